"""Proving the right to use something: sessions, request and response HMACs, the attack counter.

`Authorized` is what a handler sees of it: keys whose use is proven, new secrets unmasked, checks
that only the handler can order (a secret inside a blob). Nobody else computes an HMAC.

Source: TPM Main r116 Part 1 §§ on authorization protocols, Part 3 §18; dictionary attack Part 1.

Invariants:
- A session that was named by a command which then failed is gone (but not after 0x803).
- A session whose secret masked a new secret is not used again.
- Each failed HMAC counts against the attack counter, also when the command's draft is dropped.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from protocol.constants import (
    AUTH_REQUEST_BYTES,
    AdipScheme,
    AuthDataUsage,
    DelegateType,
    EntityType,
    KeyFlags,
    KeyHandleValue,
    ProtocolId,
)
from protocol.delegation_structures import DelegatePublic
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CounterValue
from protocol.wire import changing, decode, encode
from tpm12 import delegation
from tpm12.crypto import HmacKey, aes128_ctr, hmac_key, is_same, sha1, xor
from tpm12.keys import LoadedKey
from tpm12.pcrs import check_release
from tpm12.state import Counter, NvArea, Session, session_key
from tpm12.tpm import Tpm

if TYPE_CHECKING:
    from tpm12.dispatch import AuthBy

_read_block: Final = struct.Struct(">I20sB20s").unpack_from
_NV_NAME: Final = struct.Struct(">III")
_TRUE: Final = b"\x01"
_FALSE: Final = b"\x00"

OIAP: Final = int(ProtocolId.OIAP)
OSAP: Final = int(ProtocolId.OSAP)
DSAP: Final = int(ProtocolId.DSAP)
ANY_KIND: Final = frozenset({OIAP, OSAP, DSAP})
WITH_SHARED_SECRET: Final = frozenset({OSAP, DSAP})
"""Sessions that may insert a new secret."""
OIAP_ONLY: Final = frozenset({OIAP})

_KEY: Final = int(EntityType.KEYHANDLE)
_OWNER: Final = int(EntityType.OWNER)
_NV: Final = int(EntityType.NV)
_COUNTER: Final = int(EntityType.COUNTER)
_OWNER_ITSELF: Final = int(KeyHandleValue.OWNER)
_OWNER_BITS: Final = int(DelegateType.OWNER_BITS)
_DELEGATE_TYPES: Final = {_KEY: int(DelegateType.KEY_BITS), _OWNER: _OWNER_BITS}
# Plain integers here too: with an enumerator, `&` and `==` run Python code.
_PCR_IGNORED_ON_READ: Final = int(KeyFlags.PCR_IGNORED_ON_READ)
_NEVER: Final = int(AuthDataUsage.NEVER)
_NO_READ_PUBKEY_AUTH: Final = int(AuthDataUsage.NO_READ_PUBKEY_AUTH)

_rolled: Final = changing(Session, "nonce_even")
"""A session after one more response."""


class AuthBlock:
    """One authorization block of a request, and what became of it."""

    __slots__ = (
        "continues",
        "delegation",
        "handle",
        "hmac",
        "mac",
        "nonce_odd",
        "session",
    )

    def __init__(self, handle: int, nonce_odd: bytes, continues: int, mac: bytes) -> None:
        if continues > 1:
            raise TpmError(ReturnCode.BAD_PARAMETER, "a BOOL other than 0 or 1")
        self.handle = handle
        self.nonce_odd = nonce_odd
        self.continues = continues == 1
        self.mac = mac
        self.session: Session | None = None
        self.hmac: HmacKey | None = None
        """The key that proved the request; it also signs the response. None: not proven yet."""
        self.delegation: DelegatePublic | None = None
        """Whose authority was used, when it was a delegate's."""


class Entity(NamedTuple):
    """What a session may be bound to; `key` where it is one."""

    entity_type: int
    digest: bytes
    key: LoadedKey | None = None


def key_entity(key: LoadedKey) -> Entity:
    """A loaded key, the SRK included."""
    return Entity(_KEY, key.pub_data_digest, key)


@lru_cache(maxsize=8)
def owner_entity(owner_auth: bytes) -> Entity:
    """The owner."""
    return Entity(_OWNER, sha1(b"owner", owner_auth))


