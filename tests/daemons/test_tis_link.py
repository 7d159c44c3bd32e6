"""The driver's end of tis.sock against a chip whose connections can be cut anywhere."""

import contextlib
import itertools
import socket
import threading
import time

import pytest

from daemons.errors import ExitCode, Failure
from daemons.listeners import Kind, listen
from daemons.tis_link import (
    ChipFault,
    ChipLost,
    ChipMissing,
    ChipRefused,
    ChipSilent,
    TisLink,
)
from hwtpm.tis_device import State, TisDevice
from hwtpm.tis_driver import Timing, TisFault
from protocol import tis_messages as messages
from protocol.tis_messages import RefusedReason, decode_request, encode_message, refused

HELLO = messages.Hello(version=1, locality_mask=0b10100, is_platform=True)


def command(ordinal=0x15, body=b""):
    size = 10 + len(body)
    return b"\0\xc1" + size.to_bytes(4, "big") + ordinal.to_bytes(4, "big") + body


def answer_to(request):
    return b"\0\xc4" + (10 + len(request)).to_bytes(4, "big") + bytes(4) + request


class Port:
    """An engine that counts, so that a command that runs twice is seen."""

    established = False

    def __init__(self):
        self.executed = []
        self.hashed = b""

    def execute(self, request, _locality):
        self.executed.append(request)
        return answer_to(request)

    def hash_start(self):
        self.hashed = b""
        return True

    def hash_data(self, data):
        self.hashed += data
        return True

    def hash_end(self):
        return True


class Chip:
    """A chip behind a real socket, one connection at a time; messages can be cut, bent or held.

    `on_message(count, request)` is called for every message; it may return answers of its own,
    or raise ConnectionError to cut the connection in place of what the message asks.
    """

    def __init__(self, path, *, greeting=HELLO):
        self.port = Port()
        self.device = TisDevice(self.port)
        self.device.power_on()
        self.greeting = greeting
        self.count = 0
        self.connections = 0
        self.pins = []
        self.on_message = lambda _count, _request: None
        self.is_executing = True
        self.failures = []
        self._listener = listen(path, Kind.SEQPACKET)
        self._open = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self):
        self._listener.socket.shutdown(socket.SHUT_RDWR)
        if self._open is not None:
            with contextlib.suppress(OSError):
                self._open.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        assert not self._thread.is_alive()
        self._listener.close()
        assert self.failures == []

    def _serve(self):
        while True:
            try:
                self._open, _ = self._listener.socket.accept()
            except OSError:
                return
            self.connections += 1
            with self._open, contextlib.suppress(ConnectionError):
                try:
                    self._converse(self._open)
                except (ConnectionError, OSError):
                    continue
                except Exception as failure:  # noqa: BLE001 - shown by close()
                    self.failures.append(failure)

    def _converse(self, connection):
        connection.send(encode_message(self.greeting))
        while message := connection.recv(1000):
            request = decode_request(message)
            self.count += 1
            for answer in self._answers(request):
                connection.send(encode_message(answer))

    def _answers(self, request):
        bent = self.on_message(self.count, request)
        if bent is not None:
            return bent
        self._run_pending()
        if isinstance(request, messages.Read):
            data = self.device.read(request.locality, request.offset, request.count)
            return [messages.Value(data=data)]
        if not isinstance(request, messages.Write):
            self.pins.append(request)
            return [messages.Done()]
        self.device.write(request.locality, request.offset, request.data)
        self._run_pending()
        return [
            messages.Interrupt(locality=i.locality, status=i.status, vector=i.vector)
            for i in self.device.take_interrupts()
        ]

    def _run_pending(self):
        pending = self.device.pending_command
        if pending is not None and self.is_executing:
            self.device.complete(pending, self.port.execute(pending.request, pending.locality))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tis.sock"


@pytest.fixture
def chip(path):
    chip = Chip(path)
    yield chip
    chip.close()


@pytest.fixture
def link(path):
    with TisLink(path, 2, connect_timeout_s=0.2, answer_timeout_s=5.0) as link:
        yield link


# -- the main path ---------------------------------------------------------------------------------


