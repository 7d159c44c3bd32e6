"""Run scenarios on both TPMs; what came of it, and how that is kept.

python -m tests.differential.comparison            run all, say what differs
python -m tests.differential.comparison --record   and keep the outcome in agreed.json
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

from protocol.return_codes import ReturnCode
from tests.differential import (
    attestation_scenarios,
    counter_scenarios,
    daa_scenarios,
    nv_scenarios,
    owner_scenarios,
    session_scenarios,
    state_scenarios,
    storage_scenarios,
)
from tests.differential.deviations import deviation_for
from tests.differential.other_tpm import OtherTpmEndedError
from tests.differential.sides import Difference, Seen, differences, ours, theirs
from tpm12.commands import ALL

AGREED = Path(__file__).parent / "agreed.json"
MODULES = (
    storage_scenarios,
    nv_scenarios,
    counter_scenarios,
    daa_scenarios,
    state_scenarios,
    owner_scenarios,
    session_scenarios,
    attestation_scenarios,
)
SCENARIOS = {name: entry for module in MODULES for name, entry in module.SCENARIOS.items()}


@dataclass
class Comparison:
    """One scenario's outcome.

    Attributes:
        seen: What our side saw.
        unnamed: Differences that no deviation covers.
        named: Differences by the name of their deviation.
        stopped: Why a side's script did not reach its end, or None.
    """

    scenario: str
    seen: list[Seen]
    unnamed: list[Difference] = field(default_factory=list)
    named: dict[str, list[Difference]] = field(default_factory=dict)
    stopped: str | None = None

    def record(self):
        """What to keep: by ordinal the codes that both gave, and how each deviation showed."""
        differing = {each.at for many in self.named.values() for each in many}
        codes: dict[str, set[str]] = {}
        for at, seen in enumerate(self.seen):
            if at not in differing:
                codes.setdefault(f"0x{seen.ordinal:08X}", set()).add(code_name(seen.code))
        return {
            "agreed": {ordinal: sorted(codes[ordinal]) for ordinal in sorted(codes)},
            "deviating": {
                name: sorted(
                    {
                        f"0x{each.ordinal:08X} {each.step}: "
                        f"{code_name(each.mine.code)}, libtpms {code_name(each.other.code)}"
                        for each in many
                    }
                )
                for name, many in sorted(self.named.items())
            },
        }


def code_name(code):
    """A return code by its name."""
    if code is None:
        return "process ended"
    return ReturnCode(code).name if code in set(ReturnCode) else f"0x{code:x}"


def compared(name, commands=ALL):
    """Run one scenario on both."""
    start, script, *arguments = SCENARIOS[name]
    mine = ours(start, commands)
    stopped = _run(script, mine, arguments)
    with theirs(start) as other:
        other_stopped = _run(script, other, arguments)
    comparison = Comparison(name, mine.seen, stopped=stopped or other_stopped)
    for each in differences(mine.seen, other.seen):
        deviation = deviation_for(name, each.step)
        if deviation is None or each.mine is None or each.other is None:
            comparison.unnamed.append(each)
        else:
            comparison.named.setdefault(deviation.name, []).append(each)
    return comparison


def _run(script, side, arguments):
    try:
        script(side, *arguments)
    except (AssertionError, OtherTpmEndedError) as error:
        return f"{type(side).__name__}: {error!r} after step {side.seen[-1].step!r}"
    finally:
        side.note("")
    return None


def recorded():
    """The outcomes as they are kept."""
    return json.loads(AGREED.read_text())


def main(arguments):
    """Run what is named (all, if nothing is); 1 if anything differs unnamed."""
    names = [name for name in arguments if not name.startswith("--")] or list(SCENARIOS)
    kept = recorded() if AGREED.exists() else {}
    bad = False
    for name in names:
        comparison = compared(name)
        for each in comparison.unnamed:
            print(f"{name}: {each}")  # noqa: T201 - a program for people
        if comparison.stopped:
            print(f"{name}: {comparison.stopped}")  # noqa: T201 - a program for people
        bad = bad or bool(comparison.unnamed or comparison.stopped)
        kept[name] = comparison.record()
    if "--record" in arguments:
        kept = {name: kept[name] for name in SCENARIOS if name in kept}
        AGREED.write_text(json.dumps(kept, indent=1) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
