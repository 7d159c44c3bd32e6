"""What the doctor says about one file.

The words of a refusal are those of the daemon that would refuse: they come from its own `Failure`.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.listeners import describe_file

_LOOKS: Final = 3
_LOOK_AGAIN_S: Final = 0.02


class State(StrEnum):
    """How a file is."""

    FINE = "fine"
    ABSENT = "not there"
    """And that is normal."""
    WARNING = "warning"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One file.

    Attributes:
        path: Where it is.
        kind: What it is.
        state: How it is.
        why: Why it is in that state, or what is in it; may be empty where all is well.
        next_step: What can be done; empty where nothing needs to be.
        what: What the daemon would say it cannot do.
        exit_code: The daemon's exit status then; DONE when it would not end. NO_PERMISSION where
            nobody could look.
        is_told: A person wants to hear of it even when all is well.
    """

    path: Path
    kind: str
    state: State
    why: str = ""
    next_step: str = ""
    what: str = ""
    exit_code: ExitCode = ExitCode.DONE
    is_told: bool = False


@dataclass(frozen=True, slots=True)
class Subject:
    """A file that is looked at."""

    path: Path
    kind: str
    is_told: bool = False

    def fine(self, why: str = "") -> Finding:
        """All is well with it."""
        return Finding(
            path=self.path, kind=self.kind, state=State.FINE, why=why, is_told=self.is_told
        )

    def absent(self, why: str = "") -> Finding:
        """It is not there, and need not be."""
        return Finding(
            path=self.path, kind=self.kind, state=State.ABSENT, why=why, is_told=self.is_told
        )

    def warning(self, why: str, next_step: str) -> Finding:
        """It serves, and yet somebody should know."""
        return Finding(
            path=self.path, kind=self.kind, state=State.WARNING, why=why, next_step=next_step
        )

    def refused(self, failure: Failure) -> Finding:
        """Its daemon would not take it."""
        return Finding(
            path=self.path,
            kind=self.kind,
            state=State.REFUSED,
            why=failure.why,
            next_step=failure.next_step,
            what=failure.what,
            exit_code=failure.exit_code,
        )

    def hidden(self, error: OSError) -> Finding:
        """This user may not look at it."""
        why = (error.strerror or str(error)).lower()
        found = self.warning(
            f"it was not looked at: {why}",
            f"Run this as the user whose installation it is (this is uid {os.geteuid()}).",
        )
        return replace(found, exit_code=ExitCode.NO_PERMISSION)


def _what_is_no_file(path: Path) -> str:
    """What would hold up whoever opens it: nothing here may wait."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return ""  # its reader says so
    waits = stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)
    return describe_file(path) if waits else ""


def look_at(subject: Subject, look: Callable[[], Finding], *, is_used: bool = False) -> Finding:
    """Look at a file; what its reader refuses is the finding.

    Args:
        subject: The file.
        look: Reads it.
        is_used: Its owner may be writing it just now, so what was read may be half of it.
    """
    in_the_way = _what_is_no_file(subject.path)
    if in_the_way:
        next_step = "Look at what it is, and move it away; it was left alone."
        failure = Failure(
            f"cannot read {subject.path}",
            why=f"{in_the_way} is in its place",
            next_step=next_step,
            exit_code=ExitCode.IO_ERROR,
        )
        return subject.refused(failure)
    for _ in range(_LOOKS if is_used else 1):
        try:
            return look()
        except Failure as failure:
            found = subject.refused(failure)
        except OSError as error:
            found = subject.hidden(error)
        if is_used:
            time.sleep(_LOOK_AGAIN_S)
    return found
