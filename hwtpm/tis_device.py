"""The chip's side of the TIS: five pages of registers in front of one TPM engine.

Register accesses go in through `TisDevice.read` and `TisDevice.write`, interrupts come out through
`take_interrupts`. There is no time and no I/O in here, and the engine is not run from here either:
a write of tpmGo leaves a `pending_command`, and the caller runs it and hands the response to
`complete`. So an abort or a seize while the engine works discards the response, as on a chip.

Invariants:
- No access raises, whatever its locality, offset, width and data are.
- At most one locality is active; STS and FIFO answer that one only.
- Command and response never hold more than `COMMAND_BYTES_MAX` bytes each.
- burstCount is the same number in every state, so the two bytes of it cannot tear.

Leaves to others: what a command means (the engine behind `TpmPort`), who may use which page and
when the engine runs (`daemons/tis_server.py`), the driver's side (`tis_driver.py`).

Source: TCG PC Client TIS 1.2 rev 1.21 and TIS 1.3; hash sequence: TIS 1.21, locality 4 chapter.

Choices where the specification leaves one:
- commandReady goes to Ready at once from every state (a short cut the TIS permits).
- An access register takes one bit at a time. Of several, seize counts before relinquish before
  requestUse; beenSeized is cleared beside any of them.
- A locality that becomes active finds the TPM Idle; its predecessor's command is aborted first.
- While a hash sequence runs, locality 4's ACCESS and STS take no writes: only HASH_END, or an error
  of the sequence, gives the locality back. HASH_DATA with no active locality is a cycle out of
  sequence, and HASH_END outside a sequence too: both go to the engine, which enters failure mode.
- An access that crosses a 32-bit boundary outside a FIFO is decoded by nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Final, NamedTuple, Protocol

from hwtpm.tis_registers import (
    BURST_COUNT_SHIFT,
    COMMAND_BYTES_MAX,
    DATA_FIFO_END,
    DEVICE_ID,
    INT_EVENTS,
    INT_VECTOR_MASK,
    LOCALITIES,
    NOT_DECODED,
    REGISTER_BYTES,
    REVISION_ID,
    SIZE_KNOWN_BYTES,
    VENDOR_ID,
    XDATA_FIFO_END,
    Access,
    Capability,
    IntEnable,
    IntStatus,
    Register,
    Status,
)
from protocol.constants import Tag
from protocol.return_codes import ReturnCode

BURST_COUNT: Final = 252
"""Bytes a FIFO access may carry: the largest count of whole words that fits the low byte, so that a
driver that reads only 0x19 sees it too."""
HASH_LOCALITY: Final = 4
CAPABILITIES: Final = (
    Capability.DATA_AVAIL_INT
    | Capability.STS_VALID_INT
    | Capability.LOCALITY_CHANGE_INT
    | Capability.COMMAND_READY_INT
    | Capability.LEVEL_LOW
    | Capability.BURST_COUNT_STATIC
    | Capability.TRANSFER_64_BYTES
    | Capability.INTERFACE_1_3
)
_FIFO_OFFSETS: Final = frozenset(
    (*range(Register.DATA_FIFO, DATA_FIFO_END), *range(Register.XDATA_FIFO, XDATA_FIFO_END))
)
_INT_ENABLE_WRITABLE: Final = IntEnable.GLOBAL | INT_EVENTS


class RegisterPort(Protocol):
    """What the registers themselves ask of the engine behind them."""

    def hash_start(self) -> bool:
        """TPM_HASH_START; False: error, locality 4 is released."""
        ...

    def hash_data(self, data: bytes) -> bool:
        """TPM_HASH_DATA with 1 to `BURST_COUNT` bytes; False: error, locality 4 is released."""
        ...

    def hash_end(self) -> bool:
        """TPM_HASH_END; False: error. Locality 4 is released in any case."""
        ...

    @property
    def established(self) -> bool:
        """TPM_PERMANENT_FLAGS.tpmEstablished."""
        ...


class TpmPort(RegisterPort, Protocol):
    """One TPM engine, as far as the chip's front has to know it."""

    def execute(self, request: bytes, locality: int) -> bytes:
        """Run one command and give its response; the device's owner calls it, not the device."""
        ...


# -- commands: the STS state machine ---------------------------------------------------------------


class State(Enum):
    """Where the TPM is with the command of the active locality."""

    IDLE = "Idle"
    READY = "Ready"
    RECEPTION = "Reception"
    EXECUTION = "Execution"
    COMPLETION = "Completion"


