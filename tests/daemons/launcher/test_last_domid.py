"""The counter of domids: numbers go round, and no damaged file passes for another one."""

from dataclasses import replace

import pytest

from daemons.errors import ExitCode, Failure
from daemons.launcher.domain import DOMID_MAX
from daemons.launcher.last_domid import (
    COUNTER_NAME,
    domid_of,
    encode_count,
    next_count,
    note_count,
    read_count,
)
from daemons.registry import DomainRecord, Role

RECORD = DomainRecord(
    name="guest1",
    domid=7,
    role=Role.GUEST,
    label="system_u:system_r:domU_t",
    uid=0,
    pid=None,
    start_time=None,
)
CHIP = replace(RECORD, name="hwtpm", role=Role.HWTPM, domid=DOMID_MAX + 1)


def test_numbers_go_round_and_nobody_s_is_given():
    assert [domid_of(count) for count in (1, DOMID_MAX, DOMID_MAX + 1)] == [1, DOMID_MAX, 1]
    assert next_count(0, {1, 2, 4}) == 3
    assert next_count(DOMID_MAX - 1, {DOMID_MAX, 1}) == DOMID_MAX + 2


def test_what_was_noted_is_read(tmp_path):
    assert read_count(tmp_path, [CHIP]) == 0
    for count in (7, 12, 2 * DOMID_MAX):
        note_count(tmp_path, count)
        assert read_count(tmp_path, [RECORD, CHIP]) == count
    # After one round a record may have a higher number than the last that was given.
    note_count(tmp_path, DOMID_MAX + 1)
    assert read_count(tmp_path, [RECORD]) == DOMID_MAX + 1


@pytest.mark.parametrize("content", [b"", b"7\n", b"7 7", b"7 8\n", b"7 77\n", b"-7 -7\n"])
def test_damaged_one_is_refused(tmp_path, content):
    (tmp_path / COUNTER_NAME).write_bytes(content)
    with pytest.raises(Failure, match="damaged") as raised:
        read_count(tmp_path, [])
    assert raised.value.exit_code is ExitCode.DAMAGED


def test_no_flipped_bit_passes_for_another_number(tmp_path):
    right = encode_count(31)
    for bit in range(8 * len(right)):
        content = bytearray(right)
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / COUNTER_NAME).write_bytes(content)
        with pytest.raises(Failure):
            read_count(tmp_path, [])


def test_one_that_is_gone_or_older_than_a_record_is_refused(tmp_path):
    with pytest.raises(Failure, match="it is gone"):
        read_count(tmp_path, [RECORD])
    note_count(tmp_path, 6)
    with pytest.raises(Failure, match="ends with domid 6, and yet there is 7"):
        read_count(tmp_path, [RECORD])


def test_number_that_cannot_be_noted_is_not_given(tmp_path):
    (tmp_path / COUNTER_NAME).mkdir()
    with pytest.raises(Failure, match=COUNTER_NAME):
        note_count(tmp_path, 1)
    (tmp_path / COUNTER_NAME).rmdir()
    note_count(tmp_path, 1)
