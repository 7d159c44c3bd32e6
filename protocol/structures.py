"""TPM 1.2 structures that more than one command uses.

Source: TPM Main r116 Part 2 (§5 basic structures, §7 flags, §8 PCR, §9 storage, §10 keys,
§11 signed structures, §12 identities, §13 transport, §14 audit, §15 ticks, §18 contexts,
§19 NV, §21 capabilities, §22 DAA); PC Client for widths. Delegation has a module of its own.
Operands of one command only are declared beside its handler.
"""

from __future__ import annotations

from typing import Annotated

import construct as cs

from protocol.constants import (
    PCR_SELECT_BYTES_MAX,
    STRUCT_VER,
    ZERO_DIGEST,
    StructureTag,
)
from protocol.return_codes import ReturnCode
from protocol.wire import (
    B4,
    B16,
    U8,
    U16,
    U32,
    U64,
    Bool,
    ByLeadingU16,
    Checked,
    ConstU16,
    ConstU32,
    Counted,
    Digest,
    Mapped,
    Nonce,
    Rest,
    SecretAuth,
    SecretSized,
    Sized,
    wire,
)

StructVer = Annotated[
    bytes,
    # The two revision bytes are ignored on input and zero on output (Part 2 §5.1).
    Mapped(
        Checked(
            cs.Bytes(4),
            lambda version: version[:2] == STRUCT_VER[:2],
            ReturnCode.BAD_VERSION,
            "a structure version other than 1.1",
        ),
        lambda _version: STRUCT_VER,
        lambda version: version,
    ),
]
LocalityMask = Annotated[
    int,
    Checked(
        cs.Int8ub,
        lambda mask: 0 < mask <= 0x1F,
        ReturnCode.INVALID_STRUCTURE,
        "a locality mask of zero or with a bit above locality 4",
    ),
]
PcrSelect = Annotated[
    bytes,
    Checked(
        cs.Prefixed(cs.Int16ub, cs.GreedyBytes),
        lambda select: len(select) <= PCR_SELECT_BYTES_MAX,
        ReturnCode.INVALID_PCR_INFO,
        "a PCR selection of more than 3 bytes",
    ),
]


# -- PCRs ----------------------------------------------------------------------------------------


@wire
class PcrSelection:
    """TPM_PCR_SELECTION (§8.1): PCR i is bit i % 8 of byte i / 8."""

    pcr_select: PcrSelect

    @property
    def indices(self) -> tuple[int, ...]:
        """The selected PCRs, ascending."""
        return SELECTED[self.pcr_select]


class _Selected(dict[bytes, tuple[int, ...]]):
    """Memo of selection bytes to indices; bounded by the number of 3-byte selections in use."""

    _ENTRIES_MAX = 4096

    def __missing__(self, select: bytes) -> tuple[int, ...]:
        found = tuple(i for i in range(8 * len(select)) if select[i >> 3] >> (i & 7) & 1)
        if len(self) >= self._ENTRIES_MAX:
            self.clear()
        self[select] = found
        return found


SELECTED = _Selected()


@wire
class PcrComposite:
    """TPM_PCR_COMPOSITE (§8.2): a selection and the selected values, ascending."""

    select: PcrSelection
    pcr_value: Sized


@wire
class PcrInfo:
    """TPM_PCR_INFO (§8.3), of 1.1 age."""

    pcr_selection: PcrSelection
    digest_at_release: Digest
    digest_at_creation: Digest


@wire
class PcrInfoLong:
    """TPM_PCR_INFO_LONG (§8.4)."""

    tag: ConstU16 = StructureTag.PCR_INFO_LONG
    locality_at_creation: LocalityMask
    locality_at_release: LocalityMask
    creation_pcr_selection: PcrSelection
    release_pcr_selection: PcrSelection
    digest_at_creation: Digest
    digest_at_release: Digest


