"""A machine whose disks lose power, fail, and forget: every state a crash could leave behind.

What a reader sees (`visible`, the page cache) and what a power cut would leave (`durable`) are kept
apart. All disks of a machine count their writes and syncs together, from 0, so that one number
names a point of a whole commit, across its disks.

- Until a sync has returned, each sector (512 bytes) of each write may be durable or not, on its
  own and in any order; and one sector may be torn: a part of it new, the rest old, or zeros.
- A sync in which the power fails may have done any part of its work.
- A write that fails may have written a part. A sync that fails may have made any part durable; the
  rest is *clean* afterwards: still visible, never written again, and the next sync says yes
  (that is what Linux does since 4.13, with the error told once).
- A process that opens the image after that reads what the medium holds, as `PosixDisk` does.
"""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum

SECTOR_BYTES = 512


class PowerLoss(BaseException):
    """The machine is off. Not an Exception: nothing in the program may survive it by catching."""


class Fault(Enum):
    """How an operation fails."""

    NOTHING_DONE = "nothing was done"
    PARTLY_DONE = "a part was done"
    DISK_FULL = "no space is left"


@dataclass(frozen=True, slots=True)
class Piece:
    """One sector of a write that is not durable yet."""

    disk: str
    offset: int
    data: bytes


@dataclass(slots=True)
class Plan:
    """What goes wrong. Operations are numbered from 0 over all disks.

    Attributes:
        power_fails_at: The operation in which the machine goes off.
        fails_at: Operations that fail, and how.
        ignores_sync: Which syncs (disk, its number on that disk) do nothing: a protection removed.
        seed: Decides which part was done where only a part was.
    """

    power_fails_at: int | None = None
    fails_at: dict[int, Fault] = field(default_factory=dict)
    ignores_sync: Callable[[str, int], bool] = lambda _disk, _number: False
    seed: int = 1


class Machine:
    """Disks with one power supply.

    Args:
        contents: What is on each disk, by name.
        plan: What goes wrong.
    """

    def __init__(self, contents: dict[str, bytes], plan: Plan | None = None) -> None:
        self.plan = plan or Plan()
        self.operations = 0
        self.log: list[str] = []
        """Every operation, as "write DISK" or "sync DISK"."""
        self.disks = {name: SimulatedDisk(self, name, data) for name, data in contents.items()}
        self._random = random.Random(self.plan.seed)

    def __getitem__(self, name: str) -> SimulatedDisk:
        return self.disks[name]

    @property
    def contents(self) -> dict[str, bytes]:
        """What a reader sees."""
        return {name: bytes(disk.visible) for name, disk in self.disks.items()}

    @property
    def durable(self) -> dict[str, bytes]:
        """What was there if nothing pending had reached the medium."""
        return {name: bytes(disk.durable) for name, disk in self.disks.items()}

    def step(self, what: str) -> Fault | None:
        """Count an operation; say how it is to fail."""
        number = self.operations
        self.operations += 1
        self.log.append(what)
        return self.plan.fails_at.get(number)

    @property
    def is_failing_now(self) -> bool:
        """Whether the power fails in the operation that was counted last."""
        return self.operations - 1 == self.plan.power_fails_at

    def some(self, pieces: list[Piece]) -> list[Piece]:
        """Some of these, as the seed has it."""
        return [piece for piece in pieces if self._random.random() < 0.5]

    # -- after a power loss

    def pending(self) -> list[Piece]:
        """What may or may not be durable, in the order in which it was written."""
        return [piece for disk in self.disks.values() for piece in disk.pending]

    def after_power_loss(self, budget: int, seed: int = 1) -> Iterator[dict[str, bytes]]:
        """Yield what the disks may hold, without repeating one.

        Args:
            budget: At most so many. All are yielded where there are no more: every choice of
                sectors, and every choice with one sector torn; else the extremes, each write as a
                whole, and then seeded choices.
            seed: Of those.
        """
        seen: set[tuple[bytes, ...]] = set()
        for chosen, torn in itertools.islice(self._choices(budget, seed), 8 * budget):
            left = self._with(chosen, torn)
            key = tuple(left.values())
            if key not in seen:
                seen.add(key)
                yield left
            if len(seen) == budget:
                return

    def _choices(self, budget: int, seed: int) -> Iterator[tuple[list[Piece], _Tear | None]]:
        pieces = self.pending()
        if 2 ** len(pieces) * (1 + len(TEARS) * len(pieces)) <= budget:
            for flags in itertools.product((False, True), repeat=len(pieces)):
                chosen = list(itertools.compress(pieces, flags))
                yield chosen, None
                for piece in pieces:
                    yield from ((chosen, _Tear(piece, tear)) for tear in TEARS)
            return
        yield [], None
        yield pieces, None
        for piece in pieces:
            yield [piece], None
            yield [other for other in pieces if other is not piece], None
        for disk, offsets in self._whole_writes():
            whole = [p for p in pieces if p.disk == disk and p.offset in offsets]
            yield whole, None
            yield [p for p in pieces if p not in whole], None
        source = random.Random(seed)
        while True:
            likely = source.choice((0.1, 0.5, 0.9))
            chosen = [piece for piece in pieces if source.random() < likely]
            is_torn = source.random() < 0.5
            yield (
                chosen,
                _Tear(source.choice(pieces), source.choice(TEARS)) if is_torn and pieces else None,
            )

    def _whole_writes(self) -> list[tuple[str, set[int]]]:
        """Runs of neighbouring pending sectors: pages, slots, markers."""
        runs: list[tuple[str, set[int]]] = []
        for name, disk in self.disks.items():
            last = None
            for piece in disk.pending:
                if last is None or piece.offset != last + SECTOR_BYTES or not piece.offset % 4096:
                    runs.append((name, set()))
                runs[-1][1].add(piece.offset)
                last = piece.offset
        return runs

    def _with(self, chosen: list[Piece], torn: _Tear | None) -> dict[str, bytes]:
        left = {name: bytearray(disk.durable) for name, disk in self.disks.items()}
        kept = {id(piece) for piece in chosen}
        for piece in self.pending():
            disk = left[piece.disk]
            place = slice(piece.offset, piece.offset + len(piece.data))
            if torn is not None and piece is torn.piece:
                disk[place] = torn.tear(bytes(disk[place]), piece.data)
            elif id(piece) in kept:
                disk[place] = piece.data
        return {name: bytes(data) for name, data in left.items()}


