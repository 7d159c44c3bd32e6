"""What must not be lost: the chip's memory, the manager's image, the vTPMs' and the guests' images.

Read with the daemons' own readers from a disk that takes no lock and no write.

Leaves to the daemons: everything that needs a key. Whether the bytes of a vTPM's slot are those on
record, and whether an image is the newest, only the manager and the chip can tell.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from daemons.chip_memory import ChipMemory
from daemons.chip_memory import Inspection as ChipInspection
from daemons.disk import ReadOnlyDisk, holder_of
from daemons.doctor.finding import Finding, Subject, look_at
from daemons.errors import ExitCode, Failure
from daemons.guest.boot_image import BootImage
from daemons.guest.loader import LoaderOptions, measure
from daemons.launcher.launching import check_disk
from daemons.manager.chip_anchor import NV_INDICES
from daemons.manager.vault import inspect as inspect_vault_image
from daemons.manager.vault import inspect_vault
from daemons.places import Places
from daemons.registry import Role
from daemons.vtpm.image import inspect as inspect_vtpm_image
from daemons.xl.device_specs import Disk
from daemons.xl.domain_config import STATE_DISK, DomainConfig

_KINDS = {
    Role.MANAGER: "the manager's image",
    Role.VTPM: "its image",
    Role.GUEST: "what it boots",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Who may use an image.

    Attributes:
        user: Whose it has to be; None for this process's own user.
        is_user_known: If not, it may be anybody's.
        pid: The process of its domain, if one runs and is known by its pid.
        domain_user: Its domain has this user for itself, and is known by it.
        has_served: The domain has served since the platform was powered on.
    """

    user: int | None = None
    is_user_known: bool = True
    pid: int | None = None
    domain_user: int | None = None
    has_served: bool = False

    def is_own(self, pid: int) -> bool:
        """Whether a process is that of the domain."""
        if self.domain_user is None:
            return pid == self.pid
        try:
            return Path(f"/proc/{pid}").stat().st_uid == self.domain_user
        except OSError:
            return False

    def owner_of(self, path: Path) -> int | None:
        """Whose an image has to be.

        Raises:
            OSError: It is not known, and the image is not there.
        """
        return self.user if self.is_user_known else path.stat().st_uid

    @property
    def is_running(self) -> bool:
        """Whether the domain may be writing just now."""
        return self.pid is not None or self.domain_user is not None


# -- the chip --------------------------------------------------------------------------------------


def examine_chip_memory(
    path: Path, use: Use, *, is_manager_used: bool
) -> tuple[Finding, ChipInspection | None]:
    """Look at the chip's memory; give what is in it, too."""
    subject = Subject(path, "the chip's memory", is_told=True)
    inspected: list[ChipInspection] = []

    def look() -> Finding:
        if not path.exists() and not path.is_symlink():
            return _new_chip(subject, is_manager_used=is_manager_used, is_there=False)
        with contextlib.closing(ReadOnlyDisk(path, use.owner_of(path))) as disk:
            found = ChipMemory(disk).inspect()
        inspected.append(found)
        _require_own_holder(path, use)
        if found.permanent is None:
            return _new_chip(subject, is_manager_used=is_manager_used, is_there=True)
        if found.wrong:
            return subject.warning(
                f"state number {found.sequence} counts; {'; '.join(found.wrong)}",
                "Nothing: a save that power or a kill cut off leaves that, and the next save"
                " writes it anew. If there was none, look at the disk.",
            )
        return subject.fine(f"state number {found.sequence}")

    finding = look_at(subject, look, is_used=use.is_running)
    return finding, inspected[-1] if inspected else None


def _new_chip(subject: Subject, *, is_manager_used: bool, is_there: bool) -> Finding:
    if is_manager_used:
        return subject.warning(
            "a new chip would be made, and the manager's image is one of another chip: its key"
            " would not be unsealed",
            "Put the chip's memory back that was used with that image.",
        )
    why = "it is blank: the first vtpm up makes a new chip"
    return subject.fine(why) if is_there else subject.absent("the first vtpm up makes a new chip")


# -- images of domains -----------------------------------------------------------------------------


def image_of(places: Places, config: DomainConfig) -> Path | None:
    """The image of a manager or a vTPM."""
    disk = config.disk(STATE_DISK)
    return places.images(disk.target) if disk is not None and disk.target else None


def is_manager_used(places: Places, config: DomainConfig) -> bool:
    """Whether a manager's image holds anything; False when that cannot be told."""
    with contextlib.suppress(Failure, OSError):
        image = image_of(places, config)
        if image is not None:
            with contextlib.closing(ReadOnlyDisk(image, image.stat().st_uid)) as disk:
                return not inspect_vault_image(disk).is_blank
    return False


