"""Authorization sessions, eviction: TPM Main r116 Part 3, chapters 18, 22 and 27.1.

Leaves to others: what a session proves (`tpm12.authorization`), what a delegation is
(`tpm12.delegation`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeVar

from protocol.constants import (
    DIGEST_BYTES,
    ZERO_DIGEST,
    AdipScheme,
    EntityType,
    KeyHandleValue,
    Ordinal,
    ResourceType,
)
from protocol.delegation_structures import DelegateKeyBlob, DelegateOwnerBlob, DelegatePublic
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import U16, U32, DecodeError, Handle, Nonce, Sized, decode, encode, wire
from tpm12 import authorization, contexts, delegation
from tpm12.authorization import Authorized, Entity
from tpm12.crypto import HmacKey, hmac_key
from tpm12.dispatch import Gate, Nothing, command
from tpm12.state import Session
from tpm12.tpm import Tpm
from tpm12.wrapping import remove_from_slots

V = TypeVar("V")
B = TypeVar("B", DelegateOwnerBlob, DelegateKeyBlob)

# Plain integers: these commands are short enough for the look-up of an enumerator to show.
_OIAP: Final = authorization.OIAP
_OSAP: Final = authorization.OSAP
_DSAP: Final = authorization.DSAP
_XOR: Final = int(AdipScheme.XOR)
_ADIP_SCHEMES: Final = frozenset(int(scheme) for scheme in AdipScheme)
_SRK: Final = int(KeyHandleValue.SRK)
_OWNER: Final = int(KeyHandleValue.OWNER)
_OPERATOR: Final = int(KeyHandleValue.OPERATOR)
_KEYS: Final = frozenset({int(EntityType.KEYHANDLE), int(EntityType.SRK)})


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
        protocol=_OIAP,
        nonce_even=nonce_even,
        entity_type=0,
        entity_value=0,
        entity_digest=ZERO_DIGEST,
        adip=_XOR,
        shared_secret=b"",
        delegation=b"",
    )
    _check_room(tpm)
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

    An owner is not needed for entities that do not hang on one (NV areas, counters). While the
    owner pointer points to a delegation, a session for the owner is one for that delegation.

    Raises:
        TpmError: RESOURCES; INAPPROPRIATE_ENC for an unknown ADIP scheme; BAD_PARAMETER for an
            entity type that has no OSAP; INVALID_KEYHANDLE, BADINDEX, BAD_COUNTER; BAD_HANDLE
            for the operator's handle as a key; NOSRK;
            BADINDEX, DISABLED_CMD, FAMILYCOUNT for a delegation that is no longer good.
    """
    _check_room(tpm)
    adip = _adip_of(tpm, cmd.entity_type)
    bound = _entity(tpm, cmd.entity_type & 0xFF, cmd.entity_value)
    protocol = _DSAP if bound.delegation else _OSAP
    handle, nonce_even, nonce_even_osap = _begin(tpm, protocol, adip, bound, cmd.nonce_odd_osap)
    return OsapOut(auth_handle=handle, nonce_even=nonce_even, nonce_even_osap=nonce_even_osap)


class _Bound(NamedTuple):
    """What a session is opened for.

    Attributes:
        value: How the entity was named; ends the session with the entity.
        secret: HMAC state of the authValue that the shared secret comes from.
        delegation: DELEGATE_PUBLIC, if that authValue is a delegate's.
    """

    entity: Entity
    value: int
    secret: HmacKey
    delegation: bytes = b""


def _adip_of(tpm: Tpm, entity_type: int) -> int:
    adip = entity_type >> 8
    if adip not in _ADIP_SCHEMES or (adip == _XOR and tpm.permanent.flags.fips):
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
    return adip


def _begin(
    tpm: Tpm, protocol: int, adip: int, bound: _Bound, nonce_odd: bytes
) -> tuple[int, bytes, bytes]:
    """Open an OSAP or DSAP session: its handle, nonceEven, nonceEvenOSAP."""
    drawn = tpm.random(2 * DIGEST_BYTES)
    nonce_even, nonce_even_osap = drawn[:DIGEST_BYTES], drawn[DIGEST_BYTES:]
    session = Session(
        protocol=protocol,
        nonce_even=nonce_even,
        entity_type=bound.entity.entity_type,
        entity_value=bound.value,
        entity_digest=bound.entity.digest,
        adip=adip,
        shared_secret=bound.secret.mac(nonce_even_osap + nonce_odd),
        delegation=bound.delegation,
    )
    return _open(tpm, session), nonce_even, nonce_even_osap


def _check_room(tpm: Tpm) -> None:
    if len(tpm.stany.sessions) >= tpm.world.profile.auth_sessions:
        raise TpmError(ReturnCode.RESOURCES)


