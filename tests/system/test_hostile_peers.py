"""Hostile and broken peers at every door of a running stack, and at the simulator.

What each attack is, is in `tests/soak/hostile_peers.py`: half-open connections, one byte at a time,
kicks without a handshake, wrong states, repeated and skipped numbers, floods, unread answers,
peers that vanish in a command. A program in the guest checks each answer that it gets meanwhile;
afterwards all serve as before, and nobody has kept a descriptor or a thread. How much slower others
are meanwhile is told by `python -m tests.soak.latency`.
"""

import contextlib
import os
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from daemons.guest.tpm0_client import Tpm0Client
from tests.soak.baseline import SETTLE_S, daemon
from tests.soak.hostile_peers import ATTACKS, PCR_READ
from tests.soak.peer_process import IMP, HostilePeers, mallory
from tests.system.guest_workload import Workload
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    VTPM1,
    VTPM2,
    scratch_stack,
    vtpm_command,
    wait_until,
)

CONNECTS = int(os.environ.get("HOSTILE_CONNECTS", "1000"))
"""On each door; 10,000 by hand."""
SLOWLY_S = 120.0

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def besieged():
    """A stack with one guest, and hostile peers at each door: outsiders, a guest, a driver."""
    with scratch_stack() as stack:
        stack.make_images()
        stack.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN, VTPM2)
        places = stack.places
        vault, ring1, ring2 = (places.domain(n).ring_socket for n in (MANAGER, VTPM1, VTPM2))
        peers = {
            "tpm0": HostilePeers(stack, "tpm0", places.domain(GUEST1).tpm0, 1),
            "control": HostilePeers(stack, "control", places.launcher_socket, 2),
            "ring of another": HostilePeers(stack, "ring", ring1, 3),
            "ring of the manager": HostilePeers(stack, "ring", vault, 4),
            "ring of its own": HostilePeers(stack, "ring", ring2, 5, ("mallory", mallory(VTPM2))),
            "chip, as a stranger": HostilePeers(stack, "tis", places.tis_socket, 6),
            "chip, with a page": HostilePeers(stack, "tis", places.tis_socket, 7, ("imp", IMP)),
        }
        try:
            for each in peers.values():
                each.let_in()
            yield stack, peers
        finally:
            for each in peers.values():
                each.end()


def belongings(stack):
    """Descriptors and threads of each daemon."""
    names = {*FIRST_CHAIN, VTPM2, "hwtpm", "Domain-0", "fork server"}
    found = {name: daemon(pid) for name, pid in stack.pids().items() if name in names}
    return {name: (d.pid, d.descriptors, d.threads) for name, d in found.items()}


def all_as_before(stack, before):
    now = belongings(stack)
    return all(
        now[name][0] == pid and now[name][1] <= descriptors and now[name][2] <= threads
        for name, (pid, descriptors, threads) in before.items()
    )


def settled(stack):
    """Belongings once workers that were made for the start have gone."""
    end, before = time.monotonic() + SETTLE_S, None
    while before != (now := belongings(stack)) and time.monotonic() < end:
        before = now
        time.sleep(0.5)
    return now


@contextlib.contextmanager
def a_program_in_the_guest(stack, seed):
    """One that checks each answer, for as long as the block lasts."""
    workload = Workload(stack.places.domain(GUEST1).tpm0, seed)
    workload.prepare()
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(workload.run, _Until(stop))
        try:
            yield workload
        finally:
            stop.set()
        running.result()


class _Until:
    """A time that has not come before an event."""

    def __init__(self, event):
        self._event = event

    def __gt__(self, _now):
        return not self._event.is_set()


def test_attacks_at_every_door_at_once_cost_nobody_anything(besieged, seed):
    stack, peers = besieged
    with a_program_in_the_guest(stack, seed) as program:
        before = settled(stack)
        with ThreadPoolExecutor(len(peers)) as pool:
            list(pool.map(lambda each: each.order("each"), peers.values()))
        assert program.rounds > 0, "nobody else was served meanwhile"
        for name, each in peers.items():
            assert not each.failure, f"{name}: {each.failure}"
            assert sum(each.counts.values()) == len(ATTACKS[each.door])
        # The program still holds its connection: nothing of the attackers must be left.
        wait_until(lambda: all_as_before(stack, before), "all as before", SLOWLY_S)


@pytest.mark.parametrize("door", ["tpm0", "control", "ring of its own", "chip, with a page"])
def test_thousands_of_connects_leave_nothing(besieged, door):
    stack, peers = besieged
    with stack.tpm(GUEST1) as tpm:
        before = settled(stack)
        peers[door].order(f"connect {CONNECTS}")
        assert tpm.pcr_read(4) != bytes(20), "and whoever was connected still is"
        wait_until(lambda: all_as_before(stack, before), "all as before", SLOWLY_S)


def test_simulator_outlives_every_attack(tmp_path):
    tmp_path.chmod(0o700)
    path = tmp_path / "tpm"
    words = ["simulator", "--state", str(tmp_path / "state"), "--socket", str(path)]
    with subprocess.Popen(
        [*vtpm_command(), *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            wait_until(path.exists, "the simulator listens")
            with Tpm0Client(path) as client:
                answer = client.exchange(PCR_READ)
                before = daemon(process.pid)
                peers = HostilePeers(None, "tpm0", path, 8)
                try:
                    peers.order("each")
                    peers.order(f"connect {CONNECTS}")
                finally:
                    peers.end()
                assert not peers.failure
                assert client.exchange(PCR_READ) == answer
                wait_until(
                    lambda: (
                        daemon(process.pid).descriptors <= before.descriptors
                        and daemon(process.pid).threads <= before.threads
                    ),
                    "descriptors and threads as before",
                    SLOWLY_S,
                )
        finally:
            process.terminate()
