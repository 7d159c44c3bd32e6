"""TPM_DAA_Join and TPM_DAA_Sign: whole runs that an issuer and a verifier check, each refusal."""

from dataclasses import replace

import pytest

from protocol.constants import ResourceType
from protocol.return_codes import ReturnCode
from protocol.structures import PcrInfo, PcrSelection
from tests.tpm12 import daa_issuer
from tests.tpm12.conftest import Bench
from tests.tpm12.daa_issuer import JOIN, SIGN, Issuer, Platform, join, verify, wide
from tests.tpm12.identities import loaded_identity
from tests.tpm12.makers import WRONG, loaded, signing
from tests.tpm12.witness import sha1, sized, u16, u32
from tpm12 import daa
from tpm12.profile import Profile
from tpm12.state import StAny
from tpm12.state_codec import decode_section, encode_section

FLUSH, OWNER_CLEAR = 0xBA, 0x5B
DAASESS = 0x11A
"""TPM_CAP_PROPERTY: how many more DAA sessions there may be."""
DAA = int(ResourceType.DAA_TPM)
MESSAGE = sha1(b"message")
LAST = {JOIN: 24, SIGN: 15}


@pytest.fixture(scope="module")
def issuer():
    return Issuer()


@pytest.fixture(scope="module")
def joined(owned_state, issuer):
    """A platform with a credential: state and credential, to be shared."""
    bench = Bench(owned_state)
    credential = join(bench.tpm, issuer)
    return bench.state, credential


@pytest.fixture(scope="module")
def stages(owned_state, joined, issuer):
    """For each kind and stage: the state in which that stage comes next, and the handle."""
    found = {}
    for kind, state, credential in ((JOIN, owned_state, None), (SIGN, *joined)):
        bench = Bench(state)
        platform = Platform(bench.tpm, kind)
        for stage in range(LAST[kind] + 1):
            found[kind, stage] = (bench.state, platform.handle)
            advance(platform, issuer, stage, credential)
    return found


def advance(platform, issuer, stage, credential):
    """Run one stage (all rounds of it) with plain inputs."""
    for number, data0, data1 in platform.inputs(issuer, credential):
        if number == stage:
            platform.stage(data0, data1, again=platform.comes_again(number, data0, issuer))


@pytest.fixture
def at(stages, make_bench):
    """Make a bench and a platform whose next stage is the given one."""

    def make(kind, stage):
        state, handle = stages[kind, stage]
        bench = make_bench(state)
        platform = Platform(bench.tpm, kind)
        platform.handle, platform.next = handle, stage
        return bench, platform

    return make


# -- whole runs ------------------------------------------------------------------------------------


def test_join_then_sign_gives_a_signature_that_verifies(owned, issuer):
    credential = join(owned.tpm, issuer)
    signature = daa_issuer.sign(owned.tpm, issuer, credential, b"\1", MESSAGE)
    assert verify(issuer, signature, b"\1", MESSAGE)


def test_join_keeps_nothing_in_the_tpm(owned, issuer):
    join(owned.tpm, issuer)
    assert owned.state.stany.daa_sessions == {}
    assert not owned.last.permanent_changed


def test_sign_identity_key_names_its_modulus(owned, issuer):
    handle, key = loaded_identity(owned.tpm)
    credential = join(owned.tpm, issuer)
    signature = daa_issuer.sign(
        owned.tpm, issuer, credential, b"\0", u32(handle), message=key.modulus
    )
    assert verify(issuer, signature, b"\0", key.modulus)
    assert not verify(issuer, signature, b"\1", key.modulus)


def test_credential_signs_any_number_of_times(owned, issuer):
    credential = join(owned.tpm, issuer, count=7)
    signatures = [
        daa_issuer.sign(owned.tpm, issuer, credential, b"\1", message)
        for message in (MESSAGE, MESSAGE, sha1(b"another"))
    ]
    assert [verify(issuer, s, b"\1", MESSAGE) for s in signatures] == [True, True, False]
    assert len({s.t for s in signatures}) == 3


