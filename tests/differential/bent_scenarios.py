"""Structures that are bent: lengths, versions, flags, and bytes behind what they hold."""

from tests.differential.attestation_scenarios import NEW, destination
from tests.differential.owner_scenarios import GET_CAPABILITY, SAVE_STATE, STARTUP, forgive, owner
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12 import movers
from tests.tpm12.makers import (
    DATA_AUTH,
    ET_SRK,
    KEY_AUTH,
    MIGRATABLE,
    load,
    loaded,
    mgf1,
    pcr_info,
    pcr_info_long,
    seal,
    signing,
    template,
    unseal,
    wrap,
)
from tests.tpm12.transport_maker import LOG, Transport
from tests.tpm12.witness import (
    SRK,
    SRK_AUTH,
    ZERO,
    frame,
    parse_key,
    rsa_parms,
    sha1,
    sized,
    u8,
    u16,
    u32,
    xor,
)

SEALX, UNBIND, CHANGE_AUTH, KEY_CONTROL_OWNER, FLUSH = 0x3D, 0x1E, 0x0C, 0x23, 0xBA
SAVE_CONTEXT, LOAD_CONTEXT, SET_CAPABILITY = 0xB8, 0xB9, 0x3F
GET_CAPABILITY_SIGNED, RELEASE_TRANSPORT, OWNER_READ_INTERNAL_PUB = 0x64, 0xE8, 0x81
RELEASE_SELECTION = 5
"""Where in a PCR_INFO_LONG the length of its first selection stands, the second byte of two."""


def bent(structure, at, value):
    """With another byte at a place."""
    return structure[:at] + u8(value) + structure[at + 1 :]


VERSION, AUTH_USAGE, KEY_LENGTH = 0, 10, 25
PARMS_SIZE, EXPONENT_SIZE, PCR_SIZE, MODULUS_SIZE = 19, 31, 35, 39
"""Where these bytes of a TPM_KEY stand (its lengths: the second byte of four, or the first)."""


def keys(side):
    """Descriptions and blobs of keys with a length, a version or a usage that none has."""
    wanted = signing()
    # What follows is read as the rest of it: the session handle in the place of its last length.
    # (Of that length's last byte alone, swtpm's handle would make 0 once in 256 times.)
    for cut in (2, 10, 12, 24, len(wanted) - 4):
        side.note(f"description cut to {cut}", wrap(side.rested(), wanted[:cut]))
    for at, value in ((VERSION, 0), (AUTH_USAGE, 2)):
        side.note(f"description {at} {value}", wrap(side.rested(), bent(wanted, at, value)))
    for at in (PARMS_SIZE, EXPONENT_SIZE, PCR_SIZE, MODULUS_SIZE):
        side.note(f"length in a description {at}", wrap(side.rested(), bent(wanted, at, 1)))
    blob = side.note("wrap", wrap(side.rested(), wanted)).ok()
    for at in (PARMS_SIZE, EXPONENT_SIZE, PCR_SIZE, MODULUS_SIZE):
        side.note(f"length in a blob {at}", load(side.rested(), bent(blob, at, 1)))
    for at, value in ((VERSION, 0), (AUTH_USAGE, 2), (KEY_LENGTH, 1)):
        side.note(f"blob {at} {value}", load(side.rested(), bent(blob, at, value)))
    for tag in (0, 0x28, 0x29, 0xFFFF):
        other = u16(tag) + movers.storage_cmk()[2:]
        answer = movers.create_cmk(side.rested(), other, u32(0), approval=ZERO)
        side.note(f"key that migrates with the tag {tag:x}", answer)
    # Last: a handle on one side only.
    side.note("revision of a blob", load(side.rested(), bent(blob, 2, 1)))


def values(side):
    """Flags that are neither 0 nor 1, and parameters of keys that are none."""
    tpm = side.tpm
    parms = rsa_parms()
    for name, asked in {
        "no algorithm": u32(0) + parms[4:],
        "a byte behind": parms + b"\0",
        "exponent that is longer than it is": bent(parms, 23, 1),
        "parameters that are longer than they are": bent(parms, 9, 1),
        "three primes": bent(parms, 19, 3),
        "length": bent(parms, 12, 1),
    }.items():
        side.note(f"loaded {name}", tpm.send(GET_CAPABILITY, u32(8) + sized(asked)))
    for flag in (2, 20):
        params = u32(1) + sized(u32(flag)) + sized(b"\2")
        side.note(f"flag {flag} 2", tpm.auth(SET_CAPABILITY, params, owner(side.rested())))


