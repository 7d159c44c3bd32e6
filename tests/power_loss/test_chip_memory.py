"""The chip's memory when the power fails, at each step, and when its disk does."""

from __future__ import annotations

import pytest

from daemons.chip_memory import FILE_BYTES, HEADER_BYTES, SLOT_BYTES, ChipMemory
from daemons.errors import ExitCode, Failure
from protocol.structures import UNRESTRICTED_PCR_INFO, NvAttributes, NvDataPublic
from tests.power_loss.machine import Machine
from tests.power_loss.sweep import Sweep, Witness
from tpm12.state import NvArea, Permanent

DISK = "hwtpm.nv"
SWEEP = {"budget": 200, "again_budget": 3}


def permanent(number: int) -> Permanent:
    # The area makes it longer than a sector, and different in each.
    public = NvDataPublic(
        nv_index=1,
        pcr_info_read=UNRESTRICTED_PCR_INFO,
        pcr_info_write=UNRESTRICTED_PCR_INFO,
        permission=NvAttributes(attributes=4),
        b_read_stclear=False,
        b_write_stclear=False,
        b_write_define=False,
        data_size=1000,
    )
    area = NvArea(public=public, auth_value=bytes(20), data=bytes([number]) * 1000)
    return Permanent(no_owner_nv_write=number, nv={1: area})


def state_of(found: Permanent | None) -> int:
    return 0 if found is None else found.no_owner_nv_write


def opened(machine: Machine) -> tuple[ChipMemory, int]:
    memory = ChipMemory(machine[DISK].open_again())
    return memory, state_of(memory.load())


class Saves:
    """Three saves on a chip that has been used."""

    initial = 2

    def prepare(self) -> dict[str, bytes]:
        machine = Machine({DISK: bytes(FILE_BYTES)})
        memory, _ = opened(machine)
        for number in (1, 2):
            memory.save(permanent(number))
        machine[DISK].sync()
        return machine.durable

    def run(self, machine: Machine, witness: Witness) -> None:
        memory, _ = opened(machine)
        for number in (3, 4, 5):
            witness.change(number, lambda number=number: memory.save(permanent(number)))

    def look(self, machine: Machine) -> int:
        return opened(machine)[1]

    def go_on(self, machine: Machine) -> None:
        memory, _ = opened(machine)
        memory.save(permanent(99))
        assert opened(Machine(machine.durable))[1] == 99


class FirstSave(Saves):
    """The save that makes a new chip."""

    initial = 0

    def prepare(self) -> dict[str, bytes]:
        return {DISK: bytes(FILE_BYTES)}

    def run(self, machine: Machine, witness: Witness) -> None:
        memory, _ = opened(machine)
        for number in (1, 2):
            witness.change(number, lambda number=number: memory.save(permanent(number)))


@pytest.mark.parametrize("scenario", [Saves(), FirstSave()], ids=["saves", "first save"])
def test_every_crash_leaves_the_old_state_or_the_new(scenario):
    sweep = Sweep(scenario, **SWEEP)
    assert list(sweep.power_losses()) == []
    assert sweep.points >= 8
    assert sweep.disks_tried > 500


@pytest.mark.parametrize("scenario", [Saves(), FirstSave()], ids=["saves", "first save"])
def test_every_failure_keeps_the_last_good_copy_also_from_the_next_save(scenario):
    sweep = Sweep(scenario, budget=20, again_budget=0)
    assert list(sweep.failures()) == []
    assert sweep.points > 20


def test_a_save_costs_one_sync():
    machine = Machine(Saves().prepare())
    memory, _ = opened(machine)
    before = len(machine.log)
    memory.save(permanent(3))
    assert machine.log[before:] == [f"write {DISK}", f"sync {DISK}", f"write {DISK}"]


# -- an acknowledged state that was damaged later --------------------------------------------------


def damaged(contents: bytes, offset: int, data: bytes) -> Machine:
    return Machine({DISK: contents[:offset] + data + contents[offset + len(data) :]})


@pytest.fixture
def used() -> bytes:
    """States 1 and 2 were saved, and all of it is durable."""
    return Saves().prepare()[DISK]


def newest_slot(contents: bytes) -> int:
    sequences = [int.from_bytes(contents[at + 10 : at + 18], "big") for at in (0, SLOT_BYTES)]
    return sequences.index(max(sequences)) * SLOT_BYTES


