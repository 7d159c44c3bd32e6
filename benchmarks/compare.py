"""Compare the stack with swtpm in one run: time of each command, memory, time to the first answer.

    python -m benchmarks.compare [--ops pcrread,extend] [--seconds 0.5] [--starts 3] [--json FILE]

A scratch stack with one guest is started, `vtpm simulator` (the same engine without guest, vTPM and
manager around it) and Debian's swtpm (TPM 1.2). Every operation runs against swtpm, the simulator,
the guest's tpm0 and directly on the vTPM's ring, in slices that alternate, with the client and all
daemons pinned to one CPU: unpinned, two identical servers differ by up to five times. One start of
a program differs from the next by up to 8 %, by where its memory happens to lie, so all of it is
started several times, and the median of the starts is told. What is timed is a send and the receive
of the answer. Quote the ratios, not the microseconds. What the figures mean is in
docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.endpoints import Program, Stack, Wire, memory_of, simulator, swtpm
from benchmarks.operations import OPERATIONS, Endpoint, Measured, Operation
from protocol.return_codes import TpmError

SLICE_S = 0.05
COLD_STARTS = 7
"""So often a simulator is started to see how long that takes, of which the median is told."""


def measure(measured: Measured, endpoints: list[Endpoint], seconds: float) -> dict[str, float]:
    """Microseconds by endpoint: the median, for key generation the mean; slices alternate."""
    runs: dict[str, Operation] = {}
    for endpoint in endpoints:
        try:
            runs[endpoint.label] = measured.make(endpoint)
            if not measured.is_key_generation:
                runs[endpoint.label]()
        except TpmError as error:
            print(f"{endpoint.label}: {measured.name}: {error}", file=sys.stderr)
            runs.pop(endpoint.label, None)
    samples: dict[str, list[int]] = {label: [] for label in runs}
    order = list(runs)
    end = time.perf_counter() + seconds * len(order) * (4 if measured.is_key_generation else 1)
    while time.perf_counter() < end:
        for label in order:
            slice_end = time.perf_counter() + SLICE_S
            while time.perf_counter() < slice_end:
                samples[label].append(runs[label]())
        order.reverse()
    for endpoint in endpoints:
        endpoint.rest()
    middle = statistics.fmean if measured.is_key_generation else statistics.median
    return {label: middle(times) / 1000 for label, times in samples.items() if times}


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for sockets and state; short, because socket paths must be."""
    folder = Path(tempfile.mkdtemp(prefix="vtpm-bench-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def started(start: Callable[[Path], Program], folder: Path) -> str:
    """How long a simulator takes from its start to its first answer; its state is there already."""
    found = []
    for _ in range(COLD_STARTS + 1):
        with start(folder) as program:
            found.append(program.first_answer_s * 1000)
    first, *others = found
    return f"{statistics.median(others):.0f} ms until it answers, {first:.0f} ms with a new state"


Figures = dict[str, dict[str, float]]
"""Microseconds by operation and endpoint, of one start."""


def ratio(found: list[Figures], name: str, label: str, base: str) -> float | None:
    """The median of the starts of one endpoint's time over another's; None without both."""
    each = [start[name] for start in found]
    ratios = [row[label] / row[base] for row in each if label in row and base in row]
    return statistics.median(ratios) if ratios else None


def middle(found: list[Figures], name: str, label: str) -> float | None:
    """The median of the starts; None when it was not measured."""
    times = [start[name][label] for start in found if label in start[name]]
    return statistics.median(times) if times else None


def show(chosen: list[Measured], found: list[Figures], labels: list[str]) -> None:
    """Print the table; ratios are to the first endpoint."""
    base, *others = labels
    title = f"microseconds a command and ratio to {base}, median of {len(found)} starts"
    table = Table(title=title)
    table.add_column("command")
    table.add_column(base, justify="right")
    for label in others:
        table.add_column(label, justify="right")
        table.add_column("ratio", justify="right")
    for measured in chosen:
        name = measured.name
        cells = [measured.title, _cell(middle(found, name, base), 1)]
        for label in others:
            cells.append(_cell(middle(found, name, label), 1))
            cells.append(_cell(ratio(found, name, label, base), 2))
        table.add_row(*cells)
    Console().print(table)


def _cell(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def run_once(
    options: argparse.Namespace, chosen: list[Measured], folder: Path, said: str
) -> tuple[Figures, dict[str, str]]:
    """Start everything, measure, and end it again; the figures, and facts of the processes."""
    with ExitStack() as running:
        stack = running.enter_context(Stack(folder))
        programs = {"simulator": running.enter_context(simulator(folder / "simulator"))}
        if shutil.which("swtpm"):
            programs = {"swtpm": running.enter_context(swtpm(folder / "swtpm")), **programs}
        endpoints = [Endpoint(label, Wire(program.exchange)) for label, program in programs.items()]
        endpoints.append(Endpoint("tpm0", stack.open_tpm0()))
        ring = stack.open_ring_client() if options.ring_client else stack.open_ring()
        endpoints.append(Endpoint("ring", ring))
        cpus = os.sched_getaffinity(0)
        stack.pin(options.cpu)
        for program in programs.values():
            program.pin(options.cpu)
        os.sched_setaffinity(0, {options.cpu})
        try:
            figures = {
                measured.name: measure(measured, endpoints, options.seconds / options.starts)
                for measured in track(chosen, description=said, transient=True)
            }
        finally:
            os.sched_setaffinity(0, cpus)
        facts = {f"memory of {name}": memory_of(program.pid) for name, program in programs.items()}
        return figures, facts | stack.facts()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", help="comma-separated names; all when left out")
    parser.add_argument(
        "--seconds", type=float, default=0.5, help="per command and endpoint, all starts together"
    )
    parser.add_argument("--starts", type=int, default=3, help="how often everything is started")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--cpu", type=int, default=0, help="the CPU everything is pinned to")
    parser.add_argument(
        "--ring-client", action="store_true", help="the ring by the client that guests use"
    )
    options = parser.parse_args()
    if options.starts < 1:
        parser.error("--starts: at least one")
    wanted = options.ops.split(",") if options.ops else [m.name for m in OPERATIONS]
    chosen = [m for m in OPERATIONS if m.name in wanted]
    if len(chosen) != len(wanted):
        parser.error(f"there is {', '.join(m.name for m in OPERATIONS)}")
    starts = {"swtpm": swtpm, "simulator": simulator}
    if not shutil.which("swtpm"):
        print("swtpm is not installed (apt-get install swtpm): no ratios", file=sys.stderr)
        del starts["swtpm"]
    found: list[Figures] = []
    facts: dict[str, str] = {}
    for number in range(1, options.starts + 1):
        with scratch() as folder:
            said = f"start {number} of {options.starts}"
            figures, facts = run_once(options, chosen, folder, said)
            found.append(figures)
    show(chosen, found, [*starts, "tpm0", "ring"])
    with scratch() as folder:
        for name, start in starts.items():
            facts[f"start of {name}"] = started(start, folder / name)
    for name, value in facts.items():
        print(f"{name}: {value}")
    if options.json:
        options.json.write_text(json.dumps({"microseconds": found, "stack": facts}, indent=2))


if __name__ == "__main__":
    main()
