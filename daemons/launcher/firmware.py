"""The platform's firmware and dynamic launch: what happens to a TPM before anybody may use it.

Power-on, as a PC BIOS does it (TCG PC Client Specific Implementation Specification for
Conventional BIOS 1.21):

    TPM_Startup(ST_CLEAR), self-test, physical presence enabled for commands
    PCR 0  version of the firmware, then the firmware's own program
    PCR 1  settings of the platform
    PCR 2  the interpreter and the libraries (what a PC has in option ROMs: code of others)
    PCR 4  "Calling INT 19h": the firmware hands over
    PCR 0-7  separators
    PCR 4  the launcher's program        PCR 5  its policy
    physical presence: not asserted, and locked until the next power-on

Dynamic launch (TIS locality 4, then locality 2):

    PCR 17  launcher's program and policy, by the hash sequence
    PCR 18  the manager's program        PCR 19  the manager's configuration

The manager may start later than the platform, and again. The same manager finds the PCRs as they
are; another one (program or configuration changed) gets a new dynamic launch, so PCR 18 and 19
never say what is not true any more, and going back to the old manager brings its values back.

Invariants:
- Every extend is in the event log, and no event is in it that was not extended.
- The value that the TPM returns for each extend is what the log replays to: a TPM that was not
  reset before is noticed.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from daemons.errors import ExitCode, Failure
from daemons.launcher.event_log import Event, EventType, event_of, replay
from daemons.launcher.measuring import Measured
from protocol.constants import DIGEST_BYTES, HEADER_BYTES, PCR_COUNT, Ordinal, StartupType, Tag
from protocol.return_codes import ReturnCode

CRTM_VERSION: Final = "vtpm-stack firmware 1"
SEPARATOR: Final = bytes(4)
HANDOVER: Final = b"Calling INT 19h"
FIRMWARE_LOCALITY: Final = 0
LAUNCH_LOCALITY: Final = 2
DRTM_PCR: Final = 17
MANAGER_PROGRAM_PCR: Final = 18
MANAGER_CONFIG_PCR: Final = 19

# TPM_PHYSICAL_PRESENCE (TPM Main r116 Part 2 §4.9).
_CMD_ENABLE: Final = 0x0020
_NOTPRESENT: Final = 0x0010
_LOCK: Final = 0x0004

_HEADER: Final = struct.Struct(">HII")


class ChipPort(Protocol):
    """The chip as the firmware sees it; every method may raise a Failure."""

    def exchange(self, request: bytes, locality: int) -> bytes:
        """Run one command at a locality, which is free afterwards."""

    def hash_sequence(self, data: bytes) -> None:
        """Run HASH_START, HASH_DATA and HASH_END over some data at locality 4."""


class FirmwareFailure(Failure):
    """The TPM did not do what firmware needs; nothing above it may start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlatformParts:
    """What is measured at power-on."""

    firmware: Measured
    settings: Measured
    runtime: Measured
    launcher: Measured
    policy: Measured


