"""RSAES-OAEP with the OpenSSL that Python's `hashlib` has loaded already.

`cryptography` leaks the label of OAEP at each encryption and decryption (32 bytes for "TCPA", seen
from version 43 to 50), and OAEP without a label does not: a TPM that seals all day would grow all
day. Here the same OpenSSL functions are called that libtpms calls: RSA without padding, then the
padding. `crypto.py` falls back to `cryptography` where Python has no libcrypto of this kind.

Source: PKCS#1 v2.1 §7.1; the label is "TCPA" (TPM Main r116 Part 1 §31.1.1).

Invariants:
- A key is freed with its object, and neither is copied.
- No error stays in OpenSSL's queue, which `hashlib` and `ssl` share with us.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_char_p, c_int, c_long, c_void_p
from typing import Any, Final

from protocol.constants import OAEP_LABEL

_RSA_NO_PADDING: Final = 3
_KEY_FROM_DER = (c_void_p, [c_void_p, ctypes.POINTER(c_char_p), c_long])
_RSA = (c_int, [c_int, c_char_p, c_char_p, c_void_p, c_int])
_PROTOTYPES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "d2i_RSAPrivateKey": _KEY_FROM_DER,
    "d2i_RSAPublicKey": _KEY_FROM_DER,
    "RSA_free": (None, [c_void_p]),
    "RSA_public_encrypt": _RSA,
    "RSA_private_decrypt": _RSA,
    "RSA_padding_add_PKCS1_OAEP": (c_int, [c_char_p, c_int, c_char_p, c_int, c_char_p, c_int]),
    "RSA_padding_check_PKCS1_OAEP": (
        c_int,
        [c_char_p, c_int, c_char_p, c_int, c_int, c_char_p, c_int],
    ),
    "ERR_clear_error": (None, []),
}


def _libcrypto() -> ctypes.CDLL | None:
    """The OpenSSL of this Python, or None if it has none or hides its functions."""
    try:
        import _hashlib  # noqa: PLC0415 - a Python without OpenSSL has no such module

        library = ctypes.CDLL(_hashlib.__file__)
        for name, (result, arguments) in _PROTOTYPES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (ImportError, AttributeError, OSError):
        return None
    return library


_LIBRARY: Final[Any] = _libcrypto()
IS_AVAILABLE: Final = _LIBRARY is not None


def _der(numbers: tuple[int, ...]) -> bytes:
    """A SEQUENCE of INTEGERs, none negative: how PKCS#1 writes a key (v2.1, A.1)."""
    integers = [number.to_bytes(number.bit_length() // 8 + 1, "big") for number in numbers]
    return _der_element(0x30, b"".join([_der_element(2, integer) for integer in integers]))


def _der_element(tag: int, body: bytes) -> bytes:
    length = len(body)
    if length < 0x80:
        return bytes([tag, length]) + body
    return bytes([tag, 0x82]) + length.to_bytes(2, "big") + body


class _Key:
    """A key of libcrypto's.

    Args:
        read: Which function of libcrypto reads it.
        numbers: What PKCS#1 writes of it, in that order.
        modulus: One of them.

    Raises:
        ValueError: libcrypto does not take it.
    """

    __slots__ = ("_block", "_free", "_rsa", "_size")

    def __init__(self, read: str, numbers: tuple[int, ...], modulus: int) -> None:
        # Kept with the object: at the end of the process, the module may be gone before it.
        self._free = _LIBRARY.RSA_free
        self._rsa = None
        self._size = (modulus.bit_length() + 7) // 8
        self._block = c_char * self._size
        der = _der(numbers)
        self._rsa = getattr(_LIBRARY, read)(None, ctypes.byref(c_char_p(der)), len(der))
        if not self._rsa:
            _LIBRARY.ERR_clear_error()
            raise ValueError("libcrypto does not take this RSA key")

    def __del__(self) -> None:
        self._free(self._rsa)


class OaepPublicKey(_Key):
    """Encrypts, under a modulus and an exponent."""

    __slots__ = ()

    def __init__(self, n: int, e: int) -> None:
        super().__init__("d2i_RSAPublicKey", (n, e), n)

    def encrypt(self, plaintext: bytes) -> bytes:
        """As many bytes as the modulus has.

        Raises:
            ValueError: The plaintext is longer than the modulus allows, or the key is none.
        """
        size = self._size
        block, result = self._block(), self._block()
        padded = _LIBRARY.RSA_padding_add_PKCS1_OAEP(
            block, size, plaintext, len(plaintext), OAEP_LABEL, len(OAEP_LABEL)
        )
        if (
            padded != 1
            or _LIBRARY.RSA_public_encrypt(size, block, result, self._rsa, _RSA_NO_PADDING) != size
        ):
            _LIBRARY.ERR_clear_error()
            raise ValueError(f"{len(plaintext)} bytes for a modulus of {size}, or no RSA key")
        return result.raw


class OaepPrivateKey(_Key):
    """Decrypts, under the numbers of PKCS#1: n, e, d, p, q, dP, dQ, qInv."""

    __slots__ = ()

    def __init__(self, n: int, *numbers: int) -> None:
        super().__init__("d2i_RSAPrivateKey", (0, n, *numbers), n)

    def decrypt(self, ciphertext: bytes) -> bytes:
        """The plaintext.

        Raises:
            ValueError: Whatever is wrong with the ciphertext.
        """
        size = self._size
        if len(ciphertext) != size:
            raise ValueError("not decrypted")
        block, plaintext = self._block(), self._block()
        length = _LIBRARY.RSA_private_decrypt(size, ciphertext, block, self._rsa, _RSA_NO_PADDING)
        if length == size:
            length = _LIBRARY.RSA_padding_check_PKCS1_OAEP(
                plaintext, size, block, size, size, OAEP_LABEL, len(OAEP_LABEL)
            )
        if length < 0:
            _LIBRARY.ERR_clear_error()
            raise ValueError("not decrypted")
        return plaintext.raw[:length]