@pytest.mark.parametrize("part", ["t", "w", "pseudonym", "c", "s0", "s1", "sv", "se"])
def test_verifier_notices_each_changed_part(joined, make_bench, issuer, part):
    # The control for the verifier that the tests above believe.
    state, credential = joined
    signature = daa_issuer.sign(make_bench(state).tpm, issuer, credential, b"\1", MESSAGE)
    assert verify(issuer, signature, b"\1", MESSAGE)
    changed = replace(signature, **{part: getattr(signature, part) + 1})
    assert not verify(issuer, changed, b"\1", MESSAGE)


def test_pseudonym_depends_on_tpm_issuer_and_count(owned, issuer):
    gamma, w = issuer.gamma_bytes, wide(issuer.base())

    def pseudonym(count):
        platform = Platform(owned.tpm, JOIN)
        for stage, data0, data1 in platform.inputs(issuer, None):
            if stage == 13:
                break
            given = u32(count) if stage == 3 else data0
            platform.stage(given, data1, again=platform.comes_again(stage, data0, issuer))
        platform.stage(gamma, w)
        out = platform.stage(gamma)
        owned.tpm.send(FLUSH, u32(platform.handle) + u32(DAA)).ok()
        return out

    assert pseudonym(1) == pseudonym(1)
    assert pseudonym(1) != pseudonym(2)
    before = pseudonym(1)
    owned.change("permanent", tpm_daa_seed=sha1(b"another TPM"))
    assert pseudonym(1) != before


def test_sessions_of_two_platforms_do_not_mix(owned, issuer):
    first, second = Platform(owned.tpm, JOIN), Platform(owned.tpm, JOIN)
    for number, data0, data1 in first.inputs(issuer, None):
        if number == 3:
            break
        again = first.comes_again(number, data0, issuer)
        first.stage(data0, data1, again=again)
        second.stage(data0, data1, again=again)
    assert first.handle != second.handle
    first.stage(u32(1))
    second.stage(u32(1))


# -- sessions --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [JOIN, SIGN])
def test_first_stage_without_a_free_session_is_resources(owned, issuer, kind):
    data0 = u32(1) if kind == JOIN else issuer.settings
    for _ in range(2):
        Platform(owned.tpm, kind).stage(data0)
    assert Platform(owned.tpm, kind).ask(0, data0).code == ReturnCode.RESOURCES


def test_number_of_sessions_is_the_profiles(make_bench, owned_state):
    bench = make_bench(owned_state, Profile(daa_sessions=1))
    Platform(bench.tpm, JOIN).stage(u32(1))
    assert Platform(bench.tpm, JOIN).ask(0, u32(1)).code == ReturnCode.RESOURCES


def test_flush_ends_a_session(owned):
    platform = Platform(owned.tpm, JOIN)
    platform.stage(u32(1))
    owned.tpm.send(FLUSH, u32(platform.handle) + u32(DAA)).ok()
    assert platform.ask(1, bytes(256)).code == ReturnCode.BAD_HANDLE
    again = owned.tpm.send(FLUSH, u32(platform.handle) + u32(DAA))
    assert again.code == ReturnCode.BAD_PARAMETER


def test_flush_of_another_type_leaves_the_session(owned):
    platform = Platform(owned.tpm, JOIN)
    platform.stage(u32(2))
    for resource_type in (1, 2, 4, 5):
        assert owned.tpm.send(FLUSH, u32(platform.handle) + u32(resource_type)).code
    platform.stage(bytes(256))


def test_startup_ends_sessions(owned):
    platform = Platform(owned.tpm, JOIN)
    platform.stage(u32(1))
    owned.power_cycle().ok()
    assert platform.ask(1, bytes(256)).code == ReturnCode.BAD_HANDLE


@pytest.mark.parametrize("kind", [JOIN, SIGN])
def test_unknown_handle_is_bad_handle(owned, kind):
    assert Platform(owned.tpm, kind).ask(1, bytes(256), handle=12345).code == ReturnCode.BAD_HANDLE


def test_session_is_part_of_the_state(at):
    bench, _ = at(JOIN, 23)
    stany = bench.state.stany
    assert len(stany.daa_sessions) == 1
    assert decode_section(StAny, encode_section(stany)).daa_sessions == stany.daa_sessions


