"""OAEP as a format: the encoding without the RSA, with a seed and a label hash of one's choice.

Migration and maintenance hide a key this way before they encrypt it: the seed is a part of the key
and the label hash is a secret, so both come out again. RSA with OAEP proper is `crypto.py`.

Source: PKCS#1 v2.1 §7.1 with SHA-1 and MGF1, as TPM Main r116 Part 3 §11.1 and §12.1 use it.

Invariants:
- A block is as long as its message needs, unless padding is asked for; `decoded` accepts some.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from protocol.constants import DIGEST_BYTES
from tpm12.crypto import DecryptionError, mgf1, xor

OVERHEAD_BYTES: Final = 2 * DIGEST_BYTES + 1
"""What a block has besides its message: seed, label hash, and the byte before the message."""
_SEPARATOR: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class Decoded:
    """What was inside a block; all of it is secret."""

    message: bytes = field(repr=False)
    p_hash: bytes = field(repr=False)
    seed: bytes = field(repr=False)


def encoded(message: bytes, p_hash: bytes, seed: bytes, padding_bytes: int = 0) -> bytes:
    """Make a block of a message, the shortest if no padding is asked for.

    Args:
        message: Any size.
        p_hash: What stands for the hash of the label, 20 bytes.
        seed: 20 bytes.
        padding_bytes: How many zeros to put before the message.
    """
    data_block = p_hash + bytes(padding_bytes) + _SEPARATOR + message
    masked = xor(data_block, mgf1(seed, len(data_block)))
    return xor(seed, mgf1(masked, DIGEST_BYTES)) + masked


def decoded(block: bytes) -> Decoded:
    """Take a block apart.

    Raises:
        DecryptionError: It is no block.
    """
    if len(block) < OVERHEAD_BYTES:
        raise DecryptionError
    masked_seed, masked = block[:DIGEST_BYTES], block[DIGEST_BYTES:]
    seed = xor(masked_seed, mgf1(masked, DIGEST_BYTES))
    data_block = xor(masked, mgf1(seed, len(masked)))
    padded = data_block[DIGEST_BYTES:].lstrip(b"\0")
    if not padded.startswith(_SEPARATOR):
        raise DecryptionError
    return Decoded(padded[1:], data_block[:DIGEST_BYTES], seed)
