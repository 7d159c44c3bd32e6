"""What a killed TPM leaves to its next process: volatile state, and notes beside it.

A crash is not a power cycle: PCRs, sessions, loaded keys and all else outlive the process that had
them. Each command that changed something adds one record to the journal (`journal.py`) before it is
answered: what changed of the state, and the notes that must change with it (the response, for whom
and to which request). Commands that change nothing write nothing.

A change of the permanent state is in its store, not here: here is the digest of what the store has.
The record of a change is written first, as prepared; if the process is killed next, the store tells
whether the command was run, for the permanent state then has the digest of before or of after.

Record: kind u8, then parts: tag u8 | length u32 | data. A part is a section of the state (whole in
a snapshot, else a delta of `state_codec.py`), a note (name, NUL, value), or the SHA-256 of the
permanent section that is stored (in a snapshot) or will be (in a prepared record).

Invariants:
- State and notes of one record take effect together, or not at all.
- A prepared record that a change follows has taken effect; its store said so.
- Volatile state goes on only beside the permanent state that it had: an older copy of the store
  that took its place is refused. After a save that failed either state may be found; if it is the
  new one and nothing came after it, all that goes with it is found, too.
- Threads may write notes while another one runs a command.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.journal import Journal, read_journal, remove_journal
from tpm12.state import Permanent, StAny, State, StClear, Volatile
from tpm12.state_codec import (
    StateError,
    apply_delta,
    decode_section,
    delta,
    encode_section,
)

Notes = Mapping[str, bytes]
NO_NOTES: Final[Notes] = {}

_SNAPSHOT, _CHANGED, _PREPARED, _DROPPED, _NOTED = b"\x01", b"\x02", b"\x03", b"\x04", b"\x05"
_PERMANENT, _STCLEAR, _STANY, _VOLATILE, _NOTE, _STORED = range(1, 7)
"""Tags. `_PERMANENT`, the delta of a prepared change, stood where `_STORED` does now."""
_PART: Final = struct.Struct("<BI")


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a process left."""

    stclear: StClear
    stany: StAny
    volatile: Volatile
    notes: dict[str, bytes]
    stored: bytes | None = None
    """SHA-256 of the permanent section beside it; None: the last save failed, it may be either."""


