"""A disk that loses power, fails, and shows every state a crash could leave behind.

What a reader sees (`visible`) and what a power cut would leave (`durable`) are kept apart. Writes
since the last sync are pending; after a crash each of them, independently and in any order, may be
lost, kept, torn at several places, or half overwritten with zeros. `disks_after_power_loss` yields
all combinations.

Operations are counted from 0: every write and every sync is one.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable, Iterator


class PowerLoss(BaseException):
    """The machine is off. Not an Exception: nothing in the program may survive it by catching."""


Fate = Callable[[bytes, bytes], bytes]
"""What a pending write leaves, given the old and the new bytes of its place."""


def _prefix(cut: int) -> Fate:
    return lambda old, new: new[:cut] + old[cut:]


def _suffix(cut: int) -> Fate:
    return lambda old, new: old[:cut] + new[cut:]


LOST: Fate = lambda old, _new: old  # noqa: E731
KEPT: Fate = lambda _old, new: new  # noqa: E731
HALF_ZEROED: Fate = lambda _old, new: bytes(len(new) // 2) + new[len(new) // 2 :]  # noqa: E731
EVERY_FATE: tuple[Fate, ...] = (
    LOST,
    KEPT,
    _prefix(512),
    _prefix(2048),
    _prefix(4095),
    _suffix(2048),
    HALF_ZEROED,
)


class FaultyDisk:
    """A disk in memory.

    Args:
        contents: What is on it.
        lose_power_at: The operation in which the power fails: a write then is pending, a sync has
            not happened.
        fail_at: Operations that raise OSError (EIO) instead of happening.
        ignored_syncs: Which syncs (counted on their own from 0) return without doing anything: how
            a control takes a protection away.
    """

    name = "a faulty disk"

    def __init__(
        self,
        contents: bytes,
        *,
        lose_power_at: int | None = None,
        fail_at: frozenset[int] = frozenset(),
        ignored_syncs: Callable[[int], bool] = lambda _number: False,
    ) -> None:
        self.visible = bytearray(contents)
        self.durable = bytearray(contents)
        self.pending: list[tuple[int, bytes]] = []
        self.operations = 0
        self.reads = 0
        self.writes = 0
        self.syncs = 0
        self.lose_power_at = lose_power_at
        self.fail_at = fail_at
        self.ignored_syncs = ignored_syncs

    @property
    def size(self) -> int:
        return len(self.visible)

    def read(self, offset: int, length: int) -> bytes:
        self.reads += 1
        if offset + length > len(self.visible):
            raise OSError(errno.EIO, "past the end")
        return bytes(self.visible[offset : offset + length])

    def write(self, offset: int, data: bytes) -> None:
        if offset + len(data) > len(self.visible):
            raise OSError(errno.ENOSPC, "past the end")
        number = self._count()
        self.writes += 1
        self.visible[offset : offset + len(data)] = data
        self.pending.append((offset, data))
        if number == self.lose_power_at:
            raise PowerLoss

    def sync(self) -> None:
        number = self._count()
        if number == self.lose_power_at:
            raise PowerLoss
        self.syncs += 1
        if self.ignored_syncs(self.syncs - 1):
            return
        self.durable[:] = self.visible
        self.pending.clear()

    def close(self) -> None:
        pass

    def _count(self) -> int:
        number = self.operations
        self.operations += 1
        if number in self.fail_at:
            raise OSError(errno.EIO, "injected")
        return number

    def disks_after_power_loss(self, fates: tuple[Fate, ...] = EVERY_FATE) -> Iterator[bytes]:
        """Yield each disk that the crash could have left, without repeating one."""
        seen: set[bytes] = set()
        for chosen in itertools.product(fates, repeat=len(self.pending)):
            disk = bytearray(self.durable)
            for fate, (offset, data) in zip(chosen, self.pending, strict=True):
                place = slice(offset, offset + len(data))
                disk[place] = fate(bytes(disk[place]), data)
            left = bytes(disk)
            if left not in seen:
                seen.add(left)
                yield left
