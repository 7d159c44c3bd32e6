"""The last domid that was given out, for who gives out the next: run/vtpm/registry/.last-domid.

By a guest's domid its vTPM tells a new boot, so none may come twice while a vTPM lives that has
seen it. The records do not say it: they know those only that still are. It is written before a
number is used, and twice in its file, so that a damaged one does not pass for a smaller number.

What is written counts on after `DOMID_MAX`, when domids begin again with 1 (`domid_of`). So a file
that is older than a record can be told for as long as they have not.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.launcher.domain import DOMID_MAX
from daemons.launcher.small_files import put_whole
from daemons.private_files import UnsafeFile, read_checked
from daemons.registry import DomainRecord, Role

COUNTER_NAME: Final = ".last-domid"
NUMBERED: Final = {Role.MANAGER, Role.VTPM, Role.GUEST}
"""Whose domids are counted; the chip and domain 0 have theirs for ever."""
_BYTES_MAX: Final = 64
_CONTENT: Final = re.compile(rb"([0-9]{1,18}) \1\n")


def domid_of(count: int) -> int:
    """Give the domid that is given out as the `count`-th, from 1."""
    return (count - 1) % DOMID_MAX + 1


def next_count(last: int, taken: Collection[int]) -> int:
    """Give the count of the next domid that nobody has."""
    count = last + 1
    while domid_of(count) in taken:
        count += 1
    return count


def encode_count(count: int) -> bytes:
    """Give the content of the file."""
    return f"{count} {count}\n".encode("ascii")


def read_count(registry: Path, records: Iterable[DomainRecord]) -> int:
    """Read how many domids were given out.

    Args:
        registry: The directory.
        records: All that are in it.

    Returns:
        0 when there is no such file, and nobody who would be in it.

    Raises:
        UnsafeFile: It is damaged or gone, or knows less than the records.
    """
    path = registry / COUNTER_NAME
    highest = max((record.domid for record in records if record.role in NUMBERED), default=0)
    content = read_checked(path, _BYTES_MAX)
    if content is None:
        if highest:
            raise _unusable(path, f"it is gone, and yet there is a domain with domid {highest}")
        return 0
    said = _CONTENT.fullmatch(content)
    if said is None:
        raise _unusable(path, "it is damaged: it does not say which domid was given out last")
    if int(said[1]) < min(highest, DOMID_MAX):
        raise _unusable(path, f"it ends with domid {int(said[1])}, and yet there is {highest}")
    return int(said[1])


def note_count(registry: Path, count: int) -> None:
    """Write it, before the number is used.

    Raises:
        Failure: It cannot be.
    """
    path = registry / COUNTER_NAME
    try:
        put_whole(path, encode_count(count))
    except OSError as error:
        raise Failure(
            "cannot note which domid is given out",
            why=f"{path}: {error.strerror or error}",
            next_step="Make room on its file system, and look at its owner and mode",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def _unusable(path: Path, why: str) -> UnsafeFile:
    return UnsafeFile(
        f"{path} is not used",
        why=why,
        next_step="Put it back; or stop the whole stack, remove the file, and start it again",
        exit_code=ExitCode.DAMAGED,
    )
