"""The last response of each ring of a vTPM, where a killed process leaves it to the next.

A response is remembered in one record with what its command changed (`note`), so a command that a
frontend submits again is either known here, or has changed nothing. Responses of commands that
changed nothing are kept in this process only.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Mapping
from typing import Final

from daemons.durable_tpm import DurableTpm
from daemons.ring_server import ResponsesInMemory

_SEQUENCE: Final = struct.Struct("<Q")
_MEMORY: Final = "memory"
_RING: Final = "ring "


def note(ring_id: str, sequence: int, response: bytes) -> dict[str, bytes]:
    """What to remember with the changes of a command."""
    return {_RING + ring_id: _SEQUENCE.pack(sequence) + response}


class RememberedResponses(ResponsesInMemory):
    """Responses in memory, that knows which of them are in the journal too.

    Args:
        tpm: Has them among its notes.
        memory: See `ResponsesInMemory`.
        last: See `ResponsesInMemory`.
    """

    def __init__(self, tpm: DurableTpm, memory: str, last: Mapping[str, tuple[int, bytes]]) -> None:
        super().__init__(memory, last)
        self._tpm = tpm
        self._noted = {ring_id: tpm.notes.get(_RING + ring_id) for ring_id in last}

    def put(self, ring_id: str, sequence: int, response: bytes) -> bool:
        """See `ResponseStore`."""
        self._last[ring_id] = (sequence, response)
        noted = self._tpm.notes.get(_RING + ring_id)
        if noted is self._noted.get(ring_id):
            return False
        self._noted[ring_id] = noted
        return True

    def is_kept(self, ring_id: str, sequence: int) -> bool:
        """See `ResponseStore`."""
        noted = self._tpm.notes.get(_RING + ring_id)
        return noted is not None and _SEQUENCE.unpack_from(noted)[0] == sequence


def remembered_responses(tpm: DurableTpm) -> RememberedResponses:
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
    return RememberedResponses(tpm, tpm.notes[_MEMORY].hex(), last)
