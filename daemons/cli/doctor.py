"""`vtpm doctor`: the state of every file of an installation, and what can be done."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from daemons.cli.options import Json, Root, places_of
from daemons.cli.output import plain, print_json

if TYPE_CHECKING:
    from rich.console import Console

    from daemons.doctor.examination import Group
    from daemons.doctor.finding import Finding

FILE_WIDTH: Final = 200
"""Columns when nobody looks at a terminal; a terminal has its own width."""
_COLOURS: Final = {"fine": "green", "not there": "dim", "warning": "yellow", "refused": "red"}
_PROBLEMS: Final = ("refused", "warning")
_NOT_CHECKED: Final = (
    "Not checked, because it takes the keys: what is encrypted, and whether an image is the newest"
    " copy. The manager and the chip do that when they start."
)


def doctor(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[CFG]...", help="Config files of domains that do not run."),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="A line for each file.")] = False,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """Say what state each file is in, why, and what can be done. Nothing is changed.

    The exit status is 65 when a daemon would refuse something, 77 when not all could be looked at.
    """
    from daemons.doctor.examination import examine, exit_code_of  # noqa: PLC0415 - all daemons' rooms

    places = places_of(root)
    groups = examine(places, configs or [])
    if as_json:
        print_json([_shape(group) for group in groups])
    else:
        _print(places.root, groups, every=every)
    raise typer.Exit(int(exit_code_of(groups)))


def _shape(group: Group) -> dict[str, object]:
    return {
        "name": group.name,
        "program": group.program,
        "pid": group.pid,
        "files": [
            asdict(finding) | {"path": plain(finding.path), "exit_code": int(finding.exit_code)}
            for finding in group.findings
        ],
    }


def _print(root: Path, groups: list[Group], *, every: bool) -> None:
    from rich.console import Console  # noqa: PLC0415 - 60 ms that `--help` need not pay

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    everything = [(group, finding) for group in groups for finding in group.findings]
    for state in _PROBLEMS:
        for group, finding in everything:
            if finding.state == state:
                _print_problem(console, group, finding)
    for group in groups:
        process = f", process {group.pid}" if group.pid else ""
        console.print(f"[bold]{_safe(group.name)}[/]  [dim]{_safe(group.program)}{process}[/]")
        _print_group(console, root, group, every=every)
    counts = {s: sum(f.state == s for _, f in everything) for s in _COLOURS}
    told = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    console.print(f"{_safe(root)}: {told}")
    console.print(f"[dim]{_NOT_CHECKED}[/]")


def _print_problem(console: Console, group: Group, finding: Finding) -> None:
    colour = _COLOURS[finding.state]
    subject = f"{_safe(group.name)}: {_safe(finding.kind)} {_safe(finding.path)}"
    console.print(f"[{colour}]{finding.state}[/]  {subject}")
    for lead, text in (("says", finding.what), ("why", finding.why), ("next", finding.next_step)):
        for at, line in enumerate(text.splitlines()):
            console.print(f"    {f'{lead}:' if at == 0 else '':6}{_safe(line)}")


def _print_group(console: Console, root: Path, group: Group, *, every: bool) -> None:
    """Stores and what is wrong have a line each; small files that are fine share one."""
    small = [finding for finding in group.findings if not every and _is_small(finding)]
    shown = [finding for finding in group.findings if every or not _is_small(finding)]
    width = max((len(finding.kind) for finding in shown), default=0)
    for finding in shown:
        colour = _COLOURS[finding.state]
        told = "see above" if finding.state in _PROBLEMS else finding.why
        path = _safe(_under(root, finding.path))
        words = (
            f"[{colour}]{finding.state:9}[/]  {_safe(finding.kind.ljust(width))}  [dim]{path}[/]"
        )
        console.print(f"  {words}  {_safe(told)}".rstrip())
    names = [finding.path.name for finding in small if finding.state == "fine"]
    if names:
        console.print(f"  [green]fine[/]       {_safe(', '.join(names))}")


def _is_small(finding: Finding) -> bool:
    """Whether it is well and goes with the stack: nobody looks for these files by their names."""
    return finding.state not in _PROBLEMS and not finding.is_told


def _under(root: Path, path: Path) -> Path:
    return path.relative_to(root) if path.is_relative_to(root) else path


def _safe(value: object) -> str:
    from rich.markup import escape  # noqa: PLC0415

    return escape(plain(value))
