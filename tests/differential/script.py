"""A small language for sequences of commands: one operation a line, played on any TPM.

    start owned           where to begin: factory, with_ek or owned; the first line
    make signing          a new key under the SRK, loaded; keys are numbered from 0
    oiap owner            a session that is kept; sessions are numbered too
    info 0                an owner's command under session 0
    extend 10 61          and so on: `OPERATIONS` has them all
    # a comment

A number of a key, session, counter, blob and so on counts round (key 5 of two keys is key 1), and
an operation on something of which there is none does nothing: so every line can be left out of a
sequence without making it meaningless. Secrets are the tests' own; `wrong` is none of them.
"""

from collections.abc import Callable

from tests.differential.owner_scenarios import (
    CREATE_EK,
    EXTEND,
    GET_CAPABILITY,
    GET_CAPABILITY_OWNER,
    OWNER_CLEAR,
    PCR_READ,
    PCR_RESET,
    PHYSICAL_DISABLE,
    PHYSICAL_ENABLE,
    PHYSICAL_SET_DEACTIVATED,
    PRESENCE,
    RESET_LOCK_VALUE,
    SAVE_STATE,
    SET_OWNER_INSTALL,
    SET_TEMP_DEACTIVATED,
    STARTUP,
    owner,
)
from tests.differential.sides import Side, take_ownership
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12.makers import (
    AREA_AUTH,
    ET_COUNTER,
    ET_KEY,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    WRONG,
    load,
    nv_public,
    pcr_info,
    seal,
    signing,
    storage,
    template,
    unseal,
    wrap,
)
from tests.tpm12.nv_makers import read, read_as, read_with, write, write_as, write_with
from tests.tpm12.transport_maker import ENCRYPT, EXCLUSIVE, LOG, MGF1, Transport
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Witness,
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

SECRETS = {
    "owner": OWNER_AUTH,
    "srk": SRK_AUTH,
    "key": KEY_AUTH,
    "area": AREA_AUTH,
    "wrong": WRONG,
}
TEMPLATES = {
    "signing": signing,
    "der": lambda: signing(3),
    "storage": storage,
    "bind": lambda: template(0x14, 3, 1),
    "legacy": lambda: template(0x15, 2, 2),
    "bound": lambda: signing(pcr_info=pcr_info(10)),
    "key12": lambda: signing(key12=True),
    "free": lambda: signing(auth_data_usage=0),
}
AREAS = {"a": 0x00011101, "b": 0x00011102}
SIGN, GET_PUB_KEY, QUOTE, FLUSH = 0x3C, 0x21, 0x16, 0xBA
NV_DEFINE_SPACE, CREATE_COUNTER, INCREMENT, READ_COUNTER, RELEASE = 0xCC, 0xDC, 0xDD, 0xDE, 0xDF
AUTHFAIL, AUTH2FAIL = 0x01, 0x1D
SAVE_CONTEXT, LOAD_CONTEXT, OWNER_READ_PUBEK = 0xB8, 0xB9, 0x7D
RT_KEY, RT_AUTH, RT_TRANS, RT_CONTEXT = 1, 2, 4, 5
CONTEXT_COUNT = slice(26, 30)
"""In a TPM_CONTEXT_BLOB (Part 2 §18.1)."""
LABEL = bytes(16)
TRANSPORTS = {
    "plain": (0, 0, 0),
    "logged": (LOG, 0, 0),
    "exclusive": (EXCLUSIVE, 0, 0),
    "encrypted": (ENCRYPT, MGF1, 1),
    "all": (ENCRYPT | LOG | EXCLUSIVE, MGF1, 1),
}

Operation = Callable[..., object]


