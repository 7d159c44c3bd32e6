"""The domains that systemd starts: NAME.cfg in etc/vtpm/domains, the same xl files as ever.

An instance is a domain: `vtpm@NAME.service` and `vtpm-guest@NAME.service` are about NAME.cfg, and
so are the user vtpm_NAME, the directory run/vtpm/NAME and the sockets in it. That is why a name
must fit all of these, which leaves fewer names than the launcher takes.

Invariants:
- A file that others than root could have written is not used.
- What the files say about each other is checked before any of their domains starts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.places import CHIP_NAME, Places
from daemons.private_files import read_checked
from daemons.registry import Role
from daemons.xl.domain_config import DomainConfig, parse_domain

FILE_BYTES_MAX: Final = 64 * 1024
SUFFIX: Final = ".cfg"
MANAGER_NAME: Final = "vtpmmgr"
"""The manager's unit is no template, so its domain has a fixed name: that of Xen's examples."""
NAME_CHARACTERS_MAX: Final = 26
"""A user's name has 31 characters at most, and five of them are the prefix."""
USER_PREFIX: Final = "vtpm_"
"""Users of the daemons themselves have a hyphen there: no domain can be taken for one of them."""

_NAME: Final = re.compile(rf"[A-Za-z0-9_-]{{1,{NAME_CHARACTERS_MAX}}}")
_STATIC: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {CHIP_NAME: ("hwtpmd", "vtpm-hwtpm"), MANAGER_NAME: ("vtpmmgrd", "vtpm-mgr")}
)
"""Unit and user of what there is one of."""
_TEMPLATES: Final[Mapping[Role, str]] = MappingProxyType(
    {Role.VTPM: "vtpm@", Role.GUEST: "vtpm-guest@"}
)
BACKEND_ROLES: Final[Mapping[Role, Role]] = MappingProxyType(
    {Role.VTPM: Role.MANAGER, Role.GUEST: Role.VTPM}
)
"""Who serves the TPMs of whom."""


def unit_directory() -> Path:
    """Give the directory of the installed units: beside the packages of this installation."""
    # PREFIX/lib/vtpm-stack is the environment; PREFIX/lib/systemd/system has the units.
    return Path(sys.prefix).parent / "systemd" / "system"


def user_of(name: str) -> str:
    """Give the user, and the group, of a domain or of the chip."""
    return _STATIC[name][1] if name in _STATIC else USER_PREFIX + name


def unit_of(name: str, role: Role) -> str:
    """Give the name of a domain's unit, without its suffix."""
    return _STATIC[name][0] if name in _STATIC else _TEMPLATES[role] + name


def path_of(places: Places, name: str) -> Path:
    """Give the path of a domain's config file.

    Raises:
        Failure: The name does not fit.
    """
    check_name(name)
    return places.domains / f"{name}{SUFFIX}"


def check_name(name: str) -> None:
    """Check that units, users and sockets can be named after a domain.

    Raises:
        Failure: They cannot.
    """
    if not _NAME.fullmatch(name):
        raise misconfigured(
            f"systemd cannot start a domain {name[:64]!a}",
            f"a name has letters, digits, _ and -, and {NAME_CHARACTERS_MAX} characters at most:"
            " a user and units are named after it",
            "Rename the domain and its file, or start it with the launcher: vtpm up",
        )


def read_file(path: Path) -> tuple[DomainConfig, str]:
    """Read one config file of the directory; give its text too.

    Raises:
        Failure: It is not there, not root's, malformed, or about a domain of another name.
    """
    content = read_checked(path, FILE_BYTES_MAX)
    if content is None:
        raise Failure(
            f"there is no domain {path.stem}",
            why=f"{path} is not there",
            next_step=f"Put its xl config file there: vtpm create {path.stem}{SUFFIX} does it",
            exit_code=ExitCode.NO_INPUT,
        )
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8"
        raise misconfigured(f"cannot read {path}", why, "Write it as text") from error
    config = parse_domain(text, str(path))
    check_fits(config)
    if config.name != path.stem:
        raise misconfigured(
            f"{path} is not used",
            f"it says name={config.name!a}, and the file's name is the domain's",
            f"Rename it to {config.name}{SUFFIX}",
        )
    return config, text


def check_fits(config: DomainConfig) -> None:
    """Check that there is a unit for a domain.

    Raises:
        Failure: Its name does not fit, or a manager has another name than the manager's unit.
    """
    check_name(config.name)
    if (config.role is Role.MANAGER) != (config.name == MANAGER_NAME):
        raise misconfigured(
            f"systemd cannot start {config.name}",
            f"{MANAGER_NAME} is the name of the manager's domain, and of no other",
            "Change name= and the file's name",
        )


def read_all(places: Places) -> tuple[dict[str, DomainConfig], list[Failure]]:
    """Read all config files: those that can be used by their names, and why others cannot."""
    configs: dict[str, DomainConfig] = {}
    failures: list[Failure] = []
    try:
        paths = sorted(places.domains.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return {}, []
    except OSError as error:
        unread = Failure(
            f"cannot look into {places.domains}",
            why=error.strerror or str(error),
            next_step="Look at its owner and mode",
            exit_code=ExitCode.NO_PERMISSION,
        )
        return {}, [unread]
    for path in paths:
        if path.suffix != SUFFIX or path.name.startswith("."):
            continue
        try:
            configs[path.stem], _ = read_file(path)
        except Failure as failure:
            failures.append(failure)
    return configs, failures


def check_together(config: DomainConfig, others: Iterable[DomainConfig]) -> None:
    """Check what a domain's file says about other domains.

    Raises:
        Failure: A backend is missing or of a wrong role, serves another guest too, or the vTPM is
            twice there.
    """
    by_name = {other.name: other for other in others if other.name != config.name}
    for device in config.vtpms:
        _check_backend(config, by_name.get(device.backend), device.backend)
    for other in by_name.values():
        if other.role is not config.role:
            continue
        for device in config.vtpms:
            for its in other.vtpms:
                is_twin = config.role is Role.VTPM and its.uuid == device.uuid is not None
                is_shared = config.role is Role.GUEST and its.backend == device.backend
                if is_twin or is_shared:
                    why = (
                        f"{other.name} is the vTPM with uuid {device.uuid} too"
                        if is_twin
                        else f"{device.backend} is the TPM of {other.name} too, and a vTPM is one"
                        " machine's"
                    )
                    raise misconfigured(
                        f"{config.name} is not started", why, "Change vtpm= in one of the two files"
                    )


def _check_backend(config: DomainConfig, backend: DomainConfig | None, name: str) -> None:
    wanted = BACKEND_ROLES.get(config.role)
    if wanted is None:
        why = "it is the manager, which uses the hardware TPM"
    elif backend is None:
        why = f"its backend {name} has no config file"
    elif backend.role is not wanted:
        why = f"its backend {name} is a {backend.role.value}, not a {wanted.value}"
    else:
        return
    raise misconfigured(f"{config.name} is not started", why, "Correct vtpm= in its config file")


def misconfigured(what: str, why: str, next_step: str) -> Failure:
    """Make the failure of a config file that cannot be used."""
    return Failure(what, why=why, next_step=next_step, exit_code=ExitCode.CONFIGURATION)
