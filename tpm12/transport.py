"""Transport sessions: finding and encrypting the parameters inside a frame, the log, the proof.

Of a wrapped frame only DATAw is encrypted, hashed and logged: what follows the handles and ends
before the auth blocks. TPM_OIAP and TPM_OSAP have no DATAw, TPM_DSAP's is its entityValue.

Leaves to others: the actions of the three commands (`commands/transport.py`), running the wrapped
command (the engine), the client's end (`client_transport.py`).

Source: TPM Main r116 Part 2 §13, Part 3 §24.

Invariants:
- A transport session that was named by a transport command which then failed is gone.
- An exclusive session ends with the first command that is not on it, unless that does not parse.
- A wrong transAuth is not counted as an attack: the session it guesses at dies with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from protocol.constants import (
    AUTH_REQUEST_BYTES,
    AUTH_RESPONSE_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    ZERO_DIGEST,
    AlgorithmId,
    EncScheme,
    EntityType,
    KeyHandleValue,
    Ordinal,
    ProtocolId,
    ResourceType,
    Tag,
    TransportAttribute,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CurrentTicks, StorePubkey, TransportLogIn, TransportLogOut
from protocol.wire import encode
from tpm12.authorization import AuthBlock, Authorized, Declared
from tpm12.crypto import HmacKey, aes128_ctr, aes128_ofb, hmac_key, is_same, mgf1, sha1, xor
from tpm12.keys import LoadedKey
from tpm12.state import TransportSession
from tpm12.tpm import Tpm

if TYPE_CHECKING:
    from tpm12.dispatch import Command

TRANSPORT_ONLY: Final = frozenset({int(ProtocolId.TRANSPORT)})
"""Sessions of TPM_ExecuteTransport and TPM_ReleaseTransportSigned."""
NOT_WRAPPED: Final = frozenset(
    {
        Ordinal.ESTABLISH_TRANSPORT,
        Ordinal.EXECUTE_TRANSPORT,
        Ordinal.RELEASE_TRANSPORT_SIGNED,
    }
)
"""Commands that cannot be wrapped: transport sessions do not nest."""
IN: Final = b"in"
OUT: Final = b"out"
_REQUEST_BLOCKS: Final = {
    int(Tag.RQU_AUTH1_COMMAND): AUTH_REQUEST_BYTES,
    int(Tag.RQU_AUTH2_COMMAND): 2 * AUTH_REQUEST_BYTES,
}
_RESPONSE_BLOCKS: Final = {
    int(Tag.RSP_AUTH1_COMMAND): AUTH_RESPONSE_BYTES,
    int(Tag.RSP_AUTH2_COMMAND): 2 * AUTH_RESPONSE_BYTES,
}
_IV_BYTES: Final = 16
_TRUE: Final = b"\x01"
_FALSE: Final = b"\x00"


# -- parameters inside a frame ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Frame:
    """A wrapped request or response, and where its DATAw lies.

    Attributes:
        data: All bytes.
        command: Its declaration.
        start, end: Offsets of DATAw; equal when there is none.
    """

    data: bytes
    command: Command
    start: int
    end: int

    @property
    def parameters(self) -> bytes:
        """DATAw."""
        return self.data[self.start : self.end]

    def with_parameters(self, parameters: bytes) -> Frame:
        """The frame with another DATAw of the same size."""
        data = self.data[: self.start] + parameters + self.data[self.end :]
        return Frame(data, self.command, self.start, self.end)

    def request_digest(self) -> bytes:
        """H1 of Part 3 §24.2: H(ordinal, DATAw in clear)."""
        return sha1(self.data[6:10], self.parameters)

    def response_digest(self) -> bytes:
        """H2 of Part 3 §24.2: H(return code, ordinal, DATAw in clear)."""
        ordinal = self.command.ordinal.to_bytes(4, "big")
        return sha1(self.data[6:10], ordinal, self.parameters)


def request_frame(data: bytes, commands: Mapping[int, Command]) -> Frame:
    """Find DATAw of a wrapped request.

    Raises:
        TpmError: BAD_PARAMETER when the ordinal is unknown or cannot be told, or there are fewer
            bytes than handles and auth blocks need; BAD_PARAM_SIZE when the frame says another
            size than it has.
    """
    if len(data) < HEADER_BYTES:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a wrapped command without an ordinal")
    if int.from_bytes(data[2:6], "big") != len(data):
        raise TpmError(ReturnCode.BAD_PARAM_SIZE, "a wrapped command of another size")
    command = commands.get(int.from_bytes(data[6:10], "big"))
    if command is None:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a wrapped command that is unknown")
    end = len(data) - _REQUEST_BLOCKS.get(int.from_bytes(data[:2], "big"), 0)
    if end < command.params_at:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a wrapped command that is cut off")
    return Frame(data, command, command.params_at, end)


def response_frame(data: bytes, command: Command) -> Frame:
    """Find DATAw of a wrapped response; the response of a command that failed has none."""
    if any(data[6:10]):
        return Frame(data, command, HEADER_BYTES, HEADER_BYTES)
    end = len(data) - _RESPONSE_BLOCKS.get(int.from_bytes(data[:2], "big"), 0)
    return Frame(data, command, min(command.results_at, end), end)


def key_handles(frame: Frame) -> list[int]:
    """The handles of keys that a wrapped command names, in order (Part 3 §24.2, 6 and 10)."""
    clear, command = frame.data[: frame.end], frame.command
    match command.ordinal:
        case Ordinal.FLUSH_SPECIFIC | Ordinal.SAVE_CONTEXT:
            is_key = _number(clear, frame.start, 4) == ResourceType.KEY
            places = [HEADER_BYTES] if is_key else []
        case Ordinal.DSAP:
            named_by_key = _number(clear, HEADER_BYTES, 2) & 0xFF == EntityType.DEL_KEY_BLOB
            places = [HEADER_BYTES + 2] if named_by_key else []
        case _:
            places = [*command.key_handles_at]
    return [_number(clear, at, 4) for at in places if at + 4 <= len(clear)]


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "big")


# -- encryption ------------------------------------------------------------------------------------


def check_cipher(algorithm_id: int, enc_scheme: int, *, is_fips: bool) -> None:
    """Check that transport sessions can be encrypted so.

    Raises:
        TpmError: BAD_KEY_PROPERTY for an algorithm that is not served, INAPPROPRIATE_ENC for a
            scheme that does not go with it, and for MGF1 in FIPS mode.
    """
    if algorithm_id == AlgorithmId.MGF1:
        is_served = enc_scheme == EncScheme.NONE and not is_fips
    elif algorithm_id == AlgorithmId.AES128:
        is_served = enc_scheme in {EncScheme.SYM_CTR, EncScheme.SYM_OFB}
    else:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "no cipher of transport sessions")
    if not is_served:
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)


def crypted(session: TransportSession, nonces: bytes, direction: bytes, data: bytes) -> bytes:
    """Encrypt or decrypt DATAw, if the session encrypts at all; its own inverse.

    Args:
        session: Secret and cipher.
        nonces: The even nonce and the odd one: 40 bytes.
        direction: `IN` or `OUT`.
        data: DATAw.
    """
    if not session.attributes & TransportAttribute.ENCRYPT or not data:
        return data
    seed = nonces + direction
    if session.algorithm_id == AlgorithmId.MGF1:
        return xor(data, mgf1(seed + session.auth_data, len(data)))
    iv = mgf1(seed, _IV_BYTES)
    cipher = aes128_ctr if session.enc_scheme == EncScheme.SYM_CTR else aes128_ofb
    return cipher(session.auth_data, iv, data)


# -- log -------------------------------------------------------------------------------------------


def logged_in(trans_digest: bytes, parameters: bytes, pub_key_hash: bytes = ZERO_DIGEST) -> bytes:
    """The log's digest after an input; 20 bytes."""
    event = TransportLogIn(parameters=parameters, pub_key_hash=pub_key_hash)
    return sha1(trans_digest, encode(event))


