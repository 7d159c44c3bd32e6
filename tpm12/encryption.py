"""What the TPM encrypts to a public key, and where the chance in it comes from.

OpenSSL pads with randomness of its own, four times as fast as it can be done here. A TPM whose run
is to be repeated pads with its own source instead.

Source: PKCS#1 v2.1 §7.1 and §7.2; the label of OAEP is "TCPA" (TPM Main r116 Part 1 §31.1.1).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import DIGEST_BYTES
from tpm12 import oaep
from tpm12.crypto import OAEP_OVERHEAD_BYTES, PKCS1_OVERHEAD_BYTES, RsaPublicKey, sha1
from tpm12.tpm import Tpm

_LABEL: Final = sha1(b"TCPA")


def encrypted_oaep(tpm: Tpm, key: RsaPublicKey, plaintext: bytes) -> bytes:
    """Encrypt with RSAES-OAEP.

    Raises:
        ValueError: The plaintext is longer than the modulus allows, or the key is no RSA key.
    """
    if not tpm.world.profile.is_repeatable:
        return key.encrypt_oaep(plaintext)
    room = key.size - OAEP_OVERHEAD_BYTES - len(plaintext)
    if room < 0:
        raise ValueError(f"{len(plaintext)} bytes for a modulus of {key.size}")
    seed = tpm.random(DIGEST_BYTES)
    return key.encrypt_block(b"\0" + oaep.encoded(plaintext, _LABEL, seed, room))


def encrypted_pkcs1v15(tpm: Tpm, key: RsaPublicKey, plaintext: bytes) -> bytes:
    """Encrypt with RSAES-PKCS1-v1_5.

    Raises:
        ValueError: As `encrypted_oaep`.
    """
    if not tpm.world.profile.is_repeatable:
        return key.encrypt_pkcs1v15(plaintext)
    room = key.size - 3 - len(plaintext)
    if room < PKCS1_OVERHEAD_BYTES - 3:
        raise ValueError(f"{len(plaintext)} bytes for a modulus of {key.size}")
    padding = tpm.random(room).replace(b"\0", b"\1")  # nothing in it may be zero
    return key.encrypt_block(b"\0\2" + padding + b"\0" + plaintext)
