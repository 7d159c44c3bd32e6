"""Moving keys: the owner's authorization of destinations, the double wrapping, the tickets of CMKs.

A key on its way is an OAEP block (`oaep.py`) that carries its private part, hidden by exclusive or
with a random string that travels apart, and encrypted to the destination. Maintenance moves the SRK
in the same way.

Leaves to others: who may do what (`commands/migration.py`, `commands/maintenance.py`).

Source: TPM Main r116 Part 2 §5.12, §5.15 to §5.21, §10.8, Part 3 §11, §12.1.

Invariants:
- Every ticket and authorization is bound to this TPM and owner by tpmProof.
- What comes in is believed in nothing before its pHash, its payload or its ticket is checked:
  anyone can encrypt to a destination.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from protocol.constants import DIGEST_BYTES, EncScheme, PayloadType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    CmkMaApproval,
    CmkSigticket,
    MigrateAsymkey,
    MigrationKeyAuth,
    MsaComposite,
    Pubkey,
    StoreAsymkey,
    StorePrivkey,
)
from protocol.wire import DecodeError, decode, encode
from tpm12 import keys, oaep
from tpm12.certification import CmkMigauth
from tpm12.crypto import DEFAULT_EXPONENT, DecryptionError, hmac_sha1, is_same, sha1, xor
from tpm12.encryption import encrypted_oaep, encrypted_pkcs1v15
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

MIGRATION_KEY_BITS_MIN: Final = 2048
_IN_MOTION: Final = frozenset({PayloadType.MIGRATE, PayloadType.MAINT, PayloadType.CMK_MIGRATE})


# -- destinations ----------------------------------------------------------------------------------


def check_strength(migration_key: Pubkey) -> None:
    """Check that a destination protects a key as well as a storage key does.

    Raises:
        TpmError: BAD_KEY_PROPERTY for less than 2048 bits, another exponent than 65537, or what is
            no RSA key.
    """
    parms = keys.rsa_parms(migration_key.algorithm_parms)
    modulus = migration_key.pub_key.key
    if (
        parms.key_length < MIGRATION_KEY_BITS_MIN
        or 8 * len(modulus) != parms.key_length
        or keys.exponent_of(migration_key.algorithm_parms) != DEFAULT_EXPONENT
    ):
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "too weak to migrate to")


def authorization(tpm: Tpm, migration_key: Pubkey, migration_scheme: int) -> MigrationKeyAuth:
    """The owner's authorization of a destination for one scheme."""
    scheme = migration_scheme.to_bytes(2, "big")
    return MigrationKeyAuth(
        migration_key=migration_key,
        migration_scheme=migration_scheme,
        digest=sha1(encode(migration_key), scheme, tpm.permanent.tpm_proof),
    )


def check_authorization(tpm: Tpm, given: MigrationKeyAuth) -> None:
    """Check that this TPM's owner authorized a destination.

    Raises:
        TpmError: AUTHFAIL.
    """
    ours = authorization(tpm, given.migration_key, given.migration_scheme)
    if not is_same(ours.digest, given.digest):
        raise TpmError(ReturnCode.AUTHFAIL, "the owner did not authorize this destination")


def encrypted_to(tpm: Tpm, destination: Pubkey, data: bytes) -> bytes:
    """Encrypt to a public key that came from outside, with the scheme that it names.

    Raises:
        TpmError: BAD_KEY_PROPERTY when it is no RSA key; INAPPROPRIATE_ENC for a scheme that
            encrypts nothing; BAD_DATASIZE for more bytes than the modulus has; ENCRYPT_ERROR when
            they do not fit with their padding, or the numbers are no key.
    """
    key = keys.public_key_of(destination)
    scheme = destination.algorithm_parms.enc_scheme
    if len(data) > key.size:
        raise TpmError(ReturnCode.BAD_DATASIZE)
    try:
        if scheme == EncScheme.RSAESOAEP_SHA1_MGF1:
            return encrypted_oaep(tpm, key, data)
        if scheme == EncScheme.RSAESPKCSV15:
            return encrypted_pkcs1v15(tpm, key, data)
    except ValueError as error:
        raise TpmError(ReturnCode.ENCRYPT_ERROR) from error
    raise TpmError(ReturnCode.INAPPROPRIATE_ENC)


# -- a key on its way ------------------------------------------------------------------------------


def packed(secrets: StoreAsymkey, payload: PayloadType, p_hash: bytes) -> bytes:
    """Make the OAEP block "o1" of a private part (Part 3 §11.1, action 6); 198 bytes for 2048 bits.

    Args:
        secrets: The private part.
        payload: What kind of journey it is.
        p_hash: What takes the place of the label hash, 20 bytes.

    Raises:
        TpmError: INVALID_STRUCTURE when the prime is too short to be a key's.
    """
    private_key = encode(StorePrivkey(key=secrets.priv_key))
    k1, k2 = private_key[:DIGEST_BYTES], private_key[DIGEST_BYTES:]
    if len(k1) < DIGEST_BYTES:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "no prime")
    m1 = MigrateAsymkey(
        payload=payload,
        usage_auth=secrets.usage_auth,
        pub_data_digest=secrets.pub_data_digest,
        part_priv_key=k2,
    )
    return oaep.encoded(encode(m1), p_hash, k1)


