"""Random and mutated commands, and short sequences of them; what was ever found stays mended.

A failing sequence is shown as the bytes of a corpus file: put them into
`tests/vectors/corpus/engine/NAME.bin` and it is run from then on.
"""

from pathlib import Path

import pytest
from hypothesis import given, note, settings
from hypothesis import strategies as st

from protocol.return_codes import ReturnCode
from tests.any_bytes import lattice, reaching
from tests.any_bytes.sequences import (
    LATER,
    POWER_CYCLED,
    REPAIRED,
    STATES,
    as_bytes,
    run_sequence,
)
from tests.tpm12.witness import COMMAND, frame
from tpm12.commands import ALL

CORPUS = Path(__file__).parents[1] / "vectors" / "corpus" / "engine"
_BASES = [request for command in ALL for request in lattice.base_requests(command)]

modes = st.builds(
    lambda locality, *flags: locality | sum(flags),
    st.integers(0, 4),
    st.sampled_from([0, REPAIRED, REPAIRED, REPAIRED]),
    st.sampled_from([0] * 9 + [POWER_CYCLED]),
    st.sampled_from([0, 0, LATER]),
)
ordinals = st.sampled_from([command.ordinal for command in ALL])
framed = st.builds(frame, ordinals, st.binary(max_size=120), st.integers(COMMAND, COMMAND + 2))
edits = st.lists(
    st.tuples(
        st.integers(min_value=0),
        st.sampled_from(["flip", "set", "cut", "insert"]),
        st.integers(1, 255),
    ),
    max_size=4,
)


def mutated(request, changes):
    """A request after some edits behind its ordinal."""
    data = bytearray(request)
    for where, how, value in changes:
        at = 10 + where % max(len(data) - 10, 1)
        if how == "insert":
            data[at:at] = bytes([value]) * (value % 7)
        elif at < len(data):
            if how == "cut":
                del data[at : at + value % 7]
            else:
                data[at] = value if how == "set" else data[at] ^ value
    return bytes(data)


requests = st.one_of(
    st.builds(mutated, st.sampled_from(_BASES), edits), framed, st.binary(max_size=60)
)
steps = st.lists(st.tuples(modes, requests), min_size=1, max_size=6)


@settings(max_examples=1500)
@given(state=st.sampled_from(STATES), steps=steps, is_authorized=st.booleans())
def test_any_sequence_gets_answers(all_states, state, steps, is_authorized):
    sequence = as_bytes(state, steps, is_authorized=is_authorized)
    note(f"sequence {sequence.hex()}")
    run_sequence(sequence, all_states)


@settings(max_examples=600)
@given(steps=steps)
def test_any_authorized_sequence_gets_answers(all_states, steps):
    sequence = as_bytes("furnished", steps, is_authorized=True)
    note(f"sequence {sequence.hex()}")
    run_sequence(sequence, all_states)


@settings(max_examples=300)
@given(state=st.sampled_from(STATES), data=st.binary(max_size=5000))
def test_any_bytes_at_all_get_an_answer(all_states, state, data):
    run_sequence(as_bytes(state, [(0, data)], is_authorized=False), all_states)


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_kept_case_stays_mended(all_states, path):
    run_sequence(path.read_bytes(), all_states)


def test_corpus_files_are_small():
    assert all(path.stat().st_size <= 2048 for path in CORPUS.glob("*.bin"))


def test_sequences_made_for_a_command_reach_its_end(all_states):
    for name, sequence in reaching.as_sequences(all_states["furnished"]).items():
        assert set(run_sequence(sequence, all_states)) == {ReturnCode.SUCCESS}, name


def test_bases_succeed_in_sequences_too(all_states):
    """The control: mutations begin at requests that reach their end."""
    succeeded = 0
    for command in ALL:
        steps = [(REPAIRED, request) for request in lattice.base_requests(command)[:1]]
        codes = run_sequence(as_bytes("furnished", steps, is_authorized=True), all_states)
        succeeded += codes == [ReturnCode.SUCCESS]
    assert succeeded > len(ALL) / 4
