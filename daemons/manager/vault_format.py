"""The bytes of the manager's image: pages, two roots, a tree of hashes. Pure.

An image is a row of pages of 4096 bytes, 512 of them in the usual 2 MiB::

    page 0, 2   root slot 0, two identical copies      (even sequence numbers)
    page 1, 3   root slot 1, two identical copies      (odd sequence numbers)
    page 4...   nodes of the tree: leaves with 48 records, interior nodes with 112 references

A root page has a plain header (sequence number, and the vault key sealed to the chip, which must
be readable before anything else can be), a part that is encrypted and authenticated together with
the header, and a checksum of the whole page. A node is encrypted and authenticated as a whole, and
its parent holds its hash: so a page can neither be changed, nor moved, nor replaced by an older one
without its root.

Each root names the one before it by hash, and says where in the hardware TPM the number and hash of
the newest one are kept (`anchoring.py`).

Two copies of each root, because one flipped byte in the newest root must not bring back the one
before it: that would undo a save that was acknowledged. The checksum needs no key: it tells a root
that was torn by a power cut (its other copy or the older root counts) from one that is whole but
false (that is damage, and refused).

Invariants:
- Every decoder either gives a value that was written under the vault key or raises a `VaultError`.
- No length, count or page number is used before it is checked against the page or the image.
- What is unused is written as zeros and is under the authentication.

Leaves to others: reading, writing and their order (`vault.py`), the sealing (`sealing.py`).
"""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Final

import construct as cs
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemons.errors import ExitCode, Failure
from protocol.wire import (
    B16,
    B32,
    SECRET,
    U8,
    U16,
    U32,
    U64,
    Bool,
    Counted,
    DecodeError,
    Digest,
    Nested,
    Sized16,
    decode,
    decode_from,
    encode,
    wire,
)

PAGE_BYTES: Final = 4096
SLOTS: Final = 2
COPIES: Final = 2
ROOT_PAGES: Final = SLOTS * COPIES
PAGES_MIN: Final = 16
"""The smallest image that is accepted, 64 KiB: enough for tests and a few hundred vTPMs."""
PAGES_MAX: Final = 1 << 24
"""64 GiB: a limit so that an image's size never decides how much memory is taken."""
FORMAT_VERSION: Final = 2
FORMATS: Final = (1, FORMAT_VERSION)
"""Version 1 had roots without chain, anchorage and key generation; it is read, never written."""
MAGIC: Final = b"vTPM manager\x00\xd0\x4d\x01"

KEY_BYTES: Final = 32
NONCE_BYTES: Final = 12
TAG_BYTES: Final = 16
CHECKSUM_BYTES: Final = 32
HEADER_BYTES: Final = 2560
"""Of a root page: the plain part. Holds one seal with the values of 11 PCRs and four without."""
ROOT_BYTES: Final = PAGE_BYTES - HEADER_BYTES - NONCE_BYTES - TAG_BYTES - CHECKSUM_BYTES
"""Of a root page: the encrypted part, before encryption."""

RECORD_BYTES: Final = 84
RECORDS_PER_LEAF: Final = 48
REFERENCE_BYTES: Final = 36
FANOUT: Final = 112
NODE_HEADER_BYTES: Final = 36
BODY_BYTES: Final = 4032
ROOT_CHILDREN_MAX: Final = 32
LEVELS_MAX: Final = 6

assert RECORDS_PER_LEAF * RECORD_BYTES == FANOUT * REFERENCE_BYTES == BODY_BYTES
assert NONCE_BYTES + NODE_HEADER_BYTES + BODY_BYTES + TAG_BYTES == PAGE_BYTES

NIL_UUID: Final = bytes(16)
"""A record with this UUID is an empty place."""


# ruff: noqa: N818 - these are named for what is wrong, as the reader of a message meets them.
# -- what can be wrong -----------------------------------------------------------------------------


class VaultError(Failure):
    """The manager's image cannot serve; whatever it says, the image was left as it is."""


