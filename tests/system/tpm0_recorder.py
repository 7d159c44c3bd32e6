"""A relay in front of tpm0 that writes down what passes: for the report of a failed test.

It takes whole commands from clients, one connection to the guest's tpm0 for each, and changes
nothing.
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

    def __init__(self, tpm0: Path) -> None:
        self._tpm0 = tpm0
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
        with client, socket.socket(socket.AF_UNIX) as tpm0:
            tpm0.connect(str(self._tpm0))
            while command := _read_whole(client):
                tpm0.sendall(command)
                response = _read_whole(tpm0)
                self._passed.append(Passed(command, response))
                client.sendall(response)


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
def recorded(tpm0: Path, at: Path) -> Iterator[Recorder]:
    """Put a recorder in front of a tpm0, with a socket of its own at `at`."""
    recorder = Recorder(tpm0)
    with socket.socket(socket.AF_UNIX) as listener:
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
