"""The supervisor alone, with processes that are objects and a clock that jumps."""

# ruff: noqa: ARG001 - to ask for autojump_clock is to use it

from __future__ import annotations

import errno
import signal
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from daemons.errors import ExitCode, Failure
from daemons.launcher.last_words import LastWords
from daemons.launcher.process_states import SETTLED, TRANSITIONS, Event, State
from daemons.launcher.supervisor import (
    FINAL_EXITS,
    Changes,
    Launched,
    Limits,
    Supervisor,
    describe_exit,
)
from daemons.xl.domain_config import Action

LIMITS = Limits(
    start_s=20, drain_s=5, backoff_first_s=1, backoff_max_s=8, stable_s=100, restarts_max=4
)


@dataclass
class FakeProcess:
    """A process whose end the test decides."""

    pid: int
    start_time: int = 1
    obeys: bool = True
    signals: list[tuple[float, signal.Signals]] = field(default_factory=list)
    ended: trio.Event = field(default_factory=trio.Event)
    status: int | None = None

    def release(self) -> None:
        pass

    def signal(self, number):
        self.signals.append((trio.current_time(), number))
        if number is signal.SIGKILL:
            self.end(-signal.SIGKILL)
        elif number is signal.SIGTERM and self.obeys:
            self.end(0)

    def end(self, status):
        if not self.ended.is_set():
            self.status = status
            self.ended.set()

    async def wait(self):
        await self.ended.wait()
        return self.status


class Stage:
    """A supervisor, and every process it was given."""

    def __init__(self, limits=LIMITS, on_crash=Action.RESTART):
        self.processes: list[FakeProcess] = []
        self.started_at: list[float] = []
        self.obeys = True
        self.failure: Failure | None = None
        self.gate = trio.Event()
        self.gate.set()
        self.changes = Changes()
        self.supervisor = Supervisor("vtpm-guest1", self.launch, limits, self.changes, on_crash)

    async def launch(self):
        if not self.gate.is_set():
            self.supervisor.waits_for("waits for vtpmmgr")
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.processes.append(FakeProcess(100 + len(self.processes), obeys=self.obeys))
        self.started_at.append(trio.current_time())
        return Launched(
            process=self.processes[-1], last_words=lambda: LastWords(why="the image is upside down")
        )

    @property
    def process(self):
        return self.processes[-1]

    async def until(self, state, starts=None):
        while self.supervisor.state is not state or (
            starts is not None and self.supervisor.starts < starts
        ):
            await self.changes.next()

    async def ready(self, starts):
        await self.until(State.STARTING, starts)
        self.supervisor.notified({"READY": "1"})


@asynccontextmanager
async def staged(limits=LIMITS, on_crash=Action.RESTART, **attributes):
    stage = Stage(limits, on_crash)
    for name, value in attributes.items():
        setattr(stage, name, value)
    with trio.fail_after(10_000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.supervisor.run)
            yield stage
            stage.supervisor.stop()
    assert stage.supervisor.state is State.ENDED
    assert all(process.ended.is_set() for process in stage.processes)


# -- the table -----------------------------------------------------------------------------------


def test_every_state_but_ended_can_be_left_and_every_state_be_reached():
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.ENDED}
    assert set(TRANSITIONS.values()) == set(State) - {State.CREATED}
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_every_state_can_be_stopped():
    for state in set(State) - {State.ENDED, State.STOPPING}:
        assert TRANSITIONS[state, Event.STOP] in {State.STOPPING, State.ENDED}


def test_event_that_the_table_does_not_know_is_a_bug():
    stage = Stage()
    with pytest.raises(RuntimeError, match="ready in state created"):
        stage.supervisor._move(Event.READY)


# -- start ---------------------------------------------------------------------------------------


async def test_process_is_starting_until_it_says_ready(autojump_clock):
    async with staged() as stage:
        await stage.until(State.STARTING)
        stage.supervisor.notified({"STATUS": "making the endorsement key"})
        assert stage.supervisor.state is State.STARTING
        assert stage.supervisor.status_text == "making the endorsement key"
        stage.supervisor.notified({"READY": "1", "STATUS": "serving"})
        assert stage.supervisor.state is State.RUNNING
        await stage.supervisor.settled()
        assert (stage.supervisor.starts, stage.supervisor.restarts) == (1, 0)


