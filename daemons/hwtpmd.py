"""hwtpmd: the hardware TPM. An engine behind TIS registers, on a socket that stands for the bus.

It begins without power. The platform (domain 0, the launcher's firmware) powers it on through its
pins, sends TPM_Startup and measures; the manager drives it through the pages it was granted.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import structlog
import trio

from daemons import logs, policy, settings
from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from daemons.listeners import Kind, PeerCredentials, listen
from daemons.places import CHIP_NAME, Places
from daemons.registry import Registry, Role
from daemons.sd_notify import Notifier
from daemons.service import run_daemon
from daemons.tis_server import TisPeer, TisServer, TisSettings, serve_tis
from protocol.constants import LOCALITY_MAX
from tpm12.commands import ALL
from tpm12.profile import CHIP

PROGRAM: Final = "hwtpmd"


@dataclass(frozen=True, slots=True, kw_only=True)
class HwtpmdSettings:
    """What may be set, in etc/vtpm/hwtpmd.toml."""

    log_level: str = "info"
    tis: TisSettings = field(default_factory=TisSettings)


class Chip:
    """The engine as the TIS server wants it (`ChipPort`).

    Args:
        tpm: The engine on its memory.
        tell: Called with a line for `vtpm status`: whether the power is on.
    """

    def __init__(self, tpm: DurableTpm, tell: Callable[[str], None] = lambda _: None) -> None:
        self._tpm = tpm
        self._tell = tell
        tell("without power")

    @property
    def established(self) -> bool:
        """TPM_PERMANENT_FLAGS.tpmEstablished."""
        return self._tpm.established

    def execute(self, request: bytes, locality: int) -> bytes:
        """Run one command."""
        return self._tpm.execute(request, locality)

    def hash_start(self) -> bool:
        """Bus cycle TPM_HASH_START."""
        return self._tpm.hash_start()

    def hash_data(self, data: bytes) -> bool:
        """Bus cycle TPM_HASH_DATA."""
        return self._tpm.hash_data(data)

    def hash_end(self) -> bool:
        """Bus cycle TPM_HASH_END."""
        return self._tpm.hash_end()

    def power_on(self) -> None:
        """TPM_Init."""
        self._tpm.power_on()
        self._tell("powered on")
        structlog.get_logger().info("power is on")

    def power_off(self) -> None:
        """Nothing to store: permanent state is stored with every change."""
        self._tell("without power")
        structlog.get_logger().info("power is off")

    def set_physical_presence(self, *, is_asserted: bool) -> None:
        """The pin."""
        self._tpm.set_physical_presence(asserted=is_asserted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Arguments of the process."""

    root: Path


def main(argv: list[str] | None = None) -> int:
    """Run hwtpmd; the exit status is one of `ExitCode`."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The emulated hardware TPM 1.2.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="root of the installation")
    parser.add_argument("--domain", default=CHIP_NAME, help=argparse.SUPPRESS)
    found = parser.parse_args(argv)
    return run_daemon(PROGRAM, partial(_run, Options(root=found.root)))


async def _run(options: Options) -> None:
    places = Places(options.root)
    chosen = settings.load(places.settings(PROGRAM), HwtpmdSettings)
    logs.configure(PROGRAM, CHIP_NAME, chosen.log_level)
    notifier = Notifier.from_environment(os.environ)
    places.make_private(places.chip_memory.parent)
    memory = await trio.to_thread.run_sync(ChipMemory.open, places.chip_memory)
    tpm = DurableTpm(memory, profile=CHIP, commands=ALL)
    if tpm.is_new:
        tpm.save_as_new()
    chip = Chip(tpm, notifier.status)
    admit = admission(Registry(places.registry), policy.load(places.policy))
    server = TisServer(chip, admit, settings=chosen.tis)
    listener = listen(places.tis_socket, Kind.SEQPACKET)
    await serve_tis(listener, server)


def admission(registry: Registry, rules: policy.Policy) -> Callable[[PeerCredentials], TisPeer]:
    """Decide by the policy who comes in, and by the registry which pages he then has.

    The platform has all pages, a domain what iomem= grants. The function that is returned raises
    UnknownPeer and NotAllowed, Failures that say why not.
    """

    def admit(credentials: PeerCredentials) -> TisPeer:
        domain, own = registry.lookup(credentials), registry.get(CHIP_NAME)
        if own is None:
            raise Failure(
                "the hardware TPM lets nobody in",
                why="the registry no longer has it, so its label is not known",
                next_step="Start the platform again: vtpm down, vtpm up",
                exit_code=ExitCode.UNAVAILABLE,
            )
        rules.check_labels(domain, own)
        is_platform = domain.role is Role.DOMAIN0
        localities = range(LOCALITY_MAX + 1) if is_platform else domain.localities
        return TisPeer(name=domain.name, localities=frozenset(localities), is_platform=is_platform)

    return admit
