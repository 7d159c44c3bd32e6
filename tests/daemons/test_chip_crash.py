"""A chip that is killed comes back with its registers, and has run each command once."""

import hashlib

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.hwtpmd import Chip, Registers
from daemons.tis_server import TisPeer, TisServer
from daemons.volatile_memory import VolatileMemory
from hwtpm.tis_device import State, TisDevice
from hwtpm.tis_registers import Access, Register, Status
from hwtpm.tis_snapshot import decode_snapshot, encode_snapshot
from protocol import tis_messages as messages
from protocol.return_codes import ReturnCode
from protocol.wire import DecodeError
from tpm12.commands import ALL
from tpm12.profile import CHIP

MARK = b"m" * 20
EXTEND = bytes.fromhex("00c1000000220000001400 00000a".replace(" ", "")) + MARK
READ = bytes.fromhex("00c10000000e000000150000000a")
ONCE = hashlib.sha1(bytes(20) + MARK).digest()
TWICE = hashlib.sha1(ONCE + MARK).digest()
LOCALITY = 2


class Killed(BaseException):
    """The process ends here."""


class Store:
    permanent = None

    def load(self):
        return self.permanent

    def save(self, permanent):
        self.permanent = permanent


class Board:
    """A chip over its processes, and a driver's accesses to it."""

    def __init__(self, path):
        self.path, self.store = path, Store()
        self.start()
        self.tpm.save_as_new()
        self.server.power_on()
        self.tpm.start()

    def start(self):
        memory = VolatileMemory(self.path, "hwtpm")
        self.tpm = DurableTpm(self.store, profile=CHIP, commands=ALL, memory=memory)
        self.registers = Registers(self.tpm)
        chip = Chip(self.tpm)
        self.server = TisServer(chip, lambda _: None, memory=self.registers)
        self.server.run_recalled_command()

    def crash(self):
        self.start()
        assert self.tpm.is_resumed

    def write(self, register, data):
        self.server.write(messages.Write(locality=LOCALITY, offset=register, data=bytes(data)))

    def read(self, register, count=1):
        return self.server.read(messages.Read(locality=LOCALITY, offset=register, count=count))

    @property
    def status(self):
        return self.read(Register.STS)[0]

    def take(self):
        self.write(Register.ACCESS, [Access.REQUEST_USE])
        self.write(Register.STS, [Status.COMMAND_READY])

    def fill(self, request):
        self.write(Register.DATA_FIFO, request)

    def go(self):
        self.write(Register.STS, [Status.TPM_GO])

    def response(self):
        self.write(Register.STS, [Status.RESPONSE_RETRY])
        head = self.read(Register.DATA_FIFO, 10)
        return head + self.read(Register.DATA_FIFO, int.from_bytes(head[2:6], "big") - 10)

    def run(self, request):
        self.write(Register.STS, [Status.COMMAND_READY])
        self.fill(request)
        self.go()
        return self.response()

    def pcr(self):
        return self.run(READ)[10:]


@pytest.fixture
def board(tmp_path):
    return Board(tmp_path / "journal")


def test_locality_and_state_are_as_they_were(board):
    board.take()
    board.crash()
    assert board.read(Register.ACCESS)[0] & Access.ACTIVE_LOCALITY
    assert board.status & Status.COMMAND_READY


def test_command_that_is_not_whole_is_written_again(board):
    board.take()
    board.fill(EXTEND[:20])
    board.crash()
    assert board.status & Status.COMMAND_READY
    assert board.run(EXTEND)[10:] == ONCE


def test_command_that_ran_when_the_chip_was_killed_is_run_once(board):
    board.take()
    board.fill(EXTEND)
    board.go()
    board.crash()
    assert board.status & Status.DATA_AVAIL
    assert board.response()[10:] == ONCE
    assert board.pcr() == ONCE


def test_command_that_was_started_and_did_not_run_is_run_by_the_next_process(board):
    board.take()
    board.fill(EXTEND)
    board.registers.run = dies
    with pytest.raises(Killed):
        board.go()
    board.crash()
    assert board.response()[10:] == ONCE
    assert board.pcr() == ONCE


def dies(_command):
    raise Killed


def test_response_of_a_command_that_changed_nothing_is_made_again(board):
    board.take()
    board.run(EXTEND)
    board.write(Register.STS, [Status.COMMAND_READY])
    board.fill(READ)
    board.go()
    board.crash()
    assert board.response()[10:] == ONCE


def test_response_that_was_taken_does_not_come_again(board):
    board.take()
    board.run(EXTEND)
    board.write(Register.STS, [Status.COMMAND_READY])
    board.crash()
    assert not board.status & Status.DATA_AVAIL
    assert board.run(EXTEND)[10:] == TWICE


