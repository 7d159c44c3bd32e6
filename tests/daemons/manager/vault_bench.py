"""Vaults on faulty disks, for tests."""

from __future__ import annotations

import random
from uuid import UUID

from daemons.manager.vault import Vault
from daemons.manager.vault_format import (
    PAGE_BYTES,
    RECORDS_PER_LEAF,
    Record,
    SealedKey,
)
from tests.fakes.faulty_disk import FaultyDisk

KEY = bytes(range(32))
VAULT_ID = b"\x11" * 16
SMALL = bytes(16 * PAGE_BYTES)
USUAL = bytes(2 << 20)
SEALS = (
    SealedKey(
        name=b"this platform",
        pcr_selection=b"\xff\x00\x0e",
        locality=4,
        digest_at_release=bytes(20),
        pcr_values=tuple(bytes([n]) * 20 for n in range(11)),
        stored_data=b"\x5a" * 322,
    ),
)
SEED = 20240607


def uuid_of(number: int) -> UUID:
    return UUID(int=0xAC0A5B9ECBE24C07B43B000000000000 + number)


def record_of(number: int, generation: int = 0) -> Record:
    key = generation.to_bytes(4, "big") + number.to_bytes(4, "big")
    return Record(uuid=uuid_of(number).bytes, hash_key=key.ljust(64, b"\x77"))


def create(disk: FaultyDisk, seed: int = SEED) -> Vault:
    source = random.Random(seed)
    return Vault.create(disk, KEY, vault_id=VAULT_ID, seals=SEALS, random_bytes=source.randbytes)


def reopen(contents: bytes | bytearray, **options: object) -> tuple[Vault, FaultyDisk]:
    disk = FaultyDisk(bytes(contents))
    return open_disk(disk, **options), disk


def open_disk(disk: FaultyDisk, **options: object) -> Vault:
    source = random.Random(SEED + 1)
    return Vault.open(disk, lambda _header: KEY, random_bytes=source.randbytes, **options)


def contents_of(vault: Vault) -> dict[UUID, bytes]:
    found = {}
    for uuid in vault:
        record = vault.load(uuid)
        assert record is not None
        found[uuid] = record.hash_key
    return found


def vault_with(count: int, image: bytes = SMALL) -> FaultyDisk:
    disk = FaultyDisk(image)
    vault = create(disk)
    for start in range(0, count, RECORDS_PER_LEAF):
        vault.commit(record_of(n) for n in range(start, min(count, start + RECORDS_PER_LEAF)))
    return disk
