"""The chip's faults: registers that say "busy", and another locality that seizes the TPM.

Both outlive the process that they began in: the page says until when. They do not outlive the run:
a chip that is killed after it has no hooks, and nobody who would give the locality back.

Source: TCG PC Client TIS 1.2 rev 1.21: commandReady, dataAvail, burstCount; Seize of an access
register.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from daemons.faults.page import Page, now_us
from hwtpm.tis_registers import BURST_COUNT_SHIFT, LOCALITIES, Access, Register, Status
from protocol.tis_messages import (
    Read,
    Value,
    Write,
    decode_answer,
    decode_request,
    encode_message,
)
from protocol.wire import DecodeError

if TYPE_CHECKING:
    from daemons.tis_server import TisServer

SEIZING_LOCALITY: Final = 3
"""Who seizes: an operating system's highest, or locality 4 where that one is active."""
LOOK_AGAIN_S: Final = 0.05
"""How often it is looked whether the run is over, which gives nobody a sign."""
_NOT_DECODED: Final = 0xFF
_WITHHELD: Final = Status.COMMAND_READY | Status.DATA_AVAIL

StartTimer = Callable[[float, Callable[[], None]], None]


def start_timer(after_s: float, call: Callable[[], None]) -> None:
    """Call something later, in a thread that does not keep the process."""
    timer = threading.Timer(after_s, call)
    timer.daemon = True
    timer.start()


class OtherLocality:
    """A locality that seizes the TPM and gives it back.

    Args:
        page: Where it is remembered who has seized, and until when.
        server: The chip.
        is_wanted: Tells whether the process that asked for faults still lives.
        later: Calls something later.
    """

    def __init__(
        self,
        page: Page,
        server: TisServer,
        is_wanted: Callable[[], bool],
        later: StartTimer = start_timer,
    ) -> None:
        self._page = page
        self._server = server
        self._is_wanted = is_wanted
        self._later = later
        if page.seizure is not None:  # the process in which it was made was killed
            self._give_back_in_time()

    def seize(self, for_s: float) -> None:
        """Seize the TPM; its command is aborted. Not from a thread that holds the registers."""
        if self._page.seizure is not None:
            return
        active = self._server.device.active_locality
        by = SEIZING_LOCALITY if active is None or active < SEIZING_LOCALITY else LOCALITIES - 1
        self._page.seizure = (by, now_us() + round(for_s * 1e6))
        self._server.write(Write(locality=by, offset=Register.ACCESS, data=bytes([Access.SEIZE])))
        self._give_back_in_time()

    def _give_back_in_time(self) -> None:
        """Give the TPM back when it is time, or when the run is over."""
        seizure = self._page.seizure
        if seizure is None:
            return
        left_s = (seizure[1] - now_us()) / 1e6
        if left_s > 0.0 and self._page.generation and self._is_wanted():
            self._later(min(left_s, LOOK_AGAIN_S), self._give_back_in_time)
            return
        given_up = bytes([Access.ACTIVE_LOCALITY])
        self._server.write(Write(locality=seizure[0], offset=Register.ACCESS, data=given_up))
        self._page.seizure = None


def asks_for_status(message: bytes) -> bool:
    """Tell whether a message to the chip reads the status register."""
    try:
        request = decode_request(message)
    except DecodeError:
        return False
    return isinstance(request, Read) and request.offset == Register.STS


def as_of_a_busy_chip(message: bytes) -> bytes:
    """Withhold commandReady, dataAvail and burstCount in the answer to a read of the status."""
    try:
        answer = decode_answer(message)
    except DecodeError:
        return message
    if not isinstance(answer, Value) or answer.data[:1] == bytes([_NOT_DECODED]):
        return message
    status = int.from_bytes(answer.data, "little") & ~(_WITHHELD | 0xFFFF << BURST_COUNT_SHIFT)
    return encode_message(Value(data=status.to_bytes(len(answer.data), "little")))
