"""The driver's end of tis.sock: runs the TIS driver over a blocking socket.

- One operation at a time; other threads wait for it.
- A connection that is lost with a command outstanding is made again, and the chip is asked what
  became of the command: its response is fetched, or it is sent again, but it never runs twice.
- A chip that is busy for longer than the TIS lets it, and another locality that has taken or seized
  the TPM, are waited for. Only a command that was running when it was seized is in doubt: it is
  sent again if that does no harm (`may_run_twice`), and else its caller is told.
- Whatever goes wrong is a `Failure` that says what, why and what to do.

Leaves to others: the register accesses themselves (`hwtpm/tis_driver.py`), what commands mean.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self, TypeVar

from daemons.errors import ExitCode, Failure, NotNow
from daemons.listeners import Kind, NotListening, connect, set_receive_timeout, set_send_timeout
from hwtpm.tis_driver import (
    HASH_LOCALITY,
    ChipIdentity,
    Step,
    StepAnswer,
    Steps,
    Timing,
    TisDriver,
    TisError,
    TisFault,
    WaitInterrupt,
)
from protocol.constants import Ordinal, Tag
from protocol.tis_messages import (
    MESSAGE_BYTES_MAX,
    VERSION,
    Answer,
    Done,
    Hello,
    Interrupt,
    PhysicalPresence,
    PowerOff,
    PowerOn,
    Read,
    Refused,
    RefusedReason,
    Request,
    Value,
    Write,
    decode_answer,
    encode_message,
)
from protocol.wire import DecodeError

T = TypeVar("T")

CONNECT_RETRY_S: Final = 0.05
CONNECT_TIMEOUT_S: Final = 5.0
RECONNECT_TIMEOUT_S: Final = 10.0
HOLD_S: Final = 0.1
"""How long after `let_go` a locality is kept for a next command; a driver that wants the chip waits
750 ms for it (timeout A)."""
FAREWELL_S: Final = 1.0
"""How long a chip may take to let a locality go that nobody waits for."""
LATE_S: Final = 0.05
"""How long after a failure it is looked for answers that are left over."""
ANSWER_TIMEOUT_S: Final = 30.0
"""How long the chip may leave a register read unanswered, beyond the duration of a command: the
chip's process may be stopped or starved, which is no fault of the TPM."""
BUSY_TIMEOUT_S: Final = 30.0
"""How long the chip may be busy, or another locality's, beyond the time-outs of the TIS."""


class ChipMissing(Failure):
    """Nobody serves the chip's socket."""


class ChipLost(Failure):
    """The connection ended and could not be made again in time; the command's fate is unknown."""


class ChipSilent(Failure):
    """The chip's process does not answer."""


class ChipRefused(Failure):
    """The chip's process refused the peer, the page or the pin.

    Attributes:
        reason: Why.
    """

    def __init__(self, what: str, *, reason: RefusedReason, text: str) -> None:
        super().__init__(
            what,
            why=text,
            next_step=_REFUSED_NEXT_STEPS[reason],
            exit_code=ExitCode.NO_PERMISSION if reason in _OF_RIGHTS else ExitCode.UNAVAILABLE,
        )
        self.reason = reason


class ChipFault(Failure):
    """The chip answered, and the operation failed all the same.

    Attributes:
        fault: What kind of failure.
    """

    def __init__(self, what: str, error: TisError) -> None:
        super().__init__(
            what,
            why=str(error),
            next_step=_FAULT_NEXT_STEPS.get(error.fault, _LOOK_AT_LOG),
            exit_code=ExitCode.UNAVAILABLE,
        )
        self.fault = error.fault


_LOOK_AT_LOG: Final = "Look at the hardware TPM's log; vtpm status shows where it is."
_REFUSED_NEXT_STEPS: Final = {
    RefusedReason.UNKNOWN_PEER: "Start this program through the launcher, which registers it.",
    RefusedReason.PAGE_NOT_GRANTED: 'Grant the page in the domain\'s config, as iomem=["fed42,1"] '
    "for locality 2, and make tpmlocality= agree with it.",
    RefusedReason.NOT_PLATFORM: "Only domain 0 powers the platform on and off.",
    RefusedReason.TOO_WIDE: _LOOK_AT_LOG,
    RefusedReason.MALFORMED: "Use the same version of this software for both programs.",
    RefusedReason.TOO_MANY_CONNECTIONS: "Close other connections to the chip.",
    RefusedReason.CHIP_FAILED: _LOOK_AT_LOG,
}
_OF_RIGHTS: Final = frozenset(
    {RefusedReason.UNKNOWN_PEER, RefusedReason.PAGE_NOT_GRANTED, RefusedReason.NOT_PLATFORM}
)
"""Refusals that another try cannot change; a message with a bit turned round is refused once."""
_FAULT_NEXT_STEPS: Final = {
    TisFault.ABSENT: "Power the platform on with: vtpm up",
    TisFault.TIMEOUT_A: "Another locality keeps the TPM; wait for it, or end the program there.",
    TisFault.SEIZED: "A higher locality took the TPM; it is not known whether the command ran.",
    TisFault.TOO_LONG: "Send a command that fits the TPM's buffer of 4096 bytes.",
    TisFault.HASH_REFUSED: "The TPM must be started and no locality active for a dynamic launch.",
}


