"""Freed memory, given back to the system.

glibc keeps what a burst of connections has used and freed, megabytes of it, until more than a limit
of its own making is free at the end of the heap. Nothing leaks, but whoever watches the daemon
cannot tell that from a leak.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Final


def _malloc_trim() -> Callable[[int], int]:
    try:
        return ctypes.CDLL(None).malloc_trim
    except AttributeError:  # another C library, which has its own ways
        return lambda _: 0


_TRIM: Final = _malloc_trim()


def give_back() -> None:
    """Let the system have the free pages of the heap (malloc_trim(3)); some 0.1 ms."""
    _TRIM(0)