class Damaged(VaultError):
    """The image is not what was written. Never repaired by guessing, never replaced."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the manager's image {name} is damaged",
            why=why,
            next_step="It was left as it is. Put back an intact copy of its newest state; or begin"
            " anew with zeros here and in the images of all its vTPMs, and the manager says how to"
            " give this one up.",
            exit_code=ExitCode.DAMAGED,
        )


class UnknownFormat(VaultError):
    """The image was written by a version that this one does not know."""

    def __init__(self, name: str, version: int) -> None:
        super().__init__(
            f"cannot read the manager's image {name}",
            why=f"it has format {version}, and this version reads {FORMATS[0]} to {FORMATS[-1]}",
            next_step="Use the version of the manager that wrote it, or a newer one.",
            exit_code=ExitCode.DAMAGED,
        )


class WrongKey(VaultError):
    """The image is intact, but the key that was given is another vault's."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"cannot open the manager's image {name}",
            why="the key that was unsealed for it belongs to another image",
            next_step="Check that the image and the chip belong together; it was left as it is.",
            exit_code=ExitCode.DAMAGED,
        )


class RolledBack(VaultError):
    """The image is older than the chip says it must be."""

    def __init__(self, name: str, sequence: int, minimum: int) -> None:
        super().__init__(
            f"the manager's image {name} is an older copy",
            why=f"its newest root is number {sequence}, and number {minimum} was acknowledged",
            next_step="Put the newest copy back; this one was left as it is.",
            exit_code=ExitCode.DAMAGED,
        )


class NotAnchored(VaultError):
    """The chip and the image do not belong together."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the hardware TPM does not vouch for the manager's image {name}",
            why=why,
            next_step="Bring the image and the chip that it was last used with back together; the"
            " image was left as it is.",
            exit_code=ExitCode.DAMAGED,
        )


class Full(VaultError):
    """There is no room for what is to be stored; nothing was changed."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the manager's image {name} is full",
            why=why,
            next_step="Stop the manager, make the image longer (truncate -s +2M IMAGE), start it.",
            exit_code=ExitCode.IO_ERROR,
        )


class NotStored(VaultError):
    """A write or sync failed: nobody knows what the medium holds until the vault is reopened."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"cannot store in the manager's image {name}",
            why=why,
            next_step="Nothing was acknowledged. The image is opened again at the next request;"
            " if this stays, look at the disk.",
            exit_code=ExitCode.IO_ERROR,
        )


class NotReadable(VaultError):
    """A read failed; what is stored may be intact."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"cannot read the manager's image {name}",
            why=why,
            next_step="Look at the disk; the image was left as it is.",
            exit_code=ExitCode.IO_ERROR,
        )


# -- declarations ----------------------------------------------------------------------------------


@wire
class Record:
    """One vTPM: 84 bytes in a leaf.

    `hash_key` is what the vTPM asked to keep, filled up with zeros to 64 bytes. `flags` and
    `group` are for groups and administration; both are 0 so far.
    """

    uuid: B16
    flags: U16 = 0
    group: U16 = 0
    hash_key: Annotated[bytes, cs.Bytes(64), SECRET]


@wire
class Reference:
    """Where a node is, and the SHA-256 of its page as stored."""

    page: U32
    digest: B32


class NodeKind(int, Enum):
    """What a tree holds."""

    RECORDS = 1


@wire
class NodeHeader:
    """What a node says of itself, against being put in another node's place."""

    kind: U8
    level: U8
    """0 is a leaf."""
    reserved: U16 = 0
    number: U32
    """Position among the nodes of its level, from 0."""
    sequence: U64
    """The root with which it was written."""
    spare: Annotated[bytes, cs.Bytes(20)] = bytes(20)


@wire
class SealedKey:
    """The vault key sealed to one configuration of the platform, and what that was.

    The PCR values only serve to say later which of them differ; the chip decides.
    """

    name: Sized16
    """UTF-8: what kind of configuration, for people."""
    pcr_selection: Sized16
    locality: U8
    """Mask: bit n is locality n."""
    digest_at_release: Digest
    pcr_values: Annotated[tuple[bytes, ...], Counted(cs.Int8ub, cs.Bytes(20))]
    """Ascending; empty when only the composite is known."""
    stored_data: Sized16
    """What the chip gave, to be handed back to it."""


