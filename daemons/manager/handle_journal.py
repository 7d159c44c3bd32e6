"""Which sessions and keys of the chip are ours, so that a manager that was killed leaves none.

Xen's manager flushes every handle of the chip when it starts, and so ends other users' sessions.
Here each handle is written down while the response that named it still waits in the chip's FIFO,
and a command that opens one is written down before it is sent. So whenever the manager is killed,
the next one knows each handle, or the command whose response will tell it.

The file lies in the run directory: it has to survive a killed process, not a power cycle. A power
cycle takes all sessions and unowned keys from the chip; `epoch` (the chip's tick nonce) tells the
two apart, so that nobody's new handle is flushed in the place of our old one.

Invariants:
- A file that cannot be understood is treated as empty: then a handle may leak, which costs a slot
  until the platform's next power cycle, and nobody else's is touched.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from protocol.constants import HEADER_BYTES, Ordinal, ResourceType
from protocol.return_codes import ReturnCode
from tpm12.profile import CHIP

JOURNAL_BYTES_MAX: Final = 64 * 1024
HANDLES_MAX: Final = 64
_RESPONSE_HEADER_BYTES: Final = 10

OPENING: Final = {
    Ordinal.OIAP: ResourceType.AUTH,
    Ordinal.OSAP: ResourceType.AUTH,
    Ordinal.DSAP: ResourceType.AUTH,
    Ordinal.LOAD_KEY: ResourceType.KEY,
    Ordinal.LOAD_KEY2: ResourceType.KEY,
}
"""Commands whose response begins with a new handle, and what it is a handle of."""


Handles = tuple[tuple[int, int], ...]
"""Pairs of resource type and handle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """What a manager before this one may have left in the chip."""

    epoch: str = ""
    """Hex of the chip's tick nonce then; empty when it was not known yet."""
    outstanding: bytes = b""
    """A command whose response may still wait in the chip."""
    handles: Handles = ()


class NotNotedError(Failure):
    """What is open in the chip cannot be written down, and so may not be opened."""


