"""A whole launcher with real processes whose daemons are fakes: order, deaths, and the ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from daemons.errors import ExitCode, Failure
from tests.daemons.launcher.fake_stack import (
    DEADLINE_S,
    GUEST,
    MANAGER,
    SETTINGS,
    UUID,
    VTPM,
    create_refused,
    fake_stack,
    journals,
    kill,
    numbered,
    refused,
    started_again,
    state_letter,
)

# -- the way in and out --------------------------------------------------------------------------


def test_chain_starts_in_order_and_everything_is_told(stack):
    stack.create_chain()
    assert stack.names() == [
        *("hwtpm", "firmware", "firmware"),
        *("vtpmmgr", "vtpm-guest1", "guest1"),
    ]
    assert [entry["event"] for entry in stack.story()[1:3]] == ["power_on", "launch_manager"]
    rows = {row["name"]: row for row in stack.call("list")}
    assert list(rows) == ["Domain-0", "vtpmmgr", "vtpm-guest1", "guest1"]
    assert [row["domid"] for row in rows.values()] == [0, 1, 2, 3]
    assert {row["state"] for row in rows.values()} == {"running"}
    assert rows["guest1"]["memory"] == 1024
    assert rows["guest1"]["vif"] == ["mac=00:01:02:03:04:05,bridge=br0"]
    assert rows["guest1"]["label"] == "system_u:system_r:domU_t"
    assert rows["vtpm-guest1"]["status"] == "at work"
    status = stack.call("status")
    assert status["chip"]["state"] == "running"
    assert [row["backends"] for row in status["domains"]] == [[], ["vtpmmgr"], ["vtpm-guest1"]]
    assert all(row["pss_kib"] > 0 for row in (status["chip"], *status["domains"]))
    assert stack.call("domid", name="guest1") == 3


def test_record_has_what_backends_need(stack):
    stack.create_chain()
    _, manager, vtpm, guest = (entry["record"] for entry in stack.story("started"))
    assert (manager["role"], manager["localities"]) == ("manager", [2])
    assert (vtpm["role"], vtpm["boot_hash"]) == ("vtpm", "ab" * 20)
    assert vtpm["vtpms"] == [{"devid": 0, "backend": "vtpmmgr", "uuid": UUID, "handle": 0}]
    assert guest["role"] == "guest"
    assert guest["vtpms"][0]["backend"] == "vtpm-guest1"
    assert stack.story("started")[1]["config"] == MANAGER


def test_stop_is_in_order_and_leaves_nothing(stack):
    stack.create_chain()
    stack.create(numbered(VTPM, 2))
    stack.create(numbered(GUEST, 2))
    told: list[str] = []
    stack.call("stop", told.append)
    assert stack.launcher.wait(DEADLINE_S) == 0
    order = stack.names("stopped")
    assert set(order[:2]) == {"guest1", "guest2"}
    assert set(order[2:4]) == {"vtpm-guest1", "vtpm-guest2"}
    assert order[4:] == ["vtpmmgr", "hwtpm"]
    assert "switching the hardware TPM off" in told
    assert stack.what_is_left() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_everything_too(stack, number):
    stack.create_chain()
    stack.launcher.send_signal(number)
    assert stack.launcher.wait(DEADLINE_S) == 0
    assert stack.names("stopped") == ["guest1", "vtpm-guest1", "vtpmmgr", "hwtpm"]
    assert stack.what_is_left() == []


def test_hangup_stops_nothing(stack):
    stack.create(MANAGER)
    stack.launcher.send_signal(signal.SIGHUP)
    assert stack.row("vtpmmgr")["state"] == "running"


def test_launcher_without_domains_ends_as_clean(stack):
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_stubborn_domain_is_killed_after_its_time(stack):
    stack.behave("guest1", "stubborn")
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    assert [row["name"] for row in stack.call("list")] == ["Domain-0", "vtpmmgr", "vtpm-guest1"]
    assert not stack.places.domain("guest1").directory.exists()
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_second_launcher_of_a_root_is_refused_and_the_first_goes_on(stack):
    stack.create(MANAGER)
    second = stack.spawn_launcher()
    assert second.wait(DEADLINE_S) == ExitCode.UNAVAILABLE
    assert f"process {stack.launcher.pid} holds" in stack.launcher_log()
    assert stack.row("vtpmmgr")["state"] == "running"


def test_two_roots_do_not_touch_each_other(stack, tmp_path_factory):
    with fake_stack(tmp_path_factory.mktemp("other")) as other:
        other.start()
        stack.create_chain()
        other.create(MANAGER)
        assert other.stop() == 0
        assert stack.row("guest1")["state"] == "running"


# -- mistakes ------------------------------------------------------------------------------------


def test_missing_image_names_its_path_and_how_to_make_it(stack):
    image = stack.root / "images/vtpmmgr-stubdom.img"
    image.unlink()
    failure = create_refused(stack, MANAGER)
    assert str(image) in failure.what
    assert f"dd if=/dev/zero of={image} bs=1M count=2" in failure.next_step
    assert failure.exit_code is ExitCode.NO_INPUT
    assert [row["name"] for row in stack.call("list")] == ["Domain-0"]


@pytest.mark.parametrize("how", ["empty", "directory"])
def test_image_that_is_none_is_refused(stack, how):
    image = stack.root / "images/vtpmmgr-stubdom.img"
    image.unlink()
    if how == "empty":
        image.touch()
    else:
        image.mkdir()
    assert str(image) in create_refused(stack, MANAGER).what


def test_config_mistake_is_told_with_its_line(stack):
    assert "line 2" in str(create_refused(stack, '\nname="a" b'))


def test_guest_without_its_vtpm_is_told_what_to_create(stack):
    failure = create_refused(stack, GUEST)
    assert "no domain vtpm-guest1" in failure.why
    assert "vtpm create vtpm-guest1.cfg" in failure.next_step


def test_backend_of_the_wrong_role_is_refused(stack):
    stack.create_chain()
    failure = create_refused(stack, numbered(VTPM, 2).replace("backend=vtpmmgr", "backend=guest1"))
    assert "guest1 is a guest, not a manager" in failure.why
    failure = create_refused(
        stack, numbered(GUEST, 2).replace("backend=vtpm-guest2", "backend=vtpmmgr")
    )
    assert "vtpmmgr is a manager, not a vtpm" in failure.why


def test_backend_may_be_given_by_its_domid(stack):
    stack.create(MANAGER)
    stack.create(VTPM.replace("backend=vtpmmgr", "backend=1"))
    assert stack.row("vtpm-guest1")["backends"] == ["vtpmmgr"]


def test_vtpm_is_one_guests_only(stack):
    stack.create_chain()
    failure = create_refused(stack, GUEST.replace('"guest1"', '"other"'))
    assert "it is the TPM of guest1" in failure.why


def test_name_is_taken_only_once(stack):
    stack.create(MANAGER)
    assert "exists (domid 1, running)" in create_refused(stack, MANAGER).why


def test_second_manager_is_refused(stack):
    stack.create(MANAGER)
    failure = create_refused(stack, MANAGER.replace('"vtpmmgr"', '"other"'))
    assert "the platform has its manager: vtpmmgr" in failure.why


def test_unknown_domain_names_those_that_there_are(stack):
    for method in ("destroy", "shutdown", "reboot", "pause", "unpause", "block_list"):
        failure = refused(stack, method, domain="nobody")
        assert "Domain-0" in failure.why
    assert "'\\x1b'" in refused(stack, "domid", name="\x1b").what


# -- waiting -------------------------------------------------------------------------------------


def test_vtpm_made_before_its_manager_waits_for_it(stack):
    failure = create_refused(stack, VTPM)
    assert failure.exit_code is ExitCode.UNAVAILABLE
    assert "waits for vtpmmgr, which does not exist" in failure.why
    assert "waits for vtpmmgr" in stack.row("vtpm-guest1")["state"]
    stack.create(MANAGER)
    stack.until_state("vtpm-guest1", "running")


def test_vtpm_without_disk_waits_for_block_attach(stack):
    stack.create(MANAGER)
    text = "\n".join(line for line in VTPM.splitlines() if not line.startswith("disk"))
    assert "waits for its disk hda" in create_refused(stack, text).why
    row = stack.call(
        "block_attach",
        domain="vtpm-guest1",
        spec="backendtype=phy,backend=0,vdev=hda,access=w,target=/images/vtpm-guest1.img",
    )
    assert row["vdev"] == 768
    stack.until_state("vtpm-guest1", "running")
    assert 'disk += ["backendtype=phy' in stack.story("started")[-1]["config"]
    (disk,) = stack.call("block_list", domain="vtpm-guest1")
    assert (disk["target"], disk["access"]) == ("/images/vtpm-guest1.img", "w")


def test_platform_built_paused_gets_its_devices_before_it_runs(stack):
    bare = "\n".join(line for line in VTPM.splitlines() if not line.startswith("vtpm="))
    guest = "\n".join(line for line in GUEST.splitlines() if not line.startswith("vtpm="))
    stack.create(bare, paused=True)
    stack.create(guest, paused=True)
    assert stack.row("guest1")["state"] == "paused"
    assert stack.row("guest1")["pid"] is None
    stack.create(MANAGER)
    attached = stack.call("vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr", uuid=UUID)
    assert (attached["idx"], attached["be"], attached["uuid"]) == (0, 3, UUID)
    stack.call("vtpm_attach", domain="guest1", backend="vtpm-guest1")
    stack.call("unpause", domain="vtpm-guest1")
    stack.call("unpause", domain="guest1")
    assert stack.names("started") == ["hwtpm", "vtpmmgr", "vtpm-guest1", "guest1"]
    assert f'vtpm = ["backend=vtpmmgr,uuid={UUID}"]' in stack.story("started")[2]["config"]
    rows = stack.call("vtpm_list", domains=["vtpm-guest1", "guest1"])
    assert [(row["backend"], row["state"]) for row in rows] == [("vtpmmgr", 4), ("vtpm-guest1", 4)]
    assert rows[0]["be_path"] == "/local/domain/3/backend/vtpm/1/0"


def test_devices_of_a_running_domain_stay(stack):
    stack.create_chain()
    for method, params in (
        ("vtpm_attach", {"backend": "vtpm-guest1"}),
        ("vtpm_detach", {"devid_or_uuid": "0"}),
        ("block_attach", {"spec": "file:/images/guest2.img,xvdb,w"}),
    ):
        failure = refused(stack, method, domain="guest1", **params)
        assert "it is running" in failure.why
        assert "vtpm destroy guest1; vtpm create -p" in failure.next_step


def test_stopped_guest_takes_a_vtpm_and_boots_with_it(stack):
    stack.create_chain()
    bare = "\n".join(line for line in GUEST.splitlines() if not line.startswith("vtpm="))
    stack.call("destroy", domain="guest1")
    stack.create(bare, paused=True)
    stack.call("vtpm_attach", domain="guest1", backend="vtpm-guest1")
    stack.call("unpause", domain="guest1")
    assert stack.row("guest1")["backends"] == ["vtpm-guest1"]
    assert stack.row("guest1")["state"] == "running"


def test_vtpm_is_attached_once_and_detached_by_number_or_uuid(stack):
    stack.create(MANAGER)
    stack.create(VTPM, paused=True)
    failure = refused(stack, "vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr")
    assert f"uuid {UUID}" in failure.why
    failure = refused(stack, "vtpm_detach", domain="vtpm-guest1", devid_or_uuid="7")
    assert UUID in failure.why
    stack.call("vtpm_detach", domain="vtpm-guest1", devid_or_uuid=UUID.upper())
    assert stack.call("vtpm_list", domains=["vtpm-guest1"]) == []
    failure = refused(stack, "vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr", uuid="x")
    assert failure.exit_code is ExitCode.USAGE
    stack.call("vtpm_attach", domain="vtpm-guest1", backend="vtpmmgr")
    stack.call("vtpm_detach", domain="vtpm-guest1", devid_or_uuid="0")


# -- pages of the chip ---------------------------------------------------------------------------

PAGES = 'iomem=["fed40,5"]\n'


@pytest.mark.parametrize(("name", "text"), [("guest1", GUEST), ("vtpm-guest1", VTPM)])
def test_pages_of_the_chip_for_a_label_that_may_not_use_them_are_refused_at_once(stack, name, text):
    stack.create_chain()
    stack.call("destroy", domain=name)
    failure = create_refused(stack, text + PAGES)
    type_ = "domU_t" if name == "guest1" else "vtpm_t"
    assert f"{name} (system_u:system_r:{type_})" in failure.what
    assert "hwtpm (system_u:system_r:hwtpm_t)" in failure.what
    assert "vtpmmgr_t -> hwtpm_t" in failure.why
    assert "iomem=" in failure.next_step
    assert failure.exit_code is ExitCode.NO_PERMISSION
    assert name not in [row["name"] for row in stack.call("list")]


def test_pages_of_the_chip_go_to_who_the_policy_names(down):
    (down.root / "etc/vtpm/policy.toml").write_text(
        '[[allow]]\nfrontend="domU_t"\nbackend="hwtpm_t"\n'
        '[[allow]]\nfrontend="vtpm_t"\nbackend="vtpmmgr_t"\n'
        '[[allow]]\nfrontend="domU_t"\nbackend="vtpm_t"\n'
    )
    (down.root / "etc/vtpm/policy.toml").chmod(0o600)
    down.start()
    failure = create_refused(down, MANAGER)
    assert "vtpmmgr (system_u:system_r:vtpmmgr_t) may not use hwtpm" in failure.what
    down.create(MANAGER.replace("iomem", "#iomem"))
    down.create(VTPM)
    down.create(GUEST + PAGES)
    assert down.story("started")[-1]["record"]["localities"] == [0, 1, 2, 3, 4]


# -- what becomes of a domain that ends ------------------------------------------------------------


def test_crash_destroys_where_the_config_says_so(stack):
    stack.create_chain()
    stack.call("destroy", domain="guest1")
    stack.create(GUEST + 'on_crash="destroy"\n')
    kill(stack.row("guest1"))
    stack.until(lambda: "guest1" not in [row["name"] for row in stack.call("list")], "destroyed")
    assert not (stack.places.registry / "guest1.json").exists()
    assert not stack.places.domain("guest1").directory.exists()
    assert stack.names("started").count("guest1") == 2
    assert stack.row("vtpm-guest1")["state"] == "running"
    stack.create(GUEST)


def test_crash_while_it_is_created_is_told_before_it_destroys(stack):
    stack.behave("vtpmmgr", "fails 70")
    failure = create_refused(stack, MANAGER + 'on_crash="destroy"\n')
    assert "cannot open image: it is upside down" in failure.why
    stack.until(lambda: len(stack.call("list")) == 1, "destroyed")


def test_crash_is_preserved_where_the_config_says_so(stack):
    stack.create(MANAGER + 'on_crash="preserve"\n')
    kill(stack.row("vtpmmgr"))
    row = stack.until_state("vtpmmgr", "failed")
    assert "killed by SIGKILL" in row["state"]
    assert (row["pid"], row["restarts"]) == (None, 0)
    assert stack.call("reboot", domain="vtpmmgr")["state"] == "running"


def test_shutdown_preserves_or_restarts_where_the_config_says_so(stack):
    stack.create(MANAGER)
    stack.create(VTPM + 'on_poweroff="restart"\n')
    stack.create(GUEST + 'on_poweroff="preserve"\n')
    stack.call("shutdown", domain="guest1")
    row = stack.row("guest1")
    assert (row["state"], row["pid"]) == ("shutdown", None)
    stack.call("shutdown", domain="vtpm-guest1")
    row = stack.row("vtpm-guest1")
    assert (row["state"], row["restarts"]) == ("running", 1)
    assert row["last_reason"] == "shutdown was asked for"
    assert "shutdown" in create_refused(stack, GUEST).why
    assert stack.call("reboot", domain="guest1")["state"] == "running"
    stack.call("shutdown", domain="guest1")
    stack.call("shutdown", domain="guest1")  # it has ended before: now it goes
    assert "guest1" not in [row["name"] for row in stack.call("list")]
    assert stack.stop() == 0
    assert stack.what_is_left() == []


@pytest.mark.parametrize("action", ["destroy", "preserve"])
def test_reboot_destroys_or_preserves_where_the_config_says_so(stack, action):
    stack.create(MANAGER + f'on_reboot="{action}"\n')
    stack.call("reboot", domain="vtpmmgr")
    states = {row["name"]: row["state"] for row in stack.call("list")}
    assert states.get("vtpmmgr") == {"destroy": None, "preserve": "shutdown"}[action]
    assert stack.names("started").count("vtpmmgr") == 1


# -- what a process finds of the one before it -----------------------------------------------------


def fail_the_power(stack) -> None:
    """Let the chip find its journal damaged, so that only a power-on helps; and power it on."""
    stack.behave("hwtpm", "fails 65")
    kill(stack.chip())
    stack.until(lambda: stack.chip()["state"].startswith("failed"), "the chip refuses to start")
    stack.behave("hwtpm", "ready")
    stack.call("power_on")


def test_killed_process_leaves_its_journal_to_the_next_one(stack):
    stack.create_chain()
    for restarts in (1, 2, 3):
        kill(stack.row("vtpmmgr"))
        started_again(stack, "vtpmmgr", restarts)
    stack.call("reboot", domain="vtpmmgr")
    pids = [pid for pid, _ in journals(stack, "vtpmmgr")]
    found = [journal for _, journal in journals(stack, "vtpmmgr")]
    assert found == ["", *(str(pid) for pid in pids[:-1])]
    assert len(found) == 5
    kill(stack.row("vtpm-guest1"))
    started_again(stack, "vtpm-guest1", 1)
    (first, _), (_, found) = journals(stack, "vtpm-guest1")
    assert found == str(first)


def test_no_journal_outlives_the_power_of_the_platform(stack):
    stack.create_chain()
    kill(stack.row("vtpmmgr"))
    started_again(stack, "vtpmmgr", 1)
    fail_the_power(stack)
    started_again(stack, "guest1", 1)
    for name in ("vtpmmgr", "vtpm-guest1", "guest1"):
        assert journals(stack, name)[-1][1] == ""


def test_journal_outlives_the_reboot_of_a_guest_but_not_of_its_vtpm(stack):
    stack.create_chain()
    stack.call("reboot", domain="guest1")
    assert len(journals(stack, "vtpm-guest1")) == 1
    stack.call("reboot", domain="vtpm-guest1")
    stack.until(lambda: stack.row("guest1")["restarts"] == 2, "the guest is rebooted")
    stack.until_state("guest1", "running")
    assert [found for _, found in journals(stack, "vtpm-guest1")] == ["", ""]
    assert journals(stack, "guest1")[1][1] == ""


def test_domain_made_anew_finds_no_journal(stack):
    stack.create_chain()
    for text in (GUEST, VTPM, MANAGER):
        stack.call("destroy", domain=text.split('"')[1])
    stack.create_chain()
    assert {found for name in ("vtpmmgr", "vtpm-guest1") for _, found in journals(stack, name)} == {
        ""
    }


# -- deaths --------------------------------------------------------------------------------------


def test_dead_manager_is_started_again_alone(stack):
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    kill(before["vtpmmgr"])
    stack.until(lambda: stack.row("vtpmmgr")["restarts"] == 1, "restarted")
    row = stack.until_state("vtpmmgr", "running")
    assert row["pid"] != before["vtpmmgr"]["pid"]
    assert row["domid"] not in {entry["domid"] for entry in before.values()}
    assert row["last_reason"] == "killed by SIGKILL"
    for name in ("vtpm-guest1", "guest1"):
        assert stack.row(name)["pid"] == before[name]["pid"]


def test_dead_vtpm_is_started_again_alone(stack):
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    mark = len(stack.story())
    kill(before["vtpm-guest1"])
    started_again(stack, "vtpm-guest1", 1)
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [("vtpm-guest1", "started")]
    for name in ("guest1", "vtpmmgr"):
        assert stack.row(name)["pid"] == before[name]["pid"]


def test_vtpm_that_is_rebooted_reboots_its_guest_before_it_is_back(stack):
    stack.create_chain()
    stack.create(numbered(VTPM, 2))
    stack.create(numbered(GUEST, 2))
    before = {row["name"]: row for row in stack.call("list")}
    mark = len(stack.story())
    stack.call("reboot", domain="vtpm-guest1")
    stack.until(lambda: stack.row("guest1")["restarts"] == 1, "the guest is rebooted")
    row = stack.until_state("guest1", "running")
    assert row["last_reason"] == "its vTPM vtpm-guest1 was started anew"
    assert row["domid"] > before["guest1"]["domid"]
    # The guest is gone before its vTPM has clean PCRs, and back only after it.
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [
        ("vtpm-guest1", "stopped"),
        ("guest1", "stopped"),
        ("vtpm-guest1", "started"),
        ("guest1", "started"),
    ]
    assert stack.row("vtpm-guest1")["restarts"] == 1  # and not once more for the guest's start
    for name in ("vtpm-guest2", "guest2", "vtpmmgr"):
        assert stack.row(name)["pid"] == before[name]["pid"]


def test_dead_guest_boots_again_with_a_new_domid_on_the_vtpm_that_stands(stack):
    """By the domid its vTPM sees that it has to be reset."""
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    mark = len(stack.story())
    kill(stack.row("guest1"))
    stack.until(lambda: stack.row("guest1")["restarts"] == 1, "the guest is rebooted")
    stack.until_state("guest1", "running")
    assert stack.row("vtpm-guest1")["pid"] == before["vtpm-guest1"]["pid"]
    assert stack.row("guest1")["domid"] > before["guest1"]["domid"]
    assert stack.row("guest1")["last_reason"] == "killed by SIGKILL"
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [("guest1", "started")]


def test_vtpm_that_is_made_anew_reboots_the_guest_that_used_the_old_one(stack):
    stack.create_chain()
    stack.call("destroy", domain="vtpm-guest1")
    assert stack.row("guest1")["state"] == "running"  # it has lost its TPM, as in Xen
    stack.create(VTPM)
    stack.until(lambda: stack.row("guest1")["restarts"] == 1, "the guest is rebooted")
    stack.until_state("guest1", "running")


def test_reboot_gives_a_new_domid(stack):
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    row = stack.call("reboot", domain="guest1")
    assert row["domid"] > before["guest1"]["domid"]
    assert row["last_reason"] == "reboot was asked for"
    assert stack.row("vtpm-guest1")["pid"] == before["vtpm-guest1"]["pid"]
    first, second = [
        e["record"]["vtpms"][0]["uuid"] for e in stack.story("started") if e["name"] == "guest1"
    ]
    assert first != second  # random at each start where the config names none


def test_dead_chip_is_started_again_alone_and_not_powered_on_again(stack):
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    mark = len(stack.story())
    kill(stack.chip())
    stack.until(lambda: stack.chip()["restarts"] == 1, "the chip is back")
    assert stack.chip()["last_reason"] == "killed by SIGKILL"
    stack.until(lambda: len(stack.story()) > mark, "the chip is started")
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [("hwtpm", "started")]
    assert journals(stack, "hwtpm")[-1][1], "it finds its journal"
    for name in ("guest1", "vtpm-guest1", "vtpmmgr"):
        assert stack.row(name)["pid"] == before[name]["pid"]


def test_loss_of_power_stops_the_platform_and_brings_it_back_in_order(stack):
    stack.create_chain()
    before = {row["name"]: row for row in stack.call("list")}
    fail_the_power(stack)
    stack.until(lambda: stack.row("guest1")["restarts"] == 1, "the platform is back")
    row = stack.until_state("guest1", "running")
    assert row["last_reason"].startswith("the platform lost its power")
    assert row["domid"] > before["guest1"]["domid"]
    after = [(e["name"], e["event"]) for e in stack.story()]
    mark = after.index(("guest1", "stopped"))
    assert after[mark:] == [
        *(("guest1", "stopped"), ("vtpm-guest1", "stopped"), ("vtpmmgr", "stopped")),
        *(("hwtpm", "started"), ("firmware", "power_on"), ("firmware", "launch_manager")),
        *(("vtpmmgr", "started"), ("vtpm-guest1", "started"), ("guest1", "started")),
    ]


def test_crash_loop_ends_in_failed_with_the_reason(stack):
    stack.create(MANAGER)
    stack.behave("vtpm-guest1", "fails 70")
    failure = create_refused(stack, VTPM)
    assert "it died 4 times in a row" in failure.why
    row = stack.row("vtpm-guest1")
    assert row["state"].startswith("failed: ")
    assert "cannot open image: it is upside down" in row["state"]
    assert (row["restarts"], row["pid"]) == (3, None)
    assert stack.names("started").count("vtpm-guest1") == 4


def test_failed_domain_can_be_rebooted_or_created_again(stack):
    stack.behave("vtpmmgr", "fails 65")
    create_refused(stack, MANAGER)
    create_refused(stack, MANAGER)
    stack.behave("vtpmmgr", "ready")
    assert stack.call("reboot", domain="vtpmmgr")["state"] == "running"


def test_one_of_several_creates_takes_the_place_of_a_failed_domain(stack):
    """The others would have left processes under its name that nobody knows."""
    stack.create(MANAGER)
    stack.create(VTPM + 'on_crash="preserve"\n')
    kill(stack.row("vtpm-guest1"))
    stack.until_state("vtpm-guest1", "failed")
    mark = len(stack.story())
    create = ("create", {"config_text": VTPM, "path": "x.cfg"})
    answers = stack.call_at_once(create, create, create)
    refusals = [answer["error"] for answer in answers if "error" in answer]
    assert len(refusals) == 2
    assert all("a domain of this name exists" in error["why"] for error in refusals)
    assert [(e["name"], e["event"]) for e in stack.story()[mark:]] == [("vtpm-guest1", "started")]
    assert stack.stop() == 0
    assert stack.what_is_left() == []


def test_nothing_takes_the_place_of_a_failed_domain_while_the_stack_stops(stack):
    stack.create(MANAGER + 'on_crash="preserve"\n')
    kill(stack.row("vtpmmgr"))
    stack.until_state("vtpmmgr", "failed")
    create = ("create", {"config_text": VTPM.replace("vtpm-guest1", "vtpmmgr", 1), "path": "x"})
    created, stopped = stack.call_at_once(create, ("stop", {}))
    assert "error" in created
    assert "error" not in stopped
    assert stack.launcher.wait(DEADLINE_S) == 0
    assert stack.what_is_left() == []


def test_domain_that_is_unpaused_twice_at_once_is_started_once(stack):
    stack.create(MANAGER)
    stack.create(VTPM, paused=True)
    unpause = ("unpause", {"domain": "vtpm-guest1"})
    assert ["error" in answer for answer in stack.call_at_once(unpause, unpause)] == [False, False]
    assert stack.names("started").count("vtpm-guest1") == 1


def test_domain_that_is_unpaused_and_destroyed_at_once_is_gone(stack):
    stack.create(MANAGER)
    stack.create(VTPM, paused=True)
    unpause = ("unpause", {"domain": "vtpm-guest1"})
    stack.call_at_once(unpause, ("destroy", {"domain": "vtpm-guest1"}))
    assert [row["name"] for row in stack.call("list")] == ["Domain-0", "vtpmmgr"]
    assert stack.stop() == 0
    assert stack.what_is_left() == []


@pytest.mark.parametrize("code", [ExitCode.CONFIGURATION, ExitCode.DAMAGED, ExitCode.NO_PERMISSION])
def test_failure_that_no_restart_mends_is_told_as_the_daemon_told_it(stack, code):
    stack.behave("vtpmmgr", f"fails {int(code)} bit 7 is flipped")
    failure = create_refused(stack, MANAGER)
    assert (failure.what, failure.why) == ("cannot open image", "bit 7 is flipped")
    assert (failure.next_step, failure.exit_code) == ("turn it", code)
    assert stack.names("started").count("vtpmmgr") == 1
    assert stack.row("vtpmmgr")["state"] == "failed: cannot open image: bit 7 is flipped"


def test_create_waits_through_a_first_crash(stack):
    stack.behave("vtpmmgr", "fails_once 70")
    told: list[str] = []
    row = stack.call("create", told.append, config_text=MANAGER, path="x.cfg")
    assert (row["state"], row["restarts"]) == ("running", 1)
    assert any("upside down" in text for text in told)


def test_domain_that_is_never_ready_is_killed_in_time(stack):
    (stack.root / "etc/vtpm/launcherd.toml").write_text(
        SETTINGS.replace("start_s = 3.0", "start_s = 0.1")
    )
    stack.stop()
    stack.start()
    stack.call("power_on")
    stack.behave("vtpmmgr", "silent")
    told: list[str] = []
    with pytest.raises(Failure, match="not ready within"):
        stack.call("create", told.append, config_text=MANAGER, path="x.cfg")
    assert "thinking" in told


def test_nobody_reports_another_domain_ready(stack):
    (stack.root / "etc/vtpm/launcherd.toml").write_text(
        SETTINGS.replace("start_s = 3.0", "start_s = 0.3")
    )
    stack.stop()
    stack.start()
    stack.behave("vtpmmgr", "speaks_for_another")
    create_refused(stack, MANAGER)
    assert "a notification is from no domain" in stack.launcher_log()


def test_firmware_that_fails_is_the_failure_of_the_platform(stack):
    stack.behave("firmware", "fail")
    failure = refused(stack, "power_on")
    assert (failure.what, failure.next_step) == ("the chip refused", "mend it")
    assert "firmware failed" in stack.chip()["state"]
    (stack.root / "behave/firmware").unlink()
    stack.call("power_on")
    assert stack.chip()["state"] == "running"


def test_killed_fork_server_costs_nobody_anything(stack):
    stack.create_chain()
    before = {row["name"]: row["pid"] for row in stack.call("list")}
    os.kill(stack.call("status")["launcher"]["fork_server_pid"], signal.SIGKILL)
    stack.create(numbered(VTPM, 2))
    for name, pid in before.items():
        assert stack.row(name)["pid"] == pid
    kill(stack.row("guest1"))  # now a child of the launcher itself
    stack.until(lambda: stack.row("guest1")["restarts"] == 1, "rebooted")
    assert stack.row("guest1")["last_reason"] == "killed by SIGKILL"
    stack.until_state("guest1", "running")
    assert stack.stop() == 0
    assert stack.what_is_left() == []


# -- pause, external guests, leftovers -----------------------------------------------------------


def test_paused_domain_stands_still_and_goes_on(stack):
    stack.create_chain()
    pid = stack.row("guest1")["pid"]
    stack.call("pause", domain="guest1")
    stack.call("pause", domain="guest1")
    assert stack.row("guest1")["state"] == "paused"
    stack.until(lambda: state_letter(pid) == "T", "it stands")
    stack.call("unpause", domain="guest1")
    stack.until(lambda: state_letter(pid) == "S", "it goes on")
    stack.call("pause", domain="guest1")
    stack.call("shutdown", domain="guest1")
    assert stack.names("stopped") == ["guest1"]


def test_external_process_is_a_guest_until_it_ends(stack):
    stack.create(MANAGER)
    stack.create(VTPM)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        row = stack.call("attach_external", config_text=GUEST, pid=process.pid)
        assert (row["pid"], row["state"], row["role"]) == (process.pid, "running", "guest")
        record = json.loads((stack.places.registry / "guest1.json").read_text())
        assert record["pid"] == process.pid
        assert "not started by the launcher" in refused(stack, "pause", domain="guest1").why
        process.stdin.write(b"\n")
    stack.until(lambda: len(stack.call("list")) == 3, "it is forgotten")
    assert not (stack.places.registry / "guest1.json").exists()
    assert (
        "no such process"
        in refused(stack, "attach_external", config_text=GUEST, pid=process.pid).why
    )


def test_external_guest_loses_its_tpm_when_the_tpm_is_reset(stack):
    stack.create(MANAGER)
    stack.create(VTPM)
    stack.call("attach_external", config_text=GUEST, pid=os.getpid())
    stack.call("reboot", domain="vtpm-guest1")
    assert "guest1" not in [row["name"] for row in stack.call("list")]
