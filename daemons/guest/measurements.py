"""What a guest's loader measured: a short event list beside the guest's tpm0.

`vtpm pcrs` reads it to say what set each PCR, and checks that against the PCR's value: the list is
a claim of the loader, the PCR is the evidence.

Leaves to others: measuring (`loader`).
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from daemons.errors import ExitCode, Failure

FILE_NAME: Final = "measurements.json"
FORMAT: Final = 1
FILE_BYTES_MAX: Final = 64 * 1024
DIGEST_BYTES: Final = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One extend.

    Attributes:
        pcr: The PCR that was extended.
        digest: SHA-1 of what was measured, hex.
        what: "kernel", "command line" or "initrd".
        name: The file's path in the archive, or the command line itself.
        size: Bytes that were hashed.
    """

    pcr: int
    digest: str
    what: str
    name: str
    size: int


def sha1(data: bytes) -> bytes:
    """SHA-1 (20 bytes): the only hash that a TPM 1.2 extends."""
    return hashlib.sha1(data, usedforsecurity=False).digest()


def replay(digests: Iterable[bytes], start: bytes = bytes(DIGEST_BYTES)) -> bytes:
    """Compute the PCR value after extending `digests` one after the other.

    Spec: TPM Main r116 Part 3 §16.1.
    """
    value = start
    for digest in digests:
        value = sha1(value + digest)
    return value


def write_measurements(directory: Path, measurements: Iterable[Measurement]) -> None:
    """Write the list into a guest's run directory, whole or not at all, mode 0600.

    Raises:
        Failure: There is no room for it.
    """
    text = json.dumps({"format": FORMAT, "events": [asdict(m) for m in measurements]}, indent=1)
    beside = directory / f".{FILE_NAME}.new"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        beside.unlink(missing_ok=True)
        descriptor = os.open(beside, flags, mode=0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text + "\n")
        # No sync: the run directory does not outlive the machine's power cycle.
        beside.rename(directory / FILE_NAME)
    except OSError as error:
        raise _in_the_way(directory, error) from error


def _in_the_way(directory: Path, error: OSError) -> Failure:
    return Failure(
        "cannot write down what was measured",
        why=f"{directory / FILE_NAME}: {(error.strerror or str(error)).lower()}",
        next_step="Make room on its file system, and remove what is in the way",
        exit_code=ExitCode.IO_ERROR,
    )


def read_measurements(directory: Path) -> list[Measurement]:
    """Read the list of a guest's run directory; empty when there is none.

    Raises:
        ValueError: What stands there is not what `write_measurements` writes.
        PermissionError: Its user is another one.
    """
    # The directory is the guest's, and whoever reads here may be root: a link leads nowhere, and a
    # FIFO holds nobody up.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(directory / FILE_NAME, flags)
        with os.fdopen(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ValueError("not a regular file")
            data = file.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        return []
    except PermissionError:
        raise
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    if len(data) > FILE_BYTES_MAX:
        raise ValueError(f"more than {FILE_BYTES_MAX} bytes")
    try:
        parsed: Any = json.loads(data)
        if parsed["format"] != FORMAT:
            raise ValueError(f"format {parsed['format']!r}, this version reads {FORMAT}")
        events = [Measurement(**event) for event in parsed["events"]]
        digests = [bytes.fromhex(event.digest) for event in events]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError("not a list of measurements") from error
    for event, digest in zip(events, digests, strict=True):
        if len(digest) != DIGEST_BYTES:
            raise ValueError(f"{event.what} has no SHA-1 digest")
    return events


def forget_measurements(directory: Path) -> None:
    """Remove the list of an earlier boot.

    Raises:
        Failure: It stays.
    """
    try:
        (directory / FILE_NAME).unlink(missing_ok=True)
    except OSError as error:
        raise _in_the_way(directory, error) from error
