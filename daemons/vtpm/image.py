"""The disk image of a vTPM: its permanent state, encrypted under a key that only the manager has.

The image has two slots, each half of it:

    magic 8 | format version u16 | length u32 | nonce 12 | AES-256-GCM ciphertext and tag

The last 512 bytes of slot 0 are the claim (magic 8, format version u16, UUID 16), written and
synced before anything else in a blank image.

Every save draws a fresh key, writes the slot that does not hold the committed state, syncs, and
then hands SHA-256 of the slot and the key to the manager (the 64-byte form of SaveHashKey). The
manager's record is the commit point: whatever a crash leaves behind, the slot whose hash it names
is the state.

Source: the arrangement of Xen's `vtpmblk.c` (two slots, hash and key at the manager), with what it
leaves undone mended: authenticated encryption, a sync before the commit, no flip before it, both
slots tried, and no fresh TPM in place of one that cannot be read.

Invariants:
- The committed slot is never written.
- A TPM is new only where a blank (all zero) image meets a UUID that the manager has no record of.
  A first save that never reached the manager's record counts as blank: the image is claimed for
  this UUID and slot 1 is blank, because a TPM serves nobody before its second save.
- After a commit whose fate is unknown, the manager is asked before the next slot is chosen.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Annotated, Final, Protocol
from uuid import UUID

import construct as cs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemons.disk import Disk
from daemons.errors import ExitCode, Failure
from protocol.wire import U16, U32, decode, encode, wire
from tpm12.state import Permanent
from tpm12.state_codec import StateError, decode_section, encode_section

MAGIC: Final = b"VTPM-IMG"
FIRST_MAGIC: Final = b"VTPM-NEW"
"""Marks the claim, and the very first save, in slot 0; the second follows at once."""
CLAIM_BYTES: Final = 512
"""One sector: it may be torn inside, and nothing else is written before it is whole."""
FORMAT_VERSION: Final = 1
KEY_BYTES: Final = 32
HASH_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
_PROBE_BYTES: Final = 1 << 16


@wire
class SlotHeader:
    """The first bytes of a slot; they are authenticated with the state."""

    magic: Annotated[bytes, cs.Bytes(8)]
    version: U16
    length: U32
    nonce: Annotated[bytes, cs.Bytes(NONCE_BYTES)]


HEADER_BYTES: Final = 8 + 2 + 4 + NONCE_BYTES


class HashKeys(Protocol):
    """The manager, as far as an image needs it."""

    def load_hash_key(self) -> bytes | None:
        """Hash and key on record for this vTPM, or None when the manager has never stored one.

        Raises:
            Failure: The manager cannot or will not tell.
        """
        ...

    def save_hash_key(self, hash_key: bytes) -> None:
        """Put hash and key on record, durably.

        Raises:
            Failure: The manager refused, or its answer never came.
        """
        ...


class VtpmImage:
    """The store of one vTPM's permanent section.

    Args:
        disk: The image, opened.
        uuid: The vTPM's; part of what is authenticated, so that images cannot be swapped.
        hash_keys: The manager.
    """

    def __init__(self, disk: Disk, uuid: UUID, hash_keys: HashKeys) -> None:
        self._disk = disk
        self._uuid = uuid
        self._hash_keys = hash_keys
        self._slot_bytes = disk.size // 2
        self._active: int | None = None
        self._is_uncertain = False

    def load(self) -> Permanent | None:
        """The committed state, or None for a vTPM that is to be made.

        Raises:
            Failure: There is a state and it cannot be read, or there should be one.
        """
        record = self._hash_keys.load_hash_key()
        if record is None:
            if not self._is_blank(0, self._disk.size) and not self._is_unfinished():
                raise self._refused(
                    "the image is not blank, and the manager has never stored a key for "
                    f"UUID {self._uuid}",
                    "Use the image that belongs to this UUID, or the UUID that belongs to this "
                    "image; for a new vTPM make a blank image.",
                )
            return None
        if len(record) != HASH_BYTES + KEY_BYTES:
            raise self._refused(
                f"the manager's record has {len(record)} bytes; this program writes 64",
                "This vTPM was saved by another implementation; keep using that one.",
            )
        digest, key = record[:HASH_BYTES], record[HASH_BYTES:]
        slot, content = self._find(digest)
        self._active = slot
        return self._decrypted(content, key)

    def save(self, permanent: Permanent) -> None:
        """Commit the state: write, sync, and put hash and key on the manager's record.

        Raises:
            Failure: It was not kept, or (the manager's answer never came) perhaps kept; in both
                cases the command that made the change must fail.
        """
        if self._is_uncertain:
            self._settle()
        if self._active is None:
            self._commit(0, permanent, FIRST_MAGIC)
        self._commit(0 if self._active else 1, permanent, MAGIC)

    def _commit(self, slot: int, permanent: Permanent, magic: bytes) -> None:
        content, record = self._encrypted(permanent, magic)
        if magic == FIRST_MAGIC:
            self._write(self._slot_bytes - CLAIM_BYTES, self._claim())
        self._write(slot * self._slot_bytes, content)
        self._is_uncertain = True
        self._hash_keys.save_hash_key(record)
        self._is_uncertain = False
        self._active = slot

    def _write(self, offset: int, content: bytes) -> None:
        """Write and sync."""
        try:
            self._disk.write(offset, content)
            self._disk.sync()
        except OSError as error:
            raise Failure(
                f"cannot write image {self._disk.name}",
                why=(error.strerror or str(error)).lower(),
                next_step="Make room on that disk or replace it; the last stored state is intact.",
                exit_code=ExitCode.IO_ERROR,
            ) from error

    def _settle(self) -> None:
        """Learn from the manager which slot is committed, after a commit of unknown fate."""
        record = self._hash_keys.load_hash_key()
        if record is None:
            self._active = None
        else:
            self._active, _ = self._find(record[:HASH_BYTES])
        self._is_uncertain = False

    def _find(self, digest: bytes) -> tuple[int, bytes]:
        """The slot whose content has this hash, and its content.

        Raises:
            Failure: Neither has.
        """
        reasons = []
        for slot in (0, 1):
            content = _read_slot(self._disk, slot)
            if isinstance(content, str):
                reasons.append(f"slot {slot} {content}")
            elif hashlib.sha256(content).digest() == digest:
                return slot, content
            else:
                reasons.append(f"slot {slot} is not the one that the manager has on record")
        raise self._refused(
            "; ".join(reasons),
            "The image is damaged, an older copy, or another vTPM's. Put the right image back; "
            "it was left as it is.",
        )

    def _encrypted(self, permanent: Permanent, magic: bytes) -> tuple[bytes, bytes]:
        """The content of a slot under a fresh key, and hash and key for the manager."""
        state = encode_section(permanent)
        key, nonce = os.urandom(KEY_BYTES), os.urandom(NONCE_BYTES)
        header = encode(
            SlotHeader(
                magic=magic, version=FORMAT_VERSION, length=len(state) + TAG_BYTES, nonce=nonce
            )
        )
        content = header + AESGCM(key).encrypt(nonce, state, header + self._uuid.bytes)
        if len(content) > self._slot_bytes - CLAIM_BYTES:
            room = max(0, self._slot_bytes - CLAIM_BYTES)
            raise Failure(
                f"cannot write image {self._disk.name}",
                why=f"the state needs {len(content)} bytes, a slot has {room}",
                next_step="Use an image of 2 MiB.",
                exit_code=ExitCode.IO_ERROR,
            )
        return content, hashlib.sha256(content).digest() + key

    def _decrypted(self, content: bytes, key: bytes) -> Permanent:
        header = decode(SlotHeader, content[:HEADER_BYTES])
        if header.version != FORMAT_VERSION:
            raise self._refused(
                f"it has format version {header.version}; this program reads {FORMAT_VERSION}",
                "Use the version of the stack that wrote it, or a later one.",
            )
        associated = content[:HEADER_BYTES] + self._uuid.bytes
        try:
            state = AESGCM(key).decrypt(header.nonce, content[HEADER_BYTES:], associated)
            return decode_section(Permanent, state)
        except InvalidTag:
            raise self._refused(
                f"the key that the manager keeps for UUID {self._uuid} does not open it",
                "Use the image that belongs to this UUID.",
            ) from None
        except StateError as error:
            raise self._refused(
                str(error), "Use the version of the stack that wrote it, or a later one."
            ) from error

    def _claim(self) -> bytes:
        return FIRST_MAGIC + FORMAT_VERSION.to_bytes(2, "big") + self._uuid.bytes

    def _is_unfinished(self) -> bool:
        """A first save that nobody was told of: the image is ours, and slot 1 is blank."""
        if self._slot_bytes < HEADER_BYTES + CLAIM_BYTES:
            return False
        if not self._is_blank(self._slot_bytes, self._disk.size):
            return False
        at = self._slot_bytes - CLAIM_BYTES
        claim = self._claim().ljust(CLAIM_BYTES, b"\0")
        found = self._disk.read(at, CLAIM_BYTES)
        if found == claim:
            return True
        # Torn: some of it, and nothing else. Or an image that was begun before there were claims.
        is_torn = all(byte in (0, whole) for byte, whole in zip(found, claim, strict=True))
        is_marked = self._disk.read(0, len(FIRST_MAGIC)) == FIRST_MAGIC and not any(found)
        return (is_torn and self._is_blank(0, at)) or is_marked

    def _is_blank(self, begin: int, end: int) -> bool:
        return _is_blank(self._disk, begin, end)

    def _refused(self, why: str, next_step: str) -> Failure:
        return Failure(
            f"cannot use image {self._disk.name}",
            why=why,
            next_step=next_step,
            exit_code=ExitCode.DAMAGED,
        )


# -- without the manager ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What an image holds, as far as it can be told without the manager's record.

    Attributes:
        is_blank: Nothing but zeros: an image for a new vTPM.
        wrong: For each slot what is wrong with it, or nothing when it may be the one on record.
    """

    is_blank: bool
    wrong: tuple[str, str]

    @property
    def is_hopeless(self) -> bool:
        """Neither slot can be the one that any manager has on record."""
        return all(self.wrong)


def inspect(disk: Disk) -> Inspection:
    """Look at an image.

    Raises:
        OSError: The disk fails.
    """
    wrong = []
    for slot in (0, 1):
        content = _read_slot(disk, slot)
        if isinstance(content, str):
            wrong.append(f"slot {slot} {content}")
            continue
        version = decode(SlotHeader, content[:HEADER_BYTES]).version
        is_other = version != FORMAT_VERSION
        wrong.append(f"slot {slot} has format version {version}" if is_other else "")
    return Inspection(is_blank=_is_blank(disk, 0, disk.size), wrong=(wrong[0], wrong[1]))


def _read_slot(disk: Disk, slot: int) -> bytes | str:
    """A slot's header and content, or why there is none."""
    slot_bytes = disk.size // 2
    start = slot * slot_bytes
    if slot_bytes < HEADER_BYTES:
        return "is too small to hold anything"
    try:
        head = disk.read(start, HEADER_BYTES)
        if not any(head):
            return "is blank"
        header = decode(SlotHeader, head)
        if header.magic not in {MAGIC, FIRST_MAGIC}:
            return "holds no vTPM state"
        if header.length > slot_bytes - HEADER_BYTES:
            return "has an impossible length"
        return head + disk.read(start + HEADER_BYTES, header.length)
    except OSError as error:
        return f"cannot be read ({(error.strerror or str(error)).lower()})"


def _is_blank(disk: Disk, begin: int, end: int) -> bool:
    for start in range(begin, end, _PROBE_BYTES):
        size = min(_PROBE_BYTES, end - start)
        if any(disk.read(start, size)):
            return False
    return True
