"""Sessions, eviction (Part 3, chapters 18, 22 and 27.1), and what the dispatcher makes of them."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import nv_area
from tests.tpm12.witness import (
    EK,
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    frame,
    hmac1,
    number,
    sha1,
    u8,
    u16,
    u32,
)
from tpm12.state import Counter, TransportSession

OIAP, OSAP, FLUSH_SPECIFIC, TERMINATE_HANDLE, EVICT_KEY, RESET = 0x0A, 0x0B, 0xBA, 0x96, 0x22, 0x5A
GET_CAPABILITY_OWNER, CREATE_WRAP_KEY, GET_PUB_KEY = 0x66, 0x1F, 0x21
KEY, AUTH, HASH, TRANS, CONTEXT, COUNTER = range(1, 7)
ET_KEY, ET_OWNER, ET_SRK, ET_COUNTER, ET_NV = 0x01, 0x02, 0x04, 0x0A, 0x0B
HANDLE, OPERATOR = 0x1234, 0x40000004
ODD = b"p" * 20


def owner_command(bench, session):
    return bench.tpm.auth(GET_CAPABILITY_OWNER, b"", session)


def osap_code(bench, entity_type, value):
    return bench.tpm.send(OSAP, u16(entity_type) + u32(value) + ODD).code


# -- opening ---------------------------------------------------------------------------------------


def test_handles_and_nonces_are_new_each_time(owned):
    sessions = [owned.tpm.oiap() for _ in range(8)] + [
        owned.tpm.osap(ET_SRK, SRK, SRK_AUTH) for _ in range(8)
    ]
    assert len({session.handle for session in sessions}) == 16
    assert len({session.even for session in sessions}) == 16
    assert all(session.handle >> 24 != 0x40 for session in sessions)


def test_seventeenth_session_is_resources(owned):
    for _ in range(16):
        owned.tpm.oiap()
    assert owned.tpm.send(OIAP).code == ReturnCode.RESOURCES
    assert osap_code(owned, ET_SRK, SRK) == ReturnCode.RESOURCES
    owned.tpm.send(RESET).ok()
    owned.tpm.oiap()


def test_osap_secret_is_the_specifications(owned):
    out = owned.tpm.send(OSAP, u16(ET_OWNER) + u32(OWNER) + ODD).ok()
    shared = hmac1(OWNER_AUTH, out[24:44], ODD)
    owner_command(owned, Session(number(out[:4]), out[4:24], shared)).ok()


def test_osap_of_the_owner_ignores_the_value(owned):
    owner_command(owned, owned.tpm.osap(ET_OWNER, 0x5555, OWNER_AUTH)).ok()


@pytest.mark.parametrize(("entity_type", "value"), [(ET_SRK, SRK), (ET_SRK, 0), (ET_KEY, SRK)])
def test_osap_of_the_srk(owned, entity_type, value):
    session = owned.tpm.osap(entity_type, value, SRK_AUTH)
    # A use of the SRK that gets past authorization fails later, on its parameters.
    template_code = owned.tpm.auth(
        CREATE_WRAP_KEY, bytes(40) + b"\1\1\0\0" + bytes(100), session, handles=u32(SRK)
    ).code
    assert template_code not in (ReturnCode.AUTHFAIL, ReturnCode.BAD_MODE)


def test_osap_of_things_that_need_no_owner(fresh):
    fresh.change("permanent", nv={0x1000: nv_area(0x1000, 4)})
    counter = Counter(label=b"abcd", auth_data=ZERO, value=1)
    fresh.change("permanent", counters={2: counter})
    fresh.tpm.osap(ET_NV, 0x1000)
    fresh.tpm.osap(ET_COUNTER, 2)


@pytest.mark.parametrize(
    ("entity_type", "value", "code"),
    [
        (ET_KEY, 0x99, ReturnCode.INVALID_KEYHANDLE),
        (ET_KEY, OWNER, ReturnCode.INVALID_RESOURCE),
        (ET_KEY, OPERATOR, ReturnCode.BAD_HANDLE),
        (ET_KEY, EK, ReturnCode.KEYNOTFOUND),
        (ET_NV, 0x99, ReturnCode.BADINDEX),
        (ET_COUNTER, 0x99, ReturnCode.BAD_COUNTER),
        (0x00, 0, ReturnCode.BAD_PARAMETER),
        (0x03, 0, ReturnCode.BAD_PARAMETER),
        (0x06, 0, ReturnCode.BAD_PARAMETER),
        (0x0C, 0, ReturnCode.BAD_PARAMETER),
        (0x40, 0, ReturnCode.BAD_PARAMETER),
        (0x0104, SRK, ReturnCode.INAPPROPRIATE_ENC),
        (0xFF02, OWNER, ReturnCode.INAPPROPRIATE_ENC),
    ],
)
def test_osap_refuses(owned, entity_type, value, code):
    assert osap_code(owned, entity_type, value) == code


@pytest.mark.parametrize(
    ("entity_type", "value"), [(ET_OWNER, OWNER), (ET_SRK, SRK), (ET_KEY, SRK)]
)
def test_osap_of_owner_and_srk_without_owner_is_nosrk(with_ek, entity_type, value):
    assert osap_code(with_ek, entity_type, value) == ReturnCode.NOSRK


def test_osap_in_fips_mode_masks_with_aes_only(owned):
    owned.set_flags(fips=True)
    assert osap_code(owned, ET_SRK, SRK) == ReturnCode.INAPPROPRIATE_ENC
    assert osap_code(owned, 0x0600 | ET_SRK, SRK) == 0


# -- using -----------------------------------------------------------------------------------------


def test_session_goes_on_with_a_new_nonce_each_time(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    for _ in range(3):
        owner_command(owned, session).ok()  # the witness checks HMACs and nonces
    assert session.continues


def test_session_ends_when_asked(owned):
    session = owned.tpm.oiap(OWNER_AUTH).ending()
    owner_command(owned, session).ok()
    assert owner_command(owned, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_replayed_request_is_authfail(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    seen = []
    exchange = owned.tpm.exchange
    owned.tpm.exchange = lambda request, locality: (
        seen.append(request),
        exchange(request, locality),
    )[1]
    owner_command(owned, session).ok()
    assert owned.tpm.raw(seen[0]).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("at", range(-45, 0))
def test_any_flipped_byte_of_the_auth_block_is_refused(owned, at):
    session = owned.tpm.oiap(OWNER_AUTH)
    request = bytearray(signed(GET_CAPABILITY_OWNER, b"", session, OWNER_AUTH))
    request[at] ^= 0x01
    assert owned.tpm.raw(bytes(request)).code in (
        ReturnCode.AUTHFAIL,
        ReturnCode.INVALID_AUTHHANDLE,
        ReturnCode.BAD_PARAMETER,
    )


def test_flipped_parameter_is_authfail(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    request = bytearray(signed(0x6E, u8(0), session, OWNER_AUTH))
    request[10] = 1
    assert owned.tpm.raw(bytes(request)).code == ReturnCode.AUTHFAIL
    assert not owned.state.permanent.flags.disable


def signed(ordinal, params, session, secret, *, continues=1):
    digest = sha1(u32(ordinal), params)
    odd = b"o" * 20
    mac = hmac1(secret, digest + session.even + odd + u8(continues))
    return frame(ordinal, params + u32(session.handle) + odd + u8(continues) + mac, 0xC2)


def test_failed_command_ends_its_session(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    assert owner_command(owned, session.with_key(ZERO)).code == ReturnCode.AUTHFAIL
    assert owner_command(owned, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_command_that_fails_after_its_proof_ends_its_session_too(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    assert owned.tpm.auth(0x81, u32(5), session).code == ReturnCode.BAD_PARAMETER
    assert owner_command(owned, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_failed_command_leaves_other_sessions_alone(owned):
    other = owned.tpm.oiap(OWNER_AUTH)
    owner_command(owned, owned.tpm.oiap(ZERO))
    owner_command(owned, other).ok()


def test_malformed_auth_block_leaves_its_session_alone(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    request = signed(GET_CAPABILITY_OWNER, b"", session, OWNER_AUTH)
    longer = request[:2] + u32(len(request) + 1) + request[6:] + b"\0"
    assert owned.tpm.raw(longer).code == ReturnCode.BAD_PARAM_SIZE
    owner_command(owned, session).ok()


def test_continue_flag_other_than_0_and_1_is_bad_parameter(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    request = signed(GET_CAPABILITY_OWNER, b"", session, OWNER_AUTH, continues=2)
    assert owned.tpm.raw(request).code == ReturnCode.BAD_PARAMETER
    owner_command(owned, session).ok()  # it could not be read, so the session was not touched


def test_unknown_session_is_invalid_authhandle(owned):
    answer = owner_command(owned, Session(0xBAD, ZERO, OWNER_AUTH))
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE


def test_session_bound_to_another_entity_is_authfail(owned):
    session = owned.tpm.osap(ET_SRK, SRK, SRK_AUTH)
    assert owner_command(owned, session).code == ReturnCode.AUTHFAIL


def test_session_bound_to_an_entity_with_the_same_secret_is_authfail(owned):
    """The binding is to the entity, not to what its secret happens to be."""
    area = nv_area(0x1000, 4)
    object.__setattr__(area, "auth_value", OWNER_AUTH)
    owned.change("permanent", nv={0x1000: area})
    session = owned.tpm.osap(ET_NV, 0x1000, OWNER_AUTH)
    assert owner_command(owned, session).code == ReturnCode.AUTHFAIL


def test_osap_session_does_not_outlive_a_change_of_the_secret(owned):
    session = owned.tpm.osap(ET_OWNER, OWNER, OWNER_AUTH)
    owned.change("permanent", owner_auth=ZERO)
    assert owner_command(owned, session).code == ReturnCode.AUTHFAIL


def test_wrong_hmacs_count_and_other_authfails_do_not(owned):
    owner_command(owned, owned.tpm.oiap(ZERO))
    assert owned.state.stclear.failed_tries == 1
    owner_command(owned, owned.tpm.osap(ET_SRK, SRK, SRK_AUTH))
    owner_command(owned, Session(0xBAD, ZERO, OWNER_AUTH))
    assert owned.state.stclear.failed_tries == 1
    owner_command(owned, owned.tpm.oiap(OWNER_AUTH)).ok()
    assert owned.state.stclear.failed_tries == 1


# -- flushing --------------------------------------------------------------------------------------


@pytest.fixture
def holding(owned):
    """An owned TPM with a key in a slot and another in the owner's control."""
    srk = owned.state.permanent.srk
    owned.change("volatile", keys={HANDLE: srk})
    owned.change("permanent", owner_evict_keys={0x55: srk})
    return owned


