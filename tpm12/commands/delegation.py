"""Delegation: TPM Main r116 Part 3, chapter 19.

Leaves to others: blobs, permissions, tables (`tpm12.delegation`); sessions that use a delegation
(`commands/auth_sessions.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Final

from protocol.constants import DelegateType, FamilyFlag, FamilyOperation, Ordinal, StructureTag
from protocol.delegation_structures import (
    DelegateKeyBlob,
    DelegateOwnerBlob,
    DelegatePublic,
    DelegateTableEntry,
    FamilyTableEntry,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import U8, U32, Bool, EncAuth, Handle, Sized, decode, encode, in_sized, wire
from tpm12 import delegation, nv
from tpm12.authorization import OIAP, Authorized
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.state import DelegateRow, FamilyRow
from tpm12.tpm import Tpm

_OWNER: Final = "delegating_owner"
"""The owner's session, which these commands check themselves: other checks come before it."""
_COUNT_MAX: Final = 0xFFFFFFFF
_INDEX_BYTES: Final = 4
_TAG_BYTES: Final = 2
SizedOwnerBlob = Annotated[DelegateOwnerBlob, in_sized(DelegateOwnerBlob)]
SizedKeyBlob = Annotated[DelegateKeyBlob, in_sized(DelegateKeyBlob)]


# -- families ------------------------------------------------------------------------------------


@wire
class DelegateManageIn:
    """§19.1 incoming operands."""

    family_id: U32
    op_code: U32
    op_data: Sized


@wire
class DelegateManageOut:
    """§19.1 outgoing operands."""

    ret_data: Sized


@command(
    Ordinal.DELEGATE_MANAGE,
    name="Delegate_Manage",
    section="Part 3 §19.1",
    takes=DelegateManageIn,
    gives=DelegateManageOut,
    sessions=(AuthBy(_OWNER, may_drop=1),),
)
def delegate_manage(tpm: Tpm, cmd: DelegateManageIn, auth: Authorized) -> DelegateManageOut:
    """Make, enable, lock or drop a family; every session that may use a delegation ends.

    A family is made disabled. Without an owner anyone may do it, 64 times, until ADMIN_LOCK is set.

    Raises:
        TpmError: BADINDEX; AUTHFAIL; DELEGATE_FAMILY for a delegate in another family than its
            own; DELEGATE_LOCK, MAXNVWRITES without an owner; RESOURCES when the table is full;
            BAD_PARAMETER for another operation.
        DecodeError: BAD_PARAM_SIZE, BAD_PARAMETER when `op_data` is not what the operation takes.
    """
    is_new = cmd.op_code == FamilyOperation.CREATE
    family = None if is_new else delegation.family_at(tpm, cmd.family_id)
    if auth.blocks:
        _verify_owner(tpm, auth, None if is_new else cmd.family_id)
    else:
        _require_unowned_and_unlocked(tpm, family)
        nv.count_no_owner_write(tpm)
    delegation.end_delegated_use(tpm)
    if family is None:
        return DelegateManageOut(ret_data=_new_family(tpm, cmd.op_data).to_bytes(4, "big"))
    operation = _OPERATIONS.get(cmd.op_code)
    if operation is None:
        raise TpmError(ReturnCode.BAD_PARAMETER, "no family operation")
    operation(tpm, cmd.family_id, family, cmd.op_data)
    return DelegateManageOut(ret_data=b"")


def _verify_owner(tpm: Tpm, auth: Authorized, family_id: int | None) -> None:
    """Check the owner's session; a delegate's may touch its own family only.

    Args:
        tpm: The command's draft.
        auth: The command's authorization.
        family_id: What the command touches; None: no family that there is yet.
    """
    if not tpm.has_owner:
        raise TpmError(ReturnCode.AUTHFAIL, "no owner to be")
    auth.verify_owner(_OWNER)
    if family_id is not None:
        _require_own_family(auth, _OWNER, family_id)


def _require_own_family(auth: Authorized, over: str, family_id: int) -> DelegatePublic | None:
    """Check that a delegate keeps to its own family; give the delegation that it acts under."""
    delegated = auth.delegation(over)
    if delegated is not None and delegated.family_id != family_id:
        raise TpmError(ReturnCode.DELEGATE_FAMILY)
    return delegated


def _require_unowned_and_unlocked(tpm: Tpm, family: FamilyRow | None) -> None:
    """Check that a command without a session may change the tables."""
    if tpm.has_owner:
        raise TpmError(ReturnCode.AUTHFAIL, "the owner has not authorized this")
    if family is not None and family.flags & FamilyFlag.ADMIN_LOCK:
        raise TpmError(ReturnCode.DELEGATE_LOCK)
    nv.check_no_owner_writes(tpm)


