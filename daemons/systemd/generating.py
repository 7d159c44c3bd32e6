"""The systemd generator: what the config files say of each other, as dependencies of the units.

Run by systemd at boot and at each `systemctl daemon-reload`. For each file of etc/vtpm/domains the
target wants its unit; a guest's unit wants its vTPM and may reach its ring; a unit that keeps an
image may write that file, and nothing else. A file that cannot be used is told of, and left out:
its unit says why when somebody starts it. A vTPM may be called by its guest's name, too.

Spec: systemd.generator(7).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Final

from daemons.errors import Failure
from daemons.places import Places
from daemons.registry import Role
from daemons.systemd.domain_files import read_all, unit_directory, unit_of, user_of
from daemons.xl.domain_config import STATE_DISK, DomainConfig

TARGET: Final = "vtpm-stack.target"
DROP_IN: Final = "50-config-file.conf"

_STAND_IN: Final = """# Written by vtpm-systemd generate.
[Unit]
Description=The vTPM of {guest}: {vtpm}
Requires={vtpm}
BindsTo={vtpm}
After={vtpm}
PropagatesStopTo={vtpm}

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/true
User=nobody
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ProtectHome=yes
PrivateNetwork=yes
SystemCallFilter=@system-service
"""

_TEMPLATE: Final = re.compile(r"(.*@)[^.]*(\..*)")


def generate(places: Places, directory: Path) -> list[Failure]:
    """Write drop-ins and links.

    Args:
        places: Of the installation.
        directory: What systemd gives a generator for its units.

    Returns:
        Why files were left out.
    """
    configs, failures = read_all(places)
    for config in configs.values():
        unit = unit_of(config.name, config.role)
        for suffix in ("service", "socket"):
            _link_from_target(directory, f"{unit}.{suffix}")
        try:
            drop_in = _drop_in(places, config)
        except Failure as failure:
            failures.append(failure)
            continue
        below = directory / f"{unit}.service.d"
        below.mkdir(parents=True, exist_ok=True)
        (below / DROP_IN).write_text(drop_in, "utf-8")
        if config.role is Role.GUEST and config.vtpms:
            stand_in = f"{unit_of(config.name, Role.VTPM)}.service"
            (directory / stand_in).write_text(_stand_in(config), "utf-8")
    return failures


def _stand_in(config: DomainConfig) -> str:
    """A unit by which the vTPM of a guest is started and stopped under the guest's name.

    No alias: systemd has none from one instance of a template to another.
    """
    vtpm = f"{unit_of(config.vtpms[0].backend, Role.VTPM)}.service"
    return _STAND_IN.format(guest=config.name, vtpm=vtpm)


def _drop_in(places: Places, config: DomainConfig) -> str:
    lines = ["# Written by vtpm-systemd generate.", "[Unit]"]
    for device in config.vtpms if config.role is Role.GUEST else ():
        unit = unit_of(device.backend, Role.VTPM)
        lines += [f"{word}={unit}.socket {unit}.service" for word in ("Wants", "After")]
    images = [places.images(disk.target) for disk in config.disks if disk.target]
    lines += [f"RequiresMountsFor={_quoted(image)}" for image in images]
    lines.append("[Service]")
    if config.role is Role.GUEST:
        lines += [f"SupplementaryGroups={user_of(device.backend)}" for device in config.vtpms]
    else:
        disk = config.disk(STATE_DISK)
        if disk is not None and disk.target:
            lines.append(f"ReadWritePaths=-{_quoted(places.images(disk.target))}")
    return "\n".join(lines) + "\n"


def _quoted(path: Path) -> str:
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if re.search(r"[\s\"'\\]", text) else text


def _link_from_target(directory: Path, unit: str) -> None:
    wants = directory / f"{TARGET}.wants"
    wants.mkdir(parents=True, exist_ok=True)
    link = wants / unit
    if not link.is_symlink():
        link.symlink_to(unit_directory() / _TEMPLATE.sub(r"\1\2", unit))


def report(failures: list[Failure]) -> None:
    """Tell on stderr, which for a generator is the kernel's log."""
    for failure in failures:
        print(f"vtpm-systemd: {failure}", file=sys.stderr)  # noqa: T201
