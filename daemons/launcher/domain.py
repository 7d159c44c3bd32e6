"""One domain as the launcher knows it: its configuration, its devices, its process, its record."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final
from uuid import UUID, uuid4

from daemons.errors import Failure
from daemons.launcher.process_states import State
from daemons.registry import DomainRecord, Role, VtpmDevice
from daemons.xl.device_specs import Disk, VtpmSpec
from daemons.xl.domain_config import DomainConfig

if TYPE_CHECKING:
    from daemons.launcher.supervisor import Supervisor

CHIP_DOMID: Final = 0x7FEF
"""The last number a domain can have: the chip is no domain, and domains count from 1 as in Xen."""
DOMID_MAX: Final = CHIP_DOMID - 1
"""The last one that a domain does have."""

PROGRAMS: Final[Mapping[Role, str]] = {
    Role.HWTPM: "hwtpmd",
    Role.MANAGER: "vtpmmgrd",
    Role.VTPM: "vtpmd",
    Role.GUEST: "guestd",
}
STOP_ORDER: Final = (Role.GUEST, Role.VTPM, Role.MANAGER)
"""Who uses others goes before them; the chip goes last, by itself."""

_SHOWN_STATES: Final[Mapping[State, str]] = {
    State.CREATED: "paused",
    State.WAITING: "starting",
    State.STARTING: "starting",
    State.RUNNING: "running",
    State.PAUSED: "paused",
    State.STOPPING: "shutdown",
    State.BACKOFF: "restarting",
    State.FAILED: "failed",
    State.PRESERVED: "shutdown",
    State.ENDED: "shutdown",
}


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The devices of a domain at one moment."""

    vtpms: tuple[VtpmDevice, ...]
    random_devids: frozenset[int]
    disks: tuple[Disk, ...]
    disk_specs_attached: tuple[str, ...]


