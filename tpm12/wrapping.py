"""Making keys, wrapping their private parts under a parent, and loading them again.

What every command that makes or takes in a key shares: TPM_CreateWrapKey, TPM_LoadKey and
TPM_LoadKey2, and by the same rules TPM_TakeOwnership, TPM_MakeIdentity, TPM_CMK_CreateKey and
migration.

Leaves to others: who may do it (`authorization.py`), what properties go together (`keys.py`).

Source: TPM Main r116 Part 2 §10, Part 3 §10.4, §10.5.

Invariants:
- What came back under a parent is believed in nothing before its payload type, its digest and its
  numbers are checked: anyone who knows a storage key's public part can encrypt to it.
"""

from __future__ import annotations

from protocol.constants import AuthDataUsage, EntityType, KeyFlags, KeyUsage, PayloadType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import Key, Key12, RsaKeyParms, StoreAsymkey
from protocol.wire import DecodeError, decode, encode
from tpm12 import keys, pcrs
from tpm12.authorization import end_bound_sessions
from tpm12.crypto import DecryptionError, is_same, new_rsa_key
from tpm12.encryption import encrypted_oaep
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

FIPS_RSA_BITS_MIN = 1024
_CMK_PAYLOADS = frozenset({PayloadType.MIGRATE_RESTRICTED, PayloadType.MIGRATE_EXTERNAL})
_CMK_FLAGS = KeyFlags.MIGRATABLE | KeyFlags.MIGRATE_AUTHORITY


def check_properties(tpm: Tpm, public: Key | Key12) -> RsaKeyParms:
    """Check that this TPM serves a key of this description.

    Raises:
        TpmError: BAD_KEY_PROPERTY; NOTFIPS for what a TPM in FIPS mode does not serve.
    """
    if tpm.permanent.flags.fips and (
        public.auth_data_usage == AuthDataUsage.NEVER
        or public.key_usage == KeyUsage.LEGACY
        or keys.rsa_parms(public.algorithm_parms).key_length < FIPS_RSA_BITS_MIN
    ):
        raise TpmError(ReturnCode.NOTFIPS)
    if isinstance(public, Key12) and public.fill:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "the fill of a KEY12 is not zero")
    return keys.check_properties(public)


def generate(
    tpm: Tpm,
    template: Key | Key12,
    *,
    usage_auth: bytes,
    migration_auth: bytes | None = None,
    payload: int = PayloadType.ASYM,
) -> LoadedKey:
    """Make a new key of a description that `check_properties` has passed.

    Args:
        tpm: The command's draft; its PCRs and locality go into the creation fields.
        template: The wanted description; its public and private parts are ignored.
        usage_auth: 20 bytes.
        migration_auth: 20 bytes; None: tpmProof, so that the key never leaves.
        payload: PayloadType of its private part.

    Returns:
        The key, with `public.enc_data` empty: see `wrapped`.

    Raises:
        DecodeError: The template's PCR binding is malformed.
    """
    parms = keys.rsa_parms(template.algorithm_parms)
    exponent = keys.exponent_of(template.algorithm_parms)
    binding = keys.pcr_info_of(template)
    bits = parms.key_length
    rsa = new_rsa_key(tpm.world.key_generator.primes(bits, exponent), exponent, bits)
    public = keys.described(
        template,
        pcr_info=encode(pcrs.filled_in(tpm, binding)) if binding is not None else b"",
        pub_key=rsa.public.modulus,
        enc_data=b"",
    )
    return LoadedKey(
        public,
        payload=payload,
        usage_auth=usage_auth,
        migration_auth=tpm.permanent.tpm_proof if migration_auth is None else migration_auth,
        prime=rsa.prime,
        parent_pcr_status=False,
    )


def wrapped(tpm: Tpm, parent: LoadedKey, key: LoadedKey) -> Key | Key12:
    """The key's description with its private part encrypted to the parent."""
    enc_data = encrypted_oaep(tpm, parent.rsa.public, encode(key.store_asymkey()))
    return keys.with_private(key.public, enc_data)


def decrypt_store_asymkey(parent: LoadedKey, enc_data: bytes) -> StoreAsymkey:
    """Decrypt the private part of a key.

    Raises:
        TpmError: DECRYPT_ERROR; INVALID_STRUCTURE when the plaintext is something else.
    """
    try:
        return decode(StoreAsymkey, parent.rsa.decrypt_oaep(enc_data))
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    except DecodeError as error:
        raise TpmError(ReturnCode.INVALID_STRUCTURE, "no TPM_STORE_ASYMKEY") from error


