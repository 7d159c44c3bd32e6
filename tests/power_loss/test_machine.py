"""The simulated disks do what disks do: the sweeps stand on it."""

from __future__ import annotations

import pytest

from tests.power_loss.machine import TEARS, Fault, Machine, Plan, PowerLoss

DISK = "disk"


def machine(plan: Plan | None = None, sectors: int = 4) -> Machine:
    return Machine({DISK: bytes(512 * sectors)}, plan)


def left_by(machine: Machine, budget: int = 1000) -> list[bytes]:
    return [left[DISK] for left in machine.after_power_loss(budget)]


def test_what_is_not_synced_may_be_lost_kept_torn_and_in_any_order():
    of = machine()
    of[DISK].write(0, b"a" * 512)
    of[DISK].write(1024, b"b" * 512)
    left = left_by(of)
    a, b, zero = b"a" * 512, b"b" * 512, bytes(512)
    for first in (a, zero):
        for second in (b, zero):
            assert first + zero + second + zero in left
    assert any(disk[:512] not in {a, zero} for disk in left), "no torn sector"
    # Each tear of each sector, beside each choice of the other one; zeros are among them.
    assert len(left) == 4 + 2 * 2 * (len(TEARS) - 1)


def test_what_is_synced_stays():
    of = machine()
    of[DISK].write(0, b"a" * 2048)
    of[DISK].sync()
    assert left_by(of) == [b"a" * 2048]


def test_a_sync_in_which_the_power_fails_has_done_any_part():
    of = machine(Plan(power_fails_at=1))
    of[DISK].write(0, b"a" * 1024)
    with pytest.raises(PowerLoss):
        of[DISK].sync()
    left = {disk[:1024] for disk in left_by(of)}
    assert {bytes(1024), b"a" * 1024, b"a" * 512 + bytes(512), bytes(512) + b"a" * 512} <= left


def test_after_a_failed_sync_the_next_one_says_yes_and_nothing_is_there():
    of = machine(Plan(fails_at={1: Fault.NOTHING_DONE}))
    of[DISK].write(0, b"a" * 512)
    with pytest.raises(OSError, match="input/output"):
        of[DISK].sync()
    of[DISK].sync()
    assert of[DISK].read(0, 512) == b"a" * 512
    assert left_by(of) == [bytes(2048)]
    assert of[DISK].open_again().read(0, 512) == bytes(512)
    of[DISK].write(0, b"b" * 512)
    of[DISK].sync()
    assert left_by(of)[0][:512] == b"b" * 512


def test_a_write_fails_wholly_or_in_part():
    for fault, written in ((Fault.DISK_FULL, 0), (Fault.NOTHING_DONE, 0), (Fault.PARTLY_DONE, 512)):
        of = machine(Plan(fails_at={0: fault}))
        with pytest.raises(OSError):  # noqa: PT011 - which one is the disk's to choose
            of[DISK].write(0, b"a" * 1024)
        assert of[DISK].read(0, 1024) == b"a" * written + bytes(1024 - written)


def test_a_large_choice_has_the_extremes_and_keeps_to_its_budget():
    of = machine(sectors=64)
    of[DISK].write(0, b"a" * 512 * 64)
    left = left_by(of, budget=200)
    assert len(left) == 200
    assert {bytes(512 * 64), b"a" * 512 * 64} <= set(left)
    assert left == left_by(of, budget=200), "the same seed gives the same disks"


def test_operations_are_counted_over_all_disks():
    of = Machine({"one": bytes(512), "two": bytes(512)}, Plan(power_fails_at=2))
    of["one"].write(0, b"a")
    of["two"].write(0, b"b")
    with pytest.raises(PowerLoss):
        of["one"].sync()
    assert of.log == ["write one", "write two", "sync one"]
