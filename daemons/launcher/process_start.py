"""Fork, register, release: the one way in which the launcher starts a process of the stack."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.launcher.domain import PROGRAMS
from daemons.launcher.fork_server import Order
from daemons.launcher.last_words import read_last_words
from daemons.launcher.ready_marks import check_place
from daemons.launcher.spawner import open_log
from daemons.launcher.stack import Stack
from daemons.launcher.supervisor import Launched
from daemons.registry import Role

OOM_SCORES: Final[Mapping[Role, int]] = {Role.GUEST: 200, Role.VTPM: 100}
"""What is lost with a guest is the least."""

_MIB: Final = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """One start of a process.

    Attributes:
        name: Of its domain; names the log.
        role: Tells the program.
        argv: Of the program, without its name.
        register: Called with pid and start time while the process waits at its gate; makes it
            known, or raises.
    """

    name: str
    role: Role
    argv: tuple[str, ...]
    register: Callable[[int, int], None]


async def start_process(stack: Stack, start: Start) -> Launched:
    """Start a process; it does nothing before it is in the registry.

    Raises:
        Failure: As `Spawner.spawn`; or its log or its mark of readiness cannot be opened.
        Exception: What `register` raises; the process has then ended unborn.
    """
    check_place(stack.places, start.name)
    program = PROGRAMS[start.role]
    order = Order(
        program=program,
        argv=start.argv,
        environment=stack.child_environment,
        title=f"{program} {start.name}",
        oom_score_adj=OOM_SCORES.get(start.role, 0),
    )
    log_path = stack.places.log_dir / f"{start.name}.log"
    with open_log(log_path, stack.settings.log_mib_max * _MIB) as log_file:
        since_byte = os.fstat(log_file.fileno()).st_size
        process = await stack.spawner.spawn(order, log_file, log_file)
    try:
        start.register(process.pid, process.start_time)
    except BaseException:
        process.close_gate()
        await process.wait()
        raise
    process.release()
    return Launched(process=process, last_words=lambda: read_last_words(log_path, since_byte))


def empty_directory(directory: Path, kept: Container[str] = ()) -> None:
    """Remove what an ended process of a domain has left in its run directory.

    Args:
        directory: Of the domain.
        kept: Names of what the next process needs.
    """
    for entry in directory.iterdir():
        if entry.name in kept:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)