def flush(bench, handle, resource_type):
    return bench.tpm.send(FLUSH_SPECIFIC, u32(handle) + u32(resource_type)).code


def test_flush_of_a_session(owned):
    for ordinal, tail in ((FLUSH_SPECIFIC, u32(AUTH)), (TERMINATE_HANDLE, b"")):
        session = owned.tpm.oiap(OWNER_AUTH)
        owned.tpm.send(ordinal, u32(session.handle) + tail).ok()
        assert owner_command(owned, session).code == ReturnCode.INVALID_AUTHHANDLE
        answer = owned.tpm.send(ordinal, u32(session.handle) + tail)
        assert answer.code == ReturnCode.INVALID_AUTHHANDLE


def test_flush_of_a_key_ends_the_sessions_bound_to_it(holding):
    bound = holding.tpm.osap(ET_KEY, HANDLE, SRK_AUTH)
    other = holding.tpm.oiap(OWNER_AUTH)
    assert flush(holding, HANDLE, KEY) == 0
    assert list(holding.state.stany.sessions) == [other.handle]
    assert flush(holding, HANDLE, KEY) == ReturnCode.BAD_PARAMETER
    assert flush(holding, bound.handle, AUTH) == ReturnCode.INVALID_AUTHHANDLE


def test_evict_key(holding):
    holding.tpm.send(EVICT_KEY, u32(HANDLE)).ok()
    assert holding.tpm.send(EVICT_KEY, u32(HANDLE)).code == ReturnCode.INVALID_KEYHANDLE


