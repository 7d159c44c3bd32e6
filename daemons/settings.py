"""Settings of a daemon: its frozen dataclass, filled from etc/vtpm/DAEMON.toml if that is there.

A file says only what differs from the defaults:

    log_level = "debug"
    [rings]
    rings_max = 32

Invariants:
- Every value has a default, a unit at the end of its name, and a range.
- A key that the daemon does not have is an error with its line, not a silent nothing.
- Read once at the start, then passed down.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

from daemons.errors import ExitCode, Failure
from daemons.private_files import read_checked
from daemons.strict_toml import Table, TomlError

SETTINGS_BYTES_MAX: Final = 64 * 1024
SECONDS_MAX: Final = 24 * 3600.0
COUNT_MAX: Final = 65536
LOG_LEVELS: Final = ("error", "warning", "info", "debug")

_Settings = TypeVar("_Settings")


class SettingsError(Failure):
    """A settings file is not understood; the daemon does not start."""


def load(path: Path, kind: type[_Settings]) -> _Settings:
    """Read a daemon's settings; the defaults where there is no file.

    Args:
        path: etc/vtpm/DAEMON.toml.
        kind: The daemon's own dataclass.

    Raises:
        SettingsError: the file is not understood.
        UnsafeFile: others could have written it.
    """
    content = read_checked(path, SETTINGS_BYTES_MAX)
    return kind() if content is None else parse(content, kind, str(path))


def parse(content: bytes, kind: type[_Settings], source: str) -> _Settings:
    """Read settings from TOML.

    Raises:
        SettingsError: not TOML, an unknown key, or a value out of its range; it says where.
    """
    try:
        return _filled(Table.parse(content), kind)
    except TomlError as error:
        raise SettingsError(
            f"the settings {source} are refused",
            why=str(error),
            next_step="Correct the file, or remove it to have the defaults",
            exit_code=ExitCode.CONFIGURATION,
        ) from error


def _filled(table: Table, kind: type[_Settings]) -> _Settings:
    defaults: Any = kind()
    types = get_type_hints(kind)
    values: dict[str, object] = {}
    for name in (declared.name for declared in dataclasses.fields(defaults)):
        default = getattr(defaults, name)
        if dataclasses.is_dataclass(default):
            values[name] = _filled(table.take_table(name), types[name])
        elif types[name] is int:
            values[name] = table.take_integer(name, default, 1, COUNT_MAX)
        elif types[name] is float:
            values[name] = table.take_number(name, default, 0.01, SECONDS_MAX)
        elif name == "log_level":
            values[name] = table.take_choice(name, default, LOG_LEVELS)
        elif types[name] is str:
            values[name] = table.take_text(name, default)
        else:
            raise TypeError(f"{kind.__name__}.{name} is of a type that settings do not have")
    table.finish()
    return kind(**values)
