"""New secrets sent to a key made for it, and certified keys that leave and come back."""

from dataclasses import replace

from tests.differential.attestation_scenarios import destination
from tests.differential.owner_scenarios import EXTEND, forgive, owner
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12 import movers
from tests.tpm12.identities import AIK_AUTH, loaded_identity
from tests.tpm12.makers import (
    ET_KEY,
    KEY_AUTH,
    WRONG,
    load,
    loaded,
    pcr_info,
    seal,
    sealed_parts,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    ZERO,
    Session,
    hmac1,
    number,
    oaep,
    parse_key,
    parse_sized,
    rsa_parms,
    sha1,
    sized,
    u16,
    u32,
)

ASYM_START, ASYM_FINISH, CERTIFY_KEY2, GET_PUB_KEY = 0x0E, 0x0F, 0x33, 0x21
TEMP = rsa_parms(1024)
NEW = sha1(b"new secret")
ET_DATA, ET_KEY_BLOB = 3, 5


def asymmetric_change(side):
    """TPM_ChangeAuthAsymStart and TPM_ChangeAuthAsymFinish."""
    tpm = side.tpm
    identity, _ = side.note("identity", loaded_identity(tpm))
    signer, _ = side.note("signing key", loaded(side.rested(), signing()))
    for name, handle, secret, parms in (
        ("by a signing key", signer, KEY_AUTH, TEMP),
        ("wrong", identity, WRONG, TEMP),
        ("AES", identity, AIK_AUTH, rsa_parms(algorithm=6)),
        ("good", identity, AIK_AUTH, TEMP),
    ):
        answer = started(side.rested(), handle, secret, parms)
        side.note(f"start {name}", answer)
        forgive(side)
    ephemeral, modulus = ephemeral_key(answer.ok())
    key = side.note("key", wrap(side.rested(), signing())).ok()
    _, data = sealed_parts(side.note("data", seal(side.rested(), b"data", secret=KEY_AUTH)).ok())
    parent, _ = side.note("parent", loaded(side.rested(), storage(pcr_info=pcr_info(10))))
    below = wrap(side.rested(), signing(), parent=parent, parent_auth=KEY_AUTH).ok()
    side.note("extend", tpm.send(EXTEND, u32(10) + ZERO))
    blob = parse_key(key).enc_data
    good = {"ephemeral": ephemeral, "enc_data": blob, "sent": oaep(modulus, NEW + ZERO)}
    for name, changed in {
        "wrong parent": {"secret": WRONG},
        "other entity": {"entity": 1},
        "under a signing key": {"parent": signer, "secret": KEY_AUTH},
        "under a parent of other PCRs": {
            "parent": parent, "secret": KEY_AUTH, "enc_data": parse_key(below).enc_data
        },
        "garbage": {"enc_data": bytes(256)},
        "sent garbage": {"sent": bytes(128)},
        "another key for the secret": {"ephemeral": identity},
        "no key for the secret": {"ephemeral": 7},
        "old secret not known": {"old": WRONG},
        "data as key": {"enc_data": data},
        "key": {},
        "once more": {},
    }.items():  # fmt: skip
        answer = _finished(side.rested(), **{**good, **changed})
        side.note(f"finish {name}", answer)
        forgive(side)
        if not answer.code:
            out, _ = parse_sized(answer.body)
            side.note(f"load {name}", load(side.rested(), movers.rewrapped(key, out)))


def started(tpm, identity, secret, parms):
    return tpm.auth(ASYM_START, ZERO + parms, tpm.oiap(secret).ending(), handles=u32(identity))


def ephemeral_key(body):
    """Handle and modulus of the key in an answer of TPM_ChangeAuthAsymStart."""
    rest = body[11 + len(TEMP) + 45 :]
    _, rest = parse_sized(rest)
    return number(rest[:4]), parse_key(rest[4:]).modulus


def _finished(  # noqa: PLR0917 - the operands
    tpm, ephemeral, enc_data, sent, entity=ET_KEY_BLOB, parent=SRK, secret=OWNER_AUTH, old=KEY_AUTH
):
    params = u16(entity) + hmac1(old, NEW) + sized(sent) + sized(enc_data)
    handles = u32(parent) + u32(ephemeral)
    return tpm.auth(ASYM_FINISH, params, tpm.oiap(secret).ending(), handles=handles)