@pytest.mark.parametrize("use_interrupts", [True, False])
def test_exchange_gives_the_response(path, chip, use_interrupts):
    with TisLink(path, 2, use_interrupts=use_interrupts) as link:
        for body in (b"", b"one", bytes(4086)[:2000]):
            assert link.exchange(command(body=body)) == answer_to(command(body=body))
    assert len(chip.port.executed) == 3
    assert chip.connections == 1


def test_locality_stays_after_close(chip, link):
    link.exchange(command())
    link.close()
    assert chip.device.active_locality == 2


def test_closed_link_connects_again(chip, link):
    link.exchange(command())
    link.close()
    link.close()
    assert link.exchange(command()) == answer_to(command())
    assert chip.connections == 2


def test_identify_and_learn_timing(chip, link):
    assert link.identify().vendor_id == 0x1014
    assert link.learn_timing() == Timing()
    assert len(chip.port.executed) == 2


def test_pins_are_moved(chip, link):
    link.power_on()
    link.set_physical_presence(is_asserted=True)
    link.power_off()
    assert chip.pins == [
        messages.PowerOn(),
        messages.PhysicalPresence(is_asserted=True),
        messages.PowerOff(),
    ]


def test_power_on_initializes_the_registers_again(chip, link):
    link.exchange(command())
    chip.device.power_on()
    link.power_on()
    assert link.exchange(command()) == answer_to(command())
    assert chip.device.read(2, 0x08, 4) == b"\x0d\0\0\x80"


def test_hash_sequence_feeds_the_chip(chip, link):
    link.hash_sequence(b"launcher" * 100)
    assert chip.port.hashed == b"launcher" * 100
    assert chip.device.active_locality is None


