"""Files that a person names, to read or to write: a file, or a pipe such as a shell's `<(...)`.

A pipe is read to its end, but never waited for without end: who names a FIFO that nobody writes
into, or reads from, is told so.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from pathlib import Path
from typing import Final

WRITER_WAIT_S: Final = 3.0
"""So long a FIFO may have nobody who writes into it."""
READER_WAIT_S: Final = 3.0
"""So long a FIFO may have nobody who reads from it."""
LOOK_AGAIN_S: Final = 0.02
SILENCE_MAX_S: Final = 30.0
"""So long who writes into a pipe may say nothing: a program may think before it answers."""


def read_bytes(path: Path, bytes_max: int) -> bytes:
    """Read a file, and of one that is too long one byte more than it may have.

    Raises:
        OSError: It cannot be read; or it is a pipe, and nobody writes into it.
    """
    # O_NONBLOCK: a FIFO that nobody writes into must not hold us up. Links lead on, /dev/stdin is
    # one.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            return _read_pipe(descriptor, bytes_max)
        os.set_blocking(descriptor, True)  # a person may type it at a terminal
        return file.read(bytes_max + 1)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that nobody else may read, also one that is there; or a pipe or device.

    Raises:
        OSError: It cannot be written, or not be kept from others; or it is a FIFO, and nobody reads
            from it.
    """
    descriptor = _open_to_write(path)
    with os.fdopen(descriptor, "wb") as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)  # first: what is in it is left if that is refused
            os.ftruncate(descriptor, 0)
        else:
            os.set_blocking(descriptor, True)  # a reader that is there may take its time
        file.write(data)


def _open_to_write(path: Path) -> int:
    deadline = time.monotonic() + READER_WAIT_S
    while True:
        try:
            return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno != errno.ENXIO or not path.is_fifo():
                raise
            if time.monotonic() > deadline:
                raise TimeoutError("it is a FIFO, and nobody reads from it") from error
        time.sleep(LOOK_AGAIN_S)  # nothing tells that a reader has come


def _read_pipe(descriptor: int, bytes_max: int) -> bytes:
    content = bytearray()
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    wait_s = WRITER_WAIT_S
    while len(content) <= bytes_max:
        # It comes back at once when the last writer has gone; but not when there was none yet.
        is_told = bool(poll.poll(wait_s * 1000))
        try:
            part = os.read(descriptor, bytes_max + 1 - len(content))
        except BlockingIOError:
            if not is_told and wait_s == SILENCE_MAX_S:
                raise TimeoutError(
                    f"it is a pipe, and who writes into it has said nothing for {wait_s:.0f} s"
                ) from None
        else:
            if not part and not is_told and not content:
                raise TimeoutError("it is a FIFO, and nobody writes into it")
            if not part:
                break
            content += part
        wait_s = SILENCE_MAX_S
    return bytes(content)
