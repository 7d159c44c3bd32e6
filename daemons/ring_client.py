"""The frontend's end of a ring: blocking, for any number of threads, and it outlives its backend.

- One command is in flight; threads get their turns first come, first served.
- When the backend goes away, the outstanding request is submitted again under its own number as
  soon as the backend is back, so that it runs exactly once. The caller sees a pause, nothing else.
- When that cannot be known (the backend has lost its memory of this ring), the caller is told so.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Self
from uuid import UUID

from daemons.errors import ExitCode, Failure, NotNow
from daemons.fair_lock import FairLock
from daemons.listeners import (
    Kind,
    NotListening,
    connect,
    set_receive_timeout,
    set_send_timeout,
)
from protocol.tpmif import (
    MESSAGE_BYTES_MAX,
    BackendConnected,
    BackendWaiting,
    Cancelled,
    Fate,
    Finished,
    FrontendRing,
    PeerClosed,
    Request,
)
from protocol.tpmif_page import PACKET_BYTES_MAX
from protocol.wire import DecodeError

RECONNECT_S: Final = 30.0
"""How long an outstanding request waits for its backend to come back, in seconds."""
RECONNECTS_MAX: Final = 32
"""How often a request is submitted again; a command that kills its backend must end somewhere."""
ANSWER_S: Final = 900.0
"""The longest wait for one response; a vTPM's slowest commands are allowed 600 s by drivers."""
CANCEL_S: Final = 10.0
"""How long a cancelled backend has to say IDLE or FINISH."""
FAREWELL_S: Final = 1.0
SEND_S: Final = 5.0
RETRY_S: Final = (0.005, 0.1)
"""First and longest pause between attempts to connect."""


class RingLost(Failure):
    """The backend is gone and what became of the request is not known."""


class RingForgotten(RingLost):
    """The backend is there again, and has lost its memory of what it had executed."""


class RingRolledBack(RingLost):
    """The backend is there again with less in its memory than it had answered."""


class RingRefused(Failure):
    """The backend does not take this frontend."""


class RingCancelled(Failure):
    """The request was cancelled and changed nothing."""


class RequestTooLong(Failure):
    """The request does not fit into the shared page."""


class Sent(NamedTuple):
    """Under what a request was sent: who knows this can ask later what became of it.

    Attributes:
        memory: Of the backend; another backend, or one that has forgotten, has another.
        sequence: Its number.
    """

    memory: str
    sequence: int


BeforeSend = Callable[[Sent], None]
"""Called whenever a request is about to be sent, also when it is sent again; must not block."""


class _Dropped(Exception):  # noqa: N818 - never leaves this module
    """The connection ended; the next attempt may succeed."""


class _NotSent(_Dropped):
    """The connection ended before the request went out on it."""


