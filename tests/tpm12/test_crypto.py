"""Known answers of the cryptography, and RSA keys of every size and from every hand."""

import contextlib
import hashlib
import hmac
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.return_codes import ReturnCode, TpmError
from tests.tpm12.conftest import CountingRng, PooledPrimes
from tests.tpm12.witness import is_signature, number
from tests.tpm12.witness import sha1 as plain_sha1
from tpm12.crypto import (
    DecryptionError,
    HmacKey,
    OpenSslKeyGenerator,
    RsaKeyGenerator,
    RsaPrivateKey,
    RsaPublicKey,
    aes128_ctr,
    aes128_ofb,
    hmac_key,
    hmac_sha1,
    is_same,
    mgf1,
    new_rsa_key,
    sha1,
    xor,
)

# RFC 2202 section 3: key, data, digest.
RFC2202 = [
    (b"\x0b" * 20, b"Hi There", "b617318655057264e28bc0b6fb378c8ef146be00"),
    (b"Jefe", b"what do ya want for nothing?", "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"),
    (b"\xaa" * 20, b"\xdd" * 50, "125d7342b9ac11cd91a39af48aa17b4f63f175d3"),
    (
        b"\xaa" * 80,
        b"Test Using Larger Than Block-Size Key - Hash Key First",
        "aa4ae5e15272d00e95705637ce8a3b55ed402112",
    ),
]


@pytest.mark.parametrize(("key", "data", "digest"), RFC2202)
def test_hmac_known_answers(key, data, digest):
    assert hmac_sha1(key, data).hex() == digest
    kept = HmacKey(key)
    assert [kept.mac(data).hex() for _ in range(2)] == [digest, digest]


@given(key=st.binary(max_size=130), data=st.binary(max_size=200))
def test_hmac_is_the_standard_librarys(key, data):
    assert hmac_key(key).mac(data) == hmac.digest(key, data, "sha1")


@given(parts=st.lists(st.binary(max_size=50), min_size=1, max_size=5))
def test_sha1_hashes_the_concatenation(parts):
    assert sha1(*parts) == hashlib.sha1(b"".join(parts)).digest()


def test_mgf1_known_answers():
    # Published test values of MGF1 with SHA-1.
    assert mgf1(b"foo", 3).hex() == "1ac907"
    assert mgf1(b"foo", 5).hex() == "1ac9075cd4"
    assert mgf1(b"bar", 50).hex() == (
        "bc0c655e016bc2931d85a2e675181adcef7f581f76df2739da74faac41627be2"
        "f7f415c89e983fd0ce80ced9878641cb4876"
    )
    assert mgf1(b"foo", 0) == b""


def test_aes_ctr_known_answer():
    # NIST SP 800-38A F.5.1, first two blocks.
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    counter = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff")
    assert aes128_ctr(key, counter, plain) == cipher
    assert aes128_ctr(key, counter, cipher) == plain


def test_aes_ctr_counts_in_the_last_four_bytes_only():
    """Unlike OpenSSL's (TPM Main r116 Part 3 §24.2, informative comment)."""
    key, head = bytes(16), b"\xff" * 12
    counted = aes128_ctr(key, head + b"\xff" * 4, bytes(40))
    assert counted[:16] == aes128_ctr(key, b"\xff" * 16, bytes(16))
    assert counted[16:] == aes128_ctr(key, head + bytes(4), bytes(24))


