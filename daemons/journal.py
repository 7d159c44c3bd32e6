"""A file that a killed process leaves intact: whole records, encrypted, in the order they came.

It is mapped into memory, so a record costs no system call, and what was written is the kernel's as
soon as it is written: a killed process loses nothing, a power cut everything. That is as it should
be, for it holds what a power cut takes anyway.

    magic 8 | version u16 | boot id 16 | salt 16 | device u64 | inode u64      the head, 58 bytes
    committed u64 at byte 64: where the last whole record ends; bit 63: in the second half
    two halves from byte 128, each: count u64 | length u32 | AES-256-GCM of a record, and its tag

The key of a file is HMAC-SHA256 of the owner's key and the salt; the nonce is the count, which goes
up by one with each record; the head and the owner's name are authenticated with each. When a half
is full, the other one is begun with a snapshot of all that was said; when that does not fit, a
larger file takes the name.

Invariants:
- A record counts from the moment `committed` covers it, which is one store of eight bytes. What
  lies behind that is a record that a kill tore, and was never acknowledged.
- What `committed` covers is read whole or refused (exit status DAMAGED): bytes that were changed, a
  copy of the file (it has another inode), another owner's file.
- A file of an earlier boot of the machine is as if it were not there: the machine lost its power.

Not covered here: whoever may write into this very file while its owner is dead can put older
contents back. He has the owner's uid, and so the owner's memory too. Frontends of rings notice
it, see `Fate.ROLLED_BACK` in `protocol/tpmif.py`.
"""

from __future__ import annotations

import errno
import hmac
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemons.errors import OUT_OF_RESOURCES, ExitCode, Failure

MAGIC: Final = b"VTPM-JNL"
VERSION: Final = 1
KEY_BYTES: Final = 32
GO_ON: Final = "--go-on"
"""Option of a daemon whose predecessor was killed: without its journal, do not start."""
HALF_BYTES: Final = 64 * 1024
"""Half of a new file; of one whose snapshot is large, more."""
SIZE_BYTES_MAX: Final = 64 * 1024 * 1024
HALVES_AT: Final = 128
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")

_HEAD: Final = struct.Struct("<8sH16s16sQQ")
_COMMITTED: Final = struct.Struct("<Q")
_COMMITTED_AT: Final = 64
_SECOND_HALF: Final = 1 << 63
_RECORD: Final = struct.Struct("<QI")
_nonce: Final = _RECORD.pack
"""Twelve bytes: the count, and 0."""
_SALT_BYTES: Final = 16
_TAG_BYTES: Final = 16
_ROOM_FACTOR: Final = 4
"""How many snapshots a half has room for, at least: the rest takes what comes after one."""


def boot_id() -> bytes:
    """Names this boot of the machine; 16 bytes."""
    return bytes.fromhex(BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))


def read_journal(path: Path, key: bytes, owner: bytes) -> list[bytes] | None:
    """Read what a process left.

    Args:
        path: Of the file.
        key: `KEY_BYTES` bytes.
        owner: Who wrote it; authenticated.

    Returns:
        All records since the snapshot, which is the first; None when there is no file, or one of an
        earlier boot.

    Raises:
        Failure: There is one, and it is not what its owner wrote, or the system has no descriptor
            or memory to read it (exit status IO_ERROR). It stays as it is.
    """
    content = _read_content(path)
    if content is None:
        return None
    salt = _HEAD.unpack_from(content)[3]
    cipher = AESGCM(_file_key(key, salt))
    associated = _associated(content[: _HEAD.size], owner)
    try:
        return [
            cipher.decrypt(_nonce(count, 0), sealed, associated)
            for count, sealed in _records(content)
        ]
    except (InvalidTag, ValueError, struct.error):
        raise _damaged(path, "its bytes are not those that were written") from None


def inspect_journal(path: Path) -> int | None:
    """Look at what a process left or is writing, as far as it can be told without the key.

    Returns:
        How many records there are; None when there is no file, or one of an earlier boot.

    Raises:
        Failure: `read_journal` would refuse it, whatever the key.
    """
    content = _read_content(path)
    if content is None:
        return None
    try:
        return sum(1 for _ in _records(content))
    except (ValueError, struct.error):
        raise _damaged(path, "its bytes are not those that were written") from None


def _read_content(path: Path) -> bytes | None:
    """A journal of this boot that is where it was written; None without one."""
    try:
        # O_NONBLOCK: a FIFO in its place must not hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(SIZE_BYTES_MAX) or b""
            status = os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        if error.errno in OUT_OF_RESOURCES:
            raise Failure(
                f"cannot read journal {path}",
                why=why,
                next_step="It was left as it is. Start the domain again when the system has some.",
                exit_code=ExitCode.IO_ERROR,
            ) from error
        raise _damaged(path, why) from error
    if len(content) < HALVES_AT:
        raise _damaged(path, f"it has {len(content)} bytes")
    magic, version, boot, _, device, inode = _HEAD.unpack_from(content)
    if magic != MAGIC:
        raise _damaged(path, "it is no journal")
    if version != VERSION:
        raise _damaged(path, f"it has format version {version}; this program reads {VERSION}")
    if boot != boot_id():
        return None
    if (device, inode) != (status.st_dev, status.st_ino):
        raise _damaged(path, "it is a copy of the file that was written")
    return content