def test_threads_take_turns(chip, link):
    requests = [command(body=bytes([n])) for n in range(8)]
    answers = {}
    threads = [
        threading.Thread(target=lambda r=r: answers.__setitem__(r, link.exchange(r)))
        for r in requests
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert answers == {r: answer_to(r) for r in requests}
    assert sorted(chip.port.executed) == requests


def test_slow_command_is_woken_by_its_interrupt(chip, link):
    link.identify()
    chip.is_executing = False
    second_look = threading.Event()
    looks = []

    def look(_count, request):
        if isinstance(request, messages.Read) and chip.device.pending_command is not None:
            looks.append(request)
            second_look.set()

    chip.on_message = look

    def run():
        assert second_look.wait(10)
        pending = chip.device.pending_command
        chip.device.complete(pending, chip.port.execute(pending.request, pending.locality))
        for i in chip.device.take_interrupts():
            message = messages.Interrupt(locality=i.locality, status=i.status, vector=i.vector)
            chip._open.send(encode_message(message))

    engine = threading.Thread(target=run)
    engine.start()
    begin_s = time.monotonic()
    assert link.exchange(command()) == answer_to(command())
    engine.join(10)
    assert len(looks) == 1
    assert time.monotonic() - begin_s < 0.9  # not the fallback, which takes a second


# -- letting others in -----------------------------------------------------------------------------

ACCESS, ACTIVE_LOCALITY = 0x00, b"\x20"


def watch_given_up(chip):
    """An event that is set when the driver gives the locality up."""
    given_up = threading.Event()

    def look(_count, request):
        if getattr(request, "data", None) == ACTIVE_LOCALITY and request.offset == ACCESS:
            given_up.set()

    chip.on_message = look
    return given_up


def test_locality_is_given_up_soon_after_the_last_command(chip, link):
    given_up = watch_given_up(chip)
    link.exchange(command())
    assert chip.device.active_locality == 2
    assert not given_up.is_set()
    link.let_go()
    assert given_up.wait(10)
    link.relinquish()  # comes after it
    assert chip.device.active_locality is None
    assert link.exchange(command()) == answer_to(command())


def test_next_command_finds_the_locality_held(chip, link, monkeypatch):
    monkeypatch.setattr("daemons.tis_link.HOLD_S", 60.0)
    link.exchange(command())
    link.let_go()
    offsets = []
    chip.on_message = lambda _count, request: offsets.append(request.offset)
    for n in range(3):
        link.exchange(command(body=bytes([n])))
        link.let_go()
    assert len(offsets) >= 3 * 6
    assert ACCESS not in offsets


def test_locality_is_given_up_after_a_command_that_failed(chip, link, monkeypatch):
    monkeypatch.setattr("daemons.tis_link.HOLD_S", 0.01)
    short = b"\0\xc4\0\0\0\x01" + bytes(4)
    monkeypatch.setattr(chip.port, "execute", lambda *_: short)
    with pytest.raises(ChipFault, match="claims 1 bytes"):
        link.exchange(command())
    given_up = watch_given_up(chip)
    link.let_go()
    assert given_up.wait(10)


def test_closed_link_has_given_up_what_was_to_be_let_go(chip, link, monkeypatch):
    monkeypatch.setattr("daemons.tis_link.HOLD_S", 60.0)
    link.exchange(command())
    link.let_go()
    link.close()
    assert chip.device.active_locality is None
    assert chip.port.executed == [command()]


def test_locality_is_not_given_up_while_a_response_waits_in_the_chip(chip, link, monkeypatch):
    monkeypatch.setattr("daemons.tis_link.HOLD_S", 0.01)
    given_up = watch_given_up(chip)
    response = link.execute(command())
    link.let_go()
    assert not given_up.wait(0.1)
    assert link.resume(command()) == response
    link.finish()
    assert given_up.wait(10)
    assert chip.port.executed == [command()]


# -- lost connections ------------------------------------------------------------------------------


def exchange_three(path):
    with TisLink(path, 2, connect_timeout_s=5.0, reconnect_timeout_s=5.0) as link:
        return [link.exchange(command(body=bytes([n]))) for n in range(3)]


def test_connection_cut_at_any_message_runs_each_command_exactly_once(tmp_path):
    requests = [command(body=bytes([n])) for n in range(3)]
    cut, is_through = 1, False
    while not is_through:
        directory = tmp_path / str(cut)
        directory.mkdir(0o700)
        chip = Chip(directory / "tis.sock")
        chip.on_message = cut_at(cut)
        assert exchange_three(directory / "tis.sock") == [answer_to(r) for r in requests]
        assert chip.port.executed == requests, f"cut at message {cut}"
        is_through = chip.connections == 1
        chip.close()
        cut += 1
    assert cut > 35


def test_response_that_a_cut_left_in_the_chip_is_not_taken_for_the_next_command_s(tmp_path):
    """That the chip is to forget it is a posted write, which a killed chip may never have seen."""
    requests = [command(body=bytes([n])) for n in range(3)]
    cut, is_through = 1, False
    while not is_through:
        directory = tmp_path / str(cut)
        directory.mkdir(0o700)
        chip = Chip(directory / "tis.sock")
        chip.on_message = cut_at(cut)
        with TisLink(directory / "tis.sock", 2, reconnect_timeout_s=5.0) as link:
            link.let_go()  # such a link reads nothing back when it ends a command
            assert [link.exchange(each) for each in requests] == [answer_to(r) for r in requests]
        assert chip.port.executed == requests, f"cut at message {cut}"
        is_through = chip.connections == 1
        chip.close()
        cut += 1
    assert cut > 20


def test_two_cuts_in_a_row_run_each_command_exactly_once(tmp_path):
    requests = [command(body=bytes([n])) for n in range(3)]
    for cut in range(1, 40, 3):
        directory = tmp_path / str(cut)
        directory.mkdir(0o700)
        chip = Chip(directory / "tis.sock")
        chip.on_message = cut_at(cut, cut + 2)
        assert exchange_three(directory / "tis.sock") == [answer_to(r) for r in requests]
        assert chip.port.executed == requests, f"cut at messages {cut} and {cut + 2}"
        chip.close()


def test_launch_is_done_though_the_connection_is_cut_at_any_message(tmp_path, monkeypatch):
    """The platform gives its locality up first, or the hash sequence would not be accepted."""
    monkeypatch.setattr("daemons.tis_link.CONNECT_RETRY_S", 0.001)
    hello = messages.Hello(version=1, locality_mask=0b11111, is_platform=True)
    cut, is_through = 1, False
    while not is_through:
        directory = tmp_path / str(cut)
        directory.mkdir(0o700)
        chip = Chip(directory / "tis.sock", greeting=hello)
        chip.on_message = cut_at(cut)
        with TisLink(directory / "tis.sock", 2, reconnect_timeout_s=5.0) as link:
            assert link.exchange(command(EXTEND)) == answer_to(command(EXTEND))
            link.relinquish()
            assert chip.device.active_locality is None
            link.hash_sequence(b"launcher" * 10)
        assert chip.port.executed == [command(EXTEND)], f"cut at message {cut}"
        assert chip.port.hashed == b"launcher" * 10, f"cut at message {cut}"
        assert chip.device.active_locality is None
        is_through = chip.connections == 1
        chip.close()
        cut += 1
    assert cut > 20


def cut_at(*cuts):
    def on_message(count, _request):
        if count in cuts:
            raise ConnectionAbortedError

    return on_message


def test_response_kept_in_the_chip_is_resumed_by_another_link(path, chip):
    with TisLink(path, 2) as first:
        assert first.execute(command(body=b"x")) == answer_to(command(body=b"x"))
    with TisLink(path, 2) as second:
        assert second.resume(command(body=b"x")) == answer_to(command(body=b"x"))
        second.finish()
        assert second.exchange(command(body=b"y")) == answer_to(command(body=b"y"))
    assert chip.port.executed == [command(body=b"x"), command(body=b"y")]


def test_command_that_never_reached_the_chip_is_run_by_resume(chip, link):
    assert link.resume(command()) == answer_to(command())
    assert len(chip.port.executed) == 1


def test_command_that_never_reached_the_chip_is_not_run_by_recollect(chip, link):
    assert link.recollect(command()) is None
    assert chip.port.executed == []


def test_process_killed_at_any_message_learns_whether_its_command_was_run(tmp_path):
    request, cut, is_through = command(body=b"x"), 1, False
    found = set()
    while not is_through:
        directory = tmp_path / str(cut)
        directory.mkdir(0o700)
        chip = Chip(directory / "tis.sock")
        chip.on_message = cut_at(cut)
        with (
            contextlib.suppress(ChipLost),
            TisLink(directory / "tis.sock", 2, reconnect_timeout_s=0.0) as killed,
        ):
            killed.settle()
            killed.execute(request)
        is_through = chip.connections == 1 and chip.count < cut
        with TisLink(directory / "tis.sock", 2) as successor:
            response = successor.recollect(request)
            found.add(response is not None)
            if response is None:
                response = successor.execute(request)
            assert response == answer_to(request)
            successor.finish()
        assert chip.port.executed == [request], f"killed at message {cut}"
        chip.close()
        cut += 1
    assert cut > 10
    assert found == {True, False}


def test_older_response_of_the_same_bytes_is_not_taken_for_one_of_this_command(path, chip):
    def leave(link):
        link.execute(command())
        chip.on_message = cut_at(chip.count + 1)
        link.finish()

    with TisLink(path, 2) as link:
        leave(link)  # the next command of these bytes is begun, and not sent
    with TisLink(path, 2) as successor:
        assert successor.recollect(command()) is not None, "the control: it is there"
        leave(successor)
        successor.settle()
    with TisLink(path, 2) as successor:
        assert successor.recollect(command()) is None
    assert len(chip.port.executed) == 2


def test_response_of_an_earlier_process_is_not_taken_for_the_next_command(path, chip):
    requests = [command(body=bytes([n])) for n in range(25)]
    for cut, request in enumerate(requests):
        chip.on_message = cut_at(chip.count + cut)
        with TisLink(path, 2) as link:  # ends without `finish`, as a killed process does
            assert link.execute(request) == answer_to(request)
    assert chip.port.executed == requests


def test_response_that_was_not_finished_is_not_taken_for_the_next_command(path, chip):
    requests = [command(body=bytes([n])) for n in range(25)]
    with TisLink(path, 2) as link:
        for cut, request in enumerate(requests):
            chip.on_message = cut_at(chip.count + cut)
            assert link.execute(request) == answer_to(request)
    assert chip.port.executed == requests


def test_finish_without_connection_is_made_up_for_later(chip, link):
    link.execute(command(body=b"1"))
    chip.on_message = cut_at(chip.count + 1)
    link.finish()
    link.finish()
    assert link.exchange(command(body=b"2")) == answer_to(command(body=b"2"))
    assert len(chip.port.executed) == 2


def test_chip_that_does_not_come_back_is_lost(path, chip):
    with TisLink(path, 2, connect_timeout_s=1.0, reconnect_timeout_s=0.2) as link:
        link.identify()
        chip.on_message = cut_at(*range(1000))
        with pytest.raises(ChipLost) as caught:
            link.exchange(command())
    assert caught.value.exit_code is ExitCode.UNAVAILABLE
    assert chip.port.executed == []


def test_close_ends_an_exchange_of_another_thread(path, chip):
    chip.is_executing = False
    outcome = []
    link = TisLink(path, 2, use_interrupts=False)
    waiting = threading.Event()

    def on_message(_count, _request):
        if chip.device.pending_command is not None:
            waiting.set()
            return []  # never answered
        return None

    chip.on_message = on_message

    def run():
        try:
            link.exchange(command())
        except Failure as failure:
            outcome.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    assert waiting.wait(10)
    link.close()
    thread.join(10)
    assert [type(failure) for failure in outcome] == [ChipLost]


# -- failures --------------------------------------------------------------------------------------


def test_missing_socket_is_told_with_what_to_do(path, link):
    with pytest.raises(ChipMissing) as caught:
        link.exchange(command())
    assert str(path) in caught.value.what
    assert "after waiting 0.2 s" in caught.value.why
    assert "vtpm up" in caught.value.next_step


def test_socket_that_comes_late_is_waited_for(path):
    outcome = []
    with TisLink(path, 2, connect_timeout_s=10.0) as link:
        thread = threading.Thread(target=lambda: outcome.append(link.exchange(command())))
        thread.start()
        chip = Chip(path)
        thread.join(10)
    chip.close()
    assert outcome == [answer_to(command())]


def test_page_that_was_not_granted_is_refused(path, chip):
    with TisLink(path, 0) as link, pytest.raises(ChipRefused) as caught:
        link.exchange(command())
    assert caught.value.reason is RefusedReason.PAGE_NOT_GRANTED
    assert "granted: 2, 4" in caught.value.why
    assert "iomem" in caught.value.next_step
    assert chip.count == 0


def test_hash_sequence_needs_page_4(path):
    greeting = messages.Hello(version=1, locality_mask=0b00100, is_platform=False)
    chip = Chip(path, greeting=greeting)
    with TisLink(path, 2) as link, pytest.raises(ChipRefused, match="locality 4"):
        link.hash_sequence(b"x")
    chip.close()


def test_stranger_is_told_the_reason(path):
    chip = Chip(path, greeting=refused(RefusedReason.UNKNOWN_PEER, "no such domain"))
    with TisLink(path, 2) as link, pytest.raises(ChipRefused) as caught:
        link.exchange(command())
    assert caught.value.reason is RefusedReason.UNKNOWN_PEER
    assert caught.value.why == "no such domain"
    assert caught.value.exit_code is ExitCode.NO_PERMISSION
    chip.close()


def test_refused_pin_is_told(chip, link):
    chip.on_message = lambda _count, _request: [refused(RefusedReason.CHIP_FAILED, "worn out")]
    with pytest.raises(ChipRefused, match="worn out"):
        link.power_on()


@pytest.mark.parametrize("nth", range(1, 25))
def test_an_answer_that_comes_twice_costs_one_command_at_most(path, chip, nth):
    """Each one behind it is taken for that of the next access, as long as the connection lasts."""
    timing = Timing(a_s=0.05, b_s=0.05, c_s=0.05, d_s=0.05, short_s=0.05)
    reads = itertools.count(1)

    def twice(_count, request):
        if isinstance(request, messages.Read) and next(reads) == nth:
            value = messages.Value(
                data=chip.device.read(request.locality, request.offset, request.count)
            )
            return [value, value]
        return None

    with TisLink(
        path, 2, timing=timing, busy_timeout_s=0.01, answer_timeout_s=1.0, use_interrupts=False
    ) as link:
        link.exchange(command())
        chip.on_message = twice
        outcomes = []
        for request in [command(body=bytes([number])) for number in range(8)]:
            try:
                outcomes.append(link.exchange(request) == answer_to(request))
            except Failure:
                outcomes.append(False)
        assert next(reads) > nth
        assert outcomes.count(False) <= 1
        assert outcomes[-1]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (RefusedReason.UNKNOWN_PEER, ExitCode.NO_PERMISSION),
        (RefusedReason.PAGE_NOT_GRANTED, ExitCode.NO_PERMISSION),
        (RefusedReason.NOT_PLATFORM, ExitCode.NO_PERMISSION),
        (RefusedReason.TOO_WIDE, ExitCode.UNAVAILABLE),
        (RefusedReason.MALFORMED, ExitCode.UNAVAILABLE),
        (RefusedReason.TOO_MANY_CONNECTIONS, ExitCode.UNAVAILABLE),
        (RefusedReason.CHIP_FAILED, ExitCode.UNAVAILABLE),
    ],
)
def test_only_a_refusal_of_rights_ends_a_start_for_good(chip, link, reason, status):
    """A manager that ends with another status is started again by the launcher."""
    chip.on_message = lambda _count, _request: [refused(reason, "no")]
    with pytest.raises(ChipRefused) as caught:
        link.power_on()
    assert caught.value.exit_code is status


