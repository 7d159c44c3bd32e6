"""Commands in the log, at level debug: ordinal, return code, duration.

None of their operands: more people read a log than a TPM. At any other level it costs the look at
one flag.
"""

from __future__ import annotations

import time
from typing import Any, Final

from daemons import logs
from daemons.lean_structlog import structlog
from protocol.constants import Ordinal

_NUMBER: Final = slice(6, 10)
"""Of a command, its ordinal; of a response, its return code."""


def begin() -> float:
    """Give the time for `end`; 0 if commands are not told."""
    return time.monotonic() if logs.tells_debug() else 0.0


def end(begun: float, request: bytes, response: bytes, **who: Any) -> None:  # noqa: ANN401 - as structlog takes it
    """Tell a command that `begin` gave a time for; one without, never.

    Args:
        begun: What `begin` gave.
        request: As it came, well formed or not.
        response: What it is answered.
        who: Whose it is, as fields of the line.
    """
    if begun:
        structlog.get_logger().debug(
            "command",
            **who,
            ordinal=_ordinal(request),
            result=f"0x{response[_NUMBER].hex()}",
            ms=round((time.monotonic() - begun) * 1000, 2),
        )


def _ordinal(request: bytes) -> str:
    number = int.from_bytes(request[_NUMBER], "big")
    try:
        return Ordinal(number).name
    except ValueError:
        return f"0x{number:08x}"
