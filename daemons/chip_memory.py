"""The non-volatile memory of the hardware TPM: one file with two slots, written in turn.

    slot: magic 8 | version u16 | sequence u64 | length u32 | SHA-256 of all but itself | state

A save goes into the slot that does not hold the newest state and is synced before it counts; a
power cut in between leaves the other slot. The chip trusts its own memory, so the hash is against
damage, not against an attacker who can write the file.

Invariants:
- A file that is there and is not blank is never replaced: if no slot can be read, that is a
  Failure.
- The newest readable slot wins; a half-written one can only be the one not answered for.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Final

import construct as cs

from daemons.disk import Disk, PosixDisk
from daemons.errors import ExitCode, Failure
from protocol.wire import B32, U16, U32, U64, decode, encode, wire
from tpm12.state import Permanent
from tpm12.state_codec import StateError, decode_section, encode_section

MAGIC: Final = b"HWTPM-NV"
FORMAT_VERSION: Final = 1
SLOT_BYTES: Final = 256 * 1024
FILE_BYTES: Final = 2 * SLOT_BYTES


@wire
class SlotHeader:
    """The first bytes of a slot."""

    magic: Annotated[bytes, cs.Bytes(8)]
    version: U16
    sequence: U64
    length: U32
    sha256: B32


HEADER_BYTES: Final = 8 + 2 + 8 + 4 + 32


def make_chip_memory(path: Path) -> None:
    """Make the memory of a new chip, all zeros, where there is none.

    Raises:
        Failure: The file cannot be made.
    """
    if path.exists() or path.is_symlink():
        return
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, FILE_BYTES)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise Failure(
            f"cannot make the chip's memory {path}",
            why=(error.strerror or str(error)).lower(),
            next_step="Make room or permission there, or choose another --root.",
            exit_code=ExitCode.IO_ERROR,
        ) from error


class ChipMemory:
    """The store of the chip's permanent section.

    Args:
        disk: Its file, opened.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._active = 1
        self._sequence = 0

    @classmethod
    def open(cls, path: Path) -> ChipMemory:
        """Open the chip's file, making a blank one where there is none.

        Raises:
            Failure: It cannot be made or opened; see `PosixDisk`.
        """
        make_chip_memory(path)
        return cls(PosixDisk(path))

    def load(self) -> Permanent | None:
        """The newest state, or None when the memory is blank.

        Raises:
            Failure: The memory holds something that cannot be read.
        """
        found: list[tuple[int, int, Permanent]] = []
        reasons = []
        is_blank = True
        for slot in (0, 1):
            try:
                read = self._read_slot(slot)
            except _UnreadableSlotError as error:
                is_blank = False
                reasons.append(f"slot {slot}: {error}")
                continue
            if read is not None:
                is_blank = False
                found.append((read[0], slot, read[1]))
        if found:
            self._sequence, self._active, permanent = max(found, key=lambda item: item[0])
            return permanent
        if is_blank:
            return None
        raise Failure(
            f"cannot read the chip's memory {self._disk.name}",
            why="; ".join(reasons),
            next_step="Restore the file from a backup. It was left as it is; to start with a new "
            "chip (every sealed secret is then lost), move it away.",
            exit_code=ExitCode.DAMAGED,
        )

    def save(self, permanent: Permanent) -> None:
        """Write the state into the other slot and sync.

        Raises:
            Failure: It was not kept.
        """
        state = encode_section(permanent)
        slot = 1 - self._active
        sequence = self._sequence + 1
        if HEADER_BYTES + len(state) > SLOT_BYTES:
            raise Failure(
                f"cannot write the chip's memory {self._disk.name}",
                why=f"the state has {len(state)} bytes, a slot holds {SLOT_BYTES - HEADER_BYTES}",
                next_step="Release NV areas or keys that are not needed.",
                exit_code=ExitCode.IO_ERROR,
            )
        try:
            self._disk.write(slot * SLOT_BYTES, _packed(sequence, state))
            self._disk.sync()
        except OSError as error:
            raise Failure(
                f"cannot write the chip's memory {self._disk.name}",
                why=(error.strerror or str(error)).lower(),
                next_step="Make room on that disk or replace it; the last stored state is intact.",
                exit_code=ExitCode.IO_ERROR,
            ) from error
        self._active, self._sequence = slot, sequence

    def _read_slot(self, slot: int) -> tuple[int, Permanent] | None:
        """The slot's sequence and state; None when it is blank."""
        if self._disk.size < FILE_BYTES:
            raise _UnreadableSlotError(
                f"the file has {self._disk.size} bytes instead of {FILE_BYTES}"
            )
        start = slot * SLOT_BYTES
        try:
            head = self._disk.read(start, HEADER_BYTES)
            if not any(head):
                if any(self._disk.read(start + HEADER_BYTES, SLOT_BYTES - HEADER_BYTES)):
                    raise _UnreadableSlotError("its header is gone")
                return None
            header = decode(SlotHeader, head)
            _check_header(header)
            state = self._disk.read(start + HEADER_BYTES, header.length)
        except OSError as error:
            raise _UnreadableSlotError((error.strerror or str(error)).lower()) from error
        if _packed(header.sequence, state)[:HEADER_BYTES] != head:
            raise _UnreadableSlotError("its checksum is wrong")
        try:
            return header.sequence, decode_section(Permanent, state)
        except StateError as error:
            raise _UnreadableSlotError(str(error)) from error


class _UnreadableSlotError(Exception):
    """A slot holds something that is not a state."""


def _check_header(header: SlotHeader) -> None:
    if header.magic != MAGIC:
        raise _UnreadableSlotError("it is no chip memory")
    if header.version != FORMAT_VERSION:
        raise _UnreadableSlotError(
            f"format version {header.version}; this program reads {FORMAT_VERSION}"
        )
    if header.length > SLOT_BYTES - HEADER_BYTES:
        raise _UnreadableSlotError("its length is impossible")


def _packed(sequence: int, state: bytes) -> bytes:
    def header(digest: bytes) -> bytes:
        return encode(
            SlotHeader(
                magic=MAGIC,
                version=FORMAT_VERSION,
                sequence=sequence,
                length=len(state),
                sha256=digest,
            )
        )

    digest = hashlib.sha256(header(bytes(32)) + state).digest()
    return header(digest) + state