def test_session_does_not_show_its_secrets(at):
    bench, _ = at(JOIN, 17)
    (session,) = bench.state.stany.daa_sessions.values()
    for secret in (session.join_u0, session.join_u1, session.context_seed):
        assert repr(secret)[2:20] not in repr(session)
    assert repr(session.tpm_specific.daa_rekey)[2:20] not in repr(session)


# -- any error ends the session --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "stage"), [(kind, stage) for kind in LAST for stage in range(1, LAST[kind] + 1)]
)
def test_wrong_owner_secret_is_authfail_at_each_stage_and_ends_the_session(at, kind, stage):
    bench, platform = at(kind, stage)
    assert platform.ask(stage, secret=WRONG).code == ReturnCode.AUTHFAIL
    assert bench.state.stclear.failed_tries == 1
    assert platform.ask(stage).code == ReturnCode.BAD_HANDLE


@pytest.mark.parametrize(
    ("kind", "stage"), [(kind, stage) for kind in LAST for stage in range(1, LAST[kind] + 1)]
)
@pytest.mark.parametrize("step", [-1, 1, 100])
def test_another_stage_than_the_next_is_daa_stage_and_ends_the_session(at, kind, stage, step):
    wanted = stage + step
    if wanted == 0:
        return
    bench, platform = at(kind, stage)
    assert platform.ask(wanted).code == ReturnCode.DAA_STAGE
    assert bench.state.stany.daa_sessions == {}
    assert platform.ask(stage).code == ReturnCode.BAD_HANDLE


def test_first_stage_again_is_another_session(owned, issuer):
    platform = Platform(owned.tpm, SIGN)
    platform.stage(issuer.settings)
    assert platform.ask(0, issuer.settings).code == 0
    assert len(owned.state.stany.daa_sessions) == 2


def test_failed_first_stage_leaves_no_session(owned):
    assert Platform(owned.tpm, JOIN).ask(0, u32(0)).code == ReturnCode.DAA_INPUT_DATA0
    assert owned.state.stany.daa_sessions == {}


# -- sessions of the other kind --------------------------------------------------------------------


def test_join_session_is_no_sign_session(at, joined):
    _, credential = joined
    bench, platform = at(JOIN, 1)
    platform.ordinal = SIGN
    # The blob is good, but the session knows no issuer yet. (libtpms notices at stage 2 only.)
    assert platform.ask(1, credential.own).code == ReturnCode.DAA_ISSUER_SETTINGS
    assert bench.state.stany.daa_sessions == {}


@pytest.mark.parametrize("stage", [4, 9, 15])
def test_join_session_with_an_issuer_is_no_sign_session(at, stage):
    _, platform = at(JOIN, stage)
    platform.ordinal = SIGN
    assert platform.ask(stage).code == ReturnCode.DAA_TPM_SETTINGS


@pytest.mark.parametrize(("kind", "stage"), [(JOIN, 3), (JOIN, 24), (SIGN, 2), (SIGN, 15)])
def test_session_whose_issuer_changed_is_daa_issuer_settings(at, kind, stage):
    # No command changes it; the check is the specification's own.
    bench, platform = at(kind, stage)
    ((handle, session),) = bench.state.stany.daa_sessions.items()
    other = replace(session.issuer_settings, daa_digest_n=sha1(b"another issuer"))
    bench.change("stany", daa_sessions={handle: replace(session, issuer_settings=other)})
    assert platform.ask(stage).code == ReturnCode.DAA_ISSUER_SETTINGS


@pytest.mark.parametrize(("kind", "stage"), [(JOIN, 1), (JOIN, 24), (SIGN, 2), (SIGN, 15)])
def test_session_whose_credential_changed_is_daa_tpm_settings(at, kind, stage):
    bench, platform = at(kind, stage)
    ((handle, session),) = bench.state.stany.daa_sessions.items()
    other = replace(session.tpm_specific, daa_count=session.tpm_specific.daa_count + 1)
    bench.change("stany", daa_sessions={handle: replace(session, tpm_specific=other)})
    assert platform.ask(stage).code == ReturnCode.DAA_TPM_SETTINGS


@pytest.mark.parametrize("stage", [16, 20, 24])
def test_join_session_past_the_stages_of_sign_is_daa_stage(at, stage):
    _, platform = at(JOIN, stage)
    platform.ordinal = SIGN
    assert platform.ask(stage).code == ReturnCode.DAA_STAGE


