"""The fork server: one warm, frozen, single-threaded Python from which every daemon is forked.

A fresh interpreter that imports trio, cryptography and construct takes 100-135 ms and some 20 MB of
its own; a child forked from a parent that has imported everything and frozen its heap is there in a
few milliseconds and shares nearly all of it.

Until it is ready, its standard error is a file of the launcher's, so that the reason of a failed
start can be told; then it becomes what `--stderr` names.

The launcher starts this module as a program of its own (so that it never has threads, whatever the
launcher does, and can be started again) with one end of a SOCK_SEQPACKET pair. Each packet is one
JSON object:

    to the server      {"spawn": id, "program", "argv", "environment", "title", "oom_score_adj"}
                       and 4 descriptors beside it
    from the server    {"ready": true}             every module is imported
                       {"spawned": id, "pid"}  or  {"spawned": id, "error"}
                       {"exited": pid, "status"}   exit code, or minus the signal number

The descriptors are the child's standard input, output and error, and the read end of its gate: the
child does nothing before a byte comes through the gate, so the launcher can write its pid into the
registry first. A gate that closes without a byte (the launcher died) ends the child unborn.

Invariants:

- A child leads a session and a process group of its own; what is left of the group when it ends is
  killed.
- A killed launcher costs no child its life: the server goes on reaping and ends with its last
  child.
- Signals that stop the launcher do not stop the server: its end is the end of the link and of the
  children.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import io
import json
import os
import resource
import selectors
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import setproctitle

from daemons.errors import ExitCode, Failure
from daemons.launcher.processes import become_child_subreaper

PACKET_BYTES_MAX = 65536
DESCRIPTORS_PER_SPAWN = 4
GO = b"g"
UNBORN_EXIT_STATUS = 75
"""Exit status of a child whose gate closed before it was opened (EX_TEMPFAIL)."""

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that are meant for the launcher when the server gets them."""

