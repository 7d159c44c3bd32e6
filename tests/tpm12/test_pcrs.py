"""The PCR bank: the PC Client table of localities, composites, and bindings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import PcrInfo, PcrInfoLong, PcrInfoShort, PcrSelection
from protocol.wire import DecodeError, decode, encode
from tests.tpm12.makers import composite, pcr_info, pcr_info_long
from tests.tpm12.witness import ZERO, selection, sha1, sized, u8
from tpm12 import pcrs
from tpm12.state import State
from tpm12.tpm import Tpm

ONES = b"\xff" * 20
ANY = {0, 1, 2, 3, 4}
# PC Client TIS: who resets, who extends, and what a start sets.
TABLE = {
    **{i: (set(), ANY, ZERO) for i in range(16)},
    16: (ANY, ANY, ZERO),
    17: ({4}, {4, 3, 2}, ONES),
    18: ({4}, {4, 3, 2}, ONES),
    19: ({4}, {3, 2}, ONES),
    20: ({4, 2}, {3, 2, 1}, ONES),
    21: ({2}, {2}, ONES),
    22: ({2}, {2}, ONES),
    23: (ANY, ANY, ZERO),
}


@pytest.fixture
def tpm_at(fresh_state):
    """Make a draft at a locality, with these PCR values."""

    def make(locality=0, **values):
        stclear = fresh_state.stclear.clone()
        stclear.pcrs = {**stclear.pcrs, **{int(i[1:]): v for i, v in values.items()}}
        state = State(fresh_state.permanent, stclear, fresh_state.stany, fresh_state.volatile)
        return Tpm(state, None, locality)

    return make


def code_of(action, *arguments):
    try:
        action(*arguments)
    except (TpmError, DecodeError) as error:
        return error.code
    return ReturnCode.SUCCESS


def select(*indices, size=3):
    return decode(PcrSelection, selection(*indices, size=size))


@pytest.mark.parametrize("pcr", range(24))
def test_attributes_are_the_pc_clients(pcr):
    attributes = pcrs.ATTRIBUTES[pcr]
    resettable, extendable, start = TABLE[pcr]
    assert {i for i in range(8) if attributes.resettable_from >> i & 1} == resettable
    assert {i for i in range(8) if attributes.extendable_from >> i & 1} == extendable
    assert pcrs.start_values()[pcr] == start


@pytest.mark.parametrize("locality", range(5))
def test_extend_from_each_locality(tpm_at, locality):
    for pcr, (_, extendable, start) in TABLE.items():
        tpm = tpm_at(locality)
        if locality in extendable:
            assert pcrs.extend(tpm, pcr, b"d" * 20) == sha1(start, b"d" * 20)
            assert tpm.stclear.pcrs[pcr] == sha1(start, b"d" * 20)
        else:
            assert code_of(pcrs.extend, tpm, pcr, b"d" * 20) == ReturnCode.BAD_LOCALITY


@pytest.mark.parametrize("pcr", [24, 25, 1 << 31, 0xFFFFFFFF])
def test_extend_past_the_bank(tpm_at, pcr):
    assert code_of(pcrs.extend, tpm_at(), pcr, ZERO) == ReturnCode.BADINDEX


def test_extend_of_zeros_is_the_known_answer(tpm_at):
    assert pcrs.extend(tpm_at(), 0, ZERO).hex() == "b80de5d138758541c5f05265ad144ab9fa86d1db"


def test_extend_leaves_the_state_it_came_from_alone(tpm_at, fresh_state):
    before = dict(fresh_state.stclear.pcrs)
    pcrs.extend(tpm_at(), 3, b"d" * 20)
    assert fresh_state.stclear.pcrs == before


def test_composite_takes_the_values_in_order(tpm_at):
    tpm = tpm_at(p2=b"2" * 20, p9=b"9" * 20)
    made = pcrs.composite(tpm, select(9, 2))
    assert encode(made) == selection(2, 9) + sized(b"2" * 20 + b"9" * 20)
    assert pcrs.composite_hash(tpm, select(2, 9)) == sha1(encode(made))


def test_composite_hash_depends_on_the_size_of_the_selection(tpm_at):
    short, long = (pcrs.composite_hash(tpm_at(), select(1, size=n)) for n in (2, 3))
    assert short == composite([1], size=2)
    assert long == composite([1])
    assert short != long


@pytest.mark.parametrize("size", range(4))
def test_composite_hash_of_nothing_is_zero(tpm_at, size):
    assert pcrs.composite_hash(tpm_at(), select(size=size)) == ZERO


@given(indices=st.sets(st.integers(min_value=0, max_value=23)))
def test_selection_gives_its_indices_ascending(indices):
    assert select(*indices).indices == tuple(sorted(indices))


# -- bindings --------------------------------------------------------------------------------------


def test_binding_is_told_by_its_tag():
    assert pcrs.parse_binding(b"") is None
    assert isinstance(pcrs.parse_binding(pcr_info(1)), PcrInfo)
    assert isinstance(pcrs.parse_binding(pcr_info_long([1], [1])), PcrInfoLong)


def test_binding_of_one_form_only():
    short, long = pcr_info(1), pcr_info_long([1], [1])
    assert code_of(lambda: pcrs.parse_binding(short, is_long=True)) != ReturnCode.SUCCESS
    assert code_of(lambda: pcrs.parse_binding(long, is_long=False)) != ReturnCode.SUCCESS
    code = code_of(lambda: pcrs.binding_of(short, ReturnCode.BADINDEX, is_long=True))
    assert code == ReturnCode.BADINDEX
    assert pcrs.binding_of(b"", ReturnCode.BADINDEX, is_long=True) is None


def test_filled_in_sets_the_creation_fields_of_the_long_form(tpm_at):
    tpm = tpm_at(3, p1=b"1" * 20)
    given_one = pcrs.parse_binding(pcr_info_long([1], [2], localities=0x05, at_creation=0x1F))
    filled = pcrs.filled_in(tpm, given_one)
    assert filled.locality_at_creation == 0x08
    assert filled.digest_at_creation == composite([1], [b"1" * 20])
    for name in ("locality_at_release", "release_pcr_selection", "digest_at_release"):
        assert getattr(filled, name) == getattr(given_one, name)


def test_filled_in_sets_the_creation_digest_of_the_old_form(tpm_at):
    tpm = tpm_at(3, p1=b"1" * 20)
    filled = pcrs.filled_in(tpm, pcrs.parse_binding(pcr_info(1)))
    assert encode(filled) == selection(1) + composite([1]) + composite([1], [b"1" * 20])


def bindings(*indices, localities=0x1F, values=None):
    """The same release condition in the three forms."""
    digest = composite(indices, values)
    short = decode(PcrInfoShort, selection(*indices) + u8(localities) + digest)
    long = pcr_info_long([], indices, values=values, localities=localities)
    return [pcrs.parse_binding(pcr_info(*indices, values=values)), pcrs.parse_binding(long), short]


def test_release_of_nothing(tpm_at):
    pcrs.check_release(tpm_at(), None)


@pytest.mark.parametrize("form", range(3))
def test_release_compares_the_pcrs(tpm_at, form):
    binding = bindings(1, 5)[form]
    pcrs.check_release(tpm_at(p2=ONES), binding)
    for changed in ({"p1": ONES}, {"p5": ONES}):
        code = code_of(pcrs.check_release, tpm_at(**changed), binding)
        assert code == ReturnCode.WRONGPCRVAL


@pytest.mark.parametrize("form", range(3))
def test_release_by_no_pcr_compares_nothing(tpm_at, form):
    pcrs.check_release(tpm_at(p1=ONES), bindings(values=[ONES])[form])


@pytest.mark.parametrize("form", [1, 2])
def test_release_compares_the_locality(tpm_at, form):
    binding = bindings(1, localities=0x0A)[form]
    codes = [code_of(pcrs.check_release, tpm_at(locality), binding) for locality in range(5)]
    refused, released = ReturnCode.BAD_LOCALITY, ReturnCode.SUCCESS
    assert codes == [refused, released, refused, released, refused]


@pytest.mark.parametrize("form", [1, 2])
def test_release_tells_pcrs_before_locality(tpm_at, form):
    binding = bindings(1, localities=0x02)[form]
    code = code_of(pcrs.check_release, tpm_at(0, p1=ONES), binding)
    assert code == ReturnCode.WRONGPCRVAL


def test_release_selection_of_each_form():
    assert [pcrs.release_selection(b).indices for b in bindings(2, 3)] == [(2, 3)] * 3
