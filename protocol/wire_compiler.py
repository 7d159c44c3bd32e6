"""Compile what reads and writes a wire structure: straight-line code, from its declarations.

Runs of fixed-size fields become one `struct` call. A construct parse of a 14-byte command costs
8 us, the compiled one 0.5.

Leaves to others: what may be declared (`wire_fields.py`), when to compile (`wire.py`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import MISSING
from typing import Any, Final, TypeVar, cast

import construct as cs

from protocol.wire_fields import (
    CONSTANT,
    ByLeadingU16,
    Checked,
    Counted,
    DecodeError,
    EncodeError,
    InSized,
    Mapped,
    Nested,
    WireField,
    decode,
    short_of,
    wire_fields,
    with_constant,
)

T = TypeVar("T")

FRAME_HEADER: Final = struct.Struct(">HII")
"""Tag, size of the whole frame, ordinal or return code: how every command and response begins."""


def _local(field_name: str) -> str:
    """Name a field's local variable, so that a field may be called `data`, `size` or `value`."""
    return f"{field_name}_"


def _field_name(local: str) -> str:
    return local.removesuffix("_")


def _open_twin(structure: type) -> type:
    """A class with the fields of a structure, in the same places, which lets them be set.

    An object is filled as one of these and then made one of the frozen class by setting its
    `__class__` (30 ns, once): 5 ns a field, where going around the frozen `__setattr__` costs 35.
    """
    slots = tuple(f.name for f in wire_fields(structure))
    return type(structure.__name__, (), {"__slots__": slots})


_FIELDS_OF_TWIN_MIN: Final = 4
"""From this many fields on it is quicker to make `self` a twin and back than to go around."""


