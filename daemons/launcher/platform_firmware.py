"""The platform's firmware over the chip's socket: async outside, one blocking thread inside.

Everything is measured once, when the launcher starts and before the fork server runs any of it:
what is measured later may already be another file than the one that was loaded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from daemons.errors import ExitCode, Failure
from daemons.launcher.domain import PROGRAMS
from daemons.launcher.event_log import Event, read_log, write_log
from daemons.launcher.firmware import (
    FIRMWARE_LOCALITY,
    LAUNCH_LOCALITY,
    Firmware,
    PlatformParts,
)
from daemons.launcher.measuring import (
    Measured,
    measure_bytes,
    measure_files,
    measure_program,
    measure_runtime,
)
from daemons.lean_structlog import structlog
from daemons.places import Places
from daemons.registry import Role
from daemons.threads import run_in_thread
from daemons.tis_link import ChipFault, TisLink
from hwtpm.tis_driver import TisFault

FIRMWARE_PROGRAM: Final = "launcher.firmware"
LAUNCHER_PROGRAM: Final = "launcherd"
SETTINGS: Final = ("launcherd", *PROGRAMS.values())
"""Daemons whose settings files decide what the platform does."""
SEIZURES_MAX: Final = 10
"""Interruptions by other localities in a row after which the last one is told."""
TAKEN_S: Final = 0.2
"""The pause after one: somebody else has the chip, for a command or so."""
_TAKEN: Final = frozenset({TisFault.SEIZED, TisFault.HASH_REFUSED})

T = TypeVar("T")


class PlatformFirmware:
    """Powers one platform on, and measures it.

    Args:
        places: Of the installation.
        measure_launcher: Measures whoever starts the domains; launcherd when None.
        events: What was logged since the power-on, if that was done by an earlier process.
    """

    def __init__(
        self,
        places: Places,
        measure_launcher: Callable[[], Measured] | None = None,
        events: Iterable[Event] | None = None,
    ) -> None:
        self._places = places
        self._measure_launcher = measure_launcher or partial(measure_program, LAUNCHER_PROGRAM)
        self._links: dict[int, TisLink] = {}
        self._firmware = None if events is None else Firmware(self, events)
        self._parts: PlatformParts | None = None
        self._programs: dict[str, Measured] = {}
        self._turn = trio.Lock()

    async def measure(self) -> None:
        """Measure everything that there is before any domain; the second time does nothing.

        Raises:
            Failure: A file cannot be read.
        """
        async with self._turn:
            if self._parts is None:
                await run_in_thread(self._measure)

    async def power_on(self, tell: Callable[[str], None]) -> None:
        """Power the chip on, start it up and measure the platform into it.

        Args:
            tell: Called with what is being done.

        Raises:
            Failure: The chip is not reached, or refuses a step.
        """
        tell("whose platform is being measured")
        await self.measure()
        async with self._turn:
            tell("which is being powered on")
            await run_in_thread(partial(_unless_seized, self._power_on))

    async def adopt(self) -> None:
        """Go on with the event log of an earlier launcher.

        Raises:
            Failure: It is gone or damaged.
        """
        events = await run_in_thread(partial(read_log, self._places.event_log))
        if events is None:
            raise Failure(
                "cannot take the platform over from an earlier launcher",
                why=f"its event log {self._places.event_log} is gone",
                next_step="Power the platform off and on: vtpm down, vtpm up",
                exit_code=ExitCode.DAMAGED,
            )
        self._firmware = Firmware(self, events)

    async def launch_manager(self, config_text: str) -> None:
        """Measure the manager's program into PCR 18, its config file into PCR 19, unless done.

        Raises:
            Failure: As `power_on`.
        """
        await self.measure()
        async with self._turn:
            work = partial(self._launch_manager, config_text)
            await run_in_thread(partial(_unless_seized, work))

    async def read_pcrs(self) -> dict[int, bytes]:
        """Read all PCRs of the chip.

        Raises:
            Failure: The chip is not reached, or refuses.
        """
        async with self._turn:
            return await run_in_thread(partial(_unless_seized, self._read_pcrs))

    async def boot_hash(self, program: str) -> str:
        """Give the hex SHA-1 of a program, as measured at the launcher's start.

        Raises:
            Failure: A file cannot be read.
        """
        await self.measure()
        return self._programs[program].sha1.hex()

    # -- in a thread, one at a time --------------------------------------------------------------

    def exchange(self, request: bytes, locality: int) -> bytes:
        """Run one command of the firmware at a locality (`firmware.ChipPort`)."""
        link = self._link(locality)
        response = link.exchange(request)
        link.relinquish()  # the chip grants another locality, or a hash sequence, only then
        return response

    def hash_sequence(self, data: bytes) -> None:
        """Run the locality 4 hash sequence (`firmware.ChipPort`)."""
        self._link(LAUNCH_LOCALITY).hash_sequence(data)

    def _measure(self) -> None:
        files = {f"{daemon}.toml": self._places.settings(daemon) for daemon in SETTINGS}
        self._programs = {program: measure_program(program) for program in PROGRAMS.values()}
        self._parts = PlatformParts(
            firmware=measure_program(FIRMWARE_PROGRAM),
            settings=measure_files("settings", files),
            runtime=measure_runtime(),
            launcher=self._measure_launcher(),
            policy=measure_files("policy", {"policy.toml": self._places.policy}),
        )

    def _power_on(self) -> None:
        self._close_links()
        assert self._parts is not None
        self._firmware = Firmware(self)
        try:
            self._link(FIRMWARE_LOCALITY).power_on()
            self._firmware.power_on(self._parts)
        finally:
            self._close_links()
            write_log(self._places.event_log, self._firmware.events)

    def _launch_manager(self, config_text: str) -> None:
        assert self._firmware is not None, "a manager starts only after the platform's power-on"
        config = measure_bytes("manager configuration", {"config": config_text.encode()})
        logged = len(self._firmware.events)
        try:
            self._firmware.launch_manager(
                self._programs[PROGRAMS[Role.MANAGER]],
                config,
                keep=partial(write_log, self._places.event_log),
            )
        finally:
            self._close_links()
            # One that was only killed is measured already, and needs no room to come back.
            if len(self._firmware.events) != logged:
                write_log(self._places.event_log, self._firmware.events)

    def _read_pcrs(self) -> dict[int, bytes]:
        assert self._firmware is not None, "a chip without power is not read"
        try:
            return self._firmware.read_pcrs()
        finally:
            self._close_links()

    def _link(self, locality: int) -> TisLink:
        if locality not in self._links:
            self._links[locality] = TisLink(self._places.tis_socket, locality)
        return self._links[locality]

    def _close_links(self) -> None:
        """Leave the chip's localities and its socket to others."""
        for link in self._links.values():
            link.close()
        self._links.clear()


def _unless_seized(work: Callable[[], T]) -> T:
    """Do something that can be begun again, and begin again while other localities interrupt it.

    A platform that is powered on again begins with TPM_Init; a manager that is launched again, with
    a hash sequence where an extend is in doubt.
    """
    for _ in range(SEIZURES_MAX):
        try:
            return work()
        except ChipFault as fault:
            if fault.fault not in _TAKEN:
                raise
            structlog.get_logger().warning("begins again", reason=fault.why)
            time.sleep(TAKEN_S)
    return work()