class Event(Enum):
    """What can happen to a command."""

    COMMAND_READY = "commandReady written"
    FIFO_WRITE = "byte written to the FIFO"
    TPM_GO = "tpmGo written"
    DONE = "the engine has answered"
    RESPONSE_RETRY = "responseRetry written"
    FIFO_READ = "byte read from the FIFO"
    LOCALITY_LOST = "relinquished, seized, or a hash sequence starts"


TRANSITIONS: Final[Mapping[tuple[State, Event], State]] = MappingProxyType(
    {
        (State.IDLE, Event.COMMAND_READY): State.READY,
        (State.READY, Event.COMMAND_READY): State.READY,
        (State.RECEPTION, Event.COMMAND_READY): State.READY,  # abort
        (State.EXECUTION, Event.COMMAND_READY): State.READY,  # abort
        (State.COMPLETION, Event.COMMAND_READY): State.READY,  # done with the response
        (State.READY, Event.FIFO_WRITE): State.RECEPTION,
        (State.RECEPTION, Event.FIFO_WRITE): State.RECEPTION,  # dropped when Expect is 0
        (State.RECEPTION, Event.TPM_GO): State.EXECUTION,  # only when Expect is 0
        (State.EXECUTION, Event.DONE): State.COMPLETION,
        (State.COMPLETION, Event.RESPONSE_RETRY): State.COMPLETION,
        (State.COMPLETION, Event.FIFO_READ): State.COMPLETION,
    }
    | {(state, Event.LOCALITY_LOST): State.IDLE for state in State}
)
"""What is not in the table is ignored: writes are dropped, reads give 0xFF."""

_STATUS: Final[Mapping[State, int]] = MappingProxyType(
    {
        State.IDLE: 0,
        State.READY: Status.COMMAND_READY,
        State.RECEPTION: Status.STS_VALID,  # and EXPECT until the last byte
        State.EXECUTION: Status.STS_VALID,
        State.COMPLETION: Status.STS_VALID,  # and DATA_AVAIL until the last byte
    }
)
_WRITTEN: Final[Mapping[int, Event]] = MappingProxyType(
    {
        int(Status.COMMAND_READY): Event.COMMAND_READY,
        int(Status.TPM_GO): Event.TPM_GO,
        int(Status.RESPONSE_RETRY): Event.RESPONSE_RETRY,
    }
)
"""A write of STS with more than one of these bits does nothing."""
_WRITABLE: Final = sum(_WRITTEN)


@dataclass(frozen=True, slots=True)
class PendingCommand:
    """A command the engine has to run.

    Attributes:
        serial: Counts executions; tells a response that comes too late from a current one.
        locality: Where the command was written.
        request: The bytes, 6 to `COMMAND_BYTES_MAX`.
    """

    serial: int
    locality: int
    request: bytes


