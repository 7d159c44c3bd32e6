"""A guest's request that is under way at the manager, where a killed vTPM leaves it to the next.

It is written down before it is sent, with what the manager can be asked by: the name of its memory
and the number on the ring to it. Its response and the end of this note are one record, so the next
process either has the response for the guest, or asks the manager what became of the request.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from daemons.lean_structlog import structlog
from daemons.ring_client import BeforeSend, Sent
from daemons.vtpm.manager_link import ManagerLink
from daemons.vtpm.remembered_responses import note
from protocol.return_codes import ReturnCode
from tpm12.engine import error_response

_UNDER_WAY: Final = "under way"
_HEAD: Final = struct.Struct("<QQHH")


class PassedOn(NamedTuple):
    """A request of a guest for the manager.

    Attributes:
        ring_id: The guest's ring.
        sequence: Its number there.
        request: For the manager.
    """

    ring_id: str
    sequence: int
    request: bytes


def pass_on(tpm: DurableTpm, manager: ManagerLink, passed: PassedOn) -> bytes:
    """Have the manager carry out a request that must not be carried out twice.

    Args:
        tpm: Its memory gets the note.
        manager: Where it goes.
        passed: The request.

    Returns:
        The response for the guest, which is remembered.
    """
    return _brought_to_its_end(tpm, passed, partial(manager.pass_on_once, passed.request))


def finish_passing_on(tpm: DurableTpm, manager: ManagerLink) -> None:
    """Bring a request to its end that a killed vTPM had passed on; the guest will ask for it.

    Args:
        tpm: Resumed; its memory may have the note.
        manager: Where the request went.
    """
    noted = tpm.notes.get(_UNDER_WAY)
    if noted:
        passed, sent = _decode(noted)
        _brought_to_its_end(tpm, passed, partial(manager.resume, passed.request, sent))


def _brought_to_its_end(
    tpm: DurableTpm, passed: PassedOn, ask: Callable[[BeforeSend], bytes]
) -> bytes:
    def before_send(sent: Sent) -> None:
        tpm.remember({_UNDER_WAY: _encode(passed, sent)})

    try:
        response = ask(before_send)
    except Failure as failure:
        structlog.get_logger().error(
            "a request to the manager came back without an answer", why=str(failure)
        )
        response = error_response(ReturnCode.IOERROR)
    tpm.remember({**note(passed.ring_id, passed.sequence, response), _UNDER_WAY: b""})
    return response


def _encode(passed: PassedOn, sent: Sent) -> bytes:
    ring_id, memory = passed.ring_id.encode("ascii"), sent.memory.encode("ascii")
    head = _HEAD.pack(passed.sequence, sent.sequence, len(ring_id), len(memory))
    return head + ring_id + memory + passed.request


def _decode(noted: bytes) -> tuple[PassedOn, Sent]:
    sequence, sent_sequence, ring_bytes, memory_bytes = _HEAD.unpack_from(noted)
    ring_id = noted[_HEAD.size : _HEAD.size + ring_bytes].decode("ascii")
    at = _HEAD.size + ring_bytes + memory_bytes
    memory = noted[_HEAD.size + ring_bytes : at].decode("ascii")
    return PassedOn(ring_id, sequence, noted[at:]), Sent(memory, sent_sequence)
