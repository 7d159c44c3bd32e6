"""What holds for the stack whoever runs it: the launcher, or a real systemd.

Each test is run over both. They see the stack as a person does, by the `vtpm` command, and as a
program in a guest does, by tpm0.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import pytest

from protocol.return_codes import ReturnCode, TpmError
from tests.system.guest_workload import Workload
from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    VTPM2,
    ScratchStack,
    example,
    kill_and_wait,
    scratch_stack,
)
from tests.system.systemd import installed
from tests.system.systemd.installed import Installed, installed_machine
from tests.system.systemd.machine import why_not
from tpm12.client import TpmClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHIP = "hwtpm"
MARK = 11
WAIT_S = 60.0
XL_HEADING = ["Idx", "BE", "Uuid", "handle", "state", "evt-ch", "ring-ref", "BE-path"]
GAP_S = (0.05, 0.9)
AGAIN = 0.4
"""How likely a second kill falls into the recovery from the first."""
UNITS = {
    CHIP: installed.CHIP,
    MANAGER: installed.MANAGER,
    VTPM1: installed.VTPM1,
    GUEST1: installed.GUEST1,
}


class Way(Protocol):
    """A stack, however it is run."""

    def vtpm(self, *words: str) -> str:
        """Run the command, which must succeed; give what it says."""

    def refused(self, *words: str, status: int) -> str:
        """Run the command, which must fail with a status; give what it says of it."""

    def kill(self, pid: int) -> None:
        """Kill a process that `vtpm list` names."""

    def kill_now(self, names: tuple[str, ...]) -> None:
        """Kill what processes there are of these."""

    def path(self, path: str) -> Path:
        """A file of the installation."""

    def log(self, name: str) -> str:
        """What a domain has logged."""

    def tpm(self, guest: str) -> contextlib.AbstractContextManager[TpmClient]:
        """Be a program in a guest."""

    def config(self, name: str) -> str:
        """The path of a domain's file, for the command."""

    def up(self) -> None:
        """Start everything that there is."""


class ByLauncher:
    def __init__(self, stack: ScratchStack) -> None:
        self._stack = stack

    def vtpm(self, *words: str) -> str:
        return self._stack.vtpm(*words).out

    def refused(self, *words: str, status: int) -> str:
        return self._stack.vtpm(*words, status=status).err

    def kill(self, pid: int) -> None:
        kill_and_wait(pid)

    def kill_now(self, names: tuple[str, ...]) -> None:
        pids = self._stack.pids()
        kill_and_wait(*(pids[name] for name in names if name in pids))

    def path(self, path: str) -> Path:
        return Path(f"{self._stack.root}{path}")

    def log(self, name: str) -> str:
        return self._stack.log(name)

    def tpm(self, guest: str) -> contextlib.AbstractContextManager[TpmClient]:
        return self._stack.tpm(guest)

    def config(self, name: str) -> str:
        return str(example(name))

    def up(self) -> None:
        self._stack.up(*ALL)


class BySystemd:
    def __init__(self, stack: Installed) -> None:
        self._stack = stack

    def vtpm(self, *words: str) -> str:
        return self._stack.vtpm(*words)

    def refused(self, *words: str, status: int) -> str:
        return self._stack.run("vtpm", *words, status=status).stderr

    def kill(self, pid: int) -> None:
        self._stack.run("kill", "-KILL", str(pid))

    def kill_now(self, names: tuple[str, ...]) -> None:
        units = [UNITS[name] for name in names]
        # One that is just being started has no main process, which is no fault here.
        self._stack.systemctl("kill", "--kill-whom=main", "--signal=KILL", *units, status=None)

    def path(self, path: str) -> Path:
        return self._stack.machine.path(path)

    def log(self, name: str) -> str:
        return self._stack.journal("--unit", UNITS[name])

    def tpm(self, guest: str) -> contextlib.AbstractContextManager[TpmClient]:
        return self._stack.client(guest)

    def config(self, name: str) -> str:
        return f"/etc/vtpm/domains/{name}.cfg"

    def up(self) -> None:
        self._stack.vtpm("up")


