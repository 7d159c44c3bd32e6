"""TPM_NV_DefineSpace: each check in its order, each return code, and what is stored."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import OWNER_AUTH, SRK_AUTH
from tests.tpm12.makers import (
    AREA_AUTH,
    ET_NV,
    ET_OWNER,
    ET_SRK,
    NV_DEFINE_SPACE,
    NV_LOCK,
    WRONG,
    area_info,
    define,
    lock_nv,
    nv_public,
)
from tests.tpm12.nv_makers import (
    AUTHREAD,
    AUTHWRITE,
    D_INDEX,
    DIR,
    GLOBALLOCK,
    INDEX,
    OWNERREAD,
    OWNERWRITE,
    PPREAD,
    PPWRITE,
    READ_STCLEAR,
    SIZE,
    TRIAL,
    UNUSED,
    WRITE_STCLEAR,
    WRITEALL,
    WRITEDEFINE,
    data_of,
    owners,
    read,
    write,
    write_as,
)
from tests.tpm12.witness import SRK, ZERO, selection, sized, u16
from tpm12.profile import Profile

# -- NV_DefineSpace --------------------------------------------------------------------------------


def test_define_makes_an_area_of_ones(locked):
    owners(locked, OWNERWRITE).ok()
    assert locked.last.permanent_changed
    area = locked.state.permanent.nv[INDEX]
    assert (area.data, area.auth_value) == (UNUSED, AREA_AUTH)
    assert read(locked.tpm).ok() == sized(UNUSED)


def test_define_ignores_the_locks_in_what_it_is_given(locked):
    session = locked.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    public = nv_public(INDEX, OWNERWRITE, SIZE)
    public = public[:-7] + b"\1\1\1" + public[-4:]
    locked.tpm.auth(NV_DEFINE_SPACE, public + session.masked(AREA_AUTH), session).ok()
    stored = locked.state.permanent.nv[INDEX].public
    assert not stored.b_read_stclear
    assert not stored.b_write_stclear
    assert not stored.b_write_define


def test_define_ends_its_session(locked):
    owners(locked, OWNERWRITE).ok()
    owners(locked, OWNERWRITE, size=0).ok()
    assert locked.state.stany.sessions == {}


def test_define_without_session_takes_the_secret_in_clear(fresh):
    define(fresh.tpm, INDEX, AUTHWRITE, SIZE, secret=b"s" * 20).ok()
    assert fresh.state.permanent.nv[INDEX].auth_value == b"s" * 20


def test_define_again_makes_a_new_area(locked):
    owners(locked, OWNERWRITE).ok()
    write_as(locked.tpm, OWNER_AUTH, b"old").ok()
    owners(locked, PPWRITE, size=4).ok()
    assert data_of(locked) == UNUSED[:4]
    assert locked.state.permanent.nv[INDEX].public.permission.attributes == PPWRITE


def test_define_again_that_fails_leaves_the_old_area(locked):
    owners(locked, OWNERWRITE).ok()
    write_as(locked.tpm, OWNER_AUTH, b"old data").ok()
    before = locked.state.permanent
    assert owners(locked, OWNERWRITE | AUTHWRITE).code == ReturnCode.AUTH_CONFLICT
    assert owners(locked, 0).code == ReturnCode.PER_NOWRITE
    assert owners(locked, OWNERWRITE, size=1 << 20).code == ReturnCode.NOSPACE
    assert locked.state.permanent is before


def test_define_with_size_0_deletes(locked):
    owners(locked, OWNERWRITE).ok()
    owners(locked, 0, size=0).ok()
    assert locked.state.permanent.nv == {}
    assert owners(locked, OWNERWRITE, size=0).code == ReturnCode.BAD_PARAM_SIZE


def test_define_ends_the_sessions_bound_to_the_old_area(locked):
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    owners(locked, AUTHWRITE | AUTHREAD, index=INDEX + 1).ok()
    bound = locked.tpm.osap(ET_NV, INDEX, AREA_AUTH)
    other = locked.tpm.osap(ET_NV, INDEX + 1, AREA_AUTH)
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    assert bound.handle not in locked.state.stany.sessions
    assert other.handle in locked.state.stany.sessions


def test_define_forgets_the_old_areas_locks(locked):
    owners(locked, OWNERWRITE | READ_STCLEAR).ok()
    read(locked.tpm, 0).ok()
    assert read(locked.tpm).code == ReturnCode.DISABLED_CMD
    owners(locked, OWNERWRITE | READ_STCLEAR).ok()
    read(locked.tpm).ok()
    assert locked.state.stclear.nv_read_locked == {}
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    owners(locked, OWNERWRITE).ok()
    assert locked.state.stclear.nv_write_locked == {}


def test_trial_checks_everything_and_stores_nothing(locked):
    before = locked.state.permanent
    owners(locked, OWNERWRITE, index=TRIAL).ok()
    assert owners(locked, 0, index=TRIAL).code == ReturnCode.PER_NOWRITE
    assert owners(locked, OWNERWRITE, 1 << 20, TRIAL).code == ReturnCode.NOSPACE
    assert locked.state.permanent is before


def test_lock_sets_nv_locked_for_ever(fresh):
    assert lock_nv(fresh.tpm).ok() == b""
    assert fresh.state.permanent.flags.nv_locked
    assert fresh.last.permanent_changed
    lock_nv(fresh.tpm).ok()
    assert not fresh.last.permanent_changed


def test_lock_with_a_size_or_a_session_is_badindex(owned):
    answer = owned.tpm.send(NV_DEFINE_SPACE, nv_public(NV_LOCK, 0, 1) + ZERO)
    assert answer.code == ReturnCode.BADINDEX
    assert owners(owned, PPWRITE, index=NV_LOCK).code == ReturnCode.BADINDEX
    assert not owned.state.permanent.flags.nv_locked


def test_index_0_is_never_defined(owned):
    assert define(owned.tpm, 0, PPWRITE, SIZE).code == ReturnCode.BADINDEX
    assert owners(owned, PPWRITE, index=0).code == ReturnCode.BADINDEX
    # The index is looked at before the secret.
    session = owned.tpm.osap(ET_OWNER, 0, WRONG)
    answer = owned.tpm.auth(NV_DEFINE_SPACE, nv_public(0, PPWRITE, SIZE) + ZERO, session)
    assert answer.code == ReturnCode.BADINDEX


@pytest.mark.parametrize("index", [DIR, 0x0100F000, 0x0F000001, 0x00011600, 0x000116FF])
def test_define_of_an_index_that_is_not_served(owned, index):
    assert owners(owned, OWNERWRITE, index=index).code == ReturnCode.BADINDEX


@pytest.mark.parametrize(
    "index", [1, INDEX, 0x0000F000, 0x00020001, 0x20000001, 0x40000001, 0x80000001, 0x00011700]
)
def test_define_of_an_index_that_is_served(locked, index):
    owners(locked, OWNERWRITE, index=index).ok()


def test_d_bit_areas_are_fixed_once_nv_is_locked(owned):
    define(owned.tpm, D_INDEX, PPWRITE, SIZE).ok()
    define(owned.tpm, D_INDEX, PPWRITE, 0).ok()
    define(owned.tpm, D_INDEX, PPWRITE, SIZE).ok()
    lock_nv(owned.tpm).ok()
    for size in (0, SIZE):
        assert owners(owned, PPWRITE, size, D_INDEX).code == ReturnCode.BADINDEX
        assert define(owned.tpm, D_INDEX, PPWRITE, size).code == ReturnCode.BADINDEX


def test_define_sessions(locked):
    tpm, params = locked.tpm, nv_public(INDEX, OWNERWRITE, SIZE) + ZERO
    codes = [
        tpm.auth(NV_DEFINE_SPACE, params, session).code
        for session in (
            tpm.oiap(OWNER_AUTH),
            tpm.osap(ET_OWNER, 0, WRONG),
            tpm.osap(ET_SRK, SRK, SRK_AUTH),
        )
    ]
    assert codes == [ReturnCode.BAD_MODE, ReturnCode.AUTHFAIL, ReturnCode.AUTHFAIL]


def test_define_session_is_checked_before_nv_is_locked_too(owned):
    session = owned.tpm.osap(ET_OWNER, 0, WRONG)
    params = nv_public(INDEX, OWNERWRITE, SIZE) + ZERO
    assert owned.tpm.auth(NV_DEFINE_SPACE, params, session).code == ReturnCode.AUTHFAIL


def test_define_without_session_needs_presence_then_no_owner_then_a_size(locked):
    assert define(locked.tpm, INDEX, PPWRITE, 0).code == ReturnCode.BAD_PRESENCE
    locked.present()
    assert define(locked.tpm, INDEX, PPWRITE, 0).code == ReturnCode.OWNER_SET
    locked.change("permanent", owner_auth=None)
    assert define(locked.tpm, INDEX, PPWRITE, 0).code == ReturnCode.BAD_DATASIZE
    define(locked.tpm, INDEX, PPWRITE, SIZE).ok()


@pytest.mark.parametrize(
    ("attributes", "code"),
    [
        (OWNERWRITE | AUTHWRITE, ReturnCode.AUTH_CONFLICT),
        (OWNERREAD | AUTHREAD | PPWRITE, ReturnCode.AUTH_CONFLICT),
        (0, ReturnCode.PER_NOWRITE),
        (GLOBALLOCK | WRITE_STCLEAR | WRITEALL, ReturnCode.PER_NOWRITE),
        (PPREAD | OWNERREAD | READ_STCLEAR, ReturnCode.PER_NOWRITE),
        (OWNERWRITE | AUTHREAD, ReturnCode.SUCCESS),
        (AUTHWRITE | OWNERREAD, ReturnCode.SUCCESS),
        (WRITEDEFINE, ReturnCode.SUCCESS),
        (PPWRITE, ReturnCode.SUCCESS),
    ],
)
def test_define_attributes(locked, attributes, code):
    assert owners(locked, attributes).code == code


def test_define_with_limited_write_localities_needs_no_other_guard(locked):
    """The specification looks at who may write; libtpms looks at who may read, by mistake."""
    owners(locked, 0, write=area_info(localities=0x02)).ok()
    reading = owners(locked, 0, read=area_info(localities=0x02))
    assert reading.code == ReturnCode.PER_NOWRITE


@pytest.mark.parametrize(
    ("infos", "code"),
    [
        ({"read": area_info(localities=0)}, ReturnCode.INVALID_STRUCTURE),
        ({"write": area_info(localities=0x20)}, ReturnCode.INVALID_STRUCTURE),
        ({"read": area_info(selection(1, size=4))}, ReturnCode.INVALID_PCR_INFO),
    ],
)
def test_define_with_malformed_pcr_infos(owned, infos, code):
    assert owners(owned, PPWRITE, **infos).code == code


def test_define_with_malformed_structures(owned):
    public = nv_public(INDEX, PPWRITE, SIZE)
    tag = define_raw(owned.tpm, u16(0x19) + public[2:])
    attributes = define_raw(owned.tpm, public[:-13] + u16(0x18) + public[-11:])
    bool_value = define_raw(owned.tpm, public[:-7] + b"\2" + public[-6:])
    expected = [ReturnCode.INVALID_STRUCTURE] * 2 + [ReturnCode.BAD_PARAMETER]
    assert [answer.code for answer in (tag, attributes, bool_value)] == expected


def define_raw(tpm, public):
    return tpm.send(NV_DEFINE_SPACE, public + ZERO)


def test_define_until_the_memory_is_full(make_bench, owned_state):
    cost = 71 + 20
    bench = make_bench(owned_state, Profile(nv_bytes=3 * (cost + SIZE)))
    for i in range(3):
        define(bench.tpm, INDEX + i, PPWRITE, SIZE).ok()
    assert define(bench.tpm, INDEX + 3, PPWRITE, 1).code == ReturnCode.NOSPACE
    # A redefinition may use what the old area had, and no more.
    define(bench.tpm, INDEX, PPWRITE, SIZE).ok()
    assert define(bench.tpm, INDEX, PPWRITE, SIZE + 1).code == ReturnCode.NOSPACE
    define(bench.tpm, INDEX, PPWRITE, 0).ok()
    define(bench.tpm, INDEX + 3, PPWRITE, SIZE).ok()


@pytest.mark.parametrize("size", [28673, 1 << 31, 0xFFFFFFFF])
def test_define_of_more_than_there_is(owned, size):
    assert define(owned.tpm, INDEX, PPWRITE, size).code == ReturnCode.NOSPACE


@pytest.mark.parametrize("state", ["disabled", "deactivated"])
def test_define_when_disabled_or_deactivated_runs_only_before_the_lock(owned, state):
    if state == "disabled":
        owned.set_flags(disable=True)
    else:
        owned.change("stclear", deactivated=True)
    define(owned.tpm, INDEX, PPWRITE, SIZE).ok()
    lock_nv(owned.tpm).ok()
    assert define(owned.tpm, INDEX, PPWRITE, SIZE).code == ReturnCode[state.upper()]


def test_define_of_a_locked_area_is_area_locked(locked):
    owners(locked, OWNERWRITE | GLOBALLOCK).ok()
    owners(locked, OWNERWRITE | WRITE_STCLEAR, index=INDEX + 1).ok()
    write(locked.tpm, b"", index=0).ok()
    write_as(locked.tpm, OWNER_AUTH, b"", index=INDEX + 1).ok()
    for i in (INDEX, INDEX + 1):
        assert owners(locked, OWNERWRITE, index=i).code == ReturnCode.AREA_LOCKED
        assert owners(locked, OWNERWRITE, 0, i).code == ReturnCode.AREA_LOCKED
    locked.power_cycle().ok()
    for i in (INDEX, INDEX + 1):
        owners(locked, OWNERWRITE, index=i).ok()
