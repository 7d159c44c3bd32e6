"""The non-volatile memory of the hardware TPM: one file with two slots, written in turn.

    slot:   magic 8 | version u16 | sequence u64 | length u32 | SHA-256 of all but itself | state
    marker: magic 8 | version u16 | sequence u64 | SHA-256 of its slot | SHA-256 of all before

A save goes into the slot that does not hold the newest state and is synced before it counts; a
power cut in between leaves the other slot. Then a marker in the last page of that *other* slot says
that this state was stored. Nobody waits for the marker: it is durable at the latest with the next
save, so a save costs one sync. It tells a newest slot that was torn (nobody was told of it, and
the older one counts) from one that was stored and damaged later (refused: to fall back would undo
what was acknowledged).

The chip trusts its own memory, so the hashes are against damage, not against an attacker who can
write the file.

Invariants:
- A file that is there and is not blank is never replaced: if no slot can be read, that is a
  Failure.
- No state older than one that a marker names is ever given.
- The first state is written into both slots before anybody hears of it: so one slot that is torn
  beside one that is blank is a chip that never was, and nothing else is.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final

import construct as cs

from daemons.disk import Disk, PosixDisk
from daemons.errors import ExitCode, Failure
from protocol.wire import B32, U16, U32, U64, decode, encode, wire
from tpm12.state import Permanent
from tpm12.state_codec import StateError, decode_section, encode_section

MAGIC: Final = b"HWTPM-NV"
FORMAT_VERSION: Final = 2
FORMATS: Final = (1, FORMAT_VERSION)
"""Version 1 had no markers and wrote the first state once."""
SLOT_BYTES: Final = 256 * 1024
FILE_BYTES: Final = 2 * SLOT_BYTES
SEQUENCE_MAX: Final = 1 << 63
"""Of states; nobody comes that far by saving."""
MARKER_MAGIC: Final = b"HWTPM-OK"
MARKER_PAGE_BYTES: Final = 4096
"""Of each slot, the end: there stands the marker for the other slot."""


@wire
class SlotHeader:
    """The first bytes of a slot."""

    magic: Annotated[bytes, cs.Bytes(8)]
    version: U16
    sequence: U64
    length: U32
    sha256: B32


HEADER_BYTES: Final = 8 + 2 + 8 + 4 + 32
STATE_BYTES_MAX: Final = SLOT_BYTES - MARKER_PAGE_BYTES - HEADER_BYTES


@wire
class Marker:
    """Says that a slot was stored."""

    magic: Annotated[bytes, cs.Bytes(8)] = MARKER_MAGIC
    version: U16 = FORMAT_VERSION
    sequence: U64
    slot_sha256: B32
    """As in the header of the slot."""


MARKER_BYTES: Final = 8 + 2 + 8 + 32 + 32


def make_chip_memory(path: Path) -> None:
    """Make the memory of a new chip, all zeros, where there is none.

    Raises:
        Failure: The file cannot be made.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        if path.exists() or path.is_symlink():
            return
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
        """The newest state that is stored, or None for a new chip.

        Raises:
            Failure: The file holds something that cannot be read, or not what was stored last.
        """
        try:
            # What is read now will be acted upon: it must be what a power cut would leave too.
            self._disk.sync()
        except OSError as error:
            raise self._not_written(error) from error
        slots = [self._examine_slot(slot) for slot in (0, 1)]
        markers = [self._examine_marker(slot) for slot in (0, 1)]
        newest = max(slots, key=lambda slot: slot.sequence)
        if newest.state is None:
            self._require_unused(slots, markers)
            return None
        self._require_newest(newest, slots, markers)
        self._sequence, self._active = newest.sequence, slots.index(newest)
        try:
            permanent = decode_section(Permanent, newest.state)
        except StateError as error:
            raise self._damaged(f"slot {self._active}: {error}") from error
        if markers[self._active].sequence != self._sequence:
            self._mark(newest.sha256)
        return permanent

    def inspect(self) -> Inspection:
        """Look at what is stored; on a `ReadOnlyDisk` this changes nothing.

        Raises:
            Failure: As `load`.
        """
        permanent = self.load()
        wrong = tuple(
            slot.reason for slot in map(self._examine_slot, (0, 1)) if permanent and slot.reason
        )
        return Inspection(permanent=permanent, sequence=self._sequence, wrong=wrong)

    def save(self, permanent: Permanent) -> None:
        """Write the state into the other slot and sync.

        Raises:
            Failure: It was not kept, as far as this program can tell: what is found after a crash
                is this state or the one before.
        """
        state = encode_section(permanent)
        if len(state) > STATE_BYTES_MAX:
            raise Failure(
                f"cannot write the chip's memory {self._disk.name}",
                why=f"the state has {len(state)} bytes, a slot holds {STATE_BYTES_MAX}",
                next_step="Release NV areas or keys that are not needed.",
                exit_code=ExitCode.IO_ERROR,
            )
        if not self._sequence:
            self._store(state)
        self._mark(self._store(state))

    def _store(self, state: bytes) -> bytes:
        """Write the next slot and sync; its SHA-256."""
        slot, sequence = 1 - self._active, self._sequence + 1
        packed = _packed(sequence, state)
        try:
            self._disk.write(slot * SLOT_BYTES, packed)
            self._disk.sync()
        except OSError as error:
            raise self._not_written(error) from error
        self._active, self._sequence = slot, sequence
        return packed[HEADER_BYTES - 32 : HEADER_BYTES]

    def _mark(self, slot_sha256: bytes) -> None:
        """Say that the newest slot is stored. Only after its sync; itself without one."""
        marker = encode(Marker(sequence=self._sequence, slot_sha256=slot_sha256))
        # The state is stored, with a marker or without: a disk that fails now fails the next save.
        with contextlib.suppress(OSError):
            self._disk.write(_marker_offset(self._active), marker + hashlib.sha256(marker).digest())

    # -- what is there

    def _examine_slot(self, slot: int) -> _Slot:
        try:
            return self._read_slot(slot)
        except _UnreadableSlotError as error:
            return _Slot(reason=f"slot {slot}: {error}", is_torn=error.is_torn)

    def _read_slot(self, slot: int) -> _Slot:
        if self._disk.size < FILE_BYTES:
            raise _UnreadableSlotError(
                f"the file has {self._disk.size} bytes instead of {FILE_BYTES}"
            )
        start = slot * SLOT_BYTES
        try:
            head = self._disk.read(start, HEADER_BYTES)
            if not any(head):
                if any(self._disk.read(start + HEADER_BYTES, STATE_BYTES_MAX)):
                    raise _UnreadableSlotError("its header is gone")
                return _Slot()
            header = decode(SlotHeader, head)
            _check_header(header)
            state = self._disk.read(start + HEADER_BYTES, header.length)
        except OSError as error:
            raise _UnreadableSlotError((error.strerror or str(error)).lower()) from error
        if _packed(header.sequence, state, header.version)[:HEADER_BYTES] != head:
            # Version 1 wrote the first state once, and had no slot that nobody was told of.
            raise _UnreadableSlotError("its checksum is wrong", is_torn=header.version != 1)
        if not 0 < header.sequence <= SEQUENCE_MAX:
            raise _UnreadableSlotError("its number is impossible", is_torn=False)
        return _Slot(sequence=header.sequence, sha256=header.sha256, state=state)

    def _examine_marker(self, slot: int) -> _Marked:
        try:
            page = self._disk.read(_marker_offset(slot), MARKER_PAGE_BYTES)
        except OSError:
            return _Marked(is_unreadable=True)
        if not any(page):
            return _Marked()
        marker, checksum = page[: MARKER_BYTES - 32], page[MARKER_BYTES - 32 : MARKER_BYTES]
        is_whole = hashlib.sha256(marker).digest() == checksum and not any(page[MARKER_BYTES:])
        if not is_whole or not marker.startswith(MARKER_MAGIC):
            return _Marked(is_unreadable=True)
        found = decode(Marker, marker)
        return _Marked(sequence=found.sequence, slot_sha256=found.slot_sha256)

    def _require_unused(self, slots: list[_Slot], markers: list[_Marked]) -> None:
        """Check that no chip was ever here."""
        torn = [slot for slot in slots if slot.reason]
        if any(marker.sequence or marker.is_unreadable for marker in markers) or len(torn) > 1:
            reasons = "; ".join(slot.reason for slot in torn)
            raise self._damaged(reasons or "a state was stored here, and both slots are blank")
        # One slot that was never completed beside a blank one: the first save, never told.
        if torn and (slots[0] is not torn[0] or not torn[0].is_torn or not self._is_torn_first()):
            raise self._damaged(torn[0].reason)

    def _is_torn_first(self) -> bool:
        # What a torn write can leave is the beginning of a slot or nothing of it; what is somebody
        # else's file begins with something else.
        try:
            begin = self._disk.read(0, len(MAGIC) + 2)
        except OSError:
            return False
        ours = MAGIC + FORMAT_VERSION.to_bytes(2, "big")
        return all(byte in (0, mine) for byte, mine in zip(begin, ours, strict=True))

    def _require_newest(self, newest: _Slot, slots: list[_Slot], markers: list[_Marked]) -> None:
        """Check that the newest state which can be read is the newest that was stored."""
        reasons = "; ".join(slot.reason for slot in slots if slot.reason)
        stored = max(marker.sequence for marker in markers)
        if newest.sequence < stored:
            raise self._damaged(
                f"state number {stored} was stored, and the newest that can be read is number"
                f" {newest.sequence}" + (f" ({reasons})" if reasons else "")
            )
        # A crash leaves one torn slot and one torn marker at most.
        if reasons and all(marker.is_unreadable for marker in markers):
            raise self._damaged(f"{reasons}; both markers are damaged")
        for marker in markers:
            if marker.sequence == newest.sequence and marker.slot_sha256 != newest.sha256:
                raise self._damaged(f"state number {stored} is another one than was stored")
        older = min(slots, key=lambda slot: slot.sequence)
        if older.state is not None and older.sequence != newest.sequence - 1:
            raise self._damaged(
                f"its slots hold the states number {older.sequence} and {newest.sequence},"
                " which were never there together"
            )

    def _damaged(self, why: str) -> Failure:
        return Failure(
            f"cannot read the chip's memory {self._disk.name}",
            why=why,
            next_step="Restore the file from a backup. It was left as it is; to start with a new "
            "chip (every sealed secret is then lost), move it away.",
            exit_code=ExitCode.DAMAGED,
        )

    def _not_written(self, error: OSError) -> Failure:
        return Failure(
            f"cannot write the chip's memory {self._disk.name}",
            why=(error.strerror or str(error)).lower(),
            next_step="Make room on that disk or replace it; the last stored state is intact.",
            exit_code=ExitCode.IO_ERROR,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a chip's memory holds.

    Attributes:
        permanent: The newest state; None for a new chip.
        sequence: Its number.
        wrong: What is wrong with the slot that does not hold it.
    """

    permanent: Permanent | None = field(repr=False)
    sequence: int
    wrong: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Slot:
    """What a slot holds; nothing, when all fields are at their defaults."""

    sequence: int = 0
    sha256: bytes = b""
    state: bytes | None = field(default=None, repr=False)
    reason: str = ""
    """Why it cannot be read."""
    is_torn: bool = True
    """If it cannot be read: a save that was never completed may have left it so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marked:
    """What the marker for a slot says; nothing, when all fields are at their defaults."""

    sequence: int = 0
    slot_sha256: bytes = b""
    is_unreadable: bool = False


class _UnreadableSlotError(Exception):
    """A slot holds something that is not a state."""

    def __init__(self, why: str, *, is_torn: bool = True) -> None:
        super().__init__(why)
        self.is_torn = is_torn


def _marker_offset(slot: int) -> int:
    """Where the marker for a slot stands: at the end of the other one."""
    return (2 - slot) * SLOT_BYTES - MARKER_PAGE_BYTES


def _check_header(header: SlotHeader) -> None:
    if header.magic != MAGIC:
        raise _UnreadableSlotError("it is no chip memory")
    if header.version not in FORMATS:
        raise _UnreadableSlotError(
            f"format version {header.version}; this program reads {FORMATS[0]} to {FORMATS[-1]}"
        )
    if header.length > SLOT_BYTES - HEADER_BYTES:
        raise _UnreadableSlotError("its length is impossible")


def _packed(sequence: int, state: bytes, version: int = FORMAT_VERSION) -> bytes:
    def header(digest: bytes) -> bytes:
        return encode(
            SlotHeader(
                magic=MAGIC,
                version=version,
                sequence=sequence,
                length=len(state),
                sha256=digest,
            )
        )

    digest = hashlib.sha256(header(bytes(32)) + state).digest()
    return header(digest) + state
