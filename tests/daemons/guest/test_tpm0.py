"""tpm0 as programs see it: exact bytes, whole commands, many clients, bad clients."""

import contextlib
import os
import socket
import struct
import threading

import pytest
import trio

from daemons.errors import Failure
from daemons.guest.tpm0 import Tpm0Device
from daemons.guest.tpm0_client import Tpm0Client
from daemons.listeners import Kind, PeerCredentials, listen
from daemons.service import Connection
from protocol.tpmif_page import PACKET_BYTES_MAX

DEADLINE_S = 10.0
BADTAG = bytes.fromhex("00c4 0000000a 0000001e")
BAD_PARAM_SIZE = bytes.fromhex("00c4 0000000a 00000019")
IOERROR = bytes.fromhex("00c4 0000000a 0000001f")


def command(body=b"", tag=0x00C1, ordinal=0x15):
    return struct.pack(">HII", tag, 10 + len(body), ordinal) + body


def response_to(request):
    """What the fake vTPM answers: a success that repeats the operands backwards."""
    return struct.pack(">HII", 0x00C4, len(request), 0) + request[:9:-1]


class FakeVtpm:
    """Answers commands one at a time and keeps them; can be held back or broken."""

    def __init__(self):
        self.requests = []
        self.failure = None
        self.go = threading.Event()
        self.go.set()
        self.entered = threading.Event()
        self.given_up = 0
        self._one = threading.Lock()

    def give_up(self):
        self.given_up += 1
        self.failure = Failure("cannot reach the vTPM", why="given up", next_step="wait")
        self.go.set()

    def exchange(self, request):
        with self._one:
            self.requests.append(request)
            self.entered.set()
            assert self.go.wait(DEADLINE_S)
            if self.failure is not None:
                raise self.failure
            return BADTAG if request[0] == 0x80 else response_to(request)


@pytest.fixture
def vtpm():
    return FakeVtpm()


@pytest.fixture
def told():
    return []


@contextlib.contextmanager
def served(device):
    """One client socket, served by the device's own worker function in a thread."""
    ours, theirs = socket.socketpair()
    ended = []

    def run():
        try:
            device.serve_client(theirs, peer_pid=4711)
            ended.append(None)
        except Exception as error:  # noqa: BLE001 - the test looks at it
            ended.append(error)
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    ours.settimeout(DEADLINE_S)
    try:
        yield ours, ended
    finally:
        ours.close()
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


@pytest.fixture
def device(vtpm, told):
    return Tpm0Device(vtpm.exchange, told.append, vtpm.give_up)


def receive(client, size):
    data = b""
    while len(data) < size:
        more = client.recv(size - len(data))
        assert more, f"closed after {data!r}"
        data += more
    return data


def test_command_and_response_are_exact_bytes(device, vtpm):
    request = command(b"\0\0\0\4")
    with served(device) as (client, _):
        client.sendall(request)
        assert receive(client, len(request)) == response_to(request)
    assert vtpm.requests == [request]


@pytest.mark.parametrize("cut", range(1, 14))
def test_command_split_anywhere_gives_the_same_answer(device, vtpm, cut):
    request = command(b"\1\2\3\4")
    with served(device) as (client, _):
        client.sendall(request[:cut])
        client.sendall(request[cut:])
        assert receive(client, len(request)) == response_to(request)
    assert vtpm.requests == [request]


def test_commands_in_one_write_are_answered_one_by_one(device, vtpm):
    requests = [command(bytes([n])) for n in range(5)]
    with served(device) as (client, _):
        client.sendall(b"".join(requests)[:-3])
        client.sendall(b"".join(requests)[-3:])
        assert receive(client, 55) == b"".join(response_to(r) for r in requests)
    assert vtpm.requests == requests


def test_largest_command_passes_and_larger_is_refused(device, vtpm):
    largest = command(bytes(PACKET_BYTES_MAX - 10))
    with served(device) as (client, _):
        client.sendall(largest)
        assert receive(client, PACKET_BYTES_MAX) == response_to(largest)
    with served(device) as (client, ended):
        client.sendall(command(bytes(PACKET_BYTES_MAX - 9))[:10])
        assert receive(client, 10) == BAD_PARAM_SIZE
        assert client.recv(1) == b""
    assert "paramSize 4089" in str(ended[0])
    assert vtpm.requests == [largest]


@pytest.mark.parametrize("size", [0, 9, 0xFFFFFFFF])
def test_impossible_size_gets_an_error_and_a_closed_connection(device, vtpm, size):
    with served(device) as (client, _):
        client.sendall(struct.pack(">HII", 0xC1, size, 0x15))
        assert receive(client, 10) == BAD_PARAM_SIZE
        assert client.recv(1) == b""
    assert vtpm.requests == []


def test_client_that_closes_inside_a_command_leaves_nothing_behind(device, vtpm):
    with served(device) as (client, ended):
        client.sendall(command(b"\0\0\0\4")[:7])
    assert ended == [None]
    assert vtpm.requests == []


def test_client_that_closes_before_its_response_does_not_disturb(device, vtpm):
    vtpm.go.clear()
    with served(device) as (client, ended):
        client.sendall(command())
        assert vtpm.entered.wait(DEADLINE_S)
        client.close()
        vtpm.go.set()
    assert len(vtpm.requests) == 1
    assert ended == [None] or isinstance(ended[0], ConnectionError)


def test_client_that_stalls_inside_a_command_is_let_go(vtpm, told):
    device = Tpm0Device(vtpm.exchange, told.append, vtpm.give_up, stall_s=0.05)
    with served(device) as (client, ended):
        client.sendall(command()[:4])
        assert client.recv(1) == b""
    assert isinstance(ended[0], TimeoutError)


