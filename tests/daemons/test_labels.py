"""Labels: their text, patterns and hashes."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.labels import LABEL_CHARACTERS_MAX, Label, LabelError, matches_pattern


@pytest.mark.parametrize(
    ("label", "digest", "wildcard_digest"),
    [
        (
            "system_u:system_r:vtpm_t",
            "d0f1992dae1daf6b1515f8fc293fcac4bc673605",
            "bac83cc1100ade26fa6607723aa551683ae530fb",
        ),
        (
            "guest1_u:vm_r:vtpm_t",
            None,
            "f9575a6e1604431c592d3b469769266f13737315",
        ),
        ("system_u:system_r:domU_t", "2bc65001d506ce6cd12cab90a4a2ad9040d641e1", None),
    ],
)
def test_digest_is_that_of_the_managers_kernel_list(label, digest, wildcard_digest):
    parsed = Label.parse(label)
    if digest:
        assert parsed.digest.hex() == digest
    if wildcard_digest:
        assert parsed.wildcard_digest.hex() == wildcard_digest


def test_parse_keeps_an_mls_range():
    label = Label.parse("u:r:t:s0-s1:c0.c3")
    assert (label.type, label.mls) == ("t", "s0-s1:c0.c3")
    assert str(label) == "u:r:t:s0-s1:c0.c3"


@pytest.mark.parametrize(
    "text",
    ["", "u", "u:r", "u:r:", ":r:t", "u::t", "u:r:t:", "u :r:t", "u:r:t\n", "*:r:t", "ü:r:t",
     "u:r:t:s0 ", "u:r:t:\x1b[31m", "u:r:" + "t" * LABEL_CHARACTERS_MAX],
)  # fmt: skip
def test_parse_what_is_no_label_is_refused(text):
    with pytest.raises(LabelError) as caught:
        Label.parse(text)
    assert str(caught.value).isprintable()


def test_parse_longest_label_is_taken_whole():
    text = "u:r:" + "t" * (LABEL_CHARACTERS_MAX - 4)
    assert str(Label.parse(text)) == text


@given(st.text(max_size=140))
def test_parse_any_text_gives_itself_back_or_is_refused(text):
    with contextlib.suppress(LabelError):
        assert str(Label.parse(text)) == text


@pytest.mark.parametrize(
    ("label", "pattern", "expected"),
    [
        ("u:r:t", "u:r:t", True),
        ("u:r:t", "u:r:t2", False),
        ("u:r:t", "*:r:t", True),
        ("u:r:t", "*u:r:t", False),  # the star is at least one character
        (":r:t:r:t", "*:r:t", True),  # the suffix comes twice, and stands at the end
        (":r:t:r:tx", "*:r:t", False),
        ("u:r:t", "*nothing", False),
        ("u:r:t", "u:*", False),  # a star elsewhere is only a star
    ],
)
def test_matches_pattern_exact_or_by_suffix(label, pattern, expected):
    assert matches_pattern(label, pattern) is expected
