"""What a TPM vouches for: identities, quotes, stamped ticks, the audit; and keys on their way."""

from tests.differential.owner_scenarios import forgive, owner
from tests.tpm12 import movers
from tests.tpm12.identities import AIK_AUTH, MAKE_IDENTITY, loaded_identity
from tests.tpm12.makers import (
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    MIGRATABLE,
    WRONG,
    load,
    loaded,
    seal,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.witness import (
    EK,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    key_template,
    oaep,
    parse_key,
    parse_pubkey,
    parse_sized,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

QUOTE, QUOTE2, TICK_STAMP, GET_TICKS, UNBIND, SIGN = 0x16, 0x3E, 0xF2, 0xF1, 0x1E, 0x3C
ACTIVATE_IDENTITY, GET_AUDIT_DIGEST, AUDIT_SIGNED, SET_AUDIT = 0x7A, 0x85, 0x86, 0x8D
CHANGE_AUTH, CHANGE_AUTH_OWNER, ASYM_START = 0x0C, 0x10, 0x0E
GET_CAPABILITY_OWNER, OWNER_READ_INTERNAL_PUB = 0x66, 0x81
NEW = sha1(b"new secret")


def quotes(side):
    """Quotes and stamps by keys of every kind."""
    tpm = side.tpm
    handles = {"identity": loaded_identity(tpm)[0]}
    wanted = {
        "signing": signing(), "DER": signing(3), "INFO": signing(4), "legacy": template(0x15, 2, 2),
        "storage": storage(), "bind": template(0x14, 3, 1), "free": signing(auth_data_usage=0),
    }  # fmt: skip
    handles |= {name: loaded(side.rested(), each)[0] for name, each in wanted.items()}
    side.note("keys")
    for name, handle in handles.items():
        secret = AIK_AUTH if name == "identity" else KEY_AUTH
        for chosen, size in (((), 3), ((0, 10), 3), ((0,), 2), ((), 0), ((), 4), ((17, 23), 3)):
            pcrs = selection(*chosen, size=size)
            for ordinal, params in (
                (QUOTE, ZERO + pcrs),
                (QUOTE2, ZERO + pcrs + u8(0)),
                (QUOTE2, ZERO + pcrs + u8(1)),
            ):
                session = side.rested().oiap(secret).ending()
                answer = tpm.auth(ordinal, params, session, handles=u32(handle))
                side.note(f"{ordinal:x} {name} {chosen} {size}", answer)
        for ordinal, params in ((QUOTE, ZERO + selection(1)), (TICK_STAMP, ZERO + ZERO)):
            answer = side.rested().send(ordinal, u32(handle) + params)
            side.note(f"{ordinal:x} {name} freely", answer)
            session = side.rested().oiap(WRONG).ending()
            answer = tpm.auth(ordinal, params, session, handles=u32(handle))
            side.note(f"{ordinal:x} {name} wrong", answer)
            forgive(side)
        session = side.rested().oiap(secret).ending()
        answer = tpm.auth(TICK_STAMP, ZERO + ZERO, session, handles=u32(handle))
        side.note(f"stamp {name}", answer)
    side.note("ticks", tpm.send(GET_TICKS))


def binding(side):
    """TPM_UnBind by keys of every kind."""
    bound = b"\1\1\0\0\2data"
    for name, wanted in {
        "bind": template(0x14, 3, 1, bits=1024), "legacy": template(0x15, 3, 2, bits=1024),
        "signing": signing(bits=1024),
    }.items():  # fmt: skip
        handle, key = loaded(side.rested(), wanted)
        side.note(f"key {name}")
        for step, data in {
            "bound": oaep(key.modulus, bound),
            "other version": oaep(key.modulus, b"\2" + bound[1:]),
            "other payload": oaep(key.modulus, bound[:4] + b"\3data"),
            "short": oaep(key.modulus, bound[:3]),
            "garbage": bytes(128),
            "too short": bytes(10),
            "nothing": b"",
        }.items():
            session = side.rested().oiap(KEY_AUTH).ending()
            answer = side.tpm.auth(UNBIND, sized(data), session, handles=u32(handle))
            side.note(f"{name} {step}", answer)


def identities(side):
    """TPM_MakeIdentity and TPM_ActivateIdentity."""
    tpm = side.tpm
    parms = rsa_parms(enc=1, sig=2)
    for name, wanted in {
        "good": key_template(0x12, parms=parms),
        "KEY12": key_template(0x12, parms=parms, key12=True),
        "signing": key_template(0x10, parms=parms),
        "migratable": key_template(0x12, parms=parms, flags=2),
        "1024": key_template(0x12, parms=rsa_parms(1024, enc=1, sig=2)),
        "DER": key_template(0x12, parms=rsa_parms(enc=1, sig=3)),
    }.items():  # fmt: skip
        for who in ("both", "owner wrong", "SRK wrong"):
            if who != "both" and name != "good":
                continue
            secret = WRONG if who == "owner wrong" else OWNER_AUTH
            session = side.rested().osap(ET_OWNER, 0, secret)
            srk = tpm.oiap(WRONG if who == "SRK wrong" else SRK_AUTH).ending()
            params = session.masked(AIK_AUTH) + ZERO + wanted
            side.note(f"make {name} {who}", tpm.auth(MAKE_IDENTITY, params, srk, session))
            forgive(side)
    handle, key = side.note("identity", loaded_identity(side.rested()))
    answer = tpm.auth(OWNER_READ_INTERNAL_PUB, u32(EK), owner(side.rested()))
    _, ek, _ = parse_pubkey(answer.ok())
    symmetric = u32(6) + u16(1) + u16(16) + bytes(16)
    info = selection() + u8(0x1F) + ZERO
    for name, inside in {
        "1.1": symmetric + sha1(key.pubkey),
        "1.1 of another": symmetric + ZERO,
        "1.1 and a byte": symmetric + sha1(key.pubkey) + b"\0",
        "1.2": u16(0x2B) + symmetric + sha1(key.pubkey) + info,
        "1.2 of another": u16(0x2B) + symmetric + ZERO + info,
        "1.2 elsewhere": u16(0x2B) + symmetric + sha1(key.pubkey) + selection() + u8(2) + ZERO,
    }.items():
        for kind in (1, 2) if name.startswith("1.2") else (0,):
            blob = u16(0x0C) + u16(kind) + sized(inside) if kind else inside
            data = sized(oaep(ek, blob))
            sessions = [side.rested().oiap(AIK_AUTH).ending(), owner(tpm)]
            answer = tpm.auth(ACTIVATE_IDENTITY, data, *sessions, handles=u32(handle))
            side.note(f"activate {name} {kind}", answer)
    for who in range(2):
        secrets = [AIK_AUTH, OWNER_AUTH]
        secrets[who] = WRONG
        tpm = side.rested()
        sessions = [tpm.oiap(secret).ending() for secret in secrets]
        data = sized(oaep(ek, symmetric + sha1(key.pubkey)))
        answer = tpm.auth(ACTIVATE_IDENTITY, data, *sessions, handles=u32(handle))
        side.note(f"activate block {who} wrong", answer)
        forgive(side)


def auditing(side):
    """What is audited, and the digest of it."""
    tpm = side.tpm
    for ordinal in (0x0A, 0x15, 0x26, 0x99, 0x7777, 0x4000000A):
        for state in (1, 0, 2):
            session = owner(side.rested())
            answer = tpm.auth(SET_AUDIT, u32(ordinal) + u8(state), session)
            side.note(f"audit {ordinal:x} {state}", answer)
    for start in (0x80, 0xF3, 0xFFFF):
        side.note(f"digest from {start:x}", side.rested().send(GET_AUDIT_DIGEST, u32(start)))
    handle, _ = side.note("identity", loaded_identity(side.rested()))
    other, _ = side.note("signing", loaded(side.rested(), signing()))
    for name, key, secret in (("identity", handle, AIK_AUTH), ("signing", other, KEY_AUTH)):
        for close in (0, 1, 2):
            session = side.rested().oiap(secret).ending()
            answer = tpm.auth(AUDIT_SIGNED, u8(close) + ZERO, session, handles=u32(key))
            side.note(f"signed {name} {close}", answer)


def new_secrets(side):
    """TPM_ChangeAuth and ChangeAuthOwner."""
    tpm = side.tpm
    blob = parse_key(side.note("key", wrap(tpm, signing())).ok()).enc_data
    data = side.note("data", seal(tpm, b"secret", secret=KEY_AUTH)).ok()
    sealed = parse_sized(parse_sized(data[4:])[1])[0]
    for name, kind, enc_data, protocol, secret in (
        ("key", 5, blob, 4, KEY_AUTH), ("data", 3, sealed, 4, KEY_AUTH),
        ("key as data", 3, blob, 4, KEY_AUTH), ("other kind", 1, blob, 4, KEY_AUTH),
        ("other protocol", 5, blob, 3, KEY_AUTH), ("wrong", 5, blob, 4, WRONG),
        ("garbage", 5, bytes(256), 4, KEY_AUTH), ("short", 5, blob[:-1], 4, KEY_AUTH),
    ):  # fmt: skip
        session = side.rested().osap(ET_SRK, SRK, SRK_AUTH)
        params = u16(protocol) + session.masked(NEW) + u16(kind) + sized(enc_data)
        entity = tpm.oiap(secret)
        answer = tpm.auth(CHANGE_AUTH, params, session, entity, handles=u32(SRK))
        side.note(f"change {name}", answer)
        forgive(side)
    for kind, protocol in ((4, 4), (2, 4), (3, 4), (2, 3)):
        secret = NEW if (kind, protocol) in {(3, 4), (2, 3)} else OWNER_AUTH
        session = side.rested().osap(ET_OWNER, 0, secret)
        params = u16(protocol) + session.masked(NEW) + u16(kind)
        side.note(f"owner's {kind} {protocol}", tpm.auth(CHANGE_AUTH_OWNER, params, session))
    session = side.rested().oiap(NEW).ending()
    side.note("the new owner", tpm.auth(GET_CAPABILITY_OWNER, b"", session))


_DESTINATIONS: list = []


def destination():
    """A key of nobody's TPM, the same for both sides."""
    if not _DESTINATIONS:
        _DESTINATIONS.append(movers.OutsideKey())
    return _DESTINATIONS[0]


def migration(side):
    """Migration: permitted, sent, received."""
    for scheme in (*range(7), 0xFFFF):
        answer = movers.authorize(side.rested(), destination().pubkey, scheme)
        side.note(f"authorize {scheme}", answer)
    side.note("stranger", movers.authorize(side.rested(), destination().pubkey, secret=WRONG))
    forgive(side)
    wanted = signing(flags=MIGRATABLE)
    blob = side.note("key", wrap(side.rested(), wanted, migration_auth=movers.MIGRATION_AUTH)).ok()
    fixed = side.note("fixed", wrap(side.rested(), signing())).ok()
    for scheme in (1, 2, 3, 4):
        ticket = movers.authorize(side.rested(), destination().pubkey, scheme).ok()
        side.note(f"ticket {scheme}")
        for used in (1, 2, 3, 9):
            if scheme != used and {scheme, used} <= {1, 2}:
                continue  # libtpms looks at the operand alone
            for name, source in (("key", blob), ("fixed", fixed)):
                enc_data = parse_key(source).enc_data
                answer = movers.create_blob(side.rested(), ticket, enc_data, used)
                side.note(f"blob {scheme} {used} {name}", answer)
                forgive(side)
    ticket = movers.authorize(side.rested(), destination().pubkey).ok()
    side.note("ticket")
    enc_data = parse_key(blob).enc_data
    answer = movers.create_blob(side.rested(), ticket, enc_data, secret=WRONG)
    side.note("wrong migration secret", answer)
    forgive(side)
    altered = ticket[:-1] + bytes([ticket[-1] ^ 1])
    side.note("altered ticket", movers.create_blob(side.rested(), altered, enc_data))
    ticket = movers.authorize(side.rested(), movers.srk_pubkey(side.rested())).ok()
    side.note("to ourselves")
    random, data = movers.two_sized(movers.create_blob(side.rested(), ticket, enc_data).ok())
    side.note("sent")
    for name, pad in (("good", random), ("short", random[:-1]), ("other", bytes(len(random)))):
        answer = side.note(f"convert {name}", movers.convert(side.rested(), data, pad))
        if not answer.code:
            received = movers.rewrapped(blob, movers.one_sized(answer.body))
            side.note(f"load {name}", load(side.rested(), received))


def restricted_migration(side):
    """Certified migratable keys: approved, made, refused."""
    tpm = side.tpm
    authority = movers.msa_list(destination().digest)
    for bits in (0, 0x80000000, 0xF8000000, 1):
        answer = tpm.auth(movers.CMK_SET_RESTRICTIONS, u32(bits), owner(side.rested()))
        side.note(f"restrict {bits:x}", answer)
    for name, wanted in {
        "CMK": signing(key12=True, flags=movers.CMK), "not KEY12": signing(flags=movers.CMK),
        "migratable alone": signing(key12=True, flags=MIGRATABLE), "plain": signing(key12=True),
        "authority alone": signing(key12=True, flags=0x10),
    }.items():  # fmt: skip
        answer = movers.create_cmk(side.rested(), wanted, authority)
        side.note(f"make {name}", answer)
        if not answer.code:
            side.note(f"load {name}", load(side.rested(), answer.body))
    wrong = movers.create_cmk(side.rested(), storage(key12=True), authority, approval=ZERO)
    side.note("not approved", wrong)
    signed = sha1(b"ticket")
    outside = destination()
    for name, verifier, signature in (
        ("good", outside.as_verifier(), outside.sign(signed)),
        ("bad signature", outside.as_verifier(), bytes(256)),
        ("DER", outside.as_verifier(3), outside.sign(signed)),
        ("for encryption", outside.pubkey, outside.sign(signed)),
    ):
        answer = movers.create_ticket(side.rested(), verifier, signed, signature)
        side.note(f"ticket {name}", answer)


SCENARIOS = {
    "quotes": ("owned", quotes),
    "binding": ("owned", binding),
    "identities": ("owned", identities),
    "auditing": ("owned", auditing),
    "new secrets": ("owned", new_secrets),
    "migration": ("owned", migration),
    "restricted migration": ("owned", restricted_migration),
}
