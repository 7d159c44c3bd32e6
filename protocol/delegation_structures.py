"""TPM 1.2 structures of delegation: permissions, families, and blobs that carry a delegation.

Source: TPM Main r116 Part 2 §20.
"""

from __future__ import annotations

from typing import Annotated, Final

from protocol.constants import DelegateType, StructureTag
from protocol.return_codes import ReturnCode
from protocol.structures import PcrInfoShort
from protocol.wire import (
    U8,
    U32,
    Checked,
    ConstU16,
    Digest,
    Nested,
    SecretAuth,
    Sized,
    wire,
)

KEY_PERMISSIONS: Final = 0x1FFFFFFF
"""Bits of per1 that mean something in a key delegation; in an owner delegation all do (§20.2)."""


@wire
class Delegations:
    """TPM_DELEGATIONS (§20.2): which commands; `per1` is read by DelegateType, `per2` is unused."""

    tag: ConstU16 = StructureTag.DELEGATIONS
    delegate_type: U32
    per1: U32
    per2: U32


def _grants_what_exists(permissions: Delegations) -> bool:
    if permissions.per2:
        return False
    if permissions.delegate_type == DelegateType.KEY_BITS:
        return not permissions.per1 & ~KEY_PERMISSIONS
    return permissions.delegate_type == DelegateType.OWNER_BITS


@wire
class DelegatePublic:
    """TPM_DELEGATE_PUBLIC (§20.8): what is delegated, under which PCRs and localities, by whom.

    Attributes:
        label: The owner's own; the TPM does not look at it.
        pcr_info: Checked at each use of the delegation.
        verification_count: The family's at the time; a delegation with another count is dead.
    """

    tag: ConstU16 = StructureTag.DELEGATE_PUBLIC
    label: U8
    pcr_info: PcrInfoShort
    permissions: Annotated[
        Delegations,
        Checked(
            Nested(Delegations),
            _grants_what_exists,
            ReturnCode.BAD_PARAMETER,
            "permissions that do not exist",
        ),
    ]
    family_id: U32
    verification_count: U32


def _public_of(delegate_type: DelegateType) -> Checked:
    return Checked(
        Nested(DelegatePublic),
        lambda public: public.permissions.delegate_type == delegate_type,
        ReturnCode.INVALID_STRUCTURE,
        "owner permissions in a key delegation, or the reverse",
    )


@wire
class DelegateSensitive:
    """TPM_DELEGATE_SENSITIVE (§20.11)."""

    tag: ConstU16 = StructureTag.DELEGATE_SENSITIVE
    auth_value: SecretAuth


@wire
class DelegateOwnerBlob:
    """TPM_DELEGATE_OWNER_BLOB (§20.12): some of the owner's authority."""

    tag: ConstU16 = StructureTag.DELEGATE_OWNER_BLOB
    pub: Annotated[DelegatePublic, _public_of(DelegateType.OWNER_BITS)]
    integrity_digest: Digest
    additional_area: Sized
    sensitive_area: Sized


@wire
class DelegateKeyBlob:
    """TPM_DELEGATE_KEY_BLOB (§20.13): some uses of one key."""

    tag: ConstU16 = StructureTag.DELEGATE_KEY_BLOB
    pub: Annotated[DelegatePublic, _public_of(DelegateType.KEY_BITS)]
    integrity_digest: Digest
    pub_key_digest: Digest
    additional_area: Sized
    sensitive_area: Sized


@wire
class FamilyTableEntry:
    """TPM_FAMILY_TABLE_ENTRY (§20.5), as TPM_Delegate_ReadTable shows it."""

    tag: ConstU16 = StructureTag.FAMILY_TABLE_ENTRY
    label: U8
    family_id: U32
    verification_count: U32
    flags: U32


@wire
class DelegateTableEntry:
    """A row of the delegate table without its secret, as TPM_Delegate_ReadTable shows it."""

    index: U32
    public: DelegatePublic
