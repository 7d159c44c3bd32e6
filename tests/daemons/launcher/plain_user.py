"""What a plain user meets, for tests that root runs too."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_UID = 12345


@contextlib.contextmanager
def nobody_looks_into(directory: Path) -> Iterator[None]:
    """Be somebody who cannot look into a directory."""
    is_root, mode = os.geteuid() == 0, directory.stat().st_mode
    directory.chmod(0)
    if is_root:
        os.seteuid(_UID)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)
        directory.chmod(mode)
