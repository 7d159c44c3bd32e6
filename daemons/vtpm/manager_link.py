"""What a vTPM asks of the manager, over its ring.

Source: Xen's VTPM_ORD_* as in `protocol/manager_messages.py`.
"""

from __future__ import annotations

import contextlib
from typing import Final, Protocol, TypeVar

from daemons.errors import ExitCode, Failure
from daemons.ring_client import RECONNECTS_MAX, BeforeSend, RingForgotten, Sent
from protocol import manager_messages as messages
from protocol.constants import HEADER_BYTES, Ordinal, Tag
from protocol.manager_messages import ManagerOrdinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import DecodeError

T = TypeVar("T")

_PLAIN: Final = Tag.RQU_COMMAND.to_bytes(2, "big")
_CHANGE_NOTHING: Final = frozenset(
    ordinal.to_bytes(4, "big") for ordinal in (Ordinal.GET_RANDOM, Ordinal.PCR_READ)
)
"""Commands of guests for the chip that are as good when they are run twice."""


class ManagerRing(Protocol):
    """The ring to the manager; `RingClient` is one."""

    def exchange(self, request: bytes, *, before_send: BeforeSend | None = None) -> bytes:
        """Give the response to `request`."""
        ...

    def resume(self, request: bytes, sent: Sent, before_send: BeforeSend) -> bytes:
        """Give the response to a request that an earlier process has sent."""
        ...


def changes_nothing(request: bytes) -> bool:
    """Whether a guest's request for the manager is as good when it is run twice."""
    return request[:2] == _PLAIN and request[6:HEADER_BYTES] in _CHANGE_NOTHING


class ManagerLink:
    """The manager as one vTPM sees it.

    Args:
        ring: The ring to the manager.
    """

    def __init__(self, ring: ManagerRing) -> None:
        self._exchange = ring.exchange
        self._resume = ring.resume

    def load_hash_key(self) -> bytes | None:
        """Hash and key on record, or None when the manager does not know this vTPM.

        Raises:
            Failure: The manager refused or answered nonsense.
        """
        try:
            return self._ask(ManagerOrdinal.LOADHASHKEY, None, messages.LoadHashKeyOut).hash_key
        except TpmError as error:
            if error.code is ReturnCode.BAD_PARAMETER:
                return None  # "unknown UUID": the one answer that permits a new vTPM
            raise _refused("give the key of this vTPM", error) from error

    def save_hash_key(self, hash_key: bytes) -> None:
        """Put hash and key on record.

        Raises:
            Failure: The manager refused or answered nonsense.
        """
        operands = messages.SaveHashKeyIn(hash_key=hash_key)
        try:
            self._ask(ManagerOrdinal.SAVEHASHKEY, operands, messages.Nothing)
        except TpmError as error:
            raise _refused("keep the key of this vTPM", error) from error

    def hardware_pcr(self, index: int) -> bytes:
        """One PCR of the hardware TPM; 20 bytes.

        Raises:
            Failure: The manager or the hardware refused.
        """
        request = bytes.fromhex("00c10000000e00000015") + index.to_bytes(4, "big")
        response = self._exchange(request)
        if len(response) != HEADER_BYTES + 20 or response[6:10] != bytes(4):
            raise Failure(
                f"cannot copy hardware PCR {index}",
                why=f"the manager answered {response[:HEADER_BYTES].hex()}",
                next_step="Leave hwinitpcr out of extra=, or look at the manager's log.",
                exit_code=ExitCode.UNAVAILABLE,
            )
        return response[HEADER_BYTES:]

    def pass_on(self, request: bytes) -> bytes:
        """Give a guest's request that changes nothing to the manager, and its answer back.

        Raises:
            RingLost: The manager does not come back.
        """
        return self._exchange_over_deaths(request)

    def pass_on_once(self, request: bytes, before_send: BeforeSend) -> bytes:
        """Give a guest's request to the manager unchanged, and its answer back.

        Args:
            request: Carried out once, however often the manager dies.
            before_send: Told under what it goes out; `resume` needs it.

        Raises:
            RingForgotten: The manager lost its memory, and nobody knows whether it had done it.
            RingLost: It does not come back.
        """
        return self._exchange(request, before_send=before_send)

    def resume(self, request: bytes, sent: Sent, before_send: BeforeSend) -> bytes:
        """Give the answer to a guest's request that a killed vTPM had passed on.

        Args:
            request: As it was sent.
            sent: Under what it was sent last.
            before_send: See `pass_on_once`.

        Raises:
            RingLost: See `pass_on_once`.
        """
        return self._resume(request, sent, before_send)

    def _exchange_over_deaths(self, request: bytes) -> bytes:
        # A manager that was rebooted has forgotten whether it had done it. What is asked here is
        # the same done twice.
        for _ in range(RECONNECTS_MAX):
            with contextlib.suppress(RingForgotten):
                return self._exchange(request)
        return self._exchange(request)

    def _ask(self, ordinal: ManagerOrdinal, operands: object | None, gives: type[T]) -> T:
        request = messages.request(ordinal, operands)
        response = self._exchange_over_deaths(request)
        try:
            return messages.results(gives, response)
        except DecodeError as error:
            raise Failure(
                "cannot understand the manager",
                why=str(error),
                next_step="vTPM and manager must be of one version of the stack.",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error


_REASONS = {
    ReturnCode.DISABLED: "another live instance has this vTPM open, or its label is not allowed",
    ReturnCode.FAIL: "the manager could not find out the label of this vTPM",
    ReturnCode.NOSPACE: "the manager's image is full",
    ReturnCode.IOERROR: "the manager cannot write its image",
}


def _refused(what: str, error: TpmError) -> Failure:
    why = _REASONS.get(error.code, "the manager's log says more")
    return Failure(
        f"the manager did not {what}",
        why=f"it answered TPM_{error.code.name}: {why}",
        next_step="Look at the manager: vtpm status.",
        exit_code=ExitCode.UNAVAILABLE,
    )
