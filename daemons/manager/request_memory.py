"""What a killed manager had answered, and what it had under way, for the one that follows it.

A request that changes something a second time (VTPM_DEL, a vTPM's TPM_Extend of the chip) is
written down before it is begun, and its response before anyone hears of it. So the frontend that
submits it again is answered from here, or it was never begun. Everything else that vTPMs ask is the
same done twice, and nothing is written for it.

The file is a journal (`daemons/journal.py`). Its key is derived from the vault's id, which only who
may read the manager's image knows: it is needed before the chip gives the vault's own key, because
the chip forgets what became of a command as soon as it is asked for anything else.

Record: items of tag u8 | sequence u64 | length of ring id u16 | length of data u32 | both. An item
is the name of the memory (all before it is forgotten), a request under way, a response, or a
request that was not run after all.

Invariants:
- One request is under way at most, and none when a ring is served for the first time.
- A ring's numbers that are remembered only go up. Numbers of requests that changed nothing are not
  remembered, and come again on the ring's next connection.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from daemons.errors import ExitCode, Failure
from daemons.journal import Journal, inspect_journal, read_journal
from protocol.constants import Tag
from protocol.framing import error_response
from protocol.return_codes import ReturnCode

OWNER: Final = b"vtpmmgr requests"
NAME_BYTES: Final = 8

_NAMED, _UNDER_WAY, _ANSWERED, _NOT_RUN = range(1, 5)
_ITEM: Final = struct.Struct("<BQHI")


class Pending(NamedTuple):
    """A request that was begun, and has no response yet."""

    ring_id: str
    sequence: int
    request: bytes

    @property
    def is_for_chip(self) -> bool:
        """Whether it is a command of the hardware TPM."""
        return self.request[:2] == Tag.RQU_COMMAND.to_bytes(2, "big")


class RequestMemory:
    """The last answers of all rings; a `ResponseStore` of the ring server.

    Args:
        path: The file, in the manager's private run directory.
        vault_id: Of the vault in the manager's image, 16 bytes.
        is_new: The vault was made just now: whatever is in the file was another's.

    Raises:
        Failure: The file is damaged, or cannot be written. It stays as it is.
    """

    def __init__(self, path: Path, vault_id: bytes, *, is_new: bool = False) -> None:
        self._name = os.urandom(NAME_BYTES)
        self._answers: dict[str, tuple[int, bytes]] = {}
        self._passing: dict[str, tuple[int, bytes]] = {}
        self.pending: Pending | None = None
        """What was under way when the manager before this one was killed, or is now."""
        key = hmac.digest(vault_id, OWNER, "sha256")
        records = None
        if not is_new:
            with _told(path):
                records = read_journal(path, key, OWNER)
        self.is_resumed = records is not None
        try:
            for record in records or ():
                self._replay(record)
        except (ValueError, struct.error) as error:
            raise _damaged(path, f"another version of the stack wrote it: {error}") from error
        self._journal = Journal(path, key, OWNER, self._snapshot())

    # -- what must not be done twice

    def begin(self, pending: Pending) -> None:
        """Remember that a request is about to be carried out."""
        self.pending = pending
        self._append(_item(_UNDER_WAY, *pending))

    def answer(self, response: bytes) -> None:
        """Remember the response of what is under way: it has been carried out."""
        assert self.pending is not None
        ring_id, sequence, _ = self.pending
        self.pending = None
        self._answers[ring_id] = (sequence, response)
        self._append(_item(_ANSWERED, ring_id, sequence, response))

    def not_run(self) -> None:
        """Remember that what was under way has not been carried out, and never will be."""
        assert self.pending is not None
        ring_id, sequence, _ = self.pending
        self.pending = None
        self._append(_item(_NOT_RUN, ring_id, sequence, b""))

    def close(self) -> None:
        """Let go of the file; it stays for the next manager."""
        self._journal.close()

    # -- the ring server's view

    @property
    def memory(self) -> str:
        """See `ResponseStore`."""
        return self._name.hex()

    def last_sequence(self, ring_id: str) -> int:
        """Give the number of the ring's last remembered request; see `ResponseStore`."""
        return self._answers.get(ring_id, (0, b""))[0]

    def get(self, ring_id: str, sequence: int) -> bytes | None:
        """See `ResponseStore`."""
        for answers in (self._answers, self._passing):
            found, response = answers.get(ring_id, (0, b""))
            if found == sequence:
                return response
        return None

    def put(self, ring_id: str, sequence: int, response: bytes) -> bool:
        """Keep a response for a frontend that asks twice on the same connection."""
        self._passing[ring_id] = (sequence, response)
        return self.is_kept(ring_id, sequence)

    def is_kept(self, ring_id: str, sequence: int) -> bool:
        """See `ResponseStore`."""
        return self.last_sequence(ring_id) == sequence

    # -- the file

    def _append(self, record: bytes) -> None:
        if not self._journal.append(record):
            self._journal.restart(self._snapshot())

    def _snapshot(self) -> bytes:
        items = [_item(_NAMED, "", 0, self._name)]
        items += [_item(_ANSWERED, ring, *answer) for ring, answer in self._answers.items()]
        if self.pending is not None:
            items.append(_item(_UNDER_WAY, *self.pending))
        return b"".join(items)

    def _replay(self, record: bytes) -> None:
        at = 0
        while at < len(record):
            tag, sequence, ring_bytes, data_bytes = _ITEM.unpack_from(record, at)
            at += _ITEM.size
            end = at + ring_bytes + data_bytes
            if end > len(record):
                raise ValueError("an item ends behind its record")
            ring_id = record[at : at + ring_bytes].decode("ascii")
            self._take(tag, Pending(ring_id, sequence, record[at + ring_bytes : end]))
            at = end

    def _take(self, tag: int, item: Pending) -> None:
        if tag == _NAMED and len(item.request) == NAME_BYTES:
            self._name, self._answers, self.pending = item.request, {}, None
        elif tag == _UNDER_WAY:
            self.pending = item
        elif tag in {_ANSWERED, _NOT_RUN}:
            self.pending = None
            if tag == _ANSWERED:
                self._answers[item.ring_id] = (item.sequence, item.request)
        else:
            raise ValueError(f"an item of kind {tag}")


