"""Why a daemon ended, in its own words: the last failure line of its log.

`service.run_daemon` writes a `Failure` as one line, `TIME error PROGRAM[DOMAIN] WHAT why="..."
next_step="..."`. What ended otherwise (a usage error, a traceback) has at least a last line. Pure
but for `read_last_words`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

TAIL_BYTES_MAX: Final = 65536
WORDS_CHARS_MAX: Final = 300

_VALUE = r'(?:"(?P<{0}_quoted>(?:[^"\\]|\\.)*)"|(?P<{0}_plain>[^\s"]+))'
_FAILURE_LINE: Final = re.compile(
    r"^\S+ error\s+\S+ (?P<what>.+?) why="
    + _VALUE.format("why")
    + r" next_step="
    + _VALUE.format("next_step")
    + r"( exit_code=\d+)?$"
)
_EVERYDAY_LINE: Final = re.compile(r"^\S+ (?:debug|info|warning) ")


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """What a daemon said at its end; parts that it did not say are empty."""

    what: str = ""
    why: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.what, self.why) if part)


def parse_last_words(tail: str) -> LastWords:
    """Find the last failure line, or else the last line that is not of the everyday log."""
    lines = [line.rstrip() for line in tail.splitlines() if line.strip()]
    for line in reversed(lines):
        found = _FAILURE_LINE.match(line)
        if found is not None:
            return LastWords(
                what=_cut(found["what"]),
                why=_cut(_value(found, "why")),
                next_step=_cut(_value(found, "next_step")),
            )
    others = [line.strip() for line in lines if not _EVERYDAY_LINE.match(line)]
    return LastWords(why=_cut(others[-1]) if others else "")


def read_last_words(log: Path, since_byte: int) -> LastWords:
    """Read the last words that a daemon wrote.

    Args:
        log: Its log file.
        since_byte: Length of the log when the daemon was started.
    """
    try:
        with log.open("rb") as file:
            length = file.seek(0, 2)
            file.seek(max(since_byte, length - TAIL_BYTES_MAX) if length > since_byte else length)
            tail = file.read(TAIL_BYTES_MAX)
    except OSError:
        return LastWords()  # the reason is for people; the restart does not depend on it
    return parse_last_words(tail.decode("utf-8", errors="replace"))


def _value(found: re.Match[str], name: str) -> str:
    quoted = found[f"{name}_quoted"]
    return quoted.replace('\\"', '"') if quoted is not None else found[f"{name}_plain"]


def _cut(text: str) -> str:
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= WORDS_CHARS_MAX else shown[:WORDS_CHARS_MAX] + "..."