@contextlib.contextmanager
def by_launcher() -> Iterator[Way]:
    with scratch_stack() as made:
        made.make_images()
        for guest in (GUEST1, GUEST2):
            made.make_boot(guest)
        yield ByLauncher(made)


@contextlib.contextmanager
def by_systemd() -> Iterator[Way]:
    with installed_machine() as made:
        made.systemctl("enable", "vtpm-stack.target")
        yield BySystemd(made)


CANNOT = pytest.mark.skipif(bool(why_not()), reason=why_not())


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(by_launcher, id="launcher"),
        pytest.param(by_systemd, id="systemd", marks=CANNOT),
    ],
)
def started(request):
    with request.param() as way:
        way.up()
        yield way


@pytest.fixture
def way(started):
    until_running(started)
    return started


def rows(way):
    return {row["name"]: row for row in json.loads(way.vtpm("list", "--json"))}


def until(is_so, what):
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.05)


def until_running(way):
    until(
        lambda: all(rows(way).get(name, {}).get("state") == "running" for name in ALL),
        "all domains running",
    )


def pids(way):
    return {name: row["pid"] for name, row in rows(way).items() if name in ALL}


def kill(way, name):
    """Kill a process and wait until there is another one for it."""

    def pid():
        if name == CHIP:
            return json.loads(way.vtpm("status", "--json"))["chip"]["pid"]
        return rows(way)[name]["pid"]

    before = pid()
    way.kill(before)
    until(lambda: pid() not in {None, before}, f"another process for {name}")
    until_running(way)


def own(tpm):
    """Own a TPM with well-known secrets, unless a test before has done so."""
    try:
        tpm.take_ownership()
    except TpmError as refused:  # TPM_ReadPubek, which an owned TPM does not answer
        if refused.code is not ReturnCode.DISABLED_CMD:
            raise


def extend(tpm):
    """Extend a PCR, so that a reset would show; give its value."""
    return tpm.extend(MARK, b"m" * 20)


# -- what is seen ----------------------------------------------------------------------------------


def test_the_listing_has_the_same_domains(way):
    seen = {name: (row["role"], row["label"], row["backends"]) for name, row in rows(way).items()}
    assert seen == {
        "Domain-0": ("domain0", "system_u:system_r:dom0_t", []),
        MANAGER: ("manager", "system_u:system_r:vtpmmgr_t", []),
        VTPM1: ("vtpm", "system_u:system_r:vtpm_t", [MANAGER]),
        "vtpm-guest2": ("vtpm", "system_u:system_r:vtpm_t", [MANAGER]),
        GUEST1: ("guest", "system_u:system_r:domU_t", [VTPM1]),
        GUEST2: ("guest", "system_u:system_r:domU_t", ["vtpm-guest2"]),
    }


def test_every_pcr_that_was_measured_is_explained(way):
    for domain in (CHIP, GUEST1):
        reports = json.loads(way.vtpm("pcrs", domain, "--json"))
        told = [row["explained"] for row in reports if row["set_by"]]
        assert told
        assert all(told)


def test_the_tree_names_every_process(way):
    tree = way.vtpm("status")
    for program in ("hwtpmd", "vtpmmgrd", "vtpmd", "guestd"):
        assert program in tree


# -- crashes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [MANAGER, VTPM1, CHIP])
def test_a_crash_below_a_guest_is_a_pause_and_nothing_else(way, name):
    before = pids(way)
    with way.tpm(GUEST1) as tpm:
        boot, marked = tpm.pcr_read(4), extend(tpm)
        kill(way, name)
        assert tpm.pcr_read(MARK) == marked
        assert tpm.pcr_read(4) == boot
        assert len(tpm.get_random(20)) == 20
    after = pids(way)
    assert {other for other in ALL if after[other] != before[other]} == {name} - {CHIP}


def test_a_killed_guest_boots_again_on_a_tpm_that_was_reset(way):
    with way.tpm(GUEST1) as tpm:
        boot = tpm.pcr_read(4)
        extend(tpm)
    kill(way, GUEST1)
    with way.tpm(GUEST1) as tpm:
        assert (tpm.pcr_read(4), tpm.pcr_read(MARK)) == (boot, bytes(20))


