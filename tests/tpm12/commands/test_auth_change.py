"""TPM_ChangeAuth, ChangeAuthOwner, ChangeAuthAsymStart, Finish: each return code, each answer."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.identities import AIK_AUTH, loaded_identity
from tests.tpm12.makers import (
    DATA_AUTH,
    ET_KEY,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    MIGRATABLE,
    WRONG,
    aes_ctr,
    decrypt,
    load,
    loaded,
    pcr_info,
    seal,
    sealed_parts,
    signing,
    storage,
    unseal,
    wrap,
)
from tests.tpm12.witness import (
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    hmac1,
    is_signature,
    number,
    oaep,
    parse_key,
    parse_sized,
    rsa_parms,
    sha1,
    sized,
    u16,
    u32,
)

CHANGE_AUTH, CHANGE_AUTH_OWNER, ASYM_START, ASYM_FINISH = 0x0C, 0x10, 0x0E, 0x0F
SIGN, FLUSH, EXTEND, OWNER_SET_DISABLE, GET_CAPABILITY = 0x3C, 0xBA, 0x14, 0x6E, 0x65
ADCP, ET_DATA = 4, 0x03
NEW_AUTH = sha1(b"new secret")
REPLAY = sha1(b"replay")


def change(
    tpm,
    enc_data,
    *,
    entity_type=5,
    parent=SRK,
    parent_auth=SRK_AUTH,
    entity_auth=KEY_AUTH,
    protocol=ADCP,
    adip=0,
):
    """TPM_ChangeAuth under fresh sessions, the parent's asking to go on."""
    session = tpm.osap(adip << 8 | (ET_SRK if parent == SRK else ET_KEY), parent, parent_auth)
    new = aes_ctr(session.shared, session.even, NEW_AUTH) if adip else session.masked(NEW_AUTH)
    params = u16(protocol) + new + u16(entity_type) + sized(enc_data)
    return tpm.auth(CHANGE_AUTH, params, session, tpm.oiap(entity_auth), handles=u32(parent))


def with_enc_data(blob, enc_data):
    """A KEY around another encrypted part."""
    key = parse_key(blob)
    assert blob.endswith(sized(key.enc_data))
    return blob[: -len(sized(key.enc_data))] + sized(enc_data)


def out_data(body):
    data, rest = parse_sized(body)
    assert rest == b""
    return data


def use(tpm, handle, secret):
    """Sign with a key."""
    session = tpm.oiap(secret).ending()
    return tpm.auth(SIGN, sized(bytes(20)), session, handles=u32(handle)).code


# -- ChangeAuth ------------------------------------------------------------------------------------


def test_change_auth_of_a_key_gives_a_blob_with_the_new_secret(owned):
    blob = wrap(owned.tpm, signing()).ok()
    changed = out_data(change(owned.tpm, parse_key(blob).enc_data).ok())
    assert not owned.last.permanent_changed
    handle = number(load(owned.tpm, with_enc_data(blob, changed)).ok())
    assert use(owned.tpm, handle, NEW_AUTH) == 0
    assert use(owned.tpm, handle, KEY_AUTH) == ReturnCode.AUTHFAIL


def test_change_auth_changes_nothing_else_in_a_key(owned):
    blob = wrap(owned.tpm, signing(flags=MIGRATABLE), migration_auth=WRONG).ok()
    before = decrypt(owned.state.permanent.srk, parse_key(blob).enc_data)
    changed = out_data(change(owned.tpm, parse_key(blob).enc_data).ok())
    after = decrypt(owned.state.permanent.srk, changed)
    assert before[1:21] == KEY_AUTH
    assert after == before[:1] + NEW_AUTH + before[21:]


def test_change_auth_leaves_the_old_blob_good(owned):
    blob = wrap(owned.tpm, signing()).ok()
    change(owned.tpm, parse_key(blob).enc_data).ok()
    handle = number(load(owned.tpm, blob).ok())
    assert use(owned.tpm, handle, KEY_AUTH) == 0


