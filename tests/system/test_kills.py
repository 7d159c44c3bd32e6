"""kill -9 of one process at a time: what the launcher's rules promise is what is seen.

The rules are in `daemons/launcher/consequences.py`: in this version a vTPM or a chip that dies has
lost its PCRs, so whoever relied on them boots again.
"""

import threading

import pytest

from daemons.errors import Failure
from daemons.guest.tpm0_client import Tpm0Client
from tests.system.belongings import NV_INDEX, Belongings
from tests.system.measured_boot import boot_pcrs, sha1
from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    VTPM2,
    kill_and_wait,
    wait_until,
)

SECOND_CHAIN = (VTPM2, GUEST2)
READ_PCR_10 = bytes.fromhex("00c1 0000000e 00000015 0000000a")
MARK = b"\x42" * 20
MARKED = sha1(bytes(20) + MARK)
RESTARTS_MAX = 2


def identity(stack, *names):
    """Who somebody is: another pid or domid is another one."""
    rows = stack.rows()
    return {name: (rows[name]["pid"], rows[name]["domid"]) for name in names}


def mark(stack, *guests):
    """Extend PCR 10, so that a reset would show."""
    for guest in guests:
        with stack.tpm(guest) as tpm:
            if tpm.pcr_read(10) == bytes(20):
                tpm.extend(10, MARK)
            assert tpm.pcr_read(10) == MARKED


def pcrs(stack, guest):
    with stack.tpm(guest) as tpm:
        return {pcr: tpm.pcr_read(pcr) for pcr in (4, 5, 10)}


def fresh_boot(guest):
    return boot_pcrs(guest) | {10: bytes(20)}


def gone_on(guest):
    return boot_pcrs(guest) | {10: MARKED}


def kill(stack, *names):
    """Kill processes and wait until the launcher has others for them."""
    before = {name: stack.pid(name) for name in names}
    kill_and_wait(*before.values())
    wait_until(
        lambda: all(stack.row(name)["pid"] not in {None, before[name]} for name in names),
        f"other processes for {names}",
    )


# -- one at a time, on one stack that must heal each time ------------------------------------------


def test_killed_guest_boots_again_on_a_vtpm_that_was_reset(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    kill(running, GUEST1)
    running.until_running(*ALL)
    after = identity(running, *ALL)
    assert {name for name in ALL if after[name] != before[name]} == {GUEST1, VTPM1}
    assert after[GUEST1][1] != before[GUEST1][1], "a boot is a new domid"
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)
    row = running.row(GUEST1)
    assert row["restarts"] == 1
    assert row["last_reason"].startswith("killed by SIGKILL")
    assert running.row(VTPM1)["last_reason"] == f"reset for the start of {GUEST1}"
    assert f"last end: {row['last_reason']}" in running.vtpm("status").out


def test_killed_vtpm_never_gives_its_running_guest_clean_pcrs(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    seen = []
    with Tpm0Client(running.places.domain(GUEST1).tpm0) as program:
        # A program in the guest that reads its PCR again and again through all of it.
        reader = threading.Thread(target=read_until_lost, args=(program, seen))
        reader.start()
        wait_until(lambda: len(seen) > 5, "the program reads")
        kill(running, VTPM1)
        reader.join(30)
        assert not reader.is_alive()
    assert set(seen) == {MARKED}, "the guest that extended PCR 10 has seen it otherwise"
    running.until_running(*ALL)
    after = identity(running, *ALL)
    assert {name for name in ALL if after[name] != before[name]} == {GUEST1, VTPM1}
    assert after[GUEST1][1] != before[GUEST1][1]
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)
    assert running.row(VTPM1)["last_reason"].startswith("killed by SIGKILL")
    assert running.row(GUEST1)["last_reason"] == f"its vTPM {VTPM1} was started anew"


def read_until_lost(program, seen):
    while True:
        try:
            answer = program.exchange(READ_PCR_10)
        except Failure:
            return
        if answer[6:10] != bytes(4):
            return
        seen.append(answer[10:])


