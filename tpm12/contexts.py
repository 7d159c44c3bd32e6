"""Contexts: keys and sessions that leave the TPM encrypted, to make room, and come back.

A key stays loaded when it is saved, and its context may be loaded any number of times. A session
moves: what was saved is gone, and its context is good for one return, which contextList sees to.
What the commands of 1.1 age save, only they load ("legacy" below); TPM_Reset ends all of it.

Leaves to others: gates and operands (`commands/context.py`).

Source: TPM Main r116 Part 2 §18, Part 3 §21.2, §21.3, §27.2, §27.5. What is inside a context is
the TPM's own; the HMAC is over the clear text, as Part 3 has it, and over the IV, so that no two
are the same (libtpms encrypts without an IV).

Invariants:
- Nothing inside a context is believed before its HMAC under tpmProof was checked.
- A session comes back at most once, in the start-up it was saved in, and only to the very entity,
  with the very secret, that it was bound to.
- What ends delegated sessions ends saved ones too.
- A resource that comes back puts no other out.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from protocol.constants import (
    ZERO_DIGEST,
    EntityType,
    KeyFlags,
    KeyHandleValue,
    ResourceType,
    StructureTag,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import ContextBlob, ContextSensitive
from protocol.wire import U64, DecodeError, Digest, decode, encode, wire
from tpm12.authorization import OIAP, counter_entity, nv_entity, owner_entity
from tpm12.clearing import renew_owner_secrets
from tpm12.crypto import aes128_ctr, hmac_key, is_same, sha1
from tpm12.keys import LoadedKey
from tpm12.profile import Profile
from tpm12.state import DaaSession, Session, TransportSession
from tpm12.tpm import Tpm
from tpm12.wrapping import add_to_slots, check_room

_IV_BYTES: Final = 16
_HEAD: Final = struct.Struct(">HII16sI20sI")
"""A TPM_CONTEXT_BLOB as far as the size of its additionalData; a test holds it equal."""
_TAG: Final = int(StructureTag.CONTEXT_BLOB)
_CURRENT: Final = b""
_LEGACY: Final = b"\x01"
"""What stands behind the IV in a context of 1.1 age."""
_NO_LABEL: Final = bytes(16)
_COUNT_MAX: Final = 0xFFFFFFFF
_IS_VOLATILE: Final = int(KeyFlags.IS_VOLATILE)
_NO_KEY: Final = bytes(16)
"""The contextKey of a TPM from the factory, which everybody knows: nothing is done with it."""


@wire
class SavedSession:
    """An authorization session outside the TPM.

    Attributes:
        session: As it was.
        binding: What it was bound to, with its secret; zero for OIAP.
        delegation_changes: `StAny.delegation_changes` at the time.
    """

    session: Session
    binding: Digest
    delegation_changes: U64


@dataclass(frozen=True, slots=True)
class _Table:
    """A table of sessions.

    Attributes:
        name: Field of `StAny`.
        saved: What one is outside the TPM.
        limit: How many there may be.
    """

    name: str
    saved: type
    limit: Callable[[Profile], int]


_TABLES: Final[dict[int, _Table]] = {
    ResourceType.AUTH: _Table("sessions", SavedSession, lambda p: p.auth_sessions),
    ResourceType.TRANS: _Table(
        "transport_sessions", TransportSession, lambda p: p.transport_sessions
    ),
    ResourceType.DAA_TPM: _Table("daa_sessions", DaaSession, lambda p: p.daa_sessions),
}


class _Place(NamedTuple):
    """What was where; a key's count is 0, a legacy context has no label."""

    resource_type: int
    handle: int
    context_count: int
    label: bytes | None


# -- saving --------------------------------------------------------------------------------------


def save_key(tpm: Tpm, handle: int, label: bytes | None) -> ContextBlob:
    """Save a loaded key, which stays loaded.

    Args:
        tpm: The command's draft.
        handle: Of the key.
        label: The caller's own, 16 bytes; None: for a legacy context.

    Raises:
        TpmError: INVALID_RESOURCE, for the SRK too; OWNER_CONTROL for an owner-evict key.
    """
    if handle in tpm.permanent.owner_evict_keys:
        raise TpmError(ReturnCode.OWNER_CONTROL)
    key = tpm.volatile.keys.get(handle)
    if key is None:
        raise TpmError(ReturnCode.INVALID_RESOURCE, f"no key at 0x{handle:08x}")
    nonce = tpm.stclear.context_nonce_key if label is not None else _legacy_nonce(tpm)
    sensitive = ContextSensitive(context_nonce=nonce, internal_data=key.to_bytes())
    return _closed(tpm, _Place(int(ResourceType.KEY), handle, 0, label), sensitive)


