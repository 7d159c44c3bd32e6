"""Where systemd starts the domains: directories of many users, and what the units have noted.

What the launcher's installation has private to one user is here split over many, so other owners
and modes are right: those that systemd and `daemons/systemd/setting_up.py` give.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from daemons.doctor.finding import Finding, State, Subject, look_at
from daemons.errors import ExitCode, Failure
from daemons.places import CHIP_NAME, Places
from daemons.systemd.domain_files import MANAGER_NAME
from daemons.systemd.registering import uid_of
from daemons.systemd.run_state import SYSTEMD_MARKS, inspect_mark, mark_path
from daemons.systemd.setting_up import DIRECTORY_MODE

_STATE_MODE: Final = 0o700
_REGISTRY_MODE: Final = 0o750
_ABSENT: Final = "the first start of its unit makes it"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    uid: int
    mode: int
    mended_by: str
    """What gives the directory to its owner again."""


def examine_platform_directories(places: Places) -> list[Finding]:
    """Look at the directories that there is one of."""
    setup = "systemctl restart vtpm-setup.service"
    root_s = {
        places.run: ("the run directory", DIRECTORY_MODE),
        places.registry: ("the registry", _REGISTRY_MODE),
    }
    findings = [
        _examine(path, kind, None, mode=mode, mended_by=setup)
        for path, (kind, mode) in root_s.items()
    ]
    started = "systemctl restart hwtpmd.service"
    kind = "the state directory"
    state = _examine(places.state, kind, CHIP_NAME, mode=_STATE_MODE, mended_by=started)
    return [*findings, state]


def examine_own_directory(places: Places, name: str) -> Finding:
    """Look at the run directory of a domain, or of the chip."""
    is_made_once = name in {CHIP_NAME, MANAGER_NAME}
    unit = "vtpm-setup.service" if is_made_once else f"vtpm-setup@{name}.service"
    directory = places.domain(name).directory
    mended_by = f"systemctl restart {unit}"
    return _examine(directory, "its run directory", name, mode=DIRECTORY_MODE, mended_by=mended_by)


def examine_marks(places: Places, name: str) -> list[Finding]:
    """Look at what the units have noted of a domain, or of the chip; what is not there is fine."""
    findings = []
    for mark, meaning in SYSTEMD_MARKS.items():
        subject = Subject(mark_path(places.registry, name, mark), meaning)

        def look(subject: Subject = subject) -> Finding:
            return subject.fine() if inspect_mark(subject.path) else subject.absent()

        findings.append(look_at(subject, look))
    return [found for found in findings if found.state is not State.ABSENT]


def _examine(path: Path, kind: str, owner: str | None, *, mode: int, mended_by: str) -> Finding:
    """Look at one; its owner is a domain, or root."""
    subject = Subject(path, kind)

    def look() -> Finding:
        if not os.path.lexists(path):
            return subject.absent(_ABSENT)
        uid = 0 if owner is None else uid_of(owner)
        _check(path, _Wanted(uid=uid, mode=mode, mended_by=mended_by))
        return subject.fine()

    return look_at(subject, look)


def _check(path: Path, wanted: _Wanted) -> None:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISDIR(status.st_mode):
        why, next_step = "it is no directory", "Look at what it is, and move it away."
    elif status.st_uid != wanted.uid:
        why, next_step = f"it belongs to uid {status.st_uid}, not to {wanted.uid}", wanted.mended_by
    elif mode & ~wanted.mode:
        why = f"its mode is {mode:04o}, so others could get in"
        next_step = f"Run: chmod {wanted.mode:o} {path}"
    else:
        return
    raise Failure(
        f"the directory {path} cannot be used",
        why=why,
        next_step=next_step,
        exit_code=ExitCode.CONFIGURATION,
    )
