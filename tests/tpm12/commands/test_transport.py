"""Transport sessions (Part 3, chapter 24).

The other end is `transport_maker.Transport`, which computes everything from the specification's
formulas; the same sequences ran against libtpms under swtpm, whose deviations are named here.
"""

import pytest
from cryptography.hazmat.primitives.ciphers import modes

from protocol.return_codes import ReturnCode
from tests.tpm12.makers import (
    KEY_AUTH,
    LEGACY,
    load,
    loaded,
    lock_nv,
    mgf1,
    seal,
    signing,
    storage,
    template,
    unseal,
    wrap,
)
from tests.tpm12.transport_maker import (
    AES,
    CTR,
    ENCRYPT,
    ESTABLISH,
    EXCLUSIVE,
    EXECUTE,
    HANDLES,
    KH_TRANSPORT,
    LOG,
    MGF1,
    NONE,
    OFB,
    RELEASE,
    SECRET,
    Transport,
    aes,
    ofb,
    public,
)
from tests.tpm12.witness import (
    EK,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Witness,
    frame,
    is_signature,
    number,
    oaep,
    sha1,
    sized,
    u8,
    u16,
    u32,
    xor,
)
from tpm12 import self_test
from tpm12.commands import ALL
from tpm12.profile import Profile
from tpm12.state import SelfTestState, TransportSession

OIAP, EXTEND, PCR_READ, SIGN, GET_RANDOM, GET_TICKS = 0x0A, 0x14, 0x15, 0x3C, 0x46, 0xF1
FLUSH, SAVE_STATE, STARTUP, OWNER_CLEAR, GET_CAPABILITY_OWNER = 0xBA, 0x98, 0x99, 0x5B, 0x66
SHA1_START, SHA1_UPDATE, SHA1_COMPLETE = 0xA0, 0xA1, 0xA2
GET_TEST_RESULT, SAVE_CONTEXT, DSAP = 0x54, 0xB8, 0x11
DEL_OWNER_BLOB, DEL_KEY_BLOB = 7, 9
RT_KEY, RT_AUTH, RT_TRANS = 1, 2, 4
CIPHERS = [(MGF1, NONE), (AES, CTR), (AES, OFB)]


def encrypted(bench, secret=SECRET, *, tag=0x1D, key=None):
    """TRANSPORT_AUTH under the SRK (or another modulus)."""
    modulus = key or bench.state.permanent.srk.public.pub_key
    return oaep(modulus, u16(tag) + secret)


def hidden(bench, algorithm=MGF1, scheme=NONE, attributes=ENCRYPT):
    """An encrypting session under the SRK."""
    session = Transport(bench.tpm, attributes, algorithm, scheme)
    session.moduli[SRK] = bench.state.permanent.srk.public.pub_key
    session.moduli[EK] = bench.state.permanent.endorsement_key.public.pub_key
    return session.open_under(SRK, encrypted(bench), bench.tpm.oiap(SRK_AUTH).ending())


def plain(bench, attributes=0, **more):
    return Transport(bench.tpm, attributes, **more).open()


def is_open(bench, session):
    return session.handle in bench.state.stany.transport_sessions


def establish(bench, key, transport_public, secret, *sessions):
    params = transport_public + sized(secret)
    return bench.tpm.auth(ESTABLISH, params, *sessions, handles=u32(key), out_handles=4)


# -- EstablishTransport ----------------------------------------------------------------------------


def test_establish_with_a_plain_secret(owned):
    answer = owned.tpm.send(
        ESTABLISH, u32(KH_TRANSPORT) + public(LOG, 1, 2) + sized(SECRET), locality=3
    )
    body = answer.ok()
    handle, locality, ticks, even = body[:4], body[4:8], body[8:40], body[40:]
    assert (number(locality), len(even)) == (3, 20)
    assert ticks[:2] == u16(0x14)
    assert ticks[2:] == owned.tpm.send(GET_TICKS).ok()[2:]
    session = owned.state.stany.transport_sessions[number(handle)]
    assert (session.auth_data, session.nonce_even) == (SECRET, even)
    assert (session.attributes, session.algorithm_id, session.enc_scheme) == (LOG, 1, 2)


def test_establish_under_a_key_decrypts_the_secret(owned):
    session = hidden(owned)
    assert owned.state.stany.transport_sessions[session.handle].auth_data == SECRET
    assert session.send(PCR_READ, u32(0)).ok() == ZERO


def test_establish_answers_under_the_keys_session_with_the_handle_outside(owned):
    """`establish` checks the response's HMAC with four bytes left out, as Part 3 §24.1 has them."""
    session = owned.tpm.oiap(SRK_AUTH)
    establish(owned, SRK, public(), encrypted(owned), session).ok()
    assert session.continues


@pytest.mark.parametrize("enc", [2, 3])
def test_establish_under_a_legacy_key_with_its_own_padding(owned, enc):
    key, parts = loaded(owned.tpm, template(LEGACY, enc, 2))
    secret = u16(0x1D) + SECRET
    if enc == 3:
        blob = oaep(parts.modulus, secret)
    else:
        padded = b"\0\2" + b"\x77" * (64 - 3 - len(secret)) + b"\0" + secret
        blob = pow(number(padded), 65537, number(parts.modulus)).to_bytes(64, "big")
    establish(owned, key, public(), blob, owned.tpm.oiap(KEY_AUTH)).ok()