def logged_out(trans_digest: bytes, parameters: bytes, ticks: CurrentTicks, locality: int) -> bytes:
    """The log's digest after an output; 20 bytes."""
    event = TransportLogOut(current_ticks=ticks, parameters=parameters, locality=locality)
    return sha1(trans_digest, encode(event))


def pub_key_hash(moduli: list[bytes]) -> bytes:
    """What the log says of the keys that a command names; 20 bytes, zero for none."""
    if not moduli:
        return ZERO_DIGEST
    return sha1(*[sha1(encode(StorePubkey(key=modulus))) for modulus in moduli])


def moduli_of(tpm: Tpm, handles: list[int]) -> list[bytes]:
    """Public parts of the keys that a wrapped command names.

    Raises:
        TpmError: INVALID_KEYHANDLE when one is not loaded.
    """
    found = []
    for handle in handles:
        endorsement_key = tpm.permanent.endorsement_key
        if handle == KeyHandleValue.EK and endorsement_key is not None:
            found.append(endorsement_key.public.pub_key)
        else:
            found.append(tpm.key(handle).public.pub_key)
    return found


# -- sessions --------------------------------------------------------------------------------------


def proof(secret: HmacKey, digest: bytes, nonces: bytes, *, continues: bool) -> bytes:
    """The HMAC of a transport session over one request or response; 20 bytes."""
    return secret.mac(digest + nonces + (_TRUE if continues else _FALSE))


