"""One TPM on a Unix socket, as a process: ours, or swtpm as the second opinion."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.system.scratch_stack import vtpm_command, wait_until

END_S = 10


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@contextlib.contextmanager
def _serving(command: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    log = path.with_name("log")
    with log.open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as run:
        try:
            wait_until(
                lambda: run.poll() is not None or _answers(path), f"{command[0]} serves a TPM"
            )
            assert run.poll() is None, log.read_text()
            yield run
        finally:
            run.send_signal(signal.SIGTERM)
            run.wait(END_S)


@contextlib.contextmanager
def simulator(*options: str) -> Iterator[Path]:
    """A `vtpm simulator` that keeps nothing; gives its socket."""
    with tempfile.TemporaryDirectory(prefix="vtpm-sim-") as directory:
        path = Path(directory) / "tpm"
        command = [*vtpm_command(), "simulator", "--ephemeral", "--socket", str(path), *options]
        with _serving(command, path):
            yield path


@contextlib.contextmanager
def swtpm() -> Iterator[Path]:
    """A new swtpm, started up, without an endorsement key; gives its socket, for one client."""
    program = shutil.which("swtpm")
    assert program is not None
    with tempfile.TemporaryDirectory(prefix="vtpm-swtpm-") as directory:
        path = Path(directory) / "tpm"
        command = [program, "socket", "--tpmstate", f"dir={directory}"]
        command += ["--server", f"type=unixio,path={path}"]
        command += ["--flags", "not-need-init,startup-clear"]
        with _serving(command, path):
            yield path
