"""Opt-in, ownership, physical presence (Part 3, chapters 5 and 6)."""

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from protocol.delegation_structures import DelegatePublic, Delegations
from protocol.return_codes import ReturnCode
from protocol.structures import UNRESTRICTED_PCR_INFO
from tests.tpm12.conftest import nv_area
from tests.tpm12.witness import (
    OAEP,
    OWNER,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    hmac1,
    key_template,
    number,
    oaep,
    parse_key,
    parse_pubkey,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.commands.ownership import SetOperatorAuthIn
from tpm12.state import (
    Counter,
    DelegateRow,
    FamilyRow,
    StAny,
    StClear,
    TransportSession,
)

TAKE_OWNERSHIP, OWNER_CLEAR, DISABLE_OWNER_CLEAR, FORCE_CLEAR = 0x0D, 0x5B, 0x5C, 0x5D
DISABLE_FORCE_CLEAR, OWNER_SET_DISABLE, PHYSICAL_ENABLE, PHYSICAL_DISABLE = 0x5E, 0x6E, 0x6F, 0x70
SET_OWNER_INSTALL, PHYSICAL_SET_DEACTIVATED, SET_TEMP_DEACTIVATED = 0x71, 0x72, 0x73
SET_OPERATOR_AUTH, PRESENCE, RESET_ESTABLISHMENT = 0x74, 0x4000000A, 0x4000000B
READ_PUBEK, PCR_READ, EXTEND, SET_CAPABILITY = 0x7C, 0x15, 0x14, 0x3F
CMD_ENABLE, PRESENT, NOTPRESENT, LOCK = 0x20, 0x08, 0x10, 0x04
OPERATOR_AUTH = sha1(b"operator")


# -- opt-in ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ordinal", "body"),
    [
        (SET_OWNER_INSTALL, u8(0)),
        (PHYSICAL_ENABLE, b""),
        (PHYSICAL_DISABLE, b""),
        (PHYSICAL_SET_DEACTIVATED, u8(1)),
        (SET_TEMP_DEACTIVATED, b""),
        (SET_OPERATOR_AUTH, OPERATOR_AUTH),
        (FORCE_CLEAR, b""),
    ],
)
def test_presence_command_without_presence_is_bad_presence(fresh, ordinal, body):
    before = fresh.state.permanent
    assert fresh.tpm.send(ordinal, body).code == ReturnCode.BAD_PRESENCE
    assert fresh.state.permanent is before
    fresh.present()
    fresh.tpm.send(ordinal, body).ok()


@pytest.mark.parametrize(
    "ordinal", [SET_OWNER_INSTALL, OWNER_SET_DISABLE, PHYSICAL_SET_DEACTIVATED]
)
def test_bool_other_than_0_and_1_is_bad_parameter(owned, ordinal):
    owned.present()
    body = u8(2) + (bytes(45) if ordinal == OWNER_SET_DISABLE else b"")
    tag = 0xC2 if ordinal == OWNER_SET_DISABLE else 0xC1
    assert owned.tpm.send(ordinal, body, tag=tag).code == ReturnCode.BAD_PARAMETER


def test_set_owner_install_opens_and_closes_ownership(fresh):
    fresh.present()
    fresh.tpm.send(SET_OWNER_INSTALL, u8(0)).ok()
    assert fresh.tpm.flags()[2] == 0
    fresh.tpm.send(SET_OWNER_INSTALL, u8(1)).ok()
    assert fresh.tpm.flags()[2] == 1


def test_set_owner_install_with_an_owner_succeeds_without_effect_or_presence(owned):
    owned.tpm.send(SET_OWNER_INSTALL, u8(0)).ok()
    assert owned.tpm.flags()[2] == 1


def test_owner_set_disable_acts_at_once_and_enables_again(owned):
    session = owned.tpm.oiap(OWNER_AUTH)
    owned.tpm.auth(OWNER_SET_DISABLE, u8(1), session).ok()
    assert owned.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DISABLED
    owned.tpm.auth(OWNER_SET_DISABLE, u8(0), session).ok()
    owned.tpm.send(PCR_READ, u32(0)).ok()