def unwrapped(tpm: Tpm, parent: LoadedKey, public: Key | Key12) -> LoadedKey:
    """Take in a key that is wrapped under `parent` (Part 3 §10.5, the checks of its actions).

    Raises:
        TpmError: INVALID_KEYUSAGE for a parent that is no storage key; BAD_KEY_PROPERTY, NOTFIPS;
            DECRYPT_ERROR, INVALID_STRUCTURE; BAD_PARAMETER when the prime does not fit the
            modulus; AUTHFAIL when the public part was altered; INVALID_KEYUSAGE for usages,
            flags or secrets that do not go together.
        DecodeError: The PCR binding is malformed.
    """
    if parent.usage != KeyUsage.STORAGE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    parms = check_properties(tpm, public)
    secrets = decrypt_store_asymkey(parent, public.enc_data)
    if 8 * len(public.pub_key) != parms.key_length:
        raise TpmError(ReturnCode.BAD_PARAMETER, "the modulus has another size than the key")
    key = LoadedKey(
        public,
        payload=secrets.payload,
        usage_auth=secrets.usage_auth,
        migration_auth=secrets.migration_auth,
        prime=secrets.priv_key,
        parent_pcr_status=parent.parent_pcr_status or is_bound_to_pcrs(parent),
    )
    try:
        _ = key.rsa
    except ValueError as error:
        raise TpmError(ReturnCode.BAD_PARAMETER, "the prime does not fit the modulus") from error
    if not is_same(secrets.pub_data_digest, key.pub_data_digest):
        raise TpmError(ReturnCode.AUTHFAIL, "the public part is not the one that was wrapped")
    _check_kind(tpm, key)
    return key


def _check_kind(tpm: Tpm, key: LoadedKey) -> None:
    """Check that payload, flags, usage and migration secret go together."""
    if key.payload in _CMK_PAYLOADS:
        if not isinstance(key.public, Key12):
            raise TpmError(ReturnCode.INVALID_STRUCTURE)
        if key.flags & _CMK_FLAGS != _CMK_FLAGS:
            raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    elif key.payload != PayloadType.ASYM:
        # Sealed data decrypts to the same layout as a key; only this byte tells them apart.
        raise TpmError(ReturnCode.INVALID_STRUCTURE)
    if key.usage == KeyUsage.AUTHCHANGE or (key.usage == KeyUsage.IDENTITY and key.is_migratable):
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if not key.is_migratable and not is_same(key.migration_auth, tpm.permanent.tpm_proof):
        raise TpmError(ReturnCode.INVALID_KEYUSAGE, "a non-migratable key of another TPM")


def is_bound_to_pcrs(key: LoadedKey) -> bool:
    """Does its own binding select any PCR?"""
    binding = key.pcr_info
    return binding is not None and bool(pcrs.release_selection(binding).indices)


def check_room(tpm: Tpm) -> None:
    """Check that a slot is free.

    Raises:
        TpmError: NOSPACE.
    """
    taken = len(tpm.volatile.keys) + len(tpm.permanent.owner_evict_keys)
    if taken >= tpm.world.profile.key_slots:
        raise TpmError(ReturnCode.NOSPACE)


def add_to_slots(tpm: Tpm, key: LoadedKey, handle: int | None = None) -> int:
    """Put a key into a free slot and give its handle.

    Args:
        tpm: The command's draft.
        key: The key.
        handle: The handle it gets, if that is free to have; None: a new one.

    Raises:
        TpmError: NOSPACE when every slot is taken.
    """
    check_room(tpm)
    loaded = tpm.volatile.keys
    if handle is None:
        handle = tpm.new_handle(loaded, tpm.permanent.owner_evict_keys)
    tpm.change_volatile().keys = {**loaded, handle: key}
    return handle


def remove_from_slots(tpm: Tpm, handle: int) -> None:
    """Take a key out of its slot and end the sessions bound to it."""
    volatile = tpm.change_volatile()
    volatile.keys = {h: key for h, key in volatile.keys.items() if h != handle}
    end_bound_sessions(tpm, EntityType.KEYHANDLE, handle)
