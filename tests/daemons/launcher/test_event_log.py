"""The TCG event log: its bytes, its replay, its file."""

import hashlib
import stat
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import ExitCode
from daemons.launcher.event_log import (
    LOG_BYTES_MAX,
    Event,
    EventLogError,
    EventType,
    decode_log,
    encode_log,
    event_of,
    read_log,
    replay,
    since_last_launch,
    write_log,
)
from daemons.private_files import UnsafeFile


def sha1(data):
    return hashlib.sha1(data).digest()


def extended(value, *digests):
    for digest in digests:
        value = sha1(value + digest)
    return value


ZERO, ONES = bytes(20), b"\xff" * 20
SEPARATOR = event_of(0, EventType.SEPARATOR, bytes(4))
LAUNCH = event_of(17, EventType.HASH_START, b"launcher")
PROGRAM = event_of(18, EventType.COMPACT_HASH, b"vtpm-manifest 1 program vtpmmgrd\nabc\n")


def test_encode_is_the_structure_of_the_specification_little_endian():
    assert encode_log([SEPARATOR]) == (
        struct.pack("<II", 0, 4)
        + bytes.fromhex("9069ca78e7450a285173431b3e52c5c25299e473")  # what a PC's log shows, too
        + struct.pack("<I", 4)
        + bytes(4)
    )


EVENTS = st.lists(
    st.builds(
        Event,
        pcr_index=st.integers(0, 23),
        event_type=st.integers(0, 0xFFFFFFFF),
        digest=st.binary(min_size=20, max_size=20),
        event=st.binary(max_size=40),
    )
)


@given(EVENTS)
def test_decode_gives_back_what_was_encoded(events):
    assert decode_log(encode_log(events)) == events


@given(
    st.binary()
    | EVENTS.map(encode_log).flatmap(lambda log: st.integers(0, len(log)).map(lambda n: log[:n]))
)
def test_decode_any_bytes_give_events_or_the_named_error(data):
    try:
        events = decode_log(data)
    except EventLogError:
        return
    assert encode_log(events) == data
    for event in events:
        assert event.text.isprintable()


@pytest.mark.parametrize(
    "data",
    [
        encode_log([SEPARATOR])[:-1],
        encode_log([SEPARATOR]) + b"\0",
        struct.pack("<II", 24, 1) + ZERO + bytes(4),
        struct.pack("<II", 0, 1) + ZERO + b"\xff" * 4,
    ],
)
def test_decode_damaged_log_is_refused(data):
    with pytest.raises(EventLogError) as caught:
        decode_log(data)
    assert caught.value.exit_code is ExitCode.DAMAGED


def test_replay_of_nothing_is_a_fresh_start():
    values = replay([])
    assert sorted(values) == list(range(24))
    assert {pcr for pcr, value in values.items() if value == ONES} == {17, 18, 19, 20, 21, 22}
    assert values[16] == values[23] == ZERO


def test_replay_extends_in_order():
    other = event_of(0, EventType.ACTION, b"Calling INT 19h")
    assert replay([SEPARATOR, other])[0] == extended(ZERO, SEPARATOR.digest, other.digest)
    assert replay([other, SEPARATOR])[0] != replay([SEPARATOR, other])[0]


def test_replay_hash_sequence_sets_the_dynamic_pcrs_to_zeros_first():
    values = replay([PROGRAM, LAUNCH, PROGRAM])
    assert values[17] == extended(ZERO, LAUNCH.digest)
    assert values[18] == extended(ZERO, PROGRAM.digest)
    assert values[22] == ZERO
    assert replay([PROGRAM])[18] == extended(ONES, PROGRAM.digest)


@given(EVENTS)
def test_replay_is_the_same_without_what_a_later_launch_undid(events):
    log = [*events, LAUNCH, PROGRAM]
    assert replay(since_last_launch(log)) == replay(log)
    assert since_last_launch(events[:0]) == []


def test_text_says_what_was_measured():
    assert PROGRAM.text == "program vtpmmgrd"
    assert SEPARATOR.text == "separator"
    assert event_of(0, EventType.S_CRTM_VERSION, b"firmware 1").text == "firmware 1"
    assert event_of(0, EventType.POST_CODE, b"").text == "post_code"
    assert event_of(0, EventType.ACTION, b"\x1b[2Jx" + b"y" * 500).text.startswith("?[2Jx")


def test_event_whose_digest_is_not_that_of_its_data_is_told():
    assert SEPARATOR.is_consistent
    assert not Event(pcr_index=0, event_type=4, digest=ZERO, event=bytes(4)).is_consistent


def test_file_written_is_private_and_read_back(tmp_path):
    path = tmp_path / "event.log"
    assert read_log(path) is None
    (tmp_path / ".event.log.new").write_bytes(b"half")  # a launcher was killed here
    write_log(path, [SEPARATOR, LAUNCH])
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_log(path) == [SEPARATOR, LAUNCH]
    assert [entry.name for entry in tmp_path.iterdir()] == ["event.log"]


def test_file_is_not_written_through_planted_symlinks(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("event.log", ".event.log.new"):
        (tmp_path / name).symlink_to(victim)
    write_log(tmp_path / "event.log", [SEPARATOR])
    assert victim.read_text() == "precious"
    assert read_log(tmp_path / "event.log") == [SEPARATOR]


def test_file_that_cannot_be_written_or_believed_is_a_failure(tmp_path):
    with pytest.raises(EventLogError, match="cannot write"):
        write_log(tmp_path / "none" / "event.log", [])
    path = tmp_path / "event.log"
    write_log(path, [SEPARATOR])
    path.chmod(0o666)
    with pytest.raises(UnsafeFile):
        read_log(path)
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.truncate(LOG_BYTES_MAX + 1)
    with pytest.raises(UnsafeFile):
        read_log(path)
