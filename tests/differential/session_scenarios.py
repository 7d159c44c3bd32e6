"""Sessions and what goes through them: kinds, flushing, contexts, transport, delegation."""

from tests.differential.owner_scenarios import GET_CAPABILITY_OWNER, PCR_READ, flags, forgive, owner
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12.makers import (
    ET_KEY,
    ET_SRK,
    KEY_AUTH,
    WRONG,
    loaded,
    signing,
    storage,
)
from tests.tpm12.transport_maker import (
    AES,
    CTR,
    ENCRYPT,
    ESTABLISH,
    EXCLUSIVE,
    KH_TRANSPORT,
    LOG,
    MGF1,
    NONE,
    OFB,
    Transport,
    public,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    frame,
    oaep,
    sized,
    u8,
    u16,
    u32,
)

FLUSH, TERMINATE, EVICT, RESET = 0xBA, 0x96, 0x22, 0x5A
SAVE_CONTEXT, LOAD_CONTEXT = 0xB8, 0xB9
SIGN, GET_TICKS, OIAP, OSAP = 0x3C, 0xF1, 0x0A, 0x0B
LABEL = bytes(16)


def sessions(side):
    """Opening, ending, and using what is not there any more."""
    tpm = side.tpm
    for kind in (*range(14), 0x40, 0x0104, 0x0602, 0x0702):
        for value in (0, SRK, 0x40000001, 1):
            params = u16(kind) + u32(value) + ZERO
            side.note(f"OSAP {kind:x} {value:x}", tpm.send(OSAP, params))
            side.note("reset", tpm.send(RESET))
    for i in range(17):
        side.note(f"fill {i}", tpm.send(OIAP))
    side.note("reset", tpm.send(RESET))
    for kind in range(11):
        side.note(f"flush {kind} of nothing", tpm.send(FLUSH, u32(7) + u32(kind)))
    side.note("terminate nothing", tpm.send(TERMINATE, u32(7)))
    for how, ordinal, more in (("terminate", TERMINATE, b""), ("flush", FLUSH, u32(2))):
        session = tpm.oiap(OWNER_AUTH)
        side.note(how, tpm.send(ordinal, u32(session.handle) + more))
        side.note(f"after {how}", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    session = side.note("open", tpm.oiap(OWNER_AUTH))
    for step in ("first", "second"):
        side.note(f"{step} use", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    side.note("wrong", tpm.auth(GET_CAPABILITY_OWNER, b"", session.with_key(WRONG)))
    side.note("after a failure", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    forgive(side)
    session = side.note("of the SRK", tpm.osap(ET_SRK, SRK, SRK_AUTH))
    side.note("for the owner", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    forgive(side)
    handle, _ = side.note("key", loaded(tpm, signing()))
    session = side.note("bound to it", tpm.osap(ET_KEY, handle, KEY_AUTH))
    side.note("evict", tpm.send(EVICT, u32(handle)))
    side.note("dies with it", tpm.auth(SIGN, sized(ZERO), session, handles=u32(handle)))


def contexts(side):
    """Saving and loading of keys and sessions."""
    tpm = side.tpm
    handle, _ = side.note("key", loaded(tpm, signing()))
    for kind in range(11):
        params = u32(handle) + u32(kind) + LABEL
        side.note(f"save as {kind}", tpm.send(SAVE_CONTEXT, params))
    side.note("save the SRK", tpm.send(SAVE_CONTEXT, u32(SRK) + u32(1) + LABEL))
    answer = side.note("save", tpm.send(SAVE_CONTEXT, u32(handle) + u32(1) + LABEL))
    blob = sized(answer.ok()[4:])
    for keep in (0, 1, 2):
        params = u32(0) + u8(keep) + blob
        side.note(f"load beside it, keep {keep}", tpm.send(LOAD_CONTEXT, params))
    side.note("evict", tpm.send(EVICT, u32(handle)))
    side.note("load, keep", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + blob))
    session = side.note("session", tpm.oiap(OWNER_AUTH))
    answer = tpm.send(SAVE_CONTEXT, u32(session.handle) + u32(2) + LABEL)
    saved = sized(side.note("save the session", answer).ok()[4:])
    side.note("while it is away", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    altered = saved[:14] + bytes([saved[14] ^ 1]) + saved[15:]
    side.note("load altered", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + altered))
    side.note("load", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + saved))
    side.note("use", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    side.note("load again", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + saved))
    for ordinal, body in ((0xB4, u32(handle)), (0xB6, u32(session.handle)), (0xB4, u32(9))):
        answer = side.note(f"old save {ordinal:x} {len(body)}", tpm.send(ordinal, body))
        if not answer.code:
            old = sized(answer.body[4:])
            side.note(f"old load {ordinal + 1:x}", tpm.send(ordinal + 1, old))
    answer = tpm.send(SAVE_CONTEXT, u32(tpm.oiap(OWNER_AUTH).handle) + u32(2) + LABEL)
    side.note("TPM_Reset", tpm.send(RESET))
    after_reset = u32(0) + u8(1) + sized(answer.ok()[4:])
    side.note("a session after TPM_Reset", tpm.send(LOAD_CONTEXT, after_reset))
    side.note("start", side.started())
    side.note("a session after it", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + saved))
    side.note("a key after it", tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + blob))