def test_every_refusal_has_a_next_step():
    for reason in RefusedReason:
        assert ChipRefused("what", reason=reason, text="why").next_step


@pytest.mark.parametrize(
    "greeting",
    [messages.Hello(version=2, locality_mask=4, is_platform=False), messages.Done()],
)
def test_greeting_of_another_version_is_told(path, greeting):
    chip = Chip(path, greeting=greeting)
    with TisLink(path, 2) as link, pytest.raises(ChipSilent, match="no greeting of version 1"):
        link.exchange(command())
    chip.close()


@pytest.mark.parametrize("use_interrupts", [True, False])
def test_chip_that_answers_nothing_is_told_after_the_timeout(path, chip, use_interrupts):
    timing = Timing(short_s=0.05)
    chip.on_message = lambda _count, _request: []
    with (
        TisLink(
            path, 2, answer_timeout_s=0.1, timing=timing, use_interrupts=use_interrupts
        ) as link,
        pytest.raises(ChipSilent, match="nothing came for"),
    ):
        link.exchange(command())


@pytest.mark.parametrize(
    "answers",
    [
        [messages.Done()],
        [messages.Hello(version=1, locality_mask=4, is_platform=False)],
    ],
)
def test_answer_that_has_no_place_there_ends_the_connection(chip, link, answers):
    chip.on_message = lambda _count, _request: answers
    with pytest.raises(ChipSilent):
        link.exchange(command())
    chip.on_message = lambda _count, _request: None
    assert link.exchange(command()) == answer_to(command())
    assert chip.connections == 2


