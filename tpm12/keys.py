"""Keys as the TPM holds them, and the rules every use of a key obeys.

A `LoadedKey` is a key in a slot (or the EK or SRK): its public description as it came over the
wire, and the secrets that were inside `encData`.

Source: TPM Main r116 Part 2 §10, Part 1 §§ on key hierarchy; PC Client for 2048-bit storage keys.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    AlgorithmId,
    AuthDataUsage,
    EncScheme,
    KeyFlags,
    KeyUsage,
    SigScheme,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    AnyKey,
    Key,
    Key12,
    KeyParms,
    PcrInfo,
    PcrInfoLong,
    Pubkey,
    RsaKeyParms,
    StoreAsymkey,
    StorePubkey,
)
from protocol.wire import U8, Bool, DecodeError, SecretAuth, SecretSized, decode, encode, wire
from tpm12.crypto import DEFAULT_EXPONENT, HmacKey, RsaPrivateKey, RsaPublicKey, sha1

RSA_BITS_MIN: Final = 512
RSA_BITS_MAX: Final = 2048
STORAGE_KEY_BITS: Final = 2048
_MIGRATABLE: Final = int(KeyFlags.MIGRATABLE)
"""A plain integer: with an enumerator, `&` runs Python code."""


@wire
class KeyRecord:
    """A loaded key as it is stored with the state."""

    public: AnyKey
    payload: U8
    usage_auth: SecretAuth
    migration_auth: SecretAuth
    prime: SecretSized
    parent_pcr_status: Bool


class LoadedKey:
    """A key with its private part, ready for use. It never changes.

    Attributes:
        public: KEY or KEY12 as loaded; `enc_data` is kept as it came.
        payload: PayloadType of its STORE_ASYMKEY.
        usage_auth: Its authValue.
        migration_auth: The migration secret; tpmProof when it is not migratable.
        parent_pcr_status: Its parent, or a parent of that, is bound to PCRs.
        pcr_info: Its own binding, in the long or the 1.1 form, or None.
    """

    __slots__ = (
        "_pub_digest",
        "_pubkey",
        "_record",
        "_rsa",
        "_usage_hmac",
        "auth_data_usage",
        "flags",
        "migration_auth",
        "parent_pcr_status",
        "payload",
        "pcr_info",
        "prime",
        "public",
        "usage",
        "usage_auth",
    )

    def __init__(  # noqa: PLR0913 - the parts of a key
        self,
        public: Key | Key12,
        *,
        payload: int,
        usage_auth: bytes,
        migration_auth: bytes,
        prime: bytes,
        parent_pcr_status: bool,
    ) -> None:
        self.public = public
        self.payload = payload
        self.usage_auth = usage_auth
        self.migration_auth = migration_auth
        self.prime = prime
        self.parent_pcr_status = parent_pcr_status
        self.usage = public.key_usage
        self.flags = public.key_flags
        self.auth_data_usage = public.auth_data_usage
        self.pcr_info = pcr_info_of(public)
        self._rsa: RsaPrivateKey | None = None
        self._usage_hmac: HmacKey | None = None
        self._pub_digest: bytes | None = None
        self._pubkey: Pubkey | None = None
        self._record: bytes | None = None

    def __repr__(self) -> str:
        return f"LoadedKey(usage=0x{self.usage:04x}, bits={8 * len(self.public.pub_key)})"

    @property
    def rsa(self) -> RsaPrivateKey:
        """The key for computing; made at first use and kept.

        Raises:
            ValueError: The prime does not divide the modulus.
            TpmError: BAD_KEY_PROPERTY when its parameters are no RSA key's.
        """
        if self._rsa is None:
            exponent = exponent_of(self.public.algorithm_parms)
            self._rsa = RsaPrivateKey.from_prime(self.public.pub_key, self.prime, exponent)
        return self._rsa

    @property
    def usage_hmac(self) -> HmacKey:
        """The HMAC state of `usage_auth`, made at first use and kept."""
        if self._usage_hmac is None:
            self._usage_hmac = HmacKey(self.usage_auth)
        return self._usage_hmac

    @property
    def pub_data_digest(self) -> bytes:
        """STORE_ASYMKEY.pubDataDigest of this key: what ties a session to it."""
        if self._pub_digest is None:
            self._pub_digest = pub_data_digest(self.public)
        return self._pub_digest

    @property
    def is_migratable(self) -> bool:
        """May it leave this TPM?"""
        return bool(self.flags & _MIGRATABLE)

    @property
    def enc_scheme(self) -> int:
        """EncScheme of its parameters."""
        return self.public.algorithm_parms.enc_scheme

    @property
    def sig_scheme(self) -> int:
        """SigScheme of its parameters."""
        return self.public.algorithm_parms.sig_scheme

    def pubkey(self) -> Pubkey:
        """Its TPM_PUBKEY, made at first use and kept."""
        if self._pubkey is None:
            self._pubkey = pubkey_of(self.public)
        return self._pubkey

    def store_asymkey(self) -> StoreAsymkey:
        """What goes encrypted into `enc_data`."""
        return StoreAsymkey(
            payload=self.payload,
            usage_auth=self.usage_auth,
            migration_auth=self.migration_auth,
            pub_data_digest=self.pub_data_digest,
            priv_key=self.prime,
        )

    def with_migration_auth(self, migration_auth: bytes) -> LoadedKey:
        """The same key with another migration secret."""
        return LoadedKey(
            self.public,
            payload=self.payload,
            usage_auth=self.usage_auth,
            migration_auth=migration_auth,
            prime=self.prime,
            parent_pcr_status=self.parent_pcr_status,
        )

    def to_bytes(self) -> bytes:
        """Store it with the state; made at first use and kept: EK and SRK go into each NV write."""
        if self._record is None:
            self._record = encode(
                KeyRecord(
                    public=self.public,
                    payload=self.payload,
                    usage_auth=self.usage_auth,
                    migration_auth=self.migration_auth,
                    prime=self.prime,
                    parent_pcr_status=self.parent_pcr_status,
                )
            )
        return self._record

    @classmethod
    def from_bytes(cls, data: bytes) -> LoadedKey:
        """Read what `to_bytes` wrote.

        Raises:
            DecodeError: It is something else.
        """
        record = decode(KeyRecord, data)
        return cls(
            record.public,
            payload=record.payload,
            usage_auth=record.usage_auth,
            migration_auth=record.migration_auth,
            prime=record.prime,
            parent_pcr_status=record.parent_pcr_status,
        )


def pcr_info_of(public: Key | Key12) -> PcrInfo | PcrInfoLong | None:
    """The PCR binding in a key's description, or None.

    Raises:
        DecodeError: It is malformed.
    """
    if not public.pcr_info:
        return None
    if isinstance(public, Key12):
        return decode(PcrInfoLong, public.pcr_info)
    return decode(PcrInfo, public.pcr_info)


def pubkey_of(public: Key | Key12) -> Pubkey:
    """The TPM_PUBKEY of a key's description."""
    return Pubkey(algorithm_parms=public.algorithm_parms, pub_key=StorePubkey(key=public.pub_key))


