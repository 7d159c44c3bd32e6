"""A page of counters that a daemon and whoever injects faults into it have in common.

    magic 8 | generation, pid, begun (us) | counts of messages, steps and readings
    the clock: offset (us), from (us), until (us), speed (a double)
    the chip: busy until (us), seized until (us), by which locality + 1
    from 4096 on, for each fault of the plan: how often it was due, u32

u64 each where nothing else is said; moments are those of CLOCK_MONOTONIC. Generation 0 means that
nothing is counted and nothing happens; another one, that the plan was written anew. It is a mapped
file, so a killed daemon's counts, clock and chip are there for the next one, and each number counts
once.
"""

from __future__ import annotations

import mmap
import struct
import time
from dataclasses import dataclass
from typing import Final

from daemons.faults.hooks import PAGE_BYTES
from daemons.faults.plan import AT_ACCESSES, Fault, What

MAGIC: Final = b"VTPMFLT2"
_U64: Final = struct.Struct("<Q")
_I64: Final = struct.Struct("<q")
_DOUBLE: Final = struct.Struct("<d")
_U32: Final = struct.Struct("<I")
_GENERATION, _PID, _BEGUN, _COUNTS = 8, 16, 24, 32
_CLOCK_OFFSET, _CLOCK_FROM, _CLOCK_UNTIL, _CLOCK_SPEED = 512, 520, 528, 536
_BUSY_UNTIL, _SEIZED_UNTIL, _SEIZED_BY = 544, 552, 560
_TURNS: Final = 4096
RING: Final = "ring"
TIS: Final = "tis"
DISK: Final = "disk"
SENT: Final = " sent"
CLOCK: Final = "clock"
_SLOTS: Final = (RING, RING + SENT, TIS, TIS + SENT, DISK, CLOCK)
"""What is counted: messages in both directions, those sent alone, writes and syncs, readings."""


@dataclass(frozen=True, slots=True)
class ClockState:
    """How a clock goes: so far from the right time, and since when and until when at what speed."""

    offset_us: int = 0
    from_us: int = 0
    until_us: int = 0
    speed: float = 1.0


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

    @property
    def begun_us(self) -> int:
        """When the plan began to count."""
        return self._get(_BEGUN)

    @property
    def clock(self) -> ClockState:
        """How this daemon's clock goes."""
        (offset_us,) = _I64.unpack_from(self._map, _CLOCK_OFFSET)
        (speed,) = _DOUBLE.unpack_from(self._map, _CLOCK_SPEED)
        from_us, until_us = self._get(_CLOCK_FROM), self._get(_CLOCK_UNTIL)
        return ClockState(offset_us, from_us, until_us, speed if until_us else 1.0)

    @clock.setter
    def clock(self, state: ClockState) -> None:
        _I64.pack_into(self._map, _CLOCK_OFFSET, state.offset_us)
        self._put(_CLOCK_FROM, state.from_us)
        self._put(_CLOCK_UNTIL, state.until_us)
        _DOUBLE.pack_into(self._map, _CLOCK_SPEED, state.speed)

    @property
    def busy_until_us(self) -> int:
        """Until when the chip is busy."""
        return self._get(_BUSY_UNTIL)

    @busy_until_us.setter
    def busy_until_us(self, moment_us: int) -> None:
        self._put(_BUSY_UNTIL, moment_us)

    @property
    def seizure(self) -> tuple[int, int] | None:
        """Which locality has seized the chip on purpose, and until when."""
        by = self._get(_SEIZED_BY)
        return (by - 1, self._get(_SEIZED_UNTIL)) if by else None

    @seizure.setter
    def seizure(self, seizure: tuple[int, int] | None) -> None:
        by, until_us = (seizure[0] + 1, seizure[1]) if seizure else (0, 0)
        self._put(_SEIZED_UNTIL, until_us)
        self._put(_SEIZED_BY, by)

    def turns(self, fault: int) -> int:
        """How often a fault was due, by its number in the plan."""
        (turns,) = _U32.unpack_from(self._map, _TURNS + _U32.size * (fault - 1))
        assert isinstance(turns, int)
        return turns

    def set_turns(self, fault: int, turns: int) -> None:
        """Say how often a fault was due."""
        _U32.pack_into(self._map, _TURNS + _U32.size * (fault - 1), turns)

    def arm(self, generation: int) -> None:
        """Count from 0 on, for a plan that was written before."""
        self._put(_GENERATION, 0)
        for slot in _SLOTS:
            self._put(_at(slot), 0)
        self._map[_TURNS:] = bytes(PAGE_BYTES - _TURNS)
        self._put(_BEGUN, now_us())
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

    def operations(self, fault: Fault) -> int:
        """How many there were at which a fault could be."""
        kind = fault.where.kind
        if fault.what is What.LOST_RESPONSE:
            return self.counted(kind + SENT)
        if fault.what in AT_ACCESSES:
            return self.counted(kind) - self.counted(kind + SENT)
        return self.counted(kind)

    def close(self) -> None:
        """Let the page go."""
        self._map.close()

    def _get(self, offset: int) -> int:
        (value,) = _U64.unpack_from(self._map, offset)
        assert isinstance(value, int)
        return value

    def _put(self, offset: int, value: int) -> None:
        _U64.pack_into(self._map, offset, value)


def now_us() -> int:
    """This moment, as pages have it."""
    return time.monotonic_ns() // 1000


def _at(slot: str) -> int:
    return _COUNTS + _U64.size * _SLOTS.index(slot)
