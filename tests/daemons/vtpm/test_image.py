"""A vTPM's image: the manager's record decides, and nothing is made anew in place of damage."""

from uuid import UUID

import pytest

from daemons.errors import ExitCode, Failure
from daemons.vtpm.image import FIRST_MAGIC, HEADER_BYTES, MAGIC, VtpmImage
from tests.fakes.faulty_disk import FaultyDisk, PowerLoss
from tpm12.state import Permanent

BYTES = 1 << 17
HALF = BYTES // 2
OURS = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
OTHER = UUID("6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f")


class Manager:
    """Keeps one record; may refuse, or keep it and lose the answer."""

    def __init__(self, record=None):
        self.record = record
        self.saves = 0
        self.refuses = False
        self.loses_answer = False

    def load_hash_key(self):
        return self.record

    def save_hash_key(self, hash_key):
        self.saves += 1
        if self.refuses:
            raise Failure("no", why="told to", next_step="none")
        self.record = hash_key
        if self.loses_answer:
            raise Failure("lost", why="told to", next_step="none")


def permanent(number):
    return Permanent(no_owner_nv_write=number)


def made(*numbers):
    disk, manager = FaultyDisk(bytes(BYTES)), Manager()
    image = VtpmImage(disk, OURS, manager)
    assert image.load() is None
    for number in numbers:
        image.save(permanent(number))
    return disk, manager


def reopened(contents, manager, uuid=OURS):
    return VtpmImage(FaultyDisk(bytes(contents)), uuid, manager)


def test_a_blank_image_and_an_unknown_uuid_are_a_new_vtpm():
    assert VtpmImage(FaultyDisk(bytes(BYTES)), OURS, Manager()).load() is None


def test_the_committed_state_comes_back():
    for count in range(1, 5):
        disk, manager = made(*range(count))
        assert reopened(disk.durable, manager).load() == permanent(count - 1)


def test_the_first_save_is_followed_by_a_second_at_once():
    disk, manager = made(1)
    assert manager.saves == 2
    assert disk.durable[: len(MAGIC)] == FIRST_MAGIC
    assert disk.durable[HALF : HALF + len(MAGIC)] == MAGIC


def test_every_save_has_a_fresh_key_and_nothing_readable():
    disk, manager = made(1)
    first_key = manager.record[32:]
    image = reopened(disk.durable, manager)
    image.load()
    image.save(permanent(1))
    assert manager.record[32:] != first_key


def test_a_first_save_that_never_reached_the_manager_is_begun_again():
    disk, manager = FaultyDisk(bytes(BYTES)), Manager()
    manager.refuses = True
    image = VtpmImage(disk, OURS, manager)
    image.load()
    with pytest.raises(Failure):
        image.save(permanent(1))
    fresh = Manager()
    again = reopened(disk.durable, fresh)
    assert again.load() is None
    again.save(permanent(2))
    assert fresh.record is not None


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_image_whose_record_is_gone_is_refused(number):
    disk, _ = made(*range(number))
    with pytest.raises(Failure, match="never stored") as caught:
        reopened(disk.durable, Manager()).load()
    assert caught.value.exit_code is ExitCode.DAMAGED


def test_a_blank_image_of_a_known_uuid_is_refused():
    _, manager = made(1)
    with pytest.raises(Failure, match="blank"):
        reopened(bytes(BYTES), manager).load()


def test_an_older_copy_is_refused():
    disk, manager = made(1, 2)
    older = bytes(disk.durable)
    image = VtpmImage(disk, OURS, manager)
    image.load()
    image.save(permanent(3))
    assert reopened(disk.durable, manager).load() == permanent(3)
    with pytest.raises(Failure, match="not the one") as caught:
        reopened(older, manager).load()
    assert caught.value.exit_code is ExitCode.DAMAGED


def test_another_vtpms_image_is_refused():
    disk, manager = made(1, 2)
    with pytest.raises(Failure, match="does not open it"):
        reopened(disk.durable, manager, OTHER).load()


def test_a_refused_commit_fails_the_save_and_keeps_the_committed_slot():
    disk, manager = made(1, 2)
    image = VtpmImage(disk, OURS, manager)
    image.load()
    manager.refuses = True
    for number in (3, 4):
        with pytest.raises(Failure):
            image.save(permanent(number))
        assert reopened(disk.durable, manager).load() == permanent(2)
    manager.refuses = False
    image.save(permanent(5))
    assert reopened(disk.durable, manager).load() == permanent(5)


def test_after_a_commit_of_unknown_fate_the_manager_is_asked():
    disk, manager = made(1, 2)
    image = VtpmImage(disk, OURS, manager)
    image.load()
    manager.loses_answer = True
    with pytest.raises(Failure):
        image.save(permanent(3))
    manager.loses_answer = False
    manager.refuses = True
    with pytest.raises(Failure):
        image.save(permanent(4))
    # The manager holds 3; a save that had trusted the flip not to have happened would have
    # overwritten it.
    assert reopened(disk.durable, manager).load() == permanent(3)


@pytest.mark.parametrize("step", [0, 1])
def test_power_loss_in_a_save_leaves_the_committed_state(step):
    before, manager = made(1, 2)
    disk = FaultyDisk(bytes(before.durable), lose_power_at=step)
    image = VtpmImage(disk, OURS, manager)
    image.load()
    with pytest.raises(PowerLoss):
        image.save(permanent(3))
    for left in disk.disks_after_power_loss():
        assert reopened(left, manager).load() == permanent(2)


def test_an_acknowledged_save_survives_power_loss():
    disk, manager = made(1, 2, 3)
    for left in disk.disks_after_power_loss():
        assert reopened(left, manager).load() == permanent(3)


def test_the_harness_notices_a_missing_sync():
    before, manager = made(1, 2)
    disk = FaultyDisk(bytes(before.durable), ignored_syncs=lambda _number: True)
    image = VtpmImage(disk, OURS, manager)
    image.load()
    image.save(permanent(3))
    lost = 0
    for left in disk.disks_after_power_loss():
        try:
            assert reopened(left, manager).load() == permanent(3)
        except Failure:
            lost += 1
    assert lost


def test_every_flipped_byte_of_the_committed_slot_is_refused():
    disk, manager = made(1)
    content = bytes(disk.durable)
    for at in range(HALF, HALF + HEADER_BYTES + 120):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        with pytest.raises(Failure) as caught:
            reopened(damaged, manager).load()
        assert caught.value.exit_code is ExitCode.DAMAGED


def test_a_record_of_another_implementation_is_refused():
    disk, _ = made(1)
    with pytest.raises(Failure, match="52 bytes"):
        reopened(disk.durable, Manager(bytes(52))).load()


def test_an_image_that_is_too_small_fails_the_save():
    image = VtpmImage(FaultyDisk(bytes(64)), OURS, Manager())
    image.load()
    with pytest.raises(Failure, match="a slot has 0"):
        image.save(permanent(1))