@wire
class RootHeader:
    """The plain part of a root page."""

    magic: Annotated[bytes, cs.Bytes(16)] = MAGIC
    version: U16 = FORMAT_VERSION
    sequence: U64
    vault_id: B16
    page_count: U32
    """Pages the image had."""
    key_check: B16
    """Tells the right vault key from a wrong one, without helping anyone to find it."""
    seals: Annotated[tuple[SealedKey, ...], Counted(cs.Int8ub, Nested(SealedKey))]


@wire
class Tree:
    """The top of one tree."""

    kind: U8
    levels: U8
    """Levels below the root: 2 is leaves under interior nodes."""
    leaf_count: U32
    children: Annotated[tuple[Reference, ...], Counted(cs.Int8ub, Nested(Reference))]


@wire
class Anchorage:
    """Where in the chip the number and hash of the newest root are kept."""

    nv_index: U32
    secret: Annotated[bytes, cs.Bytes(20), SECRET]
    """Of the NV area and of the counter."""
    counter_id: U32 = 0
    counter_value: U32 = 0
    """What the counter is to have, once the manager has started that wrote this root."""
    is_confirmed: Bool
    """From here on an image whose record is not in the chip is refused."""


@wire
class Root:
    """The encrypted part of a root page."""

    sequence: U64
    previous: B32 = bytes(32)
    """SHA-256 of the page of the root before."""
    key_generation: U32 = 1
    """How often a vault key was made, for people who want a new one."""
    old_node_keys: Annotated[
        tuple[bytes, ...], Counted(cs.Int8ub, cs.Bytes(KEY_BYTES)), SECRET
    ] = ()
    """While a new vault key is brought in: under what the nodes are that it has not reached."""
    anchorages: Annotated[tuple[Anchorage, ...], Counted(cs.Int8ub, Nested(Anchorage))] = ()
    """None or one."""
    trees: Annotated[tuple[Tree, ...], Counted(cs.Int8ub, Nested(Tree))]

    @property
    def anchorage(self) -> Anchorage | None:
        """The one there is."""
        return self.anchorages[0] if self.anchorages else None


@wire
class Root1:
    """The encrypted part of a root page in version 1."""

    sequence: U64
    trees: Annotated[tuple[Tree, ...], Counted(cs.Int8ub, Nested(Tree))]


# -- keys ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, repr=False)
class VaultKeys:
    """The keys made from one vault key (32 bytes), each for one purpose."""

    nodes: AESGCM
    roots: AESGCM
    key_check: bytes
    node_key: bytes

    @classmethod
    def derive(cls, vault_key: bytes) -> VaultKeys:
        """Derive all keys. The vault key is uniformly random, so one HMAC each is a sound KDF."""
        if len(vault_key) != KEY_BYTES:
            raise ValueError("a vault key has 32 bytes")

        def purpose(name: bytes) -> bytes:
            return hmac.digest(vault_key, b"vTPM vault v1: " + name, "sha256")

        node_key = purpose(b"nodes")
        return cls(AESGCM(node_key), AESGCM(purpose(b"roots")), purpose(b"check")[:16], node_key)


# -- nodes -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Which node of the tree is meant."""

    level: int
    number: int
    kind: NodeKind = NodeKind.RECORDS