def _open(tpm: Tpm, session: Session) -> int:
    """Give a session a handle; `_check_room` has found one for it."""
    sessions = tpm.stany.sessions
    handle = tpm.new_handle(sessions, tpm.stany.transport_sessions)
    tpm.change_stany().sessions = {**sessions, handle: session}
    return handle


def _entity(tpm: Tpm, entity_type: int, value: int) -> _Bound:
    """The entity that an OSAP names."""
    if entity_type in _KEYS:
        return _key(tpm, _SRK if entity_type == EntityType.SRK else value)
    if entity_type == EntityType.OWNER:
        owner_auth = tpm.permanent.owner_auth
        if owner_auth is None:
            raise TpmError(ReturnCode.NOSRK)
        row_index = tpm.stclear.owner_reference
        if row_index != _OWNER:
            return _delegated_row(tpm, row_index)
        return _Bound(authorization.owner_entity(owner_auth), _OWNER, hmac_key(owner_auth))
    if entity_type == EntityType.NV:
        area = tpm.permanent.nv.get(value)
        if area is None:
            raise TpmError(ReturnCode.BADINDEX)
        return _Bound(authorization.nv_entity(area), value, hmac_key(area.auth_value))
    if entity_type == EntityType.COUNTER:
        counter = tpm.permanent.counters.get(value)
        if counter is None:
            raise TpmError(ReturnCode.BAD_COUNTER)
        entity = authorization.counter_entity(value, counter)
        return _Bound(entity, value, hmac_key(counter.auth_data))
    raise TpmError(ReturnCode.BAD_PARAMETER)


def _key(tpm: Tpm, handle: int) -> _Bound:
    if handle == _OPERATOR:
        raise TpmError(ReturnCode.BAD_HANDLE, "the operator has no OSAP")
    if handle == _SRK and not tpm.has_owner:
        raise TpmError(ReturnCode.NOSRK)
    key = tpm.key(handle)
    return _Bound(authorization.key_entity(key), handle, key.usage_hmac)


# -- delegation ----------------------------------------------------------------------------------


@wire
class DsapIn:
    """§18.3 incoming operands; `entity_value` is a row index or a blob, as `entity_type` says."""

    entity_type: U16
    key_handle: U32
    nonce_odd_dsap: Nonce
    entity_value: Sized


@wire
class DsapOut:
    """§18.3 outgoing operands."""

    auth_handle: U32
    nonce_even: Nonce
    nonce_even_dsap: Nonce


@command(
    Ordinal.DSAP,
    name="DSAP",
    section="Part 3 §18.3",
    takes=DsapIn,
    gives=DsapOut,
    # All that can be delegated hangs on an owner: the owner's commands, and keys under the SRK.
    gates=Gate.OWNED,
)
def dsap(tpm: Tpm, cmd: DsapIn, _auth: Authorized) -> DsapOut:
    """Open a session that uses a delegation. What it permits is checked at each use.

    Raises:
        TpmError: INAPPROPRIATE_ENC for an unknown ADIP scheme; BAD_PARAMETER for another entity
            type; WRONG_ENTITYTYPE when the blob is no such blob; BADINDEX, DISABLED_CMD,
            FAMILYCOUNT for a delegation that is no longer good; AUTHFAIL for one of another TPM;
            INVALID_KEYHANDLE, KEYNOTFOUND for another key; BAD_DELEGATE; RESOURCES.
    """
    entity_type = cmd.entity_type & 0xFF
    if entity_type == EntityType.DEL_OWNER_BLOB:
        bound = _delegated_owner(tpm, cmd.entity_value)
    elif entity_type == EntityType.DEL_ROW:
        if len(cmd.entity_value) != _ROW_INDEX_BYTES:
            raise TpmError(ReturnCode.BAD_PARAM_SIZE)
        bound = _delegated_row(tpm, int.from_bytes(cmd.entity_value, "big"))
    elif entity_type == EntityType.DEL_KEY_BLOB:
        bound = _delegated_key(tpm, cmd.entity_value, cmd.key_handle)
    else:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    _check_room(tpm)
    adip = _adip_of(tpm, cmd.entity_type)
    handle, nonce_even, nonce_even_dsap = _begin(tpm, _DSAP, adip, bound, cmd.nonce_odd_dsap)
    return DsapOut(auth_handle=handle, nonce_even=nonce_even, nonce_even_dsap=nonce_even_dsap)


_ROW_INDEX_BYTES: Final = 4


def _delegated_row(tpm: Tpm, index: int) -> _Bound:
    row = delegation.row_at(tpm, index)
    delegation.check_alive(tpm, row.public)
    return _as_owner(tpm, row.public, row.auth_value)


