"""The driver's side of the TIS: commands in, register accesses out, as mini-os' tpm_tis does it.

Every operation is a generator. It yields a `Step`, and whoever runs it sends back the answer:

    Read             the bytes read
    Write            None
    Pause            monotonic seconds after sleeping `interval_s` (0: just the time)
    WaitInterrupt    monotonic seconds after an interrupt, or after `limit_s` without one

So the driver has no clock and no I/O; `daemons/tis_link.py` runs it over a socket, tests run it
against a `TisDevice` in memory.

A command goes through `start`, `collect` and `finish`; `execute` is the first two, `transmit` all.
Until `finish` the response stays in the chip, so a caller that keeps the response somewhere safe
between `collect` and `finish` can lose its process or its connection at any instant and learn by
`resume` what became of the command: it did not run, or here is its response.

Leaves to others: what commands mean, TPM_Startup (the firmware's business), reconnecting.

Source: TCG PC Client TIS 1.2 rev 1.21, and 1.3 for the 32-bit STS; timeouts A to D and duration
classes: TPM Main r116 Part 2 §17 and the TIS' timeout table.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import Enum
from typing import Final, TypeAlias, TypeVar

from hwtpm.tis_registers import (
    BURST_COUNT_SHIFT,
    COMMAND_BYTES_MAX,
    HEADER_BYTES,
    INT_EVENTS,
    LOCALITIES,
    NOT_DECODED,
    Access,
    Capability,
    IntEnable,
    Register,
    Status,
)
from protocol.constants import Ordinal, Tag
from protocol.tis_messages import ACCESS_BYTES_MAX, Read, Write

T = TypeVar("T")

POLL_INTERVAL_S: Final = 0.005
INTERRUPT_WAIT_S: Final = 1.0
"""Longest wait for one interrupt before the register is looked at: a lost one costs no more."""
INTERRUPT_VECTOR: Final = 10
"""The SIRQ channel asked for; on a socket any number does."""
UNKNOWN_DURATION_S: Final = 120.0
"""For ordinals of no known class, and for all of them until the chip has told its durations."""
HASH_LOCALITY: Final = 4

_ABSENT: Final = 0xFF
"""No ACCESS and no status byte reads so: both have bits that read 0."""
_CAP_PROPERTY: Final = 0x05
_CAP_PROP_TIS_TIMEOUT: Final = 0x115
_CAP_PROP_DURATION: Final = 0x120


@dataclass(frozen=True, slots=True)
class Pause:
    """Let `interval_s` pass."""

    interval_s: float


@dataclass(frozen=True, slots=True)
class WaitInterrupt:
    """Wait for an interrupt of the driver's locality, at most `limit_s`."""

    limit_s: float


Step: TypeAlias = Read | Write | Pause | WaitInterrupt
StepAnswer: TypeAlias = bytes | float | None
Steps: TypeAlias = Generator[Step, StepAnswer, T]


class TisFault(Enum):
    """What went wrong between driver and chip."""

    TIMEOUT_A = "timeout A: the locality was not granted"
    TIMEOUT_B = "timeout B: the chip did not become ready"
    TIMEOUT_C = "timeout C: the FIFO did not become valid"
    TIMEOUT_D = "timeout D: burstCount stayed 0"
    TIMEOUT_DURATION = "the command ran longer than its ordinal may"
    SEIZED = "a higher locality seized the TPM"
    ABORTED = "the command was aborted"
    ABSENT = "no chip answers at the registers"
    PROTOCOL = "the chip does not keep to the TIS"
    TOO_LONG = "the command does not fit the chip's buffer"
    HASH_REFUSED = "the chip did not accept the hash sequence"


class TisError(Exception):
    """An operation failed.

    Attributes:
        fault: What kind of failure.
        locality: The driver's locality.
        detail: What was seen.
    """

    def __init__(self, fault: TisFault, locality: int, detail: str) -> None:
        super().__init__(fault, locality, detail)
        self.fault = fault
        self.locality = locality
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.fault.value} (locality {self.locality}: {self.detail})"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipIdentity:
    """What the identification registers say."""

    vendor_id: int
    device_id: int
    revision_id: int
    capabilities: int
    """`Capability` bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long the driver waits for what, seconds.

    Attributes:
        a_s: Changes of ACCESS.
        b_s: commandReady.
        c_s: stsValid, Expect and dataAvail while the FIFO is used.
        d_s: burstCount.
        short_s: Commands that use no RSA private key.
        medium_s: Commands that use one.
        long_s: Commands that make one.
    """

    a_s: float = 0.75
    b_s: float = 2.0
    c_s: float = 0.75
    d_s: float = 0.75
    short_s: float = UNKNOWN_DURATION_S
    medium_s: float = UNKNOWN_DURATION_S
    long_s: float = UNKNOWN_DURATION_S

    def duration_s(self, request: bytes) -> float:
        """The longest time a request may take."""
        try:
            ordinal = Ordinal(int.from_bytes(request[6:HEADER_BYTES], "big"))
        except ValueError:
            return UNKNOWN_DURATION_S
        if ordinal in LONG_ORDINALS:
            return self.long_s
        return self.medium_s if ordinal in MEDIUM_ORDINALS else self.short_s


