"""Refusals that no other scenario brings about, command by command."""

from tests.differential.daa_scenarios import issuer
from tests.differential.owner_scenarios import (
    EXTEND,
    KEY_CONTROL_OWNER,
    SET_OWNER_INSTALL,
    forgive,
    owner,
)
from tests.differential.sides import take_ownership
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12 import movers
from tests.tpm12.daa_issuer import JOIN, SIGN, Platform, join
from tests.tpm12.identities import AIK_AUTH, loaded_identity
from tests.tpm12.makers import (
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    MIGRATABLE,
    WRONG,
    define,
    load,
    loaded,
    lock_nv,
    nv_public,
    pcr_info,
    signing,
    storage,
    wrap,
)
from tests.tpm12.transport_maker import Transport
from tests.tpm12.witness import (
    EK,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    frame,
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

UN_BIND, ASYM_START = 0x1E, 0x0E
QUOTE, QUOTE2, SIGN_DATA, GET_PUB_KEY, SEALX = 0x16, 0x3E, 0x3C, 0x21, 0x3D
LOAD_KEY, LOAD_KEY2, CERTIFY_KEY, CERTIFY_KEY2 = 0x20, 0x41, 0x32, 0x33
ACTIVATE_IDENTITY, OWNER_READ_INTERNAL_PUB = 0x7A, 0x81
SET_AUDIT, AUDIT_SIGNED, NV_DEFINE_SPACE, GET_RANDOM = 0x8D, 0x86, 0xCC, 0x46
SAVE_KEY_CONTEXT, LOAD_KEY_CONTEXT, SAVE_CONTEXT, LOAD_CONTEXT = 0xB4, 0xB5, 0xB8, 0xB9
LABEL = bytes(16)
NV_READ_VALUE, NV_WRITE_VALUE, PPWRITE, LONG = 0xCF, 0xCD, 0x01, 4080
NV_WRITES = 66
"""More than may be made without an owner."""
SESSIONS, KEYS = 20, 25
"""More than there are slots."""


def taking(side):
    """TPM_TakeOwnership where it is not permitted."""
    tpm = side.tpm
    side.note("presence", tpm.assert_presence())
    side.note("not to be installed", tpm.send(SET_OWNER_INSTALL, u8(0)))
    side.note("take", take_ownership(side.rested()))


def keys_and_quotes(side):
    """Keys that may not do what is asked, or not now."""
    tpm = side.tpm
    handle, _ = side.note("key", loaded(tpm, signing()))
    store, _ = side.note("storage", loaded(side.rested(), storage()))
    bound, _ = side.note("bound", loaded(side.rested(), signing(pcr_info=pcr_info(10))))
    side.note("extend", tpm.send(EXTEND, u32(10) + ZERO))
    for name, key, secret in (
        ("signing", handle, WRONG), ("storage", store, KEY_AUTH), ("bound", bound, KEY_AUTH),
    ):  # fmt: skip
        for ordinal, params in (
            (QUOTE, ZERO + selection(1)), (QUOTE2, ZERO + selection(1) + u8(0)),
            (QUOTE2, ZERO + selection(1) + u8(2)), (SIGN_DATA, sized(ZERO)),
        ):  # fmt: skip
            session = side.rested().oiap(secret).ending()
            answer = tpm.auth(ordinal, params, session, handles=u32(key))
            side.note(f"{ordinal:x} {len(params)} {name}", answer)
            forgive(side)
    session = side.rested().oiap(KEY_AUTH).ending()
    side.note("unbind by nothing", tpm.auth(UN_BIND, sized(b"x"), session, handles=u32(7)))
    answer = tpm.auth(OWNER_READ_INTERNAL_PUB, u32(SRK), owner(side.rested()))
    _, srk, _ = parse_pubkey(side.note("SRK", answer).ok())
    blob = side.note("another", wrap(side.rested(), signing())).ok()
    malformed = movers.rewrapped(blob, oaep(srk, b"\1" * 30))
    side.note("load what is no key", load(side.rested(), malformed))
    for ordinal in (LOAD_KEY, LOAD_KEY2):
        side.note(f"load {ordinal:x}", load(side.rested(), blob, ordinal=ordinal))
        answer = load(side.rested(), blob, ordinal=ordinal, parent_auth=WRONG)
        side.note(f"load {ordinal:x} wrong", answer)
        forgive(side)
        garbled = movers.rewrapped(blob, bytes(256))
        side.note(f"load {ordinal:x} garbage", load(side.rested(), garbled, ordinal=ordinal))
    side.note("load 20 version", load(side.rested(), b"\1\2" + blob[2:], ordinal=LOAD_KEY))
    for size, secret in ((20, WRONG), (150, SRK_AUTH)):
        session = side.rested().osap(6 << 8 | ET_SRK, SRK, secret)
        params = ZERO + sized(b"") + sized(bytes(size))
        answer = tpm.auth(SEALX, params, session, handles=u32(SRK))
        side.note(f"sealx {size}", answer)
        forgive(side)


def identity_and_migratable(side):
    """What an identity does not vouch for, and what it is not activated by."""
    tpm = side.tpm
    identity, key = side.note("identity", loaded_identity(tpm))
    wanted = signing(flags=MIGRATABLE)
    movable, _ = side.note("migratable", loaded(side.rested(), wanted))
    for ordinal, order in ((CERTIFY_KEY, (identity, movable)), (CERTIFY_KEY2, (movable, identity))):
        params = ZERO * (1 if ordinal == CERTIFY_KEY else 2)
        tpm = side.rested()
        secrets = (AIK_AUTH, KEY_AUTH) if ordinal == CERTIFY_KEY else (KEY_AUTH, AIK_AUTH)
        sessions = [tpm.oiap(secret).ending() for secret in secrets]
        handles = u32(order[0]) + u32(order[1])
        side.note(f"certify {ordinal:x}", tpm.auth(ordinal, params, *sessions, handles=handles))
    answer = tpm.auth(OWNER_READ_INTERNAL_PUB, u32(EK), owner(side.rested()))
    _, ek, _ = parse_pubkey(side.note("EK", answer).ok())
    symmetric = u32(6) + u16(1) + u16(16) + bytes(16)
    asked = selection(10) + u8(0x1F) + WRONG
    for name, data in {
        "garbage": bytes(256),
        "a blob of another kind": oaep(ek, u16(0x0C) + u16(1) + sized(u16(0x33) + bytes(60))),
        "other PCRs": oaep(
            ek, u16(0x0C) + u16(1) + sized(u16(0x2B) + symmetric + sha1(key.pubkey) + asked)
        ),
    }.items():
        sessions = [side.rested().oiap(AIK_AUTH).ending(), owner(side.tpm)]
        answer = side.tpm.auth(ACTIVATE_IDENTITY, sized(data), *sessions, handles=u32(identity))
        side.note(f"activate {name}", answer)
    sessions = [side.rested().oiap(AIK_AUTH).ending(), owner(side.tpm)]
    answer = side.tpm.auth(ACTIVATE_IDENTITY, sized(b"x"), *sessions, handles=u32(7))
    side.note("activate nothing", answer)
    for state in (1, 0):
        session = owner(side.rested(), WRONG)
        answer = tpm.auth(SET_AUDIT, u32(0x15) + u8(state), session)
        side.note(f"audit {state} wrong", answer)
        forgive(side)
    session = side.rested().oiap(WRONG).ending()
    answer = tpm.auth(AUDIT_SIGNED, u8(0) + ZERO, session, handles=u32(identity))
    side.note("audit signed wrong", answer)


def full(side):
    """Key slots, all taken; and keys that the owner keeps."""
    tpm = side.tpm
    identity, _ = side.note("identity", loaded_identity(tpm))
    blob = side.note("key", wrap(side.rested(), signing())).ok()
    first = load(side.rested(), blob)
    handle, key = number(side.note("load", first).ok()), parse_key(blob)
    saved = side.note("save", tpm.send(SAVE_CONTEXT, u32(handle) + u32(1) + LABEL)).ok()
    old = side.note("save in the old way", tpm.send(SAVE_KEY_CONTEXT, u32(handle))).ok()
    answers = [load(tpm, blob) for _ in range(KEYS)]
    side.note("fill")
    assert answers[-1].code
    side.note("load a context", tpm.send(LOAD_CONTEXT, u32(0) + u8(0) + saved))
    side.note("load an old context", tpm.send(LOAD_KEY_CONTEXT, old))
    session = tpm.oiap(AIK_AUTH).ending()
    answer = tpm.auth(ASYM_START, ZERO + rsa_parms(1024), session, handles=u32(identity))
    side.note("key for new secrets", answer)
    handle = number(answers[0].ok())
    for name, which, secret in (
        ("wrong", handle, WRONG), ("nothing", 7, OWNER_AUTH), ("good", handle, OWNER_AUTH),
    ):  # fmt: skip
        params = key.pubkey + u32(1) + u8(1)
        session = owner(side.rested(), secret)
        answer = tpm.auth(KEY_CONTROL_OWNER, params, session, handles=u32(which))
        side.note(f"keep {name}", answer)
        forgive(side)
    side.note("save what is kept", tpm.send(SAVE_KEY_CONTEXT, u32(handle)))


def wrapped_refusals(side):
    """What is not for transport sessions, and responses that are too long."""
    tpm = side.tpm
    side.note("area", define(tpm, 9, PPWRITE, LONG, as_owner=True))
    through = side.note("open", Transport(tpm).open())
    for name, request in (
        ("save", frame(0x98)), ("random", frame(GET_RANDOM, u32(100))),
        ("long", frame(NV_READ_VALUE, u32(9) + u32(0) + u32(LONG))),
    ):  # fmt: skip
        answer = through.execute(request)
        side.note(f"wrapped {name}", answer)
        if answer.code:
            break
        through.unwrap(request, answer.body)


def many_transport_sessions(side):
    """Transport sessions until all slots are taken."""
    tpm = side.tpm
    for i in range(SESSIONS):
        clear = u32(0x40000003) + Transport(tpm).public + sized(ZERO)
        side.note(f"open {i}", tpm.send(0xE6, clear))


def nv_without_owner(side):
    """Writes without an owner, until there are too many of them."""
    side.note("lock", lock_nv(side.tpm))
    side.note("absent", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 4) + ZERO))
    side.note("presence", side.tpm.assert_presence())
    side.note("no size", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 0) + ZERO))
    for i in range(NV_WRITES):
        side.note(f"change {i}", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 4 + i % 2) + ZERO))
    side.note("family", delegate.manage(side.tpm, delegate.CREATE, 0, b"F"))


