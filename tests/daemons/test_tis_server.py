"""The chip's socket: admission, pages, pins, interrupts, commands that run beside registers."""

import signal
import socket
import threading
import time
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

import pytest
import structlog
import trio

from daemons.errors import Failure
from daemons.listeners import Kind, connect, listen
from daemons.tis_link import ChipFault, ChipRefused, TisLink
from daemons.tis_server import REFUSALS_LOGGED_MAX, TisPeer, TisServer, TisSettings, serve_tis
from hwtpm.tis_device import State
from hwtpm.tis_driver import TisFault
from hwtpm.tis_registers import Register
from protocol import tis_messages as messages
from protocol.tis_messages import RefusedReason, decode_answer, encode_message

ACCESS, INT_ENABLE, STS, FIFO = 0x00, 0x08, 0x18, 0x24
WAIT_S = 10.0


def command(body=b""):  # TPM_Extend: never run twice
    return b"\0\xc1" + (10 + len(body)).to_bytes(4, "big") + b"\0\0\0\x14" + body


def answer_to(request):
    return b"\0\xc4" + (10 + len(request)).to_bytes(4, "big") + bytes(4) + request


@dataclass
class FakeChip:
    """An engine that can be held in the middle of a command."""

    established: bool = False
    executed: list = field(default_factory=list)
    pins: list = field(default_factory=list)
    hashed: list = field(default_factory=list)
    power_fails: bool = False
    error: Exception | None = None
    is_held: bool = False
    entered: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    inside: int = 0

    @contextmanager
    def alone(self):
        self.inside += 1
        assert self.inside == 1
        yield
        self.inside -= 1

    def execute(self, request, locality):
        with self.alone():
            if self.error is not None:
                raise self.error
            self.executed.append((locality, request))
            if self.is_held:
                self.entered.set()
                assert self.released.wait(WAIT_S)
            return answer_to(request)

    def hash_start(self):
        with self.alone():
            self.hashed.append("start")
            return True

    def hash_data(self, data):
        with self.alone():
            self.hashed.append(data)
            return True

    def hash_end(self):
        with self.alone():
            self.hashed.append("end")
            return True

    def power_on(self):
        with self.alone():
            if self.power_fails:
                raise Failure("cannot start the chip", why="its memory is damaged", next_step="-")
            self.pins.append("on")

    def power_off(self):
        with self.alone():
            self.pins.append("off")

    def set_physical_presence(self, *, is_asserted):
        with self.alone():
            self.pins.append(is_asserted)


@dataclass
class Bench:
    chip: FakeChip
    server: TisServer
    path: object
    peers: list  # what `admit` gives the next connections; the last one stays

    def link(self, locality=2, **options):
        return TisLink(self.path, locality, connect_timeout_s=2.0, **options)

    @contextmanager
    def raw(self):
        """A connection without a driver; gives the socket behind the greeting."""
        with connect(self.path, Kind.SEQPACKET) as connection:
            connection.settimeout(WAIT_S)
            receive(connection)
            yield connection


MANAGER = TisPeer(name="vtpmmgr", localities=frozenset({2}))
PLATFORM = TisPeer(name="Domain-0", localities=frozenset({0, 4}), is_platform=True)
ALL_PAGES = TisPeer(name="tester", localities=frozenset(range(5)), is_platform=True)
DOMAIN_WITH_ALL_PAGES = TisPeer(name="tester", localities=frozenset(range(5)))


@pytest.fixture
def serving(tmp_path):
    @asynccontextmanager
    async def serving(*peers, settings=None):
        chip, remaining = FakeChip(), list(peers)

        def admit(_credentials):
            peer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
            if isinstance(peer, Failure):
                raise peer
            return peer

        server = TisServer(chip, admit, settings=settings)
        server.device.power_on()
        listener = listen(tmp_path / "tis.sock", Kind.SEQPACKET)
        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                await nursery.start(serve_tis, listener, server)
                yield Bench(chip, server, tmp_path / "tis.sock", remaining)
                nursery.cancel_scope.cancel()

    return serving


