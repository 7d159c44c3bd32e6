"""Which root of the manager's image is the newest: what the chip says, and what follows from it.

After a root is durable, and before anybody hears of it, its number and hash are written into an NV
area of the chip. So the chip never names a root that the image has not got, and a crash between
the two leaves the image exactly one root ahead. That one names the chip's root as the one before
it, by hash; anything else was never there.

Leaves to others: the area itself (`chip_anchor.py`), when it is made (`opening.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from daemons.manager.vault_format import Anchorage, NotAnchored, RolledBack, Root


@dataclass(frozen=True, slots=True, kw_only=True)
class Anchored:
    """What the chip keeps of a root."""

    sequence: int
    digest: bytes
    """SHA-256 of its page."""


class Anchor(Protocol):
    """A memory that an old copy of the image does not bring back: the chip's."""

    def read(self, anchorage: Anchorage) -> Anchored | None:
        """What was written last, or None when there is no area, or nothing was written into it.

        Raises:
            Failure: The chip does not tell, or the area is not the one that was made.
        """
        ...

    def write(self, anchorage: Anchorage, anchored: Anchored) -> None:
        """Keep this, durably.

        Raises:
            Failure: It was perhaps not kept.
        """
        ...


def is_one_ahead(name: str, root: Root, digest: bytes, anchored: Anchored | None) -> bool:
    """Compare the newest root of an image with what the chip says.

    Args:
        name: The image, for messages.
        root: Its newest one, which has an anchorage.
        digest: SHA-256 of the page of that root.
        anchored: What the chip says.

    Returns:
        Whether the chip is yet to be told of this root.

    Raises:
        RolledBack: The chip knows a newer one.
        NotAnchored: It knows nothing, or another history.
    """
    assert root.anchorage is not None
    if anchored is None:
        if root.anchorage.is_confirmed:
            raise NotAnchored(
                name, f"its NV area 0x{root.anchorage.nv_index:08x} is gone or was never written"
            )
        return True
    if root.sequence < anchored.sequence:
        raise RolledBack(name, root.sequence, anchored.sequence)
    if root.sequence == anchored.sequence:
        if digest == anchored.digest:
            return False
        raise NotAnchored(name, f"its root {root.sequence} is another one than the chip knows")
    if root.sequence > anchored.sequence + 1:
        raise NotAnchored(
            name,
            f"its newest root is number {root.sequence}, and the chip knows {anchored.sequence}:"
            " the chip is older, or the image was used with another",
        )
    if root.previous != anchored.digest:
        raise NotAnchored(
            name, f"its root {root.sequence} does not follow root {anchored.sequence} of the chip"
        )
    return True
