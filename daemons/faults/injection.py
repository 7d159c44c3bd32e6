"""Faults inside a daemon: at messages, disk steps, clock readings. Loaded only when asked for.

Sockets, disks and clocks are wrapped, so a daemon without faults has none of this in its way. What
happens is written to the log before it happens.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

from daemons.disk import Disk
from daemons.errors import Failure
from daemons.faults.chip import OtherLocality, as_of_a_busy_chip, asks_for_status
from daemons.faults.clock import FaultyClock
from daemons.faults.hooks import LOCK_NAME, LOG_SUFFIX, PLAN_NAME
from daemons.faults.page import DISK, RING, SENT, TIS, Page, now_us
from daemons.faults.plan import AT_ACCESSES, PLAN_BYTES_MAX, Fault, What, parse_plan
from daemons.faults.schedule import happens, happens_in_turn, turn_at
from daemons.lean_structlog import structlog
from daemons.private_files import read_checked

if TYPE_CHECKING:
    from daemons.tis_server import TisServer

SECTOR_BYTES: Final = 512


class Injection:
    """All hooks of one daemon.

    Args:
        directory: Where plan, lock and log are.
        domain: The daemon's domain.
        page: Descriptor of its page.
    """

    def __init__(self, directory: Path, domain: str, page: int) -> None:
        self._directory = directory
        self._domain = domain
        self._page = Page(page)
        self._turn = threading.Lock()
        self._generation = 0
        self._seed = 0
        self._faults: tuple[Fault, ...] = ()
        self._page.pid = os.getpid()
        self._other_locality: OtherLocality | None = None
        self.clock = FaultyClock(self._page, self)

    def is_wanted(self) -> bool:
        """Tell whether the process that asked for faults still lives: it holds a lock."""
        try:
            lock = os.open(self._directory / LOCK_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(lock)

    def ring_socket(self, raw: socket.socket) -> socket.socket:
        """Take the place of a ring's socket."""
        return FaultySocket(raw, self, RING)

    def tis_socket(self, raw: socket.socket) -> socket.socket:
        """Take the place of a connection of the chip."""
        return FaultySocket(raw, self, TIS)

    def disk(self, disk: Disk) -> Disk:
        """Take the place of a disk."""
        return FaultyDisk(disk, self)

    def attach_chip(self, server: TisServer) -> None:
        """Know the chip, for another locality to seize it."""
        self._other_locality = OtherLocality(self._page, server, self.is_wanted)

    def monotonic_s(self) -> float:
        """The clock as `time.monotonic` tells it."""
        return self.clock.now_us() / 1e6

    @property
    def is_busy(self) -> bool:
        """Whether the chip is busy now."""
        return bool(self._page.generation) and now_us() < self._page.busy_until_us

    def meet_at_access(self, fault: Fault) -> None:
        """Let a fault of the chip happen, before the register access at which it does."""
        if fault.what is What.BUSY_CHIP:
            self._page.busy_until_us = now_us() + round(fault.for_s * 1e6)
        elif fault.what is What.SEIZED_LOCALITY and self._other_locality is not None:
            self._other_locality.seize(fault.for_s)

    def next_fault(self, kind: str, *, is_sent: bool = False) -> Fault | None:
        """Count a message or a step and say what happens at it; a kill has happened already."""
        with self._turn:
            generation = self._page.generation
            if not generation:
                return None
            if generation != self._generation:
                self._read_plan(generation)
            self._page.count(kind)
            if is_sent:
                self._page.count(kind + SENT)
            for fault in self._faults:
                if fault.kind.value != kind:
                    continue
                if (fault.what in AT_ACCESSES) if is_sent else (fault.what is What.LOST_RESPONSE):
                    continue
                counted = self._page.operations(fault)
                if self._is_due(fault, counted) and self.is_wanted():
                    self._tell(fault, counted)
                    if fault.what is What.KILL:
                        die()
                    return fault
        return None

    def _is_due(self, fault: Fault, operation: int) -> bool:
        if not fault.is_timed:
            return happens(fault, self._seed, operation)
        turn = turn_at(fault, (now_us() - self._page.begun_us) / 1e6)
        if turn <= self._page.turns(fault.number):
            return False
        self._page.set_turns(fault.number, turn)
        return happens_in_turn(fault, self._seed, turn)

    def _read_plan(self, generation: int) -> None:
        self._generation = generation
        self._faults = ()
        path = self._directory / PLAN_NAME
        try:
            plan = parse_plan(read_checked(path, PLAN_BYTES_MAX) or b"", str(path))
        except Failure as failure:
            structlog.get_logger().error(failure.what, why=failure.why)
            return
        self._seed, self._faults = plan.seed, plan.inside(self._domain)
        structlog.get_logger().warning("faults are injected", faults=len(self._faults))

    def _tell(self, fault: Fault, number: int) -> None:
        line = {
            "time": time.time(),
            "fault": fault.number,
            "where": str(fault.where),
            "what": fault.what.value,
            "operation": number,
        }
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(OSError):  # a run log that cannot be written changes no fault
            log = os.open(self._directory / f"{self._domain}{LOG_SUFFIX}", flags, 0o600)
            try:
                os.write(log, json.dumps(line).encode() + b"\n")
            finally:
                os.close(log)


