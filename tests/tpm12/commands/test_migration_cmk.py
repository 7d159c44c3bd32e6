"""Certified migratable keys: TPM_CMK_SetRestrictions to TPM_CMK_ConvertMigration."""

from dataclasses import replace

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.makers import (
    AUTHCHANGE,
    BIND,
    ET_SRK,
    IDENTITY,
    KEY_AUTH,
    MIGRATE,
    SIGNING,
    WRONG,
    decrypt,
    load,
    loaded,
    pcr_info_long,
    seal,
    sealed_parts,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.movers import (
    CMK,
    CMK_APPROVE_MA,
    CMK_CREATE_KEY,
    CMK_CREATE_TICKET,
    CMK_SET_RESTRICTIONS,
    MIGRATABLE,
    MIGRATE_AUTHORITY,
    MS_MAINT,
    MS_MIGRATE,
    MS_RESTRICT_APPROVE,
    MS_RESTRICT_MIGRATE,
    MS_REWRAP,
    CmkArrival,
    CmkBlob,
    Inside,
    OutsideKey,
    approve,
    authorize,
    create_cmk,
    create_ticket,
    modulus_of,
    msa_list,
    one_sized,
    owner,
    pack,
    rewrapped,
    sent_to,
    srk_pubkey,
    storage_cmk,
    two_sized,
    unpack,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    hmac1,
    key_template,
    number,
    oaep,
    parse_key,
    rsa_parms,
    sha1,
    sized,
    u16,
    u32,
    xor,
)

SIGN, EXTEND, CMK_RESTRICTION = 0x3C, 0x14, 0x11F
SIGNED = sha1(b"signed data")


@pytest.fixture(scope="module")
def authority():
    """A migration authority: encrypts and signs outside."""
    return OutsideKey()


@pytest.fixture(scope="module")
def other():
    """Somebody who is no authority."""
    return OutsideKey()


def cmk(**more):
    """A wanted certified migratable signing key."""
    return template(SIGNING, 1, 2, bits=1024, key12=True, flags=CMK, **more)


# -- SetRestrictions -------------------------------------------------------------------------------


def set_restrictions(tpm, bits, secret=OWNER_AUTH):
    return tpm.auth(CMK_SET_RESTRICTIONS, u32(bits), owner(tpm, secret))


@pytest.mark.parametrize("bits", [0x80000000, 0xF8000000, 1, 0])
def test_set_restrictions_is_kept(owned, bits):
    set_restrictions(owned.tpm, bits).ok()
    assert owned.tpm.capability(5, u32(CMK_RESTRICTION)) == u32(bits)
    assert owned.state.permanent.restrict_delegate == bits


def test_set_restrictions_to_what_they_are_writes_nothing(owned):
    set_restrictions(owned.tpm, 3).ok()
    assert owned.last.permanent_changed
    set_restrictions(owned.tpm, 3).ok()
    assert not owned.last.permanent_changed


def test_set_restrictions_by_somebody_else_is_authfail(owned):
    assert set_restrictions(owned.tpm, 3, WRONG).code == ReturnCode.AUTHFAIL
    assert owned.state.permanent.restrict_delegate == 0


# -- ApproveMA -------------------------------------------------------------------------------------


def test_approve_ma_is_an_hmac_of_this_owner(owned, authority):
    digest = sha1(msa_list(authority.digest))
    out = approve(owned.tpm, digest).ok()
    proof = owned.state.permanent.tpm_proof
    assert out == hmac1(proof, u16(0x35), digest)


def test_approve_ma_by_somebody_else_is_authfail(owned):
    assert approve(owned.tpm, ZERO, secret=WRONG).code == ReturnCode.AUTHFAIL
    assert owned.tpm.send(CMK_APPROVE_MA, ZERO).code == ReturnCode.BADTAG


# -- CreateTicket ----------------------------------------------------------------------------------


@pytest.mark.parametrize("sig", [2, 4])
def test_create_ticket_is_an_hmac_over_verified_data(owned, authority, sig):
    verifier = authority.as_verifier(sig)
    out = create_ticket(owned.tpm, verifier, SIGNED, authority.sign(SIGNED)).ok()
    proof = owned.state.permanent.tpm_proof
    assert out == hmac1(proof, u16(0x34), sha1(verifier), SIGNED)


def test_create_ticket_for_what_a_tpm_signed(owned):
    handle, key = loaded(owned.tpm, signing(bits=1024))
    session = owned.tpm.oiap(KEY_AUTH).ending()
    signature = one_sized(owned.tpm.auth(SIGN, sized(SIGNED), session, handles=u32(handle)).ok())
    create_ticket(owned.tpm, key.pubkey, SIGNED, signature).ok()


def test_create_ticket_checks_in_the_order_of_the_specification(owned, authority):
    steps = [
        (rsa_parms(2048, 3, 3, algorithm=6), OWNER_AUTH, ReturnCode.BAD_KEY_PROPERTY),
        (rsa_parms(2048, 3, 3), OWNER_AUTH, ReturnCode.INAPPROPRIATE_ENC),
        (rsa_parms(2048, 1, 3), OWNER_AUTH, ReturnCode.INVALID_KEYUSAGE),
        (rsa_parms(2048, 1, 1), OWNER_AUTH, ReturnCode.INVALID_KEYUSAGE),
        (rsa_parms(2048, 1, 2), OWNER_AUTH, ReturnCode.BAD_SIGNATURE),
        (rsa_parms(2048, 3, 3, algorithm=6), WRONG, ReturnCode.AUTHFAIL),
    ]
    for parms, secret, code in steps:
        verifier = parms + sized(authority.modulus)
        answer = create_ticket(owned.tpm, verifier, SIGNED, bytes(256), secret=secret)
        assert answer.code == code


def test_create_ticket_wrong_signature_is_bad_signature(owned, authority, other):
    good = authority.sign(SIGNED)
    tries = [
        (authority, SIGNED, other.sign(SIGNED)),
        (other, SIGNED, good),
        (authority, sha1(b"other data"), good),
        (authority, SIGNED, good[:-1] + bytes([good[-1] ^ 1])),
        (authority, SIGNED, good[1:]),
        (authority, SIGNED, good + b"\0"),
        (authority, SIGNED, b""),
    ]
    for key, signed, signature in tries:
        answer = create_ticket(owned.tpm, key.as_verifier(), signed, signature)
        assert answer.code == ReturnCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "modulus", [b"", b"\0", b"\3", bytes(256), b"\xff" * 256, b"\xff" * 2049, b"\xff" * 3000]
)
def test_create_ticket_with_what_is_no_key_is_bad_signature(owned, modulus):
    verifier = rsa_parms(2048, 1, 2) + sized(modulus)
    answer = create_ticket(owned.tpm, verifier, SIGNED, bytes(256))
    assert answer.code == ReturnCode.BAD_SIGNATURE