Main = Callable[[list[str]], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What a child runs and how it looks from outside.

    Attributes:
        program: Name in the server's table of programs.
        argv: Arguments for its `main`, without the program's name.
        environment: The child's whole environment.
        title: Process title, as `ps` shows it.
        oom_score_adj: 0 to 1000; the higher, the sooner the kernel ends it when memory runs out.
    """

    program: str
    argv: tuple[str, ...] = ()
    environment: Mapping[str, str]
    title: str
    oom_score_adj: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Newborn:
    """A forked child on its way out of the server's loop."""

    order: Order
    main: Main
    stdio: tuple[int, int, int]
    gate: int


def encode_spawn(number: int, order: Order) -> bytes:
    """Make the packet that asks for a child; its descriptors travel beside it.

    Raises:
        Failure: The environment that the child is to have is too long.
    """
    packet = json.dumps(
        {
            "spawn": number,
            "program": order.program,
            "argv": list(order.argv),
            "environment": dict(order.environment),
            "title": order.title,
            "oom_score_adj": order.oom_score_adj,
        }
    ).encode()
    if len(packet) > PACKET_BYTES_MAX:
        raise Failure(
            f"cannot start {order.title}",
            why=f"its order has {len(packet)} bytes, more than {PACKET_BYTES_MAX}",
            next_step=f"Start the launcher with a shorter {_longest(order.environment)}",
            exit_code=ExitCode.CONFIGURATION,
        )
    return packet


def _longest(environment: Mapping[str, str]) -> str:
    return max(environment, key=lambda name: len(environment[name]), default="environment")


class _Server:
    """The loop of the fork server: takes orders, forks, reaps."""

    def __init__(
        self, link: socket.socket, programs: Mapping[str, Main], broken: Mapping[str, str]
    ) -> None:
        self._link = link
        self._programs = programs
        self._broken = broken
        self._children: set[int] = set()
        self._linked = True
        self._wake_out, self._wake_in = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._link, selectors.EVENT_READ)
        self._selector.register(self._wake_out, selectors.EVENT_READ)
        signal.set_wakeup_fd(self._wake_in, warn_on_full_buffer=False)

    def serve(self) -> _Newborn | None:
        """Serve until the link is closed and the last child has ended.

        Returns:
            None in the server itself at its end; in a forked child at once what it has to run.
        """
        self._tell({"ready": True})
        while self._linked or self._children:
            for key, _ in self._selector.select():
                if key.fileobj is self._link:
                    newborn = self._take_order()
                    if newborn is not None:
                        self._close_in_child()
                        return newborn
                else:
                    self._drain_wakeups()
                    self._reap()
        return None

    def _take_order(self) -> _Newborn | None:
        try:
            packet, descriptors, _, _ = socket.recv_fds(
                self._link, PACKET_BYTES_MAX, DESCRIPTORS_PER_SPAWN, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionError:
            packet, descriptors = b"", []
        if not packet:
            self._linked = False
            self._selector.unregister(self._link)
            return None
        number, order = _decode_spawn(packet)
        reason = self._broken.get(order.program)
        if reason is None and order.program not in self._programs:
            reason = f"no program {order.program!r} (there are: {', '.join(self._programs)})"
        if reason is None and len(descriptors) != DESCRIPTORS_PER_SPAWN:
            reason = f"{len(descriptors)} descriptors instead of {DESCRIPTORS_PER_SPAWN}"
        pid = -1
        if reason is None:
            try:
                pid = _fork()
            except OSError as error:
                reason = f"fork: {error.strerror}"
        if pid == 0:
            stdin, stdout, stderr, gate = descriptors
            return _Newborn(
                order=order,
                main=self._programs[order.program],
                stdio=(stdin, stdout, stderr),
                gate=gate,
            )
        for descriptor in descriptors:
            os.close(descriptor)
        if reason is None:
            self._children.add(pid)
            self._tell({"spawned": number, "pid": pid})
        else:
            self._tell({"spawned": number, "error": reason})
        return None

    def _close_in_child(self) -> None:
        """Let go of what belongs to the server only."""
        signal.set_wakeup_fd(-1)
        self._selector.close()
        self._link.close()
        os.close(self._wake_out)
        os.close(self._wake_in)

    def _drain_wakeups(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while os.read(self._wake_out, 512):
                pass

    def _reap(self) -> None:
        """Take every ended child; also orphans that came to us, since we are their subreaper."""
        while True:
            try:
                # WNOWAIT: while the leader is a zombie its process group number cannot be anybody
                # else's.
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            pid = ended.si_pid
            if pid in self._children:
                _kill_group(pid)
            _, wait_status = os.waitpid(pid, 0)
            if pid in self._children:
                self._children.remove(pid)
                self._tell({"exited": pid, "status": os.waitstatus_to_exitcode(wait_status)})

    def _tell(self, message: dict[str, object]) -> None:
        # Also after the launcher has said (by a half-closed link) that it has no more orders.
        with contextlib.suppress(ConnectionError):
            self._link.sendall(json.dumps(message).encode())


def _fork() -> int:
    """Fork; what the server ignores waits in the child until it takes signals as a daemon does.

    Else a child that is told to stop as soon as it is there would not hear it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _IGNORED)
    pid = -1
    try:
        pid = os.fork()
    finally:
        if pid != 0:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    return pid


def _decode_spawn(packet: bytes) -> tuple[int, Order]:
    fields = json.loads(packet)
    return fields["spawn"], Order(
        program=fields["program"],
        argv=tuple(fields["argv"]),
        environment=fields["environment"],
        title=fields["title"],
        oom_score_adj=fields["oom_score_adj"],
    )


def _kill_group(pid: int) -> None:
    # Nobody may be left, or it ended before it had made its group.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _live(newborn: _Newborn) -> int:
    """Become the daemon: the rest of a forked child's life.

    Returns:
        The exit status of the daemon's `main`.
    """
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _IGNORED)
    for target, descriptor in enumerate(newborn.stdio):
        os.dup2(descriptor, target)
    for descriptor in newborn.stdio:
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        # Decided anew: what the server wrote to may have been a terminal, the child's log is a
        # file.
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prefer_as_oom_victim(newborn.order.oom_score_adj)
    os.environ.clear()
    os.environ.update(newborn.order.environment)
    setproctitle.setproctitle(newborn.order.title)
    is_open = os.read(newborn.gate, 1) == GO
    os.close(newborn.gate)
    if not is_open:
        return UNBORN_EXIT_STATUS
    # `random` and OpenSSL notice the fork by themselves.
    return newborn.main(list(newborn.order.argv))


def _prefer_as_oom_victim(oom_score_adj: int) -> None:
    """Raise the score; to lower an inherited one takes privilege."""
    place = Path("/proc/self/oom_score_adj")
    try:
        if int(place.read_text()) < oom_score_adj:
            place.write_text(str(oom_score_adj))
    except OSError:
        pass  # a wish; some containers forbid it


def _import_programs(specifications: Sequence[str]) -> tuple[dict[str, Main], dict[str, str]]:
    """Import `name=module:function` each; what cannot be imported is kept with its reason."""
    programs: dict[str, Main] = {}
    broken: dict[str, str] = {}
    for specification in specifications:
        name, _, place = specification.partition("=")
        module_name, _, function_name = place.partition(":")
        try:
            programs[name] = getattr(importlib.import_module(module_name), function_name)
        except (ImportError, AttributeError) as error:
            broken[name] = f"{place} cannot be imported: {error}"
    return programs, broken


def main(argv: Sequence[str] | None = None) -> int:
    """Run the fork server; in each forked child, run the daemon.

    Args:
        argv: `--link FD [--stderr FD] [--title TEXT] [--warm module:function]
            name=module:function...`

    Returns:
        The exit status of the process, be it the server's or a child's.
    """
    parser = argparse.ArgumentParser(prog="fork_server", description="warm parent of the daemons")
    parser.add_argument("--link", type=int, required=True, metavar="FD")
    parser.add_argument("--stderr", type=int, metavar="FD", help="standard error, once ready")
    parser.add_argument("--title", default="vtpm fork server")
    parser.add_argument("--warm", metavar="MODULE:FUNCTION", help="called once before forking")
    parser.add_argument("programs", nargs="+", metavar="NAME=MODULE:FUNCTION")
    options = parser.parse_args(argv)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # so that it reaches the wakeup descriptor
    become_child_subreaper()
    setproctitle.setproctitle(options.title)
    programs, broken = _import_programs(options.programs)
    if options.warm is not None:
        module_name, _, function_name = options.warm.partition(":")
        getattr(importlib.import_module(module_name), function_name)()
    if options.stderr is not None:
        os.dup2(options.stderr, 2)
        os.close(options.stderr)
    link = socket.socket(fileno=options.link)
    link.set_inheritable(False)
    gc.collect()
    gc.freeze()
    newborn = _Server(link, programs, broken).serve()
    if newborn is None:
        return 0
    return _live(newborn)


if __name__ == "__main__":
    sys.exit(main())