class Player:
    """Plays lines on one side and remembers what they made."""

    def __init__(self, side: Side):
        self.side = side
        self.tpm = side.tpm
        self.keys: list[tuple[int, bytes]] = []
        self.sessions: list = []
        self.of_the_owner: list = []
        self.counters: list[int] = []
        self.blobs: list[bytes] = []
        self.contexts: list[tuple[int, int, bytes]] = []
        self.transports: list[Transport] = []
        self.families: list[int] = []
        self.delegations: list[tuple[int, bytes]] = []

    def play(self, line: str) -> None:
        """Play one line.

        Raises:
            ValueError: The line is none.
        """
        words = line.split("#", maxsplit=1)[0].split()
        if not words:
            return
        if words[0] not in OPERATIONS:
            raise ValueError(f"no such operation: {line!r}; there are {', '.join(OPERATIONS)}")
        seen_before = len(self.side.seen)
        self._tried(OPERATIONS[words[0]], self, *words[1:])
        # Wrong secrets must not add up: how long a lock lasts is each maker's own.
        if any(seen.code in {AUTHFAIL, AUTH2FAIL} for seen in self.side.seen[seen_before:]):
            self._tried(lambda: self.tpm.auth(RESET_LOCK_VALUE, b"", owner(self.tpm)))
        self.side.note(line)

    @staticmethod
    def _tried(operation: Operation, *arguments: object) -> None:
        """Run an operation to its end, or to the first session that it is not given."""
        try:
            operation(*arguments)
        except AssertionError as error:
            if not str(error).startswith("return code"):
                raise


def _nth(things, word):
    return things[int(word) % len(things)] if things else None


# -- sessions --------------------------------------------------------------------------------------


def oiap(player, secret):
    player.sessions.append(player.tpm.oiap(SECRETS[secret]))


def osap(player, what, secret):
    entities = {"owner": (ET_OWNER, 0), "srk": (ET_SRK, SRK)}
    if player.keys:
        entities["key"] = (ET_KEY, player.keys[0][0])
    if player.counters:
        entities["counter"] = (ET_COUNTER, player.counters[0])
    if what in entities:
        player.sessions.append(player.tpm.osap(*entities[what], SECRETS[secret]))
        if what == "owner":
            player.of_the_owner.append(player.sessions[-1])


def info(player, nth):
    session = _nth(player.sessions, nth)
    if session:
        player.tpm.auth(GET_CAPABILITY_OWNER, b"", session)


def make_under(player, nth):
    """A key under a session that is already open."""
    session = _nth(player.sessions, nth)
    if session and session.shared:
        odd = player.tpm.nonce()
        masks = session.masked(KEY_AUTH) + session.masked(ZERO, odd)
        params = masks + signing()
        player.tpm.auth(0x1F, params, session, handles=u32(SRK), odd=[odd])


def sign_under(player, nth, key, size):
    session, held = _nth(player.sessions, nth), _nth(player.keys, key)
    if session and held:
        player.tpm.auth(SIGN, sized(b"d" * int(size)), session, handles=u32(held[0]))


def end(player, nth):
    session = _nth(player.sessions, nth)
    if session:
        player.tpm.send(FLUSH, u32(session.handle) + u32(2))


def reset(player):
    """Of saved sessions only what is flushed before it is the same after it (a named deviation)."""
    for kind, _, blob in player.contexts:
        if kind == RT_AUTH:
            player.tpm.send(FLUSH, blob[CONTEXT_COUNT] + u32(RT_CONTEXT))
    player.contexts = [context for context in player.contexts if context[0] != RT_AUTH]
    player.tpm.send(0x5A)


# -- contexts --------------------------------------------------------------------------------------


def save_key(player, nth):
    held = _nth(player.keys, nth)
    if held:
        answer = player.tpm.send(SAVE_CONTEXT, u32(held[0]) + u32(RT_KEY) + LABEL)
        player.contexts.append((RT_KEY, held[0], answer.ok()[4:]))


def save_session(player, nth):
    """The owner's or nobody's: libtpms does not look whether what others are of is here."""
    session = _nth(player.sessions, nth)
    if session and (session.shared is None or session in player.of_the_owner):
        answer = player.tpm.send(SAVE_CONTEXT, u32(session.handle) + u32(RT_AUTH) + LABEL)
        player.contexts.append((RT_AUTH, session.handle, answer.ok()[4:]))


def load_context(player, nth, keeps_handle):
    """After what has the handle is flushed, for libtpms throws it out even if it refuses."""
    context = _nth(player.contexts, nth)
    if context:
        kind, handle, blob = context
        player.tpm.send(FLUSH, u32(handle) + u32(kind))
        player.tpm.send(LOAD_CONTEXT, u32(0) + u8(int(keeps_handle)) + sized(blob))


