"""The engine alone: one TPM 1.2 on a raw stream socket, in place of a chip or of swtpm.

    vtpm simulator --state DIR --socket PATH
        [--journal] [--no-ek] [--ephemeral] [--seed N] [--fail-self-test]
        [--control PATH] [--clients-max N] [--stall SECONDS]

Same engine, same store and same promises as the hardware TPM: permanent state is synced into
DIR/tpm.nv before a command is answered. One or many clients; each command runs whole.

The TPM is powered on when the simulator starts, and starts itself (TPM_Startup(ST_CLEAR)) when the
first command is not a TPM_Startup; so it suits clients that send one and clients that do not.
SIGHUP is a power cycle, SIGTERM ends it. To kill it is a power cycle too, unless it keeps a journal
(DIR/journal): then the next one goes on where the killed one was, as a vTPM does. With a seed it
makes the same keys, nonces and random bytes in every run, and says so in its TPM_CAP_VERSION_VAL.
It can be told to fail its self-test, so that a program's way with a TPM in failure mode can be
seen; nothing of that is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import gc
import os
import signal
import socket
import stat
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from daemons import logs
from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm, PermanentStore
from daemons.errors import ExitCode, Failure
from daemons.fair_lock import FairLock
from daemons.guest.tpm0_stream import STALL_S, Tpm0Stream
from daemons.journal import remove_journal
from daemons.listeners import Kind, Listener, listen, steady_directory
from daemons.sd_notify import Notifier
from daemons.thread_service import CLIENTS_MAX, STOPS, Door, Signals, ThreadService
from daemons.volatile_memory import VolatileMemory
from daemons.world import SeededRng
from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode
from tpm12.commands import ALL
from tpm12.engine import error_response
from tpm12.primes import rsa_primes
from tpm12.profile import CHIP, Profile
from tpm12.state import Permanent

PROGRAM: Final = "vtpm simulator"
SEEDED: Final = dataclasses.replace(CHIP, manufacturer=b"SEED", is_repeatable=True)
"""A TPM whose secrets anyone can compute again says so to whoever asks for its maker."""
_MEMORY: Final = "tpm.nv"
_JOURNAL: Final = "journal"
_SEED_BYTES_MAX: Final = 5000
"""As long as an integer may be for Python."""
_STARTUP: Final = Ordinal.STARTUP.to_bytes(4, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for."""

    state: Path
    socket: Path
    has_ek: bool = True
    is_ephemeral: bool = False
    has_journal: bool = False
    seed: int | None = None
    fails_self_test: bool = False
    clients_max: int = CLIENTS_MAX
    """Connections at a time; more are closed at once."""
    stall_s: float = STALL_S
    """How long a client may stop inside a command, or not read."""
    control: Path | None = None
    """Where swtpm's control channel is; None: there is none."""


class EphemeralStore:
    """Keeps the permanent section until the process ends."""

    def __init__(self) -> None:
        self._permanent: Permanent | None = None

    def load(self) -> Permanent | None:
        """What was saved last."""
        return self._permanent

    def save(self, permanent: Permanent) -> None:
        """Keep it in memory."""
        self._permanent = permanent


class _OfOneSeed:
    """The store of a TPM that goes on only with the seed it was made with, or with none.

    The TPM has it in its own state. The file beside that, which can get lost, tells it of those
    that were made before.

    Args:
        store: The one below.
        options: What is to run.
        noted: What the file says; empty when there is none.
    """

    def __init__(self, store: PermanentStore, options: Options, noted: str) -> None:
        self._store = store
        self._options = options
        self._noted = noted

    def load(self) -> Permanent | None:
        """What was saved last.

        Raises:
            Failure: It was made with another seed, or cannot be read.
        """
        permanent = self._store.load()
        if permanent is not None:
            seed = permanent.seed
            made_with = self._noted if seed is None else seed.decode("ascii", errors="replace")
            _check_seed(self._options, made_with)
        return permanent

    def save(self, permanent: Permanent) -> None:
        """Return when it would survive a power cut."""
        self._store.save(permanent)


