"""A plan and a seed give one order, always the same."""

import itertools

import pytest

from daemons.faults.plan import parse_plan
from daemons.faults.points import NO_FAULTS, PLACES, Point, PointKind, choose_points
from daemons.faults.schedule import (
    ENDLESS_S,
    Due,
    happens,
    happens_in_turn,
    own_length_s,
    schedule,
    turn_at,
)

OFTEN = """
seed = {seed}
[[fault]]
where = "process a"
what = "kill"
every_s = 0.1
probability = 0.5
[[fault]]
where = "process b"
what = "stop"
for_s = 0.25
at_s = 1
"""


def plan_of(text):
    return parse_plan(text.encode(), "plan")


def test_the_same_seed_gives_the_same_order():
    first, again, other = (schedule(plan_of(OFTEN.format(seed=n)), 10) for n in (1, 1, 2))
    assert first == again
    assert first != other
    assert first == sorted(first)


def test_a_longer_run_begins_as_the_shorter_one():
    short, long = (schedule(plan_of(OFTEN.format(seed=3)), for_s) for for_s in (5, 10))
    assert long[: len(short)] == short


def test_each_fault_has_times_of_its_own():
    alone = "\n".join(OFTEN.splitlines()[:7])
    found = schedule(plan_of(alone.format(seed=1)), 10)
    assert found == [due for due in schedule(plan_of(OFTEN.format(seed=1)), 10) if due.number == 1]
    assert 30 < len(found) < 70


def test_a_stop_has_an_end():
    only_stop = plan_of(OFTEN.format(seed=1).replace("probability = 0.5", "probability = 0"))
    assert schedule(only_stop, 1.1) == [Due(1.0, 2), Due(1.25, 2, is_end=True)]
    assert schedule(only_stop, 0.9) == []


def test_how_long_a_run_lasts():
    assert own_length_s(plan_of(OFTEN.format(seed=1))) == ENDLESS_S
    once = '[[fault]]\nwhere = "process a"\nwhat = "kill"\nat_s = 4\n'
    assert own_length_s(plan_of(once)) == 5


def test_the_fate_of_a_message_depends_on_seed_and_number_alone():
    (fault,) = plan_of('[[fault]]\nwhere="tis"\nwhat="kill"\nprobability=0.3').faults
    fates = [[happens(fault, seed, n) for n in range(1, 1000)] for seed in (1, 1, 2)]
    assert fates[0] == fates[1] != fates[2]
    assert 250 < sum(fates[0]) < 350
    (fault,) = plan_of('[[fault]]\nwhere="tis"\nwhat="kill"\nnth=4').faults
    assert [n for n in range(1, 10) if happens(fault, 0, n)] == [4]


def test_points_are_each_operation_of_each_place():
    counted = dict(zip(PLACES[PointKind.DISK], (2, 0, 3), strict=True))
    points = choose_points(counted, None, 0)
    assert [(point.place.domain, point.nth) for point in points] == [
        ("vtpm-guest1", 1),
        ("vtpm-guest1", 2),
        ("hwtpm", 1),
        ("hwtpm", 2),
        ("hwtpm", 3),
    ]


def test_a_sample_is_drawn_by_its_seed_and_stays_in_order():
    counted = dict.fromkeys(PLACES[PointKind.ALL], 30)
    everything = list(choose_points(counted, None, 0))
    samples = [list(choose_points(counted, 7, seed)) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]
    assert all(len(sample) == 7 for sample in samples)
    assert sorted(samples[0], key=everything.index) == samples[0]


def test_the_plan_of_a_point_kills_there():
    for place in itertools.chain(*PLACES.values()):
        (fault,) = parse_plan(Point(place, 5).plan(), "point").faults
        assert (fault.where, fault.what.value, fault.nth) == (place, "kill", 5)
    assert parse_plan(NO_FAULTS, "none").faults == ()


@pytest.mark.parametrize(
    ("when", "turns"),
    [("at_s = 2", [0, 0, 1, 1, 1]), ("every_s = 0.5", [0, 2, 4, 6, 8])],
)
def test_faults_inside_a_daemon_may_have_times(when, turns):
    (fault,) = plan_of(f'[[fault]]\nwhere="tis"\nwhat="kill"\n{when}').faults
    assert [turn_at(fault, passed_s) for passed_s in (0, 1, 2, 3, 4)] == turns


def test_what_is_due_again_and_again_may_happen_by_chance():
    (fault,) = plan_of('[[fault]]\nwhere="tis"\nwhat="kill"\nevery_s=1\nprobability=0.3').faults
    fates = [[happens_in_turn(fault, seed, n) for n in range(1, 1000)] for seed in (1, 1, 2)]
    assert fates[0] == fates[1] != fates[2]
    assert 250 < sum(fates[0]) < 350
    (fault,) = plan_of('[[fault]]\nwhere="tis"\nwhat="kill"\nat_s=1').faults
    assert happens_in_turn(fault, 0, 1)


def test_a_run_with_times_only_ends_after_the_last():
    text = '[[fault]]\nwhere="tis"\nwhat="busy-chip"\nfor_s=3\nat_s=4\n'
    assert own_length_s(plan_of(text)) == 8
    assert own_length_s(plan_of(text.replace("at_s", "every_s"))) == ENDLESS_S
    assert own_length_s(plan_of(text.replace("at_s", "nth"))) == ENDLESS_S
