"""What holds for the stack whoever runs it: the launcher, or a real systemd.

Each test is run over both. They see the stack as a person does, by the `vtpm` command, and as a
program in a guest does, by tpm0.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Protocol

import pytest

from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    ScratchStack,
    example,
    kill_and_wait,
    scratch_stack,
)
from tests.system.systemd.installed import Installed, installed_machine
from tests.system.systemd.machine import why_not
from tpm12.client import TpmClient

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CHIP = "hwtpm"
MARK = 11
WAIT_S = 60.0
OWNER = b"o" * 20


class Way(Protocol):
    """A stack, however it is run."""

    def vtpm(self, *words: str) -> str:
        """Run the command, which must succeed; give what it says."""

    def kill(self, pid: int) -> None:
        """Kill a process that `vtpm list` names."""

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

    def kill(self, pid: int) -> None:
        kill_and_wait(pid)

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

    def kill(self, pid: int) -> None:
        self._stack.run("kill", "-KILL", str(pid))

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
        tpm.take_ownership(owner_auth=OWNER)
        sealed = tpm.seal(b"the key of my disk", release=boot)
    way.vtpm("down")
    way.up()
    until_running(way)
    with way.tpm(GUEST1) as tpm:
        assert tpm.unseal(sealed) == b"the key of my disk"
