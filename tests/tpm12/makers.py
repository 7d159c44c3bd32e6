"""Keys, blobs and NV areas for tests, made through a `Witness` as any client makes them."""

from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.tpm12.conftest import OWNER_AUTH, SRK_AUTH
from tests.tpm12.witness import (
    OAEP,
    SRK,
    ZERO,
    key_template,
    number,
    parse_key,
    parse_sized,
    rsa_parms,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

KEY_AUTH = sha1(b"key secret")
DATA_AUTH = sha1(b"data secret")
AREA_AUTH = sha1(b"area secret")
WRONG = sha1(b"wrong secret")

SEAL, UNSEAL, CREATE_WRAP_KEY, LOAD_KEY, LOAD_KEY2 = 0x17, 0x18, 0x1F, 0x20, 0x41
NV_DEFINE_SPACE = 0xCC
NV_LOCK = 0xFFFFFFFF
ET_KEY, ET_OWNER, ET_SRK, ET_COUNTER, ET_NV = 0x01, 0x02, 0x04, 0x0A, 0x0B

SIGNING, STORAGE, IDENTITY, AUTHCHANGE, BIND, LEGACY, MIGRATE = range(0x10, 0x17)
MIGRATABLE, PCR_IGNORED = 0x02, 0x08


def template(usage, enc, sig, *, bits=512, exponent=b"", primes=2, algorithm=1, **more):
    """A wanted key; small where size does not matter."""
    parms = rsa_parms(bits, enc, sig, exponent, primes, algorithm)
    return key_template(usage, parms=parms, **more)


def signing(sig=2, **more):
    return template(SIGNING, 1, sig, **more)


def storage(**more):
    return template(STORAGE, 3, 1, bits=2048, **more)


def wrap(  # the operands of TPM_CreateWrapKey
    tpm,
    wanted,
    *,
    parent=SRK,
    parent_auth=SRK_AUTH,
    usage_auth=KEY_AUTH,
    migration_auth=ZERO,
    adip=0,
):
    """TPM_CreateWrapKey under a fresh OSAP session."""
    session = tpm.osap(adip << 8 | (ET_SRK if parent == SRK else ET_KEY), parent, parent_auth)
    odd = tpm.nonce()
    masks = session.masked(usage_auth) + session.masked(migration_auth, odd)
    return tpm.auth(CREATE_WRAP_KEY, masks + wanted, session, handles=u32(parent), odd=[odd])


def load(tpm, blob, *, parent=SRK, parent_auth=SRK_AUTH, ordinal=LOAD_KEY2):
    """TPM_LoadKey2 (or TPM_LoadKey) under a fresh OIAP session."""
    outside = 4 if ordinal == LOAD_KEY2 else 0
    session = tpm.oiap(parent_auth).ending()
    return tpm.auth(ordinal, blob, session, handles=u32(parent), out_handles=outside)


def loaded(tpm, wanted, **parent):
    """Make a key and load it: its handle, and its parts."""
    blob = wrap(tpm, wanted, **parent).ok()
    return number(load(tpm, blob, **parent).ok()), parse_key(blob)


def pcr_info(*indices, values=None, size=3):
    """PCR_INFO that is released by these values (by zeros, if not given)."""
    return selection(*indices, size=size) + composite(indices, values, size) + ZERO


def pcr_info_long(creation=(), release=(), *, values=None, localities=0x1F, at_creation=1):
    """PCR_INFO_LONG that is released by these values (by zeros, if not given)."""
    head = u16(6) + u8(at_creation) + u8(localities) + selection(*creation) + selection(*release)
    return head + ZERO + composite(release, values)


def composite(indices, values=None, size=3):
    """COMPOSITE_HASH of PCRs with these values."""
    return sha1(selection(*indices, size=size), sized(b"".join(values or [ZERO] * len(indices))))


def seal(tpm, data, info=b"", *, key=SRK, key_auth=SRK_AUTH, secret=DATA_AUTH, locality=None):
    """TPM_Seal under a fresh OSAP session."""
    session = tpm.osap(ET_SRK if key == SRK else ET_KEY, key, key_auth)
    params = session.masked(secret) + sized(info) + sized(data)
    return tpm.auth(SEAL, params, session, handles=u32(key), locality=locality)


def unseal(tpm, blob, *, key=SRK, key_auth=SRK_AUTH, secret=DATA_AUTH, locality=None):
    """TPM_Unseal under two fresh OIAP sessions."""
    sessions = [tpm.oiap(key_auth).ending(), tpm.oiap(secret).ending()]
    return tpm.auth(UNSEAL, blob, *sessions, handles=u32(key), locality=locality)


def mgf1(seed, size):
    """MGF1 with SHA-1."""
    blocks = [sha1(seed, u32(i)) for i in range(size // 20 + 1)]
    return b"".join(blocks)[:size]


def aes_ctr(key, block, data):
    """AES-128 in counter mode."""
    return Cipher(algorithms.AES(key[:16]), modes.CTR(block[:16])).encryptor().update(data)


def sealed_parts(blob):
    """Split STORED_DATA or STORED_DATA12: (head with sealInfo, encData)."""
    seal_info, rest = parse_sized(blob[4:])
    enc_data, rest = parse_sized(rest)
    assert not rest
    return blob[: 8 + len(seal_info)], enc_data


def decrypt(key, enc_data):
    """Decrypt as a loaded key would, without the engine: what is really inside a blob."""
    n, p = number(key.public.pub_key), number(key.prime)
    q = n // p
    d = pow(65537, -1, (p - 1) * (q - 1))
    numbers = rsa.RSAPrivateNumbers(
        p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(65537, n)
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True).decrypt(enc_data, OAEP)


def area_info(index=b"", *, release=ZERO, localities=0x1F):
    """PCR_INFO_SHORT of an NV area."""
    return (index or selection()) + u8(localities) + release


def nv_public(index, attributes, size, *, read=None, write=None):
    """NV_DATA_PUBLIC."""
    head = u16(0x18) + u32(index) + (read or area_info()) + (write or area_info())
    return head + u16(0x17) + u32(attributes) + bytes(3) + u32(size)


def define(tpm, index, attributes, size, *, as_owner=False, secret=AREA_AUTH, **infos):
    """TPM_NV_DefineSpace, as the owner or without a session."""
    public = nv_public(index, attributes, size, **infos)
    if not as_owner:
        return tpm.send(NV_DEFINE_SPACE, public + secret)
    session = tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    return tpm.auth(NV_DEFINE_SPACE, public + session.masked(secret), session)


def lock_nv(tpm):
    """Set nvLocked."""
    return tpm.send(NV_DEFINE_SPACE, nv_public(NV_LOCK, 0, 0) + ZERO)