class VolatileMemory:
    """The volatile memory of one TPM.

    Args:
        path: The journal, in a private run directory.
        owner: Name of the TPM, part of what is authenticated.
    """

    def __init__(self, path: Path, owner: str) -> None:
        self._path = path
        self._owner = owner.encode()
        self._journal: Journal | None = None
        self._state: State | None = None
        self._prepared = b""
        self._stored: bytes | None = None
        self._about_to_store = b""
        self._turn = threading.Lock()
        self.notes: dict[str, bytes] = {}

    def recall(self, permanent: Permanent) -> Remembered | None:
        """Read what the process before this one left.

        Args:
            permanent: As the store has it; its `journal_key` opens the journal.

        Returns:
            None when there is nothing to go on from: a first start, or the power was gone.

        Raises:
            Failure: There is something, and it cannot be trusted.
        """
        if permanent.journal_key is None:
            return None
        records = read_journal(self._path, permanent.journal_key, self._owner)
        if records is None:
            return None
        try:
            left = _replayed(records, permanent)
        except (StateError, struct.error, ValueError) as error:
            raise Failure(
                f"cannot go on from journal {self._path}",
                why=str(error),
                next_step="It was written by another version of the stack: use that one, or give up"
                " what was in memory by a reboot of the domain.",
                exit_code=ExitCode.DAMAGED,
            ) from error
        if left.stored not in {None, _digest(permanent)}:
            raise Failure(
                f"cannot go on from journal {self._path}",
                why="the permanent state is not the one that the killed process had stored",
                next_step="Put back the file that it had: this one is an older copy, or another"
                " TPM's. To give up what was in memory: reboot the domain; for the chip, vtpm down"
                " and vtpm up.",
                exit_code=ExitCode.DAMAGED,
            )
        return left

    def begin(self, state: State, notes: Notes = NO_NOTES) -> None:
        """Remember a state from now on, in place of all that was remembered.

        Raises:
            Failure: The journal cannot be made.
        """
        key = state.permanent.journal_key
        if key is None:
            raise ValueError("the TPM has no journal key")
        with self._turn:
            self._state, self._prepared, self.notes = state, b"", dict(notes)
            self._stored = _digest(state.permanent)
            snapshot = self._snapshot()
            if self._journal is not None:
                self._journal.restart(snapshot)
            else:
                self._journal = Journal(self._path, key, self._owner, snapshot)

    @property
    def is_kept(self) -> bool:
        """Whether changes are remembered: between `begin` and `forget`."""
        return self._journal is not None

    def changed(self, state: State, notes: Notes = NO_NOTES) -> None:
        """Remember a state whose permanent section needs no more storing, and new notes."""
        with self._turn:
            if self._journal is not None:
                self._append(self._record(_CHANGED, state, notes))
                self._state = state
                self.notes.update(notes)

    def note(self, notes: Notes) -> None:
        """Remember notes that no change of the state goes with; from any thread."""
        with self._turn:
            if self._journal is not None:
                self._append(_NOTED + _noted(notes))
                self.notes.update(notes)

    def prepare(self, state: State, notes: Notes = NO_NOTES) -> None:
        """Remember what is so once the permanent section of `state` is stored."""
        with self._turn:
            if self._journal is not None:
                self._about_to_store = _digest(state.permanent)
                record = self._record(_PREPARED, state, notes)
                self._append(record)
                self._prepared = record

    def stored(self, state: State, notes: Notes = NO_NOTES) -> None:
        """Take note that what was prepared is stored. Writes nothing: the store says it too."""
        with self._turn:
            if self._journal is not None:
                self._prepared, self._stored = b"", self._about_to_store
                self._state = state
                self.notes.update(notes)

    def dropped(self) -> None:
        """What was prepared was not stored, as far as its store can tell."""
        with self._turn:
            if self._journal is not None:
                self._prepared, self._stored = b"", None
                self._append(_DROPPED)

    def forget(self) -> None:
        """The power is gone, and what was remembered with it."""
        with self._turn:
            if self._journal is not None:
                self._journal.close()
                self._journal = None
            remove_journal(self._path)
            self._state, self._prepared, self.notes, self._stored = None, b"", {}, None

    def _record(self, kind: bytes, after: State, notes: Notes) -> bytes:
        before = self._state
        assert before is not None
        record = kind
        if kind is _PREPARED:
            record += _part(_STORED, self._about_to_store)
        if after.stclear is not before.stclear:
            record += _part(_STCLEAR, delta(before.stclear, after.stclear))
        if after.stany is not before.stany:
            record += _part(_STANY, delta(before.stany, after.stany))
        if after.volatile is not before.volatile:
            record += _part(_VOLATILE, delta(before.volatile, after.volatile))
        return record + _noted(notes) if notes else record

    def _snapshot(self) -> bytes:
        """All that is so, in one record."""
        state = self._state
        assert state is not None
        return b"".join(
            (
                _SNAPSHOT,
                _part(_STCLEAR, encode_section(state.stclear)),
                _part(_STANY, encode_section(state.stany)),
                _part(_VOLATILE, encode_section(state.volatile)),
                _part(_STORED, self._stored or b""),
                _noted(self.notes),
            )
        )

    def _append(self, record: bytes) -> None:
        assert self._journal is not None
        if self._journal.append(record):
            return
        # No room: first all that was so far, then the record.
        self._journal.restart(self._snapshot())
        for each in filter(None, (self._prepared, record)):
            if not self._journal.append(each):
                raise AssertionError("a record of a command does not fit into an empty journal")