class Firmware:
    """Plays the platform's part on one chip.

    Args:
        chip: The chip, after TPM_Init.
        events: What was already logged since the chip's power-on.
    """

    def __init__(self, chip: ChipPort, events: Iterable[Event] = ()) -> None:
        self._chip = chip
        self._events = list(events)
        self._presence_is_fixed = False

    @property
    def events(self) -> tuple[Event, ...]:
        """The log so far: everything that was extended, also when a later step failed."""
        return tuple(self._events)

    def power_on(self, parts: PlatformParts) -> None:
        """Start the TPM up and measure the platform, including its dynamic launch.

        Raises:
            FirmwareFailure: the TPM refuses a step, or its PCRs are not those of a fresh start.
        """
        self._events.clear()
        self._start_up()
        self._extend(0, EventType.S_CRTM_VERSION, CRTM_VERSION.encode())
        self._extend(0, EventType.POST_CODE, parts.firmware.manifest)
        self._extend(1, EventType.PLATFORM_CONFIG_FLAGS, parts.settings.manifest)
        self._extend(2, EventType.NONHOST_CODE, parts.runtime.manifest)
        self._extend(4, EventType.ACTION, HANDOVER)
        for pcr in range(8):
            self._extend(pcr, EventType.SEPARATOR, SEPARATOR)
        self._extend(4, EventType.IPL, parts.launcher.manifest)
        self._extend(5, EventType.IPL_PARTITION_DATA, parts.policy.manifest)
        self._lock_physical_presence()
        self._launch(parts.launcher.manifest + parts.policy.manifest)

    def launch_manager(
        self,
        program: Measured,
        config: Measured,
        keep: Callable[[Sequence[Event]], None] = lambda _events: None,
    ) -> bool:
        """Measure a manager before it starts.

        Args:
            program: Of the manager.
            config: Of the manager.
            keep: Called before what was measured is measured anew, with the log as it is then: who
                goes on from that log looks at the PCRs.

        Returns:
            True if something was extended; False if this very manager is what was measured last.

        Raises:
            FirmwareFailure: the platform was not powered on, or the TPM refuses a step.
        """
        wanted = [(MANAGER_PROGRAM_PCR, program.sha1), (MANAGER_CONFIG_PCR, config.sha1)]
        launch, measured = self._last_launch()
        if measured == wanted:
            return False
        if measured:
            del self._events[-len(measured) :]
            keep(self._events)
        # An extend that was seized, or whose author was killed, may have been done all the same.
        if measured or not self._is_explained(MANAGER_PROGRAM_PCR, MANAGER_CONFIG_PCR):
            self._launch(launch.event)
        self._extend(MANAGER_PROGRAM_PCR, EventType.COMPACT_HASH, program.manifest, LAUNCH_LOCALITY)
        self._extend(MANAGER_CONFIG_PCR, EventType.COMPACT_HASH, config.manifest, LAUNCH_LOCALITY)
        return True

    def read_pcrs(self) -> dict[int, bytes]:
        """Read all PCRs.

        Raises:
            FirmwareFailure: the TPM refuses.
        """
        return {pcr: self._read_pcr(pcr) for pcr in range(PCR_COUNT)}

    def _start_up(self) -> None:
        code, _ = self._try("start up", Ordinal.STARTUP, struct.pack(">H", StartupType.CLEAR))
        if code == ReturnCode.INVALID_POSTINIT:
            raise _failed(
                "start up",
                "it was started up before and has not lost power since",
                "Power the platform off and on: vtpm down, vtpm up",
            )
        _check("start up", code)
        self._run("test itself", Ordinal.SELF_TEST_FULL)
        # Refused once a platform has set the lifetime lock: what the lock says then stays.
        code, _ = self._try(
            "enable physical presence commands",
            Ordinal.TSC_PHYSICAL_PRESENCE,
            struct.pack(">H", _CMD_ENABLE),
        )
        self._presence_is_fixed = code == ReturnCode.BAD_PARAMETER
        if not self._presence_is_fixed:
            _check("enable physical presence commands", code)

    def _lock_physical_presence(self) -> None:
        doing = "lock physical presence"
        code, _ = self._try(
            doing, Ordinal.TSC_PHYSICAL_PRESENCE, struct.pack(">H", _NOTPRESENT | _LOCK)
        )
        # Commands for it that are disabled for good cannot be misused: nothing is to be locked.
        if not (self._presence_is_fixed and code == ReturnCode.BAD_PARAMETER):
            _check(doing, code)

    def _launch(self, data: bytes) -> None:
        self._chip.hash_sequence(data)
        event = event_of(DRTM_PCR, EventType.HASH_START, data)
        self._events.append(event)
        doing = "measure the launcher dynamically"
        answer = self._run(doing, Ordinal.PCR_READ, struct.pack(">I", DRTM_PCR))
        self._compare(doing, DRTM_PCR, answer)

    def _last_launch(self) -> tuple[Event, list[tuple[int, bytes]]]:
        """Give the last hash sequence, and what was extended after it."""
        after: list[tuple[int, bytes]] = []
        for event in reversed(self._events):
            if event.event_type == EventType.HASH_START:
                return event, after[::-1]
            after.append((event.pcr_index, event.digest))
        raise _failed(
            "measure the manager",
            "the event log has no dynamic launch",
            "Power the platform off and on: vtpm down, vtpm up",
        )

    def _extend(
        self, pcr: int, event_type: EventType, data: bytes, locality: int = FIRMWARE_LOCALITY
    ) -> None:
        event = event_of(pcr, event_type, data)
        doing = f"extend PCR {pcr} ({event.text})"
        parameters = struct.pack(">I", pcr) + event.digest
        answer = self._run(doing, Ordinal.EXTEND, parameters, locality)
        self._events.append(event)
        self._compare(doing, pcr, answer)

    def _compare(self, doing: str, pcr: int, answer: bytes) -> None:
        if _digest(doing, answer) != replay(self._events)[pcr]:
            raise _failed(
                doing,
                f"PCR {pcr} holds something that the event log does not explain",
                "Power the platform off and on: vtpm down, vtpm up",
            )

    def _is_explained(self, *pcrs: int) -> bool:
        """Whether PCRs hold what the log says."""
        logged = replay(self._events)
        # At the locality of the launch: a manager that was killed may still hold it, and then no
        # lower one is granted.
        return all(self._read_pcr(pcr, LAUNCH_LOCALITY) == logged[pcr] for pcr in pcrs)

    def _read_pcr(self, pcr: int, locality: int = FIRMWARE_LOCALITY) -> bytes:
        doing = f"read PCR {pcr}"
        return _digest(doing, self._run(doing, Ordinal.PCR_READ, struct.pack(">I", pcr), locality))

    def _run(
        self,
        doing: str,
        ordinal: Ordinal,
        parameters: bytes = b"",
        locality: int = FIRMWARE_LOCALITY,
    ) -> bytes:
        code, answer = self._try(doing, ordinal, parameters, locality)
        _check(doing, code)
        return answer

    def _try(
        self,
        doing: str,
        ordinal: Ordinal,
        parameters: bytes = b"",
        locality: int = FIRMWARE_LOCALITY,
    ) -> tuple[int, bytes]:
        size = HEADER_BYTES + len(parameters)
        request = _HEADER.pack(Tag.RQU_COMMAND, size, ordinal) + parameters
        response = self._chip.exchange(request, locality)
        if len(response) < HEADER_BYTES:
            raise _failed(doing, f"its response has {len(response)} bytes", _LOOK_AT_LOG)
        tag, size, code = _HEADER.unpack_from(response)
        if tag != Tag.RSP_COMMAND or size != len(response):
            raise _failed(doing, "its response is malformed", _LOOK_AT_LOG)
        return code, response[HEADER_BYTES:]


_LOOK_AT_LOG: Final = "Look at the chip's log, var/log/vtpm/hwtpm.log"


def _check(doing: str, code: int) -> None:
    if code == ReturnCode.SUCCESS:
        return
    known = code in {int(one) for one in ReturnCode}
    name = f"TPM_{ReturnCode(code).name}" if known else "an unknown code"
    raise _failed(doing, f"it answers {name} (0x{code:x})", _LOOK_AT_LOG)


def _digest(doing: str, answer: bytes) -> bytes:
    if len(answer) != DIGEST_BYTES:
        raise _failed(doing, f"it answers {len(answer)} bytes, not a digest", _LOOK_AT_LOG)
    return answer


def _failed(doing: str, why: str, next_step: str) -> FirmwareFailure:
    return FirmwareFailure(
        f"the hardware TPM did not {doing}",
        why=why,
        next_step=next_step,
        exit_code=ExitCode.UNAVAILABLE,
    )