def test_join_session_before_its_issuer_is_no_sign_session(at):
    _, platform = at(JOIN, 2)
    platform.ordinal = SIGN
    assert platform.ask(2).code == ReturnCode.DAA_ISSUER_SETTINGS


@pytest.mark.parametrize("stage", [1, 2, 3, 9, 15])
def test_sign_session_is_no_join_session(at, stage):
    _, platform = at(SIGN, stage)
    platform.ordinal = JOIN
    assert platform.ask(stage).code == ReturnCode.DAA_TPM_SETTINGS


# -- inputs of each stage --------------------------------------------------------------------------

SIZES = {
    # kind, stage: which input has which size
    (JOIN, 0): (0, 4),
    (JOIN, 2): (0, 148),
    (JOIN, 3): (0, 4),
    (JOIN, 8): (0, 256),
    (JOIN, 13): (1, 256),
    (JOIN, 16): (0, 20),
    (JOIN, 22): (0, 128),
    (JOIN, 23): (0, 192),
    (SIGN, 0): (0, 148),
    (SIGN, 6): (1, 256),
    (SIGN, 9): (0, 20),
    (SIGN, 10): (0, 1),
}
INPUT = (ReturnCode.DAA_INPUT_DATA0, ReturnCode.DAA_INPUT_DATA1)


def plain(platform, issuer, stage, credential=None):
    """The plain inputs of a stage (of its first round)."""
    inputs = platform.inputs(issuer, credential)
    return next([data0, data1] for number, data0, data1 in inputs if number == stage)


@pytest.mark.parametrize("change", [-1, 1])
@pytest.mark.parametrize("place", SIZES)
def test_input_of_another_size_is_refused(at, joined, issuer, place, change):
    (kind, stage), (which, size) = place, SIZES[place]
    _, platform = at(kind, stage)
    inputs = plain(platform, issuer, stage, joined[1])
    assert len(inputs[which]) == size
    inputs[which] = (inputs[which] + b"\0")[: size + change]
    assert platform.ask(stage, *inputs).code == INPUT[which]
    assert platform.ask(stage, *inputs).code in {ReturnCode.BAD_HANDLE, INPUT[which]}


NUMBERS = [
    *((JOIN, stage, which) for stage in (4, 5, 6, 7, 9, 10, 11, 12) for which in (0, 1)),
    *((JOIN, stage, 0) for stage in (13, 14, 15)),
    *((SIGN, stage, which) for stage in (2, 3, 4, 5) for which in (0, 1)),
    *((SIGN, stage, 0) for stage in (6, 7, 8)),
]


@pytest.mark.parametrize("place", NUMBERS)
def test_other_number_than_the_issuers_is_refused(at, joined, issuer, place):
    kind, stage, which = place
    _, platform = at(kind, stage)
    inputs = plain(platform, issuer, stage, joined[1])
    inputs[which] = inputs[which][:-1] + bytes([inputs[which][-1] ^ 1])
    assert platform.ask(stage, *inputs).code == INPUT[which]
    assert platform.ask(stage).code == ReturnCode.BAD_HANDLE


@pytest.mark.parametrize(("kind", "stage"), sorted({place[:2] for place in NUMBERS}))
def test_both_inputs_wrong_is_the_first(at, kind, stage):
    _, platform = at(kind, stage)
    assert platform.ask(stage, b"x", b"y").code == ReturnCode.DAA_INPUT_DATA0


def test_join_of_no_keys_is_refused(owned):
    assert Platform(owned.tpm, JOIN).ask(0, u32(0)).code == ReturnCode.DAA_INPUT_DATA0


def test_join_first_key_of_another_size_is_refused(at, issuer):
    _, platform = at(JOIN, 1)
    assert platform.ask(1, issuer.chain[0].modulus[1:]).code == ReturnCode.DAA_INPUT_DATA0


def chained(platform, issuer):
    """The first key of the chain is loaded."""
    platform.stage(issuer.chain[0].modulus, again=True)


