"""The launcher's side of the fork server: children asked for, released, signalled and waited for.

What a child is for is not known here. When the fork server itself is killed, its children live on:
the launcher, their nearest subreaper, becomes their parent and watches them itself, and a new fork
server takes the next orders.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Protocol

import trio

from daemons.errors import ExitCode, Failure
from daemons.launcher.fork_server import (
    DESCRIPTORS_PER_SPAWN,
    GO,
    PACKET_BYTES_MAX,
    Order,
    encode_spawn,
)
from daemons.launcher.processes import is_alive, send_signal
from daemons.launcher.waiting import wait_for_end
from daemons.lean_structlog import structlog
from daemons.listeners import start_time_of

SPAWN_DEADLINE_S = 15.0
"""A fork server that is importing answers when it is done; far above the 0.2 s that takes."""
SERVERS_AT_ONCE_MAX = 3
"""Fork servers that may end by a signal one after the other without having been ready. Once one was
ready, SIGKILL is not counted: who is killed has not failed, and is wanted back each time."""
FIRST_WORDS_BYTES_MAX = 65536
START_RETRY_S = 0.5
_POLL_S = 0.005

log = structlog.get_logger()


class Process(Protocol):
    """One child process as the supervisor sees it."""

    @property
    def pid(self) -> int:
        """Its process number."""

    @property
    def start_time(self) -> int:
        """Clock ticks since boot."""

    def release(self) -> None:
        """Open its gate: it does nothing before."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its whole process group; nothing happens when it has ended."""

    async def wait(self) -> int | None:
        """Wait for its end; see `ExitedProcess` for the value."""


class _Child:
    """A child of a fork server."""

    def __init__(self, pid: int, start_time: int, gate: int | None) -> None:
        self.pid = pid
        self.start_time = start_time
        self._gate = gate
        self._ended = trio.Event()
        self._status: int | None = None

    def release(self) -> None:
        if self._gate is not None:
            # One that was killed at its gate is reported like any other.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._gate, GO)
            self.close_gate()

    def close_gate(self) -> None:
        """Close the gate; a child that was not released ends."""
        if self._gate is not None:
            os.close(self._gate)
            self._gate = None

    def signal(self, number: signal.Signals) -> None:
        if self._ended.is_set():
            return
        # The fork server reaps; until its report is read here the number may be free again, so it
        # is checked. One signal and no more: a second SIGTERM can hit a daemon that is just ending.
        if not is_alive(self.pid, self.start_time):
            return
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            send_signal(self.pid, self.start_time, number)  # at its gate it may have no group yet

    async def wait(self) -> int | None:
        """Wait for the end.

        Returns:
            The exit status, minus the signal number for a killed process, or None when nobody could
            see it.
        """
        await self._ended.wait()
        return self._status

    def end(self, status: int | None) -> None:
        """Note the end; the first report counts."""
        if not self._ended.is_set():
            self._status = status
            self.close_gate()
            self._ended.set()

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()


@dataclass(eq=False)
class _Server:
    """One fork server process and what was asked of it."""

    process: subprocess.Popen[bytes]
    link: trio.socket.SocketType
    first_words: int | None
    """A file that is its standard error until it is ready; None when it was read."""
    answers: dict[int, trio.MemorySendChannel[dict[str, object]]] = field(default_factory=dict)
    children: dict[int, _Child] = field(default_factory=dict)
    exits_before_spawned: dict[int, int] = field(default_factory=dict)
    is_ready: bool = False

    def pass_on_first_words(self) -> str:
        """Write what it said before it was ready where it would have gone; give the end of it."""
        if self.first_words is None:
            return ""
        with os.fdopen(self.first_words, "rb") as file:
            self.first_words = None
            file.seek(max(0, file.seek(0, os.SEEK_END) - FIRST_WORDS_BYTES_MAX))
            said = file.read()
        with contextlib.suppress(OSError):
            os.write(2, said)
        return said.decode("utf-8", errors="replace")


