"""The backend's end of rings: admits frontends, carries their commands, answers repeats.

trio accepts, admits and walks the first half of the handshake, with a deadline; then one worker
thread per ring does blocking receive and send until the frontend goes. What a command means is left
to the backend.

- A peer is admitted or refused before a byte of it is read, and a refusal carries its reason.
- Calls into the backend never overlap; waiting frontends get their turns first come, first served.
- A response is stored before it is sent, so a frontend that comes back gets it, not a second run.
- A frontend that is slow, idle, half-open or gone costs only itself. Work it has queued is dropped.
- A new connection of a ring takes the place of the old one, after the command that runs has ended.
- A frontend that is gone has let go before another one is taken.
- Whatever the backend raises is ours: it leaves through `handle` and stops the daemon.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Final, Protocol, TypeVar

import trio

from daemons import command_log, logs
from daemons.carrying import carry, ours, stop_taking
from daemons.errors import Failure, NotNow
from daemons.fair_lock import FairLock
from daemons.lean_structlog import structlog
from daemons.listeners import (
    Listener,
    PeerCredentials,
    has_hung_up,
    set_receive_timeout,
    set_send_timeout,
)
from daemons.registry import DomainRecord, VtpmDevice
from daemons.service import DRAIN_S, PEER_FAULTS, Connection, ends_with_its_peer, serve
from protocol.framing import error_response
from protocol.return_codes import ReturnCode
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    Attached,
    BackendKeys,
    BackendRing,
    CancelAsked,
    FrontendReady,
    PeerClosed,
    PeerClosing,
    Repeat,
    Submitted,
)
from protocol.tpmif_page import PACKET_BYTES_MAX
from protocol.wire import DecodeError

T = TypeVar("T")
WrapSocket = Callable[[socket.socket], socket.socket]

CANCELLED: Final = b""
"""What `execute` returns for a command that it gave up on and that changed nothing."""


class Refused(Exception):  # noqa: N818 - the name of the outcome, as callers read it
    """A frontend is not taken; it is told the reason.

    Args:
        reason: One line for the person behind the frontend; no secrets.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def _never() -> bool:
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RingPeer:
    """The frontend of one ring.

    Attributes:
        domain: Its record in the registry at the moment it connected.
        device: Which of the domain's vTPM devices this is.
        connection_id: Counts the connections of this daemon; 0 before there is one.
        cancel_asked: Called by a backend between the steps of a long command (costs one system
            call): whether the frontend gave up on it, or is gone.
    """

    domain: DomainRecord
    device: VtpmDevice
    connection_id: int = 0
    cancel_asked: Callable[[], bool] = field(default=_never, compare=False, repr=False)
    ring_id: str = field(init=False)
    """Names the ring for as long as the domain has this device, across crashes and reboots."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ring_id", f"{self.domain.name}/{self.device.devid}")


class RingBackend(Protocol):
    """What stands behind the rings. Calls come from worker threads and never overlap."""

    def attached(self, peer: RingPeer) -> None:
        """Take a frontend.

        Raises:
            Refused: The frontend is told the reason and closed.
            NotNow: It is closed without a word, which makes it try again.
        """

    def execute(self, peer: RingPeer, request: bytes, locality: int, sequence: int) -> bytes:
        """Run one command (0 to 4088 bytes, unchecked) and give its response, or `CANCELLED`."""

    def detached(self, peer: RingPeer) -> None:
        """Let go of a frontend that `attached` took. Its TPM stays as it is."""


class ResponseStore(Protocol):
    """Remembers the last response of each ring, so that no command runs twice.

    A backend with a journal begins with what that remembers, under the same name of its `memory`.
    Calls come from worker threads and never overlap with each other or with the backend's.
    """

    @property
    def memory(self) -> str:
        """Names what is remembered; another name once anything was forgotten."""

    def last_sequence(self, ring_id: str) -> int:
        """Give the number of the ring's last stored response; 0 when there is none."""

    def get(self, ring_id: str, sequence: int) -> bytes | None:
        """Give a stored response; None when that number is not the last one stored."""

    def put(self, ring_id: str, sequence: int, response: bytes) -> bool:
        """Store a response in place of the ring's one before; True when it outlives a kill."""

    def is_kept(self, ring_id: str, sequence: int) -> bool:
        """Tell what `put` told of the response with this number, which is the last one stored."""