class _Compiler:
    """Writes the source of `__wire_decode__`, `__wire_encode__` and `__init__` of one structure.

    Fixed-size fields are collected into one struct format until one of variable size ends the run;
    the length of that one is read with them.
    """

    def __init__(self, structure: type, declared: tuple[WireField, ...]) -> None:
        self.structure = structure
        self.declared = declared
        self.names: dict[str, Any] = {
            "DecodeError": DecodeError,
            "EncodeError": EncodeError,
            "short_of": short_of,
            "_new": object.__new__,
            "_cls": structure,
            "_open": _open_twin(structure),
            "_set_class": object.__dict__["__class__"].__set__,
        }
        self.decoding: list[str] = []
        self.encoding: list[str] = []
        self.pieces: list[str] = []  # expressions for the bytes, in order
        self.packed: dict[str, str] = {}  # packing functions, with their formats
        self.run_format = ""
        self.run_in: list[str] = []
        self.run_out: list[str] = []
        self.after_run: list[str] = []
        self.runs: list[tuple[struct.Struct, list[str]]] = []  # with what reads them
        self.is_of_fixed_size = True
        self.serial = 0

    def install(self) -> None:
        for field in self.declared:
            self._field(field, f"self.{field.name}")
        self._end_run()
        structure = cast("Any", self.structure)
        names = [f.name for f in self.declared]
        making = [
            "    value = _new(_open)",
            *[f"    value.{name} = {_local(name)}" for name in names],
            "    value.__class__ = _cls",
        ]
        source = [
            "def __wire_decode__(data, at):",
            "    size = len(data)",
            *self.decoding,
            *making,
            "    return value, at",
            "def __wire_operands__(data):",
            *self._operands_source(),
            *making,
            "    return value",
            "def __wire_encode__(self):",
            *self.encoding,
            f"    return {self._joined()}",
            "def __wire_frame__(self, tag, code):",
            *self.encoding,
            *self._framed(),
        ]
        source += self._init_source(names)
        namespace = self.names
        exec(compile("\n".join(source), f"<wire {structure.__qualname__}>", "exec"), namespace)  # noqa: S102 - the source is made here from declarations
        structure.__wire_decode__ = staticmethod(namespace["__wire_decode__"])
        structure.__wire_operands__ = staticmethod(namespace["__wire_operands__"])
        structure.__wire_encode__ = namespace["__wire_encode__"]
        structure.__wire_frame__ = namespace["__wire_frame__"]
        structure.__init__ = namespace["__init__"]

    def _operands_source(self) -> list[str]:
        """Lines that read the operands of a command that is nothing but its header and them.

        None for other bytes than those: missing, left over, auth blocks.
        """
        at = FRAME_HEADER.size
        if self.is_of_fixed_size and len(self.runs) < 2:
            packer, reading = self.runs[0] if self.runs else (struct.Struct(""), [])
            return [f"    if len(data) != {at + packer.size}: return None", *reading]
        return [
            "    size = len(data)",
            f"    at = {at}",
            *self.decoding,
            "    if at != size: return None",
        ]

    def _init_source(self, names: list[str]) -> list[str]:
        parameters = []
        for field in self.declared:
            if field.default is MISSING:
                parameters.append(field.name)
            else:
                self.names[f"_default_{field.name}"] = field.default
                parameters.append(f"{field.name}=_default_{field.name}")
        star = ["*", *parameters] if parameters else []
        if len(names) < _FIELDS_OF_TWIN_MIN:
            for name in names:
                self.names[f"_set_{name}"] = cast("Any", self.structure).__dict__[name].__set__
            body = [f"    _set_{name}(self, {name})" for name in names] or ["    pass"]
        else:
            body = [f"    self.{name} = {name}" for name in names]
            body = ["    _set_class(self, _open)", *body, "    self.__class__ = _cls"]
        return [f"def __init__(self{''.join(', ' + p for p in star)}):", *body]

    def _joined(self) -> str:
        """The expression for all bytes."""
        match self.pieces:
            case []:
                return "b''"
            case [piece] if not piece.startswith("*"):
                return piece
            case [first, second] if not (first.startswith("*") or second.startswith("*")):
                return f"{first} + {second}"
            case pieces:
                return f"b''.join(({', '.join(pieces)},))"

    def _framed(self) -> list[str]:
        """Lines that return the bytes behind a header of tag, size and code.

        The header is packed with the first fields where that is possible: 0.3 us less a response.
        """
        head, *rest = self.pieces or [""]
        pack = head.partition("(")[0]
        if pack not in self.packed or any("(" in piece or "*" in piece for piece in rest):
            pack_header = self._fresh(FRAME_HEADER.pack)
            return [
                f"    body = {self._joined()}",
                f"    return {pack_header}(tag, {FRAME_HEADER.size} + len(body), code) + body",
            ]
        packer = struct.Struct(FRAME_HEADER.format + self.packed[pack].lstrip(">"))
        size = " + ".join([str(packer.size), *[f"len({piece})" for piece in rest]])
        frame = f"{self._fresh(packer.pack)}(tag, {size}, code, {head.partition('(')[2]}"
        return [f"    return {' + '.join([frame, *rest])}"]

    def _fresh(self, value: Any) -> str:
        self.serial += 1
        name = f"_x{self.serial}"
        self.names[name] = value
        return name

    def _field(self, field: WireField, source: str) -> None:
        name, declaration = field.name, field.construct
        if CONSTANT in field.markers:
            declaration = with_constant(field)
        self._emit(_local(name), declaration, source)

    def _emit(self, name: str, declaration: Any, source: str) -> None:
        """Emit code that leaves the decoded value in the local `name` and encodes `source`."""
        if isinstance(declaration, Checked):
            self._emit(name, declaration.subcon, source)
            test, code = self._fresh(declaration.is_legal), self._fresh(declaration.code)
            reason = self._fresh(declaration.reason)
            self._after(f"    if not {test}({name}): raise DecodeError({code}, {reason})")
        elif isinstance(declaration, Mapped):
            to_value, to_wire = self._fresh(declaration.to_value), self._fresh(declaration.to_wire)
            self._emit(name, declaration.subcon, f"{to_wire}({source})")
            self._after(f"    {name} = {to_value}({name})")
        elif isinstance(declaration, cs.FormatField):
            self._fixed(name, declaration.fmtstr, source)
        elif isinstance(declaration, cs.Bytes) and isinstance(declaration.length, int):
            length = declaration.length
            self._check_length(source, length, name)
            self._fixed(name, f">{length}s", source)
        else:
            self._variable(name, declaration, source)

    def _after(self, line: str) -> None:
        (self.after_run if self.run_format else self.decoding).append(line)

    def _check_length(self, source: str, length: int, name: str) -> None:
        where = f"{self.structure.__name__}.{_field_name(name)}"
        self.encoding.append(
            f"    if len({source}) != {length}: raise EncodeError('{where} is not {length} bytes')"
        )

    def _fixed(self, name: str, fmt: str, source: str) -> None:
        order, code = fmt[0], fmt[1:]
        if (
            self.run_format
            and self.run_format[0] != order
            and code != "B"
            and not code.endswith("s")
        ):
            self._end_run()
        if not self.run_format:
            self.run_format = order
        self.run_format += code
        self.run_in.append(name)
        self.run_out.append(source)

    def _end_run(self) -> None:
        if not self.run_format:
            return
        packer = struct.Struct(self.run_format)
        unpack, pack = self._fresh(packer.unpack_from), self._fresh(packer.pack)
        where = self._fresh(f"{self.structure.__name__}.{_field_name(self.run_in[0])}")
        read = f"    {', '.join(self.run_in)}, = {unpack}(data, "
        self.decoding += [
            f"    end = at + {packer.size}",
            f"    if end > size: raise short_of({where})",
            f"{read}at)",
            "    at = end",
            *self.after_run,
        ]
        self.runs.append((packer, [f"{read}{FRAME_HEADER.size})", *self.after_run]))
        self.pieces.append(f"{pack}({', '.join(self.run_out)})")
        if self.run_format.startswith(">"):
            self.packed[pack] = self.run_format
        self.run_format, self.run_in, self.run_out, self.after_run = "", [], [], []

    def _length(self, declaration: Any, source: str) -> None:
        """Emit reading of a length or count into `count` and writing of the length of `source`."""
        if self.after_run:  # what is wrong before the length is told first
            self._end_run()
        self._fixed("count", declaration.fmtstr, f"len({source})")
        self._end_run()

    def _variable(self, name: str, declaration: Any, source: str) -> None:
        self.is_of_fixed_size = False
        if not isinstance(declaration, cs.Prefixed | Counted):
            self._end_run()
        where = f"{self.structure.__name__}.{_field_name(name)}"
        if isinstance(declaration, cs.Prefixed):
            if declaration.subcon is not cs.GreedyBytes:
                raise TypeError(f"{where}: only bytes may be prefixed, use in_sized for structures")
            self._length(declaration.lengthfield, source)
            self.decoding += [
                "    end = at + count",
                f"    if end > size: raise short_of('{where}')",
                f"    {name} = data[at:end]",
                "    at = end",
            ]
            self.pieces.append(source)
        elif declaration is cs.GreedyBytes:
            self.decoding += [f"    {name} = data[at:]", "    at = size"]
            self.pieces.append(source)
        elif isinstance(declaration, Nested):
            inner = self._fresh(compiled(declaration.structure))
            self.decoding.append(f"    {name}, at = {inner}(data, at)")
            self.pieces.append(f"{source}.__wire_encode__()")
        elif isinstance(declaration, ByLeadingU16):
            table = self._fresh({k: compiled(s) for k, s in declaration.cases.items()})
            default = self._fresh(compiled(declaration.default))
            self.decoding += [
                f"    if at + 2 > size: raise short_of('the tag of {where}')",
                f"    {name}, at = {table}.get(data[at] << 8 | data[at + 1], {default})(data, at)",
            ]
            self.pieces.append(f"{source}.__wire_encode__()")
        elif isinstance(declaration, Counted):
            self._counted(name, declaration, source)
        elif isinstance(declaration, InSized):
            self._in_sized(name, declaration, source)
        else:
            raise TypeError(f"{where}: the compiler does not know {declaration!r}")

    def _counted(self, name: str, declaration: Counted, source: str) -> None:
        self._length(declaration.count, source)
        if isinstance(declaration.item, Nested):
            inner = self._fresh(compiled(declaration.item.structure))
            self.decoding += [
                f"    {name} = []",
                "    for _ in range(count):",
                f"        item, at = {inner}(data, at)",
                f"        {name}.append(item)",
                f"    {name} = tuple({name})",
            ]
            self.pieces.append(f"*[item.__wire_encode__() for item in {source}]")
            return
        item_size = declaration.item.sizeof()
        if isinstance(declaration.item, cs.FormatField):
            order, code = declaration.item.fmtstr[0], declaration.item.fmtstr[1:]
        else:
            order, code = ">", f"{item_size}s"
        packer = struct.Struct(order + code)
        unpack, pack_item = self._fresh(packer.iter_unpack), self._fresh(packer.pack)
        self.decoding += [
            f"    end = at + count * {item_size}",
            f"    if end > size: raise short_of('{_field_name(name)}')",
            f"    {name} = tuple([item for item, in {unpack}(data[at:end])])",
            "    at = end",
        ]
        self.pieces.append(f"*[{pack_item}(item) for item in {source}]")

    def _in_sized(self, name: str, declaration: InSized, source: str) -> None:
        self.serial += 1
        written = f"inner{self.serial}"
        self.encoding.append(f"    {written} = {source}.__wire_encode__()")
        self._length(declaration.length, written)
        self.pieces.append(written)
        inner = self._fresh(declaration.structure)
        whole = self._fresh(decode)
        self.decoding += [
            "    end = at + count",
            f"    if end > size: raise short_of('{_field_name(name)}')",
            f"    {name} = {whole}({inner}, data[at:end])",
            "    at = end",
        ]


