"""What one key says about another: TPM_CERTIFY_INFO and TPM_CERTIFY_INFO2.

Leaves to others: who may ask (`commands/cryptographic.py`), how it is signed (`crypto.py`).

Source: TPM Main r116 Part 2 §11.1, §11.2, Part 3 §13.8, §13.9.
"""

from __future__ import annotations

from typing import Annotated, Final

from protocol.constants import STRUCT_VER, ZERO_DIGEST, PayloadType, StructureTag
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    UNRESTRICTED_PCR_INFO,
    KeyParms,
    PcrInfo,
    PcrInfoLong,
    PcrInfoShort,
    StructVer,
)
from protocol.wire import (
    U8,
    U16,
    U32,
    Bool,
    ByLeadingU16,
    ConstU8,
    ConstU16,
    Digest,
    Nonce,
    Sized,
    encode,
    wire,
)
from tpm12.crypto import hmac_sha1, is_same, sha1
from tpm12.keys import LoadedKey
from tpm12.pcrs import release_selection

_FIRST_PCR_OF_12: Final = 16
"""A 1.1 TPM has no PCR from here on."""
_ANY_LOCALITY: Final = UNRESTRICTED_PCR_INFO.locality_at_release
CMK_PAYLOADS: Final = frozenset({PayloadType.MIGRATE_RESTRICTED, PayloadType.MIGRATE_EXTERNAL})


@wire
class CertifyInfo:
    """TPM_CERTIFY_INFO (§11.1); `pcr_info` is empty or a PcrInfo."""

    version: StructVer = STRUCT_VER
    key_usage: U16
    key_flags: U32
    auth_data_usage: U8
    algorithm_parms: KeyParms
    pubkey_digest: Digest
    data: Nonce
    parent_pcr_status: Bool
    pcr_info: Sized


@wire
class CertifyInfo2:
    """TPM_CERTIFY_INFO2 (§11.2); `pcr_info` is empty or a PcrInfoShort."""

    tag: ConstU16 = StructureTag.CERTIFY_INFO2
    fill: ConstU8 = 0
    payload_type: U8
    key_usage: U16
    key_flags: U32
    auth_data_usage: U8
    algorithm_parms: KeyParms
    pubkey_digest: Digest
    data: Nonce
    parent_pcr_status: Bool
    pcr_info: Sized
    migration_authority: Sized


AnyCertifyInfo = Annotated[
    CertifyInfo | CertifyInfo2,
    ByLeadingU16({StructureTag.CERTIFY_INFO2: CertifyInfo2}, CertifyInfo),
]


@wire
class CmkMigauth:
    """TPM_CMK_MIGAUTH (§5.19): what binds a certified migratable key to its authorities."""

    tag: ConstU16 = StructureTag.CMK_MIGAUTH
    msa_digest: Digest
    pub_key_digest: Digest


def certify_info(key: LoadedKey, anti_replay: bytes) -> CertifyInfo | CertifyInfo2:
    """Describe a key in the form that a 1.1 verifier reads, where that form can say all."""
    binding = key.pcr_info
    if binding is None:
        return _info(key, anti_replay, b"")
    uses_new_pcrs = any(i >= _FIRST_PCR_OF_12 for i in release_selection(binding).indices)
    if uses_new_pcrs or _locality_of(binding) != _ANY_LOCALITY:
        return _info2(key, anti_replay, b"")
    short = PcrInfo(
        pcr_selection=release_selection(binding),
        digest_at_release=binding.digest_at_release,
        # The specification asks for zeros, whatever the key's own creation digest is.
        digest_at_creation=ZERO_DIGEST,
    )
    return _info(key, anti_replay, encode(short))


def certify_info2(
    key: LoadedKey, anti_replay: bytes, migration_pub_digest: bytes, tpm_proof: bytes
) -> CertifyInfo2:
    """Describe a key in the 1.2 form, with its migration authorities if it has any.

    Args:
        key: The key that is certified.
        anti_replay: The caller's nonce.
        migration_pub_digest: H(MSA_COMPOSITE); looked at for certified migratable keys only.
        tpm_proof: This TPM's.

    Raises:
        TpmError: MA_SOURCE when a certified migratable key belongs to other authorities.
    """
    if key.payload not in CMK_PAYLOADS:
        return _info2(key, anti_replay, b"")
    bound = CmkMigauth(msa_digest=migration_pub_digest, pub_key_digest=sha1(encode(key.pubkey())))
    if not is_same(key.migration_auth, hmac_sha1(tpm_proof, encode(bound))):
        raise TpmError(ReturnCode.MA_SOURCE)
    return _info2(key, anti_replay, sha1(migration_pub_digest, bytes([key.payload])))


def _locality_of(binding: PcrInfo | PcrInfoLong) -> int:
    return binding.locality_at_release if isinstance(binding, PcrInfoLong) else _ANY_LOCALITY


def _info(key: LoadedKey, anti_replay: bytes, pcr_info: bytes) -> CertifyInfo:
    return CertifyInfo(
        key_usage=key.usage,
        key_flags=key.flags,
        auth_data_usage=key.auth_data_usage,
        algorithm_parms=key.public.algorithm_parms,
        pubkey_digest=sha1(key.public.pub_key),
        data=anti_replay,
        parent_pcr_status=key.parent_pcr_status,
        pcr_info=pcr_info,
    )


def _info2(key: LoadedKey, anti_replay: bytes, migration_authority: bytes) -> CertifyInfo2:
    binding = key.pcr_info
    pcr_info = b""
    if binding is not None:
        short = PcrInfoShort(
            pcr_selection=release_selection(binding),
            locality_at_release=_locality_of(binding),
            digest_at_release=binding.digest_at_release,
        )
        pcr_info = encode(short)
    return CertifyInfo2(
        payload_type=key.payload,
        key_usage=key.usage,
        key_flags=key.flags,
        auth_data_usage=key.auth_data_usage,
        algorithm_parms=key.public.algorithm_parms,
        pubkey_digest=sha1(key.public.pub_key),
        data=anti_replay,
        parent_pcr_status=key.parent_pcr_status,
        pcr_info=pcr_info,
        migration_authority=migration_authority,
    )
