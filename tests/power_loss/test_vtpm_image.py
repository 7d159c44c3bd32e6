"""A vTPM's image and its manager's, when the power fails for both, and when a disk does.

The manager is the real vault on its own disk of the same machine; in between lies only a call.
"""

from __future__ import annotations

import random
from uuid import UUID

import pytest

from daemons.errors import ExitCode, Failure
from daemons.manager.vault import Vault
from daemons.manager.vault_format import PAGE_BYTES, Record
from daemons.vtpm.image import VtpmImage
from tests.power_loss.machine import Machine, PowerLoss
from tests.power_loss.sweep import Sweep, Witness
from tpm12.state import Permanent

IMAGE, MANAGER = "vtpm.img", "vtpmmgr.img"
IMAGE_BYTES = 16 * 1024
OURS = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
OTHER = UUID("6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f")
KEY = bytes(range(32))


class DirectManager:
    """The vault as a vTPM sees it, without the ring in between."""

    def __init__(self, vault: Vault, machine: Machine) -> None:
        self._vault = vault
        self._machine = machine

    def load_hash_key(self) -> bytes | None:
        record = self._working().load(OURS)
        return None if record is None else record.hash_key

    def save_hash_key(self, hash_key: bytes) -> None:
        self._working().save(Record(uuid=OURS.bytes, hash_key=hash_key))

    def _working(self) -> Vault:
        # As `VaultKeeper` does it.
        if self._vault.failure is not None:
            self._vault = self._vault.reopened(self._machine[MANAGER].open_again())
        return self._vault


def permanent(number: int) -> Permanent:
    return Permanent(no_owner_nv_write=number, saved_state=bytes([number]) * 700)


def opened(machine: Machine, uuid: UUID = OURS) -> tuple[VtpmImage, int]:
    vault = Vault.open(
        machine[MANAGER].open_again(), lambda _header: KEY, random_bytes=random.Random(2).randbytes
    )
    image = VtpmImage(machine[IMAGE].open_again(), uuid, DirectManager(vault, machine))
    found = image.load()
    return image, 0 if found is None else found.no_owner_nv_write


def blank() -> dict[str, bytes]:
    machine = Machine({IMAGE: bytes(IMAGE_BYTES), MANAGER: bytes(16 * PAGE_BYTES)})
    Vault.create(
        machine[MANAGER], KEY, vault_id=bytes(16), seals=(), random_bytes=random.Random(1).randbytes
    )
    return machine.durable


class Saves:
    """Three saves of a vTPM that has been used."""

    initial = 2

    def prepare(self) -> dict[str, bytes]:
        machine = Machine(blank())
        image, _ = opened(machine)
        for number in (1, 2):
            image.save(permanent(number))
        return machine.durable

    def run(self, machine: Machine, witness: Witness) -> None:
        image, _ = opened(machine)
        for number in (3, 4, 5):
            witness.change(number, lambda number=number: image.save(permanent(number)))

    def look(self, machine: Machine) -> int:
        return opened(machine)[1]

    def go_on(self, machine: Machine) -> None:
        image, _ = opened(machine)
        image.save(permanent(99))
        assert opened(Machine(machine.durable))[1] == 99


class FirstSave(Saves):
    """The save that makes a vTPM: in a blank image, at a UUID that nobody knows."""

    initial = 0

    def prepare(self) -> dict[str, bytes]:
        return blank()

    def run(self, machine: Machine, witness: Witness) -> None:
        image, _ = opened(machine)
        # What a crash leaves between the two commits of a first save is the new TPM already.
        witness.change(1, lambda: image.save(permanent(1)))
        witness.change(2, lambda: image.save(permanent(2)))


BOTH = pytest.mark.parametrize("scenario", [Saves(), FirstSave()], ids=["saves", "first save"])


@BOTH
def test_every_crash_leaves_the_old_state_or_the_new(scenario):
    sweep = Sweep(scenario, budget=60, again_budget=2)
    assert list(sweep.power_losses()) == []
    assert sweep.points > 20
    assert sweep.disks_tried > 500


@BOTH
def test_every_failure_keeps_the_last_good_copy_also_from_the_next_save(scenario):
    sweep = Sweep(scenario, budget=3, again_budget=0)
    assert list(sweep.failures()) == []
    assert sweep.points > 60


def test_a_torn_first_save_of_another_vtpm_is_not_taken_over():
    machine = Machine(blank())
    image, _ = opened(machine)
    machine.plan.power_fails_at = machine.operations + 3
    with pytest.raises(PowerLoss):
        image.save(permanent(1))
    left = next(machine.after_power_loss(1))
    assert any(left[IMAGE])
    assert opened(Machine(left))[1] == 0
    with pytest.raises(Failure) as refused:
        opened(Machine(left), OTHER)
    assert refused.value.exit_code is ExitCode.DAMAGED


@pytest.mark.parametrize("begin", [0, 1000, IMAGE_BYTES // 2 - 512])
def test_an_image_with_anything_else_in_it_is_not_blank(begin):
    contents = blank()
    image = bytearray(contents[IMAGE])
    image[begin + 30] = 7
    with pytest.raises(Failure, match="not blank"):
        opened(Machine({**contents, IMAGE: bytes(image)}))


# -- controls --------------------------------------------------------------------------------------


def is_caught(scenario=None, **options: object) -> bool:
    sweep = Sweep(scenario or Saves(), budget=60, again_budget=0, **options)
    return next(sweep.power_losses(), None) is not None


def test_harness_finds_a_slot_without_its_sync():
    assert is_caught(ignores_sync=lambda disk, _number: disk == IMAGE)


def test_harness_finds_a_manager_without_its_syncs():
    assert is_caught(ignores_sync=lambda disk, number: disk == MANAGER and number > 0)


def test_harness_finds_a_write_into_the_committed_slot(monkeypatch):
    commit = VtpmImage._commit
    monkeypatch.setattr(
        VtpmImage, "_commit", lambda self, slot, *rest: commit(self, 1 - slot, *rest)
    )
    assert is_caught()


def test_harness_finds_a_record_before_its_slot(monkeypatch):
    write = VtpmImage._write

    def commit(self: VtpmImage, slot: int, state: Permanent, magic: bytes) -> None:
        content, record = self._encrypted(state, magic)
        self._hash_keys.save_hash_key(record)
        write(self, slot * self._slot_bytes, content)
        self._active = slot

    monkeypatch.setattr(VtpmImage, "_commit", commit)
    assert is_caught()


def test_harness_finds_a_flip_of_the_slot_when_the_save_failed(monkeypatch):
    """What Xen's vtpmblk.c does: the next save writes over the only slot that the record names."""
    commit = VtpmImage._commit

    def flipping(self: VtpmImage, slot: int, state: Permanent, magic: bytes) -> None:
        try:
            commit(self, slot, state, magic)
        except Failure:
            self._active, self._is_uncertain = slot, False
            raise

    monkeypatch.setattr(VtpmImage, "_commit", flipping)
    assert next(Sweep(Saves(), budget=3, again_budget=0).failures(), None) is not None


def test_harness_finds_a_first_save_without_its_claim(monkeypatch):
    write = VtpmImage._write

    def only_slots(self: VtpmImage, offset: int, content: bytes) -> None:
        if not offset % (IMAGE_BYTES // 2):
            write(self, offset, content)

    monkeypatch.setattr(VtpmImage, "_write", only_slots)
    assert is_caught(FirstSave())
