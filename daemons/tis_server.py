"""The socket side of the chip: carries register accesses from tis.sock to the device.

trio accepts and admits; then one worker thread per connection does blocking receive and send until
the peer goes. A command runs on the thread that wrote tpmGo, and while it runs the registers answer
everybody else: another locality can ask for the TPM, or seize it and so discard the command.

- A peer is admitted or refused before a byte of it is read. A page it was not granted, and a pin
  that is not its business, are refused with the reason, and logged.
- The engine is never entered twice: commands, hash cycles and pins take one lock, in turn.
- A domain's connection that ends changes no register. The locality stays with its holder, a command
  runs to its end and its response waits in the FIFO, until the same locality's next user goes on
  with it or a higher locality seizes. That is what lets a killed driver come back and learn what
  happened. What the platform held is given up: its next process has nothing to go on with.
- What a write has changed is remembered before the next access is answered, so a killed chip comes
  back with its registers, too; bytes of a command that is not whole yet are not part of that. A
  command that was started and has no remembered response is run then.
- An interrupt goes to every connection that has the locality's page. One that does not read gets
  no more of them; INT_STATUS still says what happened.

Leaves to others: the registers (`hwtpm/tis_device.py`), the engine and its memory (the `ChipPort`),
who may have which page (`admit`).
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol, TypeVar

import trio

from daemons.carrying import carry, ours
from daemons.errors import Failure, NotNow
from daemons.fair_lock import FairLock
from daemons.lean_structlog import structlog
from daemons.listeners import Listener, PeerCredentials, set_send_timeout
from daemons.sd_notify import NO_COMMAND
from daemons.service import DRAIN_S, Connection, ends_with_its_peer, serve
from daemons.threads import NoThread, run_in_thread
from hwtpm.tis_device import Interrupt, PendingCommand, State, TisDevice, TpmPort
from hwtpm.tis_snapshot import decode_snapshot, encode_snapshot
from protocol import tis_messages as messages
from protocol.tis_messages import (
    MESSAGE_BYTES_MAX,
    RefusedReason,
    decode_request,
    encode_message,
    refused,
)
from protocol.wire import DecodeError

T = TypeVar("T")


class ChipPort(TpmPort, Protocol):
    """The engine and the chip's pins. Calls come from worker threads and never overlap.

    What a method raises is our fault and stops the daemon, but for a `Failure` of the pins.
    """

    def power_on(self) -> None:
        """TPM_Init; also when the power was on.

        Raises:
            Failure: The chip cannot start; it stays without power, and the platform is told why.
        """

    def power_off(self) -> None:
        """The power goes: volatile state is gone, permanent state has long been stored.

        Raises:
            Failure: The platform is told.
        """

    def set_physical_presence(self, *, is_asserted: bool) -> None:
        """The physical-presence pin.

        Raises:
            Failure: The platform is told.
        """


class Recalled(NamedTuple):
    """What a killed process of the chip has left."""

    registers: bytes
    """As last remembered."""
    platform_pages: frozenset[int]
    """Localities at which the platform wrote last."""
    serial: int
    """Of the last command that was run."""
    response: bytes
    """Of that command."""


class RegisterMemory(Protocol):
    """Where the registers outlive a killed process. Calls come from worker threads."""

    def recall(self) -> Recalled | None:
        """What a killed process has left; None when there is nothing to go on from."""
        ...

    def remember(self, registers: bytes, platform_pages: frozenset[int]) -> None:
        """Keep the registers, and at which localities the platform wrote last."""

    def run(self, command: PendingCommand) -> bytes:
        """Run a command; its response is remembered with what it changed."""
        ...


class ForgetfulRegisters:
    """Registers that a crash takes.

    Args:
        chip: Runs the commands.
    """

    def __init__(self, chip: ChipPort) -> None:
        self._chip = chip

    def recall(self) -> None:
        """See `RegisterMemory`."""
        return

    def remember(self, registers: bytes, platform_pages: frozenset[int]) -> None:
        """See `RegisterMemory`."""

    def run(self, command: PendingCommand) -> bytes:
        """See `RegisterMemory`."""
        return self._chip.execute(command.request, command.locality)


@dataclass(frozen=True, slots=True, kw_only=True)
class TisPeer:
    """What a peer may do.

    Attributes:
        name: Its domain, for the log and for counting its connections.
        localities: The pages it was granted.
        is_platform: Whether it moves the chip's pins.
    """

    name: str
    localities: frozenset[int]
    is_platform: bool = False


Admit = Callable[[PeerCredentials], TisPeer]
"""Says what a peer may do; raises `Failure` for a stranger. Called before a byte is read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TisSettings:
    """Limits of a TIS server."""

    connections_max: int = 64
    """Connections at the same time, each with a thread; more are refused."""
    connections_per_domain_max: int = 8
    """Connections of one domain, so that none keeps the others out."""
    send_s: float = 5.0
    """How long a peer may leave its answers unread, in seconds."""
    drain_s: float = DRAIN_S
    """How long a running command may take after a stop was asked for, in seconds."""
    platform_returns_s: float = 3.0
    """How long the platform may take to come back for a locality that it had when the chip's
    process was killed, in seconds; then it is given up."""