async def in_thread(function, *args):
    return await trio.to_thread.run_sync(function, *args)


async def until(is_true):
    """Wait for what no event tells; `serving` limits how long."""
    while not is_true():  # noqa: ASYNC110 - the condition changes in a thread of the server
        await trio.sleep(0.001)


def wait_for(is_true):
    """As `until`, in a thread."""
    end = time.monotonic() + WAIT_S
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.001)


def receive(connection):
    return decode_answer(connection.recv(1000))


def send(connection, request):
    connection.send(encode_message(request))


def read(connection, locality, offset, count=1):
    send(connection, messages.Read(locality=locality, offset=offset, count=count))
    while isinstance(answer := receive(connection), messages.Interrupt):
        pass
    return answer


def write(connection, locality, offset, data):
    send(connection, messages.Write(locality=locality, offset=offset, data=data))


def start(connection, request, locality=2):
    """Take the locality, write a command and say go."""
    write(connection, locality, ACCESS, b"\x02")
    write(connection, locality, STS, b"\x40")
    write(connection, locality, FIFO, request)
    write(connection, locality, STS, b"\x20")


def value(data):
    return messages.Value(data=data)


# -- the main path ---------------------------------------------------------------------------------


async def test_command_goes_through_socket_and_device(serving):
    async with serving(MANAGER) as bench:
        with bench.link() as link:
            assert await in_thread(link.exchange, command(b"x")) == answer_to(command(b"x"))
        assert bench.chip.executed == [(2, command(b"x"))]


async def test_platform_powers_on_hashes_and_asserts_presence(serving):
    async with serving(PLATFORM) as bench:
        bench.server.device.power_off()
        with bench.link(locality=4) as link:
            await in_thread(link.power_on)
            await in_thread(link.hash_sequence, b"launcher")
            await in_thread(lambda: link.set_physical_presence(is_asserted=True))
            await in_thread(link.power_off)
        assert bench.chip.pins == ["on", True, "off"]
        assert bench.chip.hashed == ["start", b"launcher", "end"]
        assert not bench.server.device.is_powered


async def test_greeting_says_what_is_granted(serving):
    async with serving(PLATFORM) as bench:

        def greeting():
            with connect(bench.path, Kind.SEQPACKET) as connection:
                return receive(connection)

        hello = await in_thread(greeting)
        assert hello == messages.Hello(version=1, locality_mask=0b10001, is_platform=True)


# -- who may what ----------------------------------------------------------------------------------


async def test_stranger_is_refused_with_the_reason_and_logged(serving):
    stranger = Failure("pid 7 is no domain", why="it is not registered", next_step="-")
    with structlog.testing.capture_logs() as logs:
        async with serving(stranger) as bench:
            with bench.link() as link, pytest.raises(ChipRefused) as caught:
                await in_thread(link.exchange, command())
    assert caught.value.reason is RefusedReason.UNKNOWN_PEER
    assert caught.value.why == "pid 7 is no domain"
    assert any("not registered" in entry.get("reason", "") for entry in logs)


@pytest.mark.parametrize("locality", [0, 1, 3, 4])
async def test_page_that_was_not_granted_is_refused_and_logged(serving, locality):
    with structlog.testing.capture_logs() as logs:
        async with serving(MANAGER) as bench:

            def trespass():
                with bench.raw() as connection:
                    refusals = [read(connection, locality, ACCESS)]
                    for offset, data in ((ACCESS, b"\x08"), (0x28, b"\0"), (FIFO, b"x")):
                        write(connection, locality, offset, data)
                        refusals.append(receive(connection))
                    return refusals, read(connection, 2, ACCESS)

            before = bench.server.device.snapshot()
            refusals, own_page = await in_thread(trespass)
            assert bench.server.device.snapshot() == before
    assert {refusal.reason for refusal in refusals} == {RefusedReason.PAGE_NOT_GRANTED}
    assert f"the page of locality {locality}" in refusals[0].text
    assert own_page == value(b"\x81")
    assert sum(entry["event"] == "access refused" for entry in logs) == 4
    assert bench.chip.hashed == []