class Spawner:
    """Keeps one fork server running and gives out children.

    Args:
        programs: Program name to `module:function` of its main.
        title: Process title of the fork server.
        environment: The fork server's environment; None for the launcher's own.
        warm: `module:function` that the fork server calls before it forks anything.
    """

    def __init__(
        self,
        programs: Mapping[str, str],
        *,
        title: str,
        environment: Mapping[str, str] | None = None,
        warm: str | None = None,
    ) -> None:
        self._command = [
            *(sys.executable, "-P", "-m", "daemons.launcher.fork_server"),
            *("--title", title),
            *(("--warm", warm) if warm is not None else ()),
            *(f"{name}={place}" for name, place in programs.items()),
        ]
        self._environment = dict(os.environ if environment is None else environment)
        self._server: _Server | None = None
        self._changed = trio.Event()
        self._next_number = 1
        self._is_closing = False
        self._has_ended = trio.Event()
        self._is_ready = trio.Event()
        self._failure: Failure | None = None

    @property
    def server_pid(self) -> int | None:
        """The fork server's process, while there is one."""
        return self._server.process.pid if self._server is not None else None

    def start(self) -> None:
        """Start the first fork server; it imports while the launcher goes on.

        Raises:
            Failure: No process can be started.
        """
        with contextlib.ExitStack() as kept, contextlib.ExitStack() as passed:
            try:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                kept.enter_context(ours)
                passed.enter_context(theirs)
                first_words = os.memfd_create("stderr of the fork server")
                kept.callback(os.close, first_words)
                stderr = os.dup(2)  # passed under another number than 2, which is its own at first
                passed.callback(os.close, stderr)
                numbers = ("--link", str(theirs.fileno()), "--stderr", str(stderr))
                process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                    [*self._command[:4], *numbers, *self._command[4:]],
                    stdin=subprocess.DEVNULL,
                    stderr=first_words,
                    pass_fds=[theirs.fileno(), stderr],
                    env=self._environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise Failure(
                    "cannot start the fork server",
                    why=str(error),
                    next_step="Look for a limit on processes, descriptors or memory (ulimit -a)",
                ) from error
            kept.pop_all()
        self._server = _Server(process, trio.socket.from_stdlib_socket(ours), first_words)
        self._announce_change()

    async def _start_again(self) -> None:
        """Start another one, as soon as the system has what it takes."""
        while True:
            try:
                self.start()
            except Failure as lack:
                log.warning(lack.what, why=lack.why, next_step=lack.next_step)
                await trio.sleep(START_RETRY_S)
            else:
                return

    async def run(self) -> None:
        """Hear what fork servers say, replace one that ends, until `close`.

        Raises:
            Failure: Fork servers end again and again before they are ready.
        """
        unready_in_a_row = 0
        async with trio.open_nursery() as watchers:
            while True:
                server = self._server
                if server is None:
                    return
                try:
                    await self._hear(server)
                except trio.Cancelled:
                    server.link.close()
                    server.pass_on_first_words()
                    raise
                # Neither a thread nor a descriptor, of which there may be none: it is ending.
                while server.process.poll() is None:  # noqa: ASYNC110
                    await trio.sleep(_POLL_S)
                server.link.close()
                said = server.pass_on_first_words()
                was_killed = (
                    server.process.returncode == -signal.SIGKILL and self._is_ready.is_set()
                )
                unready_in_a_row = 0 if server.is_ready else unready_in_a_row + (not was_killed)
                for waiting in server.answers.values():
                    waiting.close()
                if self._is_closing:
                    self._server = None
                    self._has_ended.set()
                    return
                log.warning("fork server ended", status=server.process.returncode)
                for child in server.children.values():
                    watchers.start_soon(_watch_orphan, child)
                # One that ends by itself has met what the next one would meet too.
                ends_max = 1 if server.process.returncode > 0 else SERVERS_AT_ONCE_MAX
                if unready_in_a_row >= ends_max:
                    self._failure = _cannot_fork(unready_in_a_row, server.process.returncode, said)
                    self._announce_change()  # nobody waits for an answer any longer
                    raise self._failure
                await self._start_again()

    async def spawn(self, order: Order, stdout: IO[bytes] | int, stderr: IO[bytes] | int) -> _Child:
        """Fork a child; it waits at its gate until `release`.

        Args:
            order: What it runs.
            stdout: Where its standard output goes.
            stderr: Where its standard error goes.

        Raises:
            Failure: The program is unknown or cannot be imported, the fork failed, or nobody
                answered in time.
            OSError: There are no descriptors for it.
        """
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            gate_out, gate_in = os.pipe2(os.O_CLOEXEC)
        except OSError:
            os.close(null)
            raise
        try:
            # Each fork server has that long: the next one must not pay for one that was killed.
            with trio.move_on_after(SPAWN_DEADLINE_S) as deadline:
                while True:
                    descriptors = [null, _number(stdout), _number(stderr), gate_out]
                    child = await self._ask(order, descriptors, gate_in)
                    if child is not None:
                        return child
                    deadline.deadline = trio.current_time() + SPAWN_DEADLINE_S
        except BaseException:
            os.close(gate_in)
            raise
        finally:
            os.close(gate_out)
            os.close(null)
        os.close(gate_in)
        raise Failure(
            f"cannot start {order.title}",
            why=f"the fork server gave no answer within {SPAWN_DEADLINE_S:g} s",
            next_step="Look at the launcher's log; `vtpm down` and `vtpm up` start afresh",
        )

    async def ready(self) -> None:
        """Wait until a fork server has imported everything; `run` raises if none ever does."""
        await self._is_ready.wait()

    def close(self) -> None:
        """Let the fork server end once its last child has; `run` then returns."""
        self._is_closing = True
        if self._server is not None:
            self._server.link.shutdown(socket.SHUT_WR)

    async def ended(self) -> None:
        """Wait until the fork server has ended, after `close`."""
        await self._has_ended.wait()

    def abandon(self) -> None:
        """Leave nothing that has no purpose, when `run` was not called or has ended.

        A fork server without children would end by itself, but only once it has imported
        everything; one with children stays as long as they do.
        """
        server, self._server = self._server, None
        if server is None:
            return
        server.link.close()
        if server.children:
            server.process.returncode = 0  # nobody waits for it here
        else:
            server.process.kill()
            server.process.wait()
        server.pass_on_first_words()

    async def _ask(self, order: Order, descriptors: Sequence[int], gate: int) -> _Child | None:
        """Ask the present fork server once; None when it ended and another is to be asked."""
        if self._failure is not None:
            raise self._failure
        server, changed = self._server, self._changed
        if server is None:
            raise trio.ClosedResourceError
        number = self._next_number
        self._next_number += 1
        into_answer, answers = trio.open_memory_channel[dict[str, object]](1)
        server.answers[number] = into_answer
        packed = array.array("i", descriptors)
        assert len(packed) == DESCRIPTORS_PER_SPAWN
        try:
            await server.link.sendmsg(
                [encode_spawn(number, order)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, packed)]
            )
            answer = await answers.receive()
        except (OSError, trio.EndOfChannel, trio.ClosedResourceError):
            await changed.wait()
            return None
        finally:
            server.answers.pop(number, None)
        if "error" in answer:
            raise Failure(
                f"cannot start {order.title}",
                why=str(answer["error"]),
                next_step="Install the stack again, or look at the launcher's log",
                exit_code=ExitCode.BUG,
            )
        pid = answer["pid"]
        assert isinstance(pid, int)
        # A child killed at once has no start time any more; 0 is nobody's, so no signal can go
        # astray.
        lacking: OSError | None = None
        try:
            child = _Child(pid, start_time_of(pid) or 0, gate)
        except OSError as lack:
            # Nobody would be let in by a name without it. The child ends at its gate, which our
            # caller closes.
            child, lacking = _Child(pid, 0, None), lack
        early = server.exits_before_spawned.pop(pid, None)
        if early is not None:
            child.end(early)
        else:
            server.children[pid] = child
        if lacking is not None:
            raise lacking
        return child

    async def _hear(self, server: _Server) -> None:
        while True:
            try:
                packet = await server.link.recv(PACKET_BYTES_MAX)
            except OSError:
                return
            if not packet:
                return
            message = json.loads(packet)
            if "ready" in message:
                server.is_ready = True
                server.pass_on_first_words()
                self._is_ready.set()
            elif "spawned" in message:
                waiting = server.answers.get(message["spawned"])
                if waiting is not None:
                    waiting.send_nowait(message)
            elif message["exited"] in server.children:
                server.children.pop(message["exited"]).end(message["status"])
            else:
                # Reported before the task that asked for it had its turn.
                server.exits_before_spawned[message["exited"]] = message["status"]

    def _announce_change(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()


async def _watch_orphan(child: _Child) -> None:
    """Wait for a child whose fork server is gone; the kernel made it ours."""
    await wait_for_end(child.pid)
    try:
        # It has ended, so this does not wait.
        _, wait_status = os.waitpid(child.pid, os.WNOHANG)  # noqa: ASYNC222
    except ChildProcessError:
        child.end(None)
    else:
        child.end(os.waitstatus_to_exitcode(wait_status))


def _cannot_fork(times: int, status: int, said: str) -> Failure:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    how = f"killed by signal {-status}" if status < 0 else f"status {status}"
    ends = "ended" if times == 1 else f"ended {times} times"
    return Failure(
        "cannot start the fork server, from which all daemons come",
        why=f"it {ends} before it was ready ({how}): {lines[-1] if lines else 'it said nothing'}",
        next_step="Look at what it said in the launcher's log, and install the stack again",
        exit_code=ExitCode.BUG,
    )


def _number(file: IO[bytes] | int) -> int:
    return file if isinstance(file, int) else file.fileno()


def open_log(path: Path, bytes_max: int) -> IO[bytes]:
    """Open a domain's log for appending, after putting one that has grown too long aside.

    Args:
        path: In a private directory.
        bytes_max: A longer log becomes NAME.1, and the NAME.1 before it is gone.

    Raises:
        Failure: It is a symlink, or cannot be opened.
    """
    # O_NONBLOCK: a FIFO in its place is refused, and does not hold us up.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
        if _regular_size(descriptor) > bytes_max:
            os.close(descriptor)
            path.rename(path.with_name(path.name + ".1"))
            descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise Failure(
            f"cannot open the log {path}",
            why=error.strerror or str(error),
            next_step="Remove what is there, or make room on the disk",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "ab", buffering=0)


def _regular_size(descriptor: int) -> int:
    """The size of a file; closes it and raises OSError where it is no regular one."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file")
    return status.st_size