def test_join_next_key_needs_a_signature_of_the_one_before(at, issuer):
    first, second, third = issuer.chain
    refused = {
        (second.modulus, second.sign(second.modulus)): ReturnCode.DAA_ISSUER_VALIDITY,
        (second.modulus, third.sign(second.modulus)): ReturnCode.DAA_ISSUER_VALIDITY,
        (third.modulus, first.sign(second.modulus)): ReturnCode.DAA_ISSUER_VALIDITY,
        (second.modulus, bytes(256)): ReturnCode.DAA_ISSUER_VALIDITY,
        (second.modulus, b""): ReturnCode.DAA_INPUT_DATA1,
        (second.modulus[1:], first.sign(second.modulus[1:])): ReturnCode.DAA_INPUT_DATA0,
    }
    for (modulus, signature), code in refused.items():
        _, platform = at(JOIN, 1)
        chained(platform, issuer)
        assert platform.ask(1, modulus, signature).code == code
    chained(platform := at(JOIN, 1)[1], issuer)
    platform.stage(second.modulus, first.sign(second.modulus), again=True)


@pytest.mark.parametrize("modulus", [bytes(256), b"\xff" * 255 + b"\xfe", bytes(255) + b"\1"])
def test_join_chain_through_what_is_no_key_ends_there(owned, modulus):
    platform = Platform(owned.tpm, JOIN)
    platform.stage(u32(2))
    platform.stage(modulus, again=True)
    assert platform.ask(1, bytes(256), bytes(256)).code == ReturnCode.DAA_ISSUER_VALIDITY


def test_join_settings_need_a_signature_of_the_last_key(at, issuer):
    settings, last = issuer.settings, issuer.chain[-1]
    refused = {
        last.sign(settings): ReturnCode.DAA_ISSUER_VALIDITY,
        issuer.chain[0].sign(issuer.digest_n0 + settings): ReturnCode.DAA_ISSUER_VALIDITY,
        b"short": ReturnCode.DAA_INPUT_DATA1,
    }
    for signature, code in refused.items():
        _, platform = at(JOIN, 2)
        assert platform.ask(2, settings, signature).code == code


def without_order(settings):
    return settings[:-26] + bytes(26)


def wrong_tag(settings):
    return u16(0x2E) + settings[2:]


@pytest.mark.parametrize("spoilt", [without_order, wrong_tag])
def test_settings_that_are_none_are_refused(at, owned, issuer, spoilt):
    settings = spoilt(issuer.settings)
    _, platform = at(JOIN, 2)
    signature = issuer.chain[-1].sign(issuer.digest_n0 + settings)
    assert platform.ask(2, settings, signature).code == ReturnCode.DAA_INPUT_DATA0
    assert Platform(owned.tpm, SIGN).ask(0, settings).code == ReturnCode.DAA_INPUT_DATA0


@pytest.mark.parametrize(
    ("modulus", "works"),
    [
        (b"", False),
        (bytes(256), False),
        (bytes(255) + b"\1", False),
        (b"\xff" * 257, False),
        (b"\xff" * 3000, False),
        (b"\x03", True),
        (b"\xff" * 256, True),
    ],
    ids=["empty", "zero", "one", "257 bytes", "3000 bytes", "three", "256 bytes"],
)
def test_issuers_modulus_is_used_only_between_2_and_2048_bits(at, issuer, modulus, works):
    # Whoever makes the issuer's key can sign anything; it must neither crash nor take for ever.
    settings = bytearray(issuer.settings)
    settings[82:102] = sha1(modulus)
    _, platform = at(JOIN, 2)
    platform.stage(bytes(settings), issuer.chain[-1].sign(issuer.digest_n0 + bytes(settings)))
    platform.stage(u32(1))
    answer = platform.ask(4, wide(issuer.r0), modulus)
    assert answer.code == (0 if works else ReturnCode.DAA_INPUT_DATA1)


