"""What a field of a wire structure may be declared as: construct's declarations and a few more.

Each says with construct how its bytes are read and written. `wire_compiler.py` makes code of the
same declarations; a property test holds the two equal.

Leaves to others: structures made of fields (`wire.py`), compiling (`wire_compiler.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Annotated, Any, TypeVar, cast, get_args, get_origin

import construct as cs

from protocol.return_codes import ReturnCode

T = TypeVar("T")


class DecodeError(Exception):
    """Bytes from outside are not what the declaration says.

    Attributes:
        code: The return code a TPM gives for this kind of malformation.
    """

    def __init__(self, code: ReturnCode, reason: str) -> None:
        super().__init__(code, reason)
        self.code = code
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason} (TPM_{self.code.name})"


class EncodeError(ValueError):
    """A value does not fit its declaration; our own or the calling program's mistake."""


# -- construct declarations that say more than construct's own -------------------------------------


class Checked(cs.Adapter):  # type: ignore[type-arg]
    """A subcon whose value must pass a predicate, else `DecodeError(code)`."""

    def __init__(
        self, subcon: Any, is_legal: Callable[[Any], bool], code: ReturnCode, reason: str
    ) -> None:
        super().__init__(subcon)
        self.is_legal = is_legal
        self.code = code
        self.reason = reason

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        if not self.is_legal(obj):
            raise DecodeError(self.code, self.reason)
        return obj

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return obj


class Mapped(cs.Adapter):  # type: ignore[type-arg]
    """A subcon whose wire value and Python value differ; both functions are total."""

    def __init__(
        self, subcon: Any, to_value: Callable[[Any], Any], to_wire: Callable[[Any], Any]
    ) -> None:
        super().__init__(subcon)
        self.to_value = to_value
        self.to_wire = to_wire

    def _decode(self, obj: Any, context: Any, path: str) -> Any:
        return self.to_value(obj)

    def _encode(self, obj: Any, context: Any, path: str) -> Any:
        return self.to_wire(obj)


class Nested(cs.Construct):  # type: ignore[type-arg]
    """Another @wire structure, in place."""

    def __init__(self, structure: type) -> None:
        super().__init__()
        self.structure = structure

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        return construct_of(self.structure)._parse(stream, context, path)

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        return construct_of(self.structure)._build(obj, stream, context, path)


class ByLeadingU16(cs.Construct):  # type: ignore[type-arg]
    """One of several structures, told apart by their first two bytes (KEY and KEY12, for one)."""

    def __init__(self, cases: Mapping[int, type], default: type) -> None:
        super().__init__()
        self.cases = dict(cases)
        self.default = default

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        start = stream.tell()
        head = stream.read(2)
        stream.seek(start)
        if len(head) < 2:
            raise short_of("a structure tag")
        structure = self.cases.get(int.from_bytes(head, "big"), self.default)
        return construct_of(structure)._parse(stream, context, path)

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        return construct_of(type(obj))._build(obj, stream, context, path)


class Counted(cs.Construct):  # type: ignore[type-arg]
    """A count and that many items, as a tuple."""

    def __init__(self, count: Any, item: Any) -> None:
        super().__init__()
        self.count = count
        self.item = item

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        number = self.count._parse(stream, context, path)
        return tuple(self.item._parse(stream, context, path) for _ in range(number))

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        self.count._build(len(obj), stream, context, path)
        for item in obj:
            self.item._build(item, stream, context, path)
        return obj


def in_sized(structure: type, length: Any = cs.Int32ub) -> Any:
    """A length and a structure that fills exactly that many bytes."""
    return InSized(structure, length)


class InSized(cs.Construct):  # type: ignore[type-arg]
    """See `in_sized`."""

    def __init__(self, structure: type, length: Any) -> None:
        super().__init__()
        self.structure = structure
        self.length = length

    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        inner = cs.Prefixed(self.length, cs.GreedyBytes)._parse(stream, context, path)
        return decode(self.structure, inner)

    def _build(self, obj: Any, stream: IO[bytes], context: Any, path: str) -> Any:
        inner = encode(obj)
        cs.Prefixed(self.length, cs.GreedyBytes)._build(inner, stream, context, path)
        return obj


# -- markers and field types -----------------------------------------------------------------------


class Marker:
    """Says something about a field that is not part of its bytes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


HANDLE = Marker("HANDLE")
"""A leading handle: sent before the parameters, left out of the parameter digest."""
CONSTANT = Marker("CONSTANT")
"""The field's default is the only legal value; anything else is TPM_INVALID_STRUCTURE."""
SECRET = Marker("SECRET")
"""Never shown by repr."""

