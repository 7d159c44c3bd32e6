"""The tick counter, as every command shows it that tells the time.

Source: TPM Main r116 Part 2 §15, Part 3 §23.
"""

from __future__ import annotations

from typing import Final

from protocol.structures import CurrentTicks
from tpm12.tpm import Tpm

TICK_RATE_US: Final = 1
"""Microseconds a tick."""


def current_ticks(tpm: Tpm) -> CurrentTicks:
    """The ticks since TPM_Init, now."""
    return CurrentTicks(
        current_ticks=(tpm.world.clock.now_us() - tpm.stany.tick_start_us) // TICK_RATE_US,
        tick_rate=TICK_RATE_US,
        tick_nonce=tpm.stany.tick_nonce,
    )
