"""What the strings in disk=, iomem=, vtpm= and vif= say. Pure.

Sources: xl-disk-configuration(5) and libxlu_disk_l.l for disks, xl.cfg(5) and xl_parse.c for the
others. Stricter than xl in one way: xl stops reading a vtpm string at a word without `=` and
ignores the rest; here such a word is an error, as is any value that xl would fail on later.

Every function raises WrongTextError with the index of the offending character and nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from daemons.places import BadPlace, check_domain_name
from daemons.xl.xl_config import WrongTextError

TIS_FRAME: Final = 0xFED40
"""Page frame of locality 0; the page of locality n is n frames further on."""
LOCALITIES: Final = range(5)
SPEC_CHARACTERS_MAX: Final = 4096

_FORMATS: Final = {
    "": "raw",
    **{name: name for name in ("raw", "qcow", "qcow2", "vhd", "qed", "empty")},
}
_ACCESSES: Final = {"": True, "rw": True, "w": True, "ro": False, "r": False}
_BACKEND_TYPES: Final = frozenset({"phy", "tap", "qdisk", "standalone"})
_PLAIN_PREFIXES: Final = frozenset({"file", "phy", "tap", "tap2", "tapdisk", "aio", "ioemu"})
_FORMAT_PREFIXES: Final = frozenset({"raw", "qcow", "qcow2", "vhd"})
_SCRIPT_PREFIXES: Final = frozenset({"iscsi", "nbd", "enbd", "drbd"})
_PREFIX: Final = re.compile(r"([a-z][a-z0-9]*):(?=/)")
_IGNORED_KEYS: Final = frozenset(
    {"specification", "colo-host", "colo-port", "colo-export", "active-disk", "hidden-disk"}
)
_IGNORED_FLAGS: Final = frozenset(
    {"direct-io-safe", "discard", "no-discard", "colo", "no-colo", "trusted", "untrusted"}
)
_VDEV: Final = re.compile(
    r"(?:hd|sd|xvd|vd)[a-z]{1,3}[0-9]{0,4}|d[0-9]{1,4}(?:p[0-9]{1,3})?|[0-9]{1,6}"
)
_IOMEM: Final = re.compile(
    r"(?:0x)?([0-9a-fA-F]{1,13}),(?:0x)?([0-9a-fA-F]{1,13})(?:@(?:0x)?[0-9a-fA-F]+)?"
)
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_MAC: Final = re.compile(r"[0-9a-fA-F]{2}(?::[0-9a-fA-F]{2}){5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """One disk of a domain."""

    target: str
    """Absolute path as in the config file, to be taken under the root; empty for an empty drive."""
    vdev: str
    """What the domain calls it: hda, xvda, ..."""
    is_writable: bool
    format: str = "raw"
    is_cdrom: bool = False
    backend: str = ""
    """Domain that serves it; empty means domain 0."""
    backendtype: str = ""
    script: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmSpec:
    """One TPM frontend as a config file asks for it."""

    backend: str
    """Name of a domain, or its domid in digits."""
    uuid: UUID | None
    """None: a random one at each start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Vif:
    """One network interface: shown, not made."""

    text: str
    mac: str | None
    bridge: str | None


def parse_disk(spec: str) -> Disk:
    """Read one disk, in positional or key=value form, with or without an old prefix.

    Raises:
        WrongTextError: it is not a disk that can be attached.
    """
    if len(spec) > SPEC_CHARACTERS_MAX:
        raise WrongTextError(f"it has more than {SPEC_CHARACTERS_MAX} characters")
    return _DiskReader(spec).disk()


