"""TPM_Seal, Sealx, Unseal and UnBind: each return code, each answer."""

import pytest
from cryptography.hazmat.primitives.asymmetric import padding

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import SRK_AUTH
from tests.tpm12.makers import (
    BIND,
    DATA_AUTH,
    ET_KEY,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    LEGACY,
    MIGRATABLE,
    WRONG,
    aes_ctr,
    composite,
    decrypt,
    loaded,
    mgf1,
    pcr_info,
    pcr_info_long,
    seal,
    sealed_parts,
    signing,
    storage,
    template,
    unseal,
)
from tests.tpm12.witness import (
    OAEP,
    SRK,
    ZERO,
    Session,
    oaep,
    public_key,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
    xor,
)

SEAL, UNSEAL, UN_BIND, SEALX = 0x17, 0x18, 0x1E, 0x3D
EXTEND, FLUSH = 0x14, 0xBA


# -- Seal and Unseal -------------------------------------------------------------------------------


def test_seal_then_unseal(owned):
    blob = seal(owned.tpm, b"secret").ok()
    assert not owned.last.permanent_changed
    assert unseal(owned.tpm, blob).ok() == sized(b"secret")
    assert not owned.last.permanent_changed


def test_seal_puts_in_what_the_structures_say(owned):
    value = owned.tpm.send(EXTEND, u32(3) + b"e" * 20).ok()
    blob = seal(owned.tpm, b"secret", pcr_info(3, values=[value])).ok()
    head, enc_data = sealed_parts(blob)
    info = selection(3) + composite([3], [value]) * 2
    assert head == b"\x01\x01\x00\x00" + sized(info)
    inside = decrypt(owned.state.permanent.srk, enc_data)
    proof = owned.state.permanent.tpm_proof
    assert inside == b"\x05" + DATA_AUTH + proof + sha1(head) + sized(b"secret")


def test_seal_with_the_long_form_gives_stored_data12(owned):
    info = pcr_info_long([1], [2], localities=0x05, at_creation=0x10)
    head, _ = sealed_parts(seal(owned.tpm, b"secret", info, locality=2).ok())
    filled = info[:2] + u8(0x04) + info[3:-40] + composite([1]) + info[-20:]
    assert head == b"\x00\x16\x00\x00" + sized(filled)


def test_seal_without_pcrs_has_no_seal_info(owned):
    head, _ = sealed_parts(seal(owned.tpm, b"secret").ok())
    assert head == b"\x01\x01\x00\x00" + u32(0)


def test_seal_ends_its_session(owned):
    seal(owned.tpm, b"secret").ok()
    assert owned.state.stany.sessions == {}


@pytest.mark.parametrize(
    ("size", "code"),
    [
        (0, ReturnCode.BAD_PARAMETER),
        (1, ReturnCode.SUCCESS),
        (149, ReturnCode.SUCCESS),
        (150, ReturnCode.BAD_DATASIZE),
        (200, ReturnCode.BAD_DATASIZE),
        (1000, ReturnCode.BAD_DATASIZE),
    ],
)
def test_seal_sizes(owned, size, code):
    answer = seal(owned.tpm, b"d" * size)
    assert answer.code == code
    if code == ReturnCode.SUCCESS:
        assert unseal(owned.tpm, answer.body).ok() == sized(b"d" * size)


@pytest.mark.parametrize(
    "info",
    [
        b"\0",
        pcr_info(1)[:-1],
        pcr_info(1) + b"x",
        selection(1, size=4) + ZERO + ZERO,
        pcr_info_long([1], [1])[:-1],
        pcr_info_long([1], [1], localities=0),
        pcr_info_long([1], [1], at_creation=0x20),
    ],
)
def test_seal_with_a_malformed_binding_is_badindex(owned, info):
    assert seal(owned.tpm, b"secret", info).code == ReturnCode.BADINDEX


