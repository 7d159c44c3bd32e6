"""Faults on purpose: plans, applied to a stack that runs or starts."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

from daemons.cli.options import (
    SECONDS_MAX,
    SECONDS_MIN,
    Json,
    Root,
    ask,
    new_app,
    no_nan,
    places_of,
)
from daemons.cli.output import print_json, print_line, print_rows, progress
from daemons.errors import ExitCode, Failure
from daemons.faults.cost import Cost
from daemons.named_files import read_bytes

if TYPE_CHECKING:
    from daemons.cli.stack import DomainFile
    from daemons.faults.plan import Fault, FaultPlan
    from daemons.faults.run import FaultRun, Injected
    from daemons.places import Places

Plan = Annotated[Path, typer.Argument(metavar="PLAN", help="A fault plan, in TOML.")]
Step = Callable[[str], None]
_SEED_MAX: Final = 999_999_999
"""Less than a plan's own seed may be: one that can be read out."""
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)

app = new_app(name="fault", help="Faults on purpose.")


@app.command()
def run(
    plan: Plan,
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            min=SECONDS_MIN,
            max=SECONDS_MAX,
            callback=no_nan,
            help="How long; else as the plan says.",
        ),
    ] = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Apply a fault plan to the stack that runs.

    Prints what was injected when. Ends with status 0 when the stack is whole afterwards and nobody
    has lost anything, else with 1 and what is not.
    """
    from daemons.faults.schedule import own_length_s  # noqa: PLC0415 - `--help` needs none of it

    places = places_of(root)
    refuse_under_systemd(places, "apply a fault plan to")
    content, parsed = _read(plan)
    length_s = own_length_s(parsed) if for_s is None else for_s
    with progress("faults") as step, _ended_with_care():
        fault_run = _fault_run(places, root, step, is_quiet=as_json)
        problems = fault_run.run(parsed, content, str(plan), length_s)
    if as_json:
        print_json(
            {
                "plan": str(plan),
                "seed": parsed.seed,
                "for_s": length_s,
                "injected": [line.as_json() for line in fault_run.injected],
                "never_happened": [
                    {"fault": fault.number, "operations": fault_run.operations.get(fault.number)}
                    for fault in fault_run.never_happened(parsed)
                ],
                "problems": problems,
            }
        )
    else:
        _say_what_never_happened(fault_run, parsed)
    _say_how_it_is(fault_run, problems, "and no guest has booted again", is_quiet=as_json)


@app.command()
def check(plan: Plan, as_json: Json = False) -> None:
    """Say what a fault plan would do, or what is wrong with it. Nothing is done."""
    _, parsed = _read(plan)
    rows = [(f.number, str(f.where), f.what.value, _how(f), _when(f)) for f in parsed.faults]
    if as_json:
        keys = ("number", "where", "what", "how", "when")
        faults = [dict(zip(keys, row, strict=True)) for row in rows]
        print_json({"plan": str(plan), "seed": parsed.seed, "faults": faults})
        return
    print_rows(("Fault", "Where", "What", "How", "When"), rows)


@app.command()
def draw(
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=_SEED_MAX,
            help="The same seed draws the same plan.",
        ),
    ] = None,
    costs: Annotated[
        Cost,
        typer.Option(
            "--costs",
            help="What a program in a guest may see of it: a pause, TPM_IOERROR too, or anything.",
        ),
    ] = Cost.PAUSE,
    root: Root = None,
) -> None:
    """Draw a fault plan for the stack that runs, and print it."""
    from daemons.faults.drawing import draw_plan  # noqa: PLC0415 - `--help` needs none of it
    from daemons.faults.run import roles_of, rows_of  # noqa: PLC0415

    roles = roles_of(rows_of(ask(root, "status")))
    chosen = secrets.randbelow(_SEED_MAX) if seed is None else seed
    print_line(draw_plan(chosen, costs, roles).rstrip())


def up_with_faults(
    plan: Path, for_s: float | None, files: Sequence[DomainFile], root: str | None
) -> None:
    """Do what `vtpm up --fault` does.

    Raises:
        Failure: The plan does not fit, a stack runs already, or it is not whole afterwards.
    """
    # Who starts without faults needs none of it.
    from daemons.cli.stack import bring_up  # noqa: PLC0415
    from daemons.faults.plan import LAUNCHER  # noqa: PLC0415
    from daemons.faults.run import check_fits  # noqa: PLC0415
    from daemons.faults.schedule import start_length_s  # noqa: PLC0415
    from daemons.places import CHIP_NAME  # noqa: PLC0415
    from daemons.registry import Role  # noqa: PLC0415

    content, parsed = _read(plan)
    roles = {LAUNCHER: Role.DOMAIN0.value, CHIP_NAME: Role.HWTPM.value}
    roles |= {file.name: file.role for file in files}
    check_fits(parsed, str(plan), roles)
    places = places_of(root)
    _check_is_ours_to_start(places)
    places.prepare()
    length_s = start_length_s(parsed) if for_s is None else for_s
    with progress("starting") as step, _ended_with_care():
        fault_run = _fault_run(places, root, step)
        problems = fault_run.start(
            parsed, content, length_s, lambda: _discard(bring_up(files, root, step)), roles
        )
    _say_what_never_happened(fault_run, parsed)
    _say_how_it_is(fault_run, problems, "and nobody has lost anything")


@contextmanager
def _ended_with_care() -> Iterator[None]:
    """Let a signal that ends us be an exception: what the faults have stopped must go on."""

    def end(number: int, _: object) -> NoReturn:
        for ending in _ENDS:  # one is enough: a second would end the tidying up
            signal.signal(ending, signal.SIG_IGN)
        raise SystemExit(128 + number)

    before = {ending: signal.getsignal(ending) for ending in _ENDS}
    for ending, handler in before.items():
        if handler is not signal.SIG_IGN:  # as nohup has it
            signal.signal(ending, end)
    try:
        yield
    finally:
        for ending, handler in before.items():
            signal.signal(ending, handler)


def _check_is_ours_to_start(places: Places) -> None:
    from daemons.cli.stack import launcher_pid  # noqa: PLC0415 - as above
    from daemons.systemd import stack_control  # noqa: PLC0415

    if stack_control.is_installed(places):
        raise Failure(
            "no faults are injected while the stack starts",
            why="systemd starts it, each daemon as a user of its own",
            next_step="Use a stack of your own, below another --root",
            exit_code=ExitCode.CONFIGURATION,
        )
    if launcher_pid(places) is not None:
        raise Failure(
            "no faults are injected while the stack starts",
            why=f"it runs already under {places.root}",
            next_step="vtpm fault run PLAN, or vtpm down first",
            exit_code=ExitCode.CONFIGURATION,
        )


def _discard(_: object) -> None:
    """What was created is not shown: the verdict counts."""


def _fault_run(places: Places, root: str | None, step: Step, *, is_quiet: bool = False) -> FaultRun:
    from daemons.cli.stack import start_launcher  # noqa: PLC0415 - `--help` needs none of it
    from daemons.faults.run import FaultRun  # noqa: PLC0415

    def revive() -> None:
        start_launcher(places, step)
        ask(root, "power_on", step)

    def tell(injected: Injected) -> None:
        if not is_quiet:
            print_line(str(injected))

    return FaultRun(
        places=places, ask=lambda method: ask(root, method), revive=revive, tell=tell, step=step
    )


def _say_what_never_happened(fault_run: FaultRun, plan: FaultPlan) -> None:
    """A stack that is whole shows nothing about a fault that it has not met."""
    for fault in fault_run.never_happened(plan):
        count = fault_run.operations.get(fault.number)
        met = "" if count is None else f": there were {count or 'no'} operations there"
        line = f"fault {fault.number} never happened: {fault.what.value} {fault.where}"
        print_line(f"{line}, {_when(fault)}{met}")


def _say_how_it_is(
    fault_run: FaultRun, problems: list[str], verdict: str, *, is_quiet: bool = False
) -> None:
    if problems:
        raise Failure(
            "the stack is not as it was before the faults",
            why="; ".join(problems),
            next_step="vtpm status, and the logs that it names",
            exit_code=ExitCode.FAILED,
        )
    if not is_quiet:
        print_line(f"{len(fault_run.injected)} injected; the stack is whole, {verdict}")


def _how(fault: Fault) -> str:
    parts = [f"for {fault.for_s:g} s"] if fault.for_s else []
    parts += [f"by {fault.by_s:+g} s"] if fault.by_s else []
    parts += [f"at {fault.speed:g} times the speed"] if fault.speed != 1.0 else []
    return ", ".join(parts)


def _when(fault: Fault) -> str:
    if fault.nth is not None:
        return f"at operation {fault.nth}"
    if fault.at_s is not None:
        return f"after {fault.at_s:g} s"
    chance = f", with probability {fault.probability:g}"
    if fault.every_s is None:
        return f"at each operation{chance}"
    return f"every {fault.every_s:g} s{'' if fault.probability == 1.0 else chance}"


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


def _read(plan: Path) -> tuple[bytes, FaultPlan]:
    from daemons.faults.plan import PLAN_BYTES_MAX, parse_plan  # noqa: PLC0415 - `--help` needs none of it

    try:
        content = read_bytes(plan, PLAN_BYTES_MAX)
    except OSError as error:
        raise Failure(
            f"cannot read the fault plan {plan}",
            why=(error.strerror or str(error)).lower(),
            next_step="docs/faults.md has one to begin with",
            exit_code=ExitCode.NO_INPUT,
        ) from error
    return content, parse_plan(content, str(plan))
