"""What the `vtpm` command prints: rows, JSON, progress, and failures in three short lines.

Results go to stdout, progress and failures to stderr, so a listing can always be piped. Texts that
come from domains are escaped: a name cannot drive the reader's terminal.
"""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Final, TextIO

from daemons.errors import Failure

NARROW: Final = 40
"""Columns below which a text is not broken any narrower."""


def print_line(text: str = "") -> None:
    """Print one line of result."""
    print(text)  # noqa: T201 - this is the one place where the command prints


def print_json(value: object) -> None:
    """Print a result for programs."""
    print_line(json.dumps(value, indent=2, ensure_ascii=True))


def print_rows(
    header: Sequence[str], rows: Sequence[Sequence[object]], notes: Sequence[str] = ()
) -> None:
    """Print a table: numbers to the right, texts to the left, the last column as long as it is.

    Args:
        header: Names of the columns.
        rows: As many cells each.
        notes: For each row what stands below it, indented, if it is not empty.
    """
    texts = [[_cell(value) for value in row] for row in rows]
    is_number = [all(isinstance(row[at], int | None) for row in rows) for at in range(len(header))]
    widths = [max(len(row[at]) for row in [header, *texts]) for at in range(len(header))]
    for row, note in zip_longest([header, *texts], ["", *notes], fillvalue=""):
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_number, strict=True)
        ]
        print_line("  ".join(cells).rstrip())
        for line in _wrapped(plain(note)):
            print_line(line)


def _wrapped(text: str) -> list[str]:
    """Indent a text and break it at a terminal's width; in a file or pipe it stays one line."""
    lead = "    "
    if not sys.stdout.isatty():
        return [lead + text] if text else []
    width = max(NARROW, shutil.get_terminal_size().columns)
    return textwrap.wrap(text, width, initial_indent=lead, subsequent_indent=lead)


def state_and_reason(row: Mapping[str, object]) -> tuple[str, str]:
    """Take the launcher's `state` apart: one word, and the reason behind it or nothing."""
    word, _, reason = str(row["state"]).partition(": ")
    return word, reason


def warn(row: object) -> None:
    """Show on stderr what the launcher found strange in a config file."""
    warnings = row.get("warnings") if isinstance(row, dict) else None
    for text in warnings or ():
        sys.stderr.write(f"warning: {plain(text)}\n")


def plain(value: object) -> str:
    """Escape what is not printable."""
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode("ascii")
        for letter in text
    )


def _cell(value: object) -> str:
    return "-" if value is None or value == "" else plain(value)


def report(failure: Failure, program: str, stream: TextIO | None = None) -> None:
    """Print a failure in three short lines: what, why, what to do."""
    out = stream or sys.stderr
    for lead, text in (
        (f"{program}: ", failure.what),
        ("  why:  ", failure.why),
        ("  next: ", failure.next_step),
    ):
        first, *more = text.splitlines() or [""]
        out.write(f"{lead}{plain(first)}\n")
        for line in more:  # the excerpt of a config file
            out.write(f"        {plain(line)}\n")


@contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """Show that something is being done; yield what to call with each further step.

    A terminal gets a spinner that leaves no trace, anything else a line a step.
    """
    if sys.stderr.isatty():
        from rich.console import Console  # noqa: PLC0415 - 60 ms that a listing need not pay
        from rich.markup import escape  # noqa: PLC0415

        with Console(stderr=True).status(escape(doing)) as spinner:
            yield lambda step: spinner.update(f"{escape(doing)}: {escape(plain(step))}")
        return

    def show(step: str) -> None:
        sys.stderr.write(f"{plain(doing)}: {plain(step)}\n")
        sys.stderr.flush()

    yield show
