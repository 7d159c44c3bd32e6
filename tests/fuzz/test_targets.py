"""Every fuzz target takes its seeds, and every case that was ever found."""

import pytest

from tests.fuzz.targets import TARGETS, kept


@pytest.mark.parametrize("name", TARGETS)
def test_target_takes_its_seeds(name):
    target, seeds = TARGETS[name]
    count = 0
    for seed in seeds():
        target(seed)
        target(seed[: len(seed) // 2])
        count += 1
    assert count


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in TARGETS for path in kept(name)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_found_case_stays_mended(name, path):
    TARGETS[name][0](path.read_bytes())
