"""Descriptors 0 to 2 of a process, also where whoever started it has closed them or filled them.

- A closed one is opened on /dev/null. Otherwise the next file or socket that is opened gets its
  number, and what is meant for a stream, also by a program started later, goes into that.
- What standard output does not take is a failure that is told; what standard error does not take
  nobody can be told. A reader that has gone (EPIPE) is neither: `| head` has seen enough.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO, cast

from daemons.errors import ExitCode, Failure

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_ESCAPED = "backslashreplace"
_STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}


def open_closed() -> None:
    """Open /dev/null on each of the three that is closed, and let Python have a stream for it."""
    for number in range(len(_STREAMS)):
        try:
            os.fstat(number)
        except OSError:  # the lowest number that is free is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name, mode in _STREAMS.items():  # now that none of them can get one of the three numbers
        if getattr(sys, name) is None:
            stream = Path(os.devnull).open(mode, encoding="utf-8", errors=_ESCAPED)  # noqa: SIM115 - it stays
            setattr(sys, name, stream)


def guard_outputs() -> None:
    """Let a command's output and error streams end in what a person is told, not in a traceback.

    A text that their encoding does not have is escaped.
    """
    sys.stdout = _guarded(sys.stdout, 1, is_result=True)
    sys.stderr = _guarded(sys.stderr, 2, is_result=False)


def _guarded(stream: TextIO, number: int, *, is_result: bool) -> TextIO:
    if stream.fileno() != number:  # of `open_closed`
        return stream
    outlet = _Outlet(number, is_result=is_result)
    is_unbuffered = isinstance(getattr(stream, "buffer", None), io.RawIOBase)  # as python -u has it
    return io.TextIOWrapper(
        cast("BinaryIO", outlet if is_unbuffered else io.BufferedWriter(outlet)),
        encoding=stream.encoding,
        errors=_ESCAPED,
        line_buffering=bool(stream.line_buffering),
        write_through=getattr(stream, "write_through", False),
    )


class _Outlet(io.FileIO):
    """One of the two; after the first write that fails it takes everything and keeps nothing.

    So what is still in a buffer then is no second failure, when the program ends.

    Args:
        number: The descriptor.
        is_result: What it does not take is a failure.
    """

    def __init__(self, number: int, *, is_result: bool) -> None:
        super().__init__(number, "w", closefd=False)
        self._is_result = is_result
        self._is_lost = False

    def write(self, data: ReadableBuffer) -> int:
        """Write some of it, or all.

        Raises:
            BrokenPipeError: The reader has gone.
            Failure: It cannot be written.
        """
        count = memoryview(data).nbytes
        if self._is_lost or not count:  # with nothing, click only asks whether this takes bytes
            return count
        try:
            return self._written(data)
        except OSError as error:
            self._is_lost = True
            if error.errno == errno.EPIPE:
                raise
            if self._is_result:
                raise Failure(
                    "cannot write the result",
                    why=f"standard output: {(error.strerror or str(error)).lower()}",
                    next_step="Send it where there is room; what was asked for may have been done",
                    exit_code=ExitCode.IO_ERROR,
                ) from error
            return count

    def _written(self, data: ReadableBuffer) -> int:
        while (count := super().write(data)) is None:  # another program made it non-blocking
            select.select([], [self], [])
        return count
