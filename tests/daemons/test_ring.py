"""Rings over real sockets: one command at a time, exactly once, and peers that misbehave."""

import errno
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock
from uuid import UUID

import pytest
import trio
import trio.testing

from daemons import ring_client
from daemons.errors import Failure, NotNow
from daemons.listeners import Kind, connect, listen
from daemons.registry import DomainRecord, Role, UnknownPeer, VtpmDevice
from daemons.ring_client import (
    RequestTooLong,
    RingCancelled,
    RingClient,
    RingForgotten,
    RingLost,
    RingRefused,
    RingRolledBack,
    Sent,
)
from daemons.ring_server import (
    CANCELLED,
    Refused,
    ResponsesInMemory,
    RingPeer,
    RingServer,
    RingSettings,
)
from daemons.service import serve
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    SEQUENCE_MAX,
    BackendConnected,
    BackendWaiting,
    Finished,
    FrontendRing,
    PeerClosed,
    Prefix,
    kick,
    publication,
)
from protocol.tpmif_page import PACKET_BYTES_MAX, PageHeader, PageState, page_image
from protocol.wire import encode
from protocol.xenbus import XenbusState

WAIT_S = 20


def peer_of(name):
    devices = tuple(
        VtpmDevice(devid=devid, backend=backend, uuid=UUID(int=devid + 1), handle=devid)
        for devid, backend in enumerate(["vtpm1", "vtpm1", "other"])
    )
    record = DomainRecord(
        name=name,
        domid=7,
        role=Role.GUEST,
        label="system_u:guest_r:guest_t",
        uid=os.getuid(),
        pid=os.getpid(),
        start_time=1,
        vtpms=devices,
    )
    return RingPeer(domain=record, device=devices[0])


class Echo:
    """A backend that answers with the request's own bytes and remembers all calls."""

    def __init__(self):
        self.calls = []
        self.running = 0
        self.on_execute = lambda _peer, request: request
        self.on_attach = lambda _peer: None

    def attached(self, peer):
        self.on_attach(peer)
        self.calls.append(("attached", peer.ring_id))

    def execute(self, peer, request, locality, sequence):
        self.running += 1
        assert self.running == 1, "two commands at once"
        try:
            response = self.on_execute(peer, request)
            if response != CANCELLED:
                self.calls.append((peer.ring_id, sequence, locality, request))
            return response
        finally:
            self.running -= 1

    def detached(self, peer):
        self.calls.append(("detached", peer.ring_id))

    @property
    def executed(self):
        return [call for call in self.calls if len(call) == 4]


class Gate:
    """Holds the backend inside a command until it is opened."""

    def __init__(self):
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, _peer, request):
        if request == b"hold":
            self.is_reached.set()
            assert self.is_open.wait(WAIT_S)
        return request


class Harness:
    """One backend on one path; several servers may follow one another."""

    def __init__(self, directory):
        self.path = directory / "ring.sock"
        self.backend = Echo()
        self.responses = ResponsesInMemory()
        self.settings = RingSettings(handshake_s=WAIT_S, send_s=WAIT_S)
        self.next_domain = "guest1"
        self.server = None
        self.clients = []

    def admit(self, _credentials):
        return peer_of(self.next_domain)

    @asynccontextmanager
    async def serving(self):
        self.server = RingServer(
            self.backend, self.admit, responses=self.responses, settings=self.settings
        )
        ended = trio.Event()
        listener = listen(self.path, Kind.SEQPACKET)

        async def run(task_status):
            await serve(
                self.server.handle,
                [listener],
                drain_s=10 * WAIT_S,  # a stop that needs the deadline fails the test
                connections_max=self.settings.connections_max,
                task_status=task_status,
            )
            ended.set()

        async def stop():
            signal.raise_signal(signal.SIGTERM)
            await ended.wait()

        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield stop
            nursery.cancel_scope.cancel()

    def client(self, **options):
        client = RingClient(self.path, **({"reconnect_s": WAIT_S} | options))
        self.clients.append(client)
        return client

    async def connected(self, domain="guest1", **options):
        self.next_domain = domain
        client = self.client(**options)
        await blocking(client.connect, WAIT_S)
        return client

    def cut(self, domain="guest1"):
        """Break a ring as a crash of the backend would."""
        self.server._carriers[f"{domain}/0"].raw.shutdown(socket.SHUT_RDWR)


@pytest.fixture
async def harness(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    harness = Harness(directory)
    with trio.fail_after(2 * WAIT_S):
        yield harness
        for client in harness.clients:
            await blocking(client.close)


async def blocking(call, *arguments):
    """Run a blocking call in a thread that cannot hang the test."""
    with trio.fail_after(WAIT_S):
        return await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)


async def eventually(condition):
    with trio.fail_after(WAIT_S):
        while not condition():  # noqa: ASYNC110 - conditions of threads and processes, not of tasks
            await trio.sleep(0.001)


def open_descriptors():
    gc.collect()  # what an earlier test has left to it may go at any moment
    return len(list(Path("/proc/self/fd").iterdir()))


class RawFrontend:
    """A frontend of which every message is under the test's control."""

    def __init__(self, path):
        self.socket = trio.socket.from_stdlib_socket(connect(path, Kind.SEQPACKET))
        self.ring = FrontendRing(0)

    async def receive(self):
        return self.ring.receive(await self.socket.recv(MESSAGE_BYTES_MAX))

    async def attach(self):
        assert isinstance(await self.receive(), BackendWaiting)
        await self.socket.send(self.ring.publish())
        event = await self.receive()
        assert isinstance(event, BackendConnected)
        await self.socket.send(self.ring.connected())
        return event

    async def is_closed(self):
        """Read to the end; a connection that never ends fails the test by its deadline."""
        with trio.fail_after(WAIT_S), suppress(ConnectionResetError):
            while await self.socket.recv(MESSAGE_BYTES_MAX):
                pass
        return True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()