class SeededKeyGenerator:
    """RSA keys out of seeded randomness (slow: Miller-Rabin in Python)."""

    def __init__(self, rng: SeededRng) -> None:
        self._rng = rng

    def primes(self, bits: int, exponent: int, /) -> tuple[int, int]:
        """Give two primes for a modulus of exactly `bits` bits."""
        return rsa_primes(bits, exponent, self._rng)


class Simulator:
    """A TPM that starts itself when nobody else does.

    Args:
        tpm: The engine on its store.

    Attributes:
        exchange: Runs one command; from any thread.
        locality: Of the commands that come, 0 to 4; only a control channel changes it.
        is_on: Whether it has power; only a control channel takes it away.
    """

    def __init__(self, tpm: DurableTpm) -> None:
        self._tpm = tpm
        self._turn = FairLock()
        self.exchange: Final = self._turn.guarding(self._run)
        self.locality = 0
        self.is_on = True
        self._has_started = tpm.is_resumed and not tpm.state.stany.post_initialise
        if not tpm.is_resumed:
            tpm.power_on()

    @property
    def is_resumed(self) -> bool:
        """Whether it goes on where a killed one was."""
        return self._tpm.is_resumed

    def _run(self, request: bytes) -> bytes:
        if self._has_started:
            return self._tpm.execute(request, self.locality)
        return self._execute_first(request)

    def _execute_first(self, request: bytes) -> bytes:
        if not self.is_on:
            return error_response(ReturnCode.FAIL)  # as swtpm
        if request[6:10] != _STARTUP:
            self._tpm.start()
        response = self._tpm.execute(request, self.locality)
        self._has_started = not self._tpm.state.stany.post_initialise
        return response

    def power_cycle(self) -> None:
        """Power off and on again: volatile state is gone."""
        with self._turn:
            self.is_on, self._has_started = True, False
            self._tpm.power_on()
        _log("info", "power cycle")

    def switch_off(self) -> None:
        """The power goes, and what a journal has is true no longer; commands are refused."""
        with self._turn:
            self.is_on = self._has_started = False
            self._tpm.power_off()

    @property
    def buffer_bytes(self) -> int:
        """The longest command."""
        return CHIP.input_buffer_bytes

    @property
    def established(self) -> bool:
        """TPM_PERMANENT_FLAGS.tpmEstablished."""
        return self._tpm.established

    def reset_established(self, locality: int) -> int:
        """TSC_ResetEstablishmentBit; its return code."""
        with self._turn:
            return self._tpm.reset_established(locality)

    def hash_start(self) -> int:
        """TPM_HASH_START; a return code."""
        with self._turn:
            if not self._has_started:
                return ReturnCode.INVALID_POSTINIT
            return _bus_cycle(self._tpm.hash_start())

    def hash_data(self, data: bytes) -> int:
        """TPM_HASH_DATA; a return code."""
        with self._turn:
            if self._tpm.state.volatile.hash_sequence is None:
                return ReturnCode.SHA_THREAD
            return _bus_cycle(self._tpm.hash_data(data))

    def hash_end(self) -> int:
        """TPM_HASH_END; a return code."""
        with self._turn:
            if self._tpm.state.volatile.hash_sequence is None:
                return ReturnCode.SHA_THREAD
            return _bus_cycle(self._tpm.hash_end())

    def make_endorsement_key(self) -> None:
        """Do what a maker does, and begin again as just powered on.

        Raises:
            Failure: The key was not made or not stored.
        """
        with self._turn:
            self._tpm.power_off()  # a journal begins with the power-on below
            self._tpm.start()
            self._tpm.make_endorsement_key()
            self._tpm.power_on()


def _bus_cycle(is_done: bool) -> int:
    return ReturnCode.SUCCESS if is_done else ReturnCode.FAIL