def nv_writes_without_owner(side):
    """As above, with one area."""
    side.note("lock", lock_nv(side.tpm))
    side.note("presence", side.tpm.assert_presence())
    side.note("define", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 4) + ZERO))
    for i in range(NV_WRITES):
        params = u32(9) + u32(0) + sized(u32(i))
        side.note(f"write {i}", side.tpm.send(NV_WRITE_VALUE, params))


def families_without_owner(side):
    """As above, with the delegation tables."""
    side.note("family", delegate.manage(side.tpm, delegate.CREATE, 0, b"F"))
    side.note("enable", delegate.manage(side.tpm, delegate.ENABLE, 1, b"\1"))
    blob = delegate.clear_blob(delegate.public(1, 1))
    for i in range(NV_WRITES):
        side.note(f"load {i}", delegate.load_owner(side.tpm, 0, blob))
    side.note("another family", delegate.manage(side.tpm, delegate.CREATE, 0, b"G"))


def defined_with_owner(side):
    """TPM_NV_DefineSpace without a session where there is an owner, and by strangers."""
    side.note("lock", lock_nv(side.tpm))
    side.note("absent", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 4) + ZERO))
    side.note("presence", side.tpm.assert_presence())
    side.note("present", side.tpm.send(NV_DEFINE_SPACE, nv_public(9, 1, 4) + ZERO))
    session = side.tpm.osap(ET_OWNER, 0, WRONG)
    side.note("wrong", side.tpm.auth(NV_DEFINE_SPACE, nv_public(9, 2, 4) + ZERO, session))