def _part(tag: int, data: bytes) -> bytes:
    """One part of a record; none, where there is nothing to say."""
    return _PART.pack(tag, len(data)) + data if data else data


def _noted(notes: Notes) -> bytes:
    parts = b""
    for name, value in notes.items():
        data = name.encode() + b"\0" + value
        parts += _PART.pack(_NOTE, len(data)) + data
    return parts


def _parts(record: bytes) -> list[tuple[int, bytes]]:
    parts, at = [], 1
    while at < len(record):
        tag, length = _PART.unpack_from(record, at)
        at += _PART.size
        parts.append((tag, record[at : at + length]))
        at += length
    return parts


def _replayed(records: list[bytes], permanent: Permanent) -> Remembered:
    """What all records come to.

    Raises:
        StateError, ValueError, struct.error: They are not what this version writes.
    """
    found: Remembered | None = None
    prepared: bytes | None = None
    doubtful: bytes | None = None  # dropped last, and perhaps stored all the same
    for record in records:
        kind = record[:1]
        if kind == _SNAPSHOT:
            found, prepared, doubtful = _whole(record), None, None
        elif found is None or kind not in {_CHANGED, _PREPARED, _DROPPED, _NOTED}:
            raise ValueError(f"a record of kind {kind.hex()}, where another should be")
        elif kind == _NOTED:
            found, doubtful = _after(found, record), None  # its notes are newer
        else:
            if prepared is not None and kind != _DROPPED:
                found = _after(found, prepared)
            doubtful = prepared if kind == _DROPPED else None
            prepared = record if kind == _PREPARED else None
            if kind == _CHANGED:
                found = _after(found, record)
            elif kind == _DROPPED:
                found = dataclasses.replace(found, stored=None)
    if found is None:
        raise ValueError("the journal has no records")
    prepared = prepared or doubtful
    if prepared is not None and _is_stored(prepared, permanent):
        found = _after(found, prepared)
    return found


def _whole(record: bytes) -> Remembered:
    parts = {tag: data for tag, data in _parts(record) if tag != _NOTE}
    if not {_STCLEAR, _STANY, _VOLATILE} <= parts.keys():
        raise ValueError("a snapshot without all of its sections")
    return Remembered(
        decode_section(StClear, parts[_STCLEAR]),
        decode_section(StAny, parts[_STANY]),
        decode_section(Volatile, parts[_VOLATILE]),
        _notes_of(record),
        parts.get(_STORED),
    )


def _after(before: Remembered, record: bytes) -> Remembered:
    stclear, stany, volatile = before.stclear, before.stany, before.volatile
    stored = None if record[:1] == _PREPARED else before.stored
    for tag, data in _parts(record):
        if tag == _STCLEAR:
            stclear = apply_delta(stclear, data)
        elif tag == _STANY:
            stany = apply_delta(stany, data)
        elif tag == _VOLATILE:
            volatile = apply_delta(volatile, data)
        elif tag == _STORED:
            stored = data
    return Remembered(stclear, stany, volatile, before.notes | _notes_of(record), stored)


def _notes_of(record: bytes) -> dict[str, bytes]:
    notes = {}
    for tag, data in _parts(record):
        if tag == _NOTE:
            name, _, value = data.partition(b"\0")
            notes[name.decode()] = value
    return notes


def _is_stored(prepared: bytes, permanent: Permanent) -> bool:
    """Whether the store has what was prepared."""
    for tag, data in _parts(prepared):
        if tag == _STORED:
            return data == _digest(permanent)
        if tag == _PERMANENT:  # as an older version wrote it: then it changes nothing more
            return encode_section(apply_delta(permanent, data)) == encode_section(permanent)
    return True


def _digest(permanent: Permanent) -> bytes:
    """SHA-256 of the permanent section, as its store has it."""
    return hashlib.sha256(encode_section(permanent)).digest()
