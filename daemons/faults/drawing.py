"""Draw a fault plan: faults at places and moments that nobody has thought of. Pure.

The same seed gives the same plan for the same domains. What a plan may cost is chosen before: a
program that has to see nothing but a pause is told so by `pause`, one that has to stand TPM_IOERROR
by `error`. `anything` has also what the sockets of this system never do by themselves.

Rare at places with many operations, and short: a stack that is never whole shows nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Final

from daemons.faults.cost import Cost
from daemons.faults.plan import LAUNCHER, POSSIBLE, ROLES, Kind, What
from daemons.places import CHIP_NAME
from daemons.registry import Role

FAULTS_MAX: Final = 6
"""In one plan; what happens together is understood no longer when there are more."""

_ERRORS: Final = frozenset({What.IO_ERROR, What.DISK_FULL})
_ODD: Final = frozenset({What.DROP, What.DUPLICATE, What.CORRUPT, What.LOST_RESPONSE})
_NOT_DRAWN: Final[Mapping[Cost, frozenset[What]]] = {
    Cost.PAUSE: _ERRORS | _ODD,
    Cost.ERROR: _ODD,
    Cost.ANYTHING: frozenset(),
}
_PROBABILITIES: Final[Mapping[Kind, tuple[float, float]]] = {
    Kind.RING: (0.005, 0.05),
    Kind.TIS: (0.0002, 0.002),
    Kind.DISK: (0.005, 0.05),
    Kind.CLOCK: (0.01, 0.1),
}
"""For each operation; a command of the chip has many."""
_LATEST_NTH: Final[Mapping[Kind, int]] = {
    Kind.RING: 80,
    Kind.TIS: 2000,
    Kind.DISK: 80,
    Kind.CLOCK: 40,
}
_LENGTHS_S: Final[Mapping[What, tuple[float, float]]] = {
    What.STOP: (0.05, 1.5),
    What.DELAY: (0.005, 0.5),
    What.BUSY_CHIP: (0.02, 3.0),
    What.SEIZED_LOCALITY: (0.01, 0.5),
    What.DRIFT: (0.5, 5.0),
}
_JUMPS_S: Final = (-86400, -3600, -1, 1, 60, 3600, 86400)
_SPEEDS: Final = (0.0, 0.1, 2.0, 50.0, 1000.0)
_LATEST_S: Final = 5.0
_EVERY_S: Final = (0.5, 3.0)


def draw_plan(seed: int, cost: Cost, roles: Mapping[str, str]) -> str:
    """Draw a plan.

    Args:
        seed: What it is drawn from, and its own seed.
        cost: What it may cost a program.
        roles: The role of each domain, the chip and the launcher. No guest is killed or stopped:
            that is the program's own machine.

    Returns:
        The plan, in TOML.
    """
    chance = random.Random(seed)  # noqa: S311 - no secret
    places = _places(roles)
    tables = []
    for _ in range(chance.randint(1, FAULTS_MAX)):
        kind, where = chance.choice(places)
        what = chance.choice([w for w in POSSIBLE[kind] if w not in _NOT_DRAWN[cost]])
        how = _how(chance, what)
        when = _timed(chance) if kind is Kind.PROCESS else _counted_or_timed(chance, kind)
        said = {"where": f'"{where}"', "what": f'"{what.value}"', **how, **when}
        tables.append("\n[[fault]]\n" + "".join(f"{key} = {said[key]}\n" for key in said))
    head = f"# vtpm fault draw --seed {seed} --costs {cost.value}\nseed = {seed}\n"
    return head + "".join(tables)


def _places(roles: Mapping[str, str]) -> list[tuple[Kind, str]]:
    """Where there can be faults, each kind of place as often as there are such places."""
    found = [(Kind.PROCESS, LAUNCHER)]
    for name, role in sorted(roles.items()):
        if role not in {Role.GUEST.value, Role.DOMAIN0.value}:
            found.append((Kind.PROCESS, name))
            found += [(kind, name) for kind in ROLES if role in ROLES[kind]]
    named = [(kind, f"{kind.value} {name}") for kind, name in found]
    return [*named, (Kind.TIS, Kind.TIS.value)] if CHIP_NAME in roles else named


def _how(chance: random.Random, what: What) -> dict[str, float]:
    how: dict[str, float] = {}
    if what in _LENGTHS_S:
        how["for_s"] = _between(chance, *_LENGTHS_S[what])
    if what is What.JUMP:
        how["by_s"] = chance.choice(_JUMPS_S)
    if what is What.DRIFT:
        how["speed"] = chance.choice(_SPEEDS)
    return how


def _timed(chance: random.Random) -> dict[str, float]:
    if chance.random() < 0.5:
        return {"at_s": _between(chance, 0.0, _LATEST_S)}
    return {"every_s": _between(chance, *_EVERY_S), "probability": _between(chance, 0.3, 1.0)}


def _counted_or_timed(chance: random.Random, kind: Kind) -> dict[str, float]:
    match chance.randrange(3):
        case 0:
            return _timed(chance)
        case 1:
            return {"nth": chance.randint(1, _LATEST_NTH[kind])}
        case _:
            return {"probability": _between(chance, *_PROBABILITIES[kind])}


def _between(chance: random.Random, least: float, most: float) -> float:
    return round(chance.uniform(least, most), 4)
