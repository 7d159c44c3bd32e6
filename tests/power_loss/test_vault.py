"""The manager's image when the power fails, when its disk does, and while it gets a new key.

Exhaustive where it can be (both copies of a root, one sector at a time), seeded where every choice
of 16 and more sectors would be too many; the page-wise choices are all in.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from uuid import UUID

import pytest

from daemons.errors import Failure
from daemons.manager import vault as vault_module
from daemons.manager.anchoring import Anchored
from daemons.manager.vault import Vault
from daemons.manager.vault_format import (
    PAGE_BYTES,
    RECORDS_PER_LEAF,
    Anchorage,
    NotAnchored,
    Record,
    RolledBack,
    RootHeader,
    SealedKey,
)
from tests.daemons.manager.vault_bench import SEALS, record_of, uuid_of
from tests.power_loss.machine import Machine, Plan, PowerLoss
from tests.power_loss.sweep import Sweep, Witness

IMAGE, CHIP = "vtpmmgr.img", "chip"
PAGES = 20
OLD_KEY, NEW_KEY = bytes(range(32)), bytes(range(32, 64))
NEW_SEALS = (replace(SEALS[0], name=b"after the change of the key"),)
ANCHORAGE = Anchorage(nv_index=0x15000, secret=bytes(20), is_confirmed=True)
Contents = frozenset[tuple[UUID, bytes]]


class SectorAnchor:
    """The chip as far as a vault's order of writes goes: it keeps 40 bytes, or what it had.

    Two sectors, written in turn, each with its count: small enough for the power to fail in.
    `test_anchored_vault.py` has the chip itself.
    """

    def __init__(self, machine: Machine) -> None:
        self._disk = machine[CHIP]

    def read(self, _anchorage: Anchorage) -> Anchored | None:
        with chip_failures():
            self._disk.open_again().sync()
            found = [self._disk.read(at, 72) for at in (0, 512)]
        whole = [data for data in found if hashlib.sha256(data[:40]).digest() == data[40:]]
        if not whole:
            return None
        newest = max(whole, key=lambda data: data[:8])
        return Anchored(sequence=int.from_bytes(newest[:8], "big"), digest=newest[8:40])

    def write(self, _anchorage: Anchorage, anchored: Anchored) -> None:
        data = anchored.sequence.to_bytes(8, "big") + anchored.digest
        with chip_failures():
            self._disk.write(anchored.sequence % 2 * 512, data + hashlib.sha256(data).digest())
            self._disk.sync()


@contextlib.contextmanager
def chip_failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure("chip", why=str(error), next_step="none") from error


def unsealed(header: RootHeader) -> bytes:
    return NEW_KEY if header.seals == NEW_SEALS else OLD_KEY


def opened(machine: Machine) -> Vault:
    return Vault.open(
        machine[IMAGE].open_again(),
        unsealed,
        random_bytes=random.Random(2).randbytes,
        anchor=SectorAnchor(machine),
    )


def created(machine: Machine, seals: tuple[SealedKey, ...] = SEALS) -> Vault:
    return Vault.create(
        machine[IMAGE],
        OLD_KEY,
        vault_id=b"\x11" * 16,
        seals=seals,
        random_bytes=random.Random(1).randbytes,
        anchor=SectorAnchor(machine),
    )


def contents_of(vault: Vault) -> Contents:
    found = [vault.load(uuid) for uuid in vault]
    return frozenset((UUID(bytes=r.uuid), r.hash_key) for r in found if r is not None)


def contents(*numbered: tuple[int, int]) -> Contents:
    return frozenset((uuid_of(n), record_of(n, generation).hash_key) for n, generation in numbered)


BASE = [(n, 0) for n in range(RECORDS_PER_LEAF)]


class Changes:
    """A changed record, a new one (with a new leaf), a removed one."""

    initial = contents(*BASE)

    def prepare(self) -> dict[str, bytes]:
        machine = Machine({IMAGE: bytes(PAGES * PAGE_BYTES), CHIP: bytes(1024)})
        vault = created(machine)
        vault.set_anchorage(ANCHORAGE)
        vault.commit(record_of(n) for n, _ in BASE)
        return machine.durable

    def run(self, machine: Machine, witness: Witness) -> None:
        keeper = Keeper(machine)
        # The second and third change what the first left, whether that was told or not.
        keeper.change(witness, lambda vault: vault.save(record_of(0, 1)))
        keeper.change(witness, lambda vault: vault.save(record_of(48)))
        keeper.change(witness, lambda vault: vault.delete(uuid_of(5)))

    def look(self, machine: Machine) -> Contents:
        return contents_of(opened(machine))

    def go_on(self, machine: Machine) -> None:
        opened(machine).save(record_of(77))
        assert opened(Machine(machine.durable)).load(uuid_of(77)) == record_of(77)


class Keeper:
    """Opens the image again after its disk failed, as `VaultKeeper` does."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._vault = opened(machine)

    @property
    def vault(self) -> Vault:
        if self._vault.failure is not None:
            self._vault = self._vault.reopened(self._machine[IMAGE].open_again())
        return self._vault

    def change(self, witness: Witness, make: Callable[[Vault], None]) -> None:
        """Make a change of what the vault holds now."""
        try:
            now = contents_of(self.vault)
        except Failure:
            return  # it does not open as long as the disk fails
        witness.change(after(now, make), lambda: make(self.vault))


