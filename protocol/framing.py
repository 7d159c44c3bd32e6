"""Raw TPM commands on a byte stream: feed bytes in any pieces, take whole commands out.

This is how `/dev/tpm0` looks as a stream socket, and what TPM simulators speak: no framing but the
TPM header's own paramSize. A header whose paramSize cannot be right leaves nothing to find the next
command by, so the stream ends there: the client is sent one error response (`FrameError.response`,
TPM_BAD_PARAM_SIZE) and the connection is closed. A client that reads sees what was wrong, one that
doesn't sees the end. Commands that came whole before it are answered first.

- No more than `command_bytes_max` bytes of an unfinished command are ever kept.
- The size is judged as soon as its six bytes are there, not when the command is.

Linux `drivers/char/tpm/tpm-dev-common.c` refuses the same sizes with EINVAL and E2BIG, for which a
socket has no place.
"""

from __future__ import annotations

import struct
from typing import Final

from protocol.constants import Tag
from protocol.return_codes import ReturnCode
from protocol.wire import U16, U32, DecodeError, encode, wire

HEADER_BYTES: Final = 10
"""tag u16, paramSize u32, ordinal or return code u32."""
COMMAND_BYTES_MAX: Final = 4096
"""What /dev/tpm0 takes at most (TPM_BUFSIZE)."""

_PARAM_SIZE: Final = struct.Struct(">2xI")


@wire
class FrameHeader:
    """The ten bytes before the operands of every command and every response."""

    tag: U16
    param_size: U32
    code: U32


def error_response(code: ReturnCode) -> bytes:
    """Make the ten bytes that answer a command with nothing but a return code."""
    return encode(FrameHeader(tag=Tag.RSP_COMMAND, param_size=HEADER_BYTES, code=code))


class FrameError(DecodeError):
    """The stream holds a command that cannot be cut out of it; nothing after it can be read.

    Attributes:
        response: What to send before closing.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(ReturnCode.BAD_PARAM_SIZE, reason)
        self.response = error_response(ReturnCode.BAD_PARAM_SIZE)


class CommandFramer:
    """Cuts one direction of one stream into commands.

    Args:
        command_bytes_max: The longest command taken, in bytes.
    """

    def __init__(self, command_bytes_max: int = COMMAND_BYTES_MAX) -> None:
        self._command_bytes_max = command_bytes_max
        self._unread = b""
        self._at = 0  # where the next command starts in it
        self._fault: FrameError | None = None

    @property
    def is_inside_command(self) -> bool:
        """Whether the stream would break a command if it ended here."""
        return self._at < len(self._unread)

    def feed(self, data: bytes) -> None:
        """Add bytes as they came. Take all commands out before feeding more."""
        if self._fault is None:
            self._unread = self._unread[self._at :] + data
            self._at = 0

    def next_command(self) -> bytes | None:
        """Take the next whole command; None when more bytes are needed.

        Raises:
            FrameError: The next command's paramSize is below 10 or above the limit; again at every
                further call.
        """
        if self._fault is not None:
            raise self._fault
        available = len(self._unread) - self._at
        if available < _PARAM_SIZE.size:
            return None
        (param_size,) = _PARAM_SIZE.unpack_from(self._unread, self._at)
        if not HEADER_BYTES <= param_size <= self._command_bytes_max:
            self._fault = FrameError(
                f"paramSize {param_size} is not within {HEADER_BYTES} to {self._command_bytes_max}"
            )
            self._unread, self._at = b"", 0
            raise self._fault
        if available < param_size:
            return None
        command = self._unread[self._at : self._at + param_size]
        self._at += param_size
        return command
