"""What the `vtpm` command prints: rows, JSON, progress, and failures in three short lines.

Results go to stdout, progress and failures to stderr, so a listing can always be piped. Texts that
come from domains are escaped: a name cannot drive the reader's terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from daemons.errors import Failure


def print_line(text: str = "") -> None:
    """Print one line of result."""
    print(text)  # noqa: T201 - this is the one place where the command prints


def print_json(value: object) -> None:
    """Print a result for programs."""
    print_line(json.dumps(value, indent=2, ensure_ascii=True))


def print_rows(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table: numbers to the right, texts to the left, the last column as long as it is."""
    texts = [[_cell(value) for value in row] for row in rows]
    is_number = [all(isinstance(row[at], int | None) for row in rows) for at in range(len(header))]
    widths = [max(len(row[at]) for row in [header, *texts]) for at in range(len(header))]
    for row in [header, *texts]:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_number, strict=True)
        ]
        print_line("  ".join(cells).rstrip())


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