KINDS = {
    "plain": (0, 0, 0),
    "logged": (LOG, 0, 0),
    "exclusive": (EXCLUSIVE, 0, 0),
    "MGF1": (ENCRYPT, MGF1, NONE),
    "MGF1 with a scheme": (ENCRYPT, MGF1, CTR),
    "AES-CTR": (ENCRYPT, AES, CTR),
    "AES-OFB": (ENCRYPT, AES, OFB),
    "AES without a scheme": (ENCRYPT, AES, NONE),
    "RSA": (ENCRYPT, 1, NONE),
    "unknown attribute": (8, 0, 0),
    "all": (ENCRYPT | LOG | EXCLUSIVE, MGF1, NONE),
}


def transport(side):
    """Every kind of transport session; what may be wrapped and what may not."""
    tpm = side.tpm
    key, parts = side.note("key", loaded(tpm, storage()))
    for name, kind in KINDS.items():
        clear = u32(KH_TRANSPORT) + public(*kind) + sized(bytes(20))
        side.note(f"{name} in clear", tpm.send(ESTABLISH, clear))
        through = Transport(tpm, *kind)
        secret = oaep(parts.modulus, u16(0x1D) + through.secret)
        try:
            through.open_under(key, secret, tpm.oiap(KEY_AUTH).ending())
        except AssertionError:
            side.note(f"{name} refused")
            continue
        side.note(f"{name} opened")
        for ordinal, body in ((PCR_READ, u32(1)), (PCR_READ, u32(99)), (GET_TICKS, b"")):
            side.note(f"{name} {ordinal:x}", through.execute(frame(ordinal, body)))
            through.unwrap(frame(ordinal, body), through.outer.ok())
        side.note("in between", tpm.send(PCR_READ, u32(1)))
        for ordinal in (ESTABLISH, 0xE7, 0x98):
            answer = through.execute(frame(ordinal))
            side.note(f"{name} wraps {ordinal:x}", answer)
            if answer.code:
                break
            through.unwrap(frame(ordinal), answer.body)
        side.note(f"{name} flush", tpm.send(FLUSH, u32(through.handle) + u32(4)))
    for size in (0, 19, 21):
        params = u32(KH_TRANSPORT) + public() + sized(bytes(size))
        side.note(f"secret of {size}", tpm.send(ESTABLISH, params))
    through = side.note("open", Transport(tpm).open())
    side.note("unknown inside", through.execute(frame(0x7777)))
    through = side.note("open", Transport(tpm).open())
    side.note("wrong HMAC", through.execute(frame(GET_TICKS), bad_hmac=True))
    side.note("after it", through.execute(frame(GET_TICKS)))


def released(side):
    """TPM_ReleaseTransportSigned, of sessions with and without a log."""
    tpm = side.tpm
    key, _ = side.note("key", loaded(tpm, signing(bits=1024)))
    for name, attributes in (("logged", LOG), ("plain", 0)):
        for bad in (True, False):
            through = Transport(tpm, attributes).open()
            through.exchange(frame(PCR_READ, u32(2)))
            session = tpm.oiap(KEY_AUTH).ending()
            side.note(f"{name} {bad}", through.release(key, session, bad_hmac=bad))
            side.note("reset", tpm.send(RESET))
            forgive(side)


