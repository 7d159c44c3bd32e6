"""State as bytes: round trips, deltas, and refusal of everything that is not understood."""

import struct

import pytest

from protocol.structures import UNRESTRICTED_PCR_INFO, NvAttributes, NvDataPublic
from tpm12.state import Counter, NvArea, Permanent, StClear, factory_state
from tpm12.state_codec import (
    StateError,
    apply_delta,
    decode_section,
    delta,
    encode_section,
)


def area(index, data=b"1234"):
    public = NvDataPublic(
        nv_index=index,
        pcr_info_read=UNRESTRICTED_PCR_INFO,
        pcr_info_write=UNRESTRICTED_PCR_INFO,
        permission=NvAttributes(attributes=2),
        b_read_stclear=False,
        b_write_stclear=False,
        b_write_define=False,
        data_size=len(data),
    )
    return NvArea(public=public, auth_value=b"a" * 20, data=data)


def full():
    permanent = factory_state().permanent
    permanent.owner_auth = b"o" * 20
    permanent.nv = {0x11101: area(0x11101), 0x11102: area(0x11102, b"x" * 100)}
    permanent.counters = {3: Counter(label=b"BNCH", auth_data=b"c" * 20, value=17)}
    permanent.no_owner_nv_write = 5
    return permanent


def test_encode_then_decode_gives_the_same_section():
    permanent = full()
    assert decode_section(Permanent, encode_section(permanent)) == permanent


def test_encoding_is_deterministic():
    assert encode_section(full()) == encode_section(full())


def test_delta_holds_only_what_changed_and_applies():
    before = full()
    after = before.clone()
    after.counters = {**after.counters, 3: Counter(label=b"BNCH", auth_data=b"c" * 20, value=18)}
    after.nv = {0x11102: after.nv[0x11102]}
    after.owner_auth = None
    changed = delta(before, after)
    assert len(changed) < 100
    assert apply_delta(before, changed) == after
    assert before == full()


def test_delta_of_equal_states_is_empty():
    before = full()
    assert delta(before, before.clone()) == b""


def bank(**changed):
    return {i: changed.get(f"pcr{i}", bytes([i]) * 20) for i in range(24)}


@pytest.mark.parametrize(
    ("before", "after", "records"),
    [
        (bank(), bank(pcr16=b"x" * 20), 1),
        (bank(), bank(pcr0=b"x" * 20, pcr23=b"y" * 20), 2),
        (bank(pcr5=b"x" * 20), bank(), 1),
        ({}, bank(), 24),
        (bank(), {}, 24),
    ],
)
def test_delta_of_the_bank_holds_the_pcrs_that_changed(before, after, records):
    """Values are other objects where they differ; the rest is shared, as after an extend."""
    shared = {i: before[i] for i in after if before.get(i) == after[i]}
    was, now = StClear(pcrs=before), StClear(pcrs={**after, **shared})
    changed = delta(was, now)
    assert len(changed) <= 4 + records * 30
    assert apply_delta(was, changed).pcrs == after
    assert was.pcrs == before


@pytest.mark.parametrize(
    ("section", "number", "key"),
    [
        (StClear, 1, 0),  # contextNonceKey
        (StClear, 39, 0),  # failed tries
        (Permanent, 4, 1),  # ownerAuth is no table
    ],
)
def test_delta_that_takes_away_what_is_always_there_is_refused(section, number, key):
    head = {Permanent: 1, StClear: 2}[section]
    taken_away = struct.pack(">HHHII", 1, head, number, key, 0xFFFFFFFF)
    with pytest.raises(StateError, match="cannot be taken away"):
        apply_delta(section(), taken_away)


def test_every_prefix_is_refused_or_loses_whole_records_only():
    data = encode_section(full())
    for size in range(len(data)):
        try:
            decode_section(Permanent, data[:size])
        except StateError:
            continue
        assert decode_section(Permanent, data[:size]) != full()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "header"),
        (b"\0\2\0\1", "version 2"),
        (b"\0\1\0\2", "section 2"),
        (b"\0\1\0\1" + bytes.fromhex("00630000000000000000"), "field 99"),
        (b"\0\1\0\1" + bytes.fromhex("00030000000000000002aa"), "cut off in a value"),
        (b"\0\1\0\1" + bytes.fromhex("000b000000000000000101"), "no number"),
        (b"\0\1\0\1" + bytes.fromhex("000b00000000ffffffff"), "away"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_reason(data, reason):
    with pytest.raises(StateError, match=reason):
        decode_section(Permanent, data)