async def test_process_that_is_not_ready_in_time_is_killed_and_started_again(autojump_clock):
    async with staged() as stage:
        await stage.until(State.BACKOFF)
        assert trio.current_time() - stage.started_at[0] == LIMITS.start_s
        assert stage.supervisor.reason.startswith("it was not ready within 20 s")
        await stage.ready(2)
        await trio.sleep(LIMITS.start_s * 3)  # the second one is in time and stays
        assert stage.supervisor.state is State.RUNNING


async def test_waiting_is_shown_and_takes_no_start_time(autojump_clock):
    async with staged(gate=trio.Event()) as stage:
        await wait_all_tasks_blocked()
        assert stage.supervisor.state is State.WAITING
        assert stage.supervisor.reason == "waits for vtpmmgr"
        await trio.sleep(LIMITS.start_s * 10)
        stage.gate.set()
        await stage.ready(1)
        assert stage.supervisor.reason == ""


async def test_launch_that_fails_is_final_and_keeps_its_failure(autojump_clock):
    failure = Failure("no image", why="it is not there", next_step="dd")
    async with staged(failure=failure) as stage:
        await stage.until(State.FAILED)
        assert stage.supervisor.failure is failure
        stage.failure = None
        stage.supervisor.restart("asked")
        await stage.ready(1)
        assert stage.supervisor.failure is None


def without_room(number):
    failure = Failure("none", why="as told", next_step="room", exit_code=ExitCode.IO_ERROR)
    failure.__cause__ = OSError(number, "as told")
    return failure


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENOMEM])
async def test_who_has_served_is_started_when_there_is_room_again(autojump_clock, number):
    async with staged() as stage:
        await stage.ready(1)
        stage.failure = without_room(number)
        stage.process.end(-signal.SIGKILL)
        await stage.until(State.BACKOFF)
        await trio.sleep(1000)
        assert stage.supervisor.state in {State.BACKOFF, State.WAITING}
        assert "as told" in stage.supervisor.reason
        stage.failure = None
        await stage.ready(2)


async def test_who_has_never_served_is_told_that_there_is_no_room(autojump_clock):
    async with staged(failure=without_room(errno.ENOSPC)) as stage:
        await stage.until(State.FAILED)


async def test_error_of_the_system_at_a_launch_is_that_domain_s_failure(autojump_clock):
    async with staged(failure=OSError(errno.EMFILE, "Too many open files")) as stage:
        await stage.until(State.FAILED)
        assert stage.supervisor.failure.why == "too many open files"
        assert stage.supervisor.failure.exit_code is ExitCode.IO_ERROR


async def test_what_room_would_not_mend_is_final(autojump_clock):
    async with staged() as stage:
        await stage.ready(1)
        stage.failure = without_room(errno.EACCES)
        stage.process.end(-signal.SIGKILL)
        await stage.until(State.FAILED)


# -- death ---------------------------------------------------------------------------------------


async def test_dead_process_is_started_again_with_growing_pauses_up_to_the_limit(autojump_clock):
    async with staged() as stage:
        pauses = []
        for starts in range(1, LIMITS.restarts_max + 1):
            await stage.ready(starts)
            died_at = trio.current_time()
            stage.process.end(-signal.SIGSEGV)
            await stage.until(State.STARTING, starts + 1)
            pauses.append(stage.started_at[-1] - died_at)
        assert pauses == [1, 2, 4, 8]
        assert stage.supervisor.last_reason == "killed by SIGSEGV: the image is upside down"
        await stage.ready(5)
        stage.process.end(-signal.SIGSEGV)
        await stage.until(State.FAILED)
        assert (
            "it died 5 times in a row, the last time: killed by SIGSEGV" in stage.supervisor.reason
        )
        assert stage.supervisor.restarts == LIMITS.restarts_max
        await trio.sleep(1000)
        assert len(stage.processes) == 5


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (ExitCode.IO_ERROR, ExitCode.IO_ERROR),
        (ExitCode.UNAVAILABLE, ExitCode.UNAVAILABLE),
        (ExitCode.BUG, ExitCode.FAILED),
        (-signal.SIGSEGV, ExitCode.FAILED),
    ],
)
async def test_who_waits_for_what_cannot_run_is_told_the_kind_of_its_trouble(
    autojump_clock, status, code
):
    async with staged() as stage:
        for starts in range(1, LIMITS.restarts_max + 2):
            await stage.ready(starts)
            stage.process.end(status)
        await stage.until(State.FAILED)
        assert stage.supervisor.failure.exit_code is code


