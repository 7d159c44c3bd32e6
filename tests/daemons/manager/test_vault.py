"""The vault: what was acknowledged survives, what cannot be verified is refused."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from daemons.errors import ExitCode
from daemons.manager import vault as vault_module
from daemons.manager import vault_format
from daemons.manager.vault import Vault, inspect
from daemons.manager.vault_format import (
    PAGE_BYTES,
    RECORDS_PER_LEAF,
    Damaged,
    Full,
    NotReadable,
    NotStored,
    RolledBack,
    Root,
    RootHeader,
    UnknownFormat,
    VaultError,
    WrongKey,
    level_sizes,
)
from tests.daemons.manager.vault_bench import (
    KEY,
    SEALS,
    SEED,
    SMALL,
    USUAL,
    contents_of,
    create,
    open_disk,
    record_of,
    reopen,
    uuid_of,
    vault_with,
)
from tests.fakes.faulty_disk import FaultyDisk

# -- the main path ---------------------------------------------------------------------------------


def test_saved_records_come_back_after_reopening():
    disk = FaultyDisk(USUAL)
    vault = create(disk)
    for number in range(200):
        vault.save(record_of(number))
    vault.save(record_of(7, generation=1))
    again, _ = reopen(disk.durable)
    assert len(again) == 200
    assert again.load(uuid_of(7)) == record_of(7, generation=1)
    assert again.load(uuid_of(199)) == record_of(199)
    assert again.load(uuid_of(200)) is None
    assert uuid_of(3) in again
    assert uuid_of(200) not in again
    assert again.header.seals == SEALS
    assert again.sequence == vault.sequence == 203


def test_reopened_vault_goes_on_where_it_was():
    disk = vault_with(100)
    vault = open_disk(disk)
    vault.save(record_of(5, generation=2))
    vault.save(record_of(100))
    again, _ = reopen(disk.durable)
    assert len(again) == 101
    assert again.load(uuid_of(5)) == record_of(5, generation=2)


def test_fields_for_groups_are_kept():
    disk = FaultyDisk(SMALL)
    vault = create(disk)
    vault.save(replace(record_of(1), flags=1, group=513))
    again, _ = reopen(disk.durable)
    assert again.load(uuid_of(1)) == replace(record_of(1), flags=1, group=513)


def test_deleted_record_is_gone_and_its_place_is_used_again():
    disk = vault_with(RECORDS_PER_LEAF)
    vault = open_disk(disk)
    vault.delete(uuid_of(9))
    vault.delete(uuid_of(4711))
    assert vault.load(uuid_of(9)) is None
    vault.save(record_of(1000))
    assert len(vault._levels[0]) == 1
    again, _ = reopen(disk.durable)
    assert uuid_of(9) not in again
    assert again.load(uuid_of(1000)) == record_of(1000)
    assert len(again) == RECORDS_PER_LEAF


def test_several_changes_in_one_commit():
    disk = vault_with(60)
    vault = open_disk(disk)
    before = vault.sequence
    vault.commit(
        [record_of(1, 9), record_of(59, 9), record_of(60), record_of(60, 1)], removed=[uuid_of(2)]
    )
    assert vault.sequence == before + 1
    again, _ = reopen(disk.durable)
    assert again.load(uuid_of(1)) == record_of(1, 9)
    assert again.load(uuid_of(60)) == record_of(60, 1)
    assert uuid_of(2) not in again
    assert contents_of(again) == contents_of(vault)


def test_empty_commit_writes_nothing():
    disk = vault_with(1)
    vault = open_disk(disk)
    before = disk.operations
    vault.commit([])
    assert disk.operations == before


def test_reseal_keeps_records_and_key():
    disk = vault_with(10)
    vault = open_disk(disk)
    other = (*SEALS, replace(SEALS[0], name=b"another kernel", pcr_values=()))
    vault.reseal(other)
    again, _ = reopen(disk.durable)
    assert again.header.seals == other
    assert len(again) == 10


def test_random_operations_match_a_dictionary():
    source = random.Random(SEED)
    disk = FaultyDisk(bytes(40 * PAGE_BYTES))
    vault, model = create(disk), {}
    for step in range(600):
        number = source.randrange(300)
        if source.random() < 0.25:
            vault.delete(uuid_of(number))
            model.pop(uuid_of(number), None)
        else:
            vault.save(record_of(number, step))
            model[uuid_of(number)] = record_of(number, step).hash_key
        if step % 50 == 0:
            vault = open_disk(disk)
    assert contents_of(vault) == model
    assert contents_of(reopen(disk.durable)[0]) == model


# -- what nobody may see ---------------------------------------------------------------------------


def test_image_shows_no_record_and_no_key():
    disk = vault_with(60)
    assert KEY not in disk.durable
    for number in range(60):
        assert uuid_of(number).bytes not in disk.durable
        assert record_of(number).hash_key[:40] not in disk.durable


def test_same_record_is_never_encrypted_the_same_way():
    disk = FaultyDisk(USUAL)
    vault = create(disk)
    pages: list[bytes] = []
    for _ in range(20):
        vault.save(record_of(1))
        pages += [bytes(data) for offset, data in written(disk, vault) if offset >= 4 * PAGE_BYTES]
    nonces = {page[:12] for page in pages}
    assert len(nonces) == len(pages)


def written(disk: FaultyDisk, vault: Vault) -> list[tuple[int, bytes]]:
    references = [reference for level in vault._levels for reference in level]
    return [
        (r.page * PAGE_BYTES, disk.durable[r.page * PAGE_BYTES : (r.page + 1) * PAGE_BYTES])
        for r in references
    ]


def test_secrets_are_not_in_reprs():
    assert "77" not in repr(record_of(1))
    vault = create(FaultyDisk(SMALL))
    assert "AESGCM" not in repr(vault._sealer)


# -- cost and capacity -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 1_000, 20_000])
def test_cost_of_a_save_does_not_depend_on_the_number_of_vtpms(count: int):
    disk = full_of(count)
    vault = open_disk(disk)
    for number in (0, count // 2, count - 1):
        writes, syncs, reads = disk.writes, disk.syncs, disk.reads
        vault.save(record_of(number, 1))
        assert (disk.writes - writes, disk.syncs - syncs, disk.reads - reads) == (4, 2, 1)


def full_of(count: int) -> FaultyDisk:
    """A 2 MiB image with many records, in commits as large as its free pages allow."""
    disk = FaultyDisk(USUAL)
    vault = create(disk)
    number = 0
    while number < count:
        batch = min(100 * RECORDS_PER_LEAF, count - number, vault.capacity - number)
        try:
            vault.commit(record_of(n) for n in range(number, number + batch))
        except Full:
            for n in range(number, number + batch):
                vault.save(record_of(n))
        number += batch
    return disk


def test_two_mebibytes_hold_more_than_20000_and_stay_changeable_when_full():
    disk = full_of(24_048)
    vault = open_disk(disk)
    assert vault.capacity == len(vault) == 24_048
    with pytest.raises(Full) as refused:
        vault.save(record_of(24_048))
    assert "24048 vTPMs" in refused.value.why
    for number in range(0, 24_048, 1000):
        vault.save(record_of(number, 1))
    vault.delete(uuid_of(17))
    vault.save(record_of(24_048))
    again, _ = reopen(disk.durable)
    assert len(again) == 24_048
    assert again.load(uuid_of(23_000)) == record_of(23_000, 1)


def test_larger_image_holds_more():
    disk = vault_with(40)
    disk.visible += bytes(8 * PAGE_BYTES)
    disk.durable += bytes(8 * PAGE_BYTES)
    vault = open_disk(disk)
    assert vault.capacity > 8 * RECORDS_PER_LEAF
    for number in range(400):
        vault.save(record_of(number))
    assert vault.header.page_count == 24
    assert len(reopen(disk.durable)[0]) == 400


@pytest.mark.parametrize(
    ("leaves", "sizes"),
    [
        (0, [0, 0]),
        (1, [1, 1]),
        (112, [112, 1]),
        (113, [113, 2]),
        (32 * 112, [3584, 32]),
        (32 * 112 + 1, [3585, 33, 1]),
        (1 << 24, [1 << 24, 149797, 1338, 12]),
    ],
)
def test_levels_come_where_the_root_runs_out_of_children(leaves: int, sizes: list[int]):
    assert level_sizes(leaves) == sizes


def test_tree_that_grows_a_level_keeps_everything(monkeypatch):
    # A root with two children instead of 32, and nodes with three: four levels in a small image.
    for module in (vault_module, vault_format):
        monkeypatch.setattr(module, "FANOUT", 3)
        monkeypatch.setattr(module, "ROOT_CHILDREN_MAX", 2)
    disk = FaultyDisk(bytes(64 * PAGE_BYTES))
    vault = create(disk)
    heights = set()
    for number in range(25 * RECORDS_PER_LEAF):
        vault.save(record_of(number))
        heights.add(len(vault._levels))
    assert heights == {2, 3, 4}
    again, _ = reopen(disk.durable)
    assert contents_of(again) == contents_of(vault)
    again.save(record_of(3, 1))


# -- failing disks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", range(6))
def test_failed_write_or_sync_poisons_the_vault_until_reopened(operation: int):
    disk = vault_with(3)
    vault = open_disk(disk)
    start = disk.operations
    disk.fail_at = frozenset({start + operation})
    with pytest.raises(NotStored):
        vault.save(record_of(1, 1))
    assert vault.failure is not None
    used = disk.operations
    for attempt in (
        lambda: vault.save(record_of(2, 1)),
        lambda: vault.load(uuid_of(1)),
        lambda: vault.reseal(SEALS),
    ):
        with pytest.raises(NotStored, match="not opened since"):
            attempt()
    assert disk.operations == used, "a poisoned vault touched the disk"
    for left in disk.disks_after_power_loss():
        again, _ = reopen(left)
        assert again.load(uuid_of(1)) in (record_of(1), record_of(1, 1))
        assert again.load(uuid_of(0)) == record_of(0)
    again = vault.reopened(disk)
    again.save(record_of(1, 2))
    assert reopen(disk.durable)[0].load(uuid_of(1)) == record_of(1, 2)


def test_reopening_takes_nothing_older_and_no_other_vault():
    disk = vault_with(3)
    old = bytes(disk.durable)
    vault = open_disk(disk)
    vault.save(record_of(1, 1))
    with pytest.raises(RolledBack):
        vault.reopened(FaultyDisk(old))
    other = FaultyDisk(SMALL)
    Vault.create(
        other, KEY, vault_id=b"\x22" * 16, seals=(), random_bytes=random.Random(1).randbytes
    )
    with pytest.raises(Damaged, match="another vault"):
        vault.reopened(other)


def test_failed_sync_at_opening_is_a_failure():
    disk = vault_with(3)
    disk.fail_at = frozenset({disk.operations})
    with pytest.raises(NotStored):
        open_disk(disk)


def test_unreadable_leaf_fails_the_command_and_changes_nothing():
    disk = vault_with(3)
    vault = open_disk(disk)
    page = vault._levels[0][0].page
    before = disk.operations

    def read(*_place: int) -> bytes:
        raise OSError(5, "Input/output error")

    disk.read = read
    with pytest.raises(NotReadable):
        vault.save(record_of(1, 1))
    with pytest.raises(NotReadable):
        vault.load(uuid_of(1))
    del disk.read
    assert disk.operations == before
    disk.visible[page * PAGE_BYTES + 100] ^= 1
    with pytest.raises(Damaged):
        vault.save(record_of(1, 1))
    assert disk.operations == before
    disk.visible[page * PAGE_BYTES + 100] ^= 1
    vault.save(record_of(1, 1))


def test_full_vault_changes_nothing():
    disk = FaultyDisk(SMALL)
    vault = create(disk)
    with pytest.raises(Full):
        vault.commit(record_of(n) for n in range(10_000))
    assert len(vault) == 0
    for number in range(vault.capacity):
        vault.save(record_of(number))
    assert len(vault) == 9 * RECORDS_PER_LEAF
    before = bytes(disk.durable)
    with pytest.raises(Full):
        vault.save(record_of(vault.capacity))
    assert bytes(disk.durable) == before
    vault.save(record_of(0, 1))


# -- damage ----------------------------------------------------------------------------------------


def test_every_flipped_byte_is_refused_or_harmless():
    disk = vault_with(60)
    vault = open_disk(disk)
    vault.save(record_of(1, 1))
    vault.save(record_of(2, 1))
    model = contents_of(vault)
    image = bytes(disk.durable)
    live = {reference.page for level in vault._levels for reference in level}
    source = random.Random(SEED)
    refused = 0
    for page in range(len(image) // PAGE_BYTES):
        for offset in [0, 11, 12, 15, 16, 17, 18, 25, *source.sample(range(PAGE_BYTES), 60)]:
            flipped = bytearray(image)
            flipped[page * PAGE_BYTES + offset] ^= 1 << source.randrange(8)
            try:
                again, _ = reopen(flipped)
            except Damaged:
                assert page in live, f"harmless page {page} refused at {offset}"
                refused += 1
            else:
                assert page not in live, f"page {page} byte {offset} went unnoticed"
                assert contents_of(again) == model
                assert again.sequence == vault.sequence
    assert refused == 68 * len(live)


def test_opening_restores_the_second_copy_of_the_root():
    disk = vault_with(3)
    pages = [n * PAGE_BYTES + 2000 for n in range(4)]
    image = bytearray(disk.durable)
    sequence = open_disk(disk).sequence
    image[pages[sequence % 2]] ^= 1
    again, healed = reopen(image)
    assert bytes(healed.durable) == bytes(disk.durable)
    assert len(again) == 3


@pytest.mark.parametrize("cut", [0, 1, 4095, 4096, 4 * 4096, 15 * 4096 + 4095, 64 * 4096 - 1])
def test_truncated_image_is_refused(cut: int):
    disk = vault_with(60, bytes(64 * PAGE_BYTES))
    with pytest.raises(VaultError) as refused:
        reopen(disk.durable[:cut])
    assert refused.value.exit_code in (ExitCode.DAMAGED, ExitCode.CONFIGURATION)


def test_swapped_pages_are_refused():
    disk = vault_with(2 * RECORDS_PER_LEAF)
    vault = open_disk(disk)
    first, second = (reference.page for reference in vault._levels[0])
    image = bytearray(disk.durable)
    a, b = (slice(n * PAGE_BYTES, (n + 1) * PAGE_BYTES) for n in (first, second))
    image[a], image[b] = disk.durable[b], disk.durable[a]
    with pytest.raises(Damaged):
        reopen(image)


def test_older_page_is_refused():
    """The same leaf, once written to the same page under the same key: only its parent knows."""
    disk = vault_with(3)
    vault = open_disk(disk)
    earlier: dict[int, bytes] = {}
    for generation in range(100):
        vault.save(record_of(1, generation))
        page = vault._levels[0][0].page
        place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
        if page in earlier:
            break
        earlier[page] = bytes(disk.durable[place])
    image = bytearray(disk.durable)
    assert image[place] != earlier[page]
    image[place] = earlier[page]
    with pytest.raises(Damaged, match="damaged"):
        reopen(image)


def test_older_image_is_refused_as_rollback():
    disk = vault_with(3)
    old = bytes(disk.durable)
    vault = open_disk(disk)
    vault.save(record_of(1, 1))
    with pytest.raises(RolledBack) as refused:
        reopen(old, minimum_sequence=vault.sequence)
    assert refused.value.exit_code == ExitCode.DAMAGED
    assert reopen(disk.durable, minimum_sequence=vault.sequence)[0].sequence == vault.sequence


def test_both_copies_of_the_newest_root_lost_is_told_and_stopped_by_the_minimum():
    disk = vault_with(3)
    vault = open_disk(disk)
    image = bytearray(disk.durable)
    for page in (vault.sequence % 2, vault.sequence % 2 + 2):
        image[page * PAGE_BYTES + 3000] ^= 1
    assert inspect(FaultyDisk(bytes(image))).newer_was_torn
    with pytest.raises(RolledBack):
        reopen(image, minimum_sequence=vault.sequence)


def test_wrong_key_is_told_from_damage():
    disk = vault_with(3)
    with pytest.raises(WrongKey):
        Vault.open(disk, lambda _h: bytes(32), random_bytes=random.Random(1).randbytes)


def test_failure_to_unseal_is_passed_on_and_the_image_stays():
    disk = vault_with(3)
    before = bytes(disk.visible)

    def unseal(_header: RootHeader) -> bytes:
        raise ConnectionError

    with pytest.raises(ConnectionError):
        Vault.open(disk, unseal, random_bytes=random.Random(1).randbytes)
    assert bytes(disk.visible) == before


def test_other_version_is_named():
    disk = vault_with(3)
    image = bytearray(disk.durable)
    for page in range(4):
        start = page * PAGE_BYTES
        image[start + 16 : start + 18] = b"\x00\x03"
        refresh_checksum(image, page)
    with pytest.raises(UnknownFormat, match="format 3"):
        reopen(image)


@pytest.mark.parametrize(
    ("offset", "content"),
    [
        (0, b"X"),
        (18, b"\xff" * 8),
        (18 + 7, b"\x63"),
        (26, b"\x00" * 16),
        (62, b"\xff"),
        (64, b"\xff\xff"),
        (2500, b"\x01"),
        (2700, b"\x01"),
    ],
)
def test_whole_but_false_root_is_refused(offset: int, content: bytes):
    """Its checksum is right: no power cut does that, so the older root must not step in."""
    disk = vault_with(3)
    vault = open_disk(disk)
    image = bytearray(disk.durable)
    for page in (vault.sequence % 2, vault.sequence % 2 + 2):
        image[page * PAGE_BYTES + offset : page * PAGE_BYTES + offset + len(content)] = content
        refresh_checksum(image, page)
    with pytest.raises(Damaged):
        reopen(image)


def test_two_different_roots_with_one_number_are_refused():
    disk = vault_with(3)
    vault = open_disk(disk)
    image = bytearray(disk.durable)
    page = vault.sequence % 2
    image[page * PAGE_BYTES + 2600] ^= 1
    refresh_checksum(image, page)
    with pytest.raises(Damaged, match="two different roots"):
        reopen(image)


def refresh_checksum(image: bytearray, page: int) -> None:
    start, end = page * PAGE_BYTES, (page + 1) * PAGE_BYTES
    image[end - 32 : end] = hashlib.sha256(image[start : end - 32]).digest()


@pytest.mark.parametrize("place", [0, 4095, 4 * 4096, 16 * 4096 - 1])
def test_image_that_is_neither_blank_nor_ours_is_refused_and_left(place: int):
    image = bytearray(SMALL)
    image[place] = 1
    disk = FaultyDisk(bytes(image))
    with pytest.raises(Damaged):
        inspect(disk)
    with pytest.raises(Damaged):
        create(disk)
    assert bytes(disk.visible) == bytes(image)


def test_second_creation_is_refused():
    disk = vault_with(1)
    before = bytes(disk.visible)
    with pytest.raises(Damaged, match="has one already"):
        create(disk)
    assert bytes(disk.visible) == before


def test_blank_image_does_not_open():
    with pytest.raises(Damaged, match="blank"):
        reopen(SMALL)


def test_other_vaults_pages_are_refused():
    mine, other = vault_with(3), FaultyDisk(SMALL)
    source = random.Random(5)
    theirs = Vault.create(
        other, KEY, vault_id=b"\x22" * 16, seals=SEALS, random_bytes=source.randbytes
    )
    theirs.commit([record_of(n) for n in range(3)])
    image = bytearray(mine.durable)
    image[4 * PAGE_BYTES :] = other.durable[4 * PAGE_BYTES :]
    with pytest.raises(Damaged):
        reopen(image)


def test_seals_that_do_not_fit_change_nothing():
    disk = vault_with(3)
    vault = open_disk(disk)
    with pytest.raises(Full):
        vault.reseal(SEALS * 9)
    vault.save(record_of(1, 1))
    assert reopen(disk.durable)[0].header.seals == SEALS


# -- what only a writer with the key could do ------------------------------------------------------


def forged(change: Callable[[Root, Vault], Root]) -> bytearray:
    """An image whose newest root was changed by somebody who has the vault key."""
    disk = vault_with(60)
    vault = open_disk(disk)
    page = vault.sequence % 2
    newest = bytes(disk.durable[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])
    root = change(vault._sealer.open_root(newest, vault.sequence), vault)
    image = bytearray(disk.durable)
    written = vault._sealer.close_root(vault.header, root, nonce=bytes(12))
    for number in (page, page + 2):
        image[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = written
    return image


def with_tree(**changes: object) -> Callable[[Root, Vault], Root]:
    return lambda root, _vault: replace(root, trees=(replace(root.trees[0], **changes),))


def with_page(number: int) -> Callable[[Root, Vault], Root]:
    def change(root: Root, _vault: Vault) -> Root:
        child = replace(root.trees[0].children[0], page=number)
        return replace(root, trees=(replace(root.trees[0], children=(child,)),))

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda root, _vault: replace(root, trees=()),
        lambda root, _vault: replace(root, trees=root.trees * 2),
        with_tree(kind=9),
        with_tree(leaf_count=0xFFFFFFFF),
        with_tree(leaf_count=17),
        with_tree(leaf_count=1),
        with_tree(leaf_count=3),
        with_tree(leaf_count=113),
        with_tree(levels=1),
        with_tree(levels=3),
        with_tree(children=()),
        with_page(0),
        with_page(3),
        with_page(16),
        with_page(0xFFFFFFFF),
    ],
)
def test_root_that_contradicts_the_image_is_refused(change: Callable[[Root, Vault], Root]):
    with pytest.raises(Damaged):
        reopen(forged(change))


def test_unchanged_root_of_the_same_writer_is_taken():
    assert len(reopen(forged(lambda root, _vault: root))[0]) == 60


def test_node_that_is_two_nodes_is_refused():
    disk = vault_with(60)
    vault = open_disk(disk)
    leaf = vault._levels[0][0]
    with pytest.raises(Damaged, match="damaged"):
        vault._read_checked(leaf, vault_format.NodePlace(0, 0), {leaf.page})


def test_two_records_of_one_vtpm_are_refused():
    vault = open_disk(vault_with(60))
    body = vault_format.with_record(bytes(vault_format.BODY_BYTES), 3, record_of(1))
    with pytest.raises(Damaged) as refused:
        vault._index_leaf(7, body)
    assert str(uuid_of(1)) in refused.value.why


def test_blank_image_that_cannot_be_read_is_not_taken_for_blank():
    disk = FaultyDisk(SMALL)
    genuine = disk.read

    def read(offset: int, length: int) -> bytes:
        if offset >= 4 * PAGE_BYTES:
            raise OSError(5, "Input/output error")
        return genuine(offset, length)

    disk.read = read
    with pytest.raises(NotReadable):
        inspect(disk)
