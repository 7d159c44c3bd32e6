"""What a crash sweep does again and again: a command, a start, or coming back from a kill.

Each trial is done first without faults, which says what is right, and then once for each point.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import typer

from daemons.cli.guests import NOT_EXECUTABLE, NOT_FOUND
from daemons.cli.sweep_platform import GUEST, Platform
from daemons.errors import ExitCode, Failure

if TYPE_CHECKING:
    from daemons.faults.control import FaultControl

NV_INDEX: Final = 0x21
NV_BYTES: Final = 16
_OWNER_READ_AND_WRITE: Final = 0x00020002
_PCR: Final = 10
_MEASUREMENT: Final = b"\xa5" * 20


class TooLongError(Exception):
    """Something did not end in time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run ended.

    Attributes:
        status: The exit status of the command as a shell says it, or of what failed; None if it
            took too long.
        seconds: How long it took.
        last_line: The last it printed on stderr, else on stdout; or why it failed.
        wrong: What is not as it should be afterwards.
    """

    status: int | None
    seconds: float
    last_line: str = ""
    wrong: str = ""


class Trial(Protocol):
    """One thing to be done again and again."""

    @property
    def name(self) -> str:
        """What stands before its points in the table; empty if there is one trial alone."""

    def prepare(self) -> None:
        """Do what is to be done once, before all points."""

    def once(self, plan: bytes) -> Ended:
        """Do it on a fresh platform, with this plan."""


class CommandTrial:
    """A command of the user's, in the guest.

    Args:
        platform: Where it runs.
        control: Kills there.
        command: The program and its arguments.
        patience_s: How long it may take.
    """

    name = ""

    def __init__(
        self, platform: Platform, control: FaultControl, command: Sequence[str], patience_s: float
    ) -> None:
        self._platform = platform
        self._control = control
        self._command = command
        self._patience_s = patience_s

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def once(self, plan: bytes) -> Ended:
        """See `Trial`."""
        self._platform.restore()
        environment = self._platform.start(say_nothing)
        domid = self._platform.guest_domid()
        self._control.arm(plan)
        ended = run_command(self._command, environment, self._patience_s)
        wrong = self._platform.what_is_wrong()
        if not wrong and self._platform.guest_domid() != domid:
            wrong = f"{GUEST} has booted again"
        self._control.disarm()
        return Ended(
            status=ended.status, seconds=ended.seconds, last_line=ended.last_line, wrong=wrong
        )


class StartTrial:
    """The start of the whole platform; all PCRs have to be as without faults.

    Args:
        platform: What is started.
        control: Kills there.
        is_first: Nothing was ever stored.
        patience_s: How long it may take.
    """

    name = ""

    def __init__(
        self, platform: Platform, control: FaultControl, patience_s: float, *, is_first: bool
    ) -> None:
        self._platform = platform
        self._control = control
        self._patience_s = patience_s
        self._is_first = is_first
        self._expected: dict[str, tuple[str, ...]] | None = None

    def prepare(self) -> None:
        """There is nothing to prepare."""

    def once(self, plan: bytes) -> Ended:
        """See `Trial`."""
        self._platform.restore(is_blank=self._is_first)
        self._control.arm(plan)
        return judged(self._start, self._patience_s, self._control)

    def _start(self) -> str:
        self._platform.start(say_nothing)
        wrong = self._platform.what_is_wrong()
        if wrong:
            return wrong
        measured = self._platform.measured()
        if self._expected is None:
            self._expected = measured
        return difference(self._expected, measured)


class RecoveryTrial:
    """A daemon is killed, and the point is reached while it comes back and a guest's program works.

    Args:
        platform: Where.
        control: Kills there.
        domain: Who is killed first.
        patience_s: How long it may take until all is well.
    """

    def __init__(
        self, platform: Platform, control: FaultControl, domain: str, patience_s: float
    ) -> None:
        self._platform = platform
        self._control = control
        self._domain = domain
        self._patience_s = patience_s
        self._expected: dict[str, tuple[str, ...]] | None = None

    @property
    def name(self) -> str:
        """See `Trial`."""
        return f"{self._domain} killed, then "

    def prepare(self) -> None:
        """Keep a vTPM that has an NV area to write."""
        if self._platform.has_area:
            return
        self._platform.restore()
        self._platform.start(say_nothing)
        with self._guest() as tpm:
            tpm.make_area()
        self._platform.keep(say_nothing)
        self._platform.has_area = True

    def once(self, plan: bytes) -> Ended:
        """See `Trial`."""
        self._platform.restore()
        self._platform.start(say_nothing)
        domid = self._platform.guest_domid()
        with self._guest() as tpm:
            tpm.extend()
            self._control.arm(plan)
            os.kill(self._platform.pid(self._domain), signal.SIGKILL)
            return judged(lambda: self._work(tpm, domid), self._patience_s, self._control)

    def _work(self, tpm: GuestProgram, domid: int) -> str:
        wrong = tpm.work() or self._platform.what_is_wrong()
        if wrong:
            return wrong
        if self._platform.guest_domid() != domid:
            return f"{GUEST} has booted again"
        measured = self._platform.measured()
        if self._expected is None:
            self._expected = measured
        return difference(self._expected, measured)

    @contextlib.contextmanager
    def _guest(self) -> Iterator[GuestProgram]:
        from daemons.guest.tpm0_client import Tpm0Client  # noqa: PLC0415 - `--help` needs none

        with Tpm0Client(self._platform.tpm0, answer_s=self._patience_s) as device:
            yield GuestProgram(device.exchange)


class GuestProgram:
    """A program in the guest that changes its TPM, volatile and permanent, and checks it.

    Args:
        exchange: Runs a command.
    """

    def __init__(self, exchange: Callable[[bytes], bytes]) -> None:
        from daemons.world import SystemRng  # noqa: PLC0415 - `--help` needs none of it
        from tpm12.client import TpmClient  # noqa: PLC0415

        self._tpm = TpmClient(exchange, rng=SystemRng())

    def make_area(self) -> None:
        """Own the TPM and make the area."""
        self._tpm.take_ownership()
        self._tpm.nv_define_space(NV_INDEX, NV_BYTES, _OWNER_READ_AND_WRITE)

    def extend(self) -> None:
        """Change a PCR."""
        self._tpm.extend(_PCR, _MEASUREMENT)

    def work(self) -> str:
        """Change PCR and NV area, which the manager and the chip have to know of; what is wrong."""
        self.extend()
        written = os.urandom(NV_BYTES)
        self._tpm.nv_write_value(NV_INDEX, written)
        if self._tpm.nv_read_value(NV_INDEX, NV_BYTES) != written:
            return "the NV area does not hold what was written"
        self.extend()
        return ""


def judged(work: Callable[[], str], patience_s: float, control: FaultControl) -> Ended:
    """Do something in time, say how that ended, and let no more faults happen."""
    from protocol.return_codes import TpmError  # noqa: PLC0415
    from tpm12.client_core import BadResponseError  # noqa: PLC0415 - `--help` needs none of it

    begun = time.monotonic()
    status: int | None = ExitCode.FAILED
    last_line = wrong = ""
    try:
        with time_limit(patience_s):
            wrong = work()
            status = ExitCode.DONE
    except TooLongError:
        status = None
    except Failure as failure:
        status, last_line = failure.exit_code, f"{failure.what}: {failure.why}"
    except (TpmError, BadResponseError, OSError) as error:
        last_line = f"{type(error).__name__}: {error}"
    control.disarm()
    return Ended(
        status=None if status is None else int(status),
        seconds=time.monotonic() - begun,
        last_line=last_line,
        wrong=wrong,
    )


@contextlib.contextmanager
def time_limit(limit_s: float) -> Iterator[None]:
    """Raise `TooLongError` in the main thread when this lasts longer."""

    def ring(_number: int, _frame: object) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def difference(expected: dict[str, tuple[str, ...]], measured: dict[str, tuple[str, ...]]) -> str:
    """Which PCRs are not as without faults."""
    wrong = [
        f"PCR {pcr} of {name}"
        for name, values in expected.items()
        for pcr, value in enumerate(values)
        if measured[name][pcr] != value
    ]
    return f"not as without faults: {', '.join(wrong)}" if wrong else ""


def say_nothing(_: str) -> None:
    """For the steps of a start that is one of many."""


def run_command(command: Sequence[str], environment: dict[str, str], patience_s: float) -> Ended:
    """Run the command in a group of its own, which is ended with it.

    Raises:
        typer.Exit: It cannot be run; with a shell's exit status for that.
    """
    begun = time.monotonic()
    try:
        running = subprocess.Popen(  # noqa: S603 - the user asked for it
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        sys.stderr.write(f"vtpm: cannot run {command[0]}: {error.strerror}\n")
        status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        raise typer.Exit(status) from error
    is_late = False
    try:
        try:
            out, err = running.communicate(timeout=patience_s)
        except subprocess.TimeoutExpired:
            is_late = True
            os.killpg(running.pid, signal.SIGKILL)
            out, err = running.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
    lines = err.strip().splitlines() or out.strip().splitlines() or [""]
    status = running.returncode if running.returncode >= 0 else 128 - running.returncode
    return Ended(
        status=None if is_late else status,
        seconds=time.monotonic() - begun,
        last_line=lines[-1],
    )
