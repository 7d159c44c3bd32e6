"""A launcher that was killed leaves its domains serving; the next one takes them over as they are.

What it needs is on disk: the registry names every domain with its process, each domain's run
directory has its config file, and a marker says that the chip has its power, since which boot of
the machine. Processes that died meanwhile are started again and go on from their journals, unless
their config has another on_crash; who was to stay down does (`wishes.py`). Where a record is older
than the process that serves, nobody is started beside it.

Not taken over: a domain that was created paused and never started, and a process from outside
(`attach_external`), which is no guest any longer. How often a domain was started begins anew.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.journal import boot_id
from daemons.launcher.last_domid import read_count
from daemons.launcher.last_words import read_last_words
from daemons.launcher.processes import is_alive, is_stopped, send_signal
from daemons.launcher.ready_marks import contradictions, has_served, note_ready
from daemons.launcher.supervisor import Launched
from daemons.launcher.waiting import wait_for_end
from daemons.launcher.wishes import Noted, Wish, read_wish
from daemons.lean_structlog import structlog
from daemons.listeners import SOCKET_PATH_BYTES_MAX, served_paths
from daemons.places import CHIP_NAME, Places
from daemons.private_files import UnsafeFile, read_checked
from daemons.registry import DomainRecord, Registry, Role, served_at
from daemons.xl.domain_config import Action, parse_domain

MARKER_NAME: Final = "powered"
MARKER_BYTES_MAX: Final = 64
CONFIG_BYTES_MAX: Final = 1 << 20

log = structlog.get_logger()


class AdoptedProcess:
    """A process that an earlier launcher has started; its parent is that launcher's fork server."""

    def __init__(self, pid: int, start_time: int) -> None:
        self.pid = pid
        self.start_time = start_time

    def release(self) -> None:
        """It has long been released."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole process group; nothing happens when it has ended."""
        if is_alive(self.pid, self.start_time):
            try:
                os.killpg(self.pid, number)
            except (ProcessLookupError, PermissionError):
                send_signal(self.pid, self.start_time, number)

    async def wait(self) -> int | None:
        """Wait for its end; how it ended is for its parent to see."""
        await wait_for_end(self.pid, self.start_time)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class OldStack:
    """What an earlier launcher has left under a root whose chip has its power.

    Attributes:
        chip: The chip's record.
        domains: Records of the others, in the order of their domids.
        configs: The config file of each that was to be started.
        wishes: What is wanted of those whose process ended under its launcher's eyes, as noted.
        domids_given: How many domids were given out.
    """

    chip: DomainRecord
    domains: tuple[DomainRecord, ...]
    configs: dict[str, str]
    wishes: dict[str, Noted]
    domids_given: int


def note_power(places: Places) -> None:
    """Write down that the chip has its power, and its firmware has played through.

    Raises:
        Failure: It cannot be.
    """
    marker = _marker(places)
    # Neither a symlink nor a FIFO that somebody put there leads or holds the launcher anywhere.
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(marker, flags, 0o600), "wb", buffering=0) as file:
            file.truncate()  # fails where it is no file
            try:
                file.write(boot_id().hex().encode("ascii"))
            except OSError:
                with contextlib.suppress(OSError):
                    marker.unlink()
                raise
    except OSError as error:
        raise _cannot_note("that the hardware TPM has its power", marker, error) from error


def forget_power(places: Places) -> None:
    """Write down that it has none.

    Raises:
        Failure: It cannot be.
    """
    marker = _marker(places)
    try:
        marker.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_note("that the hardware TPM has no power", marker, error) from error


def _marker(places: Places) -> Path:
    return places.run / MARKER_NAME


def find_old_stack(places: Places) -> OldStack | None:
    """Look for what can be taken over.

    Returns:
        None when there is nothing: no stack was up, or the machine was booted since.

    Raises:
        Failure: Something of it is damaged. Nothing was touched, and what serves goes on serving.
    """
    records = {record.name: record for record in Registry(places.registry).all()}
    _require_newest(places, records)
    chip = records.get(CHIP_NAME)
    others = [
        record for record in records.values() if record.role not in {Role.DOMAIN0, Role.HWTPM}
    ]
    marker = read_checked(_marker(places), MARKER_BYTES_MAX)
    if marker != boot_id().hex().encode("ascii") or chip is None:
        _require_nobody(places, marker, others)
        return None
    configs, wishes = {}, {}
    for record in others:
        text = _config_of(places, record)
        if text is not None:
            configs[record.name] = text
        noted = _wish_of(places, record.name)
        if noted is not None:
            wishes[record.name] = noted
    return OldStack(
        chip=chip,
        domains=tuple(others),
        configs=configs,
        wishes=wishes,
        domids_given=_domids_given(places, others),
    )


def _require_nobody(places: Places, marker: bytes | None, others: list[DomainRecord]) -> None:
    """Before the chip has its power nothing starts above it, and no process outlives a boot."""
    alive = [
        record.name
        for record in others
        if record.pid and record.start_time and is_alive(record.pid, record.start_time)
        if _has_config(places, record.name)  # else it was not started by a launcher
    ]
    if alive:
        mark = "is gone" if marker is None else "is not of this boot"
        raise _cannot_take_over(
            f"the mark {_marker(places)} that the chip has its power {mark},"
            f" and yet {', '.join(alive)} run{'s' if len(alive) == 1 else ''}"
        )