_BUSY: Final = frozenset(
    {
        TisFault.TIMEOUT_A,
        TisFault.TIMEOUT_B,
        TisFault.TIMEOUT_C,
        TisFault.TIMEOUT_D,
        TisFault.TIMEOUT_DURATION,
    }
)
"""Faults that pass: the chip, or the locality that has it, needs more time."""
_REPEATABLE: Final = frozenset(
    {
        Ordinal.CONTINUE_SELF_TEST,
        Ordinal.GET_CAPABILITY,
        Ordinal.GET_RANDOM,
        Ordinal.GET_TEST_RESULT,
        Ordinal.GET_TICKS,
        Ordinal.NV_READ_VALUE,
        Ordinal.PCR_READ,
        Ordinal.READ_PUBEK,
        Ordinal.READ_COUNTER,
        Ordinal.SELF_TEST_FULL,
    }
)
_NOT_OURS: Final = frozenset({TisFault.SEIZED, TisFault.ABSENT, TisFault.TOO_LONG})
"""Faults after which there is no command of ours in the chip."""


def may_run_twice(request: bytes) -> bool:
    """Tell whether a command does no harm when it is run again, its first response lost.

    Those with authorization do: the nonces of their session have moved on.
    """
    tag, ordinal = int.from_bytes(request[:2], "big"), int.from_bytes(request[6:10], "big")
    return tag == Tag.RQU_COMMAND and ordinal in _REPEATABLE


class _LostError(Exception):
    """The connection ended under an operation."""


class _Command:
    """A command on its way.

    Args:
        request: Its bytes.
        is_outstanding: It may be in the chip, which is to be asked first.

    Attributes:
        has_gone: It was started, as far as this process knows.
    """

    def __init__(self, request: bytes, *, is_outstanding: bool) -> None:
        self.request = request
        self.is_outstanding = is_outstanding
        self.has_gone = is_outstanding

    def may_go_on(self, fault: TisFault) -> bool:
        """Tell whether to try again after a fault; if so, how is noted."""
        if fault in _BUSY:
            self.is_outstanding = self.has_gone  # what was started goes on, and is asked for again
            return True
        if fault is not TisFault.SEIZED:
            return False
        self.is_outstanding = False
        return not self.has_gone or may_run_twice(self.request)


class Patience:
    """How long something that passes is waited for, from the first time that it is seen.

    Args:
        limit_s: In seconds, of the machine's clock, whatever the driver's says.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline_s: float | None = None

    @property
    def has_more(self) -> bool:
        """Whether it may still be waited for."""
        return self.left_s > 0.0

    @property
    def left_s(self) -> float:
        """For how long it may still be waited for; counted from the first time this is asked."""
        now_s = time.monotonic()
        if self._deadline_s is None:
            self._deadline_s = now_s + self._limit_s
        return self._deadline_s - now_s


class _OddAnswerError(Exception):
    """The chip's process sent a message that has no place there."""


