"""Saved keys and sessions (Part 3, §21.2, §21.3, §27.2, §27.5)."""

import pytest

from protocol.return_codes import ReturnCode
from protocol.wire import encode
from tests.tpm12.delegation_makers import (
    DEL_AUTH,
    ENABLE,
    OFF,
    ON,
    by_blob,
    by_key,
    create_owner,
    key_blob,
    load_owner,
    manage,
    new_family,
    owner_blob,
    owner_oiap,
    owner_osap,
    public,
    srk_osap,
)
from tests.tpm12.makers import (
    AREA_AUTH,
    KEY_AUTH,
    aes_ctr,
    define,
    loaded,
    pcr_info,
    signing,
    storage,
)
from tests.tpm12.witness import (
    EK,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    frame,
    hmac1,
    number,
    parse_sized,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.contexts import SavedSession
from tpm12.daa import BLANK
from tpm12.keys import LoadedKey
from tpm12.profile import Profile

SAVE, LOAD, FLUSH, RESET = 0xB8, 0xB9, 0xBA, 0x5A
SAVE_KEY, LOAD_KEY, SAVE_AUTH, LOAD_AUTH = 0xB4, 0xB5, 0xB6, 0xB7
KEY, AUTH, TRANS, CONTEXT, DAA = 1, 2, 4, 5, 8
SIGN, OWNER_READ_PUBEK, CHANGE_AUTH_OWNER = 0x3C, 0x7D, 0x10
ESTABLISH, EXECUTE, NV_READ_AUTH, INCREMENT = 0xE6, 0xE7, 0xD0, 0xDD
ET_KEY, ET_OWNER, ET_SRK, ET_COUNTER, ET_NV = 0x01, 0x02, 0x04, 0x0A, 0x0B
LABEL = b"sixteen bytes of"
VOLATILE = 0x04
COUNT_AT, INTEGRITY_AT, IV_AT = 26, 30, 54
TRANS_SECRET = sha1(b"transport secret")


def save(tpm, handle, kind, label=LABEL):
    """TPM_SaveContext."""
    return tpm.send(SAVE, u32(handle) + u32(kind) + label)


def saved(tpm, handle, kind, label=LABEL):
    """What TPM_SaveContext gives."""
    return blob_of(save(tpm, handle, kind, label))


def blob_of(answer):
    blob, rest = parse_sized(answer.ok())
    assert not rest
    return blob


def load(tpm, blob, entity=0, *, keep=True):
    """TPM_LoadContext."""
    return tpm.send(LOAD, u32(entity) + u8(keep) + sized(blob))


def flush(tpm, handle, kind):
    return tpm.send(FLUSH, u32(handle) + u32(kind)).code


def sign(tpm, handle, session=None):
    session = session or tpm.oiap(KEY_AUTH).ending()
    return tpm.auth(SIGN, sized(sha1(b"text")), session, handles=u32(handle))


def owner_pubek(tpm, session):
    return tpm.auth(OWNER_READ_PUBEK, b"", session)


def flipped(blob, at):
    altered = bytearray(blob)
    altered[at] ^= 1
    return bytes(altered)


def count_of(blob):
    return number(blob[COUNT_AT : COUNT_AT + 4])


@pytest.fixture
def signer(owned):
    """A loaded signing key."""
    return loaded(owned.tpm, signing())[0]


# -- the blob --------------------------------------------------------------------------------------


def test_blob_is_as_specified(owned, signer):
    blob = saved(owned.tpm, signer, KEY)
    permanent = owned.state.permanent
    assert blob[:COUNT_AT] == u16(1) + u32(KEY) + u32(signer) + LABEL
    iv, rest = parse_sized(blob[INTEGRITY_AT + 20 :])
    sensitive, rest = parse_sized(rest)
    assert not rest
    clear = aes_ctr(permanent.context_key, iv, sensitive)
    assert clear[:22] == u16(2) + owned.state.stclear.context_nonce_key
    internal, rest = parse_sized(clear[22:])
    assert not rest
    assert LoadedKey.from_bytes(internal).usage_auth == KEY_AUTH
    # The HMAC is over the clear text (Part 3 §21.2, action 11).
    bare = blob[:INTEGRITY_AT] + ZERO + sized(iv) + sized(clear)
    assert blob[INTEGRITY_AT : INTEGRITY_AT + 20] == hmac1(permanent.tpm_proof, bare)


def test_equal_contexts_look_different(owned, signer):
    first, second = saved(owned.tpm, signer, KEY), saved(owned.tpm, signer, KEY)
    assert first[:INTEGRITY_AT] == second[:INTEGRITY_AT]
    assert first[INTEGRITY_AT:][:20] != second[INTEGRITY_AT:][:20]
    assert first[IV_AT : IV_AT + 16] != second[IV_AT : IV_AT + 16]
    assert first[-40:] != second[-40:]


def test_context_holds_no_secret_in_clear(owned, signer):
    assert KEY_AUTH not in saved(owned.tpm, signer, KEY)
    session = owner_osap(owned.tpm)
    assert session.shared not in saved(owned.tpm, session.handle, AUTH)


def test_every_flipped_byte_is_refused(owned, signer):
    tpm = owned.tpm
    session = tpm.oiap()
    for blob in (saved(tpm, signer, KEY), saved(tpm, session.handle, AUTH)):
        for at in range(len(blob)):
            code = load(tpm, flipped(blob, at), keep=False).code
            allowed = {
                ReturnCode.BADCONTEXT,
                ReturnCode.INVALID_STRUCTURE,
                ReturnCode.INVALID_RESOURCE,
                ReturnCode.BAD_PARAM_SIZE,
            }
            assert code in allowed, at
    assert code == ReturnCode.BADCONTEXT
    load(tpm, blob).ok()


def test_context_of_another_owner_or_tpm_is_badcontext(owned, signer):
    blob = saved(owned.tpm, signer, KEY)
    for name, value in (("tpm_proof", sha1(b"another")), ("context_key", b"k" * 16)):
        before = getattr(owned.state.permanent, name)
        owned.change("permanent", **{name: value})
        assert load(owned.tpm, blob, keep=False).code == ReturnCode.BADCONTEXT
        owned.change("permanent", **{name: before})
    load(owned.tpm, blob, keep=False).ok()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda blob: blob[:-1], ReturnCode.BAD_PARAM_SIZE),
        (lambda blob: blob + b"\0", ReturnCode.BAD_PARAM_SIZE),
        (lambda _: b"", ReturnCode.BAD_PARAM_SIZE),
        (lambda blob: u16(2) + blob[2:], ReturnCode.INVALID_STRUCTURE),
        (lambda blob: blob[:2] + u32(3) + blob[6:], ReturnCode.BADCONTEXT),
        (lambda blob: blob[:2] + u32(AUTH) + blob[6:], ReturnCode.BADCONTEXT),
        (lambda blob: blob[: IV_AT - 4] + sized(b"") + blob[IV_AT + 16 :], ReturnCode.BADCONTEXT),
        (lambda blob: blob[: IV_AT + 16] + sized(b""), ReturnCode.BADCONTEXT),
    ],
)
def test_malformed_contexts(owned, signer, change, code):
    assert load(owned.tpm, change(saved(owned.tpm, signer, KEY))).code == code


