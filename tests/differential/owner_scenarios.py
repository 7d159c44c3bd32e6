"""Owner, presence, opt-in flags, capabilities, start-up, self-test: what a platform does."""

from tests.differential.sides import CREATE_EK, READ_PUBEK, take_ownership
from tests.tpm12.makers import (
    KEY_AUTH,
    MIGRATE,
    WRONG,
    loaded,
    signing,
    template,
)
from tests.tpm12.witness import (
    EK,
    OWNER,
    OWNER_AUTH,
    SRK,
    ZERO,
    key_template,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

PRESENCE, RESET_ESTABLISHMENT = 0x4000000A, 0x4000000B
SET_OWNER_INSTALL, OWNER_SET_DISABLE, PHYSICAL_ENABLE, PHYSICAL_DISABLE = 0x71, 0x6E, 0x6F, 0x70
PHYSICAL_SET_DEACTIVATED, SET_TEMP_DEACTIVATED, SET_OPERATOR_AUTH = 0x72, 0x73, 0x74
OWNER_CLEAR, FORCE_CLEAR, DISABLE_OWNER_CLEAR, DISABLE_FORCE_CLEAR = 0x5B, 0x5D, 0x5C, 0x5E
GET_CAPABILITY, GET_CAPABILITY_OWNER, SET_CAPABILITY = 0x65, 0x66, 0x3F
RESET_LOCK_VALUE, REVOKE_TRUST, CREATE_REVOCABLE_EK = 0x40, 0x80, 0x7F
OWNER_READ_PUBEK, DISABLE_PUBEK_READ, OWNER_READ_INTERNAL_PUB = 0x7D, 0x7E, 0x81
STARTUP, SAVE_STATE, PCR_READ, EXTEND, PCR_RESET = 0x99, 0x98, 0x15, 0x14, 0xC8
SELF_TEST_FULL, CONTINUE_SELF_TEST, GET_TEST_RESULT = 0x50, 0x53, 0x54
DIR_WRITE, DIR_READ, KEY_CONTROL_OWNER = 0x19, 0x1A, 0x23
SHA1_START, SHA1_COMPLETE_EXTEND = 0xA0, 0xA3
CREATE_COUNTER, INCREMENT_COUNTER, GET_AUDIT_DIGEST = 0xDC, 0xDD, 0x85
FLAGS, VOLATILE_FLAGS = 0x108, 0x109
OPERATOR = sha1(b"operator")


def owner(tpm, secret=OWNER_AUTH):
    """A session that proves the owner's secret once."""
    return tpm.oiap(secret).ending()


def forgive(side):
    """TPM_ResetLockValue, so that wrong secrets never add up to a lock."""
    side.note("forgive", side.tpm.auth(RESET_LOCK_VALUE, b"", owner(side.rested())))


def flags(side, step):
    """Both structures of flags, to see what a step changed."""
    for kind in (FLAGS, VOLATILE_FLAGS):
        answer = side.tpm.send(GET_CAPABILITY, u32(4) + sized(u32(kind)))
        side.note(f"{step}: flags {kind:x}", answer)


def presence(side):
    """TSC_PhysicalPresence: every value, in three states."""
    for state in ("shipped", "enabled", "locked for the session"):
        if state == "enabled":
            side.note("enable", side.tpm.send(PRESENCE, u16(0x20)))
        elif state != "shipped":
            side.note("lock", side.tpm.send(PRESENCE, u16(0x04)))
        for value in (0, 1, 4, 8, 0x0C, 0x10, 0x18, 0x14, 0x28, 0x60, 0x120, 0x400, 0x8000):
            side.note(f"{state} {value:x}", side.tpm.send(PRESENCE, u16(value)))
            flags(side, f"{state} {value:x}")
    side.started()
    for value in (0x220, 0x240, 0x20, 0x80, 0x20, 0x08, 0x10, 0xA0):
        side.note(f"lifetime {value:x}", side.tpm.send(PRESENCE, u16(value)))
        flags(side, f"lifetime {value:x}")


OPT_IN = (
    ("install off", SET_OWNER_INSTALL, u8(0)),
    ("install on", SET_OWNER_INSTALL, u8(1)),
    ("install 2", SET_OWNER_INSTALL, u8(2)),
    ("deactivate", PHYSICAL_SET_DEACTIVATED, u8(1)),
    ("activate", PHYSICAL_SET_DEACTIVATED, u8(0)),
    ("disable", PHYSICAL_DISABLE, b""),
    ("deactivate while disabled", PHYSICAL_SET_DEACTIVATED, u8(1)),
    ("force clear while disabled", FORCE_CLEAR, b""),
    ("enable", PHYSICAL_ENABLE, b""),
    ("operator", SET_OPERATOR_AUTH, OPERATOR),
    ("disable force clear", DISABLE_FORCE_CLEAR, b""),
    ("force clear", FORCE_CLEAR, b""),
    ("temporarily deactivate", SET_TEMP_DEACTIVATED, b""),
)


def opt_in(side):
    """Each flag by whom it belongs to, with presence and without."""
    for state in ("absent", "present"):
        if state == "present":
            side.note("presence", side.tpm.assert_presence())
        for step, ordinal, body in OPT_IN:
            side.note(f"{state} {step}", side.tpm.send(ordinal, body))
            flags(side, f"{state} {step}")
        side.note("start", side.started())
    side.note("presence", side.tpm.assert_presence())
    session = side.tpm.oiap(WRONG)
    side.note("wrong operator", side.tpm.auth(SET_TEMP_DEACTIVATED, b"", session))
    session = side.tpm.oiap(OPERATOR)
    side.note("by the operator", side.tpm.auth(SET_TEMP_DEACTIVATED, b"", session))
    flags(side, "by the operator")


def owner_flags(side):
    """Flags that the owner sets."""
    for secret in (WRONG, OWNER_AUTH):
        who = "owner" if secret is OWNER_AUTH else "stranger"
        for value in (1, 0):
            session = owner(side.rested(), secret)
            answer = side.tpm.auth(OWNER_SET_DISABLE, u8(value), session)
            side.note(f"{who} disables {value}", answer)
        for ordinal in (DISABLE_PUBEK_READ, DISABLE_OWNER_CLEAR, OWNER_CLEAR):
            session = owner(side.rested(), secret)
            side.note(f"{who} {ordinal:x}", side.tpm.auth(ordinal, b"", session))
            flags(side, f"{who} {ordinal:x}")
        forgive(side)


def ownership(side):
    """TPM_TakeOwnership: refusals, success, a second try, a clear, and again."""
    wanted = {
        "another protocol": {"protocol": 4},
        "signing": {"wanted": key_template(0x10)},
        "migratable": {"wanted": key_template(0x11, flags=2)},
        "unknown flag": {"wanted": key_template(0x11, flags=0x80)},
        "1024 bits": {"wanted": key_template(0x11, parms=rsa_parms(1024))},
        "other schemes": {"wanted": key_template(0x11, parms=rsa_parms(enc=2))},
        "an exponent": {"wanted": key_template(0x11, parms=rsa_parms(exponent=b"\x11"))},
        "short owner": {"owner": b"o" * 19},
        "short srk": {"srk": b"s" * 19},
        "as KEY12": {"wanted": key_template(0x11, key12=True)},
        "twice": {},
    }
    for step, more in wanted.items():
        if step == "twice":
            side.note(step, side.tpm.send(READ_PUBEK, ZERO))
            continue
        side.note(step, take_ownership(side.rested(), **more))
    flags(side, "owned")
    for handle in (EK, SRK, 1):
        for secret in (WRONG, OWNER_AUTH):
            session = owner(side.rested(), secret)
            answer = side.tpm.auth(OWNER_READ_INTERNAL_PUB, u32(handle), session)
            side.note(f"internal {handle:x} {secret is WRONG}", answer)
        forgive(side)
    side.note("public EK", side.tpm.auth(OWNER_READ_PUBEK, b"", owner(side.rested())))
    side.note("clear", side.tpm.auth(OWNER_CLEAR, b"", owner(side.rested())))
    flags(side, "cleared")
    side.note("presence", side.tpm.assert_presence())
    side.note("enable", side.tpm.send(PHYSICAL_ENABLE))
    side.note("activate", side.tpm.send(PHYSICAL_SET_DEACTIVATED, u8(0)))
    side.note("start", side.started())
    side.note("again", take_ownership(side.tpm))
    flags(side, "again")


def srk_of_three_primes(side):
    """On its own, for libtpms takes it."""
    side.note(
        "take", take_ownership(side.tpm, wanted=key_template(0x11, parms=rsa_parms(primes=3)))
    )


def long_secret(side):
    """On its own too."""
    side.note("take", take_ownership(side.tpm, owner=b"o" * 21))


def endorsement(side):
    """The EK of a TPM that has none: made, revoked, made again for good."""
    tpm = side.tpm
    side.note("none", tpm.send(READ_PUBEK, ZERO))
    side.note("revoke none", tpm.send(REVOKE_TRUST, ZERO))
    side.note("1024 bits", tpm.send(CREATE_EK, ZERO + rsa_parms(1024)))
    side.note("AES", tpm.send(CREATE_EK, ZERO + rsa_parms(algorithm=6)))
    reset = sha1(b"reset")
    side.note("given", tpm.send(CREATE_REVOCABLE_EK, ZERO + rsa_parms() + u8(0) + reset))
    flags(side, "revocable")
    side.note("second", tpm.send(CREATE_EK, ZERO + rsa_parms()))
    side.note("revoke absent", tpm.send(REVOKE_TRUST, reset))
    side.note("presence", tpm.assert_presence())
    side.note("revoke wrong", tpm.send(REVOKE_TRUST, WRONG))
    side.note("revoke", tpm.send(REVOKE_TRUST, reset))
    flags(side, "revoked")
    side.note("gone", tpm.send(READ_PUBEK, ZERO))
    side.note("enable", tpm.send(PHYSICAL_ENABLE))
    side.note("activate", tpm.send(PHYSICAL_SET_DEACTIVATED, u8(0)))
    side.note("start", side.started())
    side.note("presence", tpm.assert_presence())
    side.note("random", tpm.send(CREATE_REVOCABLE_EK, ZERO + rsa_parms() + u8(1) + reset))
    side.note("revoke with the old", tpm.send(REVOKE_TRUST, reset))
    side.note("read", tpm.send(READ_PUBEK, ZERO))


_SUB_CAPS = {
    0x01: [u32(ordinal) for ordinal in (0, 0x0A, 0x15, 0x97, 0x99, 0xAA, 0x52, 0xF2, 0xFFFF)],
    0x02: [u32(algorithm) for algorithm in range(12)],
    0x03: [u16(protocol) for protocol in range(9)],
    0x04: [u32(kind) for kind in (0x107, FLAGS, VOLATILE_FLAGS, 0x10A)],
    0x05: [u32(number_) for number_ in range(0x100, 0x126)],
    0x06: [b"", b"\0"],
    0x07: [b""],
    0x08: [rsa_parms(), rsa_parms(512), rsa_parms(4096), rsa_parms(algorithm=6), b""],
    0x09: [u32(mode) for mode in range(6)],
    0x0C: [u32(SRK), u32(EK), u32(1)],
    0x0D: [b""],
    0x11: [u32(index) for index in (0, 0x10000001, 0xFFFFFFFF, 0x1101)],
    0x12: [u32(algorithm) for algorithm in range(12)],
    0x14: [u32(kind) for kind in range(12)],
    0x15: [u16(scheme) for scheme in range(7)],
    0x17: [u32(algorithm) for algorithm in range(12)],
    0x18: [b"\1\1" + u16(size) for size in range(5)] + [b"\1\2\0\3", b"\2\1\0\3"],
    0x19: [u16(entity) for entity in range(13)] + [u16(0x40)],
    0x1A: [b""],
}


def capabilities(side):
    """TPM_GetCapability: each area, each value around what is there, wrong sizes, wrong areas."""
    for area in range(0x20):
        known = _SUB_CAPS.get(area, [])
        for sub_cap in [*known, b"", b"\0", u16(1), u32(0), u32(0xFFFFFFFF), bytes(5)]:
            answer = side.tpm.send(GET_CAPABILITY, u32(area) + sized(sub_cap))
            side.note(f"{area:x} {sub_cap.hex()}", answer)
    answer = side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.rested()))
    side.note("owner", answer)
    side.note("stranger", side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.rested(), WRONG)))


