"""The frame of every daemon: accept, hand over, say READY, drain on a signal, end with a reason.

trio owns lifetimes here. What is said over a connection is the handler's business; a handler may
give its socket to a worker thread and wait for it.

- A peer's fault (bad bytes, too slow, gone) ends that peer's connection and costs one log line.
- Anything else that a handler raises is ours: it stops the daemon, and whoever started it restarts
  it.
- Connections over the limit are closed at once and cost the others nothing.

| Signal | Then |
|---|---|
| SIGTERM, SIGINT | it drains, and ends |
| SIGHUP | it reads again what may change while it runs: how much it logs |
| SIGTSTP | it stops where it stands until SIGCONT; the watchdog, if there is one, is told before |
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, ParamSpec, cast

import trio

from daemons import heap, log_levels, logs, standard_streams
from daemons.errors import OUT_OF_RESOURCES, ExitCode, Failure
from daemons.lean_structlog import structlog
from daemons.listeners import Listener, PeerCredentials, peer_credentials
from daemons.sd_notify import Notifier
from daemons.threads import NoThread, run_in_thread
from protocol.wire import DecodeError

P = ParamSpec("P")

DRAIN_S: Final = 5.0
"""How long open connections may finish what they do after a stop was asked for."""
CONNECTIONS_MAX: Final = 512
ACCEPT_RETRY_S: Final = 0.1
"""Pause after the system had no descriptor or memory for one more connection."""
PINGS: Final = 3
"""So many answers are told in the time after which the service manager would kill us."""
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)

PEER_FAULTS: Final[tuple[type[Exception], ...]] = (
    DecodeError,
    ConnectionError,
    TimeoutError,
    trio.TooSlowError,
    trio.BrokenResourceError,
)
"""What a peer can cause. No handler lets an error of these types escape from its own links."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Connection:
    """One accepted connection.

    Attributes:
        socket: Closed by the frame when the handler returns.
        peer: Who the kernel says it is, asked at accept.
        connection_id: Counts the accepted connections of this process from 1.
        stopping: Set when the daemon was asked to stop: finish what is open and return.
    """

    socket: trio.socket.SocketType
    peer: PeerCredentials
    connection_id: int
    stopping: trio.Event


Handler = Callable[[Connection], Awaitable[None]]