def test_seal_needs_a_storage_key_that_stays(owned):
    for wanted in (signing(), template(BIND, 3, 1), storage(flags=MIGRATABLE)):
        handle, _ = loaded(owned.tpm, wanted)
        answer = seal(owned.tpm, b"secret", key=handle, key_auth=KEY_AUTH)
        assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_seal_sessions(owned):
    tpm = owned.tpm
    params, handles = ZERO + sized(b"") + sized(b"data"), u32(SRK)
    oiap = tpm.auth(SEAL, params, tpm.oiap(SRK_AUTH), handles=handles)
    assert oiap.code == ReturnCode.BAD_MODE
    owner = tpm.auth(SEAL, params, tpm.osap(ET_OWNER, 0, sha1(b"owner secret")), handles=handles)
    assert owner.code == ReturnCode.AUTHFAIL
    assert seal(tpm, b"secret", key_auth=WRONG).code == ReturnCode.AUTHFAIL
    unknown = Session(0x777, ZERO, ZERO)
    answer = tpm.auth(SEAL, params, unknown, handles=handles)
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE


def test_unseal_under_another_storage_key(owned):
    handle, _ = loaded(owned.tpm, storage())
    blob = seal(owned.tpm, b"secret", key=handle, key_auth=KEY_AUTH).ok()
    unseal(owned.tpm, blob, key=handle, key_auth=KEY_AUTH).ok()
    assert unseal(owned.tpm, blob).code == ReturnCode.NOTSEALED_BLOB


def test_unseal_checks_the_secrets_in_order(owned):
    blob = seal(owned.tpm, b"secret").ok()
    assert unseal(owned.tpm, blob, key_auth=WRONG).code == ReturnCode.AUTHFAIL
    assert unseal(owned.tpm, blob, secret=WRONG).code == ReturnCode.AUTH2FAIL
    assert owned.state.stclear.failed_tries == 2
    broken = blob[:-1] + bytes([blob[-1] ^ 1])
    assert unseal(owned.tpm, broken, secret=WRONG).code == ReturnCode.NOTSEALED_BLOB


def test_unseal_of_every_altered_byte_is_refused(owned):
    blob = seal(owned.tpm, b"secret", pcr_info_long([1], [2])).ok()
    head, _ = sealed_parts(blob)
    for at in (*range(len(head)), len(head) + 4, len(blob) - 1):
        altered = bytearray(blob)
        altered[at] ^= 1
        assert unseal(owned.tpm, bytes(altered)).code != ReturnCode.SUCCESS, at


def test_unseal_of_another_owners_blob(owned):
    blob = seal(owned.tpm, b"secret").ok()
    owned.change("permanent", tpm_proof=b"another proof".ljust(20))
    assert unseal(owned.tpm, blob).code == ReturnCode.NOTSEALED_BLOB


def _sealed_by_hand(bench, payload=5, digest=None, inside=None):
    srk, head = bench.state.permanent.srk, b"\x01\x01\x00\x00" + u32(0)
    proof = bench.state.permanent.tpm_proof
    full = u8(payload) + DATA_AUTH + proof + (digest or sha1(head)) + sized(b"secret")
    return head + sized(oaep(srk.public.pub_key, full if inside is None else inside))


def test_unseal_of_a_blob_made_with_the_formulas(owned):
    """Who knows tpmProof can make blobs by the formulas; our own sealing is not needed."""
    assert unseal(owned.tpm, _sealed_by_hand(owned)).ok() == sized(b"secret")


@pytest.mark.parametrize("altered", [{"payload": 1}, {"digest": WRONG}, {"inside": b"\5" * 80}])
def test_unseal_of_what_is_no_sealed_data(owned, altered):
    blob = _sealed_by_hand(owned, **altered)
    assert unseal(owned.tpm, blob).code == ReturnCode.NOTSEALED_BLOB


def test_unseal_of_no_stored_data(owned):
    blob = seal(owned.tpm, b"secret").ok()
    assert unseal(owned.tpm, b"\x01\x02" + blob[2:]).code == ReturnCode.BAD_VERSION
    assert unseal(owned.tpm, b"\x00\x17" + blob[2:]).code == ReturnCode.BAD_VERSION
    assert unseal(owned.tpm, blob[:-1]).code == ReturnCode.BAD_PARAM_SIZE
    assert unseal(owned.tpm, blob + b"x").code == ReturnCode.BAD_PARAM_SIZE


