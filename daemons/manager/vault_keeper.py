"""Keeps a working vault at hand: one whose disk failed is opened again before it is next used.

A failed save is the failure of one request, not of the manager: the vTPM that asked is told, and
the next request finds a vault that was read back from the disk, or the reason why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import UUID

from daemons.manager.vault import Vault
from daemons.manager.vault_format import Record


class VaultKeeper:
    """The vault as requests see it. Every method may raise `Failure`.

    Args:
        vault: An open one.
        reopen: Closes the disk of a failed vault and opens the image again.
    """

    def __init__(self, vault: Vault, reopen: Callable[[Vault], Vault]) -> None:
        self._vault = vault
        self._reopen = reopen

    def load(self, uuid: UUID) -> Record | None:
        """Give a record, or None."""
        return self._working().load(uuid)

    def save(self, record: Record) -> None:
        """Store a record durably."""
        self._working().save(record)

    def delete(self, uuid: UUID) -> None:
        """Remove a record durably."""
        self._working().delete(uuid)

    def __contains__(self, uuid: UUID) -> bool:
        return uuid in self._working()

    def __iter__(self) -> Iterator[UUID]:
        return iter(self._working())

    def __len__(self) -> int:
        return len(self._vault)

    def close(self) -> None:
        """Let the image go."""
        self._vault.close()

    def _working(self) -> Vault:
        if self._vault.failure is not None:
            self._vault = self._reopen(self._vault)
        return self._vault