VICTIMS = (VTPM1, MANAGER, CHIP)
SETS = [(name,) for name in VICTIMS] + [*itertools.combinations(VICTIMS, 2), VICTIMS]


def kill_in_turns(way, workload, chance):
    """Kill sets of daemons, now and then others while these recover, and see the program go on."""
    try:
        for names in chance.sample(SETS, len(SETS)):
            way.kill_now(names)
            if chance.random() < AGAIN:
                time.sleep(chance.uniform(*GAP_S))  # any moment of a recovery will do
                way.kill_now(chance.choice(SETS))
            so_far = workload.rounds
            until(lambda so_far=so_far: workload.rounds > so_far + 1, f"a program above {names}")
    finally:
        workload.is_over.set()


def test_a_program_sees_only_a_pause_whoever_is_killed_below_it(way, seed):
    """Each daemon, pairs and all of them, more often than systemd's own limit would allow."""
    before = pids(way)
    workload = Workload(way.path(f"/run/vtpm/{GUEST1}/tpm0"), seed)
    workload.prepare()
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_in_turns, way, workload, random.Random(seed))
        workload.run(time.monotonic() + 10 * WAIT_S)
        killing.result()
    until_running(way)
    after = pids(way)
    assert {name for name in ALL if after[name] == before[name]} == {GUEST1, GUEST2, VTPM2}


# -- what people do --------------------------------------------------------------------------------


def test_a_reboot_is_a_new_domid_and_a_tpm_that_was_reset(way):
    before = rows(way)[GUEST1]["domid"]
    with way.tpm(GUEST1) as tpm:
        boot = tpm.pcr_read(4)
        extend(tpm)
    way.vtpm("reboot", GUEST1)
    assert rows(way)[GUEST1]["domid"] != before
    with way.tpm(GUEST1) as tpm:
        assert (tpm.pcr_read(4), tpm.pcr_read(MARK)) == (boot, bytes(20))


def test_a_domain_that_was_destroyed_can_be_created_again(way):
    way.vtpm("destroy", GUEST2)
    assert GUEST2 not in rows(way)
    way.vtpm("create", way.config(GUEST2))
    assert rows(way)[GUEST2]["state"] == "running"
    with way.tpm(GUEST2) as tpm:
        assert tpm.pcr_read(4) != bytes(20)


def test_what_was_sealed_is_there_after_down_and_up(way):
    with way.tpm(GUEST1) as tpm:
        boot = {pcr: tpm.pcr_read(pcr) for pcr in (4, 5)}
        own(tpm)
        sealed = tpm.seal(b"the key of my disk", release=boot)
    way.vtpm("down")
    way.up()
    until_running(way)
    with way.tpm(GUEST1) as tpm:
        assert tpm.unseal(sealed) == b"the key of my disk"


def test_a_paused_guest_stands_still_and_goes_on_as_it_was(way):
    before = pids(way)
    with way.tpm(GUEST2) as tpm:
        marked = extend(tpm)
        way.vtpm("pause", GUEST2)
        way.vtpm("pause", GUEST2)  # it is: nothing happens
        assert rows(way)[GUEST2]["state"] == "paused"
        assert "the guest is paused" in way.refused("tpm", GUEST2, "random", "8", status=69)
        way.vtpm("unpause", GUEST2)
        assert tpm.pcr_read(MARK) == marked
    until_running(way)
    assert pids(way) == before


def test_devices_are_listed_in_xl_s_columns(way):
    domids = {name: row["domid"] for name, row in rows(way).items()}
    guest, vtpm = domids[GUEST1], domids[VTPM1]
    heading, row = way.vtpm("vtpm-list", GUEST1).splitlines()
    assert heading.split() == [
        "Idx",
        "BE",
        "Uuid",
        "handle",
        "state",
        "evt-ch",
        "ring-ref",
        "BE-path",
    ]
    idx, backend, _, *others = row.split()
    assert (idx, backend) == ("0", str(vtpm))
    assert others == ["0", "4", "-1", "-1", f"/local/domain/{vtpm}/backend/vtpm/{guest}/0"]
    _, row = way.vtpm("block-list", GUEST1).splitlines()
    place = f"/local/domain/0/backend/vbd/{guest}/51712"
    assert row.split() == ["51712", "0", str(guest), "4", "-1", "-1", place]


