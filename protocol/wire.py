"""Declare a structure once with construct; read and write it with compiled straight-line code.

A structure is a class whose fields are annotated with construct declarations::

    @wire
    class PcrSelection:
        pcr_select: Sized16

`wire` makes it a frozen, slotted, keyword-only dataclass, checks its declarations at import, and at
its first use compiles one function that decodes it and one that encodes it: runs of fixed-size
fields become one `struct` call. The construct declaration stays the only source of truth:
`construct_of(cls)` gives it, and a property test holds the two equal. (Compiling costs 0.4 ms a
structure, which a program that uses few of them need not pay.)

Invariants:
- Bytes from outside either decode or raise `DecodeError`, never anything else.
- Nothing is allocated on the word of a length field before that many bytes are known to be there.
- `encode(decode(data)) == data` for every accepted input, but for fields that ignore bytes.

Leaves to others: fields (`wire_fields.py`), compiling (`wire_compiler.py`), what a structure means
(`structures.py`, the commands), frames and sessions.
"""

from __future__ import annotations

import struct
from dataclasses import MISSING, FrozenInstanceError, make_dataclass
from dataclasses import field as dataclass_field
from inspect import get_annotations
from typing import Any, Final, TypeVar, cast, dataclass_transform, get_type_hints

import construct as cs

from protocol.wire_compiler import FRAME_HEADER, changing, compiled
from protocol.wire_fields import (
    B4,
    B16,
    B32,
    CONSTANT,
    HANDLE,
    SECRET,
    U8,
    U16,
    U16LE,
    U32,
    U32LE,
    U64,
    U64LE,
    Bool,
    ByLeadingU16,
    Checked,
    ConstU8,
    ConstU16,
    ConstU32,
    Counted,
    DecodeError,
    Digest,
    EncAuth,
    EncodeError,
    Handle,
    InSized,
    Mapped,
    Marker,
    Nested,
    Nonce,
    Rest,
    SecretAuth,
    SecretSized,
    Sized,
    Sized16,
    WireField,
    construct_of,
    declared_field,
    decode,
    encode,
    in_sized,
    wire_fields,
)

__all__ = [
    "B4",
    "B16",
    "B32",
    "CONSTANT",
    "FRAME_HEADER",
    "HANDLE",
    "SECRET",
    "U8",
    "U16",
    "U16LE",
    "U32",
    "U32LE",
    "U64",
    "U64LE",
    "Bool",
    "ByLeadingU16",
    "Checked",
    "ConstU8",
    "ConstU16",
    "ConstU32",
    "Counted",
    "DecodeError",
    "Digest",
    "EncAuth",
    "EncodeError",
    "Handle",
    "Mapped",
    "Marker",
    "Nested",
    "Nonce",
    "Rest",
    "SecretAuth",
    "SecretSized",
    "Sized",
    "Sized16",
    "WireField",
    "changing",
    "compile_all",
    "construct_of",
    "decode",
    "decode_from",
    "encode",
    "encode_frame",
    "in_sized",
    "wire",
    "wire_fields",
]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def wire(cls: type[T]) -> type[T]:
    """Turn a class of annotated fields into a wire structure.

    Raises:
        TypeError: A field has no construct declaration, or one that the compiler does not know.
    """
    hints = get_type_hints(cls, include_extras=True)
    names = [*get_annotations(cls)]
    members = {n: v for n, v in cls.__dict__.items() if n not in {"__dict__", "__weakref__"}}
    declared = tuple(
        declared_field(cls, name, hints[name], members.pop(name, MISSING)) for name in names
    )
    # `dataclass` would make the same of it, and take ten times as long: 40 ms for all structures.
    structure = cast("Any", type(cls))(
        cls.__name__, cls.__bases__, {**members, "__slots__": tuple(names)}
    )
    structure.__wire_fields__ = declared
    structure.__dataclass_fields__ = _DataclassFields()
    for field in declared:
        _check_known(structure, field.name, field.construct)
    _compile_at_first_use(structure)
    structure.__repr__ = _repr
    structure.__eq__ = _eq
    structure.__hash__ = _hash
    structure.__setattr__ = structure.__delattr__ = _frozen
    _STRUCTURES.append(structure)
    return cast("type[T]", structure)