@pytest.mark.parametrize("handle", [SRK, OWNER])
def test_srk_is_not_evicted(holding, handle):
    assert holding.tpm.send(EVICT_KEY, u32(handle)).code == ReturnCode.INVALID_KEYHANDLE
    assert flush(holding, handle, KEY) == ReturnCode.BAD_PARAMETER


def test_owner_evict_key_is_not_flushed(holding):
    assert flush(holding, 0x55, KEY) == ReturnCode.KEY_OWNER_CONTROL
    assert holding.tpm.send(EVICT_KEY, u32(0x55)).code == ReturnCode.KEY_OWNER_CONTROL


def test_flush_of_a_saved_context(owned):
    owned.change("stany", context_list={3: 77, 4: 78})
    assert flush(owned, 77, CONTEXT) == 0
    assert owned.state.stany.context_list == {4: 78}
    assert flush(owned, 77, CONTEXT) == ReturnCode.BAD_PARAMETER


def test_flush_of_an_unknown_transport_session_is_invalid_authhandle(owned):
    assert flush(owned, 5, TRANS) == ReturnCode.INVALID_AUTHHANDLE


def test_flush_of_a_transport_session_ends_its_exclusiveness(owned):
    transport = TransportSession(
        auth_data=ZERO,
        nonce_even=ZERO,
        attributes=0,
        algorithm_id=0,
        enc_scheme=1,
        trans_digest=ZERO,
    )
    owned.change("stany", transport_sessions={5: transport, 6: transport}, transport_exclusive=5)
    # Any command outside an exclusive session ends it; by then there is nothing left to flush.
    assert flush(owned, 5, TRANS) == ReturnCode.INVALID_AUTHHANDLE
    assert flush(owned, 6, TRANS) == 0
    assert owned.state.stany.transport_sessions == {}
    assert owned.state.stany.transport_exclusive == 0


@pytest.mark.parametrize("resource_type", [0, HASH, COUNTER, 7, 99])
def test_flush_of_another_resource_is_invalid_resource(owned, resource_type):
    assert flush(owned, 5, resource_type) == ReturnCode.INVALID_RESOURCE


def test_reset_drops_sessions_and_nothing_else(holding):
    holding.tpm.oiap()
    before = holding.state
    holding.tpm.send(RESET).ok()
    assert holding.state.stany.sessions == {}
    assert holding.state.volatile is before.volatile
    assert holding.state.stclear is before.stclear
    assert holding.state.permanent is before.permanent


# -- frames ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", range(11))
def test_frame_shorter_than_a_header_is_bad_param_size(fresh, size):
    request = frame(OIAP)[:size]
    if size < 10:
        assert fresh.tpm.raw(request).code == ReturnCode.BAD_PARAM_SIZE


@pytest.mark.parametrize("claimed", [0, 9, 11, 0x7FFFFFFF, 0xFFFFFFFF])
def test_param_size_that_is_not_the_frames_is_bad_param_size(fresh, claimed):
    request = u16(0xC1) + u32(claimed) + u32(OIAP)
    assert fresh.tpm.raw(request).code == ReturnCode.BAD_PARAM_SIZE
