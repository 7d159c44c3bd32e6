"""The chip's memory of the manager's image: an NV area and a monotonic counter.

The NV area holds number and hash of the newest root, and is written with each save. It takes a
secret that only stands inside the encrypted root: so nobody without the vault key can write an
older value into it, and nobody, not the chip's owner either, can put another area in its place
that would answer to that secret. The counter moves once at each start of a manager; it can never
be set back, by nobody.

Leaves to others: what follows from what they say (`anchoring.py`), when (`opening.py`).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final, TypeVar

from daemons.errors import ExitCode, Failure
from daemons.manager.anchoring import Anchored
from daemons.manager.chip import Chip, ChipRefusal
from daemons.manager.vault_format import Anchorage
from protocol.constants import CapabilityArea, NvAttribute, Ordinal, ResourceType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import UNRESTRICTED_PCR_INFO, CounterValue
from tpm12.client import TpmClient
from tpm12.client_core import BadResponseError, Use

T = TypeVar("T")

NV_INDICES: Final = range(0x00015000, 0x00015010)
"""Where anchors are; one that is there means that a manager has used this chip."""
AREA_BYTES: Final = 8 + 32
SECRET_BYTES: Final = 20
_LAYOUT: Final = struct.Struct(">Q32s")
_NEVER_WRITTEN: Final = b"\xff" * AREA_BYTES
_ATTRIBUTES: Final = NvAttribute.AUTHREAD | NvAttribute.AUTHWRITE
_NO_ROOM: Final = {
    ReturnCode.NOSPACE: (
        "Remove NV areas that nobody needs, as the TPM's owner; the next start goes on from here.",
        ExitCode.UNAVAILABLE,
    )
}
_NO_COUNTER: Final = {
    ReturnCode.RESOURCES: (
        "Release counters that nobody needs, as the TPM's owner; the next start goes on from here.",
        ExitCode.UNAVAILABLE,
    )
}
_ASKED_MAX: Final = 4
_DOING: Final = "keep the number of the manager's newest root in the hardware TPM"


def _asked_twice(ask: Callable[[], T]) -> T:
    """Ask for what the chip tells without authorization, until it has told the same twice.

    Nothing else shows that an answer was changed on its way, and by what is told here images are
    refused and counters moved.
    """
    for _ in range(_ASKED_MAX):
        told = ask()
        if ask() == told:
            return told
    raise BadResponseError("it tells another thing each time it is asked")


class AnchorRefused(Failure):
    """There is an area where the anchor should be, and it is another one."""


class ChipAnchor:
    """The anchor of one vault; an `anchoring.Anchor`.

    Args:
        chip: Started.
        locality: The manager's own, from which alone the area can be used.
    """

    def __init__(self, chip: Chip, locality: int) -> None:
        self._chip = chip
        self._locality = locality

    # -- the NV area

    def indices(self) -> tuple[int, ...]:
        """The areas that are there for anchors."""
        with self._chip.operation("list the NV areas of the hardware TPM") as tpm:
            listed = _asked_twice(lambda: tpm.get_capability(CapabilityArea.NV_LIST))
        found = struct.unpack(f">{len(listed) // 4}I", listed[: len(listed) // 4 * 4])
        return tuple(index for index in found if index in NV_INDICES)

    def define(self, anchorage: Anchorage) -> None:
        """Make the area, which is not there.

        Raises:
            ChipRefusal: There is no room.
        """
        where = replace(UNRESTRICTED_PCR_INFO, locality_at_release=1 << self._locality)
        with self._chip.operation("make an NV area in the hardware TPM", _NO_ROOM) as tpm:
            # Of a vault whose area the owner took away: it has another secret, and would be found
            # again in the place of ours.
            self._release_counters(tpm, anchorage.nv_index)
            tpm.nv_define_space(
                anchorage.nv_index,
                AREA_BYTES,
                _ATTRIBUTES,
                auth=anchorage.secret,
                owner_auth=self._chip.secrets.owner_auth,
                pcr_info_read=where,
                pcr_info_write=where,
            )

    def read(self, anchorage: Anchorage) -> Anchored | None:
        """What was written last; None without an area, or when it was never written."""
        if anchorage.nv_index not in self.indices():
            return None
        with (
            self._explained(anchorage),
            self._chip.operation(
                "read the number of the manager's newest root from the hardware TPM"
            ) as tpm,
        ):
            out = tpm.call(
                Ordinal.NV_READ_VALUE_AUTH,
                Use(tpm.oiap(), anchorage.secret),
                nv_index=anchorage.nv_index,
                offset=0,
                data_size=AREA_BYTES,
            )
        if out.data == _NEVER_WRITTEN:
            return None
        sequence, digest = _LAYOUT.unpack(out.data)
        return Anchored(sequence=sequence, digest=digest)

    def write(self, anchorage: Anchorage, anchored: Anchored) -> None:
        """Keep this; on return the chip has stored it."""
        with self._explained(anchorage):
            self._chip.authorized(
                _DOING,
                Ordinal.NV_WRITE_VALUE_AUTH,
                anchorage.secret,
                nv_index=anchorage.nv_index,
                offset=0,
                data=_LAYOUT.pack(anchored.sequence, anchored.digest),
            )

    def remove(self, nv_index: int) -> None:
        """Give an anchor up, as the chip's owner: its counter, then its area."""
        owner_auth = self._chip.secrets.owner_auth
        with self._chip.operation("remove an anchor from the hardware TPM") as tpm:
            self._release_counters(tpm, nv_index)
            tpm.nv_define_space(nv_index, 0, _ATTRIBUTES, owner_auth=owner_auth)

    # -- the counter

    def make_counter(self, anchorage: Anchorage) -> tuple[int, int]:
        """The counter's id and value; one that was made before a crash is found again."""
        with self._chip.operation("make a counter in the hardware TPM", _NO_COUNTER) as tpm:
            for found in self._counters(tpm, anchorage.nv_index):
                return found
            count_id, value = tpm.create_counter(
                _label(anchorage.nv_index),
                auth=anchorage.secret,
                owner_auth=self._chip.secrets.owner_auth,
            )
        return count_id, value.counter

    def count(self, anchorage: Anchorage) -> int | None:
        """The counter's value; None when it is not there."""
        with self._chip.operation("read a counter of the hardware TPM") as tpm:
            try:
                found = _asked_twice(lambda: tpm.read_counter(anchorage.counter_id))
            except TpmError as error:
                if error.code != ReturnCode.BAD_COUNTER:
                    raise
                return None
        return found.counter if found.label == _label(anchorage.nv_index) else None

    def count_on(self, anchorage: Anchorage) -> int | None:
        """Move the counter; its new value, or None while another one is used (Part 3 §25.2)."""
        try:
            with self._chip.operation("move a counter of the hardware TPM") as tpm:
                return tpm.increment_counter(anchorage.counter_id, anchorage.secret).counter
        except ChipRefusal as refusal:
            # One counter a power cycle; whose it is, is decided by who comes first.
            if refusal.code != ReturnCode.BAD_COUNTER:
                raise
            return None

    def _release_counters(self, tpm: TpmClient, nv_index: int) -> None:
        for count_id, _ in self._counters(tpm, nv_index):
            use = Use(tpm.oiap(), self._chip.secrets.owner_auth)
            tpm.call(Ordinal.RELEASE_COUNTER_OWNER, use, count_id=count_id)

    @staticmethod
    def _counters(tpm: TpmClient, nv_index: int) -> list[tuple[int, int]]:
        def ask() -> list[tuple[int, CounterValue]]:
            handles = tpm.handles(ResourceType.COUNTER)
            return [(count_id, tpm.read_counter(count_id)) for count_id in handles]

        return [
            (count_id, found.counter)
            for count_id, found in _asked_twice(ask)
            if found.label == _label(nv_index)
        ]

    @contextlib.contextmanager
    def _explained(self, anchorage: Anchorage) -> Iterator[None]:
        try:
            yield
        except ChipRefusal as refusal:
            if refusal.code not in {ReturnCode.AUTHFAIL, ReturnCode.AUTH_CONFLICT}:
                raise
            raise AnchorRefused(
                "the hardware TPM does not vouch for the manager's image",
                why=f"NV area 0x{anchorage.nv_index:08x} is not the one that this image made",
                next_step="Bring the image and the chip that it was last used with back together;"
                " the image was left as it is.",
                exit_code=ExitCode.DAMAGED,
            ) from refusal


def _label(nv_index: int) -> bytes:
    return nv_index.to_bytes(4, "big")
