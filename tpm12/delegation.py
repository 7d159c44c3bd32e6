"""Delegation: which commands a delegation permits, families that keep it alive, and its blobs.

A delegation is some of the owner's commands, or some uses of one key, under a secret of its own. It
belongs to a family; it works while the family is enabled and has the same verificationCount.

Leaves to others: who may make and manage delegations (`commands/delegation.py`), opening sessions
(`commands/auth_sessions.py`), proving a use (`authorization.py`).

Source: TPM Main r116 Part 2 §20, Part 3 §18.3, §19, Part 1 on delegation.

Invariants:
- Nothing inside a blob is believed before its HMAC under tpmProof was checked.
- Equal delegations give different blobs: each has an IV of its own (libtpms' have none).
- Whatever can take a delegation away ends the sessions that use one, saved ones too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, TypeVar

from protocol.constants import (
    ZERO_DIGEST,
    CmkDelegate,
    DelegateType,
    FamilyFlag,
    KeyFlags,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    ProtocolId,
)
from protocol.delegation_structures import (
    DelegateKeyBlob,
    DelegateOwnerBlob,
    DelegatePublic,
    DelegateSensitive,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import StorePubkey
from protocol.wire import DecodeError, decode, encode
from tpm12.crypto import aes128_ctr, hmac_sha1, is_same, sha1
from tpm12.keys import LoadedKey
from tpm12.pcrs import check_release
from tpm12.state import DelegateRow, FamilyRow
from tpm12.tpm import Tpm

B = TypeVar("B", bound=DelegateOwnerBlob | DelegateKeyBlob)

_IV_BYTES: Final = 16


# -- permissions ---------------------------------------------------------------------------------

_OWNER_COMMANDS: Final = (  # Part 2 §20.2.1, bit 0 of per1 first
    Ordinal.DAA_SIGN,
    Ordinal.DELEGATE_CREATE_OWNER_DELEGATION,
    Ordinal.DELEGATE_MANAGE,
    Ordinal.RELEASE_COUNTER_OWNER,
    Ordinal.CREATE_COUNTER,
    Ordinal.DELEGATE_UPDATE_VERIFICATION,
    Ordinal.FIELD_UPGRADE,
    Ordinal.SET_REDIRECTION,
    Ordinal.DISABLE_PUBEK_READ,
    Ordinal.OWNER_READ_PUBEK,
    Ordinal.ACTIVATE_IDENTITY,
    Ordinal.MAKE_IDENTITY,
    Ordinal.SET_CAPABILITY,
    Ordinal.OWNER_SET_DISABLE,
    Ordinal.NV_DEFINE_SPACE,
    Ordinal.DISABLE_OWNER_CLEAR,
    Ordinal.OWNER_CLEAR,
    Ordinal.RESET_LOCK_VALUE,
    Ordinal.OWNER_READ_INTERNAL_PUB,
    Ordinal.KILL_MAINTENANCE_FEATURE,
    Ordinal.LOAD_MAINTENANCE_ARCHIVE,
    Ordinal.CREATE_MAINTENANCE_ARCHIVE,
    Ordinal.AUTHORIZE_MIGRATION_KEY,
    Ordinal.DAA_JOIN,
    Ordinal.DELEGATE_LOAD_OWNER_DELEGATION,
    Ordinal.NV_READ_VALUE,
    Ordinal.CMK_CREATE_TICKET,
    Ordinal.NV_WRITE_VALUE,
    Ordinal.CMK_APPROVE_MA,
    Ordinal.DIR_WRITE_AUTH,
    Ordinal.SET_ORDINAL_AUDIT_STATUS,
    Ordinal.KEY_CONTROL_OWNER,
)
_KEY_COMMANDS: Final = (  # Part 2 §20.2.3, bit 0 of per1 first
    Ordinal.LOAD_KEY,
    Ordinal.SEAL,
    Ordinal.UNSEAL,
    Ordinal.QUOTE,
    Ordinal.UN_BIND,
    Ordinal.GET_PUB_KEY,
    Ordinal.CHANGE_AUTH,
    Ordinal.DELEGATE_CREATE_KEY_DELEGATION,
    Ordinal.CONVERT_MIGRATION_BLOB,
    Ordinal.CREATE_MIGRATION_BLOB,
    Ordinal.CMK_CREATE_BLOB,
    Ordinal.CREATE_WRAP_KEY,
    Ordinal.CERTIFY_KEY,
    Ordinal.CERTIFY_KEY2,
    Ordinal.SIGN,
    Ordinal.GET_AUDIT_DIGEST_SIGNED,
    Ordinal.ACTIVATE_IDENTITY,
    Ordinal.MAKE_IDENTITY,
    Ordinal.SEALX,
    Ordinal.QUOTE2,
    Ordinal.RELEASE_TRANSPORT_SIGNED,
    Ordinal.ESTABLISH_TRANSPORT,
    Ordinal.LOAD_KEY2,
    Ordinal.MIGRATE_KEY,
    Ordinal.CMK_CREATE_KEY,
    Ordinal.CHANGE_AUTH_ASYM_FINISH,
    Ordinal.CHANGE_AUTH_ASYM_START,
    Ordinal.TICK_STAMP_BLOB,
    # libtpms has this bit with the owner's commands, where it permits nothing it should.
    Ordinal.CMK_CONVERT_MIGRATION,
)
PERMISSIONS: Final[dict[int, dict[int, int]]] = {
    DelegateType.OWNER_BITS: {ordinal: 1 << bit for bit, ordinal in enumerate(_OWNER_COMMANDS)},
    DelegateType.KEY_BITS: {ordinal: 1 << bit for bit, ordinal in enumerate(_KEY_COMMANDS)},
}
"""For each DelegateType: the bit of per1 that permits an ordinal; without one it cannot be
delegated."""


def check_use(
    tpm: Tpm, public: DelegatePublic, delegate_type: int, ordinal: int, failure: ReturnCode
) -> None:
    """Check that a delegation permits a command, here and now.

    Args:
        tpm: The command's draft.
        public: The delegation.
        delegate_type: DelegateType that the command needs.
        ordinal: Of the command.
        failure: What a command that is not permitted gives (AUTHFAIL, AUTH2FAIL).

    Raises:
        TpmError: `failure`; WRONGPCRVAL, BAD_LOCALITY.
    """
    bit = PERMISSIONS[delegate_type].get(ordinal, 0)
    permissions = public.permissions
    if permissions.delegate_type != delegate_type or not permissions.per1 & bit:
        raise TpmError(failure, "the delegation does not permit this command")
    check_release(tpm, public.pcr_info)


_CMK_USAGES: Final[dict[int, int]] = {
    KeyUsage.SIGNING: CmkDelegate.SIGNING,
    KeyUsage.STORAGE: CmkDelegate.STORAGE,
    KeyUsage.BIND: CmkDelegate.BIND,
    KeyUsage.LEGACY: CmkDelegate.LEGACY,
    KeyUsage.MIGRATE: CmkDelegate.MIGRATE,
}


def check_key(tpm: Tpm, key: LoadedKey) -> None:
    """Check that the owner lets delegates use this key, if it is a certified migratable one.

    Raises:
        TpmError: INVALID_KEYUSAGE (TPM_CMK_SetRestrictions, Part 3 §11.5).
    """
    if key.flags & KeyFlags.MIGRATE_AUTHORITY:
        allowed = tpm.permanent.restrict_delegate
        if not allowed & _CMK_USAGES.get(key.usage, 0):
            raise TpmError(ReturnCode.INVALID_KEYUSAGE, "no delegated use of this kind of CMK")


# -- families and rows ---------------------------------------------------------------------------


def family_at(tpm: Tpm, family_id: int) -> FamilyRow:
    """The family with an ID.

    Raises:
        TpmError: BADINDEX when there is none.
    """
    family = tpm.permanent.family_table.get(family_id)
    if family is None:
        raise TpmError(ReturnCode.BADINDEX, f"no family {family_id}")
    return family


def set_family(tpm: Tpm, family_id: int, family: FamilyRow) -> None:
    """Put a family into the table; when it stands there so already, nothing changes."""
    if tpm.permanent.family_table.get(family_id) != family:
        permanent = tpm.change_permanent()
        permanent.family_table = {**permanent.family_table, family_id: family}


def check_enabled(family: FamilyRow) -> None:
    """Check that delegations of a family may be used.

    Raises:
        TpmError: DISABLED_CMD.
    """
    if not family.flags & FamilyFlag.ENABLED:
        raise TpmError(ReturnCode.DISABLED_CMD, "the family is disabled")


def check_alive(tpm: Tpm, public: DelegatePublic) -> None:
    """Check that a delegation's family is there, is enabled, and did not move on without it.

    Raises:
        TpmError: BADINDEX, DISABLED_CMD, FAMILYCOUNT.
    """
    family = family_at(tpm, public.family_id)
    check_enabled(family)
    if public.verification_count != family.verification_count:
        raise TpmError(ReturnCode.FAMILYCOUNT)


def row_at(tpm: Tpm, index: int) -> DelegateRow:
    """A row of the delegate table.

    Raises:
        TpmError: BADINDEX when nothing was loaded there.
    """
    row = tpm.permanent.delegate_table.get(index)
    if row is None:
        raise TpmError(ReturnCode.BADINDEX, f"no delegation in row {index}")
    return row


def set_row(tpm: Tpm, index: int, row: DelegateRow) -> None:
    """Put a delegation into the table; when it stands there so already, nothing changes."""
    if tpm.permanent.delegate_table.get(index) != row:
        permanent = tpm.change_permanent()
        permanent.delegate_table = {**permanent.delegate_table, index: row}


def current(public: DelegatePublic, family: FamilyRow) -> DelegatePublic:
    """The same delegation with its family's verificationCount."""
    return replace(public, verification_count=family.verification_count)