@wire
class _Label:
    label: U8


@wire
class _Switch:
    is_on: Bool


def _new_family(tpm: Tpm, op_data: bytes) -> int:
    """Make a family; its ID was never used before and will not be used again."""
    permanent = tpm.permanent
    is_full = len(permanent.family_table) >= tpm.world.profile.family_rows
    if is_full or permanent.last_family_id == _COUNT_MAX:
        raise TpmError(ReturnCode.RESOURCES)
    label = decode(_Label, op_data).label
    family_id = permanent.last_family_id + 1
    tpm.change_permanent().last_family_id = family_id
    delegation.set_family(tpm, family_id, FamilyRow(label=label, verification_count=1, flags=0))
    return family_id


def _enable(tpm: Tpm, family_id: int, family: FamilyRow, op_data: bytes) -> None:
    _switch(tpm, family_id, family, FamilyFlag.ENABLED, op_data)


def _lock(tpm: Tpm, family_id: int, family: FamilyRow, op_data: bytes) -> None:
    _switch(tpm, family_id, family, FamilyFlag.ADMIN_LOCK, op_data)


def _switch(tpm: Tpm, family_id: int, family: FamilyRow, flag: int, op_data: bytes) -> None:
    is_on = decode(_Switch, op_data).is_on
    flags = family.flags | flag if is_on else family.flags & ~flag
    delegation.set_family(tpm, family_id, replace(family, flags=int(flags)))


def _drop(tpm: Tpm, family_id: int, _family: FamilyRow, _op_data: bytes) -> None:
    # Rows of the delegate table stay, as the specification allows; no check finds their family.
    permanent = tpm.change_permanent()
    permanent.family_table = {
        i: family for i, family in permanent.family_table.items() if i != family_id
    }


_OPERATIONS: Final[dict[int, Callable[[Tpm, int, FamilyRow, bytes], None]]] = {
    FamilyOperation.ENABLE: _enable,
    FamilyOperation.ADMIN: _lock,
    FamilyOperation.INVALIDATE: _drop,
}


# -- making delegations --------------------------------------------------------------------------


@wire
class DelegateCreateKeyDelegationIn:
    """§19.2 incoming operands."""

    key_handle: Handle
    public_info: DelegatePublic
    del_auth: EncAuth


@wire
class DelegateCreateKeyDelegationOut:
    """§19.2 outgoing operands."""

    blob: SizedKeyBlob


@command(
    Ordinal.DELEGATE_CREATE_KEY_DELEGATION,
    name="Delegate_CreateKeyDelegation",
    section="Part 3 §19.2",
    takes=DelegateCreateKeyDelegationIn,
    gives=DelegateCreateKeyDelegationOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("key_handle"),),
)
def delegate_create_key_delegation(
    tpm: Tpm, cmd: DelegateCreateKeyDelegationIn, auth: Authorized
) -> DelegateCreateKeyDelegationOut:
    """Delegate some uses of a key.

    Raises:
        TpmError: BADINDEX; DELEGATE_FAMILY, DISABLED_CMD, AUTHFAIL for a delegate who gives away
            what is not its own; BAD_PARAMETER for owner permissions; INVALID_AUTHHANDLE for an
            OIAP session.
    """
    family = _family_to_delegate_in(tpm, auth, "key_handle", cmd.public_info)
    _require(cmd.public_info, DelegateType.KEY_BITS)
    secret = _new_secret(auth, "key_handle", cmd.del_auth)
    public = delegation.current(cmd.public_info, family)
    blob = delegation.key_blob(tpm, public, auth.key("key_handle"), secret)
    return DelegateCreateKeyDelegationOut(blob=blob)


@wire
class DelegateCreateOwnerDelegationIn:
    """§19.3 incoming operands."""

    increment: Bool
    public_info: DelegatePublic
    del_auth: EncAuth


@wire
class DelegateCreateOwnerDelegationOut:
    """§19.3 outgoing operands."""

    blob: SizedOwnerBlob