class TisLink:
    """One locality of the hardware TPM, over its socket.

    Nothing is connected before it is needed. Every method may raise these:
        ChipMissing: Nobody serves the socket, for `connect_timeout_s`.
        ChipLost: The connection ended and did not come back in `reconnect_timeout_s`.
        ChipSilent: A register read stayed unanswered.
        ChipRefused: The chip's process refused it.
        ChipFault: The chip does not do it.

    Args:
        path: The chip's socket.
        locality: 0 to 4.
        connect_timeout_s: How long to wait for the socket to be there, in seconds.
        reconnect_timeout_s: How long to wait for a lost chip to come back, in seconds.
        answer_timeout_s: How long a register read may stay unanswered, in seconds.
        busy_timeout_s: How long the chip may be busy, or another locality's, in seconds.
        timing: The waits of the driver before `learn_timing`.
        monotonic_s: The clock of the driver's waits.
        use_interrupts: Wait for interrupts; False: poll.
    """

    def __init__(  # noqa: PLR0913 - two and seven named ones with defaults
        self,
        path: Path,
        locality: int,
        *,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        reconnect_timeout_s: float = RECONNECT_TIMEOUT_S,
        answer_timeout_s: float = ANSWER_TIMEOUT_S,
        busy_timeout_s: float = BUSY_TIMEOUT_S,
        monotonic_s: Callable[[], float] = time.monotonic,
        timing: Timing | None = None,
        use_interrupts: bool = True,
    ) -> None:
        self._path = path
        self._connect_timeout_s = connect_timeout_s
        self._reconnect_timeout_s = reconnect_timeout_s
        self._answer_timeout_s = answer_timeout_s
        self._busy_timeout_s = busy_timeout_s
        self._monotonic_s = monotonic_s
        self._driver = TisDriver(locality, timing=timing, use_interrupts=use_interrupts)
        self._turn = threading.Lock()
        self._wire: _Wire | None = None
        self._identity: ChipIdentity | None = None
        self._is_closing = False
        # The chip may hold a response that must not be taken for the next command's; also one of an
        # earlier process, so this is where every link begins.
        self._is_unfinished = True
        # A caller who may be killed before `finish` has yet to take the response from the chip.
        self._is_response_kept = False
        self._letting_go = threading.Event()
        self._let_go_thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection, also under an operation of another thread. The chip changes nothing.

        But for a locality that was to be let go: that is given up now. The link may be used again;
        it connects again then.
        """
        self._is_closing = True
        if self._letting_go.is_set() and self._turn.acquire(blocking=False):
            try:
                if not self._is_response_kept:
                    self._relinquish_if_connected()
            finally:
                self._turn.release()
        wire = self._wire
        if wire is not None:
            wire.cut()
        with self._turn:
            self._drop()
            self._is_closing = False

    # -- commands

    def exchange(self, request: bytes) -> bytes:
        """Run one command and give its response.

        Args:
            request: 10 to 4096 bytes.
        """
        with self._turn, self._told("run a command on"):
            response = self._execute(request, is_outstanding=False)
            self._finish()
            return response

    def execute(self, request: bytes) -> bytes:
        """Run one command and leave its response in the chip until `finish`.

        Whoever stores the response before `finish` can be killed at any instant and learn by
        `resume` what became of the command.
        """
        with self._turn, self._told("run a command on"):
            response = self._execute(request, is_outstanding=False)
            self._is_response_kept = True
            return response

    def finish(self) -> None:
        """Let the chip forget the response."""
        with self._turn, self._told("end a command on"):
            self._finish()

    def resume(self, request: bytes) -> bytes:
        """Give the response of a command that this or an earlier process left outstanding.

        It is run now if it had not run. Its response stays in the chip until `finish`.
        """
        with self._turn, self._told("resume a command on"):
            response = self._execute(request, is_outstanding=True)
            self._is_response_kept = True
            return response

    def recollect(self, request: bytes) -> bytes | None:
        """Give the response of a command that an earlier process left outstanding, if it has run.

        Returns:
            The response, which stays in the chip until `finish`; None when the command never
            reached the chip as a whole, and so was not run, nor is it now.
        """
        with self._turn, self._told("learn what became of a command on"):
            duration_s = self._driver.timing.duration_s(request)
            response = self._persist(
                lambda wire: wire.run(self._driver.resume(request)), duration_s=duration_s
            )
            self._is_response_kept = response is not None
            return response

    def settle(self) -> None:
        """Make sure that no response of an earlier command waits in the chip."""
        with self._turn, self._told("end a command on"):
            self._is_response_kept = False
            self._persist(self._settled)

    def _settled(self, wire: _Wire) -> None:
        if self._is_unfinished:
            self._finish_over(wire)
        self._initialized(wire)
        wire.run(self._driver.make_ready())

    def let_go(self) -> None:
        """Give the locality up within `HOLD_S`; what comes before that finds it still held.

        To take and to give up a locality costs more than a command.
        """
        if self._let_go_thread is None:
            thread = threading.Thread(target=self._let_go_in_time, name="let go", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there is none for us: at once, then
                with self._turn:
                    self._relinquish_if_connected()
                return
            self._let_go_thread = thread
        self._letting_go.set()

    def _let_go_in_time(self) -> None:
        while True:
            self._letting_go.wait()
            time.sleep(HOLD_S)
            with self._turn:
                if not self._is_response_kept:
                    self._letting_go.clear()
                    self._relinquish_if_connected()

    def _relinquish_if_connected(self) -> None:
        # Whether this succeeds changes nothing for anybody who was answered.
        with contextlib.suppress(Failure), self._told("give up a locality of"):
            if self._wire is not None and self._wire.is_usable:
                self._wire.allow(FAREWELL_S)
                self._wire.run(self._driver.relinquish())

    def identify(self) -> ChipIdentity:
        """Take the locality and read what chip this is."""
        with self._turn, self._told("identify"):
            return self._patiently(self._initialized)

    def learn_timing(self) -> Timing:
        """Ask the started TPM for its timeouts and durations, and use them."""

        def learn(wire: _Wire) -> Timing:
            self._initialized(wire)
            return wire.run(self._driver.learn_timing())

        with self._turn, self._told("learn the timing of"):
            return self._patiently(learn)

    def hash_sequence(self, data: bytes) -> None:
        """Run the dynamic-launch sequence of locality 4 over `data`; its page must be granted."""
        driver = TisDriver(HASH_LOCALITY, timing=self._driver.timing, use_interrupts=False)

        def measure(wire: _Wire) -> None:
            wire.check_granted(HASH_LOCALITY)
            wire.run(driver.hash_sequence(data))

        with self._turn, self._told("run the hash sequence on"):
            self._persist(measure)  # begun anew, it resets what it measures into

    def relinquish(self) -> None:
        """Give the locality up: another one is granted, and a hash sequence accepted, only then."""
        with self._turn, self._told("give up a locality of"):
            self._persist(lambda wire: wire.run(self._driver.relinquish()))

    # -- the platform's pins

    def power_on(self) -> None:
        """TPM_Init: the platform has power, or was reset."""
        self._move_pin(PowerOn())

    def power_off(self) -> None:
        """The platform has no power any more."""
        self._move_pin(PowerOff())

    def set_physical_presence(self, *, is_asserted: bool) -> None:
        """Move the physical-presence pin."""
        self._move_pin(PhysicalPresence(is_asserted=is_asserted))

    def _move_pin(self, request: PowerOn | PowerOff | PhysicalPresence) -> None:
        with self._turn, self._told("move a pin of"):
            wire = self._connected(self._connect_timeout_s)
            wire.ask(request)
            if not isinstance(request, PhysicalPresence):
                self._identity = None  # the registers have their reset values

    # -- with the turn held

    def _execute(self, request: bytes, *, is_outstanding: bool) -> bytes:
        self._is_response_kept = False
        command = _Command(request, is_outstanding=is_outstanding)
        duration_s = self._driver.timing.duration_s(request)
        try:
            return self._persist(
                lambda wire: self._attempt(wire, command), command.may_go_on, duration_s
            )
        except TisError as error:
            self._abort(error)
            raise

    def _persist(
        self,
        work: Callable[[_Wire], T],
        may_go_on: Callable[[TisFault], bool] = _BUSY.__contains__,
        duration_s: float = 0.0,
    ) -> T:
        """Do something with the chip over the loss of connections, and over what passes.

        Args:
            work: Done again from its beginning.
            may_go_on: Whether to do it again after a fault.
            duration_s: How long the chip may take for it.
        """
        connect_timeout_s = self._connect_timeout_s
        lost, busy = Patience(self._reconnect_timeout_s), Patience(self._busy_timeout_s)
        while True:
            try:
                return work(self._connected(connect_timeout_s, duration_s))
            except _LostError:
                if not lost.has_more or self._is_closing:
                    raise
                connect_timeout_s = lost.left_s
                time.sleep(CONNECT_RETRY_S)
            except TisError as error:
                if not may_go_on(error.fault) or self._is_closing or not busy.has_more:
                    raise
                if error.fault is TisFault.SEIZED:
                    self._identity = None

    def _attempt(self, wire: _Wire, command: _Command) -> bytes:
        command.has_gone = command.is_outstanding
        if command.is_outstanding:
            # Before anything else is done to the registers: they know what happened.
            response = wire.run(self._driver.resume(command.request))
            if response is not None:
                return response
            command.has_gone = False
        elif self._is_unfinished:
            self._finish_over(wire)
        self._initialized(wire)
        self._is_unfinished = True
        # A response of the command before may come back with a chip that is killed now. It must not
        # be taken for this one's, so this one is outstanding only when the chip was seen ready.
        wire.run(self._driver.make_ready())
        command.is_outstanding = True
        wire.run(self._driver.send(command.request))
        command.has_gone = True
        return wire.run(self._driver.collect(command.request))

    def _abort(self, error: TisError) -> None:
        """Let the chip forget a command that failed, where it can be told."""
        if error.fault not in _NOT_OURS and self._wire is not None and self._wire.is_usable:
            with contextlib.suppress(_LostError):
                self._wire.run(self._driver.abort())

    def _patiently(self, work: Callable[[_Wire], T]) -> T:
        """Do what does no harm when it is done again, as often as a busy chip needs it."""
        busy = Patience(self._busy_timeout_s)
        while True:
            try:
                return work(self._connected(self._connect_timeout_s))
            except TisError as error:
                passes = error.fault in _BUSY or error.fault is TisFault.SEIZED
                if not passes or self._is_closing or not busy.has_more:
                    raise

    def _finish(self) -> None:
        self._is_response_kept = False
        # With the connection lost there is nothing to do here: the next command begins with it.
        if self._wire is not None:
            try:
                self._finish_over(self._wire)
            except _LostError:
                self._drop()

    def _finish_over(self, wire: _Wire) -> None:
        # Whoever waits for the locality of a link that lets go is let in by that.
        wire.run(self._driver.finish(gives_way=self._let_go_thread is None))
        self._is_unfinished = False

    def _connected(self, timeout_s: float, duration_s: float = 0.0) -> _Wire:
        if self._wire is not None and not self._wire.is_usable:
            self._drop()
        if self._wire is None:
            self._wire = _Wire(self._path, self._answer_timeout_s, timeout_s, self._monotonic_s)
        try:
            self._wire.check_granted(self._driver.locality)
        except ChipRefused:
            self._drop()
            raise
        # At once for the command, which is mostly as the one before: each change is a system call.
        self._wire.allow(self._answer_timeout_s + duration_s)
        return self._wire

    def _initialized(self, wire: _Wire) -> ChipIdentity:
        if self._identity is None:
            self._identity = wire.run(self._driver.initialize())
        return self._identity

    def _drop(self) -> None:
        if self._wire is not None:
            self._wire.close()
        self._wire = self._identity = None

    @contextlib.contextmanager
    def _told(self, doing: str) -> Iterator[None]:
        """Turn what the layers below raise into what a person reads."""
        what = f"cannot {doing} the hardware TPM (locality {self._driver.locality})"
        try:
            yield
        except TisError as error:
            # Behind an answer that came twice, each is taken for that of the next access.
            if self._wire is not None and self._wire.has_answers_left():
                self._drop()
            raise ChipFault(what, error) from error
        except _LostError as error:
            self._drop()
            raise ChipLost(
                what,
                why=f"the connection to {self._path} ended: {error}",
                next_step=_LOOK_AT_LOG,
                exit_code=ExitCode.UNAVAILABLE,
            ) from error
        except (TimeoutError, DecodeError, _OddAnswerError) as error:
            # What comes later would be taken for the answer to something else.
            self._drop()
            raise ChipSilent(
                what,
                why=f"the process behind {self._path} gave no proper answer: {error}",
                next_step=_LOOK_AT_LOG,
                exit_code=ExitCode.UNAVAILABLE,
            ) from error
        except ChipRefused:
            self._drop()
            raise


class _Wire:
    """One connection: driver steps in, messages out.

    After any exception but `TisError` it is not usable: an answer may still be on its way.
    """

    def __init__(
        self,
        path: Path,
        answer_timeout_s: float,
        connect_timeout_s: float,
        monotonic_s: Callable[[], float],
    ) -> None:
        self.is_usable = True
        self._monotonic_s = monotonic_s
        self._has_interrupt = False
        self._limit_s = 0.0
        self._socket = _connect(path, connect_timeout_s)
        try:
            set_send_timeout(self._socket, answer_timeout_s)
            self.allow(answer_timeout_s)
            self._localities = self._greeting().localities
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def cut(self) -> None:
        """End the connection under whoever waits on it; for other threads."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def allow(self, limit_s: float) -> None:
        """Let each answer take so long, from now on."""
        if limit_s != self._limit_s:
            set_receive_timeout(self._socket, limit_s)
            self._limit_s = limit_s

    def check_granted(self, locality: int) -> None:
        """Refuse a page here that the chip would refuse too.

        Raises:
            ChipRefused: The page was not granted.
        """
        if locality not in self._localities:
            granted = ", ".join(str(n) for n in sorted(self._localities)) or "none"
            raise ChipRefused(
                f"cannot use locality {locality} of the hardware TPM",
                reason=RefusedReason.PAGE_NOT_GRANTED,
                text=f"this domain was not granted that page (granted: {granted})",
            )

    def run(self, steps: Steps[T]) -> T:
        """Run a driver operation.

        Raises:
            TisError: The operation failed; the connection goes on.
            _LostError, TimeoutError, DecodeError, _OddAnswerError, ChipRefused: It does not.
        """
        answer: StepAnswer = None
        try:
            while True:
                answer = self._perform(steps.send(answer))
        except StopIteration as end:
            value: T = end.value
            return value
        except TisError:
            raise
        except BaseException:
            self.is_usable = False
            raise

    def has_answers_left(self) -> bool:
        """Tell whether an answer is there, or about to come, that nobody waits for."""
        try:
            while select.select([self._socket], [], [], LATE_S)[0]:
                if not isinstance(self._receive(), Interrupt):
                    return True
                self._has_interrupt = True
        except (_LostError, ChipRefused, DecodeError):
            return True
        return False

    def ask(self, request: PowerOn | PowerOff | PhysicalPresence) -> None:
        """Move a pin and wait until it is done; raises as `run`."""
        try:
            self._send(request)
            self._expect(Done, request)
        except BaseException:
            self.is_usable = False
            raise

    def _perform(self, step: Step) -> StepAnswer:
        if isinstance(step, Read):
            self._send(step)
            data = self._expect(Value, step).data
            if len(data) != step.count:
                raise _OddAnswerError(f"{len(data)} bytes in answer to {step}")
            return data
        if isinstance(step, Write):
            self._send(step)
            return None
        if isinstance(step, WaitInterrupt):
            self._wait_interrupt(step.limit_s)
        elif step.interval_s > 0.0:
            time.sleep(step.interval_s)
        return self._monotonic_s()

    def _wait_interrupt(self, limit_s: float) -> None:
        if not self._has_interrupt and select.select([self._socket], [], [], limit_s)[0]:
            answer = self._receive()
            if not isinstance(answer, Interrupt):
                raise _OddAnswerError(f"{answer} where nothing was asked")
        self._has_interrupt = False

    def _greeting(self) -> Hello:
        hello = self._receive()
        if not isinstance(hello, Hello) or hello.version != VERSION:
            raise _OddAnswerError(f"{hello} is no greeting of version {VERSION}")
        return hello

    def _expect(self, kind: type[T], request: Request) -> T:
        """The answer to a request; an interrupt before it is kept for who waits for it."""
        while isinstance(answer := self._receive(), Interrupt):
            self._has_interrupt = True
        if not isinstance(answer, kind):
            raise _OddAnswerError(f"{answer} in answer to {request}")
        return answer

    def _send(self, request: Request) -> None:
        try:
            self._socket.send(encode_message(request))
        except BlockingIOError as error:
            raise TimeoutError("it takes no more register accesses") from error
        except OSError as error:
            raise _LostError(str(error)) from error

    def _receive(self) -> Answer:
        try:
            message = self._socket.recv(MESSAGE_BYTES_MAX + 1)
        except BlockingIOError as error:
            raise TimeoutError(f"nothing came for {self._limit_s} s") from error
        except OSError as error:
            raise _LostError(str(error)) from error
        if not message:
            raise _LostError("the chip's process closed it")
        answer = decode_answer(message)
        if isinstance(answer, Refused):
            raise ChipRefused(
                "the hardware TPM refused an access", reason=answer.reason, text=answer.text
            )
        return answer


def _connect(path: Path, timeout_s: float) -> socket.socket:
    """Connect, waiting for a socket that is not there yet, or for a descriptor of ours."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            return connect(path, Kind.SEQPACKET, timeout_s)
        except (NotListening, NotNow) as missing:
            if time.monotonic() >= deadline_s:
                raise ChipMissing(
                    f"cannot reach the hardware TPM at {path}",
                    why=f"{missing.why}, after waiting {timeout_s:g} s",
                    next_step="Start the stack with: vtpm up"
                    if isinstance(missing, NotListening)
                    else missing.next_step,
                    exit_code=ExitCode.UNAVAILABLE,
                ) from missing
        time.sleep(CONNECT_RETRY_S)
