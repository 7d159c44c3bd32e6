"""Context management: TPM Main r116 Part 3, §21.2, §21.3, and of 1.1 age §27.2.

Leaves to others: what is in a context, and when it may come back (`tpm12.contexts`).
"""

from __future__ import annotations

from typing import Annotated

from protocol.constants import Ordinal, ResourceType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import ContextBlob
from protocol.wire import B16, U32, Bool, Handle, in_sized, wire
from tpm12 import contexts
from tpm12.authorization import Authorized
from tpm12.dispatch import Gate, command
from tpm12.tpm import Tpm
from tpm12.wrapping import remove_from_slots

_KEY, _AUTH = int(ResourceType.KEY), int(ResourceType.AUTH)
SizedContextBlob = Annotated[ContextBlob, in_sized(ContextBlob)]


@wire
class SaveContextIn:
    """§21.2 incoming operands."""

    handle: Handle
    resource_type: U32
    label: B16


@wire
class SaveContextOut:
    """§21.2 outgoing operands."""

    context_blob: SizedContextBlob


@command(
    Ordinal.SAVE_CONTEXT,
    name="SaveContext",
    section="Part 3 §21.2",
    takes=SaveContextIn,
    gives=SaveContextOut,
    gates=Gate.USABLE | Gate.OWNED,
)
def save_context(tpm: Tpm, cmd: SaveContextIn, _auth: Authorized) -> SaveContextOut:
    """Save a key, which stays loaded, or a session, which is then gone.

    Raises:
        TpmError: INVALID_RESOURCE when it is not there or of another type; OWNER_CONTROL for an
            owner-evict key; TOOMANYCONTEXTS, CONTEXT_GAP, NOCONTEXTSPACE for a session.
    """
    if cmd.resource_type == _KEY:
        blob = contexts.save_key(tpm, cmd.handle, cmd.label)
    else:
        blob = contexts.save_session(tpm, cmd.resource_type, cmd.handle, cmd.label)
    return SaveContextOut(context_blob=blob)


@wire
class LoadContextIn:
    """§21.3 incoming operands; `entity_handle` is the key of an OSAP or DSAP session."""

    entity_handle: Handle
    keep_handle: Bool
    context_blob: SizedContextBlob


@wire
class LoadContextOut:
    """§21.3 outgoing operands."""

    handle: Handle


@command(
    Ordinal.LOAD_CONTEXT,
    name="LoadContext",
    section="Part 3 §21.3",
    takes=LoadContextIn,
    gives=LoadContextOut,
    gates=Gate.USABLE | Gate.OWNED,
)
def load_context(tpm: Tpm, cmd: LoadContextIn, _auth: Authorized) -> LoadContextOut:
    """Load what was saved; what is loaded stays, whatever comes of it.

    Raises:
        TpmError: BADCONTEXT for a context of another TPM, owner or start-up, or
            of a session that came back before; BAD_HANDLE, RESOURCEMISSING when a session's entity
            is not here; NOSPACE, RESOURCES; BAD_HANDLE when the handle must be kept and is taken.
    """
    blob = cmd.context_blob
    if blob.resource_type == _KEY:
        handle = contexts.load_key(tpm, blob, keep_handle=cmd.keep_handle)
    else:
        handle = contexts.load_session(
            tpm, blob, keep_handle=cmd.keep_handle, entity_handle=cmd.entity_handle
        )
    return LoadContextOut(handle=handle)


# -- of 1.1 age ----------------------------------------------------------------------------------


@wire
class SaveKeyContextIn:
    """§27.2.1 incoming operands."""

    key_handle: Handle


@wire
class SaveKeyContextOut:
    """§27.2.1 outgoing operands."""

    key_context_blob: SizedContextBlob