def test_create_ticket_with_malformed_parameters_is_bad_key_property(owned):
    verifier = u32(1) + u16(1) + u16(2) + sized(b"short") + sized(b"\xff" * 256)
    answer = create_ticket(owned.tpm, verifier, SIGNED, bytes(256))
    assert answer.code == ReturnCode.BAD_KEY_PROPERTY


def test_create_ticket_needs_the_owner(owned, authority):
    params = authority.as_verifier() + SIGNED + sized(authority.sign(SIGNED))
    assert owned.tpm.send(CMK_CREATE_TICKET, params).code == ReturnCode.BADTAG


# -- CreateKey -------------------------------------------------------------------------------------


def test_cmk_create_key_is_what_the_specification_says(owned, authority):
    authorities = msa_list(authority.digest)
    wanted = cmk()
    blob = create_cmk(owned.tpm, wanted, authorities).ok()
    key = parse_key(blob)
    assert key.rest == b""
    assert key.head == wanted[:11]
    secrets = decrypt(owned.state.permanent.srk, key.enc_data)
    proof = owned.state.permanent.tpm_proof
    bound = hmac1(proof, u16(0x33), sha1(authorities), sha1(key.pubkey))
    assert secrets[:61] == b"\x06" + KEY_AUTH + bound + key.digest
    assert number(key.modulus) % number(secrets[65:]) == 0


def test_cmk_create_key_makes_a_key_that_loads_and_signs(owned, authority):
    blob = create_cmk(owned.tpm, cmk(), msa_list(authority.digest)).ok()
    handle = number(load(owned.tpm, blob).ok())
    session = owned.tpm.oiap(KEY_AUTH).ending()
    owned.tpm.auth(SIGN, sized(bytes(20)), session, handles=u32(handle)).ok()


@pytest.mark.parametrize(
    "wanted",
    [
        template(BIND, 3, 1, key12=True, flags=CMK),
        template(BIND, 3, 1, key12=True, flags=CMK | 0x0C),
        storage_cmk(),
        template(MIGRATE, 3, 1, bits=2048, key12=True, flags=CMK),
    ],
)
def test_cmk_create_key_of_other_kinds(owned, authority, wanted):
    blob = create_cmk(owned.tpm, wanted, msa_list(authority.digest, sha1(b"x"))).ok()
    load(owned.tpm, blob).ok()


def test_cmk_create_key_ends_its_session(owned, authority):
    tpm = owned.tpm
    digest = sha1(msa_list(authority.digest))
    approval = approve(tpm, digest).ok()
    session = tpm.osap(ET_SRK, SRK, SRK_AUTH)
    params = session.masked(KEY_AUTH) + cmk() + approval + digest
    tpm.auth(CMK_CREATE_KEY, params, session, handles=u32(SRK)).ok()
    assert not session.continues


