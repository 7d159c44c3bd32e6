"""How much slower a guest is while others attack every door of its stack.

    python -m tests.soak.latency [--rounds N] [--for SECONDS] [--json FILE]

There are two stacks. A program in a guest of the first one reads a PCR without a pause, for some
seconds each: while nobody does anything (calm), while hostile peers attack the second stack
(elsewhere), while the same peers attack its own (siege). The attackers need the processors too, and
so do those who refuse them; what is not to be blamed on a lack of processors is siege against
elsewhere, the control. Another command, which is stored, is measured alike. That the measure can
show a loss is seen in the last phase: programs of the same guest, who may do so, keep its TPM busy
(neighbours).
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.status import Status
from rich.table import Table

from tests.soak.peer_process import IMP, HostilePeers, mallory
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    VTPM1,
    VTPM2,
    ScratchStack,
    scratch_stack,
)

NV_INDEX = 0x11101
NV_PER_OWNERWRITE = 0x00000002
OWNER = b"o" * 20
PHASES = ("calm", "elsewhere", "siege", "neighbours")
NEIGHBOURS = 3
SETTLE_S = 0.5


class Place:
    """A stack with one guest, and hostile peers at each of its doors who rest."""

    def __init__(self, stack: ScratchStack, seed: int) -> None:
        self.stack = stack
        stack.make_images()
        stack.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN, VTPM2)
        places = stack.places
        vault, ring1, ring2 = (places.domain(n).ring_socket for n in (MANAGER, VTPM1, VTPM2))
        self.peers = [
            HostilePeers(stack, "tpm0", places.domain(GUEST1).tpm0, seed + 1),
            HostilePeers(stack, "control", places.launcher_socket, seed + 2),
            HostilePeers(stack, "ring", ring1, seed + 3),
            HostilePeers(stack, "ring", vault, seed + 4),
            HostilePeers(stack, "ring", ring2, seed + 5, ("mallory", mallory(VTPM2))),
            HostilePeers(stack, "tis", places.tis_socket, seed + 6),
            HostilePeers(stack, "tis", places.tis_socket, seed + 7, ("imp", IMP)),
        ]
        for each in self.peers:
            each.let_in()

    @contextmanager
    def under_attack(self) -> Iterator[None]:
        for each in self.peers:
            each.order("go")
        try:
            yield
        finally:
            for each in self.peers:
                each.order("rest")

    @contextmanager
    def with_neighbours(self) -> Iterator[None]:
        stop = threading.Event()

        def write_again_and_again() -> None:
            with self.stack.tpm(GUEST1) as tpm:
                while not stop.is_set():
                    tpm.nv_write_value(NV_INDEX, secrets.token_bytes(8), owner_auth=OWNER)

        with ThreadPoolExecutor(NEIGHBOURS) as pool:
            busy = [pool.submit(write_again_and_again) for _ in range(NEIGHBOURS)]
            try:
                yield
            finally:
                stop.set()
        for each in busy:
            each.result()

    @property
    def attacks(self) -> int:
        return sum(sum(each.counts.values()) for each in self.peers)

    def end(self) -> None:
        for each in self.peers:
            each.end()


def measured(place: Place, for_s: float, times: dict[str, list[float]]) -> None:
    """Send both commands in turn for some seconds; milliseconds of each."""
    with place.stack.tpm(GUEST1) as tpm:
        end, number = time.monotonic() + for_s, 0
        while time.monotonic() < end:
            for _ in range(20):
                begun = time.perf_counter()
                tpm.pcr_read(10)
                times["PCRRead"].append((time.perf_counter() - begun) * 1000)
            number += 1
            begun = time.perf_counter()
            tpm.nv_write_value(NV_INDEX, number.to_bytes(8, "big"), owner_auth=OWNER)
            times["NV write, stored"].append((time.perf_counter() - begun) * 1000)


def rounds(
    mine: Place, other: Place, count: int, for_s: float, spinner: Status
) -> dict[str, dict[str, list[float]]]:
    """All phases in turn, again and again; milliseconds by phase and command."""
    times: dict[str, dict[str, list[float]]] = {phase: defaultdict(list) for phase in PHASES}
    trouble = {
        "elsewhere": other.under_attack,
        "siege": mine.under_attack,
        "neighbours": mine.with_neighbours,
    }
    for number in range(count):
        for phase in PHASES:
            spinner.update(f"round {number + 1} of {count}: {phase}")
            time.sleep(SETTLE_S)
            with ExitStack() as attack:
                if phase in trouble:
                    attack.enter_context(trouble[phase]())
                    time.sleep(SETTLE_S)
                measured(mine, for_s, times[phase])
    return times


def show(
    console: Console, times: dict[str, dict[str, list[float]]], attacks: dict[str, int]
) -> dict[str, dict[str, dict[str, float]]]:
    """Print the table; its figures."""
    table = Table(title="milliseconds of a guest's command")
    for column in ("command", "phase", "commands", "median", "90 %", "99 %", "attacks"):
        table.add_column(column, justify="left" if column in {"command", "phase"} else "right")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for command in times["calm"]:
        for phase in PHASES:
            found = sorted(times[phase][command])
            late = [found[int(share * (len(found) - 1))] for share in (0.9, 0.99)]
            row = {"median": statistics.median(found), "p90": late[0], "p99": late[1]}
            figures.setdefault(command, {})[phase] = row
            shown = [f"{value:.2f}" for value in row.values()]
            table.add_row(command, phase, str(len(found)), *shown, str(attacks.get(phase, "")))
    console.print(table)
    for command, by_phase in figures.items():
        for phase, base in (("siege", "elsewhere"), ("siege", "calm"), ("neighbours", "calm")):
            ratio = by_phase[phase]["median"] / by_phase[base]["median"]
            console.print(f"{command}: {phase} / {base} = {ratio:.2f} (medians)", highlight=False)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--for", dest="for_s", type=float, default=5.0, help="each, in seconds")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    console = Console()
    with ExitStack() as opened, console.status("starting two stacks") as spinner:
        places = [Place(opened.enter_context(scratch_stack()), seed) for seed in (0, 100)]
        for each in places:
            opened.callback(each.end)
        mine, other = places
        with mine.stack.tpm(GUEST1) as tpm:
            tpm.take_ownership(owner_auth=OWNER)
            tpm.nv_define_space(NV_INDEX, 8, NV_PER_OWNERWRITE, owner_auth=OWNER)
        times = rounds(mine, other, options.rounds, options.for_s, spinner)
        attacks = {"elsewhere": other.attacks, "siege": mine.attacks}
    figures = show(console, times, attacks)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