def test_devices_of_a_running_domain_stay_as_they_are(way):
    for words in (
        ("vtpm-attach", GUEST1, f"backend={VTPM2}"),
        ("vtpm-detach", GUEST1, "0"),
        ("block-attach", GUEST1, "file:/images/guest1.img,xvdb,w"),
    ):
        said = way.refused(*words, status=1)
        assert "it is running, and domains look for their devices when they start" in said


def test_devices_of_a_domain_that_was_created_paused_may_change(way):
    way.vtpm("destroy", GUEST2)
    way.vtpm("create", "-p", way.config(GUEST2))
    assert rows(way)[GUEST2]["state"] == "paused"
    way.vtpm("vtpm-detach", GUEST2, "0")
    assert json.loads(way.vtpm("vtpm-list", GUEST2, "--json")) == []
    assert "domain 0 serves no TPM" in way.refused("vtpm-attach", GUEST2, status=1)
    way.vtpm("vtpm-attach", GUEST2, f"backend={VTPM2}")
    write_over(way.path("/images/more.img"), bytes(512))
    way.vtpm("block-attach", GUEST2, "file:/images/more.img,xvdb,r")
    assert len(json.loads(way.vtpm("block-list", GUEST2, "--json"))) == 2
    way.vtpm("unpause", GUEST2)
    assert rows(way)[GUEST2]["state"] == "running"
    with way.tpm(GUEST2) as tpm:
        assert tpm.pcr_read(4) != bytes(20)


def test_the_log_level_changes_while_everything_runs(way):
    before = pids(way)
    levels = way.path("/etc/vtpm/log-levels.toml")
    levels.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    levels.write_text(f'[levels]\n{VTPM1} = "debug"\n')
    levels.chmod(0o644)
    way.vtpm("reload")
    until(lambda: "reloaded log_level=debug" in way.log(VTPM1), "the vTPM has heard of it")
    way.vtpm("tpm", GUEST1, "random", "8")
    assert "ordinal=GET_RANDOM result=0x00000000" in way.log(VTPM1)
    levels.write_text("level = 7")
    assert "is none of error, warning, info, debug" in way.refused("reload", status=78)
    levels.unlink()
    way.vtpm("reload")
    assert pids(way) == before


@pytest.mark.skipif(not shutil.which("tcsd"), reason="TrouSerS is not installed")
def test_trousers_finds_the_tpm_of_its_guest(way):
    script = "tcsd -e -f & until tpm_version; do kill -0 $! || exit 1; done; kill $!"
    told = way.vtpm("exec", GUEST1, "--", "sh", "-c", script)
    assert len(re.findall("TPM 1.2 Version Info", told)) == 1


def test_the_doctor_finds_nothing_wrong(way):
    assert "refused" not in way.vtpm("doctor", "--all")


def test_an_image_that_is_not_the_newest_and_whole_is_refused_and_stays(way):
    image = way.path(f"/images/{VTPM2}.img")
    older = image.read_bytes()
    with way.tpm(GUEST2) as tpm:
        own(tpm)
    way.vtpm("destroy", GUEST2)
    way.vtpm("destroy", VTPM2)
    newest = image.read_bytes()
    assert newest != older
    for harmed in (bytes(byte ^ 0x55 for byte in newest), older):
        write_over(image, harmed)
        way.refused("create", way.config(VTPM2), status=65)
        assert rows(way)[VTPM2]["state"].startswith("failed")
        assert image.read_bytes() == harmed
    write_over(image, newest)
    way.vtpm("create", way.config(VTPM2))
    way.vtpm("create", way.config(GUEST2))
    with way.tpm(GUEST2) as tpm:
        assert tpm.pcr_read(4) != bytes(20)


def write_over(path, content):
    """Write into a file, which stays its owner's; make it if there is none."""
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        file.write(content)
