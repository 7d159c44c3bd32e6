"""Integrity collection and reporting: TPM Main r116 Part 3, chapter 16."""

from __future__ import annotations

from protocol.constants import PCR_COUNT, ZERO_DIGEST, KeyUsage, Ordinal, SigScheme
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import PcrComposite, PcrInfoShort, PcrSelection, QuoteInfo, QuoteInfo2
from protocol.wire import U32, Bool, Digest, Handle, Nonce, Sized, encode, wire
from tpm12 import pcrs
from tpm12.authorization import Authorized
from tpm12.capabilities import version_info
from tpm12.crypto import sha1
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.keys import LoadedKey
from tpm12.state import ALL_ONES
from tpm12.tpm import Tpm


@wire
class ExtendIn:
    """§16.1 incoming operands."""

    pcr_num: U32
    in_digest: Digest


@wire
class PcrValueOut:
    """§16.1 and §16.2 outgoing operands."""

    out_digest: Digest


@command(
    Ordinal.EXTEND,
    name="Extend",
    section="Part 3 §16.1",
    takes=ExtendIn,
    gives=PcrValueOut,
    gates=Gate.BEFORE_SELF_TEST,
)
def extend(tpm: Tpm, cmd: ExtendIn, _auth: Authorized) -> PcrValueOut:
    """Extend a PCR. A disabled or deactivated TPM extends too, but shows zeros.

    Raises:
        TpmError: BADINDEX, BAD_LOCALITY.
    """
    value = pcrs.extend(tpm, cmd.pcr_num, cmd.in_digest)
    return PcrValueOut(out_digest=value if tpm.is_enabled_and_active else ZERO_DIGEST)


@wire
class PcrReadIn:
    """§16.2 incoming operands."""

    pcr_index: U32


@command(
    Ordinal.PCR_READ, name="PCRRead", section="Part 3 §16.2", takes=PcrReadIn, gives=PcrValueOut
)
def pcr_read(tpm: Tpm, cmd: PcrReadIn, _auth: Authorized) -> PcrValueOut:
    """Read a PCR.

    Raises:
        TpmError: BADINDEX.
    """
    value = tpm.stclear.pcrs.get(cmd.pcr_index)
    if value is None:
        raise TpmError(ReturnCode.BADINDEX)
    return PcrValueOut(out_digest=value)


@wire
class QuoteIn:
    """§16.3 incoming operands."""

    key_handle: Handle
    external_data: Nonce
    target_pcr: PcrSelection


@wire
class QuoteOut:
    """§16.3 outgoing operands."""

    pcr_data: PcrComposite
    sig: Sized


_QUOTING = {KeyUsage.SIGNING, KeyUsage.LEGACY, KeyUsage.IDENTITY}
_SHA1_SCHEMES = {SigScheme.RSASSAPKCS1V15_SHA1, SigScheme.RSASSAPKCS1V15_INFO}


@command(
    Ordinal.QUOTE,
    name="Quote",
    section="Part 3 §16.3",
    takes=QuoteIn,
    gives=QuoteOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("key_handle", may_drop=1),),
)
def quote(tpm: Tpm, cmd: QuoteIn, auth: Authorized) -> QuoteOut:
    """Sign PCR values.

    Raises:
        TpmError: INAPPROPRIATE_SIG for the key's scheme, INVALID_KEYUSAGE for its usage.
    """
    key = _quoting_key(auth)
    info = QuoteInfo(
        digest_value=pcrs.composite_hash(tpm, cmd.target_pcr), external_data=cmd.external_data
    )
    return QuoteOut(
        pcr_data=pcrs.composite(tpm, cmd.target_pcr), sig=key.rsa.sign_sha1(sha1(encode(info)))
    )


def _quoting_key(auth: Authorized) -> LoadedKey:
    key = auth.key("key_handle")
    if key.sig_scheme not in _SHA1_SCHEMES:
        raise TpmError(ReturnCode.INAPPROPRIATE_SIG)
    if key.usage not in _QUOTING:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    return key


@wire
class Quote2In:
    """§16.5 incoming operands."""

    key_handle: Handle
    external_data: Nonce
    target_pcr: PcrSelection
    add_version: Bool


@wire
class Quote2Out:
    """§16.5 outgoing operands; `version_info` is empty or a CapVersionInfo."""

    pcr_data: PcrInfoShort
    version_info: Sized
    sig: Sized


@command(
    Ordinal.QUOTE2,
    name="Quote2",
    section="Part 3 §16.5",
    takes=Quote2In,
    gives=Quote2Out,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("key_handle", may_drop=1),),
)
def quote2(tpm: Tpm, cmd: Quote2In, auth: Authorized) -> Quote2Out:
    """Sign PCR values, the locality of the command and, if wanted, what TPM this is.

    Raises:
        TpmError: INAPPROPRIATE_SIG for the key's scheme, INVALID_KEYUSAGE for its usage.
    """
    key = _quoting_key(auth)
    pcr_data = PcrInfoShort(
        pcr_selection=cmd.target_pcr,
        locality_at_release=tpm.locality_bit,
        digest_at_release=pcrs.composite_hash(tpm, cmd.target_pcr),
    )
    info = QuoteInfo2(external_data=cmd.external_data, info_short=pcr_data)
    version = encode(version_info(tpm)) if cmd.add_version else b""
    return Quote2Out(
        pcr_data=pcr_data,
        version_info=version,
        sig=key.rsa.sign_sha1(sha1(encode(info), version)),
    )


@wire
class PcrResetIn:
    """§16.4 incoming operands."""

    pcr_selection: PcrSelection


@command(
    Ordinal.PCR_RESET,
    name="PCR_Reset",
    section="Part 3 §16.4",
    takes=PcrResetIn,
    gates=Gate.NONE,
)
def pcr_reset(tpm: Tpm, cmd: PcrResetIn, _auth: Authorized) -> None:
    """Reset PCRs; all are checked before the first is changed.

    Raises:
        TpmError: INVALID_PCR_INFO for an empty selection, NOTRESETABLE, NOTLOCAL.
    """
    selected = cmd.pcr_selection.indices
    if not selected or selected[-1] >= PCR_COUNT:
        raise TpmError(ReturnCode.INVALID_PCR_INFO)
    for i in selected:
        if not pcrs.ATTRIBUTES[i].resettable_from:
            raise TpmError(ReturnCode.NOTRESETABLE)
        if not pcrs.ATTRIBUTES[i].resettable_from & tpm.locality_bit:
            raise TpmError(ReturnCode.NOTLOCAL)
    dynamic = ZERO_DIGEST if tpm.stany.tos_present else ALL_ONES
    values = {i: dynamic if i in pcrs.DYNAMIC_PCRS else ZERO_DIGEST for i in selected}
    stclear = tpm.change_stclear()
    stclear.pcrs = {**stclear.pcrs, **values}