# -- the way through


async def test_request_reaches_the_backend_and_its_response_the_frontend(harness):
    async with harness.serving():
        client = await harness.connected()
        assert await blocking(client.exchange, b"first", 2) == b"first"
        assert await blocking(client.exchange, bytes(PACKET_BYTES_MAX)) == bytes(PACKET_BYTES_MAX)
    assert harness.backend.executed[:2] == [
        ("guest1/0", 1, 2, b"first"),
        ("guest1/0", 2, 0, bytes(PACKET_BYTES_MAX)),
    ]


async def test_frontend_learns_who_it_is_from_the_backend(harness):
    async with harness.serving():
        client = await harness.connected()
        assert (client.ring_id, client.uuid) == ("guest1/0", UUID(int=1))


async def test_frontend_that_closes_and_comes_back_finds_the_same_ring(harness):
    async with harness.serving():
        client = await harness.connected()
        await blocking(client.exchange, b"measure")
        await blocking(client.close)
        # close has come back, so the backend has let go: the next one needs no patience.
        assert harness.backend.calls[-1] == ("detached", "guest1/0")
        successor = await harness.connected()
        await blocking(successor.exchange, b"kernel")
    assert [call[1] for call in harness.backend.executed] == [1, 2]


async def test_threads_share_a_client(harness):
    async with harness.serving():
        client = await harness.connected()
        answers = []

        def work(name):
            for number in range(20):
                request = f"{name}:{number}".encode()
                answers.append(client.exchange(request) == request)

        async with trio.open_nursery() as nursery:
            for name in range(6):
                nursery.start_soon(blocking, work, name)
    assert answers == [True] * 120
    assert [call[1] for call in harness.backend.executed] == list(range(1, 121))


async def test_second_device_of_a_domain_is_a_ring_of_its_own(harness):
    async with harness.serving():
        first = await harness.connected()
        second = await harness.connected(handle=1)
        await blocking(first.exchange, b"a")
        await blocking(second.exchange, b"b")
        assert (second.ring_id, second.uuid) == ("guest1/1", UUID(int=2))
    assert [call[:2] for call in harness.backend.executed] == [("guest1/0", 1), ("guest1/1", 1)]


# -- refusals


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (Refused("label guest_t may not use this vTPM"), "label guest_t may not"),
        (UnknownPeer("process 5 is not a domain", why="x", next_step="y"), "is not a domain"),
    ],
)
async def test_refused_peer_is_told_why_before_it_says_anything(harness, refusal, reason):
    def admit(_):
        raise refusal

    harness.admit = admit
    async with harness.serving():
        with RawFrontend(harness.path) as frontend:
            event = await frontend.receive()
            assert isinstance(event, PeerClosed)
            assert reason in event.reason
        with pytest.raises(RingRefused, match=reason):
            await harness.connected()
    assert harness.backend.calls == []


async def test_peer_that_cannot_be_looked_up_for_now_is_not_refused(harness):
    lacks = iter([errno.EMFILE, errno.ENFILE])
    lookup = harness.admit

    def look_up_in_want(credentials):
        if (lack := next(lacks, None)) is not None:
            raise NotNow("lookup", why=os.strerror(lack), next_step="none")
        return lookup(credentials)

    harness.admit = look_up_in_want
    async with harness.serving():
        client = await harness.connected()
        assert await blocking(client.exchange, b"x") == b"x"
    assert next(lacks, None) is None


async def test_backend_may_refuse_at_attach(harness):
    def refuse(_):
        raise Refused("another guest holds this vTPM")

    harness.backend.on_attach = refuse
    async with harness.serving():
        with pytest.raises(RingRefused, match="another guest holds"):
            await harness.connected()
    assert harness.backend.calls == []


async def test_frontend_comes_again_to_a_backend_that_cannot_take_it_for_now(harness):
    lacks = iter(range(2))

    def lack(_peer):
        if next(lacks, None) is not None:
            raise NotNow("attach", why="told to", next_step="none")

    harness.backend.on_attach = lack
    async with harness.serving():
        client = await harness.connected()
        assert await blocking(client.exchange, b"x") == b"x"
    assert harness.backend.calls.count(("attached", "guest1/0")) == 1
    assert harness.backend.calls.count(("detached", "guest1/0")) == 1


@pytest.mark.parametrize("handle", [2, 3])
async def test_device_of_another_backend_or_none_is_refused(harness, handle):
    async with harness.serving():
        with pytest.raises(RingRefused, match=f"no vTPM device {handle} here"):
            await harness.connected(handle=handle)


async def test_ring_over_the_limit_is_refused_with_that_reason(harness):
    harness.settings = replace(harness.settings, rings_max=1)
    async with harness.serving():
        first = await harness.connected("guest1")
        with pytest.raises(RingRefused, match="1 rings are connected"):
            await harness.connected("guest2")
        assert await blocking(first.exchange, b"x") == b"x"
        await blocking(first.close)
        await harness.connected("guest2")


async def test_request_longer_than_the_page_is_refused_at_home(harness):
    async with harness.serving():
        client = await harness.connected()
        with pytest.raises(RequestTooLong):
            await blocking(client.exchange, bytes(PACKET_BYTES_MAX + 1))
        assert await blocking(client.exchange, b"x") == b"x"