def nv_entity(area: NvArea) -> Entity:
    """An NV area: its index, secret, attributes and size; neither its locks nor its bytes."""
    public = area.public
    named = _NV_NAME.pack(public.nv_index, public.permission.attributes, public.data_size)
    return Entity(_NV, sha1(named, area.auth_value))


def counter_entity(count_id: int, counter: Counter) -> Entity:
    """A monotonic counter; its value does not matter."""
    public = CounterValue(label=counter.label, counter=count_id)
    return Entity(_COUNTER, sha1(encode(public), counter.auth_data))


def read_blocks(data: bytes, at: int, count: int) -> list[AuthBlock]:
    """Read `count` auth blocks from `at` to the end of `data`.

    Raises:
        TpmError: BAD_PARAM_SIZE when bytes are missing or left over, BAD_PARAMETER for a
            continueAuthSession other than 0 and 1.
    """
    if at + AUTH_REQUEST_BYTES * count != len(data):
        raise TpmError(ReturnCode.BAD_PARAM_SIZE, "the request does not end with its auth blocks")
    if count == 1:
        return [AuthBlock(*_read_block(data, at))]
    return [
        AuthBlock(*_read_block(data, start)) for start in range(at, len(data), AUTH_REQUEST_BYTES)
    ]


Declared = Sequence[tuple["AuthBy", AuthBlock | None]]
"""The sessions that a command declares, each with the block that came for it."""


