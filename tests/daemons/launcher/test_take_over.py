"""A launcher that was killed: the next one takes its domains over, or says why it cannot."""

from __future__ import annotations

import json
import os
import subprocess

import pytest

from daemons.errors import ExitCode
from daemons.launcher.last_domid import COUNTER_NAME, encode_count
from daemons.launcher.leftovers import end_leftovers, find_leftovers
from daemons.launcher.processes import is_alive
from daemons.listeners import served_paths, start_time_of
from daemons.places import CHIP_NAME
from tests.daemons.launcher.fake_stack import (
    DEADLINE_S,
    GUEST,
    MANAGER,
    UUID,
    VTPM,
    create_refused,
    journals,
    kill,
    numbered,
    refused,
    started_again,
    state_letter,
)


def kill_launcher(stack) -> None:
    stack.launcher.kill()
    stack.launcher.wait()


def test_killed_launcher_leaves_its_domains_serving_and_the_next_one_takes_them_over(stack):
    stack.create_chain()
    before = {row["name"]: (row["pid"], row["domid"]) for row in stack.call("list")[1:]}
    chip = stack.chip()["pid"]
    kill_launcher(stack)
    assert all(is_alive(pid, start_time_of(pid)) for pid, _ in before.values())
    mark = len(stack.story())
    stack.start()
    rows = stack.call("list")[1:]
    assert {row["name"]: (row["pid"], row["domid"]) for row in rows} == before
    assert {row["state"] for row in rows} == {"running"}
    assert stack.chip()["pid"] == chip
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [("firmware", "adopt")]
    # What it does with them is what it does with its own.
    kill(stack.row("vtpmmgr"))
    started_again(stack, "vtpmmgr", 1)
    stack.call("reboot", domain="guest1")
    assert stack.row("guest1")["domid"] > max(domid for _, domid in before.values())
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_launcher_that_ends_by_a_bug_leaves_its_domains_like_one_that_is_killed(stack):
    stack.create_chain()
    stack.create(numbered(VTPM, 2))
    before = {row["name"]: row["pid"] for row in stack.call("list")[1:]}
    chip = stack.chip()["pid"]
    stack.behave("boot_hash", "bug")
    kill(stack.row("vtpm-guest2"))  # the next start of a vTPM meets it
    assert stack.launcher.wait(DEADLINE_S) == ExitCode.BUG
    log = stack.launcher_log()
    assert "ZeroDivisionError" in log
    assert "domains go on serving without a launcher" in log
    del before["vtpm-guest2"]
    assert all(is_alive(pid, start_time_of(pid)) for pid in (chip, *before.values()))
    assert "stopped" not in [entry["event"] for entry in stack.story()]
    (stack.root / "behave/boot_hash").unlink()
    stack.start()
    stack.until_state("vtpm-guest2", "running")
    rows = {row["name"]: row["pid"] for row in stack.call("list")[1:]}
    assert {name: rows[name] for name in before} == before
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_domain_that_died_without_a_launcher_goes_on_with_the_next(stack):
    stack.create_chain()
    rows = {row["name"]: row for row in stack.call("list")}
    chip = stack.chip()
    kill_launcher(stack)
    for victim in (rows["vtpm-guest1"], rows["vtpmmgr"], chip):
        kill(victim)
    stack.start()
    stack.until(lambda: stack.row("vtpm-guest1")["state"] == "running", "it is started")
    assert journals(stack, "vtpm-guest1")[-1][1] == str(rows["vtpm-guest1"]["pid"])
    assert journals(stack, "hwtpm")[-1][1] == str(chip["pid"])
    assert stack.row("guest1")["pid"] == rows["guest1"]["pid"]
    assert "power_on" not in [e["event"] for e in stack.story()][-4:]


