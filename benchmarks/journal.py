"""What the journal costs: commands in this process, by a TPM with one and by a TPM without.

    python -m benchmarks.journal [--seconds 0.5]

No socket and no other process is in it, and the store lies in memory: the difference is the
journal's. In a daemon each microsecond here is up to two (docs/performance.md says why).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.endpoints import Wire
from benchmarks.operations import OPERATIONS, Endpoint
from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm
from daemons.volatile_memory import VolatileMemory
from daemons.vtpm.remembered_responses import note
from tpm12.commands import ALL
from tpm12.profile import VTPM

NAMES = ("pcrread", "extend", "oiap", "nv_read_owner", "nv_write_owner", "increment")
SLICE_S = 0.05


def endpoint(folder: Path, *, has_journal: bool) -> Endpoint:
    """A TPM in this process."""
    folder.mkdir()
    tpm = DurableTpm(
        ChipMemory.open(folder / "state"),
        profile=VTPM,
        commands=ALL,
        memory=VolatileMemory(folder / "journal", "bench") if has_journal else None,
    )
    tpm.power_on()
    remembered = (lambda response: note("bench/0", 1, response)) if has_journal else None
    return Endpoint(
        "with" if has_journal else "without", Wire(lambda r: tpm.execute(r, 0, remembered))
    )


def measure(name: str, endpoints: list[Endpoint], seconds: float) -> list[float]:
    """Median microseconds of a command for each endpoint; slices alternate."""
    make = next(measured.make for measured in OPERATIONS if measured.name == name)
    runs = [make(each) for each in endpoints]
    samples: list[list[int]] = [[] for _ in endpoints]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for run, found in zip(runs, samples, strict=True):
            slice_end = time.perf_counter() + SLICE_S
            while time.perf_counter() < slice_end:
                found.append(run())
    for each in endpoints:
        each.rest()
    return [statistics.median(found) / 1000 for found in samples]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.5, help="per command")
    options = parser.parse_args()
    table = Table(title="microseconds a command, median, in one process")
    for title in ("command", "without a journal", "with one", "its cost"):
        table.add_column(title, justify="left" if title == "command" else "right")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        endpoints = [
            endpoint(Path(folder) / str(has_journal), has_journal=has_journal)
            for has_journal in (False, True)
        ]
        for name in NAMES:
            without, with_one = measure(name, endpoints, options.seconds)
            title = next(measured.title for measured in OPERATIONS if measured.name == name)
            table.add_row(title, f"{without:.1f}", f"{with_one:.1f}", f"{with_one - without:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
