"""All files of one installation, in groups: the platform, the chip, each domain, config files.

Domains are those that run (their run directories and records) and those of config files that are
named, or that systemd starts.

Invariants:
- Nothing is written, locked, made or connected to, and no key is used or shown.
- Root looks at a plain user's installation with that user's eyes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from daemons import settings
from daemons.chip_memory import Inspection as ChipInspection
from daemons.doctor import run_files, stores, surroundings
from daemons.doctor.finding import Finding, State, Subject, look_at
from daemons.doctor.run_files import Scene
from daemons.doctor.stores import Use
from daemons.doctor.under_systemd import (
    examine_marks,
    examine_own_directory,
    examine_platform_directories,
)
from daemons.errors import ExitCode, Failure
from daemons.launcher.domain import PROGRAMS
from daemons.launcher.launcher_settings import LauncherSettings
from daemons.manager.manager_settings import VtpmmgrdSettings
from daemons.places import CHIP_NAME, TAKEN_NAMES, BadPlace, Places, check_domain_name
from daemons.registry import DomainRecord, Role
from daemons.vtpmmgrd import read_setup
from daemons.xl.domain_config import DomainConfig, read_domain

PLATFORM: Final = "platform"
CONFIG_FILES: Final = "config files"
_ORDER: Final = (Role.MANAGER, Role.VTPM, Role.GUEST)
_CONFIG_SUFFIX: Final = ".cfg"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Files that belong together.

    Attributes:
        name: Of the domain, or what they are.
        program: The daemon they belong to.
        pid: Its process; None when none is known to run.
        findings: A file each.
    """

    name: str
    program: str
    pid: int | None = None
    findings: tuple[Finding, ...] = ()


@dataclass(slots=True)
class _Domain:
    """One domain, as far as it is known."""

    name: str
    role: Role
    config: DomainConfig | None = None
    findings: list[Finding] = field(default_factory=list)


def examine(places: Places, config_paths: Iterable[Path] = ()) -> list[Group]:
    """Look at everything."""
    with _eyes_of_owner(places):
        return _examine(places, list(config_paths))


def exit_code_of(groups: Iterable[Group]) -> ExitCode:
    """DAMAGED when a daemon would refuse something, NO_PERMISSION when that could not be seen."""
    findings = [finding for group in groups for finding in group.findings]
    if any(finding.state is State.REFUSED for finding in findings):
        return ExitCode.DAMAGED
    if any(finding.exit_code is ExitCode.NO_PERMISSION for finding in findings):
        return ExitCode.NO_PERMISSION
    return ExitCode.DONE


def _examine(places: Places, config_paths: list[Path]) -> list[Group]:
    is_systemd = run_files.is_by_systemd(places)
    starter = "systemd" if is_systemd else "launcherd"
    platform = (
        examine_platform_directories(places)
        if is_systemd
        else surroundings.examine_directories(places)
    )
    if any(finding.state is State.WARNING for finding in platform):
        # A directory that is hidden from us: whatever is said about its files would be wrong.
        return [Group(name=PLATFORM, program=starter, findings=tuple(platform))]
    bad_records, records = run_files.examine_registry(places)
    scene = Scene(
        places=places,
        is_powered=run_files.is_powered(places),
        is_systemd=is_systemd,
        launcher=run_files.find_launcher(places),
        records=records,
        served=run_files.served(),
    )
    domains, config_findings = _find_domains(scene, config_paths)
    is_manager_used = any(
        stores.is_manager_used(places, domain.config)
        for domain in domains
        if domain.role is Role.MANAGER and domain.config is not None
    )
    chip_memory, chip = stores.examine_chip_memory(
        places.chip_memory, _use(scene, CHIP_NAME), is_manager_used=is_manager_used
    )
    images: list[Path] = []
    groups = [
        Group(
            name=CHIP_NAME,
            program=PROGRAMS[Role.HWTPM],
            pid=_pid(scene, CHIP_NAME),
            findings=(chip_memory, *_run_directory(scene, CHIP_NAME, Role.HWTPM)),
        )
    ]
    for domain in domains:
        if domain.role is Role.MANAGER and domain.config is not None:
            domain.findings += _manager_setup(places, domain.config)
        found = _image_findings(scene, domain, chip, is_manager_used=is_manager_used)
        images += [finding.path for finding in found]
        groups.append(
            Group(
                name=domain.name,
                program=PROGRAMS[domain.role],
                pid=_pid(scene, domain.name),
                findings=(
                    *found,
                    *domain.findings,
                    *_run_directory(scene, domain.name, domain.role),
                ),
            )
        )
    platform += [
        *run_files.examine_launcher(scene),
        *bad_records,
        *surroundings.examine_settings(places),
        *surroundings.examine_logs(places, _log_bytes_max(places)),
        *surroundings.examine_room(places, images),
    ]
    first = Group(name=PLATFORM, program=starter, pid=scene.launcher, findings=tuple(platform))
    files = Group(name=CONFIG_FILES, program="vtpm", findings=tuple(config_findings))
    return [first, *groups, *([files] if config_findings else [])]