class ResponsesInMemory:
    """A store that a crash empties, and that says so by its name.

    Args:
        memory: The name; a new one when None.
        last: What a process before this one remembered, under that name: number and response of
            each ring.
    """

    def __init__(
        self, memory: str | None = None, last: Mapping[str, tuple[int, bytes]] | None = None
    ) -> None:
        self.memory = memory or secrets.token_hex(8)
        self._last = dict(last or {})

    def last_sequence(self, ring_id: str) -> int:
        """See `ResponseStore`."""
        return self._last.get(ring_id, (0, b""))[0]

    def get(self, ring_id: str, sequence: int) -> bytes | None:
        """See `ResponseStore`."""
        last_sequence, response = self._last.get(ring_id, (0, b""))
        return response if sequence == last_sequence else None

    def put(self, ring_id: str, sequence: int, response: bytes) -> bool:
        """See `ResponseStore`."""
        self._last[ring_id] = (sequence, response)
        return False

    def is_kept(self, ring_id: str, sequence: int) -> bool:  # noqa: ARG002 - none is
        """See `ResponseStore`."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RingSettings:
    """Limits of a ring server."""

    rings_max: int = 256
    """Rings connected at the same time, each with a thread; more are refused."""
    half_open_per_domain_max: int = 4
    """Connections of a domain still in the handshake; one more ends the oldest."""
    handshake_s: float = 5.0
    """How long each side of the handshake may take, in seconds."""
    send_s: float = 5.0
    """How long a frontend may leave its responses unread, in seconds."""
    connections_max: int = 512
    """All connections, in whatever state; more are closed at once."""
    drain_s: float = DRAIN_S
    """How long running commands may take after a stop was asked for, in seconds."""


async def serve_rings(  # noqa: PLR0913 - three and four named ones
    listener: Listener,
    backend: RingBackend,
    admit: Callable[[PeerCredentials], RingPeer],
    *,
    responses: ResponseStore | None = None,
    settings: RingSettings | None = None,
    is_alive: Callable[[], object] | None = None,
    wrap_socket: WrapSocket | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve rings until a signal; arguments as for `RingServer`, end as for `service.serve`.

    `is_alive` is called between two commands of the rings.
    """
    settings = settings or RingSettings()
    server = RingServer(
        backend, admit, responses=responses, settings=settings, wrap_socket=wrap_socket
    )
    await serve(
        server.handle,
        [listener],
        drain_s=settings.drain_s,
        connections_max=settings.connections_max,
        is_alive=None if is_alive is None else partial(server.in_turn, is_alive),
        task_status=task_status,
    )


class RingServer:
    """All rings of one backend.

    Args:
        backend: Runs the commands.
        admit: Tells which frontend a peer is; raises `Refused` or a `Failure` (both are told to the
            peer). Called before a byte is read. The device it names is the one taken when the
            frontend asks for it; for another number, the domain's device of that number is taken if
            it has the same backend.
        responses: Where responses are stored; in memory when None.
        settings: Limits.
        wrap_socket: Takes the place of each ring's socket; None, but for faults on purpose.
    """

    def __init__(
        self,
        backend: RingBackend,
        admit: Callable[[PeerCredentials], RingPeer],
        *,
        responses: ResponseStore | None = None,
        settings: RingSettings | None = None,
        wrap_socket: WrapSocket | None = None,
    ) -> None:
        self._admit = admit
        self._wrap_socket = wrap_socket
        self._settings = settings or RingSettings()
        self._behind = _Behind(
            backend=backend,
            responses=responses or ResponsesInMemory(),
            turn=FairLock(),
            settings=self._settings,
        )
        self._threads = trio.CapacityLimiter(self._settings.rings_max)
        self._half_open: defaultdict[str, deque[trio.CancelScope]] = defaultdict(deque)
        self._carriers: dict[str, _Carrier] = {}

    @ends_with_its_peer()
    async def handle(self, connection: Connection) -> None:
        """Serve one connection to its end (a handler for `service.serve`)."""
        ring = BackendRing()
        try:
            peer = replace(self._admit(connection.peer), connection_id=connection.connection_id)
        except NotNow as lack:
            # Who is refused does not come again; who finds his connection ended does.
            structlog.get_logger().error("cannot serve a connection", reason=str(lack))
            return
        except (Refused, Failure) as refusal:
            await _refuse(connection, ring, refusal)
            return
        carrier = None
        with self._half_open_scope(peer.domain.name) as scope:
            try:
                carrier = await self._first_half(connection, ring, peer)
            except Refused as refusal:
                await _refuse(connection, ring, refusal)
        if scope.cancelled_caught:
            _log(peer).info("half-open connection ended", reason="the domain has newer ones")
        if carrier is not None:
            await self._carry(connection, carrier)

    def in_turn(self, work: Callable[[], object]) -> None:
        """Run something between two commands; for a thread that may wait."""
        with self._behind.turn:
            work()

    @contextlib.contextmanager
    def _half_open_scope(self, domain: str) -> Iterator[trio.CancelScope]:
        """Count a connection as half-open; one too many ends the domain's oldest."""
        scopes = self._half_open[domain]
        if len(scopes) >= self._settings.half_open_per_domain_max:
            scopes.popleft().cancel()
        with trio.CancelScope() as scope:
            scopes.append(scope)
            try:
                yield scope
            finally:
                if scope in scopes:
                    scopes.remove(scope)
                if not scopes:
                    self._half_open.pop(domain, None)

    async def _first_half(
        self, connection: Connection, ring: BackendRing, peer: RingPeer
    ) -> _Carrier:
        """Walk to the frontend's keys, and make its ring free for it."""
        with trio.fail_after(self._settings.handshake_s):
            await connection.socket.send(ring.open())
            message = await connection.socket.recv(MESSAGE_BYTES_MAX + 1)
        event = ring.receive(message) if message else None
        if not isinstance(event, FrontendReady):
            raise ConnectionAbortedError("the frontend left in the handshake")
        peer = replace(peer, device=_device(peer, event.handle))
        await self._gone_have_let_go()
        while (predecessor := self._carriers.get(peer.ring_id)) is not None:
            stop_taking(predecessor.raw)
            await predecessor.ended.wait()
        if len(self._carriers) >= self._settings.rings_max:
            raise Refused(f"{self._settings.rings_max} rings are connected, which is the limit")
        raw = socket.socket(fileno=connection.socket.detach())
        if self._wrap_socket is not None:
            raw = self._wrap_socket(raw)
        carrier = _Carrier(raw, ring, peer, self._behind)
        self._carriers[peer.ring_id] = carrier
        return carrier

    async def _gone_have_let_go(self) -> None:
        """Wait for the ends of rings whose frontends are gone: the backend has them for connected.

        It costs no time: these are commands that run, and the turn would be waited for as well.
        """
        for carrier in [each for each in self._carriers.values() if has_hung_up(each.raw)]:
            await carrier.ended.wait()

    async def _carry(self, connection: Connection, carrier: _Carrier) -> None:
        """Give the ring to a worker thread, and end it when the daemon stops."""
        try:
            await carry(
                carrier.raw,
                carrier.run,
                connection.stopping,
                limiter=self._threads,
                thread_name=f"ring {carrier.peer.ring_id}",
            )
        finally:
            del self._carriers[carrier.peer.ring_id]
            carrier.ended.set()
            carrier.raw.close()


