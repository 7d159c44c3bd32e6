"""The engine keeps a draft from command to command; nothing may stay in it that was not kept."""

import pytest

from protocol.return_codes import ReturnCode
from tpm12.commands import ALL
from tpm12.dispatch import command
from tpm12.engine import Engine
from tpm12.state import State

READ = bytes.fromhex("00c10000000e00000015 0000000a")
EXTEND = bytes.fromhex("00c1000000220000001400 00000a") + b"x" * 20
OIAP = bytes.fromhex("00c10000000a0000000a")
BROKEN = 0x20000123
ZERO = bytes(20)


@command(BROKEN, name="Broken", section="none")
def broken(tpm, _cmd, _auth):
    """Change something and break."""
    tpm.change_stclear().pcrs = {**tpm.stclear.pcrs, 10: b"?" * 20}
    raise ZeroDivisionError


@pytest.fixture
def engine(fresh):
    world = fresh.engine._world
    made = Engine(
        fresh.engine.state,
        rng=world.rng,
        clock=world.clock,
        key_generator=world.key_generator,
        profile=world.profile,
        commands=[*ALL, broken.__tpm_command__],
    )
    made.keep(made.execute(READ))
    return made


def pcr(engine):
    outcome = engine.execute(READ)
    engine.keep(outcome)
    assert outcome.code is ReturnCode.SUCCESS
    return outcome.response[10:]


def test_what_was_not_kept_is_not_there(engine):
    outcome = engine.execute(EXTEND)
    assert outcome.response[10:] != ZERO
    assert pcr(engine) == ZERO
    assert engine.execute(EXTEND).response == outcome.response


def test_what_was_kept_is_the_ground_of_the_next(engine):
    for _ in range(3):
        outcome = engine.execute(EXTEND)
        before = engine.state
        engine.keep(outcome)
        assert pcr(engine) == outcome.response[10:]
        assert before.stclear.pcrs[10] != outcome.response[10:]


def test_a_bug_in_a_command_leaves_nothing_behind(engine):
    request = b"\x00\xc1\x00\x00\x00\x0a" + BROKEN.to_bytes(4, "big")
    with pytest.raises(ZeroDivisionError):
        engine.execute(request)
    assert pcr(engine) == ZERO


def test_a_state_put_in_from_outside_is_seen(engine):
    state = engine.state
    stclear = state.stclear.clone()
    stclear.pcrs = {**stclear.pcrs, 10: b"!" * 20}
    engine.state = State(state.permanent, stclear, state.stany, state.volatile)
    assert pcr(engine) == b"!" * 20
    engine.state = state
    assert pcr(engine) == ZERO


def test_locality_is_each_commands_own(engine):
    extend_17 = bytes.fromhex("00c10000002200000014000000 11") + b"x" * 20
    codes = [engine.execute(extend_17, locality).code for locality in (0, 3, 0)]
    assert codes == [ReturnCode.BAD_LOCALITY, ReturnCode.SUCCESS, ReturnCode.BAD_LOCALITY]


def test_what_stops_commands_is_seen_when_it_comes_and_when_it_goes(engine):
    state = engine.state
    stclear = state.stclear.clone()
    stclear.deactivated = True
    engine.state = State(state.permanent, stclear, state.stany, state.volatile)
    for _ in range(2):
        assert engine.execute(READ).code is ReturnCode.DEACTIVATED
    engine.keep(engine.execute(OIAP))  # runs deactivated too, and changes the state
    assert engine.execute(READ).code is ReturnCode.DEACTIVATED
    engine.state = state
    assert pcr(engine) == ZERO
    engine.keep(engine.power_on())
    assert engine.execute(READ).code is ReturnCode.INVALID_POSTINIT


def test_an_authorization_is_neither_true_nor_false(engine):
    with pytest.raises(TypeError, match=r"auth\.blocks"):
        bool(engine._unauthorized)
