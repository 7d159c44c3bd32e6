"""When faults happen: a plan and a seed always say the same. Pure."""

from __future__ import annotations

import random
from dataclasses import dataclass

from daemons.faults.plan import Fault, FaultPlan, What

ENDLESS_S = 30.0
"""How long a run lasts whose plan has no end of its own, when nobody says how long."""
SETTLE_S = 1.0
"""How long a run goes on after its last fault."""


@dataclass(frozen=True, slots=True, order=True)
class Due:
    """Something to be done to a process.

    Attributes:
        at_s: Seconds after the start of the run.
        number: Of the fault.
        is_end: The end of a fault that lasts.
    """

    at_s: float
    number: int
    is_end: bool = False


def schedule(plan: FaultPlan, for_s: float) -> list[Due]:
    """List what is to be done to processes within so many seconds, in its order.

    What lasts is ended, after the run if need be.
    """
    found: list[Due] = []
    for fault in plan.of_processes:
        for at_s in _times(fault, plan.seed, for_s):
            found.append(Due(at_s, fault.number))
            if fault.what is What.STOP:
                found.append(Due(at_s + fault.for_s, fault.number, is_end=True))
    return sorted(found)


def _times(fault: Fault, seed: int, for_s: float) -> list[float]:
    if fault.at_s is not None:
        return [fault.at_s] if fault.at_s <= for_s else []
    assert fault.every_s is not None
    # A generator of its own for each fault: another fault more or less leaves its times alone.
    chance = random.Random(f"{seed}/{fault.number}")  # noqa: S311 - no secret
    count = int(for_s / fault.every_s)
    drawn = ((turn * fault.every_s, chance.random()) for turn in range(1, count + 1))
    return [at_s for at_s, draw in drawn if draw < (fault.probability or 0.0)]


def own_length_s(plan: FaultPlan) -> float:
    """How long a run of this plan lasts when nobody says, in seconds."""
    if not plan.faults or any(fault.at_s is None for fault in plan.faults):
        return ENDLESS_S
    return max((fault.at_s or 0.0) + fault.for_s for fault in plan.faults) + SETTLE_S


def start_length_s(plan: FaultPlan) -> float:
    """How long a plan goes on, at least, for a stack that starts; and until that is up."""
    return max(((f.at_s or 0.0) + f.for_s for f in plan.faults if f.at_s is not None), default=0.0)


def happens(fault: Fault, seed: int, operation: int) -> bool:
    """Tell whether a fault happens at the n-th message, step or reading of its place, from 1."""
    if fault.nth is not None:
        return operation == fault.nth
    chance = random.Random(f"{seed}/{fault.number}/{operation}")  # noqa: S311 - no secret
    return chance.random() < (fault.probability or 0.0)


def turn_at(fault: Fault, passed_s: float) -> int:
    """How many times a fault with a time of its own has been due, so long after the start."""
    if fault.at_s is not None:
        return int(passed_s >= fault.at_s)
    assert fault.every_s is not None
    return int(passed_s / fault.every_s)


def happens_in_turn(fault: Fault, seed: int, turn: int) -> bool:
    """Tell whether a fault happens when it is due for the n-th time, from 1."""
    if fault.probability is None:
        return True
    chance = random.Random(f"{seed}/{fault.number}/turn {turn}")  # noqa: S311 - no secret
    return chance.random() < fault.probability
