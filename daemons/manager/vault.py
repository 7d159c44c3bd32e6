"""The manager's records, kept so that a power cut at any instant leaves the old or the new.

A save writes the changed leaf and its ancestors to free pages and both copies of the next root,
syncs, tells the chip, and only then reports success. Pages that the current root needs are never
written. What a save costs depends on the height of the tree alone, which is the same for one vTPM
and for the 24,000 that 2 MiB hold: four pages and one sync.

Nodes and root may become durable in any order. So after a power cut the newest root may lack nodes:
if the chip was not told of that root, nobody was, and the one before it, which the chip names, is
the state; if it was, the image is damaged. A vault that is not anchored in a chip (it is being
made) has nobody to tell the two apart, and syncs its nodes before it writes the root.

Source of the idea: `stubdom/vtpmmgr/disk_*.c` (two roots, tree of hashes); the format is ours
(`vault_format.py`), and so is the order of writes.

Leaves to others: the bytes (`vault_format.py`), who may store what (`requests.py`), the vault key
(`sealing.py`), locking (one thread at a time may call).

Invariants:
- What was acknowledged is found again; what was not may be.
- A vault is created only in a blank image. Everything else that cannot be opened is refused.
- After a failed write or sync nothing more is read or written until the image is opened again.
- An image whose newest root is not the chip's newest, or the one right after it, is refused.
- Memory holds UUIDs and hashes; the keys of the vTPMs stay encrypted on the disk until asked for.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

from daemons.disk import Disk
from daemons.errors import ExitCode, Failure
from daemons.manager.anchoring import Anchor, Anchored, is_one_ahead
from daemons.manager.vault_change import Change
from daemons.manager.vault_format import (
    BODY_BYTES,
    FANOUT,
    NIL_UUID,
    NONCE_BYTES,
    PAGE_BYTES,
    PAGES_MAX,
    PAGES_MIN,
    RECORDS_PER_LEAF,
    ROOT_CHILDREN_MAX,
    ROOT_PAGES,
    Anchorage,
    Damaged,
    Full,
    NodeKind,
    NodePlace,
    NotAnchored,
    NotReadable,
    NotStored,
    PageState,
    Record,
    Reference,
    RolledBack,
    Root,
    RootHeader,
    SealedKey,
    Sealer,
    Tree,
    VaultError,
    VaultKeys,
    WrongKey,
    examine_root,
    level_sizes,
    pack_references,
    record_at,
    root_pages,
    unpack_references,
    uuids_of,
    with_record,
)

RandomBytes = Callable[[int], bytes]
BLANK_CHECK_BYTES: Final = 1 << 20
HASH_BYTES: Final = 32


# -- what is in an image, before any key is known --------------------------------------------------


@dataclass(frozen=True, slots=True)
class Inspection:
    """What an image holds, as far as it can be told without the vault key."""

    header: RootHeader | None
    """Of the newest root that is whole; None for a blank image."""
    root_page: bytes = field(default=b"", repr=False)
    bad_copies: tuple[int, ...] = ()
    """Pages that should hold this root too and do not."""
    newer_was_torn: bool = False
    """The other slot holds a root that was not completely written: the last save did not finish."""

    @property
    def is_blank(self) -> bool:
        """Whether the image may be given a new vault."""
        return self.header is None


def inspect(disk: Disk) -> Inspection:
    """Look at an image.

    Raises:
        Damaged: It is not blank, and has no whole root.
        UnknownFormat: It was written by another version.
        NotReadable, NotStored: The disk fails.
        VaultError: It is too small.
    """
    _check_size(disk)
    # A process before us may have died between a write and its sync. What we read now will be
    # acted upon, so it must be what a power cut would leave too.
    try:
        disk.sync()
    except OSError as error:
        raise NotStored(disk.name, _reason(error)) from error
    pages = [_read(disk, number) for number in range(ROOT_PAGES)]
    states = [examine_root(disk.name, number, page) for number, page in enumerate(pages)]
    roots = [(s.sequence, n) for n, s in enumerate(states) if isinstance(s, RootHeader)]
    if not roots:
        _require_blank(disk, states)
        return Inspection(header=None)
    sequence, number = max(roots)
    header, page = states[number], pages[number]
    assert isinstance(header, RootHeader)
    copies = root_pages(sequence)
    if any((sequence, n) in roots and pages[n] != page for n in copies):
        raise Damaged(disk.name, f"there are two different roots with number {sequence}")
    return Inspection(
        header=header,
        root_page=page,
        bad_copies=tuple(n for n in copies if pages[n] != page),
        newer_was_torn=any(
            states[n] is PageState.TORN for n in range(ROOT_PAGES) if n not in copies
        ),
    )


def inspect_vault(disk: Disk) -> tuple[Inspection, RootHeader]:
    """Look at an image that is not blank.

    Raises:
        Damaged: It is blank, or was cut off.
        VaultError: As `inspect`.
    """
    found = inspect(disk)
    header = found.header
    if header is None:
        raise Damaged(disk.name, "it is blank")
    if header.page_count > disk.size // PAGE_BYTES:
        why = f"it was cut off: {disk.size} bytes of {header.page_count * PAGE_BYTES} are left"
        raise Damaged(disk.name, why)
    return found, header


def _require_blank(disk: Disk, states: list[RootHeader | PageState]) -> None:
    # Creating a vault writes root 1, syncs, writes root 2, syncs, and reports success. So as long
    # as nothing of root 2 (pages 0 and 2) is there, a torn root 1 never held anything.
    torn = {number for number, state in enumerate(states) if state is PageState.TORN}
    if torn - set(root_pages(1)):
        raise Damaged(disk.name, "it has no intact root; it may not be a manager's image at all")
    for offset in range(ROOT_PAGES * PAGE_BYTES, disk.size, BLANK_CHECK_BYTES):
        length = min(BLANK_CHECK_BYTES, disk.size - offset)
        try:
            content = disk.read(offset, length)
        except OSError as error:
            raise NotReadable(disk.name, _reason(error)) from error
        if any(content):
            raise Damaged(disk.name, "it has no intact root and yet is not blank")


def _check_size(disk: Disk) -> None:
    if PAGES_MIN <= disk.size // PAGE_BYTES <= PAGES_MAX:
        return
    least, most = PAGES_MIN * PAGE_BYTES, PAGES_MAX * PAGE_BYTES
    raise VaultError(
        f"cannot use the manager's image {disk.name}",
        why=f"it has {disk.size} bytes, and {least} to {most} can be used",
        next_step=f"For a new manager: dd if=/dev/zero of={disk.name} bs=1M count=2",
        exit_code=ExitCode.CONFIGURATION,
    )


# -- the vault -------------------------------------------------------------------------------------


class Vault:
    """An open image. Made by `create` or `open`."""

    def __init__(
        self,
        disk: Disk,
        header: RootHeader,
        keys: VaultKeys,
        random_bytes: RandomBytes,
        anchor: Anchor | None = None,
    ) -> None:
        self._disk = disk
        self._header = header
        self._sealer = Sealer(disk.name, header.vault_id, keys)
        self._random_bytes = random_bytes
        self._anchor = anchor
        self._newest = Root(sequence=header.sequence, trees=())
        self._digest = bytes(HASH_BYTES)
        self._next_keys: VaultKeys | None = None
        self._old_pages: set[int] = set()
        self._page_count = disk.size // PAGE_BYTES
        self._levels: list[list[Reference]] = [[] for _ in level_sizes(0)]
        self._positions: dict[bytes, int] = {}
        self._vacant: list[int] = []
        # First freed, first used: the pages of the root before stay intact as long as possible.
        self._free = deque(range(ROOT_PAGES, self._page_count))
        self._failure: NotStored | None = None

    @classmethod
    def create(  # noqa: PLR0913 - one by place, and what a vault is made of by name
        cls,
        disk: Disk,
        vault_key: bytes,
        *,
        vault_id: bytes,
        seals: tuple[SealedKey, ...],
        random_bytes: RandomBytes,
        anchor: Anchor | None = None,
        anchorage: Anchorage | None = None,
    ) -> Vault:
        """Make a vault in a blank image.

        Args:
            disk: The image.
            vault_key: 32 random bytes that are sealed in `seals`.
            vault_id: 16 random bytes.
            seals: Where the next manager finds the vault key.
            random_bytes: Gives nonces.
            anchor: The chip.
            anchorage: Where in it the vault will be anchored; not confirmed yet.

        Raises:
            Damaged: The image is not blank.
            VaultError: See `inspect` and `save`.
        """
        if not inspect(disk).is_blank:
            raise Damaged(disk.name, "a new vault was asked for, and it has one already")
        keys = VaultKeys.derive(vault_key)
        header = RootHeader(
            sequence=0,
            vault_id=vault_id,
            page_count=disk.size // PAGE_BYTES,
            key_check=keys.key_check,
            seals=seals,
        )
        vault = cls(disk, header, keys, random_bytes, anchor)
        if anchorage is not None:
            vault._newest = replace(vault._newest, anchorages=(anchorage,))
        # Twice: see `_require_blank`.
        vault._commit_root(vault._levels)
        vault._commit_root(vault._levels)
        return vault

    @classmethod
    def open(
        cls,
        disk: Disk,
        unseal: Callable[[RootHeader], bytes],
        *,
        random_bytes: RandomBytes,
        minimum_sequence: int = 0,
        anchor: Anchor | None = None,
    ) -> Vault:
        """Open the newest state of an image, after checking all of it.

        Args:
            disk: The image.
            unseal: Gives the vault key, from the seals in the header; what it raises is passed on.
            random_bytes: Gives nonces.
            minimum_sequence: What is known from elsewhere to have been acknowledged.
            anchor: The chip; it is asked where the image says that it is anchored in one.

        Raises:
            WrongKey: `unseal` gave the key of another vault.
            RolledBack: The image is older than `minimum_sequence`, or than the chip says.
            NotAnchored: The chip knows nothing of it, or another history.
            Failure: The chip does not answer.
            Damaged: Anything does not verify, or the image is blank.
            VaultError: See `inspect`.
        """
        found, header = inspect_vault(disk)
        vault = cls(disk, header, VaultKeys.derive(unseal(header)), random_bytes, anchor)
        vault._load(found, minimum_sequence)
        return vault

    def reopened(self, disk: Disk) -> Vault:
        """Open the image again after a failure, with the key that this vault has.

        Nothing older than what was acknowledged is taken.

        Raises:
            VaultError: See `open`.
        """
        found, header = inspect_vault(disk)
        if header.vault_id != self._header.vault_id:
            raise Damaged(disk.name, "it is another vault's image than before")
        keys = self._sealer.keys
        # The failure may have come when the root of a new key was written, or written half.
        if self._next_keys is not None and self._next_keys.key_check == header.key_check:
            keys = self._next_keys
        vault = Vault(disk, header, keys, self._random_bytes, self._anchor)
        vault._load(found, self.sequence)
        return vault

    def close(self) -> None:
        """Let the image go."""
        self._disk.close()

    # -- what callers see

    @property
    def header(self) -> RootHeader:
        """The plain part of the current root."""
        return self._header

    @property
    def sequence(self) -> int:
        """How many roots were written; a save adds one."""
        return self._header.sequence

    @property
    def failure(self) -> NotStored | None:
        """Why the vault must be opened again, if it must."""
        return self._failure

    @property
    def anchorage(self) -> Anchorage | None:
        """Where in the chip the vault is anchored."""
        return self._newest.anchorage

    @property
    def anchored(self) -> Anchored:
        """What the chip is to know of the current root."""
        return Anchored(sequence=self.sequence, digest=self._digest)

    @property
    def key_generation(self) -> int:
        """How often this vault got a key."""
        return self._newest.key_generation

    @property
    def capacity(self) -> int:
        """How many records the image can hold, when all places are used."""
        most = self._page_count - ROOT_PAGES
        leaves = most
        while sum(sizes := level_sizes(leaves)) + len(sizes) > most:
            leaves -= 1
        return leaves * RECORDS_PER_LEAF

    def __len__(self) -> int:
        return len(self._positions)

    def __contains__(self, uuid: UUID) -> bool:
        return uuid.bytes in self._positions

    def __iter__(self) -> Iterator[UUID]:
        return (UUID(bytes=uuid) for uuid in self._positions)

    def load(self, uuid: UUID) -> Record | None:
        """Give the record of a vTPM, or None when there is none.

        Raises:
            Damaged: Its page is not what was written.
            NotReadable: The disk fails.
            NotStored: The vault must be opened again first.
        """
        self._require_working()
        position = self._positions.get(uuid.bytes)
        if position is None:
            return None
        leaf, place = divmod(position, RECORDS_PER_LEAF)
        record = record_at(self._read_leaf(leaf), place)
        assert record.uuid == uuid.bytes
        return record

    def save(self, record: Record) -> None:
        """Store one record; on return it survives a power cut.

        Raises:
            Full: No room; nothing changed, and records that are there can still be changed.
            NotStored: The disk failed; the vault must be opened again.
            Damaged, NotReadable: The leaf it belongs to cannot be read; nothing changed.
        """
        self.commit([record])

    def delete(self, uuid: UUID) -> None:
        """Take one record out; on return it is gone for good. Raises as `save`, not `Full`."""
        self.commit((), removed=[uuid])

    def commit(self, records: Iterable[Record], *, removed: Iterable[UUID] = ()) -> None:
        """Store and remove several records in one step: all of it or nothing.

        Raises:
            VaultError: See `save`. `Full` also when more changes at once than there are free pages.
        """
        self._require_working()
        change = Change(self._positions, self._vacant, len(self._levels[0]))
        for record in records:
            change.put(record)
        for uuid in removed:
            change.remove(uuid.bytes)
        if not change.by_position:
            return
        self._commit_change(change)

    def reseal(self, seals: tuple[SealedKey, ...]) -> None:
        """Replace the sealed forms of the vault key. The key itself stays.

        Raises:
            Full: They do not fit into the header; nothing changed.
            NotStored: The disk failed; the vault must be opened again.
        """
        self._require_working()
        self._commit_root(self._levels, seals=seals)

    def set_anchorage(self, anchorage: Anchorage) -> None:
        """Say where in the chip the vault is anchored; the chip is told when that is confirmed.

        Raises:
            NotStored: The disk or the chip failed; the vault must be opened again.
        """
        self._require_working()
        self._commit_root(self._levels, root=replace(self._newest, anchorages=(anchorage,)))

    # -- another key

    def rotate(self, vault_key: bytes, seals: tuple[SealedKey, ...], *, generation: int) -> None:
        """Bring in a new vault key, and write everything anew under it.

        A crash leaves a vault that opens with the old key or with the new one, as its seals say;
        `finish_rotation` then does the rest. Records can be loaded and saved in between.

        Args:
            vault_key: 32 random bytes that are sealed in `seals`.
            seals: Where the next manager finds the new key.
            generation: Its number, for people.

        Raises:
            VaultError: See `save`.
        """
        self.finish_rotation()
        keys, old = VaultKeys.derive(vault_key), self._sealer.keys
        self._next_keys = keys
        root = replace(self._newest, key_generation=generation, old_node_keys=(old.node_key,))
        self._commit_root(self._levels, seals=seals, root=root, keys=keys)
        self._next_keys = None
        self._old_pages = {reference.page for level in self._levels for reference in level}
        self.finish_rotation()

    def finish_rotation(self) -> None:
        """Write what is still under an old key under the current one, then forget the old one.

        Raises:
            VaultError: See `save`.
        """
        self._require_working()
        if not self._newest.old_node_keys:
            return
        # Each step takes as many leaves as there are free pages for, with all that is above them.
        step = max(1, len(self._free) // len(self._levels))
        while old := self._leaves_under_old_key():
            change = Change(self._positions, self._vacant, len(self._levels[0]))
            change.touched.update(old[:step])
            self._commit_change(change)
        self._commit_root(self._levels, root=replace(self._newest, old_node_keys=()))

    def _leaves_under_old_key(self) -> list[int]:
        return [n for n, leaf in enumerate(self._levels[0]) if leaf.page in self._old_pages]

    # -- saving

    def _commit_change(self, change: Change) -> None:
        levels, replaced, used = self._write_nodes(change)
        self._commit_root(levels)
        for _ in range(used):
            self._free.popleft()
        self._free.extend(replaced)
        self._old_pages.difference_update(replaced)
        self._levels = levels
        change.apply(self._positions, self._vacant)

    def _write_nodes(self, change: Change) -> tuple[list[list[Reference]], list[int], int]:
        """Write the changed leaves and all nodes above them to free pages.

        Returns:
            The levels as they will be; the pages that are free then; how many were taken.
        """
        sizes = level_sizes(change.leaf_count)
        dirty = self._dirty_nodes(change, sizes)
        needed = sum(map(len, dirty))
        growth = sum(sizes) - sum(map(len, self._levels))
        # Whoever is stored must stay changeable: one path of free pages is never given away.
        if needed > len(self._free) or (growth and len(self._free) - growth < len(sizes)):
            raise Full(
                self._disk.name,
                f"{len(self)} vTPMs are stored, and {len(self._free)} of its"
                f" {self._page_count} pages are free",
            )
        # Everything that can be refused is read before the first byte is written.
        leaves = {number: self._changed_leaf(change, number) for number in dirty[0]}
        levels = [list(level) for level in self._levels]
        levels += [[] for _ in range(len(sizes) - len(levels))]
        replaced: list[int] = []
        pages = iter(list(self._free))
        for level, numbers in enumerate(dirty):
            for number in sorted(numbers):
                body = leaves[number] if level == 0 else self._interior(levels[level - 1], number)
                reference = self._write_node(next(pages), NodePlace(level, number), body)
                if number < len(levels[level]):
                    replaced.append(levels[level][number].page)
                    levels[level][number] = reference
                else:
                    levels[level].append(reference)
        if not self._is_anchored:
            self._sync()
        return levels, replaced, needed

    def _dirty_nodes(self, change: Change, sizes: list[int]) -> list[set[int]]:
        dirty: list[set[int]] = []
        touched = change.leaves()
        for level, size in enumerate(sizes):
            present = len(self._levels[level]) if level < len(self._levels) else 0
            dirty.append(touched | set(range(present, size)))
            touched = {number // FANOUT for number in dirty[-1]}
        return dirty

    def _changed_leaf(self, change: Change, number: int) -> bytes:
        is_present = number < len(self._levels[0])
        body = self._read_leaf(number) if is_present else bytes(BODY_BYTES)
        for place, record in change.in_leaf(number):
            body = with_record(body, place, record)
        return body

    @staticmethod
    def _interior(below: list[Reference], number: int) -> bytes:
        return pack_references(below[number * FANOUT : (number + 1) * FANOUT])

    def _write_node(self, page: int, place: NodePlace, body: bytes) -> Reference:
        nonce = self._random_bytes(NONCE_BYTES)
        stored = self._sealer.close_node(page, place, body, sequence=self.sequence + 1, nonce=nonce)
        self._write(page, stored)
        return Reference(page=page, digest=hashlib.sha256(stored).digest())

    def _commit_root(
        self,
        levels: list[list[Reference]],
        *,
        seals: tuple[SealedKey, ...] | None = None,
        root: Root | None = None,
        keys: VaultKeys | None = None,
    ) -> None:
        """Write the next root, sync, and tell the chip; then it is the current one.

        Args:
            levels: The nodes it holds.
            seals: Its seals, if others than now.
            root: Its other contents, if others than now.
            keys: What it is written under, if anything else than now.
        """
        keys = keys or self._sealer.keys
        root = root or self._newest
        header = RootHeader(
            sequence=self._header.sequence + 1,
            vault_id=self._header.vault_id,
            page_count=self._page_count,
            key_check=keys.key_check,
            seals=self._header.seals if seals is None else seals,
        )
        tree = Tree(
            kind=NodeKind.RECORDS,
            levels=len(levels),
            leaf_count=len(levels[0]),
            children=tuple(levels[-1]),
        )
        root = replace(root, sequence=header.sequence, previous=self._digest, trees=(tree,))
        sealer = replace(self._sealer, keys=keys, old_node_keys=root.old_node_keys)
        page = sealer.close_root(header, root, nonce=self._random_bytes(NONCE_BYTES))
        for number in root_pages(header.sequence):
            self._write(number, page)
        self._sync()
        anchored = Anchored(sequence=header.sequence, digest=hashlib.sha256(page).digest())
        self._tell_anchor(root, anchored)
        self._header, self._newest, self._digest = header, root, anchored.digest
        self._sealer = sealer

    @property
    def _is_anchored(self) -> bool:
        """Whether the chip names the current root, and will name the next."""
        anchorage = self._newest.anchorage
        return self._anchor is not None and anchorage is not None and anchorage.is_confirmed

    def _tell_anchor(self, root: Root, anchored: Anchored) -> None:
        if self._anchor is None or root.anchorage is None or not root.anchorage.is_confirmed:
            return
        try:
            self._anchor.write(root.anchorage, anchored)
        except Failure as failure:
            why = f"the hardware TPM was not told of root {anchored.sequence}: {failure.why}"
            raise self._poison(why) from failure

    # -- opening

    def _load(self, found: Inspection, minimum_sequence: int) -> None:
        header, name = self._header, self._disk.name
        if self._sealer.keys.key_check != header.key_check:
            raise WrongKey(name)
        root = self._take_root(header, found.root_page)
        # Only now is the sequence number proven.
        if header.sequence < minimum_sequence:
            raise RolledBack(name, header.sequence, minimum_sequence)
        is_one_ahead = self._compare_with_anchor(root)
        try:
            self._load_tree(root)
        except Damaged:
            # It may lack nodes, when it was not completely written. Then nobody was told of it.
            if not (is_one_ahead and self._is_anchored):
                raise
            self._go_back(root)
            return
        self._heal(found)
        if is_one_ahead:
            self._tell_anchor(root, self.anchored)

    def _take_root(self, header: RootHeader, page: bytes) -> Root:
        root = self._sealer.open_root(page, header.sequence)
        self._header, self._newest, self._digest = header, root, hashlib.sha256(page).digest()
        self._sealer = replace(self._sealer, old_node_keys=root.old_node_keys)
        return root

    def _go_back(self, unfinished: Root) -> None:
        """Open the root that the chip names, which an unfinished one would have followed.

        Raises:
            Damaged: It does not verify.
            NotStored: The disk fails.
        """
        found, header = self._find_root(unfinished.sequence - 1, unfinished.previous)
        self._positions, self._vacant, self._old_pages = {}, [], set()
        self._load_tree(self._take_root(header, found.root_page))
        # The next root has the number of the unfinished one. They must not stand side by side, as
        # they would if the power failed while one took the other's place.
        for number in root_pages(unfinished.sequence):
            self._write(number, bytes(PAGE_BYTES))
        self._sync()
        self._heal(found)

    def _find_root(self, sequence: int, digest: bytes) -> tuple[Inspection, RootHeader]:
        copies = {number: _read(self._disk, number) for number in root_pages(sequence)}
        for number, page in copies.items():
            if hashlib.sha256(page).digest() == digest:
                header = examine_root(self._disk.name, number, page)
                assert isinstance(header, RootHeader)
                bad = tuple(n for n, copy in copies.items() if copy != page)
                return Inspection(header=header, root_page=page, bad_copies=bad), header
        raise Damaged(self._disk.name, f"root {sequence}, which the chip names, is not there")

    def _compare_with_anchor(self, root: Root) -> bool:
        if root.anchorage is None:
            return False
        if self._anchor is None:
            raise NotAnchored(self._disk.name, "the chip was not asked")
        anchored = self._anchor.read(root.anchorage)
        return is_one_ahead(self._disk.name, root, self._digest, anchored)

    def _load_tree(self, root: Root) -> None:
        name = self._disk.name
        if len(root.trees) != 1 or root.trees[0].kind != NodeKind.RECORDS:
            raise Damaged(name, "its root has trees that this version does not know")
        tree = root.trees[0]
        if tree.leaf_count > self._page_count:
            raise Damaged(name, "its root has more leaves than the image has pages")
        sizes = level_sizes(tree.leaf_count)
        if tree.levels != len(sizes) or len(tree.children) != min(sizes[-1], ROOT_CHILDREN_MAX):
            raise Damaged(name, "its root has the wrong number of children")
        taken: set[int] = set()
        levels = [list(tree.children)]
        for level in range(len(sizes) - 1, 0, -1):
            below: list[Reference] = []
            for number, reference in enumerate(levels[0]):
                body = self._read_checked(reference, NodePlace(level, number), taken)
                count = min(FANOUT, sizes[level - 1] - number * FANOUT)
                below += unpack_references(name, body, count)
            levels.insert(0, below)
        self._levels = levels
        for leaf, reference in enumerate(levels[0]):
            body = self._read_checked(reference, NodePlace(0, leaf), taken)
            self._index_leaf(leaf, body)
        self._vacant.reverse()
        self._free = deque(n for n in range(ROOT_PAGES, self._page_count) if n not in taken)

    def _read_checked(self, reference: Reference, place: NodePlace, taken: set[int]) -> bytes:
        if not ROOT_PAGES <= reference.page < self._page_count or reference.page in taken:
            raise Damaged(self._disk.name, f"page {reference.page} cannot be a node, or is two")
        taken.add(reference.page)
        stored = _read(self._disk, reference.page)
        body = self._sealer.open_node(reference, place, stored)
        if self._sealer.is_under_old_key(reference.page, stored):
            self._old_pages.add(reference.page)
        return body

    def _index_leaf(self, leaf: int, body: bytes) -> None:
        for position, uuid in enumerate(uuids_of(body), leaf * RECORDS_PER_LEAF):
            if uuid == NIL_UUID:
                self._vacant.append(position)
            elif self._positions.setdefault(uuid, position) != position:
                raise Damaged(self._disk.name, f"there are two records for {UUID(bytes=uuid)}")

    def _heal(self, found: Inspection) -> None:
        """Restore the second copy of the root, then finish a creation that was cut off."""
        for number in found.bad_copies:
            self._write(number, found.root_page)
        if found.bad_copies:
            self._sync()
        if self.sequence == 1:
            self._commit_root(self._levels)

    # -- the disk

    def _read_leaf(self, number: int) -> bytes:
        reference = self._levels[0][number]
        return self._sealer.open_node(
            reference, NodePlace(0, number), _read(self._disk, reference.page)
        )

    def _write(self, page: int, content: bytes) -> None:
        try:
            self._disk.write(page * PAGE_BYTES, content)
        except OSError as error:
            raise self._poison(_reason(error)) from error

    def _sync(self) -> None:
        try:
            self._disk.sync()
        except OSError as error:
            raise self._poison(_reason(error)) from error

    def _poison(self, why: str) -> NotStored:
        self._failure = NotStored(self._disk.name, why)
        return self._failure

    def _require_working(self) -> None:
        if self._failure is not None:
            raise NotStored(self._disk.name, f"{self._failure.why}, and it was not opened since")


def _read(disk: Disk, page: int) -> bytes:
    try:
        return disk.read(page * PAGE_BYTES, PAGE_BYTES)
    except OSError as error:
        raise NotReadable(disk.name, _reason(error)) from error


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()
