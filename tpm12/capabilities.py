"""What the TPM tells about itself: capability areas and properties.

Each area is a function of the TPM and the bytes of the sub-capability; each property a function of
the TPM. Nothing here changes anything.

Source: TPM Main r116 Part 2 §21.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Final

from protocol.constants import (
    PCR_COUNT,
    PCR_SELECT_BYTES_MAX,
    STRUCT_VER,
    AdipScheme,
    AlgorithmId,
    CapabilityArea,
    CapabilityFlag,
    CapabilityProperty,
    EncScheme,
    Ordinal,
    ProtocolId,
    ResourceType,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    CapVersionInfo,
    DaActionType,
    DaInfo,
    DaInfoLimited,
    KeyHandleList,
    KeyParms,
    PermanentFlags,
    SelectSize,
    StclearFlags,
)
from protocol.wire import decode, encode
from tpm12 import keys, nv
from tpm12.authorization import lockout_left_us
from tpm12.state import NO_COUNTER, RELEASED_COUNTER
from tpm12.tpm import Tpm

_U32: Final = struct.Struct(">I")
_TRUE: Final = b"\x01"
_FALSE: Final = b"\x00"


def _bool(value: object) -> bytes:
    return _TRUE if value else _FALSE


def _u32_of(sub_cap: bytes) -> int:
    if len(sub_cap) != 4:
        raise TpmError(ReturnCode.BAD_MODE, "a sub-capability of other than 4 bytes")
    return int.from_bytes(sub_cap, "big")


def _u16_of(sub_cap: bytes) -> int:
    if len(sub_cap) != 2:
        raise TpmError(ReturnCode.BAD_MODE, "a sub-capability of other than 2 bytes")
    return int.from_bytes(sub_cap, "big")


_UNTESTED_AREAS: Final = frozenset({CapabilityArea.VERSION, CapabilityArea.VERSION_VAL})
_UNTESTED_PROPERTIES: Final = frozenset(
    _U32.pack(p)
    for p in (
        CapabilityProperty.MANUFACTURER,
        CapabilityProperty.DURATION,
        CapabilityProperty.TIS_TIMEOUT,
    )
)


def is_told_untested(cap_area: int, sub_cap: bytes) -> bool:
    """Is this told before the self-test, and in failure mode too?"""
    return cap_area in _UNTESTED_AREAS or (
        cap_area == CapabilityArea.PROPERTY and sub_cap in _UNTESTED_PROPERTIES
    )


def tell(tpm: Tpm, cap_area: int, sub_cap: bytes) -> bytes:
    """The answer of one area.

    Raises:
        TpmError: BAD_MODE for an unknown area or sub-capability; as the area says.
        DecodeError: A structure as sub-capability is malformed.
    """
    area = _AREAS.get(cap_area)
    if area is None:
        raise TpmError(ReturnCode.BAD_MODE)
    return area(tpm, sub_cap)


def _ord(tpm: Tpm, sub_cap: bytes) -> bytes:
    return _bool(_u32_of(sub_cap) in tpm.world.ordinals)


def _alg(_tpm: Tpm, sub_cap: bytes) -> bytes:
    # About asymmetric algorithms; for the others the specification leaves the answer open.
    return _bool(_u32_of(sub_cap) == AlgorithmId.RSA)


_PROTOCOL_NEEDS: Final[dict[int, Ordinal]] = {
    ProtocolId.OIAP: Ordinal.OIAP,
    ProtocolId.OSAP: Ordinal.OSAP,
    ProtocolId.ADIP: Ordinal.OSAP,
    ProtocolId.ADCP: Ordinal.CHANGE_AUTH,
    ProtocolId.OWNER: Ordinal.TAKE_OWNERSHIP,
    ProtocolId.DSAP: Ordinal.DSAP,
    ProtocolId.TRANSPORT: Ordinal.ESTABLISH_TRANSPORT,
}


def _pid(tpm: Tpm, sub_cap: bytes) -> bytes:
    return _bool(_PROTOCOL_NEEDS.get(_u16_of(sub_cap)) in tpm.world.ordinals)


def _flag(tpm: Tpm, sub_cap: bytes) -> bytes:
    which = _u32_of(sub_cap)
    if which == CapabilityFlag.PERMANENT:
        return encode(tpm.permanent.flags)
    if which == CapabilityFlag.VOLATILE:
        return encode(stclear_flags(tpm))
    raise TpmError(ReturnCode.BAD_MODE)


def stclear_flags(tpm: Tpm) -> StclearFlags:
    """TPM_STCLEAR_FLAGS as they are."""
    stclear = tpm.stclear
    return StclearFlags(
        deactivated=stclear.deactivated,
        disable_force_clear=stclear.disable_force_clear,
        physical_presence=stclear.physical_presence,
        physical_presence_lock=stclear.physical_presence_lock,
        b_global_lock=stclear.b_global_lock,
    )


def _property(tpm: Tpm, sub_cap: bytes) -> bytes:
    find = _PROPERTIES.get(_u32_of(sub_cap))
    if find is None:
        raise TpmError(ReturnCode.BAD_MODE)
    told = find(tpm)
    return told if isinstance(told, bytes) else _U32.pack(told)


# Areas without a sub-capability ignore one, as other TPMs do.


def _version(_tpm: Tpm, _sub_cap: bytes) -> bytes:
    # The version of 1.1 age; what a 1.2 client wants to know is in VERSION_VAL.
    return STRUCT_VER


def _version_val(tpm: Tpm, _sub_cap: bytes) -> bytes:
    return encode(version_info(tpm))


def version_info(tpm: Tpm) -> CapVersionInfo:
    """TPM_CAP_VERSION_INFO of this TPM."""
    profile = tpm.world.profile
    return CapVersionInfo(
        version=profile.version,
        spec_level=profile.spec_level,
        errata_rev=profile.errata_rev,
        tpm_vendor_id=profile.manufacturer,
        vendor_specific=b"",
    )


def _handles(handles: Iterable[int]) -> bytes:
    return encode(KeyHandleList(handles=tuple(handles)))


def _key_handles(tpm: Tpm) -> list[int]:
    return [*tpm.volatile.keys, *tpm.permanent.owner_evict_keys]


def _key_handle(tpm: Tpm, _sub_cap: bytes) -> bytes:
    return _handles(_key_handles(tpm))


def _handle(tpm: Tpm, sub_cap: bytes) -> bytes:
    match _u32_of(sub_cap):
        case ResourceType.KEY:
            return _handles(_key_handles(tpm))
        case ResourceType.AUTH:
            return _handles(tpm.stany.sessions)
        case ResourceType.TRANS:
            return _handles(tpm.stany.transport_sessions)
        case ResourceType.CONTEXT:
            return _handles(tpm.stany.context_list.values())
        case ResourceType.COUNTER:
            return _handles(tpm.permanent.counters)
        case ResourceType.DAA_TPM:
            return _handles(tpm.stany.daa_sessions)
        case _:
            raise TpmError(ReturnCode.BAD_PARAMETER)


def _check_loaded(tpm: Tpm, sub_cap: bytes) -> bytes:
    parms = keys.rsa_parms(decode(KeyParms, sub_cap))
    is_served = (
        keys.RSA_BITS_MIN <= parms.key_length <= keys.RSA_BITS_MAX
        and parms.key_length % 16 == 0
        and parms.num_primes == 2
    )
    return _bool(is_served and _free_key_slots(tpm))


def _key_status(tpm: Tpm, sub_cap: bytes) -> bytes:
    handle = _u32_of(sub_cap)
    is_owner_evict = handle in tpm.permanent.owner_evict_keys
    if not is_owner_evict and handle not in tpm.volatile.keys:
        raise TpmError(ReturnCode.INVALID_KEYHANDLE)
    return _bool(is_owner_evict)


def _nv_list(tpm: Tpm, _sub_cap: bytes) -> bytes:
    indices = sorted(tpm.permanent.nv)
    return struct.pack(f">{len(indices)}I", *indices)


def _nv_index(tpm: Tpm, sub_cap: bytes) -> bytes:
    return encode(nv.public_of(tpm, nv.area_at(tpm, _u32_of(sub_cap))))


def _never(_tpm: Tpm, sub_cap: bytes) -> bytes:
    _u32_of(sub_cap)
    return _FALSE


_TRANSPORT_ALGORITHMS: Final = frozenset({AlgorithmId.MGF1, AlgorithmId.AES128})
_TRANSPORT_SCHEMES: Final = frozenset({EncScheme.SYM_CTR, EncScheme.SYM_OFB})


def _trans_alg(tpm: Tpm, sub_cap: bytes) -> bytes:
    algorithm = _u32_of(sub_cap)
    return _bool(_has_transport(tpm) and algorithm in _TRANSPORT_ALGORITHMS)


def _trans_es(tpm: Tpm, sub_cap: bytes) -> bytes:
    scheme = _u16_of(sub_cap)
    return _bool(_has_transport(tpm) and scheme in _TRANSPORT_SCHEMES)


def _has_transport(tpm: Tpm) -> bool:
    return Ordinal.ESTABLISH_TRANSPORT in tpm.world.ordinals


_ADIP_ALGORITHMS: Final[dict[int, AdipScheme]] = {
    AlgorithmId.XOR: AdipScheme.XOR,
    AlgorithmId.AES128: AdipScheme.AES128_CTR,
}


def _auth_encrypt(tpm: Tpm, sub_cap: bytes) -> bytes:
    scheme = _ADIP_ALGORITHMS.get(_u32_of(sub_cap))
    return _bool(scheme is not None and not (scheme is AdipScheme.XOR and tpm.permanent.flags.fips))


def _select_size(_tpm: Tpm, sub_cap: bytes) -> bytes:
    asked = decode(SelectSize, sub_cap)
    # "This MUST be 0x01" and "This MAY be 0x01 or 0x02" (Part 2 §5.18).
    if asked.major != 1 or asked.minor not in {1, 2}:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    return _bool(1 <= asked.req_size <= PCR_SELECT_BYTES_MAX)


_DA_ACTION_TIMEOUT: Final = DaActionType(actions=1)
_SECOND_US: Final = 1_000_000
_COUNT_MAX: Final = 0xFFFF


def _da_logic(tpm: Tpm, sub_cap: bytes) -> bytes:
    # One counter guards all secrets, so the answer is the same for every entity type.
    _u16_of(sub_cap)
    left_us = lockout_left_us(tpm)
    is_active = int(left_us > 0)
    if tpm.permanent.flags.disable_full_da_logic_info:
        return encode(
            DaInfoLimited(state=is_active, action_at_threshold=_DA_ACTION_TIMEOUT, vendor_data=b"")
        )
    return encode(
        DaInfo(
            state=is_active,
            current_count=min(tpm.stclear.failed_tries, _COUNT_MAX),
            threshold_count=tpm.world.profile.failed_tries,
            action_at_threshold=_DA_ACTION_TIMEOUT,
            action_depend_value=-(-left_us // _SECOND_US),
            vendor_data=b"",
        )
    )


_Area = Callable[[Tpm, bytes], bytes]
_AREAS: Final[dict[int, _Area]] = {
    CapabilityArea.ORD: _ord,
    CapabilityArea.ALG: _alg,
    CapabilityArea.PID: _pid,
    CapabilityArea.FLAG: _flag,
    CapabilityArea.PROPERTY: _property,
    CapabilityArea.VERSION: _version,
    CapabilityArea.KEY_HANDLE: _key_handle,
    CapabilityArea.CHECK_LOADED: _check_loaded,
    CapabilityArea.SYM_MODE: _never,
    CapabilityArea.KEY_STATUS: _key_status,
    CapabilityArea.NV_LIST: _nv_list,
    CapabilityArea.NV_INDEX: _nv_index,
    CapabilityArea.TRANS_ALG: _trans_alg,
    CapabilityArea.HANDLE: _handle,
    CapabilityArea.TRANS_ES: _trans_es,
    CapabilityArea.AUTH_ENCRYPT: _auth_encrypt,
    CapabilityArea.SELECT_SIZE: _select_size,
    CapabilityArea.DA_LOGIC: _da_logic,
    CapabilityArea.VERSION_VAL: _version_val,
}
"""TPM_CAP_MFR is missing: there is nothing of the maker's to tell, so it is BAD_MODE."""


