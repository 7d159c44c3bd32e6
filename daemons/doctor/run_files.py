"""What lies in the run directory: records, journals, sockets, locks, marks, lists of measurements.

It is gone when the stack is stopped. While the chip has its power (`Scene.is_powered`), the next
launcher takes over what is there; otherwise the next `vtpm up` clears it away, whatever it is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from daemons.doctor.finding import Finding, Subject, look_at
from daemons.errors import ExitCode, Failure
from daemons.guest.measurements import FILE_NAME as MEASUREMENTS
from daemons.guest.measurements import read_measurements
from daemons.instance_lock import inspect_lock
from daemons.journal import boot_id, inspect_journal, missing
from daemons.launcher.adoption import MARKER_NAME
from daemons.launcher.event_log import read_log
from daemons.launcher.last_domid import COUNTER_NAME, read_count
from daemons.launcher.leftovers import LOCK_NAME
from daemons.launcher.processes import is_alive
from daemons.launcher.ready_marks import READY_NAME, contradictions
from daemons.launcher.wishes import WISH_NAME, Wish, read_wish
from daemons.listeners import SOCKET_PATH_BYTES_MAX, describe_file, served_paths
from daemons.manager.handle_journal import read_leftovers
from daemons.manager.request_memory import inspect_requests
from daemons.places import CHIP_NAME, DOMAIN0_NAME, BadPlace, Places
from daemons.registry import DamagedRegistry, DomainRecord, Registry, Role, served_at
from daemons.systemd.stack_control import is_installed
from daemons.xl.domain_config import read_domain

SYSTEMD_MARK: Final = ".powered"
"""In the registry, where systemd starts the domains."""
_TAKE_OVER: Final = "vtpm up takes over what runs, and starts the others again."
_CLEARED: Final = "left by a stack that has ended; the next vtpm up clears it away"
_WISHES: Final = {
    Wish.PRESERVED: "it was shut down, and is kept",
    Wish.RESTART: "it is to be started again",
    Wish.CRASHED: "it crashed, and is kept",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What is up.

    Attributes:
        places: Of the installation.
        is_powered: The chip was powered on in this boot of the machine, and not off since.
        is_systemd: Domains are started by systemd, and there is no launcher.
        launcher: Pid of the launcher; None when none runs.
        records: Of the registry, by name; those that can be believed.
        served: Paths on which somebody listens; None when the kernel does not say.
    """

    places: Places
    is_powered: bool
    is_systemd: bool
    launcher: int | None
    records: Mapping[str, DomainRecord] = field(default_factory=dict)
    served: frozenset[str] | None = None

    def is_running(self, name: str) -> bool:
        """Whether a domain has a living process, as far as its record tells."""
        record = self.records.get(name)
        if record is None:
            return False
        if record.pid is None or record.start_time is None:
            return self.is_systemd
        return is_alive(record.pid, record.start_time)


# -- records and the launcher ----------------------------------------------------------------------


def examine_registry(places: Places) -> tuple[list[Finding], dict[str, DomainRecord]]:
    """Look at all records; give those that can be believed, too."""
    findings: list[Finding] = []
    records: dict[str, DomainRecord] = {}
    registry = Registry(places.registry)
    try:
        names = sorted(os.listdir(places.registry))  # noqa: PTH208 - only names are wanted
    except FileNotFoundError:
        return [], {}
    except OSError as error:
        return [Subject(places.registry, "the registry").hidden(error)], {}
    for name in names:
        if name.startswith(".") or not name.endswith(".json"):
            continue
        subject = Subject(places.registry / name, "a record in the registry")
        try:
            record = registry.get(name.removesuffix(".json"))
        except (DamagedRegistry, BadPlace) as failure:
            findings.append(subject.refused(_unusable_record(subject.path, failure)))
        else:
            if record is not None:
                records[record.name] = record
    for path, why in contradictions(places, records).items():
        subject = Subject(path, "a record in the registry")
        findings.append(subject.refused(_contradicted_record(path, why)))
    return findings, records


def _contradicted_record(path: Path, why: str) -> Failure:
    return DamagedRegistry(
        f"the registry entry {path} is refused",
        why=f"it {why}",
        next_step="Put the file back as it was: vtpm up then takes over what runs. Or end all of it"
        " in order: vtpm down.",
        exit_code=ExitCode.DAMAGED,
    )