def test_value_in_answer_to_a_pin_is_told(chip, link):
    chip.on_message = lambda _count, _request: [messages.Value(data=b"x")]
    with pytest.raises(ChipSilent, match="in answer to PowerOn"):
        link.power_on()


def test_value_instead_of_an_interrupt_is_told(chip, link):
    link.identify()
    chip.is_executing = False

    def on_message(_count, request):
        if isinstance(request, messages.Read) and chip.device.pending_command is not None:
            value = messages.Value(data=b"\x80\xfc\0\0")
            return [value, value]
        return None

    chip.on_message = on_message
    with pytest.raises(ChipSilent, match="where nothing was asked"):
        link.exchange(command())


def test_chip_without_power_is_told(chip, link):
    chip.device.power_off()
    with pytest.raises(ChipFault) as caught:
        link.exchange(command())
    assert caught.value.fault is TisFault.ABSENT
    assert "vtpm up" in caught.value.next_step
    chip.device.power_on()
    assert link.exchange(command()) == answer_to(command())


def test_command_over_its_duration_is_aborted(path, chip):
    chip.is_executing = False
    with (
        TisLink(
            path, 2, timing=Timing(short_s=0.05), busy_timeout_s=0.1, use_interrupts=False
        ) as link,
        pytest.raises(ChipFault) as caught,
    ):
        link.exchange(command())
    assert caught.value.fault is TisFault.TIMEOUT_DURATION
    chip.is_executing = True
    with TisLink(path, 2) as link:
        assert link.exchange(command()) == answer_to(command())