def test_killed_manager_is_a_pause_and_nothing_else(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    kill(running, MANAGER)
    running.until_running(MANAGER)
    after = identity(running, *ALL)
    assert {name for name in ALL if after[name] != before[name]} == {MANAGER}
    assert [pcrs(running, guest) for guest in (GUEST1, GUEST2)] == [
        gone_on(GUEST1),
        gone_on(GUEST2),
    ]
    assert running.row(MANAGER)["last_reason"].startswith("killed by SIGKILL")
    assert running.row(MANAGER)["status"].startswith("2 vTPMs known")


def test_permanent_change_waits_for_a_killed_manager(running):
    """A vTPM answers a permanent change only when the manager has its key: so it has to wait."""
    manager = running.pid(MANAGER)
    kill_and_wait(manager)
    with running.tpm(GUEST2) as tpm:
        # An unowned TPM whose NV memory was never locked takes this without authorization.
        tpm.nv_define_space(NV_INDEX, 8, attributes=1 << 17 | 1, owner_auth=None)
    running.until_running(*ALL, starts_after={MANAGER: manager})
    running.vtpm("reboot", GUEST2)  # with another start of its vTPM: what it has now is stored
    with running.tpm(GUEST2) as tpm:
        assert NV_INDEX.to_bytes(4, "big") in tpm.get_capability(0x0D)


def test_killed_chip_is_a_power_failure_for_all_of_the_platform(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    restarts = running.row("hwtpm")["restarts"]
    kill(running, "hwtpm")
    running.until_running(*ALL, starts_after={name: pid for name, (pid, _) in before.items()})
    after = identity(running, *ALL)
    assert all(after[name][0] != before[name][0] for name in ALL)
    assert [pcrs(running, guest) for guest in (GUEST1, GUEST2)] == [
        fresh_boot(GUEST1),
        fresh_boot(GUEST2),
    ]
    assert running.row("hwtpm")["restarts"] == restarts + 1
    assert all(
        row["last_reason"].startswith("the platform lost its power (killed by SIGKILL")
        for name, row in running.rows().items()
        if name in ALL
    )
    assert running.row(MANAGER)["status"].startswith("2 vTPMs known")


def test_killed_fork_server_is_replaced_and_nobody_else_notices(running):
    mark(running, GUEST1, GUEST2)
    before = running.pids()
    kill_and_wait(before["fork server"])
    wait_until(
        lambda: running.pids()["fork server"] not in {None, before["fork server"]},
        "a new fork server",
    )
    after = running.pids()
    assert {name for name in before if after[name] != before[name]} == {"fork server"}
    # Those that the old one started are still watched, and the new one starts the next.
    kill(running, GUEST1)
    running.until_running(*ALL)
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)


def test_reboot_of_a_guest_is_a_new_boot_of_its_vtpm_and_of_nobody_else(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    running.vtpm("reboot", GUEST1)
    after = identity(running, *ALL)
    assert {name for name in ALL if after[name] != before[name]} == {GUEST1, VTPM1}
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)


def test_paused_vtpm_is_a_pause_for_its_guest(running):
    mark(running, GUEST1)
    before = identity(running, *ALL)
    running.vtpm("pause", VTPM1)
    assert running.row(VTPM1)["state"] == "paused"
    with running.tpm(GUEST1) as tpm:
        answers = []
        reader = threading.Thread(target=lambda: answers.append(tpm.pcr_read(10)))
        reader.start()
        reader.join(0.3)  # what must not happen can only be given some time
        assert not answers
        running.vtpm("unpause", VTPM1)
        reader.join(30)
    assert answers == [MARKED]
    assert identity(running, *ALL) == before


# -- each with a stack of its own ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", [GUEST1, VTPM1, MANAGER])
def test_who_dies_again_and_again_is_given_up_with_the_reason(stack, name):
    stack.set("launcherd", f"[supervisor]\nrestarts_max = {RESTARTS_MAX}")
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    for deaths in range(1, RESTARTS_MAX + 1):
        kill(stack, name)
        stack.until_running(*FIRST_CHAIN)
        assert stack.row(name)["restarts"] >= deaths
    kill_and_wait(stack.pid(name))
    row = stack.until_state(name, "failed")
    assert f"it died {RESTARTS_MAX + 1} times in a row" in row["state"]
    assert "killed by SIGKILL" in row["state"]
    assert row["pid"] is None
    assert f"died {RESTARTS_MAX + 1} times" in stack.vtpm("list").out
    # Who stands on it waits for it and says so; nobody is dragged along.
    others = [other for other in stack.rows().values() if other["name"] != name]
    assert not any(other["state"].startswith("failed") for other in others)
    # The guest of a vTPM whose place nobody took still runs: without a TPM, not with a clean one.
    before = identity(stack, GUEST1)
    stack.vtpm("reboot", name)
    stack.until_running(*FIRST_CHAIN)
    assert (identity(stack, GUEST1) == before) == (name == MANAGER)
    assert pcrs(stack, GUEST1) == fresh_boot(GUEST1)
    things.check(stack, GUEST1)
