"""Families, delegations and the delegate table (Part 3, chapter 19)."""

from dataclasses import replace

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.delegation_makers import (
    ADMIN,
    AES,
    ALL_KEY,
    CREATE,
    CREATE_KEY,
    CREATE_OWNER,
    DEL_AUTH,
    ENABLE,
    ENABLED,
    INTEGRITY_AT,
    INVALIDATE,
    KEY_BITS,
    LOCKED,
    OFF,
    ON,
    OWNER_BITS,
    PUBLIC_BYTES,
    aes_masked,
    blob_of,
    by_blob,
    by_key,
    by_row,
    clear_blob,
    create_key,
    create_owner,
    dsap,
    dsap_request,
    key_blob,
    load_owner,
    loaded_row,
    manage,
    new_family,
    owner_blob,
    owner_oiap,
    owner_osap,
    public,
    read_table,
    set_pointer,
    srk_osap,
    update,
    verify,
    with_count,
)
from tests.tpm12.makers import aes_ctr, loaded, signing
from tests.tpm12.witness import (
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    hmac1,
    number,
    parse_sized,
    sha1,
    sized,
    u16,
    u32,
)
from tpm12.profile import Profile
from tpm12.state import FamilyRow

ET_OWNER, ET_ROW, ET_BLOB = 2, 8, 7
OWNER_READ_PUBEK = 0x7D
MANAGE_BIT, CREATE_OWNER_BIT, UPDATE_BIT, LOAD_BIT = 1 << 2, 1 << 1, 1 << 5, 1 << 24
CREATE_KEY_BIT, SEAL_BIT, GET_PUB_KEY_BIT = 1 << 7, 1 << 1, 1 << 5
MAX_COUNT = 0xFFFFFFFF


def owner_pubek(tpm, session):
    """A command of the owner's that changes nothing."""
    return tpm.auth(OWNER_READ_PUBEK, b"", session)


def flipped(blob, at=-1):
    altered = bytearray(blob)
    altered[at] ^= 1
    return bytes(altered)


def without_integrity(blob):
    return blob[:INTEGRITY_AT] + ZERO + blob[INTEGRITY_AT + 20 :]


@pytest.fixture
def family(owned):
    """An enabled family of an owned TPM."""
    return new_family(owned.tpm)


# -- §19.1: families -------------------------------------------------------------------------------


def test_new_family_is_disabled_unlocked_and_counts_from_one(owned):
    out = manage(owned.tpm, CREATE, 0, b"F", owner_oiap(owned.tpm)).ok()
    assert parse_sized(out) == (u32(1), b"")
    assert read_table(owned.tpm) == ({1: (ord("F"), 1, 0)}, {})


def test_family_ids_are_never_used_again(owned):
    for expected in (1, 2, 3):
        out = manage(owned.tpm, CREATE, 0, b"F", owner_oiap(owned.tpm)).ok()
        assert number(out[4:]) == expected
        manage(owned.tpm, INVALIDATE, expected, b"", owner_oiap(owned.tpm)).ok()


def test_create_ignores_the_family_id(owned):
    assert manage(owned.tpm, CREATE, 77, b"F", owner_oiap(owned.tpm)).ok() == sized(u32(1))


@pytest.mark.parametrize(
    ("operation", "bit"), [(ENABLE, ENABLED), (ADMIN, LOCKED)], ids=["enable", "admin"]
)
def test_flags_are_set_and_cleared(owned, operation, bit):
    family = new_family(owned.tpm, enabled=False)
    for data, flags in ((ON, bit), (ON, bit), (OFF, 0)):
        assert manage(owned.tpm, operation, family, data, owner_oiap(owned.tpm)).ok() == sized(b"")
        assert read_table(owned.tpm)[0][family][2] == flags


def test_flag_that_is_set_already_is_no_write(owned, family):
    manage(owned.tpm, ENABLE, family, ON, owner_oiap(owned.tpm)).ok()
    assert not owned.last.permanent_changed


def test_invalidated_family_leaves_dead_rows(owned, family):
    row = loaded_row(owned.tpm, family)
    manage(owned.tpm, INVALIDATE, family, b"", owner_oiap(owned.tpm)).ok()
    families, rows = read_table(owned.tpm)
    assert (list(families), list(rows)) == ([], [row])
    assert dsap_request(owned.tpm, ET_ROW, u32(row))[0].code == ReturnCode.BADINDEX


