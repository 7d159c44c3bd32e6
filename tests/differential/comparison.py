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
    bent_scenarios,
    change_scenarios,
    counter_scenarios,
    daa_scenarios,
    engine_tests,
    fips_scenarios,
    firmware_scenarios,
    nv_scenarios,
    order_scenarios,
    owner_scenarios,
    refusal_scenarios,
    session_scenarios,
    state_scenarios,
    storage_scenarios,
)
from tests.differential.deviations import deviation_for
from tests.differential.other_tpm import OtherTpmEndedError
from tests.differential.sides import Difference, Seen, differences, ours, theirs
from tests.tpm12.witness import number
from tpm12.commands import ALL

EXECUTE = 0xE7
"""TPM_ExecuteTransport."""
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
    bent_scenarios,
    change_scenarios,
    refusal_scenarios,
    firmware_scenarios,
    fips_scenarios,
    order_scenarios,
    bent_scenarios,
)
SCENARIOS = {name: entry for module in MODULES for name, entry in module.SCENARIOS.items()}
NAMES = (*SCENARIOS, *engine_tests.chosen())
"""Of all scenarios: those written as such, and the engine's own tests."""


@dataclass
class Comparison:
    """One scenario's outcome.

    Attributes:
        agreed: What our side saw that swtpm's saw too.
        unnamed: Differences that no deviation covers.
        named: Differences by the name of their deviation.
        stopped: Why a side's script did not reach its end, or None.
    """

    scenario: str
    agreed: list[Seen] = field(default_factory=list)
    unnamed: list[Difference] = field(default_factory=list)
    named: dict[str, list[Difference]] = field(default_factory=dict)
    stopped: str | None = None

    def record(self):
        """What to keep: by ordinal the codes that both gave, and how each deviation showed."""
        codes: dict[str, set[str]] = {}
        for seen in self.agreed:
            for ordinal, code in ((seen.ordinal, seen.code), *_wrapped(seen)):
                codes.setdefault(f"0x{ordinal:08X}", set()).add(code_name(code))
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

    def add(self, mine: list[Seen], other: list[Seen]):
        """Add what both saw of the same requests."""
        found = differences(mine, other)
        named_before = False
        for each in found:
            deviation = deviation_for(self.scenario, each.step)
            is_answer = _same(each)
            if deviation and is_answer:
                self.named.setdefault(deviation.name, []).append(each)
                named_before = True
            elif is_answer or not named_before:  # after two answers two scripts go their own ways
                self.unnamed.append(each)
        differing = {each.at for each in found}
        together = min(len(mine), len(other), *[each.at + 1 for each in found if not _same(each)])
        self.agreed += [seen for at, seen in enumerate(mine[:together]) if at not in differing]


def _wrapped(seen):
    """Ordinal and code of what went through a transport session."""
    if seen.ordinal == EXECUTE and seen.code == 0:
        yield number(seen.request[20:24]), number(seen.response[32:36])


def _same(difference):
    """Was at least the same asked?"""
    mine, other = difference.mine, difference.other
    return mine and other and mine.ordinal == other.ordinal


def code_name(code):
    """A return code by its name."""
    if code is None:
        return "process ended"
    return ReturnCode(code).name if code in set(ReturnCode) else f"0x{code:x}"


def compared(name, commands=ALL):
    """Run one scenario on both."""
    if name in engine_tests.chosen():
        return _compared_tests(name)
    start, script, *arguments = SCENARIOS[name]
    mine = ours(start, commands)
    stopped = _run(script, mine, arguments)
    with theirs(start) as other:
        other_stopped = _run(script, other, arguments)
    comparison = Comparison(name, stopped=stopped or other_stopped)
    comparison.add(mine.seen, other.seen)
    return comparison


def _compared_tests(name):
    mine, other = (engine_tests.seen_of_all(is_on_swtpm=which) for which in (False, True))
    comparison = Comparison(name)
    for test in engine_tests.chosen()[name]:
        comparison.add(mine[test], other[test])
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
    names = [name for name in arguments if not name.startswith("--")] or list(NAMES)
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
        kept = {name: kept[name] for name in NAMES if name in kept}
        AGREED.write_text(json.dumps(kept, indent=1) + "\n")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