def blobs(side):
    """Sealed data, contexts and delegations."""
    tpm = side.tpm
    info, long_info = pcr_info(1), pcr_info_long((1,), (2,))
    for name, each in {
        "behind": info + b"\0",
        "behind a long one": long_info + b"\0",
        "that a selection leaves": bent(long_info, RELEASE_SELECTION, 2),
    }.items():
        side.note(f"bytes {name}, sealed", seal(side.rested(), b"data", each))
        session = side.rested().osap(ET_SRK, SRK, SRK_AUTH)
        params = session.masked(DATA_AUTH) + sized(each) + sized(b"data")
        side.note(f"bytes {name}, sealed x", tpm.auth(SEALX, params, session, handles=u32(SRK)))
        wanted = signing(pcr_info=each, key12=name != "behind")
        side.note(f"bytes {name}, in a key", wrap(side.rested(), wanted))
    blob = side.note("seal", seal(side.rested(), b"data")).ok()
    for at, value in ((2, 1), (3, 1), (4, 1), (8, 1)):
        side.note(f"sealed {at} {value}", unseal(side.rested(), bent(blob, at, value)))
    family = side.note("family", delegate.new_family(side.rested()))
    by_owner = delegate.create_owner(side.rested(), delegate.public(family, 1))
    by_owner = delegate.blob_of(side.note("delegate", by_owner))
    params = u16(delegate.ET_OWNER_BLOB) + u32(SRK) + ZERO + sized(by_owner + b"\0")
    side.note("bytes behind a delegation", side.rested().send(delegate.DSAP, params))
    key, _ = side.note("key", loaded(side.rested(), signing()))
    context = tpm.send(SAVE_CONTEXT, u32(key) + u32(1) + bytes(16)).ok()[4:]
    side.note("save", tpm.send(FLUSH, u32(key) + u32(1)))
    answer = tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + sized(bent(context, 3, 1)))
    side.note("context of another kind", answer)
    answer = tpm.send(LOAD_CONTEXT, u32(0) + u8(1) + u32(len(context) + 1) + context)
    side.note("context of a longer size", answer)


def too_long(side):
    """What is decrypted, with one byte too many; and padding that is none."""
    tpm = side.tpm
    blob = side.note("key", wrap(tpm, signing(flags=MIGRATABLE))).ok()
    enc_data = parse_key(blob).enc_data + b"\0"
    for name, wanted in {"OAEP": template(0x14, 3, 1), "1.5": template(0x15, 2, 2)}.items():
        key, parts = side.note(name, loaded(side.rested(), wanted))
        for step, data in {
            "too long": bytes(len(parts.modulus) + 1),
            "no padding": bytes(len(parts.modulus)),
        }.items():
            session = side.rested().oiap(KEY_AUTH).ending()
            answer = tpm.auth(UNBIND, sized(data), session, handles=u32(key))
            side.note(f"unbind {name}, {step}", answer)
    session = side.rested().osap(ET_SRK, SRK, SRK_AUTH)
    params = u16(4) + session.masked(NEW) + u16(5) + sized(enc_data)
    answer = tpm.auth(CHANGE_AUTH, params, session, tpm.oiap(KEY_AUTH), handles=u32(SRK))
    side.note("change, too long", answer)
    ticket = movers.authorize(side.rested(), destination().pubkey).ok()
    side.note("ticket")
    answer = movers.create_blob(side.rested(), ticket, enc_data, secret=ZERO)
    side.note("migrate, too long", answer)
    side.note("convert, too long", movers.convert(side.rested(), enc_data, bytes(100)))


PUBKEY_ALGORITHM, PUBKEY_BITS, PUBKEY_EXPONENT_SIZE = 3, 14, 23
"""Where these bytes of a TPM_PUBKEY stand: the last of four, but the third of the bits."""


