"""What Linux tells about a process, and the one thing to ask of it: facts under /proc, prctl.

A pid alone says little: it is given out again. A process is named by its pid and its start time
(field 22 of /proc/PID/stat, in clock ticks since boot), as the registry records it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
from pathlib import Path

from daemons.listeners import start_time_of

_PR_SET_CHILD_SUBREAPER = 36
_STOPPED = "T"
"""In /proc/PID/stat: by a signal, as SIGSTOP is."""


_NO_PROCESS = {errno.ESRCH, errno.ENOENT, errno.EINVAL}
"""What pidfd_open says of a number that no process has; the last two, when a thread has it."""


def open_process(pid: int) -> int | None:
    """Open a handle of a process (a pidfd), or give None when no process has this number.

    Raises:
        OSError: There is no room for another descriptor.
    """
    try:
        return os.pidfd_open(pid)
    except (ValueError, OverflowError):
        return None
    except OSError as error:
        if error.errno in _NO_PROCESS:
            return None
        raise


def is_alive(pid: int, start_time: int) -> bool:
    """Tell whether exactly this process runs: no later one with its number, no unreaped remains."""
    handle = open_process(pid)
    if handle is None:
        return False
    try:
        return not _has_ended(handle) and start_time_of(pid) == start_time
    finally:
        os.close(handle)


def _has_ended(handle: int) -> bool:
    ended = select.poll()
    ended.register(handle, select.POLLIN)
    return bool(ended.poll(0))


def send_signal(pid: int, start_time: int, number: signal.Signals) -> bool:
    """Send a signal to exactly this process, never to a later one with the same number.

    Returns:
        False when it has ended already.

    Raises:
        PermissionError: It belongs to somebody else.
    """
    handle = open_process(pid)
    if handle is None:
        return False
    try:
        # The handle is held now, so the number cannot change its owner between the two lines.
        if _has_ended(handle) or start_time_of(pid) != start_time:
            return False
        signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(handle)
    return True


def is_stopped(pid: int) -> bool:
    """Tell whether a process stands still after SIGSTOP or SIGTSTP; one that is gone does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == _STOPPED


def pss_kib_of(pid: int) -> int | None:
    """Read a process's proportional share of memory.

    Returns:
        KiB, or None when it is gone or may not be looked at.
    """
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        return None
    return None


def become_child_subreaper() -> None:
    """Make the orphans among this process's descendants its own children, so that it can reap them.

    Raises:
        OSError: The kernel refuses (it never has since Linux 3.4).

    Spec: prctl(2), PR_SET_CHILD_SUBREAPER.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