def _delegated_owner(tpm: Tpm, data: bytes) -> _Bound:
    blob = _blob(DelegateOwnerBlob, data)
    delegation.check_alive(tpm, blob.pub)
    delegation.check_integrity(tpm, blob)
    return _as_owner(tpm, blob.pub, delegation.secret_in(tpm, blob, ReturnCode.BAD_DELEGATE))


def _delegated_key(tpm: Tpm, data: bytes, key_handle: int) -> _Bound:
    blob = _blob(DelegateKeyBlob, data)
    delegation.check_alive(tpm, blob.pub)
    delegation.check_integrity(tpm, blob)
    key = tpm.key(key_handle)
    if blob.pub_key_digest != delegation.pub_key_digest(key):
        raise TpmError(ReturnCode.KEYNOTFOUND, "the delegation is of another key")
    secret = delegation.secret_in(tpm, blob, ReturnCode.BAD_DELEGATE)
    return _Bound(authorization.key_entity(key), key_handle, hmac_key(secret), encode(blob.pub))


def _as_owner(tpm: Tpm, public: DelegatePublic, secret: bytes) -> _Bound:
    owner_auth = tpm.permanent.owner_auth
    assert owner_auth is not None
    return _Bound(authorization.owner_entity(owner_auth), _OWNER, hmac_key(secret), encode(public))


def _blob(structure: type[B], data: bytes) -> B:
    try:
        return decode(structure, data)
    except DecodeError as error:
        raise TpmError(ReturnCode.WRONG_ENTITYTYPE, "another kind of delegation") from error


@wire
class SetOwnerPointerIn:
    """§18.4 incoming operands."""

    entity_type: U16
    entity_value: U32


@command(
    Ordinal.SET_OWNER_POINTER,
    name="SetOwnerPointer",
    section="Part 3 §18.4",
    takes=SetOwnerPointerIn,
    gates=Gate.USABLE | Gate.OWNED,
)
def set_owner_pointer(tpm: Tpm, cmd: SetOwnerPointerIn, _auth: Authorized) -> None:
    """Let a row of the delegate table stand for the owner, or the owner again for itself.

    For clients of 1.1 age: their OIAP and OSAP sessions then use the delegation. Sessions that are
    open stay what they are. Needs no authorization, so it is open to mischief; who cannot prove
    to be the owner any more sets the pointer back.

    Raises:
        TpmError: BADINDEX, DISABLED_CMD, FAMILYCOUNT for a row that is no good delegation;
            BAD_PARAMETER for another entity type.
    """
    if cmd.entity_type == EntityType.DEL_ROW:
        delegation.check_alive(tpm, delegation.row_at(tpm, cmd.entity_value).public)
        reference = cmd.entity_value
    elif cmd.entity_type == EntityType.OWNER:
        reference = _OWNER
    else:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    if tpm.stclear.owner_reference != reference:
        tpm.change_stclear().owner_reference = reference


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
    flush = _FLUSHES.get(cmd.resource_type)
    if flush is None:
        raise TpmError(ReturnCode.INVALID_RESOURCE)
    flush(tpm, cmd.handle)


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
    """Drop every authorization session, and what commands of 1.1 age saved (itself one of them).

    What TPM_SaveContext saved stays, as the specification demands; libtpms drops it.
    """
    tpm.change_stany().sessions = {}
    contexts.end_legacy(tpm)


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
    remove_from_slots(tpm, handle)
    return True


def _flush_loaded_key(tpm: Tpm, handle: int) -> None:
    if not flush_key(tpm, handle):
        raise TpmError(ReturnCode.BAD_PARAMETER)


def _flush_transport_session(tpm: Tpm, handle: int) -> None:
    if handle not in tpm.stany.transport_sessions:
        raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
    stany = tpm.change_stany()
    stany.transport_sessions = _without(stany.transport_sessions, handle)
    if stany.transport_exclusive == handle:
        stany.transport_exclusive = 0


def _flush_daa_session(tpm: Tpm, handle: int) -> None:
    if handle not in tpm.stany.daa_sessions:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    stany = tpm.change_stany()
    stany.daa_sessions = _without(stany.daa_sessions, handle)


_FLUSHES: Final[dict[int, Callable[[Tpm, int], None]]] = {
    ResourceType.KEY: _flush_loaded_key,
    # The specification asks for BAD_PARAMETER where there is no such session; clients know the
    # code that TPMs give.
    ResourceType.AUTH: flush_session,
    ResourceType.TRANS: _flush_transport_session,
    ResourceType.CONTEXT: contexts.end_saved_session,
    ResourceType.DAA_TPM: _flush_daa_session,
}


def _without(table: dict[int, V], key: int) -> dict[int, V]:
    return {k: v for k, v in table.items() if k != key}
