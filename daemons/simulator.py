"""The engine alone: one TPM 1.2 on a raw stream socket, in place of a chip or of swtpm.

    vtpm simulator --state DIR --socket PATH [--no-ek] [--ephemeral] [--seed N]

Same engine, same store and same promises as the hardware TPM: permanent state is synced into
DIR/tpm.nv before a command is answered. One or many clients; each command runs whole.

The TPM is powered on when the simulator starts, and starts itself (TPM_Startup(ST_CLEAR)) when the
first command is not a TPM_Startup; so it suits clients that send one and clients that do not.
SIGHUP is a power cycle, SIGTERM ends it. With a seed it makes the same keys, nonces and random
bytes in every run, and says so in its TPM_CAP_VERSION_VAL.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from daemons import logs
from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm, PermanentStore
from daemons.errors import ExitCode, Failure
from daemons.fair_lock import FairLock
from daemons.guest.tpm0 import Tpm0Device
from daemons.listeners import Kind, listen
from daemons.sd_notify import Notifier
from daemons.service import run_daemon, serve
from daemons.world import SeededRng
from protocol.constants import Ordinal
from tpm12.commands import ALL
from tpm12.primes import rsa_primes
from tpm12.profile import CHIP, Profile
from tpm12.state import Permanent

PROGRAM: Final = "vtpm simulator"
SEEDED: Final = dataclasses.replace(CHIP, manufacturer=b"SEED")
"""A TPM whose secrets anyone can compute again says so to whoever asks for its maker."""
_STARTUP: Final = Ordinal.STARTUP.to_bytes(4, "big")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What was asked for."""

    state: Path
    socket: Path
    has_ek: bool = True
    is_ephemeral: bool = False
    seed: int | None = None


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
    """

    def __init__(self, tpm: DurableTpm) -> None:
        self._tpm = tpm
        self._turn = FairLock()
        self._tpm.power_on()

    def exchange(self, request: bytes) -> bytes:
        """Run one command at locality 0."""
        with self._turn:
            if self._tpm.state.stany.post_initialise and request[6:10] != _STARTUP:
                self._tpm.start()
            return self._tpm.execute(request, 0)

    def power_cycle(self) -> None:
        """Power off and on again: volatile state is gone."""
        with self._turn:
            self._tpm.power_on()

    def make_endorsement_key(self) -> None:
        """Do what a maker does, and begin again as just powered on.

        Raises:
            Failure: The key was not made or not stored.
        """
        with self._turn:
            self._tpm.start()
            self._tpm.make_endorsement_key()
            self._tpm.power_on()


def open_simulator(options: Options) -> Simulator:
    """Open the state, or make a new TPM in an empty folder.

    Raises:
        Failure: The state cannot be read or kept; it stays as it is.
    """
    store: PermanentStore = EphemeralStore()
    if not options.is_ephemeral:
        options.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        store = ChipMemory.open(options.state / "tpm.nv")
    profile: Profile = CHIP
    rng = key_generator = None
    if options.seed is not None:
        profile, rng = SEEDED, SeededRng(options.seed)
        key_generator = SeededKeyGenerator(rng)
    tpm = DurableTpm(store, profile=profile, commands=ALL, rng=rng, key_generator=key_generator)
    simulator = Simulator(tpm)
    if tpm.is_new and options.has_ek:
        simulator.make_endorsement_key()
    elif tpm.is_new:
        tpm.save_as_new()
    return simulator


def run_simulator(options: Options) -> int:
    """Serve until SIGTERM; the exit status is one of `ExitCode`."""
    return run_daemon(PROGRAM, partial(_run, options))


async def _run(options: Options) -> None:
    logs.configure(PROGRAM)
    if not options.socket.parent.is_dir():
        raise Failure(
            f"cannot listen at {options.socket}",
            why=f"there is no folder {options.socket.parent}",
            next_step=f"Make it: mkdir -m 700 {options.socket.parent}",
            exit_code=ExitCode.CONFIGURATION,
        )
    simulator = open_simulator(options)
    device = Tpm0Device(simulator.exchange, _tell, lambda: None)
    listener = listen(options.socket, Kind.STREAM)
    structlog.get_logger().info(
        "serving a TPM 1.2",
        socket=str(options.socket),
        state="in memory only" if options.is_ephemeral else str(options.state),
        seed="none" if options.seed is None else str(options.seed),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(_power_cycle_on_hangup, simulator)
        notifier = Notifier.from_environment(os.environ)
        await serve(device.handle, [listener], notifier=notifier)
        nursery.cancel_scope.cancel()


async def _power_cycle_on_hangup(
    simulator: Simulator, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGHUP) as hangups:
        task_status.started()
        async for _ in hangups:
            await trio.to_thread.run_sync(simulator.power_cycle)
            structlog.get_logger().info("power cycle")


def _tell(line: str) -> None:
    structlog.get_logger().warning(line)
