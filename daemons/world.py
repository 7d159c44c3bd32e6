"""The system's own randomness and clock, for an engine."""

from __future__ import annotations

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
