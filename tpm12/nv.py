"""NV areas: what may be defined, how an area is locked, read and written.

Leaves to others: who is authorized (`commands/nv_storage.py`). A size-0 read or write locks an
area; the locks that ST_CLEAR undoes live in the ST_CLEAR section and not in the area.

Source: TPM Main r116 Part 2 §19, Part 3 §20.

Invariants:
- Offsets and sizes are added without wrapping (libtpms adds in 32 bits, and reads past the end).
- A write that changes no byte changes no permanent state.
- Deleting an area ends the sessions bound to it and forgets its locks.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import EntityType, NvAttribute, NvIndex
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import UNRESTRICTED_PCR_INFO, NvDataPublic
from protocol.wire import encode
from tpm12 import pcrs
from tpm12.authorization import end_bound_sessions
from tpm12.state import NvArea
from tpm12.tpm import Tpm

AREA_OVERHEAD_BYTES: Final = 20
"""What an area takes of the NV memory besides its public part and its data: its secret."""
D_BIT: Final = 0x10000000
"""In an index: defined while the TPM is made, fixed once nvLocked is set."""
_RESERVED_BITS: Final = 0x0F000000
_GPIO: Final = range(0x00011600, 0x00011700)
"""PC Client general-purpose pins; this TPM has none."""
_NEVER_DEFINED: Final = frozenset({NvIndex.LOCK, NvIndex.INDEX0, NvIndex.DIR})
_ANY_LOCALITY: Final = UNRESTRICTED_PCR_INFO.locality_at_release
_UNUSED_BYTE: Final = b"\xff"

_OWNERWRITE, _AUTHWRITE = int(NvAttribute.OWNERWRITE), int(NvAttribute.AUTHWRITE)
_OWNERREAD, _AUTHREAD = int(NvAttribute.OWNERREAD), int(NvAttribute.AUTHREAD)
_PPWRITE, _PPREAD = int(NvAttribute.PPWRITE), int(NvAttribute.PPREAD)
_WRITEDEFINE, _WRITEALL = int(NvAttribute.WRITEDEFINE), int(NvAttribute.WRITEALL)
_GLOBALLOCK = int(NvAttribute.GLOBALLOCK)
_WRITE_STCLEAR, _READ_STCLEAR = int(NvAttribute.WRITE_STCLEAR), int(NvAttribute.READ_STCLEAR)
_ANY_WRITE_GUARD: Final = _OWNERWRITE | _AUTHWRITE | _WRITEDEFINE | _PPWRITE
_READ_GUARDS: Final = _PPREAD | _READ_STCLEAR
_ANY_WRITE_LOCK: Final = _WRITEDEFINE | _GLOBALLOCK | _WRITE_STCLEAR


def area_at(tpm: Tpm, nv_index: int) -> NvArea:
    """The area at an index.

    Raises:
        TpmError: BADINDEX when there is none.
    """
    area = tpm.permanent.nv.get(nv_index)
    if area is None:
        raise TpmError(ReturnCode.BADINDEX)
    return area


def public_of(tpm: Tpm, area: NvArea) -> NvDataPublic:
    """The public part of an area with its locks as they are now, as TPM_CAP_NV_INDEX shows it."""
    nv_index = area.public.nv_index
    return _with_locks(
        area.public,
        read_stclear=nv_index in tpm.stclear.nv_read_locked,
        write_stclear=nv_index in tpm.stclear.nv_write_locked,
        write_define=area.public.b_write_define,
    )


def free_bytes(tpm: Tpm, without: int | None = None) -> int:
    """NV memory that is left, in bytes; as if the area `without` were gone."""
    taken = sum(
        _cost_bytes(area.public) for index, area in tpm.permanent.nv.items() if index != without
    )
    return max(0, tpm.world.profile.nv_bytes - taken)


def _cost_bytes(public: NvDataPublic) -> int:
    return len(encode(public)) + AREA_OVERHEAD_BYTES + public.data_size


def _with_locks(
    public: NvDataPublic, *, read_stclear: bool, write_stclear: bool, write_define: bool
) -> NvDataPublic:
    return NvDataPublic(
        nv_index=public.nv_index,
        pcr_info_read=public.pcr_info_read,
        pcr_info_write=public.pcr_info_write,
        permission=public.permission,
        b_read_stclear=read_stclear,
        b_write_stclear=write_stclear,
        b_write_define=write_define,
        data_size=public.data_size,
    )


# -- defining ------------------------------------------------------------------------------------


def check_redefinable(tpm: Tpm, area: NvArea) -> None:
    """Check that a locked area is not taken away (of a TPM with nvLocked).

    Raises:
        TpmError: AREA_LOCKED.
    """
    attributes = area.public.permission.attributes
    if (attributes & _GLOBALLOCK and tpm.stclear.b_global_lock) or (
        attributes & _WRITE_STCLEAR and area.public.nv_index in tpm.stclear.nv_write_locked
    ):
        raise TpmError(ReturnCode.AREA_LOCKED)


def check_definable(tpm: Tpm, public: NvDataPublic) -> None:
    """Check attributes, index and size of a new area (Part 3 §20.1, actions 9 to 11).

    Raises:
        TpmError: AUTH_CONFLICT, PER_NOWRITE, BADINDEX, BAD_PARAM_SIZE, NOSPACE.
    """
    attributes, nv_index = public.permission.attributes, public.nv_index
    if (attributes & _OWNERWRITE and attributes & _AUTHWRITE) or (
        attributes & _OWNERREAD and attributes & _AUTHREAD
    ):
        raise TpmError(ReturnCode.AUTH_CONFLICT)
    # The specification looks at who may write; libtpms looks at pcrInfoRead here, by mistake.
    limits_write = public.pcr_info_write.locality_at_release != _ANY_LOCALITY
    if not attributes & _ANY_WRITE_GUARD and not limits_write:
        raise TpmError(ReturnCode.PER_NOWRITE)
    if nv_index in _NEVER_DEFINED or nv_index & _RESERVED_BITS or nv_index in _GPIO:
        raise TpmError(ReturnCode.BADINDEX)
    if not public.data_size:
        raise TpmError(ReturnCode.BAD_PARAM_SIZE)
    if _cost_bytes(public) > free_bytes(tpm, without=nv_index):
        raise TpmError(ReturnCode.NOSPACE)


def define(tpm: Tpm, public: NvDataPublic, auth_value: bytes) -> None:
    """Make an area that `check_definable` has passed, in place of one with the same index."""
    nv_index = public.nv_index
    remove(tpm, nv_index)
    unlocked = _with_locks(public, read_stclear=False, write_stclear=False, write_define=False)
    area = NvArea(public=unlocked, auth_value=auth_value, data=_UNUSED_BYTE * public.data_size)
    permanent = tpm.change_permanent()
    permanent.nv = {**permanent.nv, nv_index: area}


def remove(tpm: Tpm, nv_index: int) -> None:
    """Delete an area, if there is one, with its locks and the sessions bound to it."""
    if nv_index not in tpm.permanent.nv:
        return
    permanent = tpm.change_permanent()
    permanent.nv = {index: area for index, area in permanent.nv.items() if index != nv_index}
    end_bound_sessions(tpm, EntityType.NV, nv_index)
    _unlock(tpm, nv_index, read=True, write=True)


# -- reading -------------------------------------------------------------------------------------


def check_read(tpm: Tpm, area: NvArea) -> None:
    """Check presence, lock, locality and PCRs for reading.

    Raises:
        TpmError: BAD_PRESENCE, DISABLED_CMD, BAD_LOCALITY, WRONGPCRVAL.
    """
    public = area.public
    attributes = public.permission.attributes
    if attributes & _READ_GUARDS:
        if attributes & _PPREAD:
            tpm.require_presence()
        if attributes & _READ_STCLEAR and public.nv_index in tpm.stclear.nv_read_locked:
            raise TpmError(ReturnCode.DISABLED_CMD)
    pcrs.check_release(tpm, public.pcr_info_read)


def read(tpm: Tpm, area: NvArea, offset: int, size: int) -> bytes:
    """Read part of an area; a size of 0 locks reading until ST_CLEAR or a write.

    Raises:
        TpmError: NOSPACE past its end.
    """
    if size:
        return slice_of(area.data, offset, size)
    nv_index = area.public.nv_index
    if nv_index not in tpm.stclear.nv_read_locked:
        stclear = tpm.change_stclear()
        stclear.nv_read_locked = {**stclear.nv_read_locked, nv_index: True}
    return b""


def slice_of(data: bytes, offset: int, size: int) -> bytes:
    """Part of an area's bytes.

    Raises:
        TpmError: NOSPACE past their end.
    """
    end = offset + size
    if end > len(data):
        raise TpmError(ReturnCode.NOSPACE)
    return data[offset:end]


# -- writing -------------------------------------------------------------------------------------


def check_write(tpm: Tpm, area: NvArea) -> None:
    """Check presence, locks, locality and PCRs for writing.

    Raises:
        TpmError: BAD_PRESENCE, AREA_LOCKED, BAD_LOCALITY, WRONGPCRVAL.
    """
    attributes = area.public.permission.attributes
    if attributes & _PPWRITE:
        tpm.require_presence()
    if attributes & _ANY_WRITE_LOCK and (
        (attributes & _WRITEDEFINE and area.public.b_write_define)
        or (attributes & _GLOBALLOCK and tpm.stclear.b_global_lock)
        or (attributes & _WRITE_STCLEAR and area.public.nv_index in tpm.stclear.nv_write_locked)
    ):
        raise TpmError(ReturnCode.AREA_LOCKED)
    pcrs.check_release(tpm, area.public.pcr_info_write)


def write(tpm: Tpm, area: NvArea, offset: int, data: bytes) -> bool:
    """Write part of an area; no data locks writing. Did permanent state change?

    Raises:
        TpmError: NOSPACE past its end; NOT_FULLWRITE for part of an area that is written whole.
    """
    nv_index = area.public.nv_index
    if data:
        new = _with_data(area, offset, data)
    else:
        # Both locks are set whatever the attributes say; the attributes decide whether they bite.
        if nv_index not in tpm.stclear.nv_write_locked:
            stclear = tpm.change_stclear()
            stclear.nv_write_locked = {**stclear.nv_write_locked, nv_index: True}
        new = area if area.public.b_write_define else _write_defined(area)
    _unlock(tpm, nv_index, read=True)
    if new is area:
        return False
    permanent = tpm.change_permanent()
    permanent.nv = {**permanent.nv, nv_index: new}
    return True


def _with_data(area: NvArea, offset: int, data: bytes) -> NvArea:
    """The area with other bytes; the same object when they are no others."""
    old = slice_of(area.data, offset, len(data))
    if area.public.permission.attributes & _WRITEALL and len(data) != len(area.data):
        raise TpmError(ReturnCode.NOT_FULLWRITE)
    if old == data:
        return area
    whole = area.data[:offset] + data + area.data[offset + len(data) :]
    return NvArea(public=area.public, auth_value=area.auth_value, data=whole)


def _write_defined(area: NvArea) -> NvArea:
    locked = _with_locks(area.public, read_stclear=False, write_stclear=False, write_define=True)
    return NvArea(public=locked, auth_value=area.auth_value, data=area.data)


def _unlock(tpm: Tpm, nv_index: int, *, read: bool = False, write: bool = False) -> None:
    if read and nv_index in tpm.stclear.nv_read_locked:
        stclear = tpm.change_stclear()
        stclear.nv_read_locked = _without(stclear.nv_read_locked, nv_index)
    if write and nv_index in tpm.stclear.nv_write_locked:
        stclear = tpm.change_stclear()
        stclear.nv_write_locked = _without(stclear.nv_write_locked, nv_index)


def _without(locks: dict[int, bool], nv_index: int) -> dict[int, bool]:
    return {index: locked for index, locked in locks.items() if index != nv_index}


# -- writing without an owner --------------------------------------------------------------------


def check_no_owner_writes(tpm: Tpm) -> None:
    """Check that an unowned TPM may change NV memory once more without authorization.

    Anyone could wear the memory out otherwise. libtpms limits such writes with an owner too; the
    specification speaks of the time before there is one.

    Raises:
        TpmError: MAXNVWRITES.
    """
    limit = tpm.world.profile.no_owner_nv_writes
    if not tpm.has_owner and tpm.permanent.no_owner_nv_write >= limit:
        raise TpmError(ReturnCode.MAXNVWRITES)


def count_no_owner_write(tpm: Tpm) -> None:
    """Note that an unowned TPM's NV memory was changed without authorization."""
    if not tpm.has_owner:
        tpm.change_permanent().no_owner_nv_write += 1
