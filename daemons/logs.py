"""Logging of all daemons: one line an event on stderr, readable for people or (JSON) for programs.

The launcher sends a domain's stderr to its log file. Where stderr is systemd's journal, an event
goes there with its fields (`systemd_journal.py`).

- Texts that come from outside (names, reasons, labels) cannot forge a line or drive a terminal:
  control characters are escaped, and long texts are cut.
- A log that cannot be written (disk full, reader gone) never stops the daemon.
- Nobody can fill a disk with lines: of one event, whoever causes it, there are `LINES_AT_ONCE` and
  then `LINES_A_SECOND`; the next one that is written says how many were left out. Debug lines,
  which somebody has asked for, are all written (`command_log.py` has a pace of its own).
- Secrets do not come here at all: their types hide themselves.
- structlog is imported when logging is set up: it brings asyncio along, 50 ms that a program which
  writes two lines (`write_line`) need not pay.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TextIO

from daemons.errors import ExitCode, Failure
from daemons.systemd_journal import PRIORITIES, Journal, field_name, is_our_stderr, message_id

LEVELS: Final = {"error": 40, "warning": 30, "info": 20, "debug": 10}
"""The names of xl's `loglevel=` and of the settings, and structlog's numbers for them."""
TEXT_CHARS_MAX: Final = 1024
LINES_AT_ONCE: Final = 200
"""Lines of one event that are written however fast they come."""
LINES_A_SECOND: Final = 1.0
"""Lines of one event in the long run: 15 kB a minute."""

EventDict = MutableMapping[str, Any]


class _Telling:
    """What this process writes.

    Attributes:
        debug: Lines of level debug.
    """

    debug = False


telling = _Telling()
"""To be looked at before a line is made whose making would cost a command time."""


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
        level: "error", "warning", "info" or "debug": nothing below it is written.
        as_json: One JSON object a line in place of the readable form.
        stream: Where lines go; stderr when None.

    Raises:
        Failure: There is no such level.
    """
    from daemons.lean_structlog import structlog  # noqa: PLC0415 - see above

    wrapper_class = _wrapper_class(level)

    def bind(_logger: object, _method: str, event: EventDict) -> EventDict:
        event["program"] = program
        if domain is not None:
            event["domain"] = domain
        event["time"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        return event

    allowance = Allowance()

    def leave_out(_logger: object, method: str, event: EventDict) -> EventDict:
        if method == "debug":
            return event
        left_out = allowance.take(str(event["event"]))
        if left_out is None:
            raise structlog.DropEvent
        if left_out:
            event["left_out"] = left_out
        return event

    is_journal = stream is None and not as_json and is_our_stderr(os.environ)
    render = render_json if as_json else render_line
    journal = _Entries(Journal()) if is_journal else None
    structlog.configure(
        processors=[
            leave_out,
            structlog.processors.add_log_level,
            bind,
            structlog.processors.format_exc_info,
            render_fields if is_journal else render,
        ],
        wrapper_class=wrapper_class,
        logger_factory=lambda *_: journal or _Lines(stream or sys.stderr),
        cache_logger_on_first_use=False,
    )


def set_level(level: str) -> None:
    """Write from now on what is not below a level; all else stays as `configure` has set it.

    Args:
        level: As for `configure`.

    Raises:
        Failure: There is no such level.
    """
    from daemons.lean_structlog import structlog  # noqa: PLC0415 - see above

    structlog.configure(**(structlog.get_config() | {"wrapper_class": _wrapper_class(level)}))


def _wrapper_class(level: str) -> type[Any]:
    from daemons.lean_structlog import structlog  # noqa: PLC0415 - see above

    if level not in LEVELS:
        raise Failure(
            "cannot set up logging",
            why=f"there is no level {escape(level)}",
            next_step=f"Choose one of: {', '.join(LEVELS)}.",
            exit_code=ExitCode.CONFIGURATION,
        )
    telling.debug = level == "debug"
    wrapper_class: type[Any] = structlog.make_filtering_bound_logger(LEVELS[level])
    return wrapper_class


class Allowance:
    """How many lines of each event may be written now.

    Events are named in the source, so there are few. Two threads that count at the same moment may
    let one line too many through.

    Args:
        clock: Seconds, from anywhere.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._events: dict[str, tuple[float, float, int]] = {}  # allowed, at which time; left out

    def take(self, event: str) -> int | None:
        """Ask for a line.

        Returns:
            How many of this event were left out since the last one; None when this is left out.
        """
        now = self._clock()
        allowed, then, left_out = self._events.get(event, (float(LINES_AT_ONCE), now, 0))
        allowed = min(float(LINES_AT_ONCE), allowed + (now - then) * LINES_A_SECOND)
        if allowed < 1:
            self._events[event] = allowed, now, left_out + 1
            return None
        self._events[event] = allowed - 1, now, 0
        return left_out


def get_logger() -> Any:  # noqa: ANN401 - structlog's own type, which is not imported here
    """Structlog's logger, for modules of programs that may do without structlog.

    A program that has not set logging up gets lines in the usual form.
    """
    from daemons.lean_structlog import structlog  # noqa: PLC0415 - as in `configure`

    if not structlog.is_configured():
        configure(Path(sys.argv[0]).name)
    return structlog.get_logger()


def write_line(program: str, level: str, event: str, /, **values: object) -> None:
    """Write one line to stderr, in the readable form, without setting anything up."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    line = {"event": event, "program": program, "level": level, "time": now, **values}
    _Lines(sys.stderr).info(render_line(None, level, line))


class _Lines:
    """Writes finished lines to a stream; survives one that takes none, and that there is none."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def info(self, line: str) -> None:
        if self._stream is None:  # the process was started with it closed
            return
        with contextlib.suppress(OSError, ValueError):  # ValueError: the stream was closed
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = warning = error = critical = exception = info


class _Entries:
    """Sends finished entries to the journal."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def info(self, fields: Mapping[str, str]) -> None:
        self._journal.send(fields)

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
    at, level = event.pop("time"), event.pop("level")
    program, domain = event.pop("program"), event.pop("domain", None)
    traceback = event.pop("exception", None)
    who = program if domain is None else f"{program}[{escape(str(domain))}]"
    parts = [f"{at} {level:<5} {who}", escape(str(event.pop("event")))]
    parts += [f"{name}={_shown(value)}" for name, value in event.items()]
    lines = [" ".join(parts)]
    if traceback:
        lines += [f"    {escape(line)}" for line in str(traceback).splitlines()]
    return "\n".join(lines)


def render_fields(
    _logger: object, _method: str, event: EventDict
) -> tuple[tuple[dict[str, str]], dict[str, Any]]:
    """Make the fields of a journal entry; time and program are the journal's, not the line's."""
    event.pop("time")
    level, program, domain = event.pop("level"), event.pop("program"), event.pop("domain", None)
    traceback, what = event.pop("exception", None), str(event.pop("event"))
    line = " ".join([escape(what), *(f"{name}={_shown(value)}" for name, value in event.items())])
    if traceback:
        line += "".join(f"\n    {escape(text)}" for text in str(traceback).splitlines())
    fields = {
        "MESSAGE": line,
        "MESSAGE_ID": message_id(what),
        "PRIORITY": str(PRIORITIES.get(level, PRIORITIES["info"])),
        "SYSLOG_IDENTIFIER": program,
        "VTPM_EVENT": escape(what),
    }
    if domain is not None:
        fields["VTPM_DOMAIN"] = escape(str(domain))
    fields |= {field_name(name): escape(str(_plain(value))) for name, value in event.items()}
    return (fields,), {}


def _plain(value: object) -> object:
    return value.hex() if isinstance(value, bytes) else value


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
