"""What is around the stores: directories, settings and policy, logs, room on the disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Final

from daemons import policy, settings
from daemons.doctor.finding import Finding, Subject, look_at
from daemons.guestd import GuestdSettings
from daemons.hwtpmd import HwtpmdSettings
from daemons.launcher.launcher_settings import LauncherSettings
from daemons.log_levels import read_levels
from daemons.manager.admission import label_patterns
from daemons.manager.manager_settings import VtpmmgrdSettings
from daemons.manager.sealing import pcr_indices
from daemons.places import Places, inspect_directory
from daemons.vtpmd import VtpmdSettings

_SETTINGS: Final[dict[str, type]] = {
    "launcherd": LauncherSettings,
    "hwtpmd": HwtpmdSettings,
    "vtpmmgrd": VtpmmgrdSettings,
    "vtpmd": VtpmdSettings,
    "guestd": GuestdSettings,
}
MIB: Final = 1 << 20
ROOM_MIB_MIN: Final = 16
"""Less room than this on a file system is worth a word: a journal takes half of one, a log more."""


def examine_directories(places: Places) -> list[Finding]:
    """Look at owner and mode of the directories."""
    kinds = {
        places.root: "the root",
        places.run: "the run directory",
        places.state: "the state directory",
        places.log_dir: "the directory of logs",
        places.registry: "the registry",
    }
    return [_directory(path, kind, is_private=path != places.root) for path, kind in kinds.items()]


def examine_directory(path: Path) -> Finding:
    """Look at owner and mode of a domain's run directory."""
    return _directory(path, None, is_private=True)


def _directory(path: Path, kind: str | None, *, is_private: bool) -> Finding:
    subject = Subject(path, "its run directory" if kind is None else kind)

    def look() -> Finding:
        if not inspect_directory(path, is_private=is_private):
            return subject.absent("the first vtpm up makes it")
        if is_private and not os.access(path, os.R_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return subject.fine()

    return look_at(subject, look)


def examine_settings(places: Places) -> list[Finding]:
    """Read the settings of all daemons and the policy as they do."""
    findings = [_settings(places, daemon) for daemon in _SETTINGS]
    subject = Subject(places.policy, "the policy")

    def look() -> Finding:
        rules = policy.load(places.policy)
        if rules is policy.BUILT_IN:
            return subject.absent("the built-in policy holds")
        return subject.fine(f"{len(rules.rules)} rules")

    findings += [look_at(subject, look), _log_levels(places)]
    known = {f"{daemon}.toml" for daemon in _SETTINGS}
    known |= {places.policy.name, places.log_levels.name}
    try:
        names = sorted(entry.name for entry in places.config.glob("*.toml"))
    except OSError:
        return findings
    return findings + [
        Subject(places.config / name, "settings of nobody").warning(
            "no daemon reads it", f"Its name should be one of {', '.join(sorted(known))}."
        )
        for name in names
        if name not in known
    ]


def _log_levels(places: Places) -> Finding:
    subject = Subject(places.log_levels, "the log levels")

    def look() -> Finding:
        read_levels(subject.path)
        if subject.path.exists():
            return subject.fine()
        return subject.absent("the levels in the settings hold")

    return look_at(subject, look)


def _settings(places: Places, daemon: str) -> Finding:
    subject = Subject(places.settings(daemon), f"settings of {daemon}")

    def look() -> Finding:
        chosen: object = settings.load(subject.path, _SETTINGS[daemon])
        if isinstance(chosen, VtpmmgrdSettings):
            label_patterns(chosen.administrators)
            pcr_indices(chosen.seal_pcrs)
        return subject.fine() if subject.path.exists() else subject.absent("the defaults hold")

    return look_at(subject, look)


def examine_room(places: Places, images: list[Path]) -> list[Finding]:
    """Look at the room on each file system that is written to."""
    findings: list[Finding] = []
    seen: set[int] = set()
    for directory in (places.run, places.state, places.log_dir, *(path.parent for path in images)):
        try:
            device = directory.stat().st_dev
            room = os.statvfs(directory)
        except OSError:
            continue
        if device in seen:
            continue
        seen.add(device)
        subject = Subject(directory, "room", is_told=True)
        free_mib = room.f_bavail * room.f_frsize // MIB
        if free_mib < ROOM_MIB_MIN or (room.f_files and not room.f_favail):
            why = f"{free_mib} MiB and {room.f_favail} files are left"
            findings.append(
                subject.warning(why, "Make room: on a full disk commands fail with TPM_IOERROR.")
            )
        else:
            findings.append(subject.fine(f"{free_mib} MiB are left"))
    return findings


def examine_logs(places: Places, bytes_max: int) -> list[Finding]:
    """Look at the logs, all together."""
    subject = Subject(places.log_dir, "logs", is_told=True)
    large: list[Finding] = []
    sizes: list[int] = []
    try:
        for path in sorted(places.log_dir.iterdir()):
            status = path.stat(follow_symlinks=False)
            sizes.append(status.st_size)
            if path.is_symlink():
                why = "it is a symbolic link, and no log is written through one"
                large.append(Subject(path, "a log").warning(why, "Remove it."))
            elif status.st_size > bytes_max and path.suffix == ".log":
                why = f"it has {status.st_size // MIB} MiB"
                next_step = "Nothing: it is put aside when its process starts the next time."
                large.append(Subject(path, "a log").warning(why, next_step))
    except FileNotFoundError:
        return [subject.absent()]
    except OSError as error:
        return [subject.hidden(error)]
    return [*large, subject.fine(f"{len(sizes)} files, {sum(sizes) // 1024} KiB")]
