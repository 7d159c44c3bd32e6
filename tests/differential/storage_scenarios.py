"""Keys of every kind, and sealing: made, loaded, altered, used, certified."""

from tests.tpm12.makers import (
    AUTHCHANGE,
    BIND,
    ET_SRK,
    IDENTITY,
    KEY_AUTH,
    LEGACY,
    MIGRATABLE,
    PCR_IGNORED,
    WRONG,
    load,
    pcr_info,
    pcr_info_long,
    seal,
    signing,
    storage,
    template,
    unseal,
    wrap,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    number,
    selection,
    sized,
    u32,
)

RESET_LOCK_VALUE, SIGN, CERTIFY_KEY, CERTIFY_KEY2 = 0x40, 0x3C, 0x32, 0x33


WANTED = {
    "signing": signing(),
    "DER": signing(3),
    "INFO": signing(4),
    "KEY12": signing(key12=True),
    "storage": storage(),
    "migratable storage": storage(flags=MIGRATABLE),
    "bind": template(BIND, 3, 1),
    "legacy": template(LEGACY, 2, 2),
    "never": signing(auth_data_usage=0),
    "readable": signing(auth_data_usage=3),
    "exponent": signing(exponent=b"\x11"),
    "528": signing(bits=528),
    "bound": signing(pcr_info=pcr_info(10)),
    "bound elsewhere": signing(pcr_info=pcr_info(10, values=[WRONG])),
    "bound to 17": signing(
        key12=True, pcr_info=pcr_info_long([10], [17], values=[b"\xff" * 20])
    ),
    "bound to locality 0": signing(
        key12=True, pcr_info=pcr_info_long([10], [10], localities=1)
    ),
    "ignoring": signing(
        auth_data_usage=0, flags=PCR_IGNORED, pcr_info=pcr_info(10, values=[WRONG])
    ),
    "reserved authDataUsage": signing(auth_data_usage=2),
    "storage with an exponent": storage(exponent=b"\1\0\1"),
    "identity": template(IDENTITY, 1, 2, bits=2048),
    "authchange": template(AUTHCHANGE, 3, 1),
    "storage of 1024 bits": storage()[:23] + u32(1024) + storage()[27:],
    "496 bits": signing(bits=496),
    "three primes": signing(primes=3),
    "unknown flag": signing(flags=0x20),
    "certified": signing(flags=0x10),
    "exponent 9": signing(exponent=b"\x09"),
    "wrong version": b"\x01\x02\x00\x00" + signing()[4:],
    "selection of 4 bytes": signing(pcr_info=selection(1, size=4) + ZERO + ZERO),
    "no locality": signing(key12=True, pcr_info=pcr_info_long([1], [1], localities=0)),
}  # fmt: skip


def keys(log):
    """Make, load, use and certify keys of many kinds."""
    handles = {}
    for name, wanted in WANTED.items():
        blob = log.note(f"make {name}", wrap(log.rested(), wanted))
        if blob.code or name in {"reserved authDataUsage", "storage with an exponent"}:
            continue
        answer = log.note(f"load {name}", load(log.rested(), blob.body))
        handles[name] = number(answer.body)
        if name == "signing":
            _altered_keys(log, blob.body)
    for name, handle in handles.items():
        tpm = log.rested()
        log.note(f"public {name}", tpm.send(0x21, u32(handle)))
        session = tpm.oiap(KEY_AUTH)
        log.note(f"authorized {name}", tpm.auth(0x21, b"", session, handles=u32(handle)))
        for size in (0, 20, 21, 53, 54):
            session = log.rested().oiap(KEY_AUTH)
            answer = tpm.auth(SIGN, sized(b"d" * size), session, handles=u32(handle))
            log.note(f"sign {name} {size}", answer)
    _certified_keys(log, handles)


def _altered_keys(log, blob):
    for at, bits in ((0, 1), (3, 1), (5, 1), (8, 1), (9, 2), (10, 1), (34, 1), (60, 1), (-3, 1)):
        altered = bytearray(blob)
        altered[at] ^= bits
        log.note(f"load altered at {at}", load(log.rested(), bytes(altered)))


def _certified_keys(log, handles):
    signers = ("signing", "DER", "INFO", "legacy", "storage", "never")
    pairs = [(signer, "storage") for signer in signers]
    pairs += [("signing", name) for name in handles if name != "storage"]
    for signer, name in pairs:
        for ordinal, step in ((CERTIFY_KEY, "32"), (CERTIFY_KEY2, "33")):
            order = [handles[signer], handles[name]]
            if ordinal == CERTIFY_KEY2:
                order.reverse()
            operands = u32(order[0]) + u32(order[1])
            params = ZERO * (1 if ordinal == CERTIFY_KEY else 2)
            tpm = log.rested()
            sessions = [tpm.oiap(KEY_AUTH), tpm.oiap(KEY_AUTH)]
            answer = tpm.auth(ordinal, params, *sessions, handles=operands)
            label = name if signer == "signing" else f"{name} by {signer}"
            log.note(f"certify {step} {label}", answer)
            alone = log.rested().oiap(KEY_AUTH)
            answer = tpm.auth(ordinal, params, alone, handles=operands)
            log.note(f"certify {step} {label} alone", answer)


def sealing(log):
    """Seal and unseal, with every kind of binding."""
    for size in (0, 1, 149, 150, 200):
        log.note(f"seal {size}", seal(log.rested(), b"d" * size))
    for name, info in {
        "none": b"",
        "1.1": pcr_info(10),
        "1.1 elsewhere": pcr_info(10, values=[WRONG]),
        "1.1 of nothing": selection() + WRONG + ZERO,
        "1.2": pcr_info_long([9], [10]),
        "1.2 in locality 1": pcr_info_long([9], [10], localities=2),
        "1.2 nowhere": pcr_info_long([9], [10], localities=0),
        "malformed": b"\0",
        "4 bytes": selection(1, size=4) + ZERO + ZERO,
    }.items():
        answer = log.note(f"seal {name}", seal(log.rested(), b"secret", info))
        if answer.code:
            continue
        log.note(f"unseal {name}", unseal(log.rested(), answer.body))
        log.note(f"unseal {name} wrong", unseal(log.rested(), answer.body, secret=WRONG))
        log.note(f"unseal {name} wrong key", unseal(log.rested(), answer.body, key_auth=WRONG))
        session = log.tpm.oiap(OWNER_AUTH).ending()
        log.tpm.auth(RESET_LOCK_VALUE, b"", session).ok()
    blob = seal(log.rested(), b"secret").ok()
    for at in (1, 3, 7, 11, 60, len(blob) - 1):
        altered = blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :]
        log.note(f"unseal altered at {at}", unseal(log.rested(), altered))
    for adip in (0, 6):
        session = log.rested().osap(adip << 8 | ET_SRK, SRK, SRK_AUTH)
        params = ZERO + sized(b"") + sized(b"d" * 20)
        answer = log.tpm.auth(0x3D, params, session, handles=u32(SRK))
        log.note(f"sealx {adip}", answer)


SCENARIOS = {"keys": ("owned", keys), "sealing": ("owned", sealing)}