def test_paused_domain_is_paused_for_the_next_launcher(stack):
    stack.create_chain()
    pid = stack.row("guest1")["pid"]
    stack.call("pause", domain="guest1")
    stack.create(numbered(VTPM, 2), paused=True)
    kill_launcher(stack)
    stack.start()
    stack.until(lambda: stack.row("guest1")["state"] == "paused", "it is paused")
    stack.call("unpause", domain="guest1")
    stack.until(lambda: state_letter(pid) == "S", "it goes on")
    # One that was never started is nobody's memory.
    assert "vtpm-guest2" not in [row["name"] for row in stack.call("list")]
    stack.create(numbered(VTPM, 2))


def test_domain_that_was_waiting_is_started_by_the_next_launcher(stack):
    text = VTPM.replace("backend=vtpmmgr", "backend=other")
    failure = create_refused(stack, text)
    assert "waits for other" in failure.why
    kill_launcher(stack)
    stack.start()
    assert stack.names("stopped") == []  # there was no power yet, so nothing is taken over
    stack.create(MANAGER)
    create_refused(stack, text)
    kill_launcher(stack)
    stack.start()
    assert "waits for other" in stack.until_state("vtpm-guest1", "starting")["state"]


def test_domid_is_not_given_out_again_by_the_next_launcher(stack):
    """By it a vTPM sees that its guest boots, and resets itself."""
    stack.create_chain()
    last = stack.row("guest1")["domid"]
    stack.call("destroy", domain="guest1")
    kill_launcher(stack)
    stack.start()
    assert stack.create(GUEST)["domid"] > last
    assert stack.stop() == 0
    assert stack.what_is_left() == []  # nobody lives who knows the old ones
    stack.start()
    assert stack.create(MANAGER)["domid"] == 1


def test_domain_that_was_shut_down_and_kept_stays_down(stack):
    stack.create_chain()
    stack.create(numbered(VTPM, 2))
    stack.create(numbered(GUEST, 2) + 'on_poweroff="preserve"\n')
    stack.call("shutdown", domain="guest2")
    kill_launcher(stack)
    stack.start()
    row = stack.until_state("guest2", "shutdown")
    assert row["pid"] is None
    assert stack.names("started").count("guest2") == 1
    kill_launcher(stack)  # and another time
    stack.start()
    stack.until_state("guest2", "shutdown")
    assert stack.call("reboot", domain="guest2")["state"] == "running"
    kill_launcher(stack)
    killed = stack.story("started")[-1]
    kill(killed)
    stack.start()  # it was killed, no more
    stack.until(lambda: stack.row("guest2")["pid"] not in {None, killed["pid"]}, "it is back")


def test_domain_that_crashed_and_is_kept_is_kept_by_the_next_launcher(stack):
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    stack.create(GUEST + 'on_crash="preserve"\n')
    kill(stack.row("guest1"))
    before = stack.until_state("guest1", "failed")
    kill_launcher(stack)
    stack.start()
    assert stack.until_state("guest1", "failed")["state"] == before["state"]
    assert stack.names("started").count("guest1") == 2
    assert stack.call("reboot", domain="guest1")["state"] == "running"


def die_without_a_launcher(stack, name):
    row = stack.row(name)
    kill_launcher(stack)
    kill(row)
    stack.until(lambda: not is_alive(row["pid"], start_time_of(row["pid"]) or 0), "it is dead")
    stack.start()


@pytest.mark.parametrize(("action", "state"), [("preserve", "failed"), ("destroy", None)])
def test_crash_that_no_launcher_saw_means_what_the_config_says(stack, action, state):
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    stack.create(GUEST + f'on_crash="{action}"\n')
    die_without_a_launcher(stack, "guest1")
    states = {row["name"]: row["state"] for row in stack.call("list")}
    if state is None:
        assert "guest1" not in states
        assert not stack.places.domain("guest1").directory.exists()
    else:
        assert "while no launcher ran" in stack.until_state("guest1", state)["state"]
    assert stack.names("started").count("guest1") == 2
    assert stack.stop() == 0
    assert stack.what_is_left() == []


