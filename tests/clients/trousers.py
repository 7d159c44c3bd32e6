"""Debian's TrouSerS on any TPM socket: a tcsd with a recorder before the TPM, and its tools.

What a tool asked of the TPM and was answered is kept, and shown when a test fails.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.clients.terminal import run_on_terminal
from tests.system.tpm0_recorder import Passed, Recorder, recorded

TOOLS = ("tcsd", "tpm_version", "tpm_selftest", "tpm_takeownership", "tpm_sealdata")
SESSION = Path(__file__).parents[1] / "system" / "trousers_session.sh"
TOOL_S = 60
INVALID_AUTHHANDLE = 0x22
"""TrouSerS flushes sessions that ended with their command: not a failure of anything."""


def why_not(*tools: str) -> str:
    """Why TrouSerS, and tools beside its own, cannot run here; empty when they can."""
    if os.geteuid() != 0:
        return "tcsd starts only as root"
    missing = [tool for tool in (*TOOLS, *tools) if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (.ci/run names the packages)"
    return ""


@dataclass(frozen=True)
class Ended:
    """How a tool ended, and what passed at the TPM meanwhile."""

    words: tuple[str, ...]
    status: int
    out: str
    passed: tuple[Passed, ...]

    def __str__(self) -> str:
        told = "\n".join(map(str, self.passed))
        return f"{' '.join(self.words)}: status {self.status}\n{self.out}\n{told}"

    @property
    def has_failed(self) -> bool:
        """What tpm-tools report with status 0 and a line that says so counts too."""
        return self.status != 0 or re.search(r"Tspi_\w+ failed", self.out) is not None

    @property
    def refusals(self) -> set[tuple[int, int]]:
        """Ordinal and return code of each command that was refused."""
        return {(p.ordinal, p.code) for p in self.passed if p.code not in {0, INVALID_AUTHHANDLE}}

    @property
    def ordinals(self) -> set[int]:
        """Of all commands that passed."""
        return {p.ordinal for p in self.passed}


class Trousers:
    """Tools that find a TPM by tcsd.

    Args:
        directory: Where they run.
        environment: Theirs.
        recorder: What stands before the TPM.
    """

    def __init__(self, directory: Path, environment: Mapping[str, str], recorder: Recorder):
        self.directory = directory
        self.environment = environment
        self._recorder = recorder

    def run(self, *words: str, status: int | None = 0, typed: Sequence[str] | None = None) -> Ended:
        """Run a tool.

        Args:
            words: Its name and arguments.
            status: 0, or None for any.
            typed: What a person types at its prompts for passwords; None gives it no terminal.
        """
        self._recorder.take()
        if typed is None:
            ended = subprocess.run(
                words,
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=TOOL_S,
                check=False,
            )
            code, out = ended.returncode, ended.stdout.decode(errors="replace")
        else:
            code, out = run_on_terminal(
                words,
                typed,
                environment=self.environment,
                directory=self.directory,
                deadline_s=TOOL_S,
            )
        said = Ended(words, code, out, tuple(self._recorder.take()))
        assert status is None or not said.has_failed, str(said)
        return said


def free_port() -> str:
    """A port for a tcsd; what else could take it meanwhile is another such test."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextlib.contextmanager
def trousers_on(
    tpm: Path,
    *,
    within: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    takes_one: bool = False,
) -> Iterator[Trousers]:
    """A tcsd on a TPM's socket, started as a person would start it.

    Args:
        tpm: The socket.
        within: A command that runs it somewhere, as `vtpm exec guest1 --`.
        environment: For that command.
        takes_one: The TPM serves one connection at a time.
    """
    # Not below a stack's root: tcsd gives its directory to user tss.
    directory = Path(tempfile.mkdtemp(prefix="vtpm-tcsd-"))
    try:
        with recorded(tpm, directory / "tpm0", takes_one=takes_one) as recorder:
            port = free_port()
            # The tools are run by the tests, so the session only waits until its input ends.
            script = directory / "session"
            script.write_text('echo "up $TSS_TCSD_PORT"; cat\n')
            named = f"TCSD_USE_TCP_DEVICE=1 TCSD_UN_SOCKET_DEVICE_PATH={directory}/tpm0"
            inside = f"{named} exec sh {SESSION} {directory} {port} {script}"
            with subprocess.Popen(
                [*within, "sh", "-c", inside],
                env=dict(os.environ if environment is None else environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            ) as session:
                assert session.stdin is not None
                assert session.stdout is not None
                first = session.stdout.readline()
                assert first == f"up {port}\n", (directory / "tcsd.log").read_text()
                told = dict(os.environ) | {"TSS_TCSD_PORT": port}
                yield Trousers(directory, told, recorder)
                session.stdin.close()
                assert session.wait(TOOL_S) == 0
    finally:
        shutil.rmtree(directory)
