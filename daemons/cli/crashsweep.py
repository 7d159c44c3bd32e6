"""`vtpm crashsweep`: a command, a start or a recovery, with a daemon killed at each point of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemons.cli.options import SECONDS_MAX, SECONDS_MIN, Json, no_nan
from daemons.cli.output import progress
from daemons.errors import ExitCode, Failure
from daemons.faults.sweep_kinds import Phase, PointKind


def crashsweep(  # noqa: PLR0913 - options of a command
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND...]", help="The program and its arguments."),
    ] = None,
    *,
    phase: Annotated[
        Phase, typer.Option("--phase", help="Kill while the command runs, or while what happens.")
    ] = Phase.COMMAND,
    points: Annotated[
        PointKind, typer.Option("--points", help="Which points to go through.")
    ] = PointKind.ALL,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", min=1, help="At most so many points.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Draws the sample.")] = 0,
    patience_s: Annotated[
        float,
        typer.Option(
            "--patience",
            metavar="SECONDS",
            min=SECONDS_MIN,
            max=SECONDS_MAX,
            callback=no_nan,
            help="For each run.",
        ),
    ] = 120.0,
    logs: Annotated[
        Path | None,
        typer.Option("--logs", metavar="DIR", help="Keep the logs of what was not survived."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Do something again and again, with a daemon killed at another point each time.

    With a COMMAND, it runs as in guest1 of a platform made for it. --phase sweeps something else:
    the first start of the platform, an ordinary start, or the return of a daemon that was killed.

    First it is done without faults, which counts the points. Ends with status 0 if it ended the
    same way at every point.
    """
    from daemons.cli.sweep import SURVIVED, swept, tell  # noqa: PLC0415 - others need none of it

    if (phase is Phase.COMMAND) != bool(command):
        raise typer.BadParameter(
            "it takes a COMMAND, or --phase first-start, start or recovery without one"
        )
    with progress("crashsweep") as step:
        reference, outcomes = swept(
            phase,
            command or (),
            points,
            limit,
            seed=seed,
            patience_s=patience_s,
            logs=logs,
            step=step,
        )
    tell(phase, reference, outcomes, command or (), as_json=as_json)
    lost = [outcome for outcome in outcomes if outcome.outcome != SURVIVED]
    if lost:
        raise Failure(
            f"{len(lost)} of {len(outcomes)} points were not survived",
            why=f"the first: {lost[0].place}, operation {lost[0].operation}: {lost[0].outcome}",
            next_step="a program that takes nothing amiss survives all; see docs/faults.md",
            exit_code=ExitCode.FAILED,
        )