async def serve(  # noqa: PLR0913 - two and five named ones, each with a default
    handler: Handler,
    listeners: Sequence[Listener],
    *,
    drain_s: float = DRAIN_S,
    connections_max: int = CONNECTIONS_MAX,
    notifier: Notifier | None = None,
    is_alive: Callable[[], object] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve connections until SIGTERM or SIGINT; then drain, and return.

    The listeners are closed (and their files removed) as soon as accepting ends.

    Args:
        handler: Called in a task of its own for each connection; wrap it in `ends_with_its_peer`.
        listeners: Stream and sequential-packet listeners.
        drain_s: Seconds that open connections have after the signal; then they are cancelled.
        connections_max: Open connections over all listeners; more are refused by closing them.
        notifier: Where READY and STOPPING go; from the environment when None.
        is_alive: Gets an answer of what this daemon serves, whatever it is; may block. If the
            service manager wants to know, it is told each time that this returns.
        task_status: `nursery.start(serve, ...)` returns when the sockets accept.

    Raises:
        BaseExceptionGroup: What a handler raised.
    """
    notifier = notifier or Notifier.from_environment(os.environ)
    stopping = trio.Event()
    try:
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
            async with trio.open_nursery() as connections:
                async with trio.open_nursery() as accepting:
                    door = _Door(handler, connections, stopping, connections_max)
                    for listener in listeners:
                        accepting.start_soon(door.accept_from, listener)
                    if is_alive is not None and notifier.watchdog_s is not None:
                        accepting.start_soon(
                            _tell_alive, is_alive, notifier, notifier.watchdog_s / PINGS
                        )
                    await accepting.start(_reload_when_asked, notifier)
                    if notifier.watchdog_s is not None:
                        await accepting.start(_pause_when_asked, notifier)
                    notifier.ready()
                    task_status.started()
                    received = await anext(signals)
                    structlog.get_logger().info(
                        "stopping", signal=signal.Signals(received).name, open=door.open_count
                    )
                    notifier.stopping()
                    accepting.cancel_scope.cancel()
                _close(listeners)  # first, so that who is sent away now waits for our successor
                stopping.set()
                connections.cancel_scope.deadline = trio.current_time() + drain_s
    finally:
        _close(listeners)


async def _tell_alive(is_alive: Callable[[], object], notifier: Notifier, pause_s: float) -> None:
    """Tell the service manager each time that what we serve has answered."""
    while True:
        # A thread that hangs is abandoned when the daemon stops; until then nothing is told.
        try:
            await run_in_thread(is_alive, abandon_on_cancel=True)
        except NoThread as lack:  # it may pass; if it does not, we are killed for our silence
            structlog.get_logger().error("cannot tell that we are alive", reason=lack.why)
        else:
            notifier.watchdog()
        await trio.sleep(pause_s)


async def _reload_when_asked(
    notifier: Notifier, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGHUP) as signals:
        task_status.started()
        async for _ in signals:
            notifier.reloading()
            log_levels.read_again()
            notifier.ready()


async def _pause_when_asked(
    notifier: Notifier, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Stop all of this process, as SIGTSTP does anyway, but tell the watchdog first."""
    with trio.open_signal_receiver(signal.SIGTSTP) as signals:
        task_status.started()
        async for _ in signals:
            notifier.pausing()
            os.kill(os.getpid(), signal.SIGSTOP)
            notifier.unpaused()


def _close(listeners: Iterable[Listener]) -> None:
    for listener in listeners:
        listener.close()


class _Door:
    """Accepts connections and starts their handlers, up to a number."""

    def __init__(
        self,
        handler: Handler,
        connections: trio.Nursery,
        stopping: trio.Event,
        connections_max: int,
    ) -> None:
        self._handler = handler
        self._connections = connections
        self._stopping = stopping
        self._connections_max = connections_max
        self._ids: Iterator[int] = count(1)
        self._has_told_full = False
        self._memory = heap.AfterBursts(connections, stopping)
        self.open_count = 0

    async def accept_from(self, listener: Listener) -> None:
        accepting = trio.socket.from_stdlib_socket(listener.socket)
        while True:
            try:
                accepted, _ = await accepting.accept()
            except OSError as error:
                if error.errno in OUT_OF_RESOURCES:
                    structlog.get_logger().error("cannot accept", reason=error.strerror)
                    await trio.sleep(ACCEPT_RETRY_S)
                elif error.errno != errno.ECONNABORTED:
                    raise
                continue
            self._start(accepted)

    def _start(self, accepted: trio.socket.SocketType) -> None:
        if self.open_count >= self._connections_max:
            accepted.close()
            if not self._has_told_full:  # once a flood, not once a connection
                self._has_told_full = True
                structlog.get_logger().error(
                    "refusing connections", reason="too many are open", limit=self._connections_max
                )
            return
        self._has_told_full = False
        connection = Connection(
            socket=accepted,
            peer=peer_credentials(cast("socket.socket", accepted)),  # the same getsockopt
            connection_id=next(self._ids),
            stopping=self._stopping,
        )
        self.open_count += 1
        self._connections.start_soon(self._run, connection)

    async def _run(self, connection: Connection) -> None:
        try:
            await self._handler(connection)
        finally:
            self.open_count -= 1
            connection.socket.close()
            self._memory.connection_ended()


def ends_with_its_peer(
    *more_faults: type[Exception],
) -> Callable[[Callable[P, Awaitable[None]]], Callable[P, Awaitable[None]]]:
    """Wrap a handler so that a peer's fault closes the connection and writes one log line.

    Args:
        more_faults: What else counts as the peer's fault, beside `PEER_FAULTS`.
    """
    faults = PEER_FAULTS + more_faults

    def wrap(handler: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
        @functools.wraps(handler)
        async def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                await handler(*args, **kwargs)
            except* faults as group:
                connection = next((a for a in args if isinstance(a, Connection)), None)
                _log_peer_fault(connection, next(_leaves(group)))

        return wrapper

    return wrap


def _log_peer_fault(connection: Connection | None, fault: BaseException) -> None:
    who: dict[str, Any] = {}
    if connection is not None:
        who = {"peer_pid": connection.peer.pid, "connection": connection.connection_id}
    structlog.get_logger().info(
        "connection ended by its peer", reason=str(fault) or type(fault).__name__, **who
    )


def run_daemon(program: str, main: Callable[[], Awaitable[None]]) -> int:
    """Run a daemon to its end and give its exit code.

    A `Failure` becomes one readable line and its own code; SIGTERM, SIGINT and KeyboardInterrupt
    are a clean stop at any moment, also while `main` is still loading; anything else is a bug of
    ours, with its traceback in the log. The reason also goes to the service manager as STATUS.

    Args:
        program: The daemon's name, for log lines until `main` configures its own.
        main: The daemon as a coroutine function without arguments.
    """
    standard_streams.open_closed()
    logs.configure(program)
    # Whose terminal goes stays; and who is told to reload before it serves has just read it all.
    hung_up_before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trio.run(_main_with_signals, main, strict_exception_groups=True)
    except KeyboardInterrupt:
        return ExitCode.DONE
    except BaseException as raised:  # noqa: BLE001 - the one place where everything ends
        return _tell_end(raised)
    finally:
        signal.signal(signal.SIGHUP, hung_up_before)
    return ExitCode.DONE


async def _main_with_signals(main: Callable[[], Awaitable[None]]) -> None:
    """Run `main`, and cancel it on a signal that comes while no `serve` takes signals."""
    async with trio.open_nursery() as nursery:
        await nursery.start(_cancel_on_signal, nursery.cancel_scope)
        await main()
        nursery.cancel_scope.cancel()


async def _cancel_on_signal(
    scope: trio.CancelScope, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(*STOP_SIGNALS) as signals:
        task_status.started()
        await anext(signals)
        structlog.get_logger().info("stopped before it was ready")
        scope.cancel()


def _tell_end(raised: BaseException) -> int:
    """Log what ended the daemon and give the exit code."""
    leaves = list(_leaves(raised))
    bugs = [leaf for leaf in leaves if not isinstance(leaf, Failure | KeyboardInterrupt)]
    failures = [leaf for leaf in leaves if isinstance(leaf, Failure)]
    log = structlog.get_logger()
    notifier = Notifier.from_environment(os.environ)
    if bugs:
        exits = [bug for bug in bugs if isinstance(bug, SystemExit)]
        if len(exits) == len(leaves) and isinstance(exits[0].code, int | None):
            return exits[0].code or ExitCode.DONE
        log.error(
            "this is a bug of ours; please report the lines below",
            exception_type=type(bugs[0]).__name__,
            exc_info=raised,
        )
        notifier.status(f"ended by a bug: {type(bugs[0]).__name__}; see the log")
        return ExitCode.BUG
    for failure in failures:
        log.error(
            failure.what,
            why=failure.why,
            next_step=failure.next_step,
            exit_code=int(failure.exit_code),
        )
    if not failures:
        return ExitCode.DONE
    notifier.status(f"{failures[0].what}: {failures[0].why}")
    return failures[0].exit_code


def _leaves(raised: BaseException) -> Iterator[BaseException]:
    if isinstance(raised, BaseExceptionGroup):
        for inner in raised.exceptions:
            yield from _leaves(inner)
    else:
        yield raised
