"""What the small root programs of the units share in run/vtpm/registry: a lock, numbers, the power.

Everything here is root's; the daemons can read the records and nothing else. Names that begin with
a dot are no records.
"""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from daemons import policy
from daemons.errors import ExitCode, Failure
from daemons.journal import GO_ON
from daemons.launcher.domain import DOMID_MAX
from daemons.listeners import start_time_of
from daemons.places import DOMAIN0_NAME, Places
from daemons.registry import DomainRecord, Registry, RegistryWriter, Role

STABLE_S: Final = 60.0
"""Who fails again after more than this has failed for the first time."""
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
        """Hold a lock of this directory."""
        descriptor = os.open(
            self._directory / name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def new_domid(self) -> int:
        """Give a domid that no domain has, and that comes again last; the lock is held."""
        taken = {record.domid for record in self.reader.all()}
        counter = self._directory / ".last-domid"
        try:
            last = int(counter.read_text("ascii"))
        except (FileNotFoundError, ValueError):
            last = 0
        while True:
            last = last % DOMID_MAX + 1
            if last not in taken:
                counter.write_text(f"{last}\n", "ascii")
                return last

    def set_must_go_on(self, name: str, *, must: bool) -> None:
        """Write for a domain's unit whether its process may begin without a journal.

        The unit reads it as an EnvironmentFile. What is to go on must not begin anew because
        somebody took the journal away in between.
        """
        path = self._directory / f".{name}.env"
        beside = path.with_name(f"{path.name}.new")
        beside.write_text(f"VTPM_GO_ON={GO_ON if must else ''}\n", "ascii")
        beside.rename(path)

    def _hold_mark(self, name: str) -> Path:
        return self._directory / f".{name}.held"

    def is_held(self, name: str) -> bool:
        """Tell whether a domain was created paused, and nobody has started it since."""
        return self._hold_mark(name).exists()

    def set_held(self, name: str, *, is_held: bool) -> None:
        """Write down that a domain was created paused, or that it need not be held back."""
        if is_held:
            self._hold_mark(name).touch(0o600)
        else:
            self._hold_mark(name).unlink(missing_ok=True)

    def _refusal_mark(self, name: str) -> Path:
        return self._directory / f".{name}.refused"

    def is_refused(self, name: str) -> bool:
        """Tell whether the last start of a domain ended before its process was begun."""
        return self._refusal_mark(name).exists()

    @contextlib.contextmanager
    def refused_unless_done(self, name: str) -> Iterator[None]:
        """Mark a domain as refused if what is done here is not done to the end."""
        self._refusal_mark(name).touch(0o600)
        yield
        self._refusal_mark(name).unlink()

    def count_failure(self, name: str, now_s: float) -> int:
        """Count a process that has ended by itself; how many have, one soon after the other."""
        path = self._directory / f".{name}.failures"
        try:
            text, _, last = path.read_text("ascii").partition(" ")
            in_a_row = int(text) if now_s - float(last) < STABLE_S else 0
        except (FileNotFoundError, ValueError):
            in_a_row = 0
        path.write_text(f"{in_a_row + 1} {now_s}\n", "ascii")
        return in_a_row + 1

    @property
    def _power_mark(self) -> Path:
        return self._directory / ".powered"

    @property
    def is_powered(self) -> bool:
        """Whether the platform was powered on and the chip has kept its state since."""
        return self._power_mark.exists()

    def set_powered(self, *, powered: bool) -> None:
        """Write down that the firmware has played through, or that the chip lost its state."""
        if powered:
            self._power_mark.touch(0o600)
        else:
            self._power_mark.unlink(missing_ok=True)

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
