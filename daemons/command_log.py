"""Commands in the log, at level debug: ordinal, return code, duration.

None of their operands: more people read a log than a TPM. At any other level it costs the look at
one flag.

A busy program sends tens of thousands a second, and xl config files that say `loglevel=debug` are
common: so there are `LINES_AT_ONCE`, and then `LINES_A_SECOND`; the next one that is written says
how many were left out. All at once, a line a command would double its time, and fill a disk.
"""

from __future__ import annotations

import time
from typing import Any, Final

from daemons import logs
from daemons.lean_structlog import structlog
from protocol.constants import Ordinal

LINES_AT_ONCE: Final = 200
"""Commands that are told however fast they come: more than a program sends to do one thing."""
LINES_A_SECOND: Final = 20.0
"""Commands that are told in the long run."""
_NUMBER: Final = slice(6, 10)
"""Of a command, its ordinal; of a response, its return code."""
_LINE_S: Final = 1 / LINES_A_SECOND
_AHEAD_S: Final = (LINES_AT_ONCE - 0.5) * _LINE_S
"""Between two numbers of lines, so that rounding decides nothing."""


class _Pace:
    """How far the lines of this process are ahead of their pace.

    Two threads that count at the same moment may let one line too many through.

    Attributes:
        caught_up_at: When as many could be written again as if there had been none.
        left_out: Commands not told since the last line.
    """

    caught_up_at = 0.0
    left_out = 0


_pace = _Pace()


def begin() -> float:
    """Give the time for `end`; 0 if this command is not told."""
    if not logs.telling.debug:
        return 0.0
    now = time.monotonic()
    if _pace.caught_up_at - now > _AHEAD_S:
        _pace.left_out += 1
        return 0.0
    return now


def end(begun: float, request: bytes, response: bytes, **who: Any) -> None:  # noqa: ANN401 - as structlog takes it
    """Tell a command that `begin` gave a time for; one without, never.

    Args:
        begun: What `begin` gave.
        request: As it came, well formed or not.
        response: What it is answered.
        who: Whose it is, as fields of the line.
    """
    if begun:
        _pace.caught_up_at = max(_pace.caught_up_at, begun) + _LINE_S
        if _pace.left_out:
            who["left_out"], _pace.left_out = _pace.left_out, 0
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