def set_capabilities(side):
    """TPM_SetCapability: each area and each flag, by nobody, with presence, by the owner."""
    tries = [(area, u32(1), b"\1") for area in range(1, 11)]
    tries += [(1, u32(flag), b"\1") for flag in range(21)] + [
        (1, u32(flag), b"\0") for flag in (3,)
    ]
    tries += [(2, u32(flag), b"\0") for flag in range(7)]
    tries += [(3, u32(item), b"\0") for item in range(24)]
    tries += [(4, u32(item), u32(0)) for item in range(9)]
    tries += [(5, u32(flag), b"\0") for flag in range(5)] + [
        (6, u32(item), u32(0)) for item in (1, 2)
    ]
    tries += [(1, u32(3), b"\2"), (1, u32(3), b""), (1, b"", b"\1"), (1, u16(3), b"\1")]
    for who in ("nobody", "present", "owner"):
        if who == "present":
            side.note("presence", side.tpm.assert_presence())
        for i, (area, sub_cap, value) in enumerate(tries):
            params = u32(area) + sized(sub_cap) + sized(value)
            step = f"{who} {i}: {area} {sub_cap.hex()} {value.hex()}"
            if who == "owner":
                answer = side.tpm.auth(SET_CAPABILITY, params, owner(side.rested()))
            else:
                answer = side.rested().send(SET_CAPABILITY, params)
            side.note(step, answer)
        flags(side, who)


