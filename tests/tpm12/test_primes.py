"""Prime numbers for unusual RSA keys: their form, and what is not taken for a prime."""

import math

import pytest

from tests.tpm12.conftest import CountingRng
from tpm12 import primes
from tpm12.primes import is_probable_prime, rsa_primes

# Carmichael numbers and strong pseudoprimes to the first bases (OEIS A014233).
LIARS = [561, 1105, 6601, 2047, 1373653, 25326001, 3215031751, 3825123056546413051]
PRIMES = [2, 3, 5, 1999, 2003, 104729, 2**61 - 1, 2**127 - 1, 2**521 - 1]
COMPOSITES = [0, 1, 4, 9, 1997 * 1999, 2003 * 2011, 2**67 - 1, (2**61 - 1) * (2**31 - 1)]


@pytest.fixture
def rng():
    return CountingRng(b"primes")


@pytest.mark.parametrize("number", PRIMES)
def test_primes_are_prime(rng, number):
    assert is_probable_prime(number, rng)


@pytest.mark.parametrize("number", [*LIARS, *COMPOSITES])
def test_composites_are_not(rng, number):
    assert not is_probable_prime(number, rng)


def test_every_small_number_is_told_right(rng):
    sieve = [n for n in range(5000) if n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))]
    assert [n for n in range(5000) if is_probable_prime(n, rng)] == sieve


def test_miller_rabin_alone_unmasks_liars(rng, monkeypatch):
    """The control of the trial division: without it the rounds still find out."""
    monkeypatch.setattr(primes, "_SMALL", (2, 3))
    monkeypatch.setattr(primes, "_SMALL_PRODUCT", 6)
    assert not any(is_probable_prime(number, rng) for number in LIARS)


@pytest.mark.parametrize("exponent", [3, 5, 7, 17, 257, 65537])
@pytest.mark.parametrize("bits", [512, 528, 768, 1008])
def test_rsa_primes_have_the_form_that_is_asked(rng, bits, exponent):
    p, q = rsa_primes(bits, exponent, rng)
    assert (p * q).bit_length() == bits
    for prime in (p, q):
        assert prime.bit_length() == bits // 2
        assert prime >> (bits // 2 - 2) == 3
        assert math.gcd(prime - 1, exponent) == 1
        assert is_probable_prime(prime, rng)
    assert abs(p - q) >> (bits // 2 - 100)


def test_rsa_primes_follow_the_rng():
    pairs = [rsa_primes(512, 65537, CountingRng(seed)) for seed in (b"1", b"1", b"2")]
    assert pairs[0] == pairs[1] != pairs[2]


def test_rsa_primes_share_no_factors(rng):
    made = [prime for _ in range(30) for prime in rsa_primes(512, 65537, rng)]
    assert len(set(made)) == len(made)


class FirstTwice(CountingRng):
    """Gives the first candidate for p again as the first for q."""

    def __init__(self, prime):
        super().__init__()
        self._first = [prime, prime]

    def random(self, size, /):
        if self._first and size == 32:
            return self._first.pop().to_bytes(size, "big")
        return super().random(size)


def test_equal_primes_are_drawn_again(rng):
    prime, _ = rsa_primes(512, 65537, rng)
    p, q = rsa_primes(512, 65537, FirstTwice(prime))
    assert p == prime != q
