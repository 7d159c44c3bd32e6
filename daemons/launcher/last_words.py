"""Why a daemon ended, in its own words: the last error of its log, and nothing else of it.

`service.run_daemon` writes a `Failure` as one line, `TIME error PROGRAM[DOMAIN] WHAT why="..."
next_step="..."`, and a bug as an error line with its traceback below. Python itself writes a bare
traceback or "Fatal Python error: ...", argparse "PROGRAM: error: ...". Any other line, however late
it was written, tells what the daemon did and not why it ended. Pure but for `read_last_words`.
"""

from __future__ import annotations

import os
import re
import stat
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
_LOG_LINE: Final = re.compile(
    r"^\S+ (?P<level>debug|info|warning|error|critical)\s+\S+ (?P<text>.*)$"
)
_PLAIN_ERROR: Final = re.compile(r"^(?:Fatal Python error: |\S+: error: )")
_TRACEBACK: Final = "Traceback (most recent call last)"
_HAS_WORDS: Final = re.compile(r"[A-Za-z]")
"""A traceback of an exception group ends with a line that is only drawn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LastWords:
    """What a daemon said at its end; parts that it did not say are empty."""

    what: str = ""
    why: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.what, self.why) if part)


def parse_last_words(tail: str) -> LastWords:
    """Find the last error in the end of a log: a failure line, an error line, or a traceback."""
    found = LastWords()
    in_traceback = is_bare = False
    for line in tail.splitlines():
        logged = _LOG_LINE.match(line)
        if logged is not None:
            in_traceback, is_bare = logged["level"] in {"error", "critical"}, False
            if in_traceback:
                found = _error_words(line, logged["text"])
            continue
        is_indented = line.startswith(" ")  # in our log all of it, else all but its last line
        if _TRACEBACK in line:
            in_traceback, is_bare = True, not is_indented
        elif _PLAIN_ERROR.match(line):
            found = LastWords(why=_cut(line.strip()))
        elif in_traceback and (is_indented or is_bare) and _HAS_WORDS.search(line):
            found = LastWords(why=_cut(line.strip(" |")))
            in_traceback = is_indented
    return found


def _error_words(line: str, text: str) -> LastWords:
    failure = _FAILURE_LINE.match(line.rstrip())
    if failure is None:
        return LastWords(why=_cut(text.strip()))
    return LastWords(
        what=_cut(failure["what"]),
        why=_cut(_value(failure, "why")),
        next_step=_cut(_value(failure, "next_step")),
    )


def read_last_words(log: Path, since_byte: int) -> LastWords:
    """Read the last words that a daemon wrote.

    Args:
        log: Its log file.
        since_byte: Length of the log when the daemon was started.

    Returns:
        Empty ones if it is no file that can be read.
    """
    try:
        # O_NONBLOCK: a FIFO in its place must not hold us up.
        descriptor = os.open(log, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                return LastWords()
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