def _domids_given(places: Places, others: list[DomainRecord]) -> int:
    """No guess: a guest that got a number again would boot on a vTPM that is not reset."""
    try:
        return read_count(places.registry, others)
    except UnsafeFile as failure:
        raise _cannot_take_over(f"{failure.what}: {failure.why}") from failure


def _has_config(places: Places, name: str) -> bool:
    path = places.domain(name).config
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _cannot_take_over(f"{path} cannot be looked at ({error.strerror})") from error
    return True


def _require_newest(places: Places, records: Mapping[str, DomainRecord]) -> None:
    """Who serves is who the records name."""
    for path, why in contradictions(places, records).items():
        raise _cannot_take_over(f"{path} {why}")


def _config_of(places: Places, record: DomainRecord) -> str | None:
    """The config file of a domain; None when no launcher has started it."""
    path = places.domain(record.name).config
    try:
        content = read_checked(path, CONFIG_BYTES_MAX)
        if content is None:
            if record.pid is None or not path.parent.is_dir():
                return None
            raise _cannot_take_over(f"{path} is gone")
        text = content.decode("utf-8")
        config = parse_domain(text, str(path))
    except UnicodeDecodeError as error:
        raise _cannot_take_over(f"{path} is no text") from error
    except UnsafeFile as failure:
        raise _cannot_take_over(f"{failure.what}: {failure.why}") from failure
    except Failure as failure:
        raise _cannot_take_over(f"{path} is damaged: {failure.why}") from failure
    if (config.name, config.role) != (record.name, record.role):
        raise _cannot_take_over(
            f"{path} is the config of the {config.role.value} {config.name},"
            f" not of the {record.role.value} {record.name}"
        )
    return text


def _wish_of(places: Places, name: str) -> Noted | None:
    try:
        return read_wish(places, name)
    except UnsafeFile as failure:
        raise _cannot_take_over(f"{failure.what}: {failure.why}") from failure


def _cannot_note(what: str, path: Path, error: OSError) -> Failure:
    return Failure(
        f"cannot note {what}",
        why=f"{path}: {error.strerror or error}",
        next_step="Make room on its file system, and look at its owner and mode",
        exit_code=ExitCode.IO_ERROR,
    )


def _cannot_take_over(why: str) -> Failure:
    return Failure(
        "cannot take over what an earlier launcher has left",
        why=why,
        next_step="What serves goes on serving. Put the file back, then: vtpm up. Or end all of it"
        " in order, and start afresh: vtpm down",
        exit_code=ExitCode.DAMAGED,
    )


def living_process(places: Places, record: DomainRecord) -> Callable[[], Launched] | None:
    """Find the living process of a record.

    Returns:
        None when it is dead; else what gives it to its supervisor as if it had just been started.
    """
    pid, start_time = record.pid, record.start_time
    if pid is None or start_time is None or not is_alive(pid, start_time):
        return None
    log_path = places.log_dir / f"{record.name}.log"
    try:
        since_byte = log_path.lstat().st_size
    except OSError:
        since_byte = 0  # it is not there, or cannot be looked at: then no words are read either

    def launched() -> Launched:
        return Launched(
            process=AdoptedProcess(pid, start_time),
            last_words=lambda: read_last_words(log_path, since_byte),
            # One that was not when its launcher was killed may have no journal that the next
            # process could go on from.
            is_ready=_was_ready(places, record.name, record.role, pid, start_time),
            is_standing=is_stopped(pid),
        )

    return launched


def _was_ready(places: Places, name: str, role: Role, pid: int, start_time: int) -> bool:
    """Whether a living process was ready, be it when no launcher could hear of it."""
    if has_served(places, name, pid, start_time):
        return True
    if not _is_served(places, name, role):
        return False
    # What cannot be noted, because something else stands there, counts as noted (`was_ready`).
    with contextlib.suppress(Failure):
        note_ready(places, name, role, pid)
    return True


def _is_served(places: Places, name: str, role: Role) -> bool:
    socket = served_at(places, name, role)
    if len(os.fsencode(socket)) > SOCKET_PATH_BYTES_MAX:
        return True  # of such a path it cannot be told, and who lives has most likely been ready
    try:
        return str(socket) in served_paths()
    except OSError:
        return True


def what_keeps_down(
    places: Places, record: DomainRecord, on_crash: Action, noted: Noted | None
) -> Noted | None:
    """Why a domain whose process is dead is not started again; None if it is.

    A process that had served, and died when no launcher saw it, has crashed. One that had not was
    still being started, and so it is.
    """
    if noted is not None:
        return None if noted.wish is Wish.RESTART else noted
    pid, start_time = record.pid, record.start_time
    if on_crash is Action.RESTART or pid is None or start_time is None:
        return None
    if not has_served(places, record.name, pid, start_time):
        return None
    return Noted(Wish.CRASHED, "its process ended while no launcher ran")


def say_adopted(names: list[str]) -> None:
    """Tell who was taken over."""
    log.warning("an earlier launcher was killed; took its domains over", domains=" ".join(names))


def say_destroyed(name: str) -> None:
    """Tell whose crash was the end of it."""
    log.warning("a domain crashed while no launcher ran; on_crash=destroy is done", domain=name)


def say_left(record: DomainRecord, failure: Failure | None) -> None:
    """Tell who could not be."""
    why = (
        "it was not started by a launcher" if failure is None else f"{failure.what}: {failure.why}"
    )
    log.warning("a domain of an earlier launcher is not taken over", domain=record.name, why=why)
