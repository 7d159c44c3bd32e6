"""The mark of what is wanted of a domain whose process is dead, in its run directory.

    run/vtpm/NAME/wish:  preserved | restart | crashed REASON

A launcher that finds a dead process of a killed one's cannot tell a crash from a shutdown or a
reboot. Where that matters, the one who knows writes it down: `preserved` after a shutdown (or
reboot) after which the domain is kept, `crashed` where on_crash=preserve keeps it, and `restart`
where a process is ended to be started again and on_crash says something else. The next start of a
process takes the mark away.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.launcher.small_files import put_whole
from daemons.places import Places
from daemons.private_files import UnsafeFile, read_checked
from daemons.xl.domain_config import Action

WISH_NAME: Final = "wish"
_REASON_CHARS_MAX: Final = 400
_BYTES_MAX: Final = 1024
_CONTENT: Final = re.compile(rb"(preserved|restart|crashed)(?: ([ -~]*))?\n")


class Wish(StrEnum):
    """What is wanted of a domain without a process."""

    PRESERVED = "preserved"
    RESTART = "restart"
    CRASHED = "crashed"


@dataclass(frozen=True, slots=True)
class Noted:
    """A wish, and why."""

    wish: Wish
    reason: str = ""


def note_wish(places: Places, name: str, wish: Wish, reason: str = "") -> None:
    """Write it down.

    Raises:
        Failure: It cannot be.
    """
    mark = places.domain(name).directory / WISH_NAME
    shown = reason[:_REASON_CHARS_MAX].replace("\n", " ").encode("ascii", "backslashreplace")
    shown = re.sub(rb"[^ -~]", b"?", shown)[: _BYTES_MAX // 2]
    try:
        put_whole(mark, wish.value.encode("ascii") + (b" " + shown if shown else b"") + b"\n")
    except OSError as error:
        raise _cannot_note(name, f"{mark}: {error.strerror or error}") from error


def forget_wish(places: Places, name: str) -> None:
    """Nothing is wanted that a launcher would not do anyway.

    Raises:
        Failure: The mark cannot be taken away.
    """
    mark = places.domain(name).directory / WISH_NAME
    try:
        mark.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_note(name, f"{mark}: {error.strerror or error}") from error


def note_restart(places: Places, name: str, on_crash: Action) -> None:
    """Write down that a domain is to be started again, where its death would not be enough.

    Raises:
        Failure: It cannot be.
    """
    if on_crash is Action.RESTART:
        forget_wish(places, name)
    else:
        note_wish(places, name, Wish.RESTART)


def read_wish(places: Places, name: str) -> Noted | None:
    """Read it.

    Returns:
        None when there is no mark.

    Raises:
        UnsafeFile: It is damaged, or not an ordinary file of ours.
    """
    mark = places.domain(name).directory / WISH_NAME
    content = read_checked(mark, _BYTES_MAX)
    if content is None:
        return None
    said = _CONTENT.fullmatch(content)
    if said is None:
        raise UnsafeFile(
            f"{mark} is not used",
            why="it does not say whether the domain is to be started",
            next_step=f"Put it back, or remove it and {name} is started like one that was killed",
            exit_code=ExitCode.DAMAGED,
        )
    return Noted(Wish(said[1].decode("ascii")), (said[2] or b"").decode("ascii"))


def _cannot_note(name: str, why: str) -> Failure:
    return Failure(
        f"cannot note what is wanted of {name}",
        why=why,
        next_step="Make room on its file system, and look at its owner and mode",
        exit_code=ExitCode.IO_ERROR,
    )
