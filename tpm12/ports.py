"""What an engine needs from outside: randomness, a clock and RSA keys.

They are passed in, so that the same seed gives the same run. The system's own are at the end of
`crypto.py` (keys) and in the daemons (randomness, clock).
"""

from __future__ import annotations

from typing import Protocol


class Rng(Protocol):
    """A source of random bytes fit for keys and nonces."""

    def random(self, size: int, /) -> bytes:
        """Give `size` bytes."""
        ...


class StirrableRng(Rng, Protocol):
    """What an engine needs of it: TPM_StirRandom gives bytes back."""

    def stir(self, data: bytes, /) -> None:
        """Mix bytes of unknown worth into the source; it must not get worse by them."""
        ...


class Clock(Protocol):
    """A clock that never steps back while the machine runs."""

    def now_us(self) -> int:
        """Give microseconds since some fixed moment."""
        ...


class KeyGenerator(Protocol):
    """Makes RSA keys."""

    def primes(self, bits: int, exponent: int, /) -> tuple[int, int]:
        """Give two primes for a modulus of exactly `bits` bits, fit for `exponent`."""
        ...