@pytest.mark.parametrize(
    ("operation", "known", "data", "code"),
    [
        (CREATE, True, b"", ReturnCode.BAD_PARAM_SIZE),
        (CREATE, True, b"ab", ReturnCode.BAD_PARAM_SIZE),
        (ENABLE, True, b"", ReturnCode.BAD_PARAM_SIZE),
        (ENABLE, True, b"\1\1", ReturnCode.BAD_PARAM_SIZE),
        (ENABLE, True, b"\2", ReturnCode.BAD_PARAMETER),
        (ADMIN, True, b"", ReturnCode.BAD_PARAM_SIZE),
        (ADMIN, True, b"\xff", ReturnCode.BAD_PARAMETER),
        (ENABLE, False, ON, ReturnCode.BADINDEX),
        (ADMIN, False, ON, ReturnCode.BADINDEX),
        (INVALIDATE, False, b"", ReturnCode.BADINDEX),
        (0, True, b"", ReturnCode.BAD_PARAMETER),
        (5, True, b"", ReturnCode.BAD_PARAMETER),
        (5, False, b"", ReturnCode.BADINDEX),
    ],
)
def test_manage_refuses(owned, operation, known, data, code):
    family = new_family(owned.tpm)
    before = owned.state.permanent
    session = owner_oiap(owned.tpm)
    assert manage(owned.tpm, operation, family if known else 99, data, session).code == code
    assert owned.state.permanent is before


def test_manage_of_an_owned_tpm_needs_its_owner(owned, family):
    assert manage(owned.tpm, ENABLE, family, OFF).code == ReturnCode.AUTHFAIL
    assert manage(owned.tpm, ENABLE, family, OFF, owned.tpm.oiap(ZERO)).code == ReturnCode.AUTHFAIL
    assert manage(owned.tpm, CREATE, 0, b"F").code == ReturnCode.AUTHFAIL
    # The family is looked for first.
    assert manage(owned.tpm, ENABLE, 99, ON).code == ReturnCode.BADINDEX
    assert manage(owned.tpm, ENABLE, 99, ON, owned.tpm.oiap(ZERO)).code == ReturnCode.BADINDEX


def test_table_full_of_families_is_resources(owned):
    for i in range(Profile().family_rows):
        manage(owned.tpm, CREATE, 0, bytes([i]), owner_oiap(owned.tpm)).ok()
    assert manage(owned.tpm, CREATE, 0, b"", owner_oiap(owned.tpm)).code == ReturnCode.RESOURCES
    manage(owned.tpm, INVALIDATE, 3, b"", owner_oiap(owned.tpm)).ok()
    manage(owned.tpm, CREATE, 0, b"F", owner_oiap(owned.tpm)).ok()


def test_family_ids_that_are_used_up_are_resources(owned):
    owned.change("permanent", last_family_id=MAX_COUNT - 1)
    assert manage(owned.tpm, CREATE, 0, b"F", owner_oiap(owned.tpm)).ok() == sized(u32(MAX_COUNT))
    assert manage(owned.tpm, CREATE, 0, b"F", owner_oiap(owned.tpm)).code == ReturnCode.RESOURCES


# -- without an owner


def test_anyone_manages_an_unowned_tpm(with_ek):
    manage(with_ek.tpm, CREATE, 0, b"U").ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    assert read_table(with_ek.tpm)[0] == {1: (ord("U"), 1, ENABLED)}
    assert with_ek.state.permanent.no_owner_nv_write == 2


def test_session_on_an_unowned_tpm_is_authfail(with_ek):
    session = with_ek.tpm.oiap(OWNER_AUTH)
    assert manage(with_ek.tpm, CREATE, 0, b"U", session).code == ReturnCode.AUTHFAIL


def test_admin_lock_keeps_everyone_but_an_owner_out(with_ek):
    manage(with_ek.tpm, CREATE, 0, b"U").ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    manage(with_ek.tpm, ADMIN, 1, ON).ok()
    for operation, data in ((ENABLE, OFF), (ADMIN, OFF), (INVALIDATE, b"")):
        code = manage(with_ek.tpm, operation, 1, data).code
        assert code == ReturnCode.DELEGATE_LOCK
    delegation = clear_blob(public(1, 1, count=1))
    assert load_owner(with_ek.tpm, 0, delegation).code == ReturnCode.DELEGATE_LOCK
    manage(with_ek.tpm, CREATE, 0, b"V").ok()


def test_admin_lock_does_not_bind_the_owner(owned, family):
    manage(owned.tpm, ADMIN, family, ON, owner_oiap(owned.tpm)).ok()
    manage(owned.tpm, ENABLE, family, OFF, owner_oiap(owned.tpm)).ok()
    manage(owned.tpm, ADMIN, family, OFF, owner_oiap(owned.tpm)).ok()


def test_changes_without_an_owner_are_limited(with_ek):
    limit = Profile().no_owner_nv_writes
    manage(with_ek.tpm, CREATE, 0, b"U").ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    with_ek.change("permanent", no_owner_nv_write=limit - 2)
    load_owner(with_ek.tpm, 0, clear_blob(public(1, 1, count=1))).ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    assert manage(with_ek.tpm, ENABLE, 1, ON).code == ReturnCode.MAXNVWRITES
    again = load_owner(with_ek.tpm, 0, clear_blob(public(1, 1, count=1)))
    assert again.code == ReturnCode.MAXNVWRITES