def startup(side):
    """TPM_Startup of each type, from each state; what survives."""
    side.note("extend 10", side.tpm.send(EXTEND, u32(10) + ZERO))
    side.note("extend 16", side.tpm.send(EXTEND, u32(16) + ZERO))
    for kind in (0, 1, 2, 3, 4):
        side.note(f"started already {kind}", side.tpm.send(STARTUP, u16(kind)))
    for kind in (0, 1, 3):
        side.power_on()
        side.note(f"before {kind}", side.tpm.send(PCR_READ, u32(10)))
        side.note(f"start {kind}", side.tpm.send(STARTUP, u16(kind)))
        flags(side, f"start {kind}")
        side.note(f"pcr 10 {kind}", side.tpm.send(PCR_READ, u32(10)))
    side.started()
    side.note("extend 10", side.tpm.send(EXTEND, u32(10) + ZERO))
    side.note("extend 16", side.tpm.send(EXTEND, u32(16) + ZERO))
    session = side.note("session", side.tpm.oiap(OWNER_AUTH))
    handle, _ = loaded(side.tpm, signing())
    side.note("save", side.tpm.send(SAVE_STATE))
    side.power_on()
    side.note("resume", side.tpm.send(STARTUP, u16(2)))
    for index in (10, 16, 17):
        side.note(f"pcr {index} resumed", side.tpm.send(PCR_READ, u32(index)))
    side.note("session lives", side.tpm.auth(GET_CAPABILITY_OWNER, b"", session))
    side.note(
        "key lives", side.tpm.auth(0x3C, sized(ZERO), side.tpm.oiap(KEY_AUTH), handles=u32(handle))
    )
    flags(side, "resumed")
    side.note("save", side.tpm.send(SAVE_STATE))
    side.note("in between", side.tpm.send(PCR_READ, u32(10)))
    side.power_on()
    side.note("resume nothing", side.tpm.send(STARTUP, u16(2)))
    for ordinal, body in ((PCR_READ, u32(10)), (GET_TEST_RESULT, b""), (SELF_TEST_FULL, b"")):
        side.note(f"failed {ordinal:x}", side.tpm.send(ordinal, body))
    for area, sub_cap in ((6, b""), (0x1A, b""), (5, u32(0x103)), (5, u32(0x101)), (4, u32(FLAGS))):
        answer = side.tpm.send(GET_CAPABILITY, u32(area) + sized(sub_cap))
        side.note(f"failed capability {area} {sub_cap.hex()}", answer)
    side.note("start while failed", side.tpm.send(STARTUP, u16(1)))
    side.note("power", side.started())


