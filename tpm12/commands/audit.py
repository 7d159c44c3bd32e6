"""Auditing: TPM Main r116 Part 3, chapter 8.

Leaves to others: the events themselves (`tpm12.auditing`).
"""

from __future__ import annotations

import struct
from typing import Final

from protocol.constants import HEADER_BYTES, ZERO_DIGEST, KeyUsage, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CounterValue, SignInfo
from protocol.wire import U32, Bool, Digest, Handle, Nonce, Sized, encode, wire
from tpm12 import auditing
from tpm12.authorization import Authorized
from tpm12.crypto import sha1
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.keys import ATTESTING_USAGES, SHA1_SIGNATURES
from tpm12.tpm import Tpm

_ORDINAL_BYTES: Final = 4
_FIXED_BYTES: Final = HEADER_BYTES + 10 + 20 + 1 + 4
"""What a response of TPM_GetAuditDigest has besides its list."""


def _listed(ordinals: list[int]) -> bytes:
    return struct.pack(f">{len(ordinals)}I", *ordinals)


@wire
class GetAuditDigestIn:
    """§8.3 incoming operands."""

    start_ordinal: U32


@wire
class GetAuditDigestOut:
    """§8.3 outgoing operands; `ord_list` holds u32 ordinals, ascending."""

    counter_value: CounterValue
    audit_digest: Digest
    more: Bool
    ord_list: Sized


@command(
    Ordinal.GET_AUDIT_DIGEST,
    name="GetAuditDigest",
    section="Part 3 §8.3",
    takes=GetAuditDigestIn,
    gives=GetAuditDigestOut,
)
def get_audit_digest(tpm: Tpm, cmd: GetAuditDigestIn, _auth: Authorized) -> GetAuditDigestOut:
    """Tell the audit digest, and which ordinals from the given one on are audited."""
    ordinals = auditing.audited_ordinals(tpm, cmd.start_ordinal)
    fitting = (tpm.world.profile.input_buffer_bytes - _FIXED_BYTES) // _ORDINAL_BYTES
    return GetAuditDigestOut(
        counter_value=auditing.counter_value(tpm),
        audit_digest=tpm.stany.audit_digest,
        more=len(ordinals) > fitting,
        ord_list=_listed(ordinals[:fitting]),
    )


@wire
class GetAuditDigestSignedIn:
    """§8.4 incoming operands."""

    key_handle: Handle
    close_audit: Bool
    anti_replay: Nonce


@wire
class GetAuditDigestSignedOut:
    """§8.4 outgoing operands."""

    counter_value: CounterValue
    audit_digest: Digest
    ordinal_digest: Digest
    sig: Sized


@command(
    Ordinal.GET_AUDIT_DIGEST_SIGNED,
    name="GetAuditDigestSigned",
    section="Part 3 §8.4",
    takes=GetAuditDigestSignedIn,
    gives=GetAuditDigestSignedOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("key_handle", may_drop=1),),
)
def get_audit_digest_signed(
    tpm: Tpm, cmd: GetAuditDigestSignedIn, auth: Authorized
) -> GetAuditDigestSignedOut:
    """Sign the audit digest; an identity key may close the audit, so that a new cycle begins.

    The digest that is told is the one that is signed, also on closing.

    Raises:
        TpmError: INVALID_KEYUSAGE for the key's usage and for its scheme.
    """
    key = auth.key("key_handle")
    if key.usage not in ATTESTING_USAGES or key.sig_scheme not in SHA1_SIGNATURES:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if cmd.close_audit and key.usage != KeyUsage.IDENTITY:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE, "only an identity key closes the audit")
    audit_digest, counter_value = tpm.stany.audit_digest, auditing.counter_value(tpm)
    ordinal_digest = sha1(_listed(auditing.audited_ordinals(tpm)))
    signed = SignInfo(
        fixed=b"ADIG",
        replay=cmd.anti_replay,
        data=audit_digest + encode(counter_value) + ordinal_digest,
    )
    if cmd.close_audit:
        tpm.change_stany().audit_digest = ZERO_DIGEST
    return GetAuditDigestSignedOut(
        counter_value=counter_value,
        audit_digest=audit_digest,
        ordinal_digest=ordinal_digest,
        sig=key.rsa.sign_sha1(sha1(encode(signed))),
    )


@wire
class SetOrdinalAuditStatusIn:
    """§8.5 incoming operands."""

    ordinal_to_audit: U32
    audit_state: Bool


@command(
    Ordinal.SET_ORDINAL_AUDIT_STATUS,
    name="SetOrdinalAuditStatus",
    section="Part 3 §8.5",
    takes=SetOrdinalAuditStatusIn,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def set_ordinal_audit_status(tpm: Tpm, cmd: SetOrdinalAuditStatusIn, _auth: Authorized) -> None:
    """Have an ordinal audited, or not; one that has the wanted status costs no write.

    Raises:
        TpmError: BADINDEX for an ordinal that this TPM does not have; BAD_PARAMETER for auditing
            one that never is.
    """
    ordinal = cmd.ordinal_to_audit
    if ordinal not in tpm.world.commands:
        raise TpmError(ReturnCode.BADINDEX)
    if cmd.audit_state and ordinal in auditing.NEVER_AUDITED:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    if cmd.audit_state != auditing.is_audited(tpm, ordinal):
        permanent = tpm.change_permanent()
        status = permanent.ordinal_audit_status
        permanent.ordinal_audit_status = {**status, ordinal: cmd.audit_state}
