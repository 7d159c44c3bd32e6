"""TPM_LoadManuMaintPub to TPM_LoadMaintenanceArchive: each return code, and a whole move."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import Bench, PooledPrimes, made_key
from tests.tpm12.makers import (
    ET_OWNER,
    KEY_AUTH,
    WRONG,
    decrypt,
    load,
    loaded,
    mgf1,
    seal,
    signing,
    unseal,
    wrap,
)
from tests.tpm12.movers import Inside, OutsideKey, owner, pack, two_sized, unpack
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK_AUTH,
    ZERO,
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

CREATE_ARCHIVE, LOAD_ARCHIVE, KILL, LOAD_PUB, READ_PUB = 0x2C, 0x2D, 0x2E, 0x2F, 0x30
OWNER_SET_DISABLE, DISABLE_OWNER_CLEAR, OWNER_CLEAR = 0x6E, 0x5C, 0x5B
REPLAY = sha1(b"replay")
NO_KEY = u32(0) + u16(0) + u16(0) + sized(b"") + sized(b"")
OTHER_OWNER = sha1(b"another owner")


@pytest.fixture(scope="module")
def maker():
    """Who made the TPM."""
    return OutsideKey()


@pytest.fixture(scope="module")
def maintained_state(owned_state, maker):
    bench = Bench(owned_state)
    bench.change("permanent", manu_maint_pub=maker.pubkey)
    return bench.state


@pytest.fixture
def maintained(maintained_state):
    """An owned TPM that has its maker's key."""
    return Bench(maintained_state)


@pytest.fixture
def target(maintained_state):
    """Another TPM of that maker, with an SRK and an owner's proof of its own."""
    bench = Bench(maintained_state)
    primes = PooledPrimes()
    for _ in range(5):
        pair = primes.primes(2048, 65537)
    proof = sha1(b"proof of the target")
    srk = made_key(pair, 0x11, usage_auth=SRK_AUTH, migration_auth=proof)
    bench.change("permanent", srk=srk, tpm_proof=proof)
    return bench


# -- the maker's key -------------------------------------------------------------------------------


def load_pub(tpm, pubkey):
    return tpm.send(LOAD_PUB, REPLAY + pubkey)


def read_pub(tpm):
    return tpm.send(READ_PUB, REPLAY)


@pytest.mark.parametrize("kind", ["fresh", "with_ek"])
def test_load_manu_maint_pub_once(request, maker, kind):
    bench = request.getfixturevalue(kind)
    assert read_pub(bench.tpm).code == ReturnCode.KEYNOTFOUND
    checksum = load_pub(bench.tpm, maker.pubkey).ok()
    assert bench.last.permanent_changed
    assert checksum == sha1(maker.pubkey, REPLAY)
    assert read_pub(bench.tpm).ok() == checksum
    assert not bench.last.permanent_changed
    again = load_pub(bench.tpm, OutsideKey().pubkey)
    assert again.code == ReturnCode.DISABLED_CMD
    assert read_pub(bench.tpm).ok() == checksum


def test_load_manu_maint_pub_with_an_owner_is_disabled_cmd(owned, maker):
    assert load_pub(owned.tpm, maker.pubkey).code == ReturnCode.DISABLED_CMD
    assert read_pub(owned.tpm).code == ReturnCode.KEYNOTFOUND


def test_load_manu_maint_pub_of_no_key_is_for_good(fresh, owned_state, maker):
    assert load_pub(fresh.tpm, NO_KEY).ok() == sha1(NO_KEY, REPLAY)
    assert read_pub(fresh.tpm).ok() == sha1(NO_KEY, REPLAY)
    assert load_pub(fresh.tpm, maker.pubkey).code == ReturnCode.DISABLED_CMD
    bench = Bench(owned_state)
    bench.change("permanent", manu_maint_pub=fresh.state.permanent.manu_maint_pub)
    assert create(bench.tpm).code == ReturnCode.KEYNOTFOUND
    assert load_archive(bench.tpm, b"", b"", b"").code == ReturnCode.KEYNOTFOUND


