"""Every declared command against the table of ordinals: declaration, and behaviour in each state.

`vectors/ordinals.csv` says of each ordinal how many sessions it takes and in which states it runs.
Where we deliberately differ, `DEVIATIONS` says why.
"""

import csv
from pathlib import Path

import pytest

from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode
from protocol.wire import DecodeError
from tests.tpm12.witness import COMMAND, frame, key_template, rsa_parms, sized, u16, u32
from tpm12.commands import ALL
from tpm12.dispatch import Gate

_CSV = Path(__file__).parents[1] / "vectors" / "ordinals.csv"
TABLE = {int(row["ordinal"], 16): row for row in csv.DictReader(_CSV.read_text().splitlines())}
COMMANDS = {declared.ordinal: declared for declared in ALL}
DEVIATIONS = {
    # The table follows libtpms here, which takes the "no owner" column of Part 2 §17 at its word;
    # Part 3 lets an NV area or a counter have a session without an owner (§18.2), and eviction
    # (§27.1.1) has nothing to do with one.
    (Ordinal.OSAP, "unowned"): "y",
    (Ordinal.EVICT_KEY, "unowned"): "y",
}


def said(ordinal, column):
    """What the table says, with our deviations."""
    return DEVIATIONS.get((ordinal, column), TABLE[ordinal][column])


@pytest.fixture(params=sorted(COMMANDS), ids=lambda ordinal: COMMANDS[ordinal].name)
def declared(request):
    return COMMANDS[request.param]


def test_deviations_are_deviations():
    for (ordinal, column), value in DEVIATIONS.items():
        assert TABLE[ordinal][column] != value


def test_name_and_section_are_the_tables(declared):
    row = TABLE[declared.ordinal]
    assert declared.name == row["name"]
    assert declared.section.split("§")[1] == row["section"]


def test_number_of_sessions_is_the_tables(declared):
    row = TABLE[declared.ordinal]
    counts = range(int(row["sessions_min"]), int(row["sessions_max"]) + 1)
    assert sorted(declared.sessions_by_count) == list(counts)


def test_owner_authorization_is_declared(declared):
    by_owner = any("owner" in by.over for by in declared.sessions)
    assert by_owner == (TABLE[declared.ordinal]["owner"] != "n")


@pytest.mark.parametrize(
    ("column", "gate", "closed_by"),
    [
        ("disabled", Gate.ENABLED, True),
        ("deactivated", Gate.ACTIVE, True),
        ("unowned", Gate.OWNED, True),
        ("before_startup", Gate.BEFORE_STARTUP, False),
    ],
)
def test_gate_is_the_tables(declared, column, gate, closed_by):
    allowed = said(declared.ordinal, column)
    has_gate = gate in declared.gates
    if allowed == "cond":
        assert not has_gate  # the handler decides
    else:
        assert has_gate == ((allowed == "n") == closed_by)


# -- behaviour -------------------------------------------------------------------------------------

_KEY = key_template(0x11)
_CREATION = bytes(20) + rsa_parms()
_CONTEXT = sized(u16(1) + bytes(56))


def _delegate_public(delegate_type):
    nowhere = u16(3) + bytes(3) + b"\x1f" + bytes(20)
    return u16(0x1B) + b"\0" + nowhere + u16(0x1A) + u32(delegate_type) + bytes(16)


_BODIES = {
    Ordinal.ESTABLISH_TRANSPORT: u32(0) + u16(0x1E) + u32(0) + u32(0) + u16(0) + sized(b""),
    # Operands whose structures zeros do not decode to; for these states nothing else matters.
    Ordinal.TAKE_OWNERSHIP: u16(5) + sized(b"") + sized(b"") + _KEY,
    Ordinal.CREATE_WRAP_KEY: u32(0) + bytes(40) + _KEY,
    Ordinal.LOAD_KEY: u32(0) + _KEY,
    Ordinal.LOAD_KEY2: u32(0) + _KEY,
    Ordinal.MAKE_IDENTITY: bytes(40) + _KEY,
    Ordinal.UNSEAL: u32(0) + b"\1\1\0\0" + bytes(8),
    Ordinal.CMK_CREATE_KEY: u32(0) + bytes(20) + _KEY + bytes(40),
    Ordinal.CMK_CREATE_BLOB: (
        u32(0) + u16(4) + rsa_parms() + sized(b"") + u16(4) + bytes(40)
        + sized(u32(1) + bytes(20)) + sized(b"") * 3
    ),
    Ordinal.CMK_CONVERT_MIGRATION: (
        u32(0) + bytes(80) + key_template(0x11, key12=True) + sized(u32(1) + bytes(20)) + sized(b"")
    ),
    Ordinal.NV_DEFINE_SPACE: (
        u16(0x18) + u32(1) + (u16(3) + bytes(3) + b"\x1f" + bytes(20)) * 2
        + u16(0x17) + u32(1) + bytes(3) + u32(8) + bytes(20)
    ),
    Ordinal.DELEGATE_CREATE_KEY_DELEGATION: u32(0) + _delegate_public(2) + bytes(20),
    Ordinal.DELEGATE_CREATE_OWNER_DELEGATION: bytes(1) + _delegate_public(1) + bytes(20),
    Ordinal.DELEGATE_LOAD_OWNER_DELEGATION: (
        u32(0) + sized(u16(0x2A) + _delegate_public(1) + bytes(28))
    ),
    Ordinal.LOAD_CONTEXT: u32(0) + bytes(1) + _CONTEXT,
    Ordinal.LOAD_KEY_CONTEXT: _CONTEXT,
    Ordinal.LOAD_AUTH_CONTEXT: _CONTEXT,
}  # fmt: skip


