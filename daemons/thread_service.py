"""A service that is nothing but threads: accept, a thread per client, end on a signal.

The daemons are served by `service.py`, where trio owns what lives and ends. This is for a program
that is started for one client and at once, like `vtpm simulator`: it comes up in half the time and
memory when trio is not imported (0.1 s, 10 MB).

- Signals are read from a pipe by the one thread that accepts, so nothing happens inside a handler.
- A client's fault ends its connection and costs one log line. Anything else is ours: it ends the
  service.
"""

from __future__ import annotations

import contextlib
import errno
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from daemons.errors import OUT_OF_RESOURCES
from daemons.listeners import Listener, has_hung_up, peer_credentials
from daemons.sd_notify import Notifier
from protocol.wire import DecodeError

CLIENTS_MAX: Final = 64
DRAIN_S: Final = 5.0
"""How long clients may finish what they do after a stop was asked for."""
LEAVE_S: Final = 0.5
"""How long who comes to a full door waits for those there who have closed their end."""
ACCEPT_RETRY_S: Final = 0.1
"""Pause after the system had no descriptor or memory for one more connection."""
STOPS: Final = frozenset({signal.SIGTERM, signal.SIGINT})
PEER_FAULTS: Final = (DecodeError, ConnectionError, TimeoutError)
_THREAD_ENDED: Final = 0
"""What a thread that ended by a bug writes where signals write their numbers."""

ServeClient = Callable[[socket.socket, int], None]
"""Serves one client, given its connection and pid, until it leaves."""


class Signals:
    """The signals that came, as bytes on a socket; from now until it is left.

    Args:
        wanted: Signals that are to be read here and do nothing else.
    """

    def __init__(self, wanted: frozenset[signal.Signals]) -> None:
        self._wanted = wanted
        self._reader, self._writer = socket.socketpair()

    def __enter__(self) -> Signals:
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        for number in self._wanted:
            signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number in self._wanted:
            signal.signal(number, signal.SIG_DFL)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """For poll: readable when there is something to take."""
        return self._reader.fileno()

    def take(self) -> bytes:
        """The numbers of the signals that came since."""
        with contextlib.suppress(BlockingIOError):
            return self._reader.recv(256)
        return b""

    def wake(self) -> None:
        """Make it readable; from any thread."""
        with contextlib.suppress(OSError):
            self._writer.send(bytes([_THREAD_ENDED]))


@dataclass(frozen=True, slots=True, eq=False)
class Door:
    """Where clients come in.

    Attributes:
        listener: Of stream sockets; closed at the end.
        serve_client: Called in a thread for each client.
        clients_max: More at a time are refused by closing them.
    """

    listener: Listener
    serve_client: ServeClient
    clients_max: int = CLIENTS_MAX


@dataclass(frozen=True, slots=True)
class _Client:
    connection: socket.socket
    door: Door


class ThreadService:
    """Serves the clients of some doors.

    Args:
        doors: Where they come in.
        log: Called with level, event and values of a line.
    """

    def __init__(self, doors: Sequence[Door], log: Callable[..., None]) -> None:
        self._doors = doors
        self._log = log
        self._clients: dict[threading.Thread, _Client] = {}
        self._turn = threading.Lock()
        self._bug: BaseException | None = None
        self._wake: Callable[[], None] = lambda: None

    def run(self, signals: Signals, notifier: Notifier, hung_up: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT, then drain.

        Args:
            signals: SIGTERM, SIGINT and SIGHUP.
            notifier: Where READY and STOPPING go.
            hung_up: Called at a SIGHUP.

        Raises:
            Exception: What `serve_client` raised that is no fault of a client.
        """
        self._wake = signals.wake
        try:
            with contextlib.ExitStack() as listening:
                for door in self._doors:
                    listening.enter_context(door.listener)
                    door.listener.socket.setblocking(False)
                notifier.ready()
                for number in self._accept_until_signal(signals):
                    if number in STOPS:
                        name = signal.Signals(number).name
                        self._log("info", "stopping", signal=name, open=len(self._clients))
                        break
                    if number == signal.SIGHUP:
                        hung_up()
                    if self._bug is not None:
                        raise self._bug
                notifier.stopping()
        finally:
            self._drain()

    def _accept_until_signal(self, signals: Signals) -> Iterator[int]:
        """Accept clients for ever, and give each signal that comes in between."""
        doors = {door.listener.socket.fileno(): door for door in self._doors}
        events = select.poll()
        for descriptor in doors:
            events.register(descriptor, select.POLLIN)
        events.register(signals, select.POLLIN)
        while True:
            for descriptor, _ in events.poll():
                if descriptor == signals.fileno():
                    yield from signals.take()
                else:
                    self._accept(doors[descriptor])

    def _accept(self, door: Door) -> None:
        try:
            client, _ = door.listener.socket.accept()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                self._log("error", "cannot accept", reason=error.strerror)
                time.sleep(ACCEPT_RETRY_S)
            elif error.errno not in {errno.ECONNABORTED, errno.EAGAIN}:
                raise
            return
        client.setblocking(True)
        if not self.take(client, door):
            client.close()

    def take(self, client: socket.socket, door: Door) -> bool:
        """Serve a client as if it had come in at a door; from any thread.

        Returns:
            False: too many have come in there, or there is no thread for it; it is the caller's.
        """
        self._those_who_left_have_gone(door)
        with self._turn:
            if len(self._threads_of(door)) >= door.clients_max:
                self._log("error", "refused a client", reason="too many are connected")
                return False
            thread = threading.Thread(target=self._serve, args=(client, door), daemon=True)
            try:
                thread.start()  # it waits for our turn before it ends
            except RuntimeError as error:
                self._log("error", "refused a client", reason=str(error))
                return False
            self._clients[thread] = _Client(client, door)
        return True

    def _threads_of(self, door: Door) -> list[threading.Thread]:
        """Who serves the clients of a door, with the turn held."""
        return [thread for thread, client in self._clients.items() if client.door is door]

    def _those_who_left_have_gone(self, door: Door) -> None:
        """Wait for the threads of a full door whose clients have closed their end.

        Else one who closes and comes again at once is one too many whenever our thread was slower.
        """
        with self._turn:
            there = self._threads_of(door)
            if len(there) < door.clients_max:
                return
            left = [each for each in there if has_hung_up(self._clients[each].connection)]
        end = time.monotonic() + LEAVE_S  # it may be in the midst of a long command
        for thread in left:
            thread.join(max(0.0, end - time.monotonic()))

    def _serve(self, client: socket.socket, door: Door) -> None:
        peer_pid = 0
        try:
            peer_pid = peer_credentials(client).pid
            door.serve_client(client, peer_pid)
        except PEER_FAULTS as fault:
            reason = str(fault) or type(fault).__name__
            self._log("info", "connection ended by its peer", reason=reason, peer_pid=peer_pid)
        except BaseException as bug:  # noqa: BLE001 - raised again by the thread that accepts
            self._bug = bug
            self._wake()
        finally:
            with self._turn:
                del self._clients[threading.current_thread()]
                client.close()

    def _drain(self) -> None:
        """Let clients finish the command they are in, for a time; then break off."""
        self._shut_all(socket.SHUT_RD)
        end = time.monotonic() + DRAIN_S
        for thread in [*self._clients]:
            thread.join(max(0.0, end - time.monotonic()))
        self._shut_all(socket.SHUT_RDWR)

    def _shut_all(self, how: int) -> None:
        with self._turn:
            for client in self._clients.values():
                with contextlib.suppress(OSError):
                    client.connection.shutdown(how)
