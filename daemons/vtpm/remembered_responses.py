"""The last response of each ring of a vTPM, where a killed process leaves it to the next.

A response is remembered in one record with what its command changed (`note`), so a command that a
frontend submits again is either known here, or has changed nothing. Responses of commands that
changed nothing are kept in this process only.
"""

from __future__ import annotations

import secrets
import struct
from typing import Final

from daemons.durable_tpm import DurableTpm
from daemons.ring_server import ResponsesInMemory

_SEQUENCE: Final = struct.Struct("<Q")
_MEMORY: Final = "memory"
_RING: Final = "ring "


def note(ring_id: str, sequence: int, response: bytes) -> dict[str, bytes]:
    """What to remember with the changes of a command."""
    return {_RING + ring_id: _SEQUENCE.pack(sequence) + response}


def remembered_responses(tpm: DurableTpm) -> ResponsesInMemory:
    """What a killed process remembered, to go on from. New ones go to the journal by `note`.

    Args:
        tpm: The TPM, powered on or resumed, with a memory.
    """
    if _MEMORY not in tpm.notes:
        tpm.remember({_MEMORY: secrets.token_bytes(8)})
    last: dict[str, tuple[int, bytes]] = {
        name.removeprefix(_RING): (_SEQUENCE.unpack_from(value)[0], value[_SEQUENCE.size :])
        for name, value in tpm.notes.items()
        if name.startswith(_RING)
    }
    return ResponsesInMemory(tpm.notes[_MEMORY].hex(), last)
