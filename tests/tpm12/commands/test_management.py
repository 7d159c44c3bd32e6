"""Lockout, and keys in the owner's control (Part 3, chapters 9 and 21.1)."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import PooledPrimes, made_key
from tests.tpm12.witness import (
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    frame,
    rsa_parms,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.keys import LoadedKey, described
from tpm12.profile import Profile

RESET_LOCK_VALUE, KEY_CONTROL_OWNER, GET_CAPABILITY_OWNER = 0x40, 0x23, 0x66
FLUSH_SPECIFIC, EVICT_KEY, OIAP, STARTUP = 0xBA, 0x22, 0x0A, 0x99
HANDLE = 0x1234


def owner_command(bench, secret=OWNER_AUTH):
    session = bench.tpm.oiap(secret).ending()
    return bench.tpm.auth(GET_CAPABILITY_OWNER, b"", session).code


def unlock(bench, secret=OWNER_AUTH):
    return bench.tpm.auth(RESET_LOCK_VALUE, b"", bench.tpm.oiap(secret).ending()).code


# -- ResetLockValue --------------------------------------------------------------------------------


@pytest.fixture
def locked(owned):
    for _ in range(6):
        assert owner_command(owned, ZERO) == ReturnCode.AUTHFAIL
    assert owner_command(owned) == ReturnCode.DEFEND_LOCK_RUNNING
    return owned


def test_lock_sets_in_after_the_threshold_and_not_before(owned):
    for _ in range(5):
        owner_command(owned, ZERO)
    assert owner_command(owned) == 0


def test_lock_ends_with_time_and_doubles_with_each_failure(locked):
    locked.clock.pass_s(1)
    assert owner_command(locked) == 0
    assert owner_command(locked, ZERO) == ReturnCode.AUTHFAIL
    locked.clock.pass_s(1.9)
    assert owner_command(locked) == ReturnCode.DEFEND_LOCK_RUNNING
    locked.clock.pass_s(0.2)
    assert owner_command(locked) == 0


def test_lock_leaves_commands_without_authorization_alone(locked):
    locked.tpm.send(0x15, u32(0)).ok()


def test_lock_is_no_reason_to_refuse_a_startup(locked):
    request = frame(STARTUP, u16(1) + bytes(45), 0xC2)
    assert locked.tpm.raw(request).code == ReturnCode.BADTAG
    assert locked.tpm.send(STARTUP, u16(1)).code == ReturnCode.INVALID_POSTINIT


def test_lock_keeps_the_session_of_the_refused_command(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    owned.change("stclear", failed_tries=6, last_failure_us=owned.clock.us)
    answer = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session)
    assert answer.code == ReturnCode.DEFEND_LOCK_RUNNING
    owned.clock.pass_s(2)
    owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session).ok()


def test_reset_lock_value_works_while_locked(locked):
    assert unlock(locked) == 0
    assert locked.state.stclear.failed_tries == 0
    assert locked.state.stclear.last_failure_us == 0
    assert owner_command(locked) == 0


def test_reset_lock_value_under_osap(locked):
    session = locked.tpm.osap(2, OWNER, OWNER_AUTH)
    locked.tpm.auth(RESET_LOCK_VALUE, b"", session).ok()


def test_reset_lock_value_without_failures_changes_nothing_that_is_kept(owned):
    before = owned.state
    assert unlock(owned) == 0
    assert owned.state.stclear is before.stclear
    assert owned.state.permanent is before.permanent


def test_reset_lock_value_once_failed_stays_closed_while_locked(locked):
    assert unlock(locked, ZERO) == ReturnCode.AUTHFAIL
    assert locked.state.stclear.failed_tries == 7
    assert unlock(locked) == ReturnCode.AUTHFAIL
    assert locked.state.stclear.failed_tries == 7  # a refusal without a look is no guess
    locked.clock.pass_s(1.8)
    assert unlock(locked) == ReturnCode.AUTHFAIL
    locked.clock.pass_s(0.4)
    assert unlock(locked) == 0
    assert locked.state.stclear.failed_tries == 0


def test_reset_lock_value_once_failed_is_open_after_start_up(locked):
    assert unlock(locked, ZERO) == ReturnCode.AUTHFAIL
    locked.power_cycle().ok()
    assert unlock(locked) == 0


def test_reset_lock_value_once_failed_is_open_where_nothing_is_locked(owned):
    assert unlock(owned, ZERO) == ReturnCode.AUTHFAIL
    assert owned.state.stclear.disable_reset_lock
    assert owner_command(owned) == 0
    assert not owned.state.stclear.disable_reset_lock
    assert unlock(owned, ZERO) == ReturnCode.AUTHFAIL
    assert unlock(owned) == 0


def test_reset_lock_value_ends_the_session_that_failed(owned):
    session = owned.tpm.oiap(ZERO)
    assert owned.tpm.auth(RESET_LOCK_VALUE, b"", session).code == ReturnCode.AUTHFAIL
    assert session.handle not in owned.state.stany.sessions


def test_reset_lock_value_with_another_entitys_session_closes_it_too(locked):
    session = locked.tpm.osap(4, SRK, SRK_AUTH)
    assert locked.tpm.auth(RESET_LOCK_VALUE, b"", session).code == ReturnCode.AUTHFAIL
    assert locked.state.stclear.failed_tries == 6
    assert unlock(locked) == ReturnCode.AUTHFAIL


def test_reset_lock_value_with_an_unknown_session_closes_nothing(owned):
    session = Session(0xBAD, ZERO, OWNER_AUTH)
    answer = owned.tpm.auth(RESET_LOCK_VALUE, b"", session)
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE
    assert unlock(owned) == 0


# -- KeyControlOwner -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def key():
    return made_key(PooledPrimes().primes(2048, 65537), 0x11, usage_auth=ZERO, migration_auth=ZERO)


@pytest.fixture
def holding(owned, key):
    """An owned TPM with a key in a slot."""
    owned.change("volatile", keys={HANDLE: key})
    return owned


def control(bench, key, value=1, *, handle=HANDLE, bit=1, secret=OWNER_AUTH, pubkey=None):
    pubkey = pubkey or rsa_parms() + sized(key.public.pub_key)
    body = pubkey + u32(bit) + u8(value)
    session = bench.tpm.oiap(secret).ending()
    return bench.tpm.auth(KEY_CONTROL_OWNER, body, session, handles=u32(handle)).code


def key_handles(bench):
    return bench.tpm.capability(7)


def test_key_control_owner_keeps_a_key_through_start_up(holding, key):
    assert control(holding, key) == 0
    assert holding.last.permanent_changed
    assert key_handles(holding) == u16(1) + u32(HANDLE)
    holding.power_cycle().ok()
    assert key_handles(holding) == u16(1) + u32(HANDLE)
    assert (
        holding.tpm.send(FLUSH_SPECIFIC, u32(HANDLE) + u32(1)).code == ReturnCode.KEY_OWNER_CONTROL
    )
    assert holding.tpm.send(EVICT_KEY, u32(HANDLE)).code == ReturnCode.KEY_OWNER_CONTROL


def test_key_control_owner_gives_a_key_back_to_its_slot(holding, key):
    control(holding, key)
    assert control(holding, key, 0) == 0
    assert key_handles(holding) == u16(1) + u32(HANDLE)
    holding.tpm.send(FLUSH_SPECIFIC, u32(HANDLE) + u32(1)).ok()
    assert key_handles(holding) == u16(0)


@pytest.mark.parametrize("value", [0, 1])
def test_key_control_owner_to_the_present_value_writes_nothing(holding, key, value):
    if value:
        control(holding, key)
    assert control(holding, key, value) == 0
    assert not holding.last.permanent_changed


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"secret": ZERO}, ReturnCode.AUTHFAIL),
        ({"secret": ZERO, "handle": 0x99}, ReturnCode.AUTHFAIL),
        ({"handle": 0x99}, ReturnCode.INVALID_KEYHANDLE),
        ({"handle": SRK}, ReturnCode.INVALID_KEYHANDLE),
        ({"pubkey": rsa_parms() + sized(b"\1" * 256)}, ReturnCode.BAD_PARAMETER),
        ({"pubkey": rsa_parms() + sized(b"\1" * 256), "bit": 2}, ReturnCode.BAD_PARAMETER),
        ({"bit": 0}, ReturnCode.BAD_MODE),
        ({"bit": 2}, ReturnCode.BAD_MODE),
        ({"bit": 3}, ReturnCode.BAD_MODE),
        ({"value": 2}, ReturnCode.BAD_PARAMETER),
    ],
)
def test_key_control_owner_refuses(holding, key, changed, code):
    assert control(holding, key, **changed) == code
    assert holding.state.permanent.owner_evict_keys == {}


def with_flags_and_status(key, *, flags=0, parent_pcr_status=False):
    public = described(key.public, pcr_info=b"", pub_key=key.public.pub_key, enc_data=b"")
    object.__setattr__(public, "key_flags", flags)
    return LoadedKey(
        public,
        payload=1,
        usage_auth=ZERO,
        migration_auth=ZERO,
        prime=key.prime,
        parent_pcr_status=parent_pcr_status,
    )


@pytest.mark.parametrize("unfit", [{"flags": 4}, {"parent_pcr_status": True}])
def test_key_control_owner_of_a_key_that_must_not_last_is_bad_parameter(owned, key, unfit):
    owned.change("volatile", keys={HANDLE: with_flags_and_status(key, **unfit)})
    assert control(owned, key) == ReturnCode.BAD_PARAMETER
    assert control(owned, key, 0) == 0


def test_key_control_owner_leaves_slots_for_others(make_bench, owned_state, key):
    for profile, limit in (
        (Profile(), 10),
        (Profile(key_slots=5, owner_evict_slots=10), 3),
        (Profile(key_slots=10, owner_evict_slots=2), 2),
    ):
        bench = make_bench(owned_state, profile=profile)
        bench.change("permanent", owner_evict_keys=dict.fromkeys(range(1, limit + 1), key))
        bench.change("volatile", keys={HANDLE: key})
        assert control(bench, key) == ReturnCode.NOSPACE
        bench.change("permanent", owner_evict_keys=dict.fromkeys(range(1, limit), key))
        assert control(bench, key) == 0


def test_key_control_owner_key_survives_being_stored(holding, key):
    """What power-off keeps is what was kept by then."""
    control(holding, key)
    kept = holding.state.permanent.owner_evict_keys[HANDLE]
    assert LoadedKey.from_bytes(kept.to_bytes()).pub_data_digest == key.pub_data_digest
