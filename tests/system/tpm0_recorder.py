"""A relay in front of tpm0 that writes down what passes: for the report of a failed test.

It takes whole commands from clients and changes nothing. Each client has a connection of its own to
the TPM, or all share one in front of a TPM that serves no second.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES = 10


@dataclass(frozen=True)
class Passed:
    """One command and its response."""

    command: bytes
    response: bytes

    @property
    def ordinal(self) -> int:
        return int.from_bytes(self.command[6:10], "big")

    @property
    def code(self) -> int:
        return int.from_bytes(self.response[6:10], "big")

    def __str__(self) -> str:
        return (
            f"ordinal 0x{self.ordinal:x} -> 0x{self.code:x}\n"
            f"  command  {self.command.hex()}\n  response {self.response.hex()}"
        )


class Recorder:
    """What has passed so far."""

    def __init__(self, tpm0: Path, shared: socket.socket | None = None) -> None:
        self._tpm0 = tpm0
        self._shared = shared
        self._turn = threading.Lock()
        self._passed: list[Passed] = []

    def take(self) -> list[Passed]:
        """What has passed since the last call."""
        taken, self._passed = self._passed, []
        return taken

    def serve(self, listener: socket.socket) -> None:
        """Serve clients, each in a thread, until the listener is shut down."""
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._relay, args=(client,), daemon=True).start()

    def _relay(self, client: socket.socket) -> None:
        with client, self._connected() as (tpm0, turn):
            while command := _read_whole(client):
                with turn:
                    tpm0.sendall(command)
                    response = _read_whole(tpm0)
                self._passed.append(Passed(command, response))
                client.sendall(response)

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[socket.socket, threading.Lock]]:
        if self._shared is not None:
            yield self._shared, self._turn
            return
        with socket.socket(socket.AF_UNIX) as own:
            own.connect(str(self._tpm0))
            yield own, threading.Lock()


def _read_whole(connection: socket.socket) -> bytes:
    """One command or response; empty at the end of the connection."""
    data = b""
    while (size := _size_wanted(data)) > 0:
        piece = connection.recv(size)
        if not piece:
            return b""
        data += piece
    return data


def _size_wanted(data: bytes) -> int:
    if len(data) < HEADER_BYTES:
        return HEADER_BYTES - len(data)
    return int.from_bytes(data[2:6], "big") - len(data)


@contextlib.contextmanager
def recorded(tpm0: Path, at: Path, *, takes_one: bool = False) -> Iterator[Recorder]:
    """Put a recorder in front of a tpm0, with a socket of its own at `at`.

    Args:
        tpm0: The TPM.
        at: Where clients find it.
        takes_one: It serves one connection at a time.
    """
    with contextlib.ExitStack() as stack:
        shared = None
        if takes_one:
            shared = stack.enter_context(socket.socket(socket.AF_UNIX))
            shared.connect(str(tpm0))
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        recorder = Recorder(tpm0, shared)
        listener.bind(str(at))
        listener.listen()
        server = threading.Thread(target=recorder.serve, args=(listener,))
        server.start()
        try:
            yield recorder
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            server.join()
            at.unlink()
