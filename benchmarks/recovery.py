"""How long a guest's program waits when a daemon is killed: from the kill to the next answer.

    python -m benchmarks.recovery [--kills N] [--json FILE]

A program extends a PCR of guest1's TPM without a pause, and checks each answer, while one daemon
after the other is killed with SIGKILL. Its longest exchange around each kill is what is told.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.compare import scratch
from benchmarks.endpoints import Stack

VICTIMS: Final = ("vtpm-guest1", "vtpmmgr", "hwtpm")
EXTEND: Final = bytes.fromhex("00c1000000220000001400 00000a".replace(" ", ""))
MARK: Final = b"\x33" * 20
SETTLE_S: Final = 0.5
"""Between two kills, so that each begins with everything running."""


class Program:
    """The guest's program, in a thread.

    Args:
        stack: With guest1.
    """

    def __init__(self, stack: Stack) -> None:
        self._exchange = stack.open_tpm0().exchange
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.longest_s = 0.0
        self.count = 0
        self.failure: str | None = None

    def _run(self) -> None:
        pcr = None
        while not self._stop.is_set():
            begin = time.perf_counter()
            answer = self._exchange(EXTEND + MARK)
            self.longest_s = max(self.longest_s, time.perf_counter() - begin)
            expected = pcr and hashlib.sha1(pcr + MARK, usedforsecurity=False).digest()
            pcr = answer[10:]
            if expected not in {None, pcr}:
                self.failure = f"after {self.count} extends it was answered {answer.hex()}"
                return
            self.count += 1

    def __enter__(self) -> Program:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def pauses_ms(stack: Stack, program: Program, victim: str, kills: int) -> list[float]:
    """Kill a daemon again and again; the longest exchange around each kill, in milliseconds."""
    found = []
    for _ in track(range(kills), description=f"killing {victim}", transient=True):
        time.sleep(SETTLE_S)
        program.longest_s = 0.0
        before = stack.all_pids()
        os.kill(before[victim], signal.SIGKILL)
        while stack.all_pids().get(victim) in {None, before[victim]}:
            time.sleep(0.005)
        time.sleep(SETTLE_S)
        found.append(program.longest_s * 1000)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each daemon")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    figures = {}
    table = Table(title="milliseconds from a kill to the next answer of guest1's TPM")
    for column in ("killed", "median", "90 %", "longest"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    with scratch() as folder, Stack(folder) as stack, Program(stack) as program:
        for victim in VICTIMS:
            found = sorted(pauses_ms(stack, program, victim, options.kills))
            figures[victim] = found
            middle, late = statistics.median(found), found[int(0.9 * (len(found) - 1))]
            table.add_row(victim, f"{middle:.0f}", f"{late:.0f}", f"{found[-1]:.0f}")
    Console().print(table)
    print(program.failure or f"{program.count} extends, each done once")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2))
    if program.failure:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
