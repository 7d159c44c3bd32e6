"""tpm0: a stream socket with the behaviour of /dev/tpm0, for any TPM 1.2 program.

A client writes one command and reads one response, exact bytes both ways. Several clients may be
connected; each command runs whole, in the order in which the ring takes them. There is no resource
manager, as there is none behind a TPM 1.2 character device.

- Each connection has one worker thread with blocking receives and sends: a command costs two
  system calls here, and no switch between tasks.
- A client that stays silent inside a command, or does not read its response, is let go after a
  time; one that is silent between commands is not.
- A TPM 2.0 command is passed on like any other (the vTPM refuses it, with TPM_BAD_ORDINAL or
  TPM_BADTAG), and is told to the people who run the guest, once.
- When the vTPM cannot be reached any more, a command gets TPM_IOERROR, as a driver would give EIO.

Leaves to others: cutting commands out of the stream (`protocol.framing`), the ring (`ring_client`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog
import trio

from daemons.errors import Failure
from daemons.listeners import set_receive_timeout, set_send_timeout
from daemons.service import Connection, ends_with_its_peer
from protocol.framing import HEADER_BYTES, CommandFramer, FrameError, error_response
from protocol.return_codes import ReturnCode
from protocol.tpmif_page import PACKET_BYTES_MAX

CLIENTS_MAX: Final = 64
"""Connected programs, each with a thread; more are refused by closing them."""
STALL_S: Final = 60.0
"""A client may take this long within one command, and to read one response."""
_RECEIVE_BYTES: Final = 4096
_TPM2_TAGS: Final = (b"\x80\x01", b"\x80\x02")
"""TPM_ST_NO_SESSIONS and TPM_ST_SESSIONS of TPM 2.0, where 1.2 has 0x00C1 to 0x00C3."""
_SIZE: Final = slice(2, 6)

Exchange = Callable[[bytes], bytes]
"""Runs one TPM command; thread-safe."""


class Tpm0Device:
    """Serves tpm0 to its clients.

    Args:
        exchange: Runs one command on the vTPM. It raises `Failure` when the vTPM stays away.
        tell: Called with a line for `vtpm status` when there is something that people should know.
        give_up: Called when the daemon's drain time has passed and a command still runs; `exchange`
            must then raise `Failure` soon.
        clients_max: See `CLIENTS_MAX`.
        stall_s: See `STALL_S`.
    """

    def __init__(
        self,
        exchange: Exchange,
        tell: Callable[[str], None],
        give_up: Callable[[], None],
        *,
        clients_max: int = CLIENTS_MAX,
        stall_s: float = STALL_S,
    ) -> None:
        self._exchange = exchange
        self._tell = tell
        self._give_up = give_up
        self._stall_s = stall_s
        self._threads = trio.CapacityLimiter(clients_max)
        self._notice = threading.Lock()
        self._has_seen_tpm2 = False

    @ends_with_its_peer()
    async def handle(self, connection: Connection) -> None:
        """Serve one client until it leaves or the daemon stops."""
        with _blocking(connection) as client:
            async with trio.open_nursery() as nursery:
                served = trio.Event()
                nursery.start_soon(self._end_on_stop, client, connection.stopping, served)
                try:
                    await trio.to_thread.run_sync(
                        self.serve_client, client, connection.peer.pid, limiter=self._threads
                    )
                finally:
                    served.set()
                    nursery.cancel_scope.cancel()

    async def _end_on_stop(
        self, client: socket.socket, stopping: trio.Event, served: trio.Event
    ) -> None:
        """Take no more commands once the daemon stops; break off when this is cancelled."""
        try:
            await stopping.wait()
            # The thread sees the end of the stream, after it has answered the command it is in.
            _shut(client, socket.SHUT_RD)
            await trio.sleep_forever()
        finally:
            if not served.is_set():
                _shut(client, socket.SHUT_RDWR)
                self._give_up()

    def serve_client(self, client: socket.socket, peer_pid: int) -> None:
        """Answer commands until the client closes; runs in a worker thread.

        Raises:
            FrameError: Bytes that cannot be cut into commands; the client has been told.
            TimeoutError: The client stalled inside a command or did not read.
        """
        set_receive_timeout(client, self._stall_s)
        set_send_timeout(client, self._stall_s)
        framer = CommandFramer(PACKET_BYTES_MAX)
        while True:
            try:
                data = client.recv(_RECEIVE_BYTES)
            except BlockingIOError as error:
                if framer.is_inside_command:
                    raise TimeoutError("stalled inside a command") from error
                continue
            if not data:
                return
            if _is_one_command(data) and not framer.is_inside_command:
                self._answer(client, data, peer_pid)
                continue
            framer.feed(data)
            try:
                while (command := framer.next_command()) is not None:
                    self._answer(client, command, peer_pid)
            except FrameError as error:
                client.sendall(error.response)
                raise

    def _answer(self, client: socket.socket, command: bytes, peer_pid: int) -> None:
        if command[:2] in _TPM2_TAGS:
            self._notice_tpm2(peer_pid)
        try:
            response = self._exchange(command)
        except Failure as failure:
            structlog.get_logger().error(
                "command not answered by the vTPM", reason=str(failure), peer_pid=peer_pid
            )
            response = error_response(ReturnCode.IOERROR)
        try:
            client.sendall(response)
        except BlockingIOError as error:
            raise TimeoutError("did not read its response") from error

    def _notice_tpm2(self, peer_pid: int) -> None:
        with self._notice:
            if self._has_seen_tpm2:
                return
            self._has_seen_tpm2 = True
        structlog.get_logger().warning(
            "a TPM 2.0 program talks to this TPM 1.2, which refuses its commands", peer_pid=peer_pid
        )
        self._tell(f"process {peer_pid} sent TPM 2.0 commands, but this is a TPM 1.2")


def _is_one_command(data: bytes) -> bool:
    """The usual case, for which nothing needs to be kept or cut: exactly one command."""
    size = len(data)
    return HEADER_BYTES <= size <= PACKET_BYTES_MAX and int.from_bytes(data[_SIZE], "big") == size


@contextmanager
def _blocking(connection: Connection) -> Iterator[socket.socket]:
    """A blocking view of an accepted connection, for a worker thread."""
    client = socket.socket(fileno=os.dup(connection.socket.fileno()))
    try:
        client.setblocking(True)
        yield client
    finally:
        client.close()


def _shut(client: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        client.shutdown(how)