def self_test(side):
    """Self-tests, before anything else and after."""
    for ordinal in (GET_TEST_RESULT, CONTINUE_SELF_TEST, GET_TEST_RESULT, SELF_TEST_FULL):
        side.note(f"{ordinal:x}", side.tpm.send(ordinal))


def pcrs(side):
    """Each PCR from each locality: extended, read, reset, before and after a dynamic launch."""
    for launched in (False, True):
        if launched:
            side.hash_sequence(b"launch")
            flags(side, "launched")
        for locality in range(5):
            for index in range(25):
                step = f"{launched} {locality} {index}"
                answer = side.tpm.send(EXTEND, u32(index) + sha1(b"x"), locality=locality)
                side.note(f"extend {step}", answer)
                side.note(f"read {step}", side.tpm.send(PCR_READ, u32(index), locality=locality))
                if index < 24:
                    answer = side.tpm.send(PCR_RESET, selection(index), locality=locality)
                    side.note(f"reset {step}", answer)
                    side.note(f"read again {step}", side.tpm.send(PCR_READ, u32(index)))
            side.note(
                f"establishment {locality}", side.tpm.send(RESET_ESTABLISHMENT, locality=locality)
            )
    for size in range(5):
        for chosen in ((), (16,), (16, 23), (16, 10)):
            if any(index >= 8 * size for index in chosen):
                continue
            answer = side.tpm.send(PCR_RESET, selection(*chosen, size=size))
            side.note(f"reset {chosen} of {size}", answer)
    flags(side, "end")