def _legacy_nonce(tpm: Tpm) -> bytes:
    """The contextNonce of keys in legacy contexts: of this start-up and since TPM_Reset."""
    return sha1(tpm.stclear.context_nonce_key, tpm.stany.resets.to_bytes(8, "big"))


def save_session(tpm: Tpm, resource_type: int, handle: int, label: bytes | None) -> ContextBlob:
    """Save a session of one of the three kinds, which is then gone; `label` as in `save_key`.

    Raises:
        TpmError: INVALID_RESOURCE; TOOMANYCONTEXTS, CONTEXT_GAP, NOCONTEXTSPACE.
    """
    table = _TABLES.get(resource_type)
    if table is None:
        raise TpmError(ReturnCode.INVALID_RESOURCE, "no kind of session")
    sessions = getattr(tpm.stany, table.name)
    session = sessions.get(handle)
    if session is None:
        raise TpmError(ReturnCode.INVALID_RESOURCE, f"no session 0x{handle:08x}")
    if isinstance(session, Session):
        session = SavedSession(
            session=session,
            binding=_binding(tpm, session, session.entity_value),
            delegation_changes=tpm.stany.delegation_changes,
        )
    count = _next_count(tpm)
    stany = tpm.change_stany()
    setattr(stany, table.name, {h: s for h, s in sessions.items() if h != handle})
    if stany.transport_exclusive == handle:
        stany.transport_exclusive = 0
    stany.context_count = count
    saved = stany.context_list.values()
    stany.context_list = {**stany.context_list, count: count}
    if label is None:
        alive = [n for n in stany.legacy_contexts if n in saved]
        stany.legacy_contexts = dict.fromkeys([*alive, count], True)
    sensitive = ContextSensitive(
        context_nonce=stany.context_nonce_session, internal_data=encode(session)
    )
    return _closed(tpm, _Place(resource_type, handle, count, label), sensitive)


def _next_count(tpm: Tpm) -> int:
    stany, profile = tpm.stany, tpm.world.profile
    if stany.context_count >= _COUNT_MAX:
        raise TpmError(ReturnCode.TOOMANYCONTEXTS)
    count = stany.context_count + 1
    saved = stany.context_list.values()
    if saved and count - min(saved) > profile.context_distance:
        raise TpmError(ReturnCode.CONTEXT_GAP, "the oldest saved session must come back first")
    if len(saved) >= profile.saved_contexts:
        raise TpmError(ReturnCode.NOCONTEXTSPACE)
    return count


# -- loading -------------------------------------------------------------------------------------


def load_key(
    tpm: Tpm, blob: ContextBlob, *, keep_handle: bool = False, is_legacy: bool = False
) -> int:
    """Load a saved key and give its handle: the old one, if it can be had.

    Args:
        tpm: The command's draft.
        blob: Its context.
        keep_handle: It must be the old handle.
        is_legacy: It must be a legacy context, and of this start-up whatever key it is.

    Raises:
        TpmError: BADCONTEXT; NOSPACE; BAD_HANDLE.
    """
    sensitive = _opened(tpm, blob, is_legacy=is_legacy)
    try:
        key = LoadedKey.from_bytes(sensitive.internal_data)
    except DecodeError as error:
        raise TpmError(ReturnCode.BADCONTEXT) from error
    if is_legacy:
        _require_nonce(sensitive, _legacy_nonce(tpm))
    elif key.parent_pcr_status or key.flags & _IS_VOLATILE:
        _require_nonce(sensitive, tpm.stclear.context_nonce_key)
    check_room(tpm)
    handle = _handle(
        tpm, blob.handle, keep_handle, (tpm.volatile.keys, tpm.permanent.owner_evict_keys)
    )
    return add_to_slots(tpm, key, handle)