@command(
    Ordinal.SAVE_KEY_CONTEXT,
    name="SaveKeyContext",
    section="Part 3 §27.2.1",
    takes=SaveKeyContextIn,
    gives=SaveKeyContextOut,
)
def save_key_context(tpm: Tpm, cmd: SaveKeyContextIn, _auth: Authorized) -> SaveKeyContextOut:
    """Save a key and unload it, which ends the sessions bound to it.

    Raises:
        TpmError: INVALID_KEYHANDLE, for the SRK too; OWNER_CONTROL for an owner-evict key.
    """
    if cmd.key_handle not in {*tpm.volatile.keys, *tpm.permanent.owner_evict_keys}:
        raise TpmError(ReturnCode.INVALID_KEYHANDLE, "no key is in a slot there")
    blob = contexts.save_key(tpm, cmd.key_handle, None)
    remove_from_slots(tpm, cmd.key_handle)
    return SaveKeyContextOut(key_context_blob=blob)


@wire
class LoadKeyContextIn:
    """§27.2.2 incoming operands."""

    key_context_blob: SizedContextBlob


@wire
class LoadKeyContextOut:
    """§27.2.2 outgoing operands; the handle is inside the digest."""

    key_handle: Handle


@command(
    Ordinal.LOAD_KEY_CONTEXT,
    name="LoadKeyContext",
    section="Part 3 §27.2.2",
    takes=LoadKeyContextIn,
    gives=LoadKeyContextOut,
)
def load_key_context(tpm: Tpm, cmd: LoadKeyContextIn, _auth: Authorized) -> LoadKeyContextOut:
    """Load a saved key, in the start-up it was saved in.

    Raises:
        TpmError: BAD_PARAMETER for the context of something else; BADCONTEXT; NOSPACE.
    """
    blob = cmd.key_context_blob
    if blob.resource_type != _KEY:
        raise TpmError(ReturnCode.BAD_PARAMETER, "no context of a key")
    return LoadKeyContextOut(key_handle=contexts.load_key(tpm, blob, is_legacy=True))


@wire
class SaveAuthContextIn:
    """§27.2.3 incoming operands."""

    auth_handle: Handle


@wire
class SaveAuthContextOut:
    """§27.2.3 outgoing operands."""

    auth_context_blob: SizedContextBlob


@command(
    Ordinal.SAVE_AUTH_CONTEXT,
    name="SaveAuthContext",
    section="Part 3 §27.2.3",
    takes=SaveAuthContextIn,
    gives=SaveAuthContextOut,
)
def save_auth_context(tpm: Tpm, cmd: SaveAuthContextIn, _auth: Authorized) -> SaveAuthContextOut:
    """Save an authorization session, which is then gone.

    Raises:
        TpmError: INVALID_AUTHHANDLE; TOOMANYCONTEXTS, CONTEXT_GAP, NOCONTEXTSPACE.
    """
    if cmd.auth_handle not in tpm.stany.sessions:
        raise TpmError(ReturnCode.INVALID_AUTHHANDLE)
    blob = contexts.save_session(tpm, _AUTH, cmd.auth_handle, None)
    return SaveAuthContextOut(auth_context_blob=blob)


@wire
class LoadAuthContextIn:
    """§27.2.4 incoming operands."""

    auth_context_blob: SizedContextBlob


@wire
class LoadAuthContextOut:
    """§27.2.4 outgoing operands; the handle is inside the digest."""

    auth_handle: Handle


@command(
    Ordinal.LOAD_AUTH_CONTEXT,
    name="LoadAuthContext",
    section="Part 3 §27.2.4",
    takes=LoadAuthContextIn,
    gives=LoadAuthContextOut,
)
def load_auth_context(tpm: Tpm, cmd: LoadAuthContextIn, _auth: Authorized) -> LoadAuthContextOut:
    """Load a saved authorization session; a key that it is for must be loaded.

    Raises:
        TpmError: BAD_PARAMETER for the context of something else; BADCONTEXT; RESOURCEMISSING;
            RESOURCES.
    """
    blob = cmd.auth_context_blob
    if blob.resource_type != _AUTH:
        raise TpmError(ReturnCode.BAD_PARAMETER, "no context of an authorization session")
    return LoadAuthContextOut(auth_handle=contexts.load_session(tpm, blob))