@pytest.mark.parametrize("info", [pcr_info(7), pcr_info_long([1], [7])], ids=["1.1", "1.2"])
def test_unseal_needs_the_pcrs(owned, info):
    blob = seal(owned.tpm, b"secret", info).ok()
    unseal(owned.tpm, blob).ok()
    owned.tpm.send(EXTEND, u32(7) + ZERO).ok()
    assert unseal(owned.tpm, blob).code == ReturnCode.WRONGPCRVAL
    # The secret is looked at last: who does not have the PCRs learns nothing about it.
    assert unseal(owned.tpm, blob, secret=WRONG).code == ReturnCode.WRONGPCRVAL


def test_unseal_needs_the_locality(owned):
    blob = seal(owned.tpm, b"secret", pcr_info_long([1], [7], localities=0x06)).ok()
    assert unseal(owned.tpm, blob, locality=0).code == ReturnCode.BAD_LOCALITY
    assert unseal(owned.tpm, blob, locality=1).ok() == sized(b"secret")
    assert unseal(owned.tpm, blob, locality=3).code == ReturnCode.BAD_LOCALITY


def test_unseal_does_not_compare_the_digest_of_an_empty_selection(owned):
    blob = seal(owned.tpm, b"secret", selection() + b"r" * 20 + ZERO).ok()
    unseal(owned.tpm, blob).ok()


def test_unseal_needs_a_storage_key_that_stays(owned):
    blob = seal(owned.tpm, b"secret").ok()
    for wanted in (template(BIND, 3, 1, bits=2048), storage(flags=MIGRATABLE)):
        handle, _ = loaded(owned.tpm, wanted)
        answer = unseal(owned.tpm, blob, key=handle, key_auth=KEY_AUTH)
        assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_unseal_with_one_session_is_for_the_data(owned):
    tpm = owned.tpm
    blob = seal(tpm, b"secret").ok()
    answer = tpm.auth(UNSEAL, blob, tpm.oiap(DATA_AUTH), handles=u32(SRK))
    assert answer.code == ReturnCode.AUTHFAIL
    handle, _ = loaded(tpm, storage(auth_data_usage=0))
    blob = seal(tpm, b"secret", key=handle, key_auth=KEY_AUTH).ok()
    session = tpm.oiap(DATA_AUTH)
    assert tpm.auth(UNSEAL, blob, session, handles=u32(handle)).ok() == sized(b"secret")
    assert session.continues


def test_unseal_takes_no_osap_session_for_the_data(owned):
    tpm = owned.tpm
    blob = seal(tpm, b"secret").ok()
    sessions = [tpm.oiap(SRK_AUTH), tpm.osap(ET_SRK, SRK, SRK_AUTH)]
    assert tpm.auth(UNSEAL, blob, *sessions, handles=u32(SRK)).code == ReturnCode.BAD_MODE


def test_unseal_keeps_sessions_that_continue(owned):
    tpm = owned.tpm
    blob = seal(tpm, b"secret").ok()
    sessions = [tpm.osap(ET_SRK, SRK, SRK_AUTH), tpm.oiap(DATA_AUTH)]
    for _ in range(2):
        tpm.auth(UNSEAL, blob, *sessions, handles=u32(SRK)).ok()
    assert all(session.continues for session in sessions)


# -- Sealx -----------------------------------------------------------------------------------------


def sealx(tpm, data, info=b"", *, adip=0):
    """TPM_Sealx, with data and secret masked by the formulas."""
    session, odd = tpm.osap(adip << 8 | ET_SRK, SRK, SRK_AUTH), tpm.nonce()
    if adip:
        enc_auth = aes_ctr(session.shared, session.even, DATA_AUTH)
        masked = aes_ctr(session.shared, sha1(session.even, odd), data)
    else:
        enc_auth = session.masked(DATA_AUTH)
        masked = xor(data, mgf1(session.even + odd + b"XOR" + session.shared, len(data)))
    params = enc_auth + sized(info) + sized(masked)
    return tpm.auth(SEALX, params, session, handles=u32(SRK), odd=[odd])


