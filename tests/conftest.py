"""What holds for all tests: how chance is ruled, and that Ctrl-C can be tested.

In CI every test draws the same numbers in every run. Elsewhere Hypothesis looks for new cases each
time. With `--seed N` all that is drawn follows from N; what a failed test was drawn from is shown
with it.
"""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

LONGEST_FIRST = ("system/test_systemd", "system/test_both_ways", "differential/", "system/")
"""Below `tests`: what takes longest begins first, so that nobody works alone at the end."""
SEED = 1
"""What tests that take `seed` use where nobody gives one."""

# Deadlines measure the machine, not the code: it has two cores, and others at work on them.
settings.register_profile("here", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, help="draw all chance in the tests from this number")


def pytest_configure(config):
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # So does a shell start what it runs in the background, and all our children would have it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    seed = config.getoption("seed")
    if seed is not None:
        config.option.hypothesis_seed = seed
    settings.load_profile("ci" if seed is None and os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items):
    here = str(Path(__file__).parent)
    ends = len(LONGEST_FIRST)

    def rank(item):
        name = str(item.path).removeprefix(f"{here}/")
        return next((at for at, long in enumerate(LONGEST_FIRST) if name.startswith(long)), ends)

    items.sort(key=rank)


@pytest.fixture(scope="session")
def seed(pytestconfig):
    """The number that a test draws its chance from; give it to `random.Random`."""
    chosen = pytestconfig.getoption("seed")
    return SEED if chosen is None else chosen


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    drawn = getattr(item, "funcargs", {}).get("seed")
    if report.failed and drawn is not None:
        report.sections.append(("seed", f"run it again with --seed {drawn}"))
    return report
