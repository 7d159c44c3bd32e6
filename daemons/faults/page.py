"""A page of counters that a daemon and whoever injects faults into it have in common.

    magic 8 | generation, pid, ring, ring sent, tis, tis sent, disk: u64 each

Generation 0 means that nothing is counted and nothing happens; another one, that the plan was
written anew. It is a mapped file, so a killed daemon's counts are there for the next one, and each
number counts once.
"""

from __future__ import annotations

import mmap
import struct
from typing import Final

from daemons.faults.hooks import PAGE_BYTES

MAGIC: Final = b"VTPMFLT1"
_U64: Final = struct.Struct("<Q")
_GENERATION, _PID, _COUNTS = 8, 16, 24
RING: Final = "ring"
TIS: Final = "tis"
DISK: Final = "disk"
SENT: Final = " sent"
_SLOTS: Final = (RING, RING + SENT, TIS, TIS + SENT, DISK)
"""What is counted: messages in both directions, those sent alone, writes and syncs."""


class Page:
    """One daemon's counters.

    Args:
        descriptor: Of the file, open for reading and writing; it may be closed afterwards.
    """

    def __init__(self, descriptor: int) -> None:
        self._map = mmap.mmap(descriptor, PAGE_BYTES)
        if self._map[: len(MAGIC)] == bytes(len(MAGIC)):
            self._map[: len(MAGIC)] = MAGIC

    @property
    def generation(self) -> int:
        """Which plan counts; 0: none."""
        return self._get(_GENERATION)

    @property
    def pid(self) -> int:
        """The process that has hooks, or the last one that had; 0: none yet."""
        return self._get(_PID)

    @pid.setter
    def pid(self, pid: int) -> None:
        self._put(_PID, pid)

    def arm(self, generation: int) -> None:
        """Count from 0 on, for a plan that was written before."""
        self._put(_GENERATION, 0)
        for slot in _SLOTS:
            self._put(_at(slot), 0)
        self._put(_GENERATION, generation)

    def disarm(self) -> None:
        """Let nothing happen any more."""
        self._put(_GENERATION, 0)

    def count(self, slot: str) -> int:
        """Count one more, and say the how-manieth it is."""
        number = self.counted(slot) + 1
        self._put(_at(slot), number)
        return number

    def counted(self, slot: str) -> int:
        """How many there were."""
        return self._get(_at(slot))

    def close(self) -> None:
        """Let the page go."""
        self._map.close()

    def _get(self, offset: int) -> int:
        (value,) = _U64.unpack_from(self._map, offset)
        assert isinstance(value, int)
        return value

    def _put(self, offset: int, value: int) -> None:
        _U64.pack_into(self._map, offset, value)


def _at(slot: str) -> int:
    return _COUNTS + _U64.size * _SLOTS.index(slot)
