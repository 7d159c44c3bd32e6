"""Reading and writing NV areas and the DIR: each check in its order, each lock, what is stored."""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import OWNER_AUTH
from tests.tpm12.makers import (
    AREA_AUTH,
    ET_NV,
    ET_OWNER,
    WRONG,
    area_info,
    composite,
    define,
)
from tests.tpm12.nv_makers import (
    AUTHREAD,
    AUTHWRITE,
    DIR,
    DIR_READ,
    DIR_WRITE,
    EXTEND,
    GLOBALLOCK,
    INDEX,
    OWNERREAD,
    OWNERWRITE,
    PPREAD,
    PPWRITE,
    READ_AUTH,
    READ_STCLEAR,
    SIZE,
    TRIAL,
    UNUSED,
    WRITE,
    WRITE_AUTH,
    WRITE_STCLEAR,
    WRITEALL,
    WRITEDEFINE,
    data_of,
    owners,
    read,
    read_as,
    read_with,
    write,
    write_as,
    write_with,
)
from tests.tpm12.witness import ZERO, number, selection, sized, u16, u32
from tpm12 import nv
from tpm12.tpm import Tpm

# -- who may write and read ------------------------------------------------------------------------


def test_owners_area(locked):
    tpm = locked.tpm
    owners(locked, OWNERWRITE | OWNERREAD).ok()
    write_as(tpm, OWNER_AUTH, b"12345678").ok()
    assert read_as(tpm, OWNER_AUTH).ok() == sized(b"12345678")
    assert write(tpm, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read(tpm).code == ReturnCode.AUTH_CONFLICT
    assert write_as(tpm, WRONG, b"x").code == ReturnCode.AUTHFAIL
    assert read_as(tpm, WRONG).code == ReturnCode.AUTHFAIL
    assert write_with(tpm, AREA_AUTH, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read_with(tpm, AREA_AUTH).code == ReturnCode.AUTH_CONFLICT
    assert locked.state.stclear.failed_tries == 2


def test_owners_area_under_an_osap_session(locked):
    owners(locked, OWNERWRITE).ok()
    session = locked.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    for data in (b"1", b"2"):
        locked.tpm.auth(WRITE, u32(INDEX) + u32(0) + sized(data), session).ok()
    assert session.continues


def test_area_with_its_own_secret(locked):
    tpm = locked.tpm
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    write_with(tpm, AREA_AUTH, b"12345678").ok()
    assert read_with(tpm, AREA_AUTH, 4, 2).ok() == sized(b"3456")
    assert write_with(tpm, WRONG, b"x").code == ReturnCode.AUTHFAIL
    assert read_with(tpm, WRONG).code == ReturnCode.AUTHFAIL
    assert write(tpm, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read(tpm).code == ReturnCode.AUTH_CONFLICT
    assert write_as(tpm, OWNER_AUTH, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read_as(tpm, OWNER_AUTH).code == ReturnCode.AUTH_CONFLICT


def test_area_under_an_osap_session_of_its_own(locked):
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    session = locked.tpm.osap(ET_NV, INDEX, AREA_AUTH)
    body = u32(INDEX) + u32(0)
    locked.tpm.auth(WRITE_AUTH, body + sized(b"12345678"), session).ok()
    assert locked.tpm.auth(READ_AUTH, body + u32(2), session).ok() == sized(b"12")
    # Locking the area changes nothing about who it is.
    locked.tpm.auth(WRITE_AUTH, body + sized(b""), session).ok()
    locked.tpm.auth(READ_AUTH, body + u32(2), session).ok()


def test_osap_session_of_an_area_does_not_open_another_with_the_same_secret(locked):
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    owners(locked, AUTHWRITE | AUTHREAD, index=INDEX + 1).ok()
    session = locked.tpm.osap(ET_NV, INDEX, AREA_AUTH)
    answer = locked.tpm.auth(READ_AUTH, u32(INDEX + 1) + u32(0) + u32(1), session)
    assert answer.code == ReturnCode.AUTHFAIL


def test_anyones_area(locked):
    owners(locked, WRITEDEFINE).ok()
    write(locked.tpm, b"any").ok()
    assert read(locked.tpm, 3).ok() == sized(b"any")
    assert write_as(locked.tpm, OWNER_AUTH, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read_as(locked.tpm, OWNER_AUTH).code == ReturnCode.AUTH_CONFLICT


def test_area_with_presence(locked):
    owners(locked, PPWRITE | PPREAD).ok()
    assert write(locked.tpm, b"x").code == ReturnCode.BAD_PRESENCE
    assert read(locked.tpm).code == ReturnCode.BAD_PRESENCE
    locked.present()
    write(locked.tpm, b"x").ok()
    read(locked.tpm).ok()


@pytest.mark.parametrize("operation", [write, read])
def test_area_that_is_not_there(locked, operation):
    argument = (b"x",) if operation is write else ()
    assert operation(locked.tpm, *argument, index=0x777).code == ReturnCode.BADINDEX


def test_area_that_is_not_there_with_sessions(locked):
    for index in (0x777, DIR, 0):
        assert write_with(locked.tpm, WRONG, b"x", index=index).code == ReturnCode.BADINDEX
        assert read_with(locked.tpm, WRONG, index=index).code == ReturnCode.BADINDEX
    assert write_as(locked.tpm, WRONG, b"x", index=0x777).code == ReturnCode.BADINDEX
    assert read_as(locked.tpm, WRONG, index=0).code == ReturnCode.BADINDEX
    assert locked.state.stclear.failed_tries == 0


@pytest.mark.parametrize("state", ["disabled", "deactivated"])
def test_disabled_and_deactivated_stop_only_the_owners_areas(locked, state):
    tpm = locked.tpm
    owners(locked, OWNERWRITE | OWNERREAD).ok()
    owners(locked, WRITEDEFINE, index=INDEX + 1).ok()
    owners(locked, AUTHWRITE | AUTHREAD, index=INDEX + 2).ok()
    if state == "disabled":
        locked.set_flags(disable=True)
    else:
        locked.change("stclear", deactivated=True)
    code = ReturnCode[state.upper()]
    for answer in (
        write_as(tpm, OWNER_AUTH, b"x"),
        read_as(tpm, OWNER_AUTH),
        write(tpm, b"x"),
        read(tpm),
        write(tpm, b"x" * 20, index=DIR),
        write_with(tpm, AREA_AUTH, b"x", index=INDEX + 2),
        read_with(tpm, AREA_AUTH, index=INDEX + 2),
    ):
        assert answer.code == code
    write(tpm, b"x", index=INDEX + 1).ok()
    read(tpm, index=INDEX + 1).ok()
    read(tpm, 20, index=DIR).ok()


def test_before_nv_is_locked_protections_do_not_bite(owned):
    tpm = owned.tpm
    guarded = PPWRITE | PPREAD | OWNERWRITE | OWNERREAD | READ_STCLEAR | WRITE_STCLEAR
    elsewhere = area_info(selection(1), release=WRONG, localities=0x10)
    define(
        tpm, INDEX, guarded | GLOBALLOCK | WRITEDEFINE, SIZE, read=elsewhere, write=elsewhere
    ).ok()
    owned.set_flags(disable=True)
    write(tpm, b"", index=0).ok()
    for data in (b"", b"12345678"):
        write(tpm, data).ok()
        read(tpm, len(data)).ok()
    write_as(tpm, OWNER_AUTH, b"owner").ok()
    read_as(tpm, OWNER_AUTH).ok()
    assert write_as(tpm, WRONG, b"x").code == ReturnCode.AUTHFAIL
    assert read_as(tpm, WRONG).code == ReturnCode.AUTHFAIL


def test_before_nv_is_locked_an_areas_own_secret_counts(owned):
    define(owned.tpm, INDEX, AUTHWRITE | AUTHREAD | PPWRITE, SIZE).ok()
    assert write(owned.tpm, b"x").code == ReturnCode.AUTH_CONFLICT
    assert read(owned.tpm).code == ReturnCode.AUTH_CONFLICT
    # With the secret the other protections bite, locked or not.
    assert write_with(owned.tpm, AREA_AUTH, b"x").code == ReturnCode.BAD_PRESENCE
    owned.present()
    write_with(owned.tpm, AREA_AUTH, b"x").ok()


# -- what is written -------------------------------------------------------------------------------


@pytest.fixture
def area(locked):
    """A TPM with one area that anyone writes."""
    owners(locked, WRITEDEFINE).ok()
    return locked


def test_write_part_of_an_area(area):
    write(area.tpm, b"abc", 2).ok()
    assert area.last.permanent_changed
    assert data_of(area) == b"\xff\xffabc\xff\xff\xff"
    write(area.tpm, b"z", 7).ok()
    assert read(area.tpm).ok() == sized(b"\xff\xffabc\xff\xffz")


def test_write_of_the_same_bytes_stores_nothing(area):
    write(area.tpm, b"abc").ok()
    before = area.state
    write(area.tpm, b"abc").ok()
    assert not area.last.permanent_changed
    assert area.state is before


def test_write_changes_its_area_and_no_other(area):
    owners(area, WRITEDEFINE, index=INDEX + 1).ok()
    other = area.state.permanent.nv[INDEX + 1]
    write(area.tpm, b"abc").ok()
    assert area.state.permanent.nv[INDEX + 1] is other


WRAPS = [0xFFFFFFFF, 0xFFFFFFFC, 0xFFFFFFF8, 0x80000000]
PAST_THE_END = [(8, 1), (7, 2), (0, 9), *((offset, 8) for offset in WRAPS)]


@pytest.mark.parametrize(("offset", "size"), PAST_THE_END)
def test_past_the_end_is_nospace(area, offset, size):
    """Offset and size are added in wide arithmetic: in 32 bits FFFFFFFC + 8 is 4."""
    before = area.state
    assert write(area.tpm, b"x" * size, offset).code == ReturnCode.NOSPACE
    assert read(area.tpm, size, offset).code == ReturnCode.NOSPACE
    assert area.state is before


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0xFFFFFFFC, 1 << 31])
def test_reads_of_huge_sizes_are_nospace(area, size):
    for offset in (0, 4, 8, 0xFFFFFFFF):
        assert read(area.tpm, size, offset).code == ReturnCode.NOSPACE


@pytest.mark.parametrize(("offset", "size"), PAST_THE_END)
def test_past_the_end_with_a_secret_is_nospace(locked, offset, size):
    owners(locked, AUTHWRITE | AUTHREAD).ok()
    answer = write_with(locked.tpm, AREA_AUTH, b"x" * size, offset)
    assert answer.code == ReturnCode.NOSPACE
    assert read_with(locked.tpm, AREA_AUTH, size, offset).code == ReturnCode.NOSPACE


def test_area_that_is_written_whole(locked):
    owners(locked, WRITEALL | WRITEDEFINE).ok()
    assert write(locked.tpm, b"1234567").code == ReturnCode.NOT_FULLWRITE
    assert write(locked.tpm, b"1", 7).code == ReturnCode.NOT_FULLWRITE
    assert write(locked.tpm, b"12345678", 1).code == ReturnCode.NOSPACE
    write(locked.tpm, b"12345678").ok()
    write(locked.tpm, b"").ok()


# -- locks -----------------------------------------------------------------------------------------


def test_read_stclear_locks_until_st_clear(locked):
    owners(locked, OWNERWRITE | READ_STCLEAR).ok()
    assert read(locked.tpm, 0).ok() == sized(b"")
    assert not locked.last.permanent_changed
    assert read(locked.tpm).code == ReturnCode.DISABLED_CMD
    assert read(locked.tpm, 0).code == ReturnCode.DISABLED_CMD
    locked.power_cycle().ok()
    read(locked.tpm).ok()


@pytest.mark.parametrize("data", [b"new", UNUSED, b""], ids=["new", "same", "nothing"])
def test_read_stclear_is_unlocked_by_a_write(locked, data):
    owners(locked, OWNERWRITE | READ_STCLEAR).ok()
    read(locked.tpm, 0).ok()
    write_as(locked.tpm, OWNER_AUTH, data).ok()
    read(locked.tpm).ok()


def test_read_stclear_is_not_unlocked_by_a_write_that_fails(locked):
    owners(locked, OWNERWRITE | READ_STCLEAR).ok()
    read(locked.tpm, 0).ok()
    write_as(locked.tpm, OWNER_AUTH, b"x" * 9)
    assert read(locked.tpm).code == ReturnCode.DISABLED_CMD


def test_read_lock_without_the_attribute_does_not_bite(area):
    read(area.tpm, 0).ok()
    before = area.state
    read(area.tpm, 0).ok()
    assert area.state is before
    read(area.tpm).ok()


def test_write_stclear_locks_until_st_clear(locked):
    owners(locked, OWNERWRITE | WRITE_STCLEAR).ok()
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    assert write_as(locked.tpm, OWNER_AUTH, b"x").code == ReturnCode.AREA_LOCKED
    assert write_as(locked.tpm, OWNER_AUTH, b"").code == ReturnCode.AREA_LOCKED
    locked.power_cycle().ok()
    write_as(locked.tpm, OWNER_AUTH, b"x").ok()


def test_write_define_locks_until_redefined(locked):
    owners(locked, OWNERWRITE | WRITEDEFINE).ok()
    write_as(locked.tpm, OWNER_AUTH, b"last").ok()
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    assert locked.last.permanent_changed
    locked.power_cycle().ok()
    assert write_as(locked.tpm, OWNER_AUTH, b"x").code == ReturnCode.AREA_LOCKED
    assert read(locked.tpm, 4).ok() == sized(b"last")
    owners(locked, OWNERWRITE | WRITEDEFINE).ok()
    write_as(locked.tpm, OWNER_AUTH, b"x").ok()


def test_write_of_nothing_sets_both_locks_and_the_attributes_decide(locked):
    owners(locked, OWNERWRITE).ok()
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    assert locked.state.permanent.nv[INDEX].public.b_write_define
    assert INDEX in locked.state.stclear.nv_write_locked
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    assert not locked.last.permanent_changed
    write_as(locked.tpm, OWNER_AUTH, b"x").ok()


def test_index_0_locks_all_areas_that_say_so(locked):
    owners(locked, OWNERWRITE | GLOBALLOCK).ok()
    owners(locked, OWNERWRITE, index=INDEX + 1).ok()
    assert write(locked.tpm, b"x", index=0).code == ReturnCode.BADINDEX
    write(locked.tpm, b"", index=0).ok()
    assert not locked.last.permanent_changed
    assert locked.state.stclear.b_global_lock
    before = locked.state
    write(locked.tpm, b"", index=0).ok()
    assert locked.state is before
    assert write_as(locked.tpm, OWNER_AUTH, b"x").code == ReturnCode.AREA_LOCKED
    write_as(locked.tpm, OWNER_AUTH, b"x", index=INDEX + 1).ok()
    locked.power_cycle().ok()
    write_as(locked.tpm, OWNER_AUTH, b"x").ok()


def test_index_0_takes_the_owners_session_too(locked):
    write_as(locked.tpm, OWNER_AUTH, b"", index=0).ok()
    assert write_as(locked.tpm, WRONG, b"", index=0).code == ReturnCode.AUTHFAIL


def test_locks_bite_with_the_areas_secret_before_nv_is_locked(owned):
    attributes = AUTHWRITE | AUTHREAD | WRITE_STCLEAR | READ_STCLEAR
    define(owned.tpm, INDEX, attributes, SIZE).ok()
    write_with(owned.tpm, AREA_AUTH, b"").ok()
    assert write_with(owned.tpm, AREA_AUTH, b"x").code == ReturnCode.AREA_LOCKED
    read_with(owned.tpm, AREA_AUTH, 0).ok()
    assert read_with(owned.tpm, AREA_AUTH, 1).code == ReturnCode.DISABLED_CMD


def test_public_of_shows_the_locks_as_they_are(locked):
    owners(locked, OWNERWRITE).ok()
    read(locked.tpm, 0).ok()

    def shown():
        tpm = Tpm(locked.state, None, 0)
        public = nv.public_of(tpm, nv.area_at(tpm, INDEX))
        return public.b_read_stclear, public.b_write_stclear, public.b_write_define

    assert shown() == (True, False, False)
    write_as(locked.tpm, OWNER_AUTH, b"").ok()
    assert shown() == (False, True, True)
    locked.power_cycle().ok()
    assert shown() == (False, False, True)


# -- PCRs and localities ---------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["anyone", "secret"])
def test_area_bound_to_pcrs(locked, way):
    info = area_info(selection(10), release=composite([10]))
    guards = AUTHWRITE | AUTHREAD if way == "secret" else WRITEDEFINE
    owners(locked, guards, read=info, write=info).ok()

    def codes():
        if way == "anyone":
            return write(locked.tpm, b"x").code, read(locked.tpm).code
        return (
            write_with(locked.tpm, AREA_AUTH, b"x").code,
            read_with(locked.tpm, AREA_AUTH).code,
        )

    assert codes() == (ReturnCode.SUCCESS, ReturnCode.SUCCESS)
    locked.tpm.send(EXTEND, u32(10) + ZERO).ok()
    assert codes() == (ReturnCode.WRONGPCRVAL, ReturnCode.WRONGPCRVAL)


def test_area_bound_to_localities(locked):
    infos = {"read": area_info(localities=0x02), "write": area_info(localities=0x0C)}
    owners(locked, WRITEDEFINE, **infos).ok()
    for locality in range(5):
        may_write = write(locked.tpm, b"x", locality=locality).code == ReturnCode.SUCCESS
        may_read = read(locked.tpm, locality=locality).code == ReturnCode.SUCCESS
        assert (may_write, may_read) == (locality in {2, 3}, locality == 1)
    assert write(locked.tpm, b"x", locality=0).code == ReturnCode.BAD_LOCALITY
    assert read(locked.tpm, locality=0).code == ReturnCode.BAD_LOCALITY


# -- order of checks -------------------------------------------------------------------------------


def test_write_checks_in_the_order_of_the_actions(locked):
    """Take one reason after the other away; each time the next one shows."""
    tpm = locked.tpm
    elsewhere = area_info(selection(1), release=WRONG)
    attributes = OWNERWRITE | PPWRITE | WRITE_STCLEAR | WRITEALL
    owners(locked, attributes, write=elsewhere).ok()
    locked.change("stclear", nv_write_locked={INDEX: True})
    locked.set_flags(disable=True)
    seen = [write_as(tpm, WRONG, b"x" * 9).code]
    locked.set_flags(disable=False)
    seen.append(write_as(tpm, WRONG, b"x" * 9).code)
    seen.append(write_as(tpm, OWNER_AUTH, b"x" * 9).code)
    locked.present()
    seen.append(write_as(tpm, OWNER_AUTH, b"x" * 9).code)
    locked.change("stclear", nv_write_locked={})
    seen.append(write_as(tpm, OWNER_AUTH, b"x" * 9).code)
    owners(locked, attributes).ok()
    seen.append(write_as(tpm, OWNER_AUTH, b"x" * 9).code)
    seen.append(write_as(tpm, OWNER_AUTH, b"x" * 7).code)
    assert seen == [
        ReturnCode.DISABLED,
        ReturnCode.AUTHFAIL,
        ReturnCode.BAD_PRESENCE,
        ReturnCode.AREA_LOCKED,
        ReturnCode.WRONGPCRVAL,
        ReturnCode.NOSPACE,
        ReturnCode.NOT_FULLWRITE,
    ]


def test_read_checks_in_the_order_of_the_actions(locked):
    tpm = locked.tpm
    elsewhere = area_info(selection(1), release=WRONG)
    attributes = OWNERREAD | OWNERWRITE | PPREAD | READ_STCLEAR
    owners(locked, attributes, read=elsewhere).ok()
    locked.change("stclear", nv_read_locked={INDEX: True}, deactivated=True)
    seen = [read_as(tpm, WRONG, 9).code]
    locked.change("stclear", deactivated=False)
    seen.append(read_as(tpm, WRONG, 9).code)
    seen.append(read_as(tpm, OWNER_AUTH, 9).code)
    locked.present()
    seen.append(read_as(tpm, OWNER_AUTH, 9).code)
    locked.change("stclear", nv_read_locked={})
    seen.append(read_as(tpm, OWNER_AUTH, 9).code)
    owners(locked, attributes).ok()
    seen.append(read_as(tpm, OWNER_AUTH, 9).code)
    assert seen == [
        ReturnCode.DEACTIVATED,
        ReturnCode.AUTHFAIL,
        ReturnCode.BAD_PRESENCE,
        ReturnCode.DISABLED_CMD,
        ReturnCode.WRONGPCRVAL,
        ReturnCode.NOSPACE,
    ]


# -- writing without an owner ----------------------------------------------------------------------


def test_without_an_owner_changes_are_counted_up_to_64(unowned):
    define(unowned.tpm, INDEX, PPWRITE, SIZE).ok()
    for i in range(63):
        write(unowned.tpm, u16(i)).ok()
    assert unowned.state.permanent.no_owner_nv_write == 64
    before = unowned.state.permanent
    assert write(unowned.tpm, b"x").code == ReturnCode.MAXNVWRITES
    assert write(unowned.tpm, b"", index=DIR).code == ReturnCode.AUTH_CONFLICT
    assert define(unowned.tpm, INDEX, PPWRITE, SIZE).code == ReturnCode.MAXNVWRITES
    read(unowned.tpm).ok()
    write(unowned.tpm, b"", index=0).ok()  # a lock that lasts until a start
    assert unowned.state.stclear.b_global_lock
    assert unowned.state.permanent is before


def test_without_an_owner_what_changes_nothing_is_not_counted(unowned):
    tpm = unowned.tpm
    define(tpm, INDEX, PPWRITE, SIZE).ok()
    assert unowned.state.permanent.no_owner_nv_write == 1
    write(tpm, UNUSED).ok()
    write(tpm, b"", index=0).ok()
    define(tpm, TRIAL, PPWRITE, SIZE).ok()
    assert define(tpm, INDEX, 0, SIZE).code == ReturnCode.PER_NOWRITE
    assert unowned.state.permanent.no_owner_nv_write == 1
    write(tpm, b"").ok()  # sets bWriteDefine
    assert unowned.state.permanent.no_owner_nv_write == 2
    write(tpm, b"").ok()
    assert unowned.state.permanent.no_owner_nv_write == 2


def test_before_nv_is_locked_changes_are_counted_too(fresh):
    define(fresh.tpm, INDEX, PPWRITE, SIZE).ok()
    write(fresh.tpm, b"x").ok()
    write(fresh.tpm, b"d" * 20, index=DIR).ok()
    define(fresh.tpm, INDEX, PPWRITE, 0).ok()
    assert fresh.state.permanent.no_owner_nv_write == 4


def test_with_an_owner_nothing_is_counted(locked):
    """libtpms counts unauthorized writes with an owner too; the specification means before one."""
    locked.present()
    owners(locked, PPWRITE).ok()
    for i in range(70):
        write(locked.tpm, u16(i)).ok()
    assert locked.state.permanent.no_owner_nv_write == 0
    locked.change("permanent", no_owner_nv_write=64)
    write(locked.tpm, b"x").ok()


# -- the DIR ---------------------------------------------------------------------------------------


def test_dir_write_then_read(owned):
    tpm = owned.tpm
    params = u32(0) + b"d" * 20
    assert tpm.auth(DIR_WRITE, params, tpm.oiap(OWNER_AUTH)).ok() == b""
    assert owned.last.permanent_changed
    assert tpm.send(DIR_READ, u32(0)).ok() == b"d" * 20
    assert read(tpm, 20, index=DIR).ok() == sized(b"d" * 20)
    tpm.auth(DIR_WRITE, params, tpm.oiap(OWNER_AUTH)).ok()
    assert not owned.last.permanent_changed


def test_dir_codes(owned):
    tpm = owned.tpm
    assert tpm.send(DIR_READ, u32(1)).code == ReturnCode.BADINDEX
    other = tpm.auth(DIR_WRITE, u32(1) + ZERO, tpm.oiap(OWNER_AUTH))
    wrong = tpm.auth(DIR_WRITE, u32(0) + ZERO, tpm.oiap(WRONG))
    assert (other.code, wrong.code) == (ReturnCode.BADINDEX, ReturnCode.AUTHFAIL)


def test_dir_through_nv(locked):
    tpm = locked.tpm
    write_as(tpm, OWNER_AUTH, b"n" * 20, index=DIR).ok()
    assert tpm.send(DIR_READ, u32(0)).ok() == b"n" * 20
    assert read(tpm, 3, 1, index=DIR).ok() == sized(b"nnn")
    assert read_as(tpm, OWNER_AUTH, 20, index=DIR).ok() == sized(b"n" * 20)
    assert read(tpm, 0, index=DIR).ok() == sized(b"")
    before = locked.state.permanent
    write_as(tpm, OWNER_AUTH, b"n" * 20, index=DIR).ok()
    write_as(tpm, OWNER_AUTH, b"", index=DIR).ok()
    for data, offset in ((b"n" * 19, 0), (b"n" * 19, 1), (b"n" * 20, 1), (b"n" * 21, 0)):
        answer = write_as(tpm, OWNER_AUTH, data, offset, index=DIR)
        assert answer.code == ReturnCode.NOT_FULLWRITE
    assert read(tpm, 21, index=DIR).code == ReturnCode.NOSPACE
    assert read(tpm, 8, 0xFFFFFFFC, index=DIR).code == ReturnCode.NOSPACE
    assert write(tpm, b"x" * 20, index=DIR).code == ReturnCode.AUTH_CONFLICT
    assert write_as(tpm, WRONG, b"x" * 20, index=DIR).code == ReturnCode.AUTHFAIL
    assert read_as(tpm, WRONG, 20, index=DIR).code == ReturnCode.AUTHFAIL
    assert locked.state.permanent is before


def test_dir_survives_power_and_areas_too(locked):
    owners(locked, WRITEDEFINE).ok()
    write(locked.tpm, b"12345678").ok()
    write_as(locked.tpm, OWNER_AUTH, b"n" * 20, index=DIR).ok()
    locked.power_cycle().ok()
    assert locked.tpm.send(DIR_READ, u32(0)).ok() == b"n" * 20
    assert number(read(locked.tpm).ok()[4:]) == number(b"12345678")
