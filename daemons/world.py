"""Randomness and clocks for an engine: the system's own, and what makes them fit."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Final

from tpm12.ports import Clock

_NONCE_BYTES: Final = 20
_NONCES_DRAWN: Final = 32
"""How many nonces are asked of the kernel at once: 0.1 us for each instead of 0.5."""


class SystemRng:
    """The kernel's random bytes.

    Every command with authorization takes a nonce, so those are drawn in stock. A nonce is taken
    out of the stock when it is given: it is given once, and the stock keeps nothing of it. A child
    that is forked begins without stock. Longer strings (keys, TPM_GetRandom) are drawn as asked.
    """

    __slots__ = ("_nonces",)

    def __init__(self) -> None:
        self._nonces: list[bytes] = []
        os.register_at_fork(after_in_child=self._nonces.clear)

    def random(self, size: int, /) -> bytes:
        """Give `size` bytes."""
        if size > _NONCE_BYTES:
            return os.urandom(size)
        try:
            nonce = self._nonces.pop()
        except IndexError:
            nonce = self._draw()
        return nonce if size == _NONCE_BYTES else nonce[:size]

    def _draw(self) -> bytes:
        """Draw a stock of nonces, and one to give."""
        drawn = os.urandom(_NONCE_BYTES * (_NONCES_DRAWN + 1))
        nonces = [drawn[i : i + _NONCE_BYTES] for i in range(0, len(drawn), _NONCE_BYTES)]
        self._nonces += nonces[1:]
        return nonces[0]

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


class SteadyClock:
    """A clock that never steps back, whatever the one below does.

    A tick counter that stepped back would give a tick stamp twice, and a lockout would begin anew.
    Where the clock below steps back, time goes on from where it was.

    Args:
        clock: The one below.
        least_us: What has been shown before, by an earlier process for instance.
    """

    __slots__ = ("_clock", "_last_us", "_offset_us")

    def __init__(self, clock: Clock, least_us: int = 0) -> None:
        self._clock = clock
        self._last_us = least_us
        self._offset_us = 0

    def now_us(self) -> int:
        """Give microseconds since some fixed moment."""
        now_us = self._clock.now_us() + self._offset_us
        if now_us < self._last_us:
            self._offset_us += self._last_us - now_us
            return self._last_us
        self._last_us = now_us
        return now_us


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