def _device(peer: RingPeer, handle: int) -> VtpmDevice:
    if handle == peer.device.devid:
        return peer.device
    for device in peer.domain.vtpms:
        if device.devid == handle and device.backend == peer.device.backend:
            return device
    raise Refused(f"domain {peer.domain.name} has no vTPM device {handle} here")


async def _refuse(connection: Connection, ring: BackendRing, refusal: Refused | Failure) -> None:
    reason = refusal.reason if isinstance(refusal, Refused) else refusal.what
    structlog.get_logger().info(
        "frontend refused", reason=str(refusal), peer_pid=connection.peer.pid
    )
    # Never waits: nothing was sent before that could fill the socket.
    await connection.socket.send(ring.refuse(reason))


def _log(peer: RingPeer) -> structlog.typing.FilteringBoundLogger:
    logger: structlog.typing.FilteringBoundLogger = structlog.get_logger()
    return logger.bind(
        ring=peer.ring_id, peer_domid=peer.domain.domid, connection=peer.connection_id
    )


# -- the worker thread -----------------------------------------------------------------------------

_ROOM: Final = MESSAGE_BYTES_MAX + 1
"""What is longer than a message is seen to be."""


class _Notice(Enum):
    """What a look at the socket during a command found."""

    NOTHING = 0
    CANCEL = 1
    GONE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _Behind:
    """What all rings of a server share."""

    backend: RingBackend
    responses: ResponseStore
    turn: FairLock
    settings: RingSettings