@pytest.mark.parametrize(("adip", "et"), [(0, 0x0005), (6, 0x0600)], ids=["XOR", "AES"])
@pytest.mark.parametrize("info", [b"", pcr_info_long([1], [2])], ids=["free", "bound"])
def test_sealx_then_unseal_hides_the_data_both_ways(owned, adip, et, info):
    tpm, data = owned.tpm, bytes(range(50))
    blob = sealx(tpm, data, info, adip=adip).ok()
    head, enc_data = sealed_parts(blob)
    assert head[:4] == u16(0x16) + u16(et)
    assert decrypt(owned.state.permanent.srk, enc_data)[65:] == data
    session, second, odd = tpm.osap(ET_SRK, SRK, SRK_AUTH), tpm.oiap(DATA_AUTH), tpm.nonce()
    even = session.even
    send = [UNSEAL, blob, session, second]
    secret = tpm.auth(*send, handles=u32(SRK), odd=[odd, tpm.nonce()]).ok()[4:]
    assert secret != data
    if adip:
        assert aes_ctr(session.shared, sha1(even, odd), secret) == data
    else:
        assert xor(secret, mgf1(even + odd + b"XOR" + session.shared, len(data))) == data
    assert not session.continues
    assert second.continues


def test_sealx_data_needs_an_osap_session_to_come_back(owned):
    tpm = owned.tpm
    blob = sealx(tpm, b"secret").ok()
    assert unseal(tpm, blob).code == ReturnCode.BAD_MODE
    # Who does not know the secret is told that, and not how the blob was made.
    assert unseal(tpm, blob, secret=WRONG).code == ReturnCode.AUTH2FAIL


def test_sealx_data_needs_two_sessions_to_come_back(owned):
    tpm = owned.tpm
    handle, _ = loaded(tpm, storage(auth_data_usage=0))
    session, odd = tpm.osap(ET_KEY, handle, KEY_AUTH), tpm.nonce()
    params = session.masked(DATA_AUTH) + sized(b"") + sized(b"masked")
    blob = tpm.auth(SEALX, params, session, handles=u32(handle), odd=[odd]).ok()
    answer = tpm.auth(UNSEAL, blob, tpm.oiap(DATA_AUTH), handles=u32(handle))
    assert answer.code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("info", [pcr_info(1), b"\0", pcr_info_long([1], [1])[:-1]])
def test_sealx_needs_the_long_binding(owned, info):
    assert sealx(owned.tpm, b"secret", info).code == ReturnCode.BADINDEX


@pytest.mark.parametrize(
    ("size", "code"), [(0, ReturnCode.BAD_PARAMETER), (150, ReturnCode.BAD_DATASIZE)]
)
def test_sealx_sizes(owned, size, code):
    assert sealx(owned.tpm, b"d" * size).code == code


def test_sealx_blob_with_an_unknown_cipher_is_refused(owned):
    tpm, srk = owned.tpm, owned.state.permanent.srk
    head = u16(0x16) + u16(0x0100) + u32(0)
    inside = b"\5" + DATA_AUTH + owned.state.permanent.tpm_proof + sha1(head) + sized(b"secret")
    blob = head + sized(oaep(srk.public.pub_key, inside))
    sessions = [tpm.osap(ET_SRK, SRK, SRK_AUTH), tpm.oiap(DATA_AUTH)]
    answer = tpm.auth(UNSEAL, blob, *sessions, handles=u32(SRK))
    assert answer.code == ReturnCode.INAPPROPRIATE_ENC


# -- UnBind ----------------------------------------------------------------------------------------

BOUND = b"\x01\x01\x00\x00\x02"


def un_bind(tpm, handle, data, secret=KEY_AUTH):
    return tpm.auth(UN_BIND, sized(data), tpm.oiap(secret).ending(), handles=u32(handle))


def encrypted(key, data, scheme):
    return public_key(key.modulus).encrypt(data, OAEP if scheme == 3 else padding.PKCS1v15())


@pytest.mark.parametrize(
    ("usage", "scheme"), [(BIND, 3), (BIND, 2), (LEGACY, 3)], ids=["OAEP", "PKCS#1", "legacy"]
)
def test_un_bind_gives_what_is_inside_bound_data(owned, usage, scheme):
    handle, key = loaded(owned.tpm, template(usage, scheme, 2 if usage == LEGACY else 1, bits=1024))
    for data in (b"", b"hello", b"\0" * 40):
        blob = encrypted(key, BOUND + data, scheme)
        assert un_bind(owned.tpm, handle, blob).ok() == sized(data)
    assert not owned.last.permanent_changed


