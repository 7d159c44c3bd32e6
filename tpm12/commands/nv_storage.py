"""NV storage, and the DIR of 1.1: TPM Main r116 Part 3, chapter 20 and §27.3.

Leaves to others: what an area allows (`tpm12.nv`). Here is who may ask, in the order in which the
specification's actions ask it.

Until nvLocked is set an area's protections do not bite, so that a TPM's maker can fill it; the
limit on writes without an owner and the areas' own secrets do.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import DIGEST_BYTES, NvAttribute, NvIndex, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import NvDataPublic
from protocol.wire import U32, Digest, EncAuth, SecretSized, wire
from tpm12 import nv
from tpm12.authorization import OIAP, WITH_SHARED_SECRET, Authorized, nv_entity
from tpm12.crypto import hmac_key
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.flags import set_flags
from tpm12.state import NvArea
from tpm12.tpm import Tpm

_LOCK, _INDEX0, _DIR = int(NvIndex.LOCK), int(NvIndex.INDEX0), int(NvIndex.DIR)
_OWNERWRITE, _AUTHWRITE = int(NvAttribute.OWNERWRITE), int(NvAttribute.AUTHWRITE)
_OWNERREAD, _AUTHREAD = int(NvAttribute.OWNERREAD), int(NvAttribute.AUTHREAD)

_OWNER: Final = "owner of the area"
"""The owner's session, which these commands check themselves: other checks come before it."""
_AREA: Final = "area"
"""The session for an area's own secret."""
_AREA_GATES: Final = Gate.USABLE | Gate.OWNED


# -- defining ------------------------------------------------------------------------------------


@wire
class NvDefineSpaceIn:
    """§20.1 incoming operands."""

    pub_info: NvDataPublic
    enc_auth: EncAuth


@command(
    Ordinal.NV_DEFINE_SPACE,
    name="NV_DefineSpace",
    section="Part 3 §20.1",
    takes=NvDefineSpaceIn,
    gates=Gate.NONE,
    sessions=(AuthBy(_OWNER, WITH_SHARED_SECRET, may_drop=1),),
)
def nv_define_space(tpm: Tpm, cmd: NvDefineSpaceIn, auth: Authorized) -> None:
    """Define, redefine (in one step) or delete (size 0) an area, or set nvLocked.

    A redefinition that is refused leaves the old area as it was (libtpms has deleted it by then).

    Raises:
        TpmError: DISABLED, DEACTIVATED (with nvLocked); BADINDEX; AUTHFAIL, NOSRK; BAD_PRESENCE,
            OWNER_SET, BAD_DATASIZE, MAXNVWRITES without a session; AREA_LOCKED; AUTH_CONFLICT,
            PER_NOWRITE, BAD_PARAM_SIZE, NOSPACE.
    """
    public = cmd.pub_info
    is_locked = tpm.permanent.flags.nv_locked
    if is_locked:
        tpm.require_enabled_and_active()
    if public.nv_index == _LOCK and not auth.blocks:
        _lock_nv(tpm, public)
        return
    if public.nv_index == _INDEX0 or (is_locked and public.nv_index & nv.D_BIT):
        raise TpmError(ReturnCode.BADINDEX)
    auth_value = _new_secret(tpm, cmd, auth)
    old = tpm.permanent.nv.get(public.nv_index)
    if old is not None:
        if is_locked:
            nv.check_redefinable(tpm, old)
        if not public.data_size:
            nv.remove(tpm, public.nv_index)
            _count(tpm, auth)
            return
    nv.check_definable(tpm, public)
    if public.nv_index != NvIndex.TRIAL:
        nv.define(tpm, public, auth_value)
        _count(tpm, auth)


def _lock_nv(tpm: Tpm, public: NvDataPublic) -> None:
    if public.data_size:
        raise TpmError(ReturnCode.BADINDEX)
    set_flags(tpm, nv_locked=True)


def _new_secret(tpm: Tpm, cmd: NvDefineSpaceIn, auth: Authorized) -> bytes:
    """Check who defines an area; give the area's new secret."""
    if auth.blocks:
        auth.verify_owner(_OWNER)
        return auth.decrypt_secret(_OWNER, cmd.enc_auth)
    if tpm.permanent.flags.nv_locked:
        tpm.require_presence()
        if tpm.has_owner:
            raise TpmError(ReturnCode.OWNER_SET)
        if not cmd.pub_info.data_size:
            raise TpmError(ReturnCode.BAD_DATASIZE)
    nv.check_no_owner_writes(tpm)
    return cmd.enc_auth  # without a session it comes in clear