class Authorized:
    """The authorization of one command.

    Args:
        tpm: The command's draft.
        ordinal: Of the command; delegations permit by it.
        declared: Its declared sessions, each with the block that came for it or None.
        blocks: The blocks that came.
        in_param_digest: H(ordinal, parameters without handles).
        keys: The keys that the handle operands name, by operand.
    """

    __slots__ = ("_declared", "blocks", "in_param_digest", "keys", "ordinal", "tpm")

    def __init__(  # noqa: PLR0913, PLR0917 - what is known when it is checked
        self,
        tpm: Tpm,
        ordinal: int,
        declared: Declared,
        blocks: Sequence[AuthBlock],
        in_param_digest: bytes,
        keys: dict[str, LoadedKey],
    ) -> None:
        self.tpm = tpm
        self.ordinal = ordinal
        self._declared = declared
        self.blocks = blocks
        self.in_param_digest = in_param_digest
        self.keys = keys

    # -- for handlers ------------------------------------------------------------------------

    def __bool__(self) -> NoReturn:
        # An object is true as a rule; "if not auth" would let anybody in who brings no session.
        raise TypeError("ask for what came: auth.blocks, auth.has(...)")

    def has(self, over: str) -> bool:
        """Did a session come for this declared use?"""
        return self._block(over) is not None

    def key(self, operand: str) -> LoadedKey:
        """The key that a handle operand names; its use is proven."""
        return self.keys[operand]

    def session(self, over: str) -> tuple[Session, AuthBlock]:
        """The session and block that came for a declared use.

        Raises:
            TpmError: AUTHFAIL when none came; INVALID_AUTHHANDLE; BAD_MODE for a kind of session
                that is not allowed here.
        """
        by, block, _ = self._declared_use(over)
        return self._find(by, block), block

    def delegation(self, over: str) -> DelegatePublic | None:
        """The delegation whose authority a checked session used; None: the entity's own."""
        block = self._block(over)
        return None if block is None else block.delegation

    def decrypt_secret(self, over: str, enc_auth: bytes, *, is_second: bool = False) -> bytes:
        """Unmask a new secret that came under a session (ADIP), which ends that session.

        Args:
            over: The declared use whose session masks it.
            enc_auth: 20 bytes.
            is_second: It is the second secret of the command (dataMigrationAuth).
        """
        session, block = self.session(over)
        self.end_session(over)
        nonce = block.nonce_odd if is_second else session.nonce_even
        if session.adip == AdipScheme.AES128_CTR:
            return aes128_ctr(session.shared_secret, nonce, enc_auth)
        return xor(enc_auth, sha1(session.shared_secret, nonce))

    def end_session(self, over: str) -> None:
        """Force continueAuthSession to FALSE."""
        block = self._block(over)
        if block is not None:
            block.continues = False

    def end_all(self) -> None:
        """Force continueAuthSession of every session to FALSE."""
        for block in self.blocks:
            block.continues = False

    def verify(self, over: str, secret: HmacKey, entity: Entity | None) -> None:
        """Check the session that came for a declared use against a secret.

        Args:
            over: The declared use.
            secret: HMAC state of the entity's authValue (for OIAP).
            entity: What an OSAP or DSAP session must be bound to; None refuses both.

        Raises:
            TpmError: AUTHFAIL, or AUTH2FAIL for the second of two declared sessions;
                INVALID_AUTHHANDLE; BAD_MODE for a kind of session that is not allowed here.
        """
        by, block, position = self._declared_use(over)
        self._verify(by, block, self._find(by, block), secret, entity, position)

    def verify_owner(self, over: str = "owner") -> None:
        """Check a session against the owner's secret, or a delegate's (TPM_SetOwnerPointer).

        Raises:
            TpmError: NOSRK without an owner, else as `verify`.
        """
        if self.tpm.permanent.owner_auth is None:
            raise TpmError(ReturnCode.NOSRK)
        self._verify_owner(*self._declared_use(over))

    # -- for the dispatcher ------------------------------------------------------------------

    def verify_declared(self) -> None:
        """Check the sessions that the declaration says how to check; handlers do the rest.

        So a handler's own checks come first where the specification has them first.

        Raises:
            TpmError: INVALID_AUTHHANDLE, BAD_MODE; AUTHFAIL or AUTH2FAIL; NOSRK; AUTHFAIL for a key
                that needs a session.
        """
        declared, keys = self._declared, self.keys
        if len(declared) > 1 and self.blocks:
            self._find_declared()
        for position, (by, block) in enumerate(declared):
            key = keys.get(by.over)
            if key is not None:
                if block is not None:
                    session = self._find(by, block)
                    entity = None if session.protocol == OIAP else key_entity(key)
                    self._verify(by, block, session, key.usage_hmac, entity, position)
                elif not _goes_without_session(key, reads_only=by.reads_only):
                    raise TpmError(ReturnCode.AUTHFAIL, "this key needs an authorization session")
            elif block is not None and by.over == "owner":
                self._verify_owner(by, block, position)

    def _find_declared(self) -> None:
        """Of two sessions, find both before the first is checked."""
        for by, block in self._declared:
            if block is not None and (by.over in self.keys or by.over == "owner"):
                self._find(by, block)
        if len(self.blocks) == 2 and self.blocks[0].handle == self.blocks[1].handle:
            raise TpmError(ReturnCode.INVALID_AUTHHANDLE, "one session for two authorizations")

    def sign_response(self, blocks: Sequence[AuthBlock], out_param_digest: bytes) -> bytes:
        """The response's auth blocks; rolls nonces and drops sessions that do not continue."""
        tpm = self.tpm
        stany = tpm.change_stany()
        sessions = stany.sessions = stany.sessions.copy()
        signed = b""
        for block in blocks:
            handle, session, hmac = block.handle, block.session, block.hmac
            if hmac is None or session is None:
                raise AssertionError("a response is signed before its request was checked")
            nonce_even = tpm.world.rng.random(20)
            # The command itself may have ended the session, with what it was bound to.
            if block.continues and handle in sessions:
                sessions[handle] = _rolled(session, nonce_even)
                continues = _TRUE
            else:
                sessions.pop(handle, None)
                continues = _FALSE
            mac = hmac.mac(out_param_digest + nonce_even + block.nonce_odd + continues)
            signed += nonce_even + continues + mac
        return signed

    def _block(self, over: str) -> AuthBlock | None:
        for by, block in self._declared:
            if by.over == over:
                return block
        return None

    def _declared_use(self, over: str) -> tuple[AuthBy, AuthBlock, int]:
        """A declared use, the block that came for it, and its position."""
        by, first = self._declared[0]
        if by.over == over and first is not None:
            return by, first, 0
        for position, (by, block) in enumerate(self._declared):
            if by.over == over and block is not None:
                return by, block, position
        raise TpmError(ReturnCode.AUTHFAIL, f"no session for {over}")

    def _find(self, by: AuthBy, block: AuthBlock) -> Session:
        session = block.session
        if session is None:
            session = self.tpm.stany.sessions.get(block.handle)
            if session is None:
                raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
            if session.protocol not in by.kinds:
                raise TpmError(ReturnCode.BAD_MODE, "a session of another kind is needed")
            block.session = session
        return session

    def _verify_owner(self, by: AuthBy, block: AuthBlock, position: int) -> None:
        session, tpm = self._find(by, block), self.tpm
        owner_auth = tpm.permanent.owner_auth
        if owner_auth is None:
            raise TpmError(ReturnCode.NOSRK)
        secret, entity = hmac_key(owner_auth), None
        if session.protocol != OIAP:
            entity = owner_entity(owner_auth)
        elif (row_index := tpm.stclear.owner_reference) != _OWNER_ITSELF:
            secret = self._delegates_secret(block, row_index, by.failure(position))
        self._verify(by, block, session, secret, entity, position)

    def _delegates_secret(self, block: AuthBlock, row_index: int, failure: ReturnCode) -> HmacKey:
        """Let a row of the delegate table act in the owner's place (Part 3 §18.1, action 4)."""
        row = delegation.row_at(self.tpm, row_index)
        delegation.check_use(self.tpm, row.public, _OWNER_BITS, self.ordinal, failure)
        block.delegation = row.public
        return hmac_key(row.auth_value)

    def _check_delegate(
        self, session: Session, block: AuthBlock, entity: Entity, failure: ReturnCode
    ) -> None:
        """Check what a DSAP session may do here and now (Part 1 on delegation)."""
        public = decode(DelegatePublic, session.delegation)
        delegate_type = _DELEGATE_TYPES[entity.entity_type]
        delegation.check_use(self.tpm, public, delegate_type, self.ordinal, failure)
        if entity.key is not None:
            delegation.check_key(self.tpm, entity.key)
        block.delegation = public

    def _verify(  # noqa: PLR0913, PLR0917 - all that is known of it, so that nothing is looked for twice
        self,
        by: AuthBy,
        block: AuthBlock,
        session: Session,
        secret: HmacKey,
        entity: Entity | None,
        position: int,
    ) -> None:
        if session.protocol == OIAP:
            hmac = secret
        elif (
            entity is not None
            and session.entity_type == entity.entity_type
            and is_same(session.entity_digest, entity.digest)
        ):
            if session.protocol == DSAP:
                self._check_delegate(session, block, entity, by.failure(position))
            hmac = session_key(session)
        else:
            raise TpmError(by.failure(position), f"the session is not bound to {by.over}")
        continues = _TRUE if block.continues else _FALSE
        expected = hmac.mac(self.in_param_digest + session.nonce_even + block.nonce_odd + continues)
        if not is_same(expected, block.mac):
            raise WrongHmacError(by.failure(position), f"wrong authorization for {by.over}")
        block.hmac = hmac