def directory(side):
    """The DIR, and keys that the owner keeps."""
    for index in (0, 1):
        for secret in (OWNER_AUTH, WRONG):
            answer = side.tpm.auth(
                DIR_WRITE, u32(index) + sha1(b"dir"), owner(side.rested(), secret)
            )
            side.note(f"write {index} {secret is WRONG}", answer)
        side.note(f"read {index}", side.rested().send(DIR_READ, u32(index)))
    forgive(side)
    handle, key = loaded(side.rested(), signing())
    _, other = loaded(side.rested(), signing())
    for step, pubkey, bit, value in (
        ("of another", other.pubkey, 1, 1), ("bit 2", key.pubkey, 2, 1), ("keep", key.pubkey, 1, 1),
        ("keep again", key.pubkey, 1, 1),
    ):  # fmt: skip
        params = pubkey + u32(bit) + u8(value)
        answer = side.tpm.auth(KEY_CONTROL_OWNER, params, owner(side.rested()), handles=u32(handle))
        side.note(step, answer)
    side.note("status", side.tpm.send(GET_CAPABILITY, u32(0x0C) + sized(u32(handle))))
    side.note("flush", side.tpm.send(0xBA, u32(handle) + u32(1)))
    side.note("evict", side.tpm.send(0x22, u32(handle)))
    side.note("save", side.tpm.send(0xB8, u32(handle) + u32(1) + bytes(16)))
    side.note("start", side.started())
    side.note("public", side.tpm.auth(0x21, b"", side.tpm.oiap(KEY_AUTH), handles=u32(handle)))
    params = key.pubkey + u32(1) + u8(0)
    answer = side.tpm.auth(KEY_CONTROL_OWNER, params, owner(side.rested()), handles=u32(handle))
    side.note("let go", answer)
    side.note("evict then", side.tpm.send(0x22, u32(handle)))