def test_cmk_create_key_fills_in_the_pcrs_at_creation(owned, authority):
    owned.tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    info = pcr_info_long([10], [10])
    blob = create_cmk(owned.tpm, cmk(pcr_info=info), msa_list(authority.digest)).ok()
    filled = parse_key(blob).pcr_info
    assert filled[2] == 1
    assert filled[14:34] != ZERO
    assert filled[34:] == info[34:]


@pytest.mark.parametrize("flags", [0, MIGRATABLE, MIGRATE_AUTHORITY, 0x0C])
def test_cmk_create_key_without_both_flags_is_invalid_keyusage(owned, authority, flags):
    wanted = template(SIGNING, 1, 2, key12=True, flags=flags)
    answer = create_cmk(owned.tpm, wanted, msa_list(authority.digest))
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


@pytest.mark.parametrize("usage", [IDENTITY, AUTHCHANGE])
def test_cmk_create_key_of_a_kind_that_others_make_is_invalid_keyusage(owned, authority, usage):
    schemes = (1, 2) if usage == IDENTITY else (3, 1)
    wanted = template(usage, *schemes, bits=2048, key12=True, flags=CMK)
    answer = create_cmk(owned.tpm, wanted, msa_list(authority.digest))
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_cmk_create_key_under_a_migratable_parent_is_invalid_keyusage(owned, authority):
    parent, _ = loaded(owned.tpm, storage(flags=MIGRATABLE))
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    answer = create_cmk(owned.tpm, cmk(), msa_list(authority.digest), **under)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_cmk_create_key_under_another_kind_of_parent_is_invalid_keyusage(owned, authority):
    parent, _ = loaded(owned.tpm, signing())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    answer = create_cmk(owned.tpm, cmk(), msa_list(authority.digest), **under)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


@pytest.mark.parametrize(
    "wanted",
    [
        template(SIGNING, 3, 2, key12=True, flags=CMK),
        template(SIGNING, 1, 2, bits=4096, key12=True, flags=CMK),
        template(SIGNING, 1, 2, key12=True, flags=CMK | 0x20),
        template(0x99, 1, 2, key12=True, flags=CMK),
        template(SIGNING, 1, 2, key12=True, flags=CMK, auth_data_usage=2),
    ],
)
def test_cmk_create_key_that_is_not_served_is_bad_key_property(owned, authority, wanted):
    answer = create_cmk(owned.tpm, wanted, msa_list(authority.digest))
    assert answer.code == ReturnCode.BAD_KEY_PROPERTY


def test_cmk_create_key_in_fips_mode(owned, authority):
    owned.set_flags(fips=True)
    tpm, digest = owned.tpm, sha1(msa_list(authority.digest))
    approval = approve(tpm, digest).ok()
    session = tpm.osap(0x0600 | ET_SRK, SRK, SRK_AUTH)
    params = bytes(20) + template(SIGNING, 1, 2, key12=True, flags=CMK) + approval + digest
    answer = tpm.auth(CMK_CREATE_KEY, params, session, handles=u32(SRK))
    assert answer.code == ReturnCode.NOTFIPS


def test_cmk_create_key_without_the_owners_approval_is_ma_authority(owned, authority):
    authorities = msa_list(authority.digest)
    approval = approve(owned.tpm, sha1(authorities)).ok()
    other_list = msa_list(authority.digest, authority.digest)
    changed = approval[:-1] + bytes([approval[-1] ^ 1])
    for given, listed in ((changed, authorities), (approval, other_list), (ZERO, authorities)):
        answer = create_cmk(owned.tpm, cmk(), listed, approval=given)
        assert answer.code == ReturnCode.MA_AUTHORITY
    assert owned.state.stclear.failed_tries == 0


def test_cmk_create_key_of_1_1_age_is_invalid_structure(owned, authority):
    wanted = template(SIGNING, 1, 2, flags=CMK)
    answer = create_cmk(owned.tpm, wanted, msa_list(authority.digest))
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_cmk_create_key_under_oiap_is_bad_mode(owned):
    params = bytes(20) + cmk() + bytes(40)
    session = owned.tpm.oiap(SRK_AUTH)
    answer = owned.tpm.auth(CMK_CREATE_KEY, params, session, handles=u32(SRK))
    assert answer.code == ReturnCode.BAD_MODE


def test_cmk_create_key_checks_in_the_order_of_the_specification(owned, authority):
    tpm = owned.tpm
    parent, _ = loaded(tpm, signing())
    under = {"parent": parent, "parent_auth": KEY_AUTH, "approval": ZERO}
    unserved = template(SIGNING, 3, 2, flags=0)
    old = template(SIGNING, 1, 2, flags=0)
    identity = template(IDENTITY, 1, 2, bits=2048, flags=CMK)
    authorities = msa_list(authority.digest)
    steps = [
        (unserved, {**under, "parent_auth": WRONG}, ReturnCode.AUTHFAIL),
        (unserved, under, ReturnCode.BAD_KEY_PROPERTY),
        (old, under, ReturnCode.INVALID_KEYUSAGE),
        (old, {"approval": ZERO}, ReturnCode.INVALID_KEYUSAGE),
        (identity, {"approval": ZERO}, ReturnCode.MA_AUTHORITY),
        (identity, {}, ReturnCode.INVALID_KEYUSAGE),
    ]
    for wanted, how, code in steps:
        assert create_cmk(tpm, wanted, authorities, **how).code == code


