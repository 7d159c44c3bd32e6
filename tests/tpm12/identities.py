"""Identity keys for tests, made through a `Witness` as any client makes them."""

from tests.tpm12.makers import ET_OWNER, load
from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK_AUTH,
    key_template,
    number,
    parse_key,
    rsa_parms,
    sha1,
)

MAKE_IDENTITY = 0x79
AIK_AUTH = sha1(b"identity secret")


def loaded_identity(tpm, *, auth_data_usage=1):
    """TPM_MakeIdentity and TPM_LoadKey2: handle and parts of the new key."""
    wanted = key_template(0x12, parms=rsa_parms(enc=1, sig=2), auth_data_usage=auth_data_usage)
    owner = tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    secret = owner.masked(AIK_AUTH)
    srk = tpm.oiap(SRK_AUTH).ending()
    out = tpm.auth(MAKE_IDENTITY, secret + sha1(b"label") + wanted, srk, owner).ok()
    key = parse_key(out)
    blob = out[: len(out) - len(key.rest)]
    return number(load(tpm, blob).ok()), key
