"""The settings of each daemon: frozen dataclasses, filled from etc/vtpm/DAEMON.toml if it is there.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar, get_type_hints

from daemons.errors import ExitCode, Failure
from daemons.launcher.supervisor import Limits
from daemons.private_files import read_checked
from daemons.ring_server import RingSettings
from daemons.strict_toml import Table, TomlError
from daemons.tis_server import TisSettings

SETTINGS_BYTES_MAX: Final = 64 * 1024
SECONDS_MAX: Final = 24 * 3600.0
COUNT_MAX: Final = 65536
LOG_LEVELS: Final = ("error", "warning", "info", "debug")

_Settings = TypeVar("_Settings")


class SettingsError(Failure):
    """A settings file is not understood; the daemon does not start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """Of launcherd."""

    log_level: str = "info"
    control_connections_max: int = 64
    """Programs that talk to the launcher at the same time."""
    destroy_drain_s: float = 2.0
    """From SIGTERM to SIGKILL where a domain ends at once (destroy, death of what it needs)."""
    backend_wait_s: float = 20.0
    """How long `create` waits for a backend that nobody has created; the domain goes on waiting."""
    log_mib_max: int = 16
    """A domain's log that is longer when its process starts is put aside, once."""
    supervisor: Limits = field(default_factory=Limits)
    """Start, stop and restart of the domains' processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HwtpmdSettings:
    """Of hwtpmd."""

    log_level: str = "info"
    tis: TisSettings = field(default_factory=TisSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmmgrdSettings:
    """Of vtpmmgrd."""

    log_level: str = "info"
    administrators: str = ""
    """Labels of vTPMs whose guests may administer the manager, with commas; `*` may be the user."""
    seal_pcrs: str = "0-7,17-19"
    """PCRs of the chip that must be as they were when the manager's key was sealed."""
    rings: RingSettings = field(default_factory=RingSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmdSettings:
    """Of vtpmd."""

    log_level: str = "info"
    rings: RingSettings = field(default_factory=RingSettings)
    reconnect_s: float = 60.0
    """How long a request waits for a manager that went away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestdSettings:
    """Of guestd."""

    log_level: str = "info"
    clients_max: int = 64
    """Programs that have tpm0 open at the same time."""
    reconnect_s: float = 60.0
    """How long a command waits for a vTPM that went away."""


def load(path: Path, kind: type[_Settings]) -> _Settings:
    """Read a daemon's settings; the defaults where there is no file.

    Args:
        path: etc/vtpm/DAEMON.toml.
        kind: One of the dataclasses above.

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