def own_context(bench, kind, clear, count=0):
    """A context under the TPM's own keys, around anything."""
    head = u16(1) + u32(kind) + u32(0x77) + LABEL + u32(count)
    proof, key = bench.state.permanent.tpm_proof, bench.state.permanent.context_key
    iv = bytes(range(16))
    integrity = hmac1(proof, head, ZERO, sized(iv), sized(clear))
    return head + integrity + sized(iv) + sized(aes_ctr(key, iv, clear))


def test_own_context_of_another_version_is_badcontext(owned):
    nonces = owned.state.stclear.context_nonce_key, owned.state.stany.context_nonce_session
    for kind, nonce in zip((KEY, AUTH), nonces, strict=True):
        for clear in (b"", u16(3) + nonce + sized(b""), u16(2) + nonce + sized(b"unknown")):
            answer = load(owned.tpm, own_context(owned, kind, clear))
            assert answer.code == ReturnCode.BADCONTEXT


def test_keep_handle_other_than_a_boolean_is_bad_parameter(owned, signer):
    blob = saved(owned.tpm, signer, KEY)
    answer = owned.tpm.send(LOAD, u32(0) + b"\2" + sized(blob))
    assert answer.code == ReturnCode.BAD_PARAMETER


# -- keys ------------------------------------------------------------------------------------------


def test_saved_key_stays_and_comes_back(owned, signer):
    tpm = owned.tpm
    blob = saved(tpm, signer, KEY)
    assert count_of(blob) == 0
    assert owned.state.stany.context_list == {}
    sign(tpm, signer).ok()
    assert flush(tpm, signer, KEY) == 0
    assert load(tpm, blob).ok() == u32(signer)
    sign(tpm, signer).ok()


def test_key_comes_back_any_number_of_times(owned, signer):
    tpm = owned.tpm
    blob = saved(tpm, signer, KEY)
    handles = {number(load(tpm, blob, keep=False).ok()) for _ in range(3)}
    assert len(handles | {signer}) == 4
    for handle in handles:
        sign(tpm, handle).ok()


def test_key_that_cannot_keep_its_handle_puts_nobody_out(owned, signer):
    tpm = owned.tpm
    blob = saved(tpm, signer, KEY)
    before = owned.state.volatile
    assert load(tpm, blob).code == ReturnCode.BAD_HANDLE
    assert owned.state.volatile is before
    sign(tpm, signer).ok()
    while (answer := load(tpm, blob, keep=False)).code == 0:
        pass
    assert answer.code == ReturnCode.NOSPACE
    assert load(tpm, blob).code == ReturnCode.NOSPACE
    sign(tpm, signer).ok()


