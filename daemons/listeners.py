"""Unix sockets of the stack: bind, inherit, connect, and who is at the other end.

Everything about the address of a socket is here; what is said over it is up to the callers.

- A socket file has mode 0600 and stands in a directory of mode 0700 that belongs to us or to root;
  where a person says the path, in one where nobody else can exchange it (/tmp will do).
- Nothing but a socket is ever removed, and a socket only when no process accepts on it.
- A path too long for `sockaddr_un` (107 bytes) is reached through `/proc/self/fd/N/NAME`.
- A peer is who the kernel says it is (`SO_PEERCRED`), never who it says it is.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import select
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Final, Self

from daemons.errors import OUT_OF_RESOURCES, ExitCode, Failure, NotNow

SOCKET_PATH_BYTES_MAX: Final = 107
"""`sun_path` has 108 bytes, one of them for the terminating zero."""
BACKLOG: Final = 128
"""Connections that the kernel keeps waiting for an `accept`."""
CONNECT_S: Final = 5.0
"""How long a `connect` waits for room in the backlog of a busy daemon."""
DIRECTORY_LOCK_S: Final = 5.0
"""How long to wait for a directory that others may lock too."""
_LOCK_RETRY_S: Final = 0.02
SYSTEMD_FIRST_FD: Final = 3
"""SD_LISTEN_FDS_START: the first descriptor that systemd passes."""

_SO_PEERPIDFD: Final = 77
"""`asm-generic/socket.h`, Linux 6.5; Python 3.11 does not name it."""
_ACCEPTS: Final = 1 << 16
"""`linux/net.h`: __SO_ACCEPTCON, as /proc/net/unix shows it."""
_UCRED: Final = struct.Struct("=iII")
_START_TIME_FIELD: Final = 22
"""`proc(5)`: starttime, in clock ticks since boot."""


class Kind(IntEnum):
    """How a socket keeps its messages apart."""

    STREAM = socket.SOCK_STREAM
    SEQPACKET = socket.SOCK_SEQPACKET
    DATAGRAM = socket.SOCK_DGRAM


class NotListening(Failure):
    """Nobody accepts connections at a path: no file, or one that a dead process has left."""


class AlreadyRunning(Failure):
    """Another live process holds what this one wants to hold."""


# -- who a peer is -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerCredentials:
    """What the kernel knows about the process that made a connection.

    Attributes:
        pid: Its process id when it connected (or, for a listening socket, called `listen`).
        uid: Its effective user id at that moment.
        gid: Its effective group id at that moment.
        start_time: Field 22 of `/proc/PID/stat` (clock ticks since boot); with the pid it names a
            process for good. None when the process is gone.
        lack: What the system lacked to tell the start time; empty when it is as said above.
    """

    pid: int
    uid: int
    gid: int
    start_time: int | None
    lack: str = ""


def start_time_of(pid: int) -> int | None:
    """Read when a process started, in clock ticks since boot; None without such a process.

    Raises:
        OSError: The system has no descriptor or memory for us, so it cannot be told.
    """
    try:
        line = Path(f"/proc/{pid}/stat").read_text("ascii", errors="replace")
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        return None
    # The second field is the program's name in brackets and may hold spaces and brackets itself.
    fields_from_third = line.rpartition(")")[2].split()
    return int(fields_from_third[_START_TIME_FIELD - 3])


def peer_credentials(connection: socket.socket) -> PeerCredentials:
    """Ask the kernel who is at the other end of a connected Unix socket.

    Raises:
        OSError: The descriptor is not a connected Unix socket.
    """
    ucred = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, gid = _UCRED.unpack(ucred)
    start_time, lack = None, ""
    try:
        start_time = _peer_start_time(connection, pid)
    except OSError as error:
        # Not everybody needs it, and who does can tell a lack of ours from a peer that is gone.
        lack = error.strerror or str(error)
    return PeerCredentials(pid=pid, uid=uid, gid=gid, start_time=start_time, lack=lack)


def _peer_start_time(connection: socket.socket, pid: int) -> int | None:
    """Read the peer's start time, and make sure that its pid was not given to another meanwhile."""
    try:
        pidfd = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError as error:
        if error.errno in OUT_OF_RESOURCES:
            raise
        # Kernels before 6.5 have no such option; anything else says that the process is gone.
        return start_time_of(pid) if error.errno == errno.ENOPROTOOPT else None
    try:
        start_time = start_time_of(pid)
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        return None if poll.poll(0) else start_time
    finally:
        os.close(pidfd)


