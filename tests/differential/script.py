"""A small language for sequences of commands: one operation a line, played on any TPM.

    start owned           where to begin: factory, with_ek or owned; the first line
    make signing          a new key under the SRK, loaded; keys are numbered from 0
    oiap owner            a session that is kept; sessions are numbered too
    info 0                an owner's command under session 0
    extend 10 61          and so on: `OPERATIONS` has them all
    # a comment

A number of a key, session, counter or blob counts round (key 5 of two keys is key 1), and an
operation on something of which there is none does nothing: so every line can be left out of a
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
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    number,
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

Operation = Callable[..., object]


class Player:
    """Plays lines on one side and remembers what they made."""

    def __init__(self, side: Side):
        self.side = side
        self.tpm = side.tpm
        self.keys: list[tuple[int, bytes]] = []
        self.sessions: list = []
        self.counters: list[int] = []
        self.blobs: list[bytes] = []

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
    player.tpm.send(0x5A)


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
