"""What kind of TPM this is: its maker, its limits, its times.

The chip and a vTPM differ only here (and in their vendor commands).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Limits count things, `_bytes` bytes, `_us` microseconds."""

    manufacturer: bytes = b"VTPS"
    """TPM_CAP_PROP_MANUFACTURER, four characters."""
    version: bytes = b"\x01\x02\x00\x01"
    """TPM_VERSION: major 1, minor 2, and our own revision."""
    spec_level: int = 2
    errata_rev: int = 3
    """Specification revision 116."""
    input_buffer_bytes: int = 4096
    key_slots: int = 20
    owner_evict_slots: int = 10
    auth_sessions: int = 16
    transport_sessions: int = 16
    daa_sessions: int = 2
    saved_contexts: int = 128
    context_distance: int = 0xFFFFFFFF
    """How many counts the oldest saved session may lie behind the newest (CONTEXT_GAP)."""
    counters: int = 8
    family_rows: int = 16
    delegate_rows: int = 4
    nv_bytes: int = 28672
    """All NV areas together, with what each costs besides its data."""
    no_owner_nv_writes: int = 64
    failed_tries: int = 5
    """Failed authorizations before the dictionary-attack defence sets in."""
    tis_timeouts_us: tuple[int, int, int, int] = (750_000, 2_000_000, 750_000, 750_000)
    """A, B, C, D of the TIS."""
    durations_us: tuple[int, int, int] = (1_000_000, 10_000_000, 120_000_000)
    """Short, medium, long."""
    is_repeatable: bool = False
    """All chance is drawn from the TPM's own source, also what pads a ciphertext; slower."""
    fails_self_test: bool = False
    """Its full self-test finds it broken: for who wants to see failure mode."""


RING_PACKET_BYTES: Final = 4088
"""What a tpmif page carries behind its header."""
CHIP: Final = Profile()
VTPM: Final = Profile(input_buffer_bytes=RING_PACKET_BYTES)
