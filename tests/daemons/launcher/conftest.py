"""A launcher whose daemons are fakes, for each test that asks for one."""

import pytest

from tests.daemons.launcher.fake_stack import fake_stack


@pytest.fixture
def stack(tmp_path):
    with fake_stack(tmp_path) as stack:
        stack.start()
        yield stack


@pytest.fixture
def down(tmp_path):
    with fake_stack(tmp_path) as stack:
        yield stack
