"""TPM_SaveState and TPM_Startup(ST_STATE) (Part 3, §3.2 and §3.3).

The same sequences ran against libtpms under swtpm, whose deviations are named here.
"""

import pytest

from protocol.return_codes import ReturnCode
from protocol.wire import decode, encode
from tests.tpm12.makers import AREA_AUTH, KEY_AUTH, define, loaded, signing
from tests.tpm12.transport_maker import EXCLUSIVE, LOG, Transport
from tests.tpm12.witness import (
    OWNER_AUTH,
    ZERO,
    frame,
    is_signature,
    number,
    sha1,
    sized,
    u16,
    u32,
)
from tpm12.saved_state import SavedState
from tpm12.state import SelfTestState, StAny, StClear, Volatile
from tpm12.state_codec import StateError, decode_section, encode_section

SAVE_STATE, STARTUP, GET_TEST_RESULT, PCR_READ, EXTEND = 0x98, 0x99, 0x54, 0x15, 0x14
CLEAR, STATE, DEACTIVATED = 1, 2, 3
GET_TICKS, SHA1_START, SHA1_COMPLETE, SIGN, GET_CAPABILITY_OWNER = 0xF1, 0xA0, 0xA2, 0x3C, 0x66
ONES = b"\xff" * 20


def save(bench):
    bench.tpm.send(SAVE_STATE).ok()
    assert bench.state.permanent.saved_state is not None


def resume(bench):
    """A loss of power, and the start that resumes."""
    return bench.power_cycle(STATE)


def is_dead(bench):
    """In failure mode, for every start until power goes."""
    codes = [bench.tpm.send(STARTUP, u16(t)).code for t in (CLEAR, STATE, DEACTIVATED)]
    codes.append(bench.tpm.send(PCR_READ, u32(0)).code)
    bench.tpm.send(GET_TEST_RESULT).ok()
    return set(codes) == {ReturnCode.FAILEDSELFTEST}


# -- what comes back -------------------------------------------------------------------------------


def test_pcrs_come_back_but_for_those_that_can_be_reset(owned):
    values = {i: sha1(bytes([i])) for i in range(24)}
    owned.change("stclear", pcrs=values)
    save(owned)
    resume(owned).ok()
    read = {i: owned.tpm.send(PCR_READ, u32(i)).ok() for i in range(24)}
    starts = {16: ZERO, 23: ZERO, **dict.fromkeys(range(17, 23), ONES)}
    assert read == {**values, **starts}


def test_flags_and_data_until_st_clear_come_back(owned):
    kept = {
        "context_nonce_key": sha1(b"nonce"),
        "count_id": 3,
        "owner_reference": 5,
        "disable_reset_lock": True,
        "deferred_physical_presence": 1,
        "disable_force_clear": True,
        "physical_presence": True,
        "physical_presence_lock": True,
        "b_global_lock": True,
        "nv_read_locked": {0x11101: True},
        "nv_write_locked": {0x11102: True},
        "failed_tries": 4,
    }
    owned.change("stclear", **kept)
    save(owned)
    resume(owned).ok()
    for name, value in kept.items():
        assert getattr(owned.state.stclear, name) == value, name


def test_temporary_deactivation_comes_back(owned):
    owned.change("stclear", deactivated=True)
    save(owned)
    resume(owned).ok()
    assert owned.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED
    owned.power_cycle(CLEAR).ok()
    owned.tpm.send(PCR_READ, u32(0)).ok()


def test_keys_and_sessions_come_back(owned):
    key, parts = loaded(owned.tpm, signing())
    oiap, osap = owned.tpm.oiap(OWNER_AUTH), owned.tpm.osap(1, key, KEY_AUTH)
    save(owned)
    resume(owned).ok()
    owned.tpm.auth(GET_CAPABILITY_OWNER, b"", oiap).ok()
    signature = owned.tpm.auth(SIGN, sized(sha1(b"m")), osap, handles=u32(key)).ok()
    assert is_signature(parts.modulus, signature[4:], b"m")


