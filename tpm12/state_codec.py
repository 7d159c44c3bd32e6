"""Sections of state as bytes: versioned, one record per value, unknown things refused.

    version u16 | section id u16 | records: field number u16, key u32, size u32, value

A field that maps handles or indices to values has one record per entry, the key says which; a
single value has key 0; None has no record. `delta()` gives only the records that differ between two
states, found by identity, so that a store may append what one command changed.

Invariants:
- `decode(encode(section))` equals the section; encoding is deterministic.
- What is not understood whole is refused whole: `StateError` names the reason, nothing is guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import partial
from itertools import compress
from operator import is_not
from typing import Any, Final, TypeVar, cast

from protocol.return_codes import TpmError
from protocol.wire import DecodeError, decode, encode, wire_fields
from tpm12.keys import LoadedKey
from tpm12.sections import Stored, stored_fields
from tpm12.sha1 import Sha1Thread
from tpm12.state import Permanent, StAny, StClear, Volatile

S = TypeVar("S")

VERSION: Final = 1
_HEAD: Final = struct.Struct(">HH")
_RECORD: Final = struct.Struct(">HII")
_SECTION_IDS: Final[dict[type, int]] = {Permanent: 1, StClear: 2, StAny: 3, Volatile: 4}
_FIELDS: Final = {section: stored_fields(section) for section in _SECTION_IDS}
_INT_BYTES: Final = 8
_NUMBER: Final = struct.Struct(">HIIQ")
"""A record of an integer or a boolean, with its value."""
_REMOVED: Final = 0xFFFFFFFF
"""In a delta, the size of a record that takes its entry away."""


class StateError(Exception):
    """Stored state cannot be read: damaged, or written by a version that knows more."""


def encode_section(section: object) -> bytes:
    """Write a whole section."""
    return _ENCODINGS[type(section)](section)


def decode_section(section_type: type[S], data: bytes) -> S:
    """Read a whole section.

    Raises:
        StateError: It is damaged, of another section, or of an unknown version.
    """
    section = section_type()
    _apply(section, _records(section_type, data), allows_removal=False)
    return section


def delta(before: object, after: object) -> bytes:
    """The records in which two states of one section differ; empty when there are none."""
    return _DELTAS[type(after)](before, after)


def apply_delta(section: S, data: bytes) -> S:
    """The section after a delta; the given one stays as it is.

    Raises:
        StateError: As `decode_section`.
    """
    changed = cast("S", cast("Any", section).clone())
    _apply(changed, _records(type(section), data), allows_removal=True)
    return changed


def _records(section_type: type, data: bytes) -> list[tuple[int, int, bytes | None]]:
    if len(data) < _HEAD.size:
        raise StateError("the state is cut off in its header")
    version, section_id = _HEAD.unpack_from(data)
    if version != VERSION:
        raise StateError(f"the state has format version {version}; this program reads {VERSION}")
    if section_id != _SECTION_IDS[section_type]:
        raise StateError(f"the state is of section {section_id}")
    records: list[tuple[int, int, bytes | None]] = []
    at = _HEAD.size
    while at < len(data):
        if at + _RECORD.size > len(data):
            raise StateError("the state is cut off in a record")
        number, key, size = _RECORD.unpack_from(data, at)
        at += _RECORD.size
        if size == _REMOVED:
            records.append((number, key, None))
            continue
        if at + size > len(data):
            raise StateError("the state is cut off in a value")
        records.append((number, key, data[at : at + size]))
        at += size
    return records


def _apply(
    section: object, records: list[tuple[int, int, bytes | None]], *, allows_removal: bool
) -> None:
    by_number = {declared.number: (name, declared) for name, declared in _FIELDS[type(section)]}
    seen = set()
    for number, key, data in records:
        if number not in by_number:
            raise StateError(f"the state has a field {number} that this program does not know")
        if (number, key) in seen:
            raise StateError(f"the state has field {number} twice")
        seen.add((number, key))
        name, declared = by_number[number]
        if data is None:
            if not allows_removal:
                raise StateError(f"the state takes field {number} away")
            _remove(section, name, declared, key)
            continue
        value = _from_bytes(declared, data, name)
        if declared.is_map:
            setattr(section, name, {**getattr(section, name), key: value})
        elif key:
            raise StateError(f"{name} is one value, not a table")
        else:
            setattr(section, name, value)


def _remove(section: object, name: str, declared: Stored, key: int) -> None:
    if declared.is_map:
        table = {k: v for k, v in getattr(section, name).items() if k != key}
        setattr(section, name, table)
    elif key or not declared.may_be_none:
        raise StateError(f"{name} is one value, which cannot be taken away")
    else:
        setattr(section, name, None)


def _from_bytes(declared: Stored, data: bytes, name: str) -> Any:  # noqa: ANN401 - any stored value
    codec = declared.codec
    if codec is bytes:
        return data
    if codec is int or codec is bool:
        if len(data) != _INT_BYTES:
            raise StateError(f"{name} is no number")
        number = int.from_bytes(data, "big")
        if codec is int:
            return number
        if number > 1:
            raise StateError(f"{name} is neither true nor false")
        return bool(number)
    try:
        if codec is LoadedKey:
            return LoadedKey.from_bytes(data)
        if codec is Sha1Thread:
            return Sha1Thread.from_bytes(data)
        assert wire_fields(codec)
        return decode(codec, data)
    except (DecodeError, TpmError, ValueError) as error:
        raise StateError(f"{name} is malformed: {error}") from error


# -- writing, compiled -----------------------------------------------------------------------------

_Record = Callable[[int, Any], bytes]
"""Writes one record of a field, from its key and its value."""
_Records = Callable[[Any], bytes]
"""Writes all records of a field, from its value."""
_Changes = Callable[[Any, Any], bytes]
"""Writes the records in which two values of a field differ, the one before and the one after."""


def _record(declared: Stored) -> _Record:
    number, codec, head = declared.number, declared.codec, _RECORD.pack
    if codec is bytes:
        return lambda key, value: head(number, key, len(value)) + value
    if codec is int or codec is bool:
        whole = _NUMBER.pack
        return lambda key, value: whole(number, key, _INT_BYTES, value)
    write = codec.to_bytes if codec is LoadedKey or codec is Sha1Thread else encode

    def record(key: int, value: Any) -> bytes:  # noqa: ANN401 - of the codec
        data = write(value)
        return head(number, key, len(data)) + data

    return record


def _records_of(declared: Stored) -> _Records:
    record = _record(declared)
    if declared.is_map:
        return lambda table: b"".join([record(key, entry) for key, entry in table.items()])
    if not declared.may_be_none:
        return partial(record, 0)
    return lambda value: b"" if value is None else record(0, value)


def _removal(declared: Stored, key: int) -> bytes:
    return _RECORD.pack(declared.number, key, _REMOVED)


def _value_changes(declared: Stored) -> _Changes:
    record, removed = _record(declared), _removal(declared, 0)
    return lambda _, new: removed if new is None else record(0, new)


def _map_changes(declared: Stored) -> _Changes:
    record = _record(declared)

    def changes(old: dict[int, Any], new: dict[int, Any]) -> bytes:
        found = b""
        for key, entry in new.items():
            if old.get(key) is not entry:
                found += record(key, entry)
        for key in old:
            if key not in new:
                found += _removal(declared, key)
        return found

    return changes


def _bank_changes(declared: Stored) -> _Changes:
    """For a map that has the same keys for ever: of 24 PCRs one has changed, as a rule."""
    record, other_changes = _record(declared), _map_changes(declared)

    def changes(old: dict[int, Any], new: dict[int, Any]) -> bytes:
        if len(old) != len(new):
            return other_changes(old, new)
        found = b""
        for key in compress(new, map(is_not, old.values(), new.values())):
            found += record(key, new[key])
        return found

    return changes


def _changes(declared: Stored) -> _Changes:
    if not declared.is_map:
        return _value_changes(declared)
    return _bank_changes(declared) if declared.has_fixed_keys else _map_changes(declared)


def _compile_encoding(section: type) -> _Records:
    """Make `encode_section` of a section."""
    namespace: dict[str, Any] = {"head": _HEAD.pack(VERSION, _SECTION_IDS[section])}
    pieces = ["head"]
    for name, declared in _FIELDS[section]:
        namespace[f"_{name}"] = _records_of(declared)
        pieces.append(f"_{name}(section.{name})")
    source = ["def encode(section):", f"    return b''.join(({', '.join(pieces)}))"]
    return cast("_Records", _compiled(source, namespace, section))


def _compile_delta(section: type) -> _Changes:
    """Make `delta` of a section: its head, and the records of all fields that are other objects.

    It runs with every command that is journaled.
    """
    namespace: dict[str, Any] = {"head": _HEAD.pack(VERSION, _SECTION_IDS[section])}
    source = ["def delta(before, after):", "    found = b''"]
    for name, declared in _FIELDS[section]:
        namespace[f"_{name}"] = _changes(declared)
        source += [
            f"    if before.{name} is not after.{name}:",
            f"        found += _{name}(before.{name}, after.{name})",
        ]
    source.append("    return head + found if found else found")
    return cast("_Changes", _compiled(source, namespace, section))


def _compiled(source: list[str], namespace: dict[str, Any], section: type) -> object:
    """The function of a section that straight-line code gives, as its `clone()` is one."""
    code = compile("\n".join(source), f"<codec {section.__qualname__}>", "exec")
    exec(code, namespace)  # noqa: S102 - made here from declarations
    return namespace[source[0].removeprefix("def ").partition("(")[0]]


_ENCODINGS: Final = {section: _compile_encoding(section) for section in _SECTION_IDS}
_DELTAS: Final = {section: _compile_delta(section) for section in _SECTION_IDS}
