"""What a sweep can go through, and when, as `vtpm crashsweep` names it. Pure."""

from __future__ import annotations

from enum import StrEnum


class PointKind(StrEnum):
    """What a sweep goes through."""

    RING = "ring"
    DISK = "disk"
    TIS = "tis"
    ALL = "all"


class Phase(StrEnum):
    """When a sweep kills."""

    COMMAND = "command"
    FIRST_START = "first-start"
    START = "start"
    RECOVERY = "recovery"