@dataclass(eq=False, kw_only=True)
class Domain:
    """A domain that was created and not yet destroyed.

    Attributes:
        config: What its config file says.
        config_text: The file as it was given.
        config_path: Where it was, for messages.
        domid: A new one at every start of a process.
        label: `user:role:type`.
        devices: Its TPM frontends.
        disks: Its disks, those attached later too.
        disk_specs_attached: What was given for the latter.
        supervisor: Its process; None for an external guest.
        boot_hash: Hex SHA-1 of its program, or empty.
        external: Pid and start time of a process that is this guest and was not started here.
        is_leaving: It was told to end for good.
        has_begun: Its supervisor was told to run.
        has_started: A process of it was started under its present domid.
        last_process: Pid and start time of the one that was started last, dead or alive.
        power_cycle: That of the platform in which its last process was started; None when its next
            one has nothing to go on with.
        ready_before: How often its processes had been ready when it last began with no journal.
    """

    config: DomainConfig
    config_text: str
    config_path: str
    domid: int
    label: str
    devices: tuple[VtpmDevice, ...] = ()
    disks: tuple[Disk, ...] = ()
    disk_specs_attached: tuple[str, ...] = ()
    boot_hash: str = ""
    external: tuple[int, int] | None = None
    is_leaving: bool = False
    has_begun: bool = False
    has_started: bool = False
    last_process: tuple[int, int] | None = None
    power_cycle: int | None = None
    ready_before: int = 0
    _supervisor: Supervisor | None = field(default=None)
    _random_devids: set[int] = field(default_factory=set)

    @property
    def name(self) -> str:
        """As its config file says."""
        return self.config.name

    @property
    def role(self) -> Role:
        """What it is in the chain of TPMs."""
        return self.config.role

    @property
    def supervisor(self) -> Supervisor:
        """Its process; an external guest has none."""
        assert self._supervisor is not None, "an external guest is not supervised"
        return self._supervisor

    @supervisor.setter
    def supervisor(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    @property
    def is_running(self) -> bool:
        """Its process has said READY and goes on."""
        return self.external is not None or self.supervisor.state is State.RUNNING

    @property
    def has_process(self) -> bool:
        """A process of it may be talking to others."""
        return self.external is not None or self.supervisor.process is not None

    @property
    def pid(self) -> int | None:
        """Its process, while there is one."""
        if self.external is not None:
            return self.external[0]
        process = self.supervisor.process
        return process.pid if process is not None else None

    @property
    def shown_state(self) -> str:
        """State as in a listing: one word, and the reason where there is one to tell."""
        if self.external is not None:
            return "running"
        word = _SHOWN_STATES[self.supervisor.state]
        if self.supervisor.state is State.STOPPING and not self.is_leaving:
            word = "restarting"
        reason = self.supervisor.reason
        return f"{word}: {reason}" if reason and word not in {"running", "paused"} else word

    def uses(self, backend: str) -> bool:
        """Tell whether one of its TPMs is served by this domain."""
        return any(device.backend == backend for device in self.devices)

    def record(self, pid: int | None, start_time: int | None) -> DomainRecord:
        """Make its record for the registry."""
        return DomainRecord(
            name=self.name,
            domid=self.domid,
            role=self.role,
            label=self.label,
            uid=os.geteuid(),
            pid=pid,
            start_time=start_time,
            vtpms=self.devices,
            localities=tuple(self.config.localities),
            boot_hash=self.boot_hash,
        )

    @property
    def device_state(self) -> DeviceState:
        """All of its devices, to go back to."""
        return DeviceState(
            self.devices, frozenset(self._random_devids), self.disks, self.disk_specs_attached
        )

    @device_state.setter
    def device_state(self, before: DeviceState) -> None:
        self.devices, self._random_devids = before.vtpms, set(before.random_devids)
        self.disks, self.disk_specs_attached = before.disks, before.disk_specs_attached

    def attach(self, backend: str, uuid: UUID | None) -> VtpmDevice:
        """Add a TPM frontend.

        Args:
            backend: Name of the domain that serves it.
            uuid: None for a random one, another at each start.

        Raises:
            Failure: It has one of the same uuid or the same backend.
        """
        for device in self.devices:
            if device.uuid == uuid or device.backend == backend:
                raise Failure(
                    f"cannot attach a vTPM to {self.name}",
                    why=f"device {device.devid} is already there:"
                    f" backend {device.backend}, uuid {device.uuid}",
                    next_step=f"Take it away first: vtpm vtpm-detach {self.name} {device.devid}",
                )
        taken = {device.devid for device in self.devices}
        devid = next(number for number in range(len(taken) + 1) if number not in taken)
        if uuid is None:
            self._random_devids.add(devid)
        device = VtpmDevice(devid=devid, backend=backend, uuid=uuid or uuid4(), handle=devid)
        self.devices = (*self.devices, device)
        return device

    def detach(self, device: VtpmDevice) -> None:
        """Take a TPM frontend away."""
        self._random_devids.discard(device.devid)
        self.devices = tuple(other for other in self.devices if other != device)

    def note_random_uuids(self) -> None:
        """Learn from the config which of the devices it has asked for no uuid.

        A domain has one device of a backend at most.
        """
        asked = {spec.backend for spec in self.config.vtpms if spec.uuid is None}
        self._random_devids = {device.devid for device in self.devices if device.backend in asked}

    def renew_random_uuids(self) -> None:
        """Give each frontend that asked for no uuid a new one, as every start does in Xen."""
        self.devices = tuple(
            replace(device, uuid=uuid4()) if device.devid in self._random_devids else device
            for device in self.devices
        )

    @property
    def effective_config_text(self) -> str:
        """The config file, and what was attached and detached since; the last assignment counts."""
        text = self.config_text
        if self.disk_specs_attached:
            specs = ", ".join(_quoted(spec) for spec in self.disk_specs_attached)
            text += f"\ndisk += [{specs}]\n"
        wanted = self._vtpms_as_asked_for
        if wanted != self.config.vtpms:
            specs = ", ".join(_quoted(_vtpm_text(spec)) for spec in wanted)
            text += f"\nvtpm = [{specs}]\n"
        return text

    @property
    def _vtpms_as_asked_for(self) -> tuple[VtpmSpec, ...]:
        """Its devices; one that asked for no uuid gets another one at its next start."""
        return tuple(
            VtpmSpec(
                backend=device.backend,
                uuid=None if device.devid in self._random_devids else device.uuid,
            )
            for device in self.devices
        )


def _vtpm_text(spec: VtpmSpec) -> str:
    return f"backend={spec.backend}" + (f",uuid={spec.uuid}" if spec.uuid is not None else "")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
