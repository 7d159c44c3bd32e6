"""What TPM_SaveState keeps over a loss of power, and how TPM_Startup(ST_STATE) takes it up again.

Kept are TPM_STCLEAR_FLAGS and _DATA whole, of TPM_STANY_DATA the audit digest, saved contexts and
every kind of session, and the loaded keys. Not kept: PCRs that can be reset, ticks, the SHA-1
thread, and what every start-up resets (transportExclusive, TOSPresent).

    size u32 | StClear | size u32 | StAny | size u32 | Volatile        as state_codec.py writes them

Source: TPM Main r116 Part 3 §3.2, §3.3.

Invariants:
- What cannot be read whole is not taken up at all.
"""

from __future__ import annotations

from typing import Final

from protocol.wire import DecodeError, Sized, decode, encode, wire
from tpm12.pcrs import ATTRIBUTES
from tpm12.state import StAny, StClear, Volatile
from tpm12.state_codec import StateError, decode_section, encode_section
from tpm12.tpm import Tpm

_RESETTABLE: Final = {
    i: attributes.start for i, attributes in enumerate(ATTRIBUTES) if attributes.resettable_from
}
"""Start values of the PCRs that stand for a state of the platform which power takes away."""


@wire
class SavedState:
    """Three sections as bytes."""

    stclear: Sized
    stany: Sized
    volatile: Sized


def saved(tpm: Tpm) -> bytes:
    """What the state of the TPM has to be kept of."""
    return encode(
        SavedState(
            stclear=encode_section(tpm.stclear),
            stany=encode_section(tpm.stany),
            volatile=encode_section(Volatile(keys=tpm.volatile.keys)),
        )
    )


def restore(tpm: Tpm, data: bytes) -> None:
    """Take up what `saved()` gave.

    Raises:
        StateError: It is something else; the TPM is as before.
    """
    try:
        parts = decode(SavedState, data)
    except DecodeError as error:
        raise StateError("saved state is cut off") from error
    stclear = decode_section(StClear, parts.stclear)
    stany = decode_section(StAny, parts.stany)
    keys = decode_section(Volatile, parts.volatile).keys
    if set(stclear.pcrs) != set(range(len(ATTRIBUTES))):
        raise StateError("saved state has other PCRs than this TPM")
    stclear.pcrs = {**stclear.pcrs, **_RESETTABLE}
    # The clock may have begun anew with the machine: whoever is locked out waits once more.
    stclear.last_failure_us = tpm.world.clock.now_us()
    stany.tick_start_us, stany.tick_nonce = tpm.stany.tick_start_us, tpm.stany.tick_nonce
    # TPM_STANY_FLAGS: every start-up resets them.
    stany.post_initialise = False
    stany.transport_exclusive = 0
    stany.tos_present = False
    tpm.stclear, tpm.stany = stclear, stany
    tpm.change_volatile().keys = keys