@dataclass(frozen=True, slots=True)
class Sealer:
    """Encrypts and decrypts the pages of one vault.

    Attributes:
        name: The image's, for messages.
        vault_id: 16 bytes.
        keys: What everything is written under.
        old_node_keys: What nodes may be under that were written before the key was changed.
    """

    name: str
    vault_id: bytes
    keys: VaultKeys = field(repr=False)
    old_node_keys: tuple[bytes, ...] = field(default=(), repr=False)

    def close_node(
        self, page: int, place: NodePlace, body: bytes, *, sequence: int, nonce: bytes
    ) -> bytes:
        """Make the 4096 bytes of a node.

        Args:
            page: Number of the page it will be written to.
            place: Which node it is.
            body: 4032 bytes, see `BODY_BYTES`.
            sequence: Number of the root that will hold it.
            nonce: 12 bytes, never used before under this key.
        """
        header = NodeHeader(
            kind=place.kind, level=place.level, number=place.number, sequence=sequence
        )
        plain = encode(header) + body
        return nonce + self.keys.nodes.encrypt(nonce, plain, self._node_label(page))

    def open_node(self, reference: Reference, place: NodePlace, stored: bytes) -> bytes:
        """Give the body of a node.

        Raises:
            Damaged: It is not the page that its parent means.
        """
        where = f"page {reference.page} (level {place.level}, node {place.number})"
        if not hmac.compare_digest(hashlib.sha256(stored).digest(), reference.digest):
            raise Damaged(self.name, f"{where} is not the one its parent was written with")
        nonce, sealed = stored[:NONCE_BYTES], stored[NONCE_BYTES:]
        plain = self._decrypted_node(nonce, sealed, self._node_label(reference.page))
        if plain is None:
            raise Damaged(self.name, f"{where} does not decrypt")
        header, start = decode_from(NodeHeader, plain, 0)
        if (header.kind, header.level, header.number) != (place.kind, place.level, place.number):
            raise Damaged(self.name, f"{where} is another node")
        return plain[start:]

    def is_under_old_key(self, page: int, stored: bytes) -> bool:
        """Whether a node (that opens) was written before the key was changed."""
        nonce, sealed = stored[:NONCE_BYTES], stored[NONCE_BYTES:]
        return bool(self.old_node_keys) and not _opens(
            self.keys.nodes, nonce, sealed, self._node_label(page)
        )

    def _decrypted_node(self, nonce: bytes, sealed: bytes, label: bytes) -> bytes | None:
        # The page is the one that its parent means; which key it is under, its tag tells.
        for key in (self.keys.nodes, *map(AESGCM, self.old_node_keys)):
            plain = _opens(key, nonce, sealed, label)
            if plain is not None:
                return plain
        return None

    def close_root(self, header: RootHeader, root: Root, *, nonce: bytes) -> bytes:
        """Make the 4096 bytes of a root page.

        Raises:
            Full: The header has more seals, or the root more children, than fit.
        """
        plain_header = _filled(self.name, encode(header), HEADER_BYTES, "the seals")
        plain_root = _filled(self.name, encode(root), ROOT_BYTES, "the root")
        page = plain_header + nonce + self.keys.roots.encrypt(nonce, plain_root, plain_header)
        return page + hashlib.sha256(page).digest()

    def open_root(self, page: bytes, sequence: int) -> Root:
        """Give the encrypted part of a root page that `examine_root` found whole.

        Raises:
            Damaged: It was not written under this key together with this header.
        """
        nonce = page[HEADER_BYTES : HEADER_BYTES + NONCE_BYTES]
        sealed = page[HEADER_BYTES + NONCE_BYTES : PAGE_BYTES - CHECKSUM_BYTES]
        try:
            plain = self.keys.roots.decrypt(nonce, sealed, page[:HEADER_BYTES])
            root, end = _decode_root(_version_of(page), plain)
        except (InvalidTag, DecodeError):
            raise Damaged(self.name, f"root {sequence} was not written by its vault") from None
        if root.sequence != sequence or any(plain[end:]):
            raise Damaged(self.name, f"root {sequence} contradicts its header")
        return root

    def _node_label(self, page: int) -> bytes:
        return b"vTPM vault node" + self.vault_id + page.to_bytes(4, "big")


def _decode_root(version: int, plain: bytes) -> tuple[Root, int]:
    if version == FORMAT_VERSION:
        return decode_from(Root, plain, 0)
    old, end = decode_from(Root1, plain, 0)
    return Root(sequence=old.sequence, trees=old.trees), end


