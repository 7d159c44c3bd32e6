"""How a daemon comes to its faults: only if the installation's owner has asked for them.

Whoever injects keeps a directory `run/vtpm/.faults` (no domain can have that name) with a page of
counters for each daemon that is to have hooks. A daemon looks for its page once, when it starts.
Without one there are no hooks, and nothing of this package is loaded or called again.

Invariants:
- Directory and page belong to this user or root, and nobody else may read or write them.
- Hooks do nothing once the process that asked for them has ended: it holds a lock as long as it
  lives.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from daemons.disk import Disk, PosixDisk
from daemons.places import Places
from daemons.world import SystemClock
from tpm12.ports import Clock

if TYPE_CHECKING:
    from daemons.tis_server import TisServer

DIRECTORY_NAME: Final = ".faults"
PLAN_NAME: Final = "plan.toml"
LOCK_NAME: Final = "lock"
PAGE_SUFFIX: Final = ".page"
LOG_SUFFIX: Final = ".log"
PAGE_BYTES: Final = 8192


WrapSocket = Callable[[socket.socket], socket.socket]


@dataclass(frozen=True, slots=True, kw_only=True)
class Hooks:
    """Where a daemon lets faults in; without them disk, sockets and clock are as they are.

    Attributes:
        open_disk: Opens its image.
        ring_socket: Takes the place of a connection of its ring; None: nothing does.
        tis_socket: Takes the place of a connection of the chip; None: nothing does.
        attach_chip: Called with the chip's server before it serves; None: nobody is.
        clock: Makes the clock of its TPM.
        monotonic_s: The clock of a driver's waits.
    """

    open_disk: Callable[[Path], Disk] = PosixDisk
    ring_socket: WrapSocket | None = None
    tis_socket: WrapSocket | None = None
    attach_chip: Callable[[TisServer], None] | None = None
    clock: Callable[[], Clock] = SystemClock
    monotonic_s: Callable[[], float] = time.monotonic


NO_HOOKS: Final = Hooks()


def directory_of(places: Places) -> Path:
    """Where plans lie while somebody injects faults."""
    return places.run / DIRECTORY_NAME


def hooks_of(places: Places, domain: str) -> Hooks:
    """Give a daemon's hooks: `NO_HOOKS`, unless somebody injects faults into it."""
    directory = directory_of(places)
    try:
        page = os.open(
            directory / f"{domain}{PAGE_SUFFIX}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    except OSError:
        return NO_HOOKS
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, page)
        if not (_is_ours(directory.lstat(), stat.S_ISDIR) and _is_ours(os.fstat(page))):
            return NO_HOOKS
        if os.fstat(page).st_size != PAGE_BYTES:
            return NO_HOOKS
        from daemons.faults.injection import Injection  # noqa: PLC0415 - else nobody needs it

        injection = Injection(directory, domain, page)
        if not injection.is_wanted():
            return NO_HOOKS
        return Hooks(
            open_disk=lambda path: injection.disk(PosixDisk(path)),
            ring_socket=injection.ring_socket,
            tis_socket=injection.tis_socket,
            attach_chip=injection.attach_chip,
            clock=lambda: injection.clock,
            monotonic_s=injection.monotonic_s,
        )
    raise AssertionError("closing a descriptor swallows nothing")


def _is_ours(status: os.stat_result, is_kind: Callable[[int], bool] = stat.S_ISREG) -> bool:
    is_private = not stat.S_IMODE(status.st_mode) & 0o077
    return is_kind(status.st_mode) and is_private and status.st_uid in {0, os.geteuid()}
