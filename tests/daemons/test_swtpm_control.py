"""The simulator's control channel: each request, what is no request, and what must not be left."""

import contextlib
import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.simulator import Options, open_simulator
from daemons.swtpm_control import ControlChannel
from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode
from protocol.swtpm_control import HASH_BYTES_MAX, Capability, ControlCommand
from protocol.wire import DecodeError
from tests.daemons.guest.test_tpm0_stream import filled
from tests.tpm12.witness import sha1, u32

WAIT_S = 20
STALL_S = 0.2
PCR_17 = 17
LAUNCHED_PCR_17 = sha1(bytes(20) + sha1(b"code"))
READ_17 = bytes.fromhex("00c10000000e0000001500000011")
GET_TICKS = bytes.fromhex("00c10000000a000000f1")
DONE_UNNAMED = {
    ControlCommand.GET_CAPABILITY,
    ControlCommand.HASH_START,
    ControlCommand.HASH_DATA,
    ControlCommand.HASH_END,
}
"""Done, and of no capability with the same name."""
RESET_ESTABLISHMENT = bytes.fromhex("00c10000000a4000000b")


class Controlled:
    """A simulator in this process, and a connection to its control channel."""

    def __init__(self):
        options = Options(state=Path(), socket=Path(), is_ephemeral=True, has_ek=False)
        self.tpm = open_simulator(options)
        self.connections = []
        self.has_room = True
        self.shut_downs = 0
        self.ended_by = None
        self.client, self.server = socket.socketpair()
        self.client.settimeout(WAIT_S)
        channel = ControlChannel(self.tpm, self._take, self._shut_down, stall_s=STALL_S)
        self._thread = threading.Thread(target=self._serve, args=(channel,))
        self._thread.start()

    def _serve(self, channel):
        with self.server:
            try:
                channel.serve(self.server, os.getpid())
            except (DecodeError, ConnectionError, TimeoutError) as fault:
                self.ended_by = fault

    def _take(self, connection):
        if self.has_room:
            self.connections.append(connection)
        return self.has_room

    def _shut_down(self):
        self.shut_downs += 1

    def ask(self, number, operands=b"", descriptors=()):
        """Send a request; its return code and results."""
        socket.send_fds(self.client, [u32(number) + operands], descriptors)
        response = self.client.recv(100)
        return struct.unpack(">I", response[:4])[0], response[4:]

    def code(self, *request):
        code, results = self.ask(*request)
        assert results == b""
        return code

    def ended(self):
        """Close, and give what ended the channel: None, when it was that."""
        self.client.close()
        self.join()
        return self.ended_by

    def join(self):
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()

    def run(self, request):
        return self.tpm.exchange(request)