def delegation(side):
    """Families, rows and delegations; DSAP with each."""
    tpm = side.tpm
    for operation in range(6):
        session = owner(side.rested())
        side.note(f"nothing {operation}", delegate.manage(tpm, operation, 5, b"x", session))
    session = owner(side.rested())
    side.note("family", delegate.manage(tpm, delegate.CREATE, 0, b"F", session))
    for data in (b"", b"FF"):
        session = owner(side.rested())
        side.note(f"label {data!r}", delegate.manage(tpm, delegate.CREATE, 0, data, session))
    family = 1
    for data in (b"\2", b"", delegate.ON):
        session = owner(side.rested())
        answer = delegate.manage(tpm, delegate.ENABLE, family, data, session)
        side.note(f"enable {data!r}", answer)
    info = delegate.public(family, delegate.ALL_OWNER)
    answer = delegate.create_owner(side.rested(), info)
    blob = delegate.blob_of(side.note("delegate the owner", answer))
    for name, other in (
        ("another family", delegate.public(9, 1)),
        ("key bits", delegate.public(family, 1, kind=2)),
        ("no kind", delegate.public(family, 1, kind=3)),
    ):
        side.note(name, delegate.create_owner(side.rested(), other))
    for bit in range(32):
        answer = delegate.create_owner(side.rested(), delegate.public(family, 1 << bit))
        side.note(f"owner bit {bit}", answer)
        wanted = delegate.public(family, 1 << bit, kind=2)
        side.note(f"key bit {bit}", delegate.create_key(side.rested(), wanted))
    for index in (0, 3, 4):
        session = owner(side.rested())
        side.note(f"load {index}", delegate.load_owner(tpm, index, blob, session))
    side.note("table", tpm.send(delegate.READ_TABLE))
    side.note("verify", tpm.send(delegate.VERIFY, sized(blob)))
    altered = blob[:60] + bytes([blob[60] ^ 1]) + blob[61:]
    side.note("verify altered", tpm.send(delegate.VERIFY, sized(altered)))
    values = {"blob": blob, "altered": altered, "row 0": u32(0), "row 2": u32(2), "row 9": u32(9)}
    for kind in (7, 8, 9):
        for name, value in values.items():
            params = u16(kind) + u32(SRK) + ZERO + sized(value)
            side.note(f"DSAP {kind} {name}", side.rested().send(delegate.DSAP, params))
    _withdrawn(side, family, info, blob)


def _withdrawn(side, family, info, blob):
    """Delegations that end, and the owner pointer."""
    tpm = side.tpm
    for increment in (0, 1):
        session = owner(side.rested())
        params = sized(blob)
        side.note(f"update {increment}", tpm.auth(delegate.UPDATE_VERIFICATION, params, session))
        answer = delegate.create_owner(side.rested(), info, increment=bool(increment))
        side.note(f"delegate {increment}", answer)
        side.note(f"verify {increment}", side.rested().send(delegate.VERIFY, sized(blob)))
    for kind, value in ((2, 0), (8, 0), (8, 9), (4, 0)):
        params = u16(kind) + u32(value)
        side.note(f"pointer {kind} {value}", side.rested().send(delegate.SET_OWNER_POINTER, params))
    session = owner(side.rested(), delegate.DEL_AUTH)
    side.note("by the row", tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    params = u16(2) + u32(0)
    side.note("pointer back", side.rested().send(delegate.SET_OWNER_POINTER, params))
    for operation in (delegate.ADMIN, delegate.INVALIDATE):
        session = owner(side.rested())
        answer = delegate.manage(tpm, operation, family, delegate.ON, session)
        side.note(f"end {operation}", answer)
    side.note("table at the end", side.rested().send(delegate.READ_TABLE))
    flags(side, "end")


SCENARIOS = {
    "sessions": ("owned", sessions),
    "contexts": ("owned", contexts),
    "transport": ("owned", transport),
    "released transport": ("owned", released),
    "delegation": ("owned", delegation),
}