def pub_data_digest(public: Key | Key12) -> bytes:
    """Hash a key's description up to and including the public key (Part 2 §10.6)."""
    bare = with_private(public, b"")
    return sha1(encode(bare)[:-4])


def with_private(public: Key | Key12, enc_data: bytes) -> Key | Key12:
    """The same description around another `enc_data`."""
    return described(public, pcr_info=public.pcr_info, pub_key=public.pub_key, enc_data=enc_data)


def described(
    public: Key | Key12, *, pcr_info: bytes, pub_key: bytes, enc_data: bytes
) -> Key | Key12:
    """The same description around another PCR binding, public and private part."""
    return type(public)(
        key_usage=public.key_usage,
        key_flags=public.key_flags,
        auth_data_usage=public.auth_data_usage,
        algorithm_parms=public.algorithm_parms,
        pcr_info=pcr_info,
        pub_key=pub_key,
        enc_data=enc_data,
    )


def rsa_parms(parms: KeyParms) -> RsaKeyParms:
    """The RSA parameters inside KEY_PARMS.

    Raises:
        TpmError: BAD_KEY_PROPERTY when the algorithm is not RSA or the parameters are malformed.
    """
    if parms.algorithm_id != AlgorithmId.RSA:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "not an RSA key")
    try:
        return decode(RsaKeyParms, parms.parms)
    except DecodeError as error:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "malformed RSA parameters") from error


def exponent_of(parms: KeyParms) -> int:
    """The public exponent; an empty one means 65537."""
    exponent = rsa_parms(parms).exponent
    return int.from_bytes(exponent, "big") if exponent else DEFAULT_EXPONENT


