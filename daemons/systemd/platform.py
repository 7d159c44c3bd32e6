"""The platform's part under systemd: power-on and measurement, once; then the manager's launch.

It is the launcher's firmware, with one difference: who starts the domains is not launcherd but the
unit files and the programs of this package, so these are what PCR 4 and 17 hold in its place.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trio

from daemons.launcher.event_log import read_log
from daemons.launcher.measuring import Measured, measure_files, measure_program
from daemons.launcher.platform_firmware import PlatformFirmware
from daemons.places import Places
from daemons.sd_notify import Notifier
from daemons.systemd.domain_files import unit_directory
from daemons.systemd.run_state import RunState

PROGRAM: Final = "systemd.main"
UNIT_PATTERNS: Final = ("hwtpmd.*", "vtpmmgrd.*", "vtpm-*.*", "vtpm@.*", "vtpm.slice")
POWER_WAIT_S: Final = 600.0
_LOOK_AGAIN_S: Final = 0.05


def measure_units_and_programs() -> Measured:
    """Measure what starts domains: the programs of this package, and the units.

    Raises:
        Failure: A file cannot be read.
    """
    program = measure_program(PROGRAM)
    units = measure_files("units", {path.name: path for path in _unit_files()})
    return Measured("launcher systemd", tuple(sorted((*program.files, *units.files))))


def _unit_files() -> Iterator[Path]:
    for pattern in UNIT_PATTERNS:
        yield from unit_directory().glob(pattern)


def power_on(places: Places) -> None:
    """Power the platform on and measure it, unless it has power.

    Raises:
        Failure: The chip is not reached, or refuses a step.
    """
    state = RunState(places)
    if state.is_powered:
        _tell("the platform has power; the chip goes on as it was")
        return
    firmware = PlatformFirmware(places, measure_units_and_programs)
    with state.as_domain0():
        trio.run(firmware.power_on, _tell)
    state.set_powered(powered=True)
    _tell("the platform is powered on and measured")


def launch_manager(places: Places, config_text: str) -> None:
    """Measure the manager's program and configuration before it starts; wait for power first.

    Raises:
        Failure: The platform gets no power, or the chip refuses.
    """
    state = RunState(places)
    _wait_for_power(state)
    events = read_log(places.event_log) or []
    firmware = PlatformFirmware(places, measure_units_and_programs, events)
    with state.as_domain0():
        trio.run(firmware.launch_manager, config_text)


def read_pcrs(places: Places) -> list[str]:
    """Read the chip's PCRs in hex, from 0 on.

    Raises:
        Failure: The chip is not reached, has no power, or refuses.
    """
    events = read_log(places.event_log) or []
    firmware = PlatformFirmware(places, measure_units_and_programs, events)
    with RunState(places).as_domain0():
        values = trio.run(firmware.read_pcrs)
    return [value.hex() for _, value in sorted(values.items())]


def _wait_for_power(state: RunState) -> None:
    if state.is_powered:
        return
    _tell("waits for the platform's power-on: vtpm-platform.service")
    deadline = time.monotonic() + POWER_WAIT_S
    while not state.is_powered and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN_S)  # another program's file; nothing else tells of it


def _tell(text: str) -> None:
    """Say what is done or waited for: in the journal, and as the unit's status."""
    print(text, flush=True)  # noqa: T201 - stdout is the journal
    Notifier.from_environment(os.environ).status(text)
