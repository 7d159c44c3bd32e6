"""A sweep: something is done again and again, with a daemon killed at another point each time.

Each point gets a fresh platform: the images and the chip's memory are put back to what they were
when the platform had been up for the first time (or never), and everything is started anew.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from daemons.cli.output import print_json, print_line, print_rows
from daemons.cli.sweep_platform import Platform, Step, kill_children
from daemons.cli.sweep_trials import CommandTrial, Ended, RecoveryTrial, StartTrial, Trial
from daemons.errors import ExitCode, Failure
from daemons.faults.control import FaultControl
from daemons.faults.points import (
    MANAGER,
    NO_FAULTS,
    PLACES,
    VTPM,
    Point,
    choose_points,
    sample,
)
from daemons.faults.sweep_kinds import Phase, PointKind
from daemons.launcher.processes import become_child_subreaper
from daemons.places import CHIP_NAME

SURVIVED: Final = "survived"
_NOTHING: Final = "there is nothing to be swept"
SWEPT: Final = (VTPM, MANAGER, CHIP_NAME)
"""Who is killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one point."""

    place: str
    operation: int
    outcome: str
    status: int | None
    seconds: float
    last_line: str


def swept(  # noqa: PLR0913 - options of a command
    phase: Phase,
    command: Sequence[str],
    points: PointKind,
    limit: int | None,
    *,
    seed: int,
    patience_s: float,
    logs: Path | None,
    step: Step,
) -> tuple[Ended, Sequence[Outcome]]:
    """Make a platform, and go through the points; how it ended without faults, and at each.

    Raises:
        Failure: It cannot even be done without faults.
    """
    signal.signal(signal.SIGTERM, _leave)
    become_child_subreaper()
    scratch = Path(tempfile.mkdtemp(prefix="vtpm-sweep-"))
    platform = Platform(scratch)
    try:
        step("making a platform")
        platform.make(step)
        with FaultControl(platform.places, SWEPT) as control:
            trials = _trials(phase, platform, control, command, patience_s)
            sweep = Sweep(platform, control, trials, patience_s=patience_s, step=step, logs=logs)
            return sweep.run(points, limit, seed)
    finally:
        try:
            kill_children()
        finally:
            shutil.rmtree(scratch)


def _trials(
    phase: Phase,
    platform: Platform,
    control: FaultControl,
    command: Sequence[str],
    patience_s: float,
) -> list[Trial]:
    if phase is Phase.COMMAND:
        return [CommandTrial(platform, control, command, patience_s)]
    if phase is Phase.RECOVERY:
        return [RecoveryTrial(platform, control, domain, patience_s) for domain in SWEPT]
    is_first = phase is Phase.FIRST_START
    return [StartTrial(platform, control, patience_s, is_first=is_first)]


class Sweep:
    """Trials, again and again.

    Args:
        platform: Where.
        control: Kills there.
        trials: What is done.
        patience_s: How long each run may take.
        step: Called with what is being done.
        logs: Where the logs of what was not survived are kept; None: nowhere.
    """

    def __init__(  # noqa: PLR0913 - one caller
        self,
        platform: Platform,
        control: FaultControl,
        trials: Sequence[Trial],
        *,
        patience_s: float,
        step: Step,
        logs: Path | None,
    ) -> None:
        self._platform = platform
        self._control = control
        self._trials = trials
        self._patience_s = patience_s
        self._step = step
        self._logs = logs
        self._begun = 0.0

    def run(self, kind: PointKind, limit: int | None, seed: int) -> tuple[Ended, Sequence[Outcome]]:
        """Do everything without faults, then once for each point."""
        references: list[Ended] = []
        found: list[tuple[int, Point]] = []
        for number, trial in enumerate(self._trials):
            self._step(f"{trial.name}counting, without faults")
            trial.prepare()
            references.append(self._reference(trial))
            counted = {
                place: self._control.counted(place.domain, place.kind) for place in PLACES[kind]
            }
            found += [(number, point) for point in choose_points(counted, None, seed)]
        if not found:
            raise Failure(
                _NOTHING,
                why=f"without faults it came to no point of the kind '{kind}'",
                next_step="let it use the TPM whose socket is in TPM_DEVICE, or try --points all",
            )
        chosen = sample(found, limit, seed)
        outcomes: list[Outcome] = []
        lost = 0
        self._begun = time.monotonic()
        for done, (number, point) in enumerate(chosen):
            trial, reference = self._trials[number], references[number]
            so_far = f"point {done + 1} of {len(chosen)}, {lost} not survived"
            self._step(f"{so_far}{self._left(done, chosen)}: {trial.name}{point}")
            outcomes.append(self._outcome(trial, point, reference))
            if outcomes[-1].outcome != SURVIVED:
                lost += 1
                self._keep_logs(done + 1, trial, point)
        return references[0], outcomes

    def _reference(self, trial: Trial) -> Ended:
        ended = trial.once(NO_FAULTS)
        if ended.wrong or ended.status is None:
            raise Failure(
                _NOTHING,
                why=ended.wrong or f"it takes longer than {self._patience_s:g} s without faults",
                next_step="give it more time with --patience, or a smaller task",
            )
        if ended.status != ExitCode.DONE:
            # To fail in the same way at every point would be called survived.
            said = f": {ended.last_line}" if ended.last_line else ""
            raise Failure(
                _NOTHING,
                why=f"it ends with status {ended.status} without faults{said}",
                next_step="sweep a command that works, and ends with status 0 when it does",
            )
        return ended

    def _left(self, done: int, chosen: Sequence[object]) -> str:
        if not done:
            return ""
        left_s = (time.monotonic() - self._begun) / done * (len(chosen) - done)
        return f", {left_s / 60:.0f} min left" if left_s >= 60 else f", {left_s:.0f} s left"

    def _outcome(self, trial: Trial, point: Point, reference: Ended) -> Outcome:
        ended = trial.once(point.plan())
        if not self._control.new_lines():
            outcome = "not reached: it went another way"
        elif ended.status is None:
            outcome = f"did not end within {self._patience_s:g} s"
        elif ended.status != reference.status:
            outcome = f"exit status {ended.status}"
        else:
            outcome = ended.wrong or SURVIVED
        return Outcome(
            place=f"{trial.name}{point.place}",
            operation=point.nth,
            outcome=outcome,
            status=ended.status,
            seconds=round(ended.seconds, 3),
            last_line=ended.last_line,
        )

    def _keep_logs(self, number: int, trial: Trial, point: Point) -> None:
        if self._logs is not None:
            name = f"{number} {trial.name}{point}".replace(", ", " ").replace(" ", "-")
            shutil.copytree(self._platform.places.log_dir, self._logs / name, dirs_exist_ok=True)


def tell(
    phase: Phase,
    reference: Ended,
    outcomes: Sequence[Outcome],
    command: Sequence[str],
    *,
    as_json: bool,
) -> None:
    """Print what came of it."""
    if as_json:
        print_json(
            {
                "phase": phase.value,
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


def _leave(number: int, _frame: object) -> None:
    """Turn SIGTERM into an orderly end, so that nothing is left behind."""
    sys.exit(128 + number)