U8 = Annotated[int, cs.Int8ub]
U16 = Annotated[int, cs.Int16ub]
U32 = Annotated[int, cs.Int32ub]
U64 = Annotated[int, cs.Int64ub]
U16LE = Annotated[int, cs.Int16ul]
U32LE = Annotated[int, cs.Int32ul]
U64LE = Annotated[int, cs.Int64ul]
ConstU8 = Annotated[int, cs.Int8ub, CONSTANT]
ConstU16 = Annotated[int, cs.Int16ub, CONSTANT]
ConstU32 = Annotated[int, cs.Int32ub, CONSTANT]
Handle = Annotated[int, cs.Int32ub, HANDLE]
B4 = Annotated[bytes, cs.Bytes(4)]
B16 = Annotated[bytes, cs.Bytes(16)]
B32 = Annotated[bytes, cs.Bytes(32)]
Digest = Annotated[bytes, cs.Bytes(20)]
Nonce = Annotated[bytes, cs.Bytes(20)]
EncAuth = Annotated[bytes, cs.Bytes(20)]
SecretAuth = Annotated[bytes, cs.Bytes(20), SECRET]
Sized = Annotated[bytes, cs.Prefixed(cs.Int32ub, cs.GreedyBytes)]
SecretSized = Annotated[bytes, cs.Prefixed(cs.Int32ub, cs.GreedyBytes), SECRET]
Sized16 = Annotated[bytes, cs.Prefixed(cs.Int16ub, cs.GreedyBytes)]
Rest = Annotated[bytes, cs.GreedyBytes]
Bool = Annotated[
    bool,
    Mapped(
        Checked(
            cs.Int8ub,
            lambda value: value <= 1,
            ReturnCode.BAD_PARAMETER,
            "a BOOL other than 0 or 1",
        ),
        bool,
        int,
    ),
]


@dataclass(frozen=True, slots=True)
class WireField:
    """One field of a structure, as declared."""

    name: str
    construct: Any
    markers: frozenset[Marker]
    default: Any


# -- structures, by the functions that were compiled for them -------------------------------------


def decode(structure: type[T], data: bytes) -> T:
    """Read one structure from exactly `data`.

    Raises:
        DecodeError: BAD_PARAM_SIZE when bytes are missing or left over, else as the field says.
    """
    value, end = structure.__wire_decode__(data, 0)  # type: ignore[attr-defined]
    if end != len(data):
        raise DecodeError(
            ReturnCode.BAD_PARAM_SIZE,
            f"{len(data) - end} bytes left over after {structure.__name__}",
        )
    return value  # type: ignore[no-any-return]


def encode(value: object) -> bytes:
    """Write one structure.

    Raises:
        EncodeError: A field does not fit its declaration.
    """
    try:
        return value.__wire_encode__()  # type: ignore[attr-defined,no-any-return]
    except (struct.error, OverflowError) as error:
        raise EncodeError(f"{type(value).__name__}: {error}") from error


# -- declarations of structures --------------------------------------------------------------------


def construct_of(structure: type) -> Any:
    """The construct declaration of a structure, for documentation and for the property test."""
    declared: tuple[WireField, ...] = cast("Any", structure).__wire_fields__
    subcons = [f.name / with_constant(f) for f in declared]
    return Mapped(
        _ShortIsDecodeError(cs.Struct(*subcons)),
        lambda parsed: structure(**{f.name: parsed[f.name] for f in declared}),
        lambda value: {f.name: getattr(value, f.name) for f in declared},
    )


def wire_fields(structure: type) -> tuple[WireField, ...]:
    """The declared fields of a structure, in wire order."""
    return cast("tuple[WireField, ...]", cast("Any", structure).__wire_fields__)


class _ShortIsDecodeError(cs.Subconstruct):  # type: ignore[type-arg]
    def _parse(self, stream: IO[bytes], context: Any, path: str) -> Any:
        try:
            return self.subcon._parsereport(stream, context, path)
        except cs.StreamError as error:
            raise short_of(path) from error


def short_of(where: str) -> DecodeError:
    """What bytes are told that end too soon."""
    return DecodeError(ReturnCode.BAD_PARAM_SIZE, f"the bytes end inside {where}")


def with_constant(field: WireField) -> Any:
    """The construct declaration of a field, with the check of a constant one."""
    if CONSTANT not in field.markers:
        return field.construct
    return Checked(
        field.construct,
        lambda value: value == field.default,
        ReturnCode.INVALID_STRUCTURE,
        f"{field.name} is not {field.default!r}",
    )


def declared_field(structure: type, name: str, hint: Any, default: Any) -> WireField:
    """A field, from its annotation.

    Raises:
        TypeError: The annotation has no construct declaration.
    """
    if get_origin(hint) is Annotated:
        _, *extras = get_args(hint)
        constructs = [x for x in extras if isinstance(x, cs.Construct)]
        markers = frozenset(x for x in extras if isinstance(x, Marker))
    elif hasattr(hint, "__wire_fields__"):
        constructs, markers = [Nested(hint)], frozenset()
    else:
        constructs, markers = [], frozenset()
    if len(constructs) != 1:
        raise TypeError(f"{structure.__name__}.{name} has no construct declaration")
    return WireField(name, constructs[0], markers, default)