def test_certified_key_can_not_be_made_by_create_wrap_key(owned):
    assert wrap(owned.tpm, cmk()).code == ReturnCode.INVALID_KEYUSAGE


# -- CreateBlob ------------------------------------------------------------------------------------


@pytest.fixture
def leaving(owned, authority):
    """A certified key, and the operands that send it to its authority."""
    authorities = msa_list(sha1(b"an authority"), authority.digest)
    key = parse_key(create_cmk(owned.tpm, cmk(), authorities).ok())
    key_auth = authorize(owned.tpm, authority.pubkey, MS_RESTRICT_MIGRATE).ok()
    return key, CmkBlob(key_auth, sha1(key.pubkey), authorities, key.enc_data)


def test_cmk_create_blob_to_an_authority_is_what_the_specification_says(owned, authority, leaving):
    key, operands = leaving
    random, data = two_sized(operands.send(owned.tpm).ok())
    block = xor(authority.decrypt(data), random)
    inside = unpack(block)
    assert inside.payload == 8
    assert inside.usage_auth == KEY_AUTH
    assert inside.pub_data_digest == key.digest
    assert inside.p_hash == sha1(sha1(operands.authorities), sha1(key.pubkey))
    assert number(key.modulus) % number(inside.prime) == 0


def ticket_for(tpm, signer, destination, source, *, first=ZERO):
    """What an authority signs, and the ticket that this TPM gives for it."""
    restrict = first + destination + source
    digest = sha1(restrict)
    ticket = create_ticket(tpm, signer.as_verifier(), digest, signer.sign(digest)).ok()
    return restrict, ticket


@pytest.fixture
def approved(owned, authority, other):
    """A certified key, and the operands that send it where its authority lets it go."""
    verifier_digest = sha1(authority.as_verifier())
    authorities = msa_list(sha1(b"an authority"), verifier_digest)
    key = parse_key(create_cmk(owned.tpm, cmk(), authorities).ok())
    source = sha1(key.pubkey)
    key_auth = authorize(owned.tpm, other.pubkey, MS_RESTRICT_APPROVE).ok()
    restrict, ticket = ticket_for(owned.tpm, authority, other.digest, source)
    operands = CmkBlob(
        key_auth,
        source,
        authorities,
        key.enc_data,
        scheme=MS_RESTRICT_APPROVE,
        restrict_ticket=restrict,
        sig_ticket=ticket,
    )
    return key, operands


def test_cmk_create_blob_where_an_authority_lets_it_go(owned, other, approved):
    key, operands = approved
    random, data = two_sized(operands.send(owned.tpm).ok())
    inside = unpack(xor(other.decrypt(data), random))
    assert inside.payload == 8
    assert inside.pub_data_digest == key.digest


@pytest.mark.parametrize("kind", ["leaving", "approved"])
def test_cmk_create_blob_wrong_parent_secret_is_authfail(owned, request, kind):
    _, operands = request.getfixturevalue(kind)
    assert operands.send(owned.tpm, parent_auth=WRONG).code == ReturnCode.AUTHFAIL


def test_cmk_create_blob_under_another_kind_of_parent_is_invalid_keyusage(owned, leaving):
    _, operands = leaving
    for wanted in (signing(), storage(flags=MIGRATABLE)):
        parent, _ = loaded(owned.tpm, wanted)
        answer = operands.send(owned.tpm, parent=parent, parent_auth=KEY_AUTH)
        assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_cmk_create_blob_garbage_is_decrypt_error(owned, leaving):
    _, operands = leaving
    for enc_data in (b"", bytes(256), b"\x01" * 256):
        answer = replace(operands, enc_data=enc_data).send(owned.tpm)
        assert answer.code == ReturnCode.DECRYPT_ERROR


def test_cmk_create_blob_of_another_key_is_invalid_structure(owned, leaving):
    _, operands = leaving
    plain = parse_key(wrap(owned.tpm, signing(flags=MIGRATABLE)).ok()).enc_data
    _, sealed = sealed_parts(seal(owned.tpm, b"data").ok())
    for enc_data in (plain, sealed):
        answer = replace(operands, enc_data=enc_data).send(owned.tpm)
        assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_cmk_create_blob_destination_that_is_not_authorized_is_authfail(owned, leaving):
    _, operands = leaving
    changed = operands.key_auth[:-1] + bytes([operands.key_auth[-1] ^ 1])
    assert replace(operands, key_auth=changed).send(owned.tpm).code == ReturnCode.AUTHFAIL


