"""The main job: a trusted domain 0 from its five config files, and what a guest finds in it."""

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    COMMAND_S,
    EXAMPLES,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    KERNELS,
    MANAGER,
    VTPM1,
    VTPM2,
    example,
)

UUIDS = {
    VTPM1: "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839",
    VTPM2: "6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f",
}
MACS = {GUEST1: "00:01:02:03:04:05", GUEST2: "00:01:02:03:04:06"}
READ_PCR_4 = bytes.fromhex("00c1 0000000e 00000015 00000004")


def config_text(name):
    """The files as the platform's description gives them, word for word."""
    if name == MANAGER:
        return """name="vtpmmgr"
kernel="/usr/lib/xen/boot/vtpmmgr-stubdom.gz"
extra="tpmlocality=2"
memory=8
disk=["file:/images/vtpmmgr-stubdom.img,hda,w"]
iomem=["fed42,1"]
"""
    if name in UUIDS:
        return f"""name="{name}"
kernel="/usr/lib/xen/boot/vtpm-stubdom.gz"
extra="loglevel=debug"
memory=8
disk=["file:/images/{name}.img,hda,w"]
vtpm=["backend=vtpmmgr,uuid={UUIDS[name]}"]
"""
    return f"""name="{name}"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=1024
disk=["file:/images/{name}.img,xvda,w"]
vif=['mac={MACS[name]},bridge=br0']
vtpm=["backend=vtpm-{name}"]
"""


@pytest.mark.parametrize("name", ALL)
def test_example_config_files_are_the_platform_s_own(name):
    assert example(name).read_text() == config_text(name)
    assert {file.stem for file in EXAMPLES.glob("*.cfg")} == set(ALL)


# -- the ways in -----------------------------------------------------------------------------------


def test_create_one_by_one_brings_the_platform_up(stack):
    stack.vtpm("up")
    assert set(stack.rows()) == {"Domain-0"}
    for name in ALL:
        stack.vtpm("create", example(name))
        # Done, not begun: what was just created is ready when the command returns.
        assert stack.row(name)["state"] == "running"
    for guest in (GUEST1, GUEST2):
        with stack.tpm(guest) as tpm:
            assert {pcr: tpm.pcr_read(pcr) for pcr in (4, 5)} == boot_pcrs(guest)


def test_up_finds_the_order_whatever_the_files_are_named_in(stack):
    stack.vtpm("up", *(example(name) for name in reversed(ALL)))
    assert [row["state"] for row in stack.rows().values()] == ["running"] * (1 + len(ALL))


def test_up_again_leaves_what_runs_alone(stack):
    stack.up(*ALL[:2])
    before = stack.pids()
    stack.up(*ALL[:3])
    after = stack.pids()
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {VTPM2}


def test_up_of_several_at_once_is_up_for_each_of_them(stack):
    ups = [stack.begin("up", *(example(name) for name in FIRST_CHAIN)) for _ in range(3)]
    for up in ups:
        _, said = up.communicate(timeout=COMMAND_S)
        assert up.returncode == 0, said
    stack.until_running(*FIRST_CHAIN)


def test_root_option_is_the_same_as_the_variable(running):
    said = running.vtpm("--root", str(running.root), "domid", GUEST1, VTPM_ROOT="/nonexistent")
    assert said.out.strip() == str(running.row(GUEST1)["domid"])
    said = running.vtpm("domid", GUEST1, "--root", str(running.root), VTPM_ROOT="/nonexistent")
    assert said.out.strip() == str(running.row(GUEST1)["domid"])


# -- the tree --------------------------------------------------------------------------------------