@wire
class PcrInfoShort:
    """TPM_PCR_INFO_SHORT (§8.5)."""

    pcr_selection: PcrSelection
    locality_at_release: LocalityMask
    digest_at_release: Digest


# -- keys ----------------------------------------------------------------------------------------


@wire
class RsaKeyParms:
    """TPM_RSA_KEY_PARMS (§10.1.1). An exponent of size 0 means 65537."""

    key_length: U32
    num_primes: U32
    exponent: Sized


@wire
class SymmetricKeyParms:
    """TPM_SYMMETRIC_KEY_PARMS (§10.1.2)."""

    key_length: U32
    block_size: U32
    iv: Sized


@wire
class KeyParms:
    """TPM_KEY_PARMS (§10.1)."""

    algorithm_id: U32
    enc_scheme: U16
    sig_scheme: U16
    parms: Sized


@wire
class Key:
    """TPM_KEY (§10.2), of 1.1 age; `pcr_info` is empty or a PcrInfo."""

    ver: StructVer = STRUCT_VER
    key_usage: U16
    key_flags: U32
    auth_data_usage: U8
    algorithm_parms: KeyParms
    pcr_info: Sized
    pub_key: Sized
    enc_data: Sized


@wire
class Key12:
    """TPM_KEY12 (§10.3); `pcr_info` is empty or a PcrInfoLong."""

    tag: ConstU16 = StructureTag.KEY12
    fill: U16 = 0
    key_usage: U16
    key_flags: U32
    auth_data_usage: U8
    algorithm_parms: KeyParms
    pcr_info: Sized
    pub_key: Sized
    enc_data: Sized


AnyKey = Annotated[Key | Key12, ByLeadingU16({StructureTag.KEY12: Key12}, Key)]


@wire
class StorePubkey:
    """TPM_STORE_PUBKEY (§10.4): the modulus."""

    key: Sized


@wire
class Pubkey:
    """TPM_PUBKEY (§10.5)."""

    algorithm_parms: KeyParms
    pub_key: StorePubkey


@wire
class StoreAsymkey:
    """TPM_STORE_ASYMKEY (§10.6): what `enc_data` of a key decrypts to; `priv_key` is one prime."""

    payload: U8
    usage_auth: SecretAuth
    migration_auth: SecretAuth
    pub_data_digest: Digest
    priv_key: SecretSized


@wire
class SymmetricKey:
    """TPM_SYMMETRIC_KEY (§9.4): a session key in an identity credential."""

    alg_id: U32
    enc_scheme: U16
    data: Annotated[bytes, cs.Prefixed(cs.Int16ub, cs.GreedyBytes)]


@wire
class KeyHandleList:
    """TPM_KEY_HANDLE_LIST (§5.7)."""

    handles: Annotated[tuple[int, ...], Counted(cs.Int16ub, cs.Int32ub)]


# -- storage -------------------------------------------------------------------------------------


@wire
class StoredData:
    """TPM_STORED_DATA (§9.1), of 1.1 age; `seal_info` is empty or a PcrInfo."""

    ver: StructVer = STRUCT_VER
    seal_info: Sized
    enc_data: Sized


@wire
class StoredData12:
    """TPM_STORED_DATA12 (§9.2); `et` is 0 for TPM_Seal, the ADIP scheme for TPM_Sealx."""

    tag: ConstU16 = StructureTag.STORED_DATA12
    et: U16
    seal_info: Sized
    enc_data: Sized


AnyStoredData = Annotated[
    StoredData | StoredData12,
    ByLeadingU16({StructureTag.STORED_DATA12: StoredData12}, StoredData),
]


@wire
class SealedData:
    """TPM_SEALED_DATA (§9.3)."""

    payload: U8
    auth_data: SecretAuth
    tpm_proof: SecretAuth
    stored_digest: Digest
    data: SecretSized


