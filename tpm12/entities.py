"""Encrypted entities: the private part of a key or of sealed data, opened and closed again.

What the commands have in common that change such a part without loading it: TPM_ChangeAuth, its
asymmetric form, and migration.

Source: TPM Main r116 Part 2 §9.3, §10.6, Part 3 §17.1.

Invariants:
- TPM_STORE_ASYMKEY and TPM_SEALED_DATA have the same layout; only the payload byte tells a key from
  sealed data, so it is checked before anything else is believed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.constants import EntityType, PayloadType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import SealedData, StoreAsymkey
from protocol.wire import DecodeError, decode, encode
from tpm12.crypto import DecryptionError, is_same
from tpm12.encryption import encrypted_oaep
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm
from tpm12.wrapping import decrypt_store_asymkey

_KEY_PAYLOADS: Final = frozenset(
    {PayloadType.ASYM, PayloadType.MIGRATE_RESTRICTED, PayloadType.MIGRATE_EXTERNAL}
)
CHANGEABLE: Final = frozenset({EntityType.DATA, EntityType.KEY})
"""Entity types whose secret lives inside their encrypted part."""


def opened_key(parent: LoadedKey, enc_data: bytes) -> StoreAsymkey:
    """Decrypt the private part of a key.

    Raises:
        TpmError: DECRYPT_ERROR; INVALID_STRUCTURE when it is not that of a key.
    """
    secrets = decrypt_store_asymkey(parent, enc_data)
    if secrets.payload not in _KEY_PAYLOADS:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "not the private part of a key")
    return secrets


def opened_data(tpm: Tpm, parent: LoadedKey, enc_data: bytes) -> SealedData:
    """Decrypt the private part of sealed data.

    Raises:
        TpmError: DECRYPT_ERROR; INVALID_STRUCTURE when it is not that of sealed data; AUTHFAIL when
            another TPM, or this one for another owner, sealed it.
    """
    try:
        sealed = decode(SealedData, parent.rsa.decrypt_oaep(enc_data))
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    except DecodeError as error:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "no TPM_SEALED_DATA") from error
    if sealed.payload != PayloadType.SEAL:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "not the private part of sealed data")
    if not is_same(sealed.tpm_proof, tpm.permanent.tpm_proof):
        raise TpmError(ReturnCode.AUTHFAIL, "sealed by another TPM")
    return sealed


def opened(
    tpm: Tpm, parent: LoadedKey, entity_type: int, enc_data: bytes
) -> StoreAsymkey | SealedData:
    """Decrypt the private part of an entity of one of the `CHANGEABLE` types.

    Raises:
        TpmError: As `opened_key` and `opened_data`.
    """
    if entity_type == EntityType.KEY:
        return opened_key(parent, enc_data)
    return opened_data(tpm, parent, enc_data)


def secret_of(entity: StoreAsymkey | SealedData) -> bytes:
    """The entity's authValue; 20 bytes."""
    return entity.usage_auth if isinstance(entity, StoreAsymkey) else entity.auth_data


def closed(tpm: Tpm, parent: LoadedKey, entity: StoreAsymkey | SealedData, secret: bytes) -> bytes:
    """Encrypt the private part of an entity to its parent, with another authValue."""
    changed: StoreAsymkey | SealedData
    if isinstance(entity, StoreAsymkey):
        changed = replace(entity, usage_auth=secret)
    else:
        changed = replace(entity, auth_data=secret)
    return encrypted_oaep(tpm, parent.rsa.public, encode(changed))
