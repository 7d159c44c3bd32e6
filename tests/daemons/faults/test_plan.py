"""A fault plan says what it means, or is refused with the place and what is allowed."""

import re
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.faults.plan import PLAN_BYTES_MAX, Kind, Place, PlanError, What, parse_plan

ROOT = Path(__file__).parents[3]
KILL = '[[fault]]\nwhere = "process vtpm-guest1"\nwhat = "kill"\nat_s = 1\n'


def test_everything_a_plan_can_say():
    plan = parse_plan(
        b"""
        seed = 9
        [[fault]]
        where = "process launcher"
        what = "stop"
        for_s = 0.5
        every_s = 2
        probability = 0.25
        [[fault]]
        where = "ring vtpm-guest1"
        what = "lost-response"
        nth = 7
        [[fault]]
        where = "tis"
        what = "delay"
        for_s = 1
        probability = 0.5
        [[fault]]
        where = "disk hwtpm"
        what = "torn-write"
        nth = 1
        [[fault]]
        where = "tis"
        what = "busy-chip"
        for_s = 2
        every_s = 3
        [[fault]]
        where = "tis"
        what = "seized-locality"
        for_s = 0.1
        at_s = 4
        [[fault]]
        where = "clock"
        what = "jump"
        by_s = -60
        at_s = 1
        [[fault]]
        where = "clock vtpm-guest1"
        what = "drift"
        speed = 0.5
        for_s = 10
        probability = 1
        """,
        "plan",
    )
    stop, lost, delay, torn, busy, seized, jump, drift = plan.faults
    assert plan.seed == 9
    assert (stop.kind, stop.what, stop.for_s) == (Kind.PROCESS, What.STOP, 0.5)
    assert (stop.every_s, stop.probability, stop.nth, stop.at_s) == (2, 0.25, None, None)
    assert (lost.where, lost.nth) == (Place("ring", "vtpm-guest1"), 7)
    assert (str(delay.where), delay.where.domain, delay.probability) == ("tis", "hwtpm", 0.5)
    assert (str(torn.where), torn.number) == ("disk hwtpm", 4)
    assert (busy.what, busy.for_s, busy.every_s, busy.probability) == (What.BUSY_CHIP, 2, 3, 1)
    assert (seized.what, seized.at_s) == (What.SEIZED_LOCALITY, 4)
    assert (str(jump.where), jump.by_s, jump.is_timed) == ("clock", -60, True)
    assert (drift.speed, drift.for_s, drift.is_timed) == (0.5, 10, False)
    assert plan.of_processes == (stop,)
    assert plan.inside("hwtpm") == (delay, torn, busy, seized, jump)
    assert plan.inside("vtpm-guest1") == (lost, jump, drift)


def test_a_plan_may_be_empty():
    assert parse_plan(b"", "plan").faults == ()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("seed = -1", r"seed in the file \(line 1\)"),
        ("sede = 1", r"unknown key 'sede' \(line 1\): seed, fault"),
        ("seed = ]", "line 1"),
        (
            KILL + "\n" + KILL + "who = 1\n",
            r"\[\[fault\]\] number 2 has an unknown key 'who' \(line",
        ),
        (KILL.replace("kill", "maim"), "what = 'maim' in .* number 1 .* at a process: kill, stop"),
        (KILL.replace("kill", "io-error"), "not possible at a process"),
        (KILL.replace("process", "cloak"), 'is no place: "process DOMAIN"'),
        (KILL.replace("process", "clock"), "not possible at a clock: jump, stop, drift"),
        (KILL.replace("process", "clock").replace("kill", "jump"), "has no by_s"),
        (KILL.replace("process", "clock").replace("kill", "drift") + "for_s=1", "has no speed"),
        (KILL.replace("process", "clock").replace("kill", "stop"), "has no for_s"),
        (KILL.replace("kill", "busy-chip"), "not possible at a process"),
        (KILL.replace(" vtpm-guest1", ""), "cannot be the name of a domain"),
        (KILL.replace("vtpm-guest1", "../x"), "cannot be the name of a domain"),
        (KILL.replace("at_s = 1", ""), "one of at_s and every_s"),
        (KILL + "every_s = 1\n", "one of at_s and every_s"),
        (KILL.replace("at_s = 1", "nth = 1"), "one of at_s and every_s"),
        (KILL.replace("at_s = 1", "every_s = 0"), "every_s .* is not a number from 0.01"),
        (KILL + "probability = 0.5\n", "unknown key 'probability'"),
        (KILL.replace("process", "ring").replace("at_s = 1", ""), "one of nth, probability, at_s"),
        (KILL.replace("process", "ring") + "nth = 1\n", "unknown key 'nth'"),
        (KILL.replace("process", "ring").replace("at_s", "probability") + "nth=2\n", "one of nth"),
        (KILL.replace("kill", "stop"), "has no for_s"),
        (KILL.replace("kill", "stop") + "for_s = 61\n", "for_s .* from 0.001 to 60"),
        (KILL + "for_s = 1\n", "unknown key 'for_s'"),
        ("[fault]\n", r"write \[\[fault\]\]"),
        ("#" * (PLAN_BYTES_MAX + 1), "more than"),
    ],
)
def test_what_is_not_understood_is_refused(text, why):
    with pytest.raises(PlanError) as refused:
        parse_plan(text.encode(), "my.toml")
    assert refused.value.what == "the fault plan my.toml is refused"
    assert re.search(why, refused.value.why), refused.value.why
    assert refused.value.exit_code is ExitCode.CONFIGURATION


def test_the_line_is_that_of_the_table_that_is_wrong():
    text = "seed = 1\n" + KILL + KILL.replace("at_s = 1", "at_s = -1")
    with pytest.raises(PlanError, match=r"at_s in \[\[fault\]\] number 2 \(line 9\)"):
        parse_plan(text.encode(), "plan")


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (KILL.replace("process", "place"), 7),
        (KILL.replace("kill", "drop"), 8),
        (KILL.replace("kill", "stop"), 8),
        (KILL.replace("at_s = 1", ""), 8),
    ],
    ids=["where", "what", "no for_s", "no time"],
)
def test_whatever_is_wrong_has_a_line(second, line):
    with pytest.raises(PlanError, match=rf"number 2 \(line {line}\)"):
        parse_plan(f"seed = 1\n{KILL}{second}".encode(), "plan")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples/faults").glob("*.toml")), ids=lambda path: path.name
)
def test_examples_are_plans(path):
    assert parse_plan(path.read_bytes(), path.name).faults


def test_plans_in_the_documents_are_plans():
    text = (ROOT / "docs/faults.md").read_text()
    blocks = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    for block in blocks:
        assert parse_plan(block.encode(), "docs/faults.md").faults
