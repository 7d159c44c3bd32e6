"""The mark of having served, in each domain's run directory: who serves, beside the registry.

    run/vtpm/NAME/ready:  role, pid and start time of the process that was ready last; or nothing

It lasts as long as the domain's journal, so that nobody who was used is started again without one.
And it is a second witness: a record that is gone or was put back from an older copy names no living
process, while the mark still does.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.launcher.processes import is_alive
from daemons.listeners import describe_file, start_time_of
from daemons.places import Places
from daemons.private_files import read_checked
from daemons.registry import DomainRecord, Role

READY_NAME: Final = "ready"
_BYTES_MAX: Final = 64
_CONTENT: Final = re.compile(rb"([a-z0-9]+) (\d{1,10}) (\d{1,19})\n")


@dataclass(frozen=True, slots=True)
class Serving:
    """A process that was ready."""

    name: str
    role: Role
    pid: int
    start_time: int


def check_place(places: Places, name: str) -> None:
    """Check that a domain's mark can be written, before a process waits for it in vain.

    Raises:
        Failure: Something else stands in its place.
    """
    mark = places.domain(name).directory / READY_NAME
    try:
        if stat.S_ISREG(mark.lstat().st_mode):
            return
    except OSError:  # nothing is there; or whoever writes it will say why he cannot
        return
    raise Failure(
        f"cannot start {name}",
        why=f"{mark}, where it is noted who serves, is {describe_file(mark)}",
        next_step=f"The stack has put no such thing there: take it away, then: vtpm reboot {name}",
        exit_code=ExitCode.CONFIGURATION,
    )


def note_ready(places: Places, name: str, role: Role, pid: int) -> None:
    """Write down that a domain serves, and so may be used; and which process it is.

    Raises:
        Failure: It cannot be.
    """
    mark = places.domain(name).directory / READY_NAME
    # Neither a symlink nor a FIFO that somebody put there leads or holds the launcher anywhere.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(mark, flags, 0o600)
    except OSError as error:
        raise Failure(
            f"cannot note that {name} serves",
            why=f"{mark}: {error.strerror or error}",
            next_step="Make room on its file system, and look at its owner and mode",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    # On a full disk the mark is empty: a domain does not wait for room because of its witness.
    with os.fdopen(descriptor, "wb", buffering=0) as file, contextlib.suppress(OSError):
        file.truncate()
        file.write(f"{role.value} {pid} {start_time_of(pid) or 0}\n".encode("ascii"))


def was_ready(places: Places, name: str) -> bool:
    """Whether one of the domain's processes has served since its journal began.

    Whatever stands in the place of the mark counts, and so does a place that cannot be looked at:
    nobody who may have been used is started again without a journal.
    """
    try:
        (places.domain(name).directory / READY_NAME).lstat()
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return True


def has_served(places: Places, name: str, pid: int, start_time: int) -> bool:
    """Whether this very process of a domain was ready; it may be dead."""
    named = _named(places, name)
    return named is not None and (named.pid, named.start_time) == (pid, start_time)


def who_has_served(places: Places) -> list[str]:
    """The domains that have a mark, whatever it says."""
    try:
        return sorted(mark.parent.name for mark in places.run.glob(f"*/{READY_NAME}"))
    except OSError:
        return []


def who_serves(places: Places) -> dict[str, Serving]:
    """Those that the marks name and that live, by the names of their domains.

    A mark that cannot be read names nobody.
    """
    found = (_serving(places, name) for name in who_has_served(places))
    return {each.name: each for each in found if each is not None}


def contradictions(places: Places, records: Mapping[str, DomainRecord]) -> dict[Path, str]:
    """Where a record names another process than the one that serves.

    Args:
        places: Of the installation.
        records: All that the registry has, by name.

    Returns:
        What is wrong ("is gone, and ..."), by the file of the record.
    """
    found = {}
    for name, serving in who_serves(places).items():
        record, path = records.get(name), places.registry / f"{name}.json"
        if record is None:
            found[path] = f"is gone, and process {serving.pid} serves as {name}"
        elif (record.pid, record.start_time) != (serving.pid, serving.start_time):
            found[path] = (
                f"is older than what runs: it names process {record.pid or 'none'}, and process"
                f" {serving.pid} serves as {name}"
            )
    return found


def _serving(places: Places, name: str) -> Serving | None:
    named = _named(places, name)
    return named if named is not None and is_alive(named.pid, named.start_time) else None


def _named(places: Places, name: str) -> Serving | None:
    try:
        content = read_checked(places.domain(name).directory / READY_NAME, _BYTES_MAX)
        said = _CONTENT.fullmatch(content or b"")
        if said is None:
            return None
        return Serving(name, Role(said[1].decode("ascii")), int(said[2]), int(said[3]))
    except (Failure, ValueError):
        return None