@pytest.mark.parametrize(
    "pubkey",
    [
        rsa_parms(1024) + sized(b"\xff" * 128),
        rsa_parms(2048) + sized(b"\xff" * 128),
        rsa_parms(4096) + sized(b"\xff" * 512),
        rsa_parms(2048, enc=2) + sized(b"\xff" * 256),
        rsa_parms(2048, sig=2) + sized(b"\xff" * 256),
        rsa_parms(2048, exponent=b"\x03") + sized(b"\xff" * 256),
        rsa_parms(2048, primes=3) + sized(b"\xff" * 256),
        rsa_parms(2048, algorithm=6) + sized(b"\xff" * 256),
        NO_KEY[:-4] + sized(b"\xff" * 256),
    ],
)
def test_load_manu_maint_pub_of_another_kind_is_bad_key_property(fresh, maker, pubkey):
    assert load_pub(fresh.tpm, pubkey).code == ReturnCode.BAD_KEY_PROPERTY
    load_pub(fresh.tpm, maker.pubkey).ok()


# -- CreateMaintenanceArchive ----------------------------------------------------------------------


def create(tpm, generate_random=1, *, secret=OWNER_AUTH):
    return tpm.auth(CREATE_ARCHIVE, bytes([generate_random]), owner(tpm, secret))


@pytest.mark.parametrize("generate_random", [0, 1])
def test_archive_is_what_the_specification_says(maintained, maker, generate_random):
    random, archive = two_sized(create(maintained.tpm, generate_random).ok())
    assert maintained.last.permanent_changed
    assert maintained.tpm.flags()[19] == 1
    srk, permanent = maintained.state.permanent.srk, maintained.state.permanent
    key = parse_key(archive)
    assert key.rest == b""
    assert key.modulus == srk.public.pub_key
    assert key.digest == srk.pub_data_digest
    hidden = maker.decrypt(key.enc_data)
    assert len(hidden) == 198
    assert len(random) == (198 if generate_random else 0)
    inside = unpack(xor(hidden, random or mgf1(OWNER_AUTH, 198)))
    expected = Inside(4, permanent.tpm_proof, key.digest, srk.prime, OWNER_AUTH)
    assert inside == expected


def test_archive_is_hidden_anew_each_time(maintained):
    randoms = {two_sized(create(maintained.tpm).ok())[0] for _ in range(3)}
    assert len(randoms) == 3


def test_archive_without_a_makers_key_is_keynotfound(owned):
    assert create(owned.tpm).code == ReturnCode.KEYNOTFOUND
    assert owned.tpm.flags()[19] == 0


def test_archive_checks_in_the_order_of_the_specification(owned):
    owned.set_flags(allow_maintenance=False)
    assert create(owned.tpm, secret=WRONG).code == ReturnCode.DISABLED_CMD
    assert owned.state.stclear.failed_tries == 0
    owned.set_flags(allow_maintenance=True)
    assert create(owned.tpm, secret=WRONG).code == ReturnCode.AUTHFAIL
    assert create(owned.tpm).code == ReturnCode.KEYNOTFOUND


def test_archive_generate_random_is_a_bool(maintained):
    assert create(maintained.tpm, 2).code == ReturnCode.BAD_PARAMETER


def test_kill_maintenance_feature_is_for_this_owner(maintained):
    tpm = maintained.tpm
    assert tpm.auth(KILL, b"", owner(tpm, WRONG)).code == ReturnCode.AUTHFAIL
    create(tpm).ok()
    tpm.auth(KILL, b"", owner(tpm)).ok()
    assert maintained.last.permanent_changed
    assert tpm.flags()[6] == 0
    assert create(tpm).code == ReturnCode.DISABLED_CMD
    tpm.auth(KILL, b"", owner(tpm)).ok()
    tpm.auth(OWNER_CLEAR, b"", owner(tpm)).ok()
    assert tpm.flags()[6] == 1


# -- LoadMaintenanceArchive ------------------------------------------------------------------------


def load_archive(tpm, archive, random, signature, *, secret=OWNER_AUTH):
    params = sized(archive) + sized(random) + sized(signature)
    return tpm.auth(LOAD_ARCHIVE, params, owner(tpm, secret))


def readdressed(maker, archive, target):
    """What the maker does: the same archive for another TPM, and a signature."""
    key = parse_key(archive)
    hidden = maker.decrypt(key.enc_data)
    public = target.state.permanent.srk.public.pub_key
    moved = archive[: -len(sized(key.enc_data))] + sized(oaep(public, hidden))
    return moved, signed(maker, moved)


def signed(maker, archive):
    return maker.sign(sha1(u32(LOAD_ARCHIVE), archive))