@pytest.mark.parametrize("gamma", [b"", b"\0", b"\1", b"\xff" * 300])
def test_issuers_gamma_is_used_only_between_2_and_2048_bits(at, issuer, gamma):
    settings = bytearray(issuer.settings)
    settings[102:122] = sha1(gamma)
    bench, platform = at(JOIN, 13)
    (handle,) = bench.state.stany.daa_sessions
    session = bench.state.stany.daa_sessions[handle]
    digest = sha1(bytes(settings))
    assert len(settings) == 148
    spoilt = replace(
        session,
        issuer_settings=replace(session.issuer_settings, daa_digest_gamma=sha1(gamma)),
        tpm_specific=replace(session.tpm_specific, daa_digest_issuer=digest),
    )
    spoilt = replace(spoilt, digest_context=daa.join_context(spoilt))
    bench.change("stany", daa_sessions={handle: spoilt})
    assert platform.ask(13, gamma, bytes(256)).code == ReturnCode.DAA_INPUT_DATA0


def test_join_endorsement_is_asked_of_the_right_key(at):
    _, platform = at(JOIN, 8)
    assert platform.ask(8, b"\x01" * 256).code == ReturnCode.DECRYPT_ERROR
    assert platform.ask(8).code == ReturnCode.BAD_HANDLE


def test_join_without_endorsement_key_is_no_endorsement(at):
    bench, platform = at(JOIN, 8)
    bench.change("permanent", endorsement_key=None)
    assert platform.ask(8, bytes(256)).code == ReturnCode.NO_ENDORSEMENT


@pytest.mark.parametrize(("kind", "stage"), [(JOIN, 13), (SIGN, 6)])
@pytest.mark.parametrize("w", [0, 2, -1])
def test_w_outside_the_issuers_group_is_wrong_w(at, issuer, kind, stage, w):
    _, platform = at(kind, stage)
    answer = platform.ask(stage, issuer.gamma_bytes, wide(w % issuer.gamma))
    assert answer.code == ReturnCode.DAA_WRONG_W
    assert platform.ask(stage).code == ReturnCode.BAD_HANDLE


def test_v1_of_more_than_192_bytes_is_refused(at):
    # libtpms answers FAIL here, which puts it into failure mode.
    _, platform = at(JOIN, 23)
    assert platform.ask(23, b"\xff" * 192).code == ReturnCode.DAA_INPUT_DATA0


def test_v0_carries_into_v1(at):
    bench, platform = at(JOIN, 22)
    (before,) = bench.state.stany.daa_sessions.values()
    u0, u1 = (int.from_bytes(x, "big") for x in (before.join_u0, before.join_u1))
    platform.stage(b"\xff" * 128)
    (session,) = bench.state.stany.daa_sessions.values()
    v0 = ((1 << 1024) - 1 + u0) % (1 << 1024)
    assert session.tpm_specific.daa_digest_v0 == sha1(v0.to_bytes(128, "big"))
    platform.stage(bytes(192))
    (session,) = bench.state.stany.daa_sessions.values()
    assert session.tpm_specific.daa_digest_v1 == sha1((u1 + 1).to_bytes(192, "big"))


# -- blobs -----------------------------------------------------------------------------------------

BLOBS = {1: "own", 13: "v0", 14: "v0", 15: "v1"}


@pytest.mark.parametrize("stage", BLOBS)
def test_each_changed_byte_of_a_blob_is_refused(stages, make_bench, joined, stage):
    state, handle = stages[SIGN, stage]
    blob = getattr(joined[1], BLOBS[stage])
    for i in range(0, len(blob), 3):
        platform = Platform(make_bench(state).tpm, SIGN)
        platform.handle = handle
        changed = blob[:i] + bytes([blob[i] ^ 1]) + blob[i + 1 :]
        assert platform.ask(stage, changed).code == ReturnCode.DAA_INPUT_DATA0, i


@pytest.mark.parametrize("stage", BLOBS)
def test_blob_that_is_too_short_or_too_long_is_refused(at, joined, stage):
    blob = getattr(joined[1], BLOBS[stage])
    for spoilt in (b"", blob[:-1], blob + b"\0", blob[:50]):
        _, platform = at(SIGN, stage)
        assert platform.ask(stage, spoilt).code == ReturnCode.DAA_INPUT_DATA0


@pytest.mark.parametrize("stage", BLOBS)
def test_blob_of_another_kind_is_refused(at, joined, stage):
    for other in {"own", "v0", "v1"} - {BLOBS[stage]}:
        _, platform = at(SIGN, stage)
        answer = platform.ask(stage, getattr(joined[1], other))
        assert answer.code == ReturnCode.DAA_INPUT_DATA0


