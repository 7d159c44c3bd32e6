"""Sockets make every order of start right: a stack's units are started in each one there is.

CI draws some of them from the seed; START_ORDERS=all takes each (four minutes).
"""

from __future__ import annotations

import itertools
import os
import random

import pytest

from tests.system.systemd.installed import CHIP, GUEST1, MANAGER, TARGET, VTPM1, installed_machine
from tests.system.systemd.machine import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
UNITS = (CHIP, MANAGER, VTPM1, GUEST1)
SOCKETS = [unit.replace(".service", ".socket") for unit in UNITS]
SAMPLE = 12
ALONE = ("--no-block", "--job-mode=ignore-dependencies")


def pytest_generate_tests(metafunc):
    if "order" not in metafunc.fixturenames:
        return
    orders = list(itertools.permutations(UNITS))
    if os.environ.get("START_ORDERS") != "all":
        chosen = metafunc.config.getoption("seed")
        orders = random.Random(1 if chosen is None else chosen).sample(orders, SAMPLE)
    metafunc.parametrize("order", orders, ids=" ".join)


@pytest.fixture(scope="module")
def installed():
    """Started once, so that its users and directories are there: no order does without."""
    with installed_machine() as made:
        made.systemctl("enable", "--now", TARGET)
        made.until_active(*UNITS)
        yield made


def test_the_units_start_in_every_order(installed, order):
    installed.stop()
    installed.systemctl("reset-failed")
    installed.systemctl("start", *SOCKETS)
    for unit in order:
        installed.systemctl("start", *ALONE, unit)
    installed.systemctl("start", *ALONE, "vtpm-platform.service")
    with installed.client("guest1") as tpm:  # came early, and waits
        assert tpm.pcr_read(4) != bytes(20)
    installed.until_active(*order)
