"""A lock that is given to its waiters in the order in which they came.

`threading.Lock` lets whoever is quickest have it, so one busy thread can keep the others out.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import Self


class FairLock:
    """First come, first served; not re-entrant. Released by handing it to the next waiter."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._is_held = False
        self._waiting: deque[threading.Lock] = deque()

    def acquire(self) -> bool:
        """Take the lock, waiting for our turn.

        Returns:
            Whether it was necessary to wait.
        """
        with self._guard:
            if not self._is_held:
                self._is_held = True
                return False
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        turn.acquire()
        return True

    def try_acquire(self) -> bool:
        """Take the lock if that needs no waiting; say whether it was taken."""
        with self._guard:
            if self._is_held:
                return False
            self._is_held = True
            return True

    def release(self) -> None:
        """Give the lock to whoever waits longest."""
        with self._guard:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._is_held = False

    @property
    def waiting_count(self) -> int:
        """How many wait; for status and tests."""
        return len(self._waiting)

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