@command(
    Ordinal.DELEGATE_CREATE_OWNER_DELEGATION,
    name="Delegate_CreateOwnerDelegation",
    section="Part 3 §19.3",
    takes=DelegateCreateOwnerDelegationIn,
    gives=DelegateCreateOwnerDelegationOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def delegate_create_owner_delegation(
    tpm: Tpm, cmd: DelegateCreateOwnerDelegationIn, auth: Authorized
) -> DelegateCreateOwnerDelegationOut:
    """Delegate some of the owner's commands; `increment` first ends the family's older delegations.

    Raises:
        TpmError: BADINDEX; DELEGATE_FAMILY, DISABLED_CMD, AUTHFAIL for a delegate who gives away
            what is not its own; BAD_PARAMETER for key permissions; INVALID_AUTHHANDLE for an OIAP
            session; FAMILYCOUNT when the count can grow no more: it must not begin again, or dead
            delegations would live again.
    """
    family = _family_to_delegate_in(tpm, auth, "owner", cmd.public_info)
    _require(cmd.public_info, DelegateType.OWNER_BITS)
    secret = _new_secret(auth, "owner", cmd.del_auth)
    if cmd.increment:
        if family.verification_count == _COUNT_MAX:
            raise TpmError(ReturnCode.FAMILYCOUNT)
        family = replace(family, verification_count=family.verification_count + 1)
        delegation.set_family(tpm, cmd.public_info.family_id, family)
        delegation.end_delegated_use(tpm)
    blob = delegation.owner_blob(tpm, delegation.current(cmd.public_info, family), secret)
    return DelegateCreateOwnerDelegationOut(blob=blob)


def _family_to_delegate_in(
    tpm: Tpm, auth: Authorized, over: str, public: DelegatePublic
) -> FamilyRow:
    """The family of a new delegation; a delegate may pass on what it has, and no more."""
    family = delegation.family_at(tpm, public.family_id)
    delegated = _require_own_family(auth, over, public.family_id)
    if delegated is not None:
        delegation.check_enabled(family)
        if public.permissions.per1 & ~delegated.permissions.per1:
            raise TpmError(ReturnCode.AUTHFAIL, "more than was delegated")
    return family


def _require(public: DelegatePublic, delegate_type: DelegateType) -> None:
    if public.permissions.delegate_type != delegate_type:
        raise TpmError(ReturnCode.BAD_PARAMETER)


def _new_secret(auth: Authorized, over: str, enc_auth: bytes) -> bytes:
    """Unmask the delegation's secret, which takes a session with a shared secret."""
    session, _ = auth.session(over)
    if session.protocol == OIAP:
        # Where other commands say BAD_MODE; the specification has a code for this one.
        raise TpmError(ReturnCode.INVALID_AUTHHANDLE, "an OIAP session masks no secret")
    return auth.decrypt_secret(over, enc_auth)


# -- the delegate table --------------------------------------------------------------------------


@wire
class DelegateLoadOwnerDelegationIn:
    """§19.4 incoming operands."""

    index: U32
    blob: SizedOwnerBlob


@command(
    Ordinal.DELEGATE_LOAD_OWNER_DELEGATION,
    name="Delegate_LoadOwnerDelegation",
    section="Part 3 §19.4",
    takes=DelegateLoadOwnerDelegationIn,
    sessions=(AuthBy(_OWNER, may_drop=1),),
)
def delegate_load_owner_delegation(
    tpm: Tpm, cmd: DelegateLoadOwnerDelegationIn, auth: Authorized
) -> None:
    """Keep an owner delegation in the TPM; every session that may use a delegation ends.

    Without an owner the secret comes in clear and nothing vouches for the blob: whoever makes a
    platform can prepare delegations that the later owner finds.

    Raises:
        TpmError: BADINDEX for family or row; AUTHFAIL, also for a blob of another TPM;
            DELEGATE_FAMILY; DELEGATE_LOCK, MAXNVWRITES without an owner; DISABLED_CMD;
            INVALID_STRUCTURE when there is no secret in the blob.
    """
    blob = cmd.blob
    family = delegation.family_at(tpm, blob.pub.family_id)
    if auth.blocks:
        _verify_owner(tpm, auth, blob.pub.family_id)
    else:
        _require_unowned_and_unlocked(tpm, family)
    delegation.check_enabled(family)
    no_secret = ReturnCode.INVALID_STRUCTURE
    if tpm.has_owner:
        delegation.check_integrity(tpm, blob)
        secret = delegation.secret_in(tpm, blob, no_secret)
    else:
        secret = delegation.clear_secret_in(blob.sensitive_area, no_secret)
    if cmd.index >= tpm.world.profile.delegate_rows:
        raise TpmError(ReturnCode.BADINDEX)
    delegation.end_delegated_use(tpm)
    delegation.set_row(tpm, cmd.index, DelegateRow(public=blob.pub, auth_value=secret))
    nv.count_no_owner_write(tpm)


@wire
class DelegateReadTableOut:
    """§19.5 outgoing operands: TPM_FAMILY_TABLE_ENTRYs, and row indices with their delegations."""

    family_table: Sized
    delegate_table: Sized


@command(
    Ordinal.DELEGATE_READ_TABLE,
    name="Delegate_ReadTable",
    section="Part 3 §19.5",
    gives=DelegateReadTableOut,
)
def delegate_read_table(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> DelegateReadTableOut:
    """Show families and delegations, without secrets."""
    families = [
        FamilyTableEntry(
            label=family.label,
            family_id=family_id,
            verification_count=family.verification_count,
            flags=family.flags,
        )
        for family_id, family in sorted(tpm.permanent.family_table.items())
    ]
    rows = [
        DelegateTableEntry(index=index, public=row.public)
        for index, row in sorted(tpm.permanent.delegate_table.items())
    ]
    return DelegateReadTableOut(
        family_table=b"".join(map(encode, families)), delegate_table=b"".join(map(encode, rows))
    )


# -- verification --------------------------------------------------------------------------------


def _blob_in(data: bytes) -> DelegateOwnerBlob | DelegateKeyBlob:
    """Read either kind of blob.

    Raises:
        TpmError: BAD_PARAMETER when it is neither; BAD_PARAM_SIZE when it is less than a tag.
        DecodeError: It is malformed.
    """
    if len(data) < _TAG_BYTES:
        raise TpmError(ReturnCode.BAD_PARAM_SIZE)
    tag = int.from_bytes(data[:_TAG_BYTES], "big")
    if tag == StructureTag.DELEGATE_OWNER_BLOB:
        return decode(DelegateOwnerBlob, data)
    if tag == StructureTag.DELEGATE_KEY_BLOB:
        return decode(DelegateKeyBlob, data)
    raise TpmError(ReturnCode.BAD_PARAMETER, "no delegation")


@wire
class DelegateUpdateVerificationIn:
    """§19.6 incoming operands: the index of a row, or a blob."""

    input_data: Sized


@wire
class DelegateUpdateVerificationOut:
    """§19.6 outgoing operands: the blob as it is now, or nothing."""

    output_data: Sized


@command(
    Ordinal.DELEGATE_UPDATE_VERIFICATION,
    name="Delegate_UpdateVerification",
    section="Part 3 §19.6",
    takes=DelegateUpdateVerificationIn,
    gives=DelegateUpdateVerificationOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def delegate_update_verification(
    tpm: Tpm, cmd: DelegateUpdateVerificationIn, auth: Authorized
) -> DelegateUpdateVerificationOut:
    """Let a delegation live on after its family's verificationCount has changed.

    Raises:
        TpmError: BADINDEX for row or family; BAD_PARAMETER when it is no blob; AUTHFAIL for one of
            another TPM; DELEGATE_FAMILY, DISABLED_CMD for a delegate.
        DecodeError: The blob is malformed.
    """
    data = cmd.input_data
    if len(data) == _INDEX_BYTES:
        index = int.from_bytes(data, "big")
        row = delegation.row_at(tpm, index)
        family = _family_to_update(tpm, auth, row.public)
        delegation.set_row(tpm, index, replace(row, public=delegation.current(row.public, family)))
        return DelegateUpdateVerificationOut(output_data=b"")
    blob = _blob_in(data)
    delegation.check_integrity(tpm, blob)
    family = _family_to_update(tpm, auth, blob.pub)
    updated = replace(blob, pub=delegation.current(blob.pub, family))
    return DelegateUpdateVerificationOut(
        output_data=encode(delegation.with_integrity(tpm, updated))
    )


def _family_to_update(tpm: Tpm, auth: Authorized, public: DelegatePublic) -> FamilyRow:
    family = delegation.family_at(tpm, public.family_id)
    if _require_own_family(auth, "owner", public.family_id) is not None:
        delegation.check_enabled(family)
    return family


@wire
class DelegateVerifyDelegationIn:
    """§19.7 incoming operands."""

    delegation: Sized


@command(
    Ordinal.DELEGATE_VERIFY_DELEGATION,
    name="Delegate_VerifyDelegation",
    section="Part 3 §19.7",
    takes=DelegateVerifyDelegationIn,
    gates=Gate.USABLE | Gate.OWNED,
)
def delegate_verify_delegation(
    tpm: Tpm, cmd: DelegateVerifyDelegationIn, _auth: Authorized
) -> None:
    """Tell whether a blob is a delegation that works here; its key need not be loaded.

    Raises:
        TpmError: BAD_PARAMETER when it is no blob; BADINDEX, DISABLED_CMD, FAMILYCOUNT for one
            that is no longer good; AUTHFAIL for one of another TPM.
        DecodeError: It is malformed.
    """
    blob = _blob_in(cmd.delegation)
    delegation.check_alive(tpm, blob.pub)
    delegation.check_integrity(tpm, blob)
    delegation.secret_in(tpm, blob, ReturnCode.BAD_PARAMETER)