class _Carrier:
    """One ring in its worker thread."""

    def __init__(
        self, raw: socket.socket, ring: BackendRing, peer: RingPeer, behind: _Behind
    ) -> None:
        self.raw = raw
        self.peer = replace(peer, cancel_asked=self._cancel_asked)
        self.ended = trio.Event()
        self._ring = ring
        self._settings = behind.settings
        self._backend = behind.backend
        self._responses = behind.responses
        self._turn = behind.turn
        self._notice = _Notice.NOTHING
        self._fault: DecodeError | None = None

    def run(self) -> None:
        """Serve the ring to its end.

        Raises:
            DecodeError, ConnectionError, TimeoutError: The frontend's fault.
            Exception: Whatever the backend raises.
        """
        self.raw.setblocking(True)
        set_receive_timeout(self.raw, self._settings.handshake_s)
        set_send_timeout(self.raw, self._settings.send_s)
        with self._turn:
            try:
                ours(lambda: self._backend.attached(self.peer))
            except Refused as refusal:
                _log(self.peer).info("frontend refused", reason=refusal.reason)
                self._send(self._ring.refuse(refusal.reason))
                return
            except NotNow as lack:
                _log(self.peer).warning("frontend not taken for now", reason=str(lack))
                return
            last_sequence = ours(lambda: self._responses.last_sequence(self.peer.ring_id))
        is_farewell = False
        try:
            self._second_half(last_sequence)
            set_receive_timeout(self.raw, 0)
            is_farewell = self._carry_commands()
        finally:
            with self._turn:
                ours(lambda: self._backend.detached(self.peer))
        if is_farewell:  # after `detached`, so that a frontend that waits for it finds a free ring
            self._send(self._ring.wait_again())
        elif self._ring.is_attached:
            with contextlib.suppress(OSError):
                self._send(self._ring.closing("the backend stops or has a newer connection"))

    def _second_half(self, last_sequence: int) -> None:
        device = self.peer.device
        keys = BackendKeys(
            handle=device.handle,
            uuid=device.uuid,
            ring_id=self.peer.ring_id,
            memory=self._responses.memory,
        )
        self._send(self._ring.connect(keys, last_sequence))
        while not self._ring.is_attached:
            message = self._receive()
            if not message or not isinstance(self._ring.receive(message), Attached):
                raise ConnectionAbortedError("the frontend left in the handshake")
        _log(self.peer).info("ring connected", last_sequence=last_sequence)

    def _carry_commands(self) -> bool:
        """Answer messages until the frontend goes; True when it said good-bye."""
        receive, ring = self.raw.recv, self._ring  # no time limit: a frontend may be idle
        while message := receive(_ROOM):
            event = ring.receive(message)
            if type(event) is Submitted:
                answer = self._execute(event)
                if answer is None:
                    return False
                self._send(answer)
                if self._fault is not None:
                    raise self._fault
                if self._notice is _Notice.GONE:
                    return False
            elif type(event) is Repeat:
                self._send(self._repeat(event.sequence))
            elif type(event) is CancelAsked:
                self._send(self._ring.idle())
            elif type(event) is PeerClosing:
                self._send(self._ring.closing())
            elif type(event) is PeerClosed:
                return True
        return False

    def _execute(self, submitted: Submitted) -> bytes | None:
        """Run a command in its turn and store its response; None: dropped, its frontend is gone."""
        peer, sequence = self.peer, submitted.sequence
        self._notice = _Notice.NOTHING
        has_waited = self._turn.acquire()
        try:
            if has_waited and self._cancel_asked():
                if self._notice is _Notice.GONE:
                    return None
                response = CANCELLED
            else:
                # Looked at here as well: calls that find nothing to tell would show in a command.
                begun = command_log.begin() if logs.telling.debug else 0.0
                response = self._backend.execute(
                    peer, submitted.packet, submitted.locality, sequence
                )
                if begun:
                    command_log.end(begun, submitted.packet, response, ring=peer.ring_id)
                if len(response) > PACKET_BYTES_MAX:
                    _log(peer).error("response too long for the ring", length=len(response))
                    response = error_response(ReturnCode.SIZE)
            is_kept = self._responses.put(peer.ring_id, sequence, response)
        except PEER_FAULTS as error:
            raise RuntimeError("the backend let an error of its own links escape") from error
        finally:
            self._turn.release()
        return self._ring.finish(response, is_kept=is_kept) if response else self._ring.idle()

    def _repeat(self, sequence: int) -> bytes:
        with self._turn:
            response = ours(lambda: self._responses.get(self.peer.ring_id, sequence))
            is_kept = ours(lambda: self._responses.is_kept(self.peer.ring_id, sequence))
        if response is None:
            raise RuntimeError(f"no response is stored for {self.peer.ring_id}, {sequence}")
        _log(self.peer).info("repeat answered from the store", sequence=sequence)
        return self._ring.finish(response, is_kept=is_kept) if response else self._ring.idle()

    def _cancel_asked(self) -> bool:
        """Look, without waiting, whether the frontend cancels, leaves, or breaks the protocol."""
        if self._notice is _Notice.NOTHING:
            try:
                message = self.raw.recv(_ROOM, socket.MSG_DONTWAIT)
                event = self._ring.receive(message) if message else None
            except BlockingIOError:
                return False
            except OSError:
                self._notice = _Notice.GONE
            except DecodeError as fault:
                # Not raised here, in the midst of the backend's work, but after it.
                self._fault, self._notice = fault, _Notice.GONE
            else:
                is_cancel = isinstance(event, CancelAsked)
                self._notice = _Notice.CANCEL if is_cancel else _Notice.GONE
        return True

    def _receive(self) -> bytes:
        try:
            return self.raw.recv(_ROOM)
        except BlockingIOError as error:
            raise TimeoutError("the frontend took too long") from error

    def _send(self, message: bytes) -> None:
        try:
            self.raw.send(message)
        except BlockingIOError as error:
            raise TimeoutError("the frontend leaves its responses unread") from error