async def test_peer_cannot_fill_the_log_with_refusals(serving):
    with structlog.testing.capture_logs() as logs:
        async with serving(MANAGER) as bench:

            def trespass():
                with bench.raw() as connection:
                    for _ in range(100):
                        assert isinstance(read(connection, 0, ACCESS), messages.Refused)

            await in_thread(trespass)
    assert sum(entry["event"] == "access refused" for entry in logs) == REFUSALS_LOGGED_MAX


async def test_pins_are_the_platforms_only(serving):
    async with serving(MANAGER) as bench:

        def move():
            with bench.raw() as connection:
                for pin in (
                    messages.PowerOn(),
                    messages.PowerOff(),
                    messages.PhysicalPresence(is_asserted=True),
                ):
                    send(connection, pin)
                    yield receive(connection).reason

        reasons = await in_thread(lambda: list(move()))
        assert reasons == [RefusedReason.NOT_PLATFORM] * 3
        assert bench.chip.pins == []
        assert bench.server.device.is_powered


async def test_chip_that_cannot_start_stays_without_power_and_says_why(serving):
    async with serving(PLATFORM) as bench:
        bench.chip.power_fails = True
        with bench.link(locality=4) as link:
            with pytest.raises(ChipRefused) as caught:
                await in_thread(link.power_on)
            assert caught.value.why == "cannot start the chip: its memory is damaged"
            with pytest.raises(ChipFault) as caught:
                await in_thread(link.exchange, command())
        assert caught.value.fault is TisFault.ABSENT


@pytest.mark.parametrize(("offset", "count"), [(STS, 5), (FIFO, 253), (0xF00, 255)])
async def test_access_that_is_too_wide_is_refused(serving, offset, count):
    async with serving(MANAGER) as bench:

        def access():
            with bench.raw() as connection:
                refusals = [read(connection, 2, offset, count)]
                write(connection, 2, offset, bytes(count))
                return [*refusals, receive(connection)]

        for refusal in await in_thread(access):
            assert refusal.reason is RefusedReason.TOO_WIDE


@pytest.mark.parametrize("data", [b"\0", b"\x81", b"\x01\x05\0\0\x01", bytes(600)])
async def test_malformed_message_is_told_and_ends_the_connection_only(serving, data):
    async with serving(MANAGER) as bench:

        def babble():
            with bench.raw() as connection:
                connection.send(data)
                return receive(connection), connection.recv(100)

        refusal, end = await in_thread(babble)
        assert refusal.reason is RefusedReason.MALFORMED
        assert end == b""
        with bench.link() as link:
            assert await in_thread(link.exchange, command()) == answer_to(command())


async def test_connections_are_limited_in_all_and_per_domain(serving):
    settings = TisSettings(connections_max=3, connections_per_domain_max=2)
    async with serving(MANAGER, MANAGER, MANAGER, PLATFORM, PLATFORM, settings=settings) as bench:

        def crowd():
            connections, greetings = [], []
            for _ in range(5):
                connections.append(connect(bench.path, Kind.SEQPACKET))
                greetings.append(receive(connections[-1]))
            for connection in connections:
                connection.close()
            return greetings

        greetings = await in_thread(crowd)
        kinds = [type(greeting).__name__ for greeting in greetings]
        assert kinds == ["Hello", "Hello", "Refused", "Hello", "Refused"]
        assert greetings[2].reason is RefusedReason.TOO_MANY_CONNECTIONS
        bench.peers[:] = [MANAGER]
        await until(lambda: not bench.server._per_domain)
        with bench.link() as link:
            assert await in_thread(link.exchange, command()) == answer_to(command())