def test_cmk_create_blob_of_other_authorities_or_another_key_is_ma_authority(
    owned, authority, leaving
):
    _, operands = leaving
    tries = [
        replace(operands, source_digest=sha1(b"another key")),
        replace(operands, authorities=msa_list(authority.digest)),
        replace(operands, authorities=operands.authorities[:4] + operands.authorities[:3:-1]),
    ]
    for spoilt in tries:
        assert spoilt.send(owned.tpm).code == ReturnCode.MA_AUTHORITY


def test_cmk_create_blob_malformed_list_is_refused(owned, leaving):
    _, operands = leaving
    tries = {
        msa_list(): ReturnCode.INVALID_STRUCTURE,
        b"": ReturnCode.BAD_PARAM_SIZE,
        u32(2) + bytes(20): ReturnCode.BAD_PARAM_SIZE,
        u32(1) + bytes(21): ReturnCode.BAD_PARAM_SIZE,
        u32(0xFFFFFFFF) + bytes(20): ReturnCode.BAD_PARAM_SIZE,
    }
    for authorities, code in tries.items():
        assert replace(operands, authorities=authorities).send(owned.tpm).code == code


def test_cmk_create_blob_to_who_is_no_authority_is_ma_ticket_signature(owned, other, leaving):
    _, operands = leaving
    key_auth = authorize(owned.tpm, other.pubkey, MS_RESTRICT_MIGRATE).ok()
    answer = replace(operands, key_auth=key_auth).send(owned.tpm)
    assert answer.code == ReturnCode.MA_TICKET_SIGNATURE


def test_cmk_create_blob_to_an_authority_that_signs_is_invalid_keyusage(owned, authority):
    # OAEP, else the owner could not have authorized it, and a signature scheme at once.
    pubkey = rsa_parms(2048, 3, 2) + sized(authority.modulus)
    authorities = msa_list(sha1(pubkey))
    key = parse_key(create_cmk(owned.tpm, cmk(), authorities).ok())
    key_auth = authorize(owned.tpm, pubkey, MS_RESTRICT_MIGRATE).ok()
    answer = CmkBlob(key_auth, sha1(key.pubkey), authorities, key.enc_data).send(owned.tpm)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


@pytest.mark.parametrize(
    ("parms", "code"),
    [
        (rsa_parms(2048, 2, 1), ReturnCode.INAPPROPRIATE_ENC),
        (rsa_parms(2048, 2, 2, algorithm=6), ReturnCode.BAD_KEY_PROPERTY),
    ],
)
def test_cmk_create_blob_checks_the_authoritys_key_itself(owned, authority, parms, code):
    # An owner who could authorize such a key is made up here: the digest is computed outside.
    pubkey = parms + sized(authority.modulus)
    authorities = msa_list(sha1(pubkey))
    key = parse_key(create_cmk(owned.tpm, cmk(), authorities).ok())
    scheme = u16(MS_RESTRICT_MIGRATE)
    key_auth = pubkey + scheme + sha1(pubkey, scheme, owned.state.permanent.tpm_proof)
    operands = CmkBlob(key_auth, sha1(key.pubkey), authorities, key.enc_data)
    assert operands.send(owned.tpm).code == code


def test_cmk_create_blob_to_an_authority_has_no_tickets(owned, leaving):
    _, operands = leaving
    for spoilt in (
        replace(operands, restrict_ticket=bytes(60)),
        replace(operands, sig_ticket=bytes(20)),
    ):
        assert spoilt.send(owned.tpm).code == ReturnCode.BAD_PARAMETER


def test_cmk_create_blob_ticket_that_is_none_is_ma_ticket_signature(owned, other, approved):
    _, operands = approved
    restrict, ticket = ticket_for(owned.tpm, other, other.digest, operands.source_digest)
    changed = operands.restrict_ticket[:-1] + b"x"
    tries = [
        replace(operands, sig_ticket=ZERO),
        replace(operands, restrict_ticket=changed),
        replace(operands, restrict_ticket=restrict, sig_ticket=ticket),
        replace(operands, restrict_ticket=b""),
    ]
    for spoilt in tries:
        assert spoilt.send(owned.tpm).code == ReturnCode.MA_TICKET_SIGNATURE


@pytest.mark.parametrize("size", [0, 19, 21, 40])
def test_cmk_create_blob_ticket_of_another_size_is_bad_param_size(owned, approved, size):
    _, operands = approved
    answer = replace(operands, sig_ticket=bytes(size)).send(owned.tpm)
    assert answer.code == ReturnCode.BAD_PARAM_SIZE


