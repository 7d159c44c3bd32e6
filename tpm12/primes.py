"""Prime numbers for RSA keys that OpenSSL does not make.

`cryptography` makes keys of 1024 bits and more with the exponents 3 and 65537; TPM 1.2 also asks
for smaller ones and for the exponents 5, 7, 17 and 257. The primes come from a given Rng, so the
same seed gives the same key.

Source: FIPS 186-4 Appendix B.3.3 (probable primes) for the form of candidates: random, odd, the
top two bits set, p and q not close to each other, p - 1 and q - 1 coprime to the exponent.

Invariants:
- The product of two primes made here has exactly the asked number of bits.
- No candidate is stepped on to the next prime: a rejected one is replaced by a fresh random
  number, so that no prime is likelier than another (CVE-2021-3505 was an adjusted candidate).
"""

from __future__ import annotations

import math
from typing import Final

from tpm12.ports import Rng

ROUNDS: Final = 20
"""Miller-Rabin rounds: more than FIPS 186-4 table C.2 asks for any size served here."""
_DISTANCE_BITS: Final = 100
"""|p - q| must exceed 2^(bits/2 - 100)."""


def _small_primes(limit: int) -> tuple[int, ...]:
    sieve = bytearray([1]) * limit
    sieve[0] = sieve[1] = 0
    for i in range(2, math.isqrt(limit) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, limit, i)))
    return tuple(i for i in range(limit) if sieve[i])


_SMALL: Final = _small_primes(2000)
_SMALL_PRODUCT: Final = math.prod(_SMALL)


def rsa_primes(bits: int, exponent: int, rng: Rng) -> tuple[int, int]:
    """Give two primes for an RSA modulus.

    Args:
        bits: Size of the modulus; even.
        exponent: The public exponent, odd.
        rng: Where the candidates come from.
    """
    half = bits // 2
    p = _prime(half, exponent, rng)
    while True:
        q = _prime(half, exponent, rng)
        if abs(p - q) >> max(half - _DISTANCE_BITS, 0):
            return p, q


def is_probable_prime(number: int, rng: Rng) -> bool:
    """Test a number for primality: trial division, then Miller-Rabin with random bases."""
    if number <= _SMALL[-1]:
        return number in _SMALL
    if math.gcd(number, _SMALL_PRODUCT) != 1:
        return False
    shifts = ((number - 1) & -(number - 1)).bit_length() - 1
    odd = (number - 1) >> shifts
    return all(_passes_round(number, odd, shifts, rng) for _ in range(ROUNDS))


def _passes_round(number: int, odd: int, shifts: int, rng: Rng) -> bool:
    # Eight bytes more than the number make the base's distribution as good as uniform.
    size = (number.bit_length() + 7) // 8 + 8
    base = 2 + int.from_bytes(rng.random(size), "big") % (number - 3)
    power = pow(base, odd, number)
    if power in {1, number - 1}:
        return True
    for _ in range(shifts - 1):
        power = power * power % number
        if power == number - 1:
            return True
    return False


def _prime(bits: int, exponent: int, rng: Rng) -> int:
    size = (bits + 7) // 8
    mask = (1 << bits) - 1
    # With both top bits set the product of two such numbers has twice as many bits, never one less.
    fixed = 3 << (bits - 2) | 1
    while True:
        candidate = int.from_bytes(rng.random(size), "big") & mask | fixed
        if math.gcd(candidate - 1, exponent) == 1 and is_probable_prime(candidate, rng):
            return candidate
