"""A snapshot of the registers as bytes, for whoever keeps it over a crash.

Invariants:
- Reading what was written gives an equal snapshot; what cannot be understood is a `DecodeError`.
"""

from __future__ import annotations

import struct
from typing import Annotated, Final

import construct as cs

from hwtpm.tis_device import PendingCommand, State, TisSnapshot
from hwtpm.tis_registers import LOCALITIES
from protocol.return_codes import ReturnCode
from protocol.wire import U8, U32, U64, Bool, DecodeError, Sized, decode, wire

VERSION: Final = 1
NOBODY: Final = 0xFF
_STATES: Final = tuple(State)
_PER_LOCALITY: Final = struct.Struct(f">{LOCALITIES}I")
Words = Annotated[bytes, cs.Bytes(_PER_LOCALITY.size)]


@wire
class StoredSnapshot:
    """`TisSnapshot`; sets of localities are masks, `NOBODY` is no locality."""

    version: U8
    is_powered: Bool
    is_hashing: Bool
    state: U8
    serial: U64
    pending_locality: U8
    active: U8
    requested: U8
    been_seized: U8
    response_at: U32
    int_enable: Words
    int_status: Words
    int_vector: Words
    int_raised: Words
    command: Sized
    response: Sized


_FIXED: Final = struct.Struct(f">4BQ4BI{LOCALITIES}I{LOCALITIES}I{LOCALITIES}I{LOCALITIES}II")
"""`StoredSnapshot` up to the length of its command, for what is written with each command that the
chip runs; a test holds the two equal."""
_LENGTH: Final = struct.Struct(">I")
_STATE_NUMBERS: Final = {state: number for number, state in enumerate(_STATES)}


def encode_snapshot(snapshot: TisSnapshot) -> bytes:
    """Write a snapshot."""
    pending = snapshot.pending
    fixed = _FIXED.pack(
        VERSION,
        snapshot.is_powered,
        snapshot.is_hashing,
        _STATE_NUMBERS[snapshot.state],
        snapshot.serial,
        NOBODY if pending is None else pending.locality,
        NOBODY if snapshot.active is None else snapshot.active,
        _mask(snapshot.requested),
        _mask(snapshot.been_seized),
        snapshot.response_at,
        *snapshot.int_enable,
        *snapshot.int_status,
        *snapshot.int_vector,
        *snapshot.int_raised,
        len(snapshot.command),
    )
    length = _LENGTH.pack(len(snapshot.response))
    return fixed + snapshot.command + length + snapshot.response


def decode_snapshot(data: bytes) -> TisSnapshot:
    """Read a snapshot.

    Raises:
        DecodeError: It is none, or of another version.
    """
    stored = decode(StoredSnapshot, data)
    localities = {*range(LOCALITIES), NOBODY}
    if (
        stored.version != VERSION
        or stored.state >= len(_STATES)
        or not {stored.pending_locality, stored.active} <= localities
    ):
        raise DecodeError(ReturnCode.FAIL, "registers of another version")
    pending = None
    if stored.pending_locality != NOBODY:
        pending = PendingCommand(stored.serial, stored.pending_locality, stored.command)
    return TisSnapshot(
        is_powered=stored.is_powered,
        is_hashing=stored.is_hashing,
        state=_STATES[stored.state],
        command=stored.command,
        response=stored.response,
        response_at=stored.response_at,
        pending=pending,
        serial=stored.serial,
        active=None if stored.active == NOBODY else stored.active,
        requested=_flags(stored.requested),
        been_seized=_flags(stored.been_seized),
        int_enable=_PER_LOCALITY.unpack(stored.int_enable),
        int_status=_PER_LOCALITY.unpack(stored.int_status),
        int_vector=_PER_LOCALITY.unpack(stored.int_vector),
        int_raised=_PER_LOCALITY.unpack(stored.int_raised),
    )


def _mask(flags: tuple[bool, ...]) -> int:
    if True not in flags:
        return 0
    return sum(1 << locality for locality, flag in enumerate(flags) if flag)


def _flags(mask: int) -> tuple[bool, ...]:
    return tuple(bool(mask >> locality & 1) for locality in range(LOCALITIES))
