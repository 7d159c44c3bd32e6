"""What it costs the manager to keep one vTPM's record, with few vTPMs and with many.

    python -m benchmarks.vault [--saves N] [--image FILE] [--json FILE]

An image of 2 MiB in a file of the disk that FILE is on is filled with 10, 1,000 and 20,000 records
(2 MiB hold 24,048), then records drawn at random are saved: sectors written, syncs, time. The chip
has no part in it; what writing its record adds is in docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from rich.console import Console
from rich.progress import track
from rich.table import Table

from daemons.disk import Disk, PosixDisk
from daemons.manager.vault import Vault
from daemons.manager.vault_format import RECORDS_PER_LEAF, Record, SealedKey

IMAGE_BYTES: Final = 2 << 20
SECTOR_BYTES: Final = 512
COUNTS: Final = (10, 1_000, 20_000)
KEY: Final = bytes(range(32))
LEAVES_A_COMMIT: Final = 50
SEALS: Final = (
    SealedKey(
        name=b"a benchmark",
        pcr_selection=b"\xff\x00\x0e",
        locality=4,
        digest_at_release=bytes(20),
        pcr_values=(bytes(20),) * 11,
        stored_data=bytes(322),
    ),
)


@dataclass(slots=True)
class CountingDisk:
    """A disk that counts what is done with it.

    Attributes:
        sectors: Written, of 512 bytes.
        syncs: Asked for.
    """

    disk: Disk
    sectors: int = 0
    syncs: int = 0

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.disk.name

    @property
    def size(self) -> int:
        """In bytes."""
        return self.disk.size

    def read(self, offset: int, length: int) -> bytes:
        """Read bytes."""
        return self.disk.read(offset, length)

    def write(self, offset: int, data: bytes) -> None:
        """Write and count."""
        self.sectors += -(-len(data) // SECTOR_BYTES)
        self.disk.write(offset, data)

    def sync(self) -> None:
        """Sync and count."""
        self.syncs += 1
        self.disk.sync()

    def close(self) -> None:
        """Let it go."""
        self.disk.close()


def record_of(number: int, generation: int = 0) -> Record:
    """Some record."""
    key = generation.to_bytes(32, "big") + number.to_bytes(32, "big")
    return Record(uuid=UUID(int=1 << 100 | number).bytes, hash_key=key)


def filled(disk: Disk, count: int) -> Vault:
    """A vault with so many records."""
    vault = Vault.create(disk, KEY, vault_id=bytes(16), seals=SEALS, random_bytes=os.urandom)
    # Not all at once: every commit needs as many free pages as it changes.
    step = LEAVES_A_COMMIT * RECORDS_PER_LEAF
    for first in range(0, count, step):
        vault.commit(record_of(n) for n in range(first, min(first + step, count)))
    return vault


def measure(image: Path, count: int, saves: int) -> dict[str, float]:
    """Fill an image and save; sectors and syncs of one save, and microseconds."""
    with image.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    image.chmod(0o600)
    disk = CountingDisk(PosixDisk(image))
    vault = filled(disk, count)
    chance = random.Random(1)
    sectors, syncs, times = disk.sectors, disk.syncs, []
    for generation in range(1, saves + 1):
        record = record_of(chance.randrange(count), generation)
        begin = time.perf_counter()
        vault.save(record)
        times.append((time.perf_counter() - begin) * 1e6)
    found = {
        "sectors": (disk.sectors - sectors) / saves,
        "syncs": (disk.syncs - syncs) / saves,
        "median_us": statistics.median(times),
        "p99_us": sorted(times)[int(0.99 * saves)],
    }
    begin = time.perf_counter()
    vault.close()
    reopened = Vault.open(PosixDisk(image), lambda _: KEY, random_bytes=os.urandom)
    found["open_ms"] = (time.perf_counter() - begin) * 1e3
    assert len(reopened) == count
    reopened.close()
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--saves", type=int, default=500)
    parser.add_argument("--image", type=Path, help="a file to use, on the disk in question")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    figures = {}
    table = Table(title="one save in a manager's image of 2 MiB")
    for column in ("vTPMs", "sectors", "syncs", "median us", "99 % us", "start, ms"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory(prefix="vtpm-bench-") as folder:
        image = options.image or Path(folder) / "vtpmmgr.img"
        for count in track(COUNTS, description="measuring", transient=True):
            found = figures[count] = measure(image, count, options.saves)
            table.add_row(
                f"{count:,}",
                f"{found['sectors']:g}",
                f"{found['syncs']:g}",
                f"{found['median_us']:.0f}",
                f"{found['p99_us']:.0f}",
                f"{found['open_ms']:.0f}",
            )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