def end_delegated_use(tpm: Tpm) -> None:
    """End the sessions that a change of the delegation tables must end; the owner is itself again.

    All OSAP and DSAP sessions, as libtpms does it: DSAP sessions must go, others may (Part 3
    §19.1). Saved ones are found out when they are loaded, by the count that moves on here.
    """
    stany = tpm.change_stany()
    stany.sessions = {
        handle: session
        for handle, session in stany.sessions.items()
        if session.protocol == ProtocolId.OIAP
    }
    stany.delegation_changes += 1
    if tpm.stclear.owner_reference != KeyHandleValue.OWNER:
        tpm.change_stclear().owner_reference = int(KeyHandleValue.OWNER)


# -- blobs ---------------------------------------------------------------------------------------


def owner_blob(tpm: Tpm, public: DelegatePublic, secret: bytes) -> DelegateOwnerBlob:
    """Make the blob of an owner delegation."""
    iv, sensitive_area = _encrypted(tpm, secret)
    blob = DelegateOwnerBlob(
        pub=public,
        integrity_digest=ZERO_DIGEST,
        additional_area=iv,
        sensitive_area=sensitive_area,
    )
    return with_integrity(tpm, blob)


def key_blob(tpm: Tpm, public: DelegatePublic, key: LoadedKey, secret: bytes) -> DelegateKeyBlob:
    """Make the blob of a key delegation."""
    iv, sensitive_area = _encrypted(tpm, secret)
    blob = DelegateKeyBlob(
        pub=public,
        integrity_digest=ZERO_DIGEST,
        pub_key_digest=pub_key_digest(key),
        additional_area=iv,
        sensitive_area=sensitive_area,
    )
    return with_integrity(tpm, blob)