def compiled(structure: Any) -> Any:
    """The decoder of a structure, which is compiled if it was not yet."""
    if not structure.__dict__.get("__wire_is_compiled__"):
        _Compiler(structure, wire_fields(structure)).install()
        structure.__wire_is_compiled__ = True
    return structure.__wire_decode__


def changing(structure: type[T], *field_names: str) -> Callable[..., T]:
    """A function that gives a copy of a structure in which the named fields have other values.

    What `dataclasses.replace` does, in 0.2 us instead of 3: for what changes with every command.
    """
    names = [f.name for f in wire_fields(structure)]
    for unknown in set(field_names) - set(names):
        raise TypeError(f"{structure.__name__} has no field {unknown}")
    source = [
        f"def changed(old, {', '.join(_local(n) for n in field_names)}):",
        "    new = _new(_open)",
        *[f"    new.{n} = {_local(n) if n in field_names else 'old.' + n}" for n in names],
        "    new.__class__ = _cls",
        "    return new",
    ]
    namespace: dict[str, Any] = {
        "_new": object.__new__,
        "_open": _open_twin(structure),
        "_cls": structure,
    }
    exec(compile("\n".join(source), f"<wire {structure.__qualname__}>", "exec"), namespace)  # noqa: S102 - as in the compiler
    return cast("Callable[..., T]", namespace["changed"])