_NOT_BOUND = {
    "version": (b"\x01\x02\x00\x00\x02hello", ReturnCode.BAD_VERSION),
    "payload": (b"\x01\x01\x00\x00\x05hello", ReturnCode.INVALID_STRUCTURE),
    "short": (b"\x01\x01\x00\x00", ReturnCode.BAD_PARAM_SIZE),
    "nothing": (b"", ReturnCode.BAD_PARAM_SIZE),
}


@pytest.mark.parametrize(("data", "code"), _NOT_BOUND.values(), ids=_NOT_BOUND)
@pytest.mark.parametrize("scheme", [2, 3])
def test_un_bind_of_what_is_not_bound_data(owned, data, code, scheme):
    handle, key = loaded(owned.tpm, template(BIND, scheme, 1, bits=1024))
    assert un_bind(owned.tpm, handle, encrypted(key, data, scheme)).code == code


def test_un_bind_with_a_legacy_key_and_pkcs1_gives_everything(owned):
    handle, key = loaded(owned.tpm, template(LEGACY, 2, 2))
    for data in (b"hello", BOUND + b"hello", b""):
        assert un_bind(owned.tpm, handle, encrypted(key, data, 2)).ok() == sized(data)


def test_un_bind_of_no_ciphertext(owned):
    handle, key = loaded(owned.tpm, template(BIND, 3, 1))
    assert un_bind(owned.tpm, handle, b"").code == ReturnCode.BAD_PARAMETER
    size = len(key.modulus)
    for data in (b"\1", b"\1" * (size - 1), b"\1" * size, b"\xff" * size, b"\1" * (size + 1)):
        assert un_bind(owned.tpm, handle, data).code == ReturnCode.DECRYPT_ERROR


def test_un_bind_with_bad_pkcs1_padding_is_no_oracle(owned):
    """The same ciphertext gives the same bytes, and a client cannot tell them from a plaintext."""
    handle, key = loaded(owned.tpm, template(LEGACY, 2, 2))
    blob = b"\1" * len(key.modulus)
    first = un_bind(owned.tpm, handle, blob).ok()
    assert un_bind(owned.tpm, handle, blob).ok() == first
    assert un_bind(owned.tpm, handle, blob + b"\1").code == ReturnCode.DECRYPT_ERROR


def test_un_bind_needs_a_key_for_it(owned):
    for wanted in (signing(), storage()):
        handle, key = loaded(owned.tpm, wanted)
        blob = encrypted(key, b"\x01", 2)
        assert un_bind(owned.tpm, handle, blob).code == ReturnCode.INVALID_KEYUSAGE
    assert un_bind(owned.tpm, SRK, b"x" * 256, SRK_AUTH).code == ReturnCode.INVALID_KEYUSAGE


def test_un_bind_authorization(owned):
    handle, key = loaded(owned.tpm, template(BIND, 3, 1, bits=1024))
    blob = encrypted(key, BOUND + b"x", 3)
    assert un_bind(owned.tpm, handle, blob, WRONG).code == ReturnCode.AUTHFAIL
    assert owned.tpm.send(UN_BIND, u32(handle) + sized(blob)).code == ReturnCode.AUTHFAIL
    free, key = loaded(owned.tpm, template(BIND, 3, 1, bits=1024, auth_data_usage=0))
    blob = encrypted(key, BOUND + b"x", 3)
    assert owned.tpm.send(UN_BIND, u32(free) + sized(blob)).ok() == sized(b"x")


def test_osap_session_dies_with_its_key(owned):
    tpm = owned.tpm
    handle, key = loaded(tpm, template(BIND, 3, 1, bits=1024))
    session = tpm.osap(ET_KEY, handle, KEY_AUTH)
    blob = sized(encrypted(key, BOUND, 3))
    tpm.auth(UN_BIND, blob, session, handles=u32(handle)).ok()
    tpm.send(FLUSH, u32(handle) + u32(1)).ok()
    assert tpm.auth(UN_BIND, blob, session, handles=u32(handle)).code != ReturnCode.SUCCESS
    assert owned.state.stany.sessions == {}