async def test_response_longer_than_the_page_becomes_a_tpm_error(harness):
    harness.backend.on_execute = lambda _peer, _request: bytes(PACKET_BYTES_MAX + 1)
    async with harness.serving():
        client = await harness.connected()
        response = await blocking(client.exchange, b"x")
    assert response.hex() == "00c40000000a00000017"


# -- waiting, losing and finding the backend


async def test_frontend_waits_for_its_backend_and_says_so(harness):
    said, is_waiting = [], threading.Event()

    def on_status(text):
        said.append(text)
        is_waiting.set()

    client = harness.client(on_status=on_status)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(blocking, client.connect, WAIT_S)
        await eventually(is_waiting.is_set)
        async with harness.serving():
            assert await blocking(client.exchange, b"x") == b"x"
    assert said[0].startswith("waiting for the backend at")
    assert said[1].startswith("connected to the backend at")


async def test_frontend_without_a_descriptor_waits_for_one(harness, monkeypatch):
    connected, lacks = ring_client.connect, iter([errno.EMFILE, errno.ENFILE, errno.ENOMEM])

    def connect_in_want(*arguments, **options):
        with monkeypatch.context() as patch:
            if (lack := next(lacks, None)) is not None:
                refused = OSError(lack, os.strerror(lack))
                patch.setattr(socket, "socket", Mock(side_effect=refused))
            return connected(*arguments, **options)

    async with harness.serving():
        client = await harness.connected()
        monkeypatch.setattr(ring_client, "connect", connect_in_want)
        harness.cut()
        assert await blocking(client.exchange, b"x") == b"x"
    assert [call[3] for call in harness.backend.executed] == [b"x"]


async def test_frontend_gives_up_with_a_reason(harness):
    with pytest.raises(RingLost, match="no such socket"):
        await blocking(harness.client().connect, 0.02)
    with pytest.raises(RingLost, match="no such socket"):
        await blocking(harness.client(reconnect_s=0.02).exchange, b"x")


async def test_stop_lets_the_running_command_end_and_the_successor_goes_on(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving() as stop:
        client = await harness.connected()
        answers = []
        async with trio.open_nursery() as nursery:

            async def exchange():
                answers.append(await blocking(client.exchange, b"hold"))

            nursery.start_soon(exchange)
            await eventually(gate.is_reached.is_set)
            nursery.start_soon(stop)
            await eventually(lambda: not harness.path.exists())
            gate.is_open.set()
    assert answers == [b"hold"]
    async with harness.serving():
        assert await blocking(client.exchange, b"next") == b"next"
    assert [call[1] for call in harness.backend.executed] == [1, 2]


async def test_lost_response_is_repeated_and_not_executed_again(harness):
    class Cutting(ResponsesInMemory):
        def put(self, ring_id, sequence, response):
            super().put(ring_id, sequence, response)
            if sequence in {2, 4}:
                harness.cut()

    harness.responses = Cutting()
    async with harness.serving():
        client = await harness.connected()
        for number in range(1, 6):
            assert await blocking(client.exchange, b"%d" % number) == b"%d" % number
    assert [call[1:] for call in harness.backend.executed] == [
        (number, 0, b"%d" % number) for number in range(1, 6)
    ]


async def test_cancelled_command_stays_cancelled_when_its_acknowledgement_is_lost(harness):
    class Cutting(ResponsesInMemory):
        def put(self, ring_id, sequence, response):
            super().put(ring_id, sequence, response)
            if sequence == 1:
                harness.cut()

    harness.responses = Cutting()
    harness.backend.on_execute = lambda _peer, request: CANCELLED if request == b"1" else request
    async with harness.serving():
        client = await harness.connected()
        with pytest.raises(RingCancelled):
            await blocking(client.exchange, b"1")
        assert await blocking(client.exchange, b"2") == b"2"


@pytest.mark.parametrize("may_run_twice", [False, True])
async def test_backend_that_lost_its_memory_is_not_trusted_to_run_again(harness, may_run_twice):
    gate = harness.backend.on_execute = Gate()
    lost = []
    async with trio.open_nursery() as nursery:
        async with harness.serving():
            client = await harness.connected(may_run_twice=may_run_twice)
            assert await blocking(client.exchange, b"before") == b"before"

            async def exchange():
                try:
                    lost.append(await blocking(client.exchange, b"hold"))
                except RingLost as failure:
                    lost.append(failure)

            nursery.start_soon(exchange)
            await eventually(gate.is_reached.is_set)
            harness.path.unlink()  # nobody finds the old backend again
            harness.cut()
            gate.is_open.set()
            await eventually(lambda: len(harness.backend.executed) == 2)
        harness.responses = ResponsesInMemory()
        async with harness.serving():
            await eventually(lambda: lost)
            assert await blocking(client.exchange, b"after") == b"after"
    requests = [call[3] for call in harness.backend.executed]
    if may_run_twice:
        assert lost == [b"hold"]
        assert requests == [b"before", b"hold", b"hold", b"after"]
    else:
        assert "lost its memory" in str(lost[0])
        assert requests == [b"before", b"hold", b"after"]


async def test_idle_frontend_goes_on_with_a_backend_that_lost_its_memory(harness):
    async with harness.serving():
        client = await harness.connected()
        for _ in range(3):
            await blocking(client.exchange, b"x")
    harness.responses = ResponsesInMemory()
    async with harness.serving():
        # Its request cannot be sent on the dead connection, so nobody can have executed it.
        assert await blocking(client.exchange, b"y") == b"y"
    assert [call[1] for call in harness.backend.executed] == [1, 2, 3, 1]


async def test_backend_that_always_goes_away_ends_the_request_somewhere(harness, monkeypatch):
    monkeypatch.setattr(ring_client, "RECONNECTS_MAX", 3)
    harness.backend.on_execute = lambda _peer, request: harness.cut() or request

    class Forgetful(ResponsesInMemory):
        def put(self, *_):
            pass

    harness.responses = Forgetful()
    async with harness.serving():
        client = await harness.connected()
        with pytest.raises(RingLost, match="3 times"):
            await blocking(client.exchange, b"poison")
        harness.backend.on_execute = lambda _peer, request: request
        assert await blocking(client.exchange, b"x") == b"x"


async def test_backend_that_does_not_answer_is_given_up(harness, monkeypatch):
    monkeypatch.setattr(ring_client, "ANSWER_S", 0.05)
    monkeypatch.setattr(ring_client, "CANCEL_S", 0.05)
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        client = await harness.connected()
        with pytest.raises(RingLost, match="no answer within"):
            await blocking(client.exchange, b"hold")
        gate.is_open.set()
        assert await blocking(client.exchange, b"x") == b"x"
    assert [call[3] for call in harness.backend.executed] == [b"hold", b"x"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"x",
        bytes(MESSAGE_BYTES_MAX + 500),
        publication(XenbusState.CONNECTED, {}),
        publication(XenbusState.INIT_WAIT, {}),
        publication(XenbusState.CLOSING, {}),
        kick(1, page_image(PageState.FINISH)),
    ],
)
async def test_backend_that_sends_garbage_is_left_with_a_reason(harness, garbage):
    async def handler(connection):
        with suppress(OSError):
            await connection.socket.send(garbage)
            while await connection.socket.recv(5000):
                await connection.socket.send(garbage)

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, handler, [listen(harness.path, Kind.SEQPACKET)]))
        with pytest.raises(RingLost):
            await blocking(harness.client().connect, 0.1)
        nursery.cancel_scope.cancel()


