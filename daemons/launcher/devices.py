"""vtpm-attach, vtpm-list, vtpm-detach, block-attach, block-list: arguments and columns of xl.

Devices may change while a domain is not running: created paused, waiting for the very device,
failed. Our guests, vTPMs and managers look for their devices when they start, not later, so a
change to a running domain is refused and says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from daemons.errors import Failure
from daemons.launcher.device_rows import End, Row, disk_row, uuid_of, vtpm_row
from daemons.launcher.domain import Domain
from daemons.launcher.domains import Domains, Progress
from daemons.launcher.launching import check_disks, keep_for_the_next_launcher
from daemons.launcher.process_states import RESTING, State
from daemons.launcher.stack import Stack
from daemons.registry import VTPMS_MAX, VtpmDevice
from daemons.xl.domain_config import disk_from_argument

_CHANGEABLE = RESTING | {State.WAITING, State.BACKOFF}


class Devices:
    """Devices of domains.

    Args:
        stack: Of the launcher.
        domains: Who checks backends.
    """

    def __init__(self, stack: Stack, domains: Domains) -> None:
        self._stack = stack
        self._domains = domains

    async def vtpm_attach(
        self, _progress: Progress, domain: str, backend: str, uuid: str | None = None
    ) -> Row:
        """Give a domain a TPM frontend.

        Raises:
            Failure: It runs, has the device already, or the backend cannot serve it; or the uuid is
                none, or another vTPM's.
        """
        found = self._changeable(domain, "attach a vTPM to")
        if len(found.devices) >= VTPMS_MAX:
            raise _refused(f"attach a vTPM to {found.name}", f"it has {VTPMS_MAX} already")
        name = self._domains.backend_for(found, backend)
        wanted = uuid_of(uuid) if uuid is not None else None
        self._domains.refuse_twin(found, name, wanted)
        with self._changing(found):
            device = found.attach(name, wanted)
        return self._vtpm_row(found, device)

    async def vtpm_detach(self, _progress: Progress, domain: str, devid_or_uuid: str) -> Row:
        """Take a TPM frontend away, named by its uuid, or else by its number."""
        found = self._changeable(domain, "detach a vTPM from")
        for device in found.devices:
            if devid_or_uuid.lower() == str(device.uuid) or devid_or_uuid == str(device.devid):
                row = self._vtpm_row(found, device)
                with self._changing(found):
                    found.detach(device)
                return row
        there = ", ".join(f"{device.devid} ({device.uuid})" for device in found.devices) or "none"
        raise _refused(
            f"detach {devid_or_uuid[:40]!a} from {found.name}",
            f"it has no such device; there is: {there}",
            f"vtpm vtpm-list {found.name} shows them",
        )

    async def vtpm_list(self, _progress: Progress, domains: list[str]) -> list[Row]:
        """List the TPM frontends of domains."""
        found = [self._stack.find(name) for name in domains]
        return [self._vtpm_row(domain, device) for domain in found for device in domain.devices]

    async def block_attach(self, _progress: Progress, domain: str, spec: str) -> Row:
        """Give a domain a disk.

        Raises:
            Failure: It runs, has a disk of this name, the spec is none, or the image cannot be
                used.
        """
        disk = disk_from_argument(spec)
        found = self._changeable(domain, "attach a disk to")
        if any(other.vdev == disk.vdev for other in found.disks):
            raise _refused(
                f"attach a disk to {found.name}",
                f"it has a disk {disk.vdev} already",
                f"vtpm block-list {found.name} shows it",
            )
        with self._changing(found):
            found.disks = (*found.disks, disk)
            found.disk_specs_attached = (*found.disk_specs_attached, spec)
            check_disks(self._stack, found)
        return self._disk_row(found, len(found.disks) - 1)

    async def block_list(self, _progress: Progress, domain: str) -> list[Row]:
        """List the disks of a domain."""
        found = self._stack.find(domain)
        return [self._disk_row(found, number) for number in range(len(found.disks))]

    def _changeable(self, name: str, what: str) -> Domain:
        domain = self._stack.find(name)
        if domain.external is not None or domain.supervisor.state not in _CHANGEABLE:
            raise _refused(
                f"{what} {domain.name}",
                f"it is {domain.shown_state}, and domains look for their devices when they start",
                f"vtpm destroy {domain.name}; vtpm create -p its config file; attach or detach;"
                f" vtpm unpause {domain.name}. Or change the file, destroy and create",
            )
        return domain

    @contextlib.contextmanager
    def _changing(self, domain: Domain) -> Iterator[None]:
        """Change devices of a domain, and write it down; or leave all as it was.

        What was acknowledged must be there for another launcher, too. Of a domain that was created
        paused and never started nothing is taken over.
        """
        before = domain.device_state
        try:
            yield
            self._write_down(domain)
        except Failure:
            domain.device_state = before
            with contextlib.suppress(Failure):  # else it is overwritten by the next start
                self._write_down(domain)
            raise
        self._stack.changes.announce()

    def _write_down(self, domain: Domain) -> None:
        if domain.supervisor.state is State.CREATED:
            self._stack.registry.put(domain.record(None, None))
        else:
            keep_for_the_next_launcher(self._stack, domain)

    def _vtpm_row(self, domain: Domain, device: VtpmDevice) -> Row:
        backend = self._stack.domains.get(device.backend)
        return vtpm_row(_end(domain), device, _end(backend) if backend is not None else None)

    def _disk_row(self, domain: Domain, number: int) -> Row:
        return disk_row(_end(domain), domain.disks[number])


def _end(domain: Domain) -> End:
    return End(name=domain.name, domid=domain.domid, is_running=domain.is_running)


def _refused(
    what: str, why: str, next_step: str = "`vtpm list` shows the domains and their states"
) -> Failure:
    return Failure(f"cannot {what}", why=why, next_step=next_step)