@pytest.mark.parametrize("stage", [13, 14, 15])
def test_part_of_another_credential_is_refused(at, owned, issuer, stage):
    other = join(owned.tpm, issuer, count=2)
    _, platform = at(SIGN, stage)
    assert platform.ask(stage, getattr(other, BLOBS[stage])).code == ReturnCode.DAA_INPUT_DATA0


def test_credential_of_another_issuer_is_refused(at, owned):
    other = Issuer(b"another issuer")
    credential = join(owned.tpm, other)
    _, platform = at(SIGN, 1)
    assert platform.ask(1, credential.own).code == ReturnCode.DAA_ISSUER_SETTINGS


@pytest.mark.parametrize("secret", ["daa_proof", "daa_blob_key"])
def test_blobs_are_lost_with_the_secrets_of_the_tpm(at, joined, secret):
    bench, platform = at(SIGN, 1)
    bench.change("permanent", **{secret: sha1(b"renewed")[:20]})
    answer = platform.ask(1, joined[1].own)
    assert answer.code == ReturnCode.DAA_INPUT_DATA0


def test_blobs_do_not_show_what_is_inside(joined, issuer):
    _, credential = joined
    digest = sha1(issuer.settings)
    assert digest not in credential.own
    assert len({credential.own[46:62], credential.v0[46:62], credential.v1[46:62]}) == 3


# -- what is signed --------------------------------------------------------------------------------


def selections(owned_handles):
    signer, identity = owned_handles
    return {
        (b"\2", MESSAGE): ReturnCode.DAA_INPUT_DATA0,
        (b"", MESSAGE): ReturnCode.DAA_INPUT_DATA0,
        (b"\0\1", MESSAGE): ReturnCode.DAA_INPUT_DATA0,
        (b"\1", MESSAGE[1:]): ReturnCode.DAA_INPUT_DATA1,
        (b"\1", b""): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", b""): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", u32(identity) + b"\0"): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", b"\0" + u32(identity)): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", u32(12345)): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", u32(signer)): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", u32(0x40000000)): ReturnCode.DAA_INPUT_DATA1,
        (b"\0", u32(identity)): ReturnCode.SUCCESS,
        (b"\1", MESSAGE): ReturnCode.SUCCESS,
    }


def test_selector_and_what_it_selects(stages, make_bench):
    state, handle = stages[SIGN, 10]
    bench = make_bench(state)
    handles = loaded(bench.tpm, signing())[0], loaded_identity(bench.tpm)[0]
    state = bench.state
    for (selector, selected), code in selections(handles).items():
        platform = Platform(make_bench(state).tpm, SIGN)
        platform.handle = handle
        assert platform.ask(10, selector, selected).code == code, (selector, selected)


def test_identity_key_bound_to_other_pcrs_is_not_read(stages, make_bench):
    state, handle = stages[SIGN, 10]
    bench = make_bench(state)
    identity, _ = loaded_identity(bench.tpm)
    key = bench.state.volatile.keys[identity]
    key.pcr_info = PcrInfo(
        pcr_selection=PcrSelection(pcr_select=b"\1\0\0"),
        digest_at_release=sha1(b"other PCRs"),
        digest_at_creation=bytes(20),
    )
    platform = Platform(bench.tpm, SIGN)
    platform.handle = handle
    assert platform.ask(10, b"\0", u32(identity)).code == ReturnCode.DAA_INPUT_DATA1


def test_output_has_its_size(at):
    _, platform = at(JOIN, 16)
    out = platform.ask(16, MESSAGE).ok()
    assert out == sized(out[4:])
    assert len(out) == 24


def test_open_sessions_are_told(owned):
    """TPM_CAP_HANDLE of TPM_RT_DAA_TPM, and TPM_CAP_PROP_DAASESS: how many more there may be."""
    free = owned.tpm.capability(5, u32(DAASESS))
    platform = Platform(owned.tpm, JOIN)
    platform.stage(u32(1))
    assert owned.tpm.capability(0x14, u32(DAA)) == u16(1) + u32(platform.handle)
    assert owned.tpm.capability(5, u32(DAASESS)) == u32(int.from_bytes(free, "big") - 1)
