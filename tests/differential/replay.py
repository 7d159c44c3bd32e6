"""Play a script on this engine and on swtpm, and show where they part.

    python -m tests.differential.replay FILE         both; exit status 1 if they differ
    python -m tests.differential.replay FILE --ours  this engine alone

The language of the file is described in `script.py`; a failed test of generated sequences prints
one.
"""

import shutil
import sys
from pathlib import Path

from tests.differential.deviations import is_explained
from tests.differential.script import Player
from tests.differential.sides import Difference, differences, ours, theirs
from tpm12.commands import ALL


def start_of(lines):
    """Where a script begins."""
    words = lines[0].split() if lines else []
    return words[1] if words[:1] == ["start"] else "owned"


def play(side, lines):
    """All lines on one side; what was seen."""
    player = Player(side)
    for line in lines:
        player.play(line)
    return side.seen


def played(lines, commands=ALL) -> list[Difference]:
    """Play on both; where they differ."""
    mine = play(ours(start_of(lines), commands), lines)
    with theirs(start_of(lines)) as other:
        return unexplained(mine, play(other, lines))


def unexplained(mine, other) -> list[Difference]:
    """Where two plays of a script differ, but for what a named deviation says."""
    return [
        each
        for each in differences(mine, other)
        if each.mine is None
        or each.other is None
        or not is_explained(each.mine.request, each.mine.response, each.other.response)
    ]


def shortened(lines, is_bad):
    """Leave out as many lines as can be, while the rest is bad all the same."""
    step = len(lines) // 2
    while step:
        at = 1  # the first line says where to start
        while at < len(lines):
            fewer = lines[:at] + lines[at + step :]
            if is_bad(fewer):
                lines = fewer
            else:
                at += step
        step //= 2
    return lines


def main(arguments):
    """Show every exchange by its line, and each difference in full."""
    path = next(word for word in arguments if not word.startswith("--"))
    lines = Path(path).read_text().splitlines()
    mine = play(ours(start_of(lines)), lines)
    for seen in mine:
        _say(f"{seen.step:40} {seen.ordinal:8x}  {seen.shown}")
    if "--ours" in arguments:
        return 0
    if not shutil.which("swtpm"):
        _say("swtpm is not installed: nothing to compare with (apt-get install swtpm)")
        return 1
    found = played(lines)
    _say("\n".join(map(str, found)) or "both answer the same")
    return int(bool(found))


def _say(text):
    print(text)  # noqa: T201 - a program for people


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