def factors_of_small_primes(bits):
    """Two odd numbers of so many bits whose product has nearly every small prime, and no others."""
    factors = [1, 1]
    for prime in filter(is_small_prime, range(3, 2000)):
        smaller = factors.index(min(factors))
        if prime != 65537 and (factors[smaller] * prime).bit_length() < bits - 16:
            factors[smaller] *= prime
    while True:
        # Filled up to nearly all ones, so that the product has all of its bits.
        p, q = (
            f * (((1 << bits) - (1 << bits - 3)) // f + 2 * n | 1) for n, f in enumerate(factors)
        )
        if math.gcd(p, q) == 1 and math.gcd(65537, (p - 1) * (q - 1)) == 1:
            return p, q
        factors[0] //= next(prime for prime in (3, 7, 11, 13, 17, 19) if not factors[0] % prime)


def is_small_prime(number):
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def test_key_of_many_small_factors_is_refused_when_openssl_cannot_use_it():
    """Anybody who knows a storage key's public part can make such a key: a guest, for its vTPM."""
    p, q = factors_of_small_primes(1024)
    modulus, prime = (p * q).to_bytes(256, "big"), p.to_bytes(128, "big")
    seen = set()
    for _ in range(20_000):  # one in some hundreds
        key = RsaPrivateKey.from_prime(modulus, prime, 65537)
        try:
            key.sign_sha1(bytes(20))
        except TpmError as error:
            seen.add(error.code)
            break
    assert seen == {ReturnCode.BAD_KEY_PROPERTY}


def counter_stream(key: bytes, counter: bytes, size: int) -> bytes:
    """The key stream by its definition, block after block."""
    count = number(counter[12:])
    blocks = [
        counter[:12] + ((count + i) % (1 << 32)).to_bytes(4, "big") for i in range(-(-size // 16))
    ]
    return Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(b"".join(blocks))[:size]


@given(st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=16, max_size=16), st.binary())))
def test_aes_ctr_is_its_definition_whatever_came_before(calls):
    """Some ciphers are used again: with another counter, after part of a block, by any of keys."""
    for key_number, counter, data in calls:
        key = bytes([key_number]) * 16
        assert aes128_ctr(key, counter, data) == xor(data, counter_stream(key, counter, len(data)))


def test_aes_ctr_in_threads_is_what_it_is_in_one():
    key, data = b"k" * 16, bytes(1000)
    counters = [i.to_bytes(16, "big") for i in range(0, 400_000, 1000)]
    with ThreadPoolExecutor(8) as threads:
        streams = threads.map(lambda counter: aes128_ctr(key, counter, data), counters)
        assert list(streams) == [counter_stream(key, counter, 1000) for counter in counters]


def test_aes_ofb_known_answer():
    # NIST SP 800-38A F.4.1, first two blocks.
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    iv = bytes(range(16))
    plain = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51")
    cipher = bytes.fromhex("3b3fd92eb72dad20333449f8e83cfb4a7789508d16918f03f53c52dac54ed825")
    assert aes128_ofb(key, iv, plain) == cipher
    assert aes128_ofb(key, iv, cipher[:21]) == plain[:21]
    assert aes128_ofb(key, iv, b"") == b""


def test_aes_ctr_uses_the_first_16_bytes_of_20():
    assert aes128_ctr(bytes(20), bytes(20), b"data") == aes128_ctr(bytes(16), bytes(16), b"data")


@given(left=st.binary(max_size=40))
def test_xor(left):
    assert xor(left, bytes(len(left))) == left
    assert xor(left, left) == bytes(len(left))


def test_xor_of_different_lengths():
    with pytest.raises(ValueError, match="lengths"):
        xor(b"12", b"1")


def test_is_same():
    assert is_same(b"secret", b"secret")
    assert not is_same(b"secret", b"secreT")
    assert not is_same(b"secret", b"secret ")


# -- RSA -------------------------------------------------------------------------------------------


def made(bits=512, exponent=65537):
    return new_rsa_key(PooledPrimes().primes(bits, exponent), exponent, bits)


@pytest.fixture(scope="module", params=[512, 528, 1024, 2048])
def key(request):
    return made(request.param)


def test_key_has_the_size_that_was_asked(key):
    size = len(key.public.modulus)
    assert key.public.modulus[0] & 0x80
    assert len(key.prime) == size // 2
    assert number(key.public.modulus) % number(key.prime) == 0