EXTEND = 0x14


def seize_when(chip, is_time):
    """Let locality 3 seize the TPM once, before the access for which `is_time` says so.

    It gives the TPM back when locality 2 has asked for it."""
    seized = []

    def on_message(_count, request):
        if not seized and is_time(request):
            seized.append(request)
            chip.device.write(3, 0x00, b"\x08")
        elif isinstance(request, messages.Read) and chip.device.read(3, 0x00)[0] & 0x04:
            chip.device.write(3, 0x00, b"\x20")

    chip.on_message = on_message
    return seized


def test_seized_command_is_told_to_be_in_doubt(chip, link):
    link.identify()
    chip.is_executing = False
    seize_when(chip, lambda _request: chip.device.pending_command is not None)
    with pytest.raises(ChipFault) as caught:
        link.exchange(command(EXTEND))
    assert caught.value.fault is TisFault.SEIZED
    assert "not known whether" in caught.value.next_step


def test_seized_command_that_may_run_twice_is_sent_again(chip, link):
    link.identify()
    chip.is_executing = False

    def is_running(_request):
        is_time = chip.device.pending_command is not None
        chip.is_executing = is_time
        return is_time

    seized = seize_when(chip, is_running)
    assert link.exchange(command()) == answer_to(command())
    assert seized


