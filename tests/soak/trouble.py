"""What a soak does to a stack: kills and stops of processes, and damage of files.

Everything is drawn from a seed, told to the run log before it is done, and of a kind that nobody
may notice but as a pause; but for the end of a guest, which is a boot of that guest, and is
announced to its program.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.errors import Failure
from tests.soak.program import Program, resting
from tests.system.scratch_stack import (
    MANAGER,
    NotSeenError,
    ScratchStack,
    kill_and_wait,
    wait_until,
)

CHIP: Final = "hwtpm"
LAUNCHER: Final = "Domain-0"
FORK_SERVER: Final = "fork server"
GAP_S: Final = (0.05, 1.5)
"""Between two kills: some fall into the recovery from the one before."""
STOP_S: Final = (0.05, 1.5)
"""How long a stopped process stands."""
BACK_S: Final = 120.0
"""How long the stack may take to be whole again."""
STRETCH_BYTES: Final = 256
HEADER_BYTES: Final = 32
"""No store has a shorter one."""

Tell = Callable[..., None]
"""Called with the name of an event and its values."""


class NotRefused(Exception):  # noqa: N818 - what a soak is looking for
    """Something damaged was taken, replaced, or refused without a reason."""


@dataclass(frozen=True)
class Cast:
    """Who is in a soak.

    Attributes:
        stack: The installation.
        programs: By guest.
        vtpm_of: The vTPM of each guest.
        spared: Guests that are never killed, with their vTPMs: what leaks has an hour there.
        others: Further vTPMs, of hostile guests.
        revived: Called when the launcher was started again.
    """

    stack: ScratchStack
    programs: dict[str, Program]
    vtpm_of: dict[str, str]
    spared: frozenset[str]
    others: tuple[str, ...]
    revived: Callable[[], None]

    @property
    def mortal_guests(self) -> list[str]:
        return [guest for guest in self.programs if guest not in self.spared]

    @property
    def vtpms(self) -> list[str]:
        """Those that may be killed."""
        return [*(self.vtpm_of[guest] for guest in self.mortal_guests), *self.others]

    def all_domains(self) -> list[str]:
        return [MANAGER, *self.vtpm_of.values(), *self.others, *self.programs]

    def until_whole(self) -> None:
        """Wait until every domain and the chip run."""
        stack = self.stack
        deadline = time.monotonic() + BACK_S
        while True:
            with contextlib.suppress(Failure, NotSeenError):
                stack.until_running(*self.all_domains())
                if stack.row(CHIP)["state"] == "running":
                    return
            if time.monotonic() > deadline:
                listed = stack.vtpm("list", status=None)
                raise NotSeenError(f"the stack was not whole within {BACK_S:g} s\n{listed}")


class Storm:
    """Kills and stops, until it is told to end.

    Args:
        cast: Whom.
        chance: Drawn from.
        tell: The run log.
        spares_platform: Leave launcher, manager and chip alone: what leaks has a while there.
    """

    def __init__(
        self, cast: Cast, chance: random.Random, tell: Tell, *, spares_platform: bool
    ) -> None:
        self._cast, self._chance, self._tell = cast, chance, tell
        self._spares_platform = spares_platform
        self.kills = 0
        self.stops = 0

    def run(self, is_over: Callable[[], bool]) -> None:
        """Do one thing after another."""
        while not is_over():
            self._chance.choices(
                [self._kill_some, self._stop_one, self._kill_guest, self._kill_launcher],
                [10, 4, 1, 0 if self._spares_platform else 1],
            )[0]()
            time.sleep(self._chance.uniform(*GAP_S))

    def _kill(self, *names: str) -> None:
        pids = self._cast.stack.pids()  # of those that have a process now
        found = {name: pids[name] for name in names if pids.get(name)}
        self._tell("kill", victims=sorted(found))
        for name in found.keys() & self._cast.programs.keys():
            self._cast.programs[name].announce_end_of_guest()
        kill_and_wait(*found.values())
        self.kills += len(found)

    def _kill_some(self) -> None:
        """One daemon, a pair, or all of them at once; never a guest."""
        names = [*self._cast.vtpms]
        if not self._spares_platform:
            names += [MANAGER, CHIP]
        if self._chance.random() < 0.25:  # all others come from it
            names += [FORK_SERVER]
        count = self._chance.choices([1, 2, len(names)], [6, 3, 1])[0]
        self._kill(*self._chance.sample(names, count))

    def _kill_guest(self) -> None:
        self._kill(self._chance.choice(self._cast.mortal_guests))

    def _kill_launcher(self) -> None:
        self._kill(LAUNCHER, *self._chance.choice([(), (FORK_SERVER,), (MANAGER, CHIP)]))
        self._cast.stack.vtpm("up")
        self._cast.revived()

    def _stop_one(self) -> None:
        """SIGSTOP, and SIGCONT after a while: who waits for it waits."""
        cast = self._cast
        names = [*cast.vtpm_of.values(), *cast.programs, FORK_SERVER, LAUNCHER, MANAGER, CHIP]
        name = self._chance.choice(names)
        lasts_s = self._chance.uniform(*STOP_S)
        pid = cast.stack.pids().get(name)
        self._tell("stop", victim=name, for_s=round(lasts_s, 2))
        if not pid:
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(lasts_s)
            os.kill(pid, signal.SIGCONT)
        self.stops += 1


# -- damage ----------------------------------------------------------------------------------------


def one_bit_a_stretch(content: bytes, chance: random.Random) -> bytes:
    """Flip a bit in each stretch that holds anything.

    A journal that has just begun its other half is a snapshot and a head among what is not read any
    more: each stretch is so short that one lies whole in the snapshot.
    """
    damaged = bytearray(content)
    for at in range(0, len(content), STRETCH_BYTES):
        written = [i for i in range(at, min(at + STRETCH_BYTES, len(content))) if content[i]]
        if written:
            damaged[chance.choice(written)] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut_short(content: bytes, chance: random.Random) -> bytes:
    """Keep less than a header: of a journal that has just begun, half a page is all there is."""
    return content[: chance.randrange(1, HEADER_BYTES)]


def zeros(content: bytes, _chance: random.Random) -> bytes:
    """As if it had never been written."""
    return bytes(len(content))


def noise(content: bytes, chance: random.Random) -> bytes:
    """Random bytes, as many."""
    return chance.randbytes(len(content))


DAMAGES: Final = (one_bit_a_stretch, cut_short, zeros, noise)


def write_in_place(path: Path, content: bytes) -> None:
    """Write into the same file: a journal is refused when it is another."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