def _opens(key: AESGCM, nonce: bytes, sealed: bytes, label: bytes) -> bytes | None:
    try:
        return key.decrypt(nonce, sealed, label)
    except InvalidTag:
        return None


def _version_of(page: bytes) -> int:
    return int.from_bytes(page[len(MAGIC) : len(MAGIC) + 2], "big")


def pack_references(references: list[Reference]) -> bytes:
    """The body of an interior node."""
    return b"".join(map(encode, references)).ljust(BODY_BYTES, b"\0")


def unpack_references(name: str, body: bytes, count: int) -> list[Reference]:
    """The first `count` references of an interior node.

    Raises:
        Damaged: There is something behind them.
    """
    end = count * REFERENCE_BYTES
    if any(body[end:]):
        raise Damaged(name, "an interior node has more children than the tree has leaves")
    return [
        decode(Reference, body[at : at + REFERENCE_BYTES]) for at in range(0, end, REFERENCE_BYTES)
    ]


def record_at(body: bytes, place: int) -> Record:
    """The `place`-th record of a leaf; one with the nil UUID is an empty place."""
    return decode(Record, body[place * RECORD_BYTES : (place + 1) * RECORD_BYTES])


def with_record(body: bytes, place: int, record: Record | None) -> bytes:
    """A leaf's body with one record put in (or taken out)."""
    start = place * RECORD_BYTES
    encoded = bytes(RECORD_BYTES) if record is None else encode(record)
    return body[:start] + encoded + body[start + RECORD_BYTES :]


def uuids_of(body: bytes) -> list[bytes]:
    """The UUID of each place of a leaf, without decoding the rest."""
    return [body[at : at + 16] for at in range(0, BODY_BYTES, RECORD_BYTES)]


# -- roots -----------------------------------------------------------------------------------------


class PageState(Enum):
    """What a root page is before any key is known, when it is no root."""

    BLANK = "blank"
    TORN = "torn"


def root_pages(sequence: int) -> tuple[int, int]:
    """The pages of the two copies of a root."""
    slot = sequence % SLOTS
    return slot, slot + SLOTS


def examine_root(name: str, number: int, page: bytes) -> RootHeader | PageState:
    """Say what a root page is, as far as that can be told without a key.

    Args:
        name: The image, for messages.
        number: Which page it is.
        page: Its 4096 bytes.

    Raises:
        UnknownFormat: It is whole and of another version.
        Damaged: It is whole (its checksum is right) and yet no root: nobody's power cut does that.
    """
    if not any(page):
        return PageState.BLANK
    content, checksum = page[:-CHECKSUM_BYTES], page[-CHECKSUM_BYTES:]
    if not hmac.compare_digest(hashlib.sha256(content).digest(), checksum):
        return PageState.TORN
    version = _version_of(page)
    if page.startswith(MAGIC) and version not in FORMATS:
        raise UnknownFormat(name, version)
    try:
        header, end = decode_from(RootHeader, page[:HEADER_BYTES], 0)
    except DecodeError as error:
        raise Damaged(name, f"page {number} is no root: {error.reason}") from None
    if header.magic != MAGIC or any(page[end:HEADER_BYTES]):
        raise Damaged(name, f"page {number} is no root of a manager")
    if number not in root_pages(header.sequence):
        raise Damaged(name, f"page {number} holds root {header.sequence}, which belongs elsewhere")
    return header


def level_sizes(leaf_count: int) -> list[int]:
    """How many nodes each level has, leaves first; the last level hangs on the root.

    There is always one level of interior nodes, so that a save costs the same for one vTPM and for
    the 24,000 of a full 2 MiB image; more levels come where the root's 32 children run out.
    """
    sizes = [leaf_count, -(-leaf_count // FANOUT)]
    while sizes[-1] > ROOT_CHILDREN_MAX:
        sizes.append(-(-sizes[-1] // FANOUT))
    return sizes


def _filled(name: str, content: bytes, length: int, what: str) -> bytes:
    if len(content) > length:
        raise Full(name, f"{what} would take {len(content)} bytes, and there are {length}")
    return content.ljust(length, b"\0")
