"""Hostile and broken peers, run as a program of its own: one process, one door of the stack.

    python -m tests.soak.hostile_peers DOOR PATH SEED

DOOR is tpm0, control, ring or tis; PATH is the socket. At rings and at the chip a process that is
no domain (`attach_external`) is turned away before a byte is read; one that is comes further. `go`
on stdin starts attacks drawn from the seed, `rest` stops them, `each` does each once, `connect N`
connects so often; the end of stdin ends the program. Each line is answered, when it is so, with the
counts of attacks so far.

No attack changes the TPM of its door in a way that the programs beside it could see: what is
allowed to a guest (open sessions until there is no room, say) is no attack on others.
"""

from __future__ import annotations

import contextlib
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from daemons.errors import Failure
from daemons.listeners import Kind, connect
from daemons.ring_client import RingClient
from protocol.tis_messages import Read, Write, encode_message
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    BackendConnected,
    BackendWaiting,
    FrontendRing,
    kick,
)
from protocol.tpmif_page import PageState, page_image
from protocol.wire import DecodeError

PCR_READ: Final = bytes.fromhex("00c1 0000000e 00000015 00000004")
SELF_TEST: Final = bytes.fromhex("00c1 0000000a 00000050")
GET_RANDOM: Final = bytes.fromhex("00c1 0000000e 00000046 00000ffe")
EXTEND: Final = bytes.fromhex("00c1 00000022 00000014 0000000b") + b"\x66" * 20
HARMLESS: Final = (PCR_READ, SELF_TEST, GET_RANDOM)
PATIENCE_S: Final = 2.0
HELD_MAX: Final = 40
"""Connections held at once; the servers take 64 clients, and the stack's own want some of them."""
CONNECTS: Final = 200
FLOOD: Final = 400
PAUSE_S: Final = 0.02
"""Between two attacks, so that one process cannot keep a whole processor."""
ACCESS, STS, FIFO = 0x000, 0x018, 0x024

Attack = Callable[[Path, random.Random], None]


# -- what streams and rings have in common ---------------------------------------------------------


@contextlib.contextmanager
def _connected(path: Path, kind: Kind = Kind.STREAM) -> Iterator[socket.socket]:
    with connect(path, kind, PATIENCE_S) as connection:
        connection.settimeout(PATIENCE_S)
        yield connection


def _kind_of(path: Path) -> Kind:
    return Kind.SEQPACKET if path.name in {"ring.sock", "tis.sock"} else Kind.STREAM


def many_connects(path: Path, _chance: random.Random) -> None:
    """Connect and leave, as fast as it goes."""
    for _ in range(CONNECTS):
        with connect(path, _kind_of(path), PATIENCE_S):
            pass


def half_open(path: Path, chance: random.Random) -> None:
    """Hold connections on which nothing is ever said."""
    with contextlib.ExitStack() as held:
        for _ in range(chance.randint(1, HELD_MAX)):
            held.enter_context(_connected(path, _kind_of(path)))
        time.sleep(chance.uniform(0.1, 1.5))


def garbage(path: Path, chance: random.Random) -> None:
    """Random bytes, of any length."""
    with _connected(path, _kind_of(path)) as connection:
        for _ in range(chance.randint(1, 8)):
            connection.sendall(chance.randbytes(chance.choice((1, 9, 10, 100, 4097))))
        connection.shutdown(socket.SHUT_WR)
        _read_to_the_end(connection)


