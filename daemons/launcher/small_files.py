"""Small files of the run directory that are replaced as a whole."""

from __future__ import annotations

import os
from pathlib import Path


def put_whole(path: Path, content: bytes) -> None:
    """Write a file of ours, or replace the one of the same name, in one step.

    Raises:
        OSError: It cannot be; the one before is still there.
    """
    beside = path.with_name(path.name + ".new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    beside.unlink(missing_ok=True)  # left by a launcher that was killed here
    with os.fdopen(os.open(beside, flags, 0o600), "wb") as file:
        file.write(content)
    # No sync: the run directory does not outlive the machine's power cycle.
    beside.rename(path)
