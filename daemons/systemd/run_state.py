"""What the small root programs of the units share in run/vtpm/registry: a lock, numbers, the power.

Everything here is root's; the daemons can read the records and nothing else. Names that begin with
a dot are no records.

Invariant: where anything but a regular file stands in the place of a mark, a counter or a lock,
nobody is held up by it or led elsewhere, it stays as it is, and a Failure tells of it.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from daemons import policy
from daemons.errors import ExitCode, Failure
from daemons.journal import GO_ON
from daemons.launcher.last_domid import (
    COUNTER_NAME,
    domid_of,
    encode_count,
    next_count,
    read_count,
)
from daemons.listeners import describe_file, start_time_of
from daemons.places import DOMAIN0_NAME, Places
from daemons.private_files import read_checked
from daemons.registry import DomainRecord, Registry, RegistryWriter, Role

SYSTEMD_MARKS: Final = {
    "held": "it was created paused, and nobody has started it since",
    "refused": "its last start ended before its process was begun",
    "failures": "how often it has ended by itself, one soon after the other",
    "env": "whether its next process has to go on where the last one was",
}
"""What a domain may have beside its record, and what each is: `.NAME.held` and so on."""
STABLE_S: Final = 60.0
"""Who fails again after more than this has failed for the first time."""
COUNTER_BYTES_MAX: Final = 128
READERS_GROUP: Final = "vtpm"
"""All daemons and domains: they look each other up."""


class RunState:
    """The registry directory, as its writers use it.

    Args:
        places: Of the installation.

    Raises:
        Failure: The installation's group is not there.
    """

    def __init__(self, places: Places) -> None:
        try:
            readers = grp.getgrnam(READERS_GROUP).gr_gid
        except KeyError as error:
            raise Failure(
                "the stack is not set up",
                why=f"there is no group {READERS_GROUP}",
                next_step="systemctl start vtpm-setup.service makes it",
                exit_code=ExitCode.CONFIGURATION,
            ) from error
        self.places = places
        self._directory = places.registry
        self.reader = Registry(places.registry)
        self.writer = RegistryWriter(places.registry, readers)

    @contextlib.contextmanager
    def locked(self, name: str = ".lock") -> Iterator[None]:
        """Hold a lock of this directory.

        Raises:
            Failure: Something else stands in its place.
        """
        path = self._directory / name
        descriptor = _open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def new_domid(self) -> int:
        """Give a domid that no domain has, and that comes again last; the lock is held.

        Raises:
            Failure: It cannot be told which were given out, or be written down which is now.
        """
        records = self.reader.all()
        last = read_count(self._directory, records)
        count = next_count(last, {record.domid for record in records})
        _write(self._directory / COUNTER_NAME, encode_count(count).decode("ascii"))
        return domid_of(count)

    def set_must_go_on(self, name: str, *, must: bool) -> None:
        """Write for a domain's unit whether its process may begin without a journal.

        The unit reads it as an EnvironmentFile. What is to go on must not begin anew because
        somebody took the journal away in between.
        """
        _write(mark_path(self._directory, name, "env"), f"VTPM_GO_ON={GO_ON if must else ''}\n")

    def _hold_mark(self, name: str) -> Path:
        return mark_path(self._directory, name, "held")

    def is_held(self, name: str) -> bool:
        """Tell whether a domain was created paused, and nobody has started it since."""
        return _is_marked(self._hold_mark(name))

    def set_held(self, name: str, *, is_held: bool) -> None:
        """Write down that a domain was created paused, or that it need not be held back."""
        _set_mark(self._hold_mark(name), is_set=is_held)

    def _refusal_mark(self, name: str) -> Path:
        return mark_path(self._directory, name, "refused")

    def is_refused(self, name: str) -> bool:
        """Tell whether the last start of a domain ended before its process was begun.

        With something else in the place of the mark every start ends there.
        """
        return is_there(self._refusal_mark(name))

    @contextlib.contextmanager
    def refused_unless_done(self, name: str) -> Iterator[None]:
        """Mark a domain as refused if what is done here is not done to the end."""
        _set_mark(self._refusal_mark(name), is_set=True)
        yield
        _set_mark(self._refusal_mark(name), is_set=False)

    def count_failure(self, name: str, now_s: float) -> int:
        """Count a process that has ended by itself; how many have, one soon after the other."""
        path = mark_path(self._directory, name, "failures")
        try:
            text, _, last = (read_checked(path, COUNTER_BYTES_MAX) or b"").partition(b" ")
            in_a_row = int(text) if now_s - float(last) < STABLE_S else 0
        except ValueError:
            in_a_row = 0
        _write(path, f"{in_a_row + 1} {now_s}\n")
        return in_a_row + 1

    @property
    def _power_mark(self) -> Path:
        return self._directory / ".powered"

    @property
    def is_powered(self) -> bool:
        """Whether the platform was powered on and the chip has kept its state since."""
        return _is_marked(self._power_mark)

    def set_powered(self, *, powered: bool) -> None:
        """Write down that the firmware has played through, or that the chip lost its state."""
        _set_mark(self._power_mark, is_set=powered)

    @contextlib.contextmanager
    def as_domain0(self) -> Iterator[None]:
        """Let this process be domain 0, the platform's owner; one at a time."""
        with self.locked(".domain0"):
            label = policy.load(self.places.policy).default_label(Role.DOMAIN0)
            self.writer.put(
                DomainRecord(
                    name=DOMAIN0_NAME,
                    domid=0,
                    role=Role.DOMAIN0,
                    label=label,
                    uid=os.geteuid(),
                    pid=os.getpid(),
                    start_time=start_time_of(os.getpid()),
                    localities=(0, 1, 2, 3, 4),
                )
            )
            try:
                yield
            finally:
                self.writer.remove(DOMAIN0_NAME)


