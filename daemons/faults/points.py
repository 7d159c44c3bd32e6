"""The points at which a sweep kills: each message and each durable step of a command. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from daemons.faults.plan import Kind, Place
from daemons.faults.sweep_kinds import PointKind
from daemons.places import CHIP_NAME

T = TypeVar("T")


VTPM: Final = "vtpm-guest1"
MANAGER: Final = "vtpmmgr"
_RINGS: Final = (Place(Kind.RING.value, VTPM), Place(Kind.RING.value, MANAGER))
_DISKS: Final = tuple(Place(Kind.DISK.value, domain) for domain in (VTPM, MANAGER, CHIP_NAME))
_TIS: Final = (Place(Kind.TIS.value, CHIP_NAME),)
PLACES: Final[Mapping[PointKind, tuple[Place, ...]]] = {
    PointKind.RING: _RINGS,
    PointKind.DISK: _DISKS,
    PointKind.TIS: _TIS,
    PointKind.ALL: (*_RINGS, *_DISKS),
}
"""Register accesses are hundreds a command, so they are gone through only when asked for."""


@dataclass(frozen=True, slots=True)
class Point:
    """A process is killed before the n-th message of its ring, or step of its disk."""

    place: Place
    nth: int

    def __str__(self) -> str:
        return f"{self.place}, operation {self.nth}"

    def plan(self) -> bytes:
        """The plan that kills there."""
        return (f'[[fault]]\nwhere = "{self.place}"\nwhat = "kill"\nnth = {self.nth}\n').encode()


NO_FAULTS: Final = b"# counts only\n"


def choose_points(counted: Mapping[Place, int], limit: int | None, seed: int) -> Sequence[Point]:
    """List the points in order, or a sample of them.

    Args:
        counted: How many operations each place had without faults.
        limit: The most points there may be; None for all.
        seed: Of the sample.
    """
    points = [Point(place, nth) for place, count in counted.items() for nth in range(1, count + 1)]
    return sample(points, limit, seed)


def sample(items: Sequence[T], limit: int | None, seed: int) -> Sequence[T]:
    """Draw a sample of so many at most; it stays in order."""
    if limit is None or len(items) <= limit:
        return items
    chosen = random.Random(seed).sample(range(len(items)), limit)  # noqa: S311 - no secret
    return [items[at] for at in sorted(chosen)]
