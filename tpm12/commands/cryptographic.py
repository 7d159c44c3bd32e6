"""Cryptographic functions: TPM Main r116 Part 3, chapter 13.

Leaves to others: what a certificate of a key says (`tpm12.certification`).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    DIGEST_BYTES,
    ZERO_DIGEST,
    KeyFlags,
    KeyUsage,
    Ordinal,
    PayloadType,
    SigScheme,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import SignInfo
from protocol.wire import U32, Digest, Handle, Nonce, Sized, encode, wire
from tpm12 import certification, pcrs
from tpm12.authorization import Authorized
from tpm12.certification import AnyCertifyInfo, CertifyInfo2
from tpm12.crypto import PKCS1_OVERHEAD_BYTES, sha1
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.keys import ATTESTING_USAGES, SHA1_SIGNATURES, LoadedKey
from tpm12.sha1 import Sha1Thread
from tpm12.tpm import Tpm

_SHA1_GATES = Gate.BEFORE_SELF_TEST | Gate.KEEPS_SHA1_THREAD
_KEY_GATES = Gate.USABLE | Gate.OWNED
_BLOCK_BYTES: Final = 64
_SIZED_FRAME_BYTES: Final = 14
"""A header and a size: what a frame has besides one string of bytes."""


# -- the SHA-1 thread ----------------------------------------------------------------------------


@wire
class Sha1StartOut:
    """§13.1 outgoing operands."""

    max_num_bytes: U32


@command(
    Ordinal.SHA1_START,
    name="SHA1Start",
    section="Part 3 §13.1",
    gives=Sha1StartOut,
    gates=_SHA1_GATES,
)
def sha1_start(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> Sha1StartOut:
    """Start the one SHA-1 thread, afresh if it runs."""
    volatile = tpm.change_volatile()
    volatile.sha1_thread = Sha1Thread()
    volatile.sha1_thread_transport = tpm.wrapped_in
    return Sha1StartOut(max_num_bytes=_update_bytes_max(tpm))


def _update_bytes_max(tpm: Tpm) -> int:
    room = tpm.world.profile.input_buffer_bytes - _SIZED_FRAME_BYTES
    return room - room % _BLOCK_BYTES


@wire
class Sha1UpdateIn:
    """§13.2 incoming operands."""

    hash_data: Sized


@command(
    Ordinal.SHA1_UPDATE,
    name="SHA1Update",
    section="Part 3 §13.2",
    takes=Sha1UpdateIn,
    gates=_SHA1_GATES,
)
def sha1_update(tpm: Tpm, cmd: Sha1UpdateIn, _auth: Authorized) -> None:
    """Feed whole blocks of 64 bytes to the SHA-1 thread.

    Raises:
        TpmError: SHA_THREAD without one; SHA_ERROR for part of a block or too many bytes, which
            ends the thread.
    """
    thread = tpm.volatile.sha1_thread
    if thread is None:
        raise TpmError(ReturnCode.SHA_THREAD)
    size = len(cmd.hash_data)
    if size % _BLOCK_BYTES or size > _update_bytes_max(tpm):
        _end_thread(tpm)
        raise TpmError(ReturnCode.SHA_ERROR)
    tpm.change_volatile().sha1_thread = thread.fed(cmd.hash_data)


@wire
class Sha1CompleteIn:
    """§13.3 incoming operands."""

    hash_data: Sized


@wire
class Sha1CompleteOut:
    """§13.3 outgoing operands."""

    hash_value: Digest


@command(
    Ordinal.SHA1_COMPLETE,
    name="SHA1Complete",
    section="Part 3 §13.3",
    takes=Sha1CompleteIn,
    gives=Sha1CompleteOut,
    gates=_SHA1_GATES,
)
def sha1_complete(tpm: Tpm, cmd: Sha1CompleteIn, _auth: Authorized) -> Sha1CompleteOut:
    """Feed the last bytes and end the SHA-1 thread.

    Raises:
        TpmError: SHA_ERROR for more than 64 bytes; SHA_THREAD without a thread.
    """
    return Sha1CompleteOut(hash_value=_completed(tpm, cmd.hash_data))


def _completed(tpm: Tpm, last: bytes) -> bytes:
    thread = tpm.volatile.sha1_thread
    if len(last) > _BLOCK_BYTES:
        _end_thread(tpm)
        raise TpmError(ReturnCode.SHA_ERROR)
    if thread is None:
        raise TpmError(ReturnCode.SHA_THREAD)
    tpm.change_volatile().sha1_thread = None
    return thread.digest(last)


def _end_thread(tpm: Tpm) -> None:
    """End the SHA-1 thread for good, though the command fails."""
    if tpm.volatile.sha1_thread is not None:
        tpm.change_volatile().sha1_thread = None
        tpm.settle()


@wire
class Sha1CompleteExtendIn:
    """§13.4 incoming operands."""

    pcr_num: U32
    hash_data: Sized


@wire
class Sha1CompleteExtendOut:
    """§13.4 outgoing operands."""

    hash_value: Digest
    out_digest: Digest


@command(
    Ordinal.SHA1_COMPLETE_EXTEND,
    name="SHA1CompleteExtend",
    section="Part 3 §13.4",
    takes=Sha1CompleteExtendIn,
    gives=Sha1CompleteExtendOut,
    gates=_SHA1_GATES,
)
def sha1_complete_extend(
    tpm: Tpm, cmd: Sha1CompleteExtendIn, _auth: Authorized
) -> Sha1CompleteExtendOut:
    """End the SHA-1 thread and extend a PCR with its digest; a failed extend ends it too.

    Raises:
        TpmError: As `sha1_complete`; BADINDEX, BAD_LOCALITY.
    """
    digest = _completed(tpm, cmd.hash_data)
    tpm.settle()  # a failed extend ends the thread too
    value = pcrs.extend(tpm, cmd.pcr_num, digest)
    return Sha1CompleteExtendOut(
        hash_value=digest, out_digest=value if tpm.is_enabled_and_active else ZERO_DIGEST
    )


# -- signing -------------------------------------------------------------------------------------


@wire
class SignIn:
    """§13.5 incoming operands."""

    key_handle: Handle
    area_to_sign: Sized


@wire
class SignOut:
    """§13.5 outgoing operands."""

    sig: Sized


@command(
    Ordinal.SIGN,
    name="Sign",
    section="Part 3 §13.5",
    takes=SignIn,
    gives=SignOut,
    gates=_KEY_GATES,
    sessions=(AuthBy("key_handle", may_drop=1),),
)
def sign(_tpm: Tpm, cmd: SignIn, auth: Authorized) -> SignOut:
    """Sign what the key's scheme can sign.

    Raises:
        TpmError: BAD_PARAMETER for no bytes, for more or fewer than the scheme signs, and for
            TPM_SS_RSASSAPKCS1v15_INFO without a session; INVALID_KEYUSAGE.
    """
    area = cmd.area_to_sign
    if not area:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    key = auth.key("key_handle")
    if key.usage not in {KeyUsage.SIGNING, KeyUsage.LEGACY}:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    match key.sig_scheme:
        case SigScheme.RSASSAPKCS1V15_SHA1:
            if len(area) != DIGEST_BYTES:
                raise TpmError(ReturnCode.BAD_PARAMETER)
            return SignOut(sig=key.rsa.sign_sha1(area))
        case SigScheme.RSASSAPKCS1V15_DER:
            if len(area) > key.rsa.public.size - PKCS1_OVERHEAD_BYTES:
                raise TpmError(ReturnCode.BAD_PARAMETER)
            return SignOut(sig=key.rsa.sign_der(area))
        case SigScheme.RSASSAPKCS1V15_INFO:
            if not auth.blocks:
                raise TpmError(ReturnCode.BAD_PARAMETER, "no nonceOdd to sign")
            _, block = auth.session("key_handle")
            info = SignInfo(fixed=b"SIGN", replay=block.nonce_odd, data=area)
            return SignOut(sig=key.rsa.sign_sha1(sha1(encode(info))))
        case _:
            raise TpmError(ReturnCode.INVALID_KEYUSAGE)


# -- random numbers ------------------------------------------------------------------------------


@wire
class GetRandomIn:
    """§13.6 incoming operands."""

    bytes_requested: U32


@wire
class GetRandomOut:
    """§13.6 outgoing operands."""

    random_bytes: Sized


@command(
    Ordinal.GET_RANDOM,
    name="GetRandom",
    section="Part 3 §13.6",
    takes=GetRandomIn,
    gives=GetRandomOut,
)
def get_random(tpm: Tpm, cmd: GetRandomIn, _auth: Authorized) -> GetRandomOut:
    """Give random bytes, as many as asked for or as fit into a response."""
    most = tpm.world.profile.input_buffer_bytes - _SIZED_FRAME_BYTES
    return GetRandomOut(random_bytes=tpm.random(min(cmd.bytes_requested, most)))


@wire
class StirRandomIn:
    """§13.7 incoming operands."""

    in_data: Sized


@command(Ordinal.STIR_RANDOM, name="StirRandom", section="Part 3 §13.7", takes=StirRandomIn)
def stir_random(tpm: Tpm, cmd: StirRandomIn, _auth: Authorized) -> None:
    """Mix bytes into the random number generator.

    A TPM may refuse 256 bytes and more; this one takes what fits into a command.
    """
    tpm.world.rng.stir(cmd.in_data)


# -- certifying keys -----------------------------------------------------------------------------


@wire
class CertifyKeyIn:
    """§13.8 incoming operands."""

    cert_handle: Handle
    key_handle: Handle
    anti_replay: Nonce


@wire
class CertifyKeyOut:
    """§13.8 outgoing operands."""

    certify_info: AnyCertifyInfo
    out_data: Sized


@command(
    Ordinal.CERTIFY_KEY,
    name="CertifyKey",
    section="Part 3 §13.8",
    takes=CertifyKeyIn,
    gives=CertifyKeyOut,
    gates=_KEY_GATES,
    sessions=(
        AuthBy("cert_handle", may_drop=1),
        AuthBy("key_handle", may_drop=2, reads_only=True),
    ),
)
def certify_key(_tpm: Tpm, cmd: CertifyKeyIn, auth: Authorized) -> CertifyKeyOut:
    """Sign a description of another key. A lone session is for the certified key.

    Raises:
        TpmError: BAD_KEY_PROPERTY for the certifying key's scheme; INVALID_KEYUSAGE for a certified
            migratable key and for usages that do not certify or are not certified; MIGRATEFAIL
            when an identity key should speak for a migratable one.
    """
    signer, key = auth.key("cert_handle"), auth.key("key_handle")
    _require_certifying_scheme(signer)
    if key.payload != PayloadType.ASYM:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if signer.usage == KeyUsage.IDENTITY and key.is_migratable:
        raise TpmError(ReturnCode.MIGRATEFAIL)
    _require_certifying_usages(signer, key)
    info = certification.certify_info(key, cmd.anti_replay)
    return CertifyKeyOut(certify_info=info, out_data=signer.rsa.sign_sha1(sha1(encode(info))))


@wire
class CertifyKey2In:
    """§13.9 incoming operands."""

    key_handle: Handle
    cert_handle: Handle
    migration_pub_digest: Digest
    anti_replay: Nonce


@wire
class CertifyKey2Out:
    """§13.9 outgoing operands."""

    certify_info: CertifyInfo2
    out_data: Sized


@command(
    Ordinal.CERTIFY_KEY2,
    name="CertifyKey2",
    section="Part 3 §13.9",
    takes=CertifyKey2In,
    gives=CertifyKey2Out,
    gates=_KEY_GATES,
    sessions=(
        AuthBy("key_handle", may_drop=1, reads_only=True),
        AuthBy("cert_handle", may_drop=2),
    ),
)
def certify_key2(tpm: Tpm, cmd: CertifyKey2In, auth: Authorized) -> CertifyKey2Out:
    """Sign a description of another key, with the authorities it may migrate to.

    A lone session is for the certifying key.

    Raises:
        TpmError: As `certify_key`, but certified migratable keys are welcome; MA_SOURCE when one
            belongs to other authorities than named.
    """
    signer, key = auth.key("cert_handle"), auth.key("key_handle")
    _require_certifying_scheme(signer)
    is_certified_migratable = bool(
        key.flags & KeyFlags.MIGRATE_AUTHORITY and key.payload in certification.CMK_PAYLOADS
    )
    if signer.usage == KeyUsage.IDENTITY and key.is_migratable and not is_certified_migratable:
        raise TpmError(ReturnCode.MIGRATEFAIL)
    _require_certifying_usages(signer, key)
    info = certification.certify_info2(
        key, cmd.anti_replay, cmd.migration_pub_digest, tpm.permanent.tpm_proof
    )
    return CertifyKey2Out(certify_info=info, out_data=signer.rsa.sign_sha1(sha1(encode(info))))


_CERTIFIED: Final = frozenset(
    {KeyUsage.SIGNING, KeyUsage.STORAGE, KeyUsage.IDENTITY, KeyUsage.BIND, KeyUsage.LEGACY}
)


def _require_certifying_scheme(signer: LoadedKey) -> None:
    if signer.sig_scheme not in SHA1_SIGNATURES:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY)


def _require_certifying_usages(signer: LoadedKey, key: LoadedKey) -> None:
    if signer.usage not in ATTESTING_USAGES or key.usage not in _CERTIFIED:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
