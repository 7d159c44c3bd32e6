"""Supervision of one process: start, readiness, pause, restart with back-off, stop, and why.

What has to be true before the process may start, and how it is started, is the caller's `launch`;
what its death means for others is decided there too (`consequences`). Here is only the life of one
process, as a table, and the clock.

Invariants:

- Every change of state is a row of `TRANSITIONS`; anything else is a bug and raises.
- Time is trio's clock and nothing else.
- A process that was spawned is waited for: `run` never returns while it lives.
"""

from __future__ import annotations

import errno
import math
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import trio

from daemons.errors import OUT_OF_RESOURCES, ExitCode, Failure
from daemons.launcher.last_words import LastWords
from daemons.launcher.process_states import SETTLED, TRANSITIONS, Event, State
from daemons.launcher.spawner import Process
from daemons.lean_structlog import structlog
from daemons.xl.domain_config import Action

STATUS_CHARS_MAX = 200

log = structlog.get_logger()


_ADOPTED = "running since before the launcher was started again"
FINAL_EXITS = frozenset(
    {
        ExitCode.USAGE,
        ExitCode.DAMAGED,
        ExitCode.NO_INPUT,
        ExitCode.NO_PERMISSION,
        ExitCode.CONFIGURATION,
    }
)
"""Exit statuses that another start cannot change."""
PASSING_EXITS = frozenset({ExitCode.UNAVAILABLE, ExitCode.IO_ERROR})
"""Those with a reason that another start may change."""


class Changes:
    """Wakes everyone who waits for any change of any domain; what changed, they look up."""

    def __init__(self) -> None:
        self._next = trio.Event()

    def announce(self) -> None:
        """Wake all that wait now."""
        woken, self._next = self._next, trio.Event()
        woken.set()

    async def next(self) -> None:
        """Wait for the next change."""
        await self._next.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How patient the supervisor is; all times in seconds."""

    start_s: float = 60.0
    """From the start to READY; the first start of a chip makes a 2048-bit key."""
    drain_s: float = 10.0
    """From SIGTERM to SIGKILL."""
    backoff_first_s: float = 0.1
    backoff_max_s: float = 10.0
    """The pause doubles from the first to this."""
    stable_s: float = 30.0
    """Who has run for so long since READY has forgotten its earlier deaths."""
    restarts_max: int = 5
    """Restarts in a row after deaths that nobody else caused; the next such death is final."""

    def backoff_s(self, deaths: int) -> float:
        """Give the pause after the given number of deaths in a row (from 1)."""
        return min(self.backoff_max_s, self.backoff_first_s * 2.0 ** min(deaths - 1, 32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A process that was just released, and where its last words will be.

    Attributes:
        is_ready: It was ready before; it will not say so again.
        is_standing: It was paused before, and serves nobody for a moment.
    """

    process: Process
    last_words: Callable[[], LastWords]
    is_ready: bool = False
    is_standing: bool = False


class _Wish(StrEnum):
    RUN = "run"
    REPEAT = "repeat"
    REST = "rest"
    END = "end"


Launch = Callable[[], Awaitable[Launched]]


