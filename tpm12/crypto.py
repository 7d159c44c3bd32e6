"""The cryptography of TPM 1.2: SHA-1, HMAC, MGF1, RSA; the only importer of `cryptography`.

TPM 1.2 is built on SHA-1; its use here is what the specification demands, not a choice.

Invariants:
- Private RSA operations use CRT: 0.26 ms for 2048 bits against 2.3 ms without.
- Secret comparisons are constant-time (`is_same`).
- OAEP is `rsaes_oaep.py`, where there is a libcrypto for it: the library's own leaks the label.
- A key object is loaded into OpenSSL once and kept with the key, without OpenSSL's own validation
  (37 ms); `RsaPrivateKey.from_prime` has checked what matters: n = p * q.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import NoDigestInfo, Prehashed
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from protocol.constants import DIGEST_BYTES, OAEP_LABEL
from protocol.return_codes import ReturnCode, TpmError
from tpm12.ports import Rng
from tpm12.primes import rsa_primes

OAEP_OVERHEAD_BYTES: Final = 42
"""2 * 20 + 2: what OAEP with SHA-1 takes from a modulus."""
PKCS1_OVERHEAD_BYTES: Final = 11
"""What PKCS#1 v1.5 padding takes from a modulus."""
DEFAULT_EXPONENT: Final = 65537
_BLOCK_BYTES = 64

_IPAD = bytes(0x36 ^ i for i in range(256))
_OPAD = bytes(0x5C ^ i for i in range(256))


_NO_BYTES_YET: Final = hashlib.sha1(usedforsecurity=False)
"""A computation that begins as a copy of this one takes 0.3 us, one from nothing 0.45."""


def sha1(data: bytes, *more: bytes) -> bytes:
    """Hash the concatenation of what is given; 20 bytes."""
    hasher = _NO_BYTES_YET.copy()
    hasher.update(b"".join((data, *more)) if more else data)
    return hasher.digest()


class HmacKey:
    """An HMAC-SHA-1 key whose padded blocks are hashed once (0.7 us a MAC instead of 1.6)."""

    __slots__ = ("_inner", "_outer")

    def __init__(self, key: bytes) -> None:
        if len(key) > _BLOCK_BYTES:
            key = sha1(key)
        block = key.ljust(_BLOCK_BYTES, b"\0")
        self._inner = hashlib.sha1(block.translate(_IPAD), usedforsecurity=False)
        self._outer = hashlib.sha1(block.translate(_OPAD), usedforsecurity=False)

    def mac(self, message: bytes) -> bytes:
        """Authenticate `message`; 20 bytes."""
        inner = self._inner.copy()
        inner.update(message)
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()


@lru_cache(maxsize=64)
def hmac_key(secret: bytes) -> HmacKey:
    """The kept HMAC state of a secret; a few are remembered, the oldest forgotten."""
    return HmacKey(secret)


def hmac_sha1(key: bytes, message: bytes) -> bytes:
    """HMAC-SHA-1 of `message`; 20 bytes."""
    return HmacKey(key).mac(message)


is_same: Final[Callable[[bytes, bytes], bool]] = hmac.compare_digest
"""Compare secrets or MACs in constant time."""


def xor(left: bytes, right: bytes) -> bytes:
    """Exclusive or of two strings of one length.

    Raises:
        ValueError: The lengths differ.
    """
    if len(left) != len(right):
        raise ValueError("lengths differ")
    size = len(left)
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(size, "big")


def mgf1(seed: bytes, size: int) -> bytes:
    """MGF1 with SHA-1 (PKCS#1 v2.1 B.2.1)."""
    blocks = (size + DIGEST_BYTES - 1) // DIGEST_BYTES
    return b"".join([sha1(seed, struct.pack(">I", i)) for i in range(blocks)])[:size]


_AES_BLOCK_BYTES: Final = 16
_COUNTER_VALUES: Final = 1 << 32
_IDLE_COUNTERS_MAX: Final = 16
_idle_counters: Final[dict[bytes, CipherContext]] = {}
"""Counter modes that nobody uses now, by key: to make one takes 4 us, to use one again 1."""


