"""A pytest plugin that records which return codes the engine's tests reach, and for which ordinals.

    python -m pytest -q -p tests.conformance.reached tests/tpm12

writes `tests/vectors/reached.json`: by command, for each code a test that reaches it. Tests that
draw their requests (Hypothesis) do not count, for they reach what chance has it. Whoever adds a
test that reaches a code for the first time is told so by that test (`tests/tpm12/conftest.py`),
and by `tests/differential/test_codes.py` that both TPMs have to be compared there.
"""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from tpm12.commands import ALL
from tpm12.engine import Engine

REACHED = Path(__file__).parents[1] / "vectors" / "reached.json"
HOW = "python -m pytest -q -p tests.conformance.reached tests/tpm12"
NAMES = {declared.ordinal: declared.name for declared in ALL}
_KEY = "reached"


@cache
def reached():
    """{command: {code: test}}, as recorded."""
    return json.loads(REACHED.read_text())


@contextmanager
def watched(see):
    """While it lasts, `see(command, code)` is called for every command of every engine."""
    execute = Engine.execute

    def seen(self, request, locality=0):
        outcome = execute(self, request, locality)
        name = NAMES.get(int.from_bytes(request[6:10], "big"))
        if name and len(request) >= 10:
            see(name, outcome.code.name)
        return outcome

    Engine.execute = seen
    try:
        yield
    finally:
        Engine.execute = execute


def counts(item):
    """Does a test send the same in every run?"""
    return not hasattr(item.obj, "hypothesis")


class Recorder:
    """Sees every command of every test that counts."""

    def __init__(self):
        self._found = {}

    def check(self, item, name, code):
        """Note what a test reached; the shortest name stands for all."""
        tests = self._found.setdefault(name, {})
        test = item.nodeid.split("[")[0].rsplit("/", 1)[-1]
        tests[code] = min(test, tests.get(code, test), key=lambda each: (len(each), each))

    def pytest_sessionfinish(self, session):
        if session.config.args == ["tests/tpm12"]:  # a part must not stand for the whole
            kept = {name: dict(sorted(self._found[name].items())) for name in sorted(self._found)}
            REACHED.write_text(json.dumps(kept, indent=1) + "\n")


class Checker:
    """Fails a test that reaches what is not recorded."""

    def check(self, item, name, code):
        del item
        assert code in reached().get(name, ()), f"TPM_{name} gave {code} for the first time: {HOW}"


def checker(config):
    """What judges the pairs in this run."""
    return config.pluginmanager.get_plugin(_KEY) or Checker()


def pytest_configure(config):
    config.pluginmanager.register(Recorder(), _KEY)