def _records(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Count and encrypted bytes of each record that `committed` covers."""
    (word,) = _COMMITTED.unpack_from(content, _COMMITTED_AT)
    half_bytes = (len(content) - HALVES_AT) // 2
    at = HALVES_AT + (half_bytes if word & _SECOND_HALF else 0)
    end = at + (word & ~_SECOND_HALF)
    if not at < end <= len(content):
        raise ValueError(end)
    expected = None
    while at < end:
        count, length = _RECORD.unpack_from(content, at)
        at += _RECORD.size
        if at + length > end or expected not in {None, count}:
            raise ValueError(at)
        yield count, content[at : at + length]
        at += length
        expected = count + 1


class Journal:
    """One file, as its one writer has it.

    Args:
        path: Where it lies, in a private directory; what is there is replaced.
        key: `KEY_BYTES` bytes.
        owner: Authenticated with each record.
        snapshot: The first record.

    Raises:
        Failure: The file cannot be made.
    """

    def __init__(self, path: Path, key: bytes, owner: bytes, snapshot: bytes) -> None:
        self._path = path
        self._key = key
        self._owner = owner
        self._map: mmap.mmap | None = None
        self._count = 0
        self._at = self._begin = self._end = self._half = 0
        self._make_file(snapshot)

    def append(self, record: bytes) -> bool:
        """Add a record.

        Returns:
            Whether there was room. If not, nothing was written: call `restart`.
        """
        count, at = self._count, self._at
        data = self._cipher.encrypt(_nonce(count, 0), record, self._associated)
        data = _RECORD.pack(count, len(data)) + data
        end = at + len(data)
        if end > self._end:
            return False
        assert self._map is not None
        self._map[at:end] = data
        self._count, self._at = count + 1, end
        self._committed[0] = end - self._begin | self._half  # one store: a kill is before or after
        return True

    def restart(self, snapshot: bytes) -> None:
        """Begin anew with a snapshot of all that the records said; they are gone then.

        Raises:
            Failure: A larger file is needed and cannot be made; all is as it was.
        """
        before = (self._begin, self._at, self._end, self._half)
        self._take_half(0 if self._half else _SECOND_HALF)
        if len(snapshot) * _ROOM_FACTOR > self._end - self._begin or not self.append(snapshot):
            self._begin, self._at, self._end, self._half = before
            self._make_file(snapshot)

    def _take_half(self, half: int) -> None:
        half_bytes = (self._size - HALVES_AT) // 2
        self._half = half
        self._begin = self._at = HALVES_AT + (half_bytes if half else 0)
        self._end = self._begin + half_bytes

    def _make_file(self, snapshot: bytes) -> None:
        """Put a new file, which begins with a snapshot, in the place of the one before."""
        needed = _ROOM_FACTOR * (len(snapshot) + _RECORD.size + _TAG_BYTES)
        half_bytes = max(HALF_BYTES, -(-needed // mmap.PAGESIZE) * mmap.PAGESIZE)
        size = HALVES_AT + 2 * half_bytes
        beside = self._path.with_name(self._path.name + ".new")
        try:
            mapped, status = _new_map(beside, size)
            salt = os.urandom(_SALT_BYTES)
            head = _HEAD.pack(MAGIC, VERSION, boot_id(), salt, status.st_dev, status.st_ino)
            mapped[: len(head)] = head
            self.close()
            self._map, self._size = mapped, size
            self._committed = memoryview(mapped)[_COMMITTED_AT : _COMMITTED_AT + 8].cast("Q")
            self._cipher = AESGCM(_file_key(self._key, salt))
            self._associated = _associated(head, self._owner)
            self._take_half(0)
            self.append(snapshot)
            beside.rename(self._path)
        except OSError as error:
            raise Failure(
                f"cannot write journal {self._path}",
                why=(error.strerror or str(error)).lower(),
                next_step="Make room on the file system of the run directory.",
                exit_code=ExitCode.IO_ERROR,
            ) from error

    def close(self) -> None:
        """Let go of the file; it stays for the next process."""
        if self._map is not None:
            self._committed.release()
            self._map.close()
            self._map = None

    def remove(self) -> None:
        """Take the file away: what it says is no longer so."""
        self.close()
        remove_journal(self._path)


def _new_map(path: Path, size: int) -> tuple[mmap.mmap, os.stat_result]:
    """Make a file of zeros and map it.

    Raises:
        OSError: There is no room, or it is larger than a journal may be.
    """
    if size > SIZE_BYTES_MAX:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
    path.unlink(missing_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        # Reserved now: a full disk is an error here, and not a SIGBUS at some later store.
        os.posix_fallocate(descriptor, 0, size)
        return mmap.mmap(descriptor, size), os.fstat(descriptor)
    finally:
        os.close(descriptor)


def missing(path: Path) -> Failure:
    """What a daemon raises that was told `GO_ON` and finds nothing to go on from."""
    return _damaged(path, "it is gone")


def remove_journal(path: Path) -> None:
    """Take away what an earlier process left, if anything.

    Raises:
        Failure: It stays.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise Failure(
            f"cannot remove the journal {path}",
            why=(error.strerror or str(error)).lower(),
            next_step="Remove what is there by hand",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def _file_key(key: bytes, salt: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a journal key of {len(key)} bytes")
    return hmac.digest(key, salt, "sha256")


def _associated(head: bytes, owner: bytes) -> bytes:
    return head + owner


def _damaged(path: Path, why: str) -> Failure:
    return Failure(
        f"cannot go on from journal {path}",
        why=why,
        next_step="A crash must not look like a power cycle, so nothing starts here. To give up"
        " what was in memory: reboot the domain; for the chip, vtpm down and vtpm up.",
        exit_code=ExitCode.DAMAGED,
    )