def test_transport_session_comes_back_with_its_log(owned):
    key, parts = loaded(owned.tpm, signing())
    session = Transport(owned.tpm, LOG).open()
    session.send(PCR_READ, u32(0)).ok()
    save(owned)
    resume(owned).ok()
    session.tick_nonce = owned.tpm.send(GET_TICKS).ok()[12:]
    session.send(PCR_READ, u32(0)).ok()
    body = session.release(key, owned.tpm.oiap(KEY_AUTH)).ok()
    assert is_signature(parts.modulus, body[40:], session.signed_bytes(body))


def test_saved_contexts_come_back(owned):
    kept = {"context_nonce_session": sha1(b"n"), "context_count": 9, "context_list": {0: 8, 3: 9}}
    owned.change("stany", **kept)
    save(owned)
    resume(owned).ok()
    for name, value in kept.items():
        assert getattr(owned.state.stany, name) == value, name


def test_nv_locks_come_back(owned):
    define(owned.tpm, 0x11101, 0x00004000 | 0x04 | 0x40000, 4, secret=AREA_AUTH).ok()
    for data in (b"data", b""):
        owned.tpm.send(0xCD, u32(0x11101) + u32(0) + sized(data))
        owned.tpm.auth(
            0xCE, u32(0x11101) + u32(0) + sized(data), owned.tpm.oiap(AREA_AUTH).ending()
        ).ok()
    save(owned)
    resume(owned).ok()
    write = u32(0x11101) + u32(0) + sized(b"none")
    answer = owned.tpm.auth(0xCE, write, owned.tpm.oiap(AREA_AUTH).ending())
    assert answer.code == ReturnCode.AREA_LOCKED


# -- what does not ---------------------------------------------------------------------------------


def test_ticks_begin_anew(owned):
    owned.power_cycle(CLEAR).ok()
    owned.clock.pass_s(100)
    before = owned.tpm.send(GET_TICKS).ok()
    save(owned)
    resume(owned).ok()
    owned.clock.pass_s(1)
    after = owned.tpm.send(GET_TICKS).ok()
    assert number(after[2:10]) == 1_000_000
    assert after[12:] != before[12:]


def test_sha1_thread_is_gone(owned):
    owned.tpm.send(SHA1_START).ok()
    save(owned)
    resume(owned).ok()
    assert owned.tpm.send(SHA1_COMPLETE, sized(b"")).code == ReturnCode.SHA_THREAD


def test_what_every_start_resets_is_reset(owned):
    owned.change("stany", tos_present=True)
    owned.change("volatile", self_test=SelfTestState.FULL)
    save(owned)
    resume(owned).ok()
    assert not owned.state.stany.tos_present
    assert owned.state.stany.transport_exclusive == 0
    assert owned.state.volatile.self_test == SelfTestState.LIMITED


def test_flags_of_stany_are_reset_whatever_was_saved(fresh):
    stany = fresh.state.stany.clone()
    stany.post_initialise, stany.transport_exclusive, stany.tos_present = True, 5, True
    fresh.change("permanent", saved_state=parts_of(fresh, stany=encode_section(stany)))
    resume(fresh).ok()
    stany = fresh.state.stany
    assert (stany.post_initialise, stany.transport_exclusive, stany.tos_present) == (
        False,
        0,
        False,
    )


def test_exclusive_session_ends_with_the_saving(owned):
    session = Transport(owned.tpm, EXCLUSIVE).open()
    save(owned)
    resume(owned).ok()
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE


def test_lockout_goes_on_though_the_clock_began_anew(owned):
    owned.change("stclear", failed_tries=7, last_failure_us=owned.clock.us)
    save(owned)
    owned.clock.us = 5
    resume(owned).ok()
    session = owned.tpm.oiap(OWNER_AUTH)
    answer = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session)
    assert answer.code == ReturnCode.DEFEND_LOCK_RUNNING
    owned.clock.pass_s(2)
    owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session).ok()


# -- nothing saved ---------------------------------------------------------------------------------


