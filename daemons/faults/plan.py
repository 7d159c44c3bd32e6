"""What a fault plan may say: where, when and what. Pure.

A plan is TOML: `seed = N` and tables `[[fault]]`. A key, a place or a fault that is not known is an
error, so that no plan does less than its reader believes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.places import CHIP_NAME, BadPlace, check_domain_name
from daemons.strict_toml import Table, TomlError

PLAN_BYTES_MAX: Final = 256 * 1024
FAULTS_MAX: Final = 1000
SEED_MAX: Final = 2**63 - 1
NTH_MAX: Final = 2**53
SECONDS_MAX: Final = 24 * 3600.0
PAUSE_MAX_S: Final = 60.0
LEAST_EVERY_S: Final = 0.01
LAUNCHER: Final = "launcher"
"""What a plan calls the launcher; no domain of this name can be meant."""


class PlanError(Failure):
    """A fault plan says something that is not understood; nothing of it was done."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(
            f"the fault plan {name} is refused",
            why=why,
            next_step="docs/faults.md tells what a plan may say",
            exit_code=ExitCode.CONFIGURATION,
        )


class Kind(Enum):
    """The kinds of places."""

    PROCESS = "process"
    RING = "ring"
    TIS = "tis"
    DISK = "disk"


class What(Enum):
    """The faults."""

    KILL = "kill"
    STOP = "stop"
    DELAY = "delay"
    DROP = "drop"
    DUPLICATE = "duplicate"
    CORRUPT = "corrupt"
    LOST_RESPONSE = "lost-response"
    IO_ERROR = "io-error"
    DISK_FULL = "disk-full"
    TORN_WRITE = "torn-write"


_MESSAGES: Final = (
    What.KILL,
    What.DELAY,
    What.DROP,
    What.DUPLICATE,
    What.CORRUPT,
    What.LOST_RESPONSE,
)
POSSIBLE: Final[Mapping[Kind, tuple[What, ...]]] = {
    Kind.PROCESS: (What.KILL, What.STOP),
    Kind.RING: _MESSAGES,
    Kind.TIS: _MESSAGES,
    Kind.DISK: (What.KILL, What.DELAY, What.IO_ERROR, What.DISK_FULL, What.TORN_WRITE),
}
"""What can go wrong where."""
LASTING: Final = frozenset({What.STOP, What.DELAY})
"""Faults that last `for_s` seconds."""


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a fault happens.

    Attributes:
        kind: Its kind, by the plan's word.
        domain: Whose process, ring or disk it is.
    """

    kind: str
    domain: str

    def __str__(self) -> str:
        return self.kind if self.kind == Kind.TIS.value else f"{self.kind} {self.domain}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a plan. Of the four kinds of when, exactly one is given.

    Attributes:
        number: Its place in the plan, from 1.
        where: Where it happens.
        what: What happens.
        for_s: How long it lasts, in seconds; 0 for what does not last.
        nth: At this message or step, counted from the start of the run.
        probability: For each message or step, or for each time of `every_s`.
        at_s: Once, seconds after the start of the run.
        every_s: Again and again, in seconds.
    """

    number: int
    where: Place
    what: What
    for_s: float = 0.0
    nth: int | None = None
    probability: float | None = None
    at_s: float | None = None
    every_s: float | None = None

    @property
    def kind(self) -> Kind:
        """The kind of its place."""
        return Kind(self.where.kind)


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """A whole plan."""

    seed: int
    faults: tuple[Fault, ...]

    def inside(self, domain: str) -> tuple[Fault, ...]:
        """The faults that a daemon makes in itself, at its messages and disk steps."""
        return tuple(f for f in self.hooked if f.where.domain == domain)

    @property
    def hooked(self) -> tuple[Fault, ...]:
        """The faults that daemons make in themselves."""
        return tuple(fault for fault in self.faults if fault.kind is not Kind.PROCESS)

    @property
    def timed(self) -> tuple[Fault, ...]:
        """The faults that are done to processes from outside."""
        return tuple(fault for fault in self.faults if fault.kind is Kind.PROCESS)


def parse_plan(content: bytes, name: str) -> FaultPlan:
    """Read a plan.

    Args:
        content: The file.
        name: What messages call it.

    Raises:
        PlanError: It says something that is not understood; line or table number is named.
    """
    if len(content) > PLAN_BYTES_MAX:
        raise PlanError(name, f"it has more than {PLAN_BYTES_MAX} bytes")
    try:
        table = Table.parse(content)
        seed = table.take_integer("seed", 0, 0, SEED_MAX)
        entries = table.take_tables("fault", FAULTS_MAX)
        table.finish()
        faults = tuple(_fault(entry, number) for number, entry in enumerate(entries, start=1))
    except TomlError as error:
        raise PlanError(name, str(error)) from error
    return FaultPlan(seed=seed, faults=faults)


def _fault(table: Table, number: int) -> Fault:
    called = f"[[fault]] number {number}"
    where = _place(table.take_text("where"), called)
    kind = Kind(where.kind)
    possible = tuple(what.value for what in POSSIBLE[kind])
    word = table.take_text("what")
    if word not in possible:
        raise TomlError(
            f"what = {word[:40]!a} in {called} is not possible at a {kind.value}: "
            f"{', '.join(possible)}"
        )
    what = What(word)
    for_s = 0.0
    if what in LASTING:
        if not table.has("for_s"):
            raise TomlError(f"{called} has no for_s: how many seconds the {word} lasts")
        for_s = table.take_number("for_s", 0.0, 0.001, PAUSE_MAX_S)
    when = _timed(table, called) if kind is Kind.PROCESS else _counted(table, called)
    table.finish()
    return Fault(number=number, where=where, what=what, for_s=for_s, **when)  # type: ignore[arg-type]


def _place(text: str, called: str) -> Place:
    kind, _, domain = text.partition(" ")
    if text == Kind.TIS.value:
        return Place(kind, CHIP_NAME)
    if kind not in {Kind.PROCESS.value, Kind.RING.value, Kind.DISK.value}:
        raise TomlError(
            f'where = {text[:80]!a} in {called} is no place: "process DOMAIN", "process launcher", '
            f'"process hwtpm", "ring DOMAIN", "disk DOMAIN", "disk hwtpm", "tis"'
        )
    try:
        return Place(kind, check_domain_name(domain.strip()))
    except BadPlace as error:
        raise TomlError(f"where in {called}: {error.what}: {error.why}") from error


def _timed(table: Table, called: str) -> dict[str, float | int | None]:
    if table.has("at_s") == table.has("every_s"):
        raise TomlError(f"{called} needs one of at_s and every_s: when a process meets its fault")
    if table.has("at_s"):
        return {"at_s": table.take_number("at_s", 0.0, 0.0, SECONDS_MAX)}
    every_s = table.take_number("every_s", 0.0, LEAST_EVERY_S, SECONDS_MAX)
    return {"every_s": every_s, "probability": table.take_number("probability", 1.0, 0.0, 1.0)}


def _counted(table: Table, called: str) -> dict[str, float | int | None]:
    if table.has("nth") == table.has("probability"):
        raise TomlError(f"{called} needs one of nth and probability: which message or step it is")
    if table.has("nth"):
        return {"nth": table.take_integer("nth", 1, 1, NTH_MAX)}
    return {"probability": table.take_number("probability", 0.0, 0.0, 1.0)}
