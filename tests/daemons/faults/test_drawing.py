"""Drawn plans: each is one that a stack takes, of what was asked for, and the same for its seed."""

import pytest

from daemons.faults.cost import Cost
from daemons.faults.drawing import FAULTS_MAX, draw_plan
from daemons.faults.plan import Kind, What, parse_plan
from daemons.faults.run import check_fits

ROLES = {
    "launcher": "domain0",
    "hwtpm": "hwtpm",
    "vtpmmgr": "manager",
    "vtpm-guest1": "vtpm",
    "vtpm-guest2": "vtpm",
    "guest1": "guest",
}
ERRORS = {What.IO_ERROR, What.DISK_FULL}
ODD = {What.DROP, What.DUPLICATE, What.CORRUPT, What.LOST_RESPONSE}
SEEDS = range(400)


def drawn(cost, roles=ROLES):
    plans = [parse_plan(draw_plan(seed, cost, roles).encode(), f"seed {seed}") for seed in SEEDS]
    for plan in plans:
        check_fits(plan, "drawn", roles)
    return plans


@pytest.mark.parametrize(
    ("cost", "never"), [(Cost.PAUSE, ERRORS | ODD), (Cost.ERROR, ODD), (Cost.ANYTHING, set())]
)
def test_every_plan_fits_its_stack_and_costs_no_more_than_asked(cost, never):
    faults = [fault for plan in drawn(cost) for fault in plan.faults]
    assert {fault.what for fault in faults} == set(What) - never
    assert {fault.kind for fault in faults} == set(Kind)
    assert {fault.where.domain for fault in faults} == set(ROLES) - {"guest1"}


def test_plans_are_short_and_have_their_seed():
    plans = drawn(Cost.PAUSE)
    assert [plan.seed for plan in plans] == [*SEEDS]
    assert {len(plan.faults) for plan in plans} == {*range(1, FAULTS_MAX + 1)}


def test_the_same_seed_draws_the_same_plan_and_another_another():
    texts = [draw_plan(seed, Cost.ERROR, ROLES) for seed in SEEDS]
    assert texts == [draw_plan(seed, Cost.ERROR, ROLES) for seed in SEEDS]
    assert len({text.partition("\n\n")[2] for text in texts}) == len(texts)


def test_a_stack_without_a_vtpm_has_plans_too():
    roles = {"launcher": "domain0", "hwtpm": "hwtpm"}
    assert {f.where.domain for plan in drawn(Cost.ANYTHING, roles) for f in plan.faults} == {*roles}