def pub_key_digest(key: LoadedKey) -> bytes:
    """What a key delegation knows its key by: H(TPM_STORE_PUBKEY)."""
    return sha1(encode(StorePubkey(key=key.public.pub_key)))


def with_integrity(tpm: Tpm, blob: B) -> B:
    """The same blob under a fresh HMAC (after its verificationCount was changed)."""
    return replace(blob, integrity_digest=_integrity(tpm, blob))


def check_integrity(tpm: Tpm, blob: DelegateOwnerBlob | DelegateKeyBlob) -> None:
    """Check that this TPM made a blob for this owner, and that it is as it was.

    Raises:
        TpmError: AUTHFAIL.
    """
    if not is_same(blob.integrity_digest, _integrity(tpm, blob)):
        raise TpmError(ReturnCode.AUTHFAIL, "not a delegation of this TPM")


def secret_in(tpm: Tpm, blob: DelegateOwnerBlob | DelegateKeyBlob, code: ReturnCode) -> bytes:
    """Decrypt the secret of a delegation whose integrity was checked; 20 bytes.

    Raises:
        TpmError: `code` when it is none.
    """
    if len(blob.additional_area) != _IV_BYTES:
        raise TpmError(code)
    key = tpm.permanent.delegate_key
    return clear_secret_in(aes128_ctr(key, blob.additional_area, blob.sensitive_area), code)


def clear_secret_in(sensitive: bytes, code: ReturnCode) -> bytes:
    """The secret in a TPM_DELEGATE_SENSITIVE; 20 bytes.

    Raises:
        TpmError: `code` when it is none.
    """
    try:
        return decode(DelegateSensitive, sensitive).auth_value
    except DecodeError as error:
        raise TpmError(code, "no TPM_DELEGATE_SENSITIVE") from error


def _encrypted(tpm: Tpm, secret: bytes) -> tuple[bytes, bytes]:
    iv = tpm.random(_IV_BYTES)
    sensitive = encode(DelegateSensitive(auth_value=secret))
    return iv, aes128_ctr(tpm.permanent.delegate_key, iv, sensitive)


def _integrity(tpm: Tpm, blob: DelegateOwnerBlob | DelegateKeyBlob) -> bytes:
    return hmac_sha1(tpm.permanent.tpm_proof, encode(replace(blob, integrity_digest=ZERO_DIGEST)))