REFUSALS_LOGGED_MAX: Final = 16
"""Refused accesses of one connection that are logged; a peer cannot fill the log with more."""
ACCEPTED_BEYOND: Final = 64
"""Connections accepted beyond `connections_max`, only to be told that there are too many."""


async def serve_tis(
    listener: Listener,
    server: TisServer,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the chip's socket until a signal; see `service.serve`."""
    settings = server.settings
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.give_up_what_nobody_comes_back_for)
        await serve(
            server.handle,
            [listener],
            drain_s=settings.drain_s,
            connections_max=settings.connections_max + ACCEPTED_BEYOND,
            is_alive=server.ask_engine,
            task_status=task_status,
        )
        nursery.cancel_scope.cancel()


class TisServer:
    """One chip and its connections.

    Args:
        chip: The engine and the pins.
        admit: Tells what a peer may do.
        memory: Where the registers outlive a killed process; None: nowhere.
        settings: Limits.
        wrap_socket: Takes the place of each connection; None, but for faults on purpose.

    Raises:
        DecodeError: What is remembered is not understood.
    """

    def __init__(
        self,
        chip: ChipPort,
        admit: Admit,
        *,
        memory: RegisterMemory | None = None,
        settings: TisSettings | None = None,
        wrap_socket: Callable[[socket.socket], socket.socket] | None = None,
    ) -> None:
        self._wrap_socket = wrap_socket
        self.settings = settings or TisSettings()
        self._memory = memory or ForgetfulRegisters(chip)
        self._remembered: tuple[bytes, frozenset[int]] = (b"", frozenset())
        self._chip = chip
        self._admit = admit
        # Lock order: registers before engine. Who runs a command holds the engine alone.
        self._registers = threading.Lock()
        self._engine = FairLock()
        self.device = TisDevice(_EngineInTurn(chip, self._engine))
        self._carriers: set[_Carrier] = set()
        self._askers: dict[int, _Carrier] = {}
        """By locality, who wrote there last, and so asked for it, used it or gave it up."""
        self._platform_pages: frozenset[int] = frozenset()
        """Where that was the platform, be it under a killed process of the chip."""
        self._threads = trio.CapacityLimiter(self.settings.connections_max)
        self._per_domain: Counter[str] = Counter()
        self._recall()

    @ends_with_its_peer()
    async def handle(self, connection: Connection) -> None:
        """Serve one connection to its end (a handler for `service.serve`)."""
        log = structlog.get_logger().bind(
            peer_pid=connection.peer.pid, connection=connection.connection_id
        )
        try:
            peer = self._admit(connection.peer)
        except NotNow as lack:
            # Who is refused does not come again; who finds his connection ended does.
            log.warning("cannot serve a connection", reason=str(lack))
            return
        except Failure as failure:
            log.info("peer refused", reason=str(failure))
            await _refuse(connection, RefusedReason.UNKNOWN_PEER, failure.what)
            return
        limits = self.settings
        if (
            self._threads.available_tokens < 1
            or self._per_domain[peer.name] >= limits.connections_per_domain_max
        ):
            log.info("peer refused", reason="too many connections", domain=peer.name)
            await _refuse(
                connection,
                RefusedReason.TOO_MANY_CONNECTIONS,
                f"{limits.connections_per_domain_max} connections a domain, "
                f"{limits.connections_max} in all",
            )
            return
        self._per_domain[peer.name] += 1
        try:
            await self._carry(connection, peer, log.bind(domain=peer.name))
        finally:
            self._per_domain[peer.name] -= 1
            self._per_domain += Counter()  # forgets names that have no connection

    async def _carry(
        self, connection: Connection, peer: TisPeer, log: structlog.typing.FilteringBoundLogger
    ) -> None:
        """Give the connection to a worker thread, and end it when the daemon stops."""
        raw = socket.socket(fileno=connection.socket.detach())
        if self._wrap_socket is not None:
            raw = self._wrap_socket(raw)
        carrier = _Carrier(raw, peer, self, log)
        try:
            await carry(
                raw, carrier.run, connection.stopping, limiter=self._threads, thread_name="tis"
            )
        finally:
            raw.close()

    # -- called from worker threads

    def ask_engine(self) -> None:
        """Get an answer of the engine between two commands, with nothing that could change it."""
        with self._engine:
            ours(lambda: self._chip.execute(NO_COMMAND, 0))

    def attach(self, carrier: _Carrier) -> None:
        """Send interrupts there from now on."""
        with self._registers:
            self._carriers.add(carrier)

    def detach(self, carrier: _Carrier) -> None:
        """Send no more interrupts there; its socket may be closed afterwards.

        A domain that was killed comes back, and goes on at its locality where it was. The platform
        does not: what it held would be closed to everybody else.
        """
        with self._registers:
            self._carriers.discard(carrier)
            asked = [page for page, asker in self._askers.items() if asker is carrier]
            for locality in asked:
                del self._askers[locality]
            if carrier.peer.is_platform:
                self._give_up(asked)

    def read(self, access: messages.Read) -> bytes:
        """Do a register read."""
        with self._registers:
            return self.device.read(access.locality, access.offset, access.count)

    def write(self, access: messages.Write, carrier: _Carrier | None = None) -> None:
        """Do a register write of a connection, if of any, and run the command that it started."""
        with self._registers:
            if carrier is not None and self._askers.get(access.locality) is not carrier:
                self._note_asker(access.locality, carrier)
            before = self.device.pending_command
            self.device.write(access.locality, access.offset, access.data)
            self._remember()
            pending = self.device.pending_command
            self._pass_interrupts()
        if pending is not None and pending is not before:
            self._execute(pending)

    def power_on(self) -> None:
        """Power or reset: whatever runs loses its registers first, then TPM_Init."""
        with self._registers:
            self.device.power_off()
        with self._engine:
            ours(self._chip.power_on)
        with self._registers:
            self.device.power_on()
            self._remember()

    def power_off(self) -> None:
        """Take the power away."""
        with self._registers:
            self.device.power_off()
        with self._engine:
            ours(self._chip.power_off)

    def set_physical_presence(self, *, is_asserted: bool) -> None:
        """Move the pin."""
        with self._engine:
            ours(lambda: self._chip.set_physical_presence(is_asserted=is_asserted))

    async def give_up_what_nobody_comes_back_for(self) -> None:
        """Give up what the platform had under a killed process of the chip, if it died, too.

        Else nobody would ever: only who is connected can be seen to go.
        """
        while self._platform_pages - self._askers.keys():
            await trio.sleep(self.settings.platform_returns_s)
            with contextlib.suppress(NoThread):  # the next time, then
                # Whoever has the registers may be waiting for a command to end.
                await run_in_thread(self._give_up_what_nobody_has)

    def _give_up_what_nobody_has(self) -> None:
        with self._registers:
            self._give_up(self._platform_pages - self._askers.keys())

    def _note_asker(self, locality: int, carrier: _Carrier) -> None:
        self._askers[locality] = carrier
        if carrier.peer.is_platform:
            self._platform_pages |= {locality}
        else:
            self._platform_pages -= {locality}

    def _give_up(self, pages: Collection[int]) -> None:
        """Leave localities that the platform had to others, with the registers locked."""
        if not pages:
            return
        for locality in pages:
            self.device.give_up(locality)
        self._platform_pages = self._platform_pages.difference(pages)
        self._remember()
        self._pass_interrupts()

    def _recall(self) -> None:
        """Go on with the registers of a killed process."""
        recalled = self._memory.recall()
        if recalled is None:
            return
        self._platform_pages = recalled.platform_pages
        self._remembered = recalled.registers, recalled.platform_pages
        self.device.restore(decode_snapshot(recalled.registers))
        pending = self.device.pending_command
        if pending is not None and pending.serial == recalled.serial:
            self.device.complete(pending, recalled.response)

    def run_recalled_command(self) -> None:
        """Run the command that a killed process had started and not ended; call it once."""
        pending = self.device.pending_command
        if pending is not None:
            self._execute(pending)

    def _remember(self) -> None:
        # A command that is not whole is written again by a driver that finds the chip Ready.
        if self.device.state is not State.RECEPTION:
            now = encode_snapshot(self.device.snapshot()), self._platform_pages
            if now != self._remembered:
                self._memory.remember(*now)
                self._remembered = now

    def _execute(self, pending: PendingCommand) -> None:
        with self._engine:
            if self.device.pending_command is not pending:
                return  # aborted while it waited for the engine: it never ran
            response = ours(lambda: self._memory.run(pending))
        with self._registers:
            self.device.complete(pending, response)
            self._pass_interrupts()

    def _pass_interrupts(self) -> None:
        for interrupt in self.device.take_interrupts():
            for carrier in self._carriers:
                if interrupt.locality in carrier.peer.localities:
                    carrier.interrupt(interrupt)


