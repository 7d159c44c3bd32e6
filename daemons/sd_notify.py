"""The readiness protocol of systemd, both ends: a daemon tells, launcher or systemd listens.

A daemon cannot tell which of the two started it, and need not. Without NOTIFY_SOCKET it says
nothing.

Spec: sd_notify(3), sd_watchdog_enabled(3).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from daemons.errors import Failure
from daemons.listeners import Kind, Listener, listen, socket_address

DATAGRAM_BYTES_MAX: Final = 4096
FIELDS_MAX: Final = 32
STATUS_CHARS_MAX: Final = 512
NO_COMMAND: Final = b""
"""What an engine is asked, to see that it answers: too short for a command, so the answer is
TPM_BAD_PARAM_SIZE and nothing in the TPM has changed."""
SEND_S: Final = 1.0
"""A launcher that does not read must not hold up its children for longer."""

_UCRED: Final = struct.Struct("=iII")


# -- the daemon's side ---------------------------------------------------------------------------


class Notifier:
    """Tells the service manager how this process is.

    Args:
        address: NOTIFY_SOCKET: a path, or `@NAME` for an abstract socket; None: nobody listens.
        watchdog_s: How often at most the manager wants a WATCHDOG, in seconds; None: it doesn't.
    """

    def __init__(self, address: str | None = None, watchdog_s: float | None = None) -> None:
        self._address = address
        self.watchdog_s = watchdog_s

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read NOTIFY_SOCKET, WATCHDOG_USEC and WATCHDOG_PID."""
        watchdog_s = None
        microseconds = environ.get("WATCHDOG_USEC", "")
        is_for_us = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        if microseconds.isdecimal() and int(microseconds) > 0 and is_for_us:
            watchdog_s = int(microseconds) / 1_000_000
        return cls(environ.get("NOTIFY_SOCKET") or None, watchdog_s)

    def ready(self, status: str = "") -> None:
        """Say that the state is loaded and the sockets accept."""
        self.send(READY="1", **({"STATUS": status} if status else {}))

    def status(self, text: str) -> None:
        """Say in one line what this process does or waits for."""
        self.send(STATUS=text)

    def reloading(self) -> None:
        """Say that settings are being read again; `ready` says that it is done."""
        self.send(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def stopping(self, status: str = "") -> None:
        """Say that this process is about to end."""
        self.send(STOPPING="1", **({"STATUS": status} if status else {}))

    def watchdog(self) -> None:
        """Say that this process is alive. Call it after a real answer of the engine."""
        self.send(WATCHDOG="1")

    def pausing(self) -> None:
        """Say that there will be no WATCHDOG, and that this is not to be minded."""
        self.send(WATCHDOG_USEC="0")

    def unpaused(self) -> None:
        """Say that from now on there is a WATCHDOG again, as often as was asked for."""
        if self.watchdog_s is not None:
            self.send(WATCHDOG="1", WATCHDOG_USEC=str(round(self.watchdog_s * 1_000_000)))

    def send(self, **fields: str) -> None:
        """Send fields in one datagram. A manager that is gone is not an error of ours."""
        if self._address is None:
            return
        with (
            contextlib.suppress(OSError, Failure),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            sender.settimeout(SEND_S)
            datagram = encode_fields(fields)
            if self._address.startswith("@"):
                sender.sendto(datagram, "\0" + self._address[1:])
            else:
                with socket_address(Path(self._address)) as address:
                    sender.sendto(datagram, address)


def notify(**fields: str) -> None:
    """Send fields to the service manager named in this process's environment, if there is one."""
    Notifier.from_environment(os.environ).send(**fields)


def encode_fields(fields: Mapping[str, str]) -> bytes:
    """Write `NAME=text` lines. Control characters become spaces, so no text can add a field."""
    lines = []
    for name, text in fields.items():
        clean = "".join(c if c.isprintable() else " " for c in text)[:STATUS_CHARS_MAX]
        lines.append(f"{name}={clean}")
    return "\n".join(lines).encode("utf-8", errors="replace")


# -- the service manager's side ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """What a process said, and who the kernel says it was."""

    pid: int
    uid: int
    gid: int
    fields: Mapping[str, str]


def listen_for_notifications(path: Path) -> Listener:
    """Bind the datagram socket whose path goes to children as NOTIFY_SOCKET.

    Raises:
        Failure: As `listeners.listen`.
    """
    listener = listen(path, Kind.DATAGRAM)
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    return listener


def receive_notification(receiver: socket.socket) -> Notification | None:
    """Take one datagram; None when it is malformed, too long or without credentials.

    Raises:
        BlockingIOError: The socket is non-blocking and nothing is there.
    """
    # The control area has room for credentials and not one byte more, so the kernel drops any
    # descriptors that a process attaches: nobody can fill our table.
    datagram, ancillary, flags, _ = receiver.recvmsg(
        DATAGRAM_BYTES_MAX, socket.CMSG_SPACE(_UCRED.size)
    )
    if flags & socket.MSG_TRUNC:
        return None
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS):
            fields = parse_fields(datagram)
            if fields is None or len(content) != _UCRED.size:
                return None
            pid, uid, gid = _UCRED.unpack(content)
            return Notification(pid=pid, uid=uid, gid=gid, fields=fields)
    return None


def parse_fields(datagram: bytes) -> dict[str, str] | None:
    """Read `NAME=text` lines; None when one of them is not, or there are too many."""
    try:
        lines = datagram.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        return None
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            continue
        name, separator, text = line.partition("=")
        if not separator or not name.isascii() or not name.replace("_", "").isalnum():
            return None
        fields[name] = text
    return fields if len(fields) <= FIELDS_MAX else None