def test_establish_under_a_key_that_needs_no_authorization(owned):
    key, parts = loaded(owned.tpm, storage(auth_data_usage=0))
    blob = encrypted(owned, key=parts.modulus)
    owned.tpm.send(ESTABLISH, u32(key) + public() + sized(blob)).ok()


def test_establish_plain_with_an_authorization_is_badtag(owned):
    answer = establish(owned, KH_TRANSPORT, public(), SECRET, owned.tpm.oiap(SRK_AUTH))
    assert answer.code == ReturnCode.BADTAG


def test_establish_plain_cannot_encrypt(owned):
    body = u32(KH_TRANSPORT) + public(ENCRYPT, MGF1, NONE) + sized(SECRET[1:])
    assert owned.tpm.send(ESTABLISH, body).code == ReturnCode.BAD_SCHEME  # told before the size


@pytest.mark.parametrize("size", [0, 19, 21])
def test_establish_plain_secret_of_another_size_is_bad_param_size(owned, size):
    body = u32(KH_TRANSPORT) + public() + sized(bytes(size))
    assert owned.tpm.send(ESTABLISH, body).code == ReturnCode.BAD_PARAM_SIZE


def test_establish_under_no_key_is_invalid_keyhandle(owned):
    answer = establish(owned, 0x1234, public(), encrypted(owned), owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.INVALID_KEYHANDLE


def test_establish_under_a_signing_key_is_invalid_keyusage(owned):
    key, _ = loaded(owned.tpm, signing())
    answer = establish(owned, key, public(), encrypted(owned), owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.INVALID_KEYUSAGE  # told before the secret is looked at


def test_establish_without_the_keys_secret_is_authfail(owned):
    answer = establish(owned, SRK, public(), encrypted(owned), owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.AUTHFAIL
    body = u32(SRK) + public() + sized(encrypted(owned))
    assert owned.tpm.send(ESTABLISH, body).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1


@pytest.mark.parametrize("blob", [b"", bytes(256), b"\x01" * 255])
def test_establish_secret_that_does_not_decrypt_is_decrypt_error(owned, blob):
    answer = establish(owned, SRK, public(), blob, owned.tpm.oiap(SRK_AUTH))
    assert answer.code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize(
    ("tag", "secret", "code"),
    [
        (0x1E, SECRET, ReturnCode.INVALID_STRUCTURE),
        (0x1D, SECRET[1:], ReturnCode.BAD_PARAM_SIZE),
        (0x1D, SECRET + b"\0", ReturnCode.BAD_PARAM_SIZE),  # libtpms ignores what is left over
    ],
)
def test_establish_what_decrypts_must_be_a_transport_auth(owned, tag, secret, code):
    blob = encrypted(owned, secret, tag=tag)
    answer = establish(owned, SRK, public(), blob, owned.tpm.oiap(SRK_AUTH))
    assert answer.code == code


@pytest.mark.parametrize(
    ("algorithm", "scheme", "code"),
    [
        (MGF1, NONE, 0),
        (AES, CTR, 0),
        (AES, OFB, 0),
        (MGF1, 0, ReturnCode.INAPPROPRIATE_ENC),
        (MGF1, CTR, ReturnCode.INAPPROPRIATE_ENC),
        (AES, NONE, ReturnCode.INAPPROPRIATE_ENC),
        (AES, 3, ReturnCode.INAPPROPRIATE_ENC),
        (8, CTR, ReturnCode.BAD_KEY_PROPERTY),
        (9, CTR, ReturnCode.BAD_KEY_PROPERTY),
        (10, NONE, ReturnCode.BAD_KEY_PROPERTY),
        (1, NONE, ReturnCode.BAD_KEY_PROPERTY),
        (0, 0, ReturnCode.BAD_KEY_PROPERTY),
    ],
)
def test_establish_ciphers(owned, algorithm, scheme, code):
    blob = encrypted(owned)
    answer = establish(
        owned, SRK, public(ENCRYPT, algorithm, scheme), blob, owned.tpm.oiap(SRK_AUTH).ending()
    )
    assert answer.code == code
    # Who does not encrypt may say anything.
    unhidden = public(0, algorithm, scheme)
    establish(owned, SRK, unhidden, blob, owned.tpm.oiap(SRK_AUTH).ending()).ok()


def test_establish_with_mgf1_is_not_fips(owned):
    owned.set_flags(fips=True)
    session = owned.tpm.oiap(SRK_AUTH)
    answer = establish(owned, SRK, public(ENCRYPT, MGF1, NONE), encrypted(owned), session)
    assert answer.code == ReturnCode.INAPPROPRIATE_ENC
    hidden(owned, AES, CTR)


def test_establish_of_another_structure_is_invalid_structure(owned):
    body = u32(KH_TRANSPORT) + u16(0x1F) + public()[2:] + sized(SECRET)
    assert owned.tpm.send(ESTABLISH, body).code == ReturnCode.INVALID_STRUCTURE


def test_establish_when_every_slot_is_taken_is_resources(make_bench, owned_state):
    bench = make_bench(owned_state, Profile(transport_sessions=3))
    for _ in range(3):
        plain(bench)
    body = u32(KH_TRANSPORT) + public() + sized(SECRET)
    assert bench.tpm.send(ESTABLISH, body).code == ReturnCode.RESOURCES
    assert number(bench.tpm.capability(5, u32(0x10B))) == 0
    assert number(bench.tpm.capability(0x14, u32(RT_TRANS))[:2]) == 3


# -- ExecuteTransport: what goes through -----------------------------------------------------------


def test_aes_of_the_tests_is_aes():
    # NIST SP 800-38A F.4.1.
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    plain_text = bytes.fromhex("6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c")
    cipher = bytes.fromhex("3b3fd92eb72dad20333449f8e83cfb4a7789508d16918f03")
    assert ofb(key, bytes(range(16)), plain_text) == cipher


def test_execute_without_encryption_shows_the_wrapped_command(owned):
    session = plain(owned)
    request = frame(PCR_READ, u32(17))
    response = session.exchange(request)
    assert response == owned.tpm.send(PCR_READ, u32(17)).raw


def test_execute_answers_with_ticks_and_locality(owned):
    session = plain(owned)
    owned.clock.pass_s(3)
    body = session.execute(frame(PCR_READ, u32(0)), locality=2).ok()
    ticks = owned.tpm.send(GET_TICKS).ok()
    assert body[:8] == ticks[2:10]
    assert number(body[8:12]) == 2


@pytest.mark.parametrize(("algorithm", "scheme"), CIPHERS)
def test_execute_hides_parameters_both_ways(owned, algorithm, scheme):
    """Bytes on the wire against the formulas of §24.2, actions 4 and 17."""
    session = hidden(owned, algorithm, scheme)
    value, old = sha1(b"measured"), owned.tpm.send(PCR_READ, u32(16)).ok()
    even, request = session.even, frame(EXTEND, u32(16) + value)
    outer = session.execute(request)
    odd = session.sent[0]
    shown = outer.ok()[16:]
    response = session.unwrap(request, outer.ok())
    assert response[10:] == sha1(old, value)
    new_even = session.even
    if algorithm == MGF1:
        out_mask = mgf1(new_even + odd + b"out" + SECRET, 20)
    else:
        iv = mgf1(new_even + odd + b"out", 16)
        stream = {OFB: ofb, CTR: _counter}[scheme]
        out_mask = stream(SECRET, iv, bytes(20))
    assert xor(shown[10:30], response[10:]) == out_mask
    assert shown[:10] == response[:10]
    assert even != new_even


def _counter(key, iv, data):
    return aes(key, modes.CTR(iv), data)


def test_execute_plain_text_in_an_encrypting_session_is_garbage(owned):
    session = hidden(owned)
    before = owned.state.stclear.pcrs
    outer = session.execute(frame(EXTEND, u32(16) + ZERO), hide=False)
    assert outer.code == ReturnCode.AUTHFAIL  # H1 is over what the TPM decrypted
    assert owned.state.stclear.pcrs is before


@pytest.mark.parametrize(("algorithm", "scheme"), CIPHERS)
def test_execute_same_plain_text_never_looks_the_same(owned, algorithm, scheme):
    session = hidden(owned, algorithm, scheme)
    seen = set()
    for _ in range(4):
        request = frame(GET_RANDOM, u32(0))
        outer = session.execute(request).ok()
        seen.add(outer[16:])
        session.unwrap(request, outer)
    assert len(seen) == 4


@pytest.mark.parametrize(("algorithm", "scheme"), CIPHERS)
def test_execute_runs_authorized_commands_in_their_own_sessions(owned, algorithm, scheme):
    inside = Witness(hidden(owned, algorithm, scheme, ENCRYPT | LOG).exchange)
    key, parts = loaded(inside, signing())
    signature = inside.auth(SIGN, sized(sha1(b"m")), inside.oiap(KEY_AUTH), handles=u32(key)).ok()
    assert is_signature(parts.modulus, signature[4:], b"m")
    blob = seal(inside, b"sealed inside").ok()
    assert unseal(inside, blob).ok()[4:] == b"sealed inside"
    assert unseal(owned.tpm, blob).ok()[4:] == b"sealed inside"


def test_execute_session_opened_inside_is_an_ordinary_one(owned):
    inside = Witness(plain(owned).exchange)
    session = inside.oiap(OWNER_AUTH)
    owned.tpm.auth(GET_CAPABILITY_OWNER, b"", session).ok()
    inside.auth(GET_CAPABILITY_OWNER, b"", session.ending()).ok()


def test_execute_wrapped_command_is_at_the_outer_locality(owned):
    session = plain(owned)
    request = frame(EXTEND, u32(20) + ZERO)
    answer = session.unwrap(request, session.execute(request, locality=0).ok())
    assert number(answer[6:10]) == ReturnCode.BAD_LOCALITY
    answer = session.unwrap(request, session.execute(request, locality=2).ok())
    assert number(answer[6:10]) == 0


def test_execute_failure_of_the_wrapped_command_is_its_own(owned):
    session = hidden(owned)
    before = owned.state.stany.sessions
    assert session.send(PCR_READ, u32(99)).code == ReturnCode.BADINDEX
    inside = Witness(session.exchange)
    assert inside.auth(GET_CAPABILITY_OWNER, b"", inside.oiap(ZERO)).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1
    assert owned.state.stany.sessions == before
    assert session.continues
    session.send(PCR_READ, u32(0)).ok()


def test_execute_wrapped_tag_that_is_none_is_the_wrapped_commands_badtag(owned):
    assert plain(owned).send(PCR_READ, u32(0), tag=0x1234).code == ReturnCode.BADTAG


def test_execute_ends_the_session_on_request(owned):
    session = plain(owned)
    session.continues = False
    session.send(PCR_READ, u32(0)).ok()
    assert not session.continues
    assert not is_open(owned, session)


def test_execute_wrapped_permanent_change_is_one(owned):
    lock_nv(Witness(plain(owned).exchange)).ok()
    assert owned.last.permanent_changed
    assert owned.state.permanent.flags.nv_locked


def test_execute_wrapped_command_that_clears_the_owner_ends_the_session_and_is_answered(owned):
    """Implementation defined (§24.2, 7 b): here the answer is complete, and says so."""
    session = hidden(owned)
    inside = Witness(session.exchange)
    inside.auth(OWNER_CLEAR, b"", inside.oiap(OWNER_AUTH)).ok()
    assert not session.continues
    assert owned.state.permanent.owner_auth is None
    assert owned.state.stany.transport_sessions == {}


def test_execute_wrapped_flush_of_its_own_session(owned):
    session = plain(owned)
    session.send(FLUSH, u32(session.handle) + u32(RT_TRANS)).ok()
    assert not session.continues
    assert not is_open(owned, session)


def test_execute_in_failure_mode_is_failedselftest(owned):
    session = plain(owned)
    owned.change("volatile", self_test=SelfTestState.FAILURE)
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.FAILEDSELFTEST


def test_execute_wrapped_command_that_fails_the_self_test_is_answered(owned, monkeypatch):
    session = plain(owned)
    monkeypatch.setattr(self_test, "_MGF1_SEED_FOO", b"")
    assert session.send(0x50).code == ReturnCode.FAILEDSELFTEST
    assert owned.tpm.send(PCR_READ, u32(0)).code == ReturnCode.FAILEDSELFTEST


def test_execute_response_is_cut_to_what_fits(owned):
    """libtpms fails the outer command with SIZE here."""
    session = plain(owned)
    random = session.send(GET_RANDOM, u32(5000)).ok()
    outer = 10 + 16 + 41
    assert len(session.outer.raw) == 4096
    assert len(random) == 4 + number(random[:4]) == 4096 - outer - 10


def test_execute_sha1_blocks_fit_into_a_wrapped_request(owned):
    session = plain(owned)
    most = number(session.send(SHA1_START).ok())
    assert most % 64 == 0
    session.send(SHA1_UPDATE, sized(bytes(most))).ok()
    assert session.send(SHA1_COMPLETE, sized(b"")).ok() == sha1(bytes(most))


def test_execute_wrapped_response_that_does_not_fit_is_size(make_bench, owned_state):
    bench = make_bench(owned_state, Profile(input_buffer_bytes=90))
    session = plain(bench)
    before = bench.state.stclear.pcrs
    assert session.execute(frame(EXTEND, u32(16) + ZERO)).code == ReturnCode.SIZE
    assert bench.state.stclear.pcrs is before
    assert not is_open(bench, session)


# -- ExecuteTransport: refusals --------------------------------------------------------------------


def test_execute_with_a_wrong_proof_is_authfail_and_ends_the_session_uncounted(owned):
    """§24.2, action 7 c. (libtpms answers AUTH2FAIL.)"""
    session = plain(owned)
    answer = session.execute(frame(EXTEND, u32(16) + ZERO), bad_hmac=True)
    assert answer.code == ReturnCode.AUTHFAIL
    assert not is_open(owned, session)
    assert owned.state.stclear.failed_tries == 0
    assert owned.state.stclear.pcrs[16] == ZERO


def test_execute_request_cannot_be_sent_again(owned):
    session = plain(owned)
    request = frame(EXTEND, u32(16) + ZERO)
    sent = []
    exchange = owned.tpm.exchange
    owned.tpm.exchange = lambda data, locality: sent.append(data) or exchange(data, locality)
    session.exchange(request)
    answer = owned.tpm.raw(sent[0])
    assert answer.code == ReturnCode.AUTHFAIL


def test_execute_on_no_session_is_invalid_authhandle(owned):
    session = plain(owned)
    session.handle ^= 1
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE


def test_execute_naming_an_authorization_session_leaves_it_alone(owned):
    session, other = plain(owned), owned.tpm.oiap(OWNER_AUTH)
    session.handle = other.handle
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE
    owned.tpm.auth(GET_CAPABILITY_OWNER, b"", other).ok()


def test_execute_session_is_no_authorization_session(owned):
    session, other = plain(owned), owned.tpm.oiap(OWNER_AUTH)
    other.handle = session.handle
    answer = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", other)
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE
    session.send(PCR_READ, u32(0)).ok()


@pytest.mark.parametrize("ordinal", [0x6B, 0x100, 0x97, 0x64, 0xFFFFFFFF])
def test_execute_unknown_wrapped_ordinal_is_bad_parameter(owned, ordinal):
    """§24.2, action 3. (libtpms answers BAD_ORDINAL.)"""
    session = plain(owned)
    assert session.execute(frame(ordinal)).code == ReturnCode.BAD_PARAMETER
    assert not is_open(owned, session)


@pytest.mark.parametrize(
    "request_",
    [
        b"",
        b"\0\xc1\0\0\0\x09\0\0\0",
        frame(SIGN),  # no handle
        frame(0x32, u32(0)),  # one handle of two
        frame(0x0B, bytes(25)),  # not all of what TPM_OSAP sends
        frame(GET_CAPABILITY_OWNER, bytes(44), 0xC2),  # not all of an auth block
        frame(0x18, bytes(4 + 89), 0xC3),
    ],
)
def test_execute_wrapped_command_that_is_cut_off_is_bad_parameter(owned, request_):
    """§24.2, action 3: LEN1 is less than zero, or the ordinal cannot be determined."""
    session = plain(owned)
    assert session.execute(request_).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("size", [0, 9, 13, 15, 2**31, 2**32 - 1])
def test_execute_wrapped_command_of_another_size_is_bad_param_size(owned, size):
    request = b"\0\xc1" + u32(size) + u32(PCR_READ) + u32(0)
    assert plain(owned).execute(request).code == ReturnCode.BAD_PARAM_SIZE


@pytest.mark.parametrize("body", [b"", u32(0) + b"\0"])
def test_execute_wrapped_parameters_too_short_or_long_are_the_wrapped_commands_failure(owned, body):
    session = plain(owned)
    assert session.send(PCR_READ, body).code == ReturnCode.BAD_PARAM_SIZE
    assert session.continues


@pytest.mark.parametrize(
    "request_",
    [
        frame(ESTABLISH, u32(KH_TRANSPORT) + public() + sized(SECRET)),
        frame(EXECUTE, sized(b"") + bytes(45), 0xC2),
        frame(RELEASE, bytes(24) + bytes(45), 0xC2),
        frame(ESTABLISH, bytes(4)),
    ],
)
def test_execute_does_not_nest(owned, request_):
    session = plain(owned)
    sessions = owned.state.stany.transport_sessions
    assert session.execute(request_).code == ReturnCode.NO_WRAP_TRANSPORT
    assert len(owned.state.stany.transport_sessions) == len(sessions) - 1


def test_execute_does_not_nest_but_asks_for_the_proof_first(owned):
    request = frame(EXECUTE, sized(b"") + bytes(45), 0xC2)
    assert plain(owned).execute(request, bad_hmac=True).code == ReturnCode.AUTHFAIL


def test_execute_save_state_is_refused_inside(owned):
    session = plain(owned)
    assert session.send(SAVE_STATE).code == ReturnCode.NO_WRAP_TRANSPORT
    assert owned.state.permanent.saved_state is None
    assert session.send(STARTUP, u16(1)).code == ReturnCode.INVALID_POSTINIT


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_execute_every_command_in_zeros_is_answered(owned, command):
    """Whatever is inside, the outer answer is well formed and the TPM goes on."""
    for size in (0, 2, 4, 8, 44, 100):
        for tag in (0xC1, 0xC2, 0xC3):
            session = Transport(owned.tpm, LOG)
            session.handle, session.even = 1, ZERO
            kept = TransportSession(
                auth_data=SECRET,
                nonce_even=ZERO,
                attributes=LOG,
                algorithm_id=0,
                enc_scheme=0,
                trans_digest=ZERO,
            )
            owned.change("stany", transport_sessions={1: kept})
            session.execute(frame(command.ordinal, bytes(size), tag))
    owned.tpm.send(GET_TEST_RESULT).ok()
    assert owned.state.volatile.self_test == SelfTestState.FULL


# -- the log ---------------------------------------------------------------------------------------


def logged(owned, session):
    return owned.state.stany.transport_sessions[session.handle].trans_digest == session.digest


def test_log_starts_with_the_establishing(owned):
    assert logged(owned, plain(owned, LOG))
    assert logged(owned, hidden(owned, attributes=ENCRYPT | LOG))
    without = plain(owned)
    assert owned.state.stany.transport_sessions[without.handle].trans_digest == ZERO


@pytest.mark.parametrize("attributes", [LOG, LOG | ENCRYPT])
def test_log_of_commands_without_keys(owned, attributes):
    session = hidden(owned, attributes=attributes)
    for ordinal, body in (
        (PCR_READ, u32(0)),
        (PCR_READ, u32(99)),
        (GET_RANDOM, u32(5)),
        (OIAP, b""),
    ):
        session.send(ordinal, body)
        assert logged(owned, session)


def test_log_says_at_which_locality(owned):
    session = plain(owned, LOG)
    request = frame(PCR_READ, u32(0))
    session.unwrap(request, session.execute(request, locality=3).ok())
    assert logged(owned, session)


def test_log_of_commands_with_keys_names_their_public_parts(owned):
    session = hidden(owned, attributes=LOG | ENCRYPT)
    inside = Witness(session.exchange)
    key, parts = loaded(inside, signing())
    session.moduli[key] = parts.modulus
    assert logged(owned, session)
    inside.auth(0x32, ZERO, *[inside.oiap(KEY_AUTH) for _ in "ab"], handles=u32(key) * 2).ok()
    assert logged(owned, session)
    inside.auth(0x81, u32(EK), inside.oiap(OWNER_AUTH)).ok()
    assert logged(owned, session)
    load(inside, wrap(inside, signing()).ok(), ordinal=0x20).ok()
    assert logged(owned, session)
    inside.osap(1, key, KEY_AUTH)  # its key is not logged (§24.2, 6 f)
    assert logged(owned, session)


def test_log_of_a_flush_depends_on_what_is_flushed(owned):
    session = hidden(owned, attributes=LOG | ENCRYPT)
    key, parts = loaded(owned.tpm, signing())
    session.moduli[key] = parts.modulus
    session.send(FLUSH, u32(owned.tpm.oiap().handle) + u32(RT_AUTH)).ok()
    assert logged(owned, session)
    session.send(FLUSH, u32(key) + u32(RT_KEY)).ok()
    assert logged(owned, session)
    session.send(0x22, u32(SRK))
    assert logged(owned, session)


def test_log_of_saving_a_context_depends_on_what_is_saved(owned):
    session = hidden(owned, attributes=LOG | ENCRYPT)
    key, parts = loaded(owned.tpm, signing())
    session.moduli[key] = parts.modulus
    for handle, resource in ((key, RT_KEY), (owned.tpm.oiap().handle, RT_AUTH)):
        session.send(SAVE_CONTEXT, u32(handle) + u32(resource) + bytes(16)).ok()
        assert logged(owned, session)


def test_log_of_a_dsap_has_its_delegation_and_the_key_of_a_key_delegation(owned):
    """§24.2, 6 g; libtpms takes other bytes for the resource type here, and logs no key."""
    session = hidden(owned, attributes=LOG | ENCRYPT)
    key, parts = loaded(owned.tpm, signing())
    session.moduli[key] = parts.modulus
    for entity_type in (DEL_KEY_BLOB, DEL_OWNER_BLOB):
        answer = session.send(DSAP, u16(entity_type) + u32(key) + ZERO + sized(b"no delegation"))
        assert answer.code != 0
        assert session.continues
        assert logged(owned, session)


@pytest.mark.parametrize(
    "request_",
    [
        frame(0x21, u32(0x999) + bytes(45), 0xC2),
        frame(FLUSH, u32(0x999) + u32(RT_KEY)),
        frame(0x22, u32(0x999)),
        frame(0x81, u32(0x999) + bytes(45), 0xC2),
        frame(0x32, u32(SRK) + u32(0x999) + ZERO + bytes(45), 0xC2),
    ],
)
def test_log_needs_the_keys_that_are_named(owned, request_):
    """§24.2, action 10 g; without a log it is the wrapped command that fails."""
    session = plain(owned, LOG)
    assert session.execute(request_).code == ReturnCode.INVALID_KEYHANDLE
    assert not is_open(owned, session)
    session = plain(owned)
    response = session.exchange(request_)
    assert number(response[6:10]) != 0
    assert session.continues


def test_log_of_malformed_commands_with_key_handles(owned):
    session = hidden(owned, attributes=LOG | ENCRYPT)
    assert session.send(0x81).code == ReturnCode.BADTAG or session.continues
    session = hidden(owned, attributes=LOG)
    assert session.send(FLUSH, u32(SRK)).code == ReturnCode.BAD_PARAM_SIZE
    assert session.continues


# -- what is hashed: every command -----------------------------------------------------------------

KEY_HANDLES = {
    0x0C: 1, 0x0E: 1, 0x0F: 2, 0x13: 1, 0x16: 1, 0x17: 1, 0x18: 1, 0x1B: 1, 0x1E: 1, 0x1F: 1,
    0x20: 1, 0x21: 1, 0x22: 1, 0x23: 1, 0x24: 1, 0x25: 1, 0x28: 1, 0x2A: 1, 0x32: 2, 0x33: 2,
    0x3C: 1, 0x3D: 1, 0x3E: 1, 0x41: 1, 0x7A: 1, 0x81: 1, 0x86: 1, 0xB4: 1, 0xD4: 1, 0xF2: 1,
    0xE8: 1,
}  # fmt: skip
"""Commands that name keys by handle, and how many; of TPM_DSAP, TPM_FlushSpecific and
TPM_SaveContext their other operands tell."""


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.name)
def test_what_is_hashed_and_hidden_begins_where_the_specification_says(command):
    clear = (command.params_at - 10, command.results_at - 10)
    assert clear == HANDLES.get(command.ordinal, (0, 0))
    assert len(command.key_handles_at) == KEY_HANDLES.get(command.ordinal, 0)


# -- exclusive sessions ----------------------------------------------------------------------------


def test_exclusive_session_lasts_while_nothing_else_comes(owned):
    session = plain(owned, EXCLUSIVE)
    assert owned.state.stany.transport_exclusive == session.handle
    for _ in range(3):
        session.send(PCR_READ, u32(0)).ok()
    session.continues = False
    session.send(PCR_READ, u32(0)).ok()
    assert owned.state.stany.transport_exclusive == 0


@pytest.mark.parametrize(
    "request_",
    [
        frame(PCR_READ, u32(0)),
        frame(PCR_READ, u32(99)),
        frame(PCR_READ),
        frame(0x100),
        frame(FLUSH, u32(1) + u32(RT_TRANS)),
        frame(ESTABLISH, u32(KH_TRANSPORT) + public() + sized(SECRET)),
    ],
)
def test_exclusive_session_ends_with_any_other_command(owned, request_):
    session = plain(owned, EXCLUSIVE)
    owned.tpm.raw(request_)
    assert not is_open(owned, session)
    assert owned.state.stany.transport_exclusive == 0
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE


def test_exclusive_session_ends_with_a_command_through_another(owned):
    other = plain(owned)
    session = plain(owned, EXCLUSIVE)
    other.send(PCR_READ, u32(0)).ok()
    assert not is_open(owned, session)


def test_exclusive_session_ends_with_a_transport_command_on_no_session(owned):
    session, nowhere = plain(owned, EXCLUSIVE), Transport(owned.tpm)
    nowhere.handle, nowhere.even = 0x77, ZERO
    answer = nowhere.execute(frame(PCR_READ, u32(0)))
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE
    assert not is_open(owned, session)


@pytest.mark.parametrize(
    "request_",
    [
        b"\0\xc1\0\0\0\x0b" + u32(PCR_READ),
        b"",
        frame(EXECUTE, b"", 0xC2),
        frame(EXECUTE, sized(b"")),
    ],
)
def test_exclusive_session_survives_what_is_no_command(owned, request_):
    session = plain(owned, EXCLUSIVE)
    owned.tpm.raw(request_)
    session.send(PCR_READ, u32(0)).ok()


def test_exclusive_session_is_replaced_by_the_next(owned):
    first, second = plain(owned, EXCLUSIVE), plain(owned, EXCLUSIVE)
    assert not is_open(owned, first)
    assert owned.state.stany.transport_exclusive == second.handle


def test_exclusive_session_ends_with_a_launch(owned):
    session = plain(owned, EXCLUSIVE)
    owned.engine.keep(owned.engine.hash_start())
    assert not is_open(owned, session)
    assert owned.state.stany.transport_exclusive == 0


# -- SHA-1 thread ----------------------------------------------------------------------------------


def test_sha1_thread_stays_inside_its_session(owned):
    session = plain(owned)
    session.send(SHA1_START).ok()
    session.send(SHA1_UPDATE, sized(bytes(64))).ok()
    assert session.send(SHA1_COMPLETE, sized(b"abc")).ok() == sha1(bytes(64), b"abc")


def test_sha1_thread_does_not_go_in_or_out_or_across(owned):
    """Part 3 §13.1, 2 b: wholly outside, or wholly inside one session."""
    one, other = plain(owned), plain(owned)
    for start, finish in (
        (one.send, owned.tpm.send),
        (owned.tpm.send, one.send),
        (one.send, other.send),
    ):
        start(SHA1_START).ok()
        assert finish(SHA1_UPDATE, sized(bytes(64))).code == ReturnCode.SHA_THREAD


def test_sha1_thread_ends_with_another_wrapped_command(owned):
    session = plain(owned)
    session.send(SHA1_START).ok()
    session.send(PCR_READ, u32(0)).ok()
    assert session.send(SHA1_COMPLETE, sized(b"")).code == ReturnCode.SHA_THREAD


def test_sha1_thread_survives_a_transport_command_that_wraps_nothing(owned):
    """§13.1, 2 a: it is the wrapped command that counts."""
    session = plain(owned)
    owned.tpm.send(SHA1_START).ok()
    session.execute(frame(PCR_READ, u32(0)), bad_hmac=True)
    assert owned.tpm.send(SHA1_COMPLETE, sized(b"abc")).ok() == sha1(b"abc")


# -- ReleaseTransportSigned ------------------------------------------------------------------------


@pytest.fixture
def signer(owned):
    """A loaded signing key: handle and modulus."""
    key, parts = loaded(owned.tpm, signing())
    return key, parts.modulus


@pytest.mark.parametrize("sig", [2, 4])
@pytest.mark.parametrize("attributes", [LOG, LOG | ENCRYPT])
def test_release_signs_the_log_with_the_request(owned, sig, attributes):
    key, parts = loaded(owned.tpm, signing(sig))
    session = hidden(owned, attributes=attributes)
    session.send(PCR_READ, u32(0)).ok()
    replay, auth = sha1(b"replay"), owned.tpm.oiap(KEY_AUTH)
    owned.clock.pass_s(1)
    body = session.release(key, auth, replay=replay).ok()
    assert body[4:36] == owned.tpm.send(GET_TICKS).ok()
    assert is_signature(parts.modulus, body[40:], session.signed_bytes(body, replay))
    assert not is_open(owned, session)
    assert auth.continues


def test_release_tells_the_locality(owned, signer):
    owned.tpm.locality = 3
    body = plain(owned, LOG).release(signer[0], owned.tpm.oiap(KEY_AUTH)).ok()
    assert number(body[:4]) == 3


def test_release_with_a_key_that_needs_no_authorization(owned):
    key, parts = loaded(owned.tpm, signing(auth_data_usage=0))
    session = plain(owned, LOG)
    body = session.release(key).ok()
    assert is_signature(parts.modulus, body[40:], session.signed_bytes(body))


@pytest.mark.parametrize(
    ("wanted", "code"),
    [
        (signing(3), ReturnCode.INAPPROPRIATE_SIG),
        (storage(), ReturnCode.INAPPROPRIATE_SIG),
        (template(LEGACY, 3, 2), ReturnCode.INVALID_KEYUSAGE),
    ],
)
def test_release_with_a_key_for_something_else(owned, wanted, code):
    """§24.3, actions 2 and 3: before any secret is looked at."""
    key, _ = loaded(owned.tpm, wanted)
    session = plain(owned, LOG)
    assert session.release(key, owned.tpm.oiap(ZERO), bad_hmac=True).code == code
    assert not is_open(owned, session)


def test_release_without_the_keys_secret_is_authfail(owned, signer):
    session = plain(owned, LOG)
    answer = session.release(signer[0], owned.tpm.oiap(ZERO), bad_hmac=True)
    assert answer.code == ReturnCode.AUTHFAIL
    assert plain(owned, LOG).release(signer[0]).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1


def test_release_without_the_sessions_secret_is_auth2fail(owned, signer):
    session, auth = plain(owned, LOG), owned.tpm.oiap(KEY_AUTH)
    assert session.release(signer[0], auth, bad_hmac=True).code == ReturnCode.AUTH2FAIL
    assert not is_open(owned, session)
    assert auth.handle not in owned.state.stany.sessions
    assert owned.state.stclear.failed_tries == 0


def test_release_with_the_sessions_block_alone_is_auth2fail_too(owned):
    key, _ = loaded(owned.tpm, signing(auth_data_usage=0))
    assert plain(owned, LOG).release(key, bad_hmac=True).code == ReturnCode.AUTH2FAIL


def test_release_of_no_session_or_no_key(owned, signer):
    session = plain(owned, LOG)
    assert session.release(0x999, owned.tpm.oiap()).code == ReturnCode.INVALID_KEYHANDLE
    assert session.release(0x999, owned.tpm.oiap()).code == ReturnCode.INVALID_AUTHHANDLE
    session = plain(owned, LOG)
    auth = owned.tpm.oiap()
    auth.handle ^= 1
    assert session.release(signer[0], auth).code == ReturnCode.INVALID_AUTHHANDLE


def test_release_of_a_session_without_a_log_is_bad_mode(owned, signer):
    session = plain(owned)
    assert session.release(signer[0], owned.tpm.oiap(KEY_AUTH)).code == ReturnCode.BAD_MODE
    assert not is_open(owned, session)


def test_release_of_an_exclusive_session(owned):
    key, parts = loaded(owned.tpm, signing(auth_data_usage=0))
    session = plain(owned, LOG | EXCLUSIVE)
    body = session.release(key).ok()
    assert is_signature(parts.modulus, body[40:], session.signed_bytes(body))
    assert owned.state.stany.transport_exclusive == 0


# -- gates -----------------------------------------------------------------------------------------


def test_lockout_holds_transport_commands_but_not_their_sessions(owned):
    session = plain(owned)
    owned.change("stclear", failed_tries=6, last_failure_us=owned.clock.us)
    answer = session.execute(frame(PCR_READ, u32(0)))
    assert answer.code == ReturnCode.DEFEND_LOCK_RUNNING
    assert is_open(owned, session)


def test_sessions_do_not_survive_a_start(owned):
    session = plain(owned)
    owned.power_cycle().ok()
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE


def test_flush_ends_a_session(owned):
    session = plain(owned)
    owned.tpm.send(FLUSH, u32(session.handle) + u32(RT_TRANS)).ok()
    assert session.execute(frame(PCR_READ, u32(0))).code == ReturnCode.INVALID_AUTHHANDLE


def test_continue_flag_must_be_a_bool(owned):
    session = plain(owned)
    block = u32(session.handle) + ZERO + u8(2) + ZERO
    answer = owned.tpm.raw(frame(EXECUTE, sized(frame(PCR_READ, u32(0))) + block, 0xC2))
    assert answer.code == ReturnCode.BAD_PARAMETER
    assert is_open(owned, session)