def lockout(side):
    """Wrong secrets until the defence sets in."""
    for i in range(7):
        answer = side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.tpm, WRONG))
        side.note(f"wrong {i}", answer)
    side.note("right", side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.tpm)))
    side.note("without a session", side.tpm.send(PCR_READ, u32(1)))
    side.note("reset wrong", side.tpm.auth(RESET_LOCK_VALUE, b"", owner(side.tpm, WRONG)))
    side.note("reset after it", side.tpm.auth(RESET_LOCK_VALUE, b"", owner(side.tpm)))
    side.note("start", side.started())
    side.note("right again", side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.tpm)))


def reset_lock_once_failed(side):
    """A try to reset the lock that fails while nothing is locked closes nothing for long."""
    for secret in (WRONG, OWNER_AUTH, OWNER_AUTH):
        answer = side.tpm.auth(RESET_LOCK_VALUE, b"", owner(side.tpm, secret))
        side.note(f"reset {secret is WRONG}", answer)
        side.note("owner", side.tpm.auth(GET_CAPABILITY_OWNER, b"", owner(side.tpm)))


def cleared(side, ordinal):
    """What a clear leaves for the next owner: nothing that lasts until a start-up but the PCRs."""
    tpm = side.tpm
    side.note("presence", tpm.assert_presence())
    counter = _counter(side, "old")
    side.note("increment", tpm.auth(INCREMENT_COUNTER, counter, tpm.oiap(sha1(b"old")).ending()))
    deferred = u32(4) + sized(u32(6)) + sized(u32(1))
    side.note("defer presence", tpm.send(SET_CAPABILITY, deferred))
    side.note("extend", tpm.send(EXTEND, u32(10) + sha1(b"kept")))
    side.note("wrong", tpm.auth(OWNER_SET_DISABLE, u8(0), owner(tpm, WRONG)))
    side.note("reset wrong", tpm.auth(RESET_LOCK_VALUE, b"", owner(tpm, WRONG)))
    if ordinal == FORCE_CLEAR:
        side.note("clear", tpm.send(FORCE_CLEAR))
    else:
        side.note("clear", tpm.auth(OWNER_CLEAR, b"", owner(tpm)))
    side.note("enable", tpm.send(PHYSICAL_ENABLE))
    side.note("audit", tpm.send(GET_AUDIT_DIGEST, u32(0x8D)))
    for area, sub_cap in ((5, u32(0x122)), (0x19, u16(2))):
        answer = tpm.send(GET_CAPABILITY, u32(area) + sized(sub_cap))
        side.note(f"capability {area}", answer)
    side.note("pcr", tpm.send(PCR_READ, u32(10)))
    side.note("presence off", tpm.send(PRESENCE, u16(0x10)))
    side.note("defer without it", tpm.send(SET_CAPABILITY, deferred))
    side.note("presence on", tpm.send(PRESENCE, u16(0x08)))
    side.note("own", take_ownership(tpm))
    side.note("reset", tpm.auth(RESET_LOCK_VALUE, b"", owner(tpm)))
    counter = _counter(side, "new")
    side.note("increment", tpm.auth(INCREMENT_COUNTER, counter, tpm.oiap(sha1(b"new")).ending()))


