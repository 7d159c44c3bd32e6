"""Sections of state: what a TPM keeps, in parts that live and die together.

A section is a class of fields, each marked with the number under which it is stored. Its values
are never changed in place: a command that changes something clones the section (shallowly), puts
new values into the clone, and the old section stays as it was. So a failed command costs nothing
to undo, a command that changes nothing copies nothing, and what changed between two states is
found by comparing identities, field by field and entry by entry.

Invariants:
- A field holds an immutable value (int, bytes, bool, None, a wire structure, a LoadedKey) or a
  dict of such values that is replaced, not modified.
- Field numbers are never used again for something else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast, dataclass_transform

S = TypeVar("S")

_STORED = "stored"


@dataclass(frozen=True, slots=True)
class Stored:
    """How a field is stored.

    Attributes:
        number: Its record number within the section.
        codec: What one value is: `bytes`, `int`, `bool`, or a class with to_bytes / from_bytes.
        is_map: The field is a dict from a u32 to such values; each entry is a record of its own.
        may_be_none: The field may have no value at all, and then has no record.
        has_fixed_keys: Once such a dict has keys, all that follow have the same, in the same order.
    """

    number: int
    codec: Any
    is_map: bool = False
    may_be_none: bool = False
    has_fixed_keys: bool = False


def stored(number: int, codec: object, *, default: object) -> Any:  # noqa: ANN401 - like dataclasses.field
    """A field with one value, or None when there is none: then that is its default."""
    declared = Stored(number, codec, may_be_none=default is None)
    return field(default=cast("Any", default), metadata={_STORED: declared})


def stored_map(
    number: int,
    codec: object,
    *,
    default_factory: Callable[[], dict[int, Any]],
    has_fixed_keys: bool = False,
) -> Any:  # noqa: ANN401 - like dataclasses.field
    """A field that maps a u32 (handle, index, identifier) to values."""
    declared = Stored(number, codec, is_map=True, has_fixed_keys=has_fixed_keys)
    return field(default_factory=default_factory, metadata={_STORED: declared})


def stored_fields(section: type) -> tuple[tuple[str, Stored], ...]:
    """Names and declarations of a section's fields, in order of their numbers."""
    found = [(f.name, cast("Stored", f.metadata[_STORED])) for f in fields(cast("Any", section))]
    return tuple(sorted(found, key=lambda item: item[1].number))


class Section:
    """What every section has."""

    __slots__ = ()

    def clone(self: S) -> S:
        """A shallow copy; `@section` replaces this with straight-line code."""
        raise NotImplementedError(type(self).__name__)

    def __repr__(self) -> str:
        # Sections are full of secrets; a log line or a failed assertion must not show them.
        return f"<{type(self).__name__}>"


@dataclass_transform(kw_only_default=True, field_specifiers=(stored, stored_map))
def section(cls: type[S]) -> type[S]:
    """Make a class of stored fields a section, with a fast shallow `clone()`.

    Raises:
        TypeError: Two fields have one number, or a field has none.
    """
    made = cast("Any", dataclass(slots=True, kw_only=True, repr=False)(cls))
    numbers = [f.metadata[_STORED].number if _STORED in f.metadata else None for f in fields(made)]
    if None in numbers or len(set(numbers)) != len(numbers):
        raise TypeError(f"{cls.__name__}: every field needs a number of its own")
    lines = [f"    new.{f.name} = self.{f.name}" for f in fields(made)]
    source = "\n".join(["def clone(self):", "    new = _new(_cls)", *lines, "    return new"])
    namespace: dict[str, Any] = {"_new": object.__new__, "_cls": made}
    exec(compile(source, f"<section {cls.__qualname__}>", "exec"), namespace)  # noqa: S102 - made here from declarations
    made.clone = namespace["clone"]
    return cast("type[S]", made)