def load_session(
    tpm: Tpm, blob: ContextBlob, *, keep_handle: bool = False, entity_handle: int | None = None
) -> int:
    """Load a saved session and give its handle: the old one, if it can be had.

    Args:
        tpm: The command's draft.
        blob: Its context.
        keep_handle: It must be the old handle.
        entity_handle: The key that an OSAP or DSAP session is for; None: it must be a legacy
            context, whose key is found.

    Raises:
        TpmError: BADCONTEXT, for a kind of thing that is never saved too; BAD_HANDLE when
            `entity_handle` is no key, RESOURCEMISSING when what it was bound to is another or is
            gone; RESOURCES; BAD_HANDLE.
    """
    table = _TABLES.get(blob.resource_type)
    if table is None:
        raise TpmError(ReturnCode.BADCONTEXT, "no TPM saves such a thing")
    sensitive = _opened(tpm, blob, is_legacy=entity_handle is None)
    _require_nonce(sensitive, tpm.stany.context_nonce_session)
    try:
        session: Any = decode(table.saved, sensitive.internal_data)
    except DecodeError as error:
        raise TpmError(ReturnCode.BADCONTEXT) from error
    if isinstance(session, SavedSession):
        session = _bound_again(tpm, session, entity_handle)
    _take_off_list(tpm, blob.context_count)
    sessions = getattr(tpm.stany, table.name)
    if len(sessions) >= table.limit(tpm.world.profile):
        raise TpmError(ReturnCode.RESOURCES)
    all_sessions = [getattr(tpm.stany, each.name) for each in _TABLES.values()]
    handle = _handle(tpm, blob.handle, keep_handle, all_sessions)
    setattr(tpm.change_stany(), table.name, {**sessions, handle: session})
    return handle


def _require_nonce(sensitive: ContextSensitive, nonce: bytes) -> None:
    if not is_same(sensitive.context_nonce, nonce):
        raise TpmError(ReturnCode.BADCONTEXT, "of another start-up")


def _take_off_list(tpm: Tpm, count: int) -> None:
    saved = tpm.stany.context_list
    if count not in saved.values():
        raise TpmError(ReturnCode.BADCONTEXT, "it came back before, or was ended")
    stany = tpm.change_stany()
    stany.context_list = {i: n for i, n in saved.items() if n != count}
    stany.legacy_contexts = {n: True for n in stany.legacy_contexts if n != count}


def end_saved_session(tpm: Tpm, count: int) -> None:
    """Forget a saved session.

    Raises:
        TpmError: BAD_PARAMETER when there is none with this count.
    """
    if count not in tpm.stany.context_list.values():
        raise TpmError(ReturnCode.BAD_PARAMETER)
    _take_off_list(tpm, count)


def end_saved_bound_sessions(tpm: Tpm) -> None:
    """End every saved OSAP and DSAP session, which is found out when one is loaded."""
    tpm.change_stany().delegation_changes += 1


def end_legacy(tpm: Tpm) -> None:
    """End every legacy context and no other (TPM_Reset, Part 3 §27.5)."""
    stany = tpm.change_stany()
    stany.resets += 1
    ended = stany.legacy_contexts
    stany.context_list = {i: n for i, n in stany.context_list.items() if n not in ended}
    stany.legacy_contexts = {}


def _handle(
    tpm: Tpm,
    old: int,
    keep_handle: bool,
    taken: Sequence[Collection[int]],
) -> int:
    for handles in taken:
        if old in handles:
            break
    else:
        return old
    if keep_handle:
        raise TpmError(ReturnCode.BAD_HANDLE, "the handle is in use")
    return tpm.new_handle(*taken)


# -- what a session is bound to ------------------------------------------------------------------


def _bound_again(tpm: Tpm, saved: SavedSession, entity_handle: int | None) -> Session:
    """Check that what a session was bound to is here and is the same."""
    session = saved.session
    if session.protocol == OIAP:
        return session
    value = session.entity_value
    if session.entity_type == EntityType.KEYHANDLE and value != KeyHandleValue.SRK:
        value = _key_like(tpm, saved.binding) if entity_handle is None else entity_handle
    if not is_same(saved.binding, _binding(tpm, session, value)):
        raise TpmError(ReturnCode.RESOURCEMISSING, "it was bound to something else")
    if saved.delegation_changes != tpm.stany.delegation_changes:
        raise TpmError(ReturnCode.BADCONTEXT, "bound sessions were ended since")
    return replace(session, entity_value=value)


