"""Where the lengths, counts, numbers, booleans and handles of a request are, from its declaration.

`places()` walks the construct declarations along bytes that fit them, into nested structures, and
into the structures that commands find in sized fields (`_INSIDE`).
"""

from dataclasses import dataclass

import construct as cs

from protocol.delegation_structures import DelegateKeyBlob, DelegateOwnerBlob
from protocol.structures import (
    CmkAuth,
    ContextBlob,
    KeyHandleList,
    KeyParms,
    PcrInfo,
    PcrInfoLong,
    PcrSelection,
    Pubkey,
    RsaKeyParms,
)
from protocol.wire import (
    CONSTANT,
    HANDLE,
    ByLeadingU16,
    Checked,
    Counted,
    DecodeError,
    Mapped,
    Nested,
    decode,
    wire_fields,
)

LENGTH, COUNT, NUMBER, TRUTH, HANDLE_PLACE = "length", "count", "number", "truth", "handle"

_INSIDE = {
    "parms": (RsaKeyParms,),
    "pcr_info": (PcrInfoLong, PcrInfo),
    "seal_info": (PcrInfoLong, PcrInfo),
    "context_blob": (ContextBlob,),
    "sub_cap": (KeyParms,),
}
"""What a command decodes from a sized field of this name."""
_ANYWHERE = (Pubkey, DelegateKeyBlob, DelegateOwnerBlob, KeyHandleList, CmkAuth, PcrSelection)


@dataclass(frozen=True, slots=True)
class Place:
    """One field that says how much, which or whether.

    Attributes:
        kind: LENGTH, COUNT, NUMBER, TRUTH or HANDLE_PLACE.
        name: Of the field, with those around it.
        at, width: Where it is, in bytes.
        end: For a LENGTH: where what it measures ends.
        around: Lengths that measure bytes in which this field lies, outermost first.
    """

    kind: str
    name: str
    at: int
    width: int
    end: int = 0
    around: tuple = ()


def places(structure, data, at=0, name="", around=()):
    """The places of a structure in `data` at `at`, and where it ends.

    Raises:
        DecodeError: The bytes do not fit the declaration.
    """
    found = []
    for field in wire_fields(structure):
        walker = _Walker(f"{name}{field.name}", field, around, found)
        at = walker.walk(field.construct, data, at)
    return found, at


class _Walker:
    def __init__(self, name, field, around, found):
        self.name, self.field, self.around, self.found = name, field, around, found

    def place(self, kind, at, width, end=0):
        self.found.append(Place(kind, self.name, at, width, end, self.around))
        return self.found[-1]

    def inner(self, structure, data, at, around):
        inner, end = places(structure, data, at, f"{self.name}.", around)
        self.found += inner
        return end

    def walk(self, declaration, data, at):  # noqa: PLR0911 - one way out for each kind
        if isinstance(declaration, Mapped) and declaration.to_value is bool:
            self.place(TRUTH, at, 1)
            return at + 1
        if isinstance(declaration, Mapped | Checked):
            return self.walk(declaration.subcon, data, at)
        if isinstance(declaration, cs.FormatField):
            kind = HANDLE_PLACE if HANDLE in self.field.markers else NUMBER
            self.place(kind, at, declaration.sizeof())
            return at + declaration.sizeof()
        if isinstance(declaration, cs.Bytes):
            return at + declaration.length
        if declaration is cs.GreedyBytes:
            return len(data)
        if isinstance(declaration, Nested):
            return self.inner(declaration.structure, data, at, self.around)
        if isinstance(declaration, ByLeadingU16):
            leading = int.from_bytes(data[at : at + 2], "big")
            structure = declaration.cases.get(leading, declaration.default)
            return self.inner(structure, data, at, self.around)
        if isinstance(declaration, Counted):
            return self.counted(declaration, data, at)
        return self.measured(declaration, data, at)

    def counted(self, declaration, data, at):
        width = declaration.count.sizeof()
        self.place(COUNT, at, width)
        number = int.from_bytes(data[at : at + width], "big")
        at += width
        for _ in range(number):
            at = self.walk(declaration.item, data, at)
        return at

    def measured(self, declaration, data, at):
        structure = getattr(declaration, "structure", None)
        length = declaration.lengthfield if structure is None else declaration.length
        width = length.sizeof()
        start = at + width
        end = start + int.from_bytes(data[at:start], "big")
        measure = self.place(LENGTH, at, width, end)
        if structure is None:
            structure = _inside(self.field.name, data[start:end])
        if structure is not None:
            # What is inside knows nothing of the bytes behind it.
            self.inner(structure, data[:end], start, (*self.around, measure))
        return end


def _inside(field_name, payload):
    """The structure that fills a sized field, if it is known to hold one."""
    for structure in (*_INSIDE.get(field_name, ()), *_ANYWHERE):
        try:
            decode(structure, payload)
        except DecodeError:
            continue
        return structure
    return None


def least(structure):
    """The smallest bytes that a declaration accepts."""
    return b"".join(_least(field.construct, field) for field in wire_fields(structure))


def _least(declaration, field):  # noqa: C901, PLR0911 - one way out for each kind
    if CONSTANT in field.markers:
        return declaration.build(field.default)
    if isinstance(declaration, Checked) and isinstance(declaration.subcon, cs.FormatField):
        legal = next(value for value in range(1 << 16) if declaration.is_legal(value))
        return declaration.subcon.build(legal)
    if isinstance(declaration, Checked | Mapped):
        return _least(declaration.subcon, field)
    if isinstance(declaration, cs.FormatField):
        return bytes(declaration.sizeof())
    if isinstance(declaration, cs.Bytes):
        return bytes(declaration.length)
    if declaration is cs.GreedyBytes:
        return b""
    if isinstance(declaration, Nested):
        return least(declaration.structure)
    if isinstance(declaration, ByLeadingU16):
        return least(declaration.default)
    if isinstance(declaration, Counted):
        return bytes(declaration.count.sizeof())
    structure = getattr(declaration, "structure", None)
    if structure is None:
        return bytes(declaration.lengthfield.sizeof())
    inner = least(structure)
    return declaration.length.build(len(inner)) + inner
