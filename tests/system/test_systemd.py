"""The stack under a real systemd: installed, started, hung, stopped, rebooted.

What holds under the launcher too, crashes above all, is in `test_both_ways.py`.
"""

from __future__ import annotations

import json
import re
import shutil

import pytest

from daemons.systemd_journal import message_id
from tests.system.systemd.installed import (
    CHIP,
    GUEST1,
    GUEST2,
    MANAGER,
    PAGE,
    SERVICES,
    TARGET,
    VTPM1,
    installed_machine,
)
from tests.system.systemd.machine import why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]
MARK = 10
"""A PCR of the guest that nothing but these tests extends."""


@pytest.fixture(scope="module")
def installed():
    with installed_machine() as made:
        yield made


@pytest.fixture
def stack(installed):
    """Started and well, whatever the test before has done."""
    installed.systemctl("reset-failed")
    installed.systemctl("enable", "--now", TARGET)
    installed.until_active(*SERVICES)
    return installed


def pids(stack):
    return {unit: stack.pid(unit) for unit in SERVICES}


# -- what is there after `systemctl enable --now vtpm-stack.target` --------------------------------


def test_the_target_brings_up_the_whole_stack(stack):
    rows = stack.vtpm_json("list")
    assert {row["name"]: row["state"] for row in rows} == dict.fromkeys(
        ("Domain-0", "vtpmmgr", "vtpm-guest1", "vtpm-guest2", "guest1", "guest2"), "running"
    )
    status = stack.vtpm_json("status")
    assert status["chip"]["state"] == "running"
    assert status["chip"]["is_powered"]
    assert all(row["explained"] in {True, None} for row in stack.vtpm_json("pcrs", "hwtpm"))
    failed = stack.systemctl("list-units", "--failed", "--plain", "--no-legend")
    assert failed == "", stack.journal()
    measured = stack.vtpm_json("pcrs", "guest1")
    assert [row["explained"] for row in measured if row["pcr"] in {4, 5}] == [True, True]


def commands_told_in(heading):
    """The indented lines at the end of a section of the page, without what is said beside them."""
    section = PAGE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"^ {4}(\S.*)$", section.split("```")[-1], re.MULTILINE)
    return [re.split(r" {4,}", line)[0] for line in lines]


@pytest.mark.skipif(not shutil.which("tcsd"), reason="TrouSerS is not installed")
def test_the_page_s_commands_do_what_it_says(stack):
    told = commands_told_in("From apt to a running guest")
    told += commands_told_in("When a unit does not start")
    assert len(told) > 8
    for command in told:
        if not command.startswith(("apt-get ", "make ")):
            said = stack.run("sh", "-c", command).stdout
            if "tpm_version" in command:
                assert "TPM 1.2 Version Info" in said
    stack.run("rm", "/etc/vtpm/log-levels.toml")


def test_each_unit_tells_how_it_is(stack):
    assert "2 vTPMs known" in stack.show(MANAGER, "StatusText")
    assert stack.show(VTPM1, "StatusText") == "serving"
    assert stack.show(GUEST1, "StatusText").startswith("running ")


@pytest.mark.skipif(not shutil.which("tcsd"), reason="TrouSerS is not installed")
def test_trousers_finds_the_tpm_of_its_guest(stack):
    assert stack.tpm_version("guest1")


def test_a_domain_starts_with_what_it_needs_and_nothing_else(stack):
    stack.stop()
    stack.systemctl("start", VTPM1)
    assert stack.is_active(CHIP, MANAGER, VTPM1, "vtpm-platform.service")
    assert not any(stack.is_active(unit) for unit in SERVICES if unit not in {CHIP, MANAGER, VTPM1})


def test_the_vtpm_of_a_guest_starts_and_stops_by_its_guest_s_name(stack):
    stack.stop()
    stack.systemctl("start", "vtpm@guest1.service")
    assert stack.is_active(CHIP, MANAGER, VTPM1, "vtpm-platform.service")
    assert not any(stack.is_active(unit) for unit in SERVICES if unit not in {CHIP, MANAGER, VTPM1})
    stack.systemctl("stop", "vtpm@guest1.service")
    assert not stack.is_active(VTPM1)
    assert stack.is_active(CHIP, MANAGER)


# -- who may do what -------------------------------------------------------------------------------

