"""`vtpm status`: the whole chain as a tree, each TPM below the one that it rests on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from daemons.cli.options import Json, Root, ask
from daemons.cli.output import plain, print_json, state_and_reason

if TYPE_CHECKING:
    from rich.tree import Tree

Row = dict[str, Any]
FILE_WIDTH: Final = 200
"""Columns when nobody looks at a terminal; a terminal has its own width."""

_COLOURS: Final = {"running": "green", "paused": "yellow", "starting": "yellow"}
_PROGRAMS: Final = {
    "hwtpm": "hwtpmd",
    "manager": "vtpmmgrd",
    "vtpm": "vtpmd",
    "guest": "guestd",
    "domain0": "launcherd",
}


def status(as_json: Json = False, root: Root = None) -> None:
    """Show the health of the whole chain, as a tree."""
    answer = ask(root, "status")
    if as_json:
        print_json(answer)
        return
    from rich.console import Console  # noqa: PLC0415 - 60 ms that other subcommands need not pay

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(status_tree(answer))


def status_tree(answer: Row) -> Tree:
    """Draw the launcher's answer to `status`: who names a backend stands below it."""
    from rich.markup import escape  # noqa: PLC0415
    from rich.tree import Tree  # noqa: PLC0415

    launcher = answer["launcher"]
    rows: list[Row] = answer["domains"]
    names = {row["name"] for row in rows}
    tree = Tree(f"{_told(launcher)}  [dim]{escape(plain(launcher['root']))}[/]")
    chip = tree.add(_told(answer["chip"]))
    _grow(chip, [row for row in rows if row["role"] == "manager"], rows)
    unattached = [
        row for row in rows if row["role"] != "manager" and names.isdisjoint(row["backends"])
    ]
    if unattached:
        _grow(tree.add("[red]without a backend[/]"), unattached, rows)
    return tree


def _grow(tree: Tree, level: Iterable[Row], rows: list[Row]) -> None:
    for row in level:
        users = [user for user in rows if row["name"] in user["backends"]]
        _grow(tree.add(_told(row)), users, rows)


def _told(row: Row) -> str:
    """One process in one line of markup, with what it says about itself below."""
    from rich.markup import escape  # noqa: PLC0415

    word, reason = state_and_reason(row)
    colour = _COLOURS.get(word, "red")
    parts = [
        f"[bold]{escape(plain(row['name']))}[/]",
        f"[dim]{_PROGRAMS[row['role']]}[/]",
        f"[{colour}]{escape(plain(word))}[/]",
    ]
    if row.get("pid"):
        parts.append(f"pid {row['pid']}")
    if row.get("restarts"):
        parts.append(f"[yellow]restarts {row['restarts']}[/]")
    if row.get("pss_kib"):
        parts.append(f"[dim]{row['pss_kib'] / 1024:.1f} MiB[/]")
    last_end = str(row.get("last_reason") or "")
    if last_end in reason:
        last_end = ""  # told already
    said = [reason, row.get("status"), last_end and f"last end: {last_end}"]
    lines = [f"[dim]{escape(plain(text))}[/]" for text in dict.fromkeys(said) if text]
    return "\n".join(["  ".join(parts), *lines])