def after(now: Contents, make: Callable[[Vault], None]) -> Contents:
    """What a change makes of these contents, on a disk where nothing fails."""
    machine = Machine({IMAGE: bytes(PAGES * PAGE_BYTES), CHIP: bytes(1024)})
    vault = created(machine)
    vault.commit(Record(uuid=uuid.bytes, hash_key=hash_key) for uuid, hash_key in now)
    make(vault)
    return contents_of(vault)


class NewKey(Changes):
    """A new key for a vault whose nodes do not fit twice into its image."""

    initial = contents(*((n, 0) for n in range(9 * RECORDS_PER_LEAF)))

    def prepare(self) -> dict[str, bytes]:
        machine = Machine({IMAGE: bytes(PAGES * PAGE_BYTES), CHIP: bytes(1024)})
        vault = created(machine)
        vault.set_anchorage(ANCHORAGE)
        for leaf in range(9):
            first = leaf * RECORDS_PER_LEAF
            vault.commit(record_of(n) for n in range(first, first + RECORDS_PER_LEAF))
        return machine.durable

    def run(self, machine: Machine, witness: Witness) -> None:
        keeper = Keeper(machine)
        keep = self.initial
        witness.change(keep, lambda: keeper.vault.rotate(NEW_KEY, NEW_SEALS, generation=2))
        keeper.change(witness, Vault.finish_rotation)

    def look(self, machine: Machine) -> Contents:
        vault = opened(machine)
        vault.finish_rotation()
        return contents_of(vault)


def test_every_crash_leaves_the_old_contents_or_the_new():
    sweep = Sweep(Changes(), budget=60, again_budget=1)
    assert list(sweep.power_losses()) == []
    assert sweep.points > 20
    assert sweep.disks_tried > 500


def test_every_failure_is_told_and_nothing_acknowledged_is_lost():
    sweep = Sweep(Changes(), budget=3, again_budget=0)
    assert list(sweep.failures(then_power_loss=False)) == []
    assert sweep.points > 60


@pytest.mark.slow
def test_every_failure_and_then_a_power_loss():
    sweep = Sweep(Changes(), budget=2, again_budget=0)
    assert list(sweep.failures()) == []


def test_a_new_key_survives_a_crash_at_every_step():
    sweep = Sweep(NewKey(), budget=6, again_budget=0)
    assert list(sweep.power_losses()) == []
    assert sweep.points > 30


def test_after_a_new_key_the_old_one_opens_nothing():
    machine = Machine(NewKey().prepare())
    vault = opened(machine)
    vault.rotate(NEW_KEY, NEW_SEALS, generation=2)
    assert vault.key_generation == 2
    assert contents_of(vault) == NewKey.initial
    assert contents_of(opened(machine)) == NewKey.initial
    old = vault_module.VaultKeys.derive(OLD_KEY)
    for reference in [leaf for level in vault._levels for leaf in level]:
        stored = machine[IMAGE].read(reference.page * PAGE_BYTES, PAGE_BYTES)
        alien = replace(vault._sealer, keys=old, old_node_keys=())
        with pytest.raises(vault_module.Damaged, match="damaged"):
            alien.open_node(reference, vault_module.NodePlace(0, 0), stored)