def certified_keys(side):
    """TPM_CMK_CreateBlob and TPM_CMK_ConvertMigration: away, and back again."""
    tpm, authority = side.tpm, destination()
    wanted = template(0x10, 1, 2, bits=1024, key12=True, flags=movers.CMK)
    authorities = movers.msa_list(sha1(b"another"), sha1(authority.as_verifier()))
    key = side.note("key", movers.create_cmk(tpm, wanted, authorities)).ok()
    srk = side.note("SRK", movers.srk_pubkey(side.rested()))
    source, home = sha1(parse_key(key).pubkey), sha1(srk)
    tickets = {
        name: _ticket(side, authority, *ends)
        for name, ends in {
            "good": (home, source), "elsewhere": (ZERO, source), "another": (home, ZERO),
        }.items()
    }  # fmt: skip
    migration_auth = movers.authorize(side.rested(), srk, movers.MS_RESTRICT_APPROVE).ok()
    restrict, sig = tickets["good"]
    leaving = movers.CmkBlob(
        migration_auth, source, authorities, parse_key(key).enc_data,
        scheme=movers.MS_RESTRICT_APPROVE, restrict_ticket=restrict, sig_ticket=sig,
    )  # fmt: skip
    for name, changed in {
        "to elsewhere": dict(zip(_TICKETS, tickets["elsewhere"], strict=True)),
        "of another": dict(zip(_TICKETS, tickets["another"], strict=True)),
        "of other authorities": {"authorities": movers.msa_list(sha1(b"others"))},
        "garbage": {"enc_data": bytes(256)},
        "good": {},
    }.items():
        answer = side.note(f"leave {name}", replace(leaving, **changed).send(side.rested()))
    random, data = movers.two_sized(answer.ok())
    back = movers.CmkArrival(restrict, sig, movers.rewrapped(key, data), authorities, random)
    parent, _ = side.note("signing key", loaded(side.rested(), signing()))
    for name, changed, more in (
        ("wrong", {}, {"parent_auth": WRONG}),
        ("under a signing key", {}, {"parent": parent, "parent_auth": KEY_AUTH}),
        ("garbage", {"key": movers.rewrapped(key, bytes(256))}, {}),
        ("short random", {"random": random[1:]}, {}),
        ("to elsewhere", dict(zip(_TICKETS, tickets["elsewhere"], strict=True)), {}),
        ("of another", dict(zip(_TICKETS, tickets["another"], strict=True)), {}),
        ("without a ticket", {"sig_ticket": ZERO}, {}),
        ("good", {}, {}),
    ):
        answer = replace(back, **changed).send(side.rested(), **more)
        side.note(f"come {name}", answer)
        forgive(side)
        if not answer.code:
            arrived = movers.rewrapped(key, movers.one_sized(answer.body))
            answer = side.note(f"load {name}", load(side.rested(), arrived))
            _certified(side, number(answer.body), sha1(authorities))
    _plain_key(side, back, srk)
    _made_outside(side, back, srk, authority)


def _certified(side, handle, authorities):
    """TPM_CertifyKey2 of such a key, with its authorities and with others."""
    signer, _ = side.note("signer", loaded(side.rested(), signing()))
    for name, digest in (("its", authorities), ("other", WRONG)):
        sessions = [side.rested().oiap(KEY_AUTH).ending(), side.tpm.oiap(KEY_AUTH).ending()]
        answer = side.tpm.auth(
            CERTIFY_KEY2, digest + ZERO, *sessions, handles=u32(handle) + u32(signer)
        )
        side.note(f"certify with {name} authorities", answer)
    _delegated(side, handle)


def _delegated(side, handle):
    """Such a key in the hands of a delegate, before the owner permits it and then."""
    family = side.note("family", delegate.new_family(side.rested()))
    session = side.rested().osap(ET_KEY, handle, KEY_AUTH)
    blob = side.note(
        "delegation", delegate.key_blob(side.tpm, family, handle=handle, session=session)
    )
    for bits in (0, 0x80000000):
        answer = side.tpm.auth(movers.CMK_SET_RESTRICTIONS, u32(bits), owner(side.rested()))
        side.note(f"permit {bits:x}", answer)
        tpm = side.rested()
        answer, odd = delegate.dsap_request(tpm, delegate.ET_KEY_BLOB, blob, handle)
        side.note(f"DSAP {bits:x}", answer)
        if not answer.code:
            shared = hmac1(delegate.DEL_AUTH, answer.body[24:44], odd)
            session = Session(number(answer.body[:4]), answer.body[4:24], shared, shared)
            answer = tpm.auth(GET_PUB_KEY, b"", session, handles=u32(handle))
            side.note(f"public {bits:x}", answer)


_TICKETS = ("restrict_ticket", "sig_ticket")


def _ticket(side, authority, home, source):
    """What an authority signs, and the ticket for it."""
    restrict = ZERO + home + source
    digest = sha1(restrict)
    answer = movers.create_ticket(
        side.rested(), authority.as_verifier(), digest, authority.sign(digest)
    )
    return restrict, side.note("ticket", answer).ok()


def _plain_key(side, back, srk):
    """A key that is migratable and no more, offered as a certified one."""
    blob = wrap(
        side.rested(), signing(flags=movers.MIGRATABLE), migration_auth=movers.MIGRATION_AUTH
    ).ok()
    ticket = movers.authorize(side.rested(), srk).ok()
    sent = movers.create_blob(side.rested(), ticket, parse_key(blob).enc_data).ok()
    random, data = movers.two_sized(sent)
    plain = replace(back, key=movers.rewrapped(blob, data), random=random)
    side.note("come plain", plain.send(side.rested()))


_OUTSIDE: list = []


def _made_outside(side, back, srk, authority):
    """A key that no TPM made, on its way as what it may be and as what it may not."""
    if not _OUTSIDE:
        _OUTSIDE.append(movers.OutsideKey(1024))
    outside = _OUTSIDE[0]
    wanted = template(0x10, 1, 2, bits=1024, key12=True, flags=movers.CMK)
    blob = wanted[: -len(sized(b"") * 2)] + sized(outside.modulus) + sized(b"")
    key = parse_key(blob)
    source = sha1(key.pubkey)
    restrict, sig = _ticket(side, authority, sha1(srk), source)
    prime = outside.private.private_numbers().p.to_bytes(64, "big")
    hidden_hash = sha1(sha1(back.authorities), source)
    for payload in (8, 3, 1):
        block = movers.pack(movers.Inside(payload, KEY_AUTH, key.digest, prime, hidden_hash))
        random = (sha1(b"random") * 10)[: len(block)]
        sent = movers.rewrapped(blob, movers.sent_to(srk, block, random))
        arrival = movers.CmkArrival(restrict, sig, sent, back.authorities, random)
        side.note(f"come from outside as {payload}", arrival.send(side.rested()))


SCENARIOS = {
    "asymmetric change": ("owned", asymmetric_change),
    "certified keys": ("owned", certified_keys),
}