@pytest.mark.parametrize("action", ["preserve", "destroy"])
def test_domain_that_was_to_be_started_again_has_not_crashed(stack, action):
    """It has ended to be rebooted, and waits for its vTPM, when its launcher is killed."""
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    stack.create(GUEST + f'on_crash="{action}"\n')
    stack.call("pause", domain="vtpm-guest1")
    refused(stack, "reboot", domain="guest1")
    assert "waits for vtpm-guest1" in stack.row("guest1")["state"]
    kill_launcher(stack)
    stack.start()
    stack.until_state("vtpm-guest1", "paused")
    stack.until(lambda: "waits for vtpm-guest1" in stack.row("guest1")["state"], "it waits")
    stack.call("unpause", domain="vtpm-guest1")
    stack.until_state("guest1", "running")


def test_process_that_was_not_ready_when_its_launcher_was_killed_has_not_crashed(stack):
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    stack.behave("guest1", "silent")
    text = GUEST + 'on_crash="destroy"\n'
    with stack.sent(("create", {"config_text": text, "path": "x"})):
        stack.until(lambda: stack.names("started").count("guest1") == 2, "it is started")
        kill_launcher(stack)
    kill(stack.story("started")[-1])
    stack.behave("guest1", "ready")
    stack.start()
    stack.until_state("guest1", "running")


@pytest.mark.parametrize("launcher_hears", [True, False])
def test_process_that_is_not_ready_yet_is_taken_over_as_such(stack, launcher_hears):
    stack.create(MANAGER)
    stack.behave("vtpm-guest1", "slow")
    with stack.sent(("create", {"config_text": VTPM, "path": "x"})):
        stack.until(lambda: stack.names("started").count("vtpm-guest1") == 1, "it is started")
        kill_launcher(stack)
    pid = stack.story("started")[-1]["pid"]
    if not launcher_hears:
        stack.behave("vtpm-guest1", "ready")
        socket = stack.root / "run/vtpm/vtpm-guest1/ring.sock"
        stack.until(lambda: str(socket) in served_paths(), "it serves, and nobody hears of it")
    stack.start()
    if launcher_hears:
        stack.until_state("vtpm-guest1", "starting")
        assert not (stack.root / "run/vtpm/vtpm-guest1/ready").exists()
        stack.behave("vtpm-guest1", "ready")
    stack.until_state("vtpm-guest1", "running")
    assert stack.row("vtpm-guest1")["pid"] == pid
    stack.until((stack.root / "run/vtpm/vtpm-guest1/ready").exists, "it is noted")


BARE_VTPM = "\n".join(line for line in VTPM.splitlines() if not line.startswith("disk="))
DISK = "file:/images/vtpm-guest1.img,hda,w"


def test_devices_that_were_attached_are_there_for_the_next_launcher(stack):
    stack.create(MANAGER)
    create_refused(stack, BARE_VTPM.replace("backend=vtpmmgr", "backend=other"))
    stack.call("vtpm_detach", domain="vtpm-guest1", devid_or_uuid="0")
    stack.call("block_attach", domain="vtpm-guest1", spec=DISK)  # and waits for its manager
    kill_launcher(stack)
    stack.start()
    (disk,) = stack.call("block_list", domain="vtpm-guest1")
    assert disk["target"] == "/images/vtpm-guest1.img"
    assert stack.call("vtpm_list", domains=["vtpm-guest1"]) == []
    stack.call("vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr", uuid=UUID)
    stack.until_state("vtpm-guest1", "running")
    assert uuid_of(stack, "vtpm-guest1") == UUID


def test_domain_that_was_unpaused_and_waits_is_taken_over(stack):
    stack.create(MANAGER)
    stack.create(BARE_VTPM, paused=True)
    refused(stack, "unpause", domain="vtpm-guest1")
    kill_launcher(stack)
    stack.start()
    stack.call("block_attach", domain="vtpm-guest1", spec=DISK)
    stack.until_state("vtpm-guest1", "running")