def has_hung_up(connection: socket.socket) -> bool:
    """Look whether the other end was closed, which it is when its process has ended."""
    poll = select.poll()
    poll.register(connection, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


# -- directories and addresses -------------------------------------------------------------------


@contextlib.contextmanager
def private_directory(directory: Path) -> Iterator[int]:
    """Open a directory that only we (and root) can reach into, locked against our own other starts.

    Yields:
        The directory's descriptor. Until the end of the `with` block no other process that comes
        through here works in the same directory.

    Raises:
        Failure: It is missing, not a directory, a symbolic link, owned by somebody else, or open to
            group or others.
    """
    with _opened_directory(directory) as descriptor:
        _check_private(descriptor, directory)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor


@contextlib.contextmanager
def steady_directory(directory: Path) -> Iterator[int]:
    """Open a directory in which nobody else can exchange what is ours: for a path a person chose.

    Others may look into it, and put in what is theirs if it is sticky, as /tmp is. It is locked as
    a private one is; here others can hold the lock too, so it is not waited for without end.

    Yields:
        The directory's descriptor.

    Raises:
        Failure: It is missing, not a directory, a symbolic link, owned by somebody else, writable
            for others and not sticky, or locked by somebody who does not let go.
    """
    with _opened_directory(directory) as descriptor:
        _check_steady(descriptor, directory)
        _lock_in_time(descriptor, directory)
        yield descriptor


@contextlib.contextmanager
def _opened_directory(directory: Path) -> Iterator[int]:
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        why = {
            errno.ENOENT: "it is not there",
            errno.ENOTDIR: "it is not a directory",
            errno.ELOOP: "it is a symbolic link",
        }.get(error.errno or 0, os.strerror(error.errno or 0))
        if Path(directory).is_symlink():  # O_DIRECTORY answers ENOTDIR for a link on some kernels
            why = "it is a symbolic link"
        raise Failure(
            _unusable(directory),
            why=why,
            next_step=f"Make it with: install -d -m 0700 {directory}",
            exit_code=ExitCode.NO_PERMISSION if error.errno == errno.EACCES else ExitCode.NO_INPUT,
        ) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unusable(directory: Path) -> str:
    return f"cannot use directory {directory}"


def _check_private(descriptor: int, directory: Path) -> None:
    status = _check_owner(descriptor, directory)
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise Failure(
            _unusable(directory),
            why=f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others can reach into it",
            next_step=f"Close it with: chmod 0700 {directory}",
            exit_code=ExitCode.NO_PERMISSION,
        )


def _check_steady(descriptor: int, directory: Path) -> None:
    status = _check_owner(descriptor, directory)
    if status.st_mode & 0o022 and not status.st_mode & stat.S_ISVTX:
        raise Failure(
            _unusable(directory),
            why=f"its mode is {stat.S_IMODE(status.st_mode):04o}, so others can exchange what is "
            "in it",
            next_step=f"Close it with: chmod go-w {directory}",
            exit_code=ExitCode.NO_PERMISSION,
        )


def _check_owner(descriptor: int, directory: Path) -> os.stat_result:
    status = os.fstat(descriptor)
    if status.st_uid not in {0, os.geteuid()}:
        raise Failure(
            _unusable(directory),
            why=f"it belongs to user {status.st_uid}, and this process is user {os.geteuid()}",
            next_step=f"Choose another place, or: chown {os.geteuid()} {directory}",
            exit_code=ExitCode.NO_PERMISSION,
        )
    return status


def _lock_in_time(descriptor: int, directory: Path) -> None:
    deadline = time.monotonic() + DIRECTORY_LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() < deadline:
                time.sleep(_LOCK_RETRY_S)
                continue
            raise Failure(
                _unusable(directory),
                why=f"another process has held a lock on it for {DIRECTORY_LOCK_S:.0f} s",
                next_step=f"Find it with: lsof {directory}; or choose another place.",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error
        else:
            return


@contextlib.contextmanager
def socket_address(path: Path) -> Iterator[str]:
    """Give an address for a path of any length, usable inside the `with` block.

    Raises:
        Failure: The file name alone is too long, or the directory of a long path is missing.
    """
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    try:
        descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _connect_failure(path, error) from error
    try:
        address = f"/proc/self/fd/{descriptor}/{path.name}"
        if len(os.fsencode(address)) > SOCKET_PATH_BYTES_MAX:
            raise Failure(
                f"cannot use socket {path}",
                why=f"its file name has {len(os.fsencode(path.name))} bytes, too many for a socket",
                next_step="Choose a shorter domain name.",
                exit_code=ExitCode.CONFIGURATION,
            )
        yield address
    finally:
        os.close(descriptor)


# -- connecting ----------------------------------------------------------------------------------


def connect(path: Path, kind: Kind, timeout_s: float = CONNECT_S) -> socket.socket:
    """Connect to a Unix socket; the result is a blocking socket without time limits.

    Args:
        path: The socket file; may be longer than 107 bytes.
        kind: The kind of the listening socket.
        timeout_s: How long to wait for room in the backlog, in seconds.

    Raises:
        NotListening: There is no socket, or nobody accepts on it.
        NotNow: No room in time, or the system has no descriptor for us.
        Failure: No permission, no socket, or another kind of socket.
    """
    try:
        connection = socket.socket(socket.AF_UNIX, kind)
    except OSError as error:
        raise _connect_failure(path, error) from error
    try:
        # A time limit of Python's would make the descriptor non-blocking, and Linux answers a
        # non-blocking connect to a full backlog with EAGAIN instead of waiting.
        set_send_timeout(connection, timeout_s)
        with socket_address(path) as address:
            connection.connect(address)
        connection.getpeername()
        set_send_timeout(connection, 0)
    except OSError as error:
        connection.close()
        raise _connect_failure(path, error) from error
    except BaseException:
        connection.close()
        raise
    return connection


def set_receive_timeout(connection: socket.socket, timeout_s: float) -> None:
    """Limit every blocking receive, in seconds; 0 removes the limit.

    Unlike `settimeout` this costs no extra system call a message.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout_s))


def set_send_timeout(connection: socket.socket, timeout_s: float) -> None:
    """Limit every blocking send, in seconds; 0 removes the limit."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timeout_s))


def _timeval(seconds: float) -> bytes:
    microseconds = max(0, round(seconds * 1_000_000))
    return struct.pack("@ll", *divmod(microseconds, 1_000_000))


_NOT_NOW: Final = dict.fromkeys(
    OUT_OF_RESOURCES,
    ("", "Look for a limit on descriptors or memory (ulimit -n, fs.file-max)."),
) | {
    errno.EAGAIN: (
        "the daemon there is too busy to accept another connection",
        "Try again; if it stays so, look at the daemon's log.",
    )
}
"""Why, and the next step."""


def _connect_failure(path: Path, error: OSError) -> Failure:
    what = f"cannot connect to {path}"
    if error.errno == errno.ENOENT:
        return NotListening(
            what,
            why="there is no such socket",
            next_step="Start the daemon that serves it: vtpm status shows what runs.",
            exit_code=ExitCode.UNAVAILABLE,
        )
    if error.errno == errno.ECONNREFUSED:
        return NotListening(
            what,
            why=f"no process accepts there ({describe_file(path)})",
            next_step="Start the daemon that serves it: vtpm status shows what runs.",
            exit_code=ExitCode.UNAVAILABLE,
        )
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Failure(
            what,
            why=f"user {os.geteuid()} may not reach it",
            next_step=_who_may_connect(path),
            exit_code=ExitCode.NO_PERMISSION,
        )
    if error.errno in _NOT_NOW:
        why, next_step = _NOT_NOW[error.errno]
        return NotNow(
            what,
            why=why or os.strerror(error.errno),
            next_step=next_step,
            exit_code=ExitCode.UNAVAILABLE,
        )
    if error.errno == errno.EPROTOTYPE:
        return Failure(
            what,
            why="the socket there is of another kind",
            next_step="Check the path: tpm0 is a stream, ring.sock a sequential-packet socket.",
            exit_code=ExitCode.USAGE,
        )
    return Failure(
        what,
        why=os.strerror(error.errno or 0),
        next_step="Check the path and its directory.",
        exit_code=ExitCode.UNAVAILABLE,
    )


def _who_may_connect(path: Path) -> str:
    with contextlib.suppress(OSError, KeyError):
        status = path.stat()
        if status.st_mode & stat.S_IWGRP:
            group = grp.getgrgid(status.st_gid).gr_name
            return f"Run as a member of the group {group}: usermod --append --groups {group} USER"
    return "Run as the user that started the stack."


# -- listening -----------------------------------------------------------------------------------


Directory = Callable[[Path], contextlib.AbstractContextManager[int]]
"""Opens and locks a directory that is fit for a socket; gives its descriptor."""


@dataclass(slots=True)
class Listener:
    """A listening socket and, when we bound it, the file that stands for it.

    Closing it removes the file if it is still the one that we made. A socket inherited from systemd
    has no path: systemd keeps it.
    """

    socket: socket.socket
    path: Path | None
    _identity: tuple[int, int] | None = field(default=None, repr=False)
    _directory: Directory = field(default=private_directory, repr=False)

    def close(self) -> None:
        """Stop listening and remove our socket file. Safe to call again."""
        if self.socket.fileno() == -1:
            return
        try:
            if self.path is not None:
                self._remove_file(self.path)
        finally:
            self.socket.close()

    def _remove_file(self, path: Path) -> None:
        with contextlib.suppress(Failure), self._directory(path.parent) as directory:
            status = _status(path.name, directory)
            if status is not None and _identity(status) == self._identity:
                os.unlink(path.name, dir_fd=directory)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def listen(
    path: Path,
    kind: Kind,
    backlog: int = BACKLOG,
    *,
    open_directory: Directory = private_directory,
) -> Listener:
    """Bind and listen at a path, taking the place of a socket that a dead process has left.

    Args:
        path: Where the socket file stands; its directory must exist.
        kind: STREAM, SEQPACKET, or DATAGRAM (bound only).
        backlog: Connections kept waiting for `accept`.
        open_directory: What the directory must be: `private_directory` or `steady_directory`.

    Raises:
        AlreadyRunning: A live process accepts there; the message names its pid.
        Failure: The directory is not as demanded, something else stands at the path, or the name is
            too long.
    """
    bound = socket.socket(socket.AF_UNIX, kind)
    try:
        with open_directory(path.parent) as directory:
            _make_room(path, kind, directory)
            # The mode of the file is that of the descriptor at the moment of bind, so no other
            # mode is ever seen, and the umask of the process stays as it is.
            os.fchmod(bound.fileno(), 0o600)
            with socket_address(path) as address:
                bound.bind(address)
            status = _bound_status(path, directory)
            if kind is not Kind.DATAGRAM:
                bound.listen(backlog)
    except OSError as error:
        bound.close()
        raise Failure(
            f"cannot listen at {path}",
            why=os.strerror(error.errno or 0),
            next_step="Check the directory and the free space of its file system.",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    except BaseException:
        bound.close()
        raise
    return Listener(bound, path, _identity(status), open_directory)


def _bound_status(path: Path, directory: int) -> os.stat_result:
    status = _status(path.name, directory)
    if status is None:
        raise Failure(
            f"cannot listen at {path}",
            why="its directory was exchanged for another at the same moment",
            next_step="Find out who moves directories there, then start again.",
            exit_code=ExitCode.NO_PERMISSION,
        )
    return status


def describe_file(path: Path, directory: int | None = None) -> str:
    """Say in words what stands at a path, without following a link."""
    status = _status(path.name if directory is not None else str(path), directory)
    if status is None:
        return "nothing is there"
    names = {
        stat.S_IFLNK: "a symbolic link",
        stat.S_IFIFO: "a FIFO",
        stat.S_IFREG: "an ordinary file",
        stat.S_IFDIR: "a directory",
        stat.S_IFSOCK: "a socket",
        stat.S_IFCHR: "a character device",
        stat.S_IFBLK: "a block device",
    }
    name = names.get(stat.S_IFMT(status.st_mode), "something unknown")
    age_s = max(0, round(time.time() - status.st_mtime))
    return f"{name} of user {status.st_uid}, changed {age_s} s ago"


def served_paths(table: Path = Path("/proc/net/unix")) -> frozenset[str]:
    """The paths on which a live process takes connections (or datagrams), as they were bound.

    Nobody is connected to for it. Paths of more than 107 bytes were bound in another way, and are
    not among them.

    Raises:
        OSError: The kernel does not say.
    """
    served = set()
    for line in os.fsdecode(table.read_bytes()).splitlines()[1:]:
        # number, references, protocol, flags, type, state, inode, path
        words = line.split(maxsplit=7)
        if len(words) == 8 and (int(words[3], 16) & _ACCEPTS or int(words[4], 16) == Kind.DATAGRAM):
            served.add(words[7])
    return frozenset(served)


def _make_room(path: Path, kind: Kind, directory: int) -> None:
    """Remove a dead socket at the path; refuse everything else. The directory is locked."""
    status = _status(path.name, directory)
    if status is None:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise Failure(
            f"cannot listen at {path}",
            why=f"{describe_file(path, directory)} is in the way",
            next_step="Look at what it is; it was left alone. Move it away to go on.",
            exit_code=ExitCode.IO_ERROR,
        )
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        try:
            with socket_address(path) as address:
                probe.connect(address)
            holder = f"process {peer_credentials(probe).pid}"
        except ConnectionRefusedError:
            os.unlink(path.name, dir_fd=directory)
            return
        except OSError as error:  # EAGAIN: its backlog is full; EPROTOTYPE: another kind; both live
            holder = f"a live process ({os.strerror(error.errno or 0)})"
    raise AlreadyRunning(
        f"cannot listen at {path}",
        why=f"{holder} already serves it",
        next_step="Stop that one first, or choose another root.",
        exit_code=ExitCode.UNAVAILABLE,
    )


def _status(path: str, directory: int | None) -> os.stat_result | None:
    try:
        return os.stat(path, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


# -- sockets passed by systemd -------------------------------------------------------------------


class InheritedSockets:
    """The listening sockets that systemd passed to this process, by their names.

    Spec: sd_listen_fds(3): LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES.
    """

    def __init__(self, sockets: list[tuple[str, socket.socket]]) -> None:
        self._sockets = sockets

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Self:
        """Take over what systemd passed; the variables are removed, so children see nothing.

        Raises:
            Failure: The variables cannot be understood, or a descriptor is no Unix socket.
        """
        pid, count_text = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
        names_text = environ.pop("LISTEN_FDNAMES", "")
        if not count_text or pid != str(os.getpid()):
            return cls([])
        if not count_text.isdecimal():
            raise _bad_inheritance(f"LISTEN_FDS is {count_text!r}, not a number")
        count = int(count_text)
        names = names_text.split(":") if names_text else ["unknown"] * count
        if len(names) != count:
            raise _bad_inheritance(f"{count} descriptors but {len(names)} names")
        sockets = []
        for descriptor, name in enumerate(names, SYSTEMD_FIRST_FD):
            try:
                os.set_inheritable(descriptor, False)
                passed = socket.socket(fileno=descriptor)
            except OSError as error:
                raise _bad_inheritance(
                    f"descriptor {descriptor} ({name}): {os.strerror(error.errno or 0)}"
                ) from error
            sockets.append((name, passed))
        return cls(sockets)

    def take(self, name: str, kind: Kind) -> Listener | None:
        """Hand out the first socket of a name, once; None when systemd passed none.

        Raises:
            Failure: It is not a listening Unix socket of this kind.
        """
        for position, (passed_name, passed) in enumerate(self._sockets):
            if passed_name != name:
                continue
            del self._sockets[position]
            is_fit = passed.family == socket.AF_UNIX and passed.type == int(kind)
            if kind is not Kind.DATAGRAM:
                accepting = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                is_fit = is_fit and bool(accepting)
            if not is_fit:
                passed.close()
                raise _bad_inheritance(f"{name} is not a listening Unix {kind.name} socket")
            return Listener(passed, None)
        return None

    def close(self) -> None:
        """Close what nobody took."""
        for _, passed in self._sockets:
            passed.close()
        self._sockets.clear()


def activated_or_listen(name: str, path: Path, kind: Kind) -> Listener:
    """Use the socket that systemd passed to this process under a name, else bind one at the path.

    Raises:
        Failure: What systemd passed cannot be used; or as `listen`.
    """
    return inherit_or_listen(InheritedSockets.from_environment(os.environ), name, path, kind)


def inherit_or_listen(
    inherited: InheritedSockets, name: str, path: Path, kind: Kind, backlog: int = BACKLOG
) -> Listener:
    """Use the socket that systemd passed under a name, else bind one at the path."""
    return inherited.take(name, kind) or listen(path, kind, backlog)


def _bad_inheritance(why: str) -> Failure:
    return Failure(
        "cannot use the sockets passed by systemd",
        why=why,
        next_step="Check the .socket unit: FileDescriptorName=, ListenSequentialPacket=.",
        exit_code=ExitCode.CONFIGURATION,
    )
