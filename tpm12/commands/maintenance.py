"""Maintenance functions (optional): TPM Main r116 Part 3, chapter 12.

The maker of a broken TPM moves its SRK to another one, with the owner's help and without learning
it. The way of the archive:

    archive = SRK, its private part encrypted to the maker's key     TPM_CreateMaintenanceArchive
    the maker decrypts that and encrypts it to the other TPM's SRK, and signs the result
    archive, [random], signature                                     TPM_LoadMaintenanceArchive

Leaves to others: how a key is hidden on its way (`tpm12.migration`), what a clear removes
(`tpm12.clearing`), whether a TPM offers these commands at all (the vTPM's configuration).

Invariants:
- An archive is believed only with the signature of the key that was there before the owner: or an
  owner could install an SRK whose private part is known, and call it this TPM's.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    AuthDataUsage,
    KeyUsage,
    Ordinal,
    PayloadType,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    AnyKey,
    Key,
    Key12,
    KeyParms,
    Pubkey,
    StoreAsymkey,
    StorePubkey,
)
from protocol.wire import Bool, Digest, Nonce, Sized, decode, encode, wire
from tpm12 import keys, migration, wrapping
from tpm12.authorization import Authorized
from tpm12.clearing import clear_owner
from tpm12.crypto import is_same, mgf1, sha1, xor
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.flags import set_flags
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

_OWNED: Final = Gate.USABLE | Gate.OWNED
_OWNER: Final = (AuthBy("owner"),)
_NO_KEY: Final = Pubkey(
    algorithm_parms=KeyParms(algorithm_id=0, enc_scheme=0, sig_scheme=0, parms=b""),
    pub_key=StorePubkey(key=b""),
)
"""What a platform's maker loads who offers no maintenance, so that nobody else ever can."""


# -- the maker's key -------------------------------------------------------------------------------


@wire
class LoadManuMaintPubIn:
    """§12.4 incoming operands."""

    anti_replay: Nonce
    pub_key: Pubkey


@wire
class ManuMaintPubOut:
    """§12.4 and §12.5 outgoing operands."""

    checksum: Digest


@command(
    Ordinal.LOAD_MANU_MAINT_PUB,
    name="LoadManuMaintPub",
    section="Part 3 §12.4",
    takes=LoadManuMaintPubIn,
    gives=ManuMaintPubOut,
)
def load_manu_maint_pub(tpm: Tpm, cmd: LoadManuMaintPubIn, _auth: Authorized) -> ManuMaintPubOut:
    """Install the maker's key, once, or a PUBKEY of zeros: none, for good.

    The actions let the first valid command pass; the description expects it before there is an
    owner, and without authorization it must be: or whoever comes first chooses who gets the SRK.

    Raises:
        TpmError: DISABLED_CMD the second time, and while there is an owner; BAD_KEY_PROPERTY for
            another key than RSA 2048 with OAEP.
    """
    if tpm.permanent.manu_maint_pub is not None or tpm.has_owner:
        raise TpmError(ReturnCode.DISABLED_CMD)
    if cmd.pub_key != _NO_KEY:
        _check_maintenance_key(cmd.pub_key)
    public = encode(cmd.pub_key)
    tpm.change_permanent().manu_maint_pub = public
    return ManuMaintPubOut(checksum=sha1(public, cmd.anti_replay))


def _check_maintenance_key(public: Pubkey) -> None:
    as_storage_key = Key(
        key_usage=KeyUsage.STORAGE,
        key_flags=0,
        auth_data_usage=AuthDataUsage.ALWAYS,
        algorithm_parms=public.algorithm_parms,
        pcr_info=b"",
        pub_key=b"",
        enc_data=b"",
    )
    parms = keys.check_properties(as_storage_key)
    if 8 * len(public.pub_key.key) != parms.key_length:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "the modulus has another size than the key")


