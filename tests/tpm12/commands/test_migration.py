"""TPM_AuthorizeMigrationKey, CreateMigrationBlob, ConvertMigrationBlob, MigrateKey."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import padding

from protocol.return_codes import ReturnCode
from tests.tpm12.makers import (
    KEY_AUTH,
    MIGRATE,
    SIGNING,
    WRONG,
    decrypt,
    load,
    loaded,
    mgf1,
    pcr_info,
    seal,
    sealed_parts,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.movers import (
    AUTHORIZE_MIGRATION_KEY,
    CONVERT_MIGRATION_BLOB,
    CREATE_MIGRATION_BLOB,
    MIGRATABLE,
    MIGRATE_KEY,
    MIGRATION_AUTH,
    MS_MAINT,
    MS_MIGRATE,
    MS_RESTRICT_APPROVE,
    MS_RESTRICT_MIGRATE,
    MS_REWRAP,
    Inside,
    OutsideKey,
    authorize,
    convert,
    create_blob,
    create_cmk,
    migrate,
    modulus_of,
    msa_list,
    one_sized,
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

SIGN, EXTEND = 0x3C, 0x14
SCHEMES = [MS_MIGRATE, MS_REWRAP]


@pytest.fixture(scope="module")
def destination():
    """A key outside, to migrate to."""
    return OutsideKey()


def movable(tpm, **more):
    """A wrapped migratable signing key: its bytes and parts."""
    how = {"migration_auth": MIGRATION_AUTH, **more}
    blob = wrap(tpm, signing(bits=1024, flags=MIGRATABLE), **how).ok()
    return blob, parse_key(blob)


def use(tpm, handle, secret=KEY_AUTH):
    """Sign with a key."""
    session = tpm.oiap(secret).ending()
    return tpm.auth(SIGN, sized(bytes(20)), session, handles=u32(handle))


# -- AuthorizeMigrationKey -------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [0, *range(1, 6), 0xFFFF])
def test_authorize_migration_key_binds_key_and_scheme_to_this_owner(owned, destination, scheme):
    out = authorize(owned.tpm, destination.pubkey, scheme).ok()
    assert out[:-20] == destination.pubkey + u16(scheme)
    proof = owned.state.permanent.tpm_proof
    assert out[-20:] == sha1(destination.pubkey, u16(scheme), proof)


@pytest.mark.parametrize("bits", [3072, 4096])
def test_authorize_migration_key_takes_larger_keys(owned, bits):
    key = OutsideKey(bits)
    key_auth = authorize(owned.tpm, key.pubkey).ok()
    _, parts = movable(owned.tpm)
    random, data = two_sized(create_blob(owned.tpm, key_auth, parts.enc_data).ok())
    assert unpack(xor(key.decrypt(data), random)).usage_auth == KEY_AUTH


@pytest.mark.parametrize(
    "pubkey",
    [
        rsa_parms(1024) + sized(b"\xff" * 128),
        rsa_parms(2032) + sized(b"\xff" * 254),
        rsa_parms(2048) + sized(b"\xff" * 128),
        rsa_parms(2048) + sized(b""),
        rsa_parms(2048, exponent=b"\x03") + sized(b"\xff" * 256),
        rsa_parms(2048, exponent=b"\x11") + sized(b"\xff" * 256),
        rsa_parms(2048, algorithm=6) + sized(b"\xff" * 256),
        u32(1) + u16(3) + u16(1) + sized(b"short") + sized(b"\xff" * 256),
    ],
    ids=["1024", "2032", "short", "empty", "e=3", "e=17", "AES", "malformed"],
)
def test_authorize_migration_key_weak_key_is_bad_key_property(owned, pubkey):
    assert authorize(owned.tpm, pubkey).code == ReturnCode.BAD_KEY_PROPERTY


@pytest.mark.parametrize("enc", [1, 2, 4])
def test_authorize_migration_key_without_oaep_is_inappropriate_enc(owned, enc):
    pubkey = rsa_parms(2048, enc=enc) + sized(b"\xff" * 256)
    assert authorize(owned.tpm, pubkey).code == ReturnCode.INAPPROPRIATE_ENC


def test_authorize_migration_key_checks_in_the_order_of_the_specification(owned):
    weak = rsa_parms(1024, enc=1) + sized(b"\xff" * 128)
    assert authorize(owned.tpm, weak, secret=WRONG).code == ReturnCode.BAD_KEY_PROPERTY
    other = rsa_parms(2048, enc=1) + sized(b"\xff" * 256)
    assert authorize(owned.tpm, other, secret=WRONG).code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 1
    assert authorize(owned.tpm, other).code == ReturnCode.INAPPROPRIATE_ENC


def test_authorize_migration_key_explicit_default_exponent_is_the_default(owned):
    pubkey = rsa_parms(2048, exponent=b"\x01\x00\x01") + sized(b"\xff" * 256)
    authorize(owned.tpm, pubkey).ok()


# -- CreateMigrationBlob ---------------------------------------------------------------------------


def test_migrate_blob_is_what_the_specification_says(owned, destination):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    random, data = two_sized(create_blob(owned.tpm, key_auth, key.enc_data).ok())
    block = xor(destination.decrypt(data), random)
    inside = unpack(block)
    assert inside.payload == 3
    assert inside.usage_auth == KEY_AUTH
    assert inside.p_hash == MIGRATION_AUTH
    assert inside.pub_data_digest == key.digest
    assert number(key.modulus) % number(inside.prime) == 0
    assert len(inside.prime) == 64
    assert len(block) == len(random) == 198 - 64


def test_migrate_blob_of_a_2048_bit_key_has_198_bytes(owned, destination):
    blob = wrap(owned.tpm, storage(flags=MIGRATABLE), migration_auth=MIGRATION_AUTH).ok()
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    random, data = two_sized(create_blob(owned.tpm, key_auth, parse_key(blob).enc_data).ok())
    assert len(random) == 198
    assert len(unpack(xor(destination.decrypt(data), random)).prime) == 128


def test_migrate_hides_the_key_anew_each_time(owned, destination):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    randoms = {two_sized(create_blob(owned.tpm, key_auth, key.enc_data).ok())[0] for _ in range(3)}
    assert len(randoms) == 3


def test_rewrap_gives_the_private_part_unchanged(owned, destination):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey, MS_REWRAP).ok()
    random, data = two_sized(create_blob(owned.tpm, key_auth, key.enc_data, MS_REWRAP).ok())
    assert random == b""
    assert destination.decrypt(data) == decrypt(owned.state.permanent.srk, key.enc_data)


def test_rewrapped_key_loads_under_its_new_parent(owned):
    tpm = owned.tpm
    parent, new_parent = loaded(tpm, storage())
    key_auth = authorize(tpm, new_parent.pubkey, MS_REWRAP).ok()
    blob, key = movable(tpm)
    _, data = two_sized(create_blob(tpm, key_auth, key.enc_data, MS_REWRAP).ok())
    moved = rewrapped(blob, data)
    assert load(tpm, moved).code == ReturnCode.DECRYPT_ERROR
    handle = number(load(tpm, moved, parent=parent, parent_auth=KEY_AUTH).ok())
    use(tpm, handle).ok()


def test_create_migration_blob_without_session_for_a_parent_that_needs_none(owned, destination):
    tpm = owned.tpm
    parent, _ = loaded(tpm, storage(auth_data_usage=0))
    _, key = movable(tpm, parent=parent, parent_auth=KEY_AUTH)
    params = u16(MS_MIGRATE) + authorize(tpm, destination.pubkey).ok() + sized(key.enc_data)
    session = tpm.oiap(MIGRATION_AUTH).ending()
    tpm.auth(CREATE_MIGRATION_BLOB, params, session, handles=u32(parent)).ok()
    session = tpm.oiap(MIGRATION_AUTH).ending()
    answer = tpm.auth(CREATE_MIGRATION_BLOB, params, session, handles=u32(SRK))
    assert answer.code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("scheme", SCHEMES)
def test_create_migration_blob_wrong_migration_secret_is_auth2fail(owned, destination, scheme):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey, scheme).ok()
    answer = create_blob(owned.tpm, key_auth, key.enc_data, scheme, secret=WRONG)
    assert answer.code == ReturnCode.AUTH2FAIL
    assert owned.state.stclear.failed_tries == 1
    # The secret to use a key does not let it go.
    answer = create_blob(owned.tpm, key_auth, key.enc_data, scheme, secret=KEY_AUTH)
    assert answer.code == ReturnCode.AUTH2FAIL


def test_create_migration_blob_needs_oiap_for_the_key(owned, destination):
    tpm = owned.tpm
    _, key = movable(tpm)
    params = u16(MS_MIGRATE) + authorize(tpm, destination.pubkey).ok() + sized(key.enc_data)
    sessions = [tpm.oiap(SRK_AUTH), tpm.osap(4, SRK, SRK_AUTH)]
    answer = tpm.auth(CREATE_MIGRATION_BLOB, params, *sessions, handles=u32(SRK))
    assert answer.code == ReturnCode.BAD_MODE


def test_create_migration_blob_non_migratable_key_stays(owned, destination):
    # Nobody outside knows tpmProof, which is such a key's migration secret.
    key = parse_key(wrap(owned.tpm, signing()).ok())
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    for secret in (bytes(20), KEY_AUTH, MIGRATION_AUTH):
        answer = create_blob(owned.tpm, key_auth, key.enc_data, secret=secret)
        assert answer.code == ReturnCode.AUTH2FAIL


def test_create_migration_blob_wrong_parent_secret_is_authfail(owned, destination):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    answer = create_blob(owned.tpm, key_auth, key.enc_data, parent_auth=WRONG)
    assert answer.code == ReturnCode.AUTHFAIL


def test_create_migration_blob_parent_for_something_else_is_invalid_keyusage(owned, destination):
    parent, _ = loaded(owned.tpm, signing())
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    answer = create_blob(owned.tpm, key_auth, b"", parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_create_migration_blob_key_bound_to_pcrs_moves_all_the_same(owned, destination):
    # §11.1: the PCRs of the key that moves are not checked, those of its parent are.
    tpm = owned.tpm
    wanted = signing(bits=1024, flags=MIGRATABLE, pcr_info=pcr_info(10))
    key = parse_key(wrap(tpm, wanted, migration_auth=MIGRATION_AUTH).ok())
    parent, _ = loaded(tpm, storage(pcr_info=pcr_info(10)))
    tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    key_auth = authorize(tpm, destination.pubkey).ok()
    create_blob(tpm, key_auth, key.enc_data).ok()
    answer = create_blob(tpm, key_auth, b"", parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.WRONGPCRVAL


def test_create_migration_blob_garbage_is_decrypt_error(owned, destination):
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    for enc_data in (b"", bytes(256), b"\x01" * 256, b"\xff" * 256, bytes(255)):
        answer = create_blob(owned.tpm, key_auth, enc_data)
        assert answer.code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("inside", [b"", b"\x01", b"\x01" + bytes(63), b"\x01" + bytes(65)])
def test_create_migration_blob_of_what_is_no_key_is_invalid_structure(owned, destination, inside):
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    enc_data = oaep(modulus_of(srk_pubkey(owned.tpm)), inside)
    assert create_blob(owned.tpm, key_auth, enc_data).code == ReturnCode.INVALID_STRUCTURE


def test_create_migration_blob_of_sealed_data_is_invalid_structure(owned, destination):
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    _, enc_data = sealed_parts(seal(owned.tpm, b"data").ok())
    assert create_blob(owned.tpm, key_auth, enc_data).code == ReturnCode.INVALID_STRUCTURE


def test_create_migration_blob_of_a_certified_key_is_bad_migration(owned, destination):
    wanted = template(SIGNING, 1, 2, key12=True, flags=0x12)
    blob = create_cmk(owned.tpm, wanted, msa_list(destination.digest)).ok()
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    answer = create_blob(owned.tpm, key_auth, parse_key(blob).enc_data)
    assert answer.code == ReturnCode.BAD_MIGRATION


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [0, 1, 15])
def test_create_migration_blob_prime_that_is_none_is_refused(owned, destination, scheme, size):
    # Anyone can encrypt to the SRK; a key whose first 16 bytes are missing has no K1.
    secrets = b"\x01" + KEY_AUTH + MIGRATION_AUTH + bytes(20) + sized(bytes(size))
    enc_data = oaep(modulus_of(srk_pubkey(owned.tpm)), secrets)
    key_auth = authorize(owned.tpm, destination.pubkey, scheme).ok()
    answer = create_blob(owned.tpm, key_auth, enc_data, scheme)
    expected = ReturnCode.INVALID_STRUCTURE if scheme == MS_MIGRATE else ReturnCode.SUCCESS
    assert answer.code == expected


def test_create_migration_blob_that_does_not_fit_is_encrypt_error(owned, destination):
    secrets = b"\x01" + KEY_AUTH + MIGRATION_AUTH + bytes(20) + sized(bytes(149))
    enc_data = oaep(modulus_of(srk_pubkey(owned.tpm)), secrets)
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    assert create_blob(owned.tpm, key_auth, enc_data).code == ReturnCode.ENCRYPT_ERROR


@pytest.mark.parametrize("at", [0, 17, 100, -22, -21, -20, -1])
def test_create_migration_blob_changed_authorization_is_authfail(owned, destination, at):
    _, key = movable(owned.tpm)
    key_auth = bytearray(authorize(owned.tpm, destination.pubkey).ok())
    key_auth[at] ^= 1
    answer = create_blob(owned.tpm, bytes(key_auth), key.enc_data)
    assert answer.code == ReturnCode.AUTHFAIL
    assert owned.state.stclear.failed_tries == 0


def test_create_migration_blob_authorization_of_another_owner_is_authfail(owned, destination):
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    _, key = movable(owned.tpm)
    owned.change("permanent", tpm_proof=sha1(b"another owner"))
    assert create_blob(owned.tpm, key_auth, key.enc_data).code == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(("scheme", "other"), [(MS_MIGRATE, MS_REWRAP), (MS_REWRAP, MS_MIGRATE)])
def test_create_migration_blob_other_scheme_than_authorized_is_bad_mode(
    owned, destination, scheme, other
):
    # libtpms takes the one for the other.
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey, scheme).ok()
    assert create_blob(owned.tpm, key_auth, key.enc_data, other).code == ReturnCode.BAD_MODE
    create_blob(owned.tpm, key_auth, key.enc_data, scheme).ok()


@pytest.mark.parametrize(
    "scheme", [0, MS_MAINT, MS_RESTRICT_MIGRATE, MS_RESTRICT_APPROVE, 6, 0xFFFF]
)
def test_create_migration_blob_scheme_that_is_none_is_bad_parameter(owned, destination, scheme):
    _, key = movable(owned.tpm)
    key_auth = authorize(owned.tpm, destination.pubkey, scheme).ok()
    answer = create_blob(owned.tpm, key_auth, key.enc_data, scheme)
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_create_migration_blob_destination_that_is_no_key_is_encrypt_error(owned):
    # AuthorizeMigrationKey looks at the strength only; an even modulus is no key.
    pubkey = rsa_parms(2048) + sized(b"\xff" * 255 + b"\xfe")
    key_auth = authorize(owned.tpm, pubkey).ok()
    _, key = movable(owned.tpm)
    assert create_blob(owned.tpm, key_auth, key.enc_data).code == ReturnCode.ENCRYPT_ERROR


def test_create_migration_blob_checks_in_the_order_of_the_specification(owned, destination):
    tpm = owned.tpm
    _, key = movable(tpm)
    signer, _ = loaded(tpm, signing())
    good = authorize(tpm, destination.pubkey).ok()
    wrong = good[:-1] + bytes([good[-1] ^ 1])
    steps = [
        ({"parent": signer, "parent_auth": WRONG}, ReturnCode.AUTHFAIL),
        ({"parent": signer, "parent_auth": KEY_AUTH}, ReturnCode.INVALID_KEYUSAGE),
    ]
    for how, code in steps:
        assert create_blob(tpm, wrong, b"", 9, secret=WRONG, **how).code == code
    assert create_blob(tpm, wrong, b"", 9, secret=WRONG).code == ReturnCode.DECRYPT_ERROR
    enc_data = key.enc_data
    assert create_blob(tpm, wrong, enc_data, 9, secret=WRONG).code == ReturnCode.AUTH2FAIL
    assert create_blob(tpm, wrong, enc_data, 9).code == ReturnCode.AUTHFAIL
    assert create_blob(tpm, good, enc_data, 9).code == ReturnCode.BAD_PARAMETER


# -- ConvertMigrationBlob --------------------------------------------------------------------------


def test_key_migrates_from_parent_to_parent(owned):
    tpm = owned.tpm
    blob, key = movable(tpm)
    parent, new_parent = loaded(tpm, storage())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    key_auth = authorize(tpm, new_parent.pubkey).ok()
    random, data = two_sized(create_blob(tpm, key_auth, key.enc_data).ok())
    enc_data = one_sized(convert(tpm, data, random, **under).ok())
    moved = rewrapped(blob, enc_data)
    use(tpm, number(load(tpm, moved, **under).ok())).ok()
    # What arrived is what left, so it can leave again with the same secret.
    before = decrypt(owned.state.permanent.srk, key.enc_data)
    assert decrypt(owned.state.volatile.keys[parent], enc_data) == before


def arriving(tpm, **more):
    """A key from outside, as it arrives under the SRK: data, random, and what is inside."""
    _, key = movable(tpm)
    inside = Inside(3, KEY_AUTH, key.digest, b"\xab" * 64, MIGRATION_AUTH)
    inside = replace(inside, **more)
    block = pack(inside)
    random = (sha1(b"random") * 11)[: len(block)]
    return sent_to(srk_pubkey(tpm), block, random), random, inside


def test_convert_migration_blob_gives_what_was_inside(owned):
    data, random, inside = arriving(owned.tpm)
    enc_data = one_sized(convert(owned.tpm, data, random).ok())
    secrets = decrypt(owned.state.permanent.srk, enc_data)
    expected = b"\x01" + KEY_AUTH + MIGRATION_AUTH + inside.pub_data_digest + sized(inside.prime)
    assert secrets == expected


def test_convert_migration_blob_without_session_for_a_parent_that_needs_none(owned):
    tpm = owned.tpm
    data, random, _ = arriving(tpm)
    params = sized(data) + sized(random)
    answer = tpm.send(CONVERT_MIGRATION_BLOB, u32(SRK) + params)
    assert answer.code == ReturnCode.AUTHFAIL
    parent, key = loaded(tpm, storage(auth_data_usage=0))
    block = pack(Inside(3, KEY_AUTH, bytes(20), bytes(64), MIGRATION_AUTH))
    data = sent_to(key.pubkey, block, bytes(len(block)))
    tpm.send(CONVERT_MIGRATION_BLOB, u32(parent) + sized(data) + sized(bytes(len(block)))).ok()


def test_convert_migration_blob_parent_for_something_else_is_invalid_keyusage(owned):
    parent, _ = loaded(owned.tpm, signing())
    answer = convert(owned.tpm, b"", b"", parent=parent, parent_auth=KEY_AUTH)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_convert_migration_blob_wrong_parent_secret_is_authfail(owned):
    data, random, _ = arriving(owned.tpm)
    assert convert(owned.tpm, data, random, parent_auth=WRONG).code == ReturnCode.AUTHFAIL


def test_convert_migration_blob_garbage_is_decrypt_error(owned):
    for data in (b"", bytes(256), b"\x01" * 256, bytes(257)):
        assert convert(owned.tpm, data, bytes(134)).code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("change", [-134, -1, 1, 100])
def test_convert_migration_blob_random_of_another_size_is_bad_parameter(owned, change):
    data, random, _ = arriving(owned.tpm)
    random = (random + bytes(100))[: len(random) + change]
    assert convert(owned.tpm, data, random).code == ReturnCode.BAD_PARAMETER


def test_convert_migration_blob_other_random_is_decrypt_error(owned):
    data, random, _ = arriving(owned.tpm)
    for i in range(0, len(random), 7):
        other = random[:i] + bytes([random[i] ^ 1]) + random[i + 1 :]
        answer = convert(owned.tpm, data, other)
        # A changed block decodes to noise: rarely to a pHash, never to a key.
        assert answer.code in {ReturnCode.DECRYPT_ERROR, ReturnCode.INVALID_STRUCTURE}


@pytest.mark.parametrize("size", [0, 1, 20, 40])
def test_convert_migration_blob_block_that_is_too_short_is_decrypt_error(owned, size):
    data = sent_to(srk_pubkey(owned.tpm), bytes(size), bytes(size))
    assert convert(owned.tpm, data, bytes(size)).code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("payload", [0, 1, 2, 5, 6, 7, 0xFF])
def test_convert_migration_blob_payload_that_is_none_is_invalid_structure(owned, payload):
    data, random, _ = arriving(owned.tpm, payload=payload)
    assert convert(owned.tpm, data, random).code == ReturnCode.INVALID_STRUCTURE


@pytest.mark.parametrize("payload", [4, 8])
def test_convert_migration_blob_payload_of_another_journey_is_bad_migration(owned, payload):
    data, random, _ = arriving(owned.tpm, payload=payload)
    assert convert(owned.tpm, data, random).code == ReturnCode.BAD_MIGRATION


def test_convert_migration_blob_private_key_of_another_size_is_invalid_structure(owned):
    # K1 begins with the size of the prime; K2 must be the rest of exactly that.
    block = bytearray(pack(Inside(3, KEY_AUTH, bytes(20), b"\xab" * 64, MIGRATION_AUTH)))
    inside = unpack(bytes(block))
    assert len(inside.prime) == 64
    short = b"\1" + b"\3" + KEY_AUTH + bytes(20) + sized(b"\xab" * 47)
    data_block = MIGRATION_AUTH + short
    for k1 in (sized(b"\xab" * 64)[:20], u32(0xFFFFFFFF) + bytes(16), bytes(20)):
        block = oaep_block(data_block, k1)
        data = sent_to(srk_pubkey(owned.tpm), block, bytes(len(block)))
        answer = convert(owned.tpm, data, bytes(len(block)))
        assert answer.code == ReturnCode.INVALID_STRUCTURE


def oaep_block(data_block, seed):
    masked = xor(data_block, mgf1(seed, len(data_block)))
    return xor(seed, mgf1(masked, 20)) + masked


def test_convert_migration_blob_accepts_zero_padding(owned):
    data_block = MIGRATION_AUTH + bytes(9) + b"\1\3" + KEY_AUTH + bytes(20) + sized(b"\xab" * 48)
    block = oaep_block(data_block, sized(b"\xab" * 64)[:20])
    data = sent_to(srk_pubkey(owned.tpm), block, bytes(len(block)))
    convert(owned.tpm, data, bytes(len(block))).ok()


@pytest.mark.parametrize("separator", [b"", b"\2", bytes(5)])
def test_convert_migration_blob_without_separator_is_decrypt_error(owned, separator):
    block = oaep_block(MIGRATION_AUTH + separator, bytes(20))
    data = sent_to(srk_pubkey(owned.tpm), block, bytes(len(block)))
    assert convert(owned.tpm, data, bytes(len(block))).code == ReturnCode.DECRYPT_ERROR


def test_converted_key_with_another_public_part_does_not_load(owned):
    tpm = owned.tpm
    blob, _ = movable(tpm)
    data, random, _ = arriving(tpm)
    enc_data = one_sized(convert(tpm, data, random).ok())
    assert load(tpm, rewrapped(blob, enc_data)).code == ReturnCode.BAD_PARAMETER


# -- MigrateKey ------------------------------------------------------------------------------------


def authority(tpm, **more):
    """A loaded migration key: handle and parts."""
    return loaded(tpm, template(MIGRATE, 3, 1, bits=2048, **more))


def test_key_migrates_by_way_of_an_authority(owned):
    tpm = owned.tpm
    blob, key = movable(tpm)
    parent, new_parent = loaded(tpm, storage())
    handle, middle = authority(tpm)
    key_auth = authorize(tpm, middle.pubkey).ok()
    random, data = two_sized(create_blob(tpm, key_auth, key.enc_data).ok())
    passed_on = one_sized(migrate(tpm, handle, new_parent.pubkey, data).ok())
    under = {"parent": parent, "parent_auth": KEY_AUTH}
    enc_data = one_sized(convert(tpm, passed_on, random, **under).ok())
    use(tpm, number(load(tpm, rewrapped(blob, enc_data), **under).ok())).ok()


def test_migrate_key_passes_anything_on(owned, destination):
    handle, middle = authority(owned.tpm)
    for inside in (b"", b"x", b"y" * 214):
        out = migrate(owned.tpm, handle, destination.pubkey, oaep(middle.modulus, inside)).ok()
        assert destination.decrypt(one_sized(out)) == inside


def test_migrate_key_without_session_for_a_key_that_needs_none(owned, destination):
    tpm = owned.tpm
    free, key = authority(tpm, auth_data_usage=0)
    params = destination.pubkey + sized(oaep(key.modulus, b"x"))
    tpm.send(MIGRATE_KEY, u32(free) + params).ok()
    bound, _ = authority(tpm)
    assert tpm.send(MIGRATE_KEY, u32(bound) + params).code == ReturnCode.AUTHFAIL


def test_migrate_key_to_a_pkcs1_destination(owned):
    other = OutsideKey(1024, enc=2)
    handle, middle = authority(owned.tpm)
    data = oaep(middle.modulus, b"inside")
    out = one_sized(migrate(owned.tpm, handle, other.pubkey, data).ok())
    assert other.private.decrypt(out, padding.PKCS1v15()) == b"inside"


@pytest.mark.parametrize("usage", ["storage", "srk", "signing"])
def test_migrate_key_by_another_kind_of_key_is_invalid_keyusage(owned, destination, usage):
    tpm = owned.tpm
    if usage == "srk":
        handle, secret = SRK, SRK_AUTH
    else:
        wanted = storage() if usage == "storage" else signing()
        handle, secret = loaded(tpm, wanted)[0], KEY_AUTH
    answer = migrate(tpm, handle, destination.pubkey, b"", secret=secret)
    assert answer.code == ReturnCode.INVALID_KEYUSAGE


def test_migrate_key_wrong_secret_is_authfail(owned, destination):
    handle, _ = authority(owned.tpm)
    answer = migrate(owned.tpm, handle, destination.pubkey, b"", secret=WRONG)
    assert answer.code == ReturnCode.AUTHFAIL


def test_migrate_key_bound_to_other_pcrs_is_wrongpcrval(owned, destination):
    handle, _ = authority(owned.tpm, pcr_info=pcr_info(10))
    owned.tpm.send(EXTEND, u32(10) + sha1(b"event")).ok()
    answer = migrate(owned.tpm, handle, destination.pubkey, b"")
    assert answer.code == ReturnCode.WRONGPCRVAL


def test_migrate_key_garbage_is_decrypt_error(owned, destination):
    handle, _ = authority(owned.tpm)
    for data in (b"", bytes(256), b"\x01" * 256):
        answer = migrate(owned.tpm, handle, destination.pubkey, data)
        assert answer.code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize(
    ("pubkey", "code"),
    [
        (rsa_parms(2048, algorithm=6) + sized(b"\xff" * 256), ReturnCode.BAD_KEY_PROPERTY),
        (rsa_parms(2048, enc=1) + sized(b"\xff" * 256), ReturnCode.INAPPROPRIATE_ENC),
        (rsa_parms(2048, enc=4) + sized(b"\xff" * 256), ReturnCode.INAPPROPRIATE_ENC),
        (rsa_parms(512) + sized(b"\xff" * 64), ReturnCode.BAD_DATASIZE),
        (rsa_parms(512) + sized(b""), ReturnCode.BAD_DATASIZE),
        (rsa_parms(1024) + sized(b"\xff" * 128), ReturnCode.ENCRYPT_ERROR),
        (rsa_parms(2048) + sized(b"\xff" * 255 + b"\xfe"), ReturnCode.ENCRYPT_ERROR),
        (rsa_parms(2048) + sized(bytes(256)), ReturnCode.ENCRYPT_ERROR),
    ],
    ids=["AES", "none", "CTR", "small", "empty", "no room", "even", "zero"],
)
def test_migrate_key_to_what_cannot_take_it(owned, pubkey, code):
    handle, middle = authority(owned.tpm)
    data = oaep(middle.modulus, bytes(100))
    assert migrate(owned.tpm, handle, pubkey, data).code == code


@pytest.mark.parametrize("exponent", [b"\0", b"\2"], ids=["e=0", "e=2"])
def test_migrate_key_to_what_has_no_inverse(owned, exponent):
    """What is encrypted so, no private key decrypts: the key inside would be lost."""
    handle, middle = authority(owned.tpm)
    destination = rsa_parms(2048, exponent=exponent) + sized(b"\xff" * 256)
    answer = migrate(owned.tpm, handle, destination, oaep(middle.modulus, bytes(100)))
    assert answer.code == ReturnCode.ENCRYPT_ERROR


# -- the owner decides -----------------------------------------------------------------------------


def test_each_user_may_migrate_with_one_authorization(owned, destination):
    key_auth = authorize(owned.tpm, destination.pubkey).ok()
    for _ in range(2):
        _, key = movable(owned.tpm)
        create_blob(owned.tpm, key_auth, key.enc_data).ok()


def test_authorization_needs_the_owner(owned, destination):
    params = u16(MS_MIGRATE) + destination.pubkey
    answer = owned.tpm.send(AUTHORIZE_MIGRATION_KEY, params)
    assert answer.code == ReturnCode.BADTAG
    session = owned.tpm.osap(4, SRK, SRK_AUTH)
    answer = owned.tpm.auth(AUTHORIZE_MIGRATION_KEY, params, session)
    assert answer.code == ReturnCode.AUTHFAIL
    session = owned.tpm.osap(2, 0, OWNER_AUTH)
    owned.tpm.auth(AUTHORIZE_MIGRATION_KEY, params, session).ok()


def test_certified_key_is_not_for_plain_migration_either_way(owned, destination):
    # A certified key that arrives as a plain one would lose its authorities.
    tpm = owned.tpm
    blob = create_cmk(tpm, storage_cmk(), msa_list(destination.digest)).ok()
    key = parse_key(blob)
    data, random, _ = arriving(tpm, payload=8, pub_data_digest=key.digest)
    assert convert(tpm, data, random).code == ReturnCode.BAD_MIGRATION