class _CommandFlow:
    """The FIFO and the states around it. Methods give the interrupt events they caused."""

    def __init__(self) -> None:
        self.state = State.IDLE
        self.command = bytearray()
        self.response = b""
        self.response_at = 0
        self.pending: PendingCommand | None = None
        self.serial = 0

    @property
    def expects_more(self) -> bool:
        """Expect: whether the command in the FIFO lacks bytes."""
        return len(self.command) < _bytes_wanted(self.command)

    @property
    def status(self) -> int:
        """The status byte."""
        status: int = _STATUS[self.state]
        if self.state is State.RECEPTION and self.expects_more:
            status |= Status.EXPECT
        elif self.state is State.COMPLETION and self.response_at < len(self.response):
            status |= Status.DATA_AVAIL
        return status

    def write_status(self, value: int, locality: int) -> int:
        """A write of the status byte."""
        event = _WRITTEN.get(value & _WRITABLE)
        if event is Event.COMMAND_READY:
            return self.command_ready()
        if event is Event.TPM_GO:
            return self.go(locality)
        if event is Event.RESPONSE_RETRY:
            return self.response_retry()
        return 0

    def command_ready(self) -> int:
        """Ready for a new command; what was there before is aborted."""
        was_ready = self.state is State.READY
        self._clear(Event.COMMAND_READY)
        return 0 if was_ready else IntStatus.COMMAND_READY

    def lose_locality(self) -> None:
        """Abort and wait for the next locality."""
        self._clear(Event.LOCALITY_LOST)

    def fifo_write(self, data: bytes) -> int:
        """Keep the bytes the command still lacks; drop the rest."""
        was_ready = self.state is State.READY
        if not self._step(Event.FIFO_WRITE):
            return 0
        header_bytes = max(0, SIZE_KNOWN_BYTES - len(self.command))
        self.command += data[:header_bytes]
        lacking = max(0, _bytes_wanted(self.command) - len(self.command))
        self.command += data[header_bytes : header_bytes + lacking]
        return IntStatus.STS_VALID if was_ready else 0

    def go(self, locality: int) -> int:
        """Start execution of a complete command."""
        if self.expects_more or not self._step(Event.TPM_GO):
            return 0
        self.serial += 1
        self.pending = PendingCommand(self.serial, locality, bytes(self.command))
        if _declared_bytes(self.command) > COMMAND_BYTES_MAX:
            # The engine would get a packet without its end, so it is not asked.
            return self.done(self.serial, _error(ReturnCode.BAD_PARAM_SIZE))
        return 0

    def done(self, serial: int, response: bytes) -> int:
        """Offer a response, unless its command was aborted."""
        if self.pending is None or self.pending.serial != serial:
            return 0
        if len(response) > COMMAND_BYTES_MAX:
            response = _error(ReturnCode.SIZE)
        self._step(Event.DONE)
        self.pending = None
        self.response, self.response_at = response, 0
        return IntStatus.DATA_AVAIL | IntStatus.STS_VALID

    def response_retry(self) -> int:
        """Back to the first byte of the response."""
        had_data = bool(self.status & Status.DATA_AVAIL)
        if not self._step(Event.RESPONSE_RETRY):
            return 0
        self.response_at = 0
        return 0 if had_data else IntStatus.DATA_AVAIL

    def fifo_read(self, count: int) -> bytes:
        """The next bytes of the response; 0xFF where there are none."""
        if not self._step(Event.FIFO_READ):
            return _not_decoded(count)
        data = self.response[self.response_at : self.response_at + count]
        self.response_at += len(data)
        return data.ljust(count, bytes([NOT_DECODED]))

    def _step(self, event: Event) -> bool:
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            return False
        self.state = state
        return True

    def _clear(self, event: Event) -> None:
        self._step(event)
        self.command.clear()
        self.response, self.response_at = b"", 0
        self.pending = None


def _declared_bytes(command: bytes | bytearray) -> int:
    return int.from_bytes(command[2:SIZE_KNOWN_BYTES], "big")


def _bytes_wanted(command: bytes | bytearray) -> int:
    """How many bytes the FIFO takes; past the limit Expect is 0 although more were announced."""
    if len(command) < SIZE_KNOWN_BYTES:
        return SIZE_KNOWN_BYTES
    return min(_declared_bytes(command), COMMAND_BYTES_MAX)


def _error(code: ReturnCode) -> bytes:
    """A TPM response that is nothing but an error."""
    return Tag.RSP_COMMAND.to_bytes(2, "big") + b"\0\0\0\x0a" + code.to_bytes(4, "big")


def _not_decoded(count: int) -> bytes:
    return bytes([NOT_DECODED]) * count


# -- localities: the ACCESS registers --------------------------------------------------------------


class _Arbitration:
    """Who is active, who waits, who was seized."""

    def __init__(self) -> None:
        self.active: int | None = None
        self.requested = [False] * LOCALITIES
        self.been_seized = [False] * LOCALITIES

    def access(self, locality: int) -> int:
        """ACCESS of one page, but for tpmEstablishment."""
        value: int = Access.TPM_REG_VALID_STS
        if self.active == locality:
            value |= Access.ACTIVE_LOCALITY
        if self.been_seized[locality]:
            value |= Access.BEEN_SEIZED
        if self.requested[locality]:
            value |= Access.REQUEST_USE
        if any(self.requested[:locality]) or any(self.requested[locality + 1 :]):
            value |= Access.PENDING_REQUEST
        return value

    def write(self, locality: int, value: int) -> None:
        """A write of ACCESS.

        A seize takes effect in the same access, so none is ever pending for another to outrank.
        """
        if value & Access.BEEN_SEIZED:
            self.been_seized[locality] = False
        if value & Access.SEIZE:
            self._seize(locality)
        elif value & Access.ACTIVE_LOCALITY:
            self._relinquish(locality)
        elif value & Access.REQUEST_USE:
            self._request(locality)

    def grant(self, locality: int) -> None:
        """Make a locality the active one."""
        self.active = locality
        self.requested[locality] = False

    def release(self) -> None:
        """Nobody is active, or the highest locality that waits."""
        self.active = None
        for locality in reversed(range(LOCALITIES)):
            if self.requested[locality]:
                self.grant(locality)
                return

    def _relinquish(self, locality: int) -> None:
        if self.active == locality:
            self.release()
        else:
            self.requested[locality] = False

    def _request(self, locality: int) -> None:
        if self.active is None:
            self.grant(locality)
        elif self.active != locality:
            self.requested[locality] = True

    def _seize(self, locality: int) -> None:
        if self.active is not None:
            if locality <= self.active:
                return
            self.been_seized[self.active] = True
        self.grant(locality)