def _unusable_record(path: Path, failure: Failure) -> Failure:
    """The same, with the file's name: a registry that has such a file stops the next launcher."""
    return DamagedRegistry(
        f"the registry entry {path} is refused",
        why=failure.why,
        next_step="Stop the stack with `vtpm down`; where no launcher lives that is refused too:"
        " then remove this file first, and end the domain's process by its pid.",
        exit_code=ExitCode.DAMAGED,
    )


def examine_record(scene: Scene, name: str) -> list[Finding]:
    """Look at the process of a record."""
    record = scene.records.get(name)
    if record is None:
        return []
    subject = Subject(scene.places.registry / f"{name}.json", "its record in the registry")
    if record.pid is None or record.start_time is None:
        why = f"known by its user {record.uid}" if scene.is_systemd else "it has no process now"
        return [subject.fine(why)]
    if is_alive(record.pid, record.start_time):
        return [subject.fine(f"process {record.pid} lives")]
    if not scene.is_powered:
        return [subject.fine(_CLEARED)]
    next_step = (
        _TAKE_OVER
        if scene.launcher is None
        else "The launcher starts it again, unless it was refused: see vtpm status."
    )
    return [subject.warning(f"process {record.pid} is dead", next_step)]


def examine_launcher(scene: Scene) -> list[Finding]:
    """Look at what the launcher has for itself."""
    places = scene.places
    findings = [_power_mark(scene), _launcher_lock(scene), _last_domid(scene)]
    findings += [
        *_socket(scene, places.launcher_socket, scene.launcher is not None),
        *_socket(scene, places.notify_socket, scene.launcher is not None),
    ]
    if DOMAIN0_NAME in scene.records and scene.launcher is not None:
        findings += examine_record(scene, DOMAIN0_NAME)
    findings.append(_event_log(scene))
    return findings


def find_launcher(places: Places) -> int | None:
    """The pid of the launcher; None when none runs or it cannot be told."""
    try:
        return inspect_lock(places.registry / LOCK_NAME)
    except (OSError, Failure):
        return None


def is_powered(places: Places) -> bool:
    """Whether the chip was powered on in this boot of the machine."""
    try:
        if (places.registry / SYSTEMD_MARK).exists():
            return True
        mark = places.run / MARKER_NAME
        return mark.is_file() and mark.read_bytes() == boot_id().hex().encode("ascii")
    except OSError:
        return False


def is_by_systemd(places: Places) -> bool:
    """Whether the domains of an installation are started by systemd."""
    if find_launcher(places) is not None:
        return False
    return is_installed(places) or os.access(places.registry / SYSTEMD_MARK, os.F_OK)


def _power_mark(scene: Scene) -> Finding:
    path = scene.places.run / MARKER_NAME
    if scene.is_systemd:
        path = scene.places.registry / SYSTEMD_MARK
    subject = Subject(path, "the mark of a chip with power")

    def look() -> Finding:
        if scene.is_powered:
            return subject.fine("the chip was powered on in this boot of the machine")
        if not path.exists():
            return subject.absent("the chip has no power")
        if scene.launcher is not None:
            return subject.warning(
                "it is not of this boot of the machine: a killed launcher's domains would be ended"
                " instead of taken over",
                "vtpm down, vtpm up writes it again.",
            )
        return subject.fine("of an earlier boot of the machine: what it says is over")

    return look_at(subject, look)


def _launcher_lock(scene: Scene) -> Finding:
    subject = Subject(scene.places.registry / LOCK_NAME, "the launcher's lock")

    def look() -> Finding:
        try:
            holder = inspect_lock(subject.path)
        except FileNotFoundError:
            holder = None
        if holder is not None:
            return subject.fine(f"process {holder} is the launcher")
        if scene.is_powered and not scene.is_systemd:
            return subject.warning(
                "the launcher was killed; its domains go on serving without it", _TAKE_OVER
            )
        return subject.absent("no launcher runs")

    return look_at(subject, look)


def _last_domid(scene: Scene) -> Finding:
    subject = Subject(scene.places.registry / COUNTER_NAME, "how many domids were given out")

    def look() -> Finding:
        if not scene.is_powered:
            there = os.path.lexists(subject.path)
            return subject.fine(_CLEARED) if there else subject.absent("none was")
        count = read_count(scene.places.registry, scene.records.values())
        return subject.fine(str(count)) if count else subject.absent("none was")

    return look_at(subject, look, is_used=True)


