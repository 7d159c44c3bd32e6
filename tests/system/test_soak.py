"""A short soak, and the proof that a soak would notice. `python -m tests.soak` is the long one."""

import contextlib
import json
import random
import re
import subprocess
import sys

import pytest

from daemons.errors import Failure
from daemons.journal import Journal, read_journal
from tests.soak.trouble import one_bit_a_stretch, write_in_place
from tests.system.scratch_stack import PROJECT

pytestmark = pytest.mark.slow

PATIENCE_S = 280


def soak(log, *options):
    """Run it as anyone would."""
    return subprocess.run(
        [sys.executable, "-m", "tests.soak", "--log", log, *options],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def test_control_flipped_bits_hit_what_is_read_of_a_journal_that_has_just_begun_its_other_half(
    tmp_path, seed
):
    """So that a journal which is gone on with after that is a finding."""
    path, snapshot = tmp_path / "journal", random.Random(seed).randbytes(1200)
    journal = Journal(path, bytes(32), b"vtpm", snapshot)
    while journal.append(snapshot):
        pass
    journal.restart(snapshot)
    journal.close()
    good = path.read_bytes()
    for chance in map(random.Random, range(seed, seed + 100)):
        write_in_place(path, one_bit_a_stretch(good, chance))
        # Or it is none of this boot any more, which is refused to who has to go on.
        with contextlib.suppress(Failure):
            assert read_journal(path, bytes(32), b"vtpm") is None
    write_in_place(path, good)
    assert read_journal(path, bytes(32), b"vtpm") == [snapshot]


def test_stack_is_at_its_baseline_after_load_attack_kills_and_damage(tmp_path, seed):
    log = tmp_path / "run.jsonl"
    ended = soak(log, "--seed", str(seed), "--for", "16")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"PASSED: seed {seed}" in ended.stdout
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    events = {line["event"] for line in lines}
    assert {"kill", "damage", "refused", "moment", "end"} <= events
    figures = lines[-1]["figures"]
    assert figures["kills"] > 0
    assert figures["attacks"] > 50
    assert figures["damages refused"] > 0


@pytest.mark.parametrize(
    ("broken", "noticed"),
    [
        (["twice"], ["PCR 10 is not what was extended"]),
        (
            ["session", "connections", "file"],
            [
                r"guest2 has \[1, 2, 0\] keys, sessions and transports, not \[1, 1, 0\]",
                "guest2 has .* descriptors, not",
                "guest2 has .* threads, not",
                "a stray file in the run directory: stray",
            ],
        ),
    ],
    ids=["double execution", "leaks"],
)
def test_control_what_is_broken_on_purpose_is_noticed(tmp_path, seed, broken, noticed):
    options = [word for kind in broken for word in ("--sabotage", kind)]
    ended = soak(tmp_path / "run.jsonl", "--seed", str(seed), "--for", "4", *options)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    told = " ".join(ended.stdout.split())
    for problem in noticed:
        assert re.search(problem, told), told