LONG_ORDINALS: Final = frozenset(
    {
        Ordinal.TAKE_OWNERSHIP,
        Ordinal.CHANGE_AUTH_ASYM_START,
        Ordinal.CMK_CREATE_KEY,
        Ordinal.CREATE_WRAP_KEY,
        Ordinal.DAA_JOIN,
        Ordinal.DAA_SIGN,
        Ordinal.SELF_TEST_FULL,
        Ordinal.CONTINUE_SELF_TEST,
        Ordinal.CREATE_ENDORSEMENT_KEY_PAIR,
        Ordinal.MAKE_IDENTITY,
        Ordinal.CREATE_REVOCABLE_EK,
        Ordinal.FIELD_UPGRADE,
        Ordinal.EXECUTE_TRANSPORT,
    }
)
MEDIUM_ORDINALS: Final = frozenset(
    {
        Ordinal.CHANGE_AUTH,
        Ordinal.CHANGE_AUTH_ASYM_FINISH,
        Ordinal.CMK_CREATE_TICKET,
        Ordinal.QUOTE,
        Ordinal.SEAL,
        Ordinal.UNSEAL,
        Ordinal.CMK_CREATE_BLOB,
        Ordinal.UN_BIND,
        Ordinal.LOAD_KEY,
        Ordinal.CMK_CONVERT_MIGRATION,
        Ordinal.MIGRATE_KEY,
        Ordinal.CREATE_MIGRATION_BLOB,
        Ordinal.CONVERT_MIGRATION_BLOB,
        Ordinal.CERTIFY_KEY,
        Ordinal.CERTIFY_KEY2,
        Ordinal.SIGN,
        Ordinal.SEALX,
        Ordinal.QUOTE2,
        Ordinal.LOAD_KEY2,
        Ordinal.CERTIFY_SELF_TEST,
        Ordinal.GET_CAPABILITY_SIGNED,
        Ordinal.ACTIVATE_IDENTITY,
        Ordinal.GET_AUDIT_EVENT_SIGNED,
        Ordinal.GET_AUDIT_DIGEST_SIGNED,
        Ordinal.INIT,
        Ordinal.SAVE_STATE,
        Ordinal.SAVE_KEY_CONTEXT,
        Ordinal.SAVE_AUTH_CONTEXT,
        Ordinal.LOAD_AUTH_CONTEXT,
        Ordinal.SAVE_CONTEXT,
        Ordinal.LOAD_CONTEXT,
        Ordinal.DELEGATE_MANAGE,
        Ordinal.DELEGATE_CREATE_KEY_DELEGATION,
        Ordinal.DELEGATE_CREATE_OWNER_DELEGATION,
        Ordinal.DELEGATE_VERIFY_DELEGATION,
        Ordinal.DELEGATE_LOAD_OWNER_DELEGATION,
        Ordinal.RELEASE_TRANSPORT_SIGNED,
        Ordinal.TICK_STAMP_BLOB,
    }
)


