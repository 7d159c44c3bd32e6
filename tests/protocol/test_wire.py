"""The compiled codecs hold to their construct declarations, and any bytes get an answer."""

import dataclasses
from typing import Annotated

import construct as cs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import manager_messages, structures, wire
from protocol.return_codes import ReturnCode
from protocol.wire import (
    U8,
    U16,
    U16LE,
    U32,
    U32LE,
    Bool,
    ByLeadingU16,
    Checked,
    ConstU16,
    Counted,
    DecodeError,
    Digest,
    EncodeError,
    Handle,
    Nested,
    Rest,
    SecretAuth,
    Sized,
    Sized16,
    changing,
    construct_of,
    decode,
    decode_from,
    encode,
    encode_frame,
    in_sized,
)


@wire.wire
class Point:
    x: U16
    y: U16LE


@wire.wire
class Plain:
    tag: ConstU16 = 0x1234
    count: U8
    name: Sized16


@wire.wire
class Fancy:
    tag: ConstU16 = 0x0028
    digest: Digest
    flag: Bool


@wire.wire
class Everything:
    handle: Handle
    flag: Bool
    secret: SecretAuth
    points: Annotated[tuple[Point, ...], Counted(cs.Int16ub, Nested(Point))]
    numbers: Annotated[tuple[int, ...], Counted(cs.Int8ub, cs.Int32ub)]
    inner: Annotated[Point, in_sized(Point)]
    either: Annotated[Plain | Fancy, ByLeadingU16({0x28: Fancy}, Plain)]
    small: Annotated[int, Checked(cs.Int8ub, lambda v: v < 9, ReturnCode.BADINDEX, "too large")]
    little: U32LE
    rest: Rest


def structures_of(module):
    return [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and hasattr(thing, "__wire_fields__")
    ]


ALL = [Everything, *structures_of(structures), *structures_of(manager_messages)]

example = Everything(
    handle=7,
    flag=True,
    secret=b"s" * 20,
    points=(Point(x=1, y=2), Point(x=3, y=4)),
    numbers=(5, 6),
    inner=Point(x=8, y=9),
    either=Fancy(digest=b"d" * 20, flag=False),
    small=3,
    little=0x01020304,
    rest=b"the rest",
)


def outcome(parse, data):
    try:
        return parse(data)
    except DecodeError as error:
        return error.code


def whole(structure):
    """The construct way, with left-over bytes refused as `decode` does."""
    declaration = construct_of(structure)

    def parse(data):
        value = declaration.parse(data)
        if len(encode(value)) != len(data):
            raise DecodeError(ReturnCode.BAD_PARAM_SIZE, "left over")
        return value

    return parse


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.__name__)
@given(data=st.data())
def test_compiled_and_declared_decoding_agree(structure, data):
    raw = data.draw(st.one_of(st.binary(max_size=64), st.binary(max_size=12).map(lambda b: b * 6)))
    compiled, declared = (
        outcome(lambda d: decode(structure, d), raw),
        outcome(whole(structure), raw),
    )
    if isinstance(compiled, ReturnCode) or isinstance(declared, ReturnCode):
        # A run of fields is read at once: a short one may be reported before a wrong one.
        assert isinstance(compiled, ReturnCode)
        assert isinstance(declared, ReturnCode)
    else:
        assert compiled == declared


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.__name__)
@given(data=st.data())
def test_the_operands_of_a_command_are_what_stands_behind_its_header(structure, data):
    raw = data.draw(st.one_of(st.binary(max_size=64), st.binary(max_size=12).map(lambda b: b * 6)))
    operands = outcome(lambda d: structure.__wire_operands__(b"\x00\xc1header.." + d), raw)
    alone = outcome(lambda d: decode(structure, d), raw)
    if isinstance(alone, ReturnCode):  # of operands the size may be judged first, or last
        assert operands is None or isinstance(operands, ReturnCode)
    else:
        assert operands == alone


def test_operands_with_something_behind_them_are_none():
    for value in (Point(x=1, y=2), Plain(count=1, name=b"ab"), Fancy(digest=b"d" * 20, flag=True)):
        request = encode_frame(value, 0xC1, 7)
        assert value.__wire_operands__(request) == value
        assert value.__wire_operands__(request + b"!") is None


def test_a_value_survives_both_ways():
    data = encode(example)
    assert decode(Everything, data) == example
    assert construct_of(Everything).build(example) == data
    assert construct_of(Everything).parse(data) == example


def test_every_cut_is_too_short():
    data = encode(example)[: -len(example.rest)]
    for size in range(len(data)):
        with pytest.raises(DecodeError):
            decode(Everything, data[:size])


