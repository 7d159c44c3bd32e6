"""The caller's end of a transport session: commands go in plain, and through the TPM hidden.

    session = ClientTransport.establish(exchange, rng=rng, key=TransportKey(handle=SRK, pubkey=srk))
    inside = TpmClient(session.exchange, rng=rng)      # every method, wrapped
    inside.pcr_read(10)
    session.close()

A session with a log is ended by `release_signed`, which checks that the TPM has signed what went
through the session, and nothing else.

Leaves to others: ciphers and log (`transport.py`), the commands inside (`client.py`). `wrap` and
`unwrap` move no bytes themselves, for programs that cannot block.

Source: TPM Main r116 Part 3 §24.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self, cast

from protocol.constants import (
    AUTH_RESPONSE_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    ZERO_DIGEST,
    AlgorithmId,
    EncScheme,
    KeyHandleValue,
    Ordinal,
    Tag,
    TransportAttribute,
)
from protocol.structures import CurrentTicks, Pubkey, SignInfo, TransportAuth, TransportPublic
from protocol.wire import DecodeError, decode, encode
from tpm12 import transport
from tpm12.client_core import BadResponseError, ClientSession, Use, prepare, refusal
from tpm12.commands import ALL
from tpm12.crypto import HmacKey, is_same, sha1
from tpm12.dispatch import Command, Nothing, table
from tpm12.keys import public_key_of
from tpm12.ports import Rng
from tpm12.state import TransportSession
from tpm12.transport import Frame

Exchange = Callable[[bytes], bytes]
_HEADER: Final = struct.Struct(">HII")
_SHOWN_BYTES: Final = 16
"""currentTicks, locality and wrappedRspSize of a response."""
_SUCCESS: Final = bytes(4)


@dataclass(frozen=True, slots=True)
class Cipher:
    """How a session encrypts."""

    alg_id: int
    enc_scheme: int


MGF1: Final = Cipher(AlgorithmId.MGF1, EncScheme.NONE)
AES128_CTR: Final = Cipher(AlgorithmId.AES128, EncScheme.SYM_CTR)
AES128_OFB: Final = Cipher(AlgorithmId.AES128, EncScheme.SYM_OFB)


@dataclass(frozen=True, slots=True, kw_only=True)
class TransportKey:
    """A loaded storage or legacy key with OAEP, to which the session's secret is encrypted."""

    handle: int
    pubkey: Pubkey
    auth: bytes = field(default=ZERO_DIGEST, repr=False)


@dataclass(slots=True)
class _Sent:
    frame: Frame
    nonce_odd: bytes
    h1: bytes


