"""The driver against the device in memory, and against devices that misbehave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwtpm.tis_device import BURST_COUNT, State
from hwtpm.tis_driver import (
    INTERRUPT_WAIT_S,
    LONG_ORDINALS,
    MEDIUM_ORDINALS,
    POLL_INTERVAL_S,
    UNKNOWN_DURATION_S,
    Pause,
    Timing,
    TisDriver,
    TisError,
    TisFault,
    WaitInterrupt,
)
from hwtpm.tis_registers import COMMAND_BYTES_MAX, Register
from protocol.constants import Ordinal
from protocol.tis_messages import Read, Write

READY, GO, RETRY = 0x40, 0x20, 0x02
REQUEST, RELINQUISH, SEIZE = 0x02, 0x20, 0x08


@pytest.fixture
def request_(make):
    return make.packet(body=b"0123")


@pytest.fixture
def echo(make):
    """What the fake engine answers to a request."""
    return lambda request: make.packet(0, b"echo" + request, tag=0xC4)


@pytest.fixture(params=[True, False], ids=["interrupts", "polling"])
def driver(request, bench):
    driver = TisDriver(2, use_interrupts=request.param)
    bench.run(driver.initialize())
    bench.accesses.clear()
    return driver


def failing(bench, steps):
    with pytest.raises(TisError) as caught:
        bench.run(steps)
    return caught.value


# -- the main path ---------------------------------------------------------------------------------


def test_initialize_identifies_the_chip_and_takes_the_locality(bench):
    identity = bench.run(TisDriver(2).initialize())
    assert (identity.vendor_id, identity.device_id, identity.revision_id) == (0x1014, 1, 1)
    assert identity.capabilities & 0x87 == 0x87
    assert bench.device.active_locality == 2


def test_initialize_enables_interrupts_where_they_are_wanted(bench):
    bench.run(TisDriver(2).initialize())
    assert bench.device.read(2, Register.INT_ENABLE, 4) == b"\x0d\0\0\x80"
    assert bench.device.read(2, Register.INT_VECTOR) == b"\x0a"


def test_initialize_leaves_interrupts_off_when_polling(bench):
    bench.run(TisDriver(2, use_interrupts=False).initialize())
    assert bench.device.read(2, Register.INT_ENABLE, 4) == b"\x08\0\0\0"


def test_transmit_gives_the_response_and_leaves_the_chip_ready(bench, driver, request_, echo):
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert bench.port.executed == [(2, request_)]
    assert bench.device.state is State.READY
    assert bench.device.active_locality == 2


def test_transmit_follows_the_order_of_the_tis(bench, driver, request_):
    bench.run(driver.transmit(request_))
    writes = [(a[2], a[3]) for a in bench.accesses if a[0] == "write" and a[2] != 0x10]
    assert writes == [(0x18, b"\x40"), (0x24, request_), (0x18, b"\x20"), (0x18, b"\x40")]


def test_last_byte_of_a_command_of_many_bursts_comes_after_a_look_at_expect(
    make, port, driver, request_
):
    device = make.device(port, burst_count=len(request_) - 1)
    device.power_on()
    bench = make.bench(device, port)
    bench.run(driver.transmit(request_))
    fifo = [n for n, a in enumerate(bench.accesses) if a[0] == "write" and a[2] == 0x24]
    assert [bench.accesses[n][3] for n in fifo] == [request_[:-1], request_[-1:]]
    assert ("read", 0x18) in [(a[0], a[2]) for a in bench.accesses[fifo[0] : fifo[1]]]


def test_command_of_a_burst_each_way_costs_seven_accesses(bench, request_):
    driver = TisDriver(2, use_interrupts=False)
    bench.run(driver.initialize())
    bench.run(driver.transmit(request_))
    bench.accesses.clear()
    bench.run(driver.execute(request_))
    bench.run(driver.finish(gives_way=False))
    assert [a[0] for a in bench.accesses].count("read") == 4
    assert len(bench.accesses) == 7


def test_second_transmit_finds_the_chip_ready(bench, driver, request_, echo):
    bench.run(driver.transmit(request_))
    bench.accesses.clear()
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert [a[3] for a in bench.accesses if a[0] == "write" and a[2] == 0x18] == [b"\x20", b"\x40"]


@pytest.mark.parametrize("size", [10, 11, BURST_COUNT + 1, COMMAND_BYTES_MAX])
@pytest.mark.parametrize("burst_count", [1, 3, BURST_COUNT])
def test_every_size_goes_through_every_burst_count(make, port, size, burst_count):
    device = make.device(port, burst_count=burst_count)
    device.power_on()
    bench = make.bench(device, port)
    driver = TisDriver(0)
    bench.run(driver.initialize())
    request = make.packet(body=bytes(range(256)) * 16)[:size]
    request = request[:2] + size.to_bytes(4, "big") + request[6:]
    port.execute = lambda request, _locality: b"\0\xc4" + request[2:]
    assert bench.run(driver.transmit(request)) == b"\0\xc4" + request[2:]


@given(body=st.binary(max_size=600), delay=st.integers(0, 3), use_interrupts=st.booleans())
def test_any_command_comes_back_whole(make, body, delay, use_interrupts):
    port = make.port()
    device = make.device(port)
    device.power_on()
    bench = make.bench(device, port)
    driver = TisDriver(3, use_interrupts=use_interrupts)
    bench.run(driver.initialize())
    bench.delay = delay
    request = make.packet(body=body)
    assert bench.run(driver.transmit(request)) == make.packet(0, b"echo" + request, tag=0xC4)


@pytest.mark.parametrize("size", [0, 9, COMMAND_BYTES_MAX + 1])
def test_command_that_fits_no_buffer_is_not_sent(bench, driver, size):
    error = failing(bench, driver.transmit(bytes(size)))
    assert error.fault is TisFault.TOO_LONG
    assert bench.accesses == []


def test_driver_refuses_a_locality_that_does_not_exist():
    with pytest.raises(ValueError, match="no locality 5"):
        TisDriver(5)


# -- waiting ---------------------------------------------------------------------------------------


def test_slow_command_is_waited_for_by_interrupt(bench, request_, echo):
    driver = TisDriver(2)
    bench.run(driver.initialize())
    bench.delay = 3
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert bench.waits == [Pause(0.0), *[WaitInterrupt(1.0)] * 3]
    assert (2, Register.INT_STATUS, b"\x87") in [a[1:] for a in bench.accesses if a[0] == "write"]


def test_slow_command_is_polled_for_without_interrupts(bench, request_, echo):
    driver = TisDriver(2, use_interrupts=False)
    bench.run(driver.initialize())
    bench.delay = 3
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert bench.waits == [Pause(0.0), *[Pause(POLL_INTERVAL_S)] * 3]


def test_lost_interrupt_only_delays(bench, request_, echo):
    driver = TisDriver(2)
    bench.run(driver.initialize())
    bench.delay = 2
    take, bench.device.take_interrupts = bench.device.take_interrupts, list
    begin_s = bench.now_s
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert take()
    assert bench.now_s - begin_s == 2 * INTERRUPT_WAIT_S


@pytest.mark.parametrize("use_interrupts", [True, False])
def test_command_that_never_ends_is_aborted_after_its_duration(bench, request_, use_interrupts):
    driver = TisDriver(2, timing=Timing(short_s=20.0), use_interrupts=use_interrupts)
    bench.run(driver.initialize())
    bench.delay = 1_000_000
    begin_s = bench.now_s
    error = failing(bench, driver.transmit(request_))
    assert error.fault is TisFault.TIMEOUT_DURATION
    assert bench.now_s - begin_s == pytest.approx(20.0)
    assert bench.device.state is State.READY
    assert bench.device.pending_command is None


@pytest.mark.parametrize(
    ("ordinal", "expected_s"),
    [
        (Ordinal.PCR_READ, 1.0),
        (Ordinal.UNSEAL, 2.0),
        (Ordinal.TICK_STAMP_BLOB, 2.0),
        (Ordinal.CREATE_WRAP_KEY, 3.0),
        (0x7FFF_FFFF, UNKNOWN_DURATION_S),
    ],
)
def test_duration_follows_the_ordinals_class(make, ordinal, expected_s):
    timing = Timing(short_s=1.0, medium_s=2.0, long_s=3.0)
    assert timing.duration_s(make.packet(ordinal)) == expected_s


def test_duration_classes_do_not_overlap():
    assert not LONG_ORDINALS & MEDIUM_ORDINALS


def property_port(make, timeouts, durations):
    """A port whose TPM answers GetCapability of the two timing properties."""
    port = make.port()

    def execute(request, _locality):
        values = timeouts if request[-2:] == b"\x01\x15" else durations
        if values is None:
            return make.packet(0x26, tag=0xC4)
        words = b"".join(value.to_bytes(4, "big") for value in values)
        return make.packet(0, len(words).to_bytes(4, "big") + words, tag=0xC4)

    port.execute = execute
    return port


def learned(make, timeouts, durations):
    port = property_port(make, timeouts, durations)
    device = make.device(port)
    device.power_on()
    bench = make.bench(device, port)
    driver = TisDriver(0)
    bench.run(driver.initialize())
    timing = bench.run(driver.learn_timing())
    assert driver.timing is timing
    return timing


def test_timing_is_learned_in_microseconds(make):
    timing = learned(
        make, (1_000_000, 3_000_000, 900_000, 800_000), (3_000_000, 4_000_000, 600_000_000)
    )
    assert (timing.a_s, timing.b_s, timing.c_s, timing.d_s) == (1.0, 3.0, 0.9, 0.8)
    assert (timing.short_s, timing.medium_s, timing.long_s) == (3.0, 4.0, 600.0)


def test_timing_given_in_milliseconds_is_understood_and_never_below_the_defaults(make):
    timing = learned(make, (900, 2000, 10, 750), (20, 1000, 60_000))
    assert (timing.a_s, timing.b_s, timing.c_s, timing.d_s) == (0.9, 2.0, 0.75, 0.75)
    assert (timing.short_s, timing.medium_s, timing.long_s) == (1.0, 1.0, 60.0)


def test_timing_stays_when_the_tpm_does_not_tell(make):
    assert learned(make, None, None) == Timing()
    assert learned(make, (1, 2, 3), (1,)) == Timing()


# -- localities ------------------------------------------------------------------------------------


def test_locality_in_use_is_waited_for_and_the_request_withdrawn(bench):
    bench.device.write(1, Register.ACCESS, b"\x02")
    error = failing(bench, TisDriver(2).initialize())
    assert error.fault is TisFault.TIMEOUT_A
    assert bench.device.read(1, Register.ACCESS) == b"\xa1"
    assert bench.device.read(2, Register.ACCESS) == b"\x81"


def test_locality_granted_while_waiting_is_used(bench, driver, request_, echo):
    bench.run(driver.relinquish())
    bench.device.write(0, Register.ACCESS, b"\x02")
    bench.on_wait = lambda: bench.device.write(0, Register.ACCESS, b"\x20")
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert len(bench.waits) == 2


def test_seize_takes_the_tpm_from_a_lower_locality_only(bench):
    bench.device.write(1, Register.ACCESS, b"\x02")
    bench.run(TisDriver(2).request_locality(seize=True))
    assert bench.device.active_locality == 2
    assert failing(bench, TisDriver(1).request_locality(seize=True)).fault is TisFault.TIMEOUT_A
    assert bench.device.active_locality == 2


def test_been_seized_is_cleared_when_the_locality_is_asked_for(bench, driver):
    bench.device.write(3, Register.ACCESS, b"\x08")
    bench.device.write(3, Register.ACCESS, b"\x20")
    bench.run(driver.request_locality())
    assert bench.device.read(2, Register.ACCESS) == b"\xa1"


def test_finish_gives_the_locality_to_who_waits(bench, driver, request_, echo):
    bench.device.write(0, Register.ACCESS, b"\x02")
    assert bench.run(driver.transmit(request_)) == echo(request_)
    assert bench.device.active_locality == 0


def test_seize_during_execution_is_reported(bench, driver, request_):
    bench.delay = 1_000_000
    bench.on_wait = lambda: bench.device.write(3, Register.ACCESS, b"\x08")
    error = failing(bench, driver.transmit(request_))
    assert error.fault is TisFault.SEIZED
    assert bench.device.active_locality == 3


@pytest.mark.parametrize("burst_count", [1, 8, BURST_COUNT])
def test_command_that_is_seized_at_any_access_is_answered_or_told_to_be_seized(
    make, request_, echo, burst_count
):
    """What is read after the seizure is 0xFF, and must not be taken for a part of the response."""
    faults, is_seized = [], True
    while is_seized:
        port = make.port()
        device = make.device(port, burst_count=burst_count)
        device.power_on()
        bench = make.bench(device, port)
        driver = TisDriver(2, use_interrupts=False)
        bench.run(driver.initialize())
        try:
            response = bench.run(seized_before(len(faults), bench, driver.execute(request_)))
        except TisError as error:
            faults.append(error.fault)
        else:
            assert response == echo(request_)
            is_seized = bench.device.active_locality == 3
            faults.append(TisFault.SEIZED)
    # Before the first access it is asked for the locality, which it does not get.
    assert faults[0] is TisFault.TIMEOUT_A
    assert set(faults[1:]) == {TisFault.SEIZED}


def seized_before(count, bench, steps):
    """Give the same steps, with the TPM seized before one of them."""
    answer, number = None, 0
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as ended:
            return ended.value
        if number == count:
            bench.device.write(3, Register.ACCESS, bytes([SEIZE]))
        number += 1
        answer = yield step


def test_chip_without_power_is_absent(bench, driver, request_):
    bench.device.power_off()
    error = failing(bench, driver.transmit(request_))
    assert error.fault is TisFault.ABSENT
    assert "locality 2" in str(error)


# -- resume ----------------------------------------------------------------------------------------


def stop_before(bench, steps, is_last):
    """Run steps until one satisfies `is_last`, and lose the driver there."""
    answer = None
    while True:
        step = steps.send(answer)
        if is_last(step):
            steps.close()
            return
        answer = bench.perform(step)


def is_write(offset, data):
    return lambda step: isinstance(step, Write) and (step.offset, step.data) == (offset, data)


def test_resume_says_not_run_before_the_command_was_complete(bench, driver, request_):
    stop_before(bench, driver.transmit(request_), is_write(0x24, request_))
    bench.device.write(2, 0x24, request_[:-1])
    assert bench.run(TisDriver(2).resume(request_)) is None
    assert bench.port.executed == []


def test_resume_says_not_run_when_nothing_was_written(bench, driver, request_):
    assert bench.run(driver.resume(request_)) is None
    bench.run(driver.start(request_))
    bench.run(driver.finish())
    assert bench.run(driver.resume(request_)) is None


def test_resume_runs_a_complete_command_that_was_not_started(bench, driver, request_, echo):
    stop_before(bench, driver.transmit(request_), is_write(0x18, b"\x20"))
    assert bench.run(TisDriver(2).resume(request_)) == echo(request_)
    assert len(bench.port.executed) == 1


def test_resume_waits_for_a_command_that_runs(bench, driver, request_, echo):
    bench.delay = 2
    bench.run(driver.start(request_))
    assert bench.run(TisDriver(2).resume(request_)) == echo(request_)
    assert len(bench.port.executed) == 1


@pytest.mark.parametrize("reads_before", range(6))
def test_resume_reads_the_response_again_however_far_it_was_read(
    bench, driver, request_, echo, reads_before
):
    bench.run(driver.start(request_))
    steps = driver.collect(request_)
    answer = None
    try:
        for _ in range(reads_before):
            answer = bench.perform(steps.send(answer))
    except StopIteration:
        pass
    assert bench.run(TisDriver(2).resume(request_)) == echo(request_)
    assert len(bench.port.executed) == 1


def test_every_place_to_lose_the_driver_runs_the_command_exactly_once(make, request_, echo):
    place = 0
    while True:
        port = make.port()
        device = make.device(port)
        device.power_on()
        bench = make.bench(device, port)
        bench.run(TisDriver(2).initialize())
        count, is_lost = 0, False
        steps = collected(TisDriver(2), request_)
        answer = None
        try:
            while not is_lost:
                step = steps.send(answer)
                is_lost = count == place
                if not is_lost:
                    answer = bench.perform(step)
                    count += 1
        except StopIteration:
            break
        successor = TisDriver(2)
        response = bench.run(successor.resume(request_))
        if response is None:
            response = bench.run(collected(successor, request_))
        assert response == echo(request_)
        assert len(port.executed) == 1, f"driver lost before step {place}"
        place += 1
    assert place > 9


def collected(driver, request):
    yield from driver.start(request)
    return (yield from driver.collect(request))


def test_resume_after_a_seize_cannot_tell(bench, driver, request_):
    bench.delay = 1_000_000
    bench.run(driver.start(request_))
    bench.device.write(3, Register.ACCESS, b"\x08")
    assert failing(bench, TisDriver(2).resume(request_)).fault is TisFault.SEIZED


def test_resume_without_the_locality_says_not_run(bench, request_):
    assert bench.run(TisDriver(2).resume(request_)) is None


# -- the hash sequence -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4, BURST_COUNT, 5 * BURST_COUNT + 1])
def test_hash_sequence_feeds_all_bytes_in_order(bench, size):
    data = bytes(range(256)) * 5
    bench.run(TisDriver(4).hash_sequence(data[:size]))
    names = [name for name, _ in bench.port.cycles]
    assert (names[0], names[-1]) == ("start", "end")
    assert set(names[1:-1]) <= {"data"}
    assert b"".join(piece for _, piece in bench.port.cycles) == data[:size]
    assert bench.device.active_locality is None


def test_hash_sequence_needs_a_free_tpm(bench):
    bench.device.write(0, Register.ACCESS, b"\x02")
    error = failing(bench, TisDriver(4).hash_sequence(b"x"))
    assert error.fault is TisFault.HASH_REFUSED
    assert bench.port.cycles == []


@pytest.mark.parametrize(("cycle", "seen"), [("start", "HASH_START"), ("data", "HASH_DATA")])
def test_hash_sequence_that_fails_on_the_way_is_reported(bench, cycle, seen):
    bench.port.hash_answers = {cycle: False}
    error = failing(bench, TisDriver(4).hash_sequence(b"x"))
    assert error.fault is TisFault.HASH_REFUSED
    assert seen in error.detail


def test_hash_sequence_belongs_to_locality_4(bench):
    with pytest.raises(ValueError, match="locality 2"):
        bench.run(TisDriver(2).hash_sequence(b"x"))


# -- devices that misbehave ------------------------------------------------------------------------


class Bent:
    """A bench whose register reads can be bent: bend(offset, data) gives other data."""

    def __init__(self, bench, bend):
        self.bench = bench
        self.bend = bend

    def run(self, steps):
        answer = None
        while True:
            try:
                step = steps.send(answer)
            except StopIteration as end:
                return end.value
            answer = self.bench.perform(step)
            if isinstance(step, Read):
                answer = self.bend(step.offset, answer)


def status(value, burst=BURST_COUNT):
    return bytes([value, burst & 0xFF, burst >> 8, 0])


def bent_status(value, burst=BURST_COUNT):
    return lambda offset, data: status(value, burst) if offset == 0x18 else data


@pytest.mark.parametrize(
    ("bend", "fault"),
    [
        (bent_status(0x00), TisFault.TIMEOUT_B),
        (bent_status(0x40), TisFault.TIMEOUT_C),
        (bent_status(0xC0, burst=7), TisFault.PROTOCOL),  # Expect falls before the last byte
        (bent_status(0xC8), TisFault.PROTOCOL),  # Expect stays after the last byte
        (bent_status(0xC8, burst=0), TisFault.TIMEOUT_D),
        (lambda offset, data: b"\xff" * len(data) if offset == 0x18 else data, TisFault.PROTOCOL),
        (lambda _offset, data: b"\xff" * len(data), TisFault.ABSENT),
        (
            lambda offset, data: {0x00: b"\x21", 0x18: b"\xff" * len(data)}.get(offset, data),
            TisFault.TIMEOUT_A,
        ),
        (lambda _offset, data: data[:-1], TisFault.PROTOCOL),
        (lambda _offset, data: data + b"\0", TisFault.PROTOCOL),
    ],
)
def test_start_against_a_bent_device_fails_with_the_fault(make, port, request_, bend, fault):
    device = make.device(port, burst_count=7)
    device.power_on()
    bench = make.bench(device, port)
    driver = TisDriver(2, use_interrupts=False)
    bench.run(driver.request_locality())
    error = failing(Bent(bench, bend), driver.start(request_))
    assert error.fault is fault
    assert port.executed == []


@pytest.mark.parametrize(
    ("bend", "fault"),
    [
        (bent_status(0x40), TisFault.ABORTED),
        (bent_status(0x80), TisFault.TIMEOUT_DURATION),
        (bent_status(0x90, burst=0), TisFault.TIMEOUT_D),
        (bent_status(0x90, burst=7), TisFault.PROTOCOL),  # data left after the last byte
        (lambda offset, data: bytes(len(data)) if offset == 0x24 else data, TisFault.PROTOCOL),
        (lambda offset, data: b"\xff" * len(data) if offset == 0x24 else data, TisFault.PROTOCOL),
    ],
)
def test_collect_against_a_bent_device_fails_with_the_fault(bench, request_, bend, fault):
    driver = TisDriver(2, use_interrupts=False)
    bench.run(driver.start(request_))
    assert failing(Bent(bench, bend), driver.collect(request_)).fault is fault


def test_transmit_tells_the_chip_to_abort_after_a_fault(bench, request_):
    driver = TisDriver(2, use_interrupts=False)
    bench.run(driver.request_locality())
    failing(Bent(bench, bent_status(0xC8, burst=0)), driver.transmit(request_))
    assert bench.accesses[-1] == ("write", 2, 0x18, b"\x40")


@given(answers=st.lists(st.binary(min_size=1, max_size=8), min_size=1, max_size=8))
def test_any_register_values_end_in_a_response_or_a_named_error(make, answers):
    request = make.packet(body=b"0123")
    steps = TisDriver(2, timing=Timing(short_s=1.0)).transmit(request)
    now_s, count = 0.0, 0
    try:
        step = steps.send(None)
        while True:
            assert count < 5000
            count += 1
            if isinstance(step, Read):
                source = answers[count % len(answers)]
                step = steps.send((source * step.count)[: step.count])
            elif isinstance(step, Write):
                step = steps.send(None)
            else:
                now_s += getattr(step, "interval_s", None) or getattr(step, "limit_s", 0.0)
                step = steps.send(now_s)
    except TisError:
        return
    except StopIteration as end:
        response = end.value
    assert 10 <= len(response) <= COMMAND_BYTES_MAX