# -- interrupts ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Interrupt:
    """An interrupt for the driver that holds `locality`."""

    locality: int
    status: int
    """The new bits of INT_STATUS (`IntStatus`)."""
    vector: int


class _Interrupts:
    """INT_ENABLE, INT_VECTOR and INT_STATUS of each page, and what was raised since last asked."""

    def __init__(self) -> None:
        self.enable = [int(IntEnable.POLARITY_LOW_LEVEL)] * LOCALITIES
        self.status = [0] * LOCALITIES
        self.vector = [0] * LOCALITIES
        self.raised = [0] * LOCALITIES

    def write_enable(self, locality: int, skip: int, data: bytes) -> None:
        value = bytearray(self.enable[locality].to_bytes(REGISTER_BYTES, "little"))
        value[skip : skip + len(data)] = data
        writable = int.from_bytes(value, "little") & _INT_ENABLE_WRITABLE
        self.enable[locality] = writable | IntEnable.POLARITY_LOW_LEVEL

    def write_status(self, locality: int, skip: int, data: bytes) -> None:
        if skip == 0:
            self.status[locality] &= ~data[0]

    def write_vector(self, locality: int, skip: int, data: bytes) -> None:
        if skip == 0:
            self.vector[locality] = data[0] & INT_VECTOR_MASK

    def raise_(self, locality: int, events: int) -> None:
        """Note events of the active locality, as far as it has enabled them."""
        if self.enable[locality] & IntEnable.GLOBAL:
            events &= self.enable[locality]
            self.status[locality] |= events
            self.raised[locality] |= events

    def take(self) -> list[Interrupt]:
        interrupts = [
            Interrupt(locality, events, self.vector[locality])
            for locality, events in enumerate(self.raised)
            if events
        ]
        if interrupts:
            self.raised = [0] * LOCALITIES
        return interrupts


# -- the device ------------------------------------------------------------------------------------


class TisSnapshot(NamedTuple):
    """Everything the registers and buffers hold; the engine's own state is not part of it."""

    is_powered: bool
    is_hashing: bool
    state: State
    command: bytes
    response: bytes
    response_at: int
    pending: PendingCommand | None
    serial: int
    active: int | None
    requested: tuple[bool, ...]
    been_seized: tuple[bool, ...]
    int_enable: tuple[int, ...]
    int_status: tuple[int, ...]
    int_vector: tuple[int, ...]
    int_raised: tuple[int, ...]


