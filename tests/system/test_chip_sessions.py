"""A manager that is killed in the middle of its work leaves nothing open in the hardware TPM."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from daemons.registry import Registry
from daemons.tis_link import TisLink
from daemons.world import SystemRng
from protocol.constants import ResourceType
from tests.system.scratch_stack import MANAGER, WAIT_S, ScratchStack, kill_and_wait
from tpm12.client import TpmClient

KILLS = 3
DOM0_AT_LOCALITY_0 = """
name="witness"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
seclabel="system_u:system_r:dom0_t"
iomem=["fed40,1"]
"""


@contextlib.contextmanager
def platform_tpm(stack: ScratchStack) -> Iterator[TpmClient]:
    """The hardware TPM from locality 0; this process is a domain that the policy lets in."""
    stack.ask("attach_external", config_text=DOM0_AT_LOCALITY_0, pid=os.getpid())
    with TisLink(stack.places.tis_socket, 0, use_interrupts=False) as link:

        def exchange(request: bytes) -> bytes:
            try:
                return link.exchange(request)
            finally:
                link.relinquish()  # or the manager could not go on

        yield TpmClient(exchange, rng=SystemRng())


def open_in_the_chip(tpm: TpmClient) -> tuple[tuple[int, ...], ...]:
    return tpm.handles(ResourceType.AUTH), tpm.handles(ResourceType.KEY)


def test_manager_killed_with_sessions_open_leaves_none_of_them(stack):
    stack.up(MANAGER)
    with platform_tpm(stack) as tpm:
        before = open_in_the_chip(tpm)
        kill_and_wait(stack.pid(MANAGER))  # the next one unseals, which takes sessions
        for _ in range(KILLS):
            kill_with_a_handle_open(stack)
        stack.until_running(MANAGER)
        assert stack.row(MANAGER)["restarts"] == KILLS + 1
        assert open_in_the_chip(tpm) == before


def kill_with_a_handle_open(stack: ScratchStack) -> None:
    """Kill the manager while its journal names a handle that it has just opened."""
    journal, registry = stack.places.domain(MANAGER).journal, Registry(stack.places.registry)
    old = written_at(journal)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:  # without a pause: the moment is short
        if written_at(journal) == old or not names_a_handle(journal):
            continue
        manager = registry.get(MANAGER)
        if manager is None or manager.pid is None:
            continue
        os.kill(manager.pid, signal.SIGSTOP)
        if names_a_handle(journal):
            kill_and_wait(manager.pid)
            return
        os.kill(manager.pid, signal.SIGCONT)
    raise AssertionError("the manager was never caught with a handle open")


def written_at(journal: Path) -> int:
    """When the journal was written; 0 while there is none."""
    try:
        return journal.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def names_a_handle(journal: Path) -> bool:
    try:
        return bool(json.loads(journal.read_text())["handles"])
    except FileNotFoundError:
        return False