def _key_like(tpm: Tpm, binding: bytes) -> int:
    """The handle of a loaded key with this binding."""
    for keys in (tpm.volatile.keys, tpm.permanent.owner_evict_keys):
        for handle, key in keys.items():
            if is_same(binding, _key_binding(key)):
                return handle
    raise TpmError(ReturnCode.RESOURCEMISSING, "its key is not loaded")


def _binding(tpm: Tpm, session: Session, value: int) -> bytes:
    """A digest of what a session is bound to, its secret included.

    Raises:
        TpmError: BAD_HANDLE for a key, RESOURCEMISSING for another thing that is not there.
    """
    if session.protocol == OIAP:
        return ZERO_DIGEST
    permanent = tpm.permanent
    if session.entity_type == EntityType.KEYHANDLE:
        try:
            return _key_binding(tpm.key(value))
        except TpmError as error:
            raise TpmError(ReturnCode.BAD_HANDLE, "no such key is loaded") from error
    if session.entity_type == EntityType.OWNER and permanent.owner_auth is not None:
        return owner_entity(permanent.owner_auth).digest
    if session.entity_type == EntityType.NV and value in permanent.nv:
        return nv_entity(permanent.nv[value]).digest
    if session.entity_type == EntityType.COUNTER and value in permanent.counters:
        return counter_entity(value, permanent.counters[value]).digest
    raise TpmError(ReturnCode.RESOURCEMISSING)


def _key_binding(key: LoadedKey) -> bytes:
    return sha1(key.pub_data_digest, key.usage_auth)


# -- the blob ------------------------------------------------------------------------------------


def _closed(tpm: Tpm, place: _Place, sensitive: ContextSensitive) -> ContextBlob:
    if tpm.permanent.context_key == _NO_KEY:
        # No owner ever was: only now there is something to protect.
        renew_owner_secrets(tpm)
    iv = tpm.random(_IV_BYTES)
    clear = encode(sensitive)
    additional_data = iv + (_LEGACY if place.label is None else _CURRENT)
    return ContextBlob(
        resource_type=place.resource_type,
        handle=place.handle,
        label=_NO_LABEL if place.label is None else place.label,
        context_count=place.context_count,
        integrity_digest=_integrity(tpm, place, additional_data, clear),
        additional_data=additional_data,
        sensitive_data=aes128_ctr(tpm.permanent.context_key, iv, clear),
    )


def _opened(tpm: Tpm, blob: ContextBlob, *, is_legacy: bool) -> ContextSensitive:
    """Decrypt a context and check that this TPM made it for this owner.

    Raises:
        TpmError: BADCONTEXT.
    """
    iv, form = blob.additional_data[:_IV_BYTES], blob.additional_data[_IV_BYTES:]
    if len(iv) != _IV_BYTES or form != (_LEGACY if is_legacy else _CURRENT):
        raise TpmError(ReturnCode.BADCONTEXT)
    if tpm.permanent.context_key == _NO_KEY:
        raise TpmError(ReturnCode.BADCONTEXT, "no context was ever made")
    clear = aes128_ctr(tpm.permanent.context_key, iv, blob.sensitive_data)
    place = _Place(blob.resource_type, blob.handle, blob.context_count, blob.label)
    if not is_same(blob.integrity_digest, _integrity(tpm, place, blob.additional_data, clear)):
        raise TpmError(ReturnCode.BADCONTEXT, "not a context of this TPM")
    try:
        return decode(ContextSensitive, clear)
    except DecodeError as error:
        raise TpmError(ReturnCode.BADCONTEXT) from error


def _integrity(tpm: Tpm, place: _Place, additional_data: bytes, clear: bytes) -> bytes:
    """Over the blob with zeros in the place of this and the clear text in the encrypted one's."""
    resource_type, handle, count, label = place
    head = _HEAD.pack(
        _TAG,
        resource_type,
        handle,
        label or _NO_LABEL,
        count,
        ZERO_DIGEST,
        len(additional_data),
    )
    size = len(clear).to_bytes(4, "big")
    return hmac_key(tpm.permanent.tpm_proof).mac(head + additional_data + size + clear)
