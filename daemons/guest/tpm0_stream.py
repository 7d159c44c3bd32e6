"""The commands of one client of a tpm0 socket, answered in the thread that calls.

What tpm0 does is written in `tpm0.py`. This is the part of it that `vtpm simulator` uses too, which
does without trio.

- Blocking receives and sends: a command costs two system calls here, and no switch between tasks.
- A client that stays silent inside a command, or does not read its response, is let go after a
  time; one that is silent between commands is not.

Leaves to others: cutting commands out of the stream where they do not come one by one
(`protocol.framing`), accepting, ending.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from typing import Final

from daemons.errors import Failure
from daemons.listeners import set_receive_timeout, set_send_timeout
from protocol.framing import HEADER_BYTES, CommandFramer, FrameError, error_response
from protocol.return_codes import ReturnCode
from protocol.tpmif_page import PACKET_BYTES_MAX

STALL_S: Final = 60.0
"""A client may take this long within one command, and to read one response."""
_USUAL_BYTES: Final = 479
"""Most commands are shorter. A longer buffer is not Python's own memory, and takes 0.1 us more."""
_REST_BYTES: Final = 4096
_TPM2_TAGS: Final = (b"\x80\x01", b"\x80\x02")
"""TPM_ST_NO_SESSIONS and TPM_ST_SESSIONS of TPM 2.0, where 1.2 has 0x00C1 to 0x00C3."""
_TPM2: Final = 0x80
"""The first byte of both."""
_first_byte_and_size: Final = struct.Struct(">BxI").unpack_from

Exchange = Callable[[bytes], bytes]
"""Runs one TPM command; thread-safe."""


class Tpm0Stream:
    """Answers the commands of clients, each in a thread of its own.

    Args:
        exchange: Runs one command. It raises `Failure` when the TPM stays away.
        unanswered: Told of such a failure, with the pid of the client.
        tpm2_seen: Told once, with the pid, when a client takes this for a TPM 2.0.
        stall_s: See `STALL_S`.
    """

    def __init__(
        self,
        exchange: Exchange,
        unanswered: Callable[[Failure, int], None],
        tpm2_seen: Callable[[int], None],
        *,
        stall_s: float = STALL_S,
    ) -> None:
        self._exchange = exchange
        self._unanswered = unanswered
        self._tpm2_seen = tpm2_seen
        self._stall_s = stall_s
        self._notice = threading.Lock()
        self._has_seen_tpm2 = False

    def serve(self, client: socket.socket, peer_pid: int) -> None:
        """Answer commands until the client closes.

        Raises:
            FrameError: Bytes that cannot be cut into commands; the client has been told.
            TimeoutError: The client stalled inside a command or did not read.
        """
        set_send_timeout(client, self._stall_s)
        try:
            self._serve(client, peer_pid)
        except BlockingIOError as error:  # of any send, the last one to who sent no command too
            raise TimeoutError("did not read its response") from error

    def _serve(self, client: socket.socket, peer_pid: int) -> None:
        framer = CommandFramer(PACKET_BYTES_MAX)
        is_inside = False  # a command; only then is the client's time limited, a limit costs 0.3 us
        wanted = _USUAL_BYTES
        receive, send, exchange = client.recv, client.sendall, self._exchange
        while True:
            try:
                data = receive(wanted)
            except BlockingIOError as error:
                raise TimeoutError("stalled inside a command") from error
            size = len(data)
            if size == wanted and not is_inside:
                data += self._rest_that_is_there(client)
                size = len(data)
            # The usual case, for which nothing needs to be kept or cut: exactly one command.
            if size >= HEADER_BYTES and not is_inside:
                first, param_size = _first_byte_and_size(data)
                if param_size == size and first != _TPM2:
                    try:
                        response = exchange(data)
                    except Failure as failure:
                        response = self._ioerror(failure, peer_pid)
                    send(response)
                    continue
            if not data:
                return
            framer.feed(data)
            self._answer_whole(framer, client, peer_pid)
            if is_inside is not framer.is_inside_command:
                is_inside = not is_inside
                wanted = _REST_BYTES if is_inside else _USUAL_BYTES
                set_receive_timeout(client, self._stall_s if is_inside else 0)

    def _answer_whole(self, framer: CommandFramer, client: socket.socket, peer_pid: int) -> None:
        """Answer the commands that have come whole."""
        try:
            while (command := framer.next_command()) is not None:
                if command[:2] in _TPM2_TAGS:
                    self._notice_tpm2(peer_pid)
                try:
                    response = self._exchange(command)
                except Failure as failure:
                    response = self._ioerror(failure, peer_pid)
                client.sendall(response)
        except FrameError as error:
            client.sendall(error.response)
            raise

    @staticmethod
    def _rest_that_is_there(client: socket.socket) -> bytes:
        """What a client sent together with what has been received; a long command, as a rule."""
        try:
            return client.recv(_REST_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""

    def _ioerror(self, failure: Failure, peer_pid: int) -> bytes:
        self._unanswered(failure, peer_pid)
        return error_response(ReturnCode.IOERROR)

    def _notice_tpm2(self, peer_pid: int) -> None:
        with self._notice:
            if self._has_seen_tpm2:
                return
            self._has_seen_tpm2 = True
        self._tpm2_seen(peer_pid)