class ClientTransport:
    """An open transport session.

    Attributes:
        public_keys: Moduli of keys by handle: the log says which keys the commands inside named,
            so to follow it they have to be known. Of the session's own key it is.
        trans_digest: The log so far; None when a key was named that is not known, or there is none.

    Every method raises `TpmError` when the TPM refuses the outer command and `BadResponseError`
    when its answer is malformed or not authentic. What the TPM says to a command inside is in the
    response that `exchange` gives.
    """

    def __init__(
        self, exchange: Exchange, rng: Rng, commands: Mapping[int, Command], *, secret: bytes
    ) -> None:
        self._exchange, self._rng, self._commands = exchange, rng, commands
        self._secret = HmacKey(secret)
        self._session = ClientSession(0, ZERO_DIGEST, ZERO_DIGEST, shared_secret=secret)
        self._state = TransportSession(
            auth_data=secret,
            nonce_even=ZERO_DIGEST,
            attributes=0,
            algorithm_id=0,
            enc_scheme=0,
            trans_digest=ZERO_DIGEST,
        )
        self._sent: _Sent | None = None
        self._tick_nonce, self._tick_rate = ZERO_DIGEST, 0
        self.public_keys: dict[int, bytes] = {}
        self.trans_digest: bytes | None = None

    @classmethod
    def establish(  # noqa: PLR0913 - what is not said has a default
        cls,
        exchange: Exchange,
        *,
        rng: Rng,
        key: TransportKey | None,
        attributes: int = TransportAttribute.ENCRYPT,
        cipher: Cipher = AES128_CTR,
        commands: Mapping[int, Command] | None = None,
    ) -> Self:
        """Open a session: TPM_EstablishTransport.

        Args:
            exchange: Sends a request, gives the response.
            rng: For the secret and nonces.
            key: To which the secret is encrypted; None sends it in clear, and the session cannot
                encrypt.
            attributes: TransportAttribute bits.
            cipher: Only looked at with ENCRYPT.
            commands: Declared commands by ordinal; the TPM's own when None.
        """
        known = table(ALL) if commands is None else commands
        opened = cls(exchange, rng, known, secret=rng.random(DIGEST_BYTES))
        public = TransportPublic(
            trans_attributes=attributes, alg_id=cipher.alg_id, enc_scheme=cipher.enc_scheme
        )
        opened._open(public, key)
        return opened

    @property
    def handle(self) -> int:
        """The TPM's handle of the session."""
        return self._session.handle

    @property
    def is_open(self) -> bool:
        """False once the TPM has ended the session."""
        return self._session.is_open

    # -- commands inside ---------------------------------------------------------------------

    def exchange(self, request: bytes) -> bytes:
        """Send a request through the session and give its response."""
        return self.unwrap(self._exchange(self.wrap(request)))

    def wrap(self, request: bytes, *, continues: bool = True) -> bytes:
        """Make the TPM_ExecuteTransport around a request.

        Args:
            request: One whole frame.
            continues: Keep the session afterwards.
        """
        frame = transport.request_frame(request, self._commands)
        session, nonce_odd = self._session, self._rng.random(DIGEST_BYTES)
        self._sent = _Sent(frame, nonce_odd, frame.request_digest())
        nonces = session.nonce_even + nonce_odd
        hidden = transport.crypted(self._state, nonces, transport.IN, frame.parameters)
        command = self._commands[Ordinal.EXECUTE_TRANSPORT]
        body = encode(cast("Any", command.takes)(wrapped_cmd=frame.with_parameters(hidden).data))
        digest = sha1(_u32(Ordinal.EXECUTE_TRANSPORT), body[:4], self._sent.h1)
        mac = transport.proof(self._secret, digest, nonces, continues=continues)
        block = _u32(session.handle) + nonce_odd + bytes([continues]) + mac
        size = HEADER_BYTES + len(body) + len(block)
        header = _HEADER.pack(Tag.RQU_AUTH1_COMMAND, size, Ordinal.EXECUTE_TRANSPORT)
        return header + body + block

    def unwrap(self, response: bytes) -> bytes:
        """Check the response to what `wrap` made, and give the wrapped one in clear."""
        sent, self._sent = self._sent, None
        if sent is None:
            raise ValueError("nothing was sent")
        body, nonce_even, continues, mac = self._opened(response)
        wrapped = self._wrapped(body)
        frame = transport.response_frame(wrapped, sent.frame.command)
        nonces = nonce_even + sent.nonce_odd
        clear = transport.crypted(self._state, nonces, transport.OUT, frame.parameters)
        frame = frame.with_parameters(clear)
        h2 = frame.response_digest()
        digest = sha1(_SUCCESS, _u32(Ordinal.EXECUTE_TRANSPORT), body[:_SHOWN_BYTES], h2)
        if not is_same(transport.proof(self._secret, digest, nonces, continues=continues), mac):
            raise BadResponseError("TPM_ExecuteTransport: the response is not authentic")
        self._session.nonce_even = nonce_even
        self._session.is_open = continues
        self._follow(sent, h2, body)
        return frame.data

    def _opened(self, response: bytes) -> tuple[bytes, bytes, bool, bytes]:
        """Take an outer response apart: parameters, nonceEven, continueTransSession, transAuth."""
        if len(response) < HEADER_BYTES:
            raise BadResponseError("a response of less than 10 bytes")
        tag, size, code = _HEADER.unpack_from(response)
        if size != len(response):
            raise BadResponseError("a response whose length field is wrong")
        if code:
            self._session.is_open = False
            raise refusal(self._commands[Ordinal.EXECUTE_TRANSPORT], code)
        at = len(response) - AUTH_RESPONSE_BYTES
        if tag != Tag.RSP_AUTH1_COMMAND or at < HEADER_BYTES:
            raise BadResponseError("a response without its authorization")
        nonce_even, continues, mac = struct.unpack_from(">20sB20s", response, at)
        return response[HEADER_BYTES:at], nonce_even, continues == 1, mac

    def _wrapped(self, body: bytes) -> bytes:
        gives = self._commands[Ordinal.EXECUTE_TRANSPORT].gives
        try:
            wrapped = cast("bytes", cast("Any", decode(gives, body)).wrapped_rsp)
        except DecodeError as error:
            raise BadResponseError(f"TPM_ExecuteTransport: {error}") from error
        if len(wrapped) < HEADER_BYTES or int.from_bytes(wrapped[2:6], "big") != len(wrapped):
            raise BadResponseError("a wrapped response whose length field is wrong")
        return wrapped

    # -- log ---------------------------------------------------------------------------------

    def _follow(self, sent: _Sent, h2: bytes, body: bytes) -> None:
        moduli = [self.public_keys.get(handle) for handle in transport.key_handles(sent.frame)]
        if self.trans_digest is None or None in moduli:
            self.trans_digest = None
            return
        named = transport.pub_key_hash(cast("list[bytes]", moduli))
        ticks = CurrentTicks(
            current_ticks=int.from_bytes(body[:8], "big"),
            tick_rate=self._tick_rate,
            tick_nonce=self._tick_nonce,
        )
        came = transport.logged_in(self.trans_digest, sent.h1, named)
        locality = int.from_bytes(body[8:12], "big")
        self.trans_digest = transport.logged_out(came, h2, ticks, locality)

    # -- opening and closing -----------------------------------------------------------------

    def _open(self, public: TransportPublic, key: TransportKey | None) -> None:
        uses: tuple[Use, ...] = ()
        handle, secret = int(KeyHandleValue.TRANSPORT), self._state.auth_data
        if key is not None:
            plain = encode(TransportAuth(auth_data=secret))
            handle, secret = key.handle, public_key_of(key.pubkey).encrypt_oaep(plain)
            uses = (Use(self._oiap(self._exchange), key.auth),)
            self.public_keys[handle] = key.pubkey.pub_key.key
        out = self._call(
            Ordinal.ESTABLISH_TRANSPORT, uses, enc_handle=handle, trans_public=public, secret=secret
        )
        self._session.handle, self._session.nonce_even = out.trans_handle, out.trans_nonce_even
        self._session.nonce_odd = self._rng.random(DIGEST_BYTES)
        ticks = out.current_ticks
        self._tick_nonce, self._tick_rate = ticks.tick_nonce, ticks.tick_rate
        self._state = replace(
            self._state,
            attributes=public.trans_attributes,
            algorithm_id=public.alg_id,
            enc_scheme=public.enc_scheme,
        )
        if public.trans_attributes & TransportAttribute.LOG:
            ordinal = _u32(Ordinal.ESTABLISH_TRANSPORT)
            came = sha1(ordinal, encode(public), _u32(len(secret)), secret)
            went = sha1(_SUCCESS, ordinal, encode(out)[4:])
            first = transport.logged_in(ZERO_DIGEST, came)
            self.trans_digest = transport.logged_out(first, went, ticks, out.locality)

    def close(self) -> None:
        """End the session without a signature."""
        if self.is_open:
            # A last command inside, since TPM_FlushSpecific would come too late for an exclusive
            # session: it ends with the first command outside.
            last = prepare(self._commands[Ordinal.GET_TICKS], Nothing(), (), self._rng)
            self.unwrap(self._exchange(self.wrap(last.request, continues=False)))

    def release_signed(
        self, key_handle: int, anti_replay: bytes, auth: bytes = ZERO_DIGEST
    ) -> tuple[SignInfo | None, bytes]:
        """End the session and have its log signed: TPM_ReleaseTransportSigned.

        Args:
            key_handle: A signing key.
            anti_replay: 20 bytes that the signature covers.
            auth: The key's secret.

        Returns:
            What the TPM has signed if the log is what went through here (None when that could not
            be followed), and the signature over its SHA-1. Whoever has the key's public part
            checks the one against the other.
        """
        # Its session is opened inside: an exclusive transport session bears no command outside.
        proof = Use(self._oiap(self.exchange), auth)
        out = self._call(
            Ordinal.RELEASE_TRANSPORT_SIGNED,
            (proof, Use(self._session)),
            key_handle=key_handle,
            anti_replay=anti_replay,
        )
        if self.trans_digest is None:
            return None, out.signature
        came = sha1(_u32(Ordinal.RELEASE_TRANSPORT_SIGNED), anti_replay)
        digest = transport.logged_out(self.trans_digest, came, out.current_ticks, out.locality)
        return SignInfo(fixed=b"TRAN", replay=anti_replay, data=digest), out.signature

    def _oiap(self, exchange: Exchange) -> ClientSession:
        prepared = prepare(self._commands[Ordinal.OIAP], Nothing(), (), self._rng)
        out = cast("Any", prepared.finish(exchange(prepared.request)))
        return ClientSession(out.auth_handle, out.nonce_even, self._rng.random(DIGEST_BYTES))

    def _call(self, ordinal: int, uses: tuple[Use, ...], **operands: Any) -> Any:  # noqa: ANN401 - any command's
        command = self._commands[ordinal]
        prepared = prepare(command, cast("Any", command.takes)(**operands), uses, self._rng)
        return prepared.finish(self._exchange(prepared.request))


def _u32(number: int) -> bytes:
    return number.to_bytes(4, "big")
