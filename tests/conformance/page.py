"""Writes docs/conformance.md.

python -m tests.conformance.page > docs/conformance.md      (or: make conformance)
"""

import re
import sys
from pathlib import Path

from tests.conformance.ordinals import OUTSIDE, REFUSAL, REFUSED, rows
from tests.differential.codes import WHOLE_COMMANDS, coverage
from tests.differential.deviations import DEVIATIONS

_TEMPLATE = Path(__file__).parent / "page.md.in"


def page():
    """The whole page."""
    found = rows()
    covered = coverage()
    counts = {
        part: sum(len(getattr(each, part)) for each in covered.values())
        for part in ("agreed", "deviating", "only_ours")
    }
    refusals = [f"| TPM_{name} | TPM_{REFUSAL} | {why} |\n" for name, why in REFUSED.items()]
    refusals += [f"| TPM_{name} | its own | {why} |\n" for name, why in OUTSIDE.items()]
    return _TEMPLATE.read_text().format(
        done_count=sum(row.is_done for row in found),
        refused_count=len(REFUSED),
        outside_count=len(OUTSIDE),
        refusal=REFUSAL,
        reached_count=sum(counts.values()),
        reached_commands=len(covered),
        **{f"{part}_count": count for part, count in counts.items()},
        only_ours="".join(_only_ours(covered)),
        ordinals="".join(_ordinal(row, covered.get(row.name)) for row in found),
        refusals="".join(refusals),
        deviations="".join(map(_deviation, DEVIATIONS)),
    )


def _only_ours(covered):
    for name, each in covered.items():
        by_reason = {}
        for code, reason in each.only_ours.items():
            by_reason.setdefault(reason, []).append(code)
        for reason, codes in by_reason.items():
            told = "all" if name in WHOLE_COMMANDS else ", ".join(codes)
            yield f"| {name} | {told} | {reason} |\n"


def _ordinal(row, covered):
    state = "done, deviating" if row.deviations else "done"
    if not row.is_done:
        state = "of the vTPM" if row.name in OUTSIDE else "refused"
    section = row.section if row.section == "Xen" else f"§{row.section}"
    same = ", ".join(row.agreed) or "-"
    compared = "-"
    if covered:
        seen = len(covered.agreed) + len(covered.deviating)
        compared = f"{seen} of {seen + len(covered.only_ours)}"
    name = f"TPM_{row.name}"
    cells = (f"0x{row.ordinal:08X}", name, section, state, str(row.tests), compared, same)
    return "| " + " | ".join(cells).replace("TPM_TSC_", "TSC_") + " |\n"


def _deviation(deviation):
    seen_in = f"`{deviation.test}`" if deviation.test else _scenarios(deviation)
    commands = ", ".join(deviation.commands)
    cells = (
        deviation.name,
        commands,
        deviation.libtpms,
        deviation.ours,
        deviation.section,
        seen_in,
    )
    return "| " + " | ".join(cells) + " |\n"


def _scenarios(deviation):
    names = {re.split(r": ", step)[0].replace("*", "states") for step in deviation.steps}
    return ", ".join(sorted(names))


def main():
    sys.stdout.write(page())


if __name__ == "__main__":
    main()
