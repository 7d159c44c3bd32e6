"""Authorization sessions, eviction: TPM Main r116 Part 3, chapters 18, 22 and 27.1.

Leaves to others: what a session proves (`tpm12.authorization`).
"""

from __future__ import annotations

from typing import TypeVar

from protocol.constants import (
    ZERO_DIGEST,
    AdipScheme,
    EntityType,
    KeyHandleValue,
    Ordinal,
    ResourceType,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import U16, U32, Handle, Nonce, wire
from tpm12 import authorization
from tpm12.authorization import Authorized, Entity
from tpm12.crypto import hmac_sha1
from tpm12.dispatch import Gate, Nothing, command
from tpm12.state import Session
from tpm12.tpm import Tpm

V = TypeVar("V")


@wire
class OiapOut:
    """§18.1 outgoing operands."""

    auth_handle: U32
    nonce_even: Nonce


@command(Ordinal.OIAP, name="OIAP", section="Part 3 §18.1", gives=OiapOut, gates=Gate.NONE)
def oiap(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> OiapOut:
    """Open a session that is bound to nothing.

    Raises:
        TpmError: RESOURCES when every slot is taken.
    """
    nonce_even = tpm.random(20)
    session = Session(
        protocol=authorization.OIAP,
        nonce_even=nonce_even,
        entity_type=0,
        entity_value=0,
        entity_digest=ZERO_DIGEST,
        adip=AdipScheme.XOR,
        shared_secret=b"",
        delegation=b"",
    )
    return OiapOut(auth_handle=_open(tpm, session), nonce_even=nonce_even)


@wire
class OsapIn:
    """§18.2 incoming operands."""

    entity_type: U16
    entity_value: U32
    nonce_odd_osap: Nonce


@wire
class OsapOut:
    """§18.2 outgoing operands."""

    auth_handle: U32
    nonce_even: Nonce
    nonce_even_osap: Nonce


@command(
    Ordinal.OSAP,
    name="OSAP",
    section="Part 3 §18.2",
    takes=OsapIn,
    gives=OsapOut,
    gates=Gate.NONE,
)
def osap(tpm: Tpm, cmd: OsapIn, _auth: Authorized) -> OsapOut:
    """Open a session that is bound to one entity and may mask new secrets.

    An owner is not needed for entities that do not hang on one (NV areas, counters).

    Raises:
        TpmError: RESOURCES; INAPPROPRIATE_ENC for an unknown ADIP scheme; BAD_PARAMETER for an
            entity type that has no OSAP; INVALID_KEYHANDLE, BADINDEX, BAD_COUNTER; NOSRK.
    """
    adip = cmd.entity_type >> 8
    if adip not in set(AdipScheme) or (adip == AdipScheme.XOR and tpm.permanent.flags.fips):
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
    entity, secret = _entity(tpm, cmd.entity_type & 0xFF, cmd.entity_value)
    nonce_even, nonce_even_osap = tpm.random(20), tpm.random(20)
    session = Session(
        protocol=authorization.OSAP,
        nonce_even=nonce_even,
        entity_type=entity.entity_type,
        entity_value=cmd.entity_value,
        entity_digest=entity.digest,
        adip=adip,
        shared_secret=hmac_sha1(secret, nonce_even_osap + cmd.nonce_odd_osap),
        delegation=b"",
    )
    handle = _open(tpm, session)
    return OsapOut(auth_handle=handle, nonce_even=nonce_even, nonce_even_osap=nonce_even_osap)


def _open(tpm: Tpm, session: Session) -> int:
    sessions = tpm.stany.sessions
    if len(sessions) >= tpm.world.profile.auth_sessions:
        raise TpmError(ReturnCode.RESOURCES)
    handle = tpm.new_handle(sessions, tpm.stany.transport_sessions)
    tpm.change_stany().sessions = {**sessions, handle: session}
    return handle


def _entity(tpm: Tpm, entity_type: int, value: int) -> tuple[Entity, bytes]:
    """The entity that an OSAP names, and its authValue."""
    if entity_type in {EntityType.KEYHANDLE, EntityType.SRK}:
        handle = int(KeyHandleValue.SRK) if entity_type == EntityType.SRK else value
        if handle == KeyHandleValue.SRK and not tpm.has_owner:
            raise TpmError(ReturnCode.NOSRK)
        key = tpm.key(handle)
        return authorization.key_entity(key), key.usage_auth
    if entity_type == EntityType.OWNER:
        owner_auth = tpm.permanent.owner_auth
        if owner_auth is None:
            raise TpmError(ReturnCode.NOSRK)
        return authorization.owner_entity(owner_auth), owner_auth
    if entity_type == EntityType.NV:
        area = tpm.permanent.nv.get(value)
        if area is None:
            raise TpmError(ReturnCode.BADINDEX)
        return authorization.nv_entity(area), area.auth_value
    if entity_type == EntityType.COUNTER:
        counter = tpm.permanent.counters.get(value)
        if counter is None:
            raise TpmError(ReturnCode.BAD_COUNTER)
        return authorization.counter_entity(value, counter), counter.auth_data
    raise TpmError(ReturnCode.BAD_PARAMETER)


# -- eviction ------------------------------------------------------------------------------------


@wire
class FlushSpecificIn:
    """§22.1 incoming operands."""

    handle: Handle
    resource_type: U32


@command(
    Ordinal.FLUSH_SPECIFIC,
    name="FlushSpecific",
    section="Part 3 §22.1",
    takes=FlushSpecificIn,
    gates=Gate.NONE,
)
def flush_specific(tpm: Tpm, cmd: FlushSpecificIn, _auth: Authorized) -> None:
    """Drop a key, a session or a saved context.

    Raises:
        TpmError: BAD_PARAMETER when it is not there, INVALID_RESOURCE for other types,
            KEY_OWNER_CONTROL for an owner-evict key.
    """
    match cmd.resource_type:
        case ResourceType.KEY:
            if not flush_key(tpm, cmd.handle):
                raise TpmError(ReturnCode.BAD_PARAMETER)
        case ResourceType.AUTH:
            # The specification asks for BAD_PARAMETER; clients know the code that TPMs give.
            flush_session(tpm, cmd.handle)
        case ResourceType.TRANS:
            if cmd.handle not in tpm.stany.transport_sessions:
                raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
            stany = tpm.change_stany()
            stany.transport_sessions = _without(stany.transport_sessions, cmd.handle)
            if stany.transport_exclusive == cmd.handle:
                stany.transport_exclusive = 0
        case ResourceType.CONTEXT:
            found = [i for i, n in tpm.stany.context_list.items() if n == cmd.handle]
            if not found:
                raise TpmError(ReturnCode.BAD_PARAMETER)
            stany = tpm.change_stany()
            stany.context_list = _without(stany.context_list, found[0])
        case _:
            raise TpmError(ReturnCode.INVALID_RESOURCE)


@wire
class HandleIn:
    """§27.1 incoming operands."""

    handle: Handle


@command(
    Ordinal.TERMINATE_HANDLE,
    name="Terminate_Handle",
    section="Part 3 §27.1.2",
    takes=HandleIn,
    gates=Gate.NONE,
)
def terminate_handle(tpm: Tpm, cmd: HandleIn, _auth: Authorized) -> None:
    """Drop a session (of 1.1 age).

    Raises:
        TpmError: INVALID_AUTHHANDLE.
    """
    flush_session(tpm, cmd.handle)


@command(Ordinal.EVICT_KEY, name="EvictKey", section="Part 3 §27.1.1", takes=HandleIn)
def evict_key(tpm: Tpm, cmd: HandleIn, _auth: Authorized) -> None:
    """Drop a key (of 1.1 age).

    Raises:
        TpmError: INVALID_KEYHANDLE, KEY_OWNER_CONTROL.
    """
    if not flush_key(tpm, cmd.handle):
        raise TpmError(ReturnCode.INVALID_KEYHANDLE)


@command(Ordinal.RESET, name="Reset", section="Part 3 §27.5", gates=Gate.NONE)
def reset(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Drop every authorization session and nothing else (of 1.1 age)."""
    if tpm.stany.sessions:
        tpm.change_stany().sessions = {}


def flush_session(tpm: Tpm, handle: int) -> None:
    """End an authorization session.

    Raises:
        TpmError: INVALID_AUTHHANDLE.
    """
    if handle not in tpm.stany.sessions:
        raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
    stany = tpm.change_stany()
    stany.sessions = _without(stany.sessions, handle)


def flush_key(tpm: Tpm, handle: int) -> bool:
    """Unload a key and end the sessions bound to it; False when there is none.

    Raises:
        TpmError: KEY_OWNER_CONTROL for an owner-evict key.
    """
    if handle in tpm.permanent.owner_evict_keys:
        raise TpmError(ReturnCode.KEY_OWNER_CONTROL)
    if handle not in tpm.volatile.keys:
        return False
    volatile = tpm.change_volatile()
    volatile.keys = _without(volatile.keys, handle)
    bound = [
        h
        for h, s in tpm.stany.sessions.items()
        if s.entity_type == EntityType.KEYHANDLE and s.entity_value == handle
    ]
    if bound:
        stany = tpm.change_stany()
        stany.sessions = {h: s for h, s in stany.sessions.items() if h not in bound}
    return True


def _without(table: dict[int, V], key: int) -> dict[int, V]:
    return {k: v for k, v in table.items() if k != key}