class TisDevice:
    """The register file of one TPM.

    It is made without power: every byte reads 0xFF and every write is lost until `power_on`.

    Args:
        port: The engine; asked for tpmEstablished, and given the hash sequence of locality 4.
        burst_count: Bytes a FIFO access may carry, 1 to 255 (see `BURST_COUNT`).
    """

    def __init__(self, port: RegisterPort, *, burst_count: int = BURST_COUNT) -> None:
        if not 1 <= burst_count <= 255:
            raise ValueError(f"burst_count {burst_count} does not fit one byte")
        self.burst_count = burst_count
        self._port = port
        self._is_powered = False
        self._reset(serial=0)
        self._readers: dict[int, Callable[[int], int]] = {
            Register.ACCESS: self._read_access,
            Register.INT_ENABLE: lambda locality: self._interrupts.enable[locality],
            Register.INT_VECTOR: lambda locality: self._interrupts.vector[locality],
            Register.INT_STATUS: lambda locality: self._interrupts.status[locality],
            Register.INTF_CAPABILITY: lambda _locality: int(CAPABILITIES),
            Register.STS: self._read_status,
            Register.DID_VID: lambda _locality: DEVICE_ID << 16 | VENDOR_ID,
            Register.RID: lambda _locality: REVISION_ID,
        }
        self._writers: dict[int, Callable[[int, int, bytes], None]] = {
            Register.ACCESS: self._write_access,
            Register.INT_ENABLE: self._write_interrupts,
            Register.INT_VECTOR: self._write_interrupts,
            Register.INT_STATUS: self._write_interrupts,
            Register.STS: self._write_status,
            Register.HASH_END: self._write_hash_end,
            Register.HASH_START: self._write_hash_start,
        }

    # power

    @property
    def is_powered(self) -> bool:
        """Whether anything answers at the registers."""
        return self._is_powered

    def power_on(self) -> None:
        """Power or reset signal: all registers take their reset values, a command is forgotten."""
        self._is_powered = True
        self._reset(self._flow.serial)

    def power_off(self) -> None:
        """From now on every byte reads 0xFF; a command that runs is aborted."""
        self._is_powered = False
        self._reset(self._flow.serial)

    # accesses

    def access_bytes_max(self, offset: int) -> int:
        """How many bytes one access at `offset` may carry; the rest of a longer one is lost."""
        return self.burst_count if offset in _FIFO_OFFSETS else REGISTER_BYTES

    def read(self, locality: int, offset: int, count: int = 1) -> bytes:
        """Read register bytes.

        Args:
            locality: 0 to 4, the page.
            offset: 0 to 0xFFF, in the page.
            count: Bytes: 1, 2 or 4 for a register, up to `burst_count` for a FIFO.

        Returns:
            `count` bytes, but never more than an access may carry; little endian; 0xFF where
            nothing answers.
        """
        count = max(0, min(count, self.access_bytes_max(offset)))
        if not self._is_powered or not 0 <= locality < LOCALITIES:
            return _not_decoded(count)
        if offset in _FIFO_OFFSETS:
            if locality != self._localities.active:
                return _not_decoded(count)
            return self._flow.fifo_read(count)
        skip = offset & 3
        reader = self._readers.get(offset - skip)
        if reader is None or skip + count > REGISTER_BYTES:
            return _not_decoded(count)
        return reader(locality).to_bytes(REGISTER_BYTES, "little")[skip : skip + count]

    def write(self, locality: int, offset: int, data: bytes) -> None:
        """Write register bytes; arguments as for `read`. What nothing takes is lost."""
        if not data or not self._is_powered or not 0 <= locality < LOCALITIES:
            return
        if offset in _FIFO_OFFSETS:
            self._write_fifo(locality, data[: self.burst_count])
            return
        skip = offset & 3
        writer = self._writers.get(offset - skip)
        if writer is not None and skip + len(data) <= REGISTER_BYTES:
            writer(locality, offset, data)

    def give_up(self, locality: int) -> None:
        """Do at a page what its driver does before it goes: end, relinquish, wait no longer."""
        if not self._is_powered:
            return
        if self._is_held_by_hashing(locality):
            self._write_hash_end(locality, Register.HASH_END, b"")
        self._write_access(locality, Register.ACCESS, bytes([Access.ACTIVE_LOCALITY]))

    @property
    def active_locality(self) -> int | None:
        """The locality that STS and FIFO answer."""
        return self._localities.active

    @property
    def state(self) -> State:
        """Where the command of the active locality is."""
        return self._flow.state

    @property
    def pending_command(self) -> PendingCommand | None:
        """The command the caller has to run now."""
        return self._flow.pending

    def complete(self, command: PendingCommand, response: bytes) -> bool:
        """Hand in the response of a command that was pending.

        Args:
            command: What `pending_command` gave.
            response: At most `COMMAND_BYTES_MAX` bytes; a longer one becomes TPM_SIZE.

        Returns:
            False if the command was aborted meanwhile; the response is discarded then.
        """
        events = self._flow.done(command.serial, response)
        self._raise(events)
        return events != 0

    def take_interrupts(self) -> list[Interrupt]:
        """The interrupts since the last call; at most one for each locality."""
        return self._interrupts.take()

    # what survives a crash of the process

    def snapshot(self) -> TisSnapshot:
        """Everything the registers and buffers hold."""
        flow, localities, interrupts = self._flow, self._localities, self._interrupts
        return TisSnapshot(
            is_powered=self._is_powered,
            is_hashing=self._is_hashing,
            state=flow.state,
            command=bytes(flow.command),
            response=flow.response,
            response_at=flow.response_at,
            pending=flow.pending,
            serial=flow.serial,
            active=localities.active,
            requested=tuple(localities.requested),
            been_seized=tuple(localities.been_seized),
            int_enable=tuple(interrupts.enable),
            int_status=tuple(interrupts.status),
            int_vector=tuple(interrupts.vector),
            int_raised=tuple(interrupts.raised),
        )

    def restore(self, snapshot: TisSnapshot) -> None:
        """Become the device that `snapshot` was taken of; a pending command is pending again."""
        flow, localities, interrupts = _CommandFlow(), _Arbitration(), _Interrupts()
        flow.state = snapshot.state
        flow.command = bytearray(snapshot.command)
        flow.response, flow.response_at = snapshot.response, snapshot.response_at
        flow.pending, flow.serial = snapshot.pending, snapshot.serial
        localities.active = snapshot.active
        localities.requested = list(snapshot.requested)
        localities.been_seized = list(snapshot.been_seized)
        interrupts.enable = list(snapshot.int_enable)
        interrupts.status = list(snapshot.int_status)
        interrupts.vector = list(snapshot.int_vector)
        interrupts.raised = list(snapshot.int_raised)
        self._flow, self._localities, self._interrupts = flow, localities, interrupts
        self._is_powered, self._is_hashing = snapshot.is_powered, snapshot.is_hashing

    # registers

    def _reset(self, serial: int) -> None:
        """Take all reset values; `serial` goes on, so that no late response fits a new command."""
        self._flow = _CommandFlow()
        self._flow.serial = serial
        self._localities = _Arbitration()
        self._interrupts = _Interrupts()
        self._is_hashing = False

    def _read_access(self, locality: int) -> int:
        value = self._localities.access(locality)
        return value if self._port.established else value | Access.TPM_ESTABLISHMENT

    def _read_status(self, locality: int) -> int:
        if locality != self._localities.active:
            return 0xFFFF_FFFF
        return self._flow.status | self.burst_count << BURST_COUNT_SHIFT

    def _write_access(self, locality: int, offset: int, data: bytes) -> None:
        if offset == Register.ACCESS and not self._is_held_by_hashing(locality):
            before = self._localities.active
            self._localities.write(locality, data[0])
            self._after_arbitration(before)

    def _write_status(self, locality: int, offset: int, data: bytes) -> None:
        if offset != Register.STS or locality != self._localities.active:
            return
        if not self._is_held_by_hashing(locality):
            self._raise(self._flow.write_status(data[0], locality))

    def _write_interrupts(self, locality: int, offset: int, data: bytes) -> None:
        if locality != self._localities.active:
            return
        skip = offset & 3
        if offset - skip == Register.INT_ENABLE:
            self._interrupts.write_enable(locality, skip, data)
        elif offset - skip == Register.INT_VECTOR:
            self._interrupts.write_vector(locality, skip, data)
        else:
            self._interrupts.write_status(locality, skip, data)

    def _write_fifo(self, locality: int, data: bytes) -> None:
        active = self._localities.active
        is_hash_cycle = self._is_hashing or active is None
        if locality == HASH_LOCALITY and is_hash_cycle:
            if not self._port.hash_data(data):
                self._end_hashing()
        elif locality == active:
            self._raise(self._flow.fifo_write(data))

    # the hash sequence of locality 4

    def _write_hash_start(self, locality: int, offset: int, _data: bytes) -> None:
        if offset != Register.HASH_START or not self._may_hash(locality):
            return
        before = self._localities.active
        self._flow.lose_locality()
        self._localities.grant(HASH_LOCALITY)
        self._after_arbitration(before)
        self._is_hashing = self._port.hash_start()
        if not self._is_hashing:
            self._end_hashing()

    def _write_hash_end(self, locality: int, offset: int, _data: bytes) -> None:
        if offset == Register.HASH_END and self._may_hash(locality):
            self._port.hash_end()
            self._end_hashing()

    def _may_hash(self, locality: int) -> bool:
        return locality == HASH_LOCALITY and self._localities.active in {None, HASH_LOCALITY}

    def _is_held_by_hashing(self, locality: int) -> bool:
        return self._is_hashing and locality == HASH_LOCALITY

    def _end_hashing(self) -> None:
        self._is_hashing = False
        before = self._localities.active
        self._localities.release()
        self._after_arbitration(before)

    # what follows from an access

    def _after_arbitration(self, before: int | None) -> None:
        if self._localities.active != before:
            self._flow.lose_locality()
            self._raise(IntStatus.LOCALITY_CHANGE)

    def _raise(self, events: int) -> None:
        if events and self._localities.active is not None:
            self._interrupts.raise_(self._localities.active, events)
