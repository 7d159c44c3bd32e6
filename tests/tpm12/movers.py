"""Keys on their way, written from the specification: the inner wrapping, authorities, and tickets.

Nothing here comes from the engine, and everything a TPM does goes through a `Witness`.
"""

from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed

from tests.tpm12.makers import (
    ET_SRK,
    KEY_AUTH,
    mgf1,
    storage,
)
from tests.tpm12.witness import (
    OAEP,
    OWNER_AUTH,
    SRK,
    SRK_AUTH,
    oaep,
    parse_key,
    parse_sized,
    rsa_parms,
    sha1,
    sized,
    u8,
    u16,
    u32,
    xor,
)

CREATE_MIGRATION_BLOB, CONVERT_MIGRATION_BLOB = 0x28, 0x2A
AUTHORIZE_MIGRATION_KEY, MIGRATE_KEY = 0x2B, 0x25
CMK_SET_RESTRICTIONS, CMK_APPROVE_MA, CMK_CREATE_KEY = 0x1C, 0x1D, 0x13
CMK_CREATE_TICKET, CMK_CREATE_BLOB, CMK_CONVERT_MIGRATION = 0x12, 0x1B, 0x24
MS_MIGRATE, MS_REWRAP, MS_MAINT, MS_RESTRICT_MIGRATE, MS_RESTRICT_APPROVE = range(1, 6)
MIGRATABLE, MIGRATE_AUTHORITY = 0x02, 0x10
CMK = MIGRATABLE | MIGRATE_AUTHORITY
MIGRATION_AUTH = sha1(b"migration secret")


