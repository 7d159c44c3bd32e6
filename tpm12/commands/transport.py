"""Transport sessions: TPM Main r116 Part 3, chapter 24.

Leaves to others: bytes inside frames, ciphers, the log and the proof (`tpm12.transport`), running
the wrapped command (`tpm12.engine`).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    AUTH_RESPONSE_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    ZERO_DIGEST,
    EncScheme,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    TransportAttribute,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CurrentTicks, SignInfo, TransportAuth, TransportPublic
from protocol.wire import U32, U64, Handle, Nonce, Sized, decode, encode, wire
from tpm12 import key_use, transport
from tpm12.authorization import Authorized, check_key_use
from tpm12.crypto import DecryptionError, sha1
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.keys import SHA1_SIGNATURES
from tpm12.state import TransportSession
from tpm12.ticks import current_ticks
from tpm12.tpm import Tpm, Wrapping
from tpm12.transport import TRANSPORT_ONLY, TransportAuthorized

_OWNED: Final = Gate.USABLE | Gate.OWNED
_KEY: Final = "key"
"""The session for the key of TPM_EstablishTransport or TPM_ReleaseTransportSigned."""
_TRANSPORT: Final = AuthBy("transport", TRANSPORT_ONLY)
_SUCCESS: Final = bytes(4)
_ENCRYPTING_USAGES: Final = frozenset({KeyUsage.STORAGE, KeyUsage.LEGACY})
_EXECUTE_OVERHEAD_BYTES: Final = HEADER_BYTES + 8 + 4 + 4 + AUTH_RESPONSE_BYTES
"""What a response of TPM_ExecuteTransport has around the wrapped one; a request has less."""


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "big")


# -- §24.1 -----------------------------------------------------------------------------------------


@wire
class EstablishTransportIn:
    """§24.1 incoming operands."""

    enc_handle: Handle
    trans_public: TransportPublic
    secret: Sized


@wire
class EstablishTransportOut:
    """§24.1 outgoing operands."""

    trans_handle: Handle
    locality: U32
    current_ticks: CurrentTicks
    trans_nonce_even: Nonce


@command(
    Ordinal.ESTABLISH_TRANSPORT,
    name="EstablishTransport",
    section="Part 3 §24.1",
    takes=EstablishTransportIn,
    gives=EstablishTransportOut,
    gates=_OWNED,
    sessions=(AuthBy(_KEY, may_drop=1),),
)
def establish_transport(
    tpm: Tpm, cmd: EstablishTransportIn, auth: Authorized
) -> EstablishTransportOut:
    """Open a transport session, on a secret that comes encrypted to a key or, unencrypting, as is.

    Raises:
        TpmError: BADTAG, BAD_SCHEME or BAD_PARAM_SIZE for a plain secret that came with a session,
            is to encrypt, or has not 20 bytes; INVALID_KEYHANDLE, INVALID_KEYUSAGE, AUTHFAIL,
            DECRYPT_ERROR for an encrypted one; BAD_KEY_PROPERTY, INAPPROPRIATE_ENC for the cipher;
            RESOURCES when every slot is taken.
        DecodeError: What was encrypted is no TPM_TRANSPORT_AUTH.
    """
    public = cmd.trans_public
    encrypts = bool(public.trans_attributes & TransportAttribute.ENCRYPT)
    if cmd.enc_handle == KeyHandleValue.TRANSPORT:
        if auth.blocks:
            raise TpmError(ReturnCode.BADTAG)
        if encrypts:
            raise TpmError(ReturnCode.BAD_SCHEME)
        if len(cmd.secret) != DIGEST_BYTES:
            raise TpmError(ReturnCode.BAD_PARAM_SIZE)
        auth_data = cmd.secret
    else:
        auth_data = _decrypted_secret(tpm, cmd, auth)
    if encrypts:
        is_fips = tpm.permanent.flags.fips
        transport.check_cipher(public.alg_id, public.enc_scheme, is_fips=is_fips)
    if len(tpm.stany.transport_sessions) >= tpm.world.profile.transport_sessions:
        raise TpmError(ReturnCode.RESOURCES)
    out = EstablishTransportOut(
        trans_handle=tpm.new_handle(tpm.stany.transport_sessions, tpm.stany.sessions),
        locality=tpm.locality,
        current_ticks=current_ticks(tpm),
        trans_nonce_even=tpm.random(DIGEST_BYTES),
    )
    session = TransportSession(
        auth_data=auth_data,
        nonce_even=out.trans_nonce_even,
        attributes=public.trans_attributes,
        algorithm_id=public.alg_id,
        enc_scheme=public.enc_scheme,
        trans_digest=_first_log(cmd, out),
    )
    stany = tpm.change_stany()
    stany.transport_sessions = {**stany.transport_sessions, out.trans_handle: session}
    if public.trans_attributes & TransportAttribute.EXCLUSIVE:
        stany.transport_exclusive = out.trans_handle
    return out


def _decrypted_secret(tpm: Tpm, cmd: EstablishTransportIn, auth: Authorized) -> bytes:
    key = tpm.key(cmd.enc_handle)
    check_key_use(tpm, key, reads_only=False)
    if key.usage not in _ENCRYPTING_USAGES:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    key_use.authorize(auth, _KEY, key)
    is_oaep = key.enc_scheme == EncScheme.RSAESOAEP_SHA1_MGF1
    decrypt = key.rsa.decrypt_oaep if is_oaep else key.rsa.decrypt_pkcs1v15
    try:
        plain = decrypt(cmd.secret)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    return decode(TransportAuth, plain).auth_data


def _first_log(cmd: EstablishTransportIn, out: EstablishTransportOut) -> bytes:
    if not cmd.trans_public.trans_attributes & TransportAttribute.LOG:
        return ZERO_DIGEST
    ordinal, ticks = _u32(Ordinal.ESTABLISH_TRANSPORT), out.current_ticks
    size = _u32(len(cmd.secret))
    came = sha1(ordinal, encode(cmd.trans_public), size, cmd.secret)
    went = sha1(_SUCCESS, ordinal, _u32(out.locality), encode(ticks), out.trans_nonce_even)
    return transport.logged_out(transport.logged_in(ZERO_DIGEST, came), went, ticks, out.locality)


# -- §24.2 -----------------------------------------------------------------------------------------


@wire
class ExecuteTransportIn:
    """§24.2 incoming operands."""

    wrapped_cmd: Sized


@wire
class ExecuteTransportOut:
    """§24.2 outgoing operands; `current_ticks` counts microseconds."""

    current_ticks: U64
    locality: U32
    wrapped_rsp: Sized


@command(
    Ordinal.EXECUTE_TRANSPORT,
    name="ExecuteTransport",
    section="Part 3 §24.2",
    takes=ExecuteTransportIn,
    gives=ExecuteTransportOut,
    gates=_OWNED,
    sessions=(_TRANSPORT,),
)
def execute_transport(
    tpm: Tpm, cmd: ExecuteTransportIn, auth: TransportAuthorized
) -> ExecuteTransportOut:
    """Run the wrapped command as if it had come by itself, and wrap its response.

    What the wrapped command comes to, failure included, is in its own response.

    Raises:
        TpmError: INVALID_AUTHHANDLE; BAD_PARAMETER, BAD_PARAM_SIZE when the wrapped command cannot
            be taken apart; AUTHFAIL; NO_WRAP_TRANSPORT for the commands of this chapter;
            INVALID_KEYHANDLE when the log needs a key that is not loaded; SIZE when the wrapped
            response does not fit into a response.
    """
    session = auth.find_transport()
    frame = transport.request_frame(cmd.wrapped_cmd, tpm.world.commands)
    nonce_odd = auth.trans_block.nonce_odd
    nonces_in, nonces_out = session.nonce_even + nonce_odd, auth.nonce_even + nonce_odd
    clear = transport.crypted(session, nonces_in, transport.IN, frame.parameters)
    frame = frame.with_parameters(clear)
    h1, ordinal = frame.request_digest(), _u32(Ordinal.EXECUTE_TRANSPORT)
    auth.verify_transport(sha1(ordinal, _u32(len(frame.data)), h1), ReturnCode.AUTHFAIL)
    if frame.command.ordinal in transport.NOT_WRAPPED:
        raise TpmError(ReturnCode.NO_WRAP_TRANSPORT)
    logs = bool(session.attributes & TransportAttribute.LOG)
    if logs:
        moduli = transport.moduli_of(tpm, transport.key_handles(frame))
        pub_key_hash = transport.pub_key_hash(moduli)
        trans_digest = transport.logged_in(session.trans_digest, h1, pub_key_hash)

    wrapping = Wrapping(
        trans_handle=auth.trans_block.handle,
        is_encrypted=bool(session.attributes & TransportAttribute.ENCRYPT),
        overhead_bytes=_EXECUTE_OVERHEAD_BYTES,
    )
    wrapped_rsp = tpm.world.run_wrapped(tpm, frame.data, wrapping)
    if len(wrapped_rsp) + _EXECUTE_OVERHEAD_BYTES > tpm.world.profile.input_buffer_bytes:
        raise TpmError(ReturnCode.SIZE)

    ticks = current_ticks(tpm)
    frame = transport.response_frame(wrapped_rsp, frame.command)
    h2 = frame.response_digest()
    if logs:
        auth.keep_log(transport.logged_out(trans_digest, h2, ticks, tpm.locality))
    hidden = transport.crypted(session, nonces_out, transport.OUT, frame.parameters)
    out = ExecuteTransportOut(
        current_ticks=ticks.current_ticks,
        locality=tpm.locality,
        wrapped_rsp=frame.with_parameters(hidden).data,
    )
    shown = encode(out)[: -len(wrapped_rsp)]
    auth.out_param_digest = sha1(_SUCCESS, ordinal, shown, h2)
    auth.wrapped_digests = (h1, h2)
    return out


# -- §24.3 -----------------------------------------------------------------------------------------


@wire
class ReleaseTransportSignedIn:
    """§24.3 incoming operands."""

    key_handle: Handle
    anti_replay: Nonce


@wire
class ReleaseTransportSignedOut:
    """§24.3 outgoing operands."""

    locality: U32
    current_ticks: CurrentTicks
    signature: Sized


@command(
    Ordinal.RELEASE_TRANSPORT_SIGNED,
    name="ReleaseTransportSigned",
    section="Part 3 §24.3",
    takes=ReleaseTransportSignedIn,
    gives=ReleaseTransportSignedOut,
    gates=_OWNED,
    sessions=(AuthBy(_KEY, may_drop=1), _TRANSPORT),
)
def release_transport_signed(
    tpm: Tpm, cmd: ReleaseTransportSignedIn, auth: TransportAuthorized
) -> ReleaseTransportSignedOut:
    """End a transport session and sign its log, this request included.

    Raises:
        TpmError: INVALID_AUTHHANDLE; INVALID_KEYHANDLE; INAPPROPRIATE_SIG for the key's scheme,
            INVALID_KEYUSAGE for its usage; AUTHFAIL for the key, AUTH2FAIL for the transport
            session; BAD_MODE when there is no log.
    """
    session = auth.find_transport()
    key = tpm.key(cmd.key_handle)
    check_key_use(tpm, key, reads_only=False)
    if key.sig_scheme not in SHA1_SIGNATURES:
        raise TpmError(ReturnCode.INAPPROPRIATE_SIG)
    if key.usage != KeyUsage.SIGNING:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    key_use.authorize(auth, _KEY, key)
    auth.verify_transport(auth.in_param_digest, ReturnCode.AUTH2FAIL)
    if not session.attributes & TransportAttribute.LOG:
        raise TpmError(ReturnCode.BAD_MODE)
    ticks = current_ticks(tpm)
    # The structure for an output, but it holds the digest of the input, as specified.
    trans_digest = transport.logged_out(
        session.trans_digest, auth.in_param_digest, ticks, tpm.locality
    )
    info = SignInfo(fixed=b"TRAN", replay=cmd.anti_replay, data=trans_digest)
    auth.end_session(_TRANSPORT.over)
    return ReleaseTransportSignedOut(
        locality=tpm.locality,
        current_ticks=ticks,
        signature=key.rsa.sign_sha1(sha1(encode(info))),
    )
