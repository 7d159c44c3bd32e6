"""What a drawn plan may cost, as `vtpm fault draw` names it. Pure."""

from __future__ import annotations

from enum import StrEnum


class Cost(StrEnum):
    """What a program in a guest may see of a plan, each with what is before it."""

    PAUSE = "pause"
    ERROR = "error"
    ANYTHING = "anything"