def examine_images(
    places: Places,
    config: DomainConfig,
    use: Use,
    chip: ChipInspection | None,
    *,
    is_manager_used: bool,
) -> list[Finding]:
    """Look at the images of a domain."""
    findings = []
    for disk in config.disks:
        if disk.is_cdrom or not disk.target:
            continue
        path = places.images(disk.target)
        is_state = disk.vdev == STATE_DISK or config.role is Role.GUEST
        kind = _KINDS[config.role] if is_state else f"its disk {disk.vdev}"
        subject = Subject(path, kind, is_told=True)

        def look(subject: Subject = subject, disk: Disk = disk) -> Finding:
            check_disk(places, config.name, config.role, disk)
            if config.role is Role.GUEST:
                return _guest_image(subject, config, disk)
            if disk.vdev != STATE_DISK:
                return subject.fine("not used")
            if config.role is Role.MANAGER:
                return _manager_image(subject, use, chip)
            return _vtpm_image(subject, use, is_manager_used=is_manager_used)

        findings.append(look_at(subject, look, is_used=use.is_running))
    return findings


def _manager_image(subject: Subject, use: Use, chip: ChipInspection | None) -> Finding:
    with contextlib.closing(ReadOnlyDisk(subject.path, use.owner_of(subject.path))) as disk:
        found = inspect_vault_image(disk)
        if not found.is_blank:
            inspect_vault(disk)
    _require_own_holder(subject.path, use)
    if found.header is None:
        permanent = None if chip is None else chip.permanent
        anchors = sorted(set(permanent.nv if permanent else ()) & set(NV_INDICES))
        if anchors:
            return subject.warning(
                f"it is blank, and the chip has NV area 0x{anchors[0]:08x} of an image that is not"
                " here: the manager would refuse it",
                "Put that image back. To give it up, with the state of all its vTPMs, write"
                f' abandoned_anchor = "0x{anchors[0]:08x}" into the settings of vtpmmgrd.',
            )
        return subject.fine("it is blank: the manager makes a new vault in it")
    told = f"root {found.header.sequence}, format {found.header.version}"
    if found.bad_copies:
        pages = ", ".join(map(str, found.bad_copies))
        return subject.warning(
            f"{told}; its second copy in page {pages} is not whole, the first one counts",
            "Nothing: a save that was cut off leaves that, and later saves write it anew. If there"
            " was none, copy the image and look at the disk.",
        )
    if found.newer_was_torn:
        told += "; the other root is torn, as by a save that was cut off before anybody was told"
    return subject.fine(told)


def _vtpm_image(subject: Subject, use: Use, *, is_manager_used: bool) -> Finding:
    with contextlib.closing(ReadOnlyDisk(subject.path, use.owner_of(subject.path))) as disk:
        found = inspect_vtpm_image(disk)
    _require_own_holder(subject.path, use)
    wrong = "; ".join(filter(None, found.wrong))
    if found.is_blank and not use.has_served:
        if is_manager_used:
            return subject.warning(
                "it is blank: a new vTPM is made in it, unless the manager knows its UUID; then it"
                " is refused",
                "If this vTPM was used before, put its image back.",
            )
        return subject.fine("it is blank: a new vTPM is made in it")
    if found.is_hopeless:
        raise Failure(
            f"cannot use image {subject.path}",
            why=wrong,
            next_step="The image is damaged, an older copy, or another vTPM's. Put the right image"
            " back; it was left as it is.",
            exit_code=ExitCode.DAMAGED,
        )
    if wrong:
        return subject.warning(
            f"{wrong}; whether that is the slot that counts, the manager knows",
            "Start the vTPM, and it says so. A save that was cut off leaves that, too.",
        )
    return subject.fine("both slots hold a state")


def _guest_image(subject: Subject, config: DomainConfig, disk: Disk) -> Finding:
    if disk is not next(first for first in config.disks if first.target):
        return subject.fine("not booted from")
    arguments = config.arguments
    menu = arguments.menu_path if isinstance(arguments, LoaderOptions) else None
    with BootImage(subject.path) as image:
        measured = measure(image, menu) if menu else measure(image)
    return subject.fine(f"boots {measured[0].name.rsplit('/', 1)[-1]}")


def _require_own_holder(path: Path, use: Use) -> None:
    holder = holder_of(path)
    if holder is not None and not use.is_own(holder):
        raise Failure(
            f"cannot use image {path}",
            why=f"process {holder} holds it, and an image has one user at a time",
            next_step="Stop that one first, or wait until it has ended.",
            exit_code=ExitCode.UNAVAILABLE,
        )
