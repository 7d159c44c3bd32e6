"""How much a process logs: the one thing that may change while it runs.

    level = "warning"          # of everybody, in place of their own settings
    [levels]
    vtpm-guest1 = "debug"      # of one: a domain, hwtpm, or launcher

The file is etc/vtpm/log-levels.toml. It is read at the start of each process and when that is told
to reload (SIGHUP). Settings and policy are measured when the platform starts, so that what is in
PCR 1, 5 and 17 is what runs: they are read once. This file is not measured. It decides nothing but
how much is written down, and what is written holds no secret at any level.

- A file that cannot be used changes nothing, and stops nobody: a TPM is not refused over its log.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons import logs
from daemons.errors import ExitCode, Failure
from daemons.lean_structlog import structlog
from daemons.private_files import read_checked
from daemons.settings import LOG_LEVELS
from daemons.strict_toml import Table, TomlError

FILE_BYTES_MAX: Final = 64 * 1024
LAUNCHER: Final = "launcher"
OWN: Final = ""
"""No level of the file's: the process's own setting holds."""


@dataclass(frozen=True, slots=True)
class _Following:
    path: Path
    name: str
    own: str

    def take(self) -> str:
        level = read_levels(self.path).of(self.name) or self.own
        logs.set_level(level)
        return level


_following = _Following(Path("/nowhere"), "", "info")
"""Of this process, as its logging is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levels:
    """What the file says.

    Attributes:
        everybody: The level of who is not named; `OWN` if the file has none.
        named: The levels of those that are.
    """

    everybody: str = OWN
    named: dict[str, str]

    def of(self, name: str) -> str:
        """Give the level of a process, or `OWN`."""
        return self.named.get(name, self.everybody)


def read_levels(path: Path) -> Levels:
    """Read the file; one that is not there says nothing.

    Raises:
        Failure: It is not understood, or others could have written it.
    """
    content = read_checked(path, FILE_BYTES_MAX)
    if content is None:
        return Levels(named={})
    try:
        table = Table.parse(content)
        everybody = table.take_choice("level", OWN, LOG_LEVELS) if table.has("level") else OWN
        named = table.take_table("levels")
        levels = {name: named.take_choice(name, OWN, LOG_LEVELS) for name in named.names()}
        table.finish()
    except TomlError as error:
        raise Failure(
            f"the log levels {path} are refused",
            why=str(error),
            next_step="Correct the file and reload again, or remove it",
            exit_code=ExitCode.CONFIGURATION,
        ) from error
    return Levels(everybody=everybody, named=levels)


def follow(path: Path, name: str, own: str) -> None:
    """Take this process's level from the file from now on; for the end of its set-up.

    Args:
        path: `Places.log_levels`.
        name: Of the domain, hwtpm, or `LAUNCHER`.
        own: What its settings say.
    """
    global _following  # noqa: PLW0603 - a process has one log
    _following = _Following(path, name, own)
    logs.set_level(own)
    _take()


def read_again() -> None:
    """Read the file again, and log by it."""
    if (level := _take()) is not None:
        structlog.get_logger().info("reloaded", log_level=level)


def _take() -> str | None:
    try:
        return _following.take()
    except Failure as failure:
        structlog.get_logger().error(
            failure.what, why=failure.why, next_step=failure.next_step, effect="the level stays"
        )
        return None
