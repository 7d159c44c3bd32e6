"""A domain as its config file describes it: parsed values in, one frozen DomainConfig out.

Which role a domain has is told by the file name of its kernel, because that is what the files say
and nothing else in them does:

    vtpmmgr-stubdom*   the manager        vtpm-stubdom*   a vTPM        pv-grub*   a guest

The kernel itself is not run and need not be there: our own programs play these roles.

Invariants:
- A key that xl does not know is a warning with its line; a value that xl knows and that is
  malformed is an error with line and column.
- Nothing is filled in that the file leaves to chance: a missing uuid stays None.

Sources: xl.cfg(5), tools/xl/xl_parse.c.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar
from uuid import UUID

from daemons.errors import ExitCode, Failure
from daemons.guest.loader import BadLoaderArgument, LoaderOptions
from daemons.labels import Label, LabelError
from daemons.places import RESERVED_NAMES, BadPlace, check_domain_name
from daemons.registry import VTPMS_MAX, Role
from daemons.xl.device_specs import (
    Disk,
    Vif,
    VtpmSpec,
    parse_disk,
    parse_iomem,
    parse_uuid,
    parse_vif,
    parse_vtpm,
)
from daemons.xl.domain_arguments import (
    ManagerArguments,
    VtpmArguments,
    parse_manager_arguments,
    parse_vtpm_arguments,
)
from daemons.xl.xl_config import (
    Position,
    Text,
    ValueList,
    WrongTextError,
    XlConfig,
    number,
    parse,
    read,
)
from daemons.xl.xl_keys import UNUSED_KEYS, USED_KEYS

MEMORY_MIB_MAX: Final = 1 << 24
MEMORY_MIB_DEFAULT: Final = 32
"""What libxl gives a domain whose file does not say."""
VCPUS_MAX: Final = 8192
DISKS_MAX: Final = 64
VIFS_MAX: Final = 64
IOMEM_RANGES_MAX: Final = 64
STATE_DISK: Final = "hda"
"""The disk in which the manager and every vTPM keep their state."""

_ROLES: Final = (
    ("vtpmmgr-stubdom", Role.MANAGER),
    ("vtpm-stubdom", Role.VTPM),
    ("pv-grub", Role.GUEST),
)


class Action(StrEnum):
    """What becomes of a domain that has ended."""

    DESTROY = "destroy"
    RESTART = "restart"
    RENAME_RESTART = "rename-restart"
    PRESERVE = "preserve"
    COREDUMP_DESTROY = "coredump-destroy"
    COREDUMP_RESTART = "coredump-restart"
    SOFT_RESET = "soft-reset"


NEAREST_ACTIONS: Final = {
    Action.RENAME_RESTART: Action.RESTART,
    Action.COREDUMP_DESTROY: Action.DESTROY,
    Action.COREDUMP_RESTART: Action.RESTART,
    Action.SOFT_RESET: Action.RESTART,
}
"""What is done for what a process cannot do; a dump of a TPM's memory would hold its keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainConfig:
    """One domain, as far as this stack uses its file."""

    name: str
    role: Role
    kernel: str
    """Path as written; its file name tells the role."""
    ramdisk: str | None
    command_line: str
    """What the kernel gets: cmdline, or root and extra."""
    arguments: ManagerArguments | VtpmArguments | LoaderOptions
    """The command line as the role's program reads it."""
    memory_mib: int
    vcpus: int
    uuid: UUID | None
    """None: a random one."""
    label: str | None
    """seclabel; None: the policy's default for the role."""
    disks: tuple[Disk, ...]
    localities: tuple[int, ...]
    """TIS pages granted by iomem, ascending."""
    vtpms: tuple[VtpmSpec, ...]
    vifs: tuple[Vif, ...]
    on_poweroff: Action
    """After a shutdown. This and the next two: destroy, restart or preserve."""
    on_reboot: Action
    on_crash: Action
    """After its process died unasked."""
    warnings: tuple[str, ...]
    """Each names the file and a line."""
    not_used: tuple[str, ...]
    """Keys of xl that the file has and that mean nothing here."""

    def disk(self, vdev: str) -> Disk | None:
        """Give the disk that the domain calls `vdev`."""
        return next((disk for disk in self.disks if disk.vdev == vdev), None)


def parse_domain(text: str, source: str = "the config") -> DomainConfig:
    """Read a domain from the text of its config file.

    Args:
        text: The whole file.
        source: Its name, for messages.

    Raises:
        ConfigError: syntax or meaning is wrong; line and column are named.
    """
    return _Reader(parse(text, source)).domain()


def read_domain(path: Path) -> DomainConfig:
    """Read a domain from its config file.

    Raises:
        ConfigError: as `parse_domain`.
        Failure: the file cannot be read.
    """
    return _Reader(read(path)).domain()