@pytest.mark.parametrize("size", [0, 59, 61])
def test_cmk_create_blob_signed_ticket_of_another_size_is_bad_param_size(
    owned, authority, approved, size
):
    _, operands = approved
    restrict = bytes(size)
    digest = sha1(restrict)
    ticket = create_ticket(owned.tpm, authority.as_verifier(), digest, authority.sign(digest)).ok()
    spoilt = replace(operands, restrict_ticket=restrict, sig_ticket=ticket)
    assert spoilt.send(owned.tpm).code == ReturnCode.BAD_PARAM_SIZE


def test_cmk_create_blob_ticket_for_elsewhere_is_ma_destination(owned, authority, approved):
    _, operands = approved
    restrict, ticket = ticket_for(owned.tpm, authority, authority.digest, sha1(b"another key"))
    spoilt = replace(operands, restrict_ticket=restrict, sig_ticket=ticket)
    assert spoilt.send(owned.tpm).code == ReturnCode.MA_DESTINATION


def test_cmk_create_blob_ticket_for_another_key_is_ma_source(owned, authority, other, approved):
    _, operands = approved
    restrict, ticket = ticket_for(owned.tpm, authority, other.digest, sha1(b"another key"))
    spoilt = replace(operands, restrict_ticket=restrict, sig_ticket=ticket)
    assert spoilt.send(owned.tpm).code == ReturnCode.MA_SOURCE


@pytest.mark.parametrize("scheme", [0, MS_MIGRATE, MS_REWRAP, MS_MAINT, 6, 0xFFFF])
def test_cmk_create_blob_scheme_that_is_none_is_bad_parameter(owned, authority, leaving, scheme):
    _, operands = leaving
    key_auth = authorize(owned.tpm, authority.pubkey, scheme).ok()
    answer = replace(operands, scheme=scheme, key_auth=key_auth).send(owned.tpm)
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_cmk_create_blob_other_scheme_than_authorized_is_bad_mode(owned, leaving, approved):
    for _, operands in (leaving, approved):
        for scheme in set(range(6)) - {operands.scheme}:
            answer = replace(operands, scheme=scheme).send(owned.tpm)
            assert answer.code == ReturnCode.BAD_MODE


def test_cmk_create_blob_prime_that_is_none_is_invalid_structure(owned, leaving):
    _, operands = leaving
    proof = owned.state.permanent.tpm_proof
    digests = sha1(operands.authorities) + operands.source_digest
    bound = hmac1(proof, u16(0x33), digests)
    secrets = b"\x06" + KEY_AUTH + bound + bytes(20) + sized(b"short")
    enc_data = oaep(modulus_of(srk_pubkey(owned.tpm)), secrets)
    answer = replace(operands, enc_data=enc_data).send(owned.tpm)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


# -- ConvertMigration ------------------------------------------------------------------------------


@pytest.fixture
def certified(owned, authority):
    """A certified key that leaves and comes back: its bytes and its authorities."""
    authorities = msa_list(sha1(b"an authority"), sha1(authority.as_verifier()))
    return create_cmk(owned.tpm, cmk(), authorities).ok(), authorities


@pytest.fixture
def arriving(owned, authority, certified):
    """The operands that take a certified key in which an authority lets come under the SRK."""
    return arrival(owned, authority, certified)


def inside_of(bench, blob, authorities):
    """What a certified key looks like on its way."""
    key = parse_key(blob)
    secrets = decrypt(bench.state.permanent.srk, key.enc_data)
    p_hash = sha1(sha1(authorities), sha1(key.pubkey))
    return Inside(8, secrets[1:21], key.digest, secrets[65:], p_hash)


def arrival(bench, signer, certified, *, destination=None, source=None, **changed):
    """The operands of TPM_CMK_ConvertMigration, with something inside changed."""
    blob, authorities = certified
    srk = srk_pubkey(bench.tpm)
    block = pack(replace(inside_of(bench, blob, authorities), **changed))
    random = (sha1(b"random") * 20)[: len(block)]
    destination, source = destination or sha1(srk), source or sha1(parse_key(blob).pubkey)
    restrict, ticket = ticket_for(bench.tpm, signer, destination, source)
    moved = rewrapped(blob, sent_to(srk, block, random))
    return CmkArrival(restrict, ticket, moved, authorities, random)


def test_cmk_convert_migration_gives_what_the_specification_says(owned, arriving):
    enc_data = one_sized(arriving.send(owned.tpm).ok())
    key = parse_key(arriving.key)
    secrets = decrypt(owned.state.permanent.srk, enc_data)
    proof = owned.state.permanent.tpm_proof
    bound = hmac1(proof, u16(0x33), sha1(arriving.authorities), sha1(key.pubkey))
    assert secrets[:61] == b"\x07" + KEY_AUTH + bound + key.digest
    handle = number(load(owned.tpm, rewrapped(arriving.key, enc_data)).ok())
    session = owned.tpm.oiap(KEY_AUTH).ending()
    owned.tpm.auth(SIGN, sized(bytes(20)), session, handles=u32(handle)).ok()