@pytest.mark.parametrize("kind", ["bit", "header", "zeroed", "older", "blank page"])
def test_damage_of_the_newest_state_never_brings_back_the_one_before(used, kind):
    newest = newest_slot(used)
    machine = Machine({DISK: used})
    memory, _ = opened(machine)
    memory.save(permanent(3))
    older = used[SLOT_BYTES - newest :][:4096]
    memory.save(permanent(4))
    machine[DISK].sync()
    used = machine.durable[DISK]
    newest = newest_slot(used)
    harm = {
        "bit": (newest + HEADER_BYTES + 3, bytes([used[newest + HEADER_BYTES + 3] ^ 4])),
        "header": (newest + 9, b"\x77"),
        "zeroed": (newest, bytes(SLOT_BYTES - 4096)),
        "older": (newest, older),
        "blank page": (newest, bytes(4096)),
    }[kind]
    with pytest.raises(Failure) as refused:
        opened(damaged(used, *harm))
    assert refused.value.exit_code is ExitCode.DAMAGED
    assert refused.value.next_step


@pytest.mark.parametrize("part", [0, 4096 * 63, SLOT_BYTES, SLOT_BYTES + 4096 * 63])
def test_any_flipped_byte_is_refused_or_the_newest_state_still(used, part):
    for offset in range(part, part + 300):
        machine = damaged(used, offset, bytes([used[offset] ^ 0x40]))
        try:
            found = opened(machine)[1]
        except Failure:
            continue
        assert found == 2, offset


def test_what_is_refused_stays_as_it_is(used):
    newest = newest_slot(used)
    machine = damaged(used, newest + 60, b"\x55\x55")
    before = machine.contents
    with pytest.raises(Failure, match="state number 3 was stored"):
        opened(machine)
    assert machine.contents == before
    assert not machine.log or set(machine.log) == {f"sync {DISK}"}


def test_the_window_is_the_time_until_the_marker_is_written(used):
    """What cannot be told apart, as written down: no marker of the newest state was durable yet."""
    machine = Machine({DISK: used})
    memory, _ = opened(machine)
    memory.save(permanent(3))
    left = machine.durable[DISK]
    newest = newest_slot(left)
    assert opened(Machine({DISK: left}))[1] == 3
    assert opened(damaged(left, newest + 60, b"\x55\x55"))[1] == 2


# -- controls: the harness finds what is wrong -----------------------------------------------------


def is_caught(scenario=None, **options: object) -> bool:
    sweep = Sweep(scenario or Saves(), budget=60, again_budget=0, **options)
    return next(sweep.power_losses(), None) is not None


def test_harness_finds_a_save_without_its_sync():
    assert is_caught(ignores_sync=lambda _disk, number: number >= 1)


def test_harness_finds_a_marker_before_its_sync(monkeypatch):
    store = ChipMemory._store

    def marked_first(self: ChipMemory, state: bytes) -> bytes:
        sync, self._disk.sync = self._disk.sync, lambda: None
        try:
            sha256 = store(self, state)
        finally:
            self._disk.sync = sync
        self._mark(sha256)
        sync()
        return sha256

    monkeypatch.setattr(ChipMemory, "_store", marked_first)
    assert is_caught()


def test_harness_finds_a_save_over_the_newest_state(monkeypatch):
    store = ChipMemory._store

    def over_it(self: ChipMemory, state: bytes) -> bytes:
        self._active = 1 - self._active
        return store(self, state)

    monkeypatch.setattr(ChipMemory, "_store", over_it)
    assert is_caught()


def test_harness_finds_a_slot_that_is_taken_before_the_save_succeeded(monkeypatch):
    """As in Xen's vtpmblk.c: the next save then writes over the last good copy."""
    store = ChipMemory._store

    def flipped_first(self: ChipMemory, state: bytes) -> bytes:
        active = self._active
        try:
            return store(self, state)
        except Failure:
            self._active = 1 - active
            raise

    monkeypatch.setattr(ChipMemory, "_store", flipped_first)
    sweep = Sweep(Saves(), budget=20, again_budget=0)
    assert next(sweep.failures(), None) is not None


def test_harness_finds_a_torn_first_state_that_is_written_once(monkeypatch):
    monkeypatch.setattr(ChipMemory, "_is_torn_first", lambda _self: False)
    assert is_caught(FirstSave())