def test_records_can_be_saved_while_the_key_is_half_changed():
    machine = Machine(NewKey().prepare())
    vault = opened(machine)
    machine.plan.power_fails_at = machine.operations + 20
    with pytest.raises(BaseException):  # noqa: B017, PT011 - the power fails
        vault.rotate(NEW_KEY, NEW_SEALS, generation=2)
    again = Machine(machine.durable)
    half = opened(again)
    assert half._newest.old_node_keys
    half.save(record_of(3, 9))
    assert half.load(uuid_of(3)) == record_of(3, 9)
    done = opened(again)
    done.finish_rotation()
    assert not done._newest.old_node_keys
    assert done.load(uuid_of(3)) == record_of(3, 9)
    assert len(done) == 9 * RECORDS_PER_LEAF


# -- older copies ----------------------------------------------------------------------------------


def test_every_older_copy_is_refused_and_left():
    machine = Machine(Changes().prepare())
    vault = opened(machine)
    copies = [machine.durable[IMAGE]]
    for generation in range(1, 6):
        vault.save(record_of(0, generation))
        copies.append(machine.durable[IMAGE])
    assert opened(Machine(machine.durable)).load(uuid_of(0)) == record_of(0, 5)
    for older in copies[:-1]:
        restored = Machine({**machine.durable, IMAGE: older})
        with pytest.raises(RolledBack):
            opened(restored)
        assert restored.contents[IMAGE] == older


def test_an_older_chip_a_fork_and_a_chip_that_forgot_are_refused():
    machine = Machine(Changes().prepare())
    vault = opened(machine)
    first = machine.durable
    vault.save(record_of(0, 1))
    vault.save(record_of(0, 2))
    newest = machine.durable
    with pytest.raises(NotAnchored, match="chip is older"):
        opened(Machine({**newest, CHIP: first[CHIP]}))
    with pytest.raises(NotAnchored, match="gone"):
        opened(Machine({**newest, CHIP: bytes(1024)}))
    fork = Machine(first)
    forked = opened(fork)
    for generation in (7, 8):
        forked.save(record_of(0, generation))
    with pytest.raises(NotAnchored, match="another one"):
        opened(Machine({**newest, IMAGE: fork.durable[IMAGE]}))
    forked.save(record_of(0, 9))
    with pytest.raises(NotAnchored, match="does not follow"):
        opened(Machine({**newest, IMAGE: fork.durable[IMAGE]}))


def test_an_image_one_ahead_is_taken_and_the_chip_told():
    machine = Machine(Changes().prepare())
    before = machine.durable
    opened(machine).save(record_of(0, 1))
    ahead = Machine({**before, IMAGE: machine.durable[IMAGE]})
    assert opened(ahead).load(uuid_of(0)) == record_of(0, 1)
    with pytest.raises(RolledBack):
        opened(Machine({**ahead.durable, IMAGE: before[IMAGE]}))


def without_a_node(machine: Machine, before: dict[str, bytes]) -> bytes:
    """The image of a machine, with its newest root and without a node that this root needs."""
    image = bytearray(machine.durable[IMAGE])
    page = opened(Machine(machine.durable))._levels[0][0].page
    place = slice(page * PAGE_BYTES, (page + 1) * PAGE_BYTES)
    image[place] = before[IMAGE][place]
    return bytes(image)


def test_a_root_that_lacks_nodes_is_left_for_the_one_that_the_chip_names():
    machine = Machine(Changes().prepare())
    before = machine.durable
    opened(machine).save(record_of(0, 1))
    torn = Machine({**before, IMAGE: without_a_node(machine, before)})
    vault = opened(torn)
    assert contents_of(vault) == Changes.initial
    vault.save(record_of(0, 2))
    assert opened(Machine(torn.durable)).load(uuid_of(0)) == record_of(0, 2)