@pytest.mark.parametrize("nth", range(1, 9))
def test_seizure_before_the_start_of_a_command_is_a_pause(chip, link, nth):
    link.identify()
    count = iter(range(1, 10_000))
    seized = seize_when(
        chip, lambda _request: chip.device.state is not State.COMPLETION and next(count) == nth
    )
    big = command(EXTEND, bytes(600))
    assert link.exchange(big) == answer_to(big)
    assert chip.port.executed == [big]
    assert seized


def test_locality_that_another_one_has_is_waited_for(chip, path):
    chip.device.write(3, 0x00, b"\x02")
    asked = []

    def give_up_late(_count, request):
        asked.append(request)
        if len(asked) == 20:
            chip.device.write(3, 0x00, b"\x20")

    chip.on_message = give_up_late
    with TisLink(path, 2, timing=Timing(a_s=0.01), use_interrupts=False) as link:
        assert link.exchange(command()) == answer_to(command())


def test_locality_that_another_one_keeps_is_told(chip, path):
    chip.device.write(3, 0x00, b"\x02")
    with (
        TisLink(path, 2, timing=Timing(a_s=0.01), busy_timeout_s=0.05) as link,
        pytest.raises(ChipFault) as caught,
    ):
        link.exchange(command())
    assert caught.value.fault is TisFault.TIMEOUT_A


@pytest.mark.parametrize("request_", [command(EXTEND, bytes(600)), command()], ids=["big", "small"])
@pytest.mark.parametrize("at", range(12))
def test_chip_that_is_busy_beyond_every_timeout_is_waited_for(path, chip, request_, at):
    """From its n-th status on, the chip says for a while that it is not ready and has no data."""
    asked = []

    def busy(_count, request):
        if isinstance(request, messages.Read) and request.offset == 0x18:
            asked.append(request)
            if at <= len(asked) < at + 12:
                true = chip.device.read(request.locality, request.offset, request.count)
                return [messages.Value(data=bytes([true[0] & ~0x50, 0, 0, *true[3:]]))]
        return None

    chip.on_message = busy
    quick = Timing(a_s=0.01, b_s=0.01, c_s=0.01, d_s=0.01, short_s=0.01)
    with TisLink(path, 2, timing=quick, use_interrupts=False) as link:
        assert link.exchange(request_) == answer_to(request_)
    assert chip.port.executed == [request_]


def test_clock_of_the_driver_that_jumps_costs_no_command(path, chip):
    readings = iter(range(0, 10**9, 3600))
    chip.is_executing = False

    def execute_late(count, _request):
        chip.is_executing = count > 40

    chip.on_message = execute_late
    with TisLink(path, 2, monotonic_s=lambda: float(next(readings)), use_interrupts=False) as link:
        assert link.exchange(command(EXTEND)) == answer_to(command(EXTEND))
    assert chip.port.executed == [command(EXTEND)]