async def test_peer_that_reads_no_answers_ends_alone(serving):
    async with serving(MANAGER, settings=TisSettings(send_s=0.1)) as bench:

        def flood():
            with bench.raw() as connection:
                for _ in range(1_000_000):
                    try:
                        send(connection, messages.Read(locality=2, offset=0, count=1))
                    except ConnectionError:
                        return
            pytest.fail("the server took it all")

        await in_thread(flood)
        with bench.link() as link:
            assert await in_thread(link.exchange, command()) == answer_to(command())


# -- commands beside the registers -----------------------------------------------------------------


@asynccontextmanager
async def held_command(bench, locality=2, **options):
    """A command of `locality` in the middle of its execution, in another thread."""
    bench.chip.is_held = True
    outcome = []

    def run():
        with bench.link(locality, **options) as link:
            try:
                outcome.append(link.exchange(command()))
            except Failure as failure:
                outcome.append(failure)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, run)
        await in_thread(bench.chip.entered.wait, WAIT_S)
        try:
            yield outcome
        finally:
            bench.chip.released.set()


async def test_registers_answer_others_while_a_command_runs(serving):
    async with serving(DOMAIN_WITH_ALL_PAGES) as bench:

        def look():
            with bench.raw() as connection:
                write(connection, 1, ACCESS, b"\x02")
                return [
                    read(connection, 1, ACCESS),
                    read(connection, 2, STS),
                    read(connection, 2, ACCESS),
                ]

        async with held_command(bench) as outcome:
            assert await in_thread(look) == [value(b"\x83"), value(b"\x80"), value(b"\xa5")]
            assert outcome == []
        assert outcome == [answer_to(command())]
        # Locality 2 is given up after the answer, by a message that nobody answers.
        await until(lambda: bench.server.device.active_locality == 1)


async def test_seize_while_a_command_runs_discards_its_response(serving):
    async with serving(ALL_PAGES) as bench:

        def seize():
            with bench.raw() as connection:
                write(connection, 3, ACCESS, b"\x08")
                return read(connection, 3, ACCESS)

        async with held_command(bench) as outcome:
            assert await in_thread(seize) == value(b"\xa1")
        assert outcome[0].fault is TisFault.SEIZED
        assert bench.server.device.state is State.IDLE


async def test_abort_from_the_same_locality_lets_the_next_command_wait_for_the_engine(serving):
    async with serving(ALL_PAGES) as bench:

        def abort_and_run():
            with bench.raw() as first, bench.raw() as second:
                start(first, command(b"first"))
                assert bench.chip.entered.wait(WAIT_S)
                write(second, 2, STS, b"\x40")
                assert read(second, 2, STS) == value(b"\x40")
                bench.chip.is_held = False
                start(second, command(b"second"))
                bench.chip.released.set()
                assert read(second, 2, STS) == value(b"\x90")
                return read(second, 2, FIFO, 100).data

        bench.chip.is_held = True
        second = await in_thread(abort_and_run)
        expected = answer_to(command(b"second"))
        assert second[: len(expected)] == expected
        assert bench.chip.executed == [(2, command(b"first")), (2, command(b"second"))]


async def test_command_aborted_while_it_waits_for_the_engine_never_runs(serving):
    async with serving(DOMAIN_WITH_ALL_PAGES) as bench:
        device = bench.server.device

        def queue():
            with bench.raw() as connection:
                write(connection, 3, ACCESS, b"\x08")
                start(connection, command(b"queued"), locality=3)
                return read(connection, 3, STS)

        async with held_command(bench), trio.open_nursery() as nursery:
            nursery.start_soon(in_thread, queue)
            await until(lambda: bench.server._engine.waiting_count > 0)
            assert device.state is State.EXECUTION
            device.write(3, STS, b"\x40")
            bench.chip.is_held = False
            bench.chip.released.set()
        assert bench.chip.executed == [(2, command())]
        assert device.state is State.READY


