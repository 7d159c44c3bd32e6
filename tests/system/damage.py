"""Which files an installation has, and what can happen to them; for the damage matrix."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from daemons.launcher.last_domid import COUNTER_NAME
from tests.system.scratch_stack import (
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    VTPM2,
    Said,
    ScratchStack,
)

CHIP: Final = "hwtpm"
LAUNCHER: Final = "Domain-0"
PAGE_BYTES: Final = 4096
DOWN, RESTARTING, RUNNING = "down", "restarting", "running"
Where = Callable[[ScratchStack], Path]
STATUSES: Final = {65, 66, 69, 74, 77, 78}
"""Of refusals: damaged, not there, unavailable, disk, permission, configuration. Never a bug."""


@dataclass(frozen=True)
class StoredFile:
    """A kind of file.

    Attributes:
        where: Its path.
        owner: Whose restart reads it.
        states: In which states of the stack it is there.
        other: The same kind of file of another domain.
        is_written: By the stack; else only people write it.
        is_stranger: Nothing of the stack's; it is put there for a cell.
        has_meaning: For the stack; nobody but a person reads the others.
    """

    where: Where
    owner: str
    states: tuple[str, ...] = (DOWN, RESTARTING, RUNNING)
    other: Where | None = None
    is_written: bool = True
    is_stranger: bool = False
    has_meaning: bool = True


_RUN: Final = (RESTARTING, RUNNING)


def _of(domain: str, name: str) -> Where:
    return lambda stack: stack.places.domain(domain).directory / name


def _record(name: str) -> Where:
    return lambda stack: stack.places.registry / f"{name}.json"


def _log(name: str) -> Where:
    return lambda stack: stack.places.log_dir / f"{name}.log"


FILES: Final[dict[str, StoredFile]] = {
    "chip memory": StoredFile(lambda stack: stack.places.chip_memory, CHIP),
    "manager image": StoredFile(
        lambda stack: stack.image(MANAGER), MANAGER, other=lambda stack: stack.image(VTPM2)
    ),
    "vTPM image": StoredFile(
        lambda stack: stack.image(VTPM1), VTPM1, other=lambda stack: stack.image(VTPM2)
    ),
    "guest image": StoredFile(
        lambda stack: stack.image(GUEST1),
        GUEST1,
        other=lambda stack: stack.image(VTPM2),
        is_written=False,
    ),
    "settings": StoredFile(
        lambda stack: stack.places.settings("launcherd"), LAUNCHER, is_written=False
    ),
    "policy": StoredFile(lambda stack: stack.places.policy, LAUNCHER, is_written=False),
    "manager settings": StoredFile(
        lambda stack: stack.places.settings("vtpmmgrd"), MANAGER, is_written=False
    ),
    "chip journal": StoredFile(_of(CHIP, "journal"), CHIP, _RUN, _of(VTPM1, "journal")),
    "vTPM journal": StoredFile(_of(VTPM1, "journal"), VTPM1, _RUN, _of(VTPM2, "journal")),
    "manager journal": StoredFile(_of(MANAGER, "journal"), MANAGER, _RUN, _of(VTPM2, "journal")),
    "vTPM record": StoredFile(_record(VTPM1), LAUNCHER, _RUN, _record(VTPM2)),
    "guest record": StoredFile(_record(GUEST1), LAUNCHER, _RUN, _record(GUEST2)),
    "chip record": StoredFile(_record(CHIP), LAUNCHER, _RUN, _record(VTPM2)),
    "launcher lock": StoredFile(
        lambda stack: stack.places.registry / "launcher.lock", LAUNCHER, _RUN, _record(VTPM2)
    ),
    "last domid": StoredFile(lambda stack: stack.places.registry / COUNTER_NAME, LAUNCHER, _RUN),
    "power mark": StoredFile(lambda stack: stack.places.run / "powered", LAUNCHER, _RUN),
    "ready mark": StoredFile(_of(VTPM1, "ready"), LAUNCHER, _RUN),
    "config": StoredFile(_of(VTPM1, "domain.cfg"), LAUNCHER, _RUN, _of(VTPM2, "domain.cfg")),
    "event log": StoredFile(lambda stack: stack.places.event_log, LAUNCHER, _RUN),
    "measurements": StoredFile(
        _of(GUEST1, "measurements.json"), GUEST1, _RUN, _of(GUEST2, "measurements.json")
    ),
    "manager requests": StoredFile(_of(MANAGER, "requests"), MANAGER, _RUN, _of(VTPM2, "journal")),
    "own ready mark": StoredFile(_of(VTPM1, "ready"), VTPM1, (RESTARTING,)),
    "launcher log": StoredFile(_log("launcher"), LAUNCHER, has_meaning=False),
    "vTPM log": StoredFile(_log(VTPM1), VTPM1, has_meaning=False),
    "begun record": StoredFile(
        lambda stack: stack.places.registry / f".{VTPM1}.json.new",
        VTPM1,
        _RUN,
        is_stranger=True,
        has_meaning=False,
    ),
    "begun config": StoredFile(
        _of(VTPM1, "domain.cfg.new"), VTPM1, _RUN, is_stranger=True, has_meaning=False
    ),
    "stranger in the registry": StoredFile(
        _record("stranger"), LAUNCHER, _RUN, is_stranger=True, has_meaning=False
    ),
    "stranger with a guest": StoredFile(
        _of(GUEST1, "stranger"), GUEST1, _RUN, is_stranger=True, has_meaning=False
    ),
}


# -- damage ----------------------------------------------------------------------------------------


@dataclass
class Damaged:
    """A file that something has happened to.

    Attributes:
        path: The file.
        good: What it held.
    """

    path: Path
    good: bytes
    _mode: int
    _kept: Path = field(init=False)

    def __post_init__(self) -> None:
        self._kept = self.path.with_name(f".{self.path.name}.kept")

    @property
    def second_name(self) -> Path:
        """Beside it, and no name that anybody looks for."""
        return self.path.with_name(f".{self.path.name}.second")

    def write(self, content: bytes) -> None:
        """Other contents in the same file."""
        with self.path.open("r+b") as file:
            file.write(content)
            file.truncate()

    def put_aside(self) -> Path:
        """Make room for something else; the file itself is kept."""
        self.path.rename(self._kept)
        return self._kept

    def accept(self) -> None:
        """What is in the file now is right: it was gone on with."""
        for path in (self._kept, self.path):
            if path.is_file():
                self.good = path.read_bytes()
                return

    def undo(self) -> None:
        """The file as it was: the same inode with the same contents."""
        self.second_name.unlink(missing_ok=True)
        if not os.path.lexists(self._kept) and not self.path.is_file():
            return  # one of the run directory, which went with the stack
        if self._kept.exists():
            if self.path.is_dir() and not self.path.is_symlink():
                shutil.rmtree(self.path)
            else:
                self.path.unlink(missing_ok=True)
            self._kept.rename(self.path)
        self.path.chmod(self._mode)
        self.write(self.good)


def look_at(path: Path) -> tuple[object, ...]:
    """What stands at a path, to see that it stays: kind, mode, target or contents."""
    if not os.path.lexists(path):
        return ()
    status = path.lstat()
    if path.is_symlink():
        return status.st_mode, str(path.readlink())
    if path.is_file():
        return status.st_mode, path.read_bytes()
    if path.is_dir():
        return status.st_mode, sorted(path.iterdir())
    return (status.st_mode,)


Damage = Callable[[Damaged, random.Random, bytes, bytes], None]
"""Called with the file, chance, an older copy and the other domain's file (or nothing)."""


