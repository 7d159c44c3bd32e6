"""Writes the files of this version, once, when the version is new.

Run it with `python -m tests.vectors.state.make`. Files that are there are left: what an earlier
version wrote is the point of keeping them.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import random
from pathlib import Path
from uuid import UUID

from daemons import chip_memory
from daemons.chip_memory import FILE_BYTES, ChipMemory
from daemons.manager import vault_format
from daemons.manager.vault import Vault
from daemons.manager.vault_format import PAGE_BYTES, Anchorage, Record
from daemons.vtpm import image
from daemons.vtpm.image import VtpmImage
from tests.daemons.manager.chip_bench import owned_state
from tests.fakes.faulty_disk import FaultyDisk, PowerLoss

HERE = Path(__file__).parent
VAULT_KEY, NEXT_VAULT_KEY = bytes(range(32)), bytes(range(32, 64))
VTPM = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
NUMBERS = range(60)
ANCHORAGE = Anchorage(
    nv_index=0x15000, secret=b"s" * 20, counter_id=3, counter_value=7, is_confirmed=True
)


def record(number: int) -> Record:
    return Record(uuid=bytes([number]) * 15 + b"\1", hash_key=bytes([number]) * 64)


class OneRecord:
    """A manager that knows one vTPM."""

    def __init__(self, hash_key: bytes | None = None) -> None:
        self.hash_key = hash_key

    def load_hash_key(self) -> bytes | None:
        return self.hash_key

    def save_hash_key(self, hash_key: bytes) -> None:
        self.hash_key = hash_key


def keep(name: str, data: bytes) -> None:
    path = HERE / f"{name}.gz"
    if not path.exists():
        path.write_bytes(gzip.compress(data, mtime=0))


def chip() -> None:
    disk = FaultyDisk(bytes(FILE_BYTES))
    memory = ChipMemory(disk)
    memory.load()
    for _ in range(2):
        memory.save(owned_state().permanent)
    keep(f"chip-{chip_memory.FORMAT_VERSION}", bytes(disk.visible))


def vault() -> None:
    disk = FaultyDisk(bytes(16 * PAGE_BYTES))
    made = Vault.create(
        disk,
        VAULT_KEY,
        vault_id=b"fixture of state",
        seals=(),
        random_bytes=random.Random(1).randbytes,
    )
    made.commit(record(n) for n in NUMBERS)
    keep(f"vault-{vault_format.FORMAT_VERSION}", bytes(disk.durable))
    made.set_anchorage(ANCHORAGE)
    keep(f"vault-{vault_format.FORMAT_VERSION}-anchored", bytes(disk.durable))
    # The power fails while it gets a new key: one leaf is under the new one, one is not yet.
    disk.lose_power_at = disk.operations + 8
    made._free = type(made._free)(list(made._free)[:3])
    with contextlib.suppress(PowerLoss):
        made.rotate(NEXT_VAULT_KEY, (), generation=2)
    keep(f"vault-{vault_format.FORMAT_VERSION}-half-rotated", bytes(disk.durable))


def vtpm() -> None:
    disk, manager = FaultyDisk(bytes(16 * 1024)), OneRecord()
    stored = VtpmImage(disk, VTPM, manager)
    stored.load()
    for _ in range(2):
        stored.save(owned_state().permanent)
    assert manager.hash_key is not None
    name = f"vtpm-{image.FORMAT_VERSION}-claimed"
    keep(name, bytes(disk.durable))
    record_path = HERE / f"{name}.json"
    if not record_path.exists():
        record_path.write_text(json.dumps({"hash_key": manager.hash_key.hex()}) + "\n")


if __name__ == "__main__":
    chip()
    vault()
    vtpm()