def _event_log(scene: Scene) -> Finding:
    subject = Subject(scene.places.event_log, "what was measured into the chip")

    def look() -> Finding:
        events = read_log(subject.path)
        if events is not None:
            return subject.fine(f"{len(events)} events")
        if scene.is_powered:
            return subject.warning(
                "it is gone, so nothing explains the chip's PCRs",
                "It is written at the platform's next power-on: vtpm down, vtpm up.",
            )
        return subject.absent("the platform was not powered on")

    return look_at(subject, look, is_used=scene.launcher is not None)


# -- domains ---------------------------------------------------------------------------------------


def examine_chip(scene: Scene) -> list[Finding]:
    """Look at the chip's run directory."""
    own = scene.places.domain(CHIP_NAME)
    is_running = scene.is_running(CHIP_NAME)
    return [
        *examine_record(scene, CHIP_NAME),
        _journal(scene, CHIP_NAME, has_served=True),
        *_socket(scene, scene.places.tis_socket, is_running, owner=CHIP_NAME),
        *_strangers(own.directory, {"journal", "journal.new", "tis.sock", READY_NAME}),
    ]


def examine_domain(scene: Scene, name: str, role: Role) -> list[Finding]:
    """Look at a domain's run directory."""
    own = scene.places.domain(name)
    has_served = has_been_ready(scene, name)
    findings = [*examine_record(scene, name), *_config(scene, name), *_wish(scene, name)]
    is_running = scene.is_running(name)
    if role is Role.VTPM:
        findings.append(_journal(scene, name, has_served=has_served))
    if role is Role.MANAGER:
        findings += [_handle_journal(own.journal), _request_journal(scene, name)]
    is_served = is_running and has_served
    socket = served_at(scene.places, name, role)
    findings += _socket(scene, socket, is_served, owner=name)
    if role is Role.GUEST:
        findings.append(_measurements(own.directory))
    if has_served:
        findings.append(Subject(own.directory / READY_NAME, "the mark of having served").fine())
    journals = {own.journal.name, own.requests.name}
    known = journals | {socket.name, MEASUREMENTS, READY_NAME, WISH_NAME, own.config.name}
    return [*findings, *_strangers(own.directory, known)]


def has_been_ready(scene: Scene, name: str) -> bool:
    """Whether a domain has served since its journal began."""
    try:
        return scene.is_powered and (scene.places.domain(name).directory / READY_NAME).exists()
    except OSError:
        return False


def _journal(scene: Scene, name: str, *, has_served: bool) -> Finding:
    subject = Subject(scene.places.domain(name).journal, "its journal")
    is_needed = scene.is_powered and has_served and name in scene.records and not scene.is_systemd

    def look() -> Finding:
        if not scene.is_powered:
            there = os.path.lexists(subject.path)
            return subject.fine(_CLEARED) if there else subject.absent("nothing to go on from")
        records = inspect_journal(subject.path)
        if records is not None:
            return subject.fine(f"{records} records")
        if is_needed:
            # Its process goes on as long as it lives; the next one could not.
            raise missing(subject.path)
        return subject.absent("nothing to go on from")

    return look_at(subject, look, is_used=scene.is_running(name))


def _handle_journal(path: Path) -> Finding:
    subject = Subject(path, "its list of handles in the chip")

    def look() -> Finding:
        try:
            left = read_leftovers(path)
        except FileNotFoundError:
            return subject.absent("it has no handle open in the chip")
        except ValueError as error:
            return subject.warning(
                f"it is not understood, and so taken for empty: {str(error)[:100]}",
                "The chip may run short of a session or a key slot until it is powered off:"
                " vtpm down, vtpm up.",
            )
        return subject.fine(f"{len(left.handles)} handles")

    return look_at(subject, look, is_used=True)


def _request_journal(scene: Scene, name: str) -> Finding:
    subject = Subject(scene.places.domain(name).requests, "its journal of requests")

    def look() -> Finding:
        if not scene.is_powered:
            there = os.path.lexists(subject.path)
            return subject.fine(_CLEARED) if there else subject.absent("nothing to go on from")
        records = inspect_requests(subject.path)
        if records is not None:
            return subject.fine(f"{records} records")
        if scene.is_running(name):
            return subject.warning(
                "it is gone: if the manager is killed, a guest's request that was under way is"
                " answered TPM_IOERROR",
                f"vtpm reboot {name} writes it again.",
            )
        return subject.absent("nothing to go on from")

    return look_at(subject, look, is_used=scene.is_running(name))