def test_resume_with_nothing_saved_is_failure_mode_and_no_fresh_pcrs(fresh):
    """CVE-2018-6622: or PCRs could be made up by whoever resumes without having saved."""
    fresh.tpm.send(EXTEND, u32(0) + ONES).ok()
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST
    assert is_dead(fresh)
    fresh.power_cycle(CLEAR).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).ok() == ZERO


@pytest.mark.parametrize(
    "request_",
    [
        frame(EXTEND, u32(0) + ONES),
        frame(PCR_READ, u32(0)),
        frame(PCR_READ, u32(99)),
        frame(PCR_READ),
        frame(0x6B),
        frame(STARTUP, u16(STATE)),
        frame(GET_TEST_RESULT),
    ],
)
def test_next_command_drops_what_was_saved(fresh, request_):
    save(fresh)
    fresh.tpm.raw(request_)
    assert fresh.last.permanent_changed
    assert fresh.state.permanent.saved_state is None
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST
    assert is_dead(fresh)


@pytest.mark.parametrize("request_", [b"", b"\0\xc1\0\0\0\x0b\0\0\0\x15", frame(PCR_READ)[:9]])
def test_what_is_no_command_drops_nothing(fresh, request_):
    save(fresh)
    fresh.tpm.raw(request_)
    resume(fresh).ok()


def test_launch_drops_what_was_saved(fresh):
    save(fresh)
    fresh.engine.keep(fresh.engine.hash_start())
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST


def test_command_before_the_start_drops_nothing(fresh):
    """It could change nothing: who asks too early does not spoil the resume. (So does libtpms.)"""
    save(fresh)
    fresh.engine.keep(fresh.engine.power_on())
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.INVALID_POSTINIT
    assert fresh.tpm.send(0x65, u32(6) + sized(b"")).code == ReturnCode.INVALID_POSTINIT
    fresh.tpm.send(STARTUP, u16(STATE)).ok()


@pytest.mark.parametrize("startup_type", [CLEAR, DEACTIVATED, STATE])
def test_every_start_drops_what_was_saved(fresh, startup_type):
    fresh.tpm.send(EXTEND, u32(0) + ONES).ok()
    save(fresh)
    fresh.power_cycle(startup_type).ok()
    assert fresh.last.permanent_changed
    assert fresh.state.permanent.saved_state is None
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST


def test_start_of_another_type_drops_what_was_saved(fresh):
    save(fresh)
    assert fresh.power_cycle(9).code == ReturnCode.BAD_PARAMETER
    assert fresh.tpm.send(STARTUP, u16(STATE)).code == ReturnCode.FAILEDSELFTEST


def test_st_clear_after_saving_is_a_clean_start(owned):
    owned.tpm.send(EXTEND, u32(0) + ONES).ok()
    session = owned.tpm.oiap(OWNER_AUTH)
    save(owned)
    owned.power_cycle(CLEAR).ok()
    assert owned.tpm.send(PCR_READ, u32(0)).ok() == ZERO
    answer = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session)
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE


# -- what cannot be read ---------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [0, 1, 4, 100, -1])
def test_saved_state_that_is_cut_off_is_failure_mode(fresh, cut):
    save(fresh)
    data = fresh.state.permanent.saved_state
    fresh.change("permanent", saved_state=data[:cut])
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST
    assert is_dead(fresh)


def parts_of(bench, **changed):
    parts = {
        "stclear": encode_section(bench.state.stclear),
        "stany": encode_section(bench.state.stany),
        "volatile": encode_section(Volatile()),
    }
    return encode(SavedState(**{**parts, **changed}))


@pytest.mark.parametrize(
    "changed",
    [
        {"stclear": b""},
        {"stany": encode_section(StClear())},
        {"volatile": b"\0\1\0\4" + bytes.fromhex("00020000000000000000")},
        {"stclear": encode_section(StClear())},  # no PCRs
        {"stclear": encode_section(StClear(pcrs=dict.fromkeys(range(25), ZERO)))},
        {"stany": encode_section(StAny()) + b"\0"},
    ],
)
def test_saved_state_that_is_not_understood_is_failure_mode(fresh, changed):
    fresh.change("permanent", saved_state=parts_of(fresh))
    resume(fresh).ok()
    before = fresh.state.stclear.pcrs
    fresh.change("permanent", saved_state=parts_of(fresh, **changed))
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST
    assert fresh.state.stclear.pcrs == before
    assert is_dead(fresh)