def test_change_auth_of_sealed_data(owned):
    blob = seal(owned.tpm, b"data").ok()
    head, enc_data = sealed_parts(blob)
    answer = change(owned.tpm, enc_data, entity_type=ET_DATA, entity_auth=DATA_AUTH)
    changed = head + sized(out_data(answer.ok()))
    assert unseal(owned.tpm, changed, secret=NEW_AUTH).ok() == sized(b"data")
    assert unseal(owned.tpm, changed, secret=DATA_AUTH).code == ReturnCode.AUTH2FAIL


def test_change_auth_under_another_parent(owned):
    parent, _ = loaded(owned.tpm, storage())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    blob = wrap(owned.tpm, signing(), **under).ok()
    changed = out_data(change(owned.tpm, parse_key(blob).enc_data, **under).ok())
    handle = number(load(owned.tpm, with_enc_data(blob, changed), **under).ok())
    assert use(owned.tpm, handle, NEW_AUTH) == 0


def test_change_auth_with_aes_adip(owned):
    blob = wrap(owned.tpm, signing()).ok()
    changed = out_data(change(owned.tpm, parse_key(blob).enc_data, adip=6).ok())
    handle = number(load(owned.tpm, with_enc_data(blob, changed)).ok())
    assert use(owned.tpm, handle, NEW_AUTH) == 0


def test_change_auth_ends_both_sessions(owned):
    blob = wrap(owned.tpm, signing()).ok()
    tpm = owned.tpm
    parent, entity = tpm.osap(ET_SRK, SRK, SRK_AUTH), tpm.oiap(KEY_AUTH)
    params = u16(ADCP) + parent.masked(NEW_AUTH) + u16(5) + sized(parse_key(blob).enc_data)
    tpm.auth(CHANGE_AUTH, params, parent, entity, handles=u32(SRK)).ok()
    assert not parent.continues
    assert not entity.continues
    for session in (parent, entity):
        assert tpm.send(FLUSH, u32(session.handle) + u32(2)).code == ReturnCode.INVALID_AUTHHANDLE


@pytest.mark.parametrize("entity_type", [0, 1, 2, 4, 6, 0x0A, 0x0B, 0x0103, 0x0605])
def test_change_auth_of_other_entities_is_wrong_entitytype(owned, entity_type):
    blob = wrap(owned.tpm, signing()).ok()
    answer = change(owned.tpm, parse_key(blob).enc_data, entity_type=entity_type)
    assert answer.code == ReturnCode.WRONG_ENTITYTYPE


@pytest.mark.parametrize("protocol", [0, 1, 3, 5, 0xFFFF])
def test_change_auth_with_another_protocol_is_bad_parameter(owned, protocol):
    blob = wrap(owned.tpm, signing()).ok()
    answer = change(owned.tpm, parse_key(blob).enc_data, protocol=protocol)
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_change_auth_with_other_kinds_of_sessions_is_bad_mode(owned):
    tpm = owned.tpm
    enc_data = parse_key(wrap(tpm, signing()).ok()).enc_data
    params = u16(ADCP) + NEW_AUTH + u16(5) + sized(enc_data)
    sessions = [
        (lambda: tpm.oiap(SRK_AUTH), lambda: tpm.oiap(KEY_AUTH)),
        (lambda: tpm.osap(ET_SRK, SRK, SRK_AUTH), lambda: tpm.osap(ET_SRK, SRK, SRK_AUTH)),
    ]
    for parent, entity in sessions:
        answer = tpm.auth(CHANGE_AUTH, params, parent(), entity(), handles=u32(SRK))
        assert answer.code == ReturnCode.BAD_MODE


def test_change_auth_checks_in_the_order_of_the_specification(owned):
    tpm = owned.tpm
    enc_data = parse_key(wrap(tpm, signing()).ok()).enc_data
    wrong = {"entity_type": 1, "protocol": 1, "parent_auth": WRONG, "entity_auth": WRONG}
    expected = [
        ("entity_type", ReturnCode.WRONG_ENTITYTYPE),
        ("protocol", ReturnCode.BAD_PARAMETER),
        ("parent_auth", ReturnCode.AUTHFAIL),
        ("entity_auth", ReturnCode.AUTH2FAIL),
    ]
    for name, code in expected:
        assert change(tpm, enc_data, **wrong).code == code
        del wrong[name]
    change(tpm, enc_data, **wrong).ok()