def test_handle_of_an_owner_evict_key_is_taken(owned, signer):
    blob = saved(owned.tpm, signer, KEY)
    key = owned.state.volatile.keys[signer]
    owned.change("volatile", keys={})
    owned.change("permanent", owner_evict_keys={signer: key})
    assert load(owned.tpm, blob).code == ReturnCode.BAD_HANDLE
    assert save(owned.tpm, signer, KEY).code == ReturnCode.OWNER_CONTROL
    assert owned.tpm.send(SAVE_KEY, u32(signer)).code == ReturnCode.OWNER_CONTROL


def test_context_of_a_key_survives_a_power_cycle(owned, signer):
    blob = saved(owned.tpm, signer, KEY)
    owned.power_cycle().ok()
    assert load(owned.tpm, blob).ok() == u32(signer)
    sign(owned.tpm, signer).ok()


def test_context_of_a_volatile_key_does_not(owned):
    handle, _ = loaded(owned.tpm, signing(flags=VOLATILE))
    blob = saved(owned.tpm, handle, KEY)
    flush(owned.tpm, handle, KEY)
    load(owned.tpm, blob).ok()
    owned.power_cycle().ok()
    assert load(owned.tpm, blob).code == ReturnCode.BADCONTEXT


def test_context_of_a_key_under_pcrs_does_not(owned):
    tpm = owned.tpm
    parent, _ = loaded(tpm, storage(pcr_info=pcr_info(10)))
    handle, _ = loaded(tpm, signing(), parent=parent, parent_auth=KEY_AUTH)
    of_parent, of_child = saved(tpm, parent, KEY), saved(tpm, handle, KEY)
    flush(tpm, handle, KEY)
    load(tpm, of_child).ok()
    owned.power_cycle().ok()
    assert load(tpm, of_child).code == ReturnCode.BADCONTEXT
    load(tpm, of_parent).ok()


def test_owner_clear_ends_contexts(owned, signer, owned_state):
    tpm = owned.tpm
    session = tpm.oiap()
    blobs = saved(tpm, signer, KEY), saved(tpm, session.handle, AUTH)
    tpm.auth(0x5B, b"", owner_oiap(tpm)).ok()
    owned.set_flags(disable=False)
    owned.change("stclear", deactivated=False)
    taken = owned_state.permanent
    owned.change("permanent", owner_auth=OWNER_AUTH, srk=taken.srk)
    for blob in blobs:
        assert load(tpm, blob).code == ReturnCode.BADCONTEXT


# -- what cannot be saved --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [0, 3, 5, 6, 7, 9, 10, 11, 0xFFFFFFFF])
def test_other_types_are_invalid_resource(owned, signer, kind):
    assert save(owned.tpm, signer, kind).code == ReturnCode.INVALID_RESOURCE


@pytest.mark.parametrize("kind", [KEY, AUTH, TRANS, DAA])
@pytest.mark.parametrize("handle", [0, 0x1234, SRK, EK])
def test_what_is_not_there_is_invalid_resource(owned, kind, handle):
    assert save(owned.tpm, handle, kind).code == ReturnCode.INVALID_RESOURCE


def test_handle_of_another_type_is_invalid_resource(owned, signer):
    session = owned.tpm.oiap()
    assert save(owned.tpm, signer, AUTH).code == ReturnCode.INVALID_RESOURCE
    assert save(owned.tpm, session.handle, KEY).code == ReturnCode.INVALID_RESOURCE
    assert save(owned.tpm, session.handle, TRANS).code == ReturnCode.INVALID_RESOURCE


# -- sessions --------------------------------------------------------------------------------------


def test_saved_session_is_gone_and_comes_back(owned):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    owner_pubek(tpm, session).ok()
    blob = saved(tpm, session.handle, AUTH)
    assert owned.state.stany.sessions == {}
    again = session.with_key(OWNER_AUTH)
    assert owner_pubek(tpm, again).code == ReturnCode.INVALID_AUTHHANDLE
    assert load(tpm, blob).ok() == u32(session.handle)
    owner_pubek(tpm, session).ok()


def test_session_comes_back_once(owned):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    blob = saved(tpm, session.handle, AUTH)
    load(tpm, blob).ok()
    for keep in (True, False):
        assert load(tpm, blob, keep=keep).code == ReturnCode.BADCONTEXT
    owner_pubek(tpm, session.ending()).ok()
    assert load(tpm, blob).code == ReturnCode.BADCONTEXT
    assert owned.state.stany.context_list == {}


