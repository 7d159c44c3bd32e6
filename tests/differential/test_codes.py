"""Every return code that the engine's tests reach was compared with swtpm's, or says why not."""

import pytest

from tests.conformance.reached import NAMES, reached
from tests.differential import codes
from tests.differential.codes import ONLY_OURS, WHOLE_COMMANDS, coverage, shown
from tpm12.commands import ALL


@pytest.fixture(params=[declared.name for declared in ALL])
def name(request):
    return request.param


def test_every_code_that_is_reached_was_compared(name):
    missing = coverage()[name].missing
    told = [f"{code} (reached by {reached()[name][code]})" for code in sorted(missing)]
    assert not missing, (
        f"TPM_{name} and swtpm were never compared at {', '.join(told)}: name a test that reaches "
        "it in engine_tests.txt, write a scenario, or say in codes.py why it cannot be"
    )


def test_every_success_is_agreed_on(name):
    if name not in WHOLE_COMMANDS:
        assert "SUCCESS" in coverage()[name].agreed


def test_what_is_said_to_be_impossible_never_happened():
    agreed, deviating = shown()
    for name, code in ONLY_OURS:
        assert code in reached()[name], f"no test reaches {code} of {name} any more"
        assert code not in agreed.get(name, ()), f"{name} and swtpm agree on {code}"
        assert code not in deviating.get(name, ()), f"{name} deviates at {code}"


def test_every_command_is_reached():
    assert set(NAMES.values()) == reached().keys()


def test_a_new_code_is_missed(monkeypatch):
    """The control: a code that a test reaches for the first time."""
    more = {**reached(), "GetTicks": {**reached()["GetTicks"], "NOSPACE": "test_new.py::test_x"}}
    monkeypatch.setattr(codes, "reached", lambda: more)
    assert coverage()["GetTicks"].missing == {"NOSPACE"}
