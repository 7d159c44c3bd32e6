"""The SHA-1 thread, TPM_Sign, random numbers, TPM_CertifyKey and CertifyKey2."""

import hashlib

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import SRK_AUTH
from tests.tpm12.makers import (
    BIND,
    ET_KEY,
    IDENTITY,
    KEY_AUTH,
    LEGACY,
    MIGRATABLE,
    MIGRATE,
    PCR_IGNORED,
    SIGNING,
    WRONG,
    composite,
    loaded,
    pcr_info,
    pcr_info_long,
    signing,
    storage,
    template,
)
from tests.tpm12.witness import (
    SRK,
    ZERO,
    hmac1,
    is_signature,
    number,
    parse_sized,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.keys import LoadedKey
from tpm12.profile import VTPM

START, UPDATE, COMPLETE, COMPLETE_EXTEND = 0xA0, 0xA1, 0xA2, 0xA3
SIGN, GET_RANDOM, STIR_RANDOM, CERTIFY_KEY, CERTIFY_KEY2 = 0x3C, 0x46, 0x47, 0x32, 0x33
EXTEND, PCR_READ, GET_TICKS = 0x14, 0x15, 0xF1


# -- the SHA-1 thread ------------------------------------------------------------------------------


def complete(tpm, data=b""):
    return tpm.send(COMPLETE, sized(data))


def test_sha1_of_abc(fresh):
    assert number(fresh.tpm.send(START).ok()) == 4032
    assert complete(fresh.tpm, b"abc").ok().hex() == "a9993e364706816aba3e25717850c26c9cd0d89d"


def test_sha1_of_nothing(fresh):
    fresh.tpm.send(START).ok()
    assert complete(fresh.tpm).ok() == hashlib.sha1().digest()


def test_sha1_of_many_blocks(fresh):
    fresh.tpm.send(START).ok()
    for size in (64, 0, 4032, 128):
        assert fresh.tpm.send(UPDATE, sized(b"d" * size)).ok() == b""
    assert complete(fresh.tpm, b"d" * 64).ok() == sha1(b"d" * (64 + 4032 + 128 + 64))
    assert not fresh.last.permanent_changed


def test_sha1_thread_ends_with_complete(fresh):
    fresh.tpm.send(START).ok()
    complete(fresh.tpm).ok()
    assert complete(fresh.tpm).code == ReturnCode.SHA_THREAD


def test_sha1_start_starts_afresh(fresh):
    fresh.tpm.send(START).ok()
    fresh.tpm.send(UPDATE, sized(b"d" * 64)).ok()
    fresh.tpm.send(START).ok()
    assert complete(fresh.tpm, b"abc").ok() == sha1(b"abc")


@pytest.mark.parametrize(
    ("ordinal", "body"),
    [(UPDATE, sized(b"d" * 64)), (COMPLETE, sized(b"")), (COMPLETE_EXTEND, u32(1) + sized(b""))],
)
def test_sha1_without_a_thread(fresh, ordinal, body):
    assert fresh.tpm.send(ordinal, body).code == ReturnCode.SHA_THREAD


@pytest.mark.parametrize(
    ("ordinal", "body"),
    [
        (UPDATE, sized(b"d" * 63)),
        (UPDATE, sized(b"d" * 65)),
        (UPDATE, sized(b"d" * 4096)),
        (COMPLETE, sized(b"d" * 65)),
        (COMPLETE_EXTEND, u32(1) + sized(b"d" * 65)),
    ],
)
def test_sha1_error_ends_the_thread(fresh, ordinal, body):
    fresh.tpm.send(START).ok()
    assert fresh.tpm.send(ordinal, body).code == ReturnCode.SHA_ERROR
    assert complete(fresh.tpm).code == ReturnCode.SHA_THREAD


def test_sha1_complete_of_too_much_is_told_before_a_missing_thread(fresh):
    assert complete(fresh.tpm, b"d" * 65).code == ReturnCode.SHA_ERROR


def test_sha1_malformed_request_leaves_the_thread_alone(fresh):
    fresh.tpm.send(START).ok()
    assert fresh.tpm.send(UPDATE, u32(64) + b"d").code == ReturnCode.BAD_PARAM_SIZE
    assert complete(fresh.tpm, b"abc").ok() == sha1(b"abc")


@pytest.mark.parametrize("ordinal", [GET_TICKS, 0xFFF])
def test_sha1_thread_does_not_outlive_another_command(fresh, ordinal):
    fresh.tpm.send(START).ok()
    fresh.tpm.send(ordinal)
    assert complete(fresh.tpm).code == ReturnCode.SHA_THREAD


def test_sha1_thread_works_before_the_self_test(make_bench, factory):
    bench = make_bench(factory)
    bench.power_cycle().ok()
    tested = bench.state.volatile.self_test
    bench.tpm.send(START).ok()
    complete(bench.tpm).ok()
    assert bench.state.volatile.self_test == tested == 1


def test_sha1_update_fits_the_buffer_of_the_ring(make_bench, fresh_state):
    bench = make_bench(fresh_state, VTPM)
    most = number(bench.tpm.send(START).ok())
    assert most % 64 == 0
    assert 14 + most <= VTPM.input_buffer_bytes < 14 + most + 64


def test_sha1_complete_extend(fresh):
    fresh.tpm.send(START).ok()
    out = fresh.tpm.send(COMPLETE_EXTEND, u32(9) + sized(b"abc")).ok()
    assert out == sha1(b"abc") + sha1(ZERO, sha1(b"abc"))
    assert fresh.tpm.send(PCR_READ, u32(9)).ok() == out[20:]


@pytest.mark.parametrize("section", ["disabled", "deactivated"])
def test_sha1_complete_extend_shows_zeros_when_not_enabled_and_active(fresh, section):
    if section == "disabled":
        fresh.set_flags(disable=True)
    else:
        fresh.change("stclear", deactivated=True)
    fresh.tpm.send(START).ok()
    out = fresh.tpm.send(COMPLETE_EXTEND, u32(9) + sized(b"abc")).ok()
    assert out == sha1(b"abc") + ZERO
    assert fresh.state.stclear.pcrs[9] == sha1(ZERO, sha1(b"abc"))


@pytest.mark.parametrize(("pcr", "code"), [(24, "BADINDEX"), (1 << 31, "BADINDEX"), (17, None)])
def test_sha1_complete_extend_that_fails_ends_the_thread(fresh, pcr, code):
    fresh.tpm.send(START).ok()
    before = fresh.state.stclear.pcrs
    answer = fresh.tpm.send(COMPLETE_EXTEND, u32(pcr) + sized(b"abc"))
    assert answer.code == ReturnCode[code or "BAD_LOCALITY"]
    assert fresh.state.stclear.pcrs == before
    assert complete(fresh.tpm).code == ReturnCode.SHA_THREAD


def test_sha1_complete_extend_from_the_right_locality(fresh):
    fresh.tpm.send(START).ok()
    fresh.tpm.send(COMPLETE_EXTEND, u32(17) + sized(b"abc"), locality=3).ok()


# -- Sign ------------------------------------------------------------------------------------------


def sign(tpm, handle, data, secret=KEY_AUTH, odd=None):
    session = tpm.oiap(secret).ending()
    odd = odd and [odd]
    return tpm.auth(SIGN, sized(data), session, handles=u32(handle), odd=odd)


def signature(answer, size):
    sig, rest = parse_sized(answer.ok())
    assert not rest
    assert len(sig) == size
    return sig


def padded(key, sig, exponent=65537):
    """What a signature opens to, without the PKCS#1 type 1 padding."""
    size = len(key.modulus)
    block = pow(number(sig), exponent, number(key.modulus)).to_bytes(size, "big")
    head, _, inside = block[1:].partition(b"\0")
    assert block[0] == 0
    assert head == b"\1" + b"\xff" * (len(head) - 1)
    assert len(head) >= 9
    return inside


DIGEST_INFO = bytes.fromhex("3021300906052b0e03021a05000414")


@pytest.mark.parametrize("bits", [512, 528, 1024, 2048])
def test_sign_sha1_signs_the_digest(owned, bits):
    handle, key = loaded(owned.tpm, signing(2, bits=bits))
    sig = signature(sign(owned.tpm, handle, sha1(b"message")), bits // 8)
    assert is_signature(key.modulus, sig, b"message")
    assert padded(key, sig) == DIGEST_INFO + sha1(b"message")


def test_sign_with_another_exponent(owned):
    handle, key = loaded(owned.tpm, signing(2, exponent=b"\3"))
    sig = signature(sign(owned.tpm, handle, sha1(b"message")), 64)
    assert padded(key, sig, exponent=3) == DIGEST_INFO + sha1(b"message")


@pytest.mark.parametrize("size", [1, 20, 35, 53])
def test_sign_der_signs_the_callers_bytes(owned, size):
    handle, key = loaded(owned.tpm, signing(3))
    data = bytes(range(1, size + 1))
    assert padded(key, signature(sign(owned.tpm, handle, data), 64)) == data


def test_sign_info_signs_nonce_and_data(owned):
    handle, key = loaded(owned.tpm, signing(4))
    for data in (b"x", b"d" * 20, b"d" * 300):
        odd = owned.tpm.nonce()
        sig = signature(sign(owned.tpm, handle, data, odd=odd), 64)
        info = u16(5) + b"SIGN" + odd + sized(data)
        assert is_signature(key.modulus, sig, info)


def test_sign_with_a_legacy_key(owned):
    handle, key = loaded(owned.tpm, template(LEGACY, 2, 2))
    sig = signature(sign(owned.tpm, handle, sha1(b"message")), 64)
    assert is_signature(key.modulus, sig, b"message")


@pytest.mark.parametrize(
    ("scheme", "size"),
    [(2, 0), (2, 19), (2, 21), (3, 0), (3, 54), (3, 64), (3, 300), (4, 0)],
)
def test_sign_of_sizes_that_the_scheme_does_not_sign(owned, scheme, size):
    handle, _ = loaded(owned.tpm, signing(scheme))
    assert sign(owned.tpm, handle, b"d" * size).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize(
    "wanted", [storage(), template(BIND, 3, 1), template(MIGRATE, 3, 1, bits=2048)]
)
def test_sign_with_a_key_that_does_not_sign(owned, wanted):
    handle, _ = loaded(owned.tpm, wanted)
    assert sign(owned.tpm, handle, b"d" * 20).code == ReturnCode.INVALID_KEYUSAGE


def test_sign_with_an_identity_key(owned):
    handle = put_key(owned, template(IDENTITY, 1, 2, bits=2048))
    assert sign(owned.tpm, handle, b"d" * 20).code == ReturnCode.INVALID_KEYUSAGE


def test_sign_with_a_key_without_a_scheme(owned):
    handle = put_key(owned, template(SIGNING, 1, 1, bits=2048))
    assert sign(owned.tpm, handle, b"d" * 20).code == ReturnCode.INVALID_KEYUSAGE


def test_sign_authorization(owned):
    tpm = owned.tpm
    handle, _ = loaded(tpm, signing())
    assert sign(tpm, handle, b"d" * 20, WRONG).code == ReturnCode.AUTHFAIL
    body = u32(handle) + sized(b"d" * 20)
    assert tpm.send(SIGN, body).code == ReturnCode.AUTHFAIL
    assert sign(tpm, 0x4321, b"d" * 20).code == ReturnCode.INVALID_KEYHANDLE
    other, _ = loaded(tpm, signing())
    bound = tpm.osap(ET_KEY, other, KEY_AUTH)
    answer = tpm.auth(SIGN, sized(b"d" * 20), bound, handles=u32(handle))
    assert answer.code == ReturnCode.AUTHFAIL


def test_sign_without_authorization(owned):
    handle, key = loaded(owned.tpm, signing(2, auth_data_usage=0))
    answer = owned.tpm.send(SIGN, u32(handle) + sized(sha1(b"message")))
    assert is_signature(key.modulus, signature(answer, 64), b"message")


def test_sign_info_without_a_session_has_no_nonce_to_sign(owned):
    handle, _ = loaded(owned.tpm, signing(4, auth_data_usage=0))
    answer = owned.tpm.send(SIGN, u32(handle) + sized(b"d"))
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_sign_checks_the_keys_binding(owned):
    info = pcr_info_long([], [10], localities=0x03)
    handle, _ = loaded(owned.tpm, signing(key12=True, pcr_info=info))
    data, session = sized(b"d" * 20), owned.tpm.oiap(KEY_AUTH)
    owned.tpm.auth(SIGN, data, session, handles=u32(handle), locality=1).ok()
    answer = owned.tpm.auth(SIGN, data, session, handles=u32(handle), locality=2)
    assert answer.code == ReturnCode.BAD_LOCALITY
    owned.tpm.send(EXTEND, u32(10) + ZERO).ok()
    assert sign(owned.tpm, handle, b"d" * 20).code == ReturnCode.WRONGPCRVAL


# -- GetRandom and StirRandom ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 20, 4082])
def test_get_random_gives_what_was_asked(fresh, size):
    data, rest = parse_sized(fresh.tpm.send(GET_RANDOM, u32(size)).ok())
    assert (len(data), rest) == (size, b"")


@pytest.mark.parametrize("size", [4083, 5000, 65536, 0xFFFFFFFF])
def test_get_random_gives_what_fits(fresh, size):
    answer = fresh.tpm.send(GET_RANDOM, u32(size))
    assert number(answer.ok()[:4]) == 4082
    assert len(answer.raw) == 4096


def test_get_random_fits_the_buffer_of_the_ring(make_bench, fresh_state):
    answer = make_bench(fresh_state, VTPM).tpm.send(GET_RANDOM, u32(5000))
    assert len(answer.raw) == 4088


def test_get_random_does_not_repeat_itself(fresh):
    drawn = {fresh.tpm.send(GET_RANDOM, u32(20)).ok() for _ in range(50)}
    assert len(drawn) == 50


@pytest.mark.parametrize("size", [0, 1, 255, 256, 300, 4000])
def test_stir_random_reaches_the_generator(make_bench, fresh_state, size):
    stirred, other = make_bench(fresh_state), make_bench(fresh_state)
    assert stirred.tpm.send(STIR_RANDOM, sized(b"s" * size)).ok() == b""
    assert not stirred.last.permanent_changed
    drawn = [bench.tpm.send(GET_RANDOM, u32(20)).ok() for bench in (stirred, other)]
    assert drawn[0] != drawn[1]


def test_stir_random_of_missing_bytes(fresh):
    assert fresh.tpm.send(STIR_RANDOM, u32(5) + b"four").code == ReturnCode.BAD_PARAM_SIZE


# -- CertifyKey and CertifyKey2 --------------------------------------------------------------------


def put_key(bench, wanted, **more):
    """Put a key that other commands make (an identity, a CMK) into a slot; its handle."""
    handle, _ = loaded(bench.tpm, template(SIGNING, 1, 2, bits=2048))
    made = bench.state.volatile.keys[handle]
    public = made.public
    head = wanted[:11]
    changed = type(public)(
        key_usage=number(head[4:6]),
        key_flags=number(head[6:10]),
        auth_data_usage=head[10],
        algorithm_parms=type(public.algorithm_parms)(
            algorithm_id=1,
            enc_scheme=number(wanted[15:17]),
            sig_scheme=number(wanted[17:19]),
            parms=public.algorithm_parms.parms,
        ),
        pcr_info=b"",
        pub_key=public.pub_key,
        enc_data=b"",
    )
    parts = {
        "payload": 1,
        "usage_auth": KEY_AUTH,
        "migration_auth": made.migration_auth,
        "prime": made.prime,
        "parent_pcr_status": False,
    }
    key = LoadedKey(changed, **{**parts, **more})
    bench.change("volatile", keys={**bench.state.volatile.keys, handle: key})
    return handle


def certify(bench, ordinal, signer, key, *, signer_auth=KEY_AUTH, key_auth=KEY_AUTH, msa=ZERO):
    """Either command with both sessions: signer and key in the order of this report."""
    tpm = bench.tpm
    sessions = [tpm.oiap(signer_auth).ending(), tpm.oiap(key_auth).ending()]
    handles = [u32(signer), u32(key)]
    params = b"a" * 20
    if ordinal == CERTIFY_KEY2:
        sessions, handles, params = sessions[::-1], handles[::-1], msa + params
    return tpm.auth(ordinal, params, *sessions, handles=b"".join(handles))


def certified(answer, modulus, info):
    """Check that the answer is `info`, signed."""
    body = answer.ok()
    assert body[: len(info)] == info
    sig, rest = parse_sized(body[len(info) :])
    assert not rest
    assert is_signature(modulus, sig, info)


def head_of(key):
    """Usage, flags, authDataUsage, parameters, digest of the modulus, nonce."""
    return key.head[4:] + key.parms + sha1(key.modulus) + b"a" * 20


BOTH = pytest.mark.parametrize("ordinal", [CERTIFY_KEY, CERTIFY_KEY2], ids=["1", "2"])


def test_certify_key_of_a_key_without_pcrs(owned):
    signer, signing_key = loaded(owned.tpm, signing())
    handle, key = loaded(owned.tpm, storage())
    info = b"\x01\x01\x00\x00" + head_of(key) + u8(0) + u32(0)
    assert len(info) == 80
    certified(certify(owned, CERTIFY_KEY, signer, handle), signing_key.modulus, info)


def test_certify_key2_of_a_key_without_pcrs(owned):
    signer, signing_key = loaded(owned.tpm, signing())
    handle, key = loaded(owned.tpm, storage())
    info = u16(0x29) + b"\0\1" + head_of(key) + u8(0) + u32(0) + u32(0)
    assert len(info) == 84
    certified(certify(owned, CERTIFY_KEY2, signer, handle), signing_key.modulus, info)


@pytest.mark.parametrize("scheme", [2, 4])
@BOTH
def test_certify_key_with_either_scheme_signs_the_same(owned, ordinal, scheme):
    signer, signing_key = loaded(owned.tpm, signing(scheme))
    handle, _ = loaded(owned.tpm, signing())
    body = certify(owned, ordinal, signer, handle).ok()
    sig, info = body[-64:], body[:-68]
    assert is_signature(signing_key.modulus, sig, info)


def test_certify_key_of_the_srk(owned):
    signer, signing_key = loaded(owned.tpm, signing())
    body = certify(owned, CERTIFY_KEY, signer, SRK, key_auth=SRK_AUTH).ok()
    srk = owned.state.permanent.srk.public
    assert body[4:11] == u16(0x11) + u32(0) + u8(1)
    assert sha1(srk.pub_key) in body
    assert is_signature(signing_key.modulus, body[-64:], body[:-68])


def test_certify_key_tells_of_a_parent_bound_to_pcrs(owned):
    signer, _ = loaded(owned.tpm, signing())
    parent, _ = loaded(owned.tpm, storage(pcr_info=pcr_info(10)))
    child, key = loaded(owned.tpm, signing(), parent=parent, parent_auth=KEY_AUTH)
    for ordinal, head in ((CERTIFY_KEY, 4), (CERTIFY_KEY2, 4)):
        body = certify(owned, ordinal, signer, child).ok()
        at = head + len(head_of(key))
        assert body[at : at + 1] == b"\1"


_OLD_FORM = {
    "1.1 PCRs": (pcr_info(10), False, selection(10) + composite([10]) + ZERO),
    "1.1, 2 bytes": (
        pcr_info(10, size=2),
        False,
        selection(10, size=2) + composite([10], size=2) + ZERO,
    ),
    "1.2 PCRs": (pcr_info_long([1], [2, 15]), True, selection(2, 15) + composite([2, 15]) + ZERO),
    "1.2, no PCR": (pcr_info_long([], []), True, selection() + composite([]) + ZERO),
}


@pytest.mark.parametrize(("info", "key12", "shown"), _OLD_FORM.values(), ids=_OLD_FORM)
def test_certify_key_in_the_old_form(owned, info, key12, shown):
    signer, signing_key = loaded(owned.tpm, signing())
    handle, key = loaded(owned.tpm, signing(key12=key12, pcr_info=info))
    expected = b"\x01\x01\x00\x00" + head_of(key) + u8(0) + sized(shown)
    certified(certify(owned, CERTIFY_KEY, signer, handle), signing_key.modulus, expected)


_NEW_FORM = {
    "PCR 16": (signing(pcr_info=pcr_info(16)), selection(16) + b"\x1f" + composite([16])),
    "PCR 23 of 1.2": (
        signing(key12=True, pcr_info=pcr_info_long([], [23])),
        selection(23) + b"\x1f" + composite([23]),
    ),
    "locality": (
        signing(key12=True, pcr_info=pcr_info_long([], [1], localities=3)),
        selection(1) + b"\x03" + composite([1]),
    ),
}


@pytest.mark.parametrize(("wanted", "shown"), _NEW_FORM.values(), ids=_NEW_FORM)
@BOTH
def test_certify_key_in_the_new_form(owned, ordinal, wanted, shown):
    signer, signing_key = loaded(owned.tpm, signing())
    handle, key = loaded(owned.tpm, wanted)
    expected = u16(0x29) + b"\0\1" + head_of(key) + u8(0) + sized(shown) + u32(0)
    certified(certify(owned, ordinal, signer, handle), signing_key.modulus, expected)


def test_certify_key2_is_in_the_new_form_always(owned):
    signer, signing_key = loaded(owned.tpm, signing())
    handle, key = loaded(owned.tpm, signing(pcr_info=pcr_info(10)))
    shown = selection(10) + u8(0x1F) + composite([10])
    expected = u16(0x29) + b"\0\1" + head_of(key) + u8(0) + sized(shown) + u32(0)
    certified(certify(owned, CERTIFY_KEY2, signer, handle), signing_key.modulus, expected)


_BAD_SIGNERS = {
    "DER": (signing(3), ReturnCode.BAD_KEY_PROPERTY),
    "legacy with DER": (template(LEGACY, 2, 3), ReturnCode.BAD_KEY_PROPERTY),
    "storage": (storage(), ReturnCode.BAD_KEY_PROPERTY),
    "bind": (template(BIND, 3, 1), ReturnCode.BAD_KEY_PROPERTY),
    "legacy with SHA1": (template(LEGACY, 2, 2), ReturnCode.SUCCESS),
}


@pytest.mark.parametrize(("wanted", "code"), _BAD_SIGNERS.values(), ids=_BAD_SIGNERS)
@BOTH
def test_certify_key_by_a_key(owned, ordinal, wanted, code):
    signer, _ = loaded(owned.tpm, wanted)
    handle, _ = loaded(owned.tpm, signing())
    assert certify(owned, ordinal, signer, handle).code == code


@BOTH
def test_certify_key_of_a_migration_key_is_invalid_keyusage(owned, ordinal):
    signer, _ = loaded(owned.tpm, signing())
    handle, _ = loaded(owned.tpm, template(MIGRATE, 3, 1, bits=2048))
    assert certify(owned, ordinal, signer, handle).code == ReturnCode.INVALID_KEYUSAGE


@BOTH
def test_certify_key_by_an_identity_is_for_keys_that_stay(owned, ordinal):
    identity = put_key(owned, template(IDENTITY, 1, 2, bits=2048))
    stays, _ = loaded(owned.tpm, signing())
    moves, _ = loaded(owned.tpm, signing(flags=MIGRATABLE))
    certify(owned, ordinal, identity, stays).ok()
    assert certify(owned, ordinal, identity, moves).code == ReturnCode.MIGRATEFAIL
    signer, _ = loaded(owned.tpm, signing())
    certify(owned, ordinal, signer, moves).ok()
    certify(owned, ordinal, signer, identity).ok()


def put_cmk(bench, payload, msa, flags=MIGRATABLE | 0x10):
    """A certified migratable key of the authorities `msa`."""
    handle = put_key(bench, signing(flags=flags, bits=2048), payload=payload)
    keys = bench.state.volatile.keys
    key = keys[handle]
    parms = key.public.algorithm_parms
    pubkey = u32(1) + u16(1) + u16(2) + sized(parms.parms) + sized(key.public.pub_key)
    secret = hmac1(bench.state.permanent.tpm_proof, u16(0x33) + msa + sha1(pubkey))
    keys[handle] = key.with_migration_auth(secret)
    return handle


@pytest.mark.parametrize("payload", [6, 7])
def test_certify_key2_of_a_certified_migratable_key(owned, payload):
    msa = sha1(b"authorities")
    handle = put_cmk(owned, payload, msa)
    signer, signing_key = loaded(owned.tpm, signing())
    body = certify(owned, CERTIFY_KEY2, signer, handle, msa=msa).ok()
    assert body[:4] == u16(0x29) + b"\0" + u8(payload)
    info, sig = body[:-68], body[-64:]
    assert info.endswith(sized(sha1(msa, u8(payload))))
    assert is_signature(signing_key.modulus, sig, info)
    wrong = certify(owned, CERTIFY_KEY2, signer, handle, msa=WRONG)
    assert wrong.code == ReturnCode.MA_SOURCE
    assert certify(owned, CERTIFY_KEY, signer, handle).code == ReturnCode.INVALID_KEYUSAGE


def test_certify_key2_by_an_identity_of_a_certified_migratable_key(owned):
    msa = sha1(b"authorities")
    identity = put_key(owned, template(IDENTITY, 1, 2, bits=2048))
    certify(owned, CERTIFY_KEY2, identity, put_cmk(owned, 6, msa), msa=msa).ok()
    without_flag = put_cmk(owned, 6, msa, flags=MIGRATABLE)
    answer = certify(owned, CERTIFY_KEY2, identity, without_flag, msa=msa)
    assert answer.code == ReturnCode.MIGRATEFAIL


def test_certify_key_checks_both_secrets(owned):
    signer, _ = loaded(owned.tpm, signing())
    handle, _ = loaded(owned.tpm, signing())
    first = certify(owned, CERTIFY_KEY, signer, handle, signer_auth=WRONG)
    second = certify(owned, CERTIFY_KEY, signer, handle, key_auth=WRONG)
    assert (first.code, second.code) == (ReturnCode.AUTHFAIL, ReturnCode.AUTH2FAIL)
    first = certify(owned, CERTIFY_KEY2, signer, handle, key_auth=WRONG)
    second = certify(owned, CERTIFY_KEY2, signer, handle, signer_auth=WRONG)
    assert (first.code, second.code) == (ReturnCode.AUTHFAIL, ReturnCode.AUTH2FAIL)


@pytest.fixture
def by_usage(owned):
    """Handles of keys by their authDataUsage."""
    return {usage: loaded(owned.tpm, signing(auth_data_usage=usage))[0] for usage in (0, 1, 3)}


# (signer's usage, key's usage) that need no session, and that do with a lone session.
_NO_SESSION = {(0, 0), (0, 3)}


@pytest.mark.parametrize("signer", [0, 1])
@pytest.mark.parametrize("key", [0, 1, 3])
@BOTH
def test_certify_key_without_sessions(owned, by_usage, ordinal, signer, key):
    handles = [u32(by_usage[signer]), u32(by_usage[key])]
    if ordinal == CERTIFY_KEY2:
        handles = [*handles[::-1], ZERO]
    code = owned.tpm.send(ordinal, b"".join(handles) + ZERO).code
    assert code == (ReturnCode.SUCCESS if (signer, key) in _NO_SESSION else ReturnCode.AUTHFAIL)


@pytest.mark.parametrize("signer", [0, 1])
@pytest.mark.parametrize("key", [0, 1, 3])
def test_certify_key_with_a_lone_session_for_the_key(owned, by_usage, signer, key):
    handles = u32(by_usage[signer]) + u32(by_usage[key])
    session = owned.tpm.oiap(KEY_AUTH)
    answer = owned.tpm.auth(CERTIFY_KEY, ZERO, session, handles=handles)
    assert answer.code == (ReturnCode.AUTHFAIL if signer else ReturnCode.SUCCESS)


@pytest.mark.parametrize("signer", [0, 1])
@pytest.mark.parametrize("key", [0, 1, 3])
def test_certify_key2_with_a_lone_session_for_the_signer(owned, by_usage, signer, key):
    handles = u32(by_usage[key]) + u32(by_usage[signer])
    session = owned.tpm.oiap(KEY_AUTH)
    answer = owned.tpm.auth(CERTIFY_KEY2, ZERO + ZERO, session, handles=handles)
    assert answer.code == (ReturnCode.AUTHFAIL if key == 1 else ReturnCode.SUCCESS)


@BOTH
def test_certify_key_checks_the_certified_keys_pcrs_unless_ignored(owned, ordinal):
    signer, _ = loaded(owned.tpm, signing())
    bound, _ = loaded(owned.tpm, signing(pcr_info=pcr_info(10)))
    ignoring, _ = loaded(owned.tpm, signing(pcr_info=pcr_info(10), flags=PCR_IGNORED))
    owned.tpm.send(EXTEND, u32(10) + ZERO).ok()
    assert certify(owned, ordinal, signer, bound).code == ReturnCode.WRONGPCRVAL
    certify(owned, ordinal, signer, ignoring).ok()
    # The signer's private part is used: its PCRs count whatever its flags say.
    assert certify(owned, ordinal, ignoring, signer).code == ReturnCode.WRONGPCRVAL
