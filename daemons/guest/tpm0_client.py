"""A program's side of tpm0: one command out, one response back, blocking."""

from __future__ import annotations

import socket
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from daemons.errors import ExitCode, Failure
from daemons.listeners import Kind, connect, set_receive_timeout
from protocol.constants import HEADER_BYTES, Tag
from protocol.framing import CommandFramer, FrameError

ANSWER_S: Final = 300.0
"""The longest a TPM 1.2 command may take: key generation on a slow machine."""
_RECEIVE_BYTES: Final = 4096
_RESPONSE_TAGS: Final = frozenset({Tag.RSP_COMMAND, Tag.RSP_AUTH1_COMMAND, Tag.RSP_AUTH2_COMMAND})


class Tpm0Client:
    """A connection to a guest's tpm0; `exchange` is what `tpm12.client` wants.

    Args:
        path: The socket.
        answer_s: How long to wait for one response, in seconds.

    Raises:
        Failure: Nobody serves it, or no permission.
    """

    def __init__(self, path: Path, *, answer_s: float = ANSWER_S) -> None:
        self._path = path
        self._connection: socket.socket = connect(path, Kind.STREAM)
        set_receive_timeout(self._connection, answer_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def exchange(self, request: bytes) -> bytes:
        """Send one command and wait for its response.

        Raises:
            Failure: The guest closed the connection, answered in bytes that are no response, or
                did not answer in time.
        """
        framer, is_first = CommandFramer(), True
        try:
            self._connection.sendall(request)
            while (response := framer.next_command()) is None:
                data = self._connection.recv(_RECEIVE_BYTES)
                if not data:
                    raise self._lost("the guest closed the connection")
                if is_first:
                    self._check_begins_a_response(data)
                is_first = False
                framer.feed(data)
        except BlockingIOError as error:
            raise self._lost("no answer in time") from error
        except (OSError, FrameError) as error:
            raise self._lost(str(error)) from error
        return response

    def _check_begins_a_response(self, data: bytes) -> None:
        """Refuse a few bytes that no response begins with; whoever sent them sends no more.

        A control channel's answer to what it does not know, say (docs/qemu.md).
        """
        tag = int.from_bytes(data[:2], "big")
        if 2 <= len(data) < HEADER_BYTES and tag not in _RESPONSE_TAGS:
            raise self._lost(f"{data.hex()} is no answer of a TPM 1.2; is it a control socket?")

    def _lost(self, why: str) -> Failure:
        return Failure(
            f"no response from {self._path}",
            why=why,
            next_step="vtpm status shows how the guest is",
            exit_code=ExitCode.UNAVAILABLE,
        )
