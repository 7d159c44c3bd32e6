"""`vtpm crashsweep`: a user's own command, with a daemon killed at each of its messages and steps.

Each point gets a fresh platform: the images and the chip's memory are put back to what they were
when the platform had been up for the first time, and everything is started anew.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from daemons.cli.guests import NOT_EXECUTABLE, NOT_FOUND, Command
from daemons.cli.options import Json, ask
from daemons.cli.output import print_json, print_line, print_rows, progress
from daemons.errors import ExitCode, Failure
from daemons.faults.hooks import DIRECTORY_NAME
from daemons.faults.points import MANAGER, NO_FAULTS, PLACES, VTPM, PointKind, choose_points
from daemons.places import CHIP_NAME, Places

if TYPE_CHECKING:
    from daemons.faults.control import FaultControl
    from daemons.faults.points import Point

GUEST: Final = "guest1"
IMAGE_BYTES: Final = 2 * 1024 * 1024
WHOLE_S: Final = 60.0
"""How long the stack may take to be whole after a command."""
END_S: Final = 10.0
SURVIVED: Final = "survived"
_LOOK_AGAIN_S: Final = 0.02

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a run of the command ended.

    Attributes:
        status: Its exit status as a shell says it; None if it took too long.
        seconds: How long it took.
        last_line: The last it printed on stderr, else on stdout.
    """

    status: int | None
    seconds: float
    last_line: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one point."""

    place: str
    operation: int
    outcome: str
    status: int | None
    seconds: float
    last_line: str


def crashsweep(  # noqa: PLR0913 - options of a command
    command: Command,
    *,
    points: Annotated[
        PointKind, typer.Option("--points", help="Which points to go through.")
    ] = PointKind.ALL,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many points.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Draws the sample.")] = 0,
    patience_s: Annotated[
        float,
        typer.Option("--patience", metavar="SECONDS", min=0.1, help="For each run of the command."),
    ] = 120.0,
    as_json: Json = False,
) -> None:
    """Run a command again and again, with a daemon killed at another point each time.

    It runs as in guest1 of a platform made for it, first without faults, which counts the points.
    Ends with status 0 if its exit status was the same at every point.
    """
    from daemons.faults.control import FaultControl  # noqa: PLC0415 - `--help` needs none of it
    from daemons.launcher.processes import become_child_subreaper  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _leave)
    become_child_subreaper()
    scratch = Path(tempfile.mkdtemp(prefix="vtpm-sweep-"))
    platform = Platform(scratch)
    try:
        with progress("crashsweep") as step:
            step("making a platform")
            platform.make(step)
            swept = (VTPM, MANAGER, CHIP_NAME)
            with FaultControl(platform.places, swept) as control:
                sweep = Sweep(platform, control, command, patience_s, step)
                reference, outcomes = sweep.run(points, limit, seed)
    finally:
        try:
            kill_children()
        finally:
            shutil.rmtree(scratch)
    _tell(reference, outcomes, command, as_json=as_json)
    lost = [outcome for outcome in outcomes if outcome.outcome != SURVIVED]
    if lost:
        raise Failure(
            f"{len(lost)} of {len(outcomes)} points were not survived",
            why=f"the first: {lost[0].place}, operation {lost[0].operation}: {lost[0].outcome}",
            next_step="a program that takes nothing amiss survives all; see docs/faults.md",
            exit_code=ExitCode.FAILED,
        )


class Platform:
    """A scratch platform: the manager, one vTPM and its guest.

    Args:
        root: An empty directory.
    """

    def __init__(self, root: Path) -> None:
        self.places = Places(root)
        self._root = str(root)
        self._images = self.places.images("/images")
        self._kept = root / "kept"

    def make(self, step: Step) -> None:
        """Make images, start everything once, stop it, and keep what is stored."""
        from daemons.cli.story import COMMAND_LINE, initrd_of, kernel_of  # noqa: PLC0415
        from daemons.guest.boot_image import BootFiles, write_boot_image  # noqa: PLC0415

        self._images.mkdir(mode=0o700)
        for name in ("vtpmmgr-stubdom", VTPM, GUEST):
            with (self._images / f"{name}.img").open("wb") as image:
                image.truncate(IMAGE_BYTES)
        files = BootFiles(
            kernel=kernel_of(GUEST), initrd=initrd_of(GUEST), command_line=COMMAND_LINE
        )
        write_boot_image(self._images / f"{GUEST}.img", files)
        self.start(step)
        ask(self._root, "stop", step)
        kill_children()  # the launcher, which ends by itself, and nothing else
        shutil.copytree(self._images, self._kept)
        shutil.copy2(self.places.chip_memory, self._kept)

    def restore(self) -> None:
        """End what runs as a power cut does, and put back what was stored after the first start."""
        kill_children()
        for entry in self.places.run.iterdir():
            if entry.is_dir() and entry.name != DIRECTORY_NAME:
                shutil.rmtree(entry)
            elif not entry.is_dir():
                entry.unlink()
        for kept in self._kept.iterdir():
            home = self.places.chip_memory.parent if kept.suffix == ".nv" else self._images
            shutil.copy2(kept, home)

    def start(self, step: Step) -> dict[str, str]:
        """Start everything; what is in the guest's environment."""
        from daemons.cli.stack import (  # noqa: PLC0415 - `--help` needs none of it
            create_domain,
            read_domain_file,
            start_launcher,
        )
        from daemons.cli.story import EXAMPLES  # noqa: PLC0415

        start_launcher(self.places, step)
        ask(self._root, "power_on", step)
        for name in (MANAGER, VTPM, GUEST):
            create_domain(read_domain_file(EXAMPLES / f"{name}.cfg"), self._root, step)
        environment: dict[str, str] = ask(self._root, "guest_environment", domain=GUEST)
        return environment

    def guest_domid(self) -> int:
        """The domid of the guest: another one when it has booted again."""
        rows = {row["name"]: row for row in ask(self._root, "list")}
        domid = rows[GUEST]["domid"]
        assert isinstance(domid, int)
        return domid

    def what_is_wrong(self) -> str:
        """Wait until all domains run; what is wrong with one that does not, or nothing."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            rows = [*ask(self._root, "list"), ask(self._root, "status")["chip"]]
            wrong = [
                f"{row['name']} is {row['state']}" for row in rows if row["state"] != "running"
            ]
            if not wrong or time.monotonic() > deadline:
                return "; ".join(wrong)
            time.sleep(_LOOK_AGAIN_S)


class Sweep:
    """One command, again and again.

    Args:
        platform: Where it runs.
        control: Kills there.
        command: The program and its arguments.
        patience_s: How long each run may take.
        step: Called with what is being done.
    """

    def __init__(
        self,
        platform: Platform,
        control: FaultControl,
        command: Sequence[str],
        patience_s: float,
        step: Step,
    ) -> None:
        self._platform = platform
        self._control = control
        self._command = command
        self._patience_s = patience_s
        self._step = step

    def run(self, kind: PointKind, limit: int | None, seed: int) -> tuple[Ended, Sequence[Outcome]]:
        """Run the command without faults, then once for each point."""
        self._step("counting, without faults")
        reference, wrong = self._once(NO_FAULTS)
        if wrong or reference.status is None:
            raise Failure(
                "the command cannot be swept",
                why=wrong or f"it takes longer than {self._patience_s:g} s without faults",
                next_step="give it more time with --patience, or a smaller task",
            )
        counted = {place: self._control.counted(place.domain, place.kind) for place in PLACES[kind]}
        points = choose_points(counted, limit, seed)
        outcomes: list[Outcome] = []
        lost = 0
        for number, point in enumerate(points, start=1):
            self._step(f"point {number} of {len(points)}, {lost} not survived: {point}")
            outcomes.append(self._outcome(point, reference))
            lost += outcomes[-1].outcome != SURVIVED
        return reference, outcomes

    def _outcome(self, point: Point, reference: Ended) -> Outcome:
        ended, wrong = self._once(point.plan())
        if not self._control.new_lines():
            outcome = "not reached: the command went another way"
        elif ended.status is None:
            outcome = f"did not end within {self._patience_s:g} s"
        elif ended.status != reference.status:
            outcome = f"exit status {ended.status}"
        else:
            outcome = wrong or SURVIVED
        return Outcome(
            place=str(point.place),
            operation=point.nth,
            outcome=outcome,
            status=ended.status,
            seconds=round(ended.seconds, 3),
            last_line=ended.last_line,
        )

    def _once(self, plan: bytes) -> tuple[Ended, str]:
        """Run the command on a fresh platform; how it ended and what is wrong afterwards."""
        self._platform.restore()
        environment = self._platform.start(_say_nothing)
        domid = self._platform.guest_domid()
        self._control.arm(plan)
        ended = run_command(self._command, environment, self._patience_s)
        wrong = self._platform.what_is_wrong()
        if not wrong and self._platform.guest_domid() != domid:
            wrong = f"{GUEST} has booted again"
        self._control.disarm()
        return ended, wrong


def kill_children() -> None:
    """Kill every process below this one, and return when they have ended; orphans come to us.

    Raises:
        Failure: One does not end.
    """
    from daemons.cli.story import children_left  # noqa: PLC0415 - `--help` needs none of it

    deadline = time.monotonic() + END_S
    while children := children_left():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Failure(
                "the scratch platform does not end",
                why=f"processes {children} are still there after they were killed",
                next_step="look at them with ps",
            )
        time.sleep(_LOOK_AGAIN_S)


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


def _tell(
    reference: Ended, outcomes: Sequence[Outcome], command: Sequence[str], *, as_json: bool
) -> None:
    if as_json:
        print_json(
            {
                "command": list(command),
                "without_faults": asdict(reference),
                "points": [asdict(outcome) for outcome in outcomes],
            }
        )
        return
    print_rows(
        ("Place", "Operation", "Seconds", "Outcome"),
        [(o.place, o.operation, f"{o.seconds:.2f}", o.outcome) for o in outcomes],
        ["" if o.outcome == SURVIVED else o.last_line for o in outcomes],
    )
    survived = sum(outcome.outcome == SURVIVED for outcome in outcomes)
    print_line(
        f"{survived} of {len(outcomes)} points survived; "
        f"without faults: exit status {reference.status}, {reference.seconds:.2f} s"
    )


def _say_nothing(_: str) -> None:
    """For the steps of a start that is one of many."""


def _leave(number: int, _frame: object) -> None:
    """Turn SIGTERM into an orderly end, so that nothing is left behind."""
    sys.exit(128 + number)
