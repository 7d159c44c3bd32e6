"""Clocks that jump, stand still or run at another speed; the page remembers how they go."""

from __future__ import annotations

from typing import Protocol

from daemons.faults.page import CLOCK, ClockState, Page, now_us
from daemons.faults.plan import Fault, What


class FaultSource(Protocol):
    """Says what happens; `Injection` is one."""

    def next_fault(self, kind: str) -> Fault | None:
        """Count one, and say what happens at it."""


class FaultyClock:
    """A clock whose readings meet faults. What has happened to it stays, also after the run.

    Args:
        page: Where it is remembered, for the next process of this daemon too.
        source: Says what happens.
    """

    def __init__(self, page: Page, source: FaultSource) -> None:
        self._page = page
        self._source = source

    def now_us(self) -> int:
        """Microseconds, as this clock has them."""
        fault = self._source.next_fault(CLOCK)
        true_us = now_us()
        if fault is not None:
            self._page.clock = faulty(self._page.clock, fault, true_us)
        return shown_us(self._page.clock, true_us)


def faulty(state: ClockState, fault: Fault, true_us: int) -> ClockState:
    """How a clock goes on after a fault."""
    offset_us = shown_us(state, true_us) - true_us
    if fault.what is What.JUMP:
        return ClockState(
            state.offset_us + round(fault.by_s * 1e6), state.from_us, state.until_us, state.speed
        )
    speed = 0.0 if fault.what is What.STOP else fault.speed
    return ClockState(offset_us, true_us, true_us + round(fault.for_s * 1e6), speed)


def shown_us(state: ClockState, true_us: int) -> int:
    """What a clock shows at some moment."""
    lasted_us = max(0, min(true_us, state.until_us) - state.from_us)
    return true_us + state.offset_us + round(lasted_us * (state.speed - 1.0))