@wire
class BoundData:
    """TPM_BOUND_DATA (§9.5)."""

    ver: StructVer = STRUCT_VER
    payload: U8
    payload_data: Rest


# -- signed structures ---------------------------------------------------------------------------


@wire
class SignInfo:
    """TPM_SIGN_INFO (§5.14): the form of everything a 1.2 command signs."""

    tag: ConstU16 = StructureTag.SIGN_INFO
    fixed: B4
    replay: Nonce
    data: Sized


@wire
class QuoteInfo:
    """TPM_QUOTE_INFO (§11.3)."""

    version: StructVer = STRUCT_VER
    fixed: B4 = b"QUOT"
    digest_value: Digest
    external_data: Nonce


@wire
class QuoteInfo2:
    """TPM_QUOTE_INFO2 (§11.4)."""

    tag: ConstU16 = StructureTag.QUOTE_INFO2
    fixed: B4 = b"QUT2"
    external_data: Nonce
    info_short: PcrInfoShort


@wire
class CapVersionInfo:
    """TPM_CAP_VERSION_INFO (§21.6); `version` is major, minor, revision major, revision minor."""

    tag: ConstU16 = StructureTag.CAP_VERSION_INFO
    version: B4
    spec_level: U16
    errata_rev: U8
    tpm_vendor_id: B4
    vendor_specific: Annotated[bytes, cs.Prefixed(cs.Int16ub, cs.GreedyBytes)]


# -- identities ----------------------------------------------------------------------------------


@wire
class IdentityContents:
    """TPM_IDENTITY_CONTENTS (§12.5): what an identity key signs about itself."""

    ver: StructVer = STRUCT_VER
    ordinal: ConstU32 = 0x79
    label_priv_ca_digest: Digest
    identity_pub_key: Pubkey


@wire
class AsymCaContents:
    """TPM_ASYM_CA_CONTENTS (§12.8)."""

    session_key: SymmetricKey
    id_digest: Digest


@wire
class EkBlob:
    """TPM_EK_BLOB (§12.1)."""

    tag: ConstU16 = StructureTag.EK_BLOB
    ek_type: U16
    blob: Sized


@wire
class EkBlobActivate:
    """TPM_EK_BLOB_ACTIVATE (§12.2)."""

    tag: ConstU16 = StructureTag.EK_BLOB_ACTIVATE
    session_key: SymmetricKey
    id_digest: Digest
    pcr_info: PcrInfoShort


# -- NV, counters, ticks -------------------------------------------------------------------------


@wire
class NvAttributes:
    """TPM_NV_ATTRIBUTES (§19.2)."""

    tag: ConstU16 = StructureTag.NV_ATTRIBUTES
    attributes: U32


@wire
class NvDataPublic:
    """TPM_NV_DATA_PUBLIC (§19.3); `data_size` in bytes."""

    tag: ConstU16 = StructureTag.NV_DATA_PUBLIC
    nv_index: U32
    pcr_info_read: PcrInfoShort
    pcr_info_write: PcrInfoShort
    permission: NvAttributes
    b_read_stclear: Bool
    b_write_stclear: Bool
    b_write_define: Bool
    data_size: U32


@wire
class CounterValue:
    """TPM_COUNTER_VALUE (§5.13): a label and a count."""

    tag: ConstU16 = StructureTag.COUNTER_VALUE
    label: B4
    counter: U32


@wire
class CurrentTicks:
    """TPM_CURRENT_TICKS (§15.1); `tick_rate` in microseconds a tick."""

    tag: ConstU16 = StructureTag.CURRENT_TICKS
    current_ticks: U64
    tick_rate: U16
    tick_nonce: Nonce


# -- transport sessions and audit ----------------------------------------------------------------


@wire
class TransportPublic:
    """TPM_TRANSPORT_PUBLIC (§13.1): what a transport session does, and with which cipher."""

    tag: ConstU16 = StructureTag.TRANSPORT_PUBLIC
    trans_attributes: U32
    alg_id: U32
    enc_scheme: U16


