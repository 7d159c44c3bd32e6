"""A SHA-1 computation in progress that can be written down and taken up again.

hashlib computes faster and does not show its chaining value. So hashlib computes, and beside it are
kept a chaining value, worked out here, and the bytes that came since; the two are what is stored.

Source: FIPS 180-4 §6.1; TPM Main r116 Part 3 §13 (the thread), TIS 1.21 (the hash sequence).
"""

from __future__ import annotations

import hashlib
import struct
from typing import Any, Final

BLOCK_BYTES: Final = 64
SINCE_BYTES_MAX: Final = 8192
"""When more has come than that, it is worked into the chaining value: 30 us a block."""
_BEGIN: Final = (0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0)
_ROUND: Final = (0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC, 0xCA62C1D6)
_WORDS: Final = struct.Struct(">16I")
_CHAIN: Final = struct.Struct(">5I")
_STORED: Final = struct.Struct(">Q5I")
_MASK: Final = 0xFFFFFFFF

Chain = tuple[int, int, int, int, int]


def compress(chain: Chain, data: bytes) -> Chain:
    """The chaining value after whole blocks.

    Args:
        chain: The one before.
        data: A multiple of `BLOCK_BYTES` bytes.
    """
    for at in range(0, len(data), BLOCK_BYTES):
        words = list(_WORDS.unpack_from(data, at))
        for i in range(16, 80):
            mixed = words[i - 3] ^ words[i - 8] ^ words[i - 14] ^ words[i - 16]
            words.append((mixed << 1 | mixed >> 31) & _MASK)
        a, b, c, d, e = chain
        for i, word in enumerate(words):
            if i < 20:
                f = d ^ (b & (c ^ d))
            elif 40 <= i < 60:
                f = (b & c) | (d & (b | c))
            else:
                f = b ^ c ^ d
            e, d, c, b, a = (
                d,
                c,
                (b << 30 | b >> 2) & _MASK,
                a,
                ((a << 5 | a >> 27) + f + e + _ROUND[i // 20] + word) & _MASK,
            )
        chain = (
            chain[0] + a & _MASK,
            chain[1] + b & _MASK,
            chain[2] + c & _MASK,
            chain[3] + d & _MASK,
            chain[4] + e & _MASK,
        )
    return chain


class Sha1Thread:
    """A SHA-1 computation in progress; feeding it gives a new one and leaves this as it is."""

    __slots__ = ("_chain", "_hasher", "_length", "_since")

    def __init__(self) -> None:
        # None once it was taken up from a chaining value, which hashlib cannot be given.
        self._hasher: Any = hashlib.sha1(usedforsecurity=False)
        self._chain: Chain = _BEGIN
        self._length = 0  # bytes in the chaining value
        self._since = b""

    def fed(self, data: bytes) -> Sha1Thread:
        """The computation after `data`."""
        new = object.__new__(Sha1Thread)
        if self._hasher is not None:
            new._hasher = self._hasher.copy()
            new._hasher.update(data)
        else:
            new._hasher = None
        new._chain, new._length, new._since = self._chain, self._length, self._since + data
        if len(new._since) > SINCE_BYTES_MAX:
            new._work_in()
        return new

    def digest(self, last: bytes = b"") -> bytes:
        """The digest after `last`; 20 bytes."""
        if self._hasher is not None:
            hasher = self._hasher.copy()
            hasher.update(last)
            return bytes(hasher.digest())
        rest = self._since + last
        bits = 8 * (self._length + len(rest))
        padding = b"\x80" + bytes((55 - len(rest)) % BLOCK_BYTES) + bits.to_bytes(8, "big")
        return _CHAIN.pack(*compress(self._chain, rest + padding))

    def to_bytes(self) -> bytes:
        """What `from_bytes` takes the computation up from."""
        return _STORED.pack(self._length, *self._chain) + self._since

    @classmethod
    def from_bytes(cls, data: bytes) -> Sha1Thread:
        """Take a computation up again.

        Raises:
            ValueError: The bytes are none that `to_bytes` gives.
        """
        if not _STORED.size <= len(data) <= _STORED.size + SINCE_BYTES_MAX:
            raise ValueError(f"a stored SHA-1 thread of {len(data)} bytes")
        length, *chain = _STORED.unpack_from(data)
        since = data[_STORED.size :]
        if not length:
            return cls().fed(since)
        if length % BLOCK_BYTES:
            raise ValueError(f"a SHA-1 chaining value after {length} bytes")
        new = object.__new__(cls)
        new._hasher = None
        new._chain = (chain[0], chain[1], chain[2], chain[3], chain[4])
        new._length, new._since = length, since
        return new

    def _work_in(self) -> None:
        whole = len(self._since) // BLOCK_BYTES * BLOCK_BYTES
        self._chain = compress(self._chain, self._since[:whole])
        self._length += whole
        self._since = self._since[whole:]
