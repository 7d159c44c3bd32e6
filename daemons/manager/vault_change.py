"""A change of the manager's records, planned before anything of it is written.

Leaves to others: reading, writing and committing (`vault.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from daemons.manager.vault_format import NIL_UUID, RECORDS_PER_LEAF, Record


class Change:
    """Which positions get which records.

    Args:
        positions: Where the records are now, by UUID.
        vacant: Places that are free, the next one last.
        leaf_count: Leaves there are.
    """

    def __init__(self, positions: dict[bytes, int], vacant: list[int], leaf_count: int) -> None:
        self._positions = positions
        self._vacant = vacant
        self._placed: dict[bytes, int] = {}
        self._removed: dict[bytes, int] = {}
        self._vacant_taken = 0
        self._beyond = leaf_count * RECORDS_PER_LEAF
        self.by_position: dict[int, Record | None] = {}
        self.touched: set[int] = set()
        """Leaves that are written anew as they are."""

    def put(self, record: Record) -> None:
        """Store a record, in the place that its UUID has or in a free one."""
        if record.uuid == NIL_UUID:
            raise ValueError("the nil UUID marks an empty place")
        position = self._positions.get(record.uuid, self._placed.get(record.uuid))
        if position is None:
            position = self._placed[record.uuid] = self._next_place()
        self._removed.pop(record.uuid, None)
        self.by_position[position] = record

    def remove(self, uuid: bytes) -> None:
        """Free the place of a record, if there is one."""
        position = self._positions.get(uuid, self._placed.get(uuid))
        if position is not None:
            self.by_position[position] = None
            self._removed[uuid] = position

    def _next_place(self) -> int:
        if self._vacant_taken < len(self._vacant):
            self._vacant_taken += 1
            return self._vacant[-self._vacant_taken]
        self._beyond += 1
        return self._beyond - 1

    @property
    def leaf_count(self) -> int:
        """Leaves there will be."""
        return -(-self._beyond // RECORDS_PER_LEAF)

    def leaves(self) -> set[int]:
        """Leaves that change."""
        return self.touched | {position // RECORDS_PER_LEAF for position in self.by_position}

    def in_leaf(self, number: int) -> Iterator[tuple[int, Record | None]]:
        """The places of one leaf that change."""
        start = number * RECORDS_PER_LEAF
        for position, record in self.by_position.items():
            if start <= position < start + RECORDS_PER_LEAF:
                yield position - start, record

    def apply(self, positions: dict[bytes, int], vacant: list[int]) -> None:
        """Bring the index up to date, after the change has become durable."""
        if self._vacant_taken:
            del vacant[-self._vacant_taken :]
        positions.update(self._placed)
        end = self.leaf_count * RECORDS_PER_LEAF
        vacant[:0] = range(end - 1, self._beyond - 1, -1)
        for uuid, position in self._removed.items():
            del positions[uuid]
            vacant.append(position)
