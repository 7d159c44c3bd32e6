"""The few things the vault may do with its image: read, write, sync, know the size.

`Disk` is what the vault asks for; `PosixDisk` is an existing image file or block device, and
`ReadOnlyDisk` one that somebody else may be using. Tests use a disk that loses power
(`tests/fakes/faulty_disk.py`).

Leaves to others: what the bytes mean (`vault_format.py`) and in which order they are written
(`vault.py`).

Invariants:
- An image is never created, resized or replaced here; one that is missing is the user's to make.
- One process holds an image at a time (flock), under whatever name it was opened.
- No symbolic link is followed in the last part of the path, and nothing but a regular file or a
  block device is opened.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from pathlib import Path
from typing import Final, Protocol

from daemons.errors import ExitCode, Failure

_LOCKS: Final = Path("/proc/locks")


class Disk(Protocol):
    """The operations a vault is built from. Every one of them raises OSError when it fails."""

    @property
    def name(self) -> str:
        """What messages call this disk: the path of the image."""

    @property
    def size(self) -> int:
        """Bytes the disk holds."""

    def read(self, offset: int, length: int) -> bytes:
        """Give exactly `length` bytes from `offset`."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`; it may be lost until `sync` has returned."""

    def sync(self) -> None:
        """Return when everything written so far would survive a power cut."""

    def close(self) -> None:
        """Let the image go, for another process to take."""


class PosixDisk:
    """An image file or a block device that this process alone holds.

    Args:
        path: The image. It must exist, belong to this user (or be a block device that root owns)
            and be writable by nobody else.

    Raises:
        Failure: The image is missing, is not a file or block device, belongs to someone else, may
            be written by others, or is held by another process. Each says what to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor = _open_image(path, os.O_RDWR)
        try:
            _check_image(path, os.fstat(self._descriptor), os.geteuid())
            _lock_image(path, self._descriptor)
            self._opened = os.fstat(self._descriptor)
            self._size = os.lseek(self._descriptor, 0, os.SEEK_END)
            self._forget_cached_pages()
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def name(self) -> str:
        """The path of the image."""
        return str(self._path)

    @property
    def size(self) -> int:
        """Bytes the image had when it was opened."""
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """Give exactly `length` bytes from `offset`.

        Raises:
            OSError: EIO when the image ends before (it was cut off since it was opened), or as the
                kernel says.
        """
        return _read_all(self._descriptor, offset, length, self.name)

    def write(self, offset: int, data: bytes) -> None:
        """Write all of `data` at `offset`, inside the image.

        Raises:
            OSError: ENOSPC when it would reach past the end, EIO when the image is no longer what
                the next process would open, or as the kernel says.
        """
        if offset + len(data) > self._size:
            raise OSError(errno.ENOSPC, "past the end of the image", self.name)
        self._check_still_there()
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._descriptor, rest, offset)
            offset, rest = offset + written, rest[written:]

    def sync(self) -> None:
        """Wait until what was written is on the medium (the size never changes: data is enough)."""
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Give the image back; doing it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _check_still_there(self) -> None:
        # What is written must be found by the next process: not in a file that was put aside, or in
        # one that was cut off, of which only a part would come back.
        now = self._path.stat(follow_symlinks=False)
        if not os.path.samestat(now, self._opened):
            raise OSError(errno.EIO, "another file stands in its place", self.name)
        if now.st_size < self._opened.st_size:
            raise OSError(errno.EIO, "it was cut off while it was in use", self.name)

    def _forget_cached_pages(self) -> None:
        # A process before us may have died, or seen a sync fail, with pages in the kernel's cache
        # that no medium holds. What can still be written is written here; what the kernel gave up
        # on is dropped, so that we read what a power cut would leave and not a wish.
        with contextlib.suppress(OSError):
            os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


class ReadOnlyDisk:
    """An image to look at: it is not locked, and nothing can be written to it.

    What a `PosixDisk` refuses is refused here too, but for an image that somebody holds: see
    `holder_of`. What is read while its holder writes may be half of it.

    Args:
        path: The image.
        user: Whose it has to be; this process's own user when None.

    Raises:
        Failure: As `PosixDisk` says it.
    """

    def __init__(self, path: Path, user: int | None = None) -> None:
        self._path = path
        self._descriptor = _open_image(path, os.O_RDONLY)
        try:
            status = os.fstat(self._descriptor)
            _check_image(path, status, os.geteuid() if user is None else user)
            _check_writable(path)
            self.size = os.lseek(self._descriptor, 0, os.SEEK_END)
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def name(self) -> str:
        """The path of the image."""
        return str(self._path)

    def read(self, offset: int, length: int) -> bytes:
        """Give exactly `length` bytes from `offset`.

        Raises:
            OSError: As of `PosixDisk`.
        """
        return _read_all(self._descriptor, offset, length, self.name)

    def write(self, offset: int, data: bytes) -> None:
        """Refuse.

        Raises:
            OSError: EROFS, always.
        """
        del offset, data
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), self.name)

    def sync(self) -> None:
        """Do nothing: nothing was written here."""

    def close(self) -> None:
        """Let go of it; doing it twice is harmless."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def holder_of(path: Path) -> int | None:
    """The pid of the process that holds an image or a lock file; None when nobody does.

    Raises:
        OSError: There is no such file, or it may not be looked at.
    """
    return _find_holder(path.stat(follow_symlinks=False).st_ino, _LOCKS)


