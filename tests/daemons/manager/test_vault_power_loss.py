"""The vault when the power fails: at any step, while it recovers, and with a sync removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import UUID

import pytest

from daemons.manager import vault as vault_module
from daemons.manager.vault import Vault, inspect
from daemons.manager.vault_format import (
    PAGE_BYTES,
    RECORDS_PER_LEAF,
    VaultError,
)
from tests.daemons.manager.vault_bench import (
    SEALS,
    SMALL,
    contents_of,
    create,
    open_disk,
    record_of,
    reopen,
    uuid_of,
    vault_with,
)
from tests.fakes.faulty_disk import FaultyDisk, PowerLoss

Step = Callable[[Vault], None]
Model = dict[UUID, bytes]


def steps() -> list[tuple[Step, Model]]:
    """A few changes of every kind, each with the contents that it leads to."""
    base = {uuid_of(n): record_of(n).hash_key for n in range(RECORDS_PER_LEAF)}
    one = base | {uuid_of(0): record_of(0, 1).hash_key}
    two = one | {uuid_of(48): record_of(48).hash_key}
    three = {uuid: key for uuid, key in two.items() if uuid != uuid_of(5)}
    return [
        (lambda vault: vault.save(record_of(0, 1)), one),
        (lambda vault: vault.save(record_of(48)), two),
        (lambda vault: vault.delete(uuid_of(5)), three),
        (lambda vault: vault.reseal(SEALS * 2), three),
    ]


def run_until_power_fails(disk: FaultyDisk) -> tuple[Model, Model | None]:
    """Run the steps. Returns what was acknowledged and what was under way (None: nothing)."""
    acknowledged = {uuid_of(n): record_of(n).hash_key for n in range(RECORDS_PER_LEAF)}
    try:
        vault = open_disk(disk)
    except PowerLoss:
        return acknowledged, acknowledged
    for step, result in steps():
        try:
            step(vault)
        except PowerLoss:
            return acknowledged, result
        acknowledged = result
    return acknowledged, None


def crashes(
    contents: bytes, ignored_syncs: Callable[[int], bool] = lambda _n: False
) -> Iterator[tuple[int, bytes, Model, Model]]:
    """Yield every disk that a crash at any operation of the steps could leave."""
    for operation in range(1000):
        disk = FaultyDisk(contents, lose_power_at=operation, ignored_syncs=ignored_syncs)
        acknowledged, under_way = run_until_power_fails(disk)
        if under_way is None:
            # The last step was acknowledged, then the power failed.
            for left in disk.disks_after_power_loss():
                yield operation, left, acknowledged, acknowledged
            return
        for left in disk.disks_after_power_loss():
            yield operation, left, acknowledged, under_way
    raise AssertionError("the steps never end")


def violations(ignored_syncs: Callable[[int], bool]) -> Iterator[int]:
    """Yield the crashes after which the vault is neither old nor new, or does not open."""
    start = bytes(vault_with(RECORDS_PER_LEAF).durable)
    for operation, left, acknowledged, under_way in crashes(start, ignored_syncs):
        try:
            found = contents_of(reopen(left)[0])
        except VaultError:
            yield operation
            continue
        if found not in (acknowledged, under_way):
            yield operation


def test_save_is_old_or_new_after_power_loss_at_any_step():
    start = bytes(vault_with(RECORDS_PER_LEAF).durable)
    seen, operations = 0, set()
    for operation, left, acknowledged, under_way in crashes(start):
        vault, disk = reopen(left)
        assert contents_of(vault) in (acknowledged, under_way), f"operation {operation}"
        # And it works on: what was found can be built upon.
        vault.save(record_of(77))
        assert reopen(disk.durable)[0].load(uuid_of(77)) == record_of(77)
        seen += 1
        operations.add(operation)
    assert len(operations) > 20
    assert seen > 500


def test_recovery_survives_power_loss_at_any_step():
    start = bytes(vault_with(RECORDS_PER_LEAF).durable)
    recovered = 0
    for _, left, acknowledged, under_way in list(crashes(start))[::7]:
        for operation in range(100):
            disk = FaultyDisk(left, lose_power_at=operation)
            try:
                open_disk(disk)
            except PowerLoss:
                for again in disk.disks_after_power_loss():
                    found = contents_of(reopen(again)[0])
                    assert found in (acknowledged, under_way)
                    recovered += 1
            else:
                break
    assert recovered > 100


def test_creation_is_blank_or_done_after_power_loss_at_any_step():
    for operation in range(100):
        disk = FaultyDisk(SMALL, lose_power_at=operation)
        try:
            create(disk)
        except PowerLoss:
            is_done = False
        else:
            is_done = True
        for left in disk.disks_after_power_loss():
            found = inspect(FaultyDisk(left))
            if found.is_blank:
                assert not is_done
                create(FaultyDisk(left)).save(record_of(1))
            else:
                vault, again = reopen(left)
                assert vault.sequence >= 2
                vault.save(record_of(1))
                assert len(reopen(again.durable)[0]) == 1
        if is_done:
            return
    raise AssertionError("creation never ends")


# Syncs of one save, in order: nodes, then root. One more at opening comes first.
def _without_syncs_of_nodes(number: int) -> bool:
    return number in (1, 3, 5)


def _without_syncs_of_roots(number: int) -> bool:
    return number in (2, 4, 6, 7)


@pytest.mark.parametrize("removed", [_without_syncs_of_nodes, _without_syncs_of_roots])
def test_harness_notices_a_missing_sync(removed: Callable[[int], bool]):
    assert next(violations(lambda _n: False), None) is None
    assert next(violations(removed), None) is not None


def test_harness_notices_a_root_without_its_second_copy(monkeypatch):
    """A flipped byte in the newest root then brings back the one before it."""
    monkeypatch.setattr(vault_module, "root_pages", lambda sequence: (sequence % 2,))
    disk = vault_with(3)
    vault = open_disk(disk)
    vault.save(record_of(1, 1))
    image = bytearray(disk.durable)
    image[(vault.sequence % 2) * PAGE_BYTES + 3000] ^= 1
    assert reopen(image)[0].load(uuid_of(1)) == record_of(1)