@wire
class ReadManuMaintPubIn:
    """§12.5 incoming operands."""

    anti_replay: Nonce


@command(
    Ordinal.READ_MANU_MAINT_PUB,
    name="ReadManuMaintPub",
    section="Part 3 §12.5",
    takes=ReadManuMaintPubIn,
    gives=ManuMaintPubOut,
)
def read_manu_maint_pub(tpm: Tpm, cmd: ReadManuMaintPubIn, _auth: Authorized) -> ManuMaintPubOut:
    """Let anyone check which maker's key is installed, without telling it.

    Raises:
        TpmError: KEYNOTFOUND.
    """
    public = tpm.permanent.manu_maint_pub
    if public is None:
        raise TpmError(ReturnCode.KEYNOTFOUND)
    return ManuMaintPubOut(checksum=sha1(public, cmd.anti_replay))


def _maintenance_key(tpm: Tpm) -> Pubkey:
    stored = tpm.permanent.manu_maint_pub
    public = _NO_KEY if stored is None else decode(Pubkey, stored)
    if public == _NO_KEY:
        raise TpmError(ReturnCode.KEYNOTFOUND)
    return public


# -- the archive -----------------------------------------------------------------------------------


@wire
class CreateMaintenanceArchiveIn:
    """§12.1 incoming operands."""

    generate_random: Bool


@wire
class CreateMaintenanceArchiveOut:
    """§12.1 outgoing operands; `archive` is a KEY or KEY12."""

    random: Sized
    archive: Sized


@command(
    Ordinal.CREATE_MAINTENANCE_ARCHIVE,
    name="CreateMaintenanceArchive",
    section="Part 3 §12.1",
    takes=CreateMaintenanceArchiveIn,
    gives=CreateMaintenanceArchiveOut,
    gates=_OWNED,
    # Checked by the handler: whether there is maintenance at all comes first.
    sessions=(AuthBy("maintaining_owner"),),
)
def create_maintenance_archive(
    tpm: Tpm, cmd: CreateMaintenanceArchiveIn, auth: Authorized
) -> CreateMaintenanceArchiveOut:
    """Give the SRK out, encrypted to the maker and hidden from the maker.

    It is hidden with random bytes, or with what only who knows ownerAuth can compute.

    Raises:
        TpmError: DISABLED_CMD after TPM_KillMaintenanceFeature; AUTHFAIL; KEYNOTFOUND.
    """
    if not tpm.permanent.flags.allow_maintenance:
        raise TpmError(ReturnCode.DISABLED_CMD)
    auth.verify_owner("maintaining_owner")
    maker = _maintenance_key(tpm)
    permanent = tpm.permanent
    srk, owner_auth = permanent.srk, permanent.owner_auth
    assert srk is not None
    assert owner_auth is not None
    secrets = StoreAsymkey(
        payload=PayloadType.MAINT,
        usage_auth=permanent.tpm_proof,
        migration_auth=owner_auth,
        pub_data_digest=srk.pub_data_digest,
        priv_key=srk.prime,
    )
    block = migration.packed(secrets, PayloadType.MAINT, owner_auth)
    random = tpm.random(len(block)) if cmd.generate_random else b""
    mask = random or mgf1(owner_auth, len(block))
    enc_data = migration.encrypted_to(tpm, maker, xor(block, mask))
    set_flags(tpm, maintenance_done=True)
    archive = keys.with_private(srk.public, enc_data)
    return CreateMaintenanceArchiveOut(random=random, archive=encode(archive))


@wire
class LoadMaintenanceArchiveIn:
    """§12.2 incoming operands; what follows the archive is ours to choose.

    `archive` is a KEY or KEY12 whose private part is encrypted to this TPM's SRK. `random` is what
    TPM_CreateMaintenanceArchive gave out with it, or empty when the owners have one secret.
    `signature` is the maintenance key's, RSASSA-PKCS1-v1_5 over H(ordinal, archive).
    """

    archive: Sized
    random: Sized
    signature: Sized