class RingClient:
    """One vTPM device of this domain.

    Args:
        path: The backend's ring socket.
        handle: Number of the device in this domain, as in the registry (devid).
        reconnect_s: How long a request waits for a backend that went away, in seconds.
        may_run_twice: What to do with an outstanding request when the backend has lost its memory:
            True submits it as a new one (right for requests that are the same done twice), False
            raises `RingLost`.
        may_forget: A backend that was started anew, and so has another memory, is as good. Not for
            a guest: it would go on with clean PCRs.
        on_status: Called with one line when this client begins to wait for its backend and when it
            has it again; from the thread that waits.
    """

    def __init__(  # noqa: PLR0913 - one and five named ones with defaults
        self,
        path: Path,
        *,
        handle: int = 0,
        reconnect_s: float = RECONNECT_S,
        may_run_twice: bool = False,
        may_forget: bool = True,
        on_status: Callable[[str], None] | None = None,
    ) -> None:
        self.path = path
        self.uuid: UUID | None = None
        """Of the vTPM, as the backend's registry has it; None before the first connection."""
        self.ring_id = ""
        self._reconnect_s = reconnect_s
        self._may_run_twice = may_run_twice
        self._on_status = on_status or (lambda _: None)
        self._ring = FrontendRing(handle, may_forget=may_forget)
        self._connection: socket.socket | None = None
        self._opening: socket.socket | None = None  # the connection that is in its handshake
        self._turn = FairLock()
        self._in_turn = self._turn.guarding(self._exchange_in_turn)
        self._guard = threading.Lock()  # of _ring and connections, against cancel and close
        self._closed = threading.Event()
        self._is_exchanging = False
        self._is_cancel_wanted = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- connecting ----------------------------------------------------------------------------

    def connect(self, timeout_s: float) -> None:
        """Connect, waiting for the backend to appear.

        Args:
            timeout_s: How long to wait, in seconds.

        Raises:
            RingRefused: The backend does not take this frontend.
            RingLost: The backend did not appear in time, or `close` was called.
            Failure: The socket cannot be reached (rights, wrong kind).
        """
        with self._turn:
            if self._connection is None:
                self._connect(timeout_s)
                self._forget_outstanding()

    def _connect(self, timeout_s: float) -> Fate:
        """Try until connected; the turn is ours."""
        deadline = time.monotonic() + timeout_s
        pause_s, pause_s_max = RETRY_S
        is_waiting = False
        while True:
            try:
                fate = self._connect_once(deadline)
            except (NotListening, NotNow, _Dropped) as reason:
                if not is_waiting:
                    is_waiting = True
                    self._on_status(f"waiting for the backend at {self.path}")
                if self._closed.wait(pause_s):
                    raise self._lost("this client was closed") from reason
                if time.monotonic() >= deadline:
                    raise self._lost(_why(reason)) from reason
                pause_s = min(2 * pause_s, pause_s_max)
            else:
                if is_waiting:
                    self._on_status(f"connected to the backend at {self.path}")
                return fate

    def _connect_once(self, deadline: float) -> Fate:
        self._drop()
        if self._closed.is_set():
            raise self._lost("this client was closed")
        connection = connect(
            self.path, Kind.SEQPACKET, timeout_s=max(0.001, deadline - time.monotonic())
        )
        try:
            self._begin(connection)
            fate = self._handshake(connection, deadline)
            set_receive_timeout(connection, ANSWER_S)
            self._keep(connection)
        except (OSError, DecodeError) as error:
            connection.close()
            raise _Dropped(f"the connection broke in the handshake: {error}") from error
        except BaseException:
            connection.close()
            raise
        finally:
            self._opening = None
        return fate

    def _begin(self, connection: socket.socket) -> None:
        """Let `close` end the handshake: who is stopped, or still starts, may say nothing in it."""
        with self._guard:
            if self._closed.is_set():
                raise self._lost("this client was closed")
            self._opening = connection

    def _keep(self, connection: socket.socket) -> None:
        with self._guard:
            if self._closed.is_set():
                raise self._lost("this client was closed")
            self._connection = connection

    def _handshake(self, connection: socket.socket, deadline: float) -> Fate:
        set_send_timeout(connection, SEND_S)
        with self._guard:
            self._ring.reconnect()
        while True:
            # The backend may let us wait until the command of our last connection has ended.
            set_receive_timeout(connection, max(0.001, deadline - time.monotonic()))
            message = connection.recv(MESSAGE_BYTES_MAX + 1)
            if not message:
                raise _Dropped("the backend closed the connection in the handshake")
            event = self._ring.receive(message)
            if isinstance(event, BackendWaiting):
                connection.send(self._ring.publish())
            elif isinstance(event, BackendConnected):
                if event.fate is Fate.ROLLED_BACK:
                    raise self._lost(event.fate.value, RingRolledBack)
                connection.send(self._ring.connected())
                self.uuid, self.ring_id = event.uuid, event.ring_id
                return event.fate
            elif isinstance(event, PeerClosed):
                raise RingRefused(
                    f"the backend at {self.path} refuses this frontend",
                    why=event.reason or "it gives no reason",
                    next_step="Check the domain's vtpm= line and label: vtpm vtpm-list DOMAIN.",
                    exit_code=ExitCode.NO_PERMISSION,
                )
            elif event is not None:
                raise _Dropped(f"the backend left in the handshake: {event}")

    def _forget_outstanding(self) -> None:
        """Forget a request that was never sent, or that its caller was told is lost."""
        if self._ring.outstanding is not None:
            self._ring.abandon()

    def _drop(self) -> None:
        with self._guard:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    # -- commands ------------------------------------------------------------------------------

    def exchange(
        self, request: bytes, locality: int = 0, *, before_send: BeforeSend | None = None
    ) -> bytes:
        """Send a request and wait for its response, over reconnects if need be.

        Args:
            request: Up to 4088 bytes.
            locality: The locality to ask for; the backend decides.
            before_send: Told under what it goes out, for a `resume` by the process after this one.

        Raises:
            RingCancelled: `cancel` was called in time; nothing was changed.
            RingLost: The backend did not come back or answer in time, or has lost its memory
                (`RingForgotten`) or a part of it (`RingRolledBack`).
            RingRefused: The backend that came back does not take this frontend.
            RequestTooLong: The request is longer than 4088 bytes.
        """
        if len(request) > PACKET_BYTES_MAX:
            raise _too_long(len(request))
        return self._in_turn((request, locality, before_send))

    def _exchange_in_turn(self, asked: tuple[bytes, int, BeforeSend | None]) -> bytes:
        request, locality, before_send = asked
        self._is_cancel_wanted, self._is_exchanging = False, True
        try:
            return self._exchange(request, locality, before_send)
        finally:
            self._is_exchanging = False

    def resume(self, request: bytes, sent: Sent, before_send: BeforeSend) -> bytes:
        """Bring a request to its end that an earlier process of this domain has sent.

        Args:
            request: As it was sent.
            sent: What `before_send` was told last.
            before_send: As for `exchange`.

        Raises:
            RingForgotten: The backend cannot tell what became of it.
            Failure: As `exchange`.
        """
        with self._turn:
            self._drop()
            self._is_cancel_wanted = False
            with self._guard:
                self._ring.reconnect()
                self._ring.restore(sent.memory, Request(sent.sequence, 0, request))
            return self._exchange(request, 0, before_send, was_sent=True)

    def _exchange(
        self,
        request: bytes,
        locality: int,
        before_send: BeforeSend | None,
        *,
        was_sent: bool = False,  # perhaps executed: a send that fails delivers nothing
    ) -> bytes:
        """Bring a request to its end, over as many connections as it takes."""
        reason: Exception | None = None
        for _ in range(RECONNECTS_MAX + 1):
            if self._connection is None:
                fate = self._connect(self._reconnect_s)
                if not was_sent:
                    self._forget_outstanding()
                self._check_fate(fate, reason)
            try:
                return self._attempt(request, locality, before_send)
            except _NotSent as error:
                reason = error
            except (_Dropped, OSError, DecodeError) as error:
                reason, was_sent = error, True
            self._drop()
        raise self._lost(f"it went away {RECONNECTS_MAX} times during this request") from reason

    def _check_fate(self, fate: Fate, reason: Exception | None) -> None:
        """Decide, after a reconnect, whether the request may be submitted (again)."""
        if self._is_cancel_wanted and fate in {Fate.NONE, Fate.NOT_EXECUTED}:
            self._forget_outstanding()
            raise _cancelled(self.path)
        if fate is Fate.UNKNOWN and self._ring.outstanding is not None:
            self._ring.abandon()
            if not self._may_run_twice:
                why = "it has lost its memory of this ring in between"
                raise self._lost(why, RingForgotten) from reason

    def _attempt(  # noqa: C901 - the steps in a row; every command comes by
        self, request: bytes, locality: int, before_send: BeforeSend | None = None
    ) -> bytes:
        """Submit, or resubmit what is outstanding, and wait for the answer on this connection."""
        with self._guard:
            connection = self._connection
            if connection is None:
                raise _NotSent("the connection was closed")
            ring = self._ring
            if ring.outstanding is None:
                message = ring.submit(request, locality)
            else:
                message = ring.resubmit()
            if before_send is not None:
                self._tell(before_send, connection)
            try:
                connection.send(message)
            except OSError as error:
                raise _NotSent(f"the request could not be sent: {error}") from error
            if self._is_cancel_wanted:  # asked for while there was no connection
                self._send_cancel(connection)
        while True:
            try:
                message = connection.recv(MESSAGE_BYTES_MAX + 1)
            except BlockingIOError:
                message = self._receive_late(connection)
            if not message:
                raise _Dropped("the backend closed the connection")
            with self._guard:
                event = ring.receive(message)
            if type(event) is Finished:
                return event.packet
            if event is not None:
                raise self._no_response(event)

    def _tell(self, before_send: BeforeSend, connection: socket.socket) -> None:
        """Call `before_send`; the guard is ours."""
        try:
            before_send(Sent(self._ring.memory, self._ring.sequence))
        except BaseException:
            # The request is on our page and not on the ring: the next one finds a page as new.
            self._connection = None
            connection.close()
            raise

    def _no_response(self, event: object) -> Exception:
        if isinstance(event, Cancelled):
            return _cancelled(self.path)
        return _Dropped(f"the backend is closing: {event}")

    def _receive_late(self, connection: socket.socket) -> bytes:
        """Cancel a command that takes too long, and wait a little more."""
        self.cancel()
        set_receive_timeout(connection, CANCEL_S)
        try:
            message = connection.recv(MESSAGE_BYTES_MAX + 1)
        except BlockingIOError as error:
            self._drop()
            raise self._lost(f"it gave no answer within {ANSWER_S + CANCEL_S:.0f} s") from error
        set_receive_timeout(connection, ANSWER_S)
        return message

    def cancel(self) -> bool:
        """Ask the backend to give up on the request in flight; from any thread.

        Returns:
            Whether there was one. Its `exchange` then ends with `RingCancelled`, or with the
            response if the backend could not stop in time.
        """
        with self._guard:
            if not self._is_exchanging:
                return False
            self._is_cancel_wanted = True
            if self._connection is not None:
                self._send_cancel(self._connection)
            return True

    def _send_cancel(self, connection: socket.socket) -> None:
        """Send CANCEL if the page is such; the guard is ours."""
        message = self._ring.cancel()
        if message is not None:
            with contextlib.suppress(OSError):  # the exchanging thread sees it too
                connection.send(message)

    # -- the end -------------------------------------------------------------------------------

    def close(self) -> None:
        """Let go of the ring; the TPM stays as it is. A waiting `exchange` ends with `RingLost`."""
        self._closed.set()
        if not self._turn.try_acquire():
            with self._guard:
                for connection in filter(None, (self._connection, self._opening)):
                    with contextlib.suppress(OSError):
                        connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            if self._connection is not None:
                self._say_farewell(self._connection)
            self._drop()
        finally:
            self._turn.release()

    def _say_farewell(self, connection: socket.socket) -> None:
        """Walk to Closed, so that the backend has let go when this returns."""
        with contextlib.suppress(OSError, DecodeError):
            set_receive_timeout(connection, FAREWELL_S)
            connection.send(self._ring.closing())
            connection.send(self._ring.closed())
            while message := connection.recv(MESSAGE_BYTES_MAX + 1):
                self._ring.receive(message)

    def _lost(self, why: str, kind: type[RingLost] = RingLost) -> RingLost:
        return kind(
            f"the backend at {self.path} is lost",
            why=why,
            next_step="See what runs with: vtpm status. Then repeat the command.",
            exit_code=ExitCode.UNAVAILABLE,
        )


def _why(reason: Exception) -> str:
    return reason.why if isinstance(reason, Failure) else str(reason)


def _cancelled(path: Path) -> RingCancelled:
    return RingCancelled(
        f"the command to {path} was cancelled",
        why="it was asked for, and the command had changed nothing yet",
        next_step="Repeat the command if it is still wanted.",
    )


def _too_long(length: int) -> RequestTooLong:
    return RequestTooLong(
        f"cannot send a request of {length} bytes",
        why=f"the shared page takes {PACKET_BYTES_MAX} bytes",
        next_step="Split the data; TPM_CAP_PROP_INPUT_BUFFER tells this limit.",
        exit_code=ExitCode.USAGE,
    )