Tear = Callable[[bytes, bytes], bytes]
TEARS: tuple[Tear, ...] = (
    lambda old, new: new[: len(new) // 3] + old[len(new) // 3 :],
    lambda old, new: old[: -len(new) // 3] + new[-len(new) // 3 :],
    lambda _old, new: bytes(len(new)),
)


@dataclass(frozen=True, slots=True)
class _Tear:
    piece: Piece
    tear: Tear


class SimulatedDisk:
    """One disk of a machine; it is a `daemons.disk.Disk`."""

    def __init__(self, machine: Machine, name: str, contents: bytes) -> None:
        self._machine = machine
        self._name = name
        self.visible = bytearray(contents)
        self.durable = bytearray(contents)
        self.pending: list[Piece] = []
        self.writes = self.syncs = self.reads = self.bytes_written = 0

    @property
    def name(self) -> str:
        return self._name

    @property
    def size(self) -> int:
        return len(self.visible)

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if offset + length > len(self.visible):
            raise OSError(errno.EIO, "the image ends before", self._name)
        return bytes(self.visible[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.visible):
            raise OSError(errno.ENOSPC, "past the end of the image", self._name)
        fault = self._machine.step(f"write {self._name}")
        if fault is Fault.DISK_FULL:
            raise OSError(errno.ENOSPC, "no space left on device", self._name)
        if fault is Fault.NOTHING_DONE:
            raise OSError(errno.EIO, "input/output error", self._name)
        pieces = _sectors(self._name, offset, data)
        if fault is Fault.PARTLY_DONE:
            pieces = pieces[: (len(pieces) + 1) // 2]
        self.writes += 1
        self.bytes_written += len(data)
        for piece in pieces:
            self.visible[piece.offset : piece.offset + len(piece.data)] = piece.data
        self.pending += pieces
        if fault is Fault.PARTLY_DONE:
            raise OSError(errno.EIO, "input/output error", self._name)
        if self._machine.is_failing_now:
            raise PowerLoss

    def sync(self) -> None:
        fault = self._machine.step(f"sync {self._name}")
        if self._machine.is_failing_now:
            raise PowerLoss  # which part of its work it has done is among the choices
        self.syncs += 1
        if fault is not None:
            self._lose(self._machine.some(self.pending) if fault is Fault.PARTLY_DONE else [])
            raise OSError(errno.EIO, "input/output error", self._name)
        if not self._machine.plan.ignores_sync(self._name, self.syncs - 1):
            self._lose(self.pending)

    def close(self) -> None:
        """Nothing: another process may open it."""

    def open_again(self) -> SimulatedDisk:
        """What the next process gets: what is dirty is written, what is clean is read anew."""
        if not self._machine.plan.ignores_sync(self._name, -1):
            self._lose(self.pending)
        self.visible[:] = self.durable
        for piece in self.pending:
            self.visible[piece.offset : piece.offset + len(piece.data)] = piece.data
        return self

    def _lose(self, kept: list[Piece]) -> None:
        """Nothing is pending any more: some of it is durable, the rest was given up."""
        for piece in kept:
            self.durable[piece.offset : piece.offset + len(piece.data)] = piece.data
        self.pending = []


def _sectors(disk: str, offset: int, data: bytes) -> list[Piece]:
    pieces = []
    at = 0
    while at < len(data):
        length = min(SECTOR_BYTES - (offset + at) % SECTOR_BYTES, len(data) - at)
        pieces.append(Piece(disk, offset + at, data[at : at + length]))
        at += length
    return pieces
