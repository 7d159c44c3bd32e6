"""This engine and swtpm, exchange by exchange: what differs has a name, and what has one differs.

`deviations` names the differences, `agreed.json` keeps what came out: the codes that both gave
for each ordinal, and how each deviation showed. The conformance page is made of it.
"""

import dataclasses

import pytest

from protocol.return_codes import ReturnCode, TpmError
from tests.differential.comparison import NAMES, compared, recorded
from tests.differential.deviations import DEVIATIONS
from tests.differential.other_tpm import needs_swtpm
from tpm12.commands import ALL

slow_against_swtpm = [pytest.mark.slow, needs_swtpm]
HOW = "python -m tests.differential.comparison --record, then make conformance"


@pytest.mark.slow
@needs_swtpm
@pytest.mark.parametrize("name", NAMES)
def test_swtpm_answers_the_same_but_for_named_deviations(name):
    comparison = compared(name)
    assert comparison.stopped is None
    assert not comparison.unnamed, "\n".join(str(each) for each in comparison.unnamed)
    assert comparison.record() == recorded().get(name), f"what is kept is not what came out: {HOW}"


def test_every_deviation_is_seen_or_has_a_test():
    shown = {name for kept in recorded().values() for name in kept["deviating"]}
    for deviation in DEVIATIONS:
        assert deviation.test or deviation.name in shown, f"{deviation.name} is nowhere seen"
        assert not (deviation.test and deviation.steps)


def test_deviations_have_names_of_their_own():
    assert len({deviation.name for deviation in DEVIATIONS}) == len(DEVIATIONS)


def test_what_is_kept_is_of_scenarios_that_are_there():
    assert recorded().keys() == set(NAMES)


# -- controls: a wrong engine is caught ------------------------------------------------------------


def wrong_engine(name, code_by_code):
    """The commands, one of which mixes up its return codes (None: success becomes an error)."""

    def spoiled(declared):
        def handler(tpm, cmd, auth):
            try:
                out = declared.handler(tpm, cmd, auth)
            except TpmError as error:
                raise TpmError(code_by_code.get(error.code, error.code)) from error
            if None in code_by_code:
                raise TpmError(code_by_code[None])
            return out

        return dataclasses.replace(declared, handler=handler)

    return [spoiled(declared) if declared.name == name else declared for declared in ALL]


@pytest.mark.slow
@needs_swtpm
@pytest.mark.parametrize(
    ("command", "codes", "scenario"),
    [
        ("Extend", {ReturnCode.BADINDEX: ReturnCode.BAD_PARAMETER}, "PCRs"),
        ("ReadCounter", {ReturnCode.BAD_COUNTER: ReturnCode.BADINDEX}, "counters"),
        ("GetTestResult", {None: ReturnCode.FAILEDSELFTEST}, "self-test"),
    ],
)
def test_a_wrong_return_code_is_caught(command, codes, scenario):
    comparison = compared(scenario, commands=wrong_engine(command, codes))
    ordinal = next(declared.ordinal for declared in ALL if declared.name == command)
    assert {each.ordinal for each in comparison.unnamed} == {ordinal}


@pytest.mark.slow
@needs_swtpm
def test_a_wrong_byte_is_caught():
    """PCR values that are right but for one bit."""

    def handler(tpm, cmd, auth):
        out = read.handler(tpm, cmd, auth)
        return dataclasses.replace(
            out, out_digest=bytes([out.out_digest[0] ^ 1]) + out.out_digest[1:]
        )

    read = next(declared for declared in ALL if declared.name == "PCRRead")
    others = [declared for declared in ALL if declared is not read]
    comparison = compared("PCRs", commands=[*others, dataclasses.replace(read, handler=handler)])
    assert {each.ordinal for each in comparison.unnamed} == {read.ordinal}
