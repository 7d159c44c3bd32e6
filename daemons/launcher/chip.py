"""The hardware TPM as the launcher runs it: power, firmware, measurements, power failure.

The chip's process is supervised like any other. It has power when its process is ready and the
firmware has played through (TPM_Startup, the platform's events into PCR 0-7, the locality 4 hash
sequence into PCR 17); nothing above it starts before. From then on a killed chip goes on from its
journal, and has its power all the time; one that dies under the firmware is powered on again.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import trio

from daemons.errors import ExitCode, Failure
from daemons.journal import GO_ON
from daemons.launcher.adoption import forget_power, note_power
from daemons.launcher.consequences import before_power_on
from daemons.launcher.domain import CHIP_DOMID, PROGRAMS, Domain
from daemons.launcher.process_start import Start, empty_directory, start_process
from daemons.launcher.process_states import State
from daemons.launcher.stack import Stack
from daemons.launcher.supervisor import Launched, Supervisor
from daemons.lean_structlog import structlog
from daemons.places import CHIP_NAME
from daemons.registry import DomainRecord, Role

log = structlog.get_logger()

DEATH_HEARD_S: Final = 1.0
"""How long the death of a process may take to be heard of, in seconds."""


class Firmware(Protocol):
    """What the platform does with the chip before anybody else."""

    async def measure(self) -> None:
        """Measure all programs and settings, once.

        Raises:
            Failure: A file cannot be read.
        """

    async def power_on(self, tell: Callable[[str], None]) -> None:
        """Power the chip on, start it up and measure the platform into it.

        Raises:
            Failure: The chip or a file that is to be measured is not as it should be.
        """

    async def adopt(self) -> None:
        """Go on with a platform that an earlier launcher has powered on.

        Raises:
            Failure: What it has written down of it cannot be read.
        """

    async def launch_manager(self, config_text: str) -> None:
        """Measure the manager's program into PCR 18, its configuration into PCR 19, unless done.

        Raises:
            Failure: As above.
        """

    async def read_pcrs(self) -> dict[int, bytes]:
        """Read all PCRs of a chip that has power.

        Raises:
            Failure: It is not reached, or refuses.
        """
        ...

    async def boot_hash(self, program: str) -> str:
        """Give the hex SHA-1 of a program.

        Raises:
            Failure: A file of it cannot be read.
        """
        ...


class Chip:
    """The chip of one platform.

    Args:
        stack: Of the launcher.
        firmware: Plays the platform's part.

    Attributes:
        supervisor: Its process.
    """

    def __init__(self, stack: Stack, firmware: Firmware) -> None:
        self.supervisor = Supervisor(
            CHIP_NAME, self._launch, stack.settings.supervisor, stack.changes
        )
        self._stack = stack
        self._firmware = firmware
        self._firmware_failure: Failure | None = None
        self._boot_begun = 0
        self._power_cycle = 0
        self._has_power = False
        self._process_before: Callable[[], Launched] | None = None
        self._step = ""

    async def prepare(self) -> None:
        """Measure what will be started, before anything is."""
        await self._firmware.measure()

    @property
    def is_powered(self) -> bool:
        """The firmware has played through, and the chip has had power since."""
        return self.supervisor.state is State.RUNNING and self._has_power

    @property
    def power_cycle(self) -> int:
        """Number of the chip's power-ons."""
        return self._power_cycle

    @property
    def is_off(self) -> bool:
        """Nobody has switched it on yet."""
        return self.supervisor.state is State.CREATED

    @property
    def why_not_powered(self) -> str:
        """What stands between the chip and its power, as the end of a sentence."""
        if self._firmware_failure is not None:
            return f"whose firmware failed: {self._firmware_failure.what}"
        if self.is_off:
            return "which is off: vtpm up"
        if self.supervisor.state is State.RUNNING:
            return self._step or "which is being powered on"
        if self.supervisor.state in {State.WAITING, State.STARTING}:
            return "which is starting"
        return f"which is {self.supervisor.state}: {self.supervisor.reason}".rstrip(": ")

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        return self.supervisor.process.pid if self.supervisor.process is not None else None

    def record(self, pid: int | None, start_time: int | None) -> DomainRecord:
        """Make its record for the registry."""
        return DomainRecord(
            name=CHIP_NAME,
            domid=CHIP_DOMID,
            role=Role.HWTPM,
            label=self._stack.policy.default_label(Role.HWTPM),
            uid=os.geteuid(),
            pid=pid,
            start_time=start_time,
        )

    async def power_on(self, progress: Callable[[str], Awaitable[None]]) -> None:
        """Power the chip on, unless it is, and wait until the firmware has played through.

        Raises:
            Failure: The chip does not come up, or its firmware failed.
        """
        if self.is_off:
            self._stack.nursery.start_soon(self.supervisor.run)
            self._stack.nursery.start_soon(self._boot_after_each_start)
            await self._stack.until(lambda: not self.is_off)
        elif self._firmware_failure is not None or self.supervisor.state is State.FAILED:
            self._firmware_failure = None
            self._has_power = False
            self.supervisor.restart("it was asked to power on again")
            await self._stack.changes.next()
        told = ""
        while not self.is_powered:
            failure = self._firmware_failure
            if self.supervisor.state is State.FAILED:
                failure = self.supervisor.failure
            if failure is not None:
                raise failure
            if self.supervisor.state is State.ENDED:
                raise _switched_off()
            if self.why_not_powered != told:
                told = self.why_not_powered
                await progress(f"waits for the hardware TPM, {told}")
                continue
            await self._stack.changes.next()

    async def adopt(self, process: Callable[[], Launched] | None) -> None:
        """Take over a chip that has its power.

        Args:
            process: Gives its process, if it lives.

        Raises:
            Failure: See `Firmware.adopt`.
        """
        await self._firmware.adopt()
        self._has_power = True
        self._power_cycle = 1
        self._process_before = process
        self._stack.nursery.start_soon(self.supervisor.run)
        self._stack.nursery.start_soon(self._boot_after_each_start)
        await self._stack.until(lambda: not self.is_off)

    async def measure(self, domain: Domain) -> None:
        """Measure a domain before it starts: its program for its record, a manager into PCRs too.

        Raises:
            Failure: The chip refuses, or a file cannot be read.
        """
        domain.boot_hash = await self._firmware.boot_hash(PROGRAMS[domain.role])
        if domain.role is Role.MANAGER:
            await self._firmware.launch_manager(domain.effective_config_text)

    async def read_pcrs(self) -> dict[int, bytes]:
        """Read all PCRs.

        Raises:
            Failure: The chip has no power, is not reached, or refuses.
        """
        if not self.is_powered:
            raise Failure(
                "cannot read the hardware TPM",
                why=f"it waits for its power, {self.why_not_powered}",
                next_step="vtpm up powers the platform on",
                exit_code=ExitCode.UNAVAILABLE,
            )
        return await self._firmware.read_pcrs()

    async def power_off(self) -> None:
        """Stop the chip for good, after everybody else."""
        forget_power(self._stack.places)
        if not self.is_off:
            self.supervisor.stop()
            await self._stack.until(lambda: self.supervisor.state is State.ENDED)
        self._stack.registry.remove(CHIP_NAME)

    async def _launch(self) -> Launched:
        process_before, self._process_before = self._process_before, None
        if process_before is not None:
            return process_before()
        self._firmware_failure = None
        kept = ""
        if self._has_power:
            kept = self._stack.places.domain(CHIP_NAME).journal.name
        else:
            forget_power(self._stack.places)
            self._power_cycle += 1
            await before_power_on(self._stack, self.supervisor.last_reason)
        directory = self._stack.places.tis_socket.parent
        self._stack.places.make_private(directory)
        empty_directory(directory, {kept})
        argv: tuple[str, ...] = ("--root", str(self._stack.places.root), "--domain", CHIP_NAME)
        if self._has_power:
            argv = (*argv, GO_ON)

        def register(pid: int, start_time: int) -> None:
            self._stack.registry.put(self.record(pid, start_time))

        start = Start(name=CHIP_NAME, role=Role.HWTPM, argv=argv, register=register)
        with trio.CancelScope(shield=True):  # bounded by the spawner's own deadline
            launched = await start_process(self._stack, start)
        return launched  # noqa: RET504 - mypy takes a `with` for one that may swallow errors

    async def _boot_after_each_start(self) -> None:
        while self.supervisor.state is not State.ENDED:
            start = self.supervisor.starts
            if self.supervisor.state is State.RUNNING and start != self._boot_begun:
                self._boot_begun = start
                if not self._has_power:
                    await self._boot(start)
            else:
                await self._stack.changes.next()

    async def _boot(self, start: int) -> None:
        try:
            await self._firmware.power_on(self._tell)
            note_power(self._stack.places)
        except Failure as failure:
            # The link of a chip that died ends before its supervisor hears of it.
            with trio.move_on_after(DEATH_HEARD_S):
                await self._stack.until(lambda: not self._is_running_since(start))
            if self._is_running_since(start):
                log.warning("firmware failed", what=failure.what, why=failure.why)
                self._firmware_failure = failure
            # Otherwise the chip died under the firmware; the supervisor knows why, and starts it
            # again.
        else:
            self._has_power = True
        self._step = ""
        self._stack.changes.announce()

    def _is_running_since(self, start: int) -> bool:
        return self.supervisor.starts == start and self.supervisor.state is State.RUNNING

    def _tell(self, step: str) -> None:
        self._step = step
        self._stack.changes.announce()


def _switched_off() -> Failure:
    return Failure(
        "the platform is off",
        why="the stack was stopped",
        next_step="Start it again with: vtpm up",
        exit_code=ExitCode.UNAVAILABLE,
    )
