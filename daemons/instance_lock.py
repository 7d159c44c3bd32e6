"""One live instance of a thing: a locked file that names its holder.

The kernel drops the lock with its holder, so a killed process leaves a file but no lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
from pathlib import Path
from typing import Final, Self

from daemons.disk import holder_of
from daemons.errors import ExitCode, Failure
from daemons.listeners import AlreadyRunning, describe_file, private_directory, start_time_of

_HOLDER: Final = re.compile(rb"(\d{1,10}\n)?")
"""What a lock file holds: its holder's pid, or nothing while it is being taken."""


class InstanceLock:
    """A lock file held by this process from construction to `close`.

    Args:
        path: The lock file, in a private directory ("ring.lock" beside "ring.sock").
        subject: What is held, for the message to the second one ("vTPM vtpm-guest1").

    Raises:
        AlreadyRunning: Another process holds it; the message names its pid.
        Failure: The directory is not private, or something else stands at the path.
    """

    def __init__(self, path: Path, subject: str) -> None:
        self.path = path
        with private_directory(path.parent) as directory:
            try:
                self._descriptor = os.open(
                    path.name,
                    os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC,
                    0o600,
                    dir_fd=directory,
                )
            except OSError as error:
                raise _in_the_way(path, describe_file(path, directory)) from error
            try:
                _check_lock_file(self._descriptor, path, directory)
                self._lock(subject)
            except BaseException:
                os.close(self._descriptor)
                raise

    def _lock(self, subject: str) -> None:
        # No file is exchanged between open and lock: both happen under the directory's lock.
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode("ascii").strip()
            try:
                is_known = holder != "" and start_time_of(int(holder)) is not None
            except OSError:  # a lack of descriptors: that it is held is what counts
                is_known = False
            raise AlreadyRunning(
                f"{subject} is already running",
                why=f"process {holder if is_known else 'unknown'} holds {self.path}",
                next_step="Only one may run at a time; stop that one first.",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error
        # For whoever meets the lock; that one can do without on a full disk.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def close(self) -> None:
        """Give the lock back and remove its file. Safe to call again."""
        if self._descriptor == -1:
            return
        try:
            with private_directory(self.path.parent) as directory:
                if _same_file(self._descriptor, self.path.name, directory):
                    os.unlink(self.path.name, dir_fd=directory)
        except Failure:
            pass  # the directory is gone or no longer ours: then so is the file
        finally:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def inspect_lock(path: Path) -> int | None:
    """Tell who holds a lock file, without taking it.

    Returns:
        The pid of its holder; None when nobody holds it.

    Raises:
        OSError: It is not there, or may not be read.
        Failure: It is no lock file, and `InstanceLock` would refuse it.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:  # a symbolic link, a socket
            raise _in_the_way(path, describe_file(path)) from error
        raise
    try:
        _check_lock_file(descriptor, path)
    finally:
        os.close(descriptor)
    return holder_of(path)


def _check_lock_file(descriptor: int, path: Path, directory: int | None = None) -> None:
    status = os.fstat(descriptor)
    is_plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    # A file that holds anything but a pid is not a lock of ours, and would be lost with it.
    if not is_plain or not _HOLDER.fullmatch(os.pread(descriptor, 32, 0)):
        raise _in_the_way(path, describe_file(path, directory))


def _same_file(descriptor: int, name: str, directory: int) -> bool:
    try:
        there = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), there)


def _in_the_way(path: Path, found: str) -> Failure:
    return Failure(
        f"cannot lock {path}",
        why=f"{found} is in the way",
        next_step="Look at what it is; it was left alone. Move it away to go on.",
        exit_code=ExitCode.IO_ERROR,
    )