def _read_to_the_end(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


# -- tpm0 and the control socket -------------------------------------------------------------------


def one_byte_at_a_time(path: Path, chance: random.Random) -> None:
    """Trickle a request, and leave before its end."""
    request = _request(path, chance)
    with _connected(path) as connection:
        for at in range(min(len(request) - 1, 8)):
            connection.sendall(request[at : at + 1])
            time.sleep(chance.uniform(0.02, 0.3))


def half_a_command(path: Path, chance: random.Random) -> None:
    """Stop inside a command, and stay."""
    request = _request(path, chance)
    with _connected(path) as connection:
        connection.sendall(request[: chance.randrange(1, len(request))])
        time.sleep(chance.uniform(0.1, 1.0))


def never_reads(path: Path, chance: random.Random) -> None:
    """Ask and ask, and leave all answers unread."""
    with _connected(path) as connection:
        connection.settimeout(chance.uniform(0.2, 1.0))
        for _ in range(FLOOD):
            connection.sendall(_request(path, chance))


def vanishes(path: Path, chance: random.Random) -> None:
    """Leave while the command runs."""
    for _ in range(8):
        with _connected(path) as connection:
            connection.sendall(_request(path, chance))


def floods(path: Path, chance: random.Random) -> None:
    """As many commands as the door takes."""
    with _connected(path) as connection:
        for _ in range(FLOOD):
            connection.sendall(_request(path, chance))
            connection.recv(65536)


def lying_length(path: Path, chance: random.Random) -> None:
    """Headers whose length is not that of what follows."""
    with _connected(path) as connection:
        length = chance.choice((0, 1, 9, 11, 4088, 4089, 2**31, 2**32 - 1))
        connection.sendall(b"\0\xc1" + length.to_bytes(4, "big") + b"\0\0\0\x15" + bytes(4))
        connection.shutdown(socket.SHUT_WR)
        _read_to_the_end(connection)


def endless_line(path: Path, _chance: random.Random) -> None:
    """A line longer than any request."""
    with _connected(path) as connection:
        for _ in range(40):
            connection.sendall(b"[" * 65536)
        _read_to_the_end(connection)


def _request(path: Path, chance: random.Random) -> bytes:
    if path.name == "launcher.sock":
        return b'{"id": 1, "method": "list"}\n'
    return chance.choice(HARMLESS)


# -- a ring ----------------------------------------------------------------------------------------


def _attached(connection: socket.socket) -> FrontendRing:
    """Walk the handshake properly."""
    ring = FrontendRing(0)
    while True:
        event = ring.receive(connection.recv(MESSAGE_BYTES_MAX + 1))
        if isinstance(event, BackendWaiting):
            connection.send(ring.publish())
        elif isinstance(event, BackendConnected):
            connection.send(ring.connected())
            if ring.outstanding is not None:
                ring.abandon()
            return ring
        elif event is not None:
            raise ConnectionError(str(event))


def kick_without_handshake(path: Path, chance: random.Random) -> None:
    """Submit a request before anything was agreed."""
    with _connected(path, Kind.SEQPACKET) as connection:
        connection.send(kick(chance.randrange(1, 100), page_image(PageState.SUBMIT, 0, PCR_READ)))
        _read_to_the_end(connection)


def leaves_in_the_handshake(path: Path, _chance: random.Random) -> None:
    """Publish keys and go."""
    for _ in range(16):
        with _connected(path, Kind.SEQPACKET) as connection:
            ring = FrontendRing(0)
            if isinstance(ring.receive(connection.recv(MESSAGE_BYTES_MAX + 1)), BackendWaiting):
                connection.send(ring.publish())


def wrong_state(path: Path, chance: random.Random) -> None:
    """Set what only the backend may set, or CANCEL where there is nothing."""
    with _connected(path, Kind.SEQPACKET) as connection:
        ring = _attached(connection)
        connection.send(ring.submit(PCR_READ, 0))
        ring.receive(connection.recv(MESSAGE_BYTES_MAX + 1))
        state = chance.choice((PageState.FINISH, PageState.IDLE, PageState.CANCEL))
        connection.send(kick(chance.randrange(1, 100), page_image(state, 0, b"")))
        _read_to_the_end(connection)


def wrong_sequence(path: Path, chance: random.Random) -> None:
    """Repeat the number before the last, or skip some."""
    with _connected(path, Kind.SEQPACKET) as connection:
        ring = _attached(connection)
        message = ring.submit(PCR_READ, 0)
        connection.send(message)
        ring.receive(connection.recv(MESSAGE_BYTES_MAX + 1))
        number = int.from_bytes(message[1:9], "little")
        wrong = max(0, number + chance.choice((-1, 2, 3, 1000, 2**62)))
        connection.send(kick(wrong, message[9:]))
        _read_to_the_end(connection)


def same_again(path: Path, _chance: random.Random) -> None:
    """Send the number that was answered last a hundred times: each is a repeat."""
    with _connected(path, Kind.SEQPACKET) as connection:
        ring = _attached(connection)
        message = ring.submit(EXTEND, 0)
        answers = set()
        for _ in range(100):
            connection.send(message)
            answers.add(connection.recv(MESSAGE_BYTES_MAX + 1))
        if len(answers) != 1:
            raise AssertionError("a repeat was answered otherwise than the first time")


def gone_in_a_command(path: Path, chance: random.Random) -> None:
    """Submit, and leave before the answer."""
    for _ in range(8):
        with _connected(path, Kind.SEQPACKET) as connection:
            connection.send(_attached(connection).submit(chance.choice((*HARMLESS, EXTEND)), 0))


def floods_its_ring(path: Path, _chance: random.Random) -> None:
    """As many commands as the ring takes."""
    with RingClient(path) as ring:
        ring.connect(PATIENCE_S)
        for _ in range(FLOOD):
            ring.exchange(EXTEND)


# -- the chip's registers --------------------------------------------------------------------------


def _read(connection: socket.socket, offset: int, locality: int = 0) -> bytes:
    connection.send(encode_message(Read(locality=locality, offset=offset, count=1)))
    return connection.recv(1024)


def _write(connection: socket.socket, offset: int, data: bytes, locality: int = 0) -> None:
    connection.send(encode_message(Write(locality=locality, offset=offset, data=data)))


@contextlib.contextmanager
def _at_the_chip(path: Path) -> Iterator[socket.socket]:
    with _connected(path, Kind.SEQPACKET) as connection:
        connection.recv(1024)  # its Hello
        yield connection


def reads_registers(path: Path, chance: random.Random) -> None:
    """Read registers, any of them, as fast as it goes."""
    with _at_the_chip(path) as connection:
        for _ in range(FLOOD):
            _read(connection, chance.choice((ACCESS, STS, chance.randrange(0x1000))))


def another_s_page(path: Path, chance: random.Random) -> None:
    """Reach for pages that were not granted."""
    with _at_the_chip(path) as connection:
        for _ in range(50):
            _read(connection, ACCESS, chance.randrange(1, 5))


def writes_without_locality(path: Path, chance: random.Random) -> None:
    """Write registers that belong to who has the locality."""
    with _at_the_chip(path) as connection:
        for _ in range(100):
            _write(connection, chance.choice((STS, FIFO)), chance.randbytes(1))
        _read(connection, ACCESS)


def half_a_command_in_the_fifo(path: Path, chance: random.Random) -> None:
    """Take the locality, write a part of a command, and vanish with it."""
    with _at_the_chip(path) as connection:
        _write(connection, ACCESS, b"\x02")
        _write(connection, STS, b"\x40")
        _write(connection, FIFO, PCR_READ[: chance.randrange(1, len(PCR_READ))])
        _read(connection, STS)
    with _at_the_chip(path) as connection:  # let the next one have it, at last
        _write(connection, ACCESS, b"\x20")
        _read(connection, ACCESS)


# -- the program -----------------------------------------------------------------------------------

ATTACKS: Final[dict[str, tuple[Attack, ...]]] = {
    "tpm0": (
        many_connects,
        half_open,
        garbage,
        one_byte_at_a_time,
        half_a_command,
        never_reads,
        vanishes,
        floods,
        lying_length,
    ),
    "control": (
        many_connects,
        half_open,
        garbage,
        one_byte_at_a_time,
        half_a_command,
        never_reads,
        vanishes,
        floods,
        endless_line,
    ),
    "ring": (
        many_connects,
        half_open,
        garbage,
        kick_without_handshake,
        leaves_in_the_handshake,
        wrong_state,
        wrong_sequence,
        same_again,
        gone_in_a_command,
        floods_its_ring,
    ),
    "tis": (
        many_connects,
        half_open,
        garbage,
        reads_registers,
        another_s_page,
        writes_without_locality,
        half_a_command_in_the_fifo,
    ),
}


class Peers:
    """The attacks on one door, in a thread.

    Args:
        door: A key of `ATTACKS`.
        path: Its socket.
        seed: What is drawn from.
    """

    def __init__(self, door: str, path: Path, seed: int) -> None:
        self.counts: Counter[str] = Counter()
        self.failure = ""
        self._attacks = ATTACKS[door]
        self._path = path
        self._chance = random.Random(seed)
        self._may_run = threading.Event()
        self._turn = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def go(self) -> None:
        self._may_run.set()

    def rest(self) -> None:
        self._may_run.clear()
        with self._turn:  # the attack that is under way has ended
            pass

    def each(self) -> None:
        """Do each attack once."""
        for attack in self._attacks:
            self._do(attack)

    def connect(self, times: int) -> None:
        """Connect and leave, so often."""
        for _ in range(-(-times // CONNECTS)):
            self._do(many_connects)

    def _run(self) -> None:
        while self._may_run.wait():
            with self._turn:
                self._do(self._chance.choice(self._attacks))
            time.sleep(PAUSE_S)

    def _do(self, attack: Attack) -> None:
        # Refused, cut off, not there for a moment: whatever comes of it is well, as long as nobody
        # else notices.
        try:
            attack(self._path, self._chance)
        except (OSError, Failure, DecodeError):
            pass
        except Exception as error:  # noqa: BLE001 - told by who ordered it
            self.failure = f"{attack.__name__}: {error!r}"
        self.counts[attack.__name__] += 1


def main() -> None:
    door, path, seed = sys.argv[1:]
    peers = Peers(door, Path(path), int(seed))
    for line in sys.stdin:
        word, _, number = line.strip().partition(" ")
        if word == "go":
            peers.go()
        elif word == "each":
            peers.each()
        elif word == "connect":
            peers.connect(int(number))
        else:
            peers.rest()
        told = {"counts": peers.counts, "failure": peers.failure}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
