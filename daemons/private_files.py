"""Reading files that decide something: only if nobody else could have written them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from daemons.errors import ExitCode, Failure


class UnsafeFile(Failure):
    """A file is not what it should be, or somebody else may write to it; it was not read."""


def read_checked(path: Path, bytes_max: int) -> bytes | None:
    """Read a small file of the administrator's.

    Args:
        path: A regular file of this user or root, not writable by anybody else, not a symlink.
        bytes_max: Largest size, in bytes.

    Returns:
        The content; None when there is no such file.

    Raises:
        UnsafeFile: one of these does not hold, or it cannot be read.
    """
    try:
        # O_NONBLOCK: a FIFO in its place must not hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unsafe(path, f"it cannot be opened ({error.strerror})") from error
    try:
        status = os.fstat(descriptor)
        mode = stat.S_IMODE(status.st_mode)
        if not stat.S_ISREG(status.st_mode):
            raise _unsafe(path, "it is not a regular file")
        if status.st_uid not in {0, os.geteuid()}:
            raise _unsafe(path, f"it belongs to uid {status.st_uid}")
        if mode & 0o022:
            raise _unsafe(path, f"its mode {mode:04o} lets others write to it")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(bytes_max + 1)
    except OSError as error:
        raise _unsafe(path, f"it cannot be read ({error.strerror})") from error
    finally:
        os.close(descriptor)
    if len(content) > bytes_max:
        raise _unsafe(path, f"it has more than {bytes_max} bytes")
    return content


def _unsafe(path: Path, why: str) -> UnsafeFile:
    return UnsafeFile(
        f"{path} is not used",
        why=why,
        next_step="Make it a regular file of yours or root's, mode 0644 or tighter",
        exit_code=ExitCode.CONFIGURATION,
    )
