"""The chip's side of the TIS, row by row of the register tables."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwtpm.tis_device import BURST_COUNT, Event, State, TisDevice
from hwtpm.tis_registers import COMMAND_BYTES_MAX

ACCESS, INT_ENABLE, INT_VECTOR, INT_STATUS, CAPABILITY, STS = 0x00, 0x08, 0x0C, 0x10, 0x14, 0x18
HASH_END, FIFO, HASH_START, XDATA_FIFO, DID_VID, RID = 0x20, 0x24, 0x28, 0x80, 0xF00, 0xF04
READY, GO, RETRY = 0x40, 0x20, 0x02
REQUEST, RELINQUISH, SEIZE, SEIZED = 0x02, 0x20, 0x08, 0x10
ALL_INTERRUPTS = 0x8000_0087
BAD_PARAM_SIZE_RESPONSE = bytes.fromhex("00c40000000a00000019")
SIZE_RESPONSE = bytes.fromhex("00c40000000a00000017")


def access(device, locality):
    return device.read(locality, ACCESS)[0]


def status(device, locality=0):
    return device.read(locality, STS)[0]


def write(device, locality, offset, value):
    device.write(locality, offset, bytes([value]) if isinstance(value, int) else value)


def enable_interrupts(device, locality, value=ALL_INTERRUPTS):
    device.write(locality, INT_ENABLE, value.to_bytes(4, "little"))
    device.take_interrupts()


def events(device):
    return [(interrupt.locality, interrupt.status) for interrupt in device.take_interrupts()]


def bring_to(device, state, request, locality=0):
    """Make `locality` active and walk to a state; the response of Completion is not yet read."""
    write(device, locality, ACCESS, REQUEST)
    if state is State.IDLE:
        return
    write(device, locality, STS, READY)
    if state is State.READY:
        return
    write(device, locality, FIFO, request[:5] if state is State.RECEPTION else request)
    if state is State.RECEPTION:
        return
    write(device, locality, STS, GO)
    if state is State.COMPLETION:
        assert device.complete(device.pending_command, b"response")
    assert device.state is state


@pytest.fixture
def request_(make):
    return make.packet(body=b"0123")


# -- power -----------------------------------------------------------------------------------------


def test_device_without_power_reads_ff_everywhere_and_takes_no_writes(port):
    device = TisDevice(port)
    for locality in range(5):
        device.write(locality, ACCESS, b"\x02")
        for offset in (ACCESS, INT_ENABLE, CAPABILITY, STS, FIFO, XDATA_FIFO, DID_VID, RID):
            assert device.read(locality, offset, 4) == b"\xff" * 4
    assert device.active_locality is None
    assert not device.is_powered


def test_power_on_gives_reset_values(device):
    assert device.is_powered
    assert [access(device, n) for n in range(5)] == [0x81] * 5
    assert device.read(0, INT_ENABLE, 4) == b"\x08\0\0\0"
    assert device.read(0, INT_VECTOR, 1) == b"\0"
    assert device.read(0, INT_STATUS, 1) == b"\0"


@pytest.mark.parametrize("switch", ["power_off", "power_on"])
def test_power_change_forgets_locality_and_discards_the_running_command(device, request_, switch):
    bring_to(device, State.EXECUTION, request_)
    pending = device.pending_command
    getattr(device, switch)()
    assert device.active_locality is None
    assert device.pending_command is None
    assert not device.complete(pending, b"late")
    device.power_on()
    bring_to(device, State.EXECUTION, request_)
    assert not device.complete(pending, b"late")


# -- identification --------------------------------------------------------------------------------


def test_identification_is_readable_from_every_page(device):
    for locality in range(5):
        assert device.read(locality, DID_VID, 4) == bytes.fromhex("14100100")
        assert device.read(locality, RID, 1) == b"\x01"
        assert int.from_bytes(device.read(locality, CAPABILITY, 4), "little") == 0x2000_0797


@pytest.mark.parametrize(("offset", "count"), [(DID_VID + 2, 4), (DID_VID + 1, 4), (0x100, 1)])
def test_read_that_no_register_answers_gives_ff(device, offset, count):
    assert device.read(0, offset, count) == b"\xff" * count


def test_read_of_part_of_a_register_gives_that_part(device):
    assert device.read(3, DID_VID + 1, 2) == bytes.fromhex("1001")


@pytest.mark.parametrize("offset", [HASH_END, HASH_START])
def test_hash_registers_are_write_only(device, offset):
    assert device.read(4, offset) == b"\xff"


def test_locality_outside_the_five_does_not_exist(device):
    device.write(5, ACCESS, b"\x02")
    assert device.read(5, ACCESS) == b"\xff"
    assert device.read(-1, ACCESS) == b"\xff"
    assert device.active_locality is None


# -- arbitration (the rules of ACCESS) -------------------------------------------------------------


def test_request_with_no_active_locality_is_granted_at_once(device):
    write(device, 2, ACCESS, REQUEST)
    assert access(device, 2) == 0xA1
    assert [access(device, n) for n in (0, 1, 3, 4)] == [0x81] * 4


def test_request_while_another_is_active_waits_and_is_seen_by_all_others(device):
    write(device, 1, ACCESS, REQUEST)
    write(device, 3, ACCESS, REQUEST)
    assert access(device, 3) == 0x83
    assert access(device, 1) == 0xA5
    assert [access(device, n) for n in (0, 2, 4)] == [0x85] * 3


def test_request_of_the_active_locality_changes_nothing(device):
    write(device, 1, ACCESS, REQUEST)
    write(device, 1, ACCESS, REQUEST)
    assert access(device, 1) == 0xA1


def test_relinquish_grants_the_highest_waiting_locality(device):
    for locality in (1, 0, 3, 2):
        write(device, locality, ACCESS, REQUEST)
    write(device, 1, ACCESS, RELINQUISH)
    assert access(device, 3) == 0xA5
    assert access(device, 1) == 0x85
    write(device, 3, ACCESS, RELINQUISH)
    assert device.active_locality == 2
    write(device, 2, ACCESS, RELINQUISH)
    assert access(device, 0) == 0xA1


def test_relinquish_with_nobody_waiting_leaves_no_active_locality(device):
    write(device, 1, ACCESS, REQUEST)
    write(device, 1, ACCESS, RELINQUISH)
    assert device.active_locality is None
    assert access(device, 1) == 0x81


def test_relinquish_of_a_waiting_locality_withdraws_its_request(device):
    write(device, 1, ACCESS, REQUEST)
    write(device, 2, ACCESS, REQUEST)
    write(device, 2, ACCESS, RELINQUISH)
    assert access(device, 1) == 0xA1
    assert access(device, 2) == 0x81


@pytest.mark.parametrize(
    ("holder", "seizer", "is_honoured"),
    [(h, s, s > h) for h in range(5) for s in range(5)],
)
def test_seize_is_honoured_from_a_higher_locality_only(device, holder, seizer, is_honoured):
    write(device, holder, ACCESS, REQUEST)
    write(device, seizer, ACCESS, SEIZE)
    assert device.active_locality == (seizer if is_honoured else holder)
    if is_honoured:
        assert access(device, holder) == 0x91
        assert access(device, seizer) == 0xA1
    else:
        assert access(device, holder) == 0xA1


def test_seize_with_no_active_locality_activates_and_seizes_from_nobody(device):
    write(device, 0, ACCESS, SEIZE)
    assert access(device, 0) == 0xA1
    assert [access(device, n) for n in range(1, 5)] == [0x81] * 4


def test_seize_keeps_other_requests_waiting(device):
    write(device, 0, ACCESS, REQUEST)
    write(device, 1, ACCESS, REQUEST)
    write(device, 2, ACCESS, REQUEST)
    write(device, 2, ACCESS, SEIZE)
    assert access(device, 2) == 0xA5
    assert access(device, 1) == 0x83
    assert access(device, 0) == 0x95


def test_been_seized_stays_until_it_is_cleared(device):
    write(device, 0, ACCESS, REQUEST)
    write(device, 1, ACCESS, SEIZE)
    write(device, 1, ACCESS, RELINQUISH)
    write(device, 0, ACCESS, REQUEST)
    assert access(device, 0) == 0xB1
    write(device, 0, ACCESS, SEIZED)
    assert access(device, 0) == 0xA1


@pytest.mark.parametrize(
    ("value", "active"),
    [
        (SEIZE | REQUEST | RELINQUISH, 3),  # seize alone counts
        (RELINQUISH | REQUEST, 1),  # relinquish counts: 3 does not wait
        (REQUEST | SEIZED, 1),
        (0x81, 1),  # read-only bits
    ],
)
def test_access_write_with_several_bits_takes_the_first_in_order(device, value, active):
    write(device, 1, ACCESS, REQUEST)
    write(device, 3, ACCESS, value)
    assert device.active_locality == active
    assert bool(access(device, 3) & REQUEST) is (value == REQUEST | SEIZED)


def test_relinquish_and_request_in_one_write_aborts_the_command(device, request_):
    bring_to(device, State.EXECUTION, request_)
    write(device, 0, ACCESS, RELINQUISH | REQUEST)
    assert device.pending_command is None
    assert device.active_locality is None


@pytest.mark.parametrize("offset", [1, 2, 3])
def test_write_beside_the_access_byte_does_nothing(device, offset):
    write(device, 1, offset, REQUEST)
    assert device.active_locality is None


def test_establishment_bit_is_inverted(device, port):
    assert access(device, 0) == 0x81
    port.established = True
    assert access(device, 0) == 0x80


# -- STS: every row of the state table -------------------------------------------------------------

EVENTS = {
    Event.COMMAND_READY: lambda device: write(device, 0, STS, READY),
    Event.FIFO_WRITE: lambda device: write(device, 0, FIFO, b"\0"),
    Event.TPM_GO: lambda device: write(device, 0, STS, GO),
    Event.RESPONSE_RETRY: lambda device: write(device, 0, STS, RETRY),
    Event.FIFO_READ: lambda device: device.read(0, FIFO),
    Event.LOCALITY_LOST: lambda device: write(device, 0, ACCESS, RELINQUISH),
}
ROWS = {
    State.IDLE: {Event.COMMAND_READY: State.READY},
    State.READY: {Event.FIFO_WRITE: State.RECEPTION},
    State.RECEPTION: {Event.COMMAND_READY: State.READY},
    State.EXECUTION: {Event.COMMAND_READY: State.READY},
    State.COMPLETION: {Event.COMMAND_READY: State.READY},
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("event", EVENTS)
def test_event_in_state_leads_where_the_table_says(device, request_, state, event):
    bring_to(device, state, request_)
    EVENTS[event](device)
    expected = State.IDLE if event is Event.LOCALITY_LOST else ROWS[state].get(event, state)
    assert device.state is expected


@pytest.mark.parametrize(
    ("state", "visible"),
    [
        (State.IDLE, 0x00),
        (State.READY, 0x40),
        (State.RECEPTION, 0x88),
        (State.EXECUTION, 0x80),
        (State.COMPLETION, 0x90),
    ],
)
def test_status_of_each_state(device, request_, state, visible):
    bring_to(device, state, request_)
    assert status(device) == visible


@pytest.mark.parametrize("value", [READY | GO, READY | RETRY, GO | RETRY, 0x00, 0x98])
def test_status_write_of_no_or_several_bits_does_nothing(device, request_, value):
    bring_to(device, State.IDLE, request_)
    write(device, 0, STS, value)
    assert device.state is State.IDLE


@pytest.mark.parametrize("offset", [STS + 1, STS + 2, STS + 3])
def test_write_beside_the_status_byte_does_nothing(device, request_, offset):
    bring_to(device, State.IDLE, request_)
    write(device, 0, offset, READY)
    assert device.state is State.IDLE


def test_status_write_of_32_bits_uses_the_lowest_byte(device, request_):
    bring_to(device, State.IDLE, request_)
    write(device, 0, STS, b"\x40\0\0\0")
    assert device.state is State.READY


def test_write_across_a_register_border_does_nothing(device, request_):
    bring_to(device, State.IDLE, request_)
    write(device, 0, STS, b"\x40\0\0\0\0")
    assert device.state is State.IDLE


# Reception


def test_expect_falls_with_the_last_byte_and_extra_bytes_are_dropped(device, request_):
    bring_to(device, State.READY, request_)
    for byte in request_[:-1]:
        write(device, 0, FIFO, byte)
        assert status(device) == 0x88
    write(device, 0, FIFO, request_[-1])
    assert status(device) == 0x80
    write(device, 0, FIFO, b"extra")
    write(device, 0, STS, GO)
    assert device.pending_command.request == request_


@pytest.mark.parametrize("cut", range(1, 14))
def test_request_split_anywhere_arrives_whole(device, request_, cut):
    bring_to(device, State.READY, request_)
    write(device, 0, FIFO + cut % 4, request_[:cut])
    write(device, 0, XDATA_FIFO + cut, request_[cut:] + b"x" * (cut % 2))
    write(device, 0, STS, GO)
    assert device.pending_command.request == request_
    assert device.pending_command.locality == 0


def test_command_ready_in_ready_or_reception_clears_the_fifo(device, request_):
    bring_to(device, State.RECEPTION, request_)
    write(device, 0, STS, READY)
    write(device, 0, STS, READY)
    write(device, 0, FIFO, request_)
    write(device, 0, STS, GO)
    assert device.pending_command.request == request_


def test_go_before_the_last_byte_is_ignored(device, request_):
    bring_to(device, State.READY, request_)
    write(device, 0, FIFO, request_[:-1])
    write(device, 0, STS, GO)
    assert device.state is State.RECEPTION
    write(device, 0, FIFO, request_[-1])
    write(device, 0, STS, GO)
    assert device.state is State.EXECUTION


@pytest.mark.parametrize("declared", [0, 5, 6])
def test_command_that_claims_less_than_its_header_is_given_to_the_engine_as_it_came(
    device, declared
):
    bring_to(device, State.READY, b"")
    write(device, 0, FIFO, b"\0\xc1" + declared.to_bytes(4, "big") + b"\0\0\0\x15")
    write(device, 0, STS, GO)
    assert device.pending_command.request == b"\0\xc1" + declared.to_bytes(4, "big")


def test_command_of_the_greatest_size_is_taken(device, make):
    request = make.packet(body=bytes(COMMAND_BYTES_MAX - 10))
    bring_to(device, State.READY, request)
    for at in range(0, len(request), BURST_COUNT):
        assert status(device) != 0x80
        write(device, 0, FIFO, request[at : at + BURST_COUNT])
    assert status(device) == 0x80
    write(device, 0, STS, GO)
    assert device.pending_command.request == request


@pytest.mark.parametrize("declared", [COMMAND_BYTES_MAX + 1, 0x8000_0000, 0xFFFF_FFFF])
def test_longer_command_is_cut_at_the_limit_and_answered_bad_param_size(device, declared):
    bring_to(device, State.READY, b"")
    enable_interrupts(device, 0)
    write(device, 0, FIFO, b"\0\xc1" + declared.to_bytes(4, "big"))
    for _ in range(20):
        write(device, 0, FIFO, bytes(BURST_COUNT))
    assert status(device) == 0x80
    assert len(device.snapshot().command) == COMMAND_BYTES_MAX
    device.take_interrupts()
    write(device, 0, STS, GO)
    assert device.pending_command is None
    assert events(device) == [(0, 0x03)]
    assert device.read(0, FIFO, 12) == BAD_PARAM_SIZE_RESPONSE + b"\xff\xff"


# Execution


def test_pending_command_runs_once_and_a_second_response_is_discarded(device, request_):
    bring_to(device, State.EXECUTION, request_)
    pending = device.pending_command
    assert device.complete(pending, b"first")
    assert device.pending_command is None
    assert not device.complete(pending, b"second")
    assert device.read(0, FIFO, 5) == b"first"


def test_abort_in_execution_discards_the_response(device, request_):
    bring_to(device, State.EXECUTION, request_)
    pending = device.pending_command
    write(device, 0, STS, READY)
    assert status(device) == 0x40
    assert not device.complete(pending, b"late")
    assert status(device) == 0x40
    write(device, 0, FIFO, request_)
    write(device, 0, STS, GO)
    assert not device.complete(pending, b"late")
    assert device.complete(device.pending_command, b"right")


def test_response_longer_than_the_buffer_becomes_size(device, request_):
    bring_to(device, State.EXECUTION, request_)
    assert device.complete(device.pending_command, bytes(COMMAND_BYTES_MAX + 1))
    assert device.read(0, FIFO, 10) == SIZE_RESPONSE
    assert status(device) == 0x80


def test_response_of_the_greatest_size_is_given(device, request_):
    bring_to(device, State.EXECUTION, request_)
    response = bytes(range(256)) * 16
    assert device.complete(device.pending_command, response)
    read = b"".join(device.read(0, FIFO, BURST_COUNT) for _ in range(17))
    assert read == response.ljust(17 * BURST_COUNT, b"\xff")


# Completion


def test_data_avail_falls_with_the_last_byte_and_then_reads_ff(device, request_):
    bring_to(device, State.COMPLETION, request_)
    for byte in b"response":
        assert status(device) == 0x90
        assert device.read(0, FIFO)[0] == byte
    assert status(device) == 0x80
    assert device.read(0, FIFO, 2) == b"\xff\xff"


def test_response_retry_gives_the_response_again(device, request_):
    bring_to(device, State.COMPLETION, request_)
    assert device.read(0, FIFO, 3) == b"res"
    write(device, 0, STS, RETRY)
    assert device.read(0, XDATA_FIFO, 20) == b"response".ljust(20, b"\xff")
    write(device, 0, STS, RETRY)
    assert status(device) == 0x90
    assert device.read(0, FIFO, 8) == b"response"


def test_command_ready_in_completion_forgets_the_response(device, request_):
    bring_to(device, State.COMPLETION, request_)
    write(device, 0, STS, READY)
    write(device, 0, STS, RETRY)
    assert status(device) == 0x40
    assert device.read(0, FIFO) == b"\xff"


# burstCount


@pytest.mark.parametrize("state", State)
def test_burst_count_is_the_same_in_every_state_and_width(device, request_, state):
    bring_to(device, state, request_)
    assert device.read(0, STS + 1) == bytes([BURST_COUNT])
    assert device.read(0, STS + 2) == b"\0"
    assert device.read(0, STS + 1, 2) == bytes([BURST_COUNT, 0])
    assert device.read(0, STS, 4)[1:] == bytes([BURST_COUNT, 0, 0])


@pytest.mark.parametrize("burst_count", [0, 256])
def test_burst_count_must_fit_one_byte(port, burst_count):
    with pytest.raises(ValueError, match="burst_count"):
        TisDevice(port, burst_count=burst_count)


def test_access_wider_than_burst_count_moves_burst_count_bytes(port, request_):
    device = TisDevice(port, burst_count=8)
    device.power_on()
    bring_to(device, State.READY, request_)
    write(device, 0, FIFO, request_)
    assert status(device) == 0x88
    write(device, 0, FIFO, request_[8:])
    write(device, 0, STS, GO)
    assert device.complete(device.pending_command, b"0123456789")
    assert device.read(0, FIFO, 100) == b"01234567"


# -- the others' view ------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_other_localities_see_ff_and_cannot_interfere(device, request_, state):
    bring_to(device, state, request_, locality=2)
    before = device.snapshot()
    for locality in (0, 1, 3, 4):
        assert device.read(locality, STS, 4) == b"\xff" * 4
        assert device.read(locality, FIFO, 4) == b"\xff" * 4
        assert device.read(locality, XDATA_FIFO, 8) == b"\xff" * 8
        for offset in (STS, FIFO, XDATA_FIFO, INT_ENABLE, INT_VECTOR, INT_STATUS, 0x100):
            for value in (READY, GO, RETRY, 0xFF):
                write(device, locality, offset, value)
    assert device.snapshot() == before


@pytest.mark.parametrize("state", [State.RECEPTION, State.EXECUTION, State.COMPLETION])
@pytest.mark.parametrize("by", ["relinquish", "seize"])
def test_losing_the_locality_aborts_the_command(device, request_, state, by):
    bring_to(device, state, request_)
    pending = device.pending_command
    if by == "relinquish":
        write(device, 1, ACCESS, REQUEST)
        write(device, 0, ACCESS, RELINQUISH)
    else:
        write(device, 1, ACCESS, SEIZE)
    assert device.active_locality == 1
    assert device.state is State.IDLE
    assert device.pending_command is None
    if pending is not None:
        assert not device.complete(pending, b"late")
    write(device, 1, STS, RETRY)
    assert device.read(1, FIFO) == b"\xff"
    assert status(device, 1) == 0x00


# -- interrupts ------------------------------------------------------------------------------------


def test_a_command_raises_its_interrupts_in_order(device, request_):
    bring_to(device, State.IDLE, request_)
    write(device, 0, INT_VECTOR, 0x3A)
    enable_interrupts(device, 0)
    write(device, 0, STS, READY)
    assert events(device) == [(0, 0x80)]
    write(device, 0, STS, READY)
    assert events(device) == []
    write(device, 0, FIFO, request_[:3])
    assert events(device) == [(0, 0x02)]
    write(device, 0, FIFO, request_[3:])
    write(device, 0, STS, GO)
    assert events(device) == []
    device.complete(device.pending_command, b"response")
    interrupt, *others = device.take_interrupts()
    assert (interrupt.locality, interrupt.status, interrupt.vector) == (0, 0x03, 0x0A)
    assert others == []
    write(device, 0, STS, RETRY)
    assert events(device) == []
    device.read(0, FIFO, 8)
    write(device, 0, STS, RETRY)
    assert events(device) == [(0, 0x01)]


def test_interrupts_not_taken_are_merged(device, request_):
    bring_to(device, State.IDLE, request_)
    enable_interrupts(device, 0)
    for _ in range(100):
        write(device, 0, STS, READY)
        write(device, 0, FIFO, request_)
    assert events(device) == [(0, 0x82)]


def test_locality_change_is_raised_for_the_new_locality(device):
    for locality in (1, 2):
        write(device, locality, ACCESS, SEIZE)
        enable_interrupts(device, locality)
    write(device, 1, ACCESS, REQUEST)
    write(device, 2, ACCESS, RELINQUISH)
    assert events(device) == [(1, 0x04)]
    write(device, 2, ACCESS, SEIZE)
    assert events(device) == [(2, 0x04)]


@pytest.mark.parametrize("enabled", [0x0000_0087, 0x8000_0000, 0x8000_0002])
def test_events_that_are_not_enabled_raise_nothing(device, request_, enabled):
    bring_to(device, State.IDLE, request_)
    enable_interrupts(device, 0, enabled)
    write(device, 0, STS, READY)
    assert events(device) == []
    assert device.read(0, INT_STATUS, 4) == bytes(4)


def test_interrupt_status_is_cleared_by_writing_ones(device, request_):
    bring_to(device, State.READY, request_)
    enable_interrupts(device, 0)
    write(device, 0, FIFO, request_)
    write(device, 0, STS, GO)
    device.complete(device.pending_command, b"response")
    assert device.read(0, INT_STATUS) == b"\x03"
    write(device, 0, INT_STATUS, 0x01)
    assert device.read(0, INT_STATUS) == b"\x02"
    write(device, 0, INT_STATUS + 1, 0xFF)
    write(device, 0, INT_STATUS, b"\0\xff\xff\xff")
    assert device.read(0, INT_STATUS) == b"\x02"
    write(device, 0, INT_STATUS, b"\x87\0\0\0")
    assert device.read(0, INT_STATUS) == b"\0"


def test_interrupt_enable_takes_bytes_and_keeps_its_polarity(device):
    write(device, 0, ACCESS, REQUEST)
    write(device, 0, INT_ENABLE, b"\xff\xff\xff\xff")
    assert device.read(0, INT_ENABLE, 4) == b"\x8f\0\0\x80"
    write(device, 0, INT_ENABLE + 3, 0)
    assert device.read(0, INT_ENABLE, 4) == b"\x8f\0\0\0"
    write(device, 0, INT_ENABLE, 0x01)
    assert device.read(0, INT_ENABLE, 4) == b"\x09\0\0\0"


def test_interrupt_vector_has_four_bits(device):
    write(device, 0, ACCESS, REQUEST)
    write(device, 0, INT_VECTOR, 0xF5)
    write(device, 0, INT_VECTOR + 1, 0x03)
    assert device.read(0, INT_VECTOR) == b"\x05"


# -- locality 4 ------------------------------------------------------------------------------------


def test_hash_sequence_takes_and_frees_locality_4(device, port):
    write(device, 4, HASH_START, 0)
    assert access(device, 4) == 0xA1
    write(device, 4, FIFO, b"abcd")
    write(device, 4, FIFO + 3, b"e")
    write(device, 4, HASH_END, 0)
    assert port.cycles == [("start", b""), ("data", b"abcd"), ("data", b"e"), ("end", b"")]
    assert device.active_locality is None


def test_hash_end_grants_the_locality_that_waits(device):
    write(device, 4, HASH_START, 0)
    write(device, 1, ACCESS, REQUEST)
    write(device, 2, ACCESS, SEIZE)
    write(device, 4, HASH_END, 0)
    assert device.active_locality == 1


def test_hash_cycles_are_ignored_while_another_locality_is_active(device, port, request_):
    bring_to(device, State.EXECUTION, request_, locality=2)
    before = device.snapshot()
    for offset in (HASH_START, FIFO, HASH_END):
        write(device, 4, offset, 0)
    assert device.snapshot() == before
    assert port.cycles == []


@pytest.mark.parametrize("locality", range(4))
def test_hash_cycles_on_another_page_are_ignored(device, port, locality):
    for offset in (HASH_START, FIFO, HASH_END):
        write(device, locality, offset, 0)
    assert port.cycles == []
    assert device.active_locality is None


@pytest.mark.parametrize("offset", [HASH_START + 1, HASH_END + 1])
def test_write_beside_a_hash_register_does_nothing(device, port, offset):
    write(device, 4, offset, 0)
    assert port.cycles == []


def test_hash_start_from_active_locality_4_aborts_its_command(device, port, request_):
    bring_to(device, State.EXECUTION, request_, locality=4)
    pending = device.pending_command
    write(device, 4, HASH_START, 0)
    assert device.state is State.IDLE
    assert not device.complete(pending, b"late")
    write(device, 4, FIFO, request_)
    assert port.cycles == [("start", b""), ("data", request_)]
    assert device.snapshot().command == b""


@pytest.mark.parametrize("cycle", ["start", "data", "end"])
def test_error_in_the_hash_sequence_releases_locality_4(device, port, cycle):
    port.hash_answers = {cycle: False}
    write(device, 4, HASH_START, 0)
    assert (device.active_locality == 4) is (cycle != "start")
    write(device, 1, ACCESS, REQUEST)
    write(device, 4, FIFO, b"x")
    write(device, 4, HASH_END, 0)
    assert device.active_locality == 1
    assert not device.snapshot().is_hashing


@pytest.mark.parametrize("offset", [FIFO, HASH_END])
def test_hash_cycle_out_of_sequence_reaches_the_engine(device, port, offset):
    port.hash_answers = {"data": False, "end": False}
    write(device, 4, offset, 0)
    assert len(port.cycles) == 1
    assert device.active_locality is None


def test_hash_end_outside_a_sequence_releases_active_locality_4(device, port):
    write(device, 4, ACCESS, REQUEST)
    write(device, 4, HASH_END, 0)
    assert device.active_locality is None
    assert port.cycles == [("end", b"")]


@pytest.mark.parametrize("value", [RELINQUISH, SEIZE, REQUEST])
def test_hash_sequence_keeps_its_locality_against_access_writes(device, value):
    write(device, 4, HASH_START, 0)
    for locality in range(5):
        write(device, locality, ACCESS, value)
        write(device, locality, STS, READY)
    assert device.active_locality == 4
    assert device.state is State.IDLE


def test_locality_4_is_an_ordinary_locality_otherwise(device, port, request_):
    bring_to(device, State.COMPLETION, request_, locality=4)
    assert device.read(4, FIFO, 8) == b"response"
    assert port.cycles == []
    write(device, 4, ACCESS, RELINQUISH)
    assert device.active_locality is None


def test_hash_start_raises_locality_change_for_locality_4(device):
    write(device, 4, ACCESS, REQUEST)
    enable_interrupts(device, 4)
    write(device, 4, ACCESS, RELINQUISH)
    write(device, 4, HASH_START, 0)
    assert events(device) == [(4, 0x04)]


# -- snapshots -------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", State)
def test_restored_device_is_the_same_device(device, port, request_, state):
    write(device, 0, ACCESS, REQUEST)
    enable_interrupts(device, 0)
    write(device, 0, INT_VECTOR, 7)
    write(device, 1, ACCESS, REQUEST)
    bring_to(device, state, request_)
    device.read(0, FIFO, 2)
    snapshot = device.snapshot()
    restored = TisDevice(port)
    restored.restore(snapshot)
    assert restored.snapshot() == snapshot
    assert restored.is_powered
    assert restored.pending_command == device.pending_command
    assert restored.take_interrupts() == device.take_interrupts()
    for offset in (ACCESS, INT_ENABLE, INT_VECTOR, INT_STATUS, STS, FIFO):
        for locality in range(5):
            assert restored.read(locality, offset, 4) == device.read(locality, offset, 4)


def test_restored_device_takes_the_response_of_the_pending_command(device, port, request_):
    bring_to(device, State.EXECUTION, request_)
    restored = TisDevice(port)
    restored.restore(device.snapshot())
    assert restored.complete(restored.pending_command, b"response")
    assert restored.read(0, FIFO, 8) == b"response"


def test_snapshot_does_not_change_with_the_device(device, request_):
    bring_to(device, State.RECEPTION, request_)
    snapshot = device.snapshot()
    write(device, 0, FIFO, request_[5:])
    write(device, 1, ACCESS, SEIZE)
    assert snapshot.command == request_[:5]
    assert snapshot.active == 0
    assert snapshot.been_seized == (False,) * 5


# -- any accesses ----------------------------------------------------------------------------------

OFFSETS = st.sampled_from(
    [ACCESS, INT_ENABLE, INT_VECTOR, INT_STATUS, STS, FIFO, XDATA_FIFO, HASH_START, HASH_END]
) | st.integers(-8, 0x1010)
DATA = st.sampled_from([b"\x02", b"\x08", b"\x20", b"\x40", b"\0\xc1\0\0\0\x0a\0\0\0\x15"])
ANY_LOCALITY = st.sampled_from([0, 0, 0, 0, 4, 4, 1, 2, 3, -1, 5])
STEPS = st.lists(
    st.tuples(st.just("read"), ANY_LOCALITY, OFFSETS, st.integers(-1, 300))
    | st.tuples(st.just("write"), ANY_LOCALITY, OFFSETS, DATA | st.binary(max_size=300))
    | st.tuples(st.just("complete"), st.just(0), st.just(0), st.binary(max_size=20))
    | st.tuples(st.sampled_from(["power_on", "hash_fails"]), st.just(0), st.just(0), st.none()),
    max_size=60,
)


@given(steps=STEPS)
def test_any_accesses_keep_the_invariants(make, steps):
    port = make.port()
    device = make.device(port)
    device.power_on()
    for action, locality, offset, argument in steps:
        if action == "read":
            assert len(device.read(locality, offset, argument)) <= BURST_COUNT
        elif action == "write":
            device.write(locality, offset, argument)
        elif action == "complete" and device.pending_command is not None:
            device.complete(device.pending_command, argument)
        elif action == "power_on":
            device.power_on()
        elif action == "hash_fails":
            port.hash_answers = {"start": False, "data": False, "end": False}
        check_invariants(device)


def check_invariants(device):
    snapshot = device.snapshot()
    active = [n for n in range(5) if access(device, n) & 0x20]
    assert active == ([] if device.active_locality is None else [device.active_locality])
    assert len(snapshot.command) <= COMMAND_BYTES_MAX
    assert len(snapshot.response) <= COMMAND_BYTES_MAX
    assert 0 <= snapshot.response_at <= len(snapshot.response)
    assert (snapshot.pending is not None) == (snapshot.state is State.EXECUTION)
    assert not any(snapshot.requested) or snapshot.active is not None
    assert not snapshot.is_hashing or snapshot.active == 4
    assert len(device.take_interrupts()) <= 5
    for locality in range(5):
        if locality not in active:
            assert device.read(locality, STS) == b"\xff"
    restored = TisDevice(device._port)
    restored.restore(device.snapshot())
    assert restored.snapshot() == device.snapshot()
