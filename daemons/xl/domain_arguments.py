"""The words of `extra=`: what a domain's program is told at its start. Pure.

Sources: stubdom/vtpmmgr/init.c and stubdom/vtpm/vtpm.c as documented in vtpmmgr and vtpm man pages.
Where Xen ignores an option of the manager that it does not know, or reads a range as its first
number, we refuse and read the range: an option that silently does nothing is a hole.

Every function raises WrongTextError with the index of the offending word and nothing else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from daemons.policy import LocalityRule
from daemons.xl.device_specs import LOCALITIES
from daemons.xl.xl_config import WrongTextError

TIS_BASE: Final = 0xFED40000
PCR_COUNT: Final = 24
LOCALITY_RULES_MAX: Final = 16
WELL_KNOWN_AUTH: Final = bytes(20)


class TpmDriver(StrEnum):
    """How the manager reaches its TPM."""

    TPM_TIS = "tpm_tis"
    TPMFRONT = "tpmfront"
    """Another vTPM instead of the chip: for tests."""


class LogLevel(StrEnum):
    """How much a vTPM logs."""

    ERROR = "error"
    INFO = "info"
    DEBUG = "debug"


class StartupType(StrEnum):
    """Which TPM_Startup a vTPM does on itself."""

    CLEAR = "clear"
    SAVE = "save"
    DEACTIVATED = "deactivated"


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerArguments:
    """Arguments of vtpmmgr-stubdom."""

    owner_auth: bytes = field(default=WELL_KNOWN_AUTH, repr=False)
    """20 bytes."""
    srk_auth: bytes = field(default=WELL_KNOWN_AUTH, repr=False)
    """20 bytes."""
    tpm_driver: TpmDriver = TpmDriver.TPM_TIS
    tpm_iomem: int = TIS_BASE
    """Physical address of the TIS registers."""
    tpm_irq: int | None = 0
    """0: polling; None: to be probed."""
    tpm_locality: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmArguments:
    """Arguments of vtpm-stubdom."""

    loglevel: LogLevel = LogLevel.INFO
    startup: StartupType = StartupType.CLEAR
    has_maintenance_commands: bool = False
    hardware_init_pcrs: frozenset[int] = frozenset()
    """PCRs copied from the hardware TPM at start."""
    locality_rules: tuple[LocalityRule, ...] = ()
    unknown: tuple[str, ...] = ()
    """Words that no version of vtpm-stubdom knows; Xen logs and ignores them, and so do we."""


def parse_manager_arguments(extra: str) -> ManagerArguments:
    """Read the manager's arguments.

    Raises:
        WrongTextError: an option that the manager does not know, does not have here, or that is
            malformed or given twice.
    """
    given: dict[str, object] = {}
    for word, at in _words(extra):
        key, _, value = word.partition("=")
        reader = _MANAGER_OPTIONS.get(key)
        if reader is None:
            raise WrongTextError(f"the manager has no option {word[:40]!a}", at)
        name, read = reader
        if name in given:
            raise WrongTextError(f"{key}= is given twice", at)
        given[name] = read(value, at)
    return ManagerArguments(**given)  # type: ignore[arg-type]


def parse_vtpm_arguments(extra: str) -> VtpmArguments:
    """Read a vTPM's arguments.

    Raises:
        WrongTextError: a known option is malformed.
    """
    given: dict[str, object] = {}
    rules: list[LocalityRule] = []
    unknown: list[str] = []
    for word, at in _words(extra):
        key, equals, value = word.partition("=")
        if word in set(StartupType):
            given["startup"] = StartupType(word)
        elif key == "loglevel" and equals:
            if value not in set(LogLevel):
                raise WrongTextError(f"{value[:40]!a} is none of error, info, debug", at)
            given["loglevel"] = LogLevel(value)
        elif key == "maintcmds" and equals:
            given["has_maintenance_commands"] = _bit(value, at)
        elif key in {"hwinitpcr", "hwinitpcrs"} and equals:  # the man page has the second spelling
            given["hardware_init_pcrs"] = _pcr_set(value, at + len(key) + 1)
        elif key == "locality" and equals:
            rules.append(_locality_rule(value, at))
        else:
            unknown.append(word)
    if len(rules) > LOCALITY_RULES_MAX:
        raise WrongTextError(f"there are more than {LOCALITY_RULES_MAX} locality= rules")
    return VtpmArguments(
        locality_rules=tuple(rules),
        unknown=tuple(unknown),
        **given,  # type: ignore[arg-type]
    )


def _words(extra: str) -> Iterator[tuple[str, int]]:
    for found in re.finditer(r"\S+", extra):
        yield found[0], found.start()


def _auth(value: str, at: int) -> bytes:
    # The value is a secret: no message repeats it.
    if value == "well-known":
        return WELL_KNOWN_AUTH
    kind, _, rest = value.partition(":")
    if kind == "hash" and re.fullmatch(r"[0-9a-fA-F]{40}", rest):
        return bytes.fromhex(rest)
    if kind == "text":
        # The TPM's authorisation values are SHA-1 of a pass phrase by definition.
        return hashlib.sha1(rest.encode(), usedforsecurity=False).digest()
    raise WrongTextError("it is none of well-known, hash:<40 hex digits>, text:<pass phrase>", at)


def _driver(value: str, at: int) -> TpmDriver:
    if value not in set(TpmDriver):
        raise WrongTextError(f"{value[:40]!a} is neither tpm_tis nor tpmfront", at)
    return TpmDriver(value)


def _iomem(value: str, at: int) -> int:
    if not re.fullmatch(r"0x[0-9a-fA-F]{1,16}", value):
        raise WrongTextError(f"{value[:40]!a} is not an address such as 0xfed40000", at)
    address = int(value, 16)
    if address != TIS_BASE:
        raise WrongTextError(f"no TPM is at {value}; this platform's is at {TIS_BASE:#x}", at)
    return address


def _irq(value: str, at: int) -> int | None:
    if value == "probe":
        return None
    if not re.fullmatch(r"[0-9]{1,3}", value) or int(value) > 255:
        raise WrongTextError(f"{value[:40]!a} is neither an interrupt number nor probe", at)
    return int(value)


def _locality(value: str, at: int) -> int:
    if value not in {str(locality) for locality in LOCALITIES}:
        raise WrongTextError(f"{value[:40]!a} is not a locality (0 to 4)", at)
    return int(value)


def _tpm2(value: str, at: int) -> object:
    raise WrongTextError(
        f"{value[:40]!a}: tpm2= and srk_handle= are for a TPM 2.0; the chip here is a TPM 1.2",
        at,
    )


_MANAGER_OPTIONS: Final = {
    "owner_auth": ("owner_auth", _auth),
    "srk_auth": ("srk_auth", _auth),
    "tpmdriver": ("tpm_driver", _driver),
    "tpmiomem": ("tpm_iomem", _iomem),
    "tpmirq": ("tpm_irq", _irq),
    "tpmlocality": ("tpm_locality", _locality),
    "tpm2": ("tpm2", _tpm2),
    "srk_handle": ("srk_handle", _tpm2),
}


def _bit(value: str, at: int) -> bool:
    if value not in {"0", "1"}:
        raise WrongTextError(f"{value[:40]!a} is neither 0 nor 1", at)
    return value == "1"


def _pcr_set(text: str, at: int) -> frozenset[int]:
    """Read a comma list of all, none, N and X-Y, left to right."""
    chosen: set[int] = set()
    for part in text.split(","):
        found = re.fullmatch(r"([0-9]{1,2})(?:-([0-9]{1,2}))?", part)
        if part == "all":
            chosen.update(range(PCR_COUNT))
        elif part == "none":
            chosen.clear()
        elif found is not None:
            first = int(found[1])
            last = int(found[2] or first)
            if not first <= last < PCR_COUNT:
                raise WrongTextError(f"{part} is not a range of PCRs from 0 to {PCR_COUNT - 1}", at)
            chosen.update(range(first, last + 1))
        else:
            raise WrongTextError(f"{part[:40]!a} is none of all, none, N and X-Y", at)
        at += len(part) + 1
    return frozenset(chosen)


def _locality_rule(text: str, at: int) -> LocalityRule:
    """Read LABEL=N,N...; a label has no equals sign in it."""
    pattern, equals, numbers = text.partition("=")
    if not equals or not pattern or pattern == "*":
        raise WrongTextError(
            "a locality rule is locality=LABEL=N,N... or locality=*SUFFIX=N,N...", at
        )
    return LocalityRule(pattern, frozenset(_locality(part, at) for part in numbers.split(",")))