async def test_power_cycle_while_a_command_runs_discards_it(serving):
    async with serving(ALL_PAGES) as bench:

        def reset():
            with bench.raw() as connection:
                send(connection, messages.PowerOn())
                return receive(connection)

        answers = []

        async def in_background():
            answers.append(await in_thread(reset))

        async with held_command(bench) as outcome, trio.open_nursery() as nursery:
            nursery.start_soon(in_background)
            await until(lambda: bench.server._engine.waiting_count > 0)
            assert bench.chip.pins == []
            bench.chip.released.set()
        assert answers == [messages.Done()]
        assert bench.chip.pins == ["on"]
        assert isinstance(outcome[0], ChipFault)
        assert bench.server.device.state is State.IDLE


async def test_connection_that_ends_leaves_locality_command_and_response(serving):
    async with serving(MANAGER) as bench:
        bench.chip.is_held = True

        def run_and_vanish():
            with bench.raw() as connection:
                start(connection, command())
                assert bench.chip.entered.wait(WAIT_S)

        await in_thread(run_and_vanish)
        bench.chip.is_held = False
        bench.chip.released.set()
        with bench.link() as link:
            assert await in_thread(link.resume, command()) == answer_to(command())
        assert len(bench.chip.executed) == 1
        assert bench.server.device.active_locality == 2


@pytest.mark.parametrize("has_command", [False, True], ids=["idle", "after a command"])
async def test_platform_that_ends_leaves_no_locality_taken(serving, has_command):
    """Else a launcher that was killed would keep everybody else from the chip for ever."""

    def platform(bench):
        with bench.raw() as connection:
            if has_command:
                start(connection, command(), locality=0)
                wait_for(lambda: bench.chip.executed)
            else:
                write(connection, 0, ACCESS, b"\x02")
            wait_for(lambda: bench.server.device.active_locality == 0)
            asked.wait(WAIT_S)

    def manager(bench):
        with bench.raw() as connection:
            write(connection, 2, ACCESS, b"\x02")
            assert read(connection, 2, ACCESS).data[0] & 0x20 == 0  # it is the platform's
            asked.set()
            wait_for(lambda: bench.server.device.active_locality == 2)

    asked = threading.Event()
    async with serving(PLATFORM, MANAGER) as bench, trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, platform, bench)
        await until(lambda: bench.server.device.active_locality == 0)
        await in_thread(manager, bench)
        await trio.sleep(0.05)
        # What a domain holds is its own also when it has been killed.
        assert bench.server.device.active_locality == 2


async def test_platform_that_ends_in_a_hash_sequence_ends_it(serving):
    def platform(bench):
        with bench.raw() as connection:
            write(connection, 4, Register.HASH_START, b"\0")
            write(connection, 4, FIFO, b"part")
            wait_for(lambda: bench.chip.hashed == ["start", b"part"])

    async with serving(PLATFORM) as bench:
        await in_thread(platform, bench)
        await until(lambda: bench.chip.hashed[-1] == "end")
        await until(lambda: bench.server.device.active_locality is None)


async def test_platform_that_ends_leaves_a_locality_that_another_has_asked_for_since(serving):
    def both(bench):
        with bench.raw() as other:
            with bench.raw() as connection:
                start(connection, command(), locality=0)
                wait_for(lambda: bench.chip.executed)
                write(connection, 0, ACCESS, b"\x20")
                wait_for(lambda: bench.server.device.active_locality is None)
                write(other, 0, ACCESS, b"\x02")
                wait_for(lambda: bench.server.device.active_locality == 0)
            read(other, 0, ACCESS)

    async with serving(TisPeer(name="vtpmmgr", localities=frozenset({0})), PLATFORM) as bench:
        await in_thread(both, bench)
        await trio.sleep(0.05)
        assert bench.server.device.active_locality == 0


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ValueError("a bug"), ValueError),
        (TimeoutError("a link of the chip's"), RuntimeError),
        (Failure("the disk is full", why="-", next_step="-"), Failure),
    ],
)
async def test_error_of_the_chip_stops_the_daemon(serving, error, seen):
    async def run():
        async with serving(MANAGER) as bench:
            bench.chip.error = error
            with bench.link(reconnect_timeout_s=0.0) as link, pytest.raises(Failure):
                await in_thread(link.exchange, command())
            await trio.sleep_forever()

    with pytest.raises(BaseExceptionGroup) as caught:
        await run()
    assert caught.group_contains(seen)