class _DiskReader:
    """One pass over a disk string; each of the values may be given once."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._given: dict[str, tuple[str, int]] = {}
        self._flags: set[str] = set()
        self._had_prefix = False

    def disk(self) -> Disk:
        at = 0
        while at < len(self._spec):
            at += len(self._spec[at:]) - len(self._spec[at:].lstrip(" \t\n"))
            if self._spec.startswith("target=", at):
                # By name it takes the whole rest, commas included.
                self._set("target", self._spec[at + len("target=") :], at)
                break
            prefix = _PREFIX.match(self._spec, at)
            if prefix is not None and "target" not in self._given:
                self._take_prefix(prefix[1], at)
                at = prefix.end()
            end = self._spec.find(",", at)
            end = len(self._spec) if end < 0 else end
            self._take_part(self._spec[at:end], at)
            at = end + 1
        return self._result()

    def _take_prefix(self, prefix: str, at: int) -> None:
        if prefix in _FORMAT_PREFIXES:
            self._set("format", prefix, at)
        elif prefix in _SCRIPT_PREFIXES:
            self._set("script", f"block-{prefix}", at)
        elif prefix not in _PLAIN_PREFIXES:
            raise WrongTextError(f"{prefix}: is not a prefix that xl knows", at)
        self._had_prefix = True

    def _take_part(self, part: str, at: int) -> None:
        key, equals, value = part.partition("=")
        if not equals:
            self._take_word(part, at)
        elif key in {"format", "vdev", "access", "backend", "backendtype", "script"}:
            self._set(key, value, at)
        elif key == "devtype" and value in {"cdrom", "disk"}:
            self._flags.add(value)
        elif key == "grant_usage" and value in {"0", "1"}:
            pass
        elif key not in _IGNORED_KEYS:
            raise WrongTextError(f"{part[:40]!a} is not a parameter of a disk", at)

    def _take_word(self, word: str, at: int) -> None:
        if word == "cdrom":
            self._flags.add(word)
        elif word not in _IGNORED_FLAGS:
            self._set_positional(word, at)

    def _set_positional(self, word: str, at: int) -> None:
        for name in ("target", "format", "vdev", "access"):
            if name in self._given or (name == "format" and self._had_prefix):
                continue
            # The old form vdev:cdrom, also where an empty target leaves the format out.
            device, colon, devtype = word.rpartition(":")
            if colon and (name == "vdev" or (name == "format" and not self._given["target"][0])):
                if devtype not in {"cdrom", "disk"}:
                    raise WrongTextError(f"{devtype[:40]!a} is not a type of a device", at)
                self._flags.add(devtype)
                self._set("vdev", device, at)
                if name == "format":
                    self._set("format", "empty", at)
            else:
                self._set(name, word, at)
            return
        raise WrongTextError("there is more than target, format, vdev and access", at)

    def _set(self, name: str, value: str, at: int) -> None:
        old = self._given.get(name, ("", 0))[0]
        if old and old != value:
            raise WrongTextError(f"{name} is given twice", at)
        self._given[name] = (value, at)

    def _result(self) -> Disk:
        format_ = self._choice("format", _FORMATS)
        is_cdrom = "cdrom" in self._flags
        access, access_at = self._given.get("access", ("", 0))
        if access not in _ACCESSES:
            raise WrongTextError(f"{access[:40]!a} is not an access (r, ro, w or rw)", access_at)
        backendtype, type_at = self._given.get("backendtype", ("", 0))
        if backendtype and backendtype not in _BACKEND_TYPES:
            raise WrongTextError(f"{backendtype[:40]!a} is not a backendtype", type_at)
        vdev, vdev_at = self._given.get("vdev", ("", 0))
        if not _VDEV.fullmatch(vdev):
            why = f"{vdev[:40]!a} is not a device such as hda or xvda" if vdev else "it has no vdev"
            raise WrongTextError(why, vdev_at)
        return Disk(
            target=self._target(is_cdrom or format_ == "empty"),
            vdev=vdev,
            is_writable=_ACCESSES[access] and not is_cdrom,
            format=format_,
            is_cdrom=is_cdrom,
            backend=self._given.get("backend", ("", 0))[0],
            backendtype=backendtype,
            script=self._given.get("script", ("", 0))[0],
        )

    def _choice(self, name: str, choices: dict[str, str]) -> str:
        value, at = self._given.get(name, ("", 0))
        if value not in choices:
            raise WrongTextError(f"{value[:40]!a} is not a {name}", at)
        return choices[value]

    def _target(self, may_be_empty: bool) -> str:
        target, at = self._given.get("target", ("", 0))
        if not target and not may_be_empty:
            raise WrongTextError("it has no target (the path of its image)", at)
        if any(not character.isprintable() for character in target):
            raise WrongTextError("its target has characters that are not printable", at)
        if ".." in target.split("/"):
            raise WrongTextError("its target has a .. part and could leave the root", at)
        # xl-disk-configuration(5): a path that does not start with / is one in /dev.
        return target if not target or target.startswith("/") else f"/dev/{target}"


def parse_iomem(spec: str) -> tuple[int, ...]:
    """Read `START,COUNT[@GFN]` (hex page frames) and give the localities whose pages lie in it.

    Raises:
        WrongTextError: not of this form, or no page at all.
    """
    found = _IOMEM.fullmatch(spec.strip())
    if found is None:
        raise WrongTextError(f"{spec[:40]!a} is not START,COUNT in hex page frames (fed42,1)")
    start, count = int(found[1], 16), int(found[2], 16)
    if count == 0:
        raise WrongTextError(f"{spec[:40]!a} has a count of 0 pages", found.start(2))
    return tuple(n for n in LOCALITIES if start <= TIS_FRAME + n < start + count)


def parse_vtpm(spec: str) -> VtpmSpec:
    """Read `backend=DOMAIN[,uuid=UUID]`.

    Raises:
        WrongTextError: backend is missing, a key is unknown or given twice, or a value is wrong.
    """
    given: dict[str, str] = {}
    for word, at in _words(spec):
        key, equals, value = word.partition("=")
        if not equals or key not in {"backend", "uuid"}:
            raise WrongTextError(f"{word[:40]!a} is neither backend=DOMAIN nor uuid=UUID", at)
        if key in given:
            raise WrongTextError(f"{key}= is given twice", at)
        place = at + len(key) + 1
        if key == "uuid":
            parse_uuid(value, place)
        elif not (value.isascii() and value.isdigit()):
            _check_name(value, place)
        given[key] = value
    if "backend" not in given:
        raise WrongTextError(
            "backend= is missing: the manager's name for a vTPM, the vTPM's name for a guest"
        )
    return VtpmSpec(
        backend=given["backend"], uuid=parse_uuid(given["uuid"]) if "uuid" in given else None
    )


def parse_uuid(text: str, at: int = 0) -> UUID | None:
    """Read a uuid of the form 8-4-4-4-12; the nil uuid is none, as in libxl.

    Raises:
        WrongTextError: another form.
    """
    if not _UUID.fullmatch(text):
        raise WrongTextError(f"{text[:40]!a} is not a uuid of the form 8-4-4-4-12", at)
    return UUID(text) if UUID(text).int else None


def parse_vif(spec: str) -> Vif:
    """Read a network interface; only mac and bridge are looked at.

    Raises:
        WrongTextError: the mac is none, or there are characters that cannot be shown.
    """
    if len(spec) > SPEC_CHARACTERS_MAX or any(not character.isprintable() for character in spec):
        raise WrongTextError("it is too long, or has characters that are not printable")
    given: dict[str, str] = {}
    for word, at in _words(spec):
        key, _, value = word.partition("=")
        if key == "mac" and not _MAC.fullmatch(value):
            raise WrongTextError(f"{value[:40]!a} is not a MAC address", at + len("mac="))
        given[key] = value
    return Vif(text=spec, mac=given.get("mac"), bridge=given.get("bridge"))


def _words(spec: str) -> Iterator[tuple[str, int]]:
    """Cut at commas; empty words are passed over and leading blanks trimmed, as xl does."""
    at = 0
    for word in spec.split(","):
        trimmed = word.lstrip(" ")
        if trimmed:
            yield trimmed, at + len(word) - len(trimmed)
        at += len(word) + 1


def _check_name(name: str, at: int) -> None:
    try:
        check_domain_name(name)
    except BadPlace as error:
        raise WrongTextError(f"{error.what}: {error.why}", at) from error
