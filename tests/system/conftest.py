"""Real processes: a stack per test, or one per module for tests that leave it as it was.

When a test fails, the logs of its stack are shown with it.
"""

from __future__ import annotations

import pytest

from tests.system.scratch_stack import ALL, GUEST1, GUEST2, ScratchStack, scratch_stack

LOG_TAIL_CHARS = 6000


@pytest.fixture
def stack():
    """An installation of this test's own: blank images, bootable guests, nothing started."""
    with scratch_stack() as made:
        made.make_images()
        for guest in (GUEST1, GUEST2):
            made.make_boot(guest)
        yield made


@pytest.fixture(scope="module")
def running():
    """A whole platform for tests that leave it running, as it was; shared by a module."""
    with scratch_stack() as made:
        made.make_images()
        for guest in (GUEST1, GUEST2):
            made.make_boot(guest)
        made.up(*ALL)
        yield made


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and call.when != "teardown":
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, ScratchStack):
                for log in sorted(value.places.log_dir.glob("*.log")):
                    tail = log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
                    report.sections.append((f"log of {log.stem}", tail))
    return report
