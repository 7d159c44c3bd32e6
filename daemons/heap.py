"""Freed memory, given back to the system.

glibc keeps what a burst of connections has used and freed, megabytes of it, until more than a limit
of its own making is free at the end of the heap. Nothing leaks, but whoever watches the daemon
cannot tell that from a leak.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final

import trio

GIVE_BACK_S: Final = 2.0
"""From the end of a connection until its memory goes back to the system."""


def _malloc_trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library, which has its own ways
        return lambda _: 0


_TRIM: Final = _malloc_trim()


def give_back() -> None:
    """Let the system have the free pages of the heap (malloc_trim(3)); 0.15 ms for each MiB."""
    _TRIM(0)


class AfterBursts:
    """Gives back what connections used that ended in the last moments, all of it at once.

    Args:
        nursery: Where it waits for the moment.
        stopping: Does not let it wait any longer.
    """

    def __init__(self, nursery: trio.Nursery, stopping: trio.Event) -> None:
        self._nursery = nursery
        self._stopping = stopping
        self._is_due = False

    def connection_ended(self) -> None:
        """Call it when one did."""
        if not self._is_due:
            self._is_due = True
            self._nursery.start_soon(self._give_back_soon)

    async def _give_back_soon(self) -> None:
        with trio.move_on_after(GIVE_BACK_S):
            await self._stopping.wait()
        self._is_due = False
        give_back()