def test_sign_sha1_is_rsassa(key):
    signature = key.sign_sha1(plain_sha1(b"message"))
    assert is_signature(key.public.modulus, signature, b"message")
    assert key.public.is_signature(signature, plain_sha1(b"message"))
    assert not key.public.is_signature(signature, plain_sha1(b"another"))
    assert not key.public.is_signature(signature[:-1], plain_sha1(b"message"))


@pytest.mark.parametrize("exponent", [3, 5, 7, 17, 257])
def test_other_exponents(exponent):
    key = made(512, exponent)
    assert key.decrypt_oaep(key.public.encrypt_oaep(b"plain")) == b"plain"
    assert key.public.is_signature(key.sign_sha1(bytes(20)), bytes(20))


def test_sign_der_pads_and_nothing_else(key):
    size = key.public.size
    for length in {1, 15, 35, size - 12, size - 11}:
        data = bytes(range(1, 250))[:length]
        opened = pow(number(key.sign_der(data)), 65537, number(key.public.modulus))
        block = b"\0\1" + b"\xff" * (size - 3 - length) + b"\0" + data
        assert opened.to_bytes(size, "big") == block


@pytest.mark.parametrize("length", [0, 54, 64, 100])
def test_sign_der_of_a_size_that_cannot_be(length):
    with pytest.raises(ValueError, match="size"):
        made(512).sign_der(b"d" * length)


def test_oaep_round_trip_up_to_its_limit(key):
    limit = key.public.size - 42
    for data in (b"", b"d", b"d" * limit):
        assert key.decrypt_oaep(key.public.encrypt_oaep(data)) == data
    with pytest.raises(ValueError, match="modulus"):
        key.public.encrypt_oaep(b"d" * (limit + 1))


def test_oaep_has_the_tpms_label(key):
    """Unpad by hand: H("TCPA") stands where RFC 8017 has the hash of the label."""
    size, message = key.public.size, b"data"
    block = _private(key, key.public.encrypt_oaep(message))
    assert block[0] == 0
    masked_seed, masked_data = block[1:21], block[21:]
    seed = xor(masked_seed, mgf1(masked_data, 20))
    data = xor(masked_data, mgf1(seed, size - 21))
    assert data[:20] == plain_sha1(b"TCPA")
    assert data[20:].lstrip(b"\0") == b"\1" + message