def test_every_flipped_byte_is_a_start_or_failure_mode(fresh):
    save(fresh)
    data = fresh.state.permanent.saved_state
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x80
        fresh.change("permanent", saved_state=bytes(damaged))
        assert resume(fresh).code in (0, ReturnCode.FAILEDSELFTEST)


def test_volatile_section_has_a_codec_for_what_is_saved(owned):
    key, _ = loaded(owned.tpm, signing())
    volatile = Volatile(keys=owned.state.volatile.keys, physical_presence_pin=True)
    again = decode_section(Volatile, encode_section(volatile))
    assert encode_section(again) == encode_section(volatile)
    assert again.physical_presence_pin
    assert again.keys[key].usage_auth == KEY_AUTH
    record = b"\0\1\0\4" + bytes.fromhex("0002000000000000000000")[:10]
    with pytest.raises(StateError, match="sha1_thread is malformed"):
        decode_section(Volatile, record)


# -- the command itself ----------------------------------------------------------------------------


def test_saving_again_saves_what_is_now(fresh):
    save(fresh)
    fresh.tpm.send(EXTEND, u32(0) + ONES).ok()
    save(fresh)
    save(fresh)
    resume(fresh).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).ok() == sha1(ZERO, ONES)


def test_saving_is_a_permanent_change_that_may_be_refused(fresh):
    outcome = fresh.engine.execute(frame(SAVE_STATE))
    assert outcome.permanent_changed
    # Its host cannot store it, and does not keep it.
    assert resume(fresh).code == ReturnCode.FAILEDSELFTEST


def test_saving_works_disabled_deactivated_and_unowned(fresh):
    fresh.set_flags(disable=True)
    fresh.change("stclear", deactivated=True)
    save(fresh)
    resume(fresh).ok()


def test_saving_before_the_start_is_invalid_postinit(fresh):
    fresh.engine.keep(fresh.engine.power_on())
    assert fresh.tpm.send(SAVE_STATE).code == ReturnCode.INVALID_POSTINIT


def test_saving_in_failure_mode_is_failedselftest(fresh):
    fresh.change("volatile", self_test=SelfTestState.FAILURE)
    assert fresh.tpm.send(SAVE_STATE).code == ReturnCode.FAILEDSELFTEST


def test_saving_keeps_of_the_volatile_section_the_keys(owned):
    loaded(owned.tpm, signing())
    owned.change("volatile", physical_presence_pin=True)
    save(owned)
    parts = decode(SavedState, owned.state.permanent.saved_state)
    kept = decode_section(Volatile, parts.volatile)
    assert kept.keys.keys() == owned.state.volatile.keys.keys()
    assert not kept.physical_presence_pin


# -- audit -----------------------------------------------------------------------------------------


def audit_digest(bench):
    return bench.tpm.send(0x85, u32(0)).ok()[10:30]


def test_audit_digest_comes_back(owned):
    owned.change("stany", audit_digest=ONES)
    save(owned)
    resume(owned).ok()
    assert audit_digest(owned) == ONES


def test_audited_saving_leaves_its_input_in_what_is_saved(owned):
    """§3.3, action 2 a, and §8.1, corner case 3 a."""
    owned.change("permanent", ordinal_audit_status={SAVE_STATE: True}, audit_monotonic_counter=3)
    owned.change("stany", audit_digest=ONES)
    save(owned)
    counter = u16(0x0E) + bytes(4) + u32(3)
    expected = sha1(ONES, u16(0x12), sha1(u32(SAVE_STATE)), counter)
    assert owned.state.stany.audit_digest == expected
    resume(owned).ok()
    assert audit_digest(owned) == expected


def test_startup_effects_are_told(fresh):
    """Bit 2: the SHA-1 thread; 4, deprecated: keys; 6: audit digest at ST_CLEAR. As libtpms."""
    assert number(fresh.tpm.capability(5, u32(0x116))) == 0b0101_0100
