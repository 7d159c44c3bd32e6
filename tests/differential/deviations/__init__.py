"""Where libtpms and we differ on purpose: what each does, and the paragraph that decides.

A difference in a scenario is covered by the deviation whose `steps` match its name ("scenario:
step", shell patterns) and whose `ordinals` (when given) have its ordinal. What differs without
being named here fails the differential test, and so does a step that is named and does not differ.

One module a chapter, or a few that belong together.
"""

from tests.differential.deviations import (
    administration,
    contexts,
    cryptography,
    former,
    migration,
    nv,
    sessions,
    storage,
    transport,
)
from tests.differential.deviations.deviation import Deviation

_MODULES = (
    administration,
    storage,
    migration,
    cryptography,
    sessions,
    nv,
    contexts,
    transport,
    former,
)
DEVIATIONS: tuple[Deviation, ...] = tuple(
    deviation for module in _MODULES for deviation in module.DEVIATIONS
)


def deviation_for(scenario: str, step: str) -> Deviation | None:
    """The one that covers a difference."""
    return next((each for each in DEVIATIONS if each.covers(scenario, step)), None)


def is_explained(request: bytes, mine: bytes, other: bytes) -> bool:
    """Whether a deviation is all that two responses to one request differ by."""
    return any(each.explains and each.explains(request, mine, other) for each in DEVIATIONS)