class _EngineInTurn:
    """The engine as the device sees it: hash cycles wait until a running command has ended."""

    def __init__(self, chip: ChipPort, engine: FairLock) -> None:
        self._chip = chip
        self._engine = engine

    def hash_start(self) -> bool:
        with self._engine:
            return ours(self._chip.hash_start)

    def hash_data(self, data: bytes) -> bool:
        with self._engine:
            return ours(lambda: self._chip.hash_data(data))

    def hash_end(self) -> bool:
        with self._engine:
            return ours(self._chip.hash_end)

    @property
    def established(self) -> bool:
        return self._chip.established


async def _refuse(connection: Connection, reason: RefusedReason, text: str) -> None:
    # Never waits: nothing was sent before that could fill the socket.
    await connection.socket.send(encode_message(refused(reason, text)))


class _Carrier:
    """One connection in its worker thread. `interrupt` is for other threads."""

    def __init__(
        self,
        raw: socket.socket,
        peer: TisPeer,
        server: TisServer,
        log: structlog.typing.FilteringBoundLogger,
    ) -> None:
        self.peer = peer
        self._raw = raw
        self._server = server
        self._log = log
        self._refusals = 0

    def interrupt(self, interrupt: Interrupt) -> None:
        """Tell the peer, if that needs no waiting."""
        message = messages.Interrupt(
            locality=interrupt.locality, status=interrupt.status, vector=interrupt.vector
        )
        try:
            self._raw.send(encode_message(message), socket.MSG_DONTWAIT)
        except OSError as error:
            self._log.debug("interrupt not delivered", reason=str(error))

    def run(self) -> None:
        """Serve the connection to its end.

        Raises:
            DecodeError, ConnectionError, TimeoutError: The peer's fault.
            Exception: Whatever the chip raises.
        """
        self._raw.setblocking(True)
        set_send_timeout(self._raw, self._server.settings.send_s)
        self._send(
            messages.Hello(
                version=messages.VERSION,
                locality_mask=sum(1 << locality for locality in self.peer.localities),
                is_platform=self.peer.is_platform,
            )
        )
        self._log.info("driver connected", localities=sorted(self.peer.localities))
        self._server.attach(self)
        try:
            while message := self._raw.recv(MESSAGE_BYTES_MAX + 1):
                self._answer(message)
        finally:
            self._server.detach(self)
        self._log.info("driver gone")

    def _answer(self, message: bytes) -> None:
        try:
            request = decode_request(message)
        except DecodeError as error:
            self._send(refused(RefusedReason.MALFORMED, str(error)))
            raise
        if isinstance(request, messages.Read):
            if self._may(request, request.count):
                self._send(messages.Value(data=self._server.read(request)))
        elif isinstance(request, messages.Write):
            if self._may(request, len(request.data)):
                self._server.write(request, self)
        elif self.peer.is_platform:
            self._move_pin(request)
        else:
            self._refuse(RefusedReason.NOT_PLATFORM, "only the platform moves the chip's pins")

    def _may(self, access: messages.Read | messages.Write, count: int) -> bool:
        """Refuse an access to a page that was not granted, or one that is too wide."""
        if access.locality not in self.peer.localities:
            self._refuse(
                RefusedReason.PAGE_NOT_GRANTED,
                f"{self.peer.name} has no right to the page of locality {access.locality}",
            )
            return False
        most = self._server.device.access_bytes_max(access.offset)
        if count > most:
            self._refuse(
                RefusedReason.TOO_WIDE, f"{count} bytes at 0x{access.offset:03x}, at most {most}"
            )
            return False
        return True

    def _move_pin(
        self, request: messages.PowerOn | messages.PowerOff | messages.PhysicalPresence
    ) -> None:
        try:
            if isinstance(request, messages.PowerOn):
                self._server.power_on()
            elif isinstance(request, messages.PowerOff):
                self._server.power_off()
            else:
                self._server.set_physical_presence(is_asserted=request.is_asserted)
        except Failure as failure:
            self._refuse(RefusedReason.CHIP_FAILED, f"{failure.what}: {failure.why}")
            return
        self._log.info("pin moved", pin=type(request).__name__)
        self._send(messages.Done())

    def _refuse(self, reason: RefusedReason, text: str) -> None:
        self._refusals += 1
        if self._refusals <= REFUSALS_LOGGED_MAX:
            self._log.warning(
                "access refused", reason=reason.name, text=text, refusals=self._refusals
            )
        self._send(refused(reason, text))

    def _send(self, message: messages.Answer) -> None:
        try:
            self._raw.send(encode_message(message))
        except BlockingIOError as error:
            raise TimeoutError("the driver leaves its answers unread") from error