class _DataclassFields:
    """The fields as `dataclasses.replace` and `dataclasses.fields` want them, when they do."""

    def __get__(self, _value: object, structure: Any) -> Any:
        declared = [
            (f.name, f.construct, dataclass_field(default=f.default))
            for f in wire_fields(structure)
        ]
        made: Any = make_dataclass(structure.__name__, declared, kw_only=True)
        found = made.__dataclass_fields__
        structure.__dataclass_fields__ = found
        return found


_STRUCTURES: Final[list[type]] = []


def compile_all() -> None:
    """Compile every structure declared so far (for a parent whose children are to share them)."""
    for structure in _STRUCTURES:
        compiled(structure)


def _compile_at_first_use(structure: Any) -> None:
    """Give a structure methods that compile it and then are replaced by what was compiled."""

    def now_compiled() -> Any:
        compiled(structure)
        return structure

    def init(self: object, **values: object) -> None:
        now_compiled().__init__(self, **values)

    structure.__wire_decode__ = staticmethod(
        lambda data, at: now_compiled().__wire_decode__(data, at)
    )
    structure.__wire_operands__ = staticmethod(lambda data: now_compiled().__wire_operands__(data))
    structure.__wire_encode__ = lambda self: now_compiled().__wire_encode__(self)
    structure.__wire_frame__ = lambda self, tag, code: now_compiled().__wire_frame__(
        self, tag, code
    )
    structure.__init__ = init


def _repr(self: object) -> str:
    shown = [
        f"{f.name}={'<hidden>' if SECRET in f.markers else repr(getattr(self, f.name))}"
        for f in wire_fields(type(self))
        if CONSTANT not in f.markers
    ]
    return f"{type(self).__name__}({', '.join(shown)})"


def _eq(self: object, other: object) -> Any:
    if type(other) is not type(self):
        return NotImplemented
    return all(getattr(self, f.name) == getattr(other, f.name) for f in wire_fields(type(self)))


def _hash(self: object) -> int:
    return hash(tuple(getattr(self, f.name) for f in wire_fields(type(self))))


def _frozen(self: object, name: str, *_value: object) -> None:
    raise FrozenInstanceError(f"{type(self).__name__}.{name} cannot be changed")


def _check_known(structure: type, name: str, declaration: Any) -> None:
    """Refuse, at import, what the compiler would not know."""
    if isinstance(declaration, Checked | Mapped):
        _check_known(structure, name, declaration.subcon)
        return
    is_bytes = isinstance(declaration, cs.Bytes) and isinstance(declaration.length, int)
    is_sized = isinstance(declaration, cs.Prefixed) and declaration.subcon is cs.GreedyBytes
    known = (cs.FormatField, Nested, ByLeadingU16, Counted, InSized)
    if not (
        is_bytes or is_sized or declaration is cs.GreedyBytes or isinstance(declaration, known)
    ):
        raise TypeError(
            f"{structure.__name__}.{name}: the compiler does not know {declaration!r}; "
            "structures in a sized field are declared with in_sized"
        )


def decode_from(structure: type[T], data: bytes, offset: int) -> tuple[T, int]:
    """Read one structure from `data` at `offset`; give it and the offset behind it.

    Raises:
        DecodeError: As `decode`, but left-over bytes are the caller's.
    """
    return structure.__wire_decode__(data, offset)  # type: ignore[attr-defined,no-any-return]


def encode_frame(value: object, tag: int, code: int) -> bytes:
    """Write one structure behind a header.

    Args:
        value: What stands behind it.
        tag: The header's tag.
        code: Ordinal or return code.

    Raises:
        EncodeError: A field does not fit its declaration.
    """
    try:
        return value.__wire_frame__(tag, code)  # type: ignore[attr-defined,no-any-return]
    except (struct.error, OverflowError) as error:
        raise EncodeError(f"{type(value).__name__}: {error}") from error