def test_older_context_of_a_session_is_dead(owned):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    older = saved(tpm, session.handle, AUTH)
    load(tpm, older).ok()
    newer = saved(tpm, session.handle, AUTH)
    assert count_of(newer) == count_of(older) + 1
    assert load(tpm, older).code == ReturnCode.BADCONTEXT
    load(tpm, newer).ok()


def test_failed_load_leaves_the_context_good(owned):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    blob = saved(tpm, session.handle, AUTH)
    for _ in range(16):
        tpm.oiap()
    assert load(tpm, blob).code == ReturnCode.RESOURCES
    tpm.send(RESET).ok()
    load(tpm, blob).ok()
    owner_pubek(tpm, session).ok()


@pytest.mark.parametrize("table", ["sessions", "transport_sessions", "daa_sessions"])
def test_session_whose_handle_is_taken_gets_another(owned, table):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    other = owned.state.stany.sessions[session.handle]
    blob = saved(tpm, session.handle, AUTH)
    owned.change("stany", **{table: {session.handle: other}})
    assert load(tpm, blob).code == ReturnCode.BAD_HANDLE
    handle = number(load(tpm, blob, keep=False).ok())
    assert handle != session.handle
    owner_pubek(tpm, Session(handle, session.even, OWNER_AUTH)).ok()
    assert getattr(owned.state.stany, table)[session.handle] is other


def test_start_up_ends_contexts_of_sessions(owned):
    session = owned.tpm.oiap()
    blob = saved(owned.tpm, session.handle, AUTH)
    owned.power_cycle().ok()
    assert owned.state.stany.context_list == {}
    assert load(owned.tpm, blob).code == ReturnCode.BADCONTEXT
    # Not even when the list says otherwise.
    owned.change("stany", context_list={0: count_of(blob)})
    assert load(owned.tpm, blob).code == ReturnCode.BADCONTEXT


def test_flushed_context_is_dead(owned):
    tpm = owned.tpm
    blobs = [saved(tpm, tpm.oiap().handle, AUTH) for _ in range(3)]
    assert flush(tpm, count_of(blobs[1]), CONTEXT) == 0
    assert flush(tpm, count_of(blobs[1]), CONTEXT) == ReturnCode.BAD_PARAMETER
    assert [load(tpm, blob).code for blob in blobs] == [0, ReturnCode.BADCONTEXT, 0]


def test_contexts_are_listed_by_count(owned):
    tpm = owned.tpm
    counts = [count_of(saved(tpm, tpm.oiap().handle, AUTH)) for _ in range(3)]
    listed = tpm.capability(0x14, u32(CONTEXT))
    assert listed == u16(3) + b"".join(map(u32, counts))


# -- what a session is bound to --------------------------------------------------------------------


def test_session_of_a_key_needs_that_key(owned, signer):
    tpm = owned.tpm
    other, _ = loaded(tpm, signing())
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    key, blob = saved(tpm, signer, KEY), saved(tpm, session.handle, AUTH)
    for entity, code in (
        (0, ReturnCode.BAD_HANDLE),
        (0x1234, ReturnCode.BAD_HANDLE),
        (EK, ReturnCode.BAD_HANDLE),
        (other, ReturnCode.RESOURCEMISSING),
        (SRK, ReturnCode.RESOURCEMISSING),
    ):
        assert load(tpm, blob, entity).code == code
    flush(tpm, signer, KEY)
    assert load(tpm, blob, signer).code == ReturnCode.BAD_HANDLE
    load(tpm, key).ok()
    load(tpm, blob, signer).ok()
    sign(tpm, signer, session).ok()


def test_session_follows_its_key_to_another_handle(owned, signer):
    tpm = owned.tpm
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    key, blob = saved(tpm, signer, KEY), saved(tpm, session.handle, AUTH)
    moved = number(load(tpm, key, keep=False).ok())
    flush(tpm, signer, KEY)
    load(tpm, blob, moved).ok()
    sign(tpm, moved, session).ok()
    flush(tpm, moved, KEY)
    assert session.handle not in owned.state.stany.sessions


@pytest.mark.parametrize("entity_type", [ET_SRK, ET_KEY])
@pytest.mark.parametrize("entity", [0, SRK, 0x1234])
def test_srk_is_always_there(owned, entity_type, entity):
    tpm = owned.tpm
    session = tpm.osap(entity_type, SRK, SRK_AUTH)
    load(tpm, saved(tpm, session.handle, AUTH), entity).ok()
    owned.set_flags(read_srk_pub=True)
    tpm.auth(0x21, b"", session, handles=u32(SRK)).ok()


def test_session_of_the_srk_ends_with_its_secret(owned):
    tpm = owned.tpm
    session = srk_osap(tpm)
    blob = saved(tpm, session.handle, AUTH)
    osap = owner_osap(tpm)
    tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(KEY_AUTH) + u16(ET_SRK), osap).ok()
    assert load(tpm, blob, SRK).code == ReturnCode.RESOURCEMISSING