def test_disk_that_cannot_be_written_down_is_not_attached(stack):
    stack.create(MANAGER)
    create_refused(stack, BARE_VTPM)
    begun = stack.places.domain("vtpm-guest1").config.with_name("domain.cfg.new")
    begun.mkdir()  # as good as a full disk
    failure = refused(stack, "block_attach", domain="vtpm-guest1", spec=DISK)
    assert "vtpm-guest1" in failure.what
    assert stack.call("block_list", domain="vtpm-guest1") == []
    begun.rmdir()
    stack.call("block_attach", domain="vtpm-guest1", spec=DISK)
    stack.until_state("vtpm-guest1", "running")


def test_failed_domain_that_got_a_device_has_a_new_domid_with_the_next_launcher(stack):
    """Its domid was used: its vTPM would take the next boot for the one before."""
    stack.create_chain()
    stack.behave("guest1", "fails 65")
    kill(stack.row("guest1"))
    domid = stack.until_state("guest1", "failed")["domid"]
    stack.call("block_attach", domain="guest1", spec="file:/images/guest2.img,xvdb,w")
    stack.behave("guest1", "ready")
    kill_launcher(stack)
    stack.start()
    assert stack.until_state("guest1", "running")["domid"] > domid


def uuid_of(stack, name):
    (row,) = stack.call("vtpm_list", domains=[name])
    return row["uuid"]


def test_uuid_that_was_attached_is_no_random_one_for_the_next_launcher(stack):
    """A vTPM with another uuid is another vTPM to its manager."""
    stack.create(MANAGER)
    stack.create(VTPM.replace(f",uuid={UUID}", ""), paused=True)
    stack.call("vtpm_detach", domain="vtpm-guest1", devid_or_uuid="0")
    stack.call("vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr", uuid=UUID)
    stack.call("unpause", domain="vtpm-guest1")
    kill_launcher(stack)
    stack.start()
    stack.call("reboot", domain="vtpm-guest1")
    assert uuid_of(stack, "vtpm-guest1") == UUID


def test_random_uuid_stays_random_for_the_next_launcher(stack):
    """Also where another device with a uuid of its own was taken away or added."""
    stack.create(MANAGER)
    stack.create(VTPM, paused=True)
    stack.call("vtpm_detach", domain="vtpm-guest1", devid_or_uuid="0")
    stack.call("vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr")
    stack.call("unpause", domain="vtpm-guest1")
    first = uuid_of(stack, "vtpm-guest1")
    assert first != UUID
    kill_launcher(stack)
    stack.start()
    assert uuid_of(stack, "vtpm-guest1") == first
    stack.call("reboot", domain="vtpm-guest1")
    assert uuid_of(stack, "vtpm-guest1") not in {first, UUID}


def test_manager_is_measured_as_it_was_by_the_next_launcher(stack):
    """Else its vault key would stay sealed to what it was before its launcher was killed."""
    create_refused(stack, "\n".join(s for s in MANAGER.splitlines() if "disk=" not in s))
    spec = "file:/images/vtpmmgr-stubdom.img,hda,w"
    stack.call("block_attach", domain="vtpmmgr", spec=spec)
    stack.until_state("vtpmmgr", "running")
    kill_launcher(stack)
    stack.start()
    kill(stack.row("vtpmmgr"))
    started_again(stack, "vtpmmgr", 1)
    first, second = [e["config"] for e in stack.story("launch_manager")]
    assert first == second
    assert spec in first


def test_stack_whose_machine_was_booted_since_is_not_taken_over(stack):
    stack.create_chain()
    rows = stack.call("list")[1:]
    kill_launcher(stack)
    (stack.places.run / "powered").write_text("00" * 16)
    for row in rows:  # no process outlives a boot; the chip stays, to show that it is ended
        kill(row)
    stack.start()
    assert [row["name"] for row in stack.call("list")] == ["Domain-0"]
    assert stack.names("stopped") == ["hwtpm"]


def mark_gone(stack):
    (stack.places.run / "powered").unlink()


def mark_zeroed(stack):
    (stack.places.run / "powered").write_bytes(bytes(32))


def mark_that_is_a_fifo(stack):
    mark_gone(stack)
    os.mkfifo(stack.places.run / "powered", 0o600)


def wish_noted_wrong(stack):
    (stack.places.domain("guest1").directory / "wish").write_text("preserve\n")


