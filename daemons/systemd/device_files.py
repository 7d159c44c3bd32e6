"""Devices of domains that systemd starts: what is attached stands in the domain's config file.

The launcher has a domain in memory, with devices that its file need not have. Here the file is the
domain, so it is the file that a device is written into or taken out of: as a line that follows the
others, in xl's own syntax. The checks are the launcher's.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.launcher.device_rows import uuid_of
from daemons.launcher.launching import check_disk
from daemons.places import DOMAIN0_NAME, Places
from daemons.registry import VTPMS_MAX
from daemons.systemd.domain_files import (
    BACKEND_ROLES,
    check_together,
    path_of,
    read_all,
    read_file,
)
from daemons.xl.device_specs import VtpmSpec
from daemons.xl.domain_config import DomainConfig, disk_from_argument, parse_domain

_DOMAIN0: Final = frozenset({"0", DOMAIN0_NAME})


def attach_vtpm(places: Places, name: str, backend: str, uuid: str | None) -> None:
    """Write a TPM frontend into a domain's file.

    Args:
        places: Of the installation.
        name: Of the domain.
        backend: Name of the backend's domain.
        uuid: As given; None for a random one at each start.

    Raises:
        Failure: It has the device already, or the backend cannot serve it; or the uuid is none, or
            another vTPM's.
    """
    config, text = read_file(path_of(places, name))
    what = f"attach a vTPM to {name}"
    wanted = VtpmSpec(backend=backend, uuid=uuid_of(uuid) if uuid is not None else None)
    role = BACKEND_ROLES.get(config.role)
    if backend in _DOMAIN0 and role is not None:
        next_step = f"Name the {role.value} with backend=NAME"
        raise refused(what, "domain 0 serves no TPM here", next_step)
    if len(config.vtpms) >= VTPMS_MAX:
        raise refused(what, f"it has {VTPMS_MAX} already")
    for devid, there in enumerate(config.vtpms):
        if there.backend == backend or (there.uuid == wanted.uuid is not None):
            raise refused(
                what,
                f"device {devid} is already there: backend {there.backend}, uuid {there.uuid}",
                f"Take it away first: vtpm vtpm-detach {name} {devid}",
            )
    _write_checked(places, config, f"{text}\nvtpm += [{_spec(wanted)}]\n")


def detach_vtpm(places: Places, name: str, devid_or_uuid: str) -> None:
    """Take a TPM frontend out of a domain's file, named by its uuid, or else by its number.

    Raises:
        Failure: There is none of that name.
    """
    config, text = read_file(path_of(places, name))
    for devid, there in enumerate(config.vtpms):
        if devid_or_uuid.lower() == str(there.uuid) or devid_or_uuid == str(devid):
            rest = ", ".join(_spec(spec) for spec in config.vtpms if spec is not there)
            write_private(path_of(places, name), f"{text}\nvtpm = [{rest}]\n")
            return
    listed = ", ".join(f"{devid} ({v.uuid})" for devid, v in enumerate(config.vtpms)) or "none"
    raise refused(
        f"detach {devid_or_uuid[:40]!a} from {name}",
        f"it has no such device; there is: {listed}",
        f"vtpm vtpm-list {name} shows them",
    )


def attach_disk(places: Places, name: str, spec: str) -> None:
    """Write a disk into a domain's file.

    Raises:
        Failure: It has a disk of this name, the spec is none, or the image cannot be used.
    """
    disk = disk_from_argument(spec)
    config, text = read_file(path_of(places, name))
    if config.disk(disk.vdev) is not None:
        raise refused(
            f"attach a disk to {name}",
            f"it has a disk {disk.vdev} already",
            f"vtpm block-list {name} shows it",
        )
    check_disk(places, name, config.role, disk)
    _write_checked(places, config, f"{text}\ndisk += [{_quoted(spec)}]\n")


def refused(
    what: str, why: str, next_step: str = "`vtpm list` shows the domains and their states"
) -> Failure:
    """Make the failure of a device that is not attached or detached."""
    return Failure(f"cannot {what}", why=why, next_step=next_step)


def write_private(path: Path, text: str) -> None:
    """Write a config file, whole or not at all, for root's eyes.

    Raises:
        Failure: This user may not, or the disk would not.
    """
    beside = path.with_name(f".{path.name}.new")
    try:
        beside.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(beside, flags, 0o600), "w", encoding="utf-8") as file:
            file.write(text)
        beside.rename(path)
    except OSError as error:
        raise Failure(
            f"cannot write {path}",
            why=error.strerror or str(error),
            next_step="Run it as root; make install makes the directory",
            exit_code=ExitCode.NO_PERMISSION,
        ) from error


def _write_checked(places: Places, before: DomainConfig, text: str) -> None:
    path = path_of(places, before.name)
    config = parse_domain(text, str(path))
    check_together(config, _others(places))
    write_private(path, text)


def _others(places: Places) -> Iterable[DomainConfig]:
    return read_all(places)[0].values()


def _spec(device: VtpmSpec) -> str:
    uuid = f",uuid={device.uuid}" if device.uuid is not None else ""
    return _quoted(f"backend={device.backend}{uuid}")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