def _count(tpm: Tpm, auth: Authorized) -> None:
    if not auth.blocks:
        nv.count_no_owner_write(tpm)


# -- writing -------------------------------------------------------------------------------------


@wire
class NvWriteValueIn:
    """§20.2 and §20.3 incoming operands."""

    nv_index: U32
    offset: U32
    data: SecretSized


@command(
    Ordinal.NV_WRITE_VALUE,
    name="NV_WriteValue",
    section="Part 3 §20.2",
    takes=NvWriteValueIn,
    gates=Gate.NONE,
    sessions=(AuthBy(_OWNER, may_drop=1),),
)
def nv_write_value(tpm: Tpm, cmd: NvWriteValueIn, auth: Authorized) -> None:
    """Write an area as the owner or as anyone; index 0 locks all areas with GLOBALLOCK.

    Raises:
        TpmError: BADINDEX; DISABLED, DEACTIVATED (the owner's areas only); AUTH_CONFLICT for the
            wrong kind of authorization; AUTHFAIL; MAXNVWRITES; BAD_PRESENCE, AREA_LOCKED,
            BAD_LOCALITY, WRONGPCRVAL; NOSPACE, NOT_FULLWRITE.
    """
    if cmd.nv_index == _INDEX0:
        # Not one of the writes that are counted: a lock that lasts until a start wears nothing out.
        if auth.blocks:
            auth.verify_owner(_OWNER)
        _lock_globally(tpm, cmd)
        return
    if cmd.nv_index == _DIR:
        _check_writer(tpm, auth, is_owners=True, takes_owner=True)
        _write_dir(tpm, cmd, auth)
        return
    area = nv.area_at(tpm, cmd.nv_index)
    attributes = area.public.permission.attributes
    is_owners = bool(attributes & _OWNERWRITE)
    _check_writer(tpm, auth, is_owners=is_owners, takes_owner=is_owners)
    if attributes & _AUTHWRITE:
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    if tpm.permanent.flags.nv_locked:
        nv.check_write(tpm, area)
    if nv.write(tpm, area, cmd.offset, cmd.data):
        _count(tpm, auth)


def _check_writer(tpm: Tpm, auth: Authorized, *, is_owners: bool, takes_owner: bool) -> None:
    """Check opt-in state and authorization for an area that is the owner's to write, or is not."""
    is_guarded = is_owners and tpm.permanent.flags.nv_locked
    if is_guarded:
        tpm.require_enabled_and_active()
    if auth.blocks:
        if not takes_owner:
            raise TpmError(ReturnCode.AUTH_CONFLICT)
        # Without nvLocked the check may be left out; a session that proved nothing could sign no
        # response, so it is made always.
        auth.verify_owner(_OWNER)
    elif is_guarded:
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    else:
        nv.check_no_owner_writes(tpm)


def _lock_globally(tpm: Tpm, cmd: NvWriteValueIn) -> None:
    if cmd.data:
        raise TpmError(ReturnCode.BADINDEX)
    if not tpm.stclear.b_global_lock:
        tpm.change_stclear().b_global_lock = True


def _write_dir(tpm: Tpm, cmd: NvWriteValueIn, auth: Authorized) -> None:
    """Write the DIR, which is written whole; writing nothing is no error and does nothing."""
    if not cmd.data:
        return
    if cmd.offset or len(cmd.data) != DIGEST_BYTES:
        raise TpmError(ReturnCode.NOT_FULLWRITE)
    if _set_dir(tpm, cmd.data):
        _count(tpm, auth)


def _set_dir(tpm: Tpm, contents: bytes) -> bool:
    if contents == tpm.permanent.auth_dir:
        return False
    tpm.change_permanent().auth_dir = contents
    return True


@command(
    Ordinal.NV_WRITE_VALUE_AUTH,
    name="NV_WriteValueAuth",
    section="Part 3 §20.3",
    takes=NvWriteValueIn,
    gates=_AREA_GATES,
    sessions=(AuthBy(_AREA),),
)
def nv_write_value_auth(tpm: Tpm, cmd: NvWriteValueIn, auth: Authorized) -> None:
    """Write an area with its own secret; its protections bite without nvLocked too.

    Raises:
        TpmError: BADINDEX; AUTH_CONFLICT without AUTHWRITE; AUTHFAIL; then as `nv_write_value`.
    """
    area = nv.area_at(tpm, cmd.nv_index)
    if not area.public.permission.attributes & _AUTHWRITE:
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    _verify_area(auth, area)
    nv.check_write(tpm, area)
    nv.write(tpm, area, cmd.offset, cmd.data)


