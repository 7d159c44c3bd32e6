"""Who is who: a domain's record is written before its process starts, and taken away at its end.

Under systemd each domain has a user of its own, so its record names the uid and no process. It is
written by root, in front of the daemon (ExecStartPre=+), after the domain's files were read and its
program was measured.

A process that was killed comes back with what it was: record, domid and journal stay. A process
that has ended as it was asked to leaves nothing (ExecStopPost=+): its volatile state is gone as
after a power cut. Hence what a start finds tells which of the two it is.

| starts | and finds | then |
|---|---|---|
| the chip, a vTPM | its record and its journal | it goes on as it was |
| a vTPM | no journal, but a guest that has booted on it | the guest boots again |
| the chip | no journal, but a platform that had power | everybody above it starts again |
| a guest | whatever | it is a new boot: a new domid, so its vTPM resets itself |

Those that start again are taken from the registry first: no running guest ever sees clean PCRs.
"""

from __future__ import annotations

import os
import pwd
import stat
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Self

from daemons import policy
from daemons.errors import ExitCode, Failure
from daemons.guest.measurements import FILE_NAME as MEASUREMENTS
from daemons.launcher.domain import CHIP_DOMID, PROGRAMS, Domain
from daemons.launcher.measuring import program_digest
from daemons.places import CHIP_NAME, Places
from daemons.registry import DomainRecord, Role
from daemons.systemd.domain_files import (
    MANAGER_NAME,
    check_together,
    path_of,
    read_all,
    read_file,
    unit_of,
    user_of,
)
from daemons.systemd.run_state import RunState, is_there
from daemons.xl.domain_config import DomainConfig

SUCCESS: Final = "success"
"""What systemd says (SERVICE_RESULT) of a service that has ended as it was asked to."""
EXIT_CODE: Final = "exit-code"
"""What it says of one whose process, or a program in front of it, has ended with a status."""
EXITED: Final = "exited"
FINAL_STATUSES: Final = frozenset(
    str(int(code))
    for code in (
        ExitCode.USAGE,
        ExitCode.DAMAGED,
        ExitCode.NO_INPUT,
        ExitCode.NO_PERMISSION,
        ExitCode.CONFIGURATION,
    )
)
"""What a restart cannot mend; the units' RestartPreventExitStatus= has the same."""
FAILURES_MAX: Final = 5
"""So often in a row a process may end by itself, with any other status, and is started again."""


def register(places: Places, name: str, role: Role) -> None:
    """Write the record of the chip or of a domain that is about to start.

    Args:
        places: Of the installation.
        name: Of the domain: the unit's instance.
        role: What the unit starts.

    Raises:
        Failure: Its files are not as they should be, or the platform has no power.
    """
    with RunState(places).refused_unless_done(name):
        if role is Role.HWTPM:
            _register_chip(places)
        else:
            _register_domain(places, name, role)