def _private(key, block):
    n, p = number(key.public.modulus), number(key.prime)
    d = pow(65537, -1, (p - 1) * (n // p - 1))
    return pow(number(block), d, n).to_bytes(key.public.size, "big")


def test_oaep_failures_all_look_the_same(key):
    good = key.public.encrypt_oaep(b"data")
    wrong = [good[:-1] + bytes([good[-1] ^ 1]), good[:-1], good + b"x", bytes(len(good)), b""]
    for data in (*wrong, b"\xff" * len(good)):
        with pytest.raises(DecryptionError) as failure:
            key.decrypt_oaep(data)
        assert failure.value.args == ()


def test_pkcs1v15_round_trip(key):
    limit = key.public.size - 11
    for data in (b"", b"d", b"d" * limit):
        assert key.decrypt_pkcs1v15(key.public.encrypt_pkcs1v15(data)) == data


def test_pkcs1v15_of_a_wrong_size(key):
    with pytest.raises(DecryptionError):
        key.decrypt_pkcs1v15(b"\1" * (key.public.size + 1))


def test_key_is_found_again_from_one_prime(key):
    again = RsaPrivateKey.from_prime(key.public.modulus, key.prime, 65537)
    assert again.decrypt_oaep(key.public.encrypt_oaep(b"plain")) == b"plain"
    other_prime = number(key.public.modulus) // number(key.prime)
    half = len(key.prime)
    swapped = RsaPrivateKey.from_prime(key.public.modulus, other_prime.to_bytes(half, "big"), 65537)
    assert swapped.decrypt_oaep(key.public.encrypt_oaep(b"plain")) == b"plain"


_P, _Q = (3 << 254) | 1, (3 << 254) | 5
NO_KEYS = {
    "prime that does not divide": ((_P * _Q), _P + 2),
    "prime 0": (_P * _Q, 0),
    "prime 1": (_P * _Q, 1),
    "prime is the modulus": (_P * _Q, _P * _Q),
    "even prime": ((_P + 1) * _Q, _P + 1),
    "even other prime": ((_P + 1) * _Q, _Q),
    "square": (_P * _P, _P),
    "top bit unset": ((1 << 510) + 1, 1 << 255),
}


@pytest.mark.parametrize(("modulus", "prime"), NO_KEYS.values(), ids=NO_KEYS)
def test_numbers_that_are_no_key(modulus, prime):
    with pytest.raises(ValueError, match=r"."):
        RsaPrivateKey.from_prime(modulus.to_bytes(64, "big"), prime.to_bytes(64, "big"), 65537)


def test_exponent_that_does_not_fit():
    p, q = PooledPrimes().primes(512, 65537)
    product = (p * q).to_bytes(64, "big")
    with pytest.raises(ValueError, match=r"."):
        RsaPrivateKey.from_prime(product, p.to_bytes(32, "big"), 2)


@settings(deadline=None)
@given(
    p=st.integers(min_value=3 << 254, max_value=(1 << 256) - 1),
    q=st.integers(min_value=3 << 254, max_value=(1 << 256) - 1),
    exponent=st.sampled_from([3, 5, 7, 17, 257, 65537]),
    block=st.binary(min_size=64, max_size=64),
)
def test_any_two_numbers_are_refused_or_computed_with(p, q, exponent, block):
    """A storage key's owner can be given any numbers: no answer but a refusal or a result."""
    try:
        key = RsaPrivateKey.from_prime((p * q).to_bytes(64, "big"), p.to_bytes(32, "big"), exponent)
    except ValueError:
        return
    assert len(key.sign_sha1(block[:20])) == 64
    assert len(key.sign_der(block[:20])) == 64
    for decrypt in (key.decrypt_oaep, key.decrypt_pkcs1v15):
        with contextlib.suppress(DecryptionError):
            decrypt(block)


def test_public_key_of_nonsense_verifies_nothing():
    assert not RsaPublicKey(b"", 65537).is_signature(b"", bytes(20))
    assert not RsaPublicKey(bytes(64), 65537).is_signature(bytes(64), bytes(20))


# -- key generation --------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [512, 528, 1008])
@pytest.mark.parametrize("exponent", [3, 17, 65537])
def test_generator_makes_what_openssl_does_not(bits, exponent):
    p, q = RsaKeyGenerator(CountingRng()).primes(bits, exponent)
    assert (p * q).bit_length() == bits
    assert math.gcd((p - 1) * (q - 1), exponent) == 1


def test_generator_makes_other_exponents_of_usual_sizes():
    p, q = RsaKeyGenerator(CountingRng()).primes(1024, 5)
    assert (p * q).bit_length() == 1024
    assert math.gcd((p - 1) * (q - 1), 5) == 1


@pytest.mark.parametrize("bits", [1024, 1040])
@pytest.mark.parametrize("exponent", [3, 65537])
def test_generator_leaves_the_usual_to_openssl(bits, exponent):
    class NoRng:
        def random(self, size, /):
            raise AssertionError(size)

    p, q = RsaKeyGenerator(NoRng()).primes(bits, exponent)
    assert (p * q).bit_length() == bits
    assert p.bit_length() == q.bit_length() == bits // 2


@pytest.mark.parametrize(("bits", "exponent"), [(512, 65537), (1024, 17)])
def test_openssl_says_what_it_does_not_make(bits, exponent):
    with pytest.raises(ValueError, match=r"key_size|exponent"):
        OpenSslKeyGenerator().primes(bits, exponent)