def _verify_area(auth: Authorized, area: NvArea) -> None:
    session, _ = auth.session(_AREA)
    entity = None if session.protocol == OIAP else nv_entity(area)
    auth.verify(_AREA, hmac_key(area.auth_value), entity)


# -- reading -------------------------------------------------------------------------------------


@wire
class NvReadValueIn:
    """§20.4 and §20.5 incoming operands."""

    nv_index: U32
    offset: U32
    data_size: U32


@wire
class NvReadValueOut:
    """§20.4 and §20.5 outgoing operands."""

    data: SecretSized


@command(
    Ordinal.NV_READ_VALUE,
    name="NV_ReadValue",
    section="Part 3 §20.4",
    takes=NvReadValueIn,
    gives=NvReadValueOut,
    gates=Gate.NONE,
    sessions=(AuthBy(_OWNER, may_drop=1),),
)
def nv_read_value(tpm: Tpm, cmd: NvReadValueIn, auth: Authorized) -> NvReadValueOut:
    """Read an area as the owner or as anyone.

    Raises:
        TpmError: BADINDEX; DISABLED, DEACTIVATED (the owner's areas only); AUTH_CONFLICT for the
            wrong kind of authorization; AUTHFAIL; BAD_PRESENCE, DISABLED_CMD, BAD_LOCALITY,
            WRONGPCRVAL; NOSPACE.
    """
    if cmd.nv_index == _DIR:
        if auth.blocks:
            auth.verify_owner(_OWNER)
        return NvReadValueOut(data=nv.slice_of(tpm.permanent.auth_dir, cmd.offset, cmd.data_size))
    area = nv.area_at(tpm, cmd.nv_index)
    attributes = area.public.permission.attributes
    is_locked = tpm.permanent.flags.nv_locked
    is_owners = bool(attributes & _OWNERREAD)
    if is_locked and is_owners:
        tpm.require_enabled_and_active()
    if auth.blocks:
        if not is_owners:
            raise TpmError(ReturnCode.AUTH_CONFLICT)
        auth.verify_owner(_OWNER)
    elif attributes & _AUTHREAD or (is_owners and is_locked):
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    if is_locked:
        nv.check_read(tpm, area)
    return NvReadValueOut(data=nv.read(tpm, area, cmd.offset, cmd.data_size))


@command(
    Ordinal.NV_READ_VALUE_AUTH,
    name="NV_ReadValueAuth",
    section="Part 3 §20.5",
    takes=NvReadValueIn,
    gives=NvReadValueOut,
    gates=_AREA_GATES,
    sessions=(AuthBy(_AREA),),
)
def nv_read_value_auth(tpm: Tpm, cmd: NvReadValueIn, auth: Authorized) -> NvReadValueOut:
    """Read an area with its own secret; its protections bite without nvLocked too.

    Raises:
        TpmError: BADINDEX; AUTH_CONFLICT without AUTHREAD; AUTHFAIL; then as `nv_read_value`.
    """
    area = nv.area_at(tpm, cmd.nv_index)
    if not area.public.permission.attributes & _AUTHREAD:
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    _verify_area(auth, area)
    nv.check_read(tpm, area)
    return NvReadValueOut(data=nv.read(tpm, area, cmd.offset, cmd.data_size))


# -- the DIR of 1.1 ------------------------------------------------------------------------------


@wire
class DirWriteAuthIn:
    """§27.3.1 incoming operands."""

    dir_index: U32
    new_contents: Digest


@command(
    Ordinal.DIR_WRITE_AUTH,
    name="DirWriteAuth",
    section="Part 3 §27.3.1",
    takes=DirWriteAuthIn,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def dir_write_auth(tpm: Tpm, cmd: DirWriteAuthIn, _auth: Authorized) -> None:
    """Write the one DIR, which is NV index 0x10000001.

    Raises:
        TpmError: BADINDEX for another.
    """
    if cmd.dir_index:
        raise TpmError(ReturnCode.BADINDEX)
    _set_dir(tpm, cmd.new_contents)


@wire
class DirReadIn:
    """§27.3.2 incoming operands."""

    dir_index: U32


@wire
class DirReadOut:
    """§27.3.2 outgoing operands."""

    dir_contents: Digest


@command(
    Ordinal.DIR_READ,
    name="DirRead",
    section="Part 3 §27.3.2",
    takes=DirReadIn,
    gives=DirReadOut,
)
def dir_read(tpm: Tpm, cmd: DirReadIn, _auth: Authorized) -> DirReadOut:
    """Read the one DIR.

    Raises:
        TpmError: BADINDEX for another.
    """
    if cmd.dir_index:
        raise TpmError(ReturnCode.BADINDEX)
    return DirReadOut(dir_contents=tpm.permanent.auth_dir)