class TisDriver:
    """Drives the chip from one locality.

    Args:
        locality: 0 to 4, the page to use.
        timing: The waits; `learn_timing` replaces them by the chip's own.
        use_interrupts: Wait for interrupts where the chip offers them; False: poll.
    """

    def __init__(
        self, locality: int, *, timing: Timing | None = None, use_interrupts: bool = True
    ) -> None:
        if not 0 <= locality < LOCALITIES:
            raise ValueError(f"there is no locality {locality}")
        self.locality = locality
        self.timing = timing or Timing()
        self._use_interrupts = use_interrupts
        self._has_interrupts = False
        self._is_burst_static = False
        self._burst_count = 0

    # -- whole operations

    def initialize(self) -> Steps[ChipIdentity]:
        """Take the locality, identify the chip and switch its interrupts on.

        Raises:
            TisError: ABSENT, TIMEOUT_A.
        """
        self._has_interrupts = self._is_burst_static = False
        yield from self.request_locality()
        did_vid = yield from self._read_int(Register.DID_VID, 4)
        revision_id = yield from self._read_int(Register.RID, 1)
        capabilities = yield from self._learn_capabilities()
        needed = Capability.DATA_AVAIL_INT | Capability.LOCALITY_CHANGE_INT
        if self._use_interrupts and capabilities & needed == needed:
            yield from self._enable_interrupts()
        return ChipIdentity(
            vendor_id=did_vid & 0xFFFF,
            device_id=did_vid >> 16,
            revision_id=revision_id,
            capabilities=capabilities,
        )

    def learn_timing(self) -> Steps[Timing]:
        """Ask a started TPM for its timeouts and durations, and use them.

        A chip that refuses (not started, failed self-test) leaves the waits as they are. Values
        that can only be milliseconds are taken as such, and no timeout goes below its default:
        chips are known that report less than they take.

        Raises:
            TisError: As `transmit`.
        """
        timeouts = yield from self._property(_CAP_PROP_TIS_TIMEOUT, 4)
        durations = yield from self._property(_CAP_PROP_DURATION, 3)
        a_s, b_s, c_s, d_s = self.timing.a_s, self.timing.b_s, self.timing.c_s, self.timing.d_s
        if timeouts:
            per_s = 1_000 if timeouts[0] < 1_000 else 1_000_000
            least = Timing()
            a_s, b_s = max(timeouts[0] / per_s, least.a_s), max(timeouts[1] / per_s, least.b_s)
            c_s, d_s = max(timeouts[2] / per_s, least.c_s), max(timeouts[3] / per_s, least.d_s)
        short_s, medium_s, long_s = self.timing.short_s, self.timing.medium_s, self.timing.long_s
        if durations:
            is_ms = durations[0] < 10_000
            per_s = 1_000 if is_ms else 1_000_000
            short_s = 1.0 if is_ms else durations[0] / per_s
            medium_s, long_s = durations[1] / per_s, durations[2] / per_s
        self.timing = Timing(
            a_s=a_s,
            b_s=b_s,
            c_s=c_s,
            d_s=d_s,
            short_s=short_s,
            medium_s=medium_s,
            long_s=long_s,
        )
        return self.timing

    def transmit(self, request: bytes) -> Steps[bytes]:
        """Run one command.

        Args:
            request: 10 to `COMMAND_BYTES_MAX` bytes.

        Raises:
            TisError: Any fault. The chip was told to abort, where it could be told.
        """
        response = yield from self.execute(request)
        yield from self.finish()
        return response

    def execute(self, request: bytes) -> Steps[bytes]:
        """Run one command and leave its response in the chip until `finish`; else as `transmit`."""
        try:
            yield from self.start(request)
            return (yield from self.collect(request))
        except TisError as error:
            if error.fault not in {TisFault.SEIZED, TisFault.ABSENT, TisFault.TOO_LONG}:
                yield from self.abort()
            raise

    def abort(self) -> Steps[None]:
        """Let the chip forget the command, wherever it is with it."""
        yield from self._write(Register.STS, Status.COMMAND_READY)

    def start(self, request: bytes) -> Steps[None]:
        """Write a command into the FIFO and say go.

        Raises:
            TisError: TOO_LONG, ABSENT, SEIZED, TIMEOUT_A to D, PROTOCOL.
        """
        self._check_size(request)
        yield from self.make_ready()
        yield from self.send(request)

    def _check_size(self, request: bytes) -> None:
        if not HEADER_BYTES <= len(request) <= COMMAND_BYTES_MAX:
            raise self._error(TisFault.TOO_LONG, f"{len(request)} bytes")

    def make_ready(self) -> Steps[None]:
        """Have the chip wait for a command.

        A write is posted: that the chip has forgotten an older response is certain only when it is
        seen to be ready. Whoever wants to `resume` a command must not count it as begun before.

        Raises:
            TisError: ABSENT, SEIZED, TIMEOUT_A or B.
        """
        status = yield from self._status(may_request=True)
        if not status & Status.COMMAND_READY:
            yield from self._write(Register.STS, Status.COMMAND_READY)
            yield from self._wait_for(Status.COMMAND_READY, self.timing.b_s, TisFault.TIMEOUT_B)

    def send(self, request: bytes) -> Steps[None]:
        """Write a command into the FIFO of a chip that is ready, and say go.

        Raises:
            TisError: As `start`.
        """
        self._check_size(request)
        # What fits into one burst is taken whole or not at all, so one look at Expect is enough.
        at = 0 if len(request) <= (yield from self._burst()) else len(request) - 1
        if at:
            yield from self._fill_fifo(request[:at])
            if not (yield from self._valid_status()) & Status.EXPECT:
                raise self._error(TisFault.PROTOCOL, "Expect fell before the last byte")
        yield from self._write(Register.DATA_FIFO, request[at:])
        if (yield from self._valid_status()) & Status.EXPECT:
            raise self._error(TisFault.PROTOCOL, "Expect stayed after the last byte")
        yield from self._write(Register.STS, Status.TPM_GO)

    def collect(self, request: bytes) -> Steps[bytes]:
        """Wait for the response of a started command and read it; it stays in the chip.

        Args:
            request: The started command; its ordinal says how long to wait.

        Raises:
            TisError: TIMEOUT_DURATION, ABORTED, SEIZED, ABSENT, TIMEOUT_C or D, PROTOCOL.
        """
        yield from self._wait_for(
            Status.STS_VALID | Status.DATA_AVAIL,
            self.timing.duration_s(request),
            TisFault.TIMEOUT_DURATION,
            by_interrupt=True,
        )
        # Past the last byte a read gives 0xFF, so a short response takes one access.
        data = first = yield from self._read(Register.DATA_FIFO, (yield from self._burst()))
        if len(data) < HEADER_BYTES:
            data += yield from self._drain_fifo(HEADER_BYTES - len(data), is_whole_burst=True)
        size = int.from_bytes(data[2:6], "big")
        if not HEADER_BYTES <= size <= COMMAND_BYTES_MAX:
            yield from self._valid_status()  # who was seized reads 0xFF too, and is told so here
            raise self._error(TisFault.PROTOCOL, f"a response that claims {size} bytes")
        rest = first[size:]
        if rest and rest.count(NOT_DECODED) == len(rest):
            return first[:size]  # all of it in one access, and nothing behind it
        # What came in several may have been cut by a seizure: the status tells that too.
        data += yield from self._drain_fifo(size - len(data))
        if (yield from self._valid_status()) & Status.DATA_AVAIL:
            raise self._error(TisFault.PROTOCOL, "data left after the response's last byte")
        return data[:size]

    def finish(self, *, gives_way: bool = True) -> Steps[None]:
        """Let the chip forget the response.

        Args:
            gives_way: Then give the locality to whoever waits for it.
        """
        yield from self._write(Register.STS, Status.COMMAND_READY)
        if not gives_way:
            return
        access = yield from self._access()
        waited_for = Access.TPM_REG_VALID_STS | Access.PENDING_REQUEST
        if access & waited_for == waited_for:
            yield from self.relinquish()

    def resume(self, request: bytes) -> Steps[bytes | None]:
        """Learn what became of a command after the driver or its connection was lost.

        Args:
            request: The command that was outstanding: the chip was seen to be ready for it, and
                `finish` was not begun.

        Returns:
            Its response, which stays in the chip until `finish`; None if it did not run.

        Raises:
            TisError: SEIZED: it may or may not have run. Else as `collect`.
        """
        access = yield from self._access()
        if not access & Access.ACTIVE_LOCALITY:
            if access & Access.BEEN_SEIZED:
                raise self._error(TisFault.SEIZED, f"ACCESS 0x{access:02x}")
            return None
        status = yield from self._status()
        if not status & Status.STS_VALID or status & (Status.EXPECT | Status.COMMAND_READY):
            return None
        # Reception of a whole command, Execution and Completion are left. The two writes tell them
        # apart without harm: each is ignored where it does not belong.
        yield from self._write(Register.STS, Status.RESPONSE_RETRY)
        if not (yield from self._status()) & Status.DATA_AVAIL:
            yield from self._write(Register.STS, Status.TPM_GO)
        return (yield from self.collect(request))

    def hash_sequence(self, data: bytes) -> Steps[None]:
        """Run the dynamic-launch sequence of locality 4: PCR 17 := H(0^20 ++ H(data)).

        Needs a started TPM and no active locality but locality 4 itself, which is free afterwards.
        An error of HASH_END itself cannot be seen here: the TPM is in failure mode then.

        Args:
            data: What is measured; any length.

        Raises:
            TisError: HASH_REFUSED: the chip did not give, or did not keep, locality 4 for it.
            ValueError: This driver has another locality.
        """
        if self.locality != HASH_LOCALITY:
            raise ValueError(f"locality {self.locality} has no hash sequence")
        yield from self._access()
        yield from self._learn_capabilities()
        yield from self._write(Register.HASH_START, 0)
        yield from self._expect_hashing("HASH_START")
        yield from self._fill_fifo(data)
        yield from self._expect_hashing("HASH_DATA")
        yield from self._write(Register.HASH_END, 0)
        yield from self._access()  # returns when the posted writes have been done

    # -- localities

    def request_locality(self, *, seize: bool = False) -> Steps[None]:
        """Become the active locality.

        Args:
            seize: Take the TPM from a lower locality instead of waiting for it.

        Raises:
            TisError: TIMEOUT_A (the request is withdrawn), ABSENT.
        """
        access = yield from self._access()
        if access & Access.BEEN_SEIZED:
            yield from self._write(Register.ACCESS, Access.BEEN_SEIZED)
        if _is_active(access):
            return
        yield from self._write(Register.ACCESS, Access.SEIZE if seize else Access.REQUEST_USE)
        try:
            yield from self._wait_until(
                self._access,
                _is_active,
                self.timing.a_s,
                TisFault.TIMEOUT_A,
                by_interrupt=True,
            )
        except TisError:
            yield from self._write(Register.ACCESS, Access.ACTIVE_LOCALITY)
            raise

    def relinquish(self) -> Steps[None]:
        """Give the locality up; a command that runs is aborted."""
        yield from self._write(Register.ACCESS, Access.ACTIVE_LOCALITY)
        # Writes are posted: without reading back, who goes on over another connection may be there
        # before it was given up, and a hash sequence would be refused.
        yield from self._access()

    def _expect_hashing(self, cycle: str) -> Steps[None]:
        access = yield from self._access()
        if not _is_active(access):
            raise self._error(TisFault.HASH_REFUSED, f"after {cycle} ACCESS is 0x{access:02x}")

    # -- waiting

    def _wait_for(
        self, bits: int, limit_s: float, fault: TisFault, *, by_interrupt: bool = False
    ) -> Steps[int]:
        """Wait until all `bits` of STS are set."""

        def is_there(status: int) -> bool:
            if fault is TisFault.TIMEOUT_DURATION and status == Status.COMMAND_READY:
                raise self._error(TisFault.ABORTED, "the chip is ready for another command")
            return status & bits == bits

        return (
            yield from self._wait_until(
                self._status, is_there, limit_s, fault, by_interrupt=by_interrupt
            )
        )

    def _wait_until(
        self,
        read: Callable[[], Steps[int]],
        is_there: Callable[[int], bool],
        limit_s: float,
        fault: TisFault,
        *,
        by_interrupt: bool = False,
    ) -> Steps[int]:
        """Read a register until it says so, or `limit_s` have passed."""
        value = yield from read()
        if is_there(value):
            return value
        now_s = yield from self._pause(0.0)
        deadline_s = now_s + limit_s
        while now_s < deadline_s:
            if by_interrupt and self._has_interrupts:
                now_s = yield from self._interrupt(deadline_s - now_s)
            else:
                now_s = yield from self._pause(min(POLL_INTERVAL_S, deadline_s - now_s))
            value = yield from read()
            if is_there(value):
                return value
        raise self._error(fault, f"after {limit_s} s the register reads 0x{value:02x}")

    def _pause(self, interval_s: float) -> Steps[float]:
        now_s = yield Pause(interval_s)
        assert isinstance(now_s, float)
        return now_s

    def _interrupt(self, limit_s: float) -> Steps[float]:
        now_s = yield WaitInterrupt(min(limit_s, INTERRUPT_WAIT_S))
        assert isinstance(now_s, float)
        yield from self._write(Register.INT_STATUS, INT_EVENTS)
        return now_s

    def _learn_capabilities(self) -> Steps[int]:
        capabilities = yield from self._read_int(Register.INTF_CAPABILITY, 4)
        self._is_burst_static = bool(capabilities & Capability.BURST_COUNT_STATIC)
        return capabilities

    def _enable_interrupts(self) -> Steps[None]:
        enabled = yield from self._read_int(Register.INT_ENABLE, 4)
        yield from self._write(Register.INT_VECTOR, INTERRUPT_VECTOR)
        happened = yield from self._read_int(Register.INT_STATUS, 1)
        yield from self._write(Register.INT_STATUS, happened)
        enabled |= IntEnable.GLOBAL | IntEnable.DATA_AVAIL | IntEnable.LOCALITY_CHANGE
        yield from self._write(Register.INT_ENABLE, enabled.to_bytes(4, "little"))
        self._has_interrupts = True

    # -- FIFO

    def _fill_fifo(self, data: bytes) -> Steps[None]:
        at = 0
        while at < len(data):
            burst = yield from self._burst()
            yield from self._write(Register.DATA_FIFO, data[at : at + burst])
            at += burst

    def _drain_fifo(self, count: int, *, is_whole_burst: bool = False) -> Steps[bytes]:
        """Read `count` bytes, or as many more as the last burst carries."""
        data = b""
        while len(data) < count:
            burst = yield from self._burst()
            lacking = burst if is_whole_burst else min(burst, count - len(data))
            data += yield from self._read(Register.DATA_FIFO, lacking)
        return data

    def _burst(self) -> Steps[int]:
        """How many bytes the next access to the FIFO may carry, at least 1."""
        if not self._is_burst_static or self._burst_count == 0:
            yield from self._wait_until(
                self._status,
                lambda _status: self._burst_count > 0,
                self.timing.d_s,
                TisFault.TIMEOUT_D,
            )
        return min(self._burst_count, ACCESS_BYTES_MAX)

    # -- registers

    def _valid_status(self) -> Steps[int]:
        return (yield from self._wait_for(Status.STS_VALID, self.timing.c_s, TisFault.TIMEOUT_C))

    def _status(self, *, may_request: bool = False) -> Steps[int]:
        """Read status byte and burstCount in one access, so that they belong together.

        Args:
            may_request: Become the active locality first, if the register shows that we are not.
        """
        value = yield from self._read_int(Register.STS, 4)
        if may_request and value & 0xFF == _ABSENT:
            yield from self.request_locality()
            value = yield from self._read_int(Register.STS, 4)
        status = value & 0xFF
        if status == _ABSENT:
            yield from self._explain_absence()
        self._burst_count = value >> BURST_COUNT_SHIFT & 0xFFFF
        return status

    def _explain_absence(self) -> Steps[None]:
        access = yield from self._access()
        fault = TisFault.PROTOCOL if access & Access.ACTIVE_LOCALITY else TisFault.SEIZED
        raise self._error(fault, f"STS 0xff, ACCESS 0x{access:02x}")

    def _access(self) -> Steps[int]:
        access = yield from self._read_int(Register.ACCESS, 1)
        if access == _ABSENT:
            raise self._error(TisFault.ABSENT, "ACCESS 0xff")
        return access

    def _read_int(self, register: Register, count: int) -> Steps[int]:
        return int.from_bytes((yield from self._read(register, count)), "little")

    def _read(self, register: Register, count: int) -> Steps[bytes]:
        data = yield Read(locality=self.locality, offset=register, count=count)
        assert isinstance(data, bytes)
        if len(data) != count:
            raise self._error(
                TisFault.PROTOCOL, f"{len(data)} bytes for a read of {count} at 0x{register:03x}"
            )
        return data

    def _write(self, register: Register, data: int | bytes) -> Steps[None]:
        """Write bytes, or one byte given as its value."""
        value = bytes([data]) if isinstance(data, int) else data
        yield Write(locality=self.locality, offset=register, data=value)

    def _property(self, sub_capability: int, count: int) -> Steps[tuple[int, ...]]:
        """TPM_GetCapability of a property of `count` words; empty if the TPM refuses."""
        request = (
            Tag.RQU_COMMAND.to_bytes(2, "big")
            + (22).to_bytes(4, "big")
            + Ordinal.GET_CAPABILITY.to_bytes(4, "big")
            + _CAP_PROPERTY.to_bytes(4, "big")
            + (4).to_bytes(4, "big")
            + sub_capability.to_bytes(4, "big")
        )
        response = yield from self.transmit(request)
        words = response[HEADER_BYTES + 4 :]
        if response[6:HEADER_BYTES] != bytes(4) or len(words) != 4 * count:
            return ()
        return tuple(int.from_bytes(words[at : at + 4], "big") for at in range(0, 4 * count, 4))

    def _error(self, fault: TisFault, detail: str) -> TisError:
        return TisError(fault, self.locality, detail)


def _is_active(access: int) -> bool:
    wanted = Access.TPM_REG_VALID_STS | Access.ACTIVE_LOCALITY
    return access & wanted == wanted
