"""The TCG event log: what was extended into which PCR, in order, and why.

The log proves nothing by itself. Replayed, it gives the values that the PCRs must have if it is
true; the TPM gives the values that they do have.

Format (TCG PC Client Specific Implementation Specification for Conventional BIOS 1.21, §11.1):
TCG_PCClientPCREvent structures one after the other, little endian, without a header.

Two additions, both as Intel TXT logs them: the locality 4 hash sequence has the event type
EV_HASH_START, and it sets PCR 17 to 22 to zeros before it extends PCR 17.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Final

import construct as cs

from daemons.errors import ExitCode, Failure
from daemons.launcher.measuring import sha1
from daemons.private_files import read_checked
from protocol.constants import PCR_COUNT, ZERO_DIGEST
from protocol.wire import U32LE, DecodeError, Digest, decode_from, encode, wire

LOG_BYTES_MAX: Final = 16 * 1024 * 1024
EVENT_BYTES_MAX: Final = 1024 * 1024
DYNAMIC_PCRS: Final = range(17, 23)
"""What the hash sequence sets to zeros; all ones before it."""
TEXT_CHARACTERS_MAX: Final = 80


class EventType(IntEnum):
    """Event types (PC Client specification §11.3.1, and EV_HASH_START of Intel TXT)."""

    POST_CODE = 0x01
    SEPARATOR = 0x04
    ACTION = 0x05
    S_CRTM_CONTENTS = 0x07
    S_CRTM_VERSION = 0x08
    PLATFORM_CONFIG_FLAGS = 0x0A
    COMPACT_HASH = 0x0C
    IPL = 0x0D
    IPL_PARTITION_DATA = 0x0E
    NONHOST_CODE = 0x0F
    HASH_START = 0x402


_KNOWN_TYPES: Final = frozenset(int(known) for known in EventType)


class EventLogError(Failure):
    """A log file cannot be read as one; it was left as it is."""


@wire
class Event:
    """TCG_PCClientPCREvent."""

    pcr_index: U32LE
    event_type: U32LE
    digest: Digest
    event: Annotated[bytes, cs.Prefixed(cs.Int32ul, cs.GreedyBytes)]

    @property
    def is_consistent(self) -> bool:
        """Whether the digest is that of the event's data: so in every event that we log."""
        return self.digest == sha1(self.event)

    @property
    def text(self) -> str:
        """What was measured, for people; printable whatever the log says."""
        name = EventType(self.event_type).name if self.event_type in _KNOWN_TYPES else "event"
        if self.event_type == EventType.SEPARATOR:
            return "separator"
        first_line = self.event.partition(b"\n")[0].decode("utf-8", "replace")
        said = first_line.removeprefix("vtpm-manifest 1 ")[:TEXT_CHARACTERS_MAX]
        return "".join(c if c.isprintable() else "?" for c in said) or name.lower()


def event_of(pcr_index: int, event_type: EventType, data: bytes) -> Event:
    """Make the event of extending a PCR with the SHA-1 of some data."""
    return Event(pcr_index=pcr_index, event_type=event_type, digest=sha1(data), event=data)


def replay(events: Iterable[Event]) -> dict[int, bytes]:
    """Give the values of all PCRs after TPM_Startup(ST_CLEAR) and these events."""
    values = dict.fromkeys(range(PCR_COUNT), ZERO_DIGEST)
    values.update(dict.fromkeys(DYNAMIC_PCRS, b"\xff" * len(ZERO_DIGEST)))
    for event in events:
        if event.event_type == EventType.HASH_START:
            values.update(dict.fromkeys(DYNAMIC_PCRS, ZERO_DIGEST))
        values[event.pcr_index] = sha1(values[event.pcr_index] + event.digest)
    return values


def since_last_launch(events: Sequence[Event]) -> list[Event]:
    """Leave out events of dynamic PCRs that a later hash sequence has undone."""
    starts = [at for at, event in enumerate(events) if event.event_type == EventType.HASH_START]
    last = starts[-1] if starts else 0
    return [
        event
        for at, event in enumerate(events)
        if at >= last or event.pcr_index not in DYNAMIC_PCRS
    ]


def encode_log(events: Iterable[Event]) -> bytes:
    """Write events as the specification lays them out."""
    return b"".join(encode(event) for event in events)


def decode_log(data: bytes) -> list[Event]:
    """Read events.

    Raises:
        EventLogError: the data is cut off, or has a PCR index or a size that cannot be.
    """
    events: list[Event] = []
    at = 0
    try:
        while at < len(data):
            event, at = decode_from(Event, data, at)
            if event.pcr_index >= PCR_COUNT:
                raise _damaged(f"event {len(events)} is about PCR {event.pcr_index}")
            if len(event.event) > EVENT_BYTES_MAX:
                raise _damaged(f"event {len(events)} has {len(event.event)} bytes")
            events.append(event)
    except DecodeError as error:
        raise _damaged(f"event {len(events)}: {error}") from error
    return events


def write_log(path: Path, events: Iterable[Event]) -> None:
    """Write the log file, whole or not at all, mode 0600.

    Args:
        path: In a directory of mode 0700.
        events: In the order in which they were extended.

    Raises:
        EventLogError: it cannot be written.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)  # left by a launcher that was killed here
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
            file.write(encode_log(events))
        beside.rename(path)
    except OSError as error:
        raise EventLogError(
            f"cannot write the event log {path}",
            why=error.strerror or str(error),
            next_step="Make room, or look at the permissions of the run directory",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def read_log(path: Path) -> list[Event] | None:
    """Read the log file; None where there is none (the platform was not powered on).

    Raises:
        EventLogError: it is damaged.
        UnsafeFile: others could have written it.
    """
    content = read_checked(path, LOG_BYTES_MAX)
    return None if content is None else decode_log(content)


def _damaged(why: str) -> EventLogError:
    return EventLogError(
        "the event log is damaged",
        why=why,
        next_step="It is written anew at the platform's next power-on: vtpm down, vtpm up",
        exit_code=ExitCode.DAMAGED,
    )