def test_session_of_the_owner_ends_with_its_secret(owned):
    tpm = owned.tpm
    first, second = owner_osap(tpm), owner_osap(tpm)
    blobs = saved(tpm, first.handle, AUTH), saved(tpm, second.handle, AUTH)
    load(tpm, blobs[0]).ok()
    owner_pubek(tpm, first).ok()
    osap = owner_osap(tpm)
    tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(KEY_AUTH) + u16(ET_OWNER), osap).ok()
    assert load(tpm, blobs[1]).code == ReturnCode.RESOURCEMISSING


@pytest.mark.parametrize("what", [ET_OWNER, ET_SRK])
def test_saved_session_of_the_owner_ends_with_either_secret_and_for_good(owned, what):
    """Part 3 §17.2, action 8: active or saved; also when the old secret comes back."""
    tpm = owned.tpm
    blob = saved(tpm, owner_osap(tpm).handle, AUTH)
    secret = {ET_OWNER: OWNER_AUTH, ET_SRK: SRK_AUTH}[what]
    codes = []
    for current, new in ((OWNER_AUTH, KEY_AUTH), (KEY_AUTH, secret)):
        osap = owner_osap(tpm, current if what == ET_OWNER else OWNER_AUTH)
        tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(new) + u16(what), osap).ok()
        codes.append(load(tpm, blob).code)
    # While the owner is not who it was bound to, that is what is missing.
    first = ReturnCode.RESOURCEMISSING if what == ET_OWNER else ReturnCode.BADCONTEXT
    assert codes == [first, ReturnCode.BADCONTEXT]


def test_saved_legacy_session_of_the_owner_ends_with_the_srks_secret(owned):
    tpm = owned.tpm
    blob = tpm.send(SAVE_AUTH, u32(owner_osap(tpm).handle)).ok()
    osap = owner_osap(tpm)
    tpm.auth(CHANGE_AUTH_OWNER, u16(4) + osap.masked(KEY_AUTH) + u16(ET_SRK), osap).ok()
    assert tpm.send(LOAD_AUTH, blob).code == ReturnCode.BADCONTEXT


def test_session_of_an_area_needs_that_area(owned):
    tpm = owned.tpm
    define(tpm, 0x1000, 0x40004, 4, as_owner=True).ok()
    session = tpm.osap(ET_NV, 0x1000, AREA_AUTH)
    load(tpm, saved(tpm, session.handle, AUTH), 0x1000).ok()
    tpm.auth(NV_READ_AUTH, u32(0x1000) + u32(0) + u32(4), session).ok()
    blob = saved(tpm, session.handle, AUTH)
    define(tpm, 0x1000, 0x40004, 4, as_owner=True, secret=KEY_AUTH).ok()
    assert load(tpm, blob, 0x1000).code == ReturnCode.RESOURCEMISSING
    define(tpm, 0x1000, 0x40004, 0, as_owner=True).ok()
    assert load(tpm, blob, 0x1000).code == ReturnCode.RESOURCEMISSING


def test_session_of_a_counter_needs_that_counter(owned):
    tpm = owned.tpm
    osap = owner_osap(tpm)
    counter = tpm.auth(0xDC, osap.masked(AREA_AUTH) + b"cntr", osap).ok()[:4]
    session = tpm.osap(ET_COUNTER, number(counter), AREA_AUTH)
    load(tpm, saved(tpm, session.handle, AUTH), number(counter)).ok()
    tpm.auth(INCREMENT, counter, session).ok()
    blob = saved(tpm, session.handle, AUTH)
    tpm.auth(0xE0, counter, owner_oiap(tpm)).ok()
    assert load(tpm, blob, number(counter)).code == ReturnCode.RESOURCEMISSING


# -- delegated sessions ----------------------------------------------------------------------------


def test_delegated_sessions_come_back(owned, signer):
    tpm = owned.tpm
    family = new_family(tpm)
    by_owner = by_blob(tpm, owner_blob(tpm, family))
    osap = tpm.osap(ET_KEY, signer, KEY_AUTH)
    of_key = by_key(tpm, key_blob(tpm, family, handle=signer, session=osap), signer)
    blobs = saved(tpm, by_owner.handle, AUTH), saved(tpm, of_key.handle, AUTH)
    load(tpm, blobs[0]).ok()
    owner_pubek(tpm, by_owner).ok()
    assert load(tpm, blobs[1], SRK).code == ReturnCode.RESOURCEMISSING
    load(tpm, blobs[1], signer).ok()
    sign(tpm, signer, of_key).ok()
    assert tpm.auth(0x66, b"", by_owner).code == ReturnCode.AUTHFAIL  # permissions came too