@wire
class _Archive:
    """What is inside `archive`."""

    srk: AnyKey


@command(
    Ordinal.LOAD_MAINTENANCE_ARCHIVE,
    name="LoadMaintenanceArchive",
    section="Part 3 §12.2",
    takes=LoadMaintenanceArchiveIn,
    gates=_OWNED,
    sessions=_OWNER,
)
def load_maintenance_archive(tpm: Tpm, cmd: LoadMaintenanceArchiveIn, _auth: Authorized) -> None:
    """Become the TPM that an archive was made of: its SRK, its tpmProof, its owner.

    The SRK's secret becomes that owner's. Everything else goes as with TPM_OwnerClear, which
    disableOwnerClear forbids: so it forbids this too (libtpms clears all the same).

    Raises:
        TpmError: KEYNOTFOUND without a maker's key; BAD_SIGNATURE; DECRYPT_ERROR, BAD_PARAMETER,
            INVALID_STRUCTURE as `migration.received`; BAD_MIGRATION for a key on another journey;
            BAD_KEY_PROPERTY, NOTFIPS, INVALID_KEYUSAGE when it is no SRK; BAD_PARAMETER when the
            prime is not of the key; AUTHFAIL when the public part is not that of the archived key;
            CLEAR_DISABLED.
        DecodeError: The archive is no key.
    """
    signed = sha1(Ordinal.LOAD_MAINTENANCE_ARCHIVE.to_bytes(4, "big"), cmd.archive)
    if not keys.public_key_of(_maintenance_key(tpm)).is_signature(cmd.signature, signed):
        raise TpmError(ReturnCode.BAD_SIGNATURE)
    public = decode(_Archive, cmd.archive).srk
    owner_auth, srk = tpm.permanent.owner_auth, tpm.permanent.srk
    assert srk is not None
    assert owner_auth is not None
    hidden = migration.decrypted(srk, public.enc_data)
    secrets = migration.revealed(hidden, cmd.random or mgf1(owner_auth, len(hidden)))
    new_srk = _archived_srk(tpm, public, secrets)
    if tpm.permanent.flags.disable_owner_clear:
        raise TpmError(ReturnCode.CLEAR_DISABLED)
    clear_owner(tpm)
    permanent = tpm.change_permanent()
    permanent.srk = new_srk
    permanent.tpm_proof = secrets.usage_auth
    permanent.owner_auth = secrets.migration_auth
    set_flags(tpm, maintenance_done=True)


def _archived_srk(tpm: Tpm, public: Key | Key12, secrets: StoreAsymkey) -> LoadedKey:
    """Check an archived SRK and make it one; `secrets` is what `migration.revealed` gave."""
    if secrets.payload != PayloadType.MAINT:
        raise TpmError(ReturnCode.BAD_MIGRATION)
    wrapping.check_properties(tpm, public)
    key = LoadedKey(
        keys.with_private(public, b""),
        payload=PayloadType.ASYM,
        usage_auth=secrets.migration_auth,
        migration_auth=secrets.usage_auth,
        prime=secrets.priv_key,
        parent_pcr_status=False,
    )
    if key.usage != KeyUsage.STORAGE or key.is_migratable:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    try:
        _ = key.rsa
    except ValueError as error:
        raise TpmError(ReturnCode.BAD_PARAMETER, "the prime is not of this key") from error
    if not is_same(key.pub_data_digest, secrets.pub_data_digest):
        raise TpmError(ReturnCode.AUTHFAIL, "not the public part of the archived key")
    return key


@command(
    Ordinal.KILL_MAINTENANCE_FEATURE,
    name="KillMaintenanceFeature",
    section="Part 3 §12.3",
    gates=_OWNED,
    sessions=_OWNER,
)
def kill_maintenance_feature(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Forbid archives until there is another owner."""
    set_flags(tpm, allow_maintenance=False)
