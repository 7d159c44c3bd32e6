"""Registers as bytes: the fast writer says what the declared structure says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwtpm.tis_device import PendingCommand, State, TisSnapshot
from hwtpm.tis_registers import LOCALITIES
from hwtpm.tis_snapshot import StoredSnapshot, decode_snapshot, encode_snapshot
from protocol.wire import DecodeError, decode, encode

FLAGS = st.tuples(*[st.booleans()] * LOCALITIES)
WORDS = st.tuples(*[st.integers(0, 2**32 - 1)] * LOCALITIES)
LOCALITY = st.integers(0, LOCALITIES - 1)


@st.composite
def snapshots(draw):
    command, serial = draw(st.binary(max_size=300)), draw(st.integers(0, 2**64 - 1))
    pending = draw(st.none() | LOCALITY)
    return TisSnapshot(
        is_powered=draw(st.booleans()),
        is_hashing=draw(st.booleans()),
        state=draw(st.sampled_from(State)),
        command=command,
        response=draw(st.binary(max_size=300)),
        response_at=draw(st.integers(0, 2**32 - 1)),
        pending=None if pending is None else PendingCommand(serial, pending, command),
        serial=serial,
        active=draw(st.none() | LOCALITY),
        requested=draw(FLAGS),
        been_seized=draw(FLAGS),
        int_enable=draw(WORDS),
        int_status=draw(WORDS),
        int_vector=draw(WORDS),
        int_raised=draw(WORDS),
    )


@given(snapshots())
def test_snapshot_comes_back_and_is_the_declared_structure(snapshot):
    written = encode_snapshot(snapshot)
    assert decode_snapshot(written) == snapshot
    assert encode(decode(StoredSnapshot, written)) == written


@given(snapshots(), st.data())
def test_snapshot_that_was_cut_is_refused(snapshot, data):
    written = encode_snapshot(snapshot)
    with pytest.raises(DecodeError):
        decode_snapshot(written[: data.draw(st.integers(0, len(written) - 1))])