def delegated_refusals(side):
    """What a delegate may not pass on, and what cannot be brought up to date."""
    tpm = side.tpm
    family = side.note("family", delegate.new_family(tpm))
    blob = side.note("blob", delegate.owner_blob(side.rested(), family))
    flipped = blob[:60] + bytes([blob[60] ^ 1]) + blob[61:]
    for name, data in {"tag": b"\0\1", "flipped": flipped}.items():
        side.note(f"update {name}", delegate.update(side.rested(), data))
    answer = delegate.update(side.rested(), blob, owner(side.rested(), WRONG))
    side.note("update wrong", answer)
    forgive(side)
    session = side.note("delegate", delegate.by_blob(side.rested(), blob))
    side.note("disable", delegate.manage(tpm, delegate.ENABLE, family, delegate.OFF, owner(tpm)))
    side.note("update by a dead delegate", delegate.update(tpm, blob, session))
    malformed = delegate.public(family, 1)
    malformed = b"\0\x1c" + malformed[2:]
    side.note("verify no blob", delegate.verify(side.rested(), b"\0\1" + blob[2:]))
    keys_bits = delegate.clear_blob(delegate.public(family, 1, kind=2))
    answer = side.rested().send(delegate.VERIFY, sized(keys_bits))
    side.note("verify permissions of a key", answer)
    answer = delegate.manage(tpm, delegate.INVALIDATE, family, b"", owner(side.rested()))
    side.note("invalidate", answer)
    side.note("verify a dead one", delegate.verify(side.rested(), blob))
    session = side.rested().osap(ET_OWNER, 0, OWNER_AUTH)
    answer = tpm.auth(delegate.CREATE_OWNER, u8(0) + malformed + ZERO, session)
    side.note("delegate no structure", answer)


