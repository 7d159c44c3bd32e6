"""Raw commands on a stream: split anywhere, many at once, sizes that cannot be right."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import (
    COMMAND_BYTES_MAX,
    CommandFramer,
    FrameError,
    FrameHeader,
    error_response,
)
from protocol.return_codes import ReturnCode
from protocol.wire import decode


def command(length: int, fill: int = 0xAB) -> bytes:
    return struct.pack(">HII", 0x00C1, length, 0x15) + bytes([fill]) * (length - 10)


def commands_of(framer: CommandFramer) -> list[bytes]:
    taken = []
    while (one := framer.next_command()) is not None:
        taken.append(one)
    return taken


COMMANDS = [command(10), command(14, 1), command(COMMAND_BYTES_MAX, 2), command(11, 3)]


def test_whole_command_comes_out_as_it_went_in():
    framer = CommandFramer()
    framer.feed(command(14))
    assert framer.next_command() == command(14)
    assert framer.next_command() is None
    assert not framer.is_inside_command


@pytest.mark.parametrize("cut", range(1, 35))
def test_stream_cut_anywhere_gives_the_same_commands(cut):
    stream = command(10) + command(14, 1) + command(11, 3)
    framer = CommandFramer()
    framer.feed(stream[:cut])
    taken = commands_of(framer)
    framer.feed(stream[cut:])
    assert taken + commands_of(framer) == [command(10), command(14, 1), command(11, 3)]


@given(st.lists(st.integers(1, 5000), max_size=30))
def test_stream_in_any_pieces_gives_the_same_commands(pieces):
    stream, framer, taken = b"".join(COMMANDS), CommandFramer(), []
    for length in [*pieces, len(stream)]:
        framer.feed(stream[:length])
        stream = stream[length:]
        taken += commands_of(framer)
    assert taken == COMMANDS


def test_byte_by_byte_stream_gives_the_same_commands():
    framer, taken = CommandFramer(), []
    for byte in b"".join(COMMANDS):
        framer.feed(bytes([byte]))
        taken += commands_of(framer)
    assert taken == COMMANDS


def test_cut_off_command_is_seen_as_such():
    framer = CommandFramer()
    framer.feed(command(14)[:9])
    assert framer.next_command() is None
    assert framer.is_inside_command


@pytest.mark.parametrize("size", [0, 1, 9, COMMAND_BYTES_MAX + 1, 2**31, 2**32 - 1])
def test_impossible_size_ends_the_stream_with_an_error_response(size):
    framer = CommandFramer()
    framer.feed(struct.pack(">HI", 0x00C1, size))  # judged before the rest is there
    with pytest.raises(FrameError) as caught:
        framer.next_command()
    header = decode(FrameHeader, caught.value.response)
    assert (header.tag, header.param_size, header.code) == (0xC4, 10, ReturnCode.BAD_PARAM_SIZE)


def test_command_before_an_impossible_size_is_still_answered():
    framer = CommandFramer()
    framer.feed(command(14) + bytes(6))
    assert framer.next_command() == command(14)
    for _ in range(2):
        with pytest.raises(FrameError):
            framer.next_command()
    framer.feed(command(14))
    with pytest.raises(FrameError):
        framer.next_command()


def test_limit_is_the_callers():
    framer = CommandFramer(command_bytes_max=4088)
    framer.feed(command(4088))
    assert framer.next_command() == command(4088)
    framer.feed(command(4089))
    with pytest.raises(FrameError):
        framer.next_command()


@given(st.binary(max_size=200), st.integers(1, 50))
def test_any_bytes_give_commands_or_one_named_error(data, piece):
    framer = CommandFramer(command_bytes_max=64)
    for at in range(0, len(data), piece):
        framer.feed(data[at : at + piece])
        try:
            for taken in commands_of(framer):
                assert 10 <= len(taken) <= 64
        except FrameError:
            return
        assert len(framer._unread) - framer._at < 64  # nothing grows


def test_error_response_is_ten_bytes():
    assert error_response(ReturnCode.SIZE).hex() == "00c40000000a00000017"