@pytest.mark.parametrize("change", ["manage", "increment", "load"])
def test_what_ends_delegated_sessions_ends_saved_ones(owned, change):
    tpm = owned.tpm
    family = new_family(tpm)
    delegation = owner_blob(tpm, family)
    session, oiap, osap = by_blob(tpm, delegation), tpm.oiap(OWNER_AUTH), owner_osap(tpm)
    blobs = [saved(tpm, each.handle, AUTH) for each in (session, osap, oiap)]
    if change == "manage":
        manage(tpm, ENABLE, family, OFF, owner_oiap(tpm)).ok()
        manage(tpm, ENABLE, family, ON, owner_oiap(tpm)).ok()
    elif change == "increment":
        create_owner(tpm, public(family, 1), increment=True).ok()
    else:
        load_owner(tpm, 0, delegation, owner_oiap(tpm)).ok()
    codes = [load(tpm, blob).code for blob in blobs]
    assert codes == [ReturnCode.BADCONTEXT, ReturnCode.BADCONTEXT, 0]


# -- limits ----------------------------------------------------------------------------------------


def test_full_list_is_nocontextspace(owned):
    tpm = owned.tpm
    blobs = [saved(tpm, tpm.oiap().handle, AUTH) for _ in range(Profile().saved_contexts)]
    assert tpm.capability(5, u32(0x112)) == u32(0)
    session = tpm.oiap(OWNER_AUTH)
    assert save(tpm, session.handle, AUTH).code == ReturnCode.NOCONTEXTSPACE
    owner_pubek(tpm, session).ok()  # it is still there
    load(tpm, blobs[70]).ok()
    save(tpm, session.handle, AUTH).ok()


def test_last_count_is_toomanycontexts(owned):
    tpm = owned.tpm
    owned.change("stany", context_count=0xFFFFFFFE)
    assert count_of(saved(tpm, tpm.oiap().handle, AUTH)) == 0xFFFFFFFF
    session = tpm.oiap()
    assert save(tpm, session.handle, AUTH).code == ReturnCode.TOOMANYCONTEXTS
    assert session.handle in owned.state.stany.sessions


def test_gap_to_the_oldest_context_is_limited(make_bench, owned_state):
    bench = make_bench(owned_state, Profile(context_distance=3))
    tpm = bench.tpm
    assert tpm.capability(5, u32(0x11B)) == u32(3)
    oldest, second = (saved(tpm, tpm.oiap().handle, AUTH) for _ in range(2))
    for _ in range(2):
        load(tpm, saved(tpm, tpm.oiap().handle, AUTH)).ok()
    session = tpm.oiap()
    assert save(tpm, session.handle, AUTH).code == ReturnCode.CONTEXT_GAP
    load(tpm, oldest).ok()
    save(tpm, session.handle, AUTH).ok()
    load(tpm, second).ok()


def test_distance_is_no_limit_by_default(owned):
    tpm = owned.tpm
    saved(tpm, tpm.oiap().handle, AUTH)
    owned.change("stany", context_count=0xFFFFFFF0)
    saved(tpm, tpm.oiap().handle, AUTH)


# -- transport and DAA sessions --------------------------------------------------------------------


def established(tpm, attributes=0):
    """A transport session whose secret came in clear: handle and nonceEven."""
    public_part = u16(0x1E) + u32(attributes) + u32(0) + u16(1)
    out = tpm.send(ESTABLISH, u32(0x40000003) + public_part + sized(TRANS_SECRET)).ok()
    return number(out[:4]), out[-20:]


def executed(tpm, handle, even, request, *, handles=0):
    """TPM_ExecuteTransport of a command without sessions: code, and the next nonceEven.

    `handles`: bytes of handles in the request.
    """
    odd = tpm.nonce()
    hashed = request[6:10] + request[10 + handles :]
    digest = sha1(u32(EXECUTE), u32(len(request)), sha1(hashed))
    mac = hmac1(TRANS_SECRET, digest, even, odd, b"\1")
    body = sized(request) + u32(handle) + odd + b"\1" + mac
    answer = tpm.send(EXECUTE, body, tag=0xC2)
    return answer.code, answer.body[-41:-21]


def test_transport_session_comes_back(owned):
    tpm = owned.tpm
    handle, even = established(tpm)
    request = frame(0xF1)
    code, even = executed(tpm, handle, even, request)
    assert code == 0
    blob = saved(tpm, handle, TRANS)
    assert executed(tpm, handle, even, request)[0] == ReturnCode.INVALID_AUTHHANDLE
    assert load(tpm, blob).ok() == u32(handle)
    assert load(tpm, blob, keep=False).code == ReturnCode.BADCONTEXT
    assert executed(tpm, handle, even, request)[0] == 0


def test_exclusiveness_does_not_outlive_the_session(owned):
    handle, _ = established(owned.tpm, attributes=4)
    assert owned.state.stany.transport_exclusive == handle
    assert save(owned.tpm, handle, TRANS).code == ReturnCode.INVALID_RESOURCE
    assert owned.state.stany.transport_exclusive == 0


