"""Devices as xl lists them: the rows of vtpm-list and block-list, whoever runs the domains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from daemons.errors import ExitCode, Failure
from daemons.registry import VtpmDevice
from daemons.xl.device_specs import Disk

UNKNOWN: Final = -1
"""What xl prints for what nobody has published."""

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class XenbusState:
    """The numbers of xenbus for what the launcher can see of a connection."""

    INITIALISING = 1
    CONNECTED = 4
    CLOSED = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """One end of a connection: a domain as far as a listing shows it."""

    name: str
    domid: int
    is_running: bool


def vtpm_row(own: End, device: VtpmDevice, backend: End | None) -> Row:
    """Make the row of a TPM frontend.

    Args:
        own: The frontend's domain.
        device: The frontend.
        backend: The backend's domain; None when there is none.
    """
    backend_domid = backend.domid if backend is not None else UNKNOWN
    return {
        "domain": own.name,
        "idx": device.devid,
        "be": backend_domid,
        "backend": device.backend,
        "uuid": str(device.uuid),
        "handle": device.handle,
        "state": _xenbus_state(own, backend),
        # A ring here is a socket: it has neither event channel nor grant reference.
        "evt_ch": UNKNOWN,
        "ring_ref": UNKNOWN,
        "be_path": f"/local/domain/{backend_domid}/backend/vtpm/{own.domid}/{device.devid}",
    }


def disk_row(own: End, disk: Disk) -> Row:
    """Make the row of a disk of a domain."""
    handle = _virtual_device_number(disk.vdev)
    return {
        "domain": own.name,
        "vdev": handle,
        "name": disk.vdev,
        "be": 0,
        "handle": own.domid,
        "state": XenbusState.CONNECTED if own.is_running else XenbusState.INITIALISING,
        "evt_ch": UNKNOWN,
        "ring_ref": UNKNOWN,
        "be_path": f"/local/domain/0/backend/vbd/{own.domid}/{handle}",
        "target": disk.target,
        "access": "w" if disk.is_writable else "r",
    }


def _xenbus_state(frontend: End, backend: End | None) -> int:
    """Tell how far a connection is, as far as it shows outside: both ends ready, or not."""
    if backend is None:
        return XenbusState.CLOSED
    is_up = frontend.is_running and backend.is_running
    return XenbusState.CONNECTED if is_up else XenbusState.INITIALISING


def _virtual_device_number(vdev: str) -> int:
    """Give the number that xl shows for a disk name.

    Spec: xen-vbd-interface(7): hda is 768, hdc 5632, sda 2048; xvda is 51712; 256 numbers a disk
        from xvdq on are left out,
    nobody has them here.
    """
    if vdev.isdecimal():
        return int(vdev)
    letters = vdev.rstrip("0123456789")
    partition = int(vdev[len(letters) :] or 0)
    disk = ord(letters[-1]) - ord("a")
    if letters.startswith("xvd"):
        return (202 << 8) + (disk << 4) + partition
    if letters.startswith("hd") and disk < 4:
        return ((3 if disk < 2 else 22) << 8) + ((disk & 1) << 6) + partition
    if letters.startswith("sd"):
        return (8 << 8) + (disk << 4) + partition
    return UNKNOWN


def uuid_of(text: str) -> UUID | None:
    """Read the uuid of a vtpm-attach; None for the nil one, which stands for a random one.

    Raises:
        Failure: It is none.
    """
    try:
        uuid = UUID(text)
    except ValueError as error:
        raise Failure(
            "cannot attach a vTPM",
            why=f"{text[:60]!a} is not a uuid",
            next_step="Give it in the form uuid=ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839",
            exit_code=ExitCode.USAGE,
        ) from error
    return uuid if uuid.int else None  # the nil uuid is a random one, as in libxl
