"""A pytest plugin: a TPM 1.2 of a test's own, a `vtpm simulator` started and ended for it.

    def test_my_program(tpm12_simulator):
        run_my_program(tpm_socket=tpm12_simulator.socket)
        assert any(tpm12_simulator.client.pcr_read(16))
        tpm12_simulator.power_cycle()

Installed with the project, it is there in every test run (`pytest -p no:daemons.pytest_tpm` leaves
it out). `@pytest.mark.tpm12(seed=7)` chooses options for one test or a module; see `Choice`.

Everything of the project is imported when a test first asks for a TPM, not when pytest starts.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from tpm12.client import TpmClient

READY_S: Final = 30.0
"""For the first start on a busy machine; commonly it takes some tenths of a second."""
END_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.002
_MARK: Final = "tpm12"
_POWER_CYCLE: Final = "vtpm simulator power cycle"
"""What the simulator writes into its log when one is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `@pytest.mark.tpm12(...)` can say.

    Attributes:
        seed: The same keys, nonces and random bytes in every run.
        has_ek: With an endorsement key, as from most makers.
        is_ephemeral: Keeps nothing; `restart` then gives a new TPM.
        has_journal: `crash` leaves PCRs, sessions and keys as they are; else it is a power cycle.
        fails_self_test: Goes into failure mode as soon as it tests itself.
    """

    seed: int | None = None
    has_ek: bool = True
    is_ephemeral: bool = False
    has_journal: bool = False
    fails_self_test: bool = False

    def options(self, state: Path) -> list[str]:
        """Of the command."""
        words = ["--ephemeral"] if self.is_ephemeral else ["--state", str(state)]
        if self.seed is not None:
            words += ["--seed", str(self.seed)]
        if self.has_journal:
            words.append("--journal")
        if self.fails_self_test:
            words += ["--fail-self-test"]
        return words if self.has_ek else [*words, "--no-ek"]


class SimulatorError(Exception):
    """The simulator did not start, did not answer a signal in time, or ended with an error."""


@dataclass(slots=True)
class Tpm12Simulator:
    """A running TPM.

    Attributes:
        socket: Where it listens: a Unix stream socket that takes raw TPM commands.
        state: Where its memory is kept.
    """

    socket: Path
    state: Path
    _choice: Choice
    _log: Path
    _process: subprocess.Popen[bytes] | None = None
    _open: ExitStack = field(default_factory=ExitStack)
    _client: TpmClient | None = None

    @property
    def pid(self) -> int:
        """Of its process."""
        return self._running().pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return self._log.read_text(errors="replace")

    @property
    def client(self) -> TpmClient:
        """A typed client on a connection of its own, opened when first asked for."""
        if self._client is None:
            self._client = self._open.enter_context(self.new_client())
        return self._client

    @contextmanager
    def new_client(self) -> Iterator[TpmClient]:
        """One more typed client, on one more connection."""
        from daemons.guest.tpm0_client import Tpm0Client  # noqa: PLC0415 - see the module
        from daemons.world import SystemRng  # noqa: PLC0415
        from tpm12.client import TpmClient  # noqa: PLC0415

        with Tpm0Client(self.socket) as connection:
            yield TpmClient(connection.exchange, rng=SystemRng())

    def start(self) -> None:
        """Start it; returns when it takes commands.

        Raises:
            SimulatorError: It ended, with what it said, or is not ready in time.
        """
        with _readiness(self._log.with_name("notify")) as ready, self._log.open("ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                [*_command(), "--socket", str(self.socket), *self._choice.options(self.state)],
                env={**os.environ, "NOTIFY_SOCKET": str(self._log.with_name("notify"))},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            self._wait(lambda: _is_told(ready), "is not ready")

    def power_cycle(self) -> None:
        """Power off and on: PCRs, sessions, and loaded keys are gone, and connections stay open."""
        before = self.log.count(_POWER_CYCLE)
        self._running().send_signal(signal.SIGHUP)
        self._wait(lambda: self.log.count(_POWER_CYCLE) > before, "has not lost its power")

    def stop(self) -> None:
        """End it as a service manager does. What it must keep, it has kept.

        Raises:
            SimulatorError: It did not end, or not well.
        """
        process, self._process = self._running(), None
        self._open.close()
        self._client = None
        process.terminate()
        try:
            status = process.wait(END_S)
        except subprocess.TimeoutExpired as error:
            process.kill()
            process.wait()
            raise SimulatorError(f"it did not end on SIGTERM\n{self.log}") from error
        if status:
            raise SimulatorError(f"it ended with status {status}\n{self.log}")

    def restart(self) -> None:
        """Stop and start it on the same state."""
        self.stop()
        self.start()

    def kill(self) -> None:
        """End it without a warning, as a power cut would. `start` starts it again."""
        process, self._process = self._running(), None
        self._open.close()
        self._client = None
        process.kill()
        process.wait()

    def crash(self) -> None:
        """End it by SIGKILL, at whatever instant that is, and start it again on the same state.

        With `has_journal` it goes on where it was. Connections end; `client` is a new one.
        """
        self.kill()
        self.start()

    def close(self) -> None:
        """Stop it if it runs."""
        if self._process is not None:
            self.stop()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise SimulatorError("it was stopped")
        return self._process

    def _wait(self, is_so: Callable[[], bool], otherwise: str) -> None:
        process, end = self._running(), time.monotonic() + READY_S
        while not is_so():
            if process.poll() is not None:
                self._process = None
                raise SimulatorError(f"it ended with status {process.returncode}\n{self.log}")
            if time.monotonic() > end:
                raise SimulatorError(f"it {otherwise} after {READY_S:g} s\n{self.log}")
            time.sleep(_LOOK_AGAIN_S)


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        f"{_MARK}(seed=None, has_ek=True, is_ephemeral=False, has_journal=False, "
        "fails_self_test=False): options of the test's TPM simulator",
    )


@pytest.fixture
def tpm12_simulators(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[..., Tpm12Simulator]]:
    """A function that starts a TPM; each is ended with the test. It takes what `Choice` has."""
    started: list[Tpm12Simulator] = []
    # A folder with a short name: a socket's path has 107 bytes at most, and pytest's are long.
    with tempfile.TemporaryDirectory(prefix="tpm12-") as folder, ExitStack() as ends:

        def start(**chosen: Any) -> Tpm12Simulator:  # noqa: ANN401 - what `Choice` takes
            home = Path(folder) / str(len(started))
            home.mkdir(mode=0o700)
            simulator = Tpm12Simulator(
                socket=home / "tpm",
                state=home / "state",
                _choice=Choice(**chosen),
                _log=home / "log",
            )
            started.append(simulator)
            simulator._log.touch()  # noqa: SLF001 - this module's own
            ends.callback(simulator.close)
            simulator.start()
            return simulator

        yield start
        for simulator in started:
            request.node.add_report_section("teardown", "vtpm simulator", simulator.log)


@pytest.fixture
def tpm12_simulator(
    request: pytest.FixtureRequest, tpm12_simulators: Callable[..., Tpm12Simulator]
) -> Tpm12Simulator:
    """A TPM of this test's own, with an endorsement key and without an owner."""
    mark = request.node.get_closest_marker(_MARK)
    return tpm12_simulators(**({} if mark is None else mark.kwargs))


@pytest.fixture
def tpm12_client(tpm12_simulator: Tpm12Simulator) -> TpmClient:
    """A typed client of `tpm12_simulator`."""
    return tpm12_simulator.client


@contextmanager
def _readiness(path: Path) -> Iterator[socket.socket]:
    """A socket to which a service says READY=1 (sd_notify)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(path))
        listening.setblocking(False)
        try:
            yield listening
        finally:
            path.unlink()


def _is_told(ready: socket.socket) -> bool:
    try:
        return b"READY=1" in ready.recv(4096)
    except BlockingIOError:
        return False


def _command() -> list[str]:
    """The installed command; in a checkout that is not installed, its module."""
    beside = shutil.which("vtpm", path=str(Path(sys.executable).parent))
    return (
        [beside, "simulator"] if beside else [sys.executable, "-m", "daemons.cli.main", "simulator"]
    )
