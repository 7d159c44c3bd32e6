"""The side of whoever injects faults: plan, pages and run log, in a directory of this user alone.

Daemons that start while a page of theirs is there have hooks from then on; `arm` makes a plan count
in them, now and after each of their deaths. All of it ends with this process.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Self

from daemons.errors import ExitCode, Failure
from daemons.faults.hooks import (
    LOCK_NAME,
    LOG_SUFFIX,
    PAGE_BYTES,
    PAGE_SUFFIX,
    PLAN_NAME,
    directory_of,
)
from daemons.faults.page import Page
from daemons.faults.plan import Fault
from daemons.places import Places

GIVE_BACK_S: Final = 5.0
"""How long a chip that was seized may take, at the end, to be given back; it may be starting."""
LOOK_AGAIN_S: Final = 0.02

Line = Mapping[str, Any]
"""A line of a daemon's run log: time, fault, where, what, operation."""


class FaultControl:
    """One injection into one installation, from `with` to its end.

    Args:
        places: Of the installation; its run directory is made if need be.
        domains: Who is to have hooks.

    Raises:
        Failure: Somebody injects faults here already, or the directory cannot be used.
    """

    def __init__(self, places: Places, domains: Iterable[str]) -> None:
        self._root = places.root
        self._directory = directory_of(places)
        self._domains = sorted(set(domains))
        self._pages: dict[str, Page] = {}
        self._read: dict[str, int] = {}
        self._generation = 0
        places.make_private(self._directory)
        self._lock = self._locked()
        try:
            self._clear()
            for domain in self._domains:
                self._pages[domain] = _new_page(self._directory / f"{domain}{PAGE_SUFFIX}")
        except OSError as error:
            os.close(self._lock)
            raise Failure(
                f"cannot inject faults under {places.root}",
                why=f"{self._directory}: {error.strerror or error}",
                next_step="Make room there, or remove the directory",
                exit_code=ExitCode.IO_ERROR,
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.disarm()
        self._wait_for_the_chip()
        for page in self._pages.values():
            page.close()
        with contextlib.suppress(OSError):
            self._clear()
            (self._directory / LOCK_NAME).unlink()
            self._directory.rmdir()
        os.close(self._lock)

    def arm(self, plan: bytes) -> None:
        """Let a plan count from now on, with all counters at 0."""
        self.disarm()
        path = self._directory / PLAN_NAME
        beside = path.with_name(PLAN_NAME + ".new")
        beside.touch(mode=0o600)
        beside.write_bytes(plan)
        beside.rename(path)
        self._generation += 1
        for page in self._pages.values():
            page.arm(self._generation)

    def disarm(self) -> None:
        """Let nothing happen, and count nothing, until the next `arm`."""
        for page in self._pages.values():
            page.disarm()

    def _wait_for_the_chip(self) -> None:
        """Wait until a chip that was seized is given back: without our page nobody could do it."""
        end = time.monotonic() + GIVE_BACK_S
        while any(page.seizure for page in self._pages.values()) and time.monotonic() < end:
            time.sleep(LOOK_AGAIN_S)

    def has_hooks(self, domain: str, pid: int | None) -> bool:
        """Tell whether this process of a domain has hooks."""
        return pid is not None and self._pages[domain].pid == pid

    def counted(self, domain: str, slot: str) -> int:
        """How many messages or steps there were since `arm`."""
        return self._pages[domain].counted(slot)

    def operations(self, fault: Fault) -> int:
        """How many operations there were since `arm` at which a fault inside a daemon could be."""
        pages = [page for name, page in self._pages.items() if fault.where.is_in(name)]
        return sum(page.operations(fault) for page in pages)

    def new_lines(self) -> list[Line]:
        """Give what the daemons have written into their run logs since the last time."""
        lines: list[Line] = []
        for domain in self._domains:
            try:
                content = (self._directory / f"{domain}{LOG_SUFFIX}").read_bytes()
            except FileNotFoundError:
                continue
            whole = content[self._read.get(domain, 0) :]
            whole = whole[: whole.rfind(b"\n") + 1]
            self._read[domain] = self._read.get(domain, 0) + len(whole)
            lines += [json.loads(line) for line in whole.splitlines()]
        return sorted(lines, key=lambda line: float(line["time"]))

    def _locked(self) -> int:
        path = self._directory / LOCK_NAME
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            lock = os.open(path, flags, 0o600)
        except OSError as error:
            raise Failure(
                f"cannot inject faults under {self._root}",
                why=f"{path}: {error.strerror or error}",
                next_step="Remove it; it is no lock that a run has made",
                exit_code=ExitCode.IO_ERROR,
            ) from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise Failure(
                "cannot inject faults here",
                why=f"another process does so; it holds {path}",
                next_step="Wait until that one has ended, or end it",
                exit_code=ExitCode.UNAVAILABLE,
            ) from None
        return lock

    def _clear(self) -> None:
        for entry in self._directory.iterdir():
            if entry.name != LOCK_NAME:
                entry.unlink()


def _new_page(path: Path) -> Page:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, PAGE_BYTES)
        return Page(descriptor)
    finally:
        os.close(descriptor)
