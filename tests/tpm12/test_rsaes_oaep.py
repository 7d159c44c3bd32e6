"""OAEP with the libcrypto of `hashlib`, and with `cryptography` where Python hides its own."""

import ctypes

import pytest

from tests.tpm12.conftest import PooledPrimes
from tpm12 import crypto, rsaes_oaep
from tpm12.crypto import DecryptionError, new_rsa_key
from tpm12.rsaes_oaep import IS_AVAILABLE, OaepPrivateKey

BITS = 512
WAYS = {"libcrypto": True, "cryptography": False}

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="this Python hides its libcrypto")


def new_key():
    return new_rsa_key(PooledPrimes().primes(BITS, 65537), 65537, BITS)


@pytest.mark.parametrize("opens", WAYS)
@pytest.mark.parametrize("seals", WAYS)
def test_what_one_seals_the_other_opens(monkeypatch, seals, opens):
    key, limit = new_key(), BITS // 8 - 42
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", WAYS[seals])
    ciphertexts = {
        data: key.public.encrypt_oaep(data) for data in (b"", b"d", b"\0" * limit, b"d" * limit)
    }
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", WAYS[opens])
    for data, ciphertext in ciphertexts.items():
        assert len(ciphertext) == BITS // 8
        assert key.decrypt_oaep(ciphertext) == data


@pytest.mark.parametrize("way", WAYS)
def test_both_refuse_the_same(monkeypatch, way):
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", WAYS[way])
    key = new_key()
    good = key.public.encrypt_oaep(b"data")
    modulus = key.public.modulus
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    for bad in (b"", good[:-1], good + b"x", b"\0" + good, flipped, bytes(64), modulus):
        with pytest.raises(DecryptionError):
            key.decrypt_oaep(bad)
    with pytest.raises(ValueError, match=r"modulus|Encryption"):
        key.public.encrypt_oaep(b"d" * (BITS // 8 - 41))
    assert key.decrypt_oaep(good) == b"data"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("exponent", [0, 1, 2, 4])
def test_no_way_encrypts_with_an_exponent_that_is_none(monkeypatch, way, exponent):
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", WAYS[way])
    public = crypto.RsaPublicKey(new_key().public.modulus, exponent)
    with pytest.raises(ValueError, match="e must be"):
        public.encrypt_oaep(b"data")


@pytest.mark.parametrize("numbers", [(), (3,), (3,) * 6], ids=len)
def test_what_is_no_key_is_refused(numbers):
    """All a private key has is eight numbers."""
    with pytest.raises(ValueError, match="libcrypto"):
        OaepPrivateKey(15, *numbers)


needs_mallinfo = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="mallinfo2 is glibc's, from 2.33"
)


class _Mallinfo(ctypes.Structure):
    """What glibc's mallinfo2(3) gives."""

    _fields_ = (
        ("_before", ctypes.c_size_t * 7),
        ("uordblks", ctypes.c_size_t),
        ("_after", ctypes.c_size_t * 2),
    )


def _allocated():
    """Bytes that C code has allocated and not freed."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    return mallinfo().uordblks


def _growth(operation, times=1000):
    """Bytes an operation leaves allocated, on the average."""
    for _ in range(10):
        operation()
    before = _allocated()
    for _ in range(times):
        operation()
    return (_allocated() - before) / times


@needs_mallinfo
@pytest.mark.parametrize("way", WAYS)
def test_a_day_of_sealing_leaves_nothing_in_memory(monkeypatch, way):
    """The control is `cryptography`: the day it passes, `rsaes_oaep.py` can go."""
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", WAYS[way])
    key = new_key()
    ciphertext = key.public.encrypt_oaep(b"data")
    grows = [
        _growth(lambda: key.public.encrypt_oaep(b"data")),
        _growth(lambda: key.decrypt_oaep(ciphertext)),
    ]
    if WAYS[way]:
        assert max(grows) < 4, grows
    else:
        assert min(grows) > 24, grows


@needs_mallinfo
def test_keys_are_freed(monkeypatch):
    monkeypatch.setattr(rsaes_oaep, "IS_AVAILABLE", True)
    key = new_key()
    ciphertext = key.public.encrypt_oaep(b"data")

    def load_and_use():
        again = crypto.RsaPrivateKey.from_prime(key.public.modulus, key.prime, 65537)
        assert again.decrypt_oaep(ciphertext) == b"data"
        again.public.encrypt_oaep(b"data")

    assert _growth(load_and_use) < 64