def _read_all(descriptor: int, offset: int, length: int, name: str) -> bytes:
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise OSError(errno.EIO, f"the image ends at byte {offset + len(data)}", name)
        data += more
    return data


def _open_image(path: Path, mode: int) -> int:
    # O_NONBLOCK: opening a FIFO that someone put there must not hang; it means nothing for files.
    flags = mode | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        return os.open(path, flags)
    except FileNotFoundError:
        raise Failure(
            f"cannot open image {path}",
            why="there is no such file",
            next_step=f"Make it, 2 MiB of zeros: dd if=/dev/zero of={path} bs=1M count=2",
            exit_code=ExitCode.NO_INPUT,
        ) from None
    except OSError as error:
        raise _not_opened(path, error) from error


def _not_opened(path: Path, error: OSError) -> Failure:
    if error.errno == errno.ELOOP:
        why, code = "it is a symbolic link, which could lead anywhere", ExitCode.NO_PERMISSION
        next_step = "Name the image itself in the configuration."
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        why, code = (error.strerror or "not allowed").lower(), ExitCode.NO_PERMISSION
        next_step = f"Its owner must be able to write it: ls -l {path}"
    elif error.errno in (errno.EISDIR, errno.ENOTDIR, errno.ENXIO):
        # A directory, a path through a file, a socket: not an image now, and not at another try.
        why, code = (error.strerror or str(error)).lower(), ExitCode.CONFIGURATION
        next_step = "The image must be a regular file or a block device."
    else:
        why, code = (error.strerror or str(error)).lower(), ExitCode.IO_ERROR
        next_step = "Look at its file system, then start it again."
    return Failure(f"cannot open image {path}", why=why, next_step=next_step, exit_code=code)


def _check_writable(path: Path) -> None:
    # Who uses an image opens it for writing.
    if not os.access(path, os.W_OK, effective_ids=True):
        raise _not_opened(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def _check_image(path: Path, status: os.stat_result, user: int) -> None:
    is_device = stat.S_ISBLK(status.st_mode)
    if not is_device and not stat.S_ISREG(status.st_mode):
        raise Failure(
            f"cannot use image {path}",
            why="it is neither a regular file nor a block device",
            next_step="Name a disk image in the configuration.",
            exit_code=ExitCode.CONFIGURATION,
        )
    # Devices belong to root and to a group such as "disk"; the kernel has let us in already.
    if is_device:
        return
    if status.st_uid != user:
        raise Failure(
            f"cannot use image {path}",
            why=f"it belongs to user id {status.st_uid}, and this process runs as {user}",
            next_step=f"If it is yours, give it over: chown {user} {path}",
            exit_code=ExitCode.NO_PERMISSION,
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Failure(
            f"cannot use image {path}",
            why=f"others than its owner may write it (mode {stat.S_IMODE(status.st_mode):04o})",
            next_step=f"Take that away: chmod go-w {path}",
            exit_code=ExitCode.NO_PERMISSION,
        )


def _lock_image(path: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _lock_holder(os.fstat(descriptor).st_ino)
        raise Failure(
            f"cannot use image {path}",
            why=f"{holder} holds it, and an image has one user at a time",
            next_step="Stop that one first, or wait until it has ended.",
            exit_code=ExitCode.UNAVAILABLE,
        ) from None


def _lock_holder(inode: int, locks: Path = _LOCKS) -> str:
    """Name the process that holds a flock on an inode, as far as /proc/locks tells."""
    holder = _find_holder(inode, locks)
    return "another process" if holder is None else f"process {holder}"


def _find_holder(inode: int, locks: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in locks.read_text().splitlines():
            words = line.split()
            # "1: FLOCK ADVISORY WRITE 4711 08:01:1234 0 EOF"; waiters have "->" as second word.
            if len(words) > 5 and words[1] == "FLOCK" and words[5].endswith(f":{inode}"):
                return int(words[4])
    return None