def disk_from_argument(spec: str) -> Disk:
    """Read the disk of a `block-attach` command.

    Raises:
        Failure: it is not a disk.
    """
    try:
        return parse_disk(spec)
    except WrongTextError as wrong:
        raise Failure(
            f"{spec[:80]!a} is not a disk",
            why=wrong.reason,
            next_step="Write it as in a config file: file:/images/x.img,hda,w",
            exit_code=ExitCode.USAGE,
        ) from wrong


_Read = TypeVar("_Read")


class _Reader:
    """Takes a domain out of parsed settings."""

    def __init__(self, config: XlConfig) -> None:
        self._config = config
        self._warnings: list[str] = []

    def domain(self) -> DomainConfig:
        self._warn_about_keys()
        name = self._name()
        kernel = self._required("kernel", "the path of a program such as vtpm-stubdom.gz")
        role = self._role(kernel)
        command_line = self._command_line()
        domain = DomainConfig(
            name=name,
            role=role,
            kernel=kernel.text,
            ramdisk=self._text("ramdisk"),
            command_line=command_line.text if command_line else "",
            arguments=self._arguments(role, command_line),
            memory_mib=self._number("memory", MEMORY_MIB_DEFAULT, 1, MEMORY_MIB_MAX),
            vcpus=self._number("vcpus", 1, 1, VCPUS_MAX),
            uuid=self._uuid(),
            label=self._label(),
            disks=self._disks(),
            localities=self._localities(),
            vtpms=tuple(spec for spec, _ in self._items("vtpm", parse_vtpm, VTPMS_MAX)),
            vifs=tuple(vif for vif, _ in self._items("vif", parse_vif, VIFS_MAX)),
            on_poweroff=self._action("on_poweroff", Action.DESTROY),
            on_reboot=self._action("on_reboot", Action.RESTART),
            # xl's default is destroy; a TPM that is there again is what this stack is for.
            on_crash=self._action("on_crash", Action.RESTART),
            warnings=(),
            not_used=tuple(sorted(self._config.settings.keys() & UNUSED_KEYS)),
        )
        self._warn_about_role(domain)
        return replace(domain, warnings=tuple(self._warnings))

    def _name(self) -> str:
        name = self._required("name", 'such as "guest1"')
        try:
            check_domain_name(name.text)
        except BadPlace as error:
            raise self._config.error(name.position, f"{error.what}: {error.why}") from error
        if name.text in RESERVED_NAMES:
            raise self._config.error(
                name.position, f"the name {name.text} belongs to the platform itself"
            )
        return name.text

    def _role(self, kernel: Text) -> Role:
        file_name = PurePosixPath(kernel.text).name
        for beginning, role in _ROLES:
            if file_name.startswith(beginning):
                return role
        raise self._config.error(
            kernel.position,
            f"the kernel {file_name[:40]!a} tells no role: its file name begins with none of"
            " vtpmmgr-stubdom (the manager), vtpm-stubdom (a vTPM), pv-grub (a guest)",
        )

    def _command_line(self) -> Text | None:
        """Put the command line together as xl does: cmdline wins over root and extra."""
        cmdline, root, extra = (self._text_value(key) for key in ("cmdline", "root", "extra"))
        if cmdline is not None:
            for ignored in (root, extra):
                if ignored is not None:
                    self._warn(ignored.position, "root= and extra= are ignored beside cmdline=")
            return cmdline
        if root is None:
            return extra
        text = f"root={root.text}" + (f" {extra.text}" if extra else "")
        return Text(text, root.position, is_quoted=True, is_plain=False)

    def _arguments(
        self, role: Role, command_line: Text | None
    ) -> ManagerArguments | VtpmArguments | LoaderOptions:
        line = command_line or Text("", Position(0, 1, 1), is_quoted=True, is_plain=False)
        if role is Role.MANAGER:
            return self._checked(line, parse_manager_arguments)
        if role is Role.GUEST:
            try:
                return LoaderOptions.parse(line.text)
            except BadLoaderArgument as error:
                reason = f"{error.what}: {error.why}"
                raise self._config.error(line.position, reason, error.next_step) from error
        arguments = self._checked(line, parse_vtpm_arguments)
        for word in arguments.unknown:
            self._warn(line.position, f"vTPMs have no argument {word[:40]!a}; it is ignored")
        return arguments

    def _uuid(self) -> UUID | None:
        value = self._text_value("uuid")
        return None if value is None else self._checked(value, parse_uuid)

    def _label(self) -> str | None:
        value = self._text_value("seclabel")
        if value is None:
            return None
        try:
            return str(Label.parse(value.text))
        except LabelError as error:
            raise self._config.error(value.position, str(error)) from error

    def _disks(self) -> tuple[Disk, ...]:
        disks: dict[str, Disk] = {}
        for disk, item in self._items("disk", parse_disk, DISKS_MAX):
            if disk.vdev in disks:
                raise self._config.error(item.position, f"two disks are called {disk.vdev}")
            if disk.format not in {"raw", "empty"}:
                raise self._config.error(
                    item.position, f"images in format {disk.format} cannot be used, only raw ones"
                )
            disks[disk.vdev] = disk
        return tuple(disks.values())

    def _localities(self) -> tuple[int, ...]:
        granted: set[int] = set()
        for localities, item in self._items("iomem", parse_iomem, IOMEM_RANGES_MAX):
            if not localities:
                self._warn(item.position, f"no page of the TPM is in {item.text[:40]!a}")
            granted.update(localities)
        return tuple(sorted(granted))

    def _action(self, key: str, default: Action) -> Action:
        value = self._text_value(key)
        if value is None:
            return default
        if value.text not in set(Action):
            raise self._config.error(
                value.position, f"{key} is none of {', '.join(action.value for action in Action)}"
            )
        action = Action(value.text)
        nearest = NEAREST_ACTIONS.get(action)
        if nearest is not None:
            self._warn(
                value.position, f"{key}={action.value} cannot be done here; {nearest.value} is done"
            )
            return nearest
        return action

    def _required(self, key: str, example: str) -> Text:
        value = self._text_value(key)
        if value is None or not value.text:
            position = value.position if value else Position(0, 1, 1)
            raise self._config.error(position, f"{key}= is missing: {example}")
        return value

    def _text(self, key: str) -> str | None:
        value = self._text_value(key)
        return None if value is None else value.text

    def _text_value(self, key: str) -> Text | None:
        setting = self._config.settings.get(key)
        if setting is None:
            return None
        if not isinstance(setting.value, Text):
            raise self._config.error(setting.value.position, f"{key} is one value, not a list")
        return setting.value

    def _number(self, key: str, default: int, least: int, most: int) -> int:
        value = self._text_value(key)
        if value is None:
            return default
        if self._config.settings[key].is_added:
            raise self._config.error(value.position, f"+= cannot be used with numbers ({key})")
        found = self._checked(value, lambda _: number(value))
        if not least <= found <= most:
            raise self._config.error(value.position, f"{key} is not between {least} and {most}")
        return found

    def _items(
        self, key: str, reader: Callable[[str], _Read], count_max: int
    ) -> list[tuple[_Read, Text]]:
        """Read each string of a list."""
        setting = self._config.settings.get(key)
        if setting is None:
            return []
        if not isinstance(setting.value, ValueList):
            raise self._config.error(
                setting.value.position, f'{key} is a list of strings: {key}=["..."]'
            )
        if len(setting.value.items) > count_max:
            raise self._config.error(
                setting.value.items[count_max].position, f"{key} has more than {count_max} entries"
            )
        found: list[tuple[_Read, Text]] = []
        for item in setting.value.items:
            if not isinstance(item, Text):
                raise self._config.error(item.position, f"an entry of {key} is a string")
            found.append((self._checked(item, reader), item))
        return found

    def _checked(self, value: Text, reader: Callable[[str], _Read]) -> _Read:
        try:
            return reader(value.text)
        except WrongTextError as wrong:
            raise self._config.error(value.place(wrong.index), wrong.reason) from wrong

    def _warn_about_keys(self) -> None:
        for setting in self._config.settings.values():
            if setting.name not in USED_KEYS | UNUSED_KEYS:
                near = difflib.get_close_matches(setting.name[:40], USED_KEYS, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                self._warn(
                    setting.position, f"the key {setting.name[:40]} is not known and ignored{hint}"
                )
        for setting in self._config.repeated:
            self._warn(setting.position, f"{setting.name[:40]} is set again further down")

    def _warn_about_role(self, domain: DomainConfig) -> None:
        """Warn about what will stop the domain later; it may still be attached before that."""
        start = Position(0, 1, 1)
        if domain.role in {Role.MANAGER, Role.VTPM}:
            disk = domain.disk(STATE_DISK)
            if disk is None:
                self._warn(start, f"there is no disk {STATE_DISK} for the state: use block-attach")
            elif not disk.is_writable:
                self._warn(start, f"the disk {STATE_DISK} is read-only: no state can be saved")
        if domain.role is Role.VTPM:
            if not domain.vtpms:
                self._warn(start, "there is no vtpm=, so no manager: use vtpm-attach")
            elif domain.vtpms[0].uuid is None:
                self._warn(start, "vtpm= has no uuid=, so this vTPM will not find its state again")
        if isinstance(domain.arguments, ManagerArguments):
            locality = domain.arguments.tpm_locality
            if locality not in domain.localities:
                self._warn(start, f'locality {locality} needs iomem=["fed4{locality},1"]')

    def _warn(self, position: Position, reason: str) -> None:
        self._warnings.append(f"{self._config.source}:{position.line}: {reason}")
