"""Everything the launcher holds together: places, settings, domains, and the tools to start one.

The rooms of the launcher (chip, launching, consequences, domains, devices, status) share one
`Stack`; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

import trio

from daemons.errors import ExitCode, Failure
from daemons.launcher.domain import Domain
from daemons.launcher.last_domid import domid_of, next_count, note_count
from daemons.launcher.launcher_settings import LauncherSettings
from daemons.launcher.spawner import Spawner
from daemons.launcher.supervisor import Changes
from daemons.places import DOMAIN0_NAME, Places
from daemons.policy import Policy
from daemons.registry import RegistryWriter, Role

DOMAINS_MAX: Final = 1024


@dataclass(eq=False, kw_only=True)
class Stack:
    """What the rooms of the launcher share."""

    places: Places
    settings: LauncherSettings
    policy: Policy
    spawner: Spawner
    registry: RegistryWriter
    changes: Changes
    nursery: trio.Nursery
    child_environment: Mapping[str, str]
    domains: dict[str, Domain] = field(default_factory=dict)
    _domids_given: int = 0

    def new_domid(self) -> int:
        """Give a domid that no domain has; numbers come again only after all were used.

        Raises:
            Failure: It cannot be written down, also for another launcher.
        """
        taken = {domain.domid for domain in self.domains.values()}
        count = next_count(self._domids_given, taken)
        note_count(self.places.registry, count)
        self._domids_given = count
        return domid_of(count)

    def skip_domids(self, count: int) -> None:
        """Go on after those that an earlier launcher has given out."""
        self._domids_given = count

    def find(self, name_or_domid: str) -> Domain:
        """Find a domain as xl does: by its name, else by its domid.

        Raises:
            Failure: There is none.
        """
        domain = self.domains.get(name_or_domid)
        if domain is None:
            by_domid = (d for d in self.domains.values() if str(d.domid) == name_or_domid)
            domain = next(by_domid, None)
        if domain is None:
            raise Failure(
                f"there is no domain {name_or_domid!a}",
                why=f"the launcher knows: {', '.join((DOMAIN0_NAME, *self.domains))}",
                next_step="`vtpm list` shows them; `vtpm create CFG` makes one",
                exit_code=ExitCode.UNAVAILABLE,
            )
        return domain

    def of_role(self, role: Role) -> list[Domain]:
        """Give the domains of a role in the order of their creation."""
        return [domain for domain in self.domains.values() if domain.role is role]

    def users_of(self, backend: str) -> Iterator[Domain]:
        """Give the domains that have a TPM served by this one."""
        return (domain for domain in self.domains.values() if domain.uses(backend))

    async def until(self, is_so: Callable[[], bool]) -> None:
        """Wait until something is so; looked at again after each change of any domain."""
        while not is_so():
            await self.changes.next()