def test_exclusive_session_may_save_itself(owned):
    tpm = owned.tpm
    handle, even = established(tpm, attributes=4)
    request = frame(SAVE, u32(handle) + u32(TRANS) + LABEL)
    assert executed(tpm, handle, even, request, handles=4)[0] == 0
    assert owned.state.stany.transport_sessions == {}
    assert owned.state.stany.transport_exclusive == 0
    assert len(owned.state.stany.context_list) == 1


def test_no_slot_for_a_transport_session_is_resources(owned):
    tpm = owned.tpm
    handle, _ = established(tpm)
    blob = saved(tpm, handle, TRANS)
    for _ in range(Profile().transport_sessions):
        established(tpm)
    assert load(tpm, blob).code == ReturnCode.RESOURCES
    owned.change("stany", transport_sessions={})
    load(tpm, blob).ok()


def test_daa_session_comes_back(owned):
    tpm = owned.tpm
    owned.change("stany", daa_sessions={0x99: BLANK})
    blob = saved(tpm, 0x99, DAA)
    assert owned.state.stany.daa_sessions == {}
    owned.change("stany", daa_sessions={1: BLANK, 2: BLANK})
    assert load(tpm, blob).code == ReturnCode.RESOURCES
    owned.change("stany", daa_sessions={})
    load(tpm, blob).ok()
    assert owned.state.stany.daa_sessions == {0x99: BLANK}
    assert load(tpm, blob, keep=False).code == ReturnCode.BADCONTEXT


# -- of 1.1 age ------------------------------------------------------------------------------------


def save_key(tpm, handle):
    """What TPM_SaveKeyContext gives."""
    return blob_of(tpm.send(SAVE_KEY, u32(handle)))


def save_auth(tpm, handle):
    """What TPM_SaveAuthContext gives."""
    return blob_of(tpm.send(SAVE_AUTH, u32(handle)))


def load_key(tpm, blob):
    return tpm.send(LOAD_KEY, sized(blob))


def load_auth(tpm, blob):
    return tpm.send(LOAD_AUTH, sized(blob))


def test_legacy_key_is_unloaded_and_comes_back(owned, signer):
    tpm = owned.tpm
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    blob = save_key(tpm, signer)
    assert sign(tpm, signer).code == ReturnCode.INVALID_KEYHANDLE
    assert session.handle not in owned.state.stany.sessions
    assert load_key(tpm, blob).ok() == u32(signer)
    sign(tpm, signer).ok()
    again = number(load_key(tpm, blob).ok())
    assert again != signer
    sign(tpm, again).ok()


@pytest.mark.parametrize("handle", [0, 0x1234, SRK, EK])
def test_legacy_key_that_is_not_there_is_invalid_keyhandle(owned, handle):
    assert owned.tpm.send(SAVE_KEY, u32(handle)).code == ReturnCode.INVALID_KEYHANDLE


def test_legacy_key_ends_with_the_start_up(owned, signer):
    blob = save_key(owned.tpm, signer)
    owned.power_cycle().ok()
    assert load_key(owned.tpm, blob).code == ReturnCode.BADCONTEXT


def test_legacy_key_needs_a_slot(owned, signer):
    blob = save_key(owned.tpm, signer)
    while (answer := load_key(owned.tpm, blob)).code == 0:
        pass
    assert answer.code == ReturnCode.NOSPACE


def test_legacy_session_comes_back_once(owned):
    tpm = owned.tpm
    session = tpm.oiap(OWNER_AUTH)
    blob = save_auth(tpm, session.handle)
    assert tpm.send(SAVE_AUTH, u32(session.handle)).code == ReturnCode.INVALID_AUTHHANDLE
    assert load_auth(tpm, blob).ok() == u32(session.handle)
    assert load_auth(tpm, blob).code == ReturnCode.BADCONTEXT
    owner_pubek(tpm, session).ok()
    assert owned.state.stany.legacy_contexts == {}


def test_legacy_session_finds_its_key(owned):
    tpm = owned.tpm
    _, signer = loaded(tpm, signing())[0], loaded(tpm, signing())[0]
    for entity_type, handle, secret in ((ET_KEY, signer, KEY_AUTH), (ET_SRK, SRK, SRK_AUTH)):
        session = tpm.osap(entity_type, handle, secret)
        load_auth(tpm, save_auth(tpm, session.handle)).ok()
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    blob, key = save_auth(tpm, session.handle), saved(tpm, signer, KEY)
    flush(tpm, signer, KEY)
    assert load_auth(tpm, blob).code == ReturnCode.RESOURCEMISSING
    moved = number(load(tpm, key, keep=False).ok())
    load_auth(tpm, blob).ok()
    sign(tpm, moved, session).ok()