def open_simulator(options: Options) -> Simulator:
    """Open the state, or make a new TPM in an empty folder.

    Raises:
        Failure: The state cannot be read or kept; it stays as it is.
    """
    store: PermanentStore = EphemeralStore()
    if not options.is_ephemeral:
        _make_folder(options.state)
        noted = _keep_seed(options)
        store = _OfOneSeed(ChipMemory.open(options.state / _MEMORY), options, noted)
    profile: Profile = CHIP
    rng = key_generator = None
    if options.seed is not None:
        profile, rng = SEEDED, SeededRng(options.seed)
        key_generator = SeededKeyGenerator(rng)
    world = {
        "rng": rng,
        "key_generator": key_generator,
        "seed": _seed_text(options).encode() or None,
    }
    made = functools.partial(_open_tpm, options, store, **world)
    tpm = made(profile=profile)
    simulator = Simulator(tpm)
    if tpm.is_new and options.has_ek:
        simulator.make_endorsement_key()
    elif tpm.is_new:
        tpm.save_as_new()
    if options.fails_self_test:  # from now on: a broken TPM makes no key
        return Simulator(made(profile=dataclasses.replace(profile, fails_self_test=True)))
    return simulator


def _open_tpm(options: Options, store: PermanentStore, **world: Any) -> DurableTpm:  # noqa: ANN401 - of `DurableTpm`
    """Open the TPM, with what a killed one has left in its journal.

    Raises:
        Failure: The journal cannot be gone on from; it stays as it is.
    """
    if options.is_ephemeral:
        return DurableTpm(store, commands=ALL, **world)
    path = options.state / _JOURNAL
    if not options.has_journal:
        remove_journal(path)  # this start is a power-on, and what it says is over
        return DurableTpm(store, commands=ALL, **world)
    try:
        return DurableTpm(store, commands=ALL, memory=VolatileMemory(path, PROGRAM), **world)
    except Failure as failure:
        if failure.exit_code is not ExitCode.DAMAGED:
            raise
        raise Failure(
            failure.what,
            why=failure.why,
            next_step=f"To give up what was in memory, as a power cycle does: rm {path}",
            exit_code=failure.exit_code,
        ) from failure


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(
            f"cannot keep a TPM in {path}",
            why=(error.strerror or str(error)).lower(),
            next_step="Give --state a folder that you may write; it is made if there is none.",
            exit_code=ExitCode.CONFIGURATION,
        ) from error


def _seed_text(options: Options) -> str:
    return "" if options.seed is None else str(options.seed)


def _keep_seed(options: Options) -> str:
    """Write down beside a new TPM which seed it is made with; give what is there of another.

    Raises:
        Failure: What lies there cannot be read or replaced.
    """
    noted = options.state / "seed"
    wanted = _seed_text(options)
    try:
        if not (options.state / _MEMORY).exists():
            noted.unlink(missing_ok=True)
            if wanted:
                noted.write_text(wanted)
            return wanted
        return _small_file(noted).decode("ascii", errors="replace")
    except OSError as error:
        raise Failure(
            f"cannot keep a TPM in {options.state}",
            why=f"{error.filename or noted}: {(error.strerror or str(error)).lower()}",
            next_step="Look at the folder's owner and mode, and at what lies there.",
            exit_code=ExitCode.IO_ERROR,
        ) from error


def _check_seed(options: Options, made_with: str) -> None:
    """Let a TPM go on only as it was made: it must say so of itself in every later run.

    Raises:
        Failure: This one was made with another seed, or with none.
    """
    wanted = _seed_text(options)
    if made_with != wanted:
        told = f"with --seed {made_with}" if made_with else "without a seed"
        raise Failure(
            f"cannot go on with the TPM in {options.state}",
            why=f"it was made {told}, and it is now to run "
            + (f"with --seed {wanted}" if wanted else "without one"),
            next_step="Start it as it was made, or give --state another folder.",
            exit_code=ExitCode.CONFIGURATION,
        )