def public_keys(side):
    """TPM_PUBKEYs whose parameters are none, and a migration block that holds no key."""
    tpm = side.tpm
    pubkey = destination().pubkey
    bends = {
        "algorithm": bent(pubkey, PUBKEY_ALGORITHM, 6),
        "bits": bent(pubkey, PUBKEY_BITS, 0x10),
        "exponent": bent(pubkey, PUBKEY_EXPONENT_SIZE, 1),
    }
    ticket = movers.authorize(side.rested(), pubkey).ok()
    side.note("ticket")
    blob = side.note("key", wrap(side.rested(), signing(flags=MIGRATABLE))).ok()
    enc_data = parse_key(blob).enc_data
    key, _ = side.note("load", load_of(side, blob))
    for name, each in bends.items():
        side.note(f"authorize {name}", movers.authorize(side.rested(), each))
        altered = each + ticket[len(pubkey) :]
        answer = movers.create_blob(side.rested(), altered, enc_data, secret=ZERO)
        side.note(f"send {name}", answer)
        forgive(side)
        params = each + u32(1) + u8(1)
        answer = tpm.auth(KEY_CONTROL_OWNER, params, owner(side.rested()), handles=u32(key))
        side.note(f"keep {name}", answer)
    signed = sha1(b"ticket")
    verifier = bent(destination().as_verifier(), PUBKEY_EXPONENT_SIZE, 1)
    answer = movers.create_ticket(side.rested(), verifier, signed, bytes(256))
    side.note("verify exponent", answer)
    srk = movers.srk_pubkey(side.rested())
    side.note("the SRK")
    for name, seed, tail in (
        ("good", sized(bytes([0xC3] * 32))[:20], sized(bytes([0xC3] * 16))),
        ("of a byte less", sized(bytes([0xC3] * 31))[:19] + b"\xc3", sized(bytes([0xC3] * 16))),
        ("cut", sized(bytes([0xC3] * 32))[:20], u32(17) + bytes([0xC3] * 16)),
    ):
        block = ZERO + b"\1" + u8(3) + KEY_AUTH + ZERO + tail
        hidden = xor(block, mgf1(seed, len(block)))
        hidden = xor(seed, mgf1(hidden, 20)) + hidden
        data = movers.sent_to(srk, hidden, bytes(len(hidden)))
        answer = movers.convert(side.rested(), data, bytes(len(hidden)))
        side.note(f"arrived, {name}", answer)
    # Last: libtpms takes these.
    params = parse_key(blob).pubkey + u32(1) + u8(2)
    answer = tpm.auth(KEY_CONTROL_OWNER, params, owner(side.rested()), handles=u32(key))
    side.note("keep with 2", answer)
    params = u32(3) + sized(u32(2)) + sized(b"\2")
    side.note("flag of a start 2", side.rested().send(SET_CAPABILITY, params))


def load_of(side, blob):
    """A key of a blob: its handle, and its parts."""
    body = load(side.rested(), blob).ok()
    return int.from_bytes(body[:4], "big"), parse_key(blob)


def commands(side):
    """What may not be wrapped, and TPM_Startup that cannot be read, with what was saved before."""
    tpm = side.tpm
    for name, request, attributes in (
        ("deleted command", frame(GET_CAPABILITY_SIGNED), 0),
        ("end of the session", frame(RELEASE_TRANSPORT), 0),
        ("end of the session, whole", frame(RELEASE_TRANSPORT, u32(SRK) + ZERO), 0),
        ("cut handle in the log", frame(OWNER_READ_INTERNAL_PUB, b"\0\0\0"), LOG),
    ):
        through = side.note("open", Transport(side.rested(), attributes).open())
        side.note(f"wrapped, {name}", through.execute(request))
    side.note("save", tpm.send(SAVE_STATE))
    side.note("start without a type", tpm.send(STARTUP))
    side.power_on()
    side.note("not even started", tpm.send(STARTUP))
    side.note("has not started", tpm.send(GET_CAPABILITY, u32(5) + sized(u32(0x101))))
    side.note("resume after that", tpm.send(STARTUP, u16(2)))


SCENARIOS = {
    "bent keys": ("owned", keys),
    "bent values": ("owned", values),
    "bent blobs": ("owned", blobs),
    "too long": ("owned", too_long),
    "bent public keys": ("owned", public_keys),
    "bent commands": ("owned", commands),
}
