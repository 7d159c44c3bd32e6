"""Families, delegations and DSAP sessions for tests, made through a `Witness`."""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.tpm12.witness import (
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    ZERO,
    Session,
    hmac1,
    number,
    parse_sized,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

DSAP, SET_OWNER_POINTER = 0x11, 0x75
UPDATE_VERIFICATION, MANAGE, CREATE_KEY, CREATE_OWNER = 0xD1, 0xD2, 0xD4, 0xD5
VERIFY, LOAD_OWNER, READ_TABLE = 0xD6, 0xD8, 0xDB
ET_OWNER, ET_SRK = 0x02, 0x04
ET_OWNER_BLOB, ET_ROW, ET_KEY_BLOB = 0x07, 0x08, 0x09
AES = 0x0600
OWNER_BITS, KEY_BITS = 1, 2
CREATE, ENABLE, ADMIN, INVALIDATE = 1, 2, 3, 4
ON, OFF = b"\1", b"\0"
ENABLED, LOCKED = 1, 2
DEL_AUTH = sha1(b"delegate secret")
ALL_OWNER, ALL_KEY = 0xFFFFFFFF, 0x1FFFFFFF
PUBLIC_BYTES = 2 + 1 + 26 + 14 + 8
INTEGRITY_AT = 2 + PUBLIC_BYTES
"""Where in a blob its HMAC stands."""


def pcr_info(*indices, localities=0x1F, digest=ZERO):
    """PCR_INFO_SHORT."""
    return selection(*indices) + u8(localities) + digest


def public(family, per1, *, kind=OWNER_BITS, count=0, info=None, label=0x4C, per2=0):
    """DELEGATE_PUBLIC; the TPM puts its own count in."""
    head = u16(0x1B) + u8(label) + (info or pcr_info())
    return head + u16(0x1A) + u32(kind) + u32(per1) + u32(per2) + u32(family) + u32(count)


def with_count(blob_or_public, count):
    """Another verificationCount in a blob."""
    end = 2 + PUBLIC_BYTES
    return blob_or_public[: end - 4] + u32(count) + blob_or_public[end:]


def owner_oiap(tpm, secret=OWNER_AUTH):
    return tpm.oiap(secret).ending()


def owner_osap(tpm, secret=OWNER_AUTH, adip=0):
    return tpm.osap(adip << 8 | ET_OWNER, 0, secret)


def srk_osap(tpm, secret=SRK_AUTH):
    return tpm.osap(ET_SRK, SRK, secret)


def manage(tpm, operation, family=0, data=b"", session=None):
    """TPM_Delegate_Manage, without authorization when there is no session."""
    params = u32(family) + u32(operation) + sized(data)
    return tpm.auth(MANAGE, params, session) if session else tpm.send(MANAGE, params)


def new_family(tpm, label=b"F", *, enabled=True):
    """A family made by the owner; its ID."""
    out = manage(tpm, CREATE, 0, label, owner_oiap(tpm)).ok()
    family = number(out[4:])
    if enabled:
        manage(tpm, ENABLE, family, ON, owner_oiap(tpm)).ok()
    return family


def create_owner(tpm, delegation, session=None, *, increment=False, secret=DEL_AUTH):
    """TPM_Delegate_CreateOwnerDelegation."""
    session = session or owner_osap(tpm)
    params = u8(increment) + delegation + session.masked(secret)
    return tpm.auth(CREATE_OWNER, params, session)


def create_key(tpm, delegation, session=None, *, handle=SRK, secret=DEL_AUTH):
    """TPM_Delegate_CreateKeyDelegation."""
    session = session or srk_osap(tpm)
    params = delegation + session.masked(secret)
    return tpm.auth(CREATE_KEY, params, session, handles=u32(handle))


def blob_of(answer):
    """The blob in an answer."""
    blob, rest = parse_sized(answer.ok())
    assert not rest
    return blob


def owner_blob(tpm, family, per1=ALL_OWNER, **more):
    return blob_of(create_owner(tpm, public(family, per1, **more)))


def key_blob(tpm, family, per1=ALL_KEY, *, handle=SRK, session=None, **more):
    delegation = public(family, per1, kind=KEY_BITS, **more)
    return blob_of(create_key(tpm, delegation, session, handle=handle))


def load_owner(tpm, index, blob, session=None):
    """TPM_Delegate_LoadOwnerDelegation, without authorization when there is no session."""
    params = u32(index) + sized(blob)
    return tpm.auth(LOAD_OWNER, params, session) if session else tpm.send(LOAD_OWNER, params)


def loaded_row(tpm, family, per1=ALL_OWNER, *, index=0, **more):
    """An owner delegation in a row of the table."""
    load_owner(tpm, index, owner_blob(tpm, family, per1, **more), owner_oiap(tpm)).ok()
    return index


def clear_blob(delegation, secret=DEL_AUTH, tag=0x2A):
    """A DELEGATE_OWNER_BLOB as it is loaded without an owner: unproven, its secret in clear."""
    return u16(tag) + delegation + ZERO + sized(b"") + sized(u16(0x26) + secret)


def verify(tpm, blob):
    """TPM_Delegate_VerifyDelegation; the code."""
    return tpm.send(VERIFY, sized(blob)).code


def update(tpm, data, session=None):
    """TPM_Delegate_UpdateVerification."""
    return tpm.auth(UPDATE_VERIFICATION, sized(data), session or owner_oiap(tpm))


def set_pointer(tpm, entity_type, value=0):
    """TPM_SetOwnerPointer."""
    return tpm.send(SET_OWNER_POINTER, u16(entity_type) + u32(value))


def read_table(tpm):
    """TPM_Delegate_ReadTable: {family ID: (label, count, flags)}, {row: DELEGATE_PUBLIC}."""
    families, rest = parse_sized(tpm.send(READ_TABLE).ok())
    rows, rest = parse_sized(rest)
    assert not rest
    found = {}
    while families:
        assert families[:2] == u16(0x25)
        family, count, flags = (number(families[i : i + 4]) for i in (3, 7, 11))
        found[family] = (families[2], count, flags)
        families = families[15:]
    table = {}
    while rows:
        table[number(rows[:4])] = rows[4 : 4 + PUBLIC_BYTES]
        rows = rows[4 + PUBLIC_BYTES :]
    return found, table


def dsap_request(tpm, entity_type, value, handle=0):
    """TPM_DSAP: its answer, and nonceOddDSAP."""
    odd = tpm.nonce()
    return tpm.send(DSAP, u16(entity_type) + u32(handle) + odd + sized(value)), odd


def dsap(tpm, entity_type, value, handle=0, secret=DEL_AUTH):
    """A DSAP session."""
    answer, odd = dsap_request(tpm, entity_type, value, handle)
    out = answer.ok()
    shared = hmac1(secret, out[24:44], odd)
    return Session(number(out[:4]), out[4:24], shared, shared)


def by_blob(tpm, blob, **more):
    """A DSAP session of an owner blob."""
    return dsap(tpm, ET_OWNER_BLOB, blob, **more)


def by_row(tpm, index, **more):
    """A DSAP session of a row."""
    return dsap(tpm, ET_ROW, u32(index), **more)


def by_key(tpm, blob, handle=SRK, **more):
    """A DSAP session of a key blob."""
    return dsap(tpm, ET_KEY_BLOB, blob, handle, **more)


def aes_masked(session, secret):
    """A new secret under AES ADIP."""
    cipher = Cipher(algorithms.AES(session.shared[:16]), modes.CTR(session.even[:16]))
    return cipher.encryptor().update(secret)