@wire
class TransportLogIn:
    """TPM_TRANSPORT_LOG_IN (§13.3)."""

    tag: ConstU16 = StructureTag.TRANSPORT_LOG_IN
    parameters: Digest
    pub_key_hash: Digest


@wire
class TransportLogOut:
    """TPM_TRANSPORT_LOG_OUT (§13.4)."""

    tag: ConstU16 = StructureTag.TRANSPORT_LOG_OUT
    current_ticks: CurrentTicks
    parameters: Digest
    locality: U32


@wire
class TransportAuth:
    """TPM_TRANSPORT_AUTH (§13.5): the secret of a transport session, on its way to the TPM."""

    tag: ConstU16 = StructureTag.TRANSPORT_AUTH
    auth_data: SecretAuth


@wire
class AuditEventIn:
    """TPM_AUDIT_EVENT_IN (§14.1)."""

    tag: ConstU16 = StructureTag.AUDIT_EVENT_IN
    input_parms: Digest
    audit_count: CounterValue


@wire
class AuditEventOut:
    """TPM_AUDIT_EVENT_OUT (§14.2)."""

    tag: ConstU16 = StructureTag.AUDIT_EVENT_OUT
    output_parms: Digest
    audit_count: CounterValue


# -- migration -----------------------------------------------------------------------------------


@wire
class StorePrivkey:
    """TPM_STORE_PRIVKEY (§10.7): one prime of a key."""

    key: SecretSized


@wire
class MigrateAsymkey:
    """TPM_MIGRATE_ASYMKEY (§10.8): a private key on its way, without its first 16 bytes."""

    payload: U8
    usage_auth: SecretAuth
    pub_data_digest: Digest
    part_priv_key: SecretSized


@wire
class MigrationKeyAuth:
    """TPM_MIGRATIONKEYAUTH (§5.12): the owner's word for a destination and a MigrateScheme."""

    migration_key: Pubkey
    migration_scheme: U16
    digest: Digest


@wire
class MsaComposite:
    """TPM_MSA_COMPOSITE (§5.15): digests of the TPM_PUBKEYs of migration authorities."""

    mig_auth_digest: Annotated[
        tuple[bytes, ...],
        Checked(
            Counted(cs.Int32ub, cs.Bytes(20)),
            bool,
            ReturnCode.INVALID_STRUCTURE,
            "a list of no migration authorities",
        ),
    ]


@wire
class CmkAuth:
    """TPM_CMK_AUTH (§5.16): what a migration authority signs to approve a destination."""

    migration_authority_digest: Digest
    destination_key_digest: Digest
    source_key_digest: Digest


@wire
class CmkSigticket:
    """TPM_CMK_SIGTICKET (§5.20): a signature that this TPM has checked."""

    tag: ConstU16 = StructureTag.CMK_SIGTICKET
    ver_key_digest: Digest
    signed_data: Digest


@wire
class CmkMaApproval:
    """TPM_CMK_MA_APPROVAL (§5.21): migration authorities that the owner accepts."""

    tag: ConstU16 = StructureTag.CMK_MA_APPROVAL
    migration_authority_digest: Digest


# -- direct anonymous attestation ----------------------------------------------------------------


@wire
class DaaIssuer:
    """TPM_DAA_ISSUER (§22.3): digests of an issuer's public numbers, and the group order q."""

    tag: ConstU16 = StructureTag.DAA_ISSUER
    daa_digest_r0: Digest
    daa_digest_r1: Digest
    daa_digest_s0: Digest
    daa_digest_s1: Digest
    daa_digest_n: Digest
    daa_digest_gamma: Digest
    daa_generic_q: Annotated[bytes, cs.Bytes(26)]


