"""What the TPM tells of itself, and what may be set (Part 3, chapter 7)."""

import struct

import pytest

from protocol.return_codes import ReturnCode
from protocol.wire import encode
from tests.tpm12.conftest import nv_area
from tests.tpm12.witness import (
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    number,
    rsa_parms,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.commands import ALL
from tpm12.profile import Profile
from tpm12.state import RELEASED_COUNTER, Counter

GET_CAPABILITY, SET_CAPABILITY, GET_CAPABILITY_OWNER = 0x65, 0x3F, 0x66
TRUE, FALSE = b"\1", b"\0"
(ORD, ALG, PID, FLAG, PROPERTY, VERSION, KEY_HANDLE, CHECK_LOADED, SYM_MODE) = range(1, 10)
KEY_STATUS, NV_LIST, MFR, NV_INDEX, TRANS_ALG = 0x0C, 0x0D, 0x10, 0x11, 0x12
HANDLE, TRANS_ES, AUTH_ENCRYPT, SELECT_SIZE, DA_LOGIC, VERSION_VAL = (
    0x14,
    0x15,
    0x17,
    0x18,
    0x19,
    0x1A,
)


def code(bench, area, sub_cap=b""):
    return bench.tpm.send(GET_CAPABILITY, u32(area) + sized(sub_cap)).code


def tell(bench, area, sub_cap=b""):
    return bench.tpm.capability(area, sub_cap)


def told_property(bench, which):
    return tell(bench, PROPERTY, u32(which))


# -- areas -----------------------------------------------------------------------------------------


def test_ord_is_what_is_there(fresh):
    declared = {command.ordinal for command in ALL}
    for ordinal in (*range(0x100), 0x4000000A, 0x4000000B, 0x4000000C, 0x20000016):
        assert tell(fresh, ORD, u32(ordinal)) == u8(ordinal in declared)


@pytest.mark.parametrize(("algorithm", "answer"), [(1, TRUE), (0, FALSE), (2, FALSE), (99, FALSE)])
def test_alg(fresh, algorithm, answer):
    assert tell(fresh, ALG, u32(algorithm)) == answer


def test_pid_is_what_is_there(fresh):
    declared = {command.ordinal for command in ALL}
    needs = {1: 0x0A, 2: 0x0B, 3: 0x0B, 4: 0x0C, 5: 0x0D, 6: 0x11, 7: 0xE6}
    for protocol in range(10):
        assert tell(fresh, PID, u16(protocol)) == u8(needs.get(protocol) in declared)


def test_flag_permanent_of_a_fresh_tpm(fresh):
    expected = "001f 00 01 00 01 00 01 00 00 00 00 00 00 00 00 01 00 00 00 00 00"
    assert tell(fresh, FLAG, u32(0x108)) == bytes.fromhex(expected)


def test_flag_volatile(fresh):
    assert tell(fresh, FLAG, u32(0x109)) == bytes.fromhex("0020 00 00 00 00 00")
    for i, name in enumerate(
        (
            "deactivated",
            "disable_force_clear",
            "physical_presence",
            "physical_presence_lock",
            "b_global_lock",
        )
    ):
        fresh.change("stclear", **{name: True})
        assert tell(fresh, FLAG, u32(0x109))[2 + i] == 1


def test_version_is_the_one_of_1_1_age(fresh):
    assert tell(fresh, VERSION) == b"\1\1\0\0"
    assert tell(fresh, VERSION, b"ignored") == b"\1\1\0\0"


def test_version_val(fresh):
    profile = Profile()
    expected = u16(0x30) + profile.version + u16(2) + u8(3) + profile.manufacturer + u16(0)
    assert tell(fresh, VERSION_VAL) == expected
    assert profile.version[:2] == b"\1\2"


@pytest.mark.parametrize(
    ("parms", "answer"),
    [
        (rsa_parms(), TRUE),
        (rsa_parms(512, 1, 2), TRUE),
        (rsa_parms(1024, 1, 2), TRUE),
        (rsa_parms(256), FALSE),
        (rsa_parms(4096), FALSE),
        (rsa_parms(1000), FALSE),
        (rsa_parms(primes=3), FALSE),
    ],
)
def test_check_loaded(fresh, parms, answer):
    assert tell(fresh, CHECK_LOADED, parms) == answer


def test_check_loaded_when_slots_are_full(owned):
    srk = owned.state.permanent.srk
    owned.change("volatile", keys=dict.fromkeys(range(1, 11), srk))
    owned.change("permanent", owner_evict_keys=dict.fromkeys(range(11, 21), srk))
    assert tell(owned, CHECK_LOADED, rsa_parms()) == FALSE


def test_check_loaded_refuses_what_it_does_not_know(fresh):
    assert code(fresh, CHECK_LOADED, rsa_parms(algorithm=6)) == ReturnCode.BAD_KEY_PROPERTY
    assert code(fresh, CHECK_LOADED, rsa_parms()[:-1]) == ReturnCode.BAD_PARAM_SIZE


def test_sym_mode_is_never(fresh):
    assert tell(fresh, SYM_MODE, u32(1)) == FALSE


def test_handles_of_keys(owned):
    assert tell(owned, KEY_HANDLE) == u16(0)
    srk = owned.state.permanent.srk
    owned.change("volatile", keys={0x11: srk})
    owned.change("permanent", owner_evict_keys={0x22: srk})
    for told in (tell(owned, KEY_HANDLE), tell(owned, HANDLE, u32(1))):
        assert told == u16(2) + u32(0x11) + u32(0x22)
    assert tell(owned, KEY_STATUS, u32(0x11)) == FALSE
    assert tell(owned, KEY_STATUS, u32(0x22)) == TRUE


@pytest.mark.parametrize("handle", [0x33, SRK, OWNER])
def test_key_status_of_no_slot_is_invalid_keyhandle(owned, handle):
    assert code(owned, KEY_STATUS, u32(handle)) == ReturnCode.INVALID_KEYHANDLE


def test_handles_of_sessions_contexts_and_counters(owned):
    sessions = [owned.tpm.oiap(), owned.tpm.osap(4, SRK, SRK_AUTH)]
    expected = u16(2) + b"".join(u32(session.handle) for session in sessions)
    assert tell(owned, HANDLE, u32(2)) == expected
    owned.change("stany", context_list={0: 77})
    assert tell(owned, HANDLE, u32(5)) == u16(1) + u32(77)
    counter = Counter(label=b"abcd", auth_data=ZERO, value=1)
    owned.change("permanent", counters={3: counter})
    assert tell(owned, HANDLE, u32(6)) == u16(1) + u32(3)
    for empty in (4, 8):
        assert tell(owned, HANDLE, u32(empty)) == u16(0)


@pytest.mark.parametrize("resource_type", [0, 3, 7, 9, 10, 11, 0xFFFFFFFF])
def test_handles_of_other_resources_are_bad_parameter(fresh, resource_type):
    assert code(fresh, HANDLE, u32(resource_type)) == ReturnCode.BAD_PARAMETER


def test_nv_list_and_index(owned):
    assert tell(owned, NV_LIST) == b""
    areas = {0x2000: nv_area(0x2000, 0x2), 0x1000: nv_area(0x1000, 0x40000)}
    owned.change("permanent", nv=areas)
    assert tell(owned, NV_LIST) == u32(0x1000) + u32(0x2000)
    assert tell(owned, NV_INDEX, u32(0x2000)) == encode(areas[0x2000].public)
    assert code(owned, NV_INDEX, u32(0x3000)) == ReturnCode.BADINDEX
    # bReadSTClear, bWriteSTClear, bWriteDefine and the size stand at the end.
    owned.change("stclear", nv_read_locked={0x2000: True})
    assert tell(owned, NV_INDEX, u32(0x2000))[-7:] == b"\1\0\0" + u32(4)
    owned.change("stclear", nv_read_locked={}, nv_write_locked={0x2000: True})
    assert tell(owned, NV_INDEX, u32(0x2000))[-7:] == b"\0\1\0" + u32(4)


def test_transport_is_told_only_where_it_is_there(fresh):
    has_it = 0xE6 in {command.ordinal for command in ALL}
    for area, sub_cap in ((TRANS_ALG, u32(7)), (TRANS_ALG, u32(6)), (TRANS_ES, u16(4))):
        assert tell(fresh, area, sub_cap) == u8(has_it)
    assert tell(fresh, TRANS_ALG, u32(1)) == FALSE
    assert tell(fresh, TRANS_ES, u16(3)) == FALSE


def test_auth_encrypt(fresh):
    assert tell(fresh, AUTH_ENCRYPT, u32(0x0A)) == TRUE
    assert tell(fresh, AUTH_ENCRYPT, u32(6)) == TRUE
    assert tell(fresh, AUTH_ENCRYPT, u32(7)) == FALSE
    fresh.set_flags(fips=True)
    assert tell(fresh, AUTH_ENCRYPT, u32(0x0A)) == FALSE
    assert tell(fresh, AUTH_ENCRYPT, u32(6)) == TRUE


def test_select_size(fresh):
    for size in range(6):
        answer = tell(fresh, SELECT_SIZE, b"\1\1" + u16(size))
        assert answer == u8(1 <= size <= 3)
    assert tell(fresh, SELECT_SIZE, b"\1\2" + u16(2)) == TRUE
    for version in (b"\0\0", b"\2\1", b"\1\0", b"\1\3"):
        assert code(fresh, SELECT_SIZE, version + u16(2)) == ReturnCode.BAD_PARAMETER
    assert code(fresh, SELECT_SIZE, b"\1\1\0") == ReturnCode.BAD_PARAM_SIZE


def da_info(state, count, seconds):
    action = u16(0x39) + u32(1)
    return u16(0x37) + u8(state) + u16(count) + u16(5) + action + u32(seconds) + sized(b"")


def test_da_logic_follows_the_attack_counter(owned):
    assert tell(owned, DA_LOGIC, u16(2)) == da_info(0, 0, 0)
    for _ in range(5):
        owned.tpm.auth(GET_CAPABILITY_OWNER, b"", owned.tpm.oiap(ZERO))
    assert tell(owned, DA_LOGIC, u16(4)) == da_info(0, 5, 0)
    for _ in range(1):
        owned.tpm.auth(GET_CAPABILITY_OWNER, b"", owned.tpm.oiap(ZERO))
    assert tell(owned, DA_LOGIC, u16(1)) == da_info(1, 6, 1)
    owned.clock.pass_s(0.25)
    assert tell(owned, DA_LOGIC, u16(1)) == da_info(1, 6, 1)
    owned.clock.pass_s(0.75)
    assert tell(owned, DA_LOGIC, u16(1)) == da_info(0, 6, 0)


def test_da_logic_limited(fresh):
    fresh.set_flags(disable_full_da_logic_info=True)
    expected = u16(0x38) + u8(0) + u16(0x39) + u32(1) + sized(b"")
    assert tell(fresh, DA_LOGIC, u16(2)) == expected


def test_da_logic_count_fits_its_field(fresh):
    fresh.change("stclear", failed_tries=100_000)
    assert number(tell(fresh, DA_LOGIC, u16(2))[3:5]) == 0xFFFF


@pytest.mark.parametrize("area", [0, 0x0A, 0x0B, 0x0E, 0x0F, MFR, 0x13, 0x16, 0x1B, 0xFFFFFFFF])
def test_unknown_area_is_bad_mode(fresh, area):
    assert code(fresh, area) == ReturnCode.BAD_MODE
    assert code(fresh, area, u32(0)) == ReturnCode.BAD_MODE


@pytest.mark.parametrize(
    ("area", "size"),
    [
        (ORD, 4), (ALG, 4), (PID, 2), (FLAG, 4), (PROPERTY, 4), (SYM_MODE, 4), (KEY_STATUS, 4),
        (NV_INDEX, 4), (TRANS_ALG, 4), (HANDLE, 4), (TRANS_ES, 2), (AUTH_ENCRYPT, 4), (DA_LOGIC, 2),
    ],
)  # fmt: skip
def test_sub_capability_of_another_size_is_bad_mode(fresh, area, size):
    for other in (0, size - 1, size + 1):
        assert code(fresh, area, bytes(other)) == ReturnCode.BAD_MODE


@pytest.mark.parametrize("which", [0, 0x107, 0x10A])
def test_unknown_flags_are_bad_mode(fresh, which):
    assert code(fresh, FLAG, u32(which)) == ReturnCode.BAD_MODE


# -- properties ------------------------------------------------------------------------------------

PROPERTIES_OF_A_FRESH_TPM = {
    0x101: u32(24),
    0x102: u32(1),
    0x103: Profile().manufacturer,
    0x104: u32(20),
    0x107: u32(0),
    0x10A: u32(16),
    0x10B: u32(16),
    0x10C: u32(8),
    0x10D: u32(16),
    0x10E: u32(16),
    0x10F: u32(8),
    0x110: u32(20),
    0x111: FALSE,
    0x112: u32(128),
    0x113: u32(128),
    0x114: u32(16),
    0x115: struct.pack(">4I", 750_000, 2_000_000, 750_000, 750_000),
    0x117: u32(4),
    0x119: u32(2),
    0x11A: u32(2),
    0x11B: u32(0xFFFFFFFF),
    0x11C: TRUE,
    0x11D: u32(32),
    0x11E: u32(32),
    0x11F: u32(0),
    0x120: struct.pack(">3I", *Profile().durations_us),
    0x122: u32(0xFFFFFFFF),
    0x123: u32(28672),
    0x124: u32(4096),
}


@pytest.mark.parametrize("which", PROPERTIES_OF_A_FRESH_TPM, ids=hex)
def test_property_of_a_fresh_tpm(fresh, which):
    assert told_property(fresh, which) == PROPERTIES_OF_A_FRESH_TPM[which]


@pytest.mark.parametrize("which", [0, 0x100, 0x105, 0x106, 0x108, 0x109, 0x118, 0x121, 0x125])
def test_gaps_among_properties_are_bad_mode(fresh, which):
    assert code(fresh, PROPERTY, u32(which)) == ReturnCode.BAD_MODE


def test_startup_effect_names_one_fate_of_the_audit_digest(fresh):
    effect = number(told_property(fresh, 0x116))
    assert (effect >> 5 & 7).bit_count() == 1


def test_properties_that_count_what_is_left(owned):
    srk = owned.state.permanent.srk
    owned.change("volatile", keys={0x11: srk})
    counter = Counter(label=b"abcd", auth_data=ZERO, value=1)
    owned.change(
        "permanent",
        owner_evict_keys={0x22: srk},
        counters={0: counter},
        nv={0x1000: nv_area(0x1000, 2)},
        restrict_delegate=5,
    )
    owned.change("stany", context_list={0: 1})
    owned.change("stclear", count_id=0)
    owned.tpm.oiap()
    assert told_property(owned, 0x104) == u32(18)
    assert told_property(owned, 0x10A) == u32(15)
    assert told_property(owned, 0x10C) == u32(7)
    assert told_property(owned, 0x112) == u32(127)
    assert told_property(owned, 0x11D) == u32(31)
    assert told_property(owned, 0x111) == TRUE
    assert told_property(owned, 0x11F) == u32(5)
    assert told_property(owned, 0x122) == u32(0)
    assert number(told_property(owned, 0x123)) < 28672


def test_no_counter_is_active_when_the_active_one_was_released(owned):
    owned.change("stclear", count_id=RELEASED_COUNTER)
    assert told_property(owned, 0x122) == u32(0xFFFFFFFF)


def test_properties_follow_the_profile(make_bench, fresh_state):
    bench = make_bench(fresh_state, profile=Profile(input_buffer_bytes=4088, manufacturer=b"ABCD"))
    assert told_property(bench, 0x124) == u32(4088)
    assert told_property(bench, 0x103) == b"ABCD"


# -- states ----------------------------------------------------------------------------------------

TOLD_ALWAYS = [
    (VERSION, b""),
    (VERSION_VAL, b""),
    (PROPERTY, u32(0x103)),
    (PROPERTY, u32(0x115)),
    (PROPERTY, u32(0x120)),
]
TOLD_WHEN_TESTED = [
    (ORD, u32(1)),
    (FLAG, u32(0x108)),
    (PROPERTY, u32(0x101)),
    (MFR, u32(1)),
    (0, b""),
]


@pytest.mark.parametrize(("area", "sub_cap"), TOLD_ALWAYS)
def test_what_the_tpm_is_is_told_in_failure_mode(fresh, area, sub_cap):
    fresh.change("volatile", self_test=3)
    tell(fresh, area, sub_cap)


@pytest.mark.parametrize(("area", "sub_cap"), TOLD_WHEN_TESTED)
def test_other_capabilities_are_refused_in_failure_mode(fresh, area, sub_cap):
    fresh.change("volatile", self_test=3)
    assert code(fresh, area, sub_cap) == ReturnCode.FAILEDSELFTEST


@pytest.mark.parametrize(("area", "sub_cap"), TOLD_ALWAYS)
def test_what_the_tpm_is_is_told_without_testing_itself(fresh, area, sub_cap):
    fresh.change("volatile", self_test=1)
    tell(fresh, area, sub_cap)
    assert fresh.state.volatile.self_test == 1


def test_other_capabilities_make_the_tpm_test_itself(fresh):
    fresh.change("volatile", self_test=1)
    assert code(fresh, MFR) == ReturnCode.BAD_MODE
    assert fresh.state.volatile.self_test == 2


def test_capability_changes_nothing(owned):
    before = owned.state
    tell(owned, FLAG, u32(0x108))
    assert owned.state is before


# -- TPM_GetCapabilityOwner ------------------------------------------------------------------------


def test_get_capability_owner_gives_flags_as_bits(owned):
    owned.change("stclear", disable_force_clear=True, b_global_lock=True)
    out = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", owned.tpm.oiap(OWNER_AUTH)).ok()
    flags = tell(owned, FLAG, u32(0x108))[2:]
    assert out[:4] == Profile().version
    assert number(out[4:8]) == sum(flag << i for i, flag in enumerate(flags))
    assert number(out[8:12]) == 1 << 1 | 1 << 4


def test_get_capability_owner_of_someone_else_is_authfail(owned):
    wrong = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", owned.tpm.oiap(SRK_AUTH))
    assert wrong.code == ReturnCode.AUTHFAIL
    unbound = owned.tpm.auth(GET_CAPABILITY_OWNER, b"", owned.tpm.osap(4, SRK, SRK_AUTH))
    assert unbound.code == ReturnCode.AUTHFAIL


# -- TPM_SetCapability -----------------------------------------------------------------------------

PERM_FLAGS, PERM_DATA, STCLEAR_FLAGS, STCLEAR_DATA, STANY_FLAGS, STANY_DATA, VENDOR = range(1, 8)


def params(area, which, value):
    return u32(area) + sized(u32(which)) + sized(value)


def put(bench, area, which, value, locality=0):
    """Without authorization."""
    return bench.tpm.send(SET_CAPABILITY, params(area, which, value), locality=locality).code


def put_as_owner(bench, area, which, value, secret=OWNER_AUTH):
    session = bench.tpm.oiap(secret)
    return bench.tpm.auth(SET_CAPABILITY, params(area, which, value), session.ending()).code


OWNERS_FLAGS = {4: (0, 1), 5: (1,), 6: (0,), 17: (0, 1), 20: (0, 1)}


@pytest.mark.parametrize("which", [1, *OWNERS_FLAGS])
def test_owners_flag_needs_the_owner(owned, which):
    value = u8(OWNERS_FLAGS.get(which, (0,))[0])
    assert put(owned, PERM_FLAGS, which, value) == ReturnCode.AUTHFAIL
    assert put_as_owner(owned, PERM_FLAGS, which, value, ZERO) == ReturnCode.AUTHFAIL
    assert put_as_owner(owned, PERM_FLAGS, which, value) == 0
    if which != 1:
        owned.present()
        assert put(owned, PERM_FLAGS, which, value) == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("which", OWNERS_FLAGS)
def test_owners_flag_takes_only_its_values(owned, which):
    for value in range(3):
        expected = 0 if value in OWNERS_FLAGS[which] else ReturnCode.BAD_PARAMETER
        assert put_as_owner(owned, PERM_FLAGS, which, u8(value)) == expected
        if not expected:
            assert owned.tpm.flags()[which] == value


@pytest.mark.parametrize("which", [4, 5, 6, 17])
@pytest.mark.parametrize("state", ["disabled", "deactivated"])
def test_owners_flag_needs_an_enabled_and_active_tpm(owned, which, state):
    value = u8(OWNERS_FLAGS[which][0])
    if state == "disabled":
        owned.set_flags(disable=True)
    else:
        owned.change("stclear", deactivated=True)
    expected = ReturnCode.DISABLED if state == "disabled" else ReturnCode.DEACTIVATED
    assert put_as_owner(owned, PERM_FLAGS, which, value) == expected
    # Who may not, does not learn more.
    assert put(owned, PERM_FLAGS, which, value) == ReturnCode.AUTHFAIL


def test_disable_and_da_info_may_be_set_while_disabled(owned):
    assert put_as_owner(owned, PERM_FLAGS, 1, TRUE) == 0
    assert put_as_owner(owned, PERM_FLAGS, 20, TRUE) == 0
    assert put_as_owner(owned, PERM_FLAGS, 1, FALSE) == 0
    owned.present()
    assert put(owned, PERM_FLAGS, 1, TRUE) == 0
    assert owned.tpm.flags()[1] == 1


def test_ownership_flag_is_for_who_is_present(fresh):
    assert put(fresh, PERM_FLAGS, 2, FALSE) == ReturnCode.AUTHFAIL
    fresh.present()
    assert put(fresh, PERM_FLAGS, 2, FALSE) == 0
    assert fresh.tpm.flags()[2] == 0
    fresh.set_flags(disable=True)
    assert put(fresh, PERM_FLAGS, 2, TRUE) == ReturnCode.DISABLED


def test_ownership_flag_of_an_owned_tpm_is_owner_set(owned):
    owned.present()
    assert put(owned, PERM_FLAGS, 2, FALSE) == ReturnCode.OWNER_SET
    assert put_as_owner(owned, PERM_FLAGS, 2, FALSE) == ReturnCode.OWNER_SET


def test_deactivated_flag_is_for_who_is_present_at_an_enabled_tpm(owned):
    assert put(owned, PERM_FLAGS, 3, TRUE) == ReturnCode.AUTHFAIL
    assert put_as_owner(owned, PERM_FLAGS, 3, TRUE) == ReturnCode.AUTHFAIL
    owned.present()
    owned.change("stclear", deactivated=True)
    assert put(owned, PERM_FLAGS, 3, TRUE) == 0
    assert owned.tpm.flags()[3] == 1
    owned.set_flags(disable=True)
    assert put(owned, PERM_FLAGS, 3, FALSE) == ReturnCode.DISABLED


@pytest.mark.parametrize("locality", [0, 1, 2, 3, 4])
def test_established_and_tos_present_are_for_the_launched(fresh, locality):
    fresh.set_flags(tpm_established=True)
    fresh.change("stany", tos_present=True)
    expected = 0 if locality >= 3 else ReturnCode.BAD_LOCALITY
    assert put(fresh, PERM_FLAGS, 18, FALSE, locality) == expected
    assert put(fresh, STANY_FLAGS, 4, FALSE, locality) == expected
    assert fresh.tpm.flags()[18] == (locality < 3)
    assert fresh.state.stany.tos_present == (locality < 3)
    if locality >= 3:
        assert put(fresh, PERM_FLAGS, 18, TRUE, locality) == ReturnCode.BAD_PARAMETER
        assert put(fresh, STANY_FLAGS, 4, TRUE, locality) == ReturnCode.BAD_PARAMETER


def test_disable_force_clear_may_be_set_by_anyone_but_not_undone(fresh):
    assert put(fresh, STCLEAR_FLAGS, 2, FALSE) == ReturnCode.BAD_PARAMETER
    assert put(fresh, STCLEAR_FLAGS, 2, TRUE) == 0
    assert fresh.state.stclear.disable_force_clear
    fresh.set_flags(disable=True)
    assert put(fresh, STCLEAR_FLAGS, 2, TRUE) == ReturnCode.DISABLED


def test_deferred_presence_is_given_by_who_is_present_and_taken_by_anyone(fresh):
    assert put(fresh, STCLEAR_DATA, 6, u32(1)) == ReturnCode.BAD_PRESENCE
    fresh.present()
    assert put(fresh, STCLEAR_DATA, 6, u32(3)) == 0
    fresh.change("stclear", physical_presence=False)
    assert put(fresh, STCLEAR_DATA, 6, u32(5)) == ReturnCode.BAD_PRESENCE
    assert put(fresh, STCLEAR_DATA, 6, u32(1)) == 0
    assert fresh.state.stclear.deferred_physical_presence == 1


def test_restrict_delegate_is_the_owners(owned):
    assert put(owned, PERM_DATA, 23, u32(5)) == ReturnCode.AUTHFAIL
    assert put_as_owner(owned, PERM_DATA, 23, u32(5)) == 0
    assert told_property(owned, 0x11F) == u32(5)
    assert put_as_owner(owned, PERM_DATA, 23, b"\5") == ReturnCode.BAD_PARAMETER
    assert put_as_owner(owned, PERM_DATA, 23, u32(5)) == 0
    assert not owned.last.permanent_changed
    owned.set_flags(disable=True)
    assert put_as_owner(owned, PERM_DATA, 23, u32(5)) == ReturnCode.DISABLED


@pytest.mark.parametrize("value", [b"", ZERO])
def test_daa_secrets_are_renewed_by_the_owner_only(owned, value):
    """libtpms lets anybody do it, who thereby destroys every DAA credential."""
    owned.present()
    before = owned.state.permanent
    assert put(owned, PERM_DATA, 25, value) == ReturnCode.AUTHFAIL
    assert owned.state.permanent is before
    assert put_as_owner(owned, PERM_DATA, 25, value) == 0
    for name in ("daa_proof", "tpm_daa_seed", "daa_blob_key"):
        assert getattr(owned.state.permanent, name) != getattr(before, name)
        assert getattr(owned.state.permanent, name) != value


@pytest.mark.parametrize(
    ("area", "settable"),
    [
        (PERM_FLAGS, {1, 2, 3, 4, 5, 6, 17, 18, 20}),
        (PERM_DATA, {23, 25}),
        (STCLEAR_FLAGS, {2}),
        (STCLEAR_DATA, {6}),
        (STANY_FLAGS, {4}),
        (STANY_DATA, set()),
        (VENDOR, set()),
    ],
)
def test_nothing_else_may_be_set_even_by_the_owner(owned, area, settable):
    owned.present()
    for which in {*range(40), 0x101, 0xFFFFFFFF} - settable:
        assert put_as_owner(owned, area, which, TRUE) == ReturnCode.BAD_PARAMETER
        assert put(owned, area, which, TRUE) == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("area", [0, 8, 0xFFFFFFFF])
def test_set_capability_of_an_unknown_area_is_bad_parameter(owned, area):
    assert put(owned, area, 1, TRUE) == ReturnCode.BAD_PARAMETER
    assert put_as_owner(owned, area, 1, TRUE) == ReturnCode.BAD_PARAMETER
    assert put_as_owner(owned, area, 1, TRUE, ZERO) == ReturnCode.AUTHFAIL


@pytest.mark.parametrize("sub_cap", [b"", u16(1), u32(1) + b"\0"])
def test_set_capability_with_a_sub_capability_of_another_size_is_bad_parameter(owned, sub_cap):
    owned.present()
    body = u32(PERM_FLAGS) + sized(sub_cap) + sized(TRUE)
    assert owned.tpm.send(SET_CAPABILITY, body).code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("value", [b"", b"\0\1", u8(2), u8(255)])
def test_set_capability_with_a_value_that_is_no_bool_is_bad_parameter(owned, value):
    owned.present()
    assert put(owned, PERM_FLAGS, 1, value) == ReturnCode.BAD_PARAMETER


def test_set_capability_to_the_present_value_writes_nothing(owned):
    assert put_as_owner(owned, PERM_FLAGS, 4, FALSE) == 0
    assert not owned.last.permanent_changed
    assert put_as_owner(owned, PERM_FLAGS, 4, TRUE) == 0
    assert owned.last.permanent_changed


def test_set_capability_with_a_session_but_no_owner_is_nosrk(fresh):
    fresh.present()
    assert put_as_owner(fresh, PERM_FLAGS, 1, FALSE) == ReturnCode.NOSRK


def test_set_capability_opens_pubek_to_anyone_again(owned):
    assert owned.tpm.send(0x7C, ZERO).code == ReturnCode.DISABLED_CMD
    assert put_as_owner(owned, PERM_FLAGS, 4, TRUE) == 0
    out = owned.tpm.send(0x7C, ZERO).ok()
    assert out[-20:] == sha1(out[:-20], ZERO)