@contextlib.contextmanager
def _eyes_of_owner(places: Places) -> Iterator[None]:
    """Be the installation's user for a while, if we are root and it is a plain user's."""
    owner = 0
    for directory in (places.run, places.state, places.root):
        with contextlib.suppress(OSError):
            owner = directory.stat(follow_symlinks=False).st_uid
            break
    if os.geteuid() != 0 or owner == 0:
        yield
        return
    os.seteuid(owner)
    try:
        yield
    finally:
        os.seteuid(0)


# -- which domains there are -----------------------------------------------------------------------


def _find_domains(scene: Scene, paths: list[Path]) -> tuple[list[_Domain], list[Finding]]:
    """The domains in the order of their roles, and config files that tell of none."""
    findings: list[Finding] = []
    domains = {
        record.name: _Domain(record.name, record.role)
        for record in scene.records.values()
        if record.role in _ORDER
    }
    for path in _copies(scene.places):
        with contextlib.suppress(Failure, OSError):  # it is told where its directory is looked at
            if not path.is_file():
                continue
            config = read_domain(path)
            if config.name == path.parent.name:
                _note(domains, config)
    for path in [*_of_systemd(scene.places), *paths]:
        subject = Subject(path, "a config file")
        configs: list[DomainConfig] = []

        def look(subject: Subject = subject, configs: list[DomainConfig] = configs) -> Finding:
            configs.append(read_domain(subject.path))
            return subject.fine()

        finding = look_at(subject, look)
        if finding.state is not State.FINE:
            findings.append(finding)
        for config in configs:
            findings += [
                subject.warning(text, "Look at it in the file.") for text in config.warnings
            ]
            _note(domains, config)
    ordered = sorted(domains.values(), key=lambda domain: (_ORDER.index(domain.role), domain.name))
    return ordered, findings


def _note(domains: dict[str, _Domain], config: DomainConfig) -> None:
    """What runs counts before what a file says that was named."""
    known = domains.setdefault(config.name, _Domain(config.name, config.role))
    if known.config is None and known.role is config.role:
        known.config = config


def _copies(places: Places) -> list[Path]:
    found = []
    try:
        for entry in sorted(places.run.iterdir()):
            if entry.name not in TAKEN_NAMES and entry.is_dir() and not entry.is_symlink():
                with contextlib.suppress(BadPlace):
                    found.append(places.domain(check_domain_name(entry.name)).config)
    except OSError:
        return []
    return found


def _of_systemd(places: Places) -> list[Path]:
    try:
        return sorted(p for p in places.domains.iterdir() if p.suffix == _CONFIG_SUFFIX)
    except OSError:
        return []


def _manager_setup(places: Places, config: DomainConfig) -> list[Finding]:
    """What the manager says when it reads its config file together with its settings."""
    try:
        chosen = settings.load(places.settings(PROGRAMS[Role.MANAGER]), VtpmmgrdSettings)
    except (Failure, OSError):
        return []  # told where the settings are looked at
    try:
        read_setup(config, places, chosen)
    except Failure as failure:
        return [Subject(places.domain(config.name).config, "config and settings").refused(failure)]
    return []


# -- one domain ------------------------------------------------------------------------------------


def _run_directory(scene: Scene, name: str, role: Role) -> list[Finding]:
    if scene.is_systemd:
        seen = examine_own_directory(scene.places, name)
        marks = examine_marks(scene.places, name)
    else:
        seen = surroundings.examine_directory(scene.places.domain(name).directory)
        marks = []
    if seen.state is State.ABSENT:
        if not scene.is_running(name):
            return [*run_files.examine_record(scene, name), *marks]
    elif seen.state is not State.FINE:
        return [seen, *marks]
    if role is Role.HWTPM:
        return [seen, *run_files.examine_chip(scene), *marks]
    return [seen, *run_files.examine_domain(scene, name, role), *marks]


def _image_findings(
    scene: Scene, domain: _Domain, chip: ChipInspection | None, *, is_manager_used: bool
) -> list[Finding]:
    if domain.config is None:
        return []
    return stores.examine_images(
        scene.places,
        domain.config,
        _use(scene, domain.name),
        chip,
        is_manager_used=is_manager_used,
    )


def _use(scene: Scene, name: str) -> Use:
    record = scene.records.get(name)
    has_served = name != CHIP_NAME and run_files.has_been_ready(scene, name)
    if record is None:
        # Under systemd each domain has a user of its own, and who that is its record says.
        return Use(is_user_known=not _of_systemd(scene.places), has_served=has_served)
    if record.uid != os.geteuid():
        return Use(user=record.uid, domain_user=record.uid, has_served=has_served)
    return Use(user=record.uid, pid=_living(scene, record), has_served=has_served)


def _living(scene: Scene, record: DomainRecord) -> int | None:
    return record.pid if scene.is_running(record.name) else None


def _pid(scene: Scene, name: str) -> int | None:
    record = scene.records.get(name)
    return None if record is None else _living(scene, record)


def _log_bytes_max(places: Places) -> int:
    try:
        chosen = settings.load(places.settings("launcherd"), LauncherSettings)
    except (Failure, OSError):
        chosen = LauncherSettings()
    return chosen.log_mib_max * surroundings.MIB
