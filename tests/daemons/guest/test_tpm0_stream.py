"""The stream of commands on a socket: who does not read is let go, whatever he was to be told."""

import contextlib
import socket
import threading
import time

import pytest

from daemons.guest.tpm0_stream import Tpm0Stream
from protocol.framing import FrameError

COMMAND = bytes.fromhex("00c10000000e0000001500000000")
NO_COMMAND = bytes.fromhex("00c1ffffffff00000015")


def filled(connection):
    """Send until no more is taken."""
    connection.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            connection.send(bytes(10))
    connection.setblocking(True)
    return connection


@pytest.fixture
def stream():
    return Tpm0Stream(lambda _: b"response", None, None, stall_s=0.1)


@pytest.mark.parametrize("sent", [COMMAND, NO_COMMAND], ids=["command", "no command"])
def test_who_does_not_read_is_let_go(stream, sent):
    ours, served = socket.socketpair()
    with ours, filled(served):
        ours.sendall(sent)
        with pytest.raises(TimeoutError, match="did not read"):
            stream.serve(served, 0)


def test_who_reads_is_told_why_he_is_let_go(stream):
    ours, served = socket.socketpair()
    with ours, served:
        ours.sendall(COMMAND + NO_COMMAND)
        with pytest.raises(FrameError):
            stream.serve(served, 0)
        assert ours.recv(100) == b"response" + bytes.fromhex("00c40000000a00000019")


def test_who_stops_inside_a_command_is_let_go(stream):
    ours, served = socket.socketpair()
    with ours, served:
        ours.sendall(COMMAND[:-1])
        with pytest.raises(TimeoutError, match="stalled"):
            stream.serve(served, 0)


# -- commands of every length ----------------------------------------------------------------------


def command(size):
    """A command of so many bytes that can be told from others."""
    return b"\x00\xc1" + size.to_bytes(4, "big") + bytes(i % 251 for i in range(size - 6))


def asked_for(sent, *more, tpm2_seen=None):
    """The commands that a stream runs of what a client sends, in its pieces."""
    asked = []

    def exchange(request):
        asked.append(request)
        return b"response"

    stream = Tpm0Stream(exchange, None, tpm2_seen, stall_s=5)
    ours, served = socket.socketpair()
    with ours, served:
        server = threading.Thread(target=stream.serve, args=(served, 1))
        server.start()
        ours.sendall(sent)
        for piece in more:
            time.sleep(0.05)  # else it may come together with the one before
            ours.sendall(piece)
        ours.shutdown(socket.SHUT_WR)
        server.join()
    return asked


@pytest.mark.parametrize("size", [10, 11, 478, 479, 480, 481, 958, 4087, 4088])
def test_a_command_of_any_length_is_run_as_it_came(size):
    assert asked_for(command(size)) == [command(size)]
    assert asked_for(command(size) + command(10)) == [command(size), command(10)]
    assert asked_for(command(10) + command(size)) == [command(10), command(size)]


@pytest.mark.parametrize("cut", [1, 9, 10, 478, 479, 480, 700])
def test_a_long_command_may_come_in_pieces(cut):
    whole = command(900) + command(20)
    assert asked_for(whole[:cut], whole[cut:]) == [command(900), command(20)]


def test_a_command_of_a_tpm_2_is_run_and_noticed_once():
    seen = []
    ask = bytes.fromhex("80010000000a00000144")
    assert asked_for(ask, ask + ask, tpm2_seen=seen.append) == [ask] * 3
    assert seen == [1]
