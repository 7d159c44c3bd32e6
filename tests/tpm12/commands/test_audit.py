"""Auditing (Part 3, chapter 8): events, their counter, and the commands of the auditor.

Digests are computed here from the formulas; the same sequences ran against libtpms under swtpm.
"""

import pytest

from protocol.return_codes import ReturnCode
from tests.tpm12.makers import KEY_AUTH, LEGACY, load, loaded, signing, storage, template, wrap
from tests.tpm12.transport_maker import (
    ENCRYPT,
    ESTABLISH,
    EXECUTE,
    KH_TRANSPORT,
    LOG,
    MGF1,
    NONE,
    SECRET,
    Transport,
    public,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    frame,
    is_signature,
    key_template,
    number,
    oaep,
    parse_key,
    rsa_parms,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.auditing import AUDITED_AT_FACTORY, NEVER_AUDITED
from tpm12.commands import ALL
from tpm12.profile import Profile
from tpm12.state import SelfTestState

GET_AUDIT_DIGEST, GET_AUDIT_DIGEST_SIGNED, SET_ORDINAL_AUDIT_STATUS = 0x85, 0x86, 0x8D
OIAP, OSAP, PCR_READ, EXTEND, FLUSH, STARTUP = 0x0A, 0x0B, 0x15, 0x14, 0xBA, 0x99
LOAD_KEY, LOAD_KEY2, MAKE_IDENTITY, FORCE_CLEAR, OWNER_CLEAR = 0x20, 0x41, 0x79, 0x5D, 0x5B
PHYSICAL_ENABLE, CREATE_WRAP_KEY, GET_CAPABILITY_OWNER, PRESENCE = 0x6F, 0x1F, 0x66, 0x4000000A
SAVE_STATE = 0x98
REPLAY = sha1(b"replay")
FACTORY = [
    0x0D, 0x10, 0x1F, 0x28, 0x2A, 0x2B, 0x2C, 0x2D, 0x2E, 0x2F, 0x30, 0x5B, 0x5C, 0x5D, 0x5E, 0x6E,
    0x6F, 0x70, 0x71, 0x72, 0x73, 0x79, 0x7A, 0x7C, 0x7D, 0x7E, 0x8D,
]  # fmt: skip
"""Of libtpms as it runs, and the maintenance commands, which it leaves out."""


class Audit:
    """The auditor's view of a bench."""

    def __init__(self, bench):
        self.bench, self.tpm = bench, bench.tpm

    def look(self, start=0):
        """Counter value, digest, more, ordinals."""
        out = self.tpm.send(GET_AUDIT_DIGEST, u32(start)).ok()
        size = number(out[31:35])
        listed = [number(out[35 + i : 39 + i]) for i in range(0, size, 4)]
        assert len(out) == 35 + size
        return out[:10], out[10:30], out[30], listed

    @property
    def digest(self):
        return self.look()[1]

    @property
    def count(self):
        return number(self.look()[0][6:])

    def set(self, ordinal, state, secret=OWNER_AUTH):
        session = self.tpm.oiap(secret).ending()
        return self.tpm.auth(SET_ORDINAL_AUDIT_STATUS, u32(ordinal) + u8(state), session).code

    def only(self, *ordinals):
        """Audit these and nothing else."""
        factory = dict.fromkeys(FACTORY, False)
        self.bench.change(
            "permanent", ordinal_audit_status={**factory, **dict.fromkeys(ordinals, True)}
        )
        return self

    def after(self, came, went, start=None, count=None):
        """The digest after one more command, by the digests of its input and output."""
        digest = self.digest if start is None else start
        counter = u16(0x0E) + bytes(4) + u32(self.count if count is None else count)
        return sha1(sha1(digest, u16(0x12), came, counter), u16(0x13), went, counter)


@pytest.fixture
def audit(owned):
    """An owned TPM in the middle of an audit cycle, in which nothing is audited yet."""
    owned.change("stany", audit_digest=sha1(b"events so far"))
    owned.change("permanent", audit_monotonic_counter=7)
    return Audit(owned).only()


# -- what is audited -------------------------------------------------------------------------------


def test_factory_default_is_the_specifications(fresh):
    counter, digest, more, listed = Audit(fresh).look()
    assert counter == u16(0x0E) + bytes(8)
    assert (digest, more, listed) == (ZERO, 0, FACTORY)
    assert sorted(AUDITED_AT_FACTORY) == FACTORY


def test_every_default_is_a_command():
    assert {command.ordinal for command in ALL} >= AUDITED_AT_FACTORY | NEVER_AUDITED


@pytest.mark.parametrize(
    ("start", "first"), [(0, 0x0D), (0x0D, 0x0D), (0x0E, 0x10), (0x8D, 0x8D), (0x8E, None)]
)
def test_list_starts_where_it_is_asked_to(fresh, start, first):
    listed = Audit(fresh).look(start)[3]
    assert listed == [ordinal for ordinal in FACTORY if ordinal >= start]
    assert listed[:1] == ([first] if first else [])


def test_list_has_ordinals_of_the_platform_last(audit):
    audit.only(PCR_READ, PRESENCE)
    assert audit.look()[3] == [PCR_READ, PRESENCE]
    assert audit.look(PRESENCE)[3] == [PRESENCE]
    assert audit.look(PRESENCE + 1)[3] == []


def test_list_that_does_not_fit_says_more(make_bench, fresh_state):
    audit = Audit(make_bench(fresh_state, Profile(input_buffer_bytes=45 + 4 * 10 + 3)))
    assert audit.look()[2:] == (1, FACTORY[:10])
    assert audit.look(FACTORY[10])[2:] == (1, FACTORY[10:20])
    assert audit.look(FACTORY[20])[2:] == (0, FACTORY[20:])


def test_set_status_turns_audit_on_and_off(audit):
    assert audit.set(PCR_READ, 1) == 0
    assert audit.look()[3] == [PCR_READ]
    assert audit.set(PCR_READ, 0) == 0
    assert audit.look()[3] == []
    assert audit.set(FORCE_CLEAR, 1) == 0
    assert audit.look()[3] == [FORCE_CLEAR]


@pytest.mark.parametrize("ordinal", sorted({command.ordinal for command in ALL} - NEVER_AUDITED))
def test_set_status_of_every_command(audit, ordinal):
    assert audit.set(ordinal, 1) == 0
    assert audit.look()[3] == [ordinal]


def test_set_status_lasts(audit):
    audit.set(PCR_READ, 1)
    audit.bench.power_cycle().ok()
    assert audit.look()[3] == [PCR_READ]


def test_set_status_to_what_it_is_costs_no_write(audit):
    for ordinal, state in ((PCR_READ, 0), (FORCE_CLEAR, 0), (GET_AUDIT_DIGEST, 0)):
        assert audit.set(ordinal, state) == 0
        assert not audit.bench.last.permanent_changed
    audit.set(PCR_READ, 1)
    assert audit.bench.last.permanent_changed


@pytest.mark.parametrize("ordinal", [0x6B, 0x100, 0x97, 0x64, 0x82, 0x8C, 0xFFFFFFFF])
@pytest.mark.parametrize("state", [0, 1])
def test_set_status_of_what_is_no_command_is_badindex(audit, ordinal, state):
    """§8.5, action 2. (libtpms answers BAD_PARAMETER, and SUCCESS to turning them off.)"""
    assert audit.set(ordinal, state) == ReturnCode.BADINDEX


@pytest.mark.parametrize("ordinal", sorted(NEVER_AUDITED))
def test_set_status_of_what_is_never_audited(audit, ordinal):
    assert audit.set(ordinal, 1) == ReturnCode.BAD_PARAMETER
    assert audit.set(ordinal, 0) == 0


def test_set_status_is_for_the_owner(audit):
    assert audit.set(PCR_READ, 1, ZERO) == ReturnCode.AUTHFAIL
    assert audit.look()[3] == []


def test_owner_clear_brings_the_factory_default_back(audit):
    audit.only(PCR_READ)
    audit.tpm.auth(OWNER_CLEAR, b"", audit.tpm.oiap(OWNER_AUTH)).ok()
    audit.bench.set_flags(disable=False)
    assert audit.look()[3] == FACTORY


# -- events ----------------------------------------------------------------------------------------


def test_event_of_a_command_without_authorization(audit):
    audit.only(PCR_READ)
    expected = audit.after(sha1(u32(PCR_READ), u32(16)), sha1(u32(0), u32(PCR_READ), ZERO))
    audit.tpm.send(PCR_READ, u32(16)).ok()
    assert audit.digest == expected


def test_event_of_an_authorized_command(audit):
    audit.only(GET_CAPABILITY_OWNER)
    start = audit.digest
    body = audit.tpm.auth(GET_CAPABILITY_OWNER, b"", audit.tpm.oiap(OWNER_AUTH)).ok()
    ordinal = u32(GET_CAPABILITY_OWNER)
    assert audit.digest == audit.after(sha1(ordinal), sha1(u32(0), ordinal, body), start)


def test_event_leaves_handles_out_as_an_authorization_does(audit):
    blob = wrap(audit.tpm, signing()).ok()
    audit.only(LOAD_KEY, LOAD_KEY2, FLUSH)
    start = audit.digest
    key = load(audit.tpm, blob).ok()
    expected = audit.after(sha1(u32(LOAD_KEY2), blob), sha1(u32(0), u32(LOAD_KEY2)), start)
    assert audit.digest == expected
    audit.tpm.send(FLUSH, key + u32(1)).ok()
    expected = audit.after(sha1(u32(FLUSH), u32(1)), sha1(u32(0), u32(FLUSH)), expected)
    assert audit.digest == expected
    key = load(audit.tpm, blob, ordinal=LOAD_KEY).ok()
    expected = audit.after(sha1(u32(LOAD_KEY), blob), sha1(u32(0), u32(LOAD_KEY), key), expected)
    assert audit.digest == expected


@pytest.mark.parametrize("ordinal", [OIAP, OSAP])
def test_event_of_a_session_has_neither_operands_nor_results(audit, ordinal):
    audit.only(ordinal)
    expected = audit.after(sha1(u32(ordinal)), sha1(u32(0), u32(ordinal)))
    if ordinal == OIAP:
        audit.tpm.oiap()
    else:
        audit.tpm.osap(4, SRK, SRK_AUTH)
    assert audit.digest == expected


def test_event_of_a_command_that_fails_is_none(audit):
    """§8.1, 2: of this revision; until 103 a failed command left its events too."""
    audit.only(PCR_READ, FORCE_CLEAR, GET_CAPABILITY_OWNER)
    before = audit.look()
    assert audit.tpm.send(PCR_READ, u32(99)).code == ReturnCode.BADINDEX
    assert audit.tpm.send(PCR_READ).code == ReturnCode.BAD_PARAM_SIZE
    assert audit.tpm.send(FORCE_CLEAR).code == ReturnCode.BAD_PRESENCE
    answer = audit.tpm.auth(GET_CAPABILITY_OWNER, b"", audit.tpm.oiap(ZERO))
    assert answer.code == ReturnCode.AUTHFAIL
    assert audit.look() == before


def test_failed_command_begins_no_cycle(fresh):
    assert fresh.tpm.send(FORCE_CLEAR).code == ReturnCode.BAD_PRESENCE
    assert not fresh.last.permanent_changed
    assert Audit(fresh).look()[1] == ZERO


def test_event_of_what_is_not_audited_is_none(audit):
    before = audit.digest
    audit.tpm.send(PCR_READ, u32(0)).ok()
    audit.tpm.send(EXTEND, u32(0) + ZERO).ok()
    assert audit.digest == before


def test_event_of_setting_its_own_status_depends_on_the_status_before(audit):
    """§8.1, corner case 3 b."""
    ordinal, off = u32(SET_ORDINAL_AUDIT_STATUS), u32(SET_ORDINAL_AUDIT_STATUS) + u8(0)
    before = audit.digest
    audit.set(SET_ORDINAL_AUDIT_STATUS, 1)
    assert audit.digest == before
    audit.set(SET_ORDINAL_AUDIT_STATUS, 0)
    expected = audit.after(sha1(ordinal, off), sha1(u32(0), ordinal), before)
    assert audit.digest == expected


def test_event_of_owner_clear_though_it_resets_the_status_is_in_the_new_cycle(audit):
    """Part 3 §6.2: the digest is reset, too; Part 1 §21: what comes then begins another cycle."""
    audit.only(OWNER_CLEAR)
    ordinal = u32(OWNER_CLEAR)
    count = audit.bench.state.permanent.audit_monotonic_counter
    audit.tpm.auth(OWNER_CLEAR, b"", audit.tpm.oiap(OWNER_AUTH)).ok()
    audit.bench.set_flags(disable=False)
    expected = audit.after(sha1(ordinal), sha1(u32(0), ordinal), ZERO, count=count + 1)
    assert audit.digest == expected


def test_event_of_startup_is_in_the_new_cycle(audit):
    audit.only(STARTUP)
    audit.bench.power_cycle().ok()
    ordinal = u32(STARTUP)
    expected = audit.after(sha1(ordinal, u16(1)), sha1(u32(0), ordinal), ZERO, count=8)
    assert audit.look()[:2] == (u16(0x0E) + bytes(4) + u32(8), expected)


# -- cycles ----------------------------------------------------------------------------------------


def test_first_event_counts_up_and_is_a_permanent_change(fresh):
    audit = Audit(fresh)
    fresh.present()
    for _ in range(3):
        fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert audit.count == 1
    fresh.change("stany", audit_digest=ZERO)
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert fresh.last.permanent_changed
    assert audit.count == 2
    ordinal = u32(PHYSICAL_ENABLE)
    assert audit.digest == audit.after(sha1(ordinal), sha1(u32(0), ordinal), ZERO)
    fresh.tpm.send(PHYSICAL_ENABLE).ok()
    assert not fresh.last.permanent_changed


def test_start_ends_the_cycle(audit):
    audit.only(PCR_READ)
    audit.bench.power_cycle().ok()
    assert audit.look()[:2] == (u16(0x0E) + bytes(4) + u32(7), ZERO)
    audit.tpm.send(PCR_READ, u32(0)).ok()
    assert audit.count == 8


def test_counter_at_its_end_fails_the_command_and_the_tpm(audit):
    """§8.2: what cannot be audited is not done, and the TPM trusts itself no more."""
    audit.only(EXTEND)
    audit.bench.change("permanent", audit_monotonic_counter=0xFFFFFFFF)
    audit.bench.change("stany", audit_digest=ZERO)
    before = audit.bench.state.stclear.pcrs
    answer = audit.tpm.send(EXTEND, u32(0) + REPLAY)
    assert answer.code == ReturnCode.AUDITFAIL_SUCCESSFUL
    assert audit.bench.state.stclear.pcrs is before
    assert audit.bench.state.volatile.self_test == SelfTestState.FAILURE
    assert audit.tpm.send(PCR_READ, u32(0)).code == ReturnCode.FAILEDSELFTEST


def test_audited_command_whose_change_is_refused_leaves_no_event(audit):
    audit.only(EXTEND)
    audit.bench.change("stany", audit_digest=ZERO)
    outcome = audit.bench.engine.execute(frame(EXTEND, u32(0) + REPLAY))
    assert outcome.permanent_changed
    # Its host cannot store it, and does not keep it.
    assert audit.look()[:2] == (u16(0x0E) + bytes(4) + u32(7), ZERO)


# -- inside transport sessions ---------------------------------------------------------------------


def session_with(audit, attributes):
    session = Transport(audit.tpm, attributes, MGF1, NONE)
    if not attributes & ENCRYPT:
        return session.open()
    srk = audit.bench.state.permanent.srk.public.pub_key
    session.moduli[SRK] = srk
    blob = oaep(srk, u16(0x1D) + SECRET)
    return session.open_under(SRK, blob, audit.tpm.oiap(SRK_AUTH).ending())


H1, H2 = sha1(u32(PCR_READ), u32(16)), sha1(u32(0), u32(PCR_READ), ZERO)
HIDDEN = sha1(u32(PCR_READ)), sha1(u32(0), u32(PCR_READ))


@pytest.mark.parametrize("attributes", [0, LOG])
def test_event_of_a_wrapped_command_is_as_outside(audit, attributes):
    session = session_with(audit, attributes)
    audit.only(PCR_READ)
    expected = audit.after(H1, H2)
    session.send(PCR_READ, u32(16)).ok()
    assert audit.digest == expected


def test_event_of_a_hidden_command_is_its_ordinal(audit):
    session = session_with(audit, ENCRYPT)
    audit.only(PCR_READ)
    expected = audit.after(*HIDDEN)
    session.send(PCR_READ, u32(16)).ok()
    assert audit.digest == expected


@pytest.mark.parametrize("attributes", [0, ENCRYPT])
def test_event_of_executing_has_the_wrapped_parameters(audit, attributes):
    """§24.2, actions 8 and 20: H1 and H2, also of a session that encrypts."""
    session = session_with(audit, attributes)
    audit.only(EXECUTE)
    expected = audit.after(H1, H2)
    session.send(PCR_READ, u32(16)).ok()
    assert audit.digest == expected


@pytest.mark.parametrize("attributes", [0, ENCRYPT])
def test_wrapped_command_is_audited_twice_if_both_are(audit, attributes):
    session = session_with(audit, attributes)
    audit.only(EXECUTE, PCR_READ)
    inner = audit.after(*(HIDDEN if attributes else (H1, H2)))
    expected = audit.after(H1, H2, inner)
    session.send(PCR_READ, u32(16)).ok()
    assert audit.digest == expected


def test_event_of_executing_what_fails_has_its_code(audit):
    session = session_with(audit, 0)
    audit.only(EXECUTE, PCR_READ)
    came, went = sha1(u32(PCR_READ), u32(99)), sha1(u32(ReturnCode.BADINDEX), u32(PCR_READ))
    expected = audit.after(came, went)
    assert session.send(PCR_READ, u32(99)).code == ReturnCode.BADINDEX
    assert audit.digest == expected


def test_event_of_executing_that_fails_is_none(audit):
    session = session_with(audit, 0)
    audit.only(EXECUTE, PCR_READ)
    before = audit.digest
    assert session.execute(frame(PCR_READ, u32(0)), bad_hmac=True).code == ReturnCode.AUTHFAIL
    assert audit.digest == before


def test_event_of_establishing_leaves_the_handle_out(audit):
    audit.only(ESTABLISH)
    start, params = audit.digest, public() + sized(SECRET)
    body = audit.tpm.send(ESTABLISH, u32(KH_TRANSPORT) + params).ok()
    ordinal = u32(ESTABLISH)
    assert audit.digest == audit.after(
        sha1(ordinal, params), sha1(u32(0), ordinal, body[4:]), start
    )


def test_cycle_may_begin_inside(audit):
    session = session_with(audit, 0)
    audit.only(PCR_READ)
    audit.bench.change("stany", audit_digest=ZERO)
    session.send(PCR_READ, u32(16)).ok()
    assert audit.bench.last.permanent_changed
    assert audit.digest == audit.after(H1, H2, ZERO, count=8)


# -- GetAuditDigestSigned --------------------------------------------------------------------------


def sign(audit, key, secret=KEY_AUTH, *, close=0):
    session = audit.tpm.oiap(secret).ending()
    return audit.tpm.auth(GET_AUDIT_DIGEST_SIGNED, u8(close) + REPLAY, session, handles=u32(key))


def signed_bytes(counter, digest, ordinals):
    listed = sha1(b"".join(u32(ordinal) for ordinal in ordinals))
    return u16(5) + b"ADIG" + REPLAY + sized(digest + counter + listed), listed


@pytest.fixture
def identity(audit):
    """A loaded identity key: handle and modulus."""
    owner = audit.tpm.osap(2, 0, OWNER_AUTH)
    wanted = key_template(0x12, parms=rsa_parms(2048, 1, 2))
    params = owner.masked(KEY_AUTH) + sha1(b"privacy CA") + wanted
    out = audit.tpm.auth(MAKE_IDENTITY, params, audit.tpm.oiap(SRK_AUTH).ending(), owner).ok()
    parts = parse_key(out)
    blob = out[: len(out) - len(parts.rest)]
    return number(load(audit.tpm, blob).ok()), parts.modulus


@pytest.mark.parametrize("wanted", [signing(), signing(4), template(LEGACY, 3, 2)])
def test_signed_digest(audit, wanted):
    key, parts = loaded(audit.tpm, wanted)
    audit.only(PCR_READ, EXTEND)
    counter, digest, _, ordinals = audit.look()
    body = sign(audit, key).ok()
    message, listed = signed_bytes(counter, digest, ordinals)
    assert body[:50] == counter + digest + listed
    assert is_signature(parts.modulus, body[54:], message)
    assert audit.digest == digest


def test_signed_digest_of_an_identity_closes_and_tells_what_it_signed(audit, identity):
    """libtpms tells zeros then, though it signs the digest."""
    key, modulus = identity
    audit.only(PCR_READ)
    counter, digest, _, ordinals = audit.look()
    body = sign(audit, key, close=1).ok()
    message, listed = signed_bytes(counter, digest, ordinals)
    assert body[:50] == counter + digest + listed
    assert is_signature(modulus, body[54:], message)
    assert audit.look()[:2] == (counter, ZERO)
    audit.tpm.send(PCR_READ, u32(0)).ok()
    assert audit.count == number(counter[6:]) + 1


def test_signed_digest_of_an_identity_need_not_close(audit, identity):
    before = audit.digest
    sign(audit, identity[0]).ok()
    assert audit.digest == before


def test_signed_digest_is_closed_by_identities_only(audit):
    key, _ = loaded(audit.tpm, signing())
    before = audit.digest
    assert sign(audit, key, close=1).code == ReturnCode.INVALID_KEYUSAGE
    assert audit.digest == before


@pytest.mark.parametrize("wanted", [signing(3), storage()])
def test_signed_digest_by_a_key_for_something_else_is_invalid_keyusage(audit, wanted):
    key, _ = loaded(audit.tpm, wanted)
    assert sign(audit, key).code == ReturnCode.INVALID_KEYUSAGE


def test_signed_digest_needs_the_keys_secret(audit):
    key, _ = loaded(audit.tpm, signing())
    assert sign(audit, key, ZERO).code == ReturnCode.AUTHFAIL
    answer = audit.tpm.send(GET_AUDIT_DIGEST_SIGNED, u32(key) + u8(0) + REPLAY)
    assert answer.code == ReturnCode.AUTHFAIL
    assert sign(audit, 0x999).code == ReturnCode.INVALID_KEYHANDLE


def test_signed_digest_with_a_key_that_needs_no_authorization(audit):
    key, parts = loaded(audit.tpm, signing(auth_data_usage=0))
    counter, digest, _, ordinals = audit.look()
    body = audit.tpm.send(GET_AUDIT_DIGEST_SIGNED, u32(key) + u8(0) + REPLAY).ok()
    assert is_signature(parts.modulus, body[54:], signed_bytes(counter, digest, ordinals)[0])


def test_close_that_is_no_bool_is_bad_parameter(audit):
    key, _ = loaded(audit.tpm, signing())
    assert sign(audit, key, close=2).code == ReturnCode.BAD_PARAMETER