class HandleJournal:
    """The file.

    Args:
        path: In a private directory of this domain.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._beside = path.with_name(path.name + ".new")
        self._now = Leftovers()
        self._has_written = False
        self._kept: Handles = ()

    def read(self) -> Leftovers:
        """What the file says; nothing when it is not there or cannot be understood."""
        with contextlib.suppress(OSError, ValueError):
            return read_leftovers(self._path)
        return Leftovers()

    def take_over(
        self, resume: Callable[[bytes], bytes], finish: Callable[[], None]
    ) -> tuple[Leftovers, Handles]:
        """Learn what an earlier manager left. Call it before any other command.

        Args:
            resume: Fetches the response of an outstanding command, which stays in the chip.
            finish: Lets the chip forget the response.

        Returns:
            All of it, and the part that surely belongs to this power cycle: the handle whose
            response was fetched now.
        """
        left = self.read()
        kind = opens(left.outstanding)
        if kind is None:
            return left, ()
        handle = opened_handle(resume(left.outstanding))
        fresh = () if handle is None else ((int(kind), handle),)
        left = Leftovers(epoch=left.epoch, handles=(*left.handles, *fresh))
        self._write(left)
        # It is still an earlier manager's: no `clear` may take it away before it is flushed.
        self._now, self._has_written = Leftovers(), False
        finish()
        return left, fresh

    def discard_leftovers(self) -> None:
        """Say that nothing an earlier manager left is in the chip any more."""
        self._remove()

    def set_epoch(self, epoch: str) -> None:
        """From now on, handles belong to this power cycle of the chip."""
        self._now = Leftovers(epoch=epoch)

    def run(
        self,
        request: bytes,
        execute: Callable[[bytes], bytes],
        finish: Callable[[], None],
        settle: Callable[[], None],
    ) -> bytes:
        """Run one command, and write down the handle that it opens.

        Args:
            request: The command.
            settle: Makes sure that no older response waits in the chip, to be taken for this one's.
            execute: Runs it and leaves the response in the chip.
            finish: Lets the chip forget the response.

        Raises:
            NotNotedError: It was not sent; or it was, and `handles` has what it has opened.
        """
        kind = opens(request)
        if kind is not None:
            settle()
            self._write(replace(self._now, outstanding=request))
        response = execute(request)
        if kind is not None:
            handle = opened_handle(response)
            fresh = () if handle is None else ((int(kind), handle),)
            try:
                handles = (*self._now.handles, *fresh)
                self._write(Leftovers(epoch=self._now.epoch, handles=handles))
            except NotNotedError:
                finish()
                raise
        finish()
        return response

    @property
    def handles(self) -> Handles:
        """What was opened since `clear`, but for what is kept; some may have ended since."""
        return tuple(handle for handle in self._now.handles if handle not in self._kept)

    def keep(self, kind: int, handle: int) -> None:
        """Let a handle stay open, and in the file, when the rest is cleared."""
        self._kept = (*self._kept, (kind, handle))

    def unkeep(self, kind: int, handle: int) -> None:
        """Treat a handle that was kept as any other again."""
        self._kept = tuple(kept for kept in self._kept if kept != (kind, handle))

    def clear(self) -> None:
        """Say that nothing of ours is in the chip, but for what is kept."""
        if self._now.handles and self._now.handles == self._kept and not self._now.outstanding:
            return  # the file says so already
        # What an earlier manager wrote stays until its leftovers are gone.
        if self._has_written and not self._kept:
            self._remove()
        elif self._has_written:
            # Without room the file names more than is open, which harms nobody.
            with contextlib.suppress(NotNotedError):
                self._write(Leftovers(epoch=self._now.epoch, handles=self._kept))
            return
        self._now, self._has_written = Leftovers(epoch=self._now.epoch), False

    def _remove(self) -> None:
        # What cannot be removed (a directory) cannot be read either, and says nothing.
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self, now: Leftovers) -> None:
        self._has_written, self._now = True, now
        shape = {
            "epoch": now.epoch,
            "outstanding": now.outstanding.hex(),
            "handles": [list(pair) for pair in now.handles],
        }
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            self._beside.unlink(missing_ok=True)
            with os.fdopen(os.open(self._beside, flags, 0o600), "wb") as file:
                file.write(json.dumps(shape).encode())
            self._beside.rename(self._path)
        except OSError as error:
            raise NotNotedError(
                "cannot note what the manager opens in the hardware TPM",
                why=f"{self._path}: {error.strerror or error}",
                next_step="Make room on its file system; nothing is lost, and the manager goes on",
                exit_code=ExitCode.IO_ERROR,
            ) from error


def read_leftovers(path: Path) -> Leftovers:
    """Read such a file.

    Raises:
        OSError: It is not there, or cannot be read.
        ValueError: It cannot be understood.
    """
    # O_NONBLOCK: a FIFO in its place must not hold us up.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "rb") as file:
        content = file.read(JOURNAL_BYTES_MAX) or b""
    try:
        shape = json.loads(content)
        handles = tuple((int(kind), int(handle)) for kind, handle in shape["handles"])
        outstanding = bytes.fromhex(shape["outstanding"])
        if not all(0 <= number < 1 << 32 for pair in handles for number in pair):
            raise ValueError("a number that is no handle")
        if outstanding and not _is_a_command(outstanding):
            raise ValueError("its outstanding command is none")
        return Leftovers(
            epoch=str(shape["epoch"]), outstanding=outstanding, handles=handles[:HANDLES_MAX]
        )
    except (KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"it is no list of handles ({error})") from error


def _is_a_command(request: bytes) -> bool:
    size = len(request)
    is_whole = int.from_bytes(request[2:6], "big") == size
    return is_whole and HEADER_BYTES <= size <= CHIP.input_buffer_bytes


def opens(request: bytes) -> ResourceType | None:
    """What kind of handle a command opens, if it opens one."""
    ordinal = int.from_bytes(request[6:10], "big")
    return next((kind for opening, kind in OPENING.items() if opening == ordinal), None)


def opened_handle(response: bytes) -> int | None:
    """The handle in the response of such a command; None when it failed."""
    code = response[6:_RESPONSE_HEADER_BYTES]
    if len(response) < _RESPONSE_HEADER_BYTES + 4 or int.from_bytes(code, "big") != (
        ReturnCode.SUCCESS
    ):
        return None
    return int.from_bytes(response[_RESPONSE_HEADER_BYTES : _RESPONSE_HEADER_BYTES + 4], "big")