def _counter(side, label):
    session = side.tpm.osap(2, OWNER, OWNER_AUTH)
    params = session.masked(sha1(label.encode())) + label.encode().ljust(4)
    return side.note("counter", side.tpm.auth(CREATE_COUNTER, params, session)).body[:4]


def pcr_17_at_its_reset_value(side):
    """Zero after a reset, it is locality 4's alone; later localities 2 and 3 may extend it, too."""
    side.hash_sequence(b"launch")
    for locality in (2, 3, 4):
        for ordinal in (EXTEND, SHA1_COMPLETE_EXTEND):
            side.note("reset", side.tpm.send(PCR_RESET, selection(17), locality=4))
            body = u32(17) + (sha1(b"x") if ordinal == EXTEND else sized(b""))
            for turn in (1, 2):
                if ordinal != EXTEND:
                    side.note("begin", side.tpm.send(SHA1_START))
                answer = side.tpm.send(ordinal, body, locality=locality)
                side.note(f"{ordinal:x} from {locality}, {turn}", answer)
            side.note("then from 3", side.tpm.send(EXTEND, u32(17) + ZERO, locality=3))


def keys_that_the_owner_keeps(side):
    """TPM_KeyControlOwner takes loaded keys of some usages, and no reserved handle."""
    handle, key = loaded(side.tpm, signing())
    migrate, migrate_key = loaded(side.tpm, template(MIGRATE, 3, 1, bits=2048))
    for step, where, public in (
        ("signing", handle, key.pubkey), ("migrate", migrate, migrate_key.pubkey),
        ("another's", migrate, key.pubkey), ("EK", EK, key.pubkey), ("SRK", SRK, key.pubkey),
        ("owner", OWNER, key.pubkey), ("nobody", 0x1234, key.pubkey),
    ):  # fmt: skip
        for bit in (1, 2):
            params = public + u32(bit) + u8(1)
            answer = side.tpm.auth(KEY_CONTROL_OWNER, params, owner(side.tpm), handles=u32(where))
            side.note(f"{step} {bit}", answer)


def set_capabilities_while_off(side):
    """TOSPresent while the TPM is disabled, deactivated, both."""
    side.note("presence", side.tpm.assert_presence())
    for steps in ((PHYSICAL_DISABLE,), (SET_TEMP_DEACTIVATED,), (PHYSICAL_DISABLE,) * 2):
        for ordinal in steps:
            side.note(f"{ordinal:x}", side.tpm.send(ordinal))
        for locality in (0, 3, 4):
            params = u32(5) + sized(u32(4)) + sized(u8(0))
            answer = side.tpm.send(SET_CAPABILITY, params, locality=locality)
            side.note(f"TOSPresent from {locality}", answer)
        side.note("enable", side.tpm.send(PHYSICAL_ENABLE))


SCENARIOS = {
    "presence": ("factory", presence),
    "opt-in": ("with_ek", opt_in),
    "owner flags": ("owned", owner_flags),
    "ownership": ("with_ek", ownership),
    "SRK of three primes": ("with_ek", srk_of_three_primes),
    "owner secret of 21 bytes": ("with_ek", long_secret),
    "endorsement": ("factory", endorsement),
    "capabilities": ("owned", capabilities),
    "set capabilities": ("owned", set_capabilities),
    "start-up": ("owned", startup),
    "self-test": ("factory", self_test),
    "PCRs": ("owned", pcrs),
    "directory": ("owned", directory),
    "lockout": ("owned", lockout),
    "reset lock, once failed": ("owned", reset_lock_once_failed),
    "cleared by the owner": ("owned", cleared, OWNER_CLEAR),
    "cleared by force": ("owned", cleared, FORCE_CLEAR),
    "PCR 17 at its reset value": ("owned", pcr_17_at_its_reset_value),
    "keys that the owner keeps": ("owned", keys_that_the_owner_keeps),
    "capabilities while off": ("owned", set_capabilities_while_off),
}
