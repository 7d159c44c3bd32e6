"""kill -9 of one process at a time: who notices, and what it finds.

A vTPM, the manager and the chip come back as they were; a guest that is killed boots again, with
its vTPM reset. The rules are in `daemons/launcher/consequences.py`; `test_kill_anything.py` kills
under load, and several at once.
"""

import threading

import pytest

from daemons.guest.tpm0_client import Tpm0Client
from protocol.constants import CapabilityArea, Ordinal
from protocol.structures import PermanentFlags
from protocol.wire import decode
from tests.system.belongings import Belongings
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
PRESENCE_BY_COMMAND = 0x20
"""TPM_PHYSICAL_PRESENCE_CMD_ENABLE: a permanent flag, set without authorization."""


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
    assert {name for name in ALL if after[name] != before[name]} == {GUEST1}
    assert after[GUEST1][1] != before[GUEST1][1], "a boot is a new domid"
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)
    row = running.row(GUEST1)
    assert row["restarts"] == 1
    assert row["last_reason"].startswith("killed by SIGKILL")
    assert f"last end: {row['last_reason']}" in running.vtpm("status").out


def test_killed_vtpm_is_a_pause_for_a_guest_whose_connection_stays(running):
    mark(running, GUEST1, GUEST2)
    before = identity(running, *ALL)
    seen, stop = [], threading.Event()
    with Tpm0Client(running.places.domain(GUEST1).tpm0) as program:
        # A program in the guest that reads its PCR again and again through all of it.
        reader = threading.Thread(target=read_until, args=(stop, program, seen))
        reader.start()
        wait_until(lambda: len(seen) > 5, "the program reads")
        kill(running, VTPM1)
        running.until_running(VTPM1)
        so_far = len(seen)
        wait_until(lambda: len(seen) > so_far + 5, "the program reads on")
        stop.set()
        reader.join(30)
        assert not reader.is_alive()
    assert set(seen) == {MARKED}, "the guest that extended PCR 10 has seen it otherwise"
    after = identity(running, *ALL)
    assert {name for name in ALL if after[name] != before[name]} == {VTPM1}
    assert pcrs(running, GUEST1) == gone_on(GUEST1)
    assert pcrs(running, GUEST2) == gone_on(GUEST2)
    assert running.row(VTPM1)["last_reason"].startswith("killed by SIGKILL")


def read_until(stop, program, seen):
    while not stop.is_set():
        answer = program.exchange(READ_PCR_10)
        seen.append(answer[10:] if answer[6:10] == bytes(4) else answer)


def test_vtpm_without_its_journal_does_not_start_and_never_gives_clean_pcrs(running):
    """Who can kill a vTPM and take its journal away has not got clean PCRs by that."""
    mark(running, GUEST1)
    vtpm = running.places.domain(VTPM1)
    running.vtpm("pause", VTPM1)  # so that it is not back before its journal is gone
    vtpm.journal.unlink()
    kill_and_wait(running.pid(VTPM1))
    row = running.until_state(VTPM1, "failed")
    assert "cannot go on from journal" in row["state"]
    assert "it is gone" in row["state"]
    booted = identity(running, GUEST1)
    running.vtpm("reboot", VTPM1)
    running.until_running(*ALL)
    assert identity(running, GUEST1) != booted, "with clean PCRs there is a new boot"
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:300],
        lambda content: bytes(len(content)),
        lambda content: content[:150] + bytes([content[150] ^ 1]) + content[151:],
    ],
    ids=["truncated", "zeros", "one bit"],
)
def test_vtpm_with_a_damaged_journal_does_not_start(running, damage):
    mark(running, GUEST1)
    vtpm = running.places.domain(VTPM1)
    running.vtpm("pause", VTPM1)
    content = damage(vtpm.journal.read_bytes())
    with vtpm.journal.open("r+b") as file:  # the same file: not a copy of it
        file.truncate(len(content))
        file.write(content)
    kill_and_wait(running.pid(VTPM1))
    row = running.until_state(VTPM1, "failed")
    assert "cannot go on from journal" in row["state"]
    assert vtpm.journal.read_bytes() == content, "what cannot be read stays as it is"
    running.vtpm("reboot", VTPM1)
    running.until_running(*ALL)
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)


def test_older_contents_of_a_vtpm_s_journal_are_noticed_by_its_guest(running):
    """They are the very file's own, so the vTPM cannot tell; who was answered since can."""
    vtpm = running.places.domain(VTPM1)
    with running.tpm(GUEST1) as tpm:
        tpm.extend(10, MARK)
        content = vtpm.journal.read_bytes()
        before = tpm.pcr_read(10)
        assert tpm.extend(10, MARK) != before
    running.vtpm("pause", VTPM1)
    with vtpm.journal.open("r+b") as file:
        file.write(content)
    kill_and_wait(running.pid(VTPM1))
    with Tpm0Client(running.places.domain(GUEST1).tpm0) as program:
        response = program.exchange(READ_PCR_10)
    assert response[6:10] != bytes(4), "an older PCR passes for the newest"
    wait_until(lambda: "remembers less than it had answered" in running.log(GUEST1), "it is told")
    running.vtpm("reboot", GUEST1)
    running.until_running(*ALL)
    assert pcrs(running, GUEST1) == fresh_boot(GUEST1)


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
        tpm.call(Ordinal.TSC_PHYSICAL_PRESENCE, physical_presence=PRESENCE_BY_COMMAND)
    running.until_running(*ALL, starts_after={MANAGER: manager})
    running.vtpm("reboot", GUEST2)  # with another start of its vTPM: what it has now is stored
    with running.tpm(GUEST2) as tpm:
        flags = tpm.get_capability(CapabilityArea.FLAG, bytes.fromhex("00000108"))
        assert decode(PermanentFlags, flags).physical_presence_cmd_enable


def test_killed_chip_is_a_pause_and_has_the_platform_s_measurements(running):
    mark(running, GUEST1, GUEST2)
    measured = running.vtpm("pcrs", "hwtpm", "--json").out
    before = identity(running, *ALL)
    restarts = running.row("hwtpm")["restarts"]
    kill(running, "hwtpm")
    wait_until(lambda: running.row("hwtpm")["state"] == "running", "the chip is back")
    assert running.vtpm("pcrs", "hwtpm", "--json").out == measured
    assert identity(running, *ALL) == before
    assert [pcrs(running, guest) for guest in (GUEST1, GUEST2)] == [
        gone_on(GUEST1),
        gone_on(GUEST2),
    ]
    assert running.row("hwtpm")["restarts"] == restarts + 1
    # What was sealed to those measurements opens for the next manager, too.
    kill(running, MANAGER)
    running.until_running(MANAGER)
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
    assert {name for name in ALL if after[name] != before[name]} == {GUEST1}
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
@pytest.mark.parametrize("name", [GUEST1, VTPM1, MANAGER, "hwtpm"])
def test_who_is_killed_again_and_again_comes_back_each_time(stack, name):
    """The limit of restarts is for who fails by itself, not for who is killed."""
    stack.set("launcherd", f"[supervisor]\nrestarts_max = {RESTARTS_MAX}")
    stack.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    for deaths in range(1, 2 * RESTARTS_MAX + 2):
        kill(stack, name)
        stack.until_running(*FIRST_CHAIN)
        assert stack.row(name)["restarts"] == deaths
    things.check(stack, GUEST1)
