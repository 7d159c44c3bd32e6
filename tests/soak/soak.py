"""A soak: a stack under load, attack, kills and damage, and the search for anything it has lost.

It goes in cycles of four phases: calm (load only), siege (hostile peers at every door), storm
(kills and stops, with the hostile peers), damage (files of daemons that are down). After each cycle
the stack is quiet for a moment and looked at (`baseline.py`); what it has then must be what it had
after the first.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from daemons.errors import Failure
from tests.soak.baseline import SETTLE_S, Moment, differences, observe
from tests.soak.peer_process import IMP, HostilePeers, mallory
from tests.soak.program import Program, resting
from tests.soak.sabotage import Sabotage
from tests.soak.trouble import Cast, NotRefused, Storm, Vandal
from tests.system.scratch_stack import (
    GUEST1,
    GUEST2,
    IMAGE_BYTES,
    IMAGE_OF,
    MANAGER,
    VTPM1,
    VTPM2,
    NotSeenError,
    ScratchStack,
    example,
)

GUEST3: Final = "guest3"
VTPM3: Final = "vtpm-guest3"
MALLORY_VTPM: Final = "vtpm-mallory"
CYCLE_S: Final = 120.0
SHARES: Final = {"calm": 0.15, "siege": 0.30, "storm": 0.40, "damage": 0.15}
SPARED_TAIL: Final = 0.25
"""In the last part of a run the launcher, the manager and the chip are not killed any more."""
_LOOK_AGAIN_S: Final = 0.1
_EXTRA_UUIDS: Final = {
    VTPM3: "3d0b6a1c-60a5-4a4e-9d75-6d3a4e9f3c03",
    MALLORY_VTPM: "4d0b6a1c-60a5-4a4e-9d75-6d3a4e9f3c04",
}
Show = Callable[[str], None]


class RunLog:
    """One JSON object a line; the same seed gives the same events, at other times."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w")
        self._begun = time.monotonic()

    def tell(self, event: str, **values: object) -> None:
        """Add a line."""
        line = {"at_s": round(time.monotonic() - self._begun, 3), "event": event, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@dataclass
class Outcome:
    """What a soak has come to.

    Attributes:
        problems: What was wrong; empty when nothing was.
        figures: Of the phases, for people.
    """

    problems: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


class Soak:
    """One run.

    Args:
        stack: Empty; ended by the caller.
        seed: All that is drawn follows from it.
        for_s: How long it lasts, in seconds, without start and end.
        log: The run log.
        show: Called with a line of progress.
        sabotage: What is broken on purpose, as a control.
    """

    def __init__(
        self,
        stack: ScratchStack,
        seed: int,
        for_s: float,
        log: RunLog,
        *,
        show: Show,
        sabotage: Sabotage,
    ) -> None:
        self.outcome = Outcome()
        self._stack, self._log, self._show, self._sabotage = stack, log, show, sabotage
        self._for_s = for_s
        self._chance = random.Random(seed)
        self._peers: list[HostilePeers] = []
        self._totals: Counter[str] = Counter()
        tpm0 = {guest: stack.places.domain(guest).tpm0 for guest in (GUEST1, GUEST2, GUEST3)}
        self._programs = {
            guest: Program(guest, path, self._chance.randrange(2**32), sabotage.tamper(guest))
            for guest, path in tpm0.items()
        }
        self._cast = Cast(
            stack=stack,
            programs=self._programs,
            vtpm_of={GUEST1: VTPM1, GUEST2: VTPM2, GUEST3: VTPM3},
            spared=frozenset({GUEST3}),
            others=(MALLORY_VTPM,),
            revived=self._let_peers_in,
        )
        self._storms_are_mild = False

    # -- the whole

    def run(self) -> Outcome:
        """Run it to its end, or to the first thing that is wrong."""
        try:
            self._start()
            baseline = self._cycles()
            self._finish(baseline)
        except (NotRefused, NotSeenError, Failure, AssertionError, TimeoutError) as error:
            self._problem(f"{type(error).__name__}: {error}")
        except KeyboardInterrupt:
            self._problem("it was interrupted")
        finally:
            self._end_peers()
            for program in self._programs.values():
                program.abandon()
        self.outcome.figures |= dict(self._totals)
        return self.outcome

    def _problem(self, what: str) -> None:
        self._log.tell("problem", what=what)
        self._show(f"PROBLEM: {what}")
        self.outcome.problems.append(what)

    def _start(self) -> None:
        self._show("starting a stack with three guests and a hostile one")
        make_installation(self._stack)
        for program in self._programs.values():
            program.start()
        for program in self._programs.values():
            program.rest()
            program.go_on()
        self._check_programs()
        places = self._stack.places
        doors = [
            ("tpm0", places.domain(GUEST1).tpm0, None),
            ("tpm0", places.domain(GUEST2).tpm0, None),
            ("control", places.launcher_socket, None),
            ("ring", places.domain(MANAGER).ring_socket, None),
            ("ring", places.domain(MALLORY_VTPM).ring_socket, ("mallory", mallory(MALLORY_VTPM))),
            ("tis", places.tis_socket, ("imp", IMP)),
        ]
        for door, path, domain in doors:
            seed = self._chance.randrange(2**32)
            self._peers.append(HostilePeers(self._stack, door, path, seed, domain))
        self._let_peers_in()

    def _cycles(self) -> Moment:
        """All cycles; what the first quiet moment after warming up was like."""
        count = max(1, round(self._for_s / CYCLE_S))
        lengths = {phase: share * self._for_s / count for phase, share in SHARES.items()}
        baseline: Moment | None = None
        begun = time.monotonic()
        # A busy machine needs longer to be whole again after a storm: then there are fewer cycles.
        while (passed := (time.monotonic() - begun) / self._for_s) < 1:
            self._show(f"a cycle, {passed:.0%} of the time has passed")
            for phase in (self._calm, self._siege, self._storm, self._damage):
                name = phase.__name__.strip("_")
                self._begin(name)
                if name == "storm":
                    self._storms_are_mild = passed > 1 - SPARED_TAIL
                phase(lengths[name])
                if name == "calm" and count == 1:
                    baseline = self._look("baseline")
            self._calm(min(10.0, lengths["calm"]))  # whoever is new gets warm
            moment = self._look("baseline" if baseline is None else "end of cycle", baseline)
            if baseline is None:
                baseline = moment
            elif moment is not baseline:
                self._compare(baseline, moment)
        assert baseline is not None
        return baseline

    def _finish(self, baseline: Moment) -> None:
        self._sabotage.strike(self._stack)
        last = self._look("end", baseline)
        self._compare(baseline, last)
        if not self.outcome.problems:
            for program in self._programs.values():
                program.end()
            self._check_programs()
            self._end_peers()
            empty = self._handles()
            for tpm, handles in empty.items():
                if any(handles):
                    self._problem(f"{tpm} still has {handles} keys, sessions and transports")
        self.outcome.figures["phases"] = self._phase_figures()

    def _handles(self) -> dict[str, list[int]]:
        return {
            name: handles
            for name, handles in observe(self._stack, list(self._programs)).handles.items()
            if name != "hwtpm"
        }

    # -- phases

    def _begin(self, phase: str) -> None:
        self._log.tell("phase", name=phase)
        for program in self._programs.values():
            program.phase = phase

    def _calm(self, for_s: float) -> None:
        self._wait(for_s)

    def _siege(self, for_s: float) -> None:
        with self._under_attack():
            self._wait(for_s)

    def _storm(self, for_s: float) -> None:
        end = time.monotonic() + for_s
        storm = Storm(
            self._cast, self._chance, self._log.tell, spares_platform=self._storms_are_mild
        )
        with self._under_attack():
            storm.run(lambda: self._is_over(end))
        self._totals["kills"] += storm.kills
        self._totals["stops"] += storm.stops
        self._cast.until_whole()

    def _damage(self, for_s: float) -> None:
        end = time.monotonic() + for_s
        vandal = Vandal(self._cast, self._chance, self._log.tell)
        is_first = True
        while is_first or not self._is_over(end):
            is_first = False
            vandal.damage_something()
            self._check_programs()
        self._totals["damages refused"] += vandal.refusals

    def _wait(self, for_s: float) -> None:
        end = time.monotonic() + for_s
        while not self._is_over(end):
            time.sleep(_LOOK_AGAIN_S)

    def _is_over(self, end: float) -> bool:
        self._check_programs()
        return time.monotonic() > end

    @contextlib.contextmanager
    def _under_attack(self) -> Iterator[None]:
        self._let_peers_in()
        for peers in self._peers:
            peers.order("go")
        try:
            yield
        finally:
            for peers in self._peers:
                peers.order("rest")
                if peers.failure:
                    raise AssertionError(f"hostile peers at {peers.door}: {peers.failure}")

    def _let_peers_in(self) -> None:
        for peers in self._peers:
            peers.let_in()

    def _end_peers(self) -> None:
        for peers in self._peers:
            self._totals["attacks"] += sum(peers.counts.values())
            peers.end()
        self._peers = []

    # -- what is looked at

    def _check_programs(self) -> None:
        for guest, program in self._programs.items():
            if program.failure is not None:
                error = program.failure
                raise AssertionError(f"the program in {guest}: {type(error).__name__}: {error}")

    def _look(self, name: str, like: Moment | None = None) -> Moment:
        with resting(list(self._programs.values())):
            self._check_programs()
            self._cast.until_whole()
            # What was broken on purpose does not mend itself.
            settle_s = SETTLE_S / 10 if self._sabotage else SETTLE_S
            moment = observe(self._stack, list(self._programs), like, settle_s=settle_s)
        self._log.tell("moment", name=name, **moment.as_json())
        commands = sum(sum(program.commands.values()) for program in self._programs.values())
        memory_mib = sum(d.proportional_kib for d in moment.daemons.values()) / 1024
        self._show(
            f"{name}: {commands} commands each done once, {self._totals['kills']} kills, "
            f"{self._totals['stops']} stops, {self._totals['damages refused']} damages refused, "
            f"{sum(sum(p.counts.values()) for p in self._peers)} attacks; "
            f"{memory_mib:.0f} MiB in {len(moment.daemons)} daemons"
        )
        return moment

    def _compare(self, baseline: Moment, moment: Moment) -> None:
        for difference in differences(baseline, moment):
            self._problem(difference)

    def _phase_figures(self) -> dict[str, Any]:
        """By guest and phase: commands, and how long a PCRRead took."""
        found: dict[str, Any] = {}
        for guest, program in self._programs.items():
            for phase in SHARES:
                durations = sorted(program.durations_s[phase])
                if len(durations) > 10:
                    found.setdefault(guest, {})[phase] = {
                        "commands": program.commands[phase],
                        "median_ms": round(statistics.median(durations) * 1000, 3),
                        "p99_ms": round(durations[int(0.99 * len(durations))] * 1000, 3),
                    }
            found.setdefault(guest, {})["longest_ms"] = round(program.longest_s * 1000)
            found[guest]["boots"] = program.boots
        return found


# -- the installation ------------------------------------------------------------------------------


def make_installation(stack: ScratchStack) -> None:
    """Images, config files and domains of three guests, and of a vTPM for a hostile one."""
    stack.places.prepare()
    stack.make_images()
    for guest in (GUEST1, GUEST2):
        stack.make_boot(guest)
    configs = [example(name) for name in (MANAGER, VTPM1, VTPM2, GUEST1, GUEST2)]
    for vtpm, uuid in _EXTRA_UUIDS.items():
        configs.append(
            stack.variant(
                VTPM2,
                {
                    f'name="{VTPM2}"': f'name="{vtpm}"',
                    IMAGE_OF[VTPM2]: f"{vtpm}.img",
                    "6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f": uuid,
                },
            )
        )
        configs[-1] = configs[-1].rename(stack.root / f"{vtpm}.cfg")
        image = stack.root / "images" / f"{vtpm}.img"
        image.touch(mode=0o600)
        with image.open("r+b") as file:
            file.truncate(IMAGE_BYTES)
    configs.append(
        stack.variant(
            GUEST2,
            {
                f'name="{GUEST2}"': f'name="{GUEST3}"',
                IMAGE_OF[GUEST2]: f"{GUEST3}.img",
                f"backend={VTPM2}": f"backend={VTPM3}",
            },
        )
    )
    shutil.copy(stack.image(GUEST2), stack.root / "images" / f"{GUEST3}.img")
    (stack.root / "images" / f"{GUEST3}.img").chmod(0o600)
    stack.vtpm("up", *configs)