def aes128_ctr(key: bytes, counter_block: bytes, data: bytes) -> bytes:
    """AES-128 in the counter mode of TPM 1.2; its own inverse.

    Only the last four bytes of the counter block count, unlike OpenSSL's counter of 16 bytes (TPM
    Main r116 Part 3 §24.2); the two differ once in 2^32 times.
    """
    head, count = counter_block[:12], int.from_bytes(counter_block[12:16], "big")
    before_wrap = (_COUNTER_VALUES - count) * _AES_BLOCK_BYTES
    if len(data) > before_wrap:
        first, rest = data[:before_wrap], data[before_wrap:]
        return aes128_ctr(key, counter_block, first) + aes128_ctr(key, head + bytes(4), rest)
    key, counter_block = key[:16], counter_block[:16]
    # Who takes one out of the dictionary has it alone, whatever other threads do.
    cipher = _idle_counters.pop(key, None)
    if cipher is None:
        cipher = Cipher(algorithms.AES(key), modes.CTR(counter_block)).encryptor()
    else:
        cipher.reset_nonce(counter_block)
    result = cipher.update(data)
    if len(_idle_counters) >= _IDLE_COUNTERS_MAX:
        _idle_counters.clear()
    _idle_counters[key] = cipher
    return result


def aes128_ofb(key: bytes, iv: bytes, data: bytes) -> bytes:
    """AES-128 in output feedback mode; its own inverse."""
    # The key stream is what CBC makes of zeros; the library has given its own OFB up.
    blocks = -(-len(data) // _AES_BLOCK_BYTES)
    cipher = Cipher(algorithms.AES(key[:16]), modes.CBC(iv[:16]))
    stream = cipher.encryptor().update(bytes(blocks * _AES_BLOCK_BYTES))
    return xor(data, stream[: len(data)])


class DecryptionError(Exception):
    """A ciphertext does not decrypt under this key and padding; no more is said, on purpose."""


_MODULUS_BYTES_MAX: Final = 2048
_EXPONENT_BITS_MAX: Final = 64
"""OpenSSL's own limits, of which the second holds from 3072 bits on there."""


class RsaPublicKey:
    """An RSA public key; sizes in bytes unless named otherwise."""

    __slots__ = ("_encrypt_oaep", "_key", "exponent", "modulus", "size")

    def __init__(self, modulus: bytes, exponent: int = DEFAULT_EXPONENT) -> None:
        self.modulus = modulus
        self.exponent = exponent
        self.size = len(modulus)
        self._key: rsa.RSAPublicKey | None = None
        self._encrypt_oaep: Callable[[bytes], bytes] | None = None

    def _loaded(self) -> rsa.RSAPublicKey:
        if self._key is None:
            number = int.from_bytes(self.modulus, "big")
            self._key = rsa.RSAPublicNumbers(self.exponent, number).public_key()
        return self._key

    def _oaep_encryption(self) -> Callable[[bytes], bytes]:
        # Imported at the first use, for ctypes takes 4 ms of a simulator's start.
        from tpm12 import rsaes_oaep  # noqa: PLC0415

        key = self._loaded()  # here as well: it refuses numbers that are no RSA key
        if not rsaes_oaep.IS_AVAILABLE:
            return lambda plaintext: key.encrypt(plaintext, _OAEP)
        number = int.from_bytes(self.modulus, "big")
        return rsaes_oaep.OaepPublicKey(number, self.exponent).encrypt

    def encrypt_oaep(self, plaintext: bytes) -> bytes:
        """OAEP with SHA-1 and the TPM's label "TCPA".

        Raises:
            ValueError: The plaintext is longer than the modulus allows, or the key is no RSA key.
        """
        if self._encrypt_oaep is None:
            self._encrypt_oaep = self._oaep_encryption()
        return self._encrypt_oaep(plaintext)

    def encrypt_pkcs1v15(self, plaintext: bytes) -> bytes:
        """PKCS#1 v1.5 type 2.

        Raises:
            ValueError: The plaintext is longer than the modulus allows, or the key is no RSA key.
        """
        return self._loaded().encrypt(plaintext, _PKCS1)

    def encrypt_block(self, block: bytes) -> bytes:
        """RSA of a block that is padded already; as many bytes as the modulus has.

        Raises:
            ValueError: The key is none, or larger than OpenSSL's may be.
        """
        modulus = int.from_bytes(self.modulus, "big")
        if self.size > _MODULUS_BYTES_MAX or self.exponent >> _EXPONENT_BITS_MAX or not modulus:
            raise ValueError("no RSA key that OpenSSL takes, and one that takes seconds")
        number = pow(int.from_bytes(block, "big"), self.exponent, modulus)
        return number.to_bytes(self.size, "big")

    def is_signature(self, signature: bytes, digest: bytes) -> bool:
        """Check an RSASSA-PKCS1-v1_5 signature over a SHA-1 digest."""
        try:
            self._loaded().verify(signature, digest, _PKCS1, _PREHASHED)
        except (InvalidSignature, ValueError):
            return False
        return True


class RsaPrivateKey:
    """An RSA private key, made from the modulus and one prime.

    Many a key is loaded and flushed with no use between, so what OpenSSL wants besides is worked
    out at the first use: the coefficient of CRT takes 0.17 ms for 2048 bits.
    """

    __slots__ = ("_decrypt_oaep", "_factors", "_kept_numbers", "_key", "prime", "public")

    def __init__(self, public: RsaPublicKey, prime: bytes, factors: tuple[int, int]) -> None:
        self.public = public
        self.prime = prime
        self._factors = factors
        self._kept_numbers: rsa.RSAPrivateNumbers | None = None
        self._key: rsa.RSAPrivateKey | None = None
        self._decrypt_oaep: Callable[[bytes], bytes] | None = None

    @classmethod
    def from_prime(cls, modulus: bytes, prime: bytes, exponent: int) -> RsaPrivateKey:
        """Derive the key from its modulus and one prime.

        Whoever knows a storage key's public part can make a blob that it decrypts, so the numbers
        are not to be trusted. That the two factors are primes is not checked, it would take longer
        than anything else about a key; with others, results are wrong, or OpenSSL finds none.

        Raises:
            ValueError: The prime does not divide the modulus, the modulus starts with a zero bit,
                or the exponent does not fit.
        """
        n, p = int.from_bytes(modulus, "big"), int.from_bytes(prime, "big")
        if n.bit_length() != 8 * len(modulus) or p <= 1:
            raise ValueError("no modulus or no prime")
        q, rest = divmod(n, p)
        if rest or q <= 1 or not p & q & 1:
            raise ValueError("the prime does not divide the modulus")
        if math.gcd(p, q) != 1:
            raise ValueError("the prime is in the modulus twice")
        if math.gcd(exponent, (p - 1) * (q - 1)) != 1:
            raise ValueError("the exponent has no inverse")
        return cls(RsaPublicKey(modulus, exponent), prime, (p, q))

    def _numbers(self) -> rsa.RSAPrivateNumbers:
        if self._kept_numbers is None:
            p, q = self._factors
            exponent = self.public.exponent
            d = pow(exponent, -1, (p - 1) * (q - 1))
            self._kept_numbers = rsa.RSAPrivateNumbers(
                p=p,
                q=q,
                d=d,
                dmp1=d % (p - 1),
                dmq1=d % (q - 1),
                iqmp=pow(q, -1, p),
                public_numbers=rsa.RSAPublicNumbers(exponent, p * q),
            )
        return self._kept_numbers

    def _loaded(self) -> rsa.RSAPrivateKey:
        if self._key is None:
            self._key = self._numbers().private_key(unsafe_skip_rsa_key_validation=True)
        return self._key

    def _oaep_decryption(self) -> Callable[[bytes], bytes]:
        from tpm12 import rsaes_oaep  # noqa: PLC0415

        key = self._loaded()  # here as well, as in `_oaep_encryption`
        if not rsaes_oaep.IS_AVAILABLE:
            return lambda ciphertext: key.decrypt(ciphertext, _OAEP)
        k = self._numbers()
        n, e = k.public_numbers.n, k.public_numbers.e
        return rsaes_oaep.OaepPrivateKey(n, e, k.d, k.p, k.q, k.dmp1, k.dmq1, k.iqmp).decrypt

    def decrypt_oaep(self, ciphertext: bytes) -> bytes:
        """Undo OAEP with SHA-1 and label "TCPA".

        Raises:
            DecryptionError: Whatever is wrong with the ciphertext.
        """
        try:
            if self._decrypt_oaep is None:
                self._decrypt_oaep = self._oaep_decryption()
            return self._decrypt_oaep(ciphertext)
        except ValueError as error:
            raise DecryptionError from error

    def decrypt_pkcs1v15(self, ciphertext: bytes) -> bytes:
        """Undo PKCS#1 v1.5 type 2.

        Raises:
            DecryptionError: The ciphertext has the wrong size. (OpenSSL answers bad padding with
                random bytes, so that the padding is no oracle.)
        """
        try:
            return self._loaded().decrypt(ciphertext, _PKCS1)
        except ValueError as error:
            raise DecryptionError from error

    def sign_sha1(self, digest: bytes) -> bytes:
        """RSASSA-PKCS1-v1_5 over a SHA-1 digest of 20 bytes.

        Raises:
            TpmError: BAD_KEY_PROPERTY, as `sign_der`.
        """
        return self._signed(digest, _PREHASHED)

    def sign_der(self, digest_info: bytes) -> bytes:
        """PKCS#1 v1.5 type 1 around the caller's bytes as they are.

        Raises:
            ValueError: The bytes are none or more than the modulus size - 11.
            TpmError: BAD_KEY_PROPERTY when the factors turn out to be no primes.
        """
        if not 0 < len(digest_info) <= self.public.size - PKCS1_OVERHEAD_BYTES:
            raise ValueError("no size for PKCS#1 v1.5")
        return self._signed(digest_info, _NO_DIGEST_INFO)

    def _signed(self, data: bytes, of: Prehashed | NoDigestInfo) -> bytes:
        try:
            return self._loaded().sign(data, _PKCS1, of)
        except ValueError as error:
            # A key from outside may have a modulus of many small factors: now and then OpenSSL then
            # finds no number to blind it with. Whoever made the key knows why.
            raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "a key that is no RSA key") from error