def test_owners_changes_are_not_counted(owned, family):
    loaded_row(owned.tpm, family)
    assert owned.state.permanent.no_owner_nv_write == 0


# -- sessions


def test_manage_ends_sessions_with_a_shared_secret(owned, family):
    tpm = owned.tpm
    kept = tpm.oiap(OWNER_AUTH)
    ended = [srk_osap(tpm), owner_osap(tpm), by_blob(tpm, owner_blob(tpm, family))]
    manage(tpm, ENABLE, family, ON, owner_oiap(tpm)).ok()
    owner_pubek(tpm, kept).ok()
    for session in ended:
        assert owner_pubek(tpm, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_manage_ends_its_own_session_unless_that_is_oiap(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family, MANAGE_BIT)
    for open_session, continues in (
        (lambda: tpm.oiap(OWNER_AUTH), True),
        (lambda: owner_osap(tpm), False),
        (lambda: by_blob(tpm, blob), False),
    ):
        session = open_session()
        manage(tpm, ENABLE, family, ON, session).ok()  # the witness checks the response's HMAC
        assert session.continues == continues


def test_failed_manage_ends_no_other_session(owned, family):
    session = owner_osap(owned.tpm)
    assert manage(owned.tpm, ENABLE, family, b"\2", owner_oiap(owned.tpm)).code
    owner_pubek(owned.tpm, session).ok()


def test_changes_set_the_owner_pointer_back(owned, family):
    tpm = owned.tpm
    row = loaded_row(tpm, family)
    blob = owner_blob(tpm, family)
    for change in (
        lambda: manage(tpm, ENABLE, family, ON, owner_oiap(tpm, DEL_AUTH)),
        lambda: load_owner(tpm, 1, blob, owner_oiap(tpm, DEL_AUTH)),
        lambda: create_owner(tpm, public(family, 1), owner_osap(tpm, DEL_AUTH), increment=True),
    ):
        set_pointer(tpm, ET_ROW, row).ok()
        change().ok()
        assert owned.state.stclear.owner_reference == OWNER


# -- delegates


def test_delegate_manages_its_own_family_only(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    blob = owner_blob(tpm, family, MANAGE_BIT)
    code = manage(tpm, ENABLE, other, OFF, by_blob(tpm, blob)).code
    assert code == ReturnCode.DELEGATE_FAMILY
    manage(tpm, CREATE, other, b"N", by_blob(tpm, blob)).ok()
    manage(tpm, ENABLE, family, OFF, by_blob(tpm, blob)).ok()


def test_delegate_by_owner_pointer_manages_its_own_family_only(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    row = loaded_row(tpm, family)
    set_pointer(tpm, ET_ROW, row).ok()
    session = tpm.oiap(DEL_AUTH)
    assert manage(tpm, ENABLE, other, OFF, session).code == ReturnCode.DELEGATE_FAMILY
    session = owner_osap(tpm, DEL_AUTH)
    assert manage(tpm, ENABLE, other, OFF, session).code == ReturnCode.DELEGATE_FAMILY
    manage(tpm, ENABLE, family, ON, tpm.oiap(DEL_AUTH)).ok()


def test_owners_own_session_is_not_bound_by_the_owner_pointer(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    row = loaded_row(tpm, family)
    session = owner_osap(tpm)
    set_pointer(tpm, ET_ROW, row).ok()
    manage(tpm, ENABLE, other, OFF, session).ok()


# -- §19.2, §19.3: making delegations --------------------------------------------------------------


def test_owner_blob_is_as_specified(owned, family):
    wanted = public(family, 0x12345678, label=0x55, count=99)
    blob = blob_of(create_owner(owned.tpm, wanted))
    permanent = owned.state.permanent
    assert blob[:2] == u16(0x2A)
    assert blob[2 : 2 + PUBLIC_BYTES] == wanted[:-4] + u32(1)  # the family's count, not ours
    integrity = blob[INTEGRITY_AT : INTEGRITY_AT + 20]
    assert integrity == hmac1(permanent.tpm_proof, without_integrity(blob))
    iv, rest = parse_sized(blob[INTEGRITY_AT + 20 :])
    sensitive, rest = parse_sized(rest)
    assert not rest
    assert aes_ctr(permanent.delegate_key, iv, sensitive) == u16(0x26) + DEL_AUTH


def test_key_blob_is_as_specified(owned, family):
    blob = key_blob(owned.tpm, family, 0x0102)
    permanent = owned.state.permanent
    assert blob[:2] == u16(0x27)
    assert blob[2 : 2 + PUBLIC_BYTES] == public(family, 0x0102, kind=KEY_BITS, count=1)
    integrity, digest = blob[INTEGRITY_AT:][:20], blob[INTEGRITY_AT + 20 :][:20]
    assert integrity == hmac1(permanent.tpm_proof, without_integrity(blob))
    assert digest == sha1(sized(permanent.srk.public.pub_key))
    iv, rest = parse_sized(blob[INTEGRITY_AT + 40 :])
    sensitive, rest = parse_sized(rest)
    assert not rest
    assert aes_ctr(permanent.delegate_key, iv, sensitive) == u16(0x26) + DEL_AUTH


def test_equal_delegations_look_different(owned, family):
    first, second = owner_blob(owned.tpm, family), owner_blob(owned.tpm, family)
    assert first[:INTEGRITY_AT] == second[:INTEGRITY_AT]
    assert first[-22:] != second[-22:]


def test_secret_may_come_under_aes(owned, family):
    session = owned.tpm.osap(AES | ET_OWNER, 0, OWNER_AUTH)
    params = b"\0" + public(family, 1 << 9) + aes_masked(session, DEL_AUTH)
    blob = blob_of(owned.tpm.auth(CREATE_OWNER, params, session))
    owner_pubek(owned.tpm, by_blob(owned.tpm, blob)).ok()


def test_secret_may_come_under_aes_from_a_delegate(owned, family):
    session = dsap(owned.tpm, AES | ET_BLOB, owner_blob(owned.tpm, family))
    params = b"\0" + public(family, 1 << 9) + aes_masked(session, DEL_AUTH)
    blob = blob_of(owned.tpm.auth(CREATE_OWNER, params, session))
    owner_pubek(owned.tpm, by_blob(owned.tpm, blob)).ok()


def test_making_a_delegation_ends_its_session(owned, family):
    for session, make in (
        (owner_osap(owned.tpm), lambda s: create_owner(owned.tpm, public(family, 1), s)),
        (srk_osap(owned.tpm), lambda s: create_key(owned.tpm, public(family, 1, kind=2), s)),
    ):
        make(session).ok()
        assert not session.continues
        assert owner_pubek(owned.tpm, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_making_a_delegation_changes_no_permanent_state(owned, family):
    owner_blob(owned.tpm, family)
    assert not owned.last.permanent_changed
    key_blob(owned.tpm, family)
    assert not owned.last.permanent_changed


def test_delegation_in_a_disabled_family_is_made(owned):
    family = new_family(owned.tpm, enabled=False)
    blob = owner_blob(owned.tpm, family)
    assert verify(owned.tpm, blob) == ReturnCode.DISABLED_CMD
    manage(owned.tpm, ENABLE, family, ON, owner_oiap(owned.tpm)).ok()
    assert verify(owned.tpm, blob) == 0


@pytest.mark.parametrize(
    ("per1", "more", "code"),
    [
        (1, {"kind": OWNER_BITS}, ReturnCode.BAD_PARAMETER),
        (1, {"kind": 0}, ReturnCode.BAD_PARAMETER),
        (1, {"kind": 3}, ReturnCode.BAD_PARAMETER),
        (1 << 29, {"kind": KEY_BITS}, ReturnCode.BAD_PARAMETER),
        (1 << 31, {"kind": KEY_BITS}, ReturnCode.BAD_PARAMETER),
        (1, {"kind": KEY_BITS, "per2": 1}, ReturnCode.BAD_PARAMETER),
        (1, {"kind": KEY_BITS, "info": b"\0\4" + bytes(25)}, ReturnCode.INVALID_PCR_INFO),
        (1, {"kind": KEY_BITS, "info": b"\0\3" + bytes(24)}, ReturnCode.INVALID_STRUCTURE),
    ],
)
def test_create_key_delegation_refuses(owned, family, per1, more, code):
    assert create_key(owned.tpm, public(family, per1, **more)).code == code


@pytest.mark.parametrize(
    ("per1", "more", "code"),
    [
        (1, {"kind": KEY_BITS}, ReturnCode.BAD_PARAMETER),
        (1, {"per2": 0x80000000}, ReturnCode.BAD_PARAMETER),
    ],
)
def test_create_owner_delegation_refuses(owned, family, per1, more, code):
    assert create_owner(owned.tpm, public(family, per1, **more)).code == code


def test_delegation_in_no_family_is_badindex(owned):
    assert create_owner(owned.tpm, public(9, 1)).code == ReturnCode.BADINDEX
    assert create_key(owned.tpm, public(9, 1, kind=KEY_BITS)).code == ReturnCode.BADINDEX


def test_delegation_needs_the_authority_it_gives_away(owned, family):
    tpm = owned.tpm
    wrong = tpm.osap(ET_OWNER, 0, ZERO)
    assert create_owner(tpm, public(family, 1), wrong).code == ReturnCode.AUTHFAIL
    assert create_owner(tpm, public(family, 1), srk_osap(tpm)).code == ReturnCode.AUTHFAIL
    assert create_key(tpm, public(family, 1, kind=2), owner_osap(tpm)).code == ReturnCode.AUTHFAIL
    unknown = create_key(tpm, public(family, 1, kind=2), handle=0x1234)
    assert unknown.code == ReturnCode.INVALID_KEYHANDLE


def test_oiap_session_masks_no_secret(owned, family):
    tpm = owned.tpm
    params = public(family, 1, kind=KEY_BITS) + ZERO
    answer = tpm.auth(CREATE_KEY, params, tpm.oiap(SRK_AUTH), handles=u32(SRK))
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE
    answer = tpm.auth(CREATE_OWNER, b"\0" + public(family, 1) + ZERO, tpm.oiap(OWNER_AUTH))
    assert answer.code == ReturnCode.INVALID_AUTHHANDLE


# -- increment


def test_increment_ends_the_familys_older_delegations(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    old, unrelated = owner_blob(tpm, family), owner_blob(tpm, other)
    old_key = key_blob(tpm, family)
    new = blob_of(create_owner(tpm, public(family, 1), increment=True))
    assert owned.last.permanent_changed
    assert read_table(tpm)[0][family][1] == 2
    assert verify(tpm, old) == verify(tpm, old_key) == ReturnCode.FAMILYCOUNT
    assert verify(tpm, new) == verify(tpm, unrelated) == 0


def test_increment_ends_delegated_sessions(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    create_owner(tpm, public(family, 1)).ok()
    owner_pubek(tpm, session).ok()
    create_owner(tpm, public(family, 1), increment=True).ok()
    assert owner_pubek(tpm, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_increment_never_begins_again(owned, family):
    row = FamilyRow(label=1, verification_count=MAX_COUNT, flags=ENABLED)
    owned.change("permanent", family_table={family: row})
    answer = create_owner(owned.tpm, public(family, 1), increment=True)
    assert answer.code == ReturnCode.FAMILYCOUNT
    assert read_table(owned.tpm)[0][family][1] == MAX_COUNT


def test_increment_other_than_a_boolean_is_bad_parameter(owned, family):
    session = owner_osap(owned.tpm)
    params = b"\2" + public(family, 1) + session.masked(DEL_AUTH)
    assert owned.tpm.auth(CREATE_OWNER, params, session).code == ReturnCode.BAD_PARAMETER


# -- passing on


def test_delegate_passes_on_what_it_has(owned, family):
    tpm = owned.tpm
    has = CREATE_OWNER_BIT | 1 << 8 | 1 << 9
    blob = owner_blob(tpm, family, has)
    passed = blob_of(create_owner(tpm, public(family, 1 << 9), by_blob(tpm, blob)))
    owner_pubek(tpm, by_blob(tpm, passed)).ok()
    more = create_owner(tpm, public(family, 1 << 9 | 1 << 10), by_blob(tpm, blob))
    assert more.code == ReturnCode.AUTHFAIL


def test_key_delegate_passes_on_what_it_has(owned, family):
    tpm = owned.tpm
    blob = key_blob(tpm, family, CREATE_KEY_BIT | SEAL_BIT)
    create_key(tpm, public(family, SEAL_BIT, kind=KEY_BITS), by_key(tpm, blob)).ok()
    more = create_key(tpm, public(family, GET_PUB_KEY_BIT, kind=KEY_BITS), by_key(tpm, blob))
    assert more.code == ReturnCode.AUTHFAIL


def test_delegate_passes_on_within_its_family(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    blob = owner_blob(tpm, family)
    answer = create_owner(tpm, public(other, 1), by_blob(tpm, blob))
    assert answer.code == ReturnCode.DELEGATE_FAMILY
    answer = create_key(tpm, public(other, 1, kind=2), by_key(tpm, key_blob(tpm, family)))
    assert answer.code == ReturnCode.DELEGATE_FAMILY


def test_delegate_in_a_disabled_family_passes_nothing_on(owned, family):
    # Disabling a family ends such sessions, so only a state from elsewhere can have one.
    tpm = owned.tpm
    updating = owner_blob(tpm, family)
    sessions = [by_blob(tpm, owner_blob(tpm, family)) for _ in range(2)]
    row = owned.state.permanent.family_table[family]
    owned.change("permanent", family_table={family: replace(row, flags=0)})
    answer = create_owner(tpm, public(family, 1), sessions[0])
    assert answer.code == ReturnCode.DISABLED_CMD
    assert update(tpm, updating, sessions[1]).code == ReturnCode.DISABLED_CMD


def test_delegate_by_owner_pointer_passes_on_no_more_than_it_has(owned, family):
    tpm = owned.tpm
    set_pointer(tpm, ET_ROW, loaded_row(tpm, family, CREATE_OWNER_BIT)).ok()
    session = owner_osap(tpm, DEL_AUTH)
    assert create_owner(tpm, public(family, 1), session).code == ReturnCode.AUTHFAIL
    create_owner(tpm, public(family, CREATE_OWNER_BIT), owner_osap(tpm, DEL_AUTH)).ok()


def test_delegates_increment_ends_its_own_session(owned, family):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, family))
    create_owner(tpm, public(family, 1), session, increment=True).ok()
    assert not session.continues


# -- §19.4, §19.5: the delegate table --------------------------------------------------------------


def test_loaded_delegation_is_in_the_table(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family, 0x300, label=7)
    load_owner(tpm, 2, blob, owner_oiap(tpm)).ok()
    assert owned.last.permanent_changed
    assert read_table(tpm)[1] == {2: public(family, 0x300, label=7, count=1)}
    owner_pubek(tpm, by_row(tpm, 2)).ok()


def test_row_survives_a_power_cycle(owned, family):
    row = loaded_row(owned.tpm, family)
    owned.power_cycle().ok()
    owner_pubek(owned.tpm, by_row(owned.tpm, row)).ok()


def test_row_is_replaced(owned, family):
    loaded_row(owned.tpm, family, 1 << 8)
    loaded_row(owned.tpm, family, 1 << 9)
    assert read_table(owned.tpm)[1] == {0: public(family, 1 << 9, count=1)}


def test_loading_ends_sessions_as_managing_does(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    kept = tpm.oiap(OWNER_AUTH)
    ended = [owner_osap(tpm), by_blob(tpm, blob)]
    own = by_blob(tpm, blob)
    load_owner(tpm, 0, blob, own).ok()
    assert not own.continues
    owner_pubek(tpm, kept).ok()
    for session in ended:
        assert owner_pubek(tpm, session).code == ReturnCode.INVALID_AUTHHANDLE


def test_load_refuses(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    rows = Profile().delegate_rows
    for index, data, secret, code in (
        (rows, blob, OWNER_AUTH, ReturnCode.BADINDEX),
        (MAX_COUNT, blob, OWNER_AUTH, ReturnCode.BADINDEX),
        (0, blob, None, ReturnCode.AUTHFAIL),
        (0, blob, ZERO, ReturnCode.AUTHFAIL),
        (0, flipped(blob), OWNER_AUTH, ReturnCode.AUTHFAIL),
        (0, with_count(blob, 5), OWNER_AUTH, ReturnCode.AUTHFAIL),
        (0, clear_blob(public(family, 1, count=1)), OWNER_AUTH, ReturnCode.AUTHFAIL),
        (0, clear_blob(public(99, 1)), ZERO, ReturnCode.BADINDEX),
        (0, key_blob(tpm, family), OWNER_AUTH, ReturnCode.INVALID_STRUCTURE),
        (0, clear_blob(public(family, 1, kind=2)), OWNER_AUTH, ReturnCode.INVALID_STRUCTURE),
        (0, clear_blob(public(family, 1, kind=3)), OWNER_AUTH, ReturnCode.BAD_PARAMETER),
        (0, blob[:-1], OWNER_AUTH, ReturnCode.BAD_PARAM_SIZE),
        (0, blob + b"\0", OWNER_AUTH, ReturnCode.BAD_PARAM_SIZE),
    ):
        session = None if secret is None else owner_oiap(tpm, secret)
        assert load_owner(tpm, index, data, session).code == code
    assert read_table(tpm)[1] == {}


def test_load_into_a_disabled_family_is_disabled_cmd(owned):
    tpm = owned.tpm
    family = new_family(tpm, enabled=False)
    blob = owner_blob(tpm, family)
    # Who may not load at all is told that first.
    assert load_owner(tpm, 0, blob).code == ReturnCode.AUTHFAIL
    assert load_owner(tpm, 0, blob, owner_oiap(tpm)).code == ReturnCode.DISABLED_CMD


def test_dead_delegation_loads_and_does_not_work(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    create_owner(tpm, public(family, 1), increment=True).ok()
    load_owner(tpm, 0, blob, owner_oiap(tpm)).ok()
    assert dsap_request(tpm, ET_ROW, u32(0))[0].code == ReturnCode.FAMILYCOUNT


def test_delegate_loads_into_its_own_family_only(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    delegate = owner_blob(tpm, family, LOAD_BIT)
    answer = load_owner(tpm, 0, owner_blob(tpm, other), by_blob(tpm, delegate))
    assert answer.code == ReturnCode.DELEGATE_FAMILY
    load_owner(tpm, 0, owner_blob(tpm, family), by_blob(tpm, delegate)).ok()


# -- without an owner


def test_delegation_prepared_before_there_is_an_owner(with_ek, owned_state):
    manage(with_ek.tpm, CREATE, 0, b"P").ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    load_owner(with_ek.tpm, 1, clear_blob(public(1, 1 << 9, count=1))).ok()
    assert with_ek.state.permanent.no_owner_nv_write == 3
    # What TPM_TakeOwnership would set.
    taken = owned_state.permanent
    with_ek.change("permanent", owner_auth=OWNER_AUTH, srk=taken.srk, tpm_proof=taken.tpm_proof)
    owner_pubek(with_ek.tpm, by_row(with_ek.tpm, 1)).ok()


@pytest.mark.parametrize("sensitive", [b"", u16(0x26), u16(0x25) + DEL_AUTH, u16(0x26) + bytes(21)])
def test_blob_without_a_secret_is_invalid_structure(with_ek, sensitive):
    manage(with_ek.tpm, CREATE, 0, b"P").ok()
    manage(with_ek.tpm, ENABLE, 1, ON).ok()
    blob = u16(0x2A) + public(1, 1) + ZERO + sized(b"") + sized(sensitive)
    assert load_owner(with_ek.tpm, 0, blob).code == ReturnCode.INVALID_STRUCTURE


def test_unowned_load_refuses(with_ek):
    tpm = with_ek.tpm
    manage(tpm, CREATE, 0, b"P").ok()
    blob = clear_blob(public(1, 1))
    assert load_owner(tpm, 0, blob).code == ReturnCode.DISABLED_CMD
    manage(tpm, ENABLE, 1, ON).ok()
    assert load_owner(tpm, 4, blob).code == ReturnCode.BADINDEX
    assert load_owner(tpm, 0, clear_blob(public(2, 1))).code == ReturnCode.BADINDEX
    assert load_owner(tpm, 0, blob, tpm.oiap(OWNER_AUTH)).code == ReturnCode.AUTHFAIL


def test_table_is_read_without_an_owner(with_ek):
    assert read_table(with_ek.tpm) == ({}, {})


def test_owner_clear_empties_the_tables(owned, family):
    loaded_row(owned.tpm, family)
    owned.tpm.auth(0x5B, b"", owner_oiap(owned.tpm)).ok()
    owned.set_flags(disable=False)
    owned.change("stclear", deactivated=False)
    assert read_table(owned.tpm) == ({}, {})
    assert manage(owned.tpm, CREATE, 0, b"N").ok() == sized(u32(family + 1))


# -- §19.6: verification ---------------------------------------------------------------------------


@pytest.fixture
def outdated(owned, family):
    """An owner blob, a key blob and a row that an increment left behind."""
    tpm = owned.tpm
    blobs = owner_blob(tpm, family), key_blob(tpm, family)
    loaded_row(tpm, family)
    create_owner(tpm, public(family, 1), increment=True).ok()
    return blobs


def test_updated_blob_lives_again(owned, outdated):
    tpm = owned.tpm
    for blob, session in zip(outdated, (by_blob, by_key), strict=True):
        assert verify(tpm, blob) == ReturnCode.FAMILYCOUNT
        updated = blob_of(update(tpm, blob))
        assert not owned.last.permanent_changed
        assert len(updated) == len(blob)
        assert updated[INTEGRITY_AT + 20 :] == blob[INTEGRITY_AT + 20 :]
        assert verify(tpm, updated) == 0
        session(tpm, updated)


@pytest.mark.usefixtures("outdated")
def test_updated_row_lives_again(owned):
    tpm = owned.tpm
    assert dsap_request(tpm, ET_ROW, u32(0))[0].code == ReturnCode.FAMILYCOUNT
    assert update(tpm, u32(0)).ok() == sized(b"")
    assert owned.last.permanent_changed
    owner_pubek(tpm, by_row(tpm, 0)).ok()
    update(tpm, u32(0)).ok()
    assert not owned.last.permanent_changed


def test_update_works_in_a_disabled_family(owned, family, outdated):
    manage(owned.tpm, ENABLE, family, OFF, owner_oiap(owned.tpm)).ok()
    update(owned.tpm, outdated[0]).ok()


def test_update_refuses(owned, family, outdated):
    tpm = owned.tpm
    blob = outdated[0]
    for data, code in (
        (u32(1), ReturnCode.BADINDEX),
        (u32(9), ReturnCode.BADINDEX),
        (b"", ReturnCode.BAD_PARAM_SIZE),
        (b"\0", ReturnCode.BAD_PARAM_SIZE),
        (b"\0\1", ReturnCode.BAD_PARAMETER),
        (b"\0\x2b" + blob[2:], ReturnCode.BAD_PARAMETER),
        (blob[:-1], ReturnCode.BAD_PARAM_SIZE),
        (blob + b"\0", ReturnCode.BAD_PARAM_SIZE),
        (flipped(blob), ReturnCode.AUTHFAIL),
        (with_count(blob, 2), ReturnCode.AUTHFAIL),
        (clear_blob(public(99, 1)), ReturnCode.AUTHFAIL),
    ):
        assert update(tpm, data).code == code
    assert update(tpm, blob, tpm.oiap(ZERO)).code == ReturnCode.AUTHFAIL
    manage(tpm, INVALIDATE, family, b"", owner_oiap(tpm)).ok()
    assert update(tpm, blob).code == update(tpm, u32(0)).code == ReturnCode.BADINDEX


@pytest.mark.usefixtures("outdated")
def test_delegate_updates_its_own_family_only(owned, family):
    tpm = owned.tpm
    other = new_family(tpm)
    foreign, own = owner_blob(tpm, other), owner_blob(tpm, family)
    load_owner(tpm, 1, foreign, owner_oiap(tpm)).ok()
    delegate = owner_blob(tpm, family, UPDATE_BIT)
    for data in (foreign, u32(1)):
        answer = update(tpm, data, by_blob(tpm, delegate))
        assert answer.code == ReturnCode.DELEGATE_FAMILY
    update(tpm, own, by_blob(tpm, delegate)).ok()
    update(tpm, u32(0), by_blob(tpm, delegate)).ok()


# -- §19.7


def test_verify_tells_a_delegation_that_works(owned, family):
    tpm = owned.tpm
    handle, _ = loaded(tpm, signing())
    session = tpm.osap(1, handle, sha1(b"key secret"))
    blob = key_blob(tpm, family, 1, handle=handle, session=session)
    tpm.send(0xBA, u32(handle) + u32(1)).ok()
    assert verify(tpm, blob) == 0  # the key need not be loaded
    assert verify(tpm, owner_blob(tpm, family)) == 0


def test_verify_refuses(owned, family):
    tpm = owned.tpm
    blob = owner_blob(tpm, family)
    assert verify(tpm, b"") == verify(tpm, b"\0") == ReturnCode.BAD_PARAM_SIZE
    assert verify(tpm, b"\0\0") == verify(tpm, b"\0\1" + blob[2:]) == ReturnCode.BAD_PARAMETER
    assert verify(tpm, blob[:-1]) == verify(tpm, blob + b"\0") == ReturnCode.BAD_PARAM_SIZE
    # A key blob's permissions in an owner blob.
    assert verify(tpm, clear_blob(public(family, 1, kind=2))) == ReturnCode.INVALID_STRUCTURE
    assert verify(tpm, clear_blob(public(99, 1))) == ReturnCode.BADINDEX
    assert verify(tpm, with_count(blob, 2)) == ReturnCode.FAMILYCOUNT
    assert verify(tpm, flipped(blob)) == verify(tpm, flipped(blob, 4)) == ReturnCode.AUTHFAIL
    manage(tpm, ENABLE, family, OFF, owner_oiap(tpm)).ok()
    assert verify(tpm, blob) == ReturnCode.DISABLED_CMD


def test_every_flipped_byte_of_a_delegation_is_refused(owned, family):
    for blob in (owner_blob(owned.tpm, family), key_blob(owned.tpm, family, ALL_KEY)):
        for at in range(len(blob)):
            assert verify(owned.tpm, flipped(blob, at)) != 0, at


def test_delegation_of_another_owner_is_authfail(owned, family):
    blob = owner_blob(owned.tpm, family)
    owned.change("permanent", tpm_proof=sha1(b"of the next owner"))
    assert verify(owned.tpm, blob) == ReturnCode.AUTHFAIL


@pytest.mark.parametrize(
    ("additional", "sensitive"),
    [(b"", bytes(22)), (bytes(15), bytes(22)), (bytes(16), b""), (bytes(16), bytes(22))],
)
def test_proven_blob_without_a_secret_is_bad_parameter(owned, family, additional, sensitive):
    # Nobody but the TPM itself could make such a blob; a version of it that did otherwise, say.
    bare = u16(0x2A) + public(family, 1, count=1) + ZERO + sized(additional) + sized(sensitive)
    proof = hmac1(owned.state.permanent.tpm_proof, bare)
    blob = bare[:INTEGRITY_AT] + proof + bare[INTEGRITY_AT + 20 :]
    assert verify(owned.tpm, blob) == ReturnCode.BAD_PARAMETER
    assert dsap_request(owned.tpm, ET_BLOB, blob)[0].code == ReturnCode.BAD_DELEGATE
    code = load_owner(owned.tpm, 0, blob, owner_oiap(owned.tpm)).code
    assert code == ReturnCode.INVALID_STRUCTURE
