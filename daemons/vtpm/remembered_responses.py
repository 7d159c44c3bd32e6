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

_SEQUENCE: Final = struct.Struct("<Q")
_MEMORY: Final = "memory"
_RING: Final = "ring "


def note(ring_id: str, sequence: int, response: bytes) -> dict[str, bytes]:
    """What to remember with the changes of a command."""
    return {_RING + ring_id: _SEQUENCE.pack(sequence) + response}


class RememberedResponses:
    """A `ResponseStore` over a TPM's notes.

    Args:
        tpm: The TPM, powered on or resumed, with a memory.
    """

    def __init__(self, tpm: DurableTpm) -> None:
        self._tpm = tpm
        if _MEMORY not in tpm.notes:
            tpm.remember({_MEMORY: secrets.token_bytes(8)})
        self.memory = tpm.notes[_MEMORY].hex()
        self._last: dict[str, tuple[int, bytes]] = {
            name.removeprefix(_RING): (_SEQUENCE.unpack_from(value)[0], value[_SEQUENCE.size :])
            for name, value in tpm.notes.items()
            if name.startswith(_RING)
        }

    def last_sequence(self, ring_id: str) -> int:
        """See `ResponseStore`."""
        return self._last.get(ring_id, (0, b""))[0]

    def get(self, ring_id: str, sequence: int) -> bytes | None:
        """See `ResponseStore`."""
        last_sequence, response = self._last.get(ring_id, (0, b""))
        return response if sequence == last_sequence else None

    def put(self, ring_id: str, sequence: int, response: bytes) -> None:
        """See `ResponseStore`; the journal has it already, if it must."""
        self._last[ring_id] = (sequence, response)
