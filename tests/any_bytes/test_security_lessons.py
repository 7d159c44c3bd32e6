"""Every lesson has its tests, and the tests are there."""

import ast
from pathlib import Path

import pytest

from tests.any_bytes.security_lessons import LATER, LESSONS

TESTS = Path(__file__).parents[1]
NUMBERS = {"C": 28, "F": 18, "O": 13}


def names_in(path):
    nodes = ast.walk(ast.parse(path.read_text()))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_every_lesson_is_covered_or_later():
    wanted = {f"{kind}{i + 1}" for kind, count in NUMBERS.items() for i in range(count)}
    assert wanted == LESSONS.keys() | LATER.keys()
    assert not LESSONS.keys() & LATER.keys()


@pytest.mark.parametrize("lesson", LESSONS)
def test_tests_of_a_lesson_exist(lesson):
    what, *tests = LESSONS[lesson]
    assert ": " in what
    assert tests
    for each in tests:
        file, name = each.split("::")
        assert name in names_in(TESTS / file), each
