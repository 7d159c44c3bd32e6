"""hwtpmd: the hardware TPM. An engine behind TIS registers, on a socket that stands for the bus.

It begins without power. The platform (domain 0, the launcher's firmware) powers it on through its
pins, sends TPM_Startup and measures; the manager drives it through the pages it was granted. A
process that finds the journal of a killed one has its power, its registers and its state.
"""

from __future__ import annotations

import argparse
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from daemons import command_log, log_levels, logs, policy, settings
from daemons.chip_memory import ChipMemory, make_chip_memory
from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from daemons.faults.hooks import hooks_of
from daemons.journal import GO_ON, missing
from daemons.lean_structlog import structlog
from daemons.listeners import Kind, PeerCredentials, activated_or_listen
from daemons.places import CHIP_NAME, Places
from daemons.registry import Registry, Role
from daemons.sd_notify import Notifier
from daemons.self_test import pass_self_test
from daemons.service import run_daemon
from daemons.threads import run_in_thread
from daemons.tis_server import Recalled, TisPeer, TisServer, TisSettings, serve_tis
from daemons.volatile_memory import VolatileMemory
from hwtpm.tis_device import PendingCommand
from protocol.constants import LOCALITY_MAX
from tpm12.commands import ALL
from tpm12.profile import CHIP

PROGRAM: Final = "hwtpmd"
SOCKET_NAME: Final = "tis"
"""What the socket is called when systemd passes it."""
_REGISTERS: Final = "registers"
_PLATFORM_PAGES: Final = "platform pages"
"""A byte for each locality at which the platform wrote last."""
_ANSWERED: Final = "answered"
_SERIAL: Final = struct.Struct(">Q")


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
        tell("powered on" if tpm.is_resumed else "without power")

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
        """Forget what is volatile; permanent state is stored with every change."""
        self._tpm.power_off()
        self._tell("without power")
        structlog.get_logger().info("power is off")

    def set_physical_presence(self, *, is_asserted: bool) -> None:
        """The pin."""
        self._tpm.set_physical_presence(asserted=is_asserted)


class Registers:
    """The registers, remembered beside the engine's state (`RegisterMemory`).

    Args:
        tpm: The engine on its memory.
    """

    def __init__(self, tpm: DurableTpm) -> None:
        self._tpm = tpm

    def recall(self) -> Recalled | None:
        """Give the registers, and the last command that changed anything."""
        notes = self._tpm.notes
        if _REGISTERS not in notes:
            return None
        answered = notes.get(_ANSWERED, bytes(_SERIAL.size))
        return Recalled(
            registers=notes[_REGISTERS],
            # An earlier version remembered none.
            platform_pages=frozenset(notes.get(_PLATFORM_PAGES, b"")),
            serial=_SERIAL.unpack_from(answered)[0],
            response=answered[_SERIAL.size :],
        )

    def remember(self, registers: bytes, platform_pages: frozenset[int]) -> None:
        """Keep the registers, and at which localities the platform wrote last."""
        notes = {_REGISTERS: registers}
        pages = bytes(sorted(platform_pages))
        if pages != self._tpm.notes.get(_PLATFORM_PAGES, b""):
            notes[_PLATFORM_PAGES] = pages
        self._tpm.remember(notes)

    def run(self, command: PendingCommand) -> bytes:
        """Run a command; its response is remembered with what it changed."""
        serial, begun = _SERIAL.pack(command.serial), command_log.begin()
        response = self._tpm.execute(
            command.request, command.locality, lambda response: {_ANSWERED: serial + response}
        )
        command_log.end(begun, command.request, response, locality=command.locality)
        return response


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Arguments of the process."""

    root: Path
    must_go_on: bool = False


def main(argv: list[str] | None = None) -> int:
    """Run hwtpmd; the exit status is one of `ExitCode`."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="The emulated hardware TPM 1.2.")
    parser.add_argument("--root", type=Path, default=Path("/"), help="root of the installation")
    parser.add_argument("--domain", default=CHIP_NAME, help=argparse.SUPPRESS)
    parser.add_argument(GO_ON, action="store_true", help="refuse to start without a journal")
    found = parser.parse_args(argv)
    options = Options(root=found.root, must_go_on=found.go_on)
    return run_daemon(PROGRAM, partial(_run, options))


async def _run(options: Options) -> None:
    places = Places(options.root)
    chosen = settings.load(places.settings(PROGRAM), HwtpmdSettings)
    logs.configure(PROGRAM, CHIP_NAME, chosen.log_level)
    log_levels.follow(places.log_levels, CHIP_NAME, chosen.log_level)
    notifier = Notifier.from_environment(os.environ)
    places.make_private(places.chip_memory.parent)
    hooks = hooks_of(places, CHIP_NAME)
    make_chip_memory(places.chip_memory)
    memory = ChipMemory(hooks.open_disk(places.chip_memory))
    volatile = VolatileMemory(places.domain(CHIP_NAME).journal, CHIP_NAME)
    tpm = DurableTpm(
        memory,
        profile=CHIP,
        commands=ALL,
        clock=hooks.clock(),
        memory=volatile,
        is_nv_locked=True,
    )
    if options.must_go_on and not tpm.is_resumed:
        raise missing(places.domain(CHIP_NAME).journal)
    if tpm.is_new:
        tpm.save_as_new()
    await run_in_thread(partial(pass_self_test, tpm.state.permanent, CHIP, ALL))
    chip = Chip(tpm, notifier.status)
    admit = admission(Registry(places.registry), policy.load(places.policy))
    server = TisServer(
        chip, admit, memory=Registers(tpm), settings=chosen.tis, wrap_socket=hooks.tis_socket
    )
    if hooks.attach_chip is not None:
        hooks.attach_chip(server)
    if tpm.is_resumed:
        structlog.get_logger().info("went on where a killed process was")
        await run_in_thread(server.run_recalled_command)
    listener = activated_or_listen(SOCKET_NAME, places.tis_socket, Kind.SEQPACKET)
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
