"""docs/conformance.md is what the code says, and every ordinal has its place in it."""

import re
from pathlib import Path

import pytest

from protocol.return_codes import ReturnCode
from tests.conformance.ordinals import OUTSIDE, REFUSED, missing_from_the_engine, rows
from tests.conformance.page import page
from tests.differential.deviations import DEVIATIONS
from tests.differential.sides import ours
from tests.tpm12.witness import COMMAND, frame, u32

PAGE = Path(__file__).parents[1] / "docs" / "conformance.md"
_ROW = re.compile(r"^(\| 0x\w{8} \| \w+ \| [^|]+ \| [^|]+ \|) (\d+) (\|.*)$", re.MULTILINE)
HOW = "docs/conformance.md is not up to date: run `make conformance` and look at what changed"


def parts(text):
    """The page without the numbers of tests, and these."""
    counts = [int(count) for _, count, _ in _ROW.findall(text)]
    return _ROW.sub(r"\1 n \3", text), counts


def test_page_is_what_the_code_says():
    told, told_counts = parts(PAGE.read_text())
    made, counts = parts(page())
    assert told.splitlines() == made.splitlines(), HOW
    assert len(counts) == len(rows())
    # A test more must not make the page wrong; one less that the page boasts of does.
    boasts = [
        row.name
        for row, many, is_many in zip(rows(), told_counts, counts, strict=True)
        if many > is_many
    ]
    assert not boasts, f"{HOW}: fewer tests than it says of {', '.join(boasts)}"


def test_what_the_engine_lacks_is_declared_and_nothing_else():
    assert missing_from_the_engine() == REFUSED.keys() | OUTSIDE.keys()


@pytest.mark.parametrize(
    "row", [row for row in rows() if row.name in REFUSED], ids=lambda row: row.name
)
@pytest.mark.parametrize("count", range(3))
def test_refused_ordinals_are_bad_ordinal_and_capabilities_say_so(row, count):
    tpm = ours("owned").tpm
    request = frame(row.ordinal, bytes(45 * count), COMMAND + count)
    assert tpm.raw(request).code == ReturnCode.BAD_ORDINAL
    assert tpm.capability(1, u32(row.ordinal)) == b"\0"


@pytest.mark.parametrize("row", [row for row in rows() if row.is_done], ids=lambda row: row.name)
def test_every_command_has_tests(row):
    assert row.tests > 0


def test_deviations_are_of_commands_that_are_there():
    names = {row.name for row in rows()}
    for deviation in DEVIATIONS:
        assert set(deviation.commands) <= names, deviation.name


def test_a_changed_page_is_noticed():
    text = PAGE.read_text()
    for changed in (
        text.replace("| done |", "| refused |", 1),
        text.replace("§6.1", "§6.2", 1),
        text + "more\n",
    ):
        assert parts(changed)[0] != parts(text)[0]