def mark_path(registry: Path, name: str, mark: str) -> Path:
    """Give the path of one of a domain's `SYSTEMD_MARKS`."""
    return registry / f".{name}.{mark}"


def inspect_mark(path: Path) -> bool:
    """Tell whether a mark is there; nothing is changed.

    Raises:
        Failure: Something else stands in its place, or it cannot be looked at.
    """
    return _is_marked(path)


def is_there(path: Path) -> bool:
    """Tell whether anything stands at a path: a link counts, wherever it leads.

    Raises:
        Failure: It cannot be looked at.
    """
    return _mode(path) is not None


def _mode(path: Path) -> int | None:
    try:
        return path.lstat().st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(path, error) from error


def _is_marked(path: Path) -> bool:
    mode = _mode(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise _in_the_way(path)
    return mode is not None


def _set_mark(path: Path, *, is_set: bool) -> None:
    if _is_marked(path) is is_set:
        return
    if is_set:
        os.close(_open(path, os.O_WRONLY | os.O_CREAT))
        return
    try:
        path.unlink()
    except OSError as error:
        raise _unusable(path, error) from error


def _write(path: Path, text: str) -> None:
    """Put a small file in the place of the one before; who reads it finds one or the other."""
    _is_marked(path)
    beside = path.with_name(f"{path.name}.new")
    descriptor = _open(beside, os.O_WRONLY | os.O_CREAT)
    try:
        with os.fdopen(descriptor, "wb", buffering=0) as file:
            file.truncate()
            file.write(text.encode("ascii"))
        beside.rename(path)
    except OSError as error:
        raise _unusable(path, error) from error


def _open(path: Path, flags: int) -> int:
    """Open a file of ours, or make it.

    Raises:
        Failure: Something else stands in its place, or it cannot be opened.
    """
    try:
        # O_NONBLOCK: a FIFO in its place must not hold us up.
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _is_marked(path)  # says it better, where it is no file
        raise _unusable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _in_the_way(path)
    return descriptor


def _in_the_way(path: Path) -> Failure:
    return Failure(
        f"cannot use {path}",
        why=f"it is {describe_file(path)}, not an ordinary file",
        next_step="The stack has put no such thing there: look at it, take it away, and try again",
        exit_code=ExitCode.CONFIGURATION,
    )


def _unusable(path: Path, error: OSError) -> Failure:
    return Failure(
        f"cannot use {path}",
        why=error.strerror or str(error),
        next_step="Make room on its file system, and look at its owner and mode",
        exit_code=ExitCode.IO_ERROR,
    )