class Once:
    """One request on its way through the manager.

    Args:
        memory: Where it is written down.
        pending: The request.
    """

    def __init__(self, memory: RequestMemory, pending: Pending) -> None:
        self._memory = memory
        self._pending = pending

    def begin(self) -> None:
        """Say that it is about to be carried out, and must not be a second time."""
        self._memory.begin(self._pending)

    def answer(self, response: bytes) -> None:
        """Give its response; does nothing when it was not begun, or has its response."""
        if self._memory.pending is self._pending:
            self._memory.answer(response)


def settle(memory: RequestMemory, outcome: Callable[[bytes], bytes | None]) -> None:
    """Find out what became of the request that a killed manager had under way.

    Args:
        memory: With a request pending.
        outcome: Gives the response to the request, or None when it was not carried out.
    """
    assert memory.pending is not None
    response = outcome(memory.pending.request)
    if response is None:
        memory.not_run()
    else:
        memory.answer(response)


def in_doubt() -> bytes:
    """The response to a request of which nobody can tell whether it was carried out."""
    return error_response(ReturnCode.IOERROR)


def _item(tag: int, ring_id: str, sequence: int, data: bytes) -> bytes:
    ring = ring_id.encode("ascii")
    return _ITEM.pack(tag, sequence, len(ring), len(data)) + ring + data


def inspect_requests(path: Path) -> int | None:
    """Look at the file, as far as it can be told without the key.

    Returns:
        How many records there are; None when there is no file, or one of an earlier boot.

    Raises:
        Failure: A manager would refuse it, whatever the key.
    """
    with _told(path):
        return inspect_journal(path)


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Give a damaged journal the next step that this one has."""
    try:
        yield
    except Failure as failure:
        if failure.exit_code is not ExitCode.DAMAGED:
            raise
        raise _damaged(path, failure.why) from failure


def _damaged(path: Path, why: str) -> Failure:
    return Failure(
        f"cannot go on from journal {path}",
        why=why,
        next_step=f"To give it up: rm {path}, and vtpm reboot of the manager. A guest's request"
        " that was under way is answered TPM_IOERROR then.",
        exit_code=ExitCode.DAMAGED,
    )
