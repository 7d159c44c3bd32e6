"""TPM_PERMANENT_FLAGS.FIPS: no XOR of secrets, no short keys, none that anybody may use.

No command sets the flag. `sides.py` sets it in the state that each side begins with.
"""

from tests.differential.sides import FIPS, take_ownership
from tests.tpm12 import movers
from tests.tpm12.identities import MAKE_IDENTITY
from tests.tpm12.makers import ET_OWNER, ET_SRK, KEY_AUTH, aes_ctr, load, signing, storage, template
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    key_template,
    number,
    parse_key,
    rsa_parms,
    sha1,
    sized,
    u16,
    u32,
)

AES = 0x0600
WRAP, ASYM_START, CMK_CREATE_KEY, SIGN = 0x1F, 0x0E, 0x13, 0x3C
OSAP = 0x0B


def _masked(session, nonce, secret=KEY_AUTH):
    return aes_ctr(session.shared, nonce, secret)


def keys(side):
    """Keys of every kind, by an owner of a TPM in FIPS mode."""
    tpm = side.tpm
    for entity, value in ((ET_OWNER, 0), (ET_SRK, SRK)):
        side.note(f"XOR {entity}", tpm.send(OSAP, u16(entity) + u32(value) + ZERO))
        side.note(f"AES {entity}", tpm.send(OSAP, u16(AES | entity) + u32(value) + ZERO))
    for name, wanted in (
        ("short", signing()),
        ("1024", signing(bits=1024)),
        ("free", signing(bits=1024, auth_data_usage=0)),
        ("free to read", signing(bits=1024, auth_data_usage=3)),
        ("legacy", template(0x15, 3, 2, bits=1024)),
        ("bind", template(0x14, 3, 1, bits=1024)),
        ("storage", storage()),
        ("free storage", storage(auth_data_usage=0)),
    ):
        side.note(f"make {name}", _wrapped(side.rested(), wanted))
    _identities(side)
    _certified(side)


def _wrapped(tpm, wanted):
    session, odd = tpm.osap(AES | ET_SRK, SRK, SRK_AUTH), tpm.nonce()
    params = _masked(session, session.even) + _masked(session, odd) + wanted
    return tpm.auth(WRAP, params, session, handles=u32(SRK), odd=[odd])


def _identities(side):
    for usage in (0, 1):
        tpm = side.rested()
        owner = tpm.osap(AES | ET_OWNER, 0, OWNER_AUTH)
        wanted = key_template(0x12, parms=rsa_parms(enc=1, sig=2), auth_data_usage=usage)
        params = _masked(owner, owner.even) + ZERO + wanted
        answer = tpm.auth(MAKE_IDENTITY, params, tpm.oiap(SRK_AUTH).ending(), owner)
        side.note(f"identity {usage}", answer)
    out = answer.ok()
    blob = out[: len(out) - len(parse_key(out).rest)]
    handle = number(side.note("load identity", load(side.rested(), blob)).ok())
    for bits in (512, 1024):
        session = tpm.oiap(KEY_AUTH).ending()
        params = ZERO + rsa_parms(bits)
        answer = tpm.auth(ASYM_START, params, session, handles=u32(handle))
        side.note(f"new secrets by {bits}", answer)


def _certified(side):
    tpm, digest = side.rested(), sha1(movers.msa_list(ZERO))
    approval = side.note("approve", movers.approve(tpm, digest)).ok()
    for bits, usage in ((512, 1), (1024, 0), (1024, 1)):
        session = tpm.osap(AES | ET_SRK, SRK, SRK_AUTH)
        wanted = template(
            0x10, 1, 2, bits=bits, auth_data_usage=usage, key12=True, flags=movers.CMK
        )
        params = _masked(session, session.even) + wanted + approval + digest
        answer = tpm.auth(CMK_CREATE_KEY, params, session, handles=u32(SRK))
        side.note(f"certified {bits} {usage}", answer)


def owners(side):
    """An SRK that anybody may use, and one that only its user may."""
    side.note("pubek", side.tpm.send(0x7C, ZERO))
    for usage in (0, 1):
        wanted = key_template(0x11, auth_data_usage=usage)
        side.note(f"take {usage}", take_ownership(side.rested(), wanted=wanted))
    side.note("wrap", _wrapped(side.rested(), signing(bits=1024)))
    side.note("sign", side.tpm.send(SIGN, u32(SRK) + sized(ZERO)))


SCENARIOS = {
    "FIPS keys": (f"owned{FIPS}", keys),
    "FIPS owner": (f"with_ek{FIPS}", owners),
}
