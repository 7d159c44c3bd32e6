"""What survives a stop, and the loss of every process at once."""

import signal

import pytest

from tests.system.belongings import Belongings
from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    VTPM2,
    example,
    kill_and_wait,
    wait_until,
)

KEY_MAKING = "making"


def start(stack, *names):
    """`vtpm up`; give what it told while it worked."""
    return stack.vtpm("up", *(example(name) for name in names)).err


def booted(stack, guest):
    with stack.tpm(guest) as tpm:
        return {pcr: tpm.pcr_read(pcr) for pcr in (4, 5, 10)}


def fresh_boot(guest):
    return boot_pcrs(guest) | {10: bytes(20)}


@pytest.mark.slow
def test_down_and_up_brings_the_same_tpms_back(stack):
    assert KEY_MAKING in start(stack, *ALL)
    belongings = {guest: Belongings() for guest in (GUEST1, GUEST2)}
    for guest, things in belongings.items():
        things.put_into(stack, guest)
        with stack.tpm(guest) as tpm:
            tpm.extend(10, b"\x22" * 20)
    stack.down()
    assert not stack.traces()
    assert KEY_MAKING not in start(stack, *ALL)
    assert stack.row(MANAGER)["status"].startswith("2 vTPMs known")
    for guest, things in belongings.items():
        things.check(stack, guest)
        assert booted(stack, guest) == fresh_boot(guest)


@pytest.mark.slow
def test_every_process_killed_at_once_loses_nothing_that_was_answered(stack):
    start(stack, *ALL)
    belongings = {guest: Belongings() for guest in (GUEST1, GUEST2)}
    for guest, things in belongings.items():
        things.put_into(stack, guest)
    stack.kill_everything()
    assert stack.vtpm("list", status=69).what == "the stack is not up"
    assert KEY_MAKING not in start(stack, *ALL)
    for guest, things in belongings.items():
        things.check(stack, guest)
        assert booted(stack, guest) == fresh_boot(guest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "whose platform is being measured",
        "making the hardware TPM's endorsement key",
        "making a new vault in a blank image",
        "vtpm-guest1: making a new TPM",
    ],
)
def test_everything_killed_during_the_first_start_needs_no_help(stack, moment):
    """Keys are being made, and nobody was answered yet: the next start goes on or begins anew."""
    with stack.begin("up", *(example(name) for name in FIRST_CHAIN)) as first:
        for line in first.stderr:
            if moment in line:
                break
        else:
            pytest.fail(f"it did not tell of {moment!r}")
        stack.kill_everything()
    start(stack, *FIRST_CHAIN)
    assert booted(stack, GUEST1) == fresh_boot(GUEST1)
    things = Belongings()
    things.put_into(stack, GUEST1)
    things.check(stack, GUEST1)


def test_sigterm_stops_the_launcher_in_order(stack):
    start(stack, *FIRST_CHAIN)
    pids = stack.pids()
    kill_and_wait(pids["Domain-0"], number=signal.SIGTERM)
    wait_until(lambda: not stack.traces(), "nothing left")
    log = stack.log("launcher")
    order = [log.rindex(f"stopping {name}") for name in (GUEST1, VTPM1, MANAGER)]
    assert order == sorted(order)


def test_killed_launcher_costs_nobody_anything_and_up_takes_the_stack_over(stack):
    start(stack, *FIRST_CHAIN)
    before = stack.pids()
    kill_and_wait(before.pop("Domain-0"), before.pop("fork server"))
    # The guest never noticed.
    assert booted(stack, GUEST1) == fresh_boot(GUEST1)
    assert "the stack is not up" in stack.vtpm("list", status=69).err
    stack.up(*FIRST_CHAIN)
    assert {name: pid for name, pid in stack.pids().items() if name in before} == before
    assert booted(stack, GUEST1) == fresh_boot(GUEST1)
    assert "took its domains over" in stack.log("launcher")
    stack.down()
    assert not stack.traces()


def test_stack_whose_launcher_was_killed_is_ended_by_down(stack):
    start(stack, *FIRST_CHAIN)
    kill_and_wait(stack.pids()["Domain-0"])
    stack.down()
    assert not stack.traces()
    start(stack, *FIRST_CHAIN)
    assert booted(stack, GUEST1) == fresh_boot(GUEST1)


def test_vtpms_of_one_manager_do_not_disturb_each_other_over_a_restart(stack):
    """Only one chain is started again: the other's record stays in the manager's image."""
    start(stack, MANAGER, VTPM1, VTPM2, GUEST1)
    things = Belongings()
    things.put_into(stack, GUEST1)
    stack.down()
    start(stack, MANAGER, VTPM2, GUEST2)
    assert booted(stack, GUEST2) == fresh_boot(GUEST2)
    stack.up(VTPM1, GUEST1)
    things.check(stack, GUEST1)