async def test_nothing_that_a_killed_process_logged_is_taken_for_the_reason(autojump_clock):
    async with staged() as stage:
        await stage.ready(1)
        stage.process.end(-signal.SIGKILL)
        await stage.ready(2)
        assert stage.supervisor.last_reason == "killed by SIGKILL"


@pytest.mark.parametrize("status", [1, -signal.SIGSEGV, 0])
async def test_crash_that_is_to_be_preserved_is_final_until_somebody_asks(autojump_clock, status):
    async with staged(on_crash=Action.PRESERVE) as stage:
        await stage.ready(1)
        stage.process.end(status)
        await stage.until(State.FAILED)
        await trio.sleep(1000)
        assert len(stage.processes) == 1
        assert "the image is upside down" in stage.supervisor.failure.why
        stage.supervisor.restart("asked")
        await stage.ready(2)


async def test_crash_that_is_to_destroy_ends_the_supervision(autojump_clock):
    stage = Stage(on_crash=Action.DESTROY)
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.supervisor.run)
            await stage.ready(1)
            stage.process.end(1)
    assert stage.supervisor.state is State.ENDED
    assert "the image is upside down" in stage.supervisor.failure.why


async def test_preserved_one_has_ended_and_can_be_started_again(autojump_clock):
    async with staged() as stage:
        for starts in (1, 2):
            await stage.ready(starts)
            stage.supervisor.preserve()
            await stage.supervisor.settled()
            assert stage.supervisor.state is State.PRESERVED
            assert stage.process.signals[0][1] is signal.SIGTERM
            await trio.sleep(1000)
            assert len(stage.processes) == starts
            stage.supervisor.restart("asked")
        await stage.ready(3)


@pytest.mark.parametrize("state", [State.WAITING, State.STARTING, State.BACKOFF, State.FAILED])
async def test_preserve_works_in_every_state(autojump_clock, state):
    async with staged(Limits(restarts_max=0 if state is State.FAILED else 4)) as stage:
        if state is State.WAITING:
            stage.gate = trio.Event()
        await wait_all_tasks_blocked()
        if state in {State.BACKOFF, State.FAILED}:
            await stage.ready(1)
            stage.process.end(1)
            await wait_all_tasks_blocked()
        if state is not State.WAITING:
            assert stage.supervisor.state is state
        stage.supervisor.preserve()
        await stage.supervisor.settled()
        assert stage.supervisor.state is State.PRESERVED


async def test_stable_time_makes_earlier_deaths_forgotten(autojump_clock):
    async with staged() as stage:
        for starts in range(1, 3 * LIMITS.restarts_max):
            await stage.ready(starts)
            await trio.sleep(LIMITS.stable_s)
            died_at = trio.current_time()
            stage.process.end(1)
            await stage.until(State.STARTING, starts + 1)
            assert stage.started_at[-1] - died_at == LIMITS.backoff_first_s
        await stage.ready(3 * LIMITS.restarts_max)


async def test_backoff_has_a_cap(autojump_clock):
    assert LIMITS.backoff_s(10_000) == LIMITS.backoff_max_s


@pytest.mark.parametrize("code", sorted(FINAL_EXITS))
async def test_exit_that_no_restart_can_mend_is_final_with_its_last_words(autojump_clock, code):
    async with staged() as stage:
        await stage.ready(1)
        stage.process.end(int(code))
        await stage.until(State.FAILED)
        await trio.sleep(1000)
        assert len(stage.processes) == 1
        assert stage.supervisor.failure.why == "the image is upside down"
        assert stage.supervisor.failure.exit_code is code


async def test_unavailable_peer_is_not_final(autojump_clock):
    async with staged() as stage:
        await stage.ready(1)
        stage.process.end(int(ExitCode.UNAVAILABLE))
        await stage.ready(2)


async def test_failed_one_has_all_its_restarts_again_after_it_was_asked_to(autojump_clock):
    async with staged(Limits(restarts_max=0)) as stage:
        await stage.ready(1)
        stage.process.end(1)
        await stage.until(State.FAILED)
        stage.supervisor.restart("asked")
        await stage.ready(2)
        assert stage.supervisor.last_reason == "asked"


