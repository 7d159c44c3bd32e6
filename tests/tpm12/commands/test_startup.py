"""Start-up, self-test, failure mode (Part 3, chapters 3 and 4), and the bus cycles of a launch."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.witness import OWNER_AUTH, SRK, SRK_AUTH, ZERO, sha1, u16, u32
from tpm12 import self_test
from tpm12.crypto import HmacKey
from tpm12.state import NO_COUNTER, RELEASED_COUNTER, SelfTestState

STARTUP, SELF_TEST_FULL, CONTINUE_SELF_TEST, GET_TEST_RESULT = 0x99, 0x50, 0x53, 0x54
PCR_READ, EXTEND, GET_RANDOM, OIAP = 0x15, 0x14, 0x46, 0x0A
CLEAR, STATE, DEACTIVATED = 1, 2, 3
ONES = b"\xff" * 20


def pcr(bench, index):
    return bench.tpm.send(PCR_READ, u32(index)).ok()


@pytest.fixture
def powered(make_bench, factory):
    """Power on, TPM_Startup not sent yet."""
    bench = make_bench(factory)
    bench.engine.keep(bench.engine.power_on())
    return bench


# -- Startup ---------------------------------------------------------------------------------------


def test_startup_clear_sets_pcrs_as_the_pc_client_says(powered):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    values = [pcr(powered, i) for i in range(24)]
    assert values == [ZERO] * 17 + [ONES] * 6 + [ZERO]


def test_startup_when_started_is_invalid_postinit(fresh):
    for startup_type in (CLEAR, STATE, DEACTIVATED, 9):
        answer = fresh.tpm.send(STARTUP, u16(startup_type))
        assert answer.code == ReturnCode.INVALID_POSTINIT
    pcr(fresh, 0)


@pytest.mark.parametrize("startup_type", [0, 4, 0x100, 0xFFFF])
def test_startup_of_another_type_is_bad_parameter_and_may_be_tried_again(powered, startup_type):
    assert powered.tpm.send(STARTUP, u16(startup_type)).code == ReturnCode.BAD_PARAMETER
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()


def test_startup_deactivated_lasts_until_the_next_start(powered):
    powered.tpm.send(STARTUP, u16(DEACTIVATED)).ok()
    assert powered.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED
    powered.power_cycle().ok()
    pcr(powered, 0)


def test_startup_state_without_saved_state_is_failure_mode_until_power_goes(fresh):
    """Or who cuts power without TPM_SaveState could begin again with clean PCRs (CVE-2018-6622)."""
    fresh.tpm.send(EXTEND, u32(0) + sha1(b"measured")).ok()
    assert fresh.power_cycle(STATE).code == ReturnCode.FAILEDSELFTEST
    assert fresh.tpm.send(STARTUP, u16(CLEAR)).code == ReturnCode.FAILEDSELFTEST
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.FAILEDSELFTEST
    fresh.tpm.send(GET_TEST_RESULT).ok()
    fresh.power_cycle().ok()
    pcr(fresh, 0)


def test_startup_clear_resets_what_lives_until_then(owned):
    srk = owned.state.permanent.srk
    owned.change(
        "stclear",
        disable_force_clear=True,
        physical_presence=True,
        physical_presence_lock=True,
        b_global_lock=True,
        disable_reset_lock=True,
        failed_tries=3,
        nv_read_locked={1: True},
        nv_write_locked={1: True},
        owner_reference=1,
        count_id=RELEASED_COUNTER,
        deferred_physical_presence=1,
        deactivated=True,
    )
    owned.change("volatile", keys={5: srk})
    owned.change("stany", context_list={0: 1}, tos_present=True, audit_digest=ONES, context_count=9)
    owned.change("permanent", owner_evict_keys={6: srk})
    owned.tpm.oiap()
    before = owned.state
    owned.power_cycle().ok()
    stclear, stany = owned.state.stclear, owned.state.stany
    assert not stclear.disable_force_clear
    assert not stclear.physical_presence
    assert not stclear.physical_presence_lock
    assert not stclear.b_global_lock
    assert not stclear.disable_reset_lock
    assert not stclear.deactivated
    assert stclear.failed_tries == 0
    assert (stclear.nv_read_locked, stclear.nv_write_locked) == ({}, {})
    assert stclear.owner_reference == 0x40000001
    assert stclear.count_id == NO_COUNTER
    assert stclear.deferred_physical_presence == 0
    assert stclear.context_nonce_key not in (ZERO, before.stclear.context_nonce_key)
    assert stany.context_nonce_session not in (ZERO, before.stany.context_nonce_session)
    assert stany.tick_nonce not in (ZERO, before.stany.tick_nonce)
    assert (stany.sessions, stany.context_list, stany.context_count) == ({}, {}, 0)
    assert not stany.tos_present
    assert stany.audit_digest == ZERO
    assert owned.state.volatile.keys == {}
    assert owned.state.permanent is before.permanent
    assert list(owned.state.permanent.owner_evict_keys) == [6]


def test_session_does_not_survive_power(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    owned.power_cycle().ok()
    assert owned.tpm.auth(0x66, b"", session).code == ReturnCode.INVALID_AUTHHANDLE


def test_hardware_presence_is_a_line_and_survives_power(fresh):
    fresh.engine.keep(fresh.engine.physical_presence_pin(asserted=True))
    fresh.power_cycle().ok()
    assert fresh.state.volatile.physical_presence_pin


# -- self-test -------------------------------------------------------------------------------------


def test_power_on_runs_the_limited_self_test(powered):
    assert powered.state.volatile.self_test == SelfTestState.LIMITED


@pytest.mark.parametrize("ordinal", [SELF_TEST_FULL, CONTINUE_SELF_TEST])
def test_self_test_makes_the_tpm_fully_tested(powered, ordinal):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    powered.tpm.send(ordinal).ok()
    assert powered.state.volatile.self_test == SelfTestState.FULL
    assert b"full" in powered.tpm.send(GET_TEST_RESULT).ok()


def test_command_before_the_self_test_makes_the_tpm_test_itself(powered):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    powered.tpm.send(EXTEND, u32(0) + ZERO).ok()
    assert powered.state.volatile.self_test == SelfTestState.LIMITED
    powered.tpm.send(PCR_READ, u32(0)).ok()
    assert powered.state.volatile.self_test == SelfTestState.FULL


def test_result_of_a_silent_self_test_is_kept_though_the_command_fails(powered):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    assert powered.tpm.send(PCR_READ, u32(99)).code == ReturnCode.BADINDEX
    assert powered.state.volatile.self_test == SelfTestState.FULL


def test_continue_self_test_of_a_tested_tpm_changes_nothing(fresh):
    before = fresh.state
    fresh.tpm.send(CONTINUE_SELF_TEST).ok()
    assert fresh.state is before


def test_limited_self_test_that_fails_is_failure_mode(make_bench, factory, monkeypatch):
    monkeypatch.setattr(self_test, "hmac_sha1", lambda *_: HmacKey(b"other").mac(b""))
    bench = make_bench(factory)
    bench.engine.keep(bench.engine.power_on())
    assert bench.tpm.send(STARTUP, u16(CLEAR)).code == ReturnCode.FAILEDSELFTEST
    assert b"failed" in bench.tpm.send(GET_TEST_RESULT).ok()


@pytest.mark.parametrize("ordinal", [SELF_TEST_FULL, PCR_READ])
def test_full_self_test_that_fails_is_failure_mode_until_power_goes(powered, monkeypatch, ordinal):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    body = u32(0) if ordinal == PCR_READ else b""
    with monkeypatch.context() as broken:
        broken.setattr(self_test, "mgf1", lambda *_: b"wrong")
        assert powered.tpm.send(ordinal, body).code == ReturnCode.FAILEDSELFTEST
    assert powered.tpm.send(ordinal, body).code == ReturnCode.FAILEDSELFTEST
    assert powered.tpm.send(OIAP).code == ReturnCode.FAILEDSELFTEST
    powered.power_cycle().ok()
    powered.tpm.send(ordinal, body).ok()


def test_self_test_uses_the_endorsement_key(with_ek):
    """An EK whose prime is damaged does not pass."""
    key = with_ek.state.permanent.endorsement_key
    damaged = type(key)(
        key.public,
        payload=key.payload,
        usage_auth=key.usage_auth,
        migration_auth=key.migration_auth,
        prime=bytes(127) + b"\7",
        parent_pcr_status=False,
    )
    with_ek.change("permanent", endorsement_key=damaged)
    with_ek.power_cycle().ok()
    assert with_ek.tpm.send(SELF_TEST_FULL).code == ReturnCode.FAILEDSELFTEST


def test_get_test_result_says_something_before_the_full_test(powered):
    powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    assert b"limited" in powered.tpm.send(GET_TEST_RESULT).ok()


# -- the locality 4 hash sequence ------------------------------------------------------------------


def launch(bench, *parts):
    bench.engine.keep(bench.engine.hash_start())
    for part in parts:
        bench.engine.keep(bench.engine.hash_data(part))
    bench.engine.keep(bench.engine.hash_end())


def test_launch_measures_into_pcr_17_from_zero(fresh):
    launch(fresh, b"code ", b"launched")
    assert pcr(fresh, 17) == sha1(ZERO, sha1(b"code launched"))
    assert [pcr(fresh, i) for i in range(18, 23)] == [ZERO] * 5
    assert fresh.tpm.flags()[18] == 1
    assert fresh.state.stany.tos_present


def test_launch_leaves_static_pcrs_alone(fresh):
    fresh.tpm.send(EXTEND, u32(0) + ONES).ok()
    fresh.tpm.send(EXTEND, u32(16) + ONES).ok()
    before = [pcr(fresh, i) for i in (0, 16, 23)]
    launch(fresh, b"x")
    assert [pcr(fresh, i) for i in (0, 16, 23)] == before


def test_launch_writes_the_established_flag_once(fresh):
    first = fresh.engine.hash_start()
    assert first.permanent_changed
    fresh.engine.keep(first)
    assert not fresh.engine.hash_start().permanent_changed


@pytest.mark.parametrize("cycle", ["start", "data", "end"])
def test_launch_out_of_order_is_failure_mode(powered, cycle):
    actions = {
        "start": powered.engine.hash_start,
        "data": lambda: powered.engine.hash_data(b"x"),
        "end": powered.engine.hash_end,
    }
    if cycle != "start":
        powered.tpm.send(STARTUP, u16(CLEAR)).ok()
    outcome = actions[cycle]()
    assert outcome.code is not ReturnCode.SUCCESS
    powered.engine.keep(outcome)
    assert powered.tpm.send(OIAP).code == ReturnCode.FAILEDSELFTEST


def test_tpm_in_use_goes_on_after_a_launch(owned):
    session = owned.tpm.osap(4, SRK, SRK_AUTH)
    launch(owned, b"x")
    assert session.handle in owned.state.stany.sessions