# -- transport sessions ----------------------------------------------------------------------------


def transport(player, kind):
    """A transport session in clear, or under a storage key (that stays if a command ends it)."""
    through = Transport(player.tpm, *TRANSPORTS[kind])
    if through.attributes & ENCRYPT:
        handle, parts = _storage_key(player)
        secret = oaep(parts.modulus, u16(0x1D) + through.secret)
        through.open_under(handle, secret, player.tpm.oiap(KEY_AUTH).ending())
        if not through.attributes & EXCLUSIVE:
            player.tpm.send(FLUSH, u32(handle) + u32(RT_KEY))
    else:
        through.open()
    player.transports.append(through)


def _storage_key(player):
    blob = wrap(player.tpm, storage()).ok()
    return number(load(player.tpm, blob).ok()[:4]), parse_key(blob)


def through(player, nth, word, *arguments):
    """Another operation, each command of it through a transport session."""
    session = _nth(player.transports, nth)
    if session:
        outside, player.tpm = player.tpm, Witness(session.exchange)
        player.side.hides = bool(session.attributes & ENCRYPT)
        try:
            OPERATIONS[word](player, *arguments)
        finally:
            player.tpm, player.side.hides = outside, False


def release_transport(player, nth, key):
    session, held = _nth(player.transports, nth), _nth(player.keys, key)
    if session and held:
        session.release(held[0], player.tpm.oiap(KEY_AUTH).ending())


def end_transport(player, nth):
    session = _nth(player.transports, nth)
    if session:
        player.tpm.send(FLUSH, u32(session.handle) + u32(RT_TRANS))


# -- delegation ------------------------------------------------------------------------------------


def family(player, is_enabled):
    answer = delegate.manage(player.tpm, delegate.CREATE, 0, b"F", owner(player.tpm))
    made = number(answer.ok()[4:])
    player.families.append(made)
    delegate.manage(player.tpm, delegate.ENABLE, made, u8(int(is_enabled)), owner(player.tpm))


def manage(player, nth, operation):
    made = _nth(player.families, nth)
    if made:
        operations = {"on": (2, b"\1"), "off": (2, b"\0"), "lock": (3, b"\1"), "end": (4, b"")}
        delegate.manage(player.tpm, operations[operation][0], made, operations[operation][1],
                        owner(player.tpm))  # fmt: skip


def delegate_owner(player, nth, permissions):
    made = _nth(player.families, nth)
    if made:
        answer = delegate.create_owner(player.tpm, delegate.public(made, int(permissions, 16)))
        player.delegations.append((delegate.ET_OWNER_BLOB, delegate.blob_of(answer)))


def delegate_srk(player, nth, permissions):
    made = _nth(player.families, nth)
    if made:
        public_part = delegate.public(made, int(permissions, 16), kind=delegate.KEY_BITS)
        answer = delegate.create_key(player.tpm, public_part)
        player.delegations.append((delegate.ET_KEY_BLOB, delegate.blob_of(answer)))


def dsap(player, nth):
    held = _nth(player.delegations, nth)
    if held:
        player.sessions.append(delegate.dsap(player.tpm, *held, SRK))


def dsap_row(player, index):
    player.sessions.append(delegate.by_row(player.tpm, int(index)))


def load_row(player, nth, index):
    held = _nth(player.delegations, nth)
    if held and held[0] == delegate.ET_OWNER_BLOB:
        delegate.load_owner(player.tpm, int(index), held[1], owner(player.tpm))


def verify_delegation(player, nth):
    held = _nth(player.delegations, nth)
    if held:
        delegate.verify(player.tpm, held[1])


def update_delegation(player, nth):
    held = _nth(player.delegations, nth)
    if held:
        answer = delegate.update(player.tpm, held[1])
        player.delegations.append((held[0], delegate.blob_of(answer)))


def pubek(player, nth):
    session = _nth(player.sessions, nth)
    if session:
        player.tpm.auth(OWNER_READ_PUBEK, b"", session)