def test_client_that_does_not_read_is_let_go(vtpm, told):
    device = Tpm0Device(vtpm.exchange, told.append, vtpm.give_up, stall_s=0.05)
    with served(device) as (client, ended):
        many = command(bytes(4000)) * 200
        with contextlib.suppress(OSError):
            client.sendall(many)
        assert client.fileno() != -1
    assert isinstance(ended[0], TimeoutError)


def test_client_silent_between_commands_stays(vtpm, told):
    device = Tpm0Device(vtpm.exchange, told.append, vtpm.give_up, stall_s=0.02)
    with served(device) as (client, _):
        client.settimeout(0.2)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(DEADLINE_S)
        client.sendall(command())
        assert receive(client, 10) == response_to(command())


def test_tpm2_command_gets_badtag_and_is_told_once(device, vtpm, told):
    get_capability = bytes.fromhex("8001 00000016 0000017a 00000006 00000100 00000001")
    with served(device) as (client, _):
        for request in (get_capability, b"\x80\x02" + get_capability[2:]):
            client.sendall(request)
            assert receive(client, 10) == BADTAG
    assert told == ["process 4711 sent TPM 2.0 commands, but this is a TPM 1.2"]
    assert len(vtpm.requests) == 2


def test_vtpm_that_stays_away_gives_an_io_error_and_keeps_the_connection(device, vtpm):
    with served(device) as (client, _):
        vtpm.failure = Failure("cannot reach the vTPM", why="gone", next_step="wait")
        client.sendall(command())
        assert receive(client, 10) == IOERROR
        vtpm.failure = None
        client.sendall(command())
        assert receive(client, 10) == response_to(command())


def test_clients_at_once_each_get_their_own_responses(device, vtpm):
    failures = []

    def talk(number):
        with served(device) as (client, _):
            for count in range(50):
                request = command(struct.pack(">HH", number, count))
                client.sendall(request)
                if receive(client, len(request)) != response_to(request):
                    failures.append((number, count))

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert failures == []
    assert len(vtpm.requests) == 200


def connection_of(server_side, stopping):
    peer = PeerCredentials(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), start_time=1)
    return Connection(
        socket=trio.socket.from_stdlib_socket(server_side),
        peer=peer,
        connection_id=1,
        stopping=stopping,
    )


async def test_handler_ends_when_the_daemon_stops_and_answers_what_is_open(device, vtpm):
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    stopping = trio.Event()
    vtpm.go.clear()
    with trio.fail_after(DEADLINE_S), ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.handle, connection_of(theirs, stopping))
            ours.sendall(command())
            await trio.to_thread.run_sync(vtpm.entered.wait, DEADLINE_S)
            stopping.set()
            vtpm.go.set()
        assert receive(ours, 10) == response_to(command())
        theirs.close()
        assert ours.recv(1) == b""


async def test_handler_breaks_off_a_command_when_cancelled(device, vtpm):
    ours, theirs = socket.socketpair()
    vtpm.go.clear()
    with trio.fail_after(DEADLINE_S), ours:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.handle, connection_of(theirs, trio.Event()))
            ours.sendall(command())
            await trio.to_thread.run_sync(vtpm.entered.wait, DEADLINE_S)
            nursery.cancel_scope.cancel()
    theirs.close()
    assert vtpm.given_up == 1


async def test_handler_keeps_the_ring_when_a_client_leaves(device, vtpm):
    ours, theirs = socket.socketpair()
    ours.close()
    with trio.fail_after(DEADLINE_S):
        await device.handle(connection_of(theirs, trio.Event()))
    theirs.close()
    assert vtpm.given_up == 0


async def test_handler_survives_a_garbled_stream(device):
    ours, theirs = socket.socketpair()
    ours.settimeout(DEADLINE_S)
    with trio.fail_after(DEADLINE_S), ours:
        ours.sendall(bytes(10))
        await device.handle(connection_of(theirs, trio.Event()))
        assert receive(ours, 10) == BAD_PARAM_SIZE
    theirs.close()


@pytest.fixture
def listening(tmp_path):
    directory = tmp_path / "guest1"
    directory.mkdir(mode=0o700)
    with listen(directory / "tpm0", Kind.STREAM) as listener:
        yield listener


def test_client_exchanges_over_a_real_socket(listening, device):
    def accept_one():
        accepted, _ = listening.socket.accept()
        with accepted:
            device.serve_client(accepted, peer_pid=1)

    thread = threading.Thread(target=accept_one)
    thread.start()
    with Tpm0Client(listening.path) as client:
        for number in range(3):
            request = command(bytes([number]))
            assert client.exchange(request) == response_to(request)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()


def test_client_names_a_missing_socket(tmp_path):
    with pytest.raises(Failure, match="cannot connect"):
        Tpm0Client(tmp_path / "tpm0")


def test_client_names_a_guest_that_goes_away(listening):
    with Tpm0Client(listening.path) as client:
        accepted, _ = listening.socket.accept()
        accepted.close()
        with pytest.raises(Failure, match="no response from"):
            client.exchange(command())


def test_client_names_a_guest_that_does_not_answer(listening):
    with Tpm0Client(listening.path, answer_s=0.05) as client:
        accepted, _ = listening.socket.accept()
        with accepted, pytest.raises(Failure) as failure:
            client.exchange(command())
    assert failure.value.why == "no answer in time"


def test_client_names_an_answer_that_is_none(listening):
    with Tpm0Client(listening.path) as client:
        accepted, _ = listening.socket.accept()
        with accepted:
            accepted.sendall(bytes(10))
            with pytest.raises(Failure, match="no response from"):
                client.exchange(command())