def test_left_over_bytes_are_refused_by_decode_and_left_by_decode_from():
    data = encode(Point(x=1, y=2)) + b"!"
    with pytest.raises(DecodeError) as caught:
        decode(Point, data)
    assert caught.value.code is ReturnCode.BAD_PARAM_SIZE
    assert decode_from(Point, data, 0) == (Point(x=1, y=2), 4)


@pytest.mark.parametrize(
    ("at", "byte", "code"),
    [(4, 2, ReturnCode.BAD_PARAMETER), (0, 0xFF, None)],
)
def test_field_rules_give_their_codes(at, byte, code):
    data = bytearray(encode(example))
    data[at] = byte
    found = outcome(lambda d: decode(Everything, d), bytes(data))
    if code is None:
        assert found.handle == 0xFF000007
    else:
        assert found is code


def test_a_wrong_constant_is_an_invalid_structure():
    with pytest.raises(DecodeError) as caught:
        decode(Plain, b"\x12\x35\x00\x00\x00")
    assert caught.value.code is ReturnCode.INVALID_STRUCTURE


def test_a_checked_field_gives_its_code():
    data = encode(example).replace(b"\x03\x04\x03\x02\x01", b"\x09\x04\x03\x02\x01")
    assert outcome(lambda d: decode(Everything, d), data) is ReturnCode.BADINDEX


def test_repr_hides_secrets_and_constants():
    assert "s" * 20 not in repr(example)
    assert "<hidden>" in repr(example)
    assert "tag" not in repr(example.either)


def test_structures_are_frozen():
    with pytest.raises(AttributeError):
        example.handle = 8


@pytest.mark.parametrize("value", [Point(x=70000, y=0), Fancy(digest=b"short", flag=True)])
def test_what_does_not_fit_is_an_encode_error(value):
    with pytest.raises(EncodeError):
        encode(value)


def test_a_field_without_declaration_is_refused_at_import():
    with pytest.raises(TypeError, match="no construct declaration"):

        @wire.wire
        class Wrong:
            x: int


def test_a_declaration_that_the_compiler_does_not_know_is_refused_at_import():
    with pytest.raises(TypeError, match="does not know"):

        @wire.wire
        class Wrong:
            x: Annotated[int, cs.VarInt]


def test_a_huge_length_allocates_nothing():
    with pytest.raises(DecodeError):
        decode(structures.StorePubkey, b"\xff\xff\xff\xff")
    with pytest.raises(DecodeError):
        decode(structures.KeyHandleList, b"\xff\xff\0\0")


def test_fields_may_be_called_like_the_compilers_own_variables():
    @wire.wire
    class Names:
        data: Sized
        size: U8
        end: Sized16
        at: U16
        count: U8
        value: U8
        out: Sized
        self_: U8

    example = Names(data=b"d", size=2, end=b"e", at=4, count=5, value=6, out=b"o", self_=8)
    assert decode(Names, encode(example)) == example
    for cut in range(len(encode(example))):
        with pytest.raises(DecodeError):
            decode(Names, encode(example)[:cut])


def test_sized_is_bytes():
    @wire.wire
    class One:
        data: Sized
        number: U32

    assert decode(One, b"\0\0\0\2ab\0\0\0\5") == One(data=b"ab", number=5)


# -- frames and changed copies ---------------------------------------------------------------------


@pytest.mark.parametrize("structure", ALL, ids=lambda s: s.__name__)
@given(data=st.data())
def test_a_frame_is_a_header_and_the_structure(structure, data):
    raw = data.draw(st.one_of(st.binary(max_size=64), st.binary(max_size=12).map(lambda b: b * 6)))
    value = outcome(lambda d: decode(structure, d), raw)
    if isinstance(value, ReturnCode):
        return
    body = encode(value)
    header = b"\x00\xc4" + (10 + len(body)).to_bytes(4, "big") + b"\x00\x00\x00\x07"
    assert encode_frame(value, 0xC4, 7) == header + body


def test_a_frame_of_each_shape():
    empty = Plain(count=1, name=b"")
    for value in (example, empty, Point(x=1, y=2), Fancy(digest=b"d" * 20, flag=True)):
        assert encode_frame(value, 0xC4, 0)[10:] == encode(value)
        assert encode_frame(value, 0xC4, 0)[2:6] == (10 + len(encode(value))).to_bytes(4, "big")
    with pytest.raises(EncodeError):
        encode_frame(Point(x=-1, y=0), 0xC4, 0)


def test_a_changed_copy_is_as_replaced_and_as_frozen():
    with_flag = changing(Everything, "flag")
    changed = with_flag(example, False)
    assert changed == dataclasses.replace(example, flag=False)
    assert example.flag is True
    assert type(changed) is Everything
    for value in (changed, decode(Point, encode(Point(x=1, y=2))), Point(x=1, y=2), example):
        with pytest.raises(dataclasses.FrozenInstanceError):
            value.x = 1
    with pytest.raises(TypeError, match="no field"):
        changing(Everything, "nothing")