def public_key_of(public: Pubkey) -> RsaPublicKey:
    """The RSA public key in a TPM_PUBKEY.

    Raises:
        TpmError: BAD_KEY_PROPERTY when it is none.
    """
    return RsaPublicKey(public.pub_key.key, exponent_of(public.algorithm_parms))


# Which schemes go with which usage (Part 2 §5.8): usage -> (encryption schemes, signature schemes).
_NO_ENC, _OAEP = EncScheme.NONE, EncScheme.RSAESOAEP_SHA1_MGF1
_SCHEMES: Final[dict[int, tuple[frozenset[int], frozenset[int]]]] = {
    KeyUsage.SIGNING: (
        frozenset({_NO_ENC}),
        frozenset(
            {
                SigScheme.RSASSAPKCS1V15_SHA1,
                SigScheme.RSASSAPKCS1V15_DER,
                SigScheme.RSASSAPKCS1V15_INFO,
            }
        ),
    ),
    KeyUsage.STORAGE: (frozenset({_OAEP}), frozenset({SigScheme.NONE})),
    KeyUsage.IDENTITY: (frozenset({_NO_ENC}), frozenset({SigScheme.RSASSAPKCS1V15_SHA1})),
    KeyUsage.AUTHCHANGE: (frozenset({_OAEP}), frozenset({SigScheme.NONE})),
    KeyUsage.BIND: (frozenset({EncScheme.RSAESPKCSV15, _OAEP}), frozenset({SigScheme.NONE})),
    KeyUsage.LEGACY: (
        frozenset({EncScheme.RSAESPKCSV15, _OAEP}),
        frozenset({SigScheme.RSASSAPKCS1V15_SHA1, SigScheme.RSASSAPKCS1V15_DER}),
    ),
    KeyUsage.MIGRATE: (frozenset({_OAEP}), frozenset({SigScheme.NONE})),
}
_ONLY_2048: Final = frozenset({KeyUsage.STORAGE, KeyUsage.IDENTITY, KeyUsage.MIGRATE})
_DEFAULT_EXPONENT_ONLY: Final = _ONLY_2048
SHA1_SIGNATURES: Final = frozenset({SigScheme.RSASSAPKCS1V15_SHA1, SigScheme.RSASSAPKCS1V15_INFO})
"""Schemes of keys that may sign what the TPM itself says."""
ATTESTING_USAGES: Final = frozenset({KeyUsage.SIGNING, KeyUsage.LEGACY, KeyUsage.IDENTITY})
"""Usages of keys that may sign what the TPM itself says."""
EXPONENTS: Final = frozenset({3, 5, 7, 17, 257, 65537})
"""Public exponents that may be asked for."""
_KNOWN_FLAGS: Final = int(
    KeyFlags.REDIRECTION
    | KeyFlags.MIGRATABLE
    | KeyFlags.IS_VOLATILE
    | KeyFlags.PCR_IGNORED_ON_READ
    | KeyFlags.MIGRATE_AUTHORITY
)
_KNOWN_AUTH_DATA_USAGES: Final = frozenset(AuthDataUsage)


def check_properties(public: Key | Key12) -> RsaKeyParms:
    """Check that usage, flags, schemes and size go together (Part 2 §5.8, Part 3 §10.4).

    Raises:
        TpmError: BAD_KEY_PROPERTY.
    """
    parms = public.algorithm_parms
    rsa = rsa_parms(parms)
    usage = public.key_usage
    schemes = _SCHEMES.get(usage)
    if schemes is None or parms.enc_scheme not in schemes[0] or parms.sig_scheme not in schemes[1]:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "schemes do not go with the usage")
    if public.key_flags & ~_KNOWN_FLAGS:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "an unknown key flag")
    if public.auth_data_usage not in _KNOWN_AUTH_DATA_USAGES:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "an unknown authDataUsage")
    bits = rsa.key_length
    if bits % 16 or not RSA_BITS_MIN <= bits <= RSA_BITS_MAX or rsa.num_primes != 2:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "no size or number of primes that is served")
    if usage in _ONLY_2048 and bits != STORAGE_KEY_BITS:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "this usage needs 2048 bits")
    if usage in _DEFAULT_EXPONENT_ONLY and rsa.exponent:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "this usage needs the default exponent")
    if rsa.exponent and int.from_bytes(rsa.exponent, "big") not in EXPONENTS:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "an exponent that is not served")
    return rsa
