"""The processes that a run has stopped, and who lets them go on, however the run ends.

A run continues them itself at the end of each fault and of the run. Against its own death by
SIGKILL there is a small process beside it, in a session of its own, that reads from a pipe what is
stopped now: when the pipe ends, so has the run, and what is stopped goes on.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from typing import Final, Self

from daemons.launcher.processes import send_signal

Process = tuple[int, int]
"""Its pid and its start time."""

WATCHER_END_S: Final = 5.0
"""A watcher that somebody holds up holds us up no longer than this; it ends by itself."""
_STOP: Final = "stop"
_CONTINUE: Final = "continue"


class Stopped:
    """What is stopped now, by the number of the fault that did it."""

    def __init__(self) -> None:
        self._processes: dict[int, Process] = {}
        self._watcher: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.resume_all()
        finally:
            if self._watcher is not None and self._watcher.stdin is not None:
                self._watcher.stdin.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._watcher.wait(WATCHER_END_S)

    def stop(self, number: int, process: Process) -> bool:
        """Stop a process.

        Returns:
            False when it has ended already.

        Raises:
            PermissionError: It belongs to somebody else.
        """
        self._processes[number] = process  # before it is done: we may be ended between the lines
        self._tell(_STOP, number, *process)
        return send_signal(*process, signal.SIGSTOP)

    def resume(self, number: int) -> None:
        """Let go on what a fault has stopped, if anything, unless another one still holds it."""
        process = self._processes.get(number)
        if process is not None:
            if list(self._processes.values()).count(process) == 1:
                send_signal(*process, signal.SIGCONT)
            self._tell(_CONTINUE, number)
            del self._processes[number]

    def resume_all(self) -> None:
        """Let everything go on."""
        for number in list(self._processes):
            self.resume(number)

    def _tell(self, *words: object) -> None:
        """Tell the process beside us; without one we go on, and only SIGKILL would be felt."""
        with contextlib.suppress(OSError):
            if self._watcher is None:
                self._watcher = subprocess.Popen(
                    [sys.executable, "-P", "-m", "daemons.faults.stopped"],
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            if self._watcher.stdin is not None:
                self._watcher.stdin.write(" ".join(map(str, words)).encode() + b"\n")


def main() -> None:
    """Read what is stopped; when nothing more can come, let it go on."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    stopped: dict[str, Process] = {}
    for line in sys.stdin:
        match line.split():
            case [word, fault, pid, start_time] if word == _STOP:
                stopped[fault] = int(pid), int(start_time)
            case [word, fault] if word == _CONTINUE:
                stopped.pop(fault, None)
    for process in stopped.values():
        with contextlib.suppress(OSError):
            send_signal(*process, signal.SIGCONT)


if __name__ == "__main__":
    main()