def test_a_root_that_lacks_nodes_is_refused_when_the_chip_knows_it():
    machine = Machine(Changes().prepare())
    before = machine.durable
    opened(machine).save(record_of(0, 1))
    damaged = Machine({**machine.durable, IMAGE: without_a_node(machine, before)})
    with pytest.raises(vault_module.Damaged):
        opened(damaged)
    assert opened(Machine(machine.durable)).load(uuid_of(0)) == record_of(0, 1)


def saves_after_going_back() -> Iterator[tuple[int, Contents]]:
    """Go back from a root that lacks nodes and save, the power failing at each operation."""
    machine = Machine(Changes().prepare())
    before = machine.durable
    opened(machine).save(record_of(0, 1))
    start = {**before, IMAGE: without_a_node(machine, before)}
    for point in itertools.count():
        torn = Machine(start, Plan(power_fails_at=point))
        told = 0
        with contextlib.suppress(PowerLoss):
            vault = opened(torn)
            for generation in (2, 3):
                vault.save(record_of(0, generation))
                told = generation
        for left in torn.after_power_loss(40, point):
            yield told, contents_of(opened(Machine(left)))
        if told == 3:
            return


def is_old_or_new(told: int, found: Contents) -> bool:
    expected = [{**dict(BASE), 0: generation} for generation in (told, max(told + 1, 2))]
    return found in [contents(*of.items()) for of in expected]


def test_every_crash_after_going_back_leaves_the_old_contents_or_the_new():
    found = [is_old_or_new(*each) for each in saves_after_going_back()]
    assert all(found)
    assert len(found) > 200


def test_harness_finds_an_unfinished_root_beside_the_next(monkeypatch):
    write = Vault._write

    def without_zeros(self: Vault, page: int, content: bytes) -> None:
        if any(content):
            write(self, page, content)

    monkeypatch.setattr(Vault, "_write", without_zeros)
    with pytest.raises(vault_module.Damaged, match="two different roots"):
        list(saves_after_going_back())


def test_damage_of_both_copies_of_the_newest_root_never_brings_back_the_one_before():
    machine = Machine(Changes().prepare())
    vault = opened(machine)
    vault.save(record_of(0, 1))
    image = bytearray(machine.durable[IMAGE])
    for page in (vault.sequence % 2, vault.sequence % 2 + 2):
        image[page * PAGE_BYTES + 3000] ^= 1
    with pytest.raises(RolledBack):
        opened(Machine({**machine.durable, IMAGE: bytes(image)}))


# -- controls --------------------------------------------------------------------------------------


def is_caught(**options: object) -> bool:
    sweep = Sweep(Changes(), budget=60, again_budget=0, **options)
    return next(sweep.power_losses(), None) is not None


def test_harness_finds_a_missing_sync():
    assert is_caught(ignores_sync=lambda disk, number: disk == IMAGE and number > 0)


def test_harness_finds_a_vault_that_does_not_go_back(monkeypatch):
    def refuse(_self: Vault, root: object) -> None:
        raise vault_module.Damaged(IMAGE, f"root {root} lacks nodes")

    monkeypatch.setattr(Vault, "_go_back", refuse)
    assert is_caught()


def test_harness_finds_the_wrong_root_slot(monkeypatch):
    genuine = vault_module.root_pages
    monkeypatch.setattr(vault_module, "root_pages", lambda sequence: genuine(sequence // 2))
    assert is_caught()


def test_harness_finds_a_chip_that_is_told_before_the_root_is_durable(monkeypatch):
    sync, tell = Vault._sync, Vault._tell_anchor

    def told_first(self: Vault, root: object, anchored: Anchored) -> None:
        tell(self, root, anchored)
        sync(self)

    monkeypatch.setattr(Vault, "_tell_anchor", told_first)
    monkeypatch.setattr(Vault, "_sync", lambda _self: None)
    assert is_caught()


def test_harness_finds_a_new_key_that_forgets_the_old_too_early(monkeypatch):
    monkeypatch.setattr(Vault, "_leaves_under_old_key", lambda _self: [])
    sweep = Sweep(NewKey(), budget=3, again_budget=0)
    assert next(sweep.power_losses(), None) is not None