def test_certified_key_moves_to_another_parent_and_on(owned, authority):
    tpm = owned.tpm
    parent, new_parent = loaded(tpm, storage())
    verifier_digest = sha1(authority.as_verifier())
    authorities = msa_list(verifier_digest, sha1(b"another"))
    blob = create_cmk(tpm, cmk(), authorities).ok()
    key = parse_key(blob)
    source, destination = sha1(key.pubkey), sha1(new_parent.pubkey)
    restrict, ticket = ticket_for(tpm, authority, destination, source)
    key_auth = authorize(tpm, new_parent.pubkey, MS_RESTRICT_APPROVE).ok()
    operands = CmkBlob(
        key_auth, source, authorities, key.enc_data, MS_RESTRICT_APPROVE, restrict, ticket
    )
    random, data = two_sized(operands.send(tpm).ok())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    arrived = CmkArrival(restrict, ticket, rewrapped(blob, data), authorities, random)
    enc_data = one_sized(arrived.send(tpm, **under).ok())
    load(tpm, rewrapped(blob, enc_data), **under).ok()
    # It still belongs to its authorities, and can leave again.
    random, data = two_sized(replace(operands, enc_data=enc_data).send(tpm, **under).ok())
    assert len(random) == 198 - 64


def test_cmk_convert_migration_of_a_2048_bit_key(owned, authority):
    verifier_digest = sha1(authority.as_verifier())
    authorities = msa_list(verifier_digest)
    blob = create_cmk(owned.tpm, storage_cmk(), authorities).ok()
    operands = arrival(owned, authority, (blob, authorities))
    assert len(operands.random) == 198
    enc_data = one_sized(operands.send(owned.tpm).ok())
    load(owned.tpm, rewrapped(blob, enc_data)).ok()


def test_cmk_convert_migration_wrong_parent_secret_is_authfail(owned, arriving):
    assert arriving.send(owned.tpm, parent_auth=WRONG).code == ReturnCode.AUTHFAIL


