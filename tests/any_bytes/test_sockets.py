"""Garbage at the doors: ring, tpm0, TIS and the simulator's socket; the process stays as it was.

Smoke only: each door has its own property tests. Here real engines stand behind them.
"""

import contextlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from daemons.guest.tpm0 import Tpm0Device
from hwtpm.tis_device import TisDevice
from protocol.tpmif import (
    BackendKeys,
    BackendRing,
    BackendWaiting,
    FrontendReady,
    FrontendRing,
    Repeat,
    Submitted,
)
from protocol.wire import DecodeError
from tests.any_bytes import lattice
from tests.any_bytes.answers import check_response
from tests.daemons.vtpm.test_image import OURS
from tests.tpm12.conftest import Bench

DEADLINE_S = 20.0
GARBAGE_CLIENTS = 2000
GET_RANDOM = bytes.fromhex("00c1 0000000e 00000046 00000010")
BAD_PARAM_SIZE = bytes.fromhex("00c4 0000000a 00000019")


def garbage(chance):
    """Bytes of some kind that are no good command, or hardly."""
    kind = chance.randrange(5)
    if kind == 0:
        return chance.randbytes(chance.randrange(60))
    if kind == 1:
        size = chance.choice([0, 1, 9, 10, 4096, 4097, 1 << 31, (1 << 32) - 1])
        return b"\0\xc1" + size.to_bytes(4, "big") + chance.randbytes(chance.randrange(40))
    request = bytearray(chance.choice(_BASES))
    for _ in range(chance.randrange(4)):
        request[chance.randrange(len(request))] = chance.randrange(256)
    return bytes(request[: chance.randrange(len(request))] if kind == 2 else request)


_BASES = [lattice.made(command) for command in lattice.ALL if command.ordinal < 0x100]


class Serving:
    """An engine behind an exchange function."""

    def __init__(self, state):
        self.bench = Bench(state)
        self.count = 0

    def exchange(self, request):
        self.count += 1
        outcome = self.bench.engine.execute(request, 0)
        self.bench.engine.keep(outcome)
        return outcome.response


# -- tpm0 ------------------------------------------------------------------------------------------


def _talk(device, data):
    """What one client gets that sends these bytes and no more."""
    received, (ours, theirs) = b"", socket.socketpair()
    with ours:
        thread = threading.Thread(target=_serve, args=(device, theirs))
        thread.start()
        ours.settimeout(DEADLINE_S)
        with contextlib.suppress(BrokenPipeError):
            ours.sendall(data)
            ours.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # it was closed with bytes unread
            while more := ours.recv(4096):
                received += more
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return received


def _serve(device, connection):
    # What the daemon's frame of a connection takes for the peer's own fault.
    with connection, contextlib.suppress(DecodeError, ConnectionError):
        device.serve_client(connection, peer_pid=4711)


def test_tpm0_answers_garbage_or_closes(owned_state, seed):
    serving, chance = Serving(owned_state), random.Random(seed)
    device = Tpm0Device(serving.exchange, lambda _line: None, lambda: None)
    for _ in range(200):
        received = _talk(device, garbage(chance))
        while received:
            size = int.from_bytes(received[2:6], "big")
            check_response(received[:size])
            received = received[size:]
    assert check_response(_talk(device, GET_RANDOM)) is not None
    assert serving.count > 50


def test_tpm0_answers_every_length_or_closes(owned_state, seed):
    serving = Serving(owned_state)
    device = Tpm0Device(serving.exchange, lambda _line: None, lambda: None)
    for request in lattice.at_a_door(random.Random(seed)):
        received = _talk(device, request)
        if received:
            check_response(received)
    assert check_response(_talk(device, GET_RANDOM)) == 0


# -- ring ------------------------------------------------------------------------------------------


def _attached():
    backend, frontend = BackendRing(), FrontendRing(0)
    assert isinstance(frontend.receive(backend.open()), BackendWaiting)
    assert isinstance(backend.receive(frontend.publish()), FrontendReady)
    frontend.receive(backend.connect(BackendKeys(handle=0, uuid=OURS, ring_id="r", memory="m"), 0))
    backend.receive(frontend.connected())
    return backend, frontend


def test_ring_answers_any_packet_and_refuses_any_garbage(owned_state, seed):
    serving, chance = Serving(owned_state), random.Random(seed)
    backend, frontend = _attached()
    for _ in range(500):
        packet = garbage(chance)
        event = backend.receive(frontend.submit(packet))
        assert isinstance(event, Submitted | Repeat)
        response = serving.exchange(event.packet)
        check_response(response)
        frontend.receive(backend.finish(response))
        with contextlib.suppress(DecodeError):
            _attached()[0].receive(garbage(chance))


