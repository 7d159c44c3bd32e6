"""Files that were written by this and by earlier versions open, and hold what they held."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from uuid import UUID

import pytest

from daemons import chip_memory
from daemons.chip_memory import ChipMemory
from daemons.manager import vault_format
from daemons.manager.anchoring import Anchored
from daemons.manager.vault import Vault
from daemons.manager.vault_format import Anchorage, NotAnchored, RootHeader, VaultKeys
from daemons.vtpm import image
from daemons.vtpm.image import VtpmImage
from tests.fakes.faulty_disk import FaultyDisk
from tests.vectors.state.make import (
    ANCHORAGE,
    HERE,
    NEXT_VAULT_KEY,
    NUMBERS,
    VAULT_KEY,
    VTPM,
    OneRecord,
    record,
)
from tpm12.state import Permanent
from tpm12.state_codec import encode_section

WELL_KNOWN = bytes(20)
EK_FINGERPRINT = "05e1b51b836ef67b"


def kept(name: str) -> FaultyDisk:
    return FaultyDisk(gzip.decompress((HERE / f"{name}.gz").read_bytes()))


def assert_owned(permanent: Permanent) -> None:
    """The TPM that all of these files hold."""
    assert permanent.owner_auth == WELL_KNOWN
    assert permanent.srk is not None
    assert permanent.endorsement_key is not None
    modulus = permanent.endorsement_key.public.pub_key
    assert hashlib.sha256(modulus).hexdigest()[:16] == EK_FINGERPRINT


class StoredAnchor:
    """The chip with what it was told last."""

    def __init__(self, anchored: Anchored | None) -> None:
        self.anchored = anchored

    def read(self, anchorage: Anchorage) -> Anchored | None:
        assert anchorage.secret == ANCHORAGE.secret
        return self.anchored

    def write(self, _anchorage: Anchorage, anchored: Anchored) -> None:
        self.anchored = anchored


def key_of(header: RootHeader) -> bytes:
    keys = (VAULT_KEY, NEXT_VAULT_KEY)
    return next(key for key in keys if VaultKeys.derive(key).key_check == header.key_check)


def opened(disk: FaultyDisk, anchor: StoredAnchor | None = None) -> Vault:
    return Vault.open(disk, key_of, random_bytes=random.Random(3).randbytes, anchor=anchor)


def newest_of(disk: FaultyDisk) -> Anchored:
    found = vault_format.examine_root("", 0, bytes(disk.visible[:4096]))
    other = vault_format.examine_root("", 1, bytes(disk.visible[4096:8192]))
    assert isinstance(found, RootHeader)
    assert isinstance(other, RootHeader)
    page = 0 if found.sequence > other.sequence else 1
    content = bytes(disk.visible[page * 4096 : (page + 1) * 4096])
    return Anchored(
        sequence=max(found.sequence, other.sequence), digest=hashlib.sha256(content).digest()
    )


def test_every_format_has_its_files():
    names = {path.name for path in HERE.glob("*.gz")}
    for version in chip_memory.FORMATS:
        assert f"chip-{version}.gz" in names
    for version in vault_format.FORMATS:
        assert f"vault-{version}.gz" in names
    assert f"vtpm-{image.FORMAT_VERSION}.gz" in names


@pytest.mark.parametrize("name", ["chip-1", "chip-2"])
def test_a_chip_memory_of_any_version_opens_and_goes_on(name):
    disk = kept(name)
    memory = ChipMemory(disk)
    permanent = memory.load()
    assert permanent is not None
    assert_owned(permanent)
    memory.save(permanent)
    again = ChipMemory(FaultyDisk(bytes(disk.durable)))
    assert encode_section(again.load()) == encode_section(permanent)


@pytest.mark.parametrize("name", ["vtpm-1", "vtpm-1-claimed"])
def test_a_vtpm_image_of_any_version_opens_and_goes_on(name):
    disk = kept(name)
    manager = OneRecord(bytes.fromhex(json.loads((HERE / f"{name}.json").read_text())["hash_key"]))
    store = VtpmImage(disk, VTPM, manager)
    permanent = store.load()
    assert permanent is not None
    assert_owned(permanent)
    store.save(permanent)
    again = VtpmImage(FaultyDisk(bytes(disk.durable)), VTPM, manager).load()
    assert encode_section(again) == encode_section(permanent)


@pytest.mark.parametrize("name", ["vault-1", "vault-2", "vault-2-anchored", "vault-2-half-rotated"])
def test_a_managers_image_of_any_version_opens_and_goes_on(name):
    disk = kept(name)
    anchor = StoredAnchor(newest_of(disk))
    vault = opened(disk, anchor)
    assert len(vault) == len(NUMBERS)
    for number in NUMBERS:
        expected = record(number)
        assert vault.load(UUID(bytes=expected.uuid)) == expected
    assert (vault.anchorage is not None) == (name not in {"vault-1", "vault-2"})
    assert bool(vault._newest.old_node_keys) == (name == "vault-2-half-rotated")
    vault.finish_rotation()
    vault.save(record(99))
    again = opened(FaultyDisk(bytes(disk.durable)), anchor)
    assert len(again) == len(NUMBERS) + 1
    assert again.header.version == vault_format.FORMAT_VERSION


def test_an_anchored_image_does_not_open_without_its_chip():
    with pytest.raises(NotAnchored):
        opened(kept("vault-2-anchored"), StoredAnchor(None))
    with pytest.raises(NotAnchored):
        opened(kept("vault-2-anchored"))