def end_bound_sessions(tpm: Tpm, entity_type: int, entity_value: int) -> None:
    """End the OSAP and DSAP sessions that are bound to an entity which is going away."""
    sessions = tpm.stany.sessions
    kept = {
        handle: session
        for handle, session in sessions.items()
        if session.entity_type != entity_type or session.entity_value != entity_value
    }
    if len(kept) != len(sessions):
        tpm.change_stany().sessions = kept


class WrongHmacError(TpmError):
    """An HMAC was wrong: counts against the dictionary-attack defence."""


def _goes_without_session(key: LoadedKey, *, reads_only: bool) -> bool:
    if key.auth_data_usage == _NEVER:
        return True
    return reads_only and key.auth_data_usage == _NO_READ_PUBKEY_AUTH


def check_key_use(tpm: Tpm, key: LoadedKey, *, reads_only: bool) -> None:
    """Check a key's own PCR and locality binding (Part 3 §10, "use of a key").

    Raises:
        TpmError: WRONGPCRVAL, BAD_LOCALITY.
    """
    if reads_only and key.flags & _PCR_IGNORED_ON_READ:
        return
    check_release(tpm, key.pcr_info)


# -- dictionary attack (Part 1; libtpms' numbers) ------------------------------------------------

_SECOND_US: Final = 1_000_000
_DOUBLINGS_MAX: Final = 31


def lockout_left_us(tpm: Tpm) -> int:
    """How long commands with authorization are still refused; 0 when they are not."""
    over = tpm.stclear.failed_tries - tpm.world.profile.failed_tries
    if over <= 0:
        return 0
    wait_us = _SECOND_US << min(over - 1, _DOUBLINGS_MAX)
    passed_us = tpm.world.clock.now_us() - tpm.stclear.last_failure_us
    return max(0, wait_us - passed_us)


def count_failure(tpm: Tpm) -> None:
    """Note one failed authorization."""
    stclear = tpm.change_stclear()
    stclear.failed_tries += 1
    stclear.last_failure_us = tpm.world.clock.now_us()
