"""What a running or badly ended stack leaves on the machine, found without asking the stack.

Processes are found by their command line, environment, working directory, open and mapped files;
sockets and locks in the kernel's own tables.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Traces:
    """Processes (pid to name), bound socket paths, and locked files below one directory."""

    processes: dict[int, str]
    sockets: tuple[str, ...]
    locks: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.sockets or self.locks)


def find_traces(root: Path) -> Traces:
    """Look for everything that has to do with a directory, this process aside."""
    mine = {os.getpid(), os.getppid()}
    return Traces(
        processes={
            pid: _name(pid) for pid in _pids() if pid not in mine and _has_to_do_with(pid, root)
        },
        sockets=tuple(sorted(_bound_sockets(root))),
        locks=tuple(sorted(_locked_files(root))),
    )


def _pids() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            yield int(entry.name)


def _name(pid: int) -> str:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return "ended meanwhile"
    return line.replace(b"\0", b" ").decode(errors="replace").strip()


def _has_to_do_with(pid: int, root: Path) -> bool:
    needle = os.fsencode(root)
    process = Path(f"/proc/{pid}")
    try:
        if any(needle in (process / name).read_bytes() for name in ("cmdline", "environ", "maps")):
            return True
        links = [process / "cwd", *(process / "fd").iterdir()]
    except OSError:  # it has ended, or belongs to somebody else and is none of ours
        return False
    for link in links:
        try:
            if needle in os.fsencode(link.readlink()):
                return True
        except OSError:
            continue
    return False


def _bound_sockets(root: Path) -> Iterator[str]:
    # Num RefCount Protocol Flags Type St Inode Path
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) == 8 and fields[7].startswith(str(root)):
            yield fields[7]


def _locked_files(root: Path) -> Iterator[str]:
    """Files with a flock or POSIX lock, by device and inode."""
    inodes = {}
    for file in root.rglob("*"):
        try:
            status = file.lstat()
        except FileNotFoundError:  # of a process that still runs; `kill_everything` looks again
            continue
        inodes[os.major(status.st_dev), os.minor(status.st_dev), status.st_ino] = str(file)
    # 1: FLOCK ADVISORY WRITE 4580 fe:01:123456 0 EOF
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.replace("->", "").split()
        major, minor, inode = fields[5].split(":")
        locked = inodes.get((int(major, 16), int(minor, 16), int(inode)))
        if locked is not None:
            yield f"{locked} (by process {fields[4]})"