# -- keys and data ---------------------------------------------------------------------------------


def make(player, kind, secret="srk"):
    blob = wrap(player.tpm, TEMPLATES[kind](), parent_auth=SECRETS[secret]).ok()
    handle = load(player.tpm, blob).ok()
    player.keys.append((number(handle[:4]), blob))


def reload(player, nth):
    held = _nth(player.keys, nth)
    if held:
        player.keys.append((number(load(player.tpm, held[1]).ok()[:4]), held[1]))


def sign(player, nth, size, secret="key"):
    held = _nth(player.keys, nth)
    if held:
        session = player.tpm.oiap(SECRETS[secret])
        player.tpm.auth(SIGN, sized(b"d" * int(size)), session, handles=u32(held[0]))
        player.sessions.append(session)


def sign_freely(player, nth):
    held = _nth(player.keys, nth)
    if held:
        player.tpm.send(SIGN, u32(held[0]) + sized(b"d" * 20))


def public(player, nth, secret="key"):
    held = _nth(player.keys, nth)
    if held:
        session = player.tpm.oiap(SECRETS[secret]).ending()
        player.tpm.auth(GET_PUB_KEY, b"", session, handles=u32(held[0]))


def quote(player, nth, *indices):
    held = _nth(player.keys, nth)
    if held:
        params = sha1(b"external") + selection(*map(int, indices))
        session = player.tpm.oiap(KEY_AUTH).ending()
        player.tpm.auth(QUOTE, params, session, handles=u32(held[0]))


def flush(player, nth):
    held = _nth(player.keys, nth)
    if held:
        player.tpm.send(FLUSH, u32(held[0]) + u32(1))


def seal_data(player, size, *indices):
    binding = pcr_info(*map(int, indices)) if indices else b""
    answer = seal(player.tpm, b"s" * int(size), binding, secret=KEY_AUTH)
    player.blobs.append(answer.ok())


def unseal_data(player, nth, secret="key"):
    blob = _nth(player.blobs, nth)
    if blob:
        unseal(player.tpm, blob, secret=SECRETS[secret])


# -- PCRs ------------------------------------------------------------------------------------------


def extend(player, index, text, locality="0"):
    params = u32(int(index)) + sha1(text.encode())
    player.tpm.send(EXTEND, params, locality=int(locality))


def pcr(player, index):
    player.tpm.send(PCR_READ, u32(int(index)))


def pcr_reset(player, index, locality="0"):
    player.tpm.send(PCR_RESET, selection(int(index)), locality=int(locality))


# -- NV and counters -------------------------------------------------------------------------------


def define(player, area, attributes, size):
    """As the owner, after the old area is deleted: libtpms ends in failure mode else."""
    _deleted(player, area)
    session = player.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    public_part = nv_public(AREAS[area], int(attributes, 16), int(size))
    player.tpm.auth(NV_DEFINE_SPACE, public_part + session.masked(AREA_AUTH), session)


def _deleted(player, area):
    session = player.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    player.tpm.auth(NV_DEFINE_SPACE, nv_public(AREAS[area], 0, 0) + ZERO, session)


def nv_lock(player):
    player.tpm.send(NV_DEFINE_SPACE, nv_public(0xFFFFFFFF, 0, 0) + ZERO)


def nv_write(player, who, area, offset, size):
    data, place = b"w" * int(size), {"index": AREAS[area]}
    if who == "nobody":
        write(player.tpm, data, int(offset), **place)
    elif who == "area":
        write_with(player.tpm, AREA_AUTH, data, int(offset), **place)
    else:
        write_as(player.tpm, SECRETS[who], data, int(offset), **place)


def nv_read(player, who, area, offset, size):
    where = (int(size), int(offset))
    if who == "nobody":
        read(player.tpm, *where, index=AREAS[area])
    elif who == "area":
        read_with(player.tpm, AREA_AUTH, *where, index=AREAS[area])
    else:
        read_as(player.tpm, SECRETS[who], *where, index=AREAS[area])


def counter(player):
    session = player.tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    answer = player.tpm.auth(CREATE_COUNTER, session.masked(AREA_AUTH) + b"cntr", session)
    player.counters.append(number(answer.ok()[:4]))


