"""Xenbus states and the text of keys."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.wire import DecodeError
from protocol.xenbus import (
    KEYS_BYTES_MAX,
    TRANSITIONS,
    Side,
    XenbusState,
    check_transition,
    decode_keys,
    encode_keys,
)

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=20).filter(
    lambda name: name != "state"
)
TEXTS = st.text([chr(c) for c in range(0x20, 0x7F)], max_size=40)


@given(st.sampled_from(list(XenbusState)), st.dictionaries(NAMES, TEXTS, max_size=8))
def test_keys_come_out_as_they_went_in(state, keys):
    assert decode_keys(encode_keys(state, keys)) == (state, keys)


@given(st.binary(max_size=KEYS_BYTES_MAX + 10))
def test_any_bytes_are_keys_or_a_decode_error(body):
    try:
        state, keys = decode_keys(body)
    except DecodeError:
        return
    assert decode_keys(encode_keys(state, keys)) == (state, keys)


@given(st.text(max_size=300))
def test_any_text_is_published_harmlessly(text):
    _, keys = decode_keys(encode_keys(XenbusState.CLOSED, {"error": text[:256]}))
    assert keys["error"].isascii()
    assert len(keys["error"]) == len(text[:256])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"state=0",
        b"state=7",
        b"state=+4",
        b"state=4\nstate=4",
        b"state=4\nhandle",
        b"state=4\n=1",
        b"state=4\nHandle=1",
        b"state=4\nhandle=1\x1b[31m",
        b"state=4\nhandle=\xc3\xa9",
        b"state=4\n",
        b"state=4\nlong=" + b"x" * 257,
        b"state=4\n" + b"\n".join(b"k%d=1" % n for n in range(40)),
        b"state=4\n" + b"x" * KEYS_BYTES_MAX,
    ],
)
def test_malformed_keys_are_refused(body):
    with pytest.raises(DecodeError):
        decode_keys(body)


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("current", list(XenbusState))
@pytest.mark.parametrize("new", list(XenbusState))
def test_every_step_is_allowed_or_refused_as_the_table_says(side, current, new):
    if new in TRANSITIONS[side][current]:
        check_transition(side, current, new)
    else:
        with pytest.raises(DecodeError):
            check_transition(side, current, new)


def test_no_side_can_stay_in_its_state_or_get_stuck():
    for table in TRANSITIONS.values():
        assert set(table) == set(XenbusState)
        for current, new in table.items():
            assert current not in new
    assert XenbusState.INIT_WAIT not in TRANSITIONS[Side.FRONTEND][XenbusState.INITIALISING]
    assert XenbusState.INITIALISED not in TRANSITIONS[Side.BACKEND][XenbusState.INIT_WAIT]
