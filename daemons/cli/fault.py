"""Faults on purpose: a plan applied to the stack that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from daemons.cli.options import Json, Root, ask, places_of
from daemons.cli.output import print_json, print_line, progress
from daemons.errors import ExitCode, Failure

if TYPE_CHECKING:
    from daemons.places import Places


def run(
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="A fault plan, in TOML.")],
    for_s: Annotated[
        float | None,
        typer.Option("--for", metavar="SECONDS", min=0.1, help="How long; else as the plan says."),
    ] = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Apply a fault plan to the stack that runs.

    Prints what was injected when. Ends with status 0 when the stack is whole afterwards and nobody
    has lost anything, else with 1 and what is not.
    """
    # `--help` needs none of it
    from daemons.cli.stack import start_launcher  # noqa: PLC0415
    from daemons.faults.plan import parse_plan  # noqa: PLC0415
    from daemons.faults.run import FaultRun, Injected  # noqa: PLC0415
    from daemons.faults.schedule import own_length_s  # noqa: PLC0415

    places = places_of(root)
    refuse_under_systemd(places, "apply a fault plan to")
    content = _read(plan)
    parsed = parse_plan(content, str(plan))
    length_s = own_length_s(parsed) if for_s is None else for_s
    with progress("faults") as step:

        def revive() -> None:
            start_launcher(places, step)
            ask(root, "power_on", step)

        def tell(injected: Injected) -> None:
            if not as_json:
                print_line(str(injected))

        fault_run = FaultRun(
            places=places, ask=lambda method: ask(root, method), revive=revive, tell=tell, step=step
        )
        problems = fault_run.run(parsed, content, str(plan), length_s)
    if as_json:
        print_json(
            {
                "plan": str(plan),
                "seed": parsed.seed,
                "for_s": length_s,
                "injected": [line.as_json() for line in fault_run.injected],
                "problems": problems,
            }
        )
    if problems:
        raise Failure(
            "the stack is not as it was before the faults",
            why="; ".join(problems),
            next_step="vtpm status, and the logs that it names",
            exit_code=ExitCode.FAILED,
        )
    if not as_json:
        count = len(fault_run.injected)
        print_line(f"{count} injected; the stack is whole, and no guest has booted again")


def refuse_under_systemd(places: Places, what: str) -> None:
    """Refuse a plan where its processes are not a launcher's.

    Raises:
        Failure: systemd runs the stack of this installation.
    """
    from daemons.systemd.stack_control import is_run_by_systemd  # noqa: PLC0415

    if is_run_by_systemd(places):
        raise Failure(
            f"cannot {what} a stack that systemd runs",
            why="a plan is laid out for the daemons of one user, and these have a user each",
            next_step="Do it in a stack of a launcher: vtpm up --root DIR CFG...",
            exit_code=ExitCode.USAGE,
        )


def _read(plan: Path) -> bytes:
    try:
        return plan.read_bytes()
    except OSError as error:
        raise Failure(
            f"cannot read the fault plan {plan}",
            why=(error.strerror or str(error)).lower(),
            next_step="docs/faults.md has one to begin with",
            exit_code=ExitCode.NO_INPUT,
        ) from error