# -- interrupts ------------------------------------------------------------------------------------


def enable_interrupts(connection, locality):
    write(connection, locality, ACCESS, b"\x02")
    write(connection, locality, INT_ENABLE, b"\x87\0\0\x80")


async def test_interrupts_go_to_all_who_have_the_page_and_nobody_else(serving):
    listener = TisPeer(name="second", localities=frozenset({2}))
    async with serving(MANAGER, listener, PLATFORM) as bench:

        def listen_in():
            with bench.raw() as manager, bench.raw() as second, bench.raw() as platform:
                for connection, locality in ((second, 2), (platform, 0)):
                    read(connection, locality, ACCESS)  # it is attached then
                enable_interrupts(manager, 2)
                write(manager, 2, STS, b"\x40")
                seen = [receive(manager), receive(second)]
                platform.setblocking(False)
                with pytest.raises(BlockingIOError):
                    platform.recv(100)
                return seen

        raised = messages.Interrupt(locality=2, status=0x80, vector=0)
        assert await in_thread(listen_in) == [raised, raised]


async def test_locality_change_reaches_the_one_who_waits(serving):
    waiting = TisPeer(name="first", localities=frozenset({1}))
    async with serving(waiting, MANAGER) as bench:

        def hand_over():
            with bench.raw() as first, bench.raw() as manager:
                enable_interrupts(first, 1)
                write(first, 1, ACCESS, b"\x20")
                read(first, 1, ACCESS)
                write(manager, 2, ACCESS, b"\x02")
                read(manager, 2, ACCESS)
                write(first, 1, ACCESS, b"\x02")
                read(first, 1, ACCESS)
                write(manager, 2, ACCESS, b"\x20")
                return receive(first)

        raised = messages.Interrupt(locality=1, status=0x04, vector=0)
        assert await in_thread(hand_over) == raised


async def test_peer_that_reads_no_interrupts_holds_nobody_up(serving):
    deaf = TisPeer(name="deaf", localities=frozenset({2}))
    async with serving(deaf, MANAGER) as bench:

        def ring():
            with bench.raw() as silent, bench.raw() as manager:
                silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
                read(silent, 2, ACCESS)
                enable_interrupts(manager, 2)
                for _ in range(1000):
                    write(manager, 2, STS, b"\x40")
                    assert isinstance(receive(manager), messages.Interrupt)
                    write(manager, 2, FIFO, b"\0")
                    assert isinstance(receive(manager), messages.Interrupt)
                return read(manager, 2, STS)

        assert await in_thread(ring) == value(b"\x88")


# -- the end ---------------------------------------------------------------------------------------


async def test_stop_ends_idle_connections_and_lets_the_command_end(serving):
    async with serving(DOMAIN_WITH_ALL_PAGES) as bench:
        ends = []

        async def wait_for_end():
            def wait():
                with bench.raw() as connection:
                    read(connection, 0, ACCESS)
                    attached.set()
                    return connection.recv(100)

            ends.append(await in_thread(wait))

        attached = threading.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_for_end)
            async with held_command(bench, reconnect_timeout_s=0.0) as outcome:
                await in_thread(attached.wait, WAIT_S)
                signal.raise_signal(signal.SIGTERM)
                await until(lambda: ends)
        assert ends == [b""]
        assert isinstance(outcome[0], Failure)
        assert bench.server.device.state is State.COMPLETION


async def test_command_over_the_drain_time_does_not_keep_the_connection(serving):
    async with serving(ALL_PAGES, settings=TisSettings(drain_s=0.05)) as bench:
        async with held_command(bench, reconnect_timeout_s=0.0) as outcome:
            signal.raise_signal(signal.SIGTERM)
            await until(lambda: outcome)
        assert isinstance(outcome[0], Failure)
