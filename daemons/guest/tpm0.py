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

Leaves to others: answering a client's commands (`tpm0_stream`), the ring (`ring_client`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import trio

from daemons.carrying import carry
from daemons.errors import Failure
from daemons.guest.tpm0_stream import STALL_S, Exchange, Tpm0Stream
from daemons.lean_structlog import structlog
from daemons.service import Connection, ends_with_its_peer

CLIENTS_MAX: Final = 64
"""Connected programs, each with a thread; more are refused by closing them."""


class Tpm0Device:
    """Serves tpm0 to its clients.

    Args:
        exchange: Runs one command on the vTPM. It raises `Failure` when the vTPM stays away.
        tell: Called with a line for `vtpm status` when there is something that people should know.
        give_up: Called when the daemon's drain time has passed and a command still runs; `exchange`
            must then raise `Failure` soon.
        clients_max: See `CLIENTS_MAX`.
        stall_s: See `STALL_S` in `tpm0_stream.py`.
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
        self._tell = tell
        self._give_up = give_up
        self._threads = trio.CapacityLimiter(clients_max)
        self._stream = Tpm0Stream(exchange, _log_unanswered, self._tell_tpm2, stall_s=stall_s)

    @ends_with_its_peer()
    async def handle(self, connection: Connection) -> None:
        """Serve one client until it leaves or the daemon stops."""
        with _blocking(connection) as client:
            await carry(
                client,
                partial(self.serve_client, client, connection.peer.pid),
                connection.stopping,
                limiter=self._threads,
                thread_name="tpm0",
                cut_short=self._give_up,
            )

    def serve_client(self, client: socket.socket, peer_pid: int) -> None:
        """Answer commands until the client closes; runs in a worker thread.

        Raises:
            FrameError: Bytes that cannot be cut into commands; the client has been told.
            TimeoutError: The client stalled inside a command or did not read.
        """
        self._stream.serve(client, peer_pid)

    def _tell_tpm2(self, peer_pid: int) -> None:
        structlog.get_logger().warning(
            "a TPM 2.0 program talks to this TPM 1.2, which refuses its commands", peer_pid=peer_pid
        )
        self._tell(f"process {peer_pid} sent TPM 2.0 commands, but this is a TPM 1.2")


def _log_unanswered(failure: Failure, peer_pid: int) -> None:
    structlog.get_logger().error(
        "command not answered by the vTPM", reason=str(failure), peer_pid=peer_pid
    )


@contextmanager
def _blocking(connection: Connection) -> Iterator[socket.socket]:
    """An accepted connection for a worker thread: the same descriptor, a second may be lacking."""
    client = socket.socket(fileno=connection.socket.detach())
    try:
        client.setblocking(True)
        yield client
    finally:
        client.close()
