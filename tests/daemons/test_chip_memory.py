"""The chip's memory: old or new after any crash, and never something new in place of damage."""

import errno

import pytest

from daemons.chip_memory import FILE_BYTES, HEADER_BYTES, SLOT_BYTES, ChipMemory, _packed
from daemons.errors import ExitCode, Failure
from tests.fakes.faulty_disk import FaultyDisk, PowerLoss
from tpm12.state import Permanent
from tpm12.state_codec import encode_section


def permanent(number):
    return Permanent(no_owner_nv_write=number)


def saved(*numbers):
    disk = FaultyDisk(bytes(FILE_BYTES))
    memory = ChipMemory(disk)
    assert memory.load() is None
    for number in numbers:
        memory.save(permanent(number))
    return disk


def test_a_blank_memory_is_a_new_chip():
    assert ChipMemory(FaultyDisk(bytes(FILE_BYTES))).load() is None


def test_the_newest_state_comes_back():
    for count in range(1, 5):
        disk = saved(*range(count))
        assert ChipMemory(FaultyDisk(bytes(disk.durable))).load() == permanent(count - 1)


@pytest.mark.parametrize("step", [0, 1])
def test_power_loss_in_a_save_leaves_the_old_state_or_the_new(step):
    disk = FaultyDisk(bytes(saved(1, 2).visible))
    memory = ChipMemory(disk)
    memory.load()
    disk.lose_power_at = disk.operations + step
    with pytest.raises(PowerLoss):
        memory.save(permanent(3))
    outcomes = set()
    for left in disk.disks_after_power_loss():
        found = ChipMemory(FaultyDisk(left)).load()
        assert found in (permanent(2), permanent(3))
        outcomes.add(found.no_owner_nv_write)
    assert outcomes == {2, 3}


def test_an_acknowledged_save_survives_power_loss():
    disk = FaultyDisk(bytes(saved(1).durable))
    memory = ChipMemory(disk)
    memory.load()
    memory.save(permanent(2))
    for left in disk.disks_after_power_loss():
        assert ChipMemory(FaultyDisk(left)).load() == permanent(2)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failed_save_is_a_failure_and_keeps_the_last_good_copy(failing):
    disk = FaultyDisk(bytes(saved(1).visible))
    memory = ChipMemory(disk)
    memory.load()
    disk.fail_at = frozenset({disk.operations + failing})
    with pytest.raises(Failure) as caught:
        memory.save(permanent(2))
    assert caught.value.exit_code is ExitCode.IO_ERROR
    memory.save(permanent(3))
    for left in disk.disks_after_power_loss():
        assert ChipMemory(FaultyDisk(left)).load() == permanent(3)


def test_a_marker_that_cannot_be_written_fails_no_save():
    disk = FaultyDisk(bytes(saved(1).visible))
    memory = ChipMemory(disk)
    memory.load()
    disk.fail_at = frozenset({disk.operations + 2})
    memory.save(permanent(2))
    assert ChipMemory(FaultyDisk(bytes(disk.durable))).load() == permanent(2)
    memory.save(permanent(3))
    assert ChipMemory(FaultyDisk(bytes(disk.visible))).load() == permanent(3)


def test_damage_of_both_slots_is_refused_and_left_as_it_is():
    contents = bytearray(saved(1, 2).durable)
    for slot in (0, 1):
        contents[slot * SLOT_BYTES + HEADER_BYTES + 5] ^= 1
    disk = FaultyDisk(bytes(contents))
    with pytest.raises(Failure, match="checksum") as caught:
        ChipMemory(disk).load()
    assert caught.value.exit_code is ExitCode.DAMAGED
    assert disk.visible == contents


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        (b"x" * FILE_BYTES, "no chip memory"),
        (bytes(100), "100 bytes"),
        (b"HWTPM-NV" + b"\0\x09" + bytes(FILE_BYTES - 10), "version 9"),
        (bytes(SLOT_BYTES + 5000) + b"\1" + bytes(SLOT_BYTES - 5001), "header is gone"),
        (bytes(SLOT_BYTES - 1) + b"\1" + bytes(SLOT_BYTES), "both slots are blank"),
    ],
)
def test_what_is_no_memory_is_refused_with_the_reason(contents, reason):
    with pytest.raises(Failure, match=reason):
        ChipMemory(FaultyDisk(contents)).load()


@pytest.mark.parametrize("number", [0, (1 << 64) - 1])
def test_state_with_a_number_that_nobody_comes_to_is_refused(number):
    """Its checksum is right; the next save could not count on."""
    contents = bytearray(FILE_BYTES)
    packed = _packed(number, encode_section(permanent(1)))
    contents[: len(packed)] = packed
    with pytest.raises(Failure, match="its number is impossible"):
        ChipMemory(FaultyDisk(bytes(contents))).load()


class NoBeginning(FaultyDisk):
    """Its first ten bytes cannot be read on their own."""

    def read(self, offset, length):
        if length == 10:
            raise OSError(errno.EIO, "Input/output error")
        return super().read(offset, length)


def test_disk_that_fails_where_a_first_save_may_have_been_torn_is_refused():
    contents = bytearray(saved(1).durable[:SLOT_BYTES] + bytes(SLOT_BYTES))
    contents[HEADER_BYTES + 5] ^= 1
    contents[SLOT_BYTES - 4096 :] = bytes(FILE_BYTES - SLOT_BYTES + 4096)
    assert ChipMemory(FaultyDisk(bytes(contents))).load() is None  # torn, never told
    with pytest.raises(Failure, match="checksum"):
        ChipMemory(NoBeginning(bytes(contents))).load()


def test_every_flipped_byte_of_the_newest_slot_gives_no_third_state():
    contents = bytes(saved(1, 2).durable)
    used = HEADER_BYTES + 200
    for at in range(0, used, 3):
        damaged = bytearray(contents)
        damaged[SLOT_BYTES + at] ^= 0x40
        try:
            found = ChipMemory(FaultyDisk(bytes(damaged))).load()
        except Failure:
            continue
        assert found in (permanent(1), permanent(2))


def test_open_makes_a_blank_file_once(tmp_path):
    path = tmp_path / "hwtpm.nv"
    memory = ChipMemory.open(path)
    assert memory.load() is None
    memory.save(permanent(7))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_size == FILE_BYTES


def test_open_does_not_follow_a_link(tmp_path):
    target = tmp_path / "precious"
    target.write_bytes(b"data")
    (tmp_path / "hwtpm.nv").symlink_to(target)
    with pytest.raises(Failure):
        ChipMemory.open(tmp_path / "hwtpm.nv")
    assert target.read_bytes() == b"data"
