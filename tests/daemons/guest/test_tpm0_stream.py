"""The stream of commands on a socket: who does not read is let go, whatever he was to be told."""

import contextlib
import socket

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
