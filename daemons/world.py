"""The system's own randomness and clock, for an engine."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path


class SystemRng:
    """The kernel's random bytes."""

    __slots__ = ()

    def random(self, size: int, /) -> bytes:
        """Give `size` bytes."""
        return os.urandom(size)

    def stir(self, data: bytes, /) -> None:
        """Mix bytes into the kernel's pool, which does not trust them for more than they are."""
        with Path("/dev/urandom").open("wb", buffering=0) as pool:
            pool.write(data)


class SystemClock:
    """The machine's clock since boot: never steps back, does not depend on the date."""

    __slots__ = ()

    def now_us(self) -> int:
        """Give microseconds since some fixed moment."""
        return time.monotonic_ns() // 1000


class SeededRng:
    """The same bytes for the same seed, for a TPM whose run can be repeated. Never for secrets.

    Args:
        seed: Any number.
    """

    __slots__ = ("_counter", "_key")

    def __init__(self, seed: int) -> None:
        self._key = hashlib.sha256(b"vtpm simulator seed " + str(seed).encode()).digest()
        self._counter = 0

    def random(self, size: int, /) -> bytes:
        """Give `size` bytes."""
        self._counter += 1
        return hashlib.shake_256(self._key + self._counter.to_bytes(8, "big")).digest(size)

    def stir(self, data: bytes, /) -> None:
        """Mix bytes in; the run stays repeatable if they are."""
        self._key = hashlib.sha256(self._key + data).digest()
