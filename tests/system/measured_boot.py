"""What a measured boot must give, computed here with hashlib and nothing of the stack.

PCR 4 takes the kernel; PCR 5 the command line, then the initrd. An extend is SHA-1(old || digest),
a PCR starts at 20 zero bytes (TPM Main r116 Part 3 §16.1).
"""

from __future__ import annotations

import hashlib

from tests.system.scratch_stack import COMMAND_LINE, INITRDS, KERNELS


def sha1(data: bytes) -> bytes:
    return hashlib.sha1(data, usedforsecurity=False).digest()


def extended(*measured: bytes) -> bytes:
    """A PCR after what was measured into it since its reset."""
    pcr = bytes(20)
    for data in measured:
        pcr = sha1(pcr + sha1(data))
    return pcr


def boot_pcrs(guest: str, kernel: bytes | None = None) -> dict[int, bytes]:
    """PCR 4 and 5 of a guest that has booted its image, and nothing since."""
    return {
        4: extended(KERNELS[guest] if kernel is None else kernel),
        5: extended(COMMAND_LINE.encode(), INITRDS[guest]),
    }
