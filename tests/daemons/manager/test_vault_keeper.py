"""A failed save is one request's failure: the next one finds a vault again, or the reason."""

from __future__ import annotations

import random
from pathlib import Path
from uuid import UUID

import pytest

from daemons.disk import PosixDisk
from daemons.errors import ExitCode, Failure
from daemons.manager.vault import Vault
from daemons.manager.vault_format import Damaged, NotStored, Record
from daemons.manager.vault_keeper import VaultKeeper
from daemons.vtpmmgrd import reopen_vault

UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
OLD = Record(uuid=UUID_1.bytes, hash_key=b"\x01" * 64)
NEW = Record(uuid=UUID_1.bytes, hash_key=b"\x02" * 64)


class FailingDisk(PosixDisk):
    """A disk whose syncs can be made to fail."""

    is_failing = False

    def sync(self) -> None:
        if self.is_failing:
            raise OSError(5, "Input/output error")
        super().sync()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vtpmmgr.img"
    path.write_bytes(bytes(64 * 1024))
    path.chmod(0o600)
    return path


@pytest.fixture
def disk(image: Path) -> FailingDisk:
    return FailingDisk(image)


@pytest.fixture
def keeper(image: Path, disk: FailingDisk):
    vault = Vault.create(
        disk,
        bytes(32),
        vault_id=bytes(16),
        seals=(),
        random_bytes=random.Random(1).randbytes,
    )
    vault.save(OLD)
    keeper = VaultKeeper(vault, lambda failed: reopen_vault(image, failed))
    yield keeper
    keeper.close()


def test_next_request_after_a_failed_save_finds_old_or_new(keeper: VaultKeeper, disk: FailingDisk):
    disk.is_failing = True
    with pytest.raises(NotStored):
        keeper.save(NEW)
    assert keeper.load(UUID_1) in (OLD, NEW)
    keeper.save(NEW)
    assert keeper.load(UUID_1) == NEW
    assert list(keeper) == [UUID_1]
    assert UUID_1 in keeper
    assert len(keeper) == 1
    keeper.delete(UUID_1)
    assert UUID_1 not in keeper


def test_image_that_went_away_is_told_until_it_is_back(
    keeper: VaultKeeper, disk: FailingDisk, image: Path
):
    disk.is_failing = True
    with pytest.raises(NotStored):
        keeper.save(NEW)
    aside = image.with_name("aside")
    image.rename(aside)
    for _ in range(2):
        with pytest.raises(Failure) as missing:
            keeper.load(UUID_1)
        assert missing.value.exit_code == ExitCode.NO_INPUT
    aside.rename(image)
    assert keeper.load(UUID_1) in (OLD, NEW)


def test_blank_image_in_its_place_is_refused(keeper: VaultKeeper, disk: FailingDisk, image: Path):
    disk.is_failing = True
    with pytest.raises(NotStored):
        keeper.save(NEW)
    image.unlink()
    image.write_bytes(bytes(64 * 1024))
    image.chmod(0o600)
    with pytest.raises(Damaged, match="damaged"):
        keeper.load(UUID_1)
    assert not any(image.read_bytes())