# -- properties ------------------------------------------------------------------------------------

STARTUP_EFFECT: Final = 1 << 2 | 1 << 4 | 1 << 6
"""ST_STATE drops the SHA-1 thread (bit 2), and of what lives until then nothing else; ST_CLEAR
zeroes the audit digest (6). Bit 4, on keys, is deprecated as open to interpretation: those that are
not owner-evict are lost at ST_CLEAR."""
_DIR_REGISTERS: Final = 1
_MIN_COUNTER_TENTHS_OF_S: Final = 0


def _free_key_slots(tpm: Tpm) -> int:
    taken = len(tpm.volatile.keys) + len(tpm.permanent.owner_evict_keys)
    return tpm.world.profile.key_slots - taken


def _free_sessions(tpm: Tpm) -> int:
    return tpm.world.profile.auth_sessions - len(tpm.stany.sessions)


def _free_transport_sessions(tpm: Tpm) -> int:
    return tpm.world.profile.transport_sessions - len(tpm.stany.transport_sessions)


def _active_counter(tpm: Tpm) -> int:
    """None is active before the first increment, nor when the active one was released."""
    count_id = tpm.stclear.count_id
    return NO_COUNTER if count_id == RELEASED_COUNTER else count_id


_Property = Callable[[Tpm], int | bytes]
_PROPERTIES: Final[dict[int, _Property]] = {
    CapabilityProperty.PCR: lambda _tpm: PCR_COUNT,
    CapabilityProperty.DIR: lambda _tpm: _DIR_REGISTERS,
    CapabilityProperty.MANUFACTURER: lambda tpm: tpm.world.profile.manufacturer,
    CapabilityProperty.KEYS: _free_key_slots,
    CapabilityProperty.MIN_COUNTER: lambda _tpm: _MIN_COUNTER_TENTHS_OF_S,
    CapabilityProperty.AUTHSESS: _free_sessions,
    CapabilityProperty.TRANSESS: _free_transport_sessions,
    CapabilityProperty.COUNTERS: lambda tpm: (
        tpm.world.profile.counters - len(tpm.permanent.counters)
    ),
    CapabilityProperty.MAX_AUTHSESS: lambda tpm: tpm.world.profile.auth_sessions,
    CapabilityProperty.MAX_TRANSESS: lambda tpm: tpm.world.profile.transport_sessions,
    CapabilityProperty.MAX_COUNTERS: lambda tpm: tpm.world.profile.counters,
    CapabilityProperty.MAX_KEYS: lambda tpm: tpm.world.profile.key_slots,
    CapabilityProperty.OWNER: lambda tpm: _bool(tpm.has_owner),
    CapabilityProperty.CONTEXT: lambda tpm: (
        tpm.world.profile.saved_contexts - len(tpm.stany.context_list)
    ),
    CapabilityProperty.MAX_CONTEXT: lambda tpm: tpm.world.profile.saved_contexts,
    CapabilityProperty.FAMILYROWS: lambda tpm: tpm.world.profile.family_rows,
    CapabilityProperty.TIS_TIMEOUT: lambda tpm: struct.pack(
        ">4I", *tpm.world.profile.tis_timeouts_us
    ),
    CapabilityProperty.STARTUP_EFFECT: lambda _tpm: STARTUP_EFFECT,
    CapabilityProperty.DELEGATE_ROW: lambda tpm: tpm.world.profile.delegate_rows,
    CapabilityProperty.MAX_DAASESS: lambda tpm: tpm.world.profile.daa_sessions,
    CapabilityProperty.DAASESS: lambda tpm: (
        tpm.world.profile.daa_sessions - len(tpm.stany.daa_sessions)
    ),
    CapabilityProperty.CONTEXT_DIST: lambda tpm: tpm.world.profile.context_distance,
    CapabilityProperty.DAA_INTERRUPT: lambda _tpm: _TRUE,
    CapabilityProperty.SESSIONS: lambda tpm: _free_sessions(tpm) + _free_transport_sessions(tpm),
    CapabilityProperty.MAX_SESSIONS: lambda tpm: (
        tpm.world.profile.auth_sessions + tpm.world.profile.transport_sessions
    ),
    CapabilityProperty.CMK_RESTRICTION: lambda tpm: tpm.permanent.restrict_delegate,
    CapabilityProperty.DURATION: lambda tpm: struct.pack(">3I", *tpm.world.profile.durations_us),
    CapabilityProperty.ACTIVE_COUNTER: _active_counter,
    CapabilityProperty.MAX_NV_AVAILABLE: nv.free_bytes,
    CapabilityProperty.INPUT_BUFFER: lambda tpm: tpm.world.profile.input_buffer_bytes,
}


def as_bits(flags: PermanentFlags | StclearFlags) -> int:
    """The first flag as bit 0, the second as bit 1, and so on."""
    names = [f.name for f in fields(flags) if f.name != "tag"]
    return sum(getattr(flags, name) << i for i, name in enumerate(names))
