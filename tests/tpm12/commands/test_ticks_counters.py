"""Ticks, tick stamps and monotonic counters."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import OWNER_AUTH, SRK_AUTH
from tests.tpm12.makers import (
    BIND,
    ET_COUNTER,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    LEGACY,
    WRONG,
    loaded,
    signing,
    storage,
    template,
)
from tests.tpm12.witness import (
    SRK,
    ZERO,
    is_signature,
    number,
    parse_sized,
    sized,
    u16,
    u32,
)
from tpm12.profile import Profile
from tpm12.state import Counter

GET_TICKS, TICK_STAMP_BLOB = 0xF1, 0xF2
CREATE, INCREMENT, READ, RELEASE, RELEASE_OWNER = range(0xDC, 0xE1)
COUNTER_AUTH = b"counter secret".ljust(20)
NO_COUNTER, RELEASED = 0xFFFFFFFF, 0xFFFFFFFE


# -- ticks -----------------------------------------------------------------------------------------


def ticks(bench):
    out = bench.tpm.send(GET_TICKS).ok()
    assert out[:2] == u16(0x14)
    assert number(out[10:12]) == 1
    assert len(out) == 32
    return number(out[2:10]), out[12:]


def test_ticks_start_at_tpm_init_and_count_microseconds(fresh):
    fresh.power_cycle().ok()
    assert ticks(fresh)[0] == 0
    fresh.clock.pass_s(1.5)
    assert ticks(fresh)[0] == 1_500_000
    fresh.clock.us += 1
    assert ticks(fresh)[0] == 1_500_001


def test_ticks_keep_their_nonce_until_the_next_tpm_init(fresh):
    fresh.power_cycle().ok()
    first = ticks(fresh)[1]
    fresh.clock.pass_s(100)
    assert ticks(fresh)[1] == first
    fresh.power_cycle().ok()
    count, nonce = ticks(fresh)
    assert (count, nonce != first, nonce != ZERO) == (0, True, True)


def test_ticks_hold_for_longer_than_32_bits(fresh):
    fresh.power_cycle().ok()
    fresh.clock.pass_s(10**9)
    assert ticks(fresh)[0] == 10**15


def stamp(tpm, handle, secret=KEY_AUTH):
    session = tpm.oiap(secret).ending()
    return tpm.auth(TICK_STAMP_BLOB, b"r" * 20 + b"d" * 20, session, handles=u32(handle))


@pytest.mark.parametrize(
    "wanted", [signing(2), signing(4), template(LEGACY, 2, 2)], ids=["SHA1", "INFO", "legacy"]
)
def test_tick_stamp_signs_digest_and_ticks(owned, wanted):
    handle, key = loaded(owned.tpm, wanted)
    owned.clock.pass_s(3)
    body = stamp(owned.tpm, handle).ok()
    current, (sig, rest) = body[:32], parse_sized(body[32:])
    assert rest == b""
    assert current == owned.tpm.send(GET_TICKS).ok()
    info = u16(5) + b"TSTP" + b"r" * 20 + sized(b"d" * 20 + current)
    assert is_signature(key.modulus, sig, info)
    assert not owned.last.permanent_changed


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (storage(), ReturnCode.INVALID_KEYUSAGE),
        (template(BIND, 3, 1), ReturnCode.INVALID_KEYUSAGE),
        (signing(3), ReturnCode.INAPPROPRIATE_SIG),
        (template(LEGACY, 2, 3), ReturnCode.INAPPROPRIATE_SIG),
    ],
    ids=["storage", "bind", "DER", "legacy with DER"],
)
def test_tick_stamp_with_another_key(owned, wanted, code):
    handle, _ = loaded(owned.tpm, wanted)
    assert stamp(owned.tpm, handle).code == code


def test_tick_stamp_authorization(owned):
    handle, _ = loaded(owned.tpm, signing())
    free, key = loaded(owned.tpm, signing(auth_data_usage=0))
    assert stamp(owned.tpm, handle, WRONG).code == ReturnCode.AUTHFAIL
    assert stamp(owned.tpm, 0x4321).code == ReturnCode.INVALID_KEYHANDLE
    params = ZERO + ZERO
    assert owned.tpm.send(TICK_STAMP_BLOB, u32(handle) + params).code == ReturnCode.AUTHFAIL
    body = owned.tpm.send(TICK_STAMP_BLOB, u32(free) + params).ok()
    info = u16(5) + b"TSTP" + ZERO + sized(ZERO + body[:32])
    assert is_signature(key.modulus, body[36:], info)


# -- counters --------------------------------------------------------------------------------------


def create(tpm, label=b"cntr", secret=COUNTER_AUTH, owner_auth=OWNER_AUTH):
    session = tpm.osap(ET_OWNER, 0, owner_auth)
    return tpm.auth(CREATE, session.masked(secret) + label, session)


def created(tpm, **more):
    """Create a counter: its id and value."""
    body = create(tpm, **more).ok()
    assert len(body) == 14
    return number(body[:4]), value_of(body[4:])


def value_of(body, label=b"cntr"):
    assert body[:6] == u16(0x0E) + label
    assert len(body) == 10
    return number(body[6:])


def increment(tpm, count_id, secret=COUNTER_AUTH):
    return tpm.auth(INCREMENT, u32(count_id), tpm.oiap(secret).ending())


def read(tpm, count_id):
    return tpm.send(READ, u32(count_id))


def release(tpm, count_id, secret=COUNTER_AUTH):
    return tpm.auth(RELEASE, u32(count_id), tpm.oiap(secret).ending())


def release_as_owner(tpm, count_id, secret=OWNER_AUTH):
    return tpm.auth(RELEASE_OWNER, u32(count_id), tpm.oiap(secret).ending())


def test_create_gives_id_label_and_first_value(owned):
    assert created(owned.tpm) == (0, 1)
    assert owned.last.permanent_changed
    counter = owned.state.permanent.counters[0]
    assert counter == Counter(label=b"cntr", auth_data=COUNTER_AUTH, value=1)
    assert owned.state.stany.sessions == {}


def test_create_starts_above_every_counter(owned):
    tpm = owned.tpm
    first, _ = created(tpm)
    for _ in range(5):
        increment(tpm, first).ok()
    assert created(tpm) == (1, 7)
    assert created(tpm) == (2, 8)


def test_create_starts_above_released_counters_and_takes_their_ids(owned):
    tpm = owned.tpm
    first, _ = created(tpm)
    for _ in range(5):
        increment(tpm, first).ok()
    release(tpm, first).ok()
    assert created(tpm) == (first, 7)


def test_create_when_every_counter_is_taken(owned):
    assert [created(owned.tpm) for _ in range(8)] == [(i, i + 1) for i in range(8)]
    before = owned.state.permanent
    assert create(owned.tpm).code == ReturnCode.RESOURCES
    assert owned.state.permanent is before
    release(owned.tpm, 3).ok()
    assert created(owned.tpm) == (3, 9)


def test_create_with_another_number_of_counters(make_bench, owned_state):
    bench = make_bench(owned_state, Profile(counters=1))
    created(bench.tpm)
    assert create(bench.tpm).code == ReturnCode.RESOURCES


def test_create_when_counting_is_over(owned):
    owned.change("permanent", counter_highest=0xFFFFFFFF)
    assert create(owned.tpm).code == ReturnCode.RESOURCES


def test_create_sessions(owned):
    tpm, params = owned.tpm, ZERO + b"cntr"
    codes = [
        tpm.auth(CREATE, params, session).code
        for session in (
            tpm.oiap(OWNER_AUTH),
            tpm.osap(ET_SRK, SRK, SRK_AUTH),
            tpm.osap(ET_OWNER, 0, WRONG),
        )
    ]
    assert codes == [ReturnCode.BAD_MODE, ReturnCode.AUTHFAIL, ReturnCode.AUTHFAIL]
    assert owned.state.permanent.counters == {}


def test_increment_counts_by_one(owned):
    count_id, value = created(owned.tpm)
    for i in range(1, 4):
        assert value_of(increment(owned.tpm, count_id).ok()) == value + i
        assert owned.last.permanent_changed
        assert value_of(read(owned.tpm, count_id).ok()) == value + i
        assert not owned.last.permanent_changed


def test_increment_survives_power(owned):
    count_id, _ = created(owned.tpm)
    increment(owned.tpm, count_id).ok()
    owned.power_cycle().ok()
    assert value_of(read(owned.tpm, count_id).ok()) == 2


def test_increment_makes_a_counter_the_active_one_until_st_clear(owned):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    assert owned.state.stclear.count_id == NO_COUNTER
    increment(tpm, first).ok()
    assert owned.state.stclear.count_id == first
    assert increment(tpm, second).code == ReturnCode.BAD_COUNTER
    owned.power_cycle().ok()
    increment(tpm, second).ok()
    assert increment(tpm, first).code == ReturnCode.BAD_COUNTER


def test_increment_that_fails_makes_no_counter_active(owned):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    assert increment(tpm, first, WRONG).code == ReturnCode.AUTHFAIL
    assert increment(tpm, 7).code == ReturnCode.BAD_COUNTER
    assert owned.state.stclear.count_id == NO_COUNTER
    increment(tpm, second).ok()


def test_increment_of_another_counter_is_told_before_the_secret(owned):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    increment(tpm, first).ok()
    assert increment(tpm, second, WRONG).code == ReturnCode.BAD_COUNTER
    assert owned.state.stclear.failed_tries == 0


def test_increment_under_an_osap_session(owned):
    tpm = owned.tpm
    count_id, _ = created(tpm)
    session = tpm.osap(ET_COUNTER, count_id, COUNTER_AUTH)
    for value in (2, 3):
        assert value_of(tpm.auth(INCREMENT, u32(count_id), session).ok()) == value
    assert session.continues


def test_osap_session_of_a_counter_does_not_count_another(owned):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    session = tpm.osap(ET_COUNTER, first, COUNTER_AUTH)
    assert tpm.auth(INCREMENT, u32(second), session).code == ReturnCode.AUTHFAIL


def test_increment_never_starts_anew(owned):
    count_id, _ = created(owned.tpm)
    last = Counter(label=b"cntr", auth_data=COUNTER_AUTH, value=0xFFFFFFFE)
    owned.change("permanent", counters={count_id: last})
    assert value_of(increment(owned.tpm, count_id).ok()) == 0xFFFFFFFF
    assert increment(owned.tpm, count_id).code == ReturnCode.BAD_COUNTER
    assert value_of(read(owned.tpm, count_id).ok()) == 0xFFFFFFFF


@pytest.mark.parametrize("count_id", [0, 7, 8, RELEASED, NO_COUNTER])
def test_counters_that_are_not_there(owned, count_id):
    tpm = owned.tpm
    for answer in (
        read(tpm, count_id),
        increment(tpm, count_id),
        release(tpm, count_id),
        release_as_owner(tpm, count_id),
    ):
        assert answer.code == ReturnCode.BAD_COUNTER


@pytest.mark.parametrize("way", [release, release_as_owner])
def test_release_forgets_the_counter(owned, way):
    count_id, _ = created(owned.tpm)
    assert way(owned.tpm, count_id).ok() == b""
    assert owned.last.permanent_changed
    assert owned.state.permanent.counters == {}
    assert read(owned.tpm, count_id).code == ReturnCode.BAD_COUNTER


@pytest.mark.parametrize("way", [release, release_as_owner])
def test_release_with_a_wrong_secret(owned, way):
    count_id, _ = created(owned.tpm)
    assert way(owned.tpm, count_id, WRONG).code == ReturnCode.AUTHFAIL
    read(owned.tpm, count_id).ok()


@pytest.mark.parametrize("way", [release, release_as_owner])
def test_release_of_the_active_counter_stops_counting_until_st_clear(owned, way):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    increment(tpm, first).ok()
    way(tpm, first).ok()
    assert owned.state.stclear.count_id == RELEASED
    assert increment(tpm, second).code == ReturnCode.BAD_COUNTER
    assert created(tpm)[0] == first
    assert increment(tpm, first).code == ReturnCode.BAD_COUNTER
    owned.power_cycle().ok()
    increment(tpm, second).ok()


def test_release_of_another_counter_leaves_the_active_one(owned):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    increment(tpm, first).ok()
    release(tpm, second).ok()
    increment(tpm, first).ok()


@pytest.mark.parametrize("way", [release, release_as_owner])
def test_release_ends_the_sessions_of_its_counter_only(owned, way):
    tpm = owned.tpm
    first, second = created(tpm)[0], created(tpm)[0]
    bound = tpm.osap(ET_COUNTER, first, COUNTER_AUTH)
    other = tpm.osap(ET_COUNTER, second, COUNTER_AUTH)
    way(tpm, first).ok()
    assert set(owned.state.stany.sessions) == {other.handle}
    answer = tpm.auth(INCREMENT, u32(first), bound)
    assert answer.code == ReturnCode.BAD_COUNTER


def test_release_under_an_osap_session_ends_it_and_says_so(owned):
    tpm = owned.tpm
    count_id, _ = created(tpm)
    session = tpm.osap(ET_COUNTER, count_id, COUNTER_AUTH)
    tpm.auth(RELEASE, u32(count_id), session).ok()
    assert not session.continues
    assert owned.state.stany.sessions == {}


def test_release_under_an_oiap_session_keeps_it(owned):
    tpm = owned.tpm
    count_id, _ = created(tpm)
    session = tpm.oiap(COUNTER_AUTH)
    tpm.auth(RELEASE, u32(count_id), session).ok()
    assert session.continues


def test_counters_are_read_and_released_without_an_owner(owned):
    count_id, _ = created(owned.tpm)
    owned.change("permanent", owner_auth=None)
    read(owned.tpm, count_id).ok()
    assert increment(owned.tpm, count_id).code == ReturnCode.NOSRK
    release(owned.tpm, count_id).ok()