@contextlib.contextmanager
def controlled():
    """Descriptors are counted: none may be left."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    made = Controlled()
    try:
        yield made
    finally:
        made.ended()
        for connection in made.connections:
            connection.close()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.fixture
def channel():
    with controlled() as made:
        yield made


def test_capabilities_are_what_is_done_and_no_more(channel):
    code, results = channel.ask(ControlCommand.GET_CAPABILITY)
    claimed = int.from_bytes(results, "big")
    assert (code, claimed) == (0, sum(Capability))
    named = {capability.name for capability in Capability}
    not_done = [c for c in ControlCommand if c.name not in named and c not in DONE_UNNAMED]
    assert len(not_done) == 6
    for command in not_done:
        assert channel.code(command) == ReturnCode.BAD_ORDINAL


def test_init_is_a_power_cycle(channel):
    channel.run(bytes.fromhex("00c1000000220000001400000000") + bytes(20))
    assert channel.code(ControlCommand.INIT, u32(0)) == 0
    assert channel.run(bytes.fromhex("00c10000000e0000001500000000"))[10:] == bytes(20)


def test_stop_takes_the_power_and_init_gives_it_back(channel):
    needing_power = [
        (ControlCommand.GET_TPMESTABLISHED,),
        (ControlCommand.RESET_TPMESTABLISHED, b"\x03"),
        (ControlCommand.HASH_START,),
        (ControlCommand.HASH_DATA, u32(0)),
        (ControlCommand.HASH_END,),
    ]
    assert channel.code(ControlCommand.STOP) == 0
    assert channel.run(GET_TICKS) == bytes.fromhex("00c40000000a00000009")
    assert [channel.code(*each) for each in needing_power] == [ReturnCode.BAD_ORDINAL] * 5
    assert channel.code(ControlCommand.INIT, u32(1)) == 0
    assert channel.run(GET_TICKS)[6:10] == bytes(4)


def test_dynamic_launch(channel):
    """The bus cycles of locality 4, what they leave, and who may take back that there was one."""
    channel.run(GET_TICKS)  # the simulator has started itself
    assert channel.ask(ControlCommand.GET_TPMESTABLISHED) == (0, bytes(4))
    assert channel.code(ControlCommand.HASH_DATA, u32(4) + b"code") == ReturnCode.SHA_THREAD
    assert channel.code(ControlCommand.HASH_END) == ReturnCode.SHA_THREAD
    assert channel.code(ControlCommand.HASH_START) == 0
    assert channel.code(ControlCommand.HASH_DATA, u32(4) + b"code") == 0
    assert channel.code(ControlCommand.HASH_END) == 0
    assert channel.run(READ_17)[10:] == LAUNCHED_PCR_17
    assert channel.ask(ControlCommand.GET_TPMESTABLISHED) == (0, b"\x01\0\0\0")
    for locality, code in ((2, ReturnCode.BAD_LOCALITY), (5, ReturnCode.BAD_LOCALITY), (3, 0)):
        assert channel.code(ControlCommand.RESET_TPMESTABLISHED, bytes([locality])) == code
    assert channel.ask(ControlCommand.GET_TPMESTABLISHED) == (0, bytes(4))


def test_no_launch_before_startup(channel):
    assert channel.code(ControlCommand.HASH_START) == ReturnCode.INVALID_POSTINIT
    assert channel.run(GET_TICKS)[6:10] == bytes(4)  # and the TPM is none the worse


@pytest.mark.parametrize("padding", [b"", bytes(3)])
def test_commands_run_at_the_locality_that_was_set(channel, padding):
    channel.run(GET_TICKS)
    for locality in (3, 0, 4):
        assert channel.code(ControlCommand.SET_LOCALITY, bytes([locality]) + padding) == 0
        may = locality in {3, 4}
        expected = ReturnCode.SUCCESS if may else ReturnCode.BAD_LOCALITY
        assert channel.run(RESET_ESTABLISHMENT)[6:10] == u32(expected)
    assert channel.code(ControlCommand.SET_LOCALITY, b"\x05") == ReturnCode.BAD_LOCALITY
    assert channel.tpm.locality == 4


def test_buffer_has_one_size(channel):
    for wanted in (0, 1, 1 << 31):
        code, results = channel.ask(ControlCommand.SET_BUFFERSIZE, u32(wanted))
        assert (code, struct.unpack(">III", results)) == (0, (4096, 4096, 4096))


def test_no_flag_of_the_configuration_is_set(channel):
    assert channel.ask(ControlCommand.GET_CONFIG) == (0, bytes(4))


def test_shutdown_ends_the_program_when_it_was_answered(channel):
    assert channel.code(ControlCommand.SHUTDOWN) == 0
    channel.ended()
    assert channel.shut_downs == 1


def test_connection_that_is_given_is_served(channel):
    ours, given = socket.socketpair()
    with ours:
        with given:
            given.setblocking(False)
            assert channel.ask(ControlCommand.SET_DATAFD, b"", [given.fileno()]) == (0, b"")
        (taken,) = channel.connections
        assert taken.getblocking()
        ours.sendall(b"through")
        assert taken.recv(10) == b"through"


def test_one_connection_at_a_time_and_it_ends_with_the_channel(channel):
    ours, given = socket.socketpair()
    other, another = socket.socketpair()
    with ours, given, other, another:
        assert channel.ask(ControlCommand.SET_DATAFD, b"", [given.fileno()]) == (0, b"")
        code, _ = channel.ask(ControlCommand.SET_DATAFD, b"", [another.fileno()])
        assert code == ReturnCode.IOERROR
        channel.connections[0].close()  # as whoever serves it does when its client has left
        assert channel.ask(ControlCommand.SET_DATAFD, b"", [another.fileno()]) == (0, b"")
        channel.ended()
        assert other.recv(1) == b""


def test_what_is_no_connection_is_not_served(channel):
    stream, the_other = socket.socketpair()
    with (
        Path("/dev/null").open("rb") as null,
        socket.socket(socket.AF_INET) as inet,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
        socket.socket(socket.AF_UNIX) as unconnected,
        socket.socket(socket.AF_UNIX) as listening,
        socket.socket(socket.AF_UNIX) as named,
        stream,
        the_other,
        contextlib.ExitStack() as closing,
    ):
        listening.bind(f"\0{listening.fileno()}-{os.getpid()}")
        listening.listen()
        named.connect(listening.getsockname())
        of_a_path = os.open("/dev/null", os.O_PATH)
        closing.callback(os.close, of_a_path)
        files = [null, inet, datagrams, unconnected, listening, named]
        wrong = [[], [stream.fileno()] * 2, [of_a_path], *([each.fileno()] for each in files)]
        for descriptors in wrong:
            code, _ = channel.ask(ControlCommand.SET_DATAFD, b"", descriptors)
            assert code == ReturnCode.BAD_PARAMETER
        channel.has_room = False
        code, _ = channel.ask(ControlCommand.SET_DATAFD, b"", [stream.fileno()])
        assert code == ReturnCode.RESOURCES
    assert channel.connections == []


def test_descriptors_that_nobody_asked_for_are_closed(channel):
    with Path("/dev/null").open("rb") as null:
        assert channel.ask(ControlCommand.STOP, b"", [null.fileno()] * 4) == (0, b"")


@pytest.mark.parametrize(
    ("number", "operands"),
    [
        (ControlCommand.STOP, bytes(4)),
        (ControlCommand.INIT, bytes(8)),
        (ControlCommand.SET_LOCALITY, bytes(5)),
        (ControlCommand.HASH_DATA, u32(2) + b"abc"),
    ],
)
def test_more_bytes_than_a_request_has_are_refused(channel, number, operands):
    assert channel.code(number, operands) == ReturnCode.BAD_PARAMETER


def test_request_may_come_a_byte_at_a_time(channel):
    channel.run(GET_TICKS)
    assert channel.code(ControlCommand.HASH_START) == 0
    for byte in u32(ControlCommand.HASH_DATA) + u32(4) + b"code":
        channel.client.sendall(bytes([byte]))
    assert channel.client.recv(100) == bytes(4)
    assert channel.code(ControlCommand.HASH_END) == 0
    assert channel.run(READ_17)[10:] == LAUNCHED_PCR_17


def test_who_stalls_inside_a_request_is_let_go_and_who_is_silent_between_them_is_not(channel):
    assert channel.code(ControlCommand.STOP) == 0
    channel.client.settimeout(2 * STALL_S)
    with pytest.raises(TimeoutError):
        channel.client.recv(1)  # nothing is said, and nobody is let go
    channel.client.settimeout(WAIT_S)
    channel.client.sendall(u32(ControlCommand.INIT))
    assert channel.client.recv(1) == b""
    assert isinstance(channel.ended(), TimeoutError)


def test_who_closes_inside_a_request_has_asked_nothing(channel):
    channel.client.sendall(u32(ControlCommand.INIT) + b"\0")
    assert isinstance(channel.ended(), ConnectionError)


def test_too_much_data_at_once_is_refused_and_its_sender_let_go(channel):
    """Where the next request begins is not known behind it."""
    channel.run(GET_TICKS)
    assert channel.code(ControlCommand.HASH_START) == 0
    length = HASH_BYTES_MAX + 1
    assert channel.code(ControlCommand.HASH_DATA, u32(length)) == ReturnCode.BAD_PARAMETER
    assert channel.client.recv(1) == b""
    assert isinstance(channel.ended(), DecodeError)


@pytest.mark.parametrize(
    "request_bytes",
    [u32(ControlCommand.STOP), u32(ControlCommand.HASH_DATA) + u32(HASH_BYTES_MAX + 1)],
)
def test_who_does_not_read_is_let_go(channel, request_bytes):
    filled(channel.server)
    channel.client.sendall(request_bytes)
    channel.join()
    assert isinstance(channel.ended_by, TimeoutError)


@given(st.lists(st.binary(max_size=40) | st.sampled_from([u32(c) for c in ControlCommand])))
def test_any_bytes_are_answered_or_end_the_connection(messages):
    with controlled() as channel:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for message in messages:
                channel.client.sendall(message)
        channel.client.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while answered := channel.client.recv(4096):
                assert len(answered) >= 4
        channel.tpm.power_cycle()
        assert channel.run(GET_TICKS)[6:10] == bytes(4)
        assert channel.run(bytes.fromhex("00c10000000a") + u32(Ordinal.GET_TEST_RESULT))
