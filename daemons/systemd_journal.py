"""systemd's journal: an event as fields, to be asked for by domain and by what happened.

| Field | What |
|---|---|
| MESSAGE | the line that a person reads |
| MESSAGE_ID | the same number for each event of one kind, in every version that words it so |
| PRIORITY | as syslog has it |
| SYSLOG_IDENTIFIER | the program |
| VTPM_DOMAIN | the domain it works for |
| VTPM_EVENT | what happened, in the words of the kind |
| VTPM_... | what is told with it: VTPM_REASON, VTPM_WHY, VTPM_UUID ... |

The unit is added by the journal itself. Spec: systemd.journal-fields(7) and its native protocol.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from uuid import UUID, uuid5

SOCKET: Final = Path("/run/systemd/journal/socket")
PRIORITIES: Final = {"critical": 2, "error": 3, "warning": 4, "info": 6, "debug": 7}
KINDS: Final = UUID("d6a2f3a0-5e7b-4c59-9f0c-3d9a4f1f1b52")
"""The name space of our message ids."""

_NO_NAME: Final = re.compile(r"[^A-Z0-9_]")


def is_our_stderr(environ: Mapping[str, str], descriptor: int = 2) -> bool:
    """Tell whether what this process writes to stderr goes to the journal (JOURNAL_STREAM)."""
    try:
        status = os.fstat(descriptor)
    except OSError:
        return False
    return environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def message_id(event: str) -> str:
    """Give the id of a kind of event."""
    return uuid5(KINDS, event).hex


def encode_entry(fields: Mapping[str, str]) -> bytes:
    """Write fields as the journal takes them: one a line, or with its length if it has lines."""
    parts = []
    for name, text in fields.items():
        value = text.encode("utf-8", "backslashreplace")
        if b"\n" in value:
            parts.append(name.encode() + b"\n" + struct.pack("<Q", len(value)) + value + b"\n")
        else:
            parts.append(name.encode() + b"=" + value + b"\n")
    return b"".join(parts)


def field_name(key: str) -> str:
    """Give the field for a key of an event."""
    return "VTPM_" + _NO_NAME.sub("_", key.upper())[:58]


class Journal:
    """Sends entries; what the journal does not take is written to stderr as a line."""

    def __init__(self, address: Path = SOCKET) -> None:
        self._address = str(address)

    def send(self, fields: Mapping[str, str]) -> None:
        """Send one entry."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.sendto(encode_entry(fields), self._address)
        except OSError:  # too long, or the journal is away: stderr is kept for it by systemd
            print(fields["MESSAGE"], file=sys.stderr, flush=True)  # noqa: T201