class Vandal:
    """Damages files of daemons that are down for it: refused, and served again once mended.

    Args:
        cast: Whose.
        chance: Drawn from.
        tell: The run log.
    """

    def __init__(self, cast: Cast, chance: random.Random, tell: Tell) -> None:
        self._cast, self._chance, self._tell = cast, chance, tell
        self.refusals = 0

    def damage_something(self) -> None:
        """One file of one daemon.

        Raises:
            NotRefused: It was taken, or touched, or nobody said why not.
        """
        stack = self._cast.stack
        guest = self._chance.choice([*self._cast.mortal_guests, ""])
        if guest:
            vtpm = self._cast.vtpm_of[guest]
            image = stack.root / "images" / f"{vtpm}.img"
            file = self._chance.choice([image, stack.places.domain(vtpm).journal])
            with self._out_of_the_way({guest: self._cast.programs[guest]}):
                self._damage(vtpm, file)
                self._cast.programs[guest].announce_end_of_guest()  # it boots with its vTPM
        else:
            with self._out_of_the_way(self._cast.programs):
                self._damage(MANAGER, stack.image(MANAGER))

    @contextlib.contextmanager
    def _out_of_the_way(self, programs: Mapping[str, Program]) -> Iterator[None]:
        with resting(list(programs.values())):
            yield
            self._cast.until_whole()

    def _damage(self, domain: str, file: Path) -> None:
        stack = self._cast.stack
        damage = self._chance.choice(DAMAGES)
        self._tell("damage", domain=domain, file=file.name, how=damage.__name__)
        stack.vtpm("pause", domain)  # so that it is not back before its file is another
        good = file.read_bytes()
        damaged = damage(good, self._chance)
        write_in_place(file, damaged)
        kill_and_wait(stack.pid(domain))
        wait_until(
            lambda: str(stack.row(domain)["state"]).startswith("failed"),
            f"{domain} is refused, with its {file.name} {damage.__name__}",
            BACK_S,
        )
        self._check(file, damaged, str(stack.row(domain)["state"]))
        self.refusals += 1
        write_in_place(file, good)
        stack.vtpm("reboot", domain)

    def _check(self, file: Path, damaged: bytes, state: str) -> None:
        reason = state.removeprefix("failed").strip(": ")
        self._tell("refused", file=file.name, reason=reason)
        if file.name not in reason and str(file.parent) not in reason:
            raise NotRefused(f"{file} was damaged, and what is said is: {reason!r}")
        if file.read_bytes() != damaged:
            raise NotRefused(f"{file} was damaged, refused, and is not as it was left")