def test_response_of_an_aborted_command_is_not_taken_for_another_s(board):
    """It ran to its end after its driver had given it up, and then the chip was killed."""
    board.take()
    board.fill(EXTEND)
    board.go()
    answered = board.tpm.notes["answered"]
    board.write(Register.STS, [Status.COMMAND_READY])
    board.fill(READ)
    board.registers.run = dies
    with pytest.raises(Killed):
        board.go()
    assert board.tpm.notes["answered"] == answered
    board.crash()
    assert board.response()[10:] == ONCE
    assert len(board.response()) == 30


def test_power_off_is_forgotten_by_no_crash(board):
    board.take()
    board.server.power_off()
    board.start()
    assert not board.tpm.is_resumed
    assert board.read(Register.ACCESS) == b"\xff"


def test_without_memory_of_the_registers_the_command_is_lost(tmp_path):
    """The control: what the registers' memory is for."""
    board = Board(tmp_path / "journal")
    board.take()
    board.fill(EXTEND)
    board.registers.run = dies
    board.registers.remember = lambda *_: None
    with pytest.raises(Killed):
        board.go()
    board.crash()
    assert not board.status & Status.DATA_AVAIL


# -- who had a locality, and does not come back ----------------------------------------------------


class Peer:
    """A connection, as far as the server looks at it."""

    def __init__(self, *, is_platform):
        self.peer = TisPeer(name="-", localities=frozenset(range(5)), is_platform=is_platform)

    def interrupt(self, interrupt):
        """Take no interrupts."""


def ask(board, peer, locality):
    request = messages.Write(
        locality=locality, offset=Register.ACCESS, data=bytes([Access.REQUEST_USE])
    )
    board.server.write(request, peer)


@pytest.mark.usefixtures("autojump_clock")
@pytest.mark.parametrize(
    ("is_platform", "comes_back", "is_kept"),
    [(True, False, False), (True, True, True), (False, False, True)],
    ids=["platform", "platform that comes back", "domain"],
)
async def test_locality_of_a_platform_that_died_with_the_chip_is_given_up(
    board, is_platform, comes_back, is_kept
):
    ask(board, Peer(is_platform=is_platform), 0)
    for _ in range(2):  # the chip may be killed again before it could give anything up
        board.crash()
        assert board.server.device.active_locality == 0
    if comes_back:
        ask(board, Peer(is_platform=True), 0)
    await board.server.give_up_what_nobody_comes_back_for()
    kept = 0 if is_kept else None
    assert board.server.device.active_locality == kept
    board.crash()
    assert board.server.device.active_locality == kept
    if not is_kept:  # the platform is no part of this any more
        ask(board, Peer(is_platform=False), 0)
        await board.server.give_up_what_nobody_comes_back_for()
        assert board.server.device.active_locality == 0


@pytest.mark.usefixtures("autojump_clock")
async def test_locality_that_a_domain_has_used_since_is_its_own(board):
    """Who is granted a locality of the platform's may find it active, and need not ask for it."""
    ask(board, Peer(is_platform=True), LOCALITY)
    board.crash()
    manager = Peer(is_platform=False)
    board.server.write(
        messages.Write(locality=LOCALITY, offset=Register.STS, data=bytes([Status.COMMAND_READY])),
        manager,
    )
    board.crash()
    await board.server.give_up_what_nobody_comes_back_for()
    assert board.server.device.active_locality == LOCALITY


# -- the snapshot as bytes -------------------------------------------------------------------------


@pytest.mark.parametrize("state", list(State))
def test_snapshot_is_read_as_it_was_written(state, board):
    board.take()
    if state is State.RECEPTION:
        board.fill(EXTEND[:7])
    if state is State.COMPLETION:
        board.run(READ)
    if state is State.EXECUTION:
        board.fill(EXTEND)
        board.registers.run = dies
        with pytest.raises(Killed):
            board.go()
    if state is State.IDLE:
        board.write(Register.ACCESS, [Access.ACTIVE_LOCALITY])
    board.write(Register.INT_ENABLE, [0x81, 0, 0, 0])
    snapshot = board.server.device.snapshot()
    assert snapshot.state is state
    read = decode_snapshot(encode_snapshot(snapshot))
    assert read == snapshot
    other = TisDevice(board.tpm)
    other.restore(read)
    assert other.snapshot() == snapshot


def test_snapshot_of_another_version_is_refused(board):
    data = encode_snapshot(board.server.device.snapshot())
    for bad in (b"", data[:-1], data + b"\0", b"\x02" + data[1:], data[:3] + b"\x09" + data[4:]):
        with pytest.raises(DecodeError) as caught:
            decode_snapshot(bad)
        assert isinstance(caught.value.code, ReturnCode)