def body_for(declared):
    """Operands that decode; zeros, where zeros do."""
    body = _BODIES.get(declared.ordinal)
    if body is not None:
        return body
    for size in range(600):
        try:
            _, end = declared.takes.__wire_decode__(bytes(size), 0)
        except DecodeError:
            continue
        return bytes(end)
    raise AssertionError(f"TPM_{declared.name} needs a body in _BODIES")


def code_of(bench, declared):
    """The code of a well-formed request with as many sessions as possible, all unknown."""
    count = max(declared.sessions_by_count)
    request = frame(declared.ordinal, body_for(declared) + bytes(45 * count), COMMAND + count)
    return bench.tpm.raw(request, locality=0).code


def test_state_before_startup(declared, make_bench, factory):
    bench = make_bench(factory)
    bench.engine.keep(bench.engine.power_on())
    is_refused = code_of(bench, declared) == ReturnCode.INVALID_POSTINIT
    assert is_refused == (TABLE[declared.ordinal]["before_startup"] == "n")


def test_state_disabled(declared, owned):
    owned.set_flags(disable=True)
    if TABLE[declared.ordinal]["disabled"] != "cond":
        is_refused = code_of(owned, declared) == ReturnCode.DISABLED
        assert is_refused == (TABLE[declared.ordinal]["disabled"] == "n")


def test_state_deactivated(declared, owned):
    owned.change("stclear", deactivated=True)
    if TABLE[declared.ordinal]["deactivated"] != "cond":
        is_refused = code_of(owned, declared) == ReturnCode.DEACTIVATED
        assert is_refused == (TABLE[declared.ordinal]["deactivated"] == "n")


def test_state_disabled_is_told_before_deactivated(declared, owned):
    if TABLE[declared.ordinal]["disabled"] == TABLE[declared.ordinal]["deactivated"] == "n":
        owned.change("stclear", deactivated=True)
        owned.set_flags(disable=True)
        assert code_of(owned, declared) == ReturnCode.DISABLED


def test_state_unowned(declared, fresh):
    if said(declared.ordinal, "unowned") == "n":
        assert code_of(fresh, declared) == ReturnCode.NOSRK


def test_state_failed_self_test(declared, owned):
    owned.change("volatile", self_test=3)
    is_refused = code_of(owned, declared) == ReturnCode.FAILEDSELFTEST
    # GetCapability tells some things then and refuses others; the request here asks for area 0.
    assert is_refused == (declared.ordinal != Ordinal.GET_TEST_RESULT)


@pytest.mark.parametrize("tag", [0x00C1, 0x00C2, 0x00C3, 0x00C4, 0x0000, 0xFFFF])
def test_tag_with_another_number_of_sessions_is_badtag(declared, owned, tag):
    count = tag - COMMAND
    if count in declared.sessions_by_count:
        return
    blocks = bytes(45 * count) if 0 <= count <= 2 else b""
    answer = owned.tpm.raw(frame(declared.ordinal, body_for(declared) + blocks, tag))
    assert answer.code == ReturnCode.BADTAG


def test_one_byte_more_or_less_is_bad_param_size(declared, owned):
    count = max(declared.sessions_by_count)
    body = body_for(declared) + bytes(45 * count)
    longer = owned.tpm.raw(frame(declared.ordinal, body + b"\0", COMMAND + count))
    assert longer.code == ReturnCode.BAD_PARAM_SIZE
    if body:
        shorter = owned.tpm.raw(frame(declared.ordinal, body[:-1], COMMAND + count))
        assert shorter.code == ReturnCode.BAD_PARAM_SIZE


def test_lockout_stops_every_command_with_sessions_but_the_one_that_ends_it(declared, owned):
    owned.change("stclear", failed_tries=6, last_failure_us=owned.clock.us)
    count = max(declared.sessions_by_count)
    is_refused = code_of(owned, declared) == ReturnCode.DEFEND_LOCK_RUNNING
    assert is_refused == (count > 0 and declared.ordinal != Ordinal.RESET_LOCK_VALUE)


def test_failed_command_changes_nothing_but_sessions_and_attack_counter(declared, owned):
    before = owned.state
    if code_of(owned, declared) == ReturnCode.SUCCESS:
        return
    assert owned.state.permanent is before.permanent
    assert owned.state.volatile.keys is before.volatile.keys
    assert owned.state.stclear.pcrs is before.stclear.pcrs


def test_unknown_ordinals_are_bad_ordinals(any_tpm):
    for ordinal in (*(set(TABLE) - set(COMMANDS)), 0, 0x100, 0x20000016, 0xFFFFFFFF):
        assert any_tpm.tpm.send(ordinal).code == ReturnCode.BAD_ORDINAL
