"""Audit: which ordinals are audited, and the digest that the audited ones leave behind.

A command leaves its two events when it has succeeded; one that fails leaves none (until revision
103 of the specification it did). The first event after the digest was zero begins a cycle and
counts the audit counter up, which is a permanent change: at most one a start-up.

Leaves to others: when an event is due (`engine.py`), what the auditor asks for
(`commands/audit.py`).

Source: TPM Main r116 Part 2 §14, Part 3 §8.

Invariants:
- A command that is not audited pays one look at a table of exceptions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from protocol.constants import ZERO_DIGEST, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import AuditEventIn, AuditEventOut, CounterValue
from protocol.wire import encode
from tpm12.authorization import Authorized
from tpm12.crypto import sha1
from tpm12.tpm import Tpm
from tpm12.transport import TransportAuthorized, response_frame

if TYPE_CHECKING:
    from tpm12.dispatch import Command

AUDITED_AT_FACTORY: Final = frozenset(
    {
        Ordinal.TAKE_OWNERSHIP,
        Ordinal.CHANGE_AUTH_OWNER,
        Ordinal.CREATE_WRAP_KEY,
        Ordinal.CREATE_MIGRATION_BLOB,
        Ordinal.CONVERT_MIGRATION_BLOB,
        Ordinal.AUTHORIZE_MIGRATION_KEY,
        Ordinal.CREATE_MAINTENANCE_ARCHIVE,
        Ordinal.LOAD_MAINTENANCE_ARCHIVE,
        Ordinal.KILL_MAINTENANCE_FEATURE,
        Ordinal.LOAD_MANU_MAINT_PUB,
        Ordinal.READ_MANU_MAINT_PUB,
        Ordinal.OWNER_CLEAR,
        Ordinal.DISABLE_OWNER_CLEAR,
        Ordinal.FORCE_CLEAR,
        Ordinal.DISABLE_FORCE_CLEAR,
        Ordinal.OWNER_SET_DISABLE,
        Ordinal.PHYSICAL_ENABLE,
        Ordinal.PHYSICAL_DISABLE,
        Ordinal.SET_OWNER_INSTALL,
        Ordinal.PHYSICAL_SET_DEACTIVATED,
        Ordinal.SET_TEMP_DEACTIVATED,
        Ordinal.MAKE_IDENTITY,
        Ordinal.ACTIVATE_IDENTITY,
        Ordinal.READ_PUBEK,
        Ordinal.OWNER_READ_PUBEK,
        Ordinal.DISABLE_PUBEK_READ,
        Ordinal.SET_ORDINAL_AUDIT_STATUS,
    }
)
"""Part 2 §17, column "audit default"."""
NEVER_AUDITED: Final = frozenset({Ordinal.GET_AUDIT_DIGEST, Ordinal.GET_AUDIT_DIGEST_SIGNED})
_COUNT_MAX: Final = 0xFFFFFFFF
_LABEL: Final = bytes(4)
_SUCCESS: Final = bytes(4)


def is_audited(tpm: Tpm, ordinal: int) -> bool:
    """Is a command of this ordinal audited?"""
    status = tpm.permanent.ordinal_audit_status.get(ordinal)
    return ordinal in AUDITED_AT_FACTORY if status is None else status


def audited_ordinals(tpm: Tpm, first: int = 0) -> list[int]:
    """The audited ordinals from `first` on, ascending."""
    return [o for o in sorted(tpm.world.commands) if o >= first and is_audited(tpm, o)]


def counter_value(tpm: Tpm) -> CounterValue:
    """TPM_PERMANENT_DATA.auditMonotonicCounter; its label is zero."""
    return CounterValue(label=_LABEL, counter=tpm.permanent.audit_monotonic_counter)


def record(tpm: Tpm, command: Command, auth: Authorized, response: bytes) -> None:
    """Extend the audit digest by a command that has succeeded.

    What is hashed of input and output is what an authorization would hash.

    Args:
        tpm: The command's draft.
        command: Its declaration.
        auth: Its authorization, with the digest of its input.
        response: All of it.

    Raises:
        TpmError: AUDITFAIL_SUCCESSFUL when the audit counter is at its end.
    """
    if command.ordinal == Ordinal.SAVE_STATE:
        return  # it has recorded its input itself, before it saved the digest
    in_digest = auth.in_param_digest
    if isinstance(auth, TransportAuthorized) and auth.wrapped_digests is not None:
        in_digest, out_digest = auth.wrapped_digests
    else:
        out_digest = response_frame(response, command).response_digest()
    wrapping = tpm.world.wrapping
    if wrapping is not None and wrapping.is_encrypted:
        # What the transport session hides must not show in the log (Part 3 §24.2).
        ordinal = command.ordinal.to_bytes(4, "big")
        in_digest, out_digest = sha1(ordinal), sha1(_SUCCESS + ordinal)
    record_input(tpm, in_digest)
    _extend(tpm, encode(AuditEventOut(output_parms=out_digest, audit_count=counter_value(tpm))))


def record_input(tpm: Tpm, in_digest: bytes) -> None:
    """Extend the audit digest by what went into a command; of TPM_SaveState, that is all.

    Raises:
        TpmError: AUDITFAIL_SUCCESSFUL when the audit counter is at its end.
    """
    if tpm.stany.audit_digest == ZERO_DIGEST:
        if tpm.permanent.audit_monotonic_counter >= _COUNT_MAX:
            raise TpmError(ReturnCode.AUDITFAIL_SUCCESSFUL, "the audit counter is at its end")
        tpm.change_permanent().audit_monotonic_counter += 1
    _extend(tpm, encode(AuditEventIn(input_parms=in_digest, audit_count=counter_value(tpm))))


def _extend(tpm: Tpm, event: bytes) -> None:
    stany = tpm.change_stany()
    stany.audit_digest = sha1(stany.audit_digest, event)
