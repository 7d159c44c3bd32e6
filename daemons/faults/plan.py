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
from daemons.registry import Role
from daemons.strict_toml import Table, TomlError

PLAN_BYTES_MAX: Final = 256 * 1024
FAULTS_MAX: Final = 1000
SEED_MAX: Final = 2**63 - 1
NTH_MAX: Final = 2**53
SECONDS_MAX: Final = 24 * 3600.0
PAUSE_MAX_S: Final = 60.0
JUMP_MAX_S: Final = 366 * 24 * 3600.0
SPEED_MAX: Final = 1000.0
LEAST_EVERY_S: Final = 0.01
LAUNCHER: Final = "launcher"
"""What a plan calls the launcher; no domain of this name can be meant."""
EVERY_DOMAIN: Final = ""
"""Whose clock the clock of the whole machine is."""


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
    CLOCK = "clock"


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
    BUSY_CHIP = "busy-chip"
    SEIZED_LOCALITY = "seized-locality"
    JUMP = "jump"
    DRIFT = "drift"


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
    Kind.TIS: (*_MESSAGES, What.BUSY_CHIP, What.SEIZED_LOCALITY),
    Kind.DISK: (What.KILL, What.DELAY, What.IO_ERROR, What.DISK_FULL, What.TORN_WRITE),
    Kind.CLOCK: (What.JUMP, What.STOP, What.DRIFT),
}
"""What can go wrong where."""
ROLES: Final = {
    Kind.RING: {Role.MANAGER.value, Role.VTPM.value},
    Kind.DISK: {Role.MANAGER.value, Role.VTPM.value, Role.HWTPM.value},
    Kind.CLOCK: {Role.MANAGER.value, Role.VTPM.value, Role.HWTPM.value},
}
"""Who has a place of these kinds; processes have all, and TIS is the chip's."""
LASTING: Final = frozenset(
    {What.STOP, What.DELAY, What.BUSY_CHIP, What.SEIZED_LOCALITY, What.DRIFT}
)
"""Faults that last `for_s` seconds."""
AT_ACCESSES: Final = frozenset({What.BUSY_CHIP, What.SEIZED_LOCALITY})
"""Faults that happen at what a driver sends, never at an answer."""


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
        is_alone = self.kind == Kind.TIS.value or self.domain == EVERY_DOMAIN
        return self.kind if is_alone else f"{self.kind} {self.domain}"

    def is_in(self, domain: str) -> bool:
        """Tell whether it is a place of this domain."""
        return self.domain in {domain, EVERY_DOMAIN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of a plan.

    When it happens is one of `nth`, `at_s`, `every_s` (with a probability), `probability` alone.

    Attributes:
        number: Its place in the plan, from 1.
        where: Where it happens.
        what: What happens.
        for_s: How long it lasts, in seconds; 0 for what does not last.
        by_s: How far a clock jumps, in seconds.
        speed: How fast a clock runs that drifts; 1 is right.
        nth: At this message, step or reading, counted from the start of the run.
        probability: For each message, step or reading, or for each time of `every_s`.
        at_s: Once, seconds after the start of the run.
        every_s: Again and again, in seconds.
    """

    number: int
    where: Place
    what: What
    for_s: float = 0.0
    by_s: float = 0.0
    speed: float = 1.0
    nth: int | None = None
    probability: float | None = None
    at_s: float | None = None
    every_s: float | None = None

    @property
    def kind(self) -> Kind:
        """The kind of its place."""
        return Kind(self.where.kind)

    @property
    def is_timed(self) -> bool:
        """Whether the time says when it happens."""
        return self.at_s is not None or self.every_s is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """A whole plan."""

    seed: int
    faults: tuple[Fault, ...]

    def inside(self, domain: str) -> tuple[Fault, ...]:
        """The faults that a daemon makes in itself: at messages, disk steps, looks at its clock."""
        return tuple(f for f in self.hooked if f.where.is_in(domain))

    @property
    def hooked(self) -> tuple[Fault, ...]:
        """The faults that daemons make in themselves."""
        return tuple(fault for fault in self.faults if fault.kind is not Kind.PROCESS)

    @property
    def of_processes(self) -> tuple[Fault, ...]:
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
    where = _place(table.take_text("where"), f"{called}{table.line_of('where')}")
    kind = Kind(where.kind)
    possible = tuple(what.value for what in POSSIBLE[kind])
    word = table.take_text("what")
    if word not in possible:
        raise TomlError(
            f"what = {word[:40]!a} in {called}{table.line_of('what')} is not possible at a "
            f"{kind.value}: "
            f"{', '.join(possible)}"
        )
    what = What(word)
    called += table.line_of("what")
    how = _how(table, what, called)
    when = _timed(table, called) if kind is Kind.PROCESS else _counted_or_timed(table, called)
    table.finish()
    return Fault(number=number, where=where, what=what, **how, **when)  # type: ignore[arg-type]


def _how(table: Table, what: What, called: str) -> dict[str, float]:
    how: dict[str, float] = {}
    if what in LASTING:
        if not table.has("for_s"):
            raise TomlError(f"{called} has no for_s: how many seconds the {what.value} lasts")
        how["for_s"] = table.take_number("for_s", 0.0, 0.001, PAUSE_MAX_S)
    if what is What.JUMP:
        if not table.has("by_s"):
            raise TomlError(
                f"{called} has no by_s: how many seconds the clock jumps, or -by_s back"
            )
        how["by_s"] = table.take_number("by_s", 0.0, -JUMP_MAX_S, JUMP_MAX_S)
    if what is What.DRIFT:
        if not table.has("speed"):
            raise TomlError(f"{called} has no speed: how fast the clock runs; 1 is right")
        how["speed"] = table.take_number("speed", 1.0, 0.0, SPEED_MAX)
    return how


def _place(text: str, called: str) -> Place:
    kind, _, domain = text.partition(" ")
    if text == Kind.TIS.value:
        return Place(kind, CHIP_NAME)
    if text == Kind.CLOCK.value:
        return Place(kind, EVERY_DOMAIN)
    if kind not in {known.value for known in Kind} - {Kind.TIS.value}:
        raise TomlError(
            f'where = {text[:80]!a} in {called} is no place: "process DOMAIN", "process launcher", '
            f'"process hwtpm", "ring DOMAIN", "disk DOMAIN", "disk hwtpm", "tis", '
            f'"clock DOMAIN", "clock hwtpm", "clock"'
        )
    try:
        return Place(kind, check_domain_name(domain.strip()))
    except BadPlace as error:
        raise TomlError(f"where in {called}: {error.what}: {error.why}") from error


def _timed(table: Table, called: str) -> dict[str, float | int | None]:
    if table.has("at_s") == table.has("every_s"):
        raise TomlError(f"{called} needs one of at_s and every_s: when it happens")
    if table.has("at_s"):
        return {"at_s": table.take_number("at_s", 0.0, 0.0, SECONDS_MAX)}
    every_s = table.take_number("every_s", 0.0, LEAST_EVERY_S, SECONDS_MAX)
    return {"every_s": every_s, "probability": table.take_number("probability", 1.0, 0.0, 1.0)}


def _counted_or_timed(table: Table, called: str) -> dict[str, float | int | None]:
    if table.has("at_s") or table.has("every_s"):
        return _timed(table, called)
    if table.has("nth") == table.has("probability"):
        raise TomlError(
            f"{called} needs one of nth, probability, at_s and every_s: which message or step it is"
        )
    if table.has("nth"):
        return {"nth": table.take_integer("nth", 1, 1, NTH_MAX)}
    return {"probability": table.take_number("probability", 0.0, 0.0, 1.0)}