@pytest.mark.parametrize("generate_random", [0, 1])
def test_archive_moves_everything_that_hangs_on_the_srk(maintained, target, maker, generate_random):
    blob, sealed = wrap(maintained.tpm, signing()).ok(), seal(maintained.tpm, b"data").ok()
    random, archive = two_sized(create(maintained.tpm, generate_random).ok())
    moved, signature = readdressed(maker, archive, target)
    assert load(target.tpm, blob).code == ReturnCode.DECRYPT_ERROR
    load_archive(target.tpm, moved, random, signature).ok()
    assert target.last.permanent_changed
    source, permanent = maintained.state.permanent, target.state.permanent
    assert permanent.srk.public.pub_key == source.srk.public.pub_key
    assert permanent.srk.prime == source.srk.prime
    assert permanent.tpm_proof == permanent.srk.migration_auth == source.tpm_proof
    assert permanent.owner_auth == permanent.srk.usage_auth == OWNER_AUTH
    # The actions of TPM_OwnerClear leave it disabled and deactivated.
    flags = target.tpm.flags()
    assert (flags[1], flags[3], flags[19]) == (1, 1, 1)
    target.set_flags(disable=False, deactivated=False)
    load(target.tpm, blob, parent_auth=OWNER_AUTH).ok()
    assert unseal(target.tpm, sealed, key_auth=OWNER_AUTH).ok() == sized(b"data")


def test_archive_with_random_brings_its_own_owner(maintained, target, maker):
    maintained.change("permanent", owner_auth=OTHER_OWNER)
    random, archive = two_sized(create(maintained.tpm, secret=OTHER_OWNER).ok())
    moved, signature = readdressed(maker, archive, target)
    session = owner(target.tpm)
    params = sized(moved) + sized(random) + sized(signature)
    # The response is signed with the secret of the owner who asked: Witness.auth checks that.
    target.tpm.auth(LOAD_ARCHIVE, params, session).ok()
    enable = target.tpm.auth(OWNER_SET_DISABLE, b"\0", owner(target.tpm))
    assert enable.code == ReturnCode.AUTHFAIL
    target.tpm.auth(OWNER_SET_DISABLE, b"\0", owner(target.tpm, OTHER_OWNER)).ok()


def test_archive_without_random_needs_the_same_owner(maintained, target, maker):
    maintained.change("permanent", owner_auth=OTHER_OWNER)
    _, archive = two_sized(create(maintained.tpm, 0, secret=OTHER_OWNER).ok())
    moved, signature = readdressed(maker, archive, target)
    answer = load_archive(target.tpm, moved, b"", signature)
    assert answer.code in {ReturnCode.DECRYPT_ERROR, ReturnCode.INVALID_STRUCTURE}


def test_loaded_archive_ends_keys_and_sessions(maintained, target, maker):
    random, archive = two_sized(create(maintained.tpm).ok())
    moved, signature = readdressed(maker, archive, target)
    loaded(target.tpm, signing())
    session = target.tpm.oiap(OWNER_AUTH)
    params = sized(moved) + sized(random) + sized(signature)
    target.tpm.auth(LOAD_ARCHIVE, params, session).ok()
    assert not session.continues
    assert target.state.volatile.keys == {}
    assert target.state.stany.sessions == {}


@pytest.fixture
def archive(maintained, target, maker):
    """What moves the first TPM to the target: archive, random, signature."""
    random, made = two_sized(create(maintained.tpm).ok())
    moved, signature = readdressed(maker, made, target)
    return moved, random, signature


def test_load_archive_wrong_owner_is_authfail(target, archive):
    assert load_archive(target.tpm, *archive, secret=WRONG).code == ReturnCode.AUTHFAIL


def test_load_archive_without_a_makers_key_is_keynotfound(owned, archive):
    assert load_archive(owned.tpm, *archive).code == ReturnCode.KEYNOTFOUND


def test_load_archive_that_the_maker_did_not_sign_is_bad_signature(target, archive):
    moved, random, signature = archive
    other = OutsideKey()
    tries = [b"", bytes(256), signature[:-1], signed(other, moved)]
    for wrong in tries:
        answer = load_archive(target.tpm, moved, random, wrong)
        assert answer.code == ReturnCode.BAD_SIGNATURE
    changed = bytearray(moved)
    for at in (0, 6, 10, 50, -1):
        changed[at] ^= 1
        answer = load_archive(target.tpm, bytes(changed), random, signature)
        assert answer.code == ReturnCode.BAD_SIGNATURE


