"""The messages of tis.sock."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import tis_messages as messages
from protocol.tis_messages import (
    ACCESS_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    TEXT_BYTES_MAX,
    RefusedReason,
    decode_answer,
    decode_request,
    encode_message,
    refused,
)
from protocol.wire import DecodeError, construct_of

LOCALITIES = st.integers(0, 4)
OFFSETS = st.integers(0, 0xFFF)
DATA = st.binary(min_size=1, max_size=ACCESS_BYTES_MAX)
REQUESTS = st.one_of(
    st.builds(
        messages.Read, locality=LOCALITIES, offset=OFFSETS, count=st.integers(1, ACCESS_BYTES_MAX)
    ),
    st.builds(messages.Write, locality=LOCALITIES, offset=OFFSETS, data=DATA),
    st.builds(messages.PowerOn),
    st.builds(messages.PowerOff),
    st.builds(messages.PhysicalPresence, is_asserted=st.booleans()),
)
ANSWERS = st.one_of(
    st.builds(
        messages.Hello,
        version=st.integers(0, 0xFFFF),
        locality_mask=st.integers(0, 31),
        is_platform=st.booleans(),
    ),
    st.builds(messages.Value, data=DATA),
    st.builds(
        messages.Interrupt,
        locality=LOCALITIES,
        status=st.integers(0, 255),
        vector=st.integers(0, 255),
    ),
    st.builds(messages.Done),
    st.builds(refused, st.sampled_from(RefusedReason), st.text(max_size=600)),
)


@given(request=REQUESTS)
def test_request_comes_back_from_its_bytes(request):
    data = encode_message(request)
    assert decode_request(data) == request
    assert len(data) <= MESSAGE_BYTES_MAX
    assert construct_of(type(request)).parse(data) == request
    assert construct_of(type(request)).build(request) == data


@given(answer=ANSWERS)
def test_answer_comes_back_from_its_bytes(answer):
    data = encode_message(answer)
    assert decode_answer(data) == answer
    assert len(data) <= MESSAGE_BYTES_MAX
    assert construct_of(type(answer)).parse(data) == answer


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (messages.Read(locality=2, offset=0x18, count=4), "0102001804"),
        (messages.Write(locality=4, offset=0xF04, data=b"\xab\xcd"), "02040f04abcd"),
        (messages.PowerOn(), "11"),
        (messages.PowerOff(), "12"),
        (messages.PhysicalPresence(is_asserted=True), "1301"),
        (messages.Hello(version=1, locality_mask=4, is_platform=False), "8100010400"),
        (messages.Value(data=b"\x90"), "8290"),
        (messages.Interrupt(locality=2, status=3, vector=10), "8302030a"),
        (messages.Done(), "84"),
        (messages.Refused(reason=RefusedReason.NOT_PLATFORM, text="no"), "85036e6f"),
    ],
)
def test_bytes_of_each_message(message, data):
    assert encode_message(message).hex() == data


def check_bytes(data):
    for decode in (decode_request, decode_answer):
        try:
            message = decode(data)
        except DecodeError:
            continue
        assert encode_message(message) == data


@given(data=st.binary(max_size=MESSAGE_BYTES_MAX + 2))
def test_any_bytes_are_a_message_or_a_decode_error(data):
    check_bytes(data)


@given(message=REQUESTS | ANSWERS, at=st.integers(0, 40), byte=st.integers(0, 255))
def test_changed_bytes_are_a_message_or_a_decode_error(message, at, byte):
    data = bytearray(encode_message(message))
    data[at % len(data)] = byte
    check_bytes(bytes(data))


@pytest.mark.parametrize(
    "data",
    [
        "",
        "00",
        "81",  # a message from the chip
        "ff",
        "0105001804",  # locality 5
        "0102100004",  # offset 0x1000
        "0102001800",  # no bytes
        "01020018",  # cut off
        "010200180400",  # too long
        "02020018",  # a write without data
        "02020018" + "00" * (ACCESS_BYTES_MAX + 1),
        "1100",
        "1302",
        "13",
        "02020018" + "00" * 600,
    ],
)
def test_malformed_request_is_a_decode_error(data):
    with pytest.raises(DecodeError):
        decode_request(bytes.fromhex(data))


@pytest.mark.parametrize(
    "data",
    [
        "",
        "01",
        "8100012000",  # locality 5 granted
        "8100010402",
        "82",
        "8305030a",
        "8400",
        "8500",
        "8509",
        "8501ff",  # no UTF-8
        "850107",  # a control character
        "8501" + "41" * (TEXT_BYTES_MAX + 1),
    ],
)
def test_malformed_answer_is_a_decode_error(data):
    with pytest.raises(DecodeError):
        decode_answer(bytes.fromhex(data))


def test_hello_names_its_localities():
    hello = messages.Hello(version=1, locality_mask=0b10101, is_platform=False)
    assert hello.localities == frozenset({0, 2, 4})


def test_refusal_is_made_printable_and_cut():
    refusal = refused(RefusedReason.CHIP_FAILED, "a\x1b[31m\n" + "é" * 500)
    assert refusal.text.startswith("a?[31m?é")
    assert len(refusal.text.encode()) <= TEXT_BYTES_MAX