def end(tpm: Tpm, trans_handle: int) -> None:
    """End a transport session, if there is one."""
    sessions = tpm.stany.transport_sessions
    if trans_handle in sessions:
        stany = tpm.change_stany()
        stany.transport_sessions = {h: s for h, s in sessions.items() if h != trans_handle}
        if stany.transport_exclusive == trans_handle:
            stany.transport_exclusive = 0


class TransportAuthorized(Authorized):
    """The authorization of a command whose last session is a transport session.

    Attributes:
        nonce_even: Of the response; drawn with the request, since it also encrypts.
        wrapped_digests: H1 and H2 of what was wrapped, if anything was; they stand for the
            parameters when the command is audited.
        out_param_digest: Of the response, where it is not the usual one.
    """

    __slots__ = ("_session", "nonce_even", "out_param_digest", "wrapped_digests")

    def __init__(  # noqa: PLR0913, PLR0917 - as the class above it
        self,
        tpm: Tpm,
        ordinal: int,
        declared: Declared,
        blocks: Sequence[AuthBlock],
        in_param_digest: bytes,
        keys: dict[str, LoadedKey],
    ) -> None:
        super().__init__(tpm, ordinal, declared, blocks, in_param_digest, keys)
        self.nonce_even = tpm.random(DIGEST_BYTES)
        self.wrapped_digests: tuple[bytes, bytes] | None = None
        self.out_param_digest: bytes | None = None
        self._session: TransportSession | None = None

    @property
    def trans_block(self) -> AuthBlock:
        """The block of the transport session: the last one."""
        return self.blocks[-1]

    def find_transport(self) -> TransportSession:
        """The transport session that the command is on; ends an exclusive one that is another.

        Raises:
            TpmError: INVALID_AUTHHANDLE.
        """
        handle, tpm = self.trans_block.handle, self.tpm
        if tpm.stany.transport_exclusive not in {0, handle}:
            end(tpm, tpm.stany.transport_exclusive)
            tpm.settle()
        session = tpm.stany.transport_sessions.get(handle)
        if session is None:
            raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
        self._session = session
        return session

    def verify_transport(self, in_param_digest: bytes, failure: ReturnCode) -> None:
        """Check transAuth.

        Raises:
            TpmError: `failure`.
        """
        session, block = self._found(), self.trans_block
        nonces = session.nonce_even + block.nonce_odd
        secret = hmac_key(session.auth_data)
        expected = proof(secret, in_param_digest, nonces, continues=block.continues)
        if not is_same(expected, block.mac):
            raise TpmError(failure, "wrong authorization for the transport session")
        block.hmac = secret

    def keep_log(self, trans_digest: bytes) -> None:
        """Give the session another log digest, if it is still there after the command."""
        self._session = replace(self._found(), trans_digest=trans_digest)

    def sign_response(self, blocks: Sequence[AuthBlock], out_param_digest: bytes) -> bytes:
        """The response's auth blocks; rolls nonces and ends sessions that do not continue."""
        *own, block = blocks
        signed = super().sign_response(own, out_param_digest) if own else b""
        session, tpm = self._found(), self.tpm
        sessions = tpm.stany.transport_sessions
        # The wrapped command itself may have ended the session, with the owner for one.
        continues = block.continues and block.handle in sessions
        if block.hmac is None:
            raise AssertionError("a response is signed before its request was checked")
        if continues:
            rolled = replace(session, nonce_even=self.nonce_even)
            tpm.change_stany().transport_sessions = {**sessions, block.handle: rolled}
        else:
            end(tpm, block.handle)
        digest = self.out_param_digest or out_param_digest
        nonces = self.nonce_even + block.nonce_odd
        mac = proof(block.hmac, digest, nonces, continues=continues)
        return signed + self.nonce_even + (_TRUE if continues else _FALSE) + mac

    def _found(self) -> TransportSession:
        if self._session is None:
            raise AssertionError("the transport session was not looked for")
        return self._session