_OAEP = padding.OAEP(
    mgf=padding.MGF1(algorithm=hashes.SHA1()), algorithm=hashes.SHA1(), label=OAEP_LABEL
)
_PKCS1 = padding.PKCS1v15()
_PREHASHED = Prehashed(hashes.SHA1())
_NO_DIGEST_INFO = NoDigestInfo()


class OpenSslKeyGenerator:
    """Makes RSA keys with OpenSSL and its own randomness (43 ms for 2048 bits, mean)."""

    BITS_MIN: Final = 1024
    EXPONENTS: Final = frozenset({3, DEFAULT_EXPONENT})

    def primes(self, bits: int, exponent: int, /) -> tuple[int, int]:
        """Give two primes for a modulus of exactly `bits` bits.

        Raises:
            ValueError: OpenSSL makes no keys of this size or exponent (3 and 65537 only).
        """
        numbers = rsa.generate_private_key(exponent, bits).private_numbers()
        return numbers.p, numbers.q


class RsaKeyGenerator:
    """Makes every RSA key that TPM 1.2 knows: the usual ones with OpenSSL, the others itself.

    Args:
        rng: For the sizes and exponents that OpenSSL does not serve.
    """

    def __init__(self, rng: Rng) -> None:
        self._rng = rng
        self._openssl = OpenSslKeyGenerator()

    def primes(self, bits: int, exponent: int, /) -> tuple[int, int]:
        """Give two primes for a modulus of exactly `bits` bits, fit for `exponent`."""
        openssl = self._openssl
        if bits >= openssl.BITS_MIN and exponent in openssl.EXPONENTS:
            return openssl.primes(bits, exponent)
        return rsa_primes(bits, exponent, self._rng)


def new_rsa_key(primes: tuple[int, int], exponent: int, bits: int) -> RsaPrivateKey:
    """Make a key of two primes; the stored prime has half the modulus' size."""
    p, q = primes
    modulus = (p * q).to_bytes(bits // 8, "big")
    return RsaPrivateKey.from_prime(modulus, p.to_bytes(bits // 16, "big"), exponent)