async def test_backend_that_says_all_numbers_are_used_up_is_left_with_a_reason(harness):
    class UsedUp(ResponsesInMemory):
        def last_sequence(self, _ring_id):
            return SEQUENCE_MAX

    harness.responses = UsedUp()
    async with harness.serving():
        client = await harness.connected()
        with pytest.raises(RingLost, match="times during this request"):
            await blocking(client.exchange, b"x")
    assert harness.backend.executed == []


async def test_close_ends_a_waiting_exchange(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        client = await harness.connected()
        ends = []

        async def exchange():
            with pytest.raises(RingLost, match="closed"):
                await blocking(client.exchange, b"hold")
            ends.append(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(exchange)
            await eventually(gate.is_reached.is_set)
            await blocking(client.close)
            await eventually(lambda: ends)
            gate.is_open.set()
        with pytest.raises(RingLost, match="closed"):
            await blocking(client.exchange, b"x")


@pytest.mark.parametrize("is_exchanging", [False, True], ids=["connect", "exchange"])
async def test_close_ends_a_handshake_that_nobody_answers(harness, is_exchanging):
    client = harness.client(reconnect_s=10 * WAIT_S)
    if is_exchanging:
        async with harness.serving() as stop:
            await blocking(client.connect, WAIT_S)
            await stop()
    # As systemd does it while the daemon starts: the kernel takes connections, nobody answers.
    with listen(harness.path, Kind.SEQPACKET) as silent:
        waits = (client.exchange, b"x") if is_exchanging else (client.connect, 10 * WAIT_S)

        async def wait():
            with pytest.raises(RingLost, match="closed"):
                await blocking(*waits)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            mute, _ = await trio.to_thread.run_sync(silent.socket.accept)
            with mute:
                await blocking(client.close)
                await blocking(mute.recv, 1)


async def executed_and_lost(harness, client, request):
    """Send a request that is executed while its frontend dies; what it was sent under."""
    sent = []
    gate = Gate()
    harness.backend.on_execute = lambda peer, _: gate(peer, b"hold")

    def exchange():
        with pytest.raises(RingLost):
            client.exchange(request, before_send=sent.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(blocking, exchange)
        await eventually(gate.is_reached.is_set)
        await blocking(client.close)
        gate.is_open.set()
    harness.backend.on_execute = lambda _, request: request
    return sent[-1]


async def resumed(harness, request, sent):
    """The next process of a frontend; what it is answered and what it sent that under."""
    again = []
    client = await harness.connected()
    answer = await blocking(client.resume, request, sent, again.append)
    return answer, again, client


async def test_frontend_is_told_under_what_its_request_goes_out(harness):
    sent = []
    async with harness.serving():
        client = await harness.connected()
        await blocking(client.exchange, b"one")
        await blocking(partial(client.exchange, b"two", before_send=sent.append))
    assert sent == [Sent(harness.responses.memory, 2)]


async def test_request_that_could_not_be_noted_is_not_sent_and_the_next_one_is(harness):
    def disk_full(_sent):
        raise Failure("no room", why="told to", next_step="none")

    async with harness.serving():
        client = await harness.connected()
        for _ in range(2):
            with pytest.raises(Failure, match="no room"):
                await blocking(partial(client.exchange, b"never", before_send=disk_full))
        assert await blocking(client.exchange, b"x") == b"x"
    assert [call[3] for call in harness.backend.executed] == [b"x"]


async def test_next_process_of_a_frontend_gets_the_response_of_what_was_executed(harness):
    async with harness.serving():
        client = await harness.connected()
        await blocking(client.exchange, b"before")
        sent = await executed_and_lost(harness, client, b"once")
        answer, again, successor = await resumed(harness, b"once", sent)
        assert answer == b"hold"
        assert again == [sent]
        assert await blocking(successor.exchange, b"after") == b"after"
    assert [call[3] for call in harness.backend.executed] == [b"before", b"once", b"after"]


async def test_next_process_of_a_frontend_sends_what_was_not_executed(harness):
    async with harness.serving():
        client = await harness.connected()
        await blocking(client.exchange, b"before")
        await blocking(client.close)
        not_sent = Sent(harness.responses.memory, 5)
        answer, again, _ = await resumed(harness, b"once", not_sent)
        assert answer == b"once"
        assert again == [Sent(harness.responses.memory, 2)], "the number that is expected next"
    assert [call[3] for call in harness.backend.executed] == [b"before", b"once"]


@pytest.mark.parametrize("what", ["another memory", "an older number"])
async def test_next_process_of_a_frontend_is_told_when_nobody_knows(harness, what):
    async with harness.serving():
        client = await harness.connected()
        await blocking(client.exchange, b"one")
        await blocking(client.exchange, b"two")
        await blocking(client.close)
        memory = harness.responses.memory
        sent = Sent("x", 3) if what == "another memory" else Sent(memory, 1)
        with pytest.raises(RingForgotten):
            await resumed(harness, b"one", sent)
    assert len(harness.backend.executed) == 2


class KeptResponses(ResponsesInMemory):
    """A store that says of all its responses that they outlive the process."""

    def put(self, ring_id, sequence, response):
        super().put(ring_id, sequence, response)
        return True

    def is_kept(self, ring_id, sequence):
        return self.last_sequence(ring_id) == sequence


@pytest.mark.parametrize("responses", [ResponsesInMemory, KeptResponses])
async def test_repeat_is_answered_with_the_very_message_of_the_first_time(harness, responses):
    """Also with the word whether it is kept, which the frontend may not have heard."""
    harness.responses = responses()
    async with harness.serving():
        with RawFrontend(harness.path) as frontend:
            await frontend.attach()
            message = frontend.ring.submit(b"request")
            answers = set()
            for _ in range(3):
                await frontend.socket.send(message)
                answers.add(await frontend.socket.recv(MESSAGE_BYTES_MAX))
    assert len(answers) == 1


async def answered_three(harness, **options):
    """A frontend with three answers, the last two of which its backend must not forget."""
    client = await harness.connected(**options)
    await blocking(client.exchange, b"one")
    older = KeptResponses(harness.responses.memory, harness.responses._last)
    await blocking(client.exchange, b"two")
    await blocking(client.exchange, b"three")
    return client, older


@pytest.mark.parametrize("backend", ["older contents", "none"])
async def test_frontend_refuses_a_backend_that_remembers_less_than_it_answered(harness, backend):
    harness.responses = KeptResponses()
    async with harness.serving() as stop:
        client, older = await answered_three(harness, may_forget=False)
        await stop()
    harness.responses = older if backend == "older contents" else KeptResponses()
    async with harness.serving():
        for _ in range(2):
            with pytest.raises(RingRolledBack, match="is lost"):
                await blocking(client.exchange, b"four")
    assert b"four" not in [call[3] for call in harness.backend.executed]


@pytest.mark.parametrize("responses", [ResponsesInMemory, KeptResponses])
async def test_frontend_takes_a_backend_that_remembers_what_it_must(harness, responses):
    """A response that changed nothing may be forgotten; one that is kept is there."""
    harness.responses = responses()
    async with harness.serving() as stop:
        client, older = await answered_three(harness, may_forget=False)
        await stop()
    if responses is ResponsesInMemory:
        harness.responses = older
    async with harness.serving():
        assert await blocking(client.exchange, b"four") == b"four"


async def test_frontend_that_may_takes_a_backend_that_was_started_anew(harness):
    harness.responses = KeptResponses()
    async with harness.serving() as stop:
        client, _ = await answered_three(harness)
        await stop()
    harness.responses = KeptResponses()
    async with harness.serving():
        assert await blocking(client.exchange, b"four") == b"four"


BACKEND = """
import os, signal, sys, trio
from pathlib import Path
from functools import partial
sys.path.insert(0, "tests/daemons")
from daemons.listeners import *
from daemons.ring_server import *
from daemons.service import run_daemon
from test_ring import peer_of
path, log_path, kill_at = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

class Journal:
    '''What was executed is one line, and so is what was answered: the same one.'''
    memory = "journal"
    def lines(self):
        return [l.split() for l in log_path.read_text().splitlines()] if log_path.exists() else []
    def last_sequence(self, ring_id):
        return max((int(s) for s, _ in self.lines()), default=0)
    def get(self, ring_id, sequence):
        return next((bytes.fromhex(r) for s, r in self.lines() if int(s) == sequence), None)
    def put(self, ring_id, sequence, response):
        if kill_at == f"after:{sequence}":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.is_kept(ring_id, sequence)
    def is_kept(self, ring_id, sequence):
        return self.last_sequence(ring_id) == sequence

class Backend:
    def attached(self, peer): pass
    def detached(self, peer): pass
    def execute(self, peer, request, locality, sequence):
        if kill_at == f"before:{sequence}":
            os.kill(os.getpid(), signal.SIGKILL)
        with open(log_path, "a") as log:
            log.write(f"{sequence} {request.hex()}\\n")
        return request

async def main():
    await serve_rings(
        listen(path, Kind.SEQPACKET), Backend(), lambda _: peer_of("guest1"), responses=Journal()
    )
sys.exit(run_daemon("backend", main))
"""


async def test_backend_killed_before_and_after_execution_executes_exactly_once(harness):
    """A real process dies by SIGKILL in the midst of commands; its frontend sees only delay."""
    log_path = harness.path.parent / "executed"
    kills = iter(["before:3", "after:5", "after:8", "before:9", "never"])

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", BACKEND, harness.path, log_path, next(kills)],
            cwd=Path(__file__).parents[2],
            stderr=subprocess.DEVNULL,
        )

    client = harness.client()
    answers = []

    def work():
        for number in range(1, 13):
            answers.append(client.exchange(b"command %d" % number))  # noqa: PERF401 - one by one

    async with trio.open_nursery() as nursery:
        nursery.start_soon(blocking, work)
        codes = []
        for _ in range(4):
            process = start()
            codes.append(await blocking(process.wait))
        last = start()
        await eventually(lambda: len(answers) == 12)
    last.terminate()
    assert await blocking(last.wait) == 0
    assert codes == [-signal.SIGKILL] * 4
    assert answers == [b"command %d" % number for number in range(1, 13)]
    assert log_path.read_text() == "".join(
        f"{number} {(b'command %d' % number).hex()}\n" for number in range(1, 13)
    )


# -- cancel


async def exchange_and_cancel(client, is_ready):
    """Start an exchange, cancel it when the condition holds, and give what came of it."""
    came = []

    async def exchange():
        try:
            came.append(await blocking(client.exchange, b"long"))
        except RingCancelled as failure:
            came.append(failure)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange)
        await eventually(is_ready)
        assert await blocking(client.cancel) is True
    return came[0]


async def test_backend_that_looks_is_cancelled_and_nothing_is_executed(harness):
    is_running = threading.Event()

    def long_command(peer, request):
        if request != b"long":
            return request
        is_running.set()
        return CANCELLED if wait_for_cancel(peer) else request

    harness.backend.on_execute = long_command
    async with harness.serving():
        client = await harness.connected()
        came = await exchange_and_cancel(client, is_running.is_set)
        assert isinstance(came, RingCancelled)
        assert await blocking(client.exchange, b"x") == b"x"
    assert [call[3] for call in harness.backend.executed] == [b"x"]


async def test_cancel_that_comes_before_the_request_is_on_the_page_is_not_lost(harness):
    class Early(RingClient):
        def _check_fate(self, *arguments):
            super()._check_fate(*arguments)
            assert self.cancel() is True

    harness.backend.on_execute = lambda peer, request: (
        CANCELLED if request == b"long" and wait_for_cancel(peer) else request
    )
    async with harness.serving():
        client = Early(harness.path, reconnect_s=WAIT_S)
        harness.clients.append(client)
        with pytest.raises(RingCancelled):
            await blocking(client.exchange, b"long")
        assert await blocking(client.exchange, b"x") == b"x"


def wait_for_cancel(peer):
    while not peer.cancel_asked():
        pass
    return True


async def test_backend_that_does_not_look_is_cancelled_too_late(harness):
    is_running, may_end = threading.Event(), threading.Event()

    def long_command(_peer, request):
        if request == b"long":
            is_running.set()
            assert may_end.wait(WAIT_S)
        return request

    harness.backend.on_execute = long_command
    async with harness.serving():
        client = await harness.connected()
        cancel = client.cancel
        client.cancel = lambda: cancel() and not may_end.set()
        assert await exchange_and_cancel(client, is_running.is_set) == b"long"
        assert await blocking(client.exchange, b"x") == b"x"  # the late IDLE harms nobody
        assert await blocking(cancel) is False


async def test_command_cancelled_while_it_waits_for_its_turn_is_never_executed(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        first = await harness.connected("guest1")
        second = await harness.connected("guest2")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocking, first.exchange, b"hold")
            await eventually(gate.is_reached.is_set)
            turn = harness.server._behind.turn
            cancel = second.cancel
            second.cancel = lambda: cancel() and not gate.is_open.set()
            came = await exchange_and_cancel(second, lambda: turn.waiting_count == 1)
        assert isinstance(came, RingCancelled)
        assert await blocking(second.exchange, b"x") == b"x"
    assert [call[3] for call in harness.backend.executed] == [b"hold", b"x"]


async def test_cancel_while_the_backend_is_away_cancels_what_was_not_executed(harness):
    is_waiting = threading.Event()
    client = harness.client(on_status=lambda _: is_waiting.set())
    async with harness.serving():
        await blocking(client.connect, WAIT_S)
        assert await blocking(client.exchange, b"x") == b"x"
    is_waiting.clear()
    came = []

    async def exchange():
        with pytest.raises(RingCancelled):
            await blocking(client.exchange, b"long")
        came.append(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(exchange)
        await eventually(is_waiting.is_set)
        assert client.cancel() is True
        async with harness.serving():
            await eventually(lambda: came)
            assert await blocking(client.exchange, b"y") == b"y"
    assert [call[3] for call in harness.backend.executed] == [b"x", b"y"]


# -- fairness


async def test_turns_are_given_in_the_order_of_arrival(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        clients = [await harness.connected(f"guest{number}") for number in range(6)]
        turn = harness.server._behind.turn
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocking, clients[0].exchange, b"hold")
            await eventually(gate.is_reached.is_set)
            for waiting, number in enumerate([3, 1, 5, 2, 4], 1):
                nursery.start_soon(blocking, clients[number].exchange, b"%d" % number)
                await eventually(partial(lambda count: turn.waiting_count == count, waiting))
            gate.is_open.set()
    assert [call[3] for call in harness.backend.executed] == [b"hold", b"3", b"1", b"5", b"2", b"4"]


# -- hostile and broken frontends


def attached_kick(message):
    return True, message


def early(message):
    return False, message


HEADER = encode(PageHeader(length=4, state=1, locality=0, pad=0, nr_extra_pages=0))


@pytest.mark.parametrize(
    ("is_attached", "message"),
    [
        early(b"x"),
        early(kick(1, page_image(PageState.SUBMIT, 0, b"request"))),
        early(bytes(MESSAGE_BYTES_MAX + 1)),
        early(bytes(100_000)),
        early(publication(XenbusState.INITIALISED, {})),
        early(publication(XenbusState.CLOSED, {})),
        early(publication(XenbusState.INIT_WAIT, {})),
        attached_kick(b"x"),
        attached_kick(bytes(MESSAGE_BYTES_MAX + 1)),
        attached_kick(bytes(100_000)),
        attached_kick(encode(Prefix(kind=2, sequence=1)) + HEADER + b"12345"),
        attached_kick(encode(Prefix(kind=2, sequence=1)) + HEADER + b"123"),
        attached_kick(kick(3, page_image(PageState.SUBMIT, 0, b"skipped"))),
        attached_kick(kick(0, page_image(PageState.SUBMIT, 0, b"zero"))),
        attached_kick(kick(1, page_image(PageState.FINISH))),
        attached_kick(kick(1, page_image(PageState.IDLE))),
        attached_kick(kick(1, page_image(PageState.CANCEL))),
        attached_kick(kick(1, b"\0\0\0\0\7\0\0\0")),
        attached_kick(publication(XenbusState.CONNECTED, {})),
        attached_kick(publication(XenbusState.INITIALISED, {})),
    ],
)
async def test_frontend_that_breaks_the_protocol_costs_itself_alone(harness, is_attached, message):
    async with harness.serving():
        good = await harness.connected("good")
        harness.next_domain = "bad"
        with RawFrontend(harness.path) as bad:
            if is_attached:
                await bad.attach()
            await bad.socket.send(message)
            assert await bad.is_closed()
        assert await blocking(good.exchange, b"x") == b"x"
    assert [call[0] for call in harness.backend.executed] == ["good/0"]
    assert harness.backend.calls.count(("attached", "bad/0")) == is_attached
    assert harness.backend.calls.count(("detached", "bad/0")) == is_attached


async def test_two_hundred_half_open_connections_cost_nobody_anything(harness):
    """Each domain may have a few; the newest stay, so a domain cannot lock itself out either."""
    async with harness.serving():
        good = await harness.connected("good")
        harness.next_domain = "bad"
        half_open = []
        for _ in range(4):  # not more at once than the kernel's backlog holds
            half_open += [RawFrontend(harness.path) for _ in range(50)]
            await trio.testing.wait_all_tasks_blocked()
        assert await blocking(good.exchange, b"x") == b"x"
        await eventually(lambda: len(harness.server._half_open["bad"]) == 4)
        for frontend in half_open[:-4]:
            assert await frontend.is_closed()
        late = await harness.connected("bad")
        assert await blocking(late.exchange, b"y") == b"y"
        assert await blocking(good.exchange, b"z") == b"z"
        for frontend in half_open:
            frontend.socket.close()
        await eventually(lambda: not harness.server._half_open)


async def test_half_open_connections_of_many_domains_cost_nobody_anything(harness):
    async with harness.serving():
        half_open = []
        for number in range(200):
            harness.next_domain = f"bad{number}"
            half_open.append(RawFrontend(harness.path))
            await eventually(lambda: len(harness.server._half_open) == len(half_open))
        good = await harness.connected("good")
        assert await blocking(good.exchange, b"x") == b"x"
        assert not harness.server._carriers.keys() - {"good/0"}
        for frontend in half_open:
            frontend.socket.close()


@pytest.mark.parametrize("says_hello", [False, True])
async def test_handshake_has_a_deadline(harness, says_hello):
    harness.settings = replace(harness.settings, handshake_s=0.05)
    async with harness.serving():
        with RawFrontend(harness.path) as slow:
            assert isinstance(await slow.receive(), BackendWaiting)
            if says_hello:
                await slow.socket.send(slow.ring.publish())
            assert await slow.is_closed()
    assert (
        harness.backend.calls == [("attached", "guest1/0"), ("detached", "guest1/0")] * says_hello
    )


async def test_idle_ring_is_kept(harness):
    harness.settings = replace(harness.settings, handshake_s=0.05)
    async with harness.serving():
        client = await harness.connected()
        await trio.sleep(0.2)  # longer than any deadline of the server
        assert await blocking(client.exchange, b"x") == b"x"
        assert harness.backend.calls.count(("attached", "guest1/0")) == 1


async def test_frontend_that_leaves_its_responses_unread_costs_itself_alone(harness):
    harness.settings = replace(harness.settings, send_s=0.05)
    async with harness.serving():
        good = await harness.connected("good")
        harness.next_domain = "bad"
        with RawFrontend(harness.path) as bad:
            await bad.attach()
            big = bytes(PACKET_BYTES_MAX)
            with suppress(BrokenPipeError, ConnectionResetError):
                for sequence in range(1, 10_000):
                    await bad.socket.send(kick(sequence, page_image(PageState.SUBMIT, 0, big)))
            assert await blocking(good.exchange, b"x") == b"x"
            assert await bad.is_closed()
        assert await blocking(good.exchange, b"y") == b"y"


async def test_frontend_that_vanishes_during_its_command_finds_the_response_later(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        with RawFrontend(harness.path) as frontend:
            await frontend.attach()
            await frontend.socket.send(frontend.ring.submit(b"hold"))
            await eventually(gate.is_reached.is_set)
        gate.is_open.set()
        with RawFrontend(harness.path) as successor:
            successor.ring = frontend.ring
            successor.ring.reconnect()
            await successor.attach()
            await successor.socket.send(successor.ring.resubmit())
            assert await successor.receive() == Finished(1, b"hold")
    assert [call[3] for call in harness.backend.executed] == [b"hold"]


async def test_command_whose_frontend_vanished_before_its_turn_is_dropped(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        first = await harness.connected("guest1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(blocking, first.exchange, b"hold")
            await eventually(gate.is_reached.is_set)
            harness.next_domain = "guest2"
            with RawFrontend(harness.path) as second:
                attaching = partial(eventually, lambda: second.ring.is_attached)
                nursery.start_soon(second.attach)
                gate.is_open.set()
                await attaching()
                gate.is_reached.clear()
                gate.is_open.clear()
                nursery.start_soon(blocking, first.exchange, b"hold")
                await eventually(gate.is_reached.is_set)
                await second.socket.send(second.ring.submit(b"never"))
                await eventually(lambda: harness.server._behind.turn.waiting_count == 1)
            gate.is_open.set()
        await eventually(lambda: "guest2/0" not in harness.server._carriers)
    assert b"never" not in [call[3] for call in harness.backend.executed]
    assert harness.responses.last_sequence("guest2/0") == 0


async def test_new_connection_of_a_ring_takes_the_place_of_the_old_one(harness):
    gate = harness.backend.on_execute = Gate()
    async with harness.serving():
        with RawFrontend(harness.path) as old, RawFrontend(harness.path) as new:
            await old.attach()
            await old.socket.send(old.ring.submit(b"hold"))
            await eventually(gate.is_reached.is_set)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(new.attach)  # waits for the command of the old one
                await trio.testing.wait_all_tasks_blocked()
                assert not new.ring.is_attached
                gate.is_open.set()
            assert await old.receive() == Finished(1, b"hold")
            assert await old.is_closed()
            await new.socket.send(new.ring.submit(b"x"))
            assert await new.receive() == Finished(2, b"x")
    assert [call[1] for call in harness.backend.executed] == [1, 2]


async def test_frontend_that_is_gone_has_let_go_before_another_domain_is_taken(harness):
    gate = harness.backend.on_execute = Gate()

    def one_machine_at_a_time(peer):  # as a vTPM has it
        has_let_go = ("detached", "guest1/0") in harness.backend.calls
        if peer.domain.name == "guest2" and not has_let_go:
            raise Refused("this is the TPM of guest1")

    harness.backend.on_attach = one_machine_at_a_time
    async with harness.serving():
        with RawFrontend(harness.path) as killed:
            await killed.attach()
            await killed.socket.send(killed.ring.submit(b"hold"))
            await eventually(gate.is_reached.is_set)
        harness.next_domain = "guest2"
        with RawFrontend(harness.path) as next_one:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(next_one.attach)
                await trio.testing.wait_all_tasks_blocked()
                gate.is_open.set()
            await next_one.socket.send(next_one.ring.submit(b"x"))
            assert await next_one.receive() == Finished(1, b"x")


async def test_descriptors_and_threads_stay_flat_over_many_connections(harness):
    async with harness.serving():
        counts = []
        for number in range(150):
            client = RingClient(harness.path)
            await blocking(client.connect, WAIT_S)
            await blocking(client.exchange, b"x")
            await blocking(client.close)
            with RawFrontend(harness.path) as rude:
                await rude.attach()
                await rude.socket.send(rude.ring.submit(b"x"))
            with RawFrontend(harness.path):
                pass
            if number in {20, 149}:
                await eventually(lambda: not harness.server._carriers)
                await eventually(lambda: not harness.server._half_open)
                await trio.testing.wait_all_tasks_blocked()
                counts.append((open_descriptors(), harness.server._threads.borrowed_tokens))
    assert counts[0] == counts[1]


# -- our own faults


@pytest.mark.parametrize(
    ("bug", "seen"),
    [
        (ZeroDivisionError(), ZeroDivisionError),
        (Failure("image damaged", why="x", next_step="y"), Failure),
        (ConnectionResetError("the manager went away"), RuntimeError),
        (TimeoutError("the disk hangs"), RuntimeError),
    ],
)
@pytest.mark.parametrize("where", ["execute", "attach", "put"])
async def test_backends_own_fault_stops_the_daemon(harness, bug, seen, where):
    def fail(*_):
        raise bug

    if where == "execute":
        harness.backend.on_execute = fail
    elif where == "attach":
        harness.backend.on_attach = fail
    else:
        harness.responses.put = fail
    with pytest.RaisesGroup(seen, flatten_subgroups=True):
        async with harness.serving():
            bystander = RawFrontend(harness.path)  # does not keep the daemon from ending
            with bystander, RawFrontend(harness.path) as frontend:
                await frontend.receive()
                await frontend.socket.send(frontend.ring.publish())
                if where != "attach":
                    await frontend.receive()
                    await frontend.socket.send(frontend.ring.connected())
                    await frontend.socket.send(frontend.ring.submit(b"x"))
                await trio.sleep_forever()
    assert not harness.path.exists()


def test_kicks_need_no_more_than_one_socket_message():
    """The longest kick fits the kernel's limit for one message of a Unix socket."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        near.send(kick(1, page_image(PageState.SUBMIT, 0, bytes(PACKET_BYTES_MAX))))
        assert len(far.recv(MESSAGE_BYTES_MAX + 1)) == MESSAGE_BYTES_MAX