# -- stop and restart ----------------------------------------------------------------------------


async def test_stop_asks_first_and_kills_after_the_drain_time(autojump_clock):
    async with staged(obeys=False) as stage:
        await stage.ready(1)
        asked_at = trio.current_time()
        stage.supervisor.stop()
        await stage.supervisor.settled()
        assert [(at - asked_at, number) for at, number in stage.process.signals] == [
            (0, signal.SIGTERM),
            (0, signal.SIGCONT),
            (LIMITS.drain_s, signal.SIGKILL),
        ]


async def test_second_stop_can_hurry_but_not_delay_the_first(autojump_clock):
    async with staged(obeys=False) as stage:
        await stage.ready(1)
        asked_at = trio.current_time()
        stage.supervisor.stop()
        await wait_all_tasks_blocked()
        stage.supervisor.stop(drain_s=100)
        await wait_all_tasks_blocked()
        stage.supervisor.stop(drain_s=1)
        await stage.supervisor.settled()
        assert trio.current_time() - asked_at == 1


@pytest.mark.parametrize("state", [State.WAITING, State.STARTING, State.BACKOFF, State.PAUSED])
async def test_stop_works_in_every_state(autojump_clock, state):
    async with staged() as stage:
        if state is State.WAITING:
            stage.gate = trio.Event()
        await wait_all_tasks_blocked()
        if state in {State.BACKOFF, State.PAUSED}:
            await stage.ready(1)
        if state is State.BACKOFF:
            stage.process.end(1)
        if state is State.PAUSED:
            stage.supervisor.pause()
        await wait_all_tasks_blocked()
        if state is not State.WAITING:
            assert stage.supervisor.state is state
        stage.supervisor.stop()
        await stage.supervisor.settled()
        assert stage.supervisor.state is State.ENDED


async def test_restart_is_at_once_and_keeps_its_reason(autojump_clock):
    async with staged() as stage:
        await stage.ready(1)
        before = trio.current_time()
        stage.supervisor.restart("its vTPM was lost")
        await stage.ready(2)
        assert trio.current_time() == before
        assert stage.supervisor.last_reason == "its vTPM was lost"
        assert stage.processes[0].signals[0][1] is signal.SIGTERM


async def test_restart_while_it_waits_makes_it_look_again(autojump_clock):
    async with staged(gate=trio.Event()) as stage:
        await wait_all_tasks_blocked()
        stage.supervisor.restart("the platform lost its power")
        await wait_all_tasks_blocked()
        assert stage.supervisor.state is State.WAITING
        stage.gate.set()
        await stage.ready(1)


async def test_restart_after_stop_is_too_late(autojump_clock):
    async with staged(obeys=False) as stage:
        await stage.ready(1)
        stage.supervisor.stop()
        stage.supervisor.restart("asked")
        await stage.supervisor.settled()
        assert stage.supervisor.state is State.ENDED


async def test_pause_stops_and_unpause_continues(autojump_clock):
    async with staged() as stage:
        assert not stage.supervisor.pause()  # not before it runs
        await stage.ready(1)
        assert stage.supervisor.pause()
        assert not stage.supervisor.pause()
        assert stage.supervisor.state is State.PAUSED
        assert stage.supervisor.unpause()
        assert not stage.supervisor.unpause()
        assert [number for _, number in stage.process.signals] == [signal.SIGSTOP, signal.SIGCONT]


async def test_cancelled_supervisor_leaves_its_process_as_it_is(autojump_clock):
    stage = Stage()
    with trio.fail_after(1000):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stage.supervisor.run)
            await stage.ready(1)
            nursery.cancel_scope.cancel()
    assert stage.process.status is None
    assert stage.process.signals == []


def test_ends_are_told_in_words():
    assert describe_exit(-9) == "killed by SIGKILL"
    assert describe_exit(-63) == "killed by signal 63"
    assert describe_exit(0) == "it ended by itself (exit status 0, done)"
    assert describe_exit(70) == "it ended by itself (exit status 70, bug)"
    assert describe_exit(99) == "it ended with exit status 99"
    assert "nobody" in describe_exit(None)


def test_settled_states_are_those_without_a_task_under_way():
    assert State.WAITING not in SETTLED
    assert State.BACKOFF not in SETTLED