def test_change_auth_wrong_secrets_count_as_attacks(owned):
    enc_data = parse_key(wrap(owned.tpm, signing()).ok()).enc_data
    change(owned.tpm, enc_data, parent_auth=WRONG)
    change(owned.tpm, enc_data, entity_auth=WRONG)
    assert owned.state.stclear.failed_tries == 2


def test_change_auth_unknown_parent_is_invalid_keyhandle(owned):
    tpm = owned.tpm
    session = tpm.osap(ET_SRK, SRK, SRK_AUTH)
    params = u16(ADCP) + session.masked(NEW_AUTH) + u16(5) + sized(bytes(256))
    answer = tpm.auth(CHANGE_AUTH, params, session, tpm.oiap(), handles=u32(12345))
    assert answer.code == ReturnCode.INVALID_KEYHANDLE


def test_change_auth_parent_for_something_else_is_invalid_keyusage(owned):
    parent, _ = loaded(owned.tpm, signing())
    answer = change(owned.tpm, bytes(64), parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_change_auth_parent_bound_to_other_pcrs_is_wrongpcrval(owned):
    parent, _ = loaded(owned.tpm, storage(pcr_info=pcr_info(10)))
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    blob = wrap(owned.tpm, signing(), **under).ok()
    owned.tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    answer = change(owned.tpm, parse_key(blob).enc_data, **under)
    assert answer.code == ReturnCode.WRONGPCRVAL


def test_change_auth_key_bound_to_other_pcrs_is_changed_all_the_same(owned):
    # "No PCR check on the entity": only its parent is used.
    blob = wrap(owned.tpm, signing(pcr_info=pcr_info(10))).ok()
    owned.tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    change(owned.tpm, parse_key(blob).enc_data).ok()


@pytest.mark.parametrize("entity_type", [ET_DATA, 5])
def test_change_auth_of_what_does_not_decrypt_is_decrypt_error(owned, entity_type):
    for enc_data in (b"", bytes(256), b"\x01" * 256, b"\x01" * 255):
        answer = change(owned.tpm, enc_data, entity_type=entity_type)
        assert answer.code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("entity_type", [ET_DATA, 5])
@pytest.mark.parametrize("inside", [b"", b"\x01", b"\x05" + bytes(63), b"\x01" + bytes(100)])
def test_change_auth_of_what_is_no_entity_is_invalid_structure(owned, entity_type, inside):
    enc_data = oaep(owned.state.permanent.srk.public.pub_key, inside)
    answer = change(owned.tpm, enc_data, entity_type=entity_type)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_change_auth_does_not_take_a_key_for_sealed_data(owned):
    # The two have one layout, and the migration secret of a key that stays is tpmProof too.
    enc_data = parse_key(wrap(owned.tpm, signing()).ok()).enc_data
    answer = change(owned.tpm, enc_data, entity_type=ET_DATA)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_change_auth_does_not_take_sealed_data_for_a_key(owned):
    _, enc_data = sealed_parts(seal(owned.tpm, b"data").ok())
    answer = change(owned.tpm, enc_data, entity_auth=DATA_AUTH)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_change_auth_of_data_that_another_tpm_sealed_is_authfail(owned):
    _, enc_data = sealed_parts(seal(owned.tpm, b"data").ok())
    owned.change("permanent", tpm_proof=sha1(b"another proof"))
    answer = change(owned.tpm, enc_data, entity_type=ET_DATA, entity_auth=DATA_AUTH)
    assert answer.code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 0


# -- ChangeAuthOwner -------------------------------------------------------------------------------


def change_owner(tpm, entity_type, secret=NEW_AUTH, *, protocol=ADCP, session=None):
    session = session or tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    params = u16(protocol) + session.masked(secret) + u16(entity_type)
    return tpm.auth(CHANGE_AUTH_OWNER, params, session)


def is_owner(tpm, secret):
    return tpm.auth(OWNER_SET_DISABLE, b"\0", tpm.oiap(secret).ending()).code == 0


def test_change_auth_owner_changes_the_owners_secret(owned):
    session = owned.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    # The response is signed with the old secret: Witness.auth checks that.
    change_owner(owned.tpm, ET_OWNER, session=session).ok()
    assert owned.last.permanent_changed
    assert not session.continues
    assert is_owner(owned.tpm, NEW_AUTH)
    assert not is_owner(owned.tpm, OWNER_AUTH)


def test_change_auth_owner_changes_the_srks_secret(owned):
    digest = owned.state.permanent.srk.pub_data_digest
    change_owner(owned.tpm, ET_SRK).ok()
    assert owned.last.permanent_changed
    assert owned.state.permanent.srk.pub_data_digest == digest
    assert is_owner(owned.tpm, OWNER_AUTH)
    blob = wrap(owned.tpm, signing(), parent_auth=NEW_AUTH).ok()
    load(owned.tpm, blob, parent_auth=NEW_AUTH).ok()
    assert load(owned.tpm, blob).code == ReturnCode.AUTHFAIL


def test_change_auth_owner_keeps_what_the_secrets_protect(owned):
    sealed, key = seal(owned.tpm, b"data").ok(), wrap(owned.tpm, signing()).ok()
    change_owner(owned.tpm, ET_OWNER).ok()
    change_owner(owned.tpm, ET_SRK, session=owned.tpm.osap(ET_OWNER, 0, NEW_AUTH)).ok()
    assert unseal(owned.tpm, sealed, key_auth=NEW_AUTH).ok() == sized(b"data")
    load(owned.tpm, key, parent_auth=NEW_AUTH).ok()


def is_open(tpm, session):
    handles = tpm.capability(0x14, u32(2))
    return u32(session.handle) in [handles[i : i + 4] for i in range(2, len(handles), 4)]


@pytest.mark.parametrize(
    ("changed", "ended"),
    [(ET_OWNER, {"owner"}), (ET_SRK, {"owner", "srk", "srk by handle"})],
)
def test_change_auth_owner_ends_the_sessions_of_what_changed(owned, changed, ended):
    tpm = owned.tpm
    key, _ = loaded(tpm, signing())
    sessions = {
        "owner": tpm.osap(ET_OWNER, OWNER, OWNER_AUTH),
        "srk": tpm.osap(ET_SRK, 0, SRK_AUTH),
        "srk by handle": tpm.osap(ET_KEY, SRK, SRK_AUTH),
        "key": tpm.osap(ET_KEY, key, KEY_AUTH),
        "oiap": tpm.oiap(),
    }
    change_owner(tpm, changed).ok()
    assert {name for name, s in sessions.items() if not is_open(tpm, s)} == ended


def test_change_auth_owner_with_another_protocol_is_bad_parameter(owned):
    assert change_owner(owned.tpm, ET_OWNER, protocol=3).code == ReturnCode.BAD_PARAMETER
    assert change_owner(owned.tpm, 1, protocol=3).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("entity_type", [0, 1, 3, 5, 0x0A, 0x0B, 0x0602])
def test_change_auth_owner_of_other_entities_is_wrong_entitytype(owned, entity_type):
    assert change_owner(owned.tpm, entity_type).code == ReturnCode.WRONG_ENTITYTYPE


def test_change_auth_owner_under_oiap_is_bad_mode(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    params = u16(ADCP) + NEW_AUTH + u16(ET_OWNER)
    assert owned.tpm.auth(CHANGE_AUTH_OWNER, params, session).code == ReturnCode.BAD_MODE


def test_change_auth_owner_by_somebody_else_is_authfail(owned):
    tpm = owned.tpm
    wrong = tpm.osap(ET_OWNER, 0, WRONG)
    assert change_owner(tpm, ET_OWNER, session=wrong).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1
    srks = tpm.osap(ET_SRK, SRK, SRK_AUTH)
    assert change_owner(tpm, ET_OWNER, session=srks).code == ReturnCode.AUTHFAIL
    assert is_owner(tpm, OWNER_AUTH)


def test_failed_change_auth_owner_ends_its_session(owned):
    session = owned.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    change_owner(owned.tpm, 1, session=session)
    assert not is_open(owned.tpm, session)


# -- ChangeAuthAsymStart ---------------------------------------------------------------------------

TEMP = rsa_parms(1024)
"""The smallest usual size that OAEP leaves room for a new secret and its nonce in."""


def start(tpm, identity, parms=TEMP, *, secret=AIK_AUTH):
    return tpm.auth(ASYM_START, REPLAY + parms, tpm.oiap(secret).ending(), handles=u32(identity))


def started(tpm, identity, parms=TEMP):
    """Handle and modulus of a new ephemeral key; checks that the identity vouches for it."""
    handle, key = identity
    body = start(tpm, handle, parms).ok()
    info_size = 4 + 2 + 4 + 1 + len(parms) + 20 + 20 + 1 + 4
    info, rest = body[:info_size], body[info_size:]
    signature, rest = parse_sized(rest)
    ephemeral, temp_key = number(rest[:4]), parse_key(rest[4:])
    assert temp_key.rest == b""
    assert temp_key.enc_data == b""
    head = u16(0x13) + u32(4) + b"\0"
    assert temp_key.head == b"\1\1\0\0" + head
    assert temp_key.parms == parms
    assert temp_key.pcr_info == b""
    certified = b"\1\1\0\0" + head + parms + sha1(temp_key.modulus) + REPLAY + b"\0" + u32(0)
    assert info == certified
    assert is_signature(key.modulus, signature, info)
    return ephemeral, temp_key.modulus


def key_handles(tpm):
    handles = tpm.capability(7)
    return [number(handles[i : i + 4]) for i in range(2, len(handles), 4)]


@pytest.mark.parametrize("bits", [512, 1024, 2048])
def test_asym_start_makes_a_key_that_the_identity_vouches_for(owned, bits):
    parms = rsa_parms(bits)
    ephemeral, modulus = started(owned.tpm, loaded_identity(owned.tpm), parms)
    assert len(modulus) == bits // 8
    assert ephemeral in key_handles(owned.tpm)
    assert not owned.last.permanent_changed


def test_asym_start_without_session_for_an_identity_that_needs_none(owned):
    free, _ = loaded_identity(owned.tpm, auth_data_usage=0)
    owned.tpm.send(ASYM_START, u32(free) + REPLAY + TEMP).ok()
    bound, _ = loaded_identity(owned.tpm)
    answer = owned.tpm.send(ASYM_START, u32(bound) + REPLAY + TEMP)
    assert answer.code == ReturnCode.AUTHFAIL


def test_asym_start_key_is_for_nothing_else(owned):
    tpm = owned.tpm
    ephemeral, modulus = started(tpm, loaded_identity(tpm))
    bound = oaep(modulus, b"\1\1\0\0\2x")
    codes = {
        tpm.send(0x1E, u32(ephemeral) + sized(bound)).code,
        tpm.send(0x3C, u32(ephemeral) + sized(bytes(20))).code,
        tpm.send(0x25, u32(ephemeral) + TEMP + sized(modulus) + sized(bound)).code,
        tpm.send(0x2A, u32(ephemeral) + sized(bound) + sized(b"x")).code,
    }
    assert codes == {ReturnCode.INVALID_KEYUSAGE}


def test_asym_start_with_another_key_is_invalid_keyusage(owned):
    handle, _ = loaded(owned.tpm, signing())
    assert start(owned.tpm, handle, secret=KEY_AUTH).code == ReturnCode.INVALID_KEYUSAGE


def test_asym_start_unknown_identity_is_invalid_keyhandle(owned):
    assert start(owned.tpm, 12345).code == ReturnCode.INVALID_KEYHANDLE


def test_asym_start_wrong_secret_is_authfail(owned):
    identity, _ = loaded_identity(owned.tpm)
    assert start(owned.tpm, identity, secret=WRONG).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(
    "parms",
    [
        rsa_parms(256),
        rsa_parms(520),
        rsa_parms(4096),
        rsa_parms(512, enc=2),
        rsa_parms(512, enc=1),
        rsa_parms(512, sig=2),
        rsa_parms(512, primes=3),
        rsa_parms(512, algorithm=6),
        rsa_parms(512, exponent=b"\x04"),
        u32(1) + u16(3) + u16(1) + sized(b"short"),
    ],
)
def test_asym_start_key_of_another_kind_is_bad_key_property(owned, parms):
    identity, _ = loaded_identity(owned.tpm)
    assert start(owned.tpm, identity, parms).code == ReturnCode.BAD_KEY_PROPERTY


def test_asym_start_small_key_in_fips_mode_is_notfips(owned):
    identity, _ = loaded_identity(owned.tpm)
    owned.set_flags(fips=True)
    assert start(owned.tpm, identity, rsa_parms(512)).code == ReturnCode.NOTFIPS
    start(owned.tpm, identity, rsa_parms(1024)).ok()


def test_asym_start_without_a_free_slot_is_nospace(owned):
    identity, _ = loaded_identity(owned.tpm)
    (key,) = owned.state.volatile.keys.values()
    owned.change("volatile", keys={identity: key, **dict.fromkeys(range(1, 20), key)})
    assert start(owned.tpm, identity).code == ReturnCode.NOSPACE


# -- ChangeAuthAsymFinish --------------------------------------------------------------------------

N1 = sha1(b"n1")


def finish(
    tpm,
    ephemeral,
    enc_data,
    *,
    entity_type=5,
    parent=SRK,
    parent_auth=OWNER_AUTH,
    old=KEY_AUTH,
    inside=NEW_AUTH + N1,
    sent=None,
):
    """TPM_ChangeAuthAsymFinish; `ephemeral` is what `started` gave."""
    handle, modulus = ephemeral
    sent = oaep(modulus, inside) if sent is None else sent
    link = hmac1(old, NEW_AUTH)
    params = u16(entity_type) + link + sized(sent) + sized(enc_data)
    session = tpm.oiap(parent_auth).ending()
    return tpm.auth(ASYM_FINISH, params, session, handles=u32(parent) + u32(handle))


@pytest.fixture
def ready(owned):
    """A bench with an ephemeral key, and a wrapped key."""
    ephemeral = started(owned.tpm, loaded_identity(owned.tpm))
    blob = wrap(owned.tpm, signing()).ok()
    return owned, ephemeral, blob


def checked(body):
    """outData, after checking the proof that the secret was changed."""
    changed, rest = parse_sized(body)
    assert len(rest) == 40
    assert rest[20:] == hmac1(NEW_AUTH, rest[:20], N1)
    return changed


def test_asym_finish_gives_a_key_with_the_new_secret(ready):
    # With the SRK as parent, the owner's secret authorizes.
    bench, ephemeral, blob = ready
    changed = checked(finish(bench.tpm, ephemeral, parse_key(blob).enc_data).ok())
    assert not bench.last.permanent_changed
    handle = number(load(bench.tpm, with_enc_data(blob, changed)).ok())
    assert use(bench.tpm, handle, NEW_AUTH) == 0
    assert use(bench.tpm, handle, KEY_AUTH) == ReturnCode.AUTHFAIL


def test_asym_finish_with_the_srks_own_secret_is_authfail(ready):
    bench, ephemeral, blob = ready
    answer = finish(bench.tpm, ephemeral, parse_key(blob).enc_data, parent_auth=SRK_AUTH)
    assert answer.code == ReturnCode.AUTHFAIL


def test_asym_finish_of_sealed_data(ready):
    # libtpms changes keys only.
    bench, ephemeral, _ = ready
    head, enc_data = sealed_parts(seal(bench.tpm, b"data").ok())
    answer = finish(bench.tpm, ephemeral, enc_data, entity_type=ET_DATA, old=DATA_AUTH)
    changed = head + sized(checked(answer.ok()))
    assert unseal(bench.tpm, changed, secret=NEW_AUTH).ok() == sized(b"data")


def test_asym_finish_under_another_parent_needs_its_secret(owned):
    parent, _ = loaded(owned.tpm, storage())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    enc_data = parse_key(wrap(owned.tpm, signing(), **under).ok()).enc_data
    ephemeral = started(owned.tpm, loaded_identity(owned.tpm))
    refused = finish(owned.tpm, ephemeral, enc_data, parent=parent)
    assert refused.code == ReturnCode.AUTHFAIL
    checked(finish(owned.tpm, ephemeral, enc_data, **under).ok())


def test_asym_finish_without_session_under_a_parent_that_needs_none(owned):
    tpm = owned.tpm
    parent, _ = loaded(tpm, storage(auth_data_usage=0))
    blob = wrap(tpm, signing(), parent=parent, parent_auth=KEY_AUTH).ok()
    handle, modulus = started(tpm, loaded_identity(tpm))
    sent = sized(oaep(modulus, NEW_AUTH + N1))
    params = u32(handle) + u16(5) + hmac1(KEY_AUTH, NEW_AUTH) + sent
    params += sized(parse_key(blob).enc_data)
    assert tpm.send(ASYM_FINISH, u32(SRK) + params).code == ReturnCode.AUTHFAIL
    checked(tpm.send(ASYM_FINISH, u32(parent) + params).ok())


def test_asym_finish_drops_the_ephemeral_key_and_its_sessions(ready):
    bench, ephemeral, blob = ready
    enc_data = parse_key(blob).enc_data
    session = bench.tpm.osap(ET_KEY, ephemeral[0], ZERO)
    finish(bench.tpm, ephemeral, enc_data).ok()
    assert ephemeral[0] not in key_handles(bench.tpm)
    assert not is_open(bench.tpm, session)
    assert finish(bench.tpm, ephemeral, enc_data).code == ReturnCode.INVALID_KEYHANDLE


def test_failed_asym_finish_keeps_the_ephemeral_key(ready):
    bench, ephemeral, blob = ready
    enc_data = parse_key(blob).enc_data
    assert finish(bench.tpm, ephemeral, enc_data, old=WRONG).code == ReturnCode.AUTHFAIL
    assert bench.state.stclear.failed_tries == 0
    finish(bench.tpm, ephemeral, enc_data).ok()


def test_asym_finish_wrong_parent_secret_is_authfail_and_counted(ready):
    bench, ephemeral, blob = ready
    answer = finish(bench.tpm, ephemeral, parse_key(blob).enc_data, parent_auth=WRONG)
    assert answer.code == ReturnCode.AUTHFAIL
    assert bench.state.stclear.failed_tries == 1


def test_asym_finish_unknown_parent_is_invalid_keyhandle(ready):
    bench, ephemeral, blob = ready
    answer = finish(bench.tpm, ephemeral, parse_key(blob).enc_data, parent=12345)
    assert answer.code == ReturnCode.INVALID_KEYHANDLE


def test_asym_finish_parent_bound_to_other_pcrs_is_wrongpcrval(ready):
    bench, ephemeral, _ = ready
    parent, _ = loaded(bench.tpm, storage(pcr_info=pcr_info(10)))
    bench.tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    answer = finish(bench.tpm, ephemeral, b"", parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.WRONGPCRVAL


@pytest.mark.parametrize("entity_type", [0, 1, 2, 4, 0x0A, 0x0105])
def test_asym_finish_of_other_entities_is_wrong_entitytype(ready, entity_type):
    bench, ephemeral, blob = ready
    answer = finish(bench.tpm, ephemeral, parse_key(blob).enc_data, entity_type=entity_type)
    assert answer.code == ReturnCode.WRONG_ENTITYTYPE


def test_asym_finish_parent_for_something_else_is_invalid_keyusage(ready):
    bench, ephemeral, blob = ready
    parent, _ = loaded(bench.tpm, signing())
    enc_data = parse_key(blob).enc_data
    answer = finish(bench.tpm, ephemeral, enc_data, parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_asym_finish_of_what_does_not_decrypt_is_decrypt_error(ready):
    bench, ephemeral, blob = ready
    assert finish(bench.tpm, ephemeral, bytes(256)).code == ReturnCode.DECRYPT_ERROR
    enc_data = parse_key(blob).enc_data
    answer = finish(bench.tpm, ephemeral, enc_data, sent=b"\x01" * 128)
    assert answer.code == ReturnCode.DECRYPT_ERROR


def test_asym_finish_of_another_kind_of_entity_is_invalid_structure(ready):
    bench, ephemeral, blob = ready
    enc_data = parse_key(blob).enc_data
    answer = finish(bench.tpm, ephemeral, enc_data, entity_type=ET_DATA)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_asym_finish_with_another_key_for_the_secret_is_bad_parameter(ready):
    bench, _, blob = ready
    other, key = loaded(bench.tpm, storage())
    answer = finish(bench.tpm, (other, key.modulus), parse_key(blob).enc_data)
    assert answer.code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("inside", [b"", NEW_AUTH, NEW_AUTH + N1[1:]])
def test_asym_finish_new_secret_of_another_size_is_refused(ready, inside):
    bench, ephemeral, blob = ready
    answer = finish(bench.tpm, ephemeral, parse_key(blob).enc_data, inside=inside)
    assert answer.code == ReturnCode.BAD_PARAM_SIZE