def die() -> None:
    """End this process as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # for a process that is traced, and so not ended at once


class FaultySocket(socket.socket):
    """A connection whose messages meet faults, each one way or the other.

    Args:
        raw: The connection; it is taken over.
        injection: Says what happens.
        kind: Of the place.
    """

    def __init__(self, raw: socket.socket, injection: Injection, kind: str) -> None:
        super().__init__(fileno=raw.detach())
        self._injection = injection
        self._kind = kind
        self._again: deque[bytes] = deque()
        self._status_is_asked = False

    def recv(self, size: int, flags: int = 0) -> bytes:
        """Receive a message, unless a fault has it otherwise."""
        message = self._again.popleft() if self._again else self._received(size, flags)
        self._status_is_asked = self._kind == TIS and asks_for_status(message)
        return message

    def _received(self, size: int, flags: int) -> bytes:
        while message := super().recv(size, flags):
            fault = self._injection.next_fault(self._kind)
            if fault is None:
                return message
            if fault.what is What.DROP:
                continue
            if fault.what is What.DELAY:
                time.sleep(fault.for_s)
            elif fault.what is What.DUPLICATE:
                self._again.append(message)
            elif fault.what is What.CORRUPT:
                return corrupted(message)
            else:
                self._injection.meet_at_access(fault)
            return message
        return b""

    def send(self, message: bytes, flags: int = 0) -> int:  # type: ignore[override]  # bytes only
        """Send a message, unless a fault has it otherwise."""
        if self._status_is_asked and self._injection.is_busy:
            message = as_of_a_busy_chip(message)
        fault = self._injection.next_fault(self._kind, is_sent=True)
        what = fault.what if fault is not None else None
        if what in {What.DROP, What.LOST_RESPONSE}:
            return len(message)
        if fault is not None and what is What.DELAY:
            time.sleep(fault.for_s)
        elif what is What.DUPLICATE:
            super().send(message, flags)
        elif what is What.CORRUPT:
            message = corrupted(message)
        return super().send(message, flags)


def corrupted(message: bytes) -> bytes:
    """Turn round one bit in the middle of a message."""
    at = len(message) // 2
    return message[:at] + bytes([message[at] ^ 0x10]) + message[at + 1 :]


class FaultyDisk:
    """A disk whose writes and syncs meet faults (see `Disk`).

    Args:
        disk: The real one.
        injection: Says what happens.
    """

    def __init__(self, disk: Disk, injection: Injection) -> None:
        self._disk = disk
        self._injection = injection

    @property
    def name(self) -> str:
        """As the real one's."""
        return self._disk.name

    @property
    def size(self) -> int:
        """As the real one's."""
        return self._disk.size

    def read(self, offset: int, length: int) -> bytes:
        """Read; reading meets no faults."""
        return self._disk.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write, unless a fault has it otherwise."""
        fault = self._next_fault()
        if fault is not None and fault.what is What.TORN_WRITE:
            half = len(data) // 2
            self._disk.write(offset, data[: half - half % SECTOR_BYTES or half])
            die()
        self._disk.write(offset, data)

    def sync(self) -> None:
        """Sync, unless a fault has it otherwise; at a sync there is nothing to tear."""
        fault = self._next_fault()
        if fault is not None and fault.what is What.TORN_WRITE:
            die()
        self._disk.sync()

    def close(self) -> None:
        """Close the real one."""
        self._disk.close()

    def _next_fault(self) -> Fault | None:
        """Let the next fault happen that is the same for writes and syncs.

        Raises:
            OSError: The fault.
        """
        fault = self._injection.next_fault(DISK)
        if fault is None:
            return None
        if fault.what is What.DELAY:
            time.sleep(fault.for_s)
        elif fault.what is What.IO_ERROR:
            raise OSError(errno.EIO, "an I/O error on purpose", self.name)
        elif fault.what is What.DISK_FULL:
            raise OSError(errno.ENOSPC, "a full disk on purpose", self.name)
        return fault