def test_each_is_a_process_of_its_own_named_for_what_it_is(running):
    answer = json.loads(running.vtpm("status", "--json").out)
    rows = {row["name"]: row for row in [answer["launcher"], answer["chip"], *answer["domains"]]}
    titles = {name: Path(f"/proc/{row['pid']}/cmdline").read_text() for name, row in rows.items()}
    assert "daemons.launcherd" in titles.pop("Domain-0")
    expected = {"hwtpm": "hwtpmd hwtpm", MANAGER: "vtpmmgrd vtpmmgr"}
    expected |= {name: f"vtpmd {name}" for name in UUIDS}
    expected |= {name: f"guestd {name}" for name in MACS}
    assert {name: title.rstrip("\0 ") for name, title in titles.items()} == expected
    assert len({row["pid"] for row in rows.values()}) == len(rows)


def test_status_draws_each_tpm_below_the_one_it_rests_on(running):
    lines = running.vtpm("status").out.splitlines()
    depth = {}
    for line in lines:
        words = line.lstrip("│├└─ \xa0").split()
        if words and words[0] in {"Domain-0", "hwtpm", *ALL} and "running" in words:
            depth[words[0]] = len(line) - len(line.lstrip("│├└─ \xa0"))
            pid = int(words[words.index("pid") + 1])
            assert pid == running.pid(words[0])
    assert list(depth) == ["Domain-0", "hwtpm", MANAGER, VTPM1, GUEST1, VTPM2, GUEST2]
    levels = sorted(set(depth.values()))
    assert [levels.index(level) for level in depth.values()] == [0, 1, 2, 3, 4, 3, 4]


def test_status_says_that_no_configuration_is_signed(running):
    assert "no signed configuration" in running.row(MANAGER)["status"]
    assert "no signed configuration" in running.vtpm("status").out


def test_list_shows_what_the_config_files_say(running):
    rows = {row["name"]: row for row in json.loads(running.vtpm("list", "--json").out)}
    assert {name: rows[name]["memory"] for name in ALL} == {
        MANAGER: 8,
        VTPM1: 8,
        VTPM2: 8,
        GUEST1: 1024,
        GUEST2: 1024,
    }
    for guest, mac in MACS.items():
        assert mac in str(rows[guest]["vif"])
        assert "br0" in str(rows[guest]["vif"])
    for vtpm, uuid in UUIDS.items():
        assert rows[vtpm]["vtpms"] == [{"devid": 0, "backend": MANAGER, "uuid": uuid}]
    assert [row["warnings"] for row in rows.values()] == [[]] * len(rows)
    assert len({row["domid"] for row in rows.values()}) == len(rows)
    table = running.vtpm("list").out.splitlines()
    assert table[0].split() == ["Name", "ID", "Mem", "State", "PID", "Restarts", "Label"]
    assert len(table) == 2 + len(ALL)


def test_vtpm_list_and_block_list_show_the_devices(running):
    assert UUIDS[VTPM1] in running.vtpm("vtpm-list", VTPM1).out
    assert running.vtpm("vtpm-list", GUEST1).out.splitlines()[1].split()[1] == str(
        running.row(VTPM1)["domid"]
    )
    assert running.vtpm("block-list", GUEST1).out.splitlines()[1].split()[0] == "51712"  # xvda


# -- measured boot ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guest", [GUEST1, GUEST2])
def test_boot_pcrs_are_the_hashes_of_what_was_booted(running, guest):
    with running.tpm(guest) as tpm:
        values = tpm.pcr_values()
    expected = {pcr: bytes(20) for pcr in range(24)} | boot_pcrs(guest)
    assert {pcr: value for pcr, value in values.items() if pcr not in range(17, 23)} == {
        pcr: value for pcr, value in expected.items() if pcr not in range(17, 23)
    }


def test_other_kernel_gives_another_pcr_4_and_the_same_pcr_5(running):
    reports = {}
    for guest in (GUEST1, GUEST2):
        shown = json.loads(running.vtpm("pcrs", guest, "--json").out)
        reports[guest] = {row["pcr"]: row for row in shown}
        assert {pcr: bytes.fromhex(reports[guest][pcr]["value"]) for pcr in (4, 5)} == boot_pcrs(
            guest
        )
        assert all(reports[guest][pcr]["explained"] for pcr in (4, 5))
    assert KERNELS[GUEST1] != KERNELS[GUEST2]
    assert reports[GUEST1][4]["value"] != reports[GUEST2][4]["value"]
    assert reports[GUEST1][5]["value"] == reports[GUEST2][5]["value"]


