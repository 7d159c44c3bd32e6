"""What is looked at first, and what at all: sessions in pairs, sizes, wrapped frames."""

from tests.differential.change_scenarios import ASYM_FINISH, NEW, TEMP, ephemeral_key, started
from tests.differential.owner_scenarios import EXTEND, PCR_READ, forgive, owner
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12 import movers
from tests.tpm12.identities import AIK_AUTH, MAKE_IDENTITY, loaded_identity
from tests.tpm12.makers import (
    AREA_AUTH,
    DATA_AUTH,
    ET_COUNTER,
    ET_KEY,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    MIGRATABLE,
    WRONG,
    area_info,
    composite,
    loaded,
    nv_public,
    pcr_info,
    pcr_info_long,
    seal,
    sealed_parts,
    signing,
    storage,
    unseal,
    wrap,
)
from tests.tpm12.transport_maker import LOG, Transport
from tests.tpm12.witness import (
    AUTH1,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    Witness,
    frame,
    hmac1,
    key_template,
    number,
    oaep,
    parse_key,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

UNSEAL, CERTIFY_KEY, CERTIFY_KEY2, SIGN, GET_PUB_KEY = 0x18, 0x32, 0x33, 0x3C, 0x21
SET_AUDIT, GET_AUDIT_DIGEST, TSC_PRESENCE = 0x8D, 0x85, 0x4000000A
CREATE_COUNTER, INCREMENT = 0xDC, 0xDD
NV_READ_VALUE, NV_WRITE_VALUE, DIR = 0xCF, 0xCD, 0x10000001
GET_TICKS, GET_CAPABILITY, SELECT_SIZE = 0xF1, 0x65, 0x18
CREATE_MIGRATION_BLOB, ACTIVATE_IDENTITY = 0x28, 0x7A
SET_CAPABILITY = 0x3F
NV_DEFINE_SPACE, QUOTE, QUOTE2, PCR_RESET, FLUSH = 0xCC, 0x16, 0x3E, 0xC8, 0xBA
BEYOND = u16(0xFFFF) + bytes(3)
"""A TPM_PCR_SELECTION that ends before its sizeOfSelect does."""


# -- transport sessions ----------------------------------------------------------------------------


def wrapped_frames(side):
    """What a transport session is opened with, and what is no whole command inside of one."""
    tpm = side.tpm
    key, parts = side.note("key", loaded(tpm, storage()))
    secret = Transport(tpm).secret
    for name, plain in {
        "whole": u16(0x1D) + secret,
        "cut": u16(0x1D) + secret[:19],
        "another tag": u16(0x1E) + secret,
        "nothing": b"",
        "byte behind": u16(0x1D) + secret + b"\0",
    }.items():
        params = Transport(tpm).public + sized(oaep(parts.modulus, plain))
        session = side.rested().oiap(KEY_AUTH).ending()
        answer = tpm.auth(0xE6, params, session, handles=u32(key), out_handles=4)
        side.note(f"secret, {name}", answer)
    side.note("start", side.started())
    for name, request in {
        "byte behind the frame": frame(PCR_READ, u32(1)) + b"\0",
        "byte behind the parameters": frame(PCR_READ, u32(1) + b"\0"),
        "cut parameters": frame(PCR_READ, u32(1)[:3]),
        "unknown tag": frame(PCR_READ, u32(1), 0x1234),
        "session that is not taken": frame(PCR_READ, u32(1) + bytes(45), AUTH1),
        "no ordinal": frame(PCR_READ)[:9],
        "nothing": b"",
        "cut handle": frame(SIGN, b"\0\0"),
        "cut session": frame(SIGN, u32(1) + bytes(44), AUTH1),
        "cut kind of resource": frame(FLUSH, u32(1) + b"\0"),
    }.items():
        through = side.note("open", Transport(tpm).open())
        answer = side.note(f"wrapped, {name}", through.execute(request))
        if not answer.code:
            through.unwrap(request, answer.body)
            side.note(f"after it, {name}", through.execute(frame(GET_TICKS)))


def logged_keys(side):
    """The log of a transport session names keys, whatever they may be used for."""
    tpm = side.tpm
    bound, bound_parts = side.note("bound", loaded(tpm, signing(pcr_info=pcr_info(10))))
    free, free_parts = side.note("free", loaded(side.rested(), signing()))
    side.note("extend", tpm.send(EXTEND, u32(10) + ZERO))
    for attributes in (0, LOG):
        for name, handle in {"free": free, "no key": 7, "bound": bound}.items():
            through = side.note("open", Transport(side.rested(), attributes).open())
            through.moduli = {free: free_parts.modulus, bound: bound_parts.modulus}
            inside = Witness(through.exchange)
            for ordinal, params in ((SIGN, sized(ZERO)), (GET_PUB_KEY, b"")):
                session = tpm.oiap(KEY_AUTH).ending()
                _tried(inside, ordinal, params, session, handles=u32(handle))
                side.note(f"{ordinal:x} {name} {attributes}")


def _tried(inside, *arguments, **more):
    """Send a wrapped command; the transport command may fail."""
    try:
        inside.auth(*arguments, **more)
    except AssertionError as error:
        if not str(error).startswith("return code"):
            raise


def wrapped_asymmetric_change(side):
    """TPM_ChangeAuthAsymFinish has two handles, inside a transport session as outside."""
    identity, _ = side.note("identity", loaded_identity(side.tpm))
    blob = parse_key(side.note("key", wrap(side.rested(), signing())).ok()).enc_data
    for attributes in (0, LOG):
        answer = started(side.rested(), identity, AIK_AUTH, TEMP)
        ephemeral, modulus = ephemeral_key(side.note("start", answer).ok())
        through = side.note("open", Transport(side.tpm, attributes).open())
        through.moduli = {ephemeral: modulus}
        params = u16(5) + hmac1(KEY_AUTH, NEW) + sized(oaep(modulus, NEW + ZERO)) + sized(blob)
        handles = u32(SRK) + u32(ephemeral)
        _tried(Witness(through.exchange), ASYM_FINISH, params, owner(side.tpm), handles=handles)
        side.note(f"finish {attributes}")


# -- two sessions ----------------------------------------------------------------------------------


def one_session_twice(side):
    """Both authorization blocks of a command name one session."""
    tpm = side.tpm
    identity, _ = side.note("identity", loaded_identity(tpm))
    first, _ = side.note("first", loaded(side.rested(), signing()))
    second, _ = side.note("second", loaded(side.rested(), signing()))
    blob = side.note("blob", seal(side.rested(), b"data")).ok()
    movable = side.note("movable", wrap(side.rested(), signing(flags=MIGRATABLE))).ok()
    pubkey = movers.OutsideKey().pubkey
    ticket = side.note("ticket", movers.authorize(side.rested(), pubkey)).ok()
    migrate = u16(movers.MS_MIGRATE) + ticket + sized(parse_key(movable).enc_data)
    for name, ordinal, params, handles, secrets in (
        ("unseal", UNSEAL, blob, u32(SRK), (SRK_AUTH, DATA_AUTH)),
        ("unseal wrong", UNSEAL, blob, u32(SRK), (SRK_AUTH, WRONG)),
        ("certify", CERTIFY_KEY, ZERO, u32(first) + u32(second), (KEY_AUTH, KEY_AUTH)),
        ("certify wrong", CERTIFY_KEY, ZERO, u32(first) + u32(second), (WRONG, KEY_AUTH)),
        ("certify2", CERTIFY_KEY2, ZERO * 2, u32(second) + u32(first), (KEY_AUTH, KEY_AUTH)),
        ("migrate", CREATE_MIGRATION_BLOB, migrate, u32(SRK), (SRK_AUTH, ZERO)),
        ("activate", ACTIVATE_IDENTITY, sized(bytes(256)), u32(identity), (AIK_AUTH, WRONG)),
    ):
        session = side.rested().oiap(secrets[0])
        again = session.with_key(secrets[1])
        side.note(f"{name} twice", tpm.auth(ordinal, params, session, again, handles=handles))
        forgive(side)
    session = side.rested().osap(ET_OWNER, 0, OWNER_AUTH)
    wanted = key_template(0x12, parms=rsa_parms(enc=1, sig=2))
    params = session.masked(AIK_AUTH) + sha1(b"label") + wanted
    side.note("make twice", tpm.auth(MAKE_IDENTITY, params, session, session))
    forgive(side)


PAIR = {
    "good": lambda tpm, _first, _second: tpm.oiap(KEY_AUTH),
    "wrong": lambda tpm, _first, _second: tpm.oiap(WRONG),
    "of the first": lambda tpm, first, _second: tpm.osap(ET_KEY, first, KEY_AUTH),
    "of the second": lambda tpm, _first, second: tpm.osap(ET_KEY, second, KEY_AUTH),
    "of the SRK": lambda tpm, _first, _second: tpm.osap(ET_SRK, SRK, SRK_AUTH),
    "none": lambda _tpm, _first, _second: Session(9, ZERO, ZERO),
}


def pairs_of_sessions(side):
    """Two sessions of one command, each good, wrong, of something else, or not there."""
    tpm = side.tpm
    first, _ = side.note("first", loaded(tpm, signing()))
    second, _ = side.note("second", loaded(side.rested(), signing()))
    for ordinal, count in ((CERTIFY_KEY, 1), (CERTIFY_KEY2, 2)):
        for one in PAIR:
            for other in PAIR:
                side.rested()
                sessions = [PAIR[kind](tpm, first, second).ending() for kind in (one, other)]
                handles = u32(first) + u32(second)
                answer = tpm.auth(ordinal, ZERO * count, *sessions, handles=handles)
                side.note(f"{ordinal:x}: {one}, {other}", answer)
                forgive(side)


# -- sizes -----------------------------------------------------------------------------------------


def sizes(side):
    """Bytes before auth blocks, selections longer than what came, sealInfo that is none."""
    tpm = side.tpm
    key, _ = side.note("key", loaded(tpm, signing()))
    for last in (0, 1, 2):
        session = side.rested().oiap(KEY_AUTH)
        odd = [bytes(19) + u8(last)]
        answer = tpm.auth(SIGN, sized(ZERO) + b"\0", session, handles=u32(key), odd=odd)
        side.note(f"byte before a block, read as {last}", answer)
        side.note("session", tpm.auth(SIGN, sized(ZERO), session, handles=u32(key)))
    for name, select in {
        "4": selection(1, size=4),
        "0": selection(size=0),
        "beyond": BEYOND,
    }.items():
        public = nv_public(0x11001, 2, 4, read=area_info(select))
        session = owner(side.rested())
        side.note(f"select {name}, area", tpm.auth(NV_DEFINE_SPACE, public + ZERO, session))
        for ordinal, params in ((QUOTE, ZERO + select), (QUOTE2, ZERO + select + u8(0))):
            session = side.rested().oiap(KEY_AUTH).ending()
            answer = tpm.auth(ordinal, params, session, handles=u32(key))
            side.note(f"select {name}, {ordinal:x}", answer)
        side.note(f"select {name}, reset", tpm.send(PCR_RESET, select))
        info = select + ZERO * 2
        side.note(f"select {name}, key", wrap(side.rested(), signing(pcr_info=info)))
    _, enc_data = sealed_parts(side.note("seal", seal(side.rested(), b"data")).ok())
    whole = pcr_info(1)
    for head, version in ((bytes.fromhex("01010000"), 1), (bytes.fromhex("00160000"), 2)):
        for name, info in {
            "none": b"",
            "cut": whole[:-1],
            "of 1.1": whole,
            "of 1.2": pcr_info_long(release=(1,)),
            "byte behind": whole + b"\0",
            "beyond": BEYOND + ZERO * 2,
            "four bytes": selection(1, size=4) + composite((1,), size=4) + ZERO,
            "no locality": pcr_info_long(localities=0),
        }.items():
            for by, secret in {"": SRK_AUTH, ", wrong": WRONG}.items():
                blob = head + sized(info) + sized(enc_data)
                answer = unseal(side.rested(), blob, key_auth=secret)
                side.note(f"sealInfo {version} {name}{by}", answer)
                forgive(side)


# -- what is told ----------------------------------------------------------------------------------


def versions_of_a_selection(side):
    """TPM_CAP_SELECT_SIZE for versions that there are and that there are not."""
    for major in range(3):
        for minor in range(5):
            params = u32(SELECT_SIZE) + sized(u8(major) + u8(minor) + u16(3))
            side.note(f"version {major}.{minor}", side.tpm.send(GET_CAPABILITY, params))


def lists(side):
    """Lists from where they end, and in the order in which they are told."""
    tpm = side.tpm
    answer = tpm.auth(SET_AUDIT, u32(TSC_PRESENCE) + u8(1), owner(tpm))
    side.note("audit presence", answer)
    for first in (TSC_PRESENCE, TSC_PRESENCE + 1):
        side.note(f"audited from {first:x}", tpm.send(GET_AUDIT_DIGEST, u32(first)))
    family = side.note("family", delegate.new_family(side.rested()))
    side.note("another family", delegate.new_family(side.rested()))
    session = owner(side.rested())
    ended = delegate.manage(tpm, delegate.INVALIDATE, family, b"", session)
    side.note("end the first", ended)
    side.note("table", tpm.send(delegate.READ_TABLE))
    family = side.note("a third family", delegate.new_family(side.rested()))
    side.note("table with the third", tpm.send(delegate.READ_TABLE))
    answer = delegate.manage(tpm, delegate.ADMIN, family, b"\2", owner(side.rested()))
    side.note("lock b'\\x02'", answer)


def counters_after_a_start(side):
    """Two counters with one secret, and OSAP sessions of each."""
    tpm = side.tpm
    for step in ("first", "second"):
        session = tpm.osap(ET_OWNER, 0, OWNER_AUTH)
        answer = tpm.auth(CREATE_COUNTER, session.masked(AREA_AUTH) + b"abcd", session)
        count_id = number(side.note(step, answer).ok()[:4])
    for when in ("before", "after"):
        session = tpm.osap(ET_COUNTER, count_id, AREA_AUTH)
        answer = tpm.auth(INCREMENT, u32(count_id), session)
        side.note(f"its own, {when} a start", answer)
        session = tpm.osap(ET_COUNTER, count_id - 1, AREA_AUTH)
        answer = tpm.auth(INCREMENT, u32(count_id), session)
        side.note(f"the other's, {when} a start", answer)
        side.note("start", side.started())


def dir_of_nobody(side):
    """The DIR and the global lock, with a session, where there is no owner."""
    for name, ordinal, params in (
        ("read DIR", NV_READ_VALUE, u32(DIR) + u32(0) + u32(20)),
        ("write DIR", NV_WRITE_VALUE, u32(DIR) + u32(0) + sized(ZERO)),
        ("lock", NV_WRITE_VALUE, u32(0) + u32(0) + sized(b"")),
    ):
        side.note(name, side.tpm.send(ordinal, params))
        session = side.tpm.oiap(OWNER_AUTH)
        side.note(f"{name} as the owner", side.tpm.auth(ordinal, params, session))


SCENARIOS = {
    "lists": ("owned", lists),
    "counters after a start": ("owned", counters_after_a_start),
    "DIR of nobody": ("with_ek", dir_of_nobody),
    "versions of a selection": ("factory", versions_of_a_selection),
    "wrapped frames": ("owned", wrapped_frames),
    "logged keys": ("owned", logged_keys),
    "wrapped asymmetric change": ("owned", wrapped_asymmetric_change),
    "one session twice": ("owned", one_session_twice),
    "pairs of sessions": ("owned", pairs_of_sessions),
    "sizes": ("owned", sizes),
}