def test_owner_set_disable_with_another_secret_is_authfail(owned):
    answer = owned.tpm.auth(OWNER_SET_DISABLE, u8(1), owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.AUTHFAIL
    assert not owned.state.permanent.flags.disable


def test_physical_disable_and_enable_act_at_once(fresh):
    fresh.present()
    fresh.tpm.send(PHYSICAL_DISABLE).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DISABLED
    assert fresh.tpm.send(PHYSICAL_DISABLE).code == ReturnCode.DISABLED
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    fresh.tpm.send(PCR_READ, u32(0)).ok()


def test_flag_that_has_its_value_costs_no_write(fresh):
    fresh.change("stany", audit_digest=sha1(b"an audit cycle is under way"))
    fresh.present()
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert not fresh.last.permanent_changed
    fresh.tpm.send(PHYSICAL_DISABLE).ok()
    assert fresh.last.permanent_changed


def test_physical_set_deactivated_acts_at_the_next_start(fresh):
    fresh.present()
    fresh.tpm.send(PHYSICAL_SET_DEACTIVATED, u8(1)).ok()
    fresh.tpm.send(PCR_READ, u32(0)).ok()
    fresh.power_cycle().ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED
    fresh.present()
    fresh.tpm.send(PHYSICAL_SET_DEACTIVATED, u8(0)).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED
    fresh.power_cycle().ok()
    fresh.tpm.send(PCR_READ, u32(0)).ok()


def test_set_temp_deactivated_lasts_until_the_next_start(fresh):
    fresh.present()
    fresh.tpm.send(SET_TEMP_DEACTIVATED).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED
    fresh.power_cycle().ok()
    fresh.tpm.send(PCR_READ, u32(0)).ok()


def test_set_temp_deactivated_by_the_operator(fresh):
    fresh.present()
    fresh.tpm.send(SET_OPERATOR_AUTH, OPERATOR_AUTH).ok()
    assert fresh.tpm.flags()[14] == 1
    fresh.change("stclear", physical_presence=False)
    wrong = fresh.tpm.auth(SET_TEMP_DEACTIVATED, b"", fresh.tpm.oiap(ZERO))
    assert wrong.code == ReturnCode.AUTHFAIL
    fresh.tpm.auth(SET_TEMP_DEACTIVATED, b"", fresh.tpm.oiap(OPERATOR_AUTH)).ok()
    assert fresh.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED


def test_set_operator_auth_to_the_same_secret_writes_nothing(fresh):
    fresh.present()
    fresh.tpm.send(SET_OPERATOR_AUTH, OPERATOR_AUTH).ok()
    assert fresh.last.permanent_changed
    fresh.tpm.send(SET_OPERATOR_AUTH, OPERATOR_AUTH).ok()
    assert not fresh.last.permanent_changed
    fresh.tpm.send(SET_OPERATOR_AUTH, ZERO).ok()
    assert fresh.last.permanent_changed


def test_set_temp_deactivated_without_operator_is_nooperator_before_the_session(fresh):
    fresh.present()
    session = Session(0xBAD, ZERO, ZERO)
    assert fresh.tpm.auth(SET_TEMP_DEACTIVATED, b"", session).code == ReturnCode.NOOPERATOR


def test_set_temp_deactivated_under_osap_is_bad_mode(owned):
    owned.present()
    owned.tpm.send(SET_OPERATOR_AUTH, OPERATOR_AUTH).ok()
    session = owned.tpm.osap(2, OWNER, OWNER_AUTH)
    assert owned.tpm.auth(SET_TEMP_DEACTIVATED, b"", session).code == ReturnCode.BAD_MODE


# -- TakeOwnership ---------------------------------------------------------------------------------


class Candidate:
    """Someone who takes ownership; each test spoils one thing."""

    def __init__(self, bench):
        self.tpm = bench.tpm
        _, self.ek, _ = parse_pubkey(self.tpm.send(READ_PUBEK, ZERO).ok())
        self.protocol_id = 5
        self.owner_auth = OWNER_AUTH
        self.enc_owner_auth = oaep(self.ek, OWNER_AUTH)
        self.enc_srk_auth = oaep(self.ek, SRK_AUTH)
        self.srk_params = key_template(0x11)
        self.session = None

    def take(self):
        session = self.session or self.tpm.oiap(self.owner_auth)
        params = u16(self.protocol_id) + sized(self.enc_owner_auth) + sized(self.enc_srk_auth)
        return self.tpm.auth(TAKE_OWNERSHIP, params + self.srk_params, session)


@pytest.fixture
def candidate(with_ek):
    return Candidate(with_ek)


@pytest.mark.parametrize("key12", [False, True])
def test_take_ownership_installs_owner_and_srk(with_ek, candidate, key12):
    candidate.srk_params = key_template(0x11, key12=key12, auth_data_usage=0)
    srk = parse_key(candidate.take().ok())
    assert with_ek.last.permanent_changed
    assert srk.head == candidate.srk_params[:11]
    assert (srk.parms, srk.pcr_info, srk.enc_data, srk.rest) == (rsa_parms(), b"", b"", b"")
    assert len(srk.modulus) == 256
    assert candidate.tpm.capability(5, u32(0x111)) == b"\1"
    # Owner and SRK secrets both work now.
    candidate.tpm.auth(0x66, b"", candidate.tpm.oiap(OWNER_AUTH)).ok()
    owner_read = candidate.tpm.auth(0x81, u32(SRK), candidate.tpm.osap(2, OWNER, OWNER_AUTH)).ok()
    assert owner_read == srk.pubkey
    candidate.tpm.osap(4, SRK, SRK_AUTH)
    assert candidate.tpm.send(READ_PUBEK, ZERO).code == ReturnCode.DISABLED_CMD


def test_take_ownership_draws_new_owner_secrets(with_ek, candidate):
    before = with_ek.state.permanent
    candidate.take().ok()
    after = with_ek.state.permanent
    for name in ("tpm_proof", "context_key", "delegate_key"):
        assert getattr(after, name) != getattr(before, name)
        assert any(getattr(after, name))
    assert after.srk.migration_auth == after.tpm_proof
    assert after.srk.payload == 1


def test_take_ownership_makes_the_tpm_that_other_tests_start_from(with_ek, candidate, owned_state):
    candidate.take().ok()
    made, assumed = with_ek.state.permanent, owned_state.permanent
    assert made.flags == assumed.flags
    assert made.owner_auth == assumed.owner_auth
    assert made.srk.usage_auth == assumed.srk.usage_auth
    assert made.srk.public.algorithm_parms == assumed.srk.public.algorithm_parms


def test_take_ownership_session_may_go_on_with_the_new_owner(candidate):
    session = candidate.session = candidate.tpm.oiap(OWNER_AUTH)
    candidate.take().ok()
    assert session.continues
    candidate.tpm.auth(0x66, b"", session).ok()


def test_take_ownership_works_deactivated(with_ek, candidate):
    with_ek.change("stclear", deactivated=True)
    candidate.take().ok()


def test_take_ownership_binds_the_srk_to_pcrs_as_they_are(candidate):
    binding = selection(0) + ZERO + ZERO
    candidate.srk_params = key_template(0x11, pcr_info=binding)
    srk = parse_key(candidate.take().ok())
    composite = sha1(selection(0), sized(ZERO))
    assert srk.pcr_info == selection(0) + ZERO + composite


def test_take_ownership_twice_is_owner_set_before_anything_else(owned):
    session = Session(0xBAD, ZERO, ZERO)
    params = u16(1) + sized(b"") + sized(b"") + key_template(0x10)
    assert owned.tpm.auth(TAKE_OWNERSHIP, params, session).code == ReturnCode.OWNER_SET


def test_take_ownership_when_not_installable_is_install_disabled(with_ek, candidate):
    with_ek.set_flags(ownership=False)
    assert candidate.take().code == ReturnCode.INSTALL_DISABLED


def test_take_ownership_without_ek_is_no_endorsement(fresh):
    params = u16(5) + sized(b"") + sized(b"") + key_template(0x11)
    answer = fresh.tpm.auth(TAKE_OWNERSHIP, params, fresh.tpm.oiap(OWNER_AUTH))
    assert answer.code == ReturnCode.NO_ENDORSEMENT


@pytest.mark.parametrize(
    ("changed", "code"),
    [
        ({"protocol_id": 1}, ReturnCode.BAD_PARAMETER),
        ({"enc_owner_auth": b""}, ReturnCode.DECRYPT_ERROR),
        ({"enc_owner_auth": b"\x11" * 256}, ReturnCode.DECRYPT_ERROR),
        ({"enc_srk_auth": b"\x11" * 255}, ReturnCode.DECRYPT_ERROR),
        ({"owner_auth": ZERO}, ReturnCode.AUTHFAIL),
        ({"session": Session(0xBAD, ZERO, ZERO)}, ReturnCode.INVALID_AUTHHANDLE),
        ({"srk_params": key_template(0x10)}, ReturnCode.INVALID_KEYUSAGE),
        ({"srk_params": key_template(0x12)}, ReturnCode.INVALID_KEYUSAGE),
        ({"srk_params": key_template(0x11, flags=2)}, ReturnCode.INVALID_KEYUSAGE),
        ({"srk_params": key_template(0x11, flags=0x20)}, ReturnCode.BAD_KEY_PROPERTY),
        ({"srk_params": key_template(0x11, auth_data_usage=2)}, ReturnCode.BAD_KEY_PROPERTY),
        ({"srk_params": key_template(0x11, parms=rsa_parms(1024))}, ReturnCode.BAD_KEY_PROPERTY),
        ({"srk_params": key_template(0x11, parms=rsa_parms(4096))}, ReturnCode.BAD_KEY_PROPERTY),
        (
            {"srk_params": key_template(0x11, parms=rsa_parms(primes=3))},
            ReturnCode.BAD_KEY_PROPERTY,
        ),
        ({"srk_params": key_template(0x11, parms=rsa_parms(enc=2))}, ReturnCode.BAD_KEY_PROPERTY),
        ({"srk_params": key_template(0x11, parms=rsa_parms(sig=2))}, ReturnCode.BAD_KEY_PROPERTY),
        (
            {"srk_params": key_template(0x11, parms=rsa_parms(algorithm=6))},
            ReturnCode.BAD_KEY_PROPERTY,
        ),
        (
            {"srk_params": key_template(0x11, parms=rsa_parms(exponent=b"\1\0\1"))},
            ReturnCode.BAD_KEY_PROPERTY,
        ),
        ({"srk_params": b"\2" + key_template(0x11)[1:]}, ReturnCode.BAD_VERSION),
    ],
)
def test_take_ownership_refuses(with_ek, candidate, changed, code):
    for name, value in changed.items():
        setattr(candidate, name, value)
    before = with_ek.state.permanent
    assert candidate.take().code == code
    assert with_ek.state.permanent is before


@pytest.mark.parametrize("size", [0, 19, 21])
@pytest.mark.parametrize("which", ["owner", "srk"])
def test_take_ownership_with_a_secret_of_another_size_is_bad_key_property(candidate, which, size):
    setattr(candidate, f"enc_{which}_auth", oaep(candidate.ek, bytes(size)))
    assert candidate.take().code == ReturnCode.BAD_KEY_PROPERTY


def test_take_ownership_proof_comes_before_the_srk_is_looked_at(candidate):
    candidate.owner_auth = ZERO
    candidate.enc_srk_auth = b""
    candidate.srk_params = key_template(0x10)
    assert candidate.take().code == ReturnCode.AUTHFAIL


def test_take_ownership_finds_its_session_before_it_looks_at_operands(candidate):
    candidate.session = Session(0xBAD, ZERO, ZERO)
    candidate.protocol_id = 1
    candidate.enc_owner_auth = b""
    assert candidate.take().code == ReturnCode.INVALID_AUTHHANDLE


def test_take_ownership_under_osap_is_bad_mode(with_ek, candidate):
    area = nv_area(0x1000, 4)
    with_ek.change("permanent", nv={0x1000: area})
    candidate.session = candidate.tpm.osap(0x0B, 0x1000, ZERO)
    assert candidate.take().code == ReturnCode.BAD_MODE


def test_take_ownership_in_fips_mode_needs_a_guarded_srk(with_ek, candidate):
    with_ek.set_flags(fips=True)
    candidate.srk_params = key_template(0x11, auth_data_usage=0)
    assert candidate.take().code == ReturnCode.NOTFIPS


def test_take_ownership_wants_the_oaep_label_of_the_tpm(candidate):
    other = rsa.RSAPublicNumbers(65537, number(candidate.ek)).public_key()
    unlabeled = OAEP.__class__(mgf=OAEP._mgf, algorithm=OAEP._algorithm, label=None)
    candidate.enc_owner_auth = other.encrypt(OWNER_AUTH, unlabeled)
    assert candidate.take().code == ReturnCode.DECRYPT_ERROR


# -- clearing --------------------------------------------------------------------------------------


OWNERWRITE, OWNERREAD, AUTHREAD = 0x2, 0x20000, 0x40000
AREAS = {
    0x1000: nv_area(0x1000, OWNERWRITE),
    0x1001: nv_area(0x1001, OWNERREAD),
    0x1002: nv_area(0x1002, AUTHREAD),
    0x10001003: nv_area(0x10001003, OWNERWRITE),
}


DELEGATION = DelegatePublic(
    label=0,
    pcr_info=UNRESTRICTED_PCR_INFO,
    permissions=Delegations(delegate_type=1, per1=0xFFFFFFFF, per2=0),
    family_id=1,
    verification_count=1,
)
"""All that an owner can delegate; the owner pointer of `lived_in` points to it."""


@pytest.fixture
def lived_in(owned):
    """An owned TPM with something of everything."""
    permanent = owned.state.permanent
    owned.set_flags(
        disable_owner_clear=False,
        allow_maintenance=False,
        maintenance_done=True,
        read_srk_pub=True,
        operator=True,
        nv_locked=True,
        tpm_established=True,
        disable_full_da_logic_info=True,
        ownership=False,
    )
    owned.change(
        "permanent",
        operator_auth=OPERATOR_AUTH,
        owner_evict_keys={0x55: permanent.srk},
        family_table={1: FamilyRow(label=1, verification_count=1, flags=1)},
        delegate_table={1: DelegateRow(public=DELEGATION, auth_value=OWNER_AUTH)},
        last_family_id=7,
        counters={0: Counter(label=b"abcd", auth_data=ZERO, value=41)},
        counter_highest=41,
        ordinal_audit_status={0x14: True},
        audit_monotonic_counter=5,
        no_owner_nv_write=12,
        restrict_delegate=3,
        auth_dir=sha1(b"dir"),
        nv=AREAS,
    )
    owned.change("volatile", keys={0x66: permanent.srk})
    owned.change(
        "stclear",
        count_id=0,
        owner_reference=1,
        nv_read_locked={0x1000: True, 0x1002: True},
    )
    transport = TransportSession(
        auth_data=ZERO,
        nonce_even=ZERO,
        attributes=0,
        algorithm_id=0,
        enc_scheme=1,
        trans_digest=ZERO,
    )
    owned.change("stany", context_list={0: 9}, transport_sessions={0x77: transport})
    owned.tpm.oiap()
    owned.tpm.osap(4, SRK, SRK_AUTH)
    return owned


def check_cleared(bench, before):
    """Everything that a clear does, and nothing that it does not (Part 3 §6.2)."""
    after = bench.state
    permanent = after.permanent
    assert permanent.owner_auth is None
    assert permanent.operator_auth is None
    assert permanent.srk is None
    assert permanent.owner_evict_keys == {}
    assert after.volatile.keys == {}
    assert after.stany.sessions == {}
    assert after.stany.context_list == {}
    assert after.stany.transport_sessions == {}
    assert after.stany.transport_exclusive == 0
    assert after.stclear.owner_reference == OWNER
    for name in ("tpm_proof", "context_key", "delegate_key"):
        assert getattr(permanent, name) != getattr(before.permanent, name)
    assert permanent.family_table == {}
    assert permanent.delegate_table == {}
    assert permanent.counters == {}
    assert permanent.ordinal_audit_status == {}
    assert permanent.no_owner_nv_write == 0
    assert permanent.restrict_delegate == 0
    flags = permanent.flags
    assert flags.disable
    assert flags.deactivated
    assert flags.ownership
    assert flags.read_pubek
    assert flags.allow_maintenance
    assert not flags.disable_owner_clear
    assert not flags.operator
    assert not flags.maintenance_done
    assert not flags.read_srk_pub
    assert not flags.disable_full_da_logic_info


def check_kept(bench, before):
    permanent, kept = bench.state.permanent, before.permanent
    assert permanent.endorsement_key is kept.endorsement_key
    assert permanent.tpm_daa_seed == kept.tpm_daa_seed
    assert permanent.daa_proof == kept.daa_proof
    assert permanent.auth_dir == kept.auth_dir
    assert permanent.last_family_id == kept.last_family_id
    assert permanent.audit_monotonic_counter == kept.audit_monotonic_counter + 1  # it is audited
    assert permanent.counter_highest == kept.counter_highest
    for name in (
        "physical_presence_cmd_enable",
        "physical_presence_hw_enable",
        "physical_presence_lifetime_lock",
        "cekp_used",
        "enable_revoke_ek",
        "nv_locked",
        "tpm_established",
    ):
        assert getattr(permanent.flags, name) == getattr(kept.flags, name)
    assert bench.state.stclear.pcrs is before.stclear.pcrs
    assert sorted(permanent.nv) == [0x1002, 0x10001003]
    assert bench.state.stclear.nv_read_locked == {0x1002: True}


def test_owner_clear_clears_and_answers_with_the_old_secret(lived_in):
    before = lived_in.state
    session = lived_in.tpm.oiap(OWNER_AUTH)
    lived_in.tpm.auth(OWNER_CLEAR, b"", session).ok()
    assert not session.continues
    assert lived_in.last.permanent_changed
    check_cleared(lived_in, before)
    check_kept(lived_in, before)


def test_owner_clear_under_osap(lived_in):
    before = lived_in.state
    lived_in.tpm.auth(OWNER_CLEAR, b"", lived_in.tpm.osap(2, OWNER, OWNER_AUTH)).ok()
    check_cleared(lived_in, before)


def test_force_clear_clears(lived_in):
    lived_in.present()
    lived_in.change("stany", transport_exclusive=0x77)
    lived_in.set_flags(disable_owner_clear=True)
    before = lived_in.state
    lived_in.tpm.send(FORCE_CLEAR).ok()
    check_cleared(lived_in, before)
    check_kept(lived_in, before)


CLEARED_STCLEAR = {
    "count_id": 0,
    "disable_reset_lock": False,  # a session with the owner's secret has opened it already
    "deferred_physical_presence": 1,
    "failed_tries": 3,
    "last_failure_us": 1,
}
CLEARED_STANY = {"context_count": 9, "legacy_contexts": {1: 2}}


def test_clear_resets_what_lasts_until_start_up_but_the_pcrs(lived_in):
    """Part 3 §6.2: all fields of TPM_STANY_DATA, and of TPM_STCLEAR_DATA except the PCRs."""
    lived_in.change("stclear", **CLEARED_STCLEAR)
    lived_in.change("stany", **CLEARED_STANY)
    lived_in.tpm.send(EXTEND, u32(10) + sha1(b"kept")).ok()
    before = lived_in.state
    lived_in.tpm.auth(OWNER_CLEAR, b"", lived_in.tpm.oiap(OWNER_AUTH)).ok()
    stclear, stany, new = lived_in.state.stclear, lived_in.state.stany, StClear()
    for name in ("owner_reference", *CLEARED_STCLEAR):
        assert getattr(stclear, name) == getattr(new, name), name
    for name in CLEARED_STANY:
        assert getattr(stany, name) == getattr(StAny(), name), name
    assert stclear.context_nonce_key != before.stclear.context_nonce_key
    assert stany.context_nonce_session != before.stany.context_nonce_session
    assert stclear.pcrs == before.stclear.pcrs


def test_presence_that_was_deferred_before_a_clear_is_not_there_after_it(owned):
    deferred = u32(4) + sized(u32(6)) + sized(u32(1))
    owned.present()
    owned.tpm.send(SET_CAPABILITY, deferred).ok()
    owned.tpm.send(FORCE_CLEAR).ok()
    owned.change("stclear", physical_presence=False)
    assert owned.tpm.send(SET_CAPABILITY, deferred).code == ReturnCode.BAD_PRESENCE


def test_clear_disables_at_once_and_deactivates_at_the_next_start(owned):
    owned.tpm.auth(OWNER_CLEAR, b"", owned.tpm.oiap(OWNER_AUTH)).ok()
    assert owned.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DISABLED
    owned.present()
    owned.tpm.send(PHYSICAL_ENABLE).ok()
    owned.tpm.send(PCR_READ, u32(0)).ok()
    owned.power_cycle().ok()
    assert owned.tpm.send(PCR_READ, u32(0)).code == ReturnCode.DEACTIVATED


def test_cleared_tpm_can_be_owned_again_with_another_srk(owned):
    old = owned.state.permanent.srk.public.pub_key
    owned.present()
    owned.tpm.send(FORCE_CLEAR).ok()
    owned.tpm.send(PHYSICAL_ENABLE).ok()
    srk = parse_key(Candidate(owned).take().ok())
    assert srk.modulus != old


def test_force_clear_needs_no_owner(fresh):
    fresh.present()
    fresh.tpm.send(FORCE_CLEAR).ok()
    assert fresh.tpm.flags()[1] == 1


def test_owner_clear_with_another_secret_is_authfail(owned):
    answer = owned.tpm.auth(OWNER_CLEAR, b"", owned.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.AUTHFAIL
    assert owned.state.permanent.owner_auth == OWNER_AUTH


def test_disable_owner_clear_lasts_until_force_clear(owned):
    owned.tpm.auth(DISABLE_OWNER_CLEAR, b"", owned.tpm.oiap(OWNER_AUTH)).ok()
    owned.power_cycle().ok()
    answer = owned.tpm.auth(OWNER_CLEAR, b"", owned.tpm.oiap(OWNER_AUTH))
    assert answer.code == ReturnCode.CLEAR_DISABLED
    wrong = owned.tpm.auth(OWNER_CLEAR, b"", owned.tpm.oiap(ZERO))
    assert wrong.code == ReturnCode.AUTHFAIL  # who is not the owner does not learn it
    owned.present()
    owned.tpm.send(FORCE_CLEAR).ok()
    assert owned.tpm.flags()[5] == 0


def test_disable_force_clear_lasts_until_the_next_start(fresh):
    fresh.present()
    fresh.tpm.send(DISABLE_FORCE_CLEAR).ok()
    fresh.tpm.send(DISABLE_FORCE_CLEAR).ok()
    assert fresh.tpm.send(FORCE_CLEAR).code == ReturnCode.CLEAR_DISABLED
    fresh.power_cycle().ok()
    fresh.present()
    fresh.tpm.send(FORCE_CLEAR).ok()


# -- physical presence -----------------------------------------------------------------------------


def presence(bench, value):
    return bench.tpm.send(PRESENCE, u16(value)).code


def test_presence_is_asserted_and_withdrawn_by_command(fresh):
    assert presence(fresh, CMD_ENABLE) == 0
    assert presence(fresh, PRESENT) == 0
    assert fresh.tpm.capability(4, u32(0x109))[4] == 1
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert presence(fresh, NOTPRESENT) == 0
    assert fresh.tpm.send(PHYSICAL_ENABLE).code == ReturnCode.BAD_PRESENCE


def test_presence_lasts_until_the_next_start(fresh):
    presence(fresh, CMD_ENABLE)
    presence(fresh, PRESENT)
    fresh.power_cycle().ok()
    assert fresh.tpm.send(PHYSICAL_ENABLE).code == ReturnCode.BAD_PRESENCE
    assert fresh.tpm.flags()[9] == 1


def test_presence_lock_takes_presence_and_lasts_until_the_next_start(fresh):
    presence(fresh, CMD_ENABLE)
    presence(fresh, PRESENT)
    assert presence(fresh, LOCK) == 0
    assert fresh.tpm.capability(4, u32(0x109))[4:6] == b"\0\1"
    for value in (PRESENT, NOTPRESENT, LOCK, LOCK | NOTPRESENT):
        assert presence(fresh, value) == ReturnCode.BAD_PARAMETER
    fresh.power_cycle().ok()
    assert presence(fresh, PRESENT) == 0


def test_presence_lock_with_notpresent_in_one_call(fresh):
    presence(fresh, CMD_ENABLE)
    assert presence(fresh, LOCK | NOTPRESENT) == 0


def test_presence_lifetime_lock_ends_every_change_of_how(fresh):
    assert presence(fresh, 0x80 | CMD_ENABLE) == 0  # enable and lock in one call
    assert [fresh.tpm.flags()[i] for i in (7, 8, 9)] == [1, 0, 1]
    for value in (0x200, 0x100, 0x80, 0x40, 0x20):
        assert presence(fresh, value) == ReturnCode.BAD_PARAMETER
    assert presence(fresh, PRESENT) == 0


def test_presence_by_hardware_pin(fresh):
    assert presence(fresh, 0x40) == 0
    assert fresh.tpm.send(PHYSICAL_ENABLE).code == ReturnCode.BAD_PRESENCE
    fresh.engine.keep(fresh.engine.physical_presence_pin(asserted=True))
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert presence(fresh, 0x200) == 0
    assert fresh.tpm.send(PHYSICAL_ENABLE).code == ReturnCode.BAD_PRESENCE


def test_presence_disable_by_command(fresh):
    presence(fresh, CMD_ENABLE)
    presence(fresh, PRESENT)
    assert presence(fresh, 0x100) == 0
    assert fresh.tpm.send(PHYSICAL_ENABLE).code == ReturnCode.BAD_PRESENCE
    assert presence(fresh, PRESENT) == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize(
    "value",
    [
        0,  # nothing asked
        0x0001, 0x0002, 0x0400, 0x0800, 0x1000, 0x2000, 0x4000, 0x8000,  # no such bit
        0x0020 | 0x8000,
        0x0240,  # hardware on and off
        0x0120,  # command on and off
        0x0020 | PRESENT, 0x0080 | LOCK, 0x0040 | NOTPRESENT,  # for life, and now
        LOCK | PRESENT,
        PRESENT | NOTPRESENT,
    ],
)  # fmt: skip
def test_presence_refuses(fresh, value):
    presence(fresh, CMD_ENABLE)
    before = fresh.state
    assert presence(fresh, value) == ReturnCode.BAD_PARAMETER
    assert fresh.state.permanent is before.permanent
    assert fresh.state.stclear is before.stclear


def test_presence_assertion_before_it_is_enabled_is_bad_parameter(fresh):
    for value in (PRESENT, NOTPRESENT, LOCK):
        assert presence(fresh, value) == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("locality", [0, 1, 2, 3, 4])
def test_reset_establishment_bit_is_for_the_launched(fresh, locality):
    fresh.set_flags(tpm_established=True)
    answer = fresh.tpm.send(RESET_ESTABLISHMENT, locality=locality)
    assert answer.code == (0 if locality >= 3 else ReturnCode.BAD_LOCALITY)
    assert fresh.tpm.flags()[18] == (locality < 3)


def test_secret_does_not_show_in_the_operands_repr():
    assert "hidden" in repr(SetOperatorAuthIn(operator_auth=OPERATOR_AUTH))


def test_hmac_formula_is_the_specifications(owned):
    """One request put together by hand, so that the witness has a witness."""
    out = owned.tpm.send(0x0A).ok()
    handle, even, odd = out[:4], out[4:24], b"o" * 20
    digest = sha1(u32(DISABLE_OWNER_CLEAR))
    mac = hmac1(OWNER_AUTH, digest + even + odd + b"\0")
    answer = owned.tpm.send(DISABLE_OWNER_CLEAR, handle + odd + b"\0" + mac, tag=0xC2)
    body = answer.ok()
    new_even, continues, answer_mac = body[:20], body[20:21], body[21:]
    out_digest = sha1(u32(0), u32(DISABLE_OWNER_CLEAR))
    assert continues == b"\0"
    assert answer_mac == hmac1(OWNER_AUTH, out_digest + new_even + odd + b"\0")
    assert owned.state.stany.sessions == {}