def test_pcr_that_was_extended_since_says_so(running):
    with running.tpm(GUEST2) as tpm:
        tpm.extend(10, b"\x01" * 20)
    line = running.vtpm("pcrs", GUEST2).out.splitlines()[1 + 10]
    assert line.split()[:2] == ["10", line.split()[1]]
    assert line.endswith("not known")


def test_chip_s_pcrs_are_explained_by_the_event_log(running):
    rows = json.loads(running.vtpm("pcrs", "hwtpm", "--json").out)
    for pcr in (0, 17, 18, 19):
        assert rows[pcr]["explained"], f"PCR {pcr}: {rows[pcr]}"
        assert rows[pcr]["value"] not in {"00" * 20, "ff" * 20}
    assert rows[16]["value"] == "00" * 20


# -- tpm0 ------------------------------------------------------------------------------------------


def test_tpm0_is_a_private_socket_that_speaks_plain_commands(running):
    path = Path(running.vtpm("device", GUEST1).out.strip())
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(READ_PCR_4)
        # A whole response in one piece, exact bytes: as one read(2) of /dev/tpm0 gives it.
        assert client.recv(4096) == bytes.fromhex("00c4 0000001e 00000000") + boot_pcrs(GUEST1)[4]


def test_several_clients_each_get_their_own_answers(running):
    clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    try:
        for pcr, client in enumerate(clients):
            client.connect(str(running.places.domain(GUEST1).tpm0))
            client.sendall(READ_PCR_4[:-1] + bytes([pcr + 2]))
        expected = {pcr: bytes(20) for pcr in range(24)} | boot_pcrs(GUEST1)
        for pcr, client in enumerate(clients):
            assert client.recv(4096)[10:] == expected[pcr + 2]
    finally:
        for client in clients:
            client.close()


def test_exec_gives_a_program_the_guest_s_tpm(running):
    program = (
        "import os, socket\n"
        "s = socket.socket(socket.AF_UNIX)\n"
        "s.connect(os.environ['TPM_DEVICE'])\n"
        f"s.sendall(bytes.fromhex('{READ_PCR_4.hex()}')); print(s.recv(4096).hex())\n"
        "print(os.environ['TCSD_UN_SOCKET_DEVICE_PATH'], os.environ['TCSD_USE_TCP_DEVICE'])\n"
        "raise SystemExit(7)\n"
    )
    said = running.vtpm("exec", GUEST2, "--", "python3", "-c", program, status=7)
    answer, environment = said.out.splitlines()
    assert bytes.fromhex(answer)[10:] == boot_pcrs(GUEST2)[4]
    assert environment.split() == [str(running.places.domain(GUEST2).tpm0), "1"]


def test_shell_has_xl_as_its_name(running):
    with_input = 'xl list | cut -d" " -f1; test -S "$TPM_DEVICE" && echo has a TPM\n'
    script = running.root / "typed"
    script.write_text(f"#!/bin/sh\n{with_input}")
    script.chmod(0o700)
    said = running.vtpm("shell", GUEST1, SHELL=str(script))
    assert set(ALL) < set(said.out.split())
    assert said.out.splitlines()[-1] == "has a TPM"


def test_everything_below_the_root_is_private(running):
    for top in (running.places.run, running.places.state, running.places.log_dir):
        for path in [top, *top.rglob("*")]:
            status = path.lstat()
            assert not status.st_mode & 0o077, f"{path} has mode {stat.S_IMODE(status.st_mode):04o}"
            assert status.st_uid == os.geteuid()