def test_load_archive_for_another_tpm_is_decrypt_error(maintained, archive):
    assert load_archive(maintained.tpm, *archive).code == ReturnCode.DECRYPT_ERROR


@pytest.mark.parametrize("size", [1, 197, 199])
def test_load_archive_random_of_another_size_is_bad_parameter(target, archive, size):
    moved, _, signature = archive
    answer = load_archive(target.tpm, moved, bytes(size), signature)
    assert answer.code == ReturnCode.BAD_PARAMETER


def test_load_archive_other_random_is_decrypt_error(target, archive):
    moved, random, signature = archive
    for other in (bytes(198), b"", random[::-1]):
        answer = load_archive(target.tpm, moved, other, signature)
        assert answer.code in {ReturnCode.DECRYPT_ERROR, ReturnCode.INVALID_STRUCTURE}


def made_archive(bench, maker, target, *, template=None, **changed):
    """An archive that the maker made up, with something inside changed."""
    permanent = bench.state.permanent
    srk = permanent.srk
    head = template or key_template(0x11)
    public = head[:-8] + sized(changed.pop("modulus", srk.public.pub_key))
    values = {
        "payload": 4,
        "usage_auth": permanent.tpm_proof,
        "pub_data_digest": sha1(public),
        "prime": srk.prime,
        "p_hash": OWNER_AUTH,
        **changed,
    }
    hidden = xor(pack(Inside(**values)), random := (sha1(b"random") * 10)[:198])
    moved = public + sized(oaep(target.state.permanent.srk.public.pub_key, hidden))
    return moved, random, signed(maker, moved)


def test_archive_that_the_maker_made_up_loads(maintained, target, maker):
    load_archive(target.tpm, *made_archive(maintained, maker, target)).ok()


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"payload": 3}, ReturnCode.BAD_MIGRATION),
        ({"payload": 8}, ReturnCode.BAD_MIGRATION),
        ({"payload": 1}, ReturnCode.INVALID_STRUCTURE),
        ({"prime": b"\xff" * 128}, ReturnCode.BAD_PARAMETER),
        ({"modulus": b"\xff" * 256}, ReturnCode.BAD_PARAMETER),
        ({"modulus": b"\xff" * 128}, ReturnCode.BAD_PARAMETER),
        ({"pub_data_digest": ZERO}, ReturnCode.AUTHFAIL),
        ({"template": key_template(0x11, flags=2)}, ReturnCode.INVALID_KEYUSAGE),
        (
            {"template": key_template(0x16)},
            ReturnCode.INVALID_KEYUSAGE,
        ),
        ({"template": key_template(0x10)}, ReturnCode.BAD_KEY_PROPERTY),
        ({"template": key_template(0x11, parms=rsa_parms(1024))}, ReturnCode.BAD_KEY_PROPERTY),
    ],
)
def test_load_archive_of_what_is_no_srk(maintained, target, maker, changed, code):
    before = target.state.permanent
    archive = made_archive(maintained, maker, target, **changed)
    assert load_archive(target.tpm, *archive).code == code
    assert target.state.permanent.srk is before.srk


@pytest.mark.parametrize("archive", [b"", b"\1\1\0\0", key_template(0x11)[:-1], b"\xff" * 500])
def test_load_archive_that_is_no_key_is_refused(target, maker, archive):
    answer = load_archive(target.tpm, archive, b"", signed(maker, archive))
    assert answer.code in {ReturnCode.BAD_PARAM_SIZE, ReturnCode.BAD_VERSION}


def test_load_archive_where_the_owner_may_not_clear_is_clear_disabled(target, archive):
    target.set_flags(disable_owner_clear=True)
    assert load_archive(target.tpm, *archive).code == ReturnCode.CLEAR_DISABLED
    assert target.state.permanent.owner_auth == OWNER_AUTH


def test_srk_that_came_by_archive_makes_keys(target, archive):
    load_archive(target.tpm, *archive).ok()
    target.set_flags(disable=False, deactivated=False)
    blob = wrap(target.tpm, signing(), parent_auth=OWNER_AUTH).ok()
    handle = number(load(target.tpm, blob, parent_auth=OWNER_AUTH).ok())
    session = target.tpm.osap(1, handle, KEY_AUTH)
    target.tpm.auth(0x3C, sized(bytes(20)), session, handles=u32(handle)).ok()
    srk = target.state.permanent.srk
    assert decrypt(srk, parse_key(blob).enc_data)[1:21] == KEY_AUTH
    assert target.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