def _small_file(path: Path) -> bytes:
    """The content of a file; empty when there is none. A FIFO in its place holds nobody up."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        return file.read(_SEED_BYTES_MAX)


def run_simulator(options: Options) -> int:
    """Serve until SIGTERM; the exit status is one of `ExitCode`."""
    try:
        with Signals(STOPS | {signal.SIGHUP}) as signals:
            _run(options, signals)
    except Failure as failure:
        values = {"why": failure.why, "next_step": failure.next_step}
        _log("error", failure.what, **values, exit_code=int(failure.exit_code))
        return failure.exit_code
    except Exception:  # noqa: BLE001 - the one place where a bug of ours ends
        traceback.print_exc()
        _log("error", "this is a bug of ours; please report the lines above")
        return ExitCode.BUG
    return ExitCode.DONE


def _run(options: Options, signals: Signals) -> None:
    paths = [options.socket]
    if options.control is not None:
        paths.append(options.control)
    for path in paths:
        _require_folder(path)
    simulator = open_simulator(options)
    listener, *control_listeners = _listening(paths)
    stream = Tpm0Stream(simulator.exchange, _tell_unanswered, _tell_tpm2, stall_s=options.stall_s)
    commands = Door(listener, stream.serve, options.clients_max)

    def take_connection(connection: socket.socket) -> bool:
        return service.take(connection, commands)

    doors = [commands]
    for control_listener in control_listeners:
        from daemons import swtpm_control  # noqa: PLC0415 - few need it, and it takes time to import

        channel = swtpm_control.ControlChannel(
            simulator, take_connection, _shut_down, stall_s=options.stall_s
        )
        doors.append(Door(control_listener, channel.serve, swtpm_control.CLIENTS_MAX))
    service = ThreadService(doors, _log)
    _log(
        "info",
        "serving a TPM 1.2" + (", gone on where a killed one was" if simulator.is_resumed else ""),
        socket=str(options.socket),
        state="in memory only" if options.is_ephemeral else str(options.state),
        seed="none" if options.seed is None else str(options.seed),
    )
    gc.freeze()  # what is there now stays; looking through it again would stop commands for 10 ms
    service.run(signals, Notifier.from_environment(os.environ), simulator.power_cycle)
    simulator.switch_off()


def _require_folder(path: Path) -> None:
    try:
        is_there = path.parent.is_dir()
    except OSError:  # no name for a folder
        is_there = False
    if not is_there:
        raise Failure(
            f"cannot listen at {path}",
            why=f"there is no folder {path.parent}",
            next_step=f"Make it: mkdir -m 700 {path.parent}",
            exit_code=ExitCode.CONFIGURATION,
        )


def _listening(paths: Sequence[Path]) -> Sequence[Listener]:
    """Listen at all paths or at none."""
    with contextlib.ExitStack() as unless_all:
        listeners = [
            unless_all.enter_context(listen(path, Kind.STREAM, open_directory=steady_directory))
            for path in paths
        ]
        unless_all.pop_all()
    return listeners


def _shut_down() -> None:
    """End as SIGTERM does."""
    os.kill(os.getpid(), signal.SIGTERM)


_ALLOWANCE: Final = logs.Allowance()


def _log(level: str, event: str, /, **values: object) -> None:
    left_out = _ALLOWANCE.take(event)
    if left_out is not None:
        more = {"left_out": left_out} if left_out else {}
        logs.write_line(PROGRAM, level, event, **values, **more)


def _tell_unanswered(failure: Failure, peer_pid: int) -> None:
    _log("error", "command not answered", reason=str(failure), peer_pid=peer_pid)


def _tell_tpm2(peer_pid: int) -> None:
    _log(
        "warning",
        "a TPM 2.0 program talks to this TPM 1.2, which refuses its commands",
        peer_pid=peer_pid,
    )