def test_ring_answers_every_length(owned_state, seed):
    serving = Serving(owned_state)
    backend, frontend = _attached()
    for request in lattice.at_a_door(random.Random(seed)):
        event = backend.receive(frontend.submit(request))
        response = serving.exchange(event.packet)
        check_response(response)
        assert frontend.receive(backend.finish(response)) is not None


# -- TIS -------------------------------------------------------------------------------------------

ACCESS, STS, FIFO = 0x00, 0x18, 0x24
READY, GO = b"\x40", b"\x20"


class Port:
    """What the chip's front needs of an engine."""

    established = False

    def __init__(self, engine):
        self.engine = engine

    def _keep(self, outcome):
        self.engine.keep(outcome)
        return not outcome.code

    def hash_start(self):
        return self._keep(self.engine.hash_start())

    def hash_data(self, data):
        return self._keep(self.engine.hash_data(data))

    def hash_end(self):
        return self._keep(self.engine.hash_end())


def _through_registers(device, serving, request, disturb):
    device.write(0, ACCESS, b"\x02")
    device.write(0, STS, READY)
    for at in range(0, len(request), 32):
        disturb()
        device.write(0, FIFO, request[at : at + 32])
    device.write(0, STS, GO)
    pending = device.pending_command
    if pending is not None:
        device.complete(pending, serving.exchange(pending.request))
    disturb()
    return device.read(0, FIFO, 32)


@pytest.mark.parametrize("is_disturbed", [False, True])
def test_tis_takes_random_accesses_around_commands(owned_state, seed, is_disturbed):
    serving, chance = Serving(owned_state), random.Random(seed)
    device = TisDevice(Port(serving.bench.engine))
    device.power_on()

    def disturb():
        for _ in range(chance.randrange(4) if is_disturbed else 0):
            locality, offset = chance.randrange(-1, 6), chance.randrange(0x1000)
            if chance.randrange(2):
                device.read(locality, offset, chance.randrange(70))
            else:
                device.write(locality, offset, chance.randbytes(chance.randrange(70)))
            device.take_interrupts()

    for _ in range(300):
        answer = _through_registers(device, serving, garbage(chance), disturb)
        assert is_disturbed or answer[:1] in {b"\0", b"\xff", b""}
    device.power_on()
    answer = _through_registers(device, serving, GET_RANDOM, lambda: None)
    assert answer[:2] == b"\0\xc4"


def test_tis_answers_every_length_or_shows_nothing(owned_state, seed):
    serving = Serving(owned_state)
    device = TisDevice(Port(serving.bench.engine))
    device.power_on()
    for request in lattice.at_a_door(random.Random(seed)):
        answer = _through_registers(device, serving, request, lambda: None)
        assert answer[:1] in {b"\0", b"\xff", b""}
    device.power_on()
    answer = _through_registers(device, serving, GET_RANDOM, lambda: None)
    assert answer[:2] == b"\0\xc4"


# -- the simulator, a real process -----------------------------------------------------------------


@contextlib.contextmanager
def simulator(folder):
    path = folder / "sock"
    program = str(Path(sys.executable).with_name("vtpm"))
    command = [program, "simulator", "--ephemeral", "--no-ek", "--socket", str(path)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + DEADLINE_S
            while not _answers(path):
                assert process.poll() is None
                assert time.monotonic() < end
                time.sleep(0.01)
            yield process, path
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_S) == 0


def _answers(path):
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


def _exchange(path, data):
    """Everything that comes back; a client that sends nothing good may be cut off any time."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(DEADLINE_S)
        connection.connect(str(path))
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(4096), b""))
    return b""


def _belongings(process):
    """Descriptors, threads, and resident memory in KiB."""
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
    )
    descriptors = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    return descriptors, int(status["Threads"]), int(status["VmRSS"].split()[0])


def test_simulator_stays_flat_over_garbage_clients(tmp_path, seed):
    folder = tmp_path / "sim"
    folder.mkdir(mode=0o700)
    chance = random.Random(seed)
    with simulator(folder) as (process, path):
        seen = []
        for number in range(GARBAGE_CLIENTS):
            _exchange(path, garbage(chance))
            if number in {GARBAGE_CLIENTS // 4, GARBAGE_CLIENTS - 1}:
                assert len(_exchange(path, GET_RANDOM)) >= 10
                seen.append(_settled(process))
    (early_files, early_threads, early_kib), (files, threads, kib) = seen
    assert files <= early_files
    assert threads <= early_threads + 2
    assert kib <= early_kib + 4096, f"memory grew from {early_kib} to {kib} KiB"


def _settled(process):
    """Its belongings once they no longer change; the last clients may still be leaving."""
    before, end = None, time.monotonic() + DEADLINE_S
    while before != (now := _belongings(process)):
        assert time.monotonic() < end
        before = now
        time.sleep(0.05)
    return now
