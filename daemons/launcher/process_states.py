"""The life of a supervised process as a table: states, events, what follows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class State(StrEnum):
    """Where a supervised process is in its life."""

    CREATED = "created"
    """Nothing was started yet."""
    WAITING = "waiting"
    """Something must be there first."""
    STARTING = "starting"
    """It runs, and has not said READY."""
    RUNNING = "running"
    PAUSED = "paused"
    STOPPING = "stopping"
    """It was told to end, for good or to be started again."""
    BACKOFF = "backoff"
    """It died, and is started again after a while."""
    FAILED = "failed"
    """It is not started again before somebody asks."""
    PRESERVED = "preserved"
    """It was shut down and is kept, until somebody starts it again or destroys it."""
    ENDED = "ended"


class Event(StrEnum):
    """What happens to it."""

    START = "start"
    SPAWNED = "spawned"
    READY = "ready"
    EXITED = "exited"
    PAUSE = "pause"
    UNPAUSE = "unpause"
    STOP = "stop"
    REPEAT = "repeat"
    """The stop was for a new start."""
    PUT_OFF = "put off"
    """There is no room for a start now; it is tried again."""
    GIVE_UP = "give up"
    PRESERVE = "preserve"
    """The stop was one after which it is kept."""


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = {
    (State.CREATED, Event.START): State.WAITING,
    (State.CREATED, Event.STOP): State.ENDED,
    (State.WAITING, Event.SPAWNED): State.STARTING,
    (State.WAITING, Event.REPEAT): State.WAITING,
    (State.WAITING, Event.PUT_OFF): State.BACKOFF,
    (State.WAITING, Event.GIVE_UP): State.FAILED,
    (State.WAITING, Event.STOP): State.ENDED,
    (State.WAITING, Event.PRESERVE): State.PRESERVED,
    (State.STARTING, Event.READY): State.RUNNING,
    (State.STARTING, Event.STOP): State.STOPPING,
    (State.STARTING, Event.EXITED): State.BACKOFF,
    (State.RUNNING, Event.PAUSE): State.PAUSED,
    (State.RUNNING, Event.STOP): State.STOPPING,
    (State.RUNNING, Event.EXITED): State.BACKOFF,
    (State.PAUSED, Event.UNPAUSE): State.RUNNING,
    (State.PAUSED, Event.STOP): State.STOPPING,
    (State.PAUSED, Event.EXITED): State.BACKOFF,
    (State.STOPPING, Event.REPEAT): State.WAITING,
    (State.STOPPING, Event.EXITED): State.ENDED,
    (State.STOPPING, Event.PRESERVE): State.PRESERVED,
    (State.BACKOFF, Event.START): State.WAITING,
    (State.BACKOFF, Event.REPEAT): State.WAITING,
    (State.BACKOFF, Event.GIVE_UP): State.FAILED,
    (State.BACKOFF, Event.STOP): State.ENDED,
    (State.BACKOFF, Event.PRESERVE): State.PRESERVED,
    (State.FAILED, Event.REPEAT): State.WAITING,
    (State.FAILED, Event.STOP): State.ENDED,
    (State.FAILED, Event.PRESERVE): State.PRESERVED,
    (State.PRESERVED, Event.REPEAT): State.WAITING,
    (State.PRESERVED, Event.STOP): State.ENDED,
}

RESTING = frozenset({State.CREATED, State.FAILED, State.PRESERVED})
"""States of a process that is not there and is not started before somebody asks."""
SETTLED = RESTING | {State.RUNNING, State.PAUSED, State.ENDED}
"""States that last until something new happens."""