class OutsideKey:
    """An RSA key that no TPM made: a destination, an authority, a maker."""

    def __init__(self, bits=2048, *, enc=3, sig=1, exponent=65537):
        self.private = rsa.generate_private_key(exponent, bits)
        self.modulus = self.private.public_key().public_numbers().n.to_bytes(bits // 8, "big")
        wire_exponent = b"" if exponent == 65537 else exponent.to_bytes(1, "big")
        self.parms = rsa_parms(bits, enc, sig, wire_exponent)

    @property
    def pubkey(self):
        return self.parms + sized(self.modulus)

    @property
    def digest(self):
        return sha1(self.pubkey)

    def decrypt(self, data):
        return self.private.decrypt(data, OAEP)

    def sign(self, digest):
        return self.private.sign(digest, padding.PKCS1v15(), Prehashed(hashes.SHA1()))

    def as_verifier(self, sig=2):
        """The same modulus as a key for signatures."""
        return rsa_parms(8 * len(self.modulus), 1, sig) + sized(self.modulus)


# -- the inner wrapping ----------------------------------------------------------------------------


@dataclass
class Inside:
    """What a migration block carries."""

    payload: int
    usage_auth: bytes
    pub_data_digest: bytes
    prime: bytes
    p_hash: bytes


def pack(inside):
    """Make the OAEP block o1."""
    private_key = sized(inside.prime)
    k1, k2 = private_key[:20], private_key[20:]
    m1 = u8(inside.payload) + inside.usage_auth + inside.pub_data_digest + sized(k2)
    data_block = inside.p_hash + b"\1" + m1
    masked = xor(data_block, mgf1(k1, len(data_block)))
    return xor(k1, mgf1(masked, 20)) + masked


def unpack(block):
    """Take the OAEP block o1 apart."""
    seed = xor(block[:20], mgf1(block[20:], 20))
    data_block = xor(block[20:], mgf1(seed, len(block) - 20))
    p_hash, m1 = data_block[:20], data_block[21:]
    assert data_block[20:21] == b"\1"
    k2, rest = parse_sized(m1[41:])
    assert rest == b""
    prime, rest = parse_sized(seed + k2)
    assert rest == b""
    return Inside(m1[0], m1[1:21], m1[21:41], prime, p_hash)


def two_sized(body):
    first, rest = parse_sized(body)
    second, rest = parse_sized(rest)
    assert rest == b""
    return first, second


def one_sized(body):
    data, rest = parse_sized(body)
    assert rest == b""
    return data


# -- commands --------------------------------------------------------------------------------------


def owner(tpm, secret=OWNER_AUTH):
    return tpm.oiap(secret).ending()


def authorize(tpm, pubkey, scheme=MS_MIGRATE, *, secret=OWNER_AUTH):
    return tpm.auth(AUTHORIZE_MIGRATION_KEY, u16(scheme) + pubkey, owner(tpm, secret))


def create_blob(
    tpm,
    key_auth,
    enc_data,
    scheme=MS_MIGRATE,
    *,
    parent=SRK,
    parent_auth=SRK_AUTH,
    secret=MIGRATION_AUTH,
):
    """TPM_CreateMigrationBlob; `key_auth` is what `authorize` gave."""
    sessions = [tpm.oiap(parent_auth).ending(), tpm.oiap(secret).ending()]
    params = u16(scheme) + key_auth + sized(enc_data)
    return tpm.auth(CREATE_MIGRATION_BLOB, params, *sessions, handles=u32(parent))


def convert(tpm, data, random, *, parent=SRK, parent_auth=SRK_AUTH):
    session = tpm.oiap(parent_auth).ending()
    params = sized(data) + sized(random)
    return tpm.auth(CONVERT_MIGRATION_BLOB, params, session, handles=u32(parent))


def migrate(tpm, handle, pubkey, data, *, secret=KEY_AUTH):
    session = tpm.oiap(secret).ending()
    return tpm.auth(MIGRATE_KEY, pubkey + sized(data), session, handles=u32(handle))


def rewrapped(blob, enc_data):
    """A KEY around another encrypted part."""
    key = parse_key(blob)
    assert blob.endswith(sized(key.enc_data))
    return blob[: -len(sized(key.enc_data))] + sized(enc_data)


def msa_list(*digests):
    """TPM_MSA_COMPOSITE."""
    return u32(len(digests)) + b"".join(digests)


def approve(tpm, digest, *, secret=OWNER_AUTH):
    return tpm.auth(CMK_APPROVE_MA, digest, owner(tpm, secret))


def create_cmk(
    tpm,
    wanted,
    authorities,
    *,
    approval=None,
    parent=SRK,
    parent_auth=SRK_AUTH,
    usage_auth=KEY_AUTH,
):
    """TPM_CMK_CreateKey for a list of authorities that the owner approves first."""
    digest = sha1(authorities)
    approval = approve(tpm, digest).ok() if approval is None else approval
    session = tpm.osap(ET_SRK if parent == SRK else 1, parent, parent_auth)
    params = session.masked(usage_auth) + wanted + approval + digest
    return tpm.auth(CMK_CREATE_KEY, params, session, handles=u32(parent))


def create_ticket(tpm, verifier, signed, signature, *, secret=OWNER_AUTH):
    params = verifier + signed + sized(signature)
    return tpm.auth(CMK_CREATE_TICKET, params, owner(tpm, secret))


@dataclass
class CmkBlob:
    """Operands of TPM_CMK_CreateBlob."""

    key_auth: bytes
    source_digest: bytes
    authorities: bytes
    enc_data: bytes
    scheme: int = MS_RESTRICT_MIGRATE
    restrict_ticket: bytes = b""
    sig_ticket: bytes = b""

    def send(self, tpm, *, parent=SRK, parent_auth=SRK_AUTH):
        params = u16(self.scheme) + self.key_auth + self.source_digest + sized(self.authorities)
        params += sized(self.restrict_ticket) + sized(self.sig_ticket) + sized(self.enc_data)
        session = tpm.oiap(parent_auth).ending()
        return tpm.auth(CMK_CREATE_BLOB, params, session, handles=u32(parent))


@dataclass
class CmkArrival:
    """Operands of TPM_CMK_ConvertMigration."""

    restrict_ticket: bytes
    sig_ticket: bytes
    key: bytes
    authorities: bytes
    random: bytes

    def send(self, tpm, *, parent=SRK, parent_auth=SRK_AUTH):
        params = self.restrict_ticket + self.sig_ticket + self.key + sized(self.authorities)
        session = tpm.oiap(parent_auth).ending()
        return tpm.auth(
            CMK_CONVERT_MIGRATION, params + sized(self.random), session, handles=u32(parent)
        )


def srk_pubkey(tpm):
    """TPM_PUBKEY of the SRK, by TPM_OwnerReadInternalPub."""
    return tpm.auth(0x81, u32(SRK), owner(tpm)).ok()


def modulus_of(pubkey):
    return pubkey[-256:]


def sent_to(pubkey, block, random):
    """Hide and encrypt a block, as the sending TPM does."""
    return oaep(modulus_of(pubkey), xor(block, random))


def storage_cmk(**more):
    return storage(key12=True, flags=CMK, **more)