def wish_that_is_a_fifo(stack):
    os.mkfifo(stack.places.domain("guest1").directory / "wish", 0o600)


def config_gone(stack):
    stack.places.domain("vtpm-guest1").config.unlink()


def config_of_another(stack):
    path = stack.places.domain("vtpm-guest1").config
    path.write_text(numbered(VTPM, 2))


def config_cut_short(stack):
    path = stack.places.domain("vtpm-guest1").config
    path.write_text(path.read_text()[:40])


def config_that_is_a_fifo(stack):
    config_gone(stack)
    os.mkfifo(stack.places.domain("vtpm-guest1").config, 0o600)


def record_older(stack, name="vtpm-guest1"):
    """As a copy from before its last start has it."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    path = stack.places.registry / f"{name}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"pid": ended.pid, "start_time": 1}))


def record_of_the_chip_older(stack):
    record_older(stack, CHIP_NAME)


def record_gone(stack):
    (stack.places.registry / "vtpm-guest1.json").unlink()


def record_of_the_chip_gone(stack):
    (stack.places.registry / f"{CHIP_NAME}.json").unlink()


def counter_of_domids_gone(stack):
    (stack.places.registry / COUNTER_NAME).unlink()


def counter_of_domids_zeroed(stack):
    (stack.places.registry / COUNTER_NAME).write_bytes(bytes(4))


def counter_of_domids_older(stack):
    (stack.places.registry / COUNTER_NAME).write_bytes(encode_count(1))


def counter_of_domids_that_is_a_fifo(stack):
    counter_of_domids_gone(stack)
    os.mkfifo(stack.places.registry / COUNTER_NAME, 0o600)


@pytest.mark.parametrize(
    "damage",
    [
        counter_of_domids_gone,
        counter_of_domids_zeroed,
        counter_of_domids_older,
        counter_of_domids_that_is_a_fifo,
        record_older,
        record_of_the_chip_older,
        record_gone,
        record_of_the_chip_gone,
        mark_gone,
        mark_zeroed,
        mark_that_is_a_fifo,
        wish_noted_wrong,
        wish_that_is_a_fifo,
        config_gone,
        config_of_another,
        config_cut_short,
        config_that_is_a_fifo,
    ],
    ids=lambda damage: damage.__name__,
)
def test_launcher_that_cannot_take_over_says_why_and_disturbs_nobody(stack, damage):
    """Neither may another's config be believed, nor all be ended because a mark is damaged."""
    stack.create_chain()
    alive = {
        row["pid"]: start_time_of(row["pid"]) for row in [*stack.call("list")[1:], stack.chip()]
    }
    kill_launcher(stack)
    damage(stack)
    launcher = stack.spawn_launcher()
    assert launcher.wait(DEADLINE_S) in {ExitCode.DAMAGED, ExitCode.CONFIGURATION}
    said = stack.launcher_log()
    assert str(stack.places.run) in said
    assert "next_step=" in said
    assert all(is_alive(pid, start_time) for pid, start_time in alive.items())
    end_leftovers(stack.places)
    stack.until(lambda: stack.what_is_left() == [], "everything can be ended in order")


def test_stack_without_a_launcher_can_be_ended(stack):
    stack.create_chain()
    kill_launcher(stack)
    found = find_leftovers(stack.places)
    assert [record.name for record in found] == ["guest1", "vtpm-guest1", "vtpmmgr", "hwtpm"]
    end_leftovers(stack.places)
    assert stack.names("stopped") == ["guest1", "vtpm-guest1", "vtpmmgr", "hwtpm"]
    stack.until(lambda: stack.what_is_left() == [], "everything is gone")
    stack.start()
    assert [row["name"] for row in stack.call("list")] == ["Domain-0"]
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_launcher_that_cannot_start_says_why(down):
    (down.root / "etc/vtpm/launcherd.toml").write_text("colour = 3\n")
    launcher = down.spawn_launcher()
    assert launcher.wait(DEADLINE_S) == ExitCode.CONFIGURATION
    assert "colour" in down.launcher_log()