DAA_WRONG = {
    # Stage, and what is wrong there: data0, data1, or the secret.
    "join secret": (JOIN, 3, None, None, WRONG),
    "join data1": (JOIN, 4, None, b"short", OWNER_AUTH),
    "join other n": (JOIN, 4, None, bytes(255) + b"\1", OWNER_AUTH),
    "join w": (JOIN, 13, None, bytes(255) + b"\0", OWNER_AUTH),
    "join garbage": (JOIN, 8, bytes(256), None, OWNER_AUTH),
    "sign secret": (SIGN, 1, None, None, WRONG),
    "sign data1": (SIGN, 2, None, b"short", OWNER_AUTH),
    "sign other n": (SIGN, 2, None, bytes(255) + b"\1", OWNER_AUTH),
    "sign w": (SIGN, 6, None, bytes(255) + b"\0", OWNER_AUTH),
    "sign stage": (SIGN, -1, None, None, OWNER_AUTH),
    "sign garbage": (SIGN, 1, bytes(400), None, OWNER_AUTH),
}


def daa_refusals(side, name):
    """A DAA session up to a stage at which something is wrong."""
    kind, wrong_at, data0, data1, secret = DAA_WRONG[name]
    credential = join(side.tpm, issuer()) if kind == SIGN else None
    side.note("joined")
    platform = Platform(side.rested(), kind)
    for stage, *inputs in platform.inputs(issuer(), credential):
        if stage == wrong_at or (wrong_at < 0 and stage == -wrong_at):
            wrong = [inputs[0] if data0 is None else data0, inputs[1] if data1 is None else data1]
            asked = stage + 1 if wrong_at < 0 else stage
            side.note("wrong", platform.ask(asked, *wrong, secret=secret))
            break
        platform.stage(*inputs, again=platform.comes_again(stage, inputs[0], issuer()))
        side.note(f"stage {stage}")


def crossed_daa(side):
    """A session of one DAA command used by the other."""
    credential = side.note("credential", join(side.tpm, issuer()))
    for begun, other in ((JOIN, SIGN), (SIGN, JOIN)):
        for wanted in (1, 4, 9):
            platform = Platform(side.rested(), begun)
            for stage, *inputs in platform.inputs(issuer(), credential):
                if stage == wanted:
                    break
                platform.stage(*inputs, again=platform.comes_again(stage, inputs[0], issuer()))
            side.note(f"{begun:x} up to {wanted}")
            if (other, wanted) == (SIGN, 1):
                inputs = [credential.own, b""]
            platform.ordinal = other
            side.note(f"{other:x} at {wanted}", platform.ask(wanted, *inputs))


SCENARIOS = {
    "taking": ("with_ek", taking),
    "keys and quotes": ("owned", keys_and_quotes),
    "identity and migratable": ("owned", identity_and_migratable),
    "full": ("owned", full),
    "wrapped refusals": ("owned", wrapped_refusals),
    "many transport sessions": ("owned", many_transport_sessions),
    "nv without owner": ("factory", nv_without_owner),
    "nv writes without owner": ("factory", nv_writes_without_owner),
    "families without owner": ("factory", families_without_owner),
    "defined with owner": ("owned", defined_with_owner),
    "delegated refusals": ("owned", delegated_refusals),
    "crossed DAA": ("owned", crossed_daa),
    **{f"DAA {name}": ("owned", daa_refusals, name) for name in DAA_WRONG},
}