def _register_domain(places: Places, name: str, role: Role) -> None:
    config, text = read_file(path_of(places, name))
    _check_unit(config, role)
    others, _ = read_all(places)
    check_together(config, others.values())
    uid = uid_of(name)
    for disk in config.disks:
        if disk.target and not disk.is_cdrom:
            give_image(places.images(disk.target), uid, name)
    if role is Role.MANAGER:
        # Only this needs what runs the chip: it takes longer to load than all the rest to run.
        from daemons.systemd.platform import launch_manager  # noqa: PLC0415

        launch_manager(places, text)
    state = RunState(places)
    state.set_held(name, is_held=False)
    with state.locked():
        previous = state.reader.get(name)
        keeps = previous is not None and _goes_on(places, name, role)
        if role is Role.VTPM and not keeps:
            _forget_journal(places, name)
            fallen = [guest for guest in _guests_of(state, name) if _has_booted(places, guest)]
            _start_again(state, fallen)
        if role is Role.VTPM:
            state.set_must_go_on(name, must=keeps)
        state.writer.put(_record(state, config, uid, previous if keeps else None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """How a service has ended, in systemd's words.

    Spec: systemd.exec(5), SERVICE_RESULT, EXIT_CODE and EXIT_STATUS.
    """

    result: str
    code: str = ""
    status: str = ""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read what systemd gives to ExecStopPost=."""
        words = (environ.get(name, "") for name in ("SERVICE_RESULT", "EXIT_CODE", "EXIT_STATUS"))
        result, code, status = words
        return cls(result=result, code=code, status=status)


def forget(places: Places, name: str, role: Role, ending: Ending) -> None:
    """Take away what an ended process leaves, if it has ended as it was asked to.

    One that cannot run gives its socket up: who waits there would start it again and again.

    Args:
        places: Of the installation.
        name: Of the domain.
        role: What the unit starts.
        ending: How its service has ended.

    Raises:
        Failure: Something stands in the place of a file of its, which was left as it is.
    """
    state = RunState(places)
    if ending.result != SUCCESS:
        if _is_final(state, name, ending):
            _give_up(unit_of(name, role), is_prevented=ending.status in FINAL_STATUSES)
        return
    with state.locked():
        state.writer.remove(name)
        if role in {Role.HWTPM, Role.VTPM}:
            _forget_journal(places, name)
        if role is Role.GUEST:
            _remove(places.domain(name).directory / MEASUREMENTS)
        if role is Role.HWTPM:
            _forget_power(places, state)


def _is_final(state: RunState, name: str, ending: Ending) -> bool:
    """Tell whether another start would end as this one has. Who was killed has not failed.

    Nor has he who was killed in front of his process, or waited there too long for the platform's
    power: that leaves the mark of a refusal, too.
    """
    if ending.result != EXIT_CODE:
        return False
    if state.is_refused(name):
        return True
    if ending.code != EXITED:
        return False
    if ending.status in FINAL_STATUSES:
        return True
    return state.count_failure(name, time.monotonic()) > FAILURES_MAX


def _give_up(unit: str, *, is_prevented: bool) -> None:
    """Stop the socket, and with it the next start; the unit stays failed, with its reason.

    Args:
        unit: Without its suffix.
        is_prevented: systemd does not start it again by itself: then only the socket is stopped, so
            that whoever waits for the start is told that it failed, not that it was cancelled.
    """
    print(f"{unit}.service cannot run, and is not started again", flush=True)  # noqa: T201
    words = ["systemctl", "--no-block", "stop", f"{unit}.socket"]
    if is_prevented:
        words.append("--job-mode=ignore-dependencies")
    subprocess.run(words, check=False)  # noqa: S603 - a unit of our own names


def uid_of(name: str) -> int:
    """Give the uid of a domain.

    Raises:
        Failure: Its user was not made.
    """
    try:
        return pwd.getpwnam(user_of(name)).pw_uid
    except KeyError as error:
        raise Failure(
            f"{name} cannot start",
            why=f"there is no user {user_of(name)}",
            next_step=f"systemctl restart vtpm-setup@{name}.service makes it",
            exit_code=ExitCode.CONFIGURATION,
        ) from error


def give_image(image: Path, uid: int, name: str) -> None:
    """Give an image of root's to the user of its domain, and to nobody else.

    Raises:
        Failure: It is not there, no file, or somebody else's.
    """
    what = f"{name} cannot use the image {image}"
    try:
        descriptor = os.open(image, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise Failure(
            what,
            why=error.strerror or str(error),
            next_step=f"A new TPM's image is zeros: dd if=/dev/zero of={image} bs=1M count=2;"
            " a guest's is made by vtpm image make",
            exit_code=ExitCode.NO_INPUT,
        ) from error
    try:
        status = os.fstat(descriptor)
        if stat.S_ISBLK(status.st_mode):
            return  # devices are given by udev's rules, not by us
        if not stat.S_ISREG(status.st_mode) or status.st_uid not in {0, uid}:
            raise Failure(
                what,
                why=f"it belongs to uid {status.st_uid}"
                if stat.S_ISREG(status.st_mode)
                else "it is neither a file nor a block device",
                next_step=f"If it is this domain's: chown {user_of(name)} {image}",
                exit_code=ExitCode.NO_PERMISSION,
            )
        os.fchown(descriptor, uid, -1)
        os.fchmod(descriptor, 0o600)
    except OSError as error:
        raise Failure(
            what,
            why=f"it cannot be given to uid {uid}: {error.strerror}",
            next_step="Put the image on a file system that can be written",
            exit_code=ExitCode.IO_ERROR,
        ) from error
    finally:
        os.close(descriptor)


def _register_chip(places: Places) -> None:
    state = RunState(places)
    with state.locked():
        journal = places.domain(CHIP_NAME).journal
        if state.is_powered and not is_there(journal):
            _forget_power(places, state)
            fallen = [record for record in state.reader.all() if record.role in _ABOVE_THE_CHIP]
            _start_again(state, fallen, ("vtpm-platform.service",))
        elif not state.is_powered:
            _forget_journal(places, CHIP_NAME)
        state.set_must_go_on(CHIP_NAME, must=state.is_powered)
        label = policy.load(places.policy).default_label(Role.HWTPM)
        state.writer.put(
            DomainRecord(
                name=CHIP_NAME,
                domid=CHIP_DOMID,
                role=Role.HWTPM,
                label=label,
                uid=uid_of(CHIP_NAME),
                pid=None,
                start_time=None,
                boot_hash=program_digest(PROGRAMS[Role.HWTPM]),
            )
        )


_ABOVE_THE_CHIP: Final = frozenset({Role.MANAGER, Role.VTPM, Role.GUEST})


def _check_unit(config: DomainConfig, role: Role) -> None:
    if config.role is not role:
        raise Failure(
            f"this is not the unit of {config.name}",
            why=f"its config file makes it a {config.role.value}",
            next_step=f"systemctl start {unit_of(config.name, config.role)}.service",
            exit_code=ExitCode.CONFIGURATION,
        )


def _goes_on(places: Places, name: str, role: Role) -> bool:
    """Tell whether a process begins where the one before it was killed."""
    return role is Role.MANAGER or (role is Role.VTPM and is_there(places.domain(name).journal))


def _record(
    state: RunState, config: DomainConfig, uid: int, previous: DomainRecord | None
) -> DomainRecord:
    label = config.label or policy.load(state.places.policy).default_label(config.role)
    domain = Domain(
        config=config,
        config_text="",
        config_path="",
        domid=state.new_domid() if previous is None else previous.domid,
        label=label,
        boot_hash=program_digest(PROGRAMS[config.role]),
    )
    known = {} if previous is None else {device.backend: device for device in previous.vtpms}
    for spec in config.vtpms:
        kept = known.get(spec.backend)
        domain.attach(spec.backend, spec.uuid or (kept.uuid if kept is not None else None))
    return replace(domain.record(None, None), uid=uid)


def _guests_of(state: RunState, vtpm: str) -> list[DomainRecord]:
    return [
        record
        for record in state.reader.all()
        if record.role is Role.GUEST and any(device.backend == vtpm for device in record.vtpms)
    ]


def _has_booted(places: Places, guest: DomainRecord) -> bool:
    """Tell whether a guest has measured its boot into the vTPM that is no more."""
    return is_there(places.domain(guest.name).directory / MEASUREMENTS)


def _start_again(
    state: RunState, fallen: Iterable[DomainRecord], units: Iterable[str] = ()
) -> None:
    """Start domains again that have lost what they stand on; the lock is held."""
    named = list(units)
    for record in fallen:
        state.writer.remove(record.name)
        named.append(f"{unit_of(record.name, record.role)}.service")
    if named:
        print("these have lost their TPM and start again:", *named, flush=True)  # noqa: T201
        subprocess.run(["systemctl", "--no-block", "try-restart", *named], check=False)  # noqa: S603, S607 - units of our own names


def _forget_journal(places: Places, name: str) -> None:
    _remove(places.domain(name).journal, places.domain(name).requests)


def _forget_power(places: Places, state: RunState) -> None:
    """The chip has lost its volatile state: what was true of it is no more."""
    chip, manager = places.domain(CHIP_NAME), places.domain(MANAGER_NAME)
    _remove(chip.journal, chip.requests, manager.journal, manager.requests, places.event_log)
    # Last: as long as the mark is there, a start without a journal comes here again.
    state.set_powered(powered=False)


def _remove(*paths: Path) -> None:
    """Remove files, also those behind one that cannot be removed.

    Raises:
        Failure: One cannot be: a directory stands in its place, for one. It was left as it is.
    """
    failures = []
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            failures.append(
                Failure(
                    f"cannot remove {path}",
                    why=error.strerror or str(error),
                    next_step="The stack has put no such thing there: look at it, take it away",
                    exit_code=ExitCode.IO_ERROR,
                )
            )
    if failures:
        raise failures[0]