@wire
class DaaTpm:
    """TPM_DAA_TPM (§22.4): what a TPM keeps of one credential."""

    tag: ConstU16 = StructureTag.DAA_TPM
    daa_digest_issuer: Digest
    daa_digest_v0: Digest
    daa_digest_v1: Digest
    daa_rekey: SecretAuth
    daa_count: U32


@wire
class DaaBlob:
    """TPM_DAA_BLOB (§22.8): a part of a credential, kept outside for the TPM that made it."""

    tag: ConstU16 = StructureTag.DAA_BLOB
    resource_type: U32
    label: B16
    blob_integrity: Digest
    additional_data: Sized
    sensitive_data: Sized


@wire
class DaaSensitive:
    """TPM_DAA_SENSITIVE (§22.9)."""

    tag: ConstU16 = StructureTag.DAA_SENSITIVE
    internal_data: SecretSized


# -- contexts ------------------------------------------------------------------------------------


@wire
class ContextBlob:
    """TPM_CONTEXT_BLOB (§18.1): a key or a session, kept outside for the TPM that had it."""

    tag: ConstU16 = StructureTag.CONTEXT_BLOB
    resource_type: U32
    handle: U32
    label: B16
    context_count: U32
    integrity_digest: Digest
    additional_data: Sized
    sensitive_data: Sized


@wire
class ContextSensitive:
    """TPM_CONTEXT_SENSITIVE (§18.2)."""

    tag: ConstU16 = StructureTag.CONTEXT_SENSITIVE
    context_nonce: Nonce
    internal_data: SecretSized


# -- capabilities --------------------------------------------------------------------------------


@wire
class SelectSize:
    """TPM_SELECT_SIZE (§5.18): may a PCR selection have this many bytes?"""

    major: U8
    minor: U8
    req_size: U16


@wire
class DaActionType:
    """TPM_DA_ACTION_TYPE (§21)."""

    tag: ConstU16 = StructureTag.DA_ACTION_TYPE
    actions: U32


@wire
class DaInfo:
    """TPM_DA_INFO (§21): state of the dictionary-attack defence."""

    tag: ConstU16 = StructureTag.DA_INFO
    state: U8
    current_count: U16
    threshold_count: U16
    action_at_threshold: DaActionType
    action_depend_value: U32
    vendor_data: Sized


@wire
class DaInfoLimited:
    """TPM_DA_INFO_LIMITED (§21)."""

    tag: ConstU16 = StructureTag.DA_INFO_LIMITED
    state: U8
    action_at_threshold: DaActionType
    vendor_data: Sized


@wire
class PermanentFlags:
    """TPM_PERMANENT_FLAGS (§7.1), in the order of the specification."""

    tag: ConstU16 = StructureTag.PERMANENT_FLAGS
    disable: Bool
    ownership: Bool
    deactivated: Bool
    read_pubek: Bool
    disable_owner_clear: Bool
    allow_maintenance: Bool
    physical_presence_lifetime_lock: Bool
    physical_presence_hw_enable: Bool
    physical_presence_cmd_enable: Bool
    cekp_used: Bool
    tpm_post: Bool
    tpm_post_lock: Bool
    fips: Bool
    operator: Bool
    enable_revoke_ek: Bool
    nv_locked: Bool
    read_srk_pub: Bool
    tpm_established: Bool
    maintenance_done: Bool
    disable_full_da_logic_info: Bool


@wire
class StclearFlags:
    """TPM_STCLEAR_FLAGS (§7.2)."""

    tag: ConstU16 = StructureTag.STCLEAR_FLAGS
    deactivated: Bool
    disable_force_clear: Bool
    physical_presence: Bool
    physical_presence_lock: Bool
    b_global_lock: Bool


UNRESTRICTED_PCR_INFO = PcrInfoShort(
    pcr_selection=PcrSelection(pcr_select=bytes(PCR_SELECT_BYTES_MAX)),
    locality_at_release=0x1F,
    digest_at_release=ZERO_DIGEST,
)
"""No PCR selected, any locality."""
