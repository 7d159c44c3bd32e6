"""A TPM client without I/O: requests out of declarations, results out of responses.

`prepare()` makes one request with its authorization blocks; `Prepared.finish()` checks the
response and gives its results. Whoever moves the bytes (a socket, a ring, an engine in memory; a
blocking or a trio program) stands in between.

Source: TPM Main r116 Part 1 on authorization protocols, Part 3 §18.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from protocol.constants import (
    AUTH_RESPONSE_BYTES,
    DIGEST_BYTES,
    HEADER_BYTES,
    AdipScheme,
    Tag,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import DecodeError, decode, encode
from tpm12.crypto import HmacKey, aes128_ctr, hmac_sha1, is_same, sha1, xor
from tpm12.dispatch import Command
from tpm12.ports import Rng

_HEADER: Final = struct.Struct(">HII")


class BadResponseError(Exception):
    """The TPM's answer is malformed, or its authorization is wrong: do not trust it."""


@dataclass(slots=True)
class ClientSession:
    """The client's end of an authorization session.

    Attributes:
        handle: The TPM's handle.
        nonce_even: What the TPM sent last.
        nonce_odd: What the next command will send.
        shared_secret: Of OSAP and DSAP; None for OIAP.
        adip: How new secrets are masked.
        is_open: False once the TPM ended it.
    """

    handle: int
    nonce_even: bytes
    nonce_odd: bytes
    shared_secret: bytes | None = field(default=None, repr=False)
    adip: int = AdipScheme.XOR
    is_open: bool = True

    def mask(self, secret: bytes, *, is_second: bool = False) -> bytes:
        """Mask a new secret for the next command under this session (ADIP).

        Raises:
            ValueError: This is an OIAP session.
        """
        if self.shared_secret is None:
            raise ValueError("an OIAP session cannot mask a new secret")
        nonce = self.nonce_odd if is_second else self.nonce_even
        if self.adip == AdipScheme.AES128_CTR:
            return aes128_ctr(self.shared_secret, nonce, secret)
        return xor(secret, sha1(self.shared_secret, nonce))


@dataclass(slots=True)
class Use:
    """One authorization of a command: a session, and the secret that it proves.

    Attributes:
        secret: The entity's authValue; needed for an OIAP session only.
        continues: Keep the session afterwards.
    """

    session: ClientSession
    secret: bytes = field(default=b"", repr=False)
    continues: bool = False

    def hmac(self) -> HmacKey:
        """The HMAC key of request and response."""
        shared = self.session.shared_secret
        return HmacKey(self.secret if shared is None else shared)


def osap_shared_secret(secret: bytes, nonce_even_osap: bytes, nonce_odd_osap: bytes) -> bytes:
    """The HMAC key of an OSAP or DSAP session; 20 bytes."""
    return hmac_sha1(secret, nonce_even_osap + nonce_odd_osap)


@dataclass(slots=True)
class Prepared:
    """A request on its way, and what is needed to understand its response."""

    command: Command
    request: bytes
    _uses: Sequence[Use]
    _hmacs: list[HmacKey]
    _rng: Rng

    def finish(self, response: bytes) -> object:
        """Check the response and give the results (an instance of `command.gives`).

        Raises:
            TpmError: The TPM refused; its sessions are then gone.
            BadResponseError: The response is malformed or not signed by who knows the secret.
        """
        if len(response) < HEADER_BYTES:
            raise BadResponseError("a response of less than 10 bytes")
        tag, size, code = _HEADER.unpack_from(response)
        if size != len(response):
            raise BadResponseError("a response whose length field is wrong")
        if code:
            for use in self._uses:
                use.session.is_open = code == ReturnCode.DEFEND_LOCK_RUNNING
            raise refusal(self.command, code)
        if tag != Tag.RSP_COMMAND + len(self._uses):
            raise BadResponseError(f"a response with tag 0x{tag:04x}")
        end = len(response) - AUTH_RESPONSE_BYTES * len(self._uses)
        if end < HEADER_BYTES:
            raise BadResponseError("a response without its authorization")
        body = response[HEADER_BYTES:end]
        if self._uses:
            self._check(body, response, end)
        try:
            return cast("object", decode(self.command.gives, body))
        except DecodeError as error:
            raise BadResponseError(f"TPM_{self.command.name}: {error}") from error

    def _check(self, body: bytes, response: bytes, end: int) -> None:
        ordinal = self.command.ordinal.to_bytes(4, "big")
        digest = sha1(bytes(4) + ordinal + body[4 * self.command.handles_out :])
        for i, (use, hmac) in enumerate(zip(self._uses, self._hmacs, strict=True)):
            at = end + AUTH_RESPONSE_BYTES * i
            nonce_even = response[at : at + DIGEST_BYTES]
            continues = response[at + DIGEST_BYTES : at + DIGEST_BYTES + 1]
            mac = response[at + DIGEST_BYTES + 1 : at + AUTH_RESPONSE_BYTES]
            session = use.session
            if not is_same(hmac.mac(digest + nonce_even + session.nonce_odd + continues), mac):
                raise BadResponseError(f"TPM_{self.command.name}: the response is not authentic")
            session.nonce_even = nonce_even
            session.nonce_odd = self._rng.random(DIGEST_BYTES)
            session.is_open = continues == b"\x01"


def prepare(command: Command, operands: object, uses: Sequence[Use], rng: Rng) -> Prepared:
    """Make the request of one command.

    Args:
        command: Its declaration.
        operands: An instance of `command.takes`.
        uses: Authorization, in the order of the declared sessions.
        rng: For nonces.
    """
    body = encode(operands)
    hmacs = [use.hmac() for use in uses]
    blocks = b""
    if uses:
        ordinal = command.ordinal.to_bytes(4, "big")
        digest = sha1(ordinal + body[4 * command.handles_in :])
        for use, hmac in zip(uses, hmacs, strict=True):
            session = use.session
            continues = b"\x01" if use.continues else b"\x00"
            mac = hmac.mac(digest + session.nonce_even + session.nonce_odd + continues)
            blocks += session.handle.to_bytes(4, "big") + session.nonce_odd + continues + mac
    size = HEADER_BYTES + len(body) + len(blocks)
    header = _HEADER.pack(Tag.RQU_COMMAND + len(uses), size, command.ordinal)
    return Prepared(command, header + body + blocks, uses, hmacs, rng)


def refusal(command: Command, code: int) -> TpmError:
    """The error that a return code other than SUCCESS stands for."""
    name = f"TPM_{command.name}"
    if code in set(ReturnCode):
        return TpmError(ReturnCode(code), name)
    return TpmError(ReturnCode.FAIL, f"{name} answered with unknown code 0x{code:x}")