class Supervisor:
    """One process and its whole life.

    Args:
        name: For the log.
        launch: Waits for what must be there first (may be cancelled there), then spawns, registers
            and releases. A `Failure` from it is final.
        limits: How patient to be.
        changes: Told of every change.
        on_crash: What becomes of it when its process dies unasked: RESTART, PRESERVE or DESTROY.

    Attributes:
        state: Where the process is.
        reason: Why it failed, is started again, or waits; empty when there is nothing to say.
        status_text: The process's own last STATUS.
        starts: How often a process was started.
        times_ready: How often one of them came to be ready.
        last_reason: Why it was last started again.
        before_keeping: Called with the reason before one that crashed is kept as it is.
    """

    def __init__(
        self,
        name: str,
        launch: Launch,
        limits: Limits,
        changes: Changes,
        on_crash: Action = Action.RESTART,
    ) -> None:
        self.name = name
        self.state = State.CREATED
        self.reason = ""
        self.failure: Failure | None = None
        self.status_text = ""
        self.starts = 0
        self.times_ready = 0
        self.last_reason = ""
        self.before_keeping: Callable[[str], None] = lambda _reason: None
        self._launch = launch
        self._limits = limits
        self._changes = changes
        self._on_crash = on_crash
        self._process: Process | None = None
        self._wish = _Wish.RUN
        self._drain_s = limits.drain_s
        self._kill_at = math.inf
        self._interruption: trio.CancelScope | None = None
        self._stop_asked = trio.Event()
        self._deaths_in_a_row = 0
        self._put_off_in_a_row = 0
        self._ready_at: float | None = None

    @property
    def process(self) -> Process | None:
        """The living process, if there is one."""
        return self._process

    @property
    def restarts(self) -> int:
        """How often it was started again."""
        return max(0, self.starts - 1)

    # -- what others ask of it -------------------------------------------------------------------

    def waits_for(self, what: str) -> None:
        """Note what `launch` waits for, while it does."""
        if self.state is State.WAITING and self.reason != what:
            self.reason = what
            self._changes.announce()

    def notified(self, fields: Mapping[str, str]) -> None:
        """Take what the process says of itself (sd_notify); the sender was checked."""
        if "STATUS" in fields:
            self.status_text = fields["STATUS"][:STATUS_CHARS_MAX]
        if fields.get("READY") == "1" and self.state is State.STARTING:
            self._ready_at = trio.current_time()
            self.times_ready += 1
            self._move(Event.READY)
        self._changes.announce()

    def pause(self) -> bool:
        """Stop the process where it stands (SIGSTOP); False when it does not run."""
        if self.state is not State.RUNNING or self._process is None:
            return False
        self._process.signal(signal.SIGSTOP)
        self._move(Event.PAUSE)
        return True

    def unpause(self) -> bool:
        """Let a paused process go on; False when it is not paused."""
        if self.state is not State.PAUSED or self._process is None:
            return False
        self._process.signal(signal.SIGCONT)
        self._move(Event.UNPAUSE)
        return True

    def reload(self) -> None:
        """Let the process read again what may change while it runs (SIGHUP), if it serves."""
        if self.state in {State.RUNNING, State.PAUSED} and self._process is not None:
            self._process.signal(signal.SIGHUP)

    def restart(self, reason: str, *, drain_s: float | None = None) -> None:
        """Stop the process if there is one, and start it again without back-off.

        Args:
            reason: Shown as the reason of the restart.
            drain_s: Seconds from SIGTERM to SIGKILL; None for the usual.
        """
        if self._wish is _Wish.END or self.state in {State.CREATED, State.ENDED}:
            return
        self.last_reason = reason
        self.failure = None
        self._deaths_in_a_row = self._put_off_in_a_row = 0
        self._ask(_Wish.REPEAT, drain_s)

    def stop(self, *, drain_s: float | None = None) -> None:
        """Stop the process for good; `run` returns when it has ended."""
        self._ask(_Wish.END, drain_s)

    def preserve(self, *, drain_s: float | None = None) -> None:
        """Stop the process, and stay: it is in state PRESERVED when it has ended."""
        if self._wish is _Wish.END or self.state in {State.CREATED, State.ENDED, State.PRESERVED}:
            return
        self._ask(_Wish.REST, drain_s)

    async def settled(self) -> None:
        """Wait until nothing is under way."""
        while self.state not in SETTLED or (
            self._wish is not _Wish.RUN and self.state is not State.ENDED
        ):
            await self._changes.next()

    # -- its life --------------------------------------------------------------------------------

    async def run(self) -> None:
        """Live until `stop`.

        Cancelling it leaves the process to itself, as the death of the launcher would: who cancels
        is a launcher that ends by a bug, and the next one takes over what goes on serving.
        """
        self._move(Event.START)
        while self._wish is not _Wish.END:
            if self.state in {State.FAILED, State.PRESERVED}:
                await self._interruptible(trio.sleep_forever)
            elif self.state is State.BACKOFF:
                await self._interruptible(self._back_off)
            elif self.state is State.WAITING:
                self._wish = _Wish.RUN
                await self._start_and_live()
            if self._wish is _Wish.REPEAT and self.state is not State.WAITING:
                self.reason = self.last_reason
                self._move(Event.REPEAT)
            elif self._wish is _Wish.REST:
                self._rest()
        if self.state is not State.ENDED:
            self._move(Event.EXITED if self.state is State.STOPPING else Event.STOP)

    def _rest(self) -> None:
        self._wish = _Wish.RUN  # it was granted; what is asked for next counts again
        self.failure = None
        self.reason = ""
        if self.state is not State.PRESERVED:
            self._move(Event.PRESERVE)

    async def _start_and_live(self) -> None:
        launched: Launched | None = None

        async def launch() -> None:
            nonlocal launched
            try:
                launched = await self._launch()
            except OSError as error:  # one domain's trouble is not the end of the others
                raise Failure(
                    f"cannot start {self.name}",
                    why=(error.strerror or str(error)).lower(),
                    next_step="`vtpm doctor` shows what there is; then: vtpm up",
                    exit_code=ExitCode.IO_ERROR,
                ) from error

        self.failure = None
        try:
            await self._interruptible(launch)
        except Failure as failure:
            if self._has_served and _is_about_room(failure):
                self._put_off(failure)
            else:
                self._give_up(failure)
            return
        if launched is not None:
            await self._live(launched)

    async def _live(self, launched: Launched) -> None:
        process = self._process = launched.process
        self.starts += 1
        self.status_text = ""
        self.reason = ""
        self._ready_at = None
        self._stop_asked = trio.Event()
        self._kill_at = math.inf
        self._move(Event.SPAWNED)
        if launched.is_ready:
            self.notified({"READY": "1", "STATUS": _ADOPTED})
        if launched.is_standing:
            self.pause()
        overdue = trio.Event()
        status: int | None = None
        if self._wish is not _Wish.RUN:
            self._stop_asked.set()  # asked for in the last moments of `launch`
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._expect_ready, process, overdue)
            nursery.start_soon(self._stop_when_asked, process)
            status = await process.wait()
            nursery.cancel_scope.cancel()
        self._process = None
        if self._wish is _Wish.RUN:
            how = (
                f"it was not ready within {self._limits.start_s:g} s"
                if overdue.is_set()
                else describe_exit(status)
            )
            # Of one that was adopted nobody sees how it ended.
            was_killed = status in {None, -signal.SIGKILL} and not overdue.is_set()
            # Nobody says why he is killed: what was logged before has another reason.
            last_words = LastWords() if was_killed else launched.last_words()
            self._died(status, how, last_words, was_killed=was_killed)
        elif self.state is not State.STOPPING:
            self._move(Event.STOP)  # it ended by itself just when it was told to

    async def _expect_ready(self, process: Process, overdue: trio.Event) -> None:
        with trio.move_on_after(self._limits.start_s):
            while self.state is State.STARTING:
                await self._changes.next()
            return
        overdue.set()
        process.signal(signal.SIGKILL)

    async def _stop_when_asked(self, process: Process) -> None:
        await self._stop_asked.wait()
        self._move(Event.STOP)
        process.signal(signal.SIGTERM)
        process.signal(signal.SIGCONT)  # a paused process hears SIGTERM only when it goes on
        self._kill_at = trio.current_time() + self._drain_s
        while trio.current_time() < self._kill_at:
            with trio.move_on_at(self._kill_at):
                await self._changes.next()
        log.warning("did not end in time, killed", domain=self.name)
        process.signal(signal.SIGKILL)

    def _died(
        self, status: int | None, how: str, last_words: LastWords, *, was_killed: bool
    ) -> None:
        """Decide what the unasked end of the process means for itself."""
        now = trio.current_time()
        if self._ready_at is not None and now - self._ready_at >= self._limits.stable_s:
            self._deaths_in_a_row = self._put_off_in_a_row = 0
        # Who is killed has not failed, and what is killed all day has to come back each time.
        if not was_killed:
            self._deaths_in_a_row += 1
        self.reason = self.last_reason = ": ".join(filter(None, (how, str(last_words))))
        log.warning("process died", domain=self.name, reason=self.reason)
        self._move(Event.EXITED)
        if self._on_crash is not Action.RESTART:
            if self._on_crash is Action.PRESERVE:
                self.before_keeping(self.reason)
            self._give_up(crashed(self.name, self.reason, self._on_crash))
            if self._on_crash is Action.DESTROY:
                self._wish = _Wish.END
        elif status in FINAL_EXITS:
            self._give_up(
                Failure(
                    last_words.what or f"{self.name} cannot run",
                    why=last_words.why or how,
                    next_step=last_words.next_step or f"Mend that, then: vtpm reboot {self.name}",
                    exit_code=ExitCode(status),
                )
            )
        elif self._deaths_in_a_row > self._limits.restarts_max:
            self._give_up(
                Failure(
                    f"{self.name} cannot run",
                    why=f"it died {self._deaths_in_a_row} times in a row,"
                    f" the last time: {self.reason}",
                    next_step=f"Look at its log, then: vtpm reboot {self.name}",
                    # Its own, where it refused: whoever waits is told what kind of trouble it is.
                    exit_code=ExitCode(status) if status in PASSING_EXITS else ExitCode.FAILED,
                )
            )

    @property
    def _has_served(self) -> bool:
        return self.times_ready > 0

    async def _back_off(self) -> None:
        ends = self._deaths_in_a_row + self._put_off_in_a_row
        if ends:  # who was killed is wanted back at once
            await trio.sleep(self._limits.backoff_s(ends))
        self._move(Event.START)

    def _put_off(self, failure: Failure) -> None:
        """Try again later, as often as it takes: a disk that is full is so for a while.

        Who has never served is told at once: whoever wants the first start waits for it.
        """
        self._put_off_in_a_row += 1
        self.reason = f"{failure.what}: {failure.why}"
        log.warning("start put off", domain=self.name, reason=failure.why)
        self._move(Event.PUT_OFF)

    def _give_up(self, failure: Failure) -> None:
        self.failure = failure
        self.reason = f"{failure.what}: {failure.why}"
        self._deaths_in_a_row = 0
        log.error("gave up", domain=self.name, reason=failure.why)
        self._move(Event.GIVE_UP)

    def _ask(self, wish: _Wish, drain_s: float | None) -> None:
        self._drain_s = self._limits.drain_s if drain_s is None else drain_s
        self._wish = wish
        self._kill_at = min(
            self._kill_at, trio.current_time() + self._drain_s
        )  # hurry, never wait longer
        self._stop_asked.set()
        if self._interruption is not None:
            self._interruption.cancel()
        self._changes.announce()

    async def _interruptible(self, activity: Callable[[], Awaitable[object]]) -> None:
        """Run something that a new wish ends at once."""
        with trio.CancelScope() as scope:
            if self._wish is not _Wish.RUN:
                scope.cancel()
            self._interruption = scope
            try:
                await activity()
            finally:
                self._interruption = None

    def _move(self, event: Event) -> None:
        target = TRANSITIONS.get((self.state, event))
        if target is None:
            raise RuntimeError(f"{self.name}: {event} in state {self.state}")
        log.debug("state", domain=self.name, event_name=event, before=self.state, after=target)
        self.state = target
        self._changes.announce()


_NO_ROOM: Final = OUT_OF_RESOURCES | {errno.ENOSPC, errno.EDQUOT}


def _is_about_room(failure: Failure) -> bool:
    """Whether it would not have happened if a disk, a quota or descriptors were not used up."""
    cause = failure.__cause__
    return isinstance(cause, OSError) and cause.errno in _NO_ROOM


def crashed(name: str, why: str, on_crash: Action) -> Failure:
    """What to tell of a domain that crashed and is not started again."""
    return Failure(
        f"{name} crashed",
        why=why,
        next_step=f"on_crash={on_crash.value} keeps it from being started again; look at its log",
    )


def describe_exit(status: int | None) -> str:
    """Say in words how a process ended.

    Args:
        status: Exit status, minus the signal number, or None when nobody saw it.
    """
    if status is None:
        return "it ended, and nobody could see how"
    if status < 0:
        try:
            return f"killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"killed by signal {-status}"
    try:
        word = ExitCode(status).name.lower().replace("_", " ")
    except ValueError:
        return f"it ended with exit status {status}"
    return f"it ended by itself (exit status {status}, {word})"