def _counted(ordinal):
    def operation(player, nth, secret="area"):
        count_id = _nth(player.counters, nth)
        if count_id is not None:
            session = player.tpm.oiap(SECRETS[secret]).ending()
            player.tpm.auth(ordinal, u32(count_id), session)

    return operation


def counter_read(player, nth):
    count_id = _nth(player.counters, nth)
    if count_id is not None:
        player.tpm.send(READ_COUNTER, u32(count_id))


# -- the platform and the owner --------------------------------------------------------------------


def take(player):
    take_ownership(player.tpm)


def clear(player, secret="owner"):
    player.tpm.auth(OWNER_CLEAR, b"", owner(player.tpm, SECRETS[secret]))


def _plain(ordinal, body=b""):
    return lambda player: player.tpm.send(ordinal, body)


def power(player):
    player.side.started()


def resume(player):
    """TPM_SaveState, TPM_Init, TPM_Startup(ST_STATE)."""
    player.tpm.send(SAVE_STATE)
    player.side.power_on()
    player.tpm.send(STARTUP, u16(2))


def capability(player, area, sub_cap):
    sub_caps = {"-": b"", "flags": u32(0x108), "volatile": u32(0x109)}
    data = sub_caps[sub_cap] if sub_cap in sub_caps else bytes.fromhex(sub_cap)
    player.tpm.send(GET_CAPABILITY, u32(int(area, 16)) + sized(data))


def raw(player, request):
    """Any bytes, without what they would mean to a client."""
    player.tpm.raw(bytes.fromhex(request))


OPERATIONS: dict[str, Operation] = {
    "start": lambda _player, _start: None,
    "oiap": oiap,
    "osap": osap,
    "info": info,
    "make-under": make_under,
    "sign-under": sign_under,
    "end": end,
    "reset": reset,
    "save-key": save_key,
    "save-session": save_session,
    "load-context": load_context,
    "transport": transport,
    "through": through,
    "release-transport": release_transport,
    "end-transport": end_transport,
    "family": family,
    "manage": manage,
    "delegate-owner": delegate_owner,
    "delegate-srk": delegate_srk,
    "dsap": dsap,
    "dsap-row": dsap_row,
    "load-row": load_row,
    "verify-delegation": verify_delegation,
    "update-delegation": update_delegation,
    "table": _plain(delegate.READ_TABLE),
    "pubek": pubek,
    "make": make,
    "reload": reload,
    "sign": sign,
    "sign-freely": sign_freely,
    "public": public,
    "quote": quote,
    "flush": flush,
    "seal": seal_data,
    "unseal": unseal_data,
    "extend": extend,
    "pcr": pcr,
    "pcr-reset": pcr_reset,
    "define": define,
    "nv-lock": nv_lock,
    "write": nv_write,
    "read": nv_read,
    "counter": counter,
    "increment": _counted(INCREMENT),
    "release": _counted(RELEASE),
    "counter-read": counter_read,
    "take": take,
    "clear": clear,
    "make-ek": _plain(CREATE_EK, ZERO + rsa_parms()),
    "force-clear": _plain(0x5D),
    "enable": _plain(PHYSICAL_ENABLE),
    "disable": _plain(PHYSICAL_DISABLE),
    "activate": _plain(PHYSICAL_SET_DEACTIVATED, u8(0)),
    "deactivate": _plain(PHYSICAL_SET_DEACTIVATED, u8(1)),
    "deactivate-now": _plain(SET_TEMP_DEACTIVATED),
    "install": _plain(SET_OWNER_INSTALL, u8(1)),
    "no-install": _plain(SET_OWNER_INSTALL, u8(0)),
    "presence-command": _plain(PRESENCE, u16(0x20)),
    "present": _plain(PRESENCE, u16(0x08)),
    "absent": _plain(PRESENCE, u16(0x10)),
    "presence-lock": _plain(PRESENCE, u16(0x04)),
    "power": power,
    "resume": resume,
    "capability": capability,
    "raw": raw,
}
"""Words of the language; the functions above say what they do."""