def test_cmk_convert_migration_other_kind_of_parent_is_invalid_keyusage(owned, arriving):
    parent, _ = loaded(owned.tpm, signing())
    answer = arriving.send(owned.tpm, parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_cmk_convert_migration_migratable_parent_is_invalid_keyusage(owned, arriving):
    parent, key = loaded(owned.tpm, storage(flags=MIGRATABLE))
    block = pack(inside_of_arrival(owned, arriving))
    data = sent_to(key.pubkey, block, arriving.random)
    spoilt = replace(arriving, key=rewrapped(arriving.key, data))
    answer = spoilt.send(owned.tpm, parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def inside_of_arrival(bench, operands):
    hidden = decrypt(bench.state.permanent.srk, parse_key(operands.key).enc_data)
    return unpack(xor(hidden, operands.random))


def test_cmk_convert_migration_garbage_is_decrypt_error(owned, arriving):
    for data in (b"", bytes(256), b"\x01" * 256):
        spoilt = replace(arriving, key=rewrapped(arriving.key, data))
        assert spoilt.send(owned.tpm).code == ReturnCode.DECRYPT_ERROR


def test_cmk_convert_migration_random_of_another_size_is_bad_parameter(owned, arriving):
    for random in (b"", arriving.random[1:], arriving.random + b"\0"):
        answer = replace(arriving, random=random).send(owned.tpm)
        assert answer.code == ReturnCode.BAD_PARAMETER


def test_cmk_convert_migration_other_random_is_decrypt_error(owned, arriving):
    other_random = b"x" + arriving.random[1:]
    answer = replace(arriving, random=other_random).send(owned.tpm)
    assert answer.code in {ReturnCode.DECRYPT_ERROR, ReturnCode.INVALID_STRUCTURE}


def test_cmk_convert_migration_of_other_authorities_is_authfail(owned, authority, arriving):
    answer = replace(arriving, authorities=msa_list(authority.digest)).send(owned.tpm)
    assert answer.code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 0


def test_cmk_convert_migration_of_another_public_key_is_authfail(owned, arriving):
    key = parse_key(arriving.key)
    changed = key.modulus[:-1] + bytes([key.modulus[-1] ^ 2])
    spoilt = replace(arriving, key=arriving.key.replace(key.modulus, changed))
    assert spoilt.send(owned.tpm).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("payload", [3, 4])
def test_cmk_convert_migration_of_a_plain_key_is_bad_migration(
    owned, authority, certified, payload
):
    spoilt = arrival(owned, authority, certified, payload=payload)
    assert spoilt.send(owned.tpm).code == ReturnCode.BAD_MIGRATION


@pytest.mark.parametrize("payload", [0, 1, 6, 7])
def test_cmk_convert_migration_of_what_is_not_on_its_way_is_invalid_structure(
    owned, authority, certified, payload
):
    spoilt = arrival(owned, authority, certified, payload=payload)
    assert spoilt.send(owned.tpm).code == ReturnCode.INVALID_STRUCTURE


def test_cmk_convert_migration_ticket_that_is_none_is_ma_ticket_signature(owned, arriving):
    changed = arriving.restrict_ticket[:-1] + bytes([arriving.restrict_ticket[-1] ^ 1])
    for spoilt in (
        replace(arriving, sig_ticket=ZERO),
        replace(arriving, restrict_ticket=changed),
    ):
        assert spoilt.send(owned.tpm).code == ReturnCode.MA_TICKET_SIGNATURE


def test_cmk_convert_migration_ticket_of_who_is_no_authority_is_ma_ticket_signature(
    owned, other, certified
):
    spoilt = arrival(owned, other, certified)
    assert spoilt.send(owned.tpm).code == ReturnCode.MA_TICKET_SIGNATURE


def test_cmk_convert_migration_approved_for_elsewhere_is_ma_destination(
    owned, authority, certified
):
    spoilt = arrival(owned, authority, certified, destination=sha1(b"elsewhere"))
    assert spoilt.send(owned.tpm).code == ReturnCode.MA_DESTINATION


def test_cmk_convert_migration_of_a_key_that_was_not_approved_is_ma_source(
    owned, authority, certified
):
    spoilt = arrival(owned, authority, certified, source=sha1(b"another key"))
    assert spoilt.send(owned.tpm).code == ReturnCode.MA_SOURCE


@pytest.mark.parametrize("prime", [b"\xff" * 64, bytes(64), b"\1" * 63, bytes(63) + b"\1"])
def test_cmk_convert_migration_prime_of_another_key_is_bad_parameter(
    owned, authority, certified, prime
):
    spoilt = arrival(owned, authority, certified, prime=prime)
    assert spoilt.send(owned.tpm).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("flags", [0, MIGRATABLE, MIGRATE_AUTHORITY])
def test_cmk_convert_migration_without_both_flags_is_invalid_keyusage(owned, arriving, flags):
    assert arriving.key[6:10] == u32(CMK)
    spoilt = replace(arriving, key=arriving.key[:6] + u32(flags) + arriving.key[10:])
    assert spoilt.send(owned.tpm).code == ReturnCode.INVALID_KEYUSAGE


def test_cmk_convert_migration_checks_in_the_order_of_the_specification(
    owned, authority, other, certified
):
    wrong = {
        "payload": 3,
        "signer": other,
        "destination": sha1(b"elsewhere"),
        "prime": b"\xff" * 64,
        "key": "without flags",
        "source": sha1(b"another key"),
    }
    expected = [
        ("payload", ReturnCode.BAD_MIGRATION),
        ("signer", ReturnCode.MA_TICKET_SIGNATURE),
        ("destination", ReturnCode.MA_DESTINATION),
        ("prime", ReturnCode.BAD_PARAMETER),
        ("key", ReturnCode.INVALID_KEYUSAGE),
        ("source", ReturnCode.MA_SOURCE),
    ]
    for name, code in expected:
        how = {k: v for k, v in wrong.items() if k not in {"signer", "key"}}
        operands = arrival(owned, wrong.get("signer", authority), certified, **how)
        if "key" in wrong:
            key = operands.key
            operands = replace(operands, key=key[:6] + u32(0) + key[10:])
        assert operands.send(owned.tpm).code == code
        del wrong[name]
    arrival(owned, authority, certified).send(owned.tpm).ok()


def test_cmk_convert_migration_key_of_1_1_age_is_invalid_structure(owned, arriving):
    old = key_template(SIGNING, flags=CMK, parms=rsa_parms(1024, 1, 2))
    answer = replace(arriving, key=old).send(owned.tpm)
    assert answer.code == ReturnCode.INVALID_STRUCTURE


def test_cmk_convert_migration_malformed_list_is_refused(owned, arriving):
    answer = replace(arriving, authorities=msa_list()).send(owned.tpm)
    assert answer.code == ReturnCode.INVALID_STRUCTURE
    answer = replace(arriving, authorities=u32(2) + bytes(20)).send(owned.tpm)
    assert answer.code == ReturnCode.BAD_PARAM_SIZE


def test_tickets_and_approvals_are_lost_with_the_owner(owned, authority, certified, arriving):
    owned.change("permanent", tpm_proof=sha1(b"another owner"))
    assert arriving.send(owned.tpm).code == ReturnCode.MA_TICKET_SIGNATURE
    blob, authorities = certified
    key = parse_key(blob)
    key_auth = authorize(owned.tpm, authority.pubkey, MS_RESTRICT_MIGRATE).ok()
    operands = CmkBlob(key_auth, sha1(key.pubkey), authorities, key.enc_data)
    assert operands.send(owned.tpm).code == ReturnCode.MA_AUTHORITY
