"""Logging of all daemons: one line an event on stderr, readable for people or (JSON) for programs.

The launcher sends a domain's stderr to its log file; systemd sends it to the journal.

- Texts that come from outside (names, reasons, labels) cannot forge a line or drive a terminal:
  control characters are escaped, and long texts are cut.
- A log that cannot be written (disk full, reader gone) never stops the daemon.
- Secrets do not come here at all: their types hide themselves.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import structlog

from daemons.errors import ExitCode, Failure

LEVELS: Final = {"error": 40, "info": 20, "debug": 10}
"""The names of xl's `loglevel=`, and structlog's numbers for them."""
TEXT_CHARS_MAX: Final = 1024

EventDict = MutableMapping[str, Any]


def configure(
    program: str,
    domain: str | None = None,
    level: str = "info",
    *,
    as_json: bool = False,
    stream: TextIO | None = None,
) -> None:
    """Set up structlog for this process. May be called again when the domain is known.

    Args:
        program: The daemon's name ("vtpmd"); part of every line.
        domain: The domain it works for; part of every line.
        level: "error", "info" or "debug": nothing below it is written.
        as_json: One JSON object a line in place of the readable form.
        stream: Where lines go; stderr when None.

    Raises:
        Failure: There is no such level.
    """
    if level not in LEVELS:
        raise Failure(
            "cannot set up logging",
            why=f"there is no level {escape(level)}",
            next_step=f"Choose one of: {', '.join(LEVELS)}.",
            exit_code=ExitCode.CONFIGURATION,
        )

    def bind(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["program"] = program
        if domain is not None:
            event["domain"] = domain
        event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        return event

    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            bind,
            structlog.processors.format_exc_info,
            render_json if as_json else render_line,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: _Lines(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )


class _Lines:
    """Writes finished lines to a stream and survives a stream that takes none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def info(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = warning = error = critical = exception = info


def escape(text: str) -> str:
    r"""Make a text from outside harmless: the unprintable becomes `\xNN`, long texts are cut."""
    if len(text) > TEXT_CHARS_MAX:
        text = f"{text[:TEXT_CHARS_MAX]}... ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )


def render_line(_logger: object, _method: str, event: EventDict) -> str:
    """Write `TIME level program[domain] event key=value ...`; a traceback goes on its own lines."""
    time, level = event.pop("time"), event.pop("level")
    program, domain = event.pop("program"), event.pop("domain", None)
    traceback = event.pop("exception", None)
    who = program if domain is None else f"{program}[{escape(str(domain))}]"
    parts = [f"{time} {level:<5} {who}", escape(str(event.pop("event")))]
    parts += [f"{name}={_shown(value)}" for name, value in event.items()]
    lines = [" ".join(parts)]
    if traceback:
        lines += [f"    {escape(line)}" for line in str(traceback).splitlines()]
    return "\n".join(lines)


def render_json(_logger: object, _method: str, event: EventDict) -> str:
    """Write one JSON object in one ASCII line."""
    shape = {
        name: value if isinstance(value, int | float | bool | None) else _cut(name, value)
        for name, value in event.items()
    }
    return json.dumps(shape)


def _cut(name: str, value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    return text if name == "exception" else text[:TEXT_CHARS_MAX]


def _shown(value: object) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value)
    text = escape(text)
    if not text or any(c in ' "=' for c in text):
        return '"' + text.replace('"', '\\"') + '"'
    return text