def unpacked(block: bytes) -> StoreAsymkey:
    """Take an OAEP block "o1" apart (Part 3 §11.2, actions 5 to 7).

    Returns:
        The private part. Its payload is still that of a key on its way, and its migration_auth is
        the block's pHash.

    Raises:
        TpmError: DECRYPT_ERROR when it is no block; INVALID_STRUCTURE when no key is inside.
    """
    try:
        inside = oaep.decoded(block)
        m1 = decode(MigrateAsymkey, inside.message)
        private_key = decode(StorePrivkey, inside.seed + m1.part_priv_key)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    except DecodeError as error:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "no TPM_MIGRATE_ASYMKEY") from error
    if m1.payload not in _IN_MOTION:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "not a key on its way")
    return StoreAsymkey(
        payload=m1.payload,
        usage_auth=m1.usage_auth,
        migration_auth=inside.p_hash,
        pub_data_digest=m1.pub_data_digest,
        priv_key=private_key.key,
    )


def sent(tpm: Tpm, block: bytes, destination: Pubkey) -> tuple[bytes, bytes]:
    """Hide a block with random bytes and encrypt it to its destination.

    Returns:
        The random bytes, and the encrypted block.

    Raises:
        TpmError: As `encrypted_to`.
    """
    random = tpm.random(len(block))
    return random, encrypted_to(tpm, destination, xor(block, random))


def decrypted(destination: LoadedKey, enc_data: bytes) -> bytes:
    """Undo the encryption of `sent`: a block that is still hidden.

    Raises:
        TpmError: DECRYPT_ERROR.
    """
    try:
        return destination.rsa.decrypt_oaep(enc_data)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error


def revealed(hidden: bytes, random: bytes) -> StoreAsymkey:
    """Undo the hiding of `sent`, and take the block apart as `unpacked`.

    Raises:
        TpmError: BAD_PARAMETER when `random` is not as long as what it hides; as `unpacked`.
    """
    if len(hidden) != len(random):
        raise TpmError(ReturnCode.BAD_PARAMETER, "random is not as long as what it hides")
    return unpacked(xor(hidden, random))


def received(parent: LoadedKey, enc_data: bytes, random: bytes) -> StoreAsymkey:
    """Undo `sent`; gives what `unpacked` gives.

    Raises:
        TpmError: DECRYPT_ERROR, BAD_PARAMETER, INVALID_STRUCTURE.
    """
    return revealed(decrypted(parent, enc_data), random)


# -- certified migratable keys ---------------------------------------------------------------------


def pubkey_digest(public: Pubkey) -> bytes:
    """What lists of authorities and tickets call a key by; 20 bytes."""
    return sha1(encode(public))


def approval(tpm: Tpm, migration_authority_digest: bytes) -> bytes:
    """The owner's approval of migration authorities, 20 bytes."""
    approved = CmkMaApproval(migration_authority_digest=migration_authority_digest)
    return hmac_sha1(tpm.permanent.tpm_proof, encode(approved))


def migration_auth(tpm: Tpm, msa_digest: bytes, pub_key_digest: bytes) -> bytes:
    """What binds a certified migratable key of this TPM to its authorities, 20 bytes."""
    bound = CmkMigauth(msa_digest=msa_digest, pub_key_digest=pub_key_digest)
    return hmac_sha1(tpm.permanent.tpm_proof, encode(bound))


def sig_ticket(tpm: Tpm, ver_key_digest: bytes, signed_data: bytes) -> bytes:
    """This TPM's word that a key has signed a digest, 20 bytes."""
    checked = CmkSigticket(ver_key_digest=ver_key_digest, signed_data=signed_data)
    return hmac_sha1(tpm.permanent.tpm_proof, encode(checked))


def check_sig_ticket(
    tpm: Tpm, given: bytes, msa_list: MsaComposite, restrict_ticket: bytes
) -> None:
    """Check that one of the authorities signed a restriction ticket.

    Raises:
        TpmError: MA_TICKET_SIGNATURE.
    """
    signed_data = sha1(restrict_ticket)
    if not any(
        is_same(given, sig_ticket(tpm, authority, signed_data))
        for authority in msa_list.mig_auth_digest
    ):
        raise TpmError(ReturnCode.MA_TICKET_SIGNATURE, "signed by none of the authorities")


def check_is_authority(destination: Pubkey, authorities: Container[bytes]) -> None:
    """Check that a destination is itself one of the authorities.

    Raises:
        TpmError: MA_TICKET_SIGNATURE.
    """
    if pubkey_digest(destination) not in authorities:
        raise TpmError(ReturnCode.MA_TICKET_SIGNATURE, "the destination is no authority")
