"""Endorsement key and identities (Part 3, chapters 14 and 15)."""

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import Bench, nv_area
from tests.tpm12.witness import (
    EK,
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    hmac1,
    is_signature,
    key_template,
    number,
    oaep,
    parse_key,
    parse_pubkey,
    parse_sized,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.keys import LoadedKey, described

CREATE_EK, CREATE_REVOCABLE_EK, REVOKE_TRUST, READ_PUBEK = 0x78, 0x7F, 0x80, 0x7C
OWNER_READ_PUBEK, DISABLE_PUBEK_READ, OWNER_READ_INTERNAL_PUB = 0x7D, 0x7E, 0x81
MAKE_IDENTITY, ACTIVATE_IDENTITY, LOAD_KEY2, EXTEND = 0x79, 0x7A, 0x41, 0x14
REPLAY = sha1(b"replay")
RESET = sha1(b"reset")
AIK_AUTH = sha1(b"identity")
LABEL = sha1(b"label and CA")


# -- endorsement key -------------------------------------------------------------------------------


def check_pubek(body):
    """A PUBKEY of an EK and its checksum; gives the modulus and what follows."""
    parms, modulus, rest = parse_pubkey(body)
    assert len(modulus) == 256
    assert modulus[0] >= 0x80
    assert rest[:20] == sha1(parms, sized(modulus), REPLAY)
    return parms, modulus, rest[20:]


def test_create_ek_makes_one_that_can_be_read(fresh):
    out = fresh.tpm.send(CREATE_EK, REPLAY + rsa_parms()).ok()
    assert fresh.last.permanent_changed
    parms, _, rest = check_pubek(out)
    assert parms == rsa_parms()
    assert rest == b""
    assert fresh.tpm.send(READ_PUBEK, REPLAY).ok() == out
    flags = fresh.tpm.flags()
    assert (flags[10], flags[15]) == (1, 0)


def test_create_ek_draws_daa_secrets(fresh):
    fresh.tpm.send(CREATE_EK, REPLAY + rsa_parms()).ok()
    permanent = fresh.state.permanent
    assert all(
        any(s) for s in (permanent.tpm_daa_seed, permanent.daa_proof, permanent.daa_blob_key)
    )


def test_create_ek_makes_a_key_that_works(fresh):
    _, modulus, _ = check_pubek(fresh.tpm.send(CREATE_EK, REPLAY + rsa_parms()).ok())
    params = u16(5) + sized(oaep(modulus, OWNER_AUTH)) + sized(oaep(modulus, SRK_AUTH))
    session = fresh.tpm.oiap(OWNER_AUTH)
    fresh.tpm.auth(0x0D, params + key_template(0x11), session).ok()


@pytest.mark.parametrize(("enc", "sig"), [(1, 1), (2, 2), (3, 1), (9, 9)])
def test_create_ek_ignores_the_schemes_and_tells_its_own(fresh, enc, sig):
    out = fresh.tpm.send(CREATE_EK, REPLAY + rsa_parms(enc=enc, sig=sig)).ok()
    assert check_pubek(out)[0] == rsa_parms(enc=3, sig=1)


@pytest.mark.parametrize("exponent", [b"\1\0\1", b"\3"])
def test_create_ek_keeps_an_exponent_that_was_asked_for(fresh, exponent):
    out = fresh.tpm.send(CREATE_EK, REPLAY + rsa_parms(exponent=exponent)).ok()
    assert check_pubek(out)[0] == rsa_parms(exponent=exponent)
    assert fresh.state.permanent.endorsement_key.rsa.public.exponent == number(exponent)


@pytest.mark.parametrize(
    "parms",
    [
        rsa_parms(512),
        rsa_parms(1024),
        rsa_parms(4096),
        rsa_parms(primes=3),
        rsa_parms(algorithm=6),
        rsa_parms(exponent=b"\2"),
        rsa_parms(exponent=b"\xff" * 300),
        u32(1) + u16(3) + u16(1) + sized(b""),
        u32(1) + u16(3) + u16(1) + sized(bytes(12) + b"\0"),
    ],
)
@pytest.mark.parametrize("ordinal", [CREATE_EK, CREATE_REVOCABLE_EK])
def test_create_ek_of_another_kind_is_bad_key_property(fresh, ordinal, parms):
    tail = u8(0) + RESET if ordinal == CREATE_REVOCABLE_EK else b""
    answer = fresh.tpm.send(ordinal, REPLAY + parms + tail)
    assert answer.code == ReturnCode.BAD_KEY_PROPERTY
    assert fresh.tpm.send(READ_PUBEK, REPLAY).code == ReturnCode.NO_ENDORSEMENT


@pytest.mark.parametrize("parms", [rsa_parms(), rsa_parms(512)])
def test_second_ek_is_disabled_cmd(with_ek, parms):
    before = with_ek.state.permanent
    assert with_ek.tpm.send(CREATE_EK, REPLAY + parms).code == ReturnCode.DISABLED_CMD
    body = REPLAY + parms + u8(0) + RESET
    assert with_ek.tpm.send(CREATE_REVOCABLE_EK, body).code == ReturnCode.DISABLED_CMD
    assert with_ek.state.permanent is before


def revocable(bench, *, generate):
    out = bench.tpm.send(CREATE_REVOCABLE_EK, REPLAY + rsa_parms() + u8(generate) + RESET).ok()
    _, modulus, ek_reset = check_pubek(out)
    return modulus, ek_reset


def test_create_revocable_ek_with_a_given_reset(fresh):
    _, ek_reset = revocable(fresh, generate=False)
    assert ek_reset == RESET
    flags = fresh.tpm.flags()
    assert (flags[10], flags[15]) == (1, 1)


def test_create_revocable_ek_with_a_random_reset(fresh):
    _, ek_reset = revocable(fresh, generate=True)
    assert len(ek_reset) == 20
    assert ek_reset not in (RESET, ZERO)
    fresh.present()
    assert fresh.tpm.send(REVOKE_TRUST, RESET).code == ReturnCode.AUTHFAIL
    fresh.tpm.send(REVOKE_TRUST, ek_reset).ok()


def test_create_revocable_ek_with_a_bad_bool_is_bad_parameter(fresh):
    body = REPLAY + rsa_parms() + u8(2) + RESET
    assert fresh.tpm.send(CREATE_REVOCABLE_EK, body).code == ReturnCode.BAD_PARAMETER


def test_revoke_trust_clears_and_removes_the_ek(fresh):
    modulus, _ = revocable(fresh, generate=False)
    fresh.set_flags(nv_locked=True)
    owner_area, d_area, other = 0x1000, 0x10001000, 0x1001
    areas = {owner_area: 0x2, d_area: 0x2, other: 0x40000}
    fresh.change(
        "permanent", nv={i: nv_area(i, a) for i, a in areas.items()}, owner_auth=OWNER_AUTH
    )
    before = fresh.state.permanent
    fresh.present()
    fresh.tpm.send(REVOKE_TRUST, RESET).ok()
    after = fresh.state.permanent
    assert after.endorsement_key is None
    assert after.owner_auth is None
    assert after.tpm_daa_seed != before.tpm_daa_seed
    assert sorted(after.nv) == [other]
    assert after.ek_reset != before.ek_reset
    flags = after.flags
    assert (flags.nv_locked, flags.cekp_used, flags.enable_revoke_ek) == (False, False, True)
    assert (flags.disable, flags.deactivated) == (True, True)
    # A new EK may follow, and it is another.
    fresh.tpm.send(0x6F).ok()
    again, _ = revocable(fresh, generate=False)
    assert again != modulus


def test_revoke_trust_is_not_stopped_by_disable_owner_clear_and_disable_force_clear(fresh):
    revocable(fresh, generate=False)
    fresh.present()
    fresh.set_flags(disable_owner_clear=True)
    fresh.change("stclear", disable_force_clear=True)
    fresh.tpm.send(REVOKE_TRUST, RESET).ok()


def test_revoke_trust_of_a_permanent_ek_is_permanentek(with_ek):
    with_ek.present()
    assert with_ek.tpm.send(REVOKE_TRUST, ZERO).code == ReturnCode.PERMANENTEK


def test_revoke_trust_checks_the_reset_before_presence(fresh):
    revocable(fresh, generate=False)
    assert fresh.tpm.send(REVOKE_TRUST, ZERO).code == ReturnCode.AUTHFAIL
    assert fresh.tpm.send(REVOKE_TRUST, RESET).code == ReturnCode.BAD_PRESENCE


@pytest.mark.parametrize("revoked_before", [False, True])
def test_revoke_trust_without_an_ek_is_authfail(fresh, revoked_before):
    """No reset was ever set for an EK that is not there; zeros must not do."""
    fresh.present()
    if revoked_before:
        revocable(fresh, generate=False)
        fresh.tpm.send(REVOKE_TRUST, RESET).ok()
        fresh.tpm.send(0x6F).ok()
    for guess in (ZERO, RESET, fresh.state.permanent.ek_reset):
        assert fresh.tpm.send(REVOKE_TRUST, guess).code == ReturnCode.AUTHFAIL


def test_read_pubek_without_ek_is_no_endorsement(fresh):
    assert fresh.tpm.send(READ_PUBEK, REPLAY).code == ReturnCode.NO_ENDORSEMENT


def test_read_pubek_of_an_owned_tpm_is_disabled_cmd(owned):
    assert owned.tpm.send(READ_PUBEK, REPLAY).code == ReturnCode.DISABLED_CMD


def test_read_pubek_where_forbidden_is_disabled_cmd_even_without_ek(fresh):
    fresh.set_flags(read_pubek=False)
    assert fresh.tpm.send(READ_PUBEK, REPLAY).code == ReturnCode.DISABLED_CMD


def ek_modulus(bench):
    return bench.state.permanent.endorsement_key.public.pub_key


def test_owner_reads_pubek_and_internal_pubs(owned):
    tpm = owned.tpm
    pubek = rsa_parms() + sized(ek_modulus(owned))
    srk = rsa_parms() + sized(owned.state.permanent.srk.public.pub_key)
    session = tpm.oiap(OWNER_AUTH)
    assert tpm.auth(OWNER_READ_PUBEK, b"", session).ok() == pubek
    assert tpm.auth(OWNER_READ_INTERNAL_PUB, u32(EK), session).ok() == pubek
    assert tpm.auth(OWNER_READ_INTERNAL_PUB, u32(SRK), session).ok() == srk


@pytest.mark.parametrize("handle", [0, 5, OWNER, 0x40000005])
def test_owner_read_internal_pub_of_another_handle_is_bad_parameter(owned, handle):
    session = owned.tpm.oiap(OWNER_AUTH)
    answer = owned.tpm.auth(OWNER_READ_INTERNAL_PUB, u32(handle), session)
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_owner_read_internal_pub_hashes_the_handle(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    answer = owned.tpm.auth(OWNER_READ_INTERNAL_PUB, b"", session, handles=u32(EK))
    assert answer.code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(
    ("ordinal", "body"),
    [(OWNER_READ_PUBEK, b""), (DISABLE_PUBEK_READ, b""), (OWNER_READ_INTERNAL_PUB, u32(EK))],
)
def test_owners_reading_with_another_secret_is_authfail(owned, ordinal, body):
    answer = owned.tpm.auth(ordinal, body, owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.AUTHFAIL


def test_owners_reading_without_an_ek_is_no_endorsement(owned):
    owned.change("permanent", endorsement_key=None)
    session = owned.tpm.oiap(OWNER_AUTH)
    assert owned.tpm.auth(OWNER_READ_PUBEK, b"", session).code == ReturnCode.NO_ENDORSEMENT
    session = owned.tpm.oiap(OWNER_AUTH)
    answer = owned.tpm.auth(OWNER_READ_INTERNAL_PUB, u32(EK), session)
    assert answer.code == ReturnCode.NO_ENDORSEMENT


def test_disable_pubek_read(owned):
    owned.set_flags(read_pubek=True)
    owned.tpm.send(READ_PUBEK, REPLAY).ok()
    owned.tpm.auth(DISABLE_PUBEK_READ, b"", owned.tpm.oiap(OWNER_AUTH)).ok()
    assert owned.tpm.send(READ_PUBEK, REPLAY).code == ReturnCode.DISABLED_CMD


# -- MakeIdentity ----------------------------------------------------------------------------------

AIK_PARMS = rsa_parms(enc=1, sig=2)
AIK = key_template(0x12, parms=AIK_PARMS)


def make(bench, template=AIK, *, srk=None, owner=None, without_srk=False):
    """MakeIdentity with good sessions where none are given."""
    tpm = bench.tpm
    owner = owner or tpm.osap(2, OWNER, OWNER_AUTH)
    sessions = [owner] if without_srk else [srk or tpm.oiap(SRK_AUTH), owner]
    secret = owner.masked(AIK_AUTH) if owner.shared else AIK_AUTH
    return tpm.auth(MAKE_IDENTITY, secret + LABEL + template, *sessions)


def load(bench, blob):
    session = bench.tpm.oiap(SRK_AUTH).ending()
    out = bench.tpm.auth(LOAD_KEY2, blob, session, handles=u32(SRK), out_handles=4).ok()
    return number(out[:4])


def made_identity(bench, **how):
    """The bytes of a new identity key, and its parts."""
    body = make(bench, **how).ok()
    key = parse_key(body)
    binding, rest = parse_sized(key.rest)
    assert rest == b""
    return body[: -4 - len(binding)], key, binding


@pytest.mark.parametrize("key12", [False, True])
def test_make_identity_makes_a_key_that_names_itself(owned, key12):
    template = key_template(0x12, key12=key12, parms=AIK_PARMS)
    blob, key, binding = made_identity(owned, template=template)
    assert key.head == template[:11]
    assert (key.parms, len(key.modulus), len(key.enc_data)) == (AIK_PARMS, 256, 256)
    contents = b"\1\1\0\0" + u32(MAKE_IDENTITY) + LABEL + key.pubkey
    assert is_signature(key.modulus, binding, contents)
    # It loads, and its secret is the one that was masked.
    handle = load(owned, blob)
    owned.tpm.osap(1, handle, AIK_AUTH)
    quote = REPLAY + selection(0)
    owned.tpm.auth(0x16, quote, owned.tpm.oiap(AIK_AUTH), handles=u32(handle)).ok()


def test_make_identity_wraps_what_the_specification_says(owned):
    _, key, _ = made_identity(owned)
    srk = owned.state.permanent.srk
    secret = srk.rsa.decrypt_oaep(key.enc_data)
    assert secret[:1] == b"\1"
    assert secret[1:21] == AIK_AUTH
    assert secret[21:41] == owned.state.permanent.tpm_proof
    assert secret[41:61] == key.digest
    prime, rest = parse_sized(secret[61:])
    assert rest == b""
    assert number(key.modulus) % number(prime) == 0


def test_make_identity_ends_both_sessions(owned):
    srk, owner = owned.tpm.oiap(SRK_AUTH), owned.tpm.osap(2, OWNER, OWNER_AUTH)
    make(owned, srk=srk, owner=owner).ok()
    assert (srk.continues, owner.continues) == (False, False)
    assert owned.state.stany.sessions == {}


def test_make_identity_with_a_secret_masked_by_aes(owned):
    owner = owned.tpm.osap(0x0600 | 2, OWNER, OWNER_AUTH)
    cipher = Cipher(algorithms.AES(owner.shared[:16]), modes.CTR(owner.even[:16])).encryptor()
    params = cipher.update(AIK_AUTH) + LABEL + AIK
    body = owned.tpm.auth(MAKE_IDENTITY, params, owned.tpm.oiap(SRK_AUTH), owner).ok()
    secret = owned.state.permanent.srk.rsa.decrypt_oaep(parse_key(body).enc_data)
    assert secret[1:21] == AIK_AUTH


def test_make_identity_changes_no_permanent_state(owned):
    owned.change("stany", audit_digest=sha1(b"an audit cycle is under way"))
    make(owned).ok()
    assert not owned.last.permanent_changed


def test_make_identity_with_an_osap_session_for_the_srk(owned):
    make(owned, srk=owned.tpm.osap(4, SRK, SRK_AUTH)).ok()


def test_make_identity_with_one_session(owned):
    assert make(owned, without_srk=True).code == ReturnCode.AUTHFAIL
    srk = owned.state.permanent.srk
    public = described(srk.public, pcr_info=b"", pub_key=srk.public.pub_key, enc_data=b"")
    object.__setattr__(public, "auth_data_usage", 0)
    free = LoadedKey(
        public,
        payload=1,
        usage_auth=SRK_AUTH,
        migration_auth=srk.migration_auth,
        prime=srk.prime,
        parent_pcr_status=False,
    )
    owned.change("permanent", srk=free)
    make(owned, without_srk=True).ok()


def test_make_identity_binds_to_pcrs_as_they_are(owned):
    binding = selection(0) + ZERO + ZERO
    template = key_template(0x12, parms=AIK_PARMS, pcr_info=binding)
    _, key, _ = made_identity(owned, template=template)
    assert key.pcr_info == selection(0) + ZERO + sha1(selection(0), sized(ZERO))


def unknown():
    return Session(0xBAD, ZERO, ZERO, ZERO)


@pytest.mark.parametrize(
    ("sessions", "code"),
    [
        (lambda t: {"srk": t.oiap(ZERO)}, ReturnCode.AUTHFAIL),
        (lambda t: {"owner": t.osap(2, OWNER, ZERO)}, ReturnCode.AUTH2FAIL),
        (lambda t: {"srk": t.oiap(ZERO), "owner": t.osap(2, OWNER, ZERO)}, ReturnCode.AUTH2FAIL),
        (lambda t: {"owner": t.osap(2, OWNER, ZERO), "without_srk": True}, ReturnCode.AUTH2FAIL),
        (lambda t: {"owner": t.oiap(OWNER_AUTH)}, ReturnCode.BAD_MODE),
        (lambda t: {"owner": t.osap(4, SRK, SRK_AUTH)}, ReturnCode.AUTH2FAIL),
        (lambda t: {"srk": t.osap(2, OWNER, OWNER_AUTH)}, ReturnCode.AUTHFAIL),
        (lambda _: {"srk": unknown()}, ReturnCode.INVALID_AUTHHANDLE),
        (lambda _: {"owner": unknown()}, ReturnCode.INVALID_AUTHHANDLE),
    ],
)
def test_make_identity_refuses_sessions(owned, sessions, code):
    assert make(owned, **sessions(owned.tpm)).code == code


def test_make_identity_refuses_one_session_for_both(owned):
    session = owned.tpm.osap(2, OWNER, OWNER_AUTH)
    assert make(owned, srk=session, owner=session).code == ReturnCode.INVALID_AUTHHANDLE


@pytest.mark.parametrize(
    ("template", "code"),
    [
        (key_template(0x10, parms=AIK_PARMS), ReturnCode.INVALID_KEYUSAGE),
        (key_template(0x11), ReturnCode.INVALID_KEYUSAGE),
        (key_template(0x12, parms=AIK_PARMS, flags=2), ReturnCode.INVALID_KEYUSAGE),
        (key_template(0x12, parms=AIK_PARMS, flags=0x20), ReturnCode.BAD_KEY_PROPERTY),
        (key_template(0x12, parms=rsa_parms(1024, 1, 2)), ReturnCode.BAD_KEY_PROPERTY),
        (key_template(0x12, parms=rsa_parms(2048, 3, 2)), ReturnCode.BAD_KEY_PROPERTY),
        (key_template(0x12, parms=rsa_parms(2048, 1, 3)), ReturnCode.BAD_KEY_PROPERTY),
        (key_template(0x12, parms=rsa_parms(2048, 1, 2, b"\3")), ReturnCode.BAD_KEY_PROPERTY),
        (key_template(0x99, parms=AIK_PARMS), ReturnCode.BAD_KEY_PROPERTY),
        (b"\2" + AIK[1:], ReturnCode.BAD_VERSION),
    ],
)
def test_make_identity_refuses_templates(owned, template, code):
    assert make(owned, template).code == code


def test_make_identity_looks_at_properties_then_sessions_then_usage(owned):
    small = key_template(0x12, parms=rsa_parms(1024, 1, 2))
    assert make(owned, small, owner=unknown()).code == ReturnCode.BAD_KEY_PROPERTY
    signing = key_template(0x10, parms=AIK_PARMS)
    assert make(owned, signing, srk=owned.tpm.oiap(ZERO)).code == ReturnCode.AUTHFAIL


def test_make_identity_in_fips_mode_needs_a_guarded_key(owned):
    owned.set_flags(fips=True)
    template = key_template(0x12, parms=AIK_PARMS, auth_data_usage=0)
    session = owned.tpm.oiap(SRK_AUTH)
    body = ZERO + LABEL + template
    answer = owned.tpm.auth(MAKE_IDENTITY, body, session, owned.tpm.oiap(OWNER_AUTH))
    assert answer.code == ReturnCode.NOTFIPS


# -- ActivateIdentity ------------------------------------------------------------------------------

CREDENTIAL = u32(6) + u16(2) + u16(16) + b"K" * 16
ANYWHERE = selection() + b"\x1f" + ZERO


@pytest.fixture(scope="module")
def identified_state(owned_state):
    """An owned TPM with a loaded identity key: (state, handle, PUBKEY)."""
    bench = Bench(owned_state)
    blob, key, _ = made_identity(bench)
    handle = load(bench, blob)
    return bench.state, handle, key.pubkey


class Activation:
    """The owner and a CA; each test spoils one thing."""

    def __init__(self, bench, handle, pubkey):
        self.bench, self.tpm, self.handle = bench, bench.tpm, handle
        self.digest = sha1(pubkey)

    def encrypted(self, plaintext):
        return oaep(ek_modulus(self.bench), plaintext)

    def of_1_1(self, digest=None):
        return self.encrypted(CREDENTIAL + (digest or self.digest))

    def of_1_2(self, *, digest=None, pcr_info=ANYWHERE, ek_type=1, tag=0x2B, cut=0):
        inner = u16(tag) + CREDENTIAL + (digest or self.digest) + pcr_info
        inner = inner[: len(inner) - cut]
        return self.encrypted(u16(0x0C) + u16(ek_type) + sized(inner))

    def activate(self, blob, *, key=None, owner=None, without_key=False, locality=0):
        owner = owner or self.tpm.oiap(OWNER_AUTH)
        sessions = [owner] if without_key else [key or self.tpm.oiap(AIK_AUTH), owner]
        return self.tpm.auth(
            ACTIVATE_IDENTITY, sized(blob), *sessions, handles=u32(self.handle), locality=locality
        )


@pytest.fixture
def activation(make_bench, identified_state):
    state, handle, pubkey = identified_state
    return Activation(make_bench(state), handle, pubkey)


def test_activate_identity_gives_the_key_of_a_1_1_blob(activation):
    assert activation.activate(activation.of_1_1()).ok() == CREDENTIAL


def test_activate_identity_gives_the_key_of_a_1_2_blob(activation):
    assert activation.activate(activation.of_1_2()).ok() == CREDENTIAL


def test_activate_identity_under_osap(activation):
    key = activation.tpm.osap(1, activation.handle, AIK_AUTH)
    owner = activation.tpm.osap(2, OWNER, OWNER_AUTH)
    assert activation.activate(activation.of_1_1(), key=key, owner=owner).ok() == CREDENTIAL
    assert (key.continues, owner.continues) == (True, True)


@pytest.mark.parametrize("form", ["of_1_1", "of_1_2"])
def test_activate_identity_for_another_identity_is_bad_parameter(activation, form):
    blob = getattr(activation, form)(digest=sha1(b"another"))
    assert activation.activate(blob).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("blob", [b"", b"\1" * 20, b"\1" * 256, b"\xff" * 256, b"\1" * 257])
def test_activate_identity_of_what_does_not_decrypt_is_decrypt_error(activation, blob):
    assert activation.activate(blob).code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("ek_type", [0, 2, 3])
def test_activate_identity_of_another_ek_blob_is_bad_type(activation, ek_type):
    assert activation.activate(activation.of_1_2(ek_type=ek_type)).code == ReturnCode.BAD_TYPE


def test_activate_identity_of_malformed_plaintexts(activation):
    cases = [
        (activation.of_1_2(tag=0x2C), ReturnCode.INVALID_STRUCTURE),
        (activation.of_1_2(cut=1), ReturnCode.BAD_PARAM_SIZE),
        (activation.of_1_2(pcr_info=selection() + b"\0" + ZERO), ReturnCode.INVALID_STRUCTURE),
        (activation.encrypted(b""), ReturnCode.BAD_PARAM_SIZE),
        (activation.encrypted(CREDENTIAL), ReturnCode.BAD_PARAM_SIZE),
        (activation.encrypted(CREDENTIAL + activation.digest + b"\0"), ReturnCode.BAD_PARAM_SIZE),
    ]
    for blob, code in cases:
        assert activation.activate(blob).code == code


def test_activate_identity_where_the_ca_asks_for_pcrs(activation):
    wanted = sha1(selection(16), sized(ZERO))
    blob = activation.of_1_2(pcr_info=selection(16) + b"\x1f" + wanted)
    activation.activate(blob).ok()
    activation.tpm.send(EXTEND, u32(16) + ZERO).ok()
    assert activation.activate(blob).code == ReturnCode.WRONGPCRVAL


def test_activate_identity_where_the_ca_asks_for_a_locality(activation):
    blob = activation.of_1_2(pcr_info=selection() + b"\x04" + ZERO)
    assert activation.activate(blob).code == ReturnCode.BAD_LOCALITY
    activation.activate(blob, locality=2).ok()


def test_activate_identity_block_order(activation):
    """First block AUTHFAIL, second AUTH2FAIL, as everywhere; libtpms has them swapped here."""
    tpm, blob = activation.tpm, activation.of_1_1()
    assert activation.activate(blob, key=tpm.oiap(ZERO)).code == ReturnCode.AUTHFAIL
    assert activation.activate(blob, owner=tpm.oiap(ZERO)).code == ReturnCode.AUTH2FAIL
    wrong = {"key": tpm.oiap(ZERO), "owner": tpm.oiap(ZERO)}
    assert activation.activate(blob, **wrong).code == ReturnCode.AUTH2FAIL, "the owner comes first"
    assert activation.activate(blob, key=unknown()).code == ReturnCode.INVALID_AUTHHANDLE
    assert activation.activate(blob, owner=unknown()).code == ReturnCode.INVALID_AUTHHANDLE
    assert activation.activate(blob, without_key=True).code == ReturnCode.AUTHFAIL


def test_activate_identity_with_the_srk_is_bad_parameter(activation):
    """Even where the CA named it: its usage is not IDENTITY."""
    activation.handle = SRK
    srk = activation.bench.state.permanent.srk.public.pub_key
    activation.digest = sha1(rsa_parms(), sized(srk))
    answer = activation.activate(activation.of_1_1(), key=activation.tpm.oiap(SRK_AUTH))
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_activate_identity_with_an_unknown_handle_is_invalid_keyhandle(activation):
    activation.handle = 0x99
    assert activation.activate(activation.of_1_1()).code == ReturnCode.INVALID_KEYHANDLE
    answer = activation.activate(activation.of_1_1(), owner=unknown())
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE, "the owner comes first"


def test_masking_formula_is_the_specifications(owned):
    """ADIP by hand, so that the witness has a witness."""
    odd_osap, odd = b"p" * 20, b"o" * 20
    out = owned.tpm.send(0x0B, u16(2) + u32(OWNER) + odd_osap).ok()
    handle, even, even_osap = out[:4], out[4:24], out[24:44]
    shared = hmac1(OWNER_AUTH, even_osap, odd_osap)
    pad = sha1(shared, even)
    enc_auth = bytes(a ^ b for a, b in zip(AIK_AUTH, pad, strict=True))
    params = enc_auth + LABEL + AIK
    digest = sha1(u32(MAKE_IDENTITY), params)
    srk_session = owned.tpm.oiap(SRK_AUTH)
    blocks = b""
    for session_handle, session_even, key in (
        (u32(srk_session.handle), srk_session.even, SRK_AUTH),
        (handle, even, shared),
    ):
        mac = hmac1(key, digest + session_even + odd + b"\0")
        blocks += session_handle + odd + b"\0" + mac
    body = owned.tpm.send(MAKE_IDENTITY, params + blocks, tag=0xC3).ok()
    key = parse_key(body[:-82])
    secret = owned.state.permanent.srk.rsa.decrypt_oaep(key.enc_data)
    assert secret[1:21] == AIK_AUTH
