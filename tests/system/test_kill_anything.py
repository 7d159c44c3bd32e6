"""kill -9 of anything, at random, under load: a guest's program sees a pause and nothing else.

With `--seed N` other victims and moments are drawn; KILL_BUDGET_S (seconds a case runs, 8 when not
given) makes it a soak.
"""

import contextlib
import itertools
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.system.guest_workload import Workload
from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    VTPM2,
    kill_and_wait,
    wait_until,
)

BUDGET_S = float(os.environ.get("KILL_BUDGET_S", "8"))
CHIP = "hwtpm"
EXTEND = bytes.fromhex("00000014")
VICTIMS = (VTPM1, MANAGER, CHIP)
KILLS_IN_A_ROW = 4
GAP_S = (0.02, 0.7)
"""Between two kills: some fall into the recovery from the one before."""

pytestmark = pytest.mark.slow


class Killer:
    """Kills until it is told to stop; notes whom.

    After every few kills it waits until the program has made a round: on a busy machine what it
    kills would else never come back, and the program's patience would end.
    """

    def __init__(self, stack, seed, sets, program):
        self.killed = []
        self.failure = None
        self._stack, self._sets, self._program = stack, sets, program
        self._kills = self._rounds = 0
        self._chance = random.Random(seed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _let_a_round_through(self):
        self._kills += 1
        if self._kills % KILLS_IN_A_ROW == 0:
            wait_until(
                lambda: self._program.rounds > self._rounds or self._stop.is_set(),
                "the program makes a round",
            )
            self._rounds = self._program.rounds

    def _run(self):
        try:
            while not self._stop.wait(self._chance.uniform(*GAP_S)):
                names = self._chance.choice(self._sets)
                pids = self._stack.pids()  # of those that have a process now
                found = {name: pids[name] for name in names if name in pids}
                kill_and_wait(*found.values())
                self.killed += found
                self._let_a_round_through()
        except Exception as error:  # noqa: BLE001 - told by the test
            self.failure = error


def play(stack, count_id, seed, sets):
    """Let the workload run while sets of daemons are killed; how it went."""
    workload = Workload(stack.places.domain(GUEST1).tpm0, seed, count_id)
    with Killer(stack, seed, sets, workload) as killer:
        workload.run(time.monotonic() + BUDGET_S)
    assert killer.failure is None, killer.failure
    return workload, killer


@pytest.fixture(scope="module")
def count_id(running):
    """The counter of a TPM that was prepared for the workload."""
    workload = Workload(running.places.domain(GUEST1).tpm0, 0)
    workload.prepare()
    return workload.count_id


@pytest.mark.parametrize(
    "sets",
    [
        [(VTPM1,)],
        [(MANAGER,)],
        [(CHIP,)],
        [*itertools.combinations(VICTIMS, 2)],
        [(name,) for name in (*VICTIMS, VTPM2)] + [VICTIMS],
    ],
    ids=["vTPM", "manager", "chip", "pairs", "any and all"],
)
def test_program_in_a_guest_sees_only_a_pause(running, count_id, seed, sets):
    guest_pid = running.pid(GUEST1)
    workload, killer = play(running, count_id, seed, sets)
    assert len(killer.killed) > 3
    assert workload.rounds
    assert set(killer.killed) <= {*VICTIMS, VTPM2}
    running.until_running(*ALL)
    assert running.pid(GUEST1) == guest_pid


@pytest.mark.parametrize("with_fork_server", [False, True], ids=["launcher", "and fork server"])
def test_program_in_a_guest_does_not_notice_a_killed_launcher(
    running, count_id, seed, with_fork_server
):
    before = running.pids()
    workload = Workload(running.places.domain(GUEST1).tpm0, seed, count_id)
    with in_a_thread(workload.run, time.monotonic() + BUDGET_S):
        victims = ("Domain-0", "fork server")[: 1 + with_fork_server]
        kill_and_wait(*(before[name] for name in victims))
        running.vtpm("up")
    after = running.pids()
    assert {n: p for n, p in after.items() if n in before and p != before[n]}.keys() == {
        "Domain-0",
        "fork server",
    }


def test_program_in_a_guest_sees_a_pause_when_all_but_its_guest_is_killed_at_once(
    running, count_id, seed
):
    before = running.pids()
    workload = Workload(running.places.domain(GUEST1).tpm0, seed, count_id)
    with in_a_thread(workload.run, time.monotonic() + BUDGET_S):
        wait_until(lambda: workload.rounds, "the program runs")
        guests = {GUEST1, GUEST2}
        kill_and_wait(*(pid for name, pid in before.items() if name not in guests))
        running.vtpm("up")
        running.until_running(*ALL)
        so_far = workload.rounds
        wait_until(lambda: workload.rounds > so_far, "the program runs on")
    after = running.pids()
    assert {name for name, pid in after.items() if before[name] == pid} == {GUEST1, GUEST2}


@contextlib.contextmanager
def in_a_thread(call, *arguments):
    """Run something meanwhile; what it raises is raised at the end."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(call, *arguments)
        yield
        running.result()


class Faulty(Workload):
    """A program whose TPM does something twice, or not at all: what a bad recovery looks like."""

    fault = ""

    def _timed(self, device):
        exchange = super()._timed(device)
        last = {}

        def faulty(request):
            ordinal = request[6:10]
            if self.rounds == 2 and ordinal == EXTEND and self.fault == "lost":
                return last[ordinal]
            if self.rounds == 2 and ordinal == EXTEND and self.fault == "twice":
                exchange(request)
            last[ordinal] = exchange(request)
            return last[ordinal]

        return faulty


@pytest.mark.parametrize("fault", ["twice", "lost"])
def test_the_program_would_notice(running, count_id, seed, fault):
    """The control: without it, a workload that sees nothing would prove nothing."""
    workload = Faulty(running.places.domain(GUEST1).tpm0, seed, count_id)
    workload.fault = fault
    with pytest.raises(AssertionError, match="PCR 10 is not what was extended"):
        workload.run(time.monotonic() + 30)
    assert workload.rounds == 2