_CONNECT = """
import socket, sys
kind = socket.SOCK_STREAM if sys.argv[1].endswith("tpm0") else socket.SOCK_SEQPACKET
with socket.socket(socket.AF_UNIX, kind) as connection:
    connection.connect(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ("vtpm_guest2", "/run/vtpm/vtpm-guest1/ring.sock"),
        ("vtpm_guest2", "/run/vtpm/guest1/tpm0"),
        ("vtpm_guest1", "/run/vtpm/vtpmmgr/ring.sock"),
        ("vtpm_guest1", "/run/vtpm/hwtpm/tis.sock"),
        ("vtpm_vtpm-guest1", "/run/vtpm/hwtpm/tis.sock"),
        ("vtpm_vtpm-guest1", "/run/vtpm/vtpm-guest2/ring.sock"),
        ("daemon", "/run/vtpm/guest1/tpm0"),
        ("vtpm-hwtpm", "/run/vtpm/vtpmmgr/ring.sock"),
    ],
)
def test_a_stranger_does_not_reach_a_socket(stack, user, path):
    tried = stack.run("/usr/bin/python3", "-c", _CONNECT, path, as_user=user, status=None)
    assert "PermissionError" in tried.stderr


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ("vtpm_guest1", "/run/vtpm/guest1/tpm0"),
        ("vtpm-mgr", "/run/vtpm/hwtpm/tis.sock"),
    ],
)
def test_who_belongs_there_does(stack, user, path):
    stack.run("/usr/bin/python3", "-c", _CONNECT, path, as_user=user)


@pytest.mark.parametrize(
    ("user", "path"),
    [
        ("vtpm_vtpm-guest2", "/images/vtpm-guest1.img"),
        ("vtpm_guest1", "/images/guest2.img"),
        ("vtpm_guest1", "/images/vtpm-guest1.img"),
        ("vtpm-mgr", "/var/lib/vtpm/hwtpm.nv"),
        ("vtpm_guest1", "/etc/vtpm/domains/vtpmmgr.cfg"),
        ("vtpm_vtpm-guest1", "/images/vtpmmgr-stubdom.img"),
        ("daemon", "/run/vtpm/registry/guest1.json"),
    ],
)
def test_a_stranger_does_not_read_a_file(stack, user, path):
    tried = stack.run("cat", path, as_user=user, status=None)
    assert "Permission denied" in tried.stderr


def test_who_may_not_use_a_tpm_is_told_how_he_may(stack):
    words = ("vtpm", "tpm", "/run/vtpm/guest1/tpm0", "pcr-read", "4")
    said = stack.run(*words, as_user="vtpm_guest2", status=77).stderr
    assert "usermod --append --groups vtpm_guest1" in said
    assert stack.run(*words, as_user="vtpm_guest1").stdout.startswith("4 ")


def test_each_domain_has_a_user_of_its_own(stack):
    owners = {
        stack.run("stat", "--format=%u", f"/proc/{stack.pid(unit)}").stdout for unit in SERVICES
    }
    assert len(owners) == len(SERVICES)
    assert "0\n" not in owners


def test_a_daemon_sees_a_file_system_that_it_cannot_write(stack):
    inside = ["nsenter", "--target", str(stack.pid(VTPM1)), "--mount"]
    tried = stack.run(*inside, "touch", "/usr/x", "/etc/x", "/images/x", status=None)
    assert tried.stderr.count("Read-only file system") == 3


# -- crashes ---------------------------------------------------------------------------------------


def test_a_vtpm_without_its_journal_reboots_its_guest(stack):
    """What a crash costs when the volatile state is lost: never clean PCRs for a running guest."""
    before = pids(stack)
    with stack.client("guest1") as tpm:
        tpm.extend(MARK, b"m" * 20)
    stack.systemctl("stop", VTPM1)
    stack.systemctl("start", VTPM1)
    stack.until(lambda: stack.pid(GUEST1) not in {0, before[GUEST1]}, "another guestd")
    stack.until_active(*SERVICES)
    with stack.client("guest1") as tpm:
        assert tpm.pcr_read(MARK) == bytes(20)
        assert tpm.pcr_read(4) != bytes(20)
    assert stack.pid(GUEST2) == before[GUEST2]


WATCHED = """[Service]
WatchdogSec={seconds}
"""


@pytest.fixture
def watched(stack):
    """The same stack, with less patience; the order of patience stays."""
    drop_ins = {CHIP: 2, MANAGER: 6, VTPM1: 10, GUEST1: 2}
    for unit, seconds in drop_ins.items():
        name = unit.replace("vtpm-guest1", "").replace("guest1", "")
        path = f"/run/systemd/system/{name}.d/watchdog.conf"
        stack.run("mkdir", "-p", f"/run/systemd/system/{name}.d")
        stack.run("tee", path, text=WATCHED.format(seconds=seconds))
    stack.systemctl("daemon-reload")
    stack.systemctl("restart", TARGET)
    stack.until_active(*SERVICES)
    yield stack
    stack.run("sh", "-c", "rm -f /run/systemd/system/*.d/watchdog.conf")
    stack.systemctl("daemon-reload")


@pytest.mark.parametrize("unit", [CHIP, MANAGER, VTPM1, GUEST1])
def test_the_watchdog_ends_what_hangs(watched, unit):
    stopped = watched.pid(unit)
    watched.run("kill", "-STOP", str(stopped))
    watched.until(lambda: watched.pid(unit) not in {0, stopped}, "another process")
    watched.until_active(*SERVICES)
    assert "watchdog" in watched.journal("--unit", unit).lower()
    with watched.client("guest1") as tpm:
        assert tpm.pcr_read(4) != bytes(20)


def test_the_watchdog_leaves_alone_what_works(watched):
    before = pids(watched)
    for unit in (CHIP, GUEST1):
        since = int(watched.show(unit, "WatchdogTimestampMonotonic"))
        for _ in range(3):  # three pings are told in the time that it has
            last = since
            since = watched.until(
                lambda unit=unit, last=last: (
                    (now := int(watched.show(unit, "WatchdogTimestampMonotonic"))) > last and now
                ),
                "another ping",
            )
    assert pids(watched) == before


def test_the_watchdog_leaves_alone_what_is_paused(watched):
    """SIGSTOP is a hang, which the watchdog ends; a pause is not."""
    before = pids(watched)
    told = int(watched.show(GUEST1, "WatchdogTimestampMonotonic"))
    watched.vtpm("pause", "guest1")
    hung = watched.pid(GUEST2)
    watched.run("kill", "-STOP", str(hung))
    watched.until(lambda: watched.pid(GUEST2) not in {0, hung}, "another guest2: its time is over")
    assert watched.pid(GUEST1) == before[GUEST1], "it had no more time than guest2"
    watched.vtpm("unpause", "guest1")
    watched.until(
        lambda: int(watched.show(GUEST1, "WatchdogTimestampMonotonic")) > told, "another ping"
    )
    watched.until_active(*SERVICES)
    assert watched.pid(GUEST1) == before[GUEST1]
    assert watched.show(GUEST1, "WatchdogUSec") == "2s"


def test_a_manager_that_is_refused_is_not_started_again_and_again(stack):
    """Whoever waits at its socket would start it anew for ever."""
    image = "/images/vtpmmgr-stubdom.img"
    stack.stop()
    stack.run(
        "sh",
        "-c",
        f"cp {image} /root/whole && tr '\\0-\\377' '\\1-\\377\\0' < /root/whole > {image}",
    )
    stack.systemctl("start", "--no-block", TARGET)
    stack.until(lambda: stack.show(MANAGER, "ActiveState") == "failed", "the manager refused")
    starts = int(stack.show(MANAGER, "NRestarts"))
    said = stack.journal("--unit", MANAGER)
    assert "is not started again" in said
    assert not stack.is_active("vtpmmgrd.socket")
    stack.run("cp", "/root/whole", image)
    assert int(stack.show(MANAGER, "NRestarts")) == starts
    stack.systemctl("start", MANAGER)
    stack.until_active(*SERVICES)


# -- stop, start, reboot ---------------------------------------------------------------------------


def test_what_was_stored_is_there_after_a_stop_and_a_reboot(stack):
    with stack.client("guest1") as tpm:
        boot = {pcr: tpm.pcr_read(pcr) for pcr in (4, 5)}
        tpm.take_ownership(owner_auth=b"o" * 20)
        sealed = tpm.seal(b"the key of my disk", release=boot)
    for begin_again in (
        lambda: (stack.stop(), stack.systemctl("start", TARGET)),
        stack.machine.reboot,
        stack.machine.cut_power,
    ):
        begin_again()
        stack.until_active(*SERVICES)
        assert "2 vTPMs known" in stack.show(MANAGER, "StatusText"), "its vault was opened"
        with stack.client("guest1") as tpm:
            assert tpm.unseal(sealed) == b"the key of my disk"


def test_a_stopped_target_leaves_no_process_and_no_socket(stack):
    stack.stop()
    found = stack.run("find", "/run/vtpm", "-type", "s")
    assert found.stdout == ""


# -- the vtpm command ------------------------------------------------------------------------------


def test_domains_come_and_go_by_the_command(stack):
    stack.vtpm("destroy", "guest2")
    assert not stack.is_active(GUEST2)
    assert "guest2" not in {row["name"] for row in stack.vtpm_json("list")}
    config = stack.run("cat", "/etc/vtpm/domains/guest2.cfg").stdout
    stack.run("tee", "/root/guest2.cfg", text=config)
    stack.vtpm("create", "/root/guest2.cfg")
    assert stack.is_active(GUEST2)
    assert stack.vtpm("device", "guest2").strip() == "/run/vtpm/guest2/tpm0"
    before = int(stack.vtpm("domid", "guest2"))
    stack.vtpm("reboot", "guest2")
    assert int(stack.vtpm("domid", "guest2")) != before
    stack.vtpm("up", "/root/guest2.cfg")  # it is there, and stays as it is
    refused = stack.run("vtpm", "fault", "run", "/root/guest2.cfg", status=2)
    assert "vtpm up --root DIR" in refused.stderr


def test_a_guest_is_added_as_the_document_says(stack):
    stack.run("sh", "-e", "-c", GUEST3_IMAGES)
    for kind, backend in (("vtpm-guest", "vtpmmgr"), ("guest", "vtpm-guest3")):
        config = stack.run("cat", f"/etc/vtpm/domains/{kind}1.cfg").stdout
        config = config.replace(f"{kind}1", f"{kind}3").replace("vtpm-guest1", backend)
        config = config.replace("ac0a5b9e", "0c0a5b9e")
        stack.run("tee", f"/etc/vtpm/domains/{kind}3.cfg", text=config)
    stack.systemctl("daemon-reload")
    stack.systemctl("start", "vtpm-guest@guest3.service")
    with stack.client("guest3") as tpm:
        assert tpm.pcr_read(4) != bytes(20)
    stack.run("sh", "-c", "systemctl stop vtpm-guest@guest3 vtpm@vtpm-guest3")
    stack.run("sh", "-c", "rm /etc/vtpm/domains/*guest3.cfg && systemctl daemon-reload")


def test_a_unit_that_cannot_start_says_why(stack):
    stack.run("tee", "/etc/vtpm/domains/lonely.cfg", text=LONELY)
    stack.systemctl("daemon-reload")
    stack.systemctl("start", "vtpm-guest@lonely.service", status=1)
    said = stack.journal("--unit", "vtpm-guest@lonely.service")
    assert "its backend nobody has no config file" in said
    assert "its backend nobody" in stack.show("vtpm-guest@lonely.service", "StatusText")
    stack.run("rm", "/etc/vtpm/domains/lonely.cfg")
    stack.systemctl("daemon-reload")


GUEST3_IMAGES = """
dd if=/dev/zero of=/images/vtpm-guest3.img bs=1M count=2 status=none
cp /images/guest1.img /images/guest3.img
chown root: /images/guest3.img
"""
LONELY = """name="lonely"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=64
disk=["file:/images/guest1.img,xvda,w"]
vtpm=["backend=nobody"]
"""


def test_the_doctor_finds_an_installed_stack_well_up_and_down(stack):
    assert "refused" not in stack.vtpm("doctor", "--all")
    stack.stop()
    assert "refused" not in stack.vtpm("doctor", "--all")


@pytest.mark.parametrize("path", ["/run/vtpm/guest1", "/var/lib/vtpm"])
def test_the_doctor_knows_whose_directory_it_is_and_what_gives_it_back(stack, path):
    stack.run("chown", "daemon:", path)
    said = stack.run("vtpm", "doctor", status=65).stdout
    (step,) = (line.split("next:")[1] for line in said.splitlines() if "next:" in line)
    stack.run("sh", "-c", step)
    stack.until_active(*SERVICES)
    assert "refused" not in stack.vtpm("doctor")


# -- the units themselves --------------------------------------------------------------------------


def test_systemd_finds_nothing_wrong_with_the_units(stack):
    units = "/usr/local/lib/systemd/system"
    listed = stack.run("sh", "-c", f"ls {units} | grep -v @").stdout.split()
    templates = ["vtpm@vtpm-guest1", "vtpm-guest@guest1", "vtpm-setup@guest1"]
    named = [f"{name}.service" for name in templates]
    named += [f"{name}.socket" for name in templates[:2]]
    checked = stack.run("systemd-analyze", "verify", "--recursive-errors=no", *listed, *named)
    assert checked.stdout + checked.stderr == ""


def test_the_journal_knows_unit_domain_and_kind_of_an_event(stack):
    asked = ("VTPM_DOMAIN=vtpm-guest1", f"MESSAGE_ID={message_id('ring connected')}")
    told = stack.run("journalctl", "--no-pager", "-o", "json", *asked).stdout
    last = json.loads(told.splitlines()[-1])
    assert last["_SYSTEMD_UNIT"] == VTPM1
    assert last["VTPM_RING"] == "guest1/0"
    assert last["MESSAGE"].startswith("ring connected ring=guest1/0 ")