def test_legacy_session_finds_an_owner_evict_key(owned, signer):
    tpm = owned.tpm
    session = tpm.osap(ET_KEY, signer, KEY_AUTH)
    blob = save_auth(tpm, session.handle)
    owned.change("permanent", owner_evict_keys={signer: owned.state.volatile.keys[signer]})
    owned.change("volatile", keys={})
    load_auth(tpm, blob).ok()


def test_legacy_session_shares_list_and_limits(owned):
    tpm = owned.tpm
    blob = save_auth(tpm, tpm.oiap().handle)
    assert owned.state.stany.context_list == {count_of(blob): count_of(blob)}
    assert flush(tpm, count_of(blob), CONTEXT) == 0
    assert load_auth(tpm, blob).code == ReturnCode.BADCONTEXT
    blob = save_auth(tpm, tpm.oiap().handle)
    for _ in range(16):
        tpm.oiap()
    assert load_auth(tpm, blob).code == ReturnCode.RESOURCES


def test_legacy_and_new_contexts_do_not_mix(owned, signer):
    tpm = owned.tpm
    first, second = tpm.oiap(), tpm.oiap()
    key, auth = saved(tpm, signer, KEY), saved(tpm, first.handle, AUTH)
    legacy_auth, legacy_key = save_auth(tpm, second.handle), save_key(tpm, signer)
    assert load_key(tpm, legacy_auth).code == ReturnCode.BAD_PARAMETER
    assert load_auth(tpm, legacy_key).code == ReturnCode.BAD_PARAMETER
    assert load_key(tpm, key).code == ReturnCode.BADCONTEXT
    assert load_auth(tpm, auth).code == ReturnCode.BADCONTEXT
    assert load(tpm, legacy_key).code == ReturnCode.BADCONTEXT
    assert load(tpm, legacy_auth).code == ReturnCode.BADCONTEXT


def test_reset_ends_legacy_contexts_and_no_others(owned, signer):
    tpm = owned.tpm
    other, _ = loaded(tpm, signing())
    first, second = tpm.oiap(), tpm.oiap()
    kept = saved(tpm, other, KEY), saved(tpm, first.handle, AUTH)
    ended = save_auth(tpm, second.handle), save_key(tpm, signer)
    tpm.send(RESET).ok()
    assert len(owned.state.stany.context_list) == 1
    assert load_auth(tpm, ended[0]).code == ReturnCode.BADCONTEXT
    assert load_key(tpm, ended[1]).code == ReturnCode.BADCONTEXT
    load(tpm, kept[0], keep=False).ok()
    load(tpm, kept[1]).ok()
    sign(tpm, other).ok()


def test_forgotten_legacy_counts_do_not_pile_up(owned):
    tpm = owned.tpm
    for _ in range(3):
        save_auth(tpm, tpm.oiap().handle)
        owned.change("stany", context_list={})  # as a clear of the owner does
    assert len(owned.state.stany.legacy_contexts) <= 2


# -- before there is an owner


def test_nothing_is_saved_under_the_factorys_keys(with_ek):
    tpm = with_ek.tpm
    assert with_ek.state.permanent.context_key == bytes(16)
    session = tpm.oiap()
    blob = save_auth(tpm, session.handle)
    assert with_ek.last.permanent_changed
    permanent = with_ek.state.permanent
    assert permanent.context_key != bytes(16)
    assert permanent.tpm_proof != ZERO
    assert load_auth(tpm, blob).ok() == u32(session.handle)
    again = save_auth(tpm, session.handle)
    assert not with_ek.last.permanent_changed
    load_auth(tpm, again).ok()


def test_nothing_is_loaded_under_the_factorys_keys(owned):
    # Who knows these keys (everybody does) could make a session with any shared secret.
    tpm = owned.tpm
    owned.change("permanent", context_key=bytes(16), tpm_proof=ZERO)
    session, count = owner_osap(tpm), 7
    internal = encode(
        SavedSession(
            session=owned.state.stany.sessions[session.handle],
            binding=sha1(b"owner", OWNER_AUTH),
            delegation_changes=0,
        )
    )
    tpm.send(RESET).ok()
    owned.change("stany", context_list={count: count})
    clear = u16(2) + owned.state.stany.context_nonce_session + sized(internal)
    assert load(tpm, own_context(owned, AUTH, clear, count)).code == ReturnCode.BADCONTEXT
    # Under keys that nobody else knows the same is as good as the TPM's own.
    owned.change("permanent", context_key=b"contextKey bytes", tpm_proof=sha1(b"proof"))
    load(tpm, own_context(owned, AUTH, clear, count)).ok()


def test_saved_delegate_needs_its_secret(owned):
    tpm = owned.tpm
    session = by_blob(tpm, owner_blob(tpm, new_family(tpm)), secret=DEL_AUTH)
    load(tpm, saved(tpm, session.handle, AUTH)).ok()
    assert owner_pubek(tpm, session.with_key(ZERO)).code == ReturnCode.AUTHFAIL