def flipped(file: Damaged, chance: random.Random, _older: bytes, _other: bytes) -> None:
    """One bit of each page that holds anything."""
    content = bytearray(file.good)
    for at in range(0, len(content), PAGE_BYTES):
        written = [i for i in range(at, min(at + PAGE_BYTES, len(content))) if content[i]]
        if written:
            content[chance.choice(written)] ^= 1 << chance.randrange(8)
    file.write(bytes(content))


def one_bit(file: Damaged, chance: random.Random, _older: bytes, _other: bytes) -> None:
    """A single bit."""
    content = bytearray(file.good)
    written = [i for i, byte in enumerate(content) if byte]
    if written:
        content[chance.choice(written)] ^= 1 << chance.randrange(8)
    file.write(bytes(content))


def truncated(file: Damaged, chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Cut off somewhere, in a page or before."""
    file.write(file.good[: chance.choice((0, 1, len(file.good) // 2, max(0, len(file.good) - 1)))])


def zeroed(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Nothing but zeros."""
    file.write(bytes(len(file.good)))


def noise(file: Damaged, chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Random bytes."""
    file.write(chance.randbytes(len(file.good)))


def swapped(file: Damaged, _chance: random.Random, _older: bytes, other: bytes) -> None:
    """The other domain's contents."""
    file.write(other)


def older(file: Damaged, _chance: random.Random, older: bytes, _other: bytes) -> None:
    """An older copy of itself."""
    file.write(older)


def gone(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Not there."""
    file.put_aside()


def open_to_all(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Others may have written it."""
    file.path.chmod(0o666)


def unreadable(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """Nobody may read it; root may."""
    file.path.chmod(0)


def symbolic_link(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """A link to the file itself, elsewhere."""
    file.path.symlink_to(file.put_aside())


def hard_link(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """A second name, under which somebody may still have it open."""
    os.link(file.path, file.second_name)


def fifo(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """A FIFO, on which an open may wait for ever."""
    file.put_aside()
    os.mkfifo(file.path, 0o600)


def directory(file: Damaged, _chance: random.Random, _older: bytes, _other: bytes) -> None:
    """A directory."""
    file.put_aside()
    file.path.mkdir(mode=0o700)


DAMAGES: Final[dict[str, Damage]] = {
    damage.__name__: damage
    for damage in (
        flipped,
        one_bit,
        truncated,
        zeroed,
        noise,
        swapped,
        older,
        gone,
        open_to_all,
        unreadable,
        symbolic_link,
        hard_link,
        fifo,
        directory,
    )
}


CONTENTS: Final = {"flipped", "one_bit", "truncated", "zeroed", "swapped", "older"}
"""Damages that say nothing about a file whose contents mean nothing."""


def check_said(said: Said) -> str:
    """A subcommand that did not do it has to say why."""
    assert said.status in STATUSES, said
    assert said.what, said
    assert said.why, said
    assert said.next_step, said
    assert "Traceback" not in said.err
    return str(said)


@contextlib.contextmanager
def there(file: StoredFile, path: Path) -> Iterator[None]:
    """A stranger is put there, and taken away after the block; all else is there anyway."""
    if file.is_stranger:
        path.write_bytes(b"nobody knows me")
    try:
        yield
    finally:
        if file.is_stranger:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def watched(path: Path) -> Iterator[Damaged]:
    """A file to be damaged; it is as it was after the block."""
    file = Damaged(path, path.read_bytes(), path.stat().st_mode & 0o7777)
    try:
        yield file
    finally:
        file.undo()