def _config(scene: Scene, name: str) -> list[Finding]:
    path = scene.places.domain(name).config
    subject = Subject(path, "its config file as created")

    def look() -> Finding:
        if path.exists():
            read_domain(path)
            return subject.fine() if scene.is_powered else subject.fine(_CLEARED)
        if scene.is_powered and name in scene.records and not scene.is_systemd:
            return subject.warning(
                "it is gone: after a kill of the launcher this domain would not be taken over",
                f"vtpm reboot {name} writes it again.",
            )
        return subject.absent()

    return [look_at(subject, look)]


def _wish(scene: Scene, name: str) -> list[Finding]:
    path = scene.places.domain(name).directory / WISH_NAME
    subject = Subject(path, "what is wanted of it without a process")

    def look() -> Finding:
        if not scene.is_powered:
            return subject.fine(_CLEARED)
        noted = read_wish(scene.places, name)
        return subject.absent() if noted is None else subject.fine(_WISHES[noted.wish])

    return [look_at(subject, look, is_used=True)] if os.path.lexists(path) else []


def _measurements(directory: Path) -> Finding:
    subject = Subject(directory / MEASUREMENTS, "what its loader measured")

    def look() -> Finding:
        try:
            found = read_measurements(directory)
        except ValueError as error:
            raise Failure(
                f"cannot read what {directory.name} measured",
                why=f"{subject.path}: {error}",
                next_step=f"vtpm reboot {directory.name} writes it again",
                exit_code=ExitCode.DAMAGED,
            ) from error
        return subject.fine(f"{len(found)} events") if found else subject.absent("not booted")

    return look_at(subject, look)


# -- sockets, and what does not belong there -------------------------------------------------------


def _socket(scene: Scene, path: Path, is_served: bool, *, owner: str = "") -> list[Finding]:
    """Look at a socket.

    Args:
        scene: What is up.
        path: Of the socket.
        is_served: Somebody has to listen on it.
        owner: The domain whose process that is; empty for the launcher.
    """
    subject = Subject(path, "its socket")

    def look() -> Finding:
        try:
            mode = path.stat(follow_symlinks=False).st_mode
        except FileNotFoundError:
            if not is_served:
                return subject.absent("nobody serves it")
            return subject.warning(
                "it is gone, so nobody can connect",
                f"vtpm reboot {owner} makes it again."
                if owner not in {"", CHIP_NAME}
                else "vtpm down, vtpm up makes it again.",
            )
        if not stat.S_ISSOCK(mode):
            next_step = "Look at what it is, and move it away."
            return subject.warning(f"{describe_file(path)} is in its place", next_step)
        return _judged_socket(scene, subject, is_served=is_served, owner=owner)

    return [look_at(subject, look)]


def _judged_socket(scene: Scene, subject: Subject, *, is_served: bool, owner: str) -> Finding:
    if scene.served is None or len(os.fsencode(subject.path)) > SOCKET_PATH_BYTES_MAX:
        return subject.fine("whether anybody listens cannot be told")
    if str(subject.path) in scene.served:
        if owner and owner not in scene.records and not scene.is_systemd:
            return subject.warning(
                "a process listens on it that the registry does not know",
                f"End that process: ss -xlp src {subject.path} names it.",
            )
        return subject.fine("somebody listens")
    if is_served:
        next_step = "vtpm status says what the daemon does."
        return subject.warning("nobody listens on it, and its daemon lives", next_step)
    return subject.fine("stale: left by a process that was killed, and replaced by the next")


def served() -> frozenset[str] | None:
    """Paths on which somebody listens; None when the kernel does not say."""
    try:
        return served_paths()
    except OSError:
        return None


def _strangers(directory: Path, known: set[str]) -> list[Finding]:
    try:
        names = sorted(set(os.listdir(directory)) - known)  # noqa: PTH208 - only names
    except OSError:
        return []
    return [
        Subject(directory / name, "a file of nobody").warning(
            "the stack has no file of this name here", "It is removed at the domain's next start."
        )
        for name in names
        if not name.endswith(".new")
    ]
