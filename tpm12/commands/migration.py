"""Migration functions: TPM Main r116 Part 3, chapter 11.

Leaves to others: how a key is hidden on its way, tickets and approvals (`tpm12.migration`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Final

from protocol.constants import (
    DIGEST_BYTES,
    ZERO_DIGEST,
    AlgorithmId,
    EncScheme,
    KeyFlags,
    KeyUsage,
    MigrateScheme,
    Ordinal,
    PayloadType,
    SigScheme,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    AnyKey,
    CmkAuth,
    Key12,
    MigrationKeyAuth,
    MsaComposite,
    Pubkey,
    StoreAsymkey,
)
from protocol.wire import (
    U16,
    U32,
    Digest,
    EncAuth,
    Handle,
    Sized,
    decode,
    encode,
    in_sized,
    wire,
)
from tpm12 import keys, migration, wrapping
from tpm12.authorization import OIAP_ONLY, WITH_SHARED_SECRET, Authorized
from tpm12.crypto import RsaPrivateKey, hmac_key, is_same, sha1
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.encryption import encrypted_oaep
from tpm12.entities import opened_key
from tpm12.keys import SHA1_SIGNATURES, LoadedKey
from tpm12.tpm import Tpm

_GATES: Final = Gate.USABLE | Gate.OWNED
_OWNER: Final = (AuthBy("owner"),)
_CMK_FLAGS: Final = int(KeyFlags.MIGRATABLE | KeyFlags.MIGRATE_AUTHORITY)
_CMK_PAYLOADS: Final = frozenset({PayloadType.MIGRATE_RESTRICTED, PayloadType.MIGRATE_EXTERNAL})
SizedMsaComposite = Annotated[MsaComposite, in_sized(MsaComposite)]


def _require_storage(parent: LoadedKey) -> None:
    if parent.usage != KeyUsage.STORAGE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)


def _require_non_migratable(parent: LoadedKey) -> None:
    if parent.is_migratable:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE, "under a parent that may leave")


# -- migratable keys -------------------------------------------------------------------------------


@wire
class CreateMigrationBlobIn:
    """§11.1 incoming operands."""

    parent_handle: Handle
    migration_type: U16
    migration_key_auth: MigrationKeyAuth
    enc_data: Sized


@wire
class MigrationBlobOut:
    """§11.1 and §11.9 outgoing operands."""

    random: Sized
    out_data: Sized


@command(
    Ordinal.CREATE_MIGRATION_BLOB,
    name="CreateMigrationBlob",
    section="Part 3 §11.1",
    takes=CreateMigrationBlobIn,
    gives=MigrationBlobOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", may_drop=1), AuthBy("entity", OIAP_ONLY)),
)
def create_migration_blob(
    tpm: Tpm, cmd: CreateMigrationBlobIn, auth: Authorized
) -> MigrationBlobOut:
    """Send a migratable key to a destination that the owner authorized.

    MIGRATE hides it for TPM_ConvertMigrationBlob, REWRAP wraps it for TPM_LoadKey.

    Raises:
        TpmError: INVALID_KEYUSAGE; DECRYPT_ERROR, INVALID_STRUCTURE; BAD_MIGRATION for a certified
            migratable key; AUTH2FAIL for the key's migration secret; AUTHFAIL for a destination
            that is not authorized; BAD_PARAMETER for another scheme, BAD_MODE for one that the
            owner did not authorize; what `migration.encrypted_to` says.
    """
    parent = auth.key("parent_handle")
    _require_storage(parent)
    secrets = opened_key(parent, cmd.enc_data)
    if secrets.payload != PayloadType.ASYM:
        raise TpmError(ReturnCode.BAD_MIGRATION)
    auth.verify("entity", hmac_key(secrets.migration_auth), None)
    authorized = cmd.migration_key_auth
    migration.check_authorization(tpm, authorized)
    if cmd.migration_type not in {MigrateScheme.MIGRATE, MigrateScheme.REWRAP}:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    # The owner authorized one scheme. The specification leaves the comparison out here and has it,
    # with this code, in TPM_CMK_CreateBlob; libtpms takes either scheme for the other.
    if cmd.migration_type != authorized.migration_scheme:
        raise TpmError(ReturnCode.BAD_MODE)
    destination = authorized.migration_key
    if cmd.migration_type == MigrateScheme.REWRAP:
        rewrapped = migration.encrypted_to(tpm, destination, encode(secrets))
        return MigrationBlobOut(random=b"", out_data=rewrapped)
    block = migration.packed(secrets, PayloadType.MIGRATE, secrets.migration_auth)
    random, out_data = migration.sent(tpm, block, destination)
    return MigrationBlobOut(random=random, out_data=out_data)


@wire
class ConvertMigrationBlobIn:
    """§11.2 incoming operands."""

    parent_handle: Handle
    in_data: Sized
    random: Sized


@wire
class OutDataOut:
    """§11.2, §11.4 and §11.10 outgoing operands."""

    out_data: Sized


@command(
    Ordinal.CONVERT_MIGRATION_BLOB,
    name="ConvertMigrationBlob",
    section="Part 3 §11.2",
    takes=ConvertMigrationBlobIn,
    gives=OutDataOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", may_drop=1),),
)
def convert_migration_blob(tpm: Tpm, cmd: ConvertMigrationBlobIn, auth: Authorized) -> OutDataOut:
    """Turn a key that arrived into the private part of a key under its new parent.

    Raises:
        TpmError: INVALID_KEYUSAGE; DECRYPT_ERROR, BAD_PARAMETER, INVALID_STRUCTURE as
            `migration.received`; BAD_MIGRATION for a certified migratable key or an archive.
    """
    parent = auth.key("parent_handle")
    _require_storage(parent)
    arrived = migration.received(parent, cmd.in_data, cmd.random)
    if arrived.payload != PayloadType.MIGRATE:
        raise TpmError(ReturnCode.BAD_MIGRATION)
    return OutDataOut(out_data=_wrapped(tpm, parent, replace(arrived, payload=PayloadType.ASYM)))


def _wrapped(tpm: Tpm, parent: LoadedKey, secrets: StoreAsymkey) -> bytes:
    # What arrived under this parent carried 5 bytes more, so that it fits is certain.
    return encrypted_oaep(tpm, parent.rsa.public, encode(secrets))


@wire
class AuthorizeMigrationKeyIn:
    """§11.3 incoming operands."""

    migration_scheme: U16
    migration_key: Pubkey


@wire
class AuthorizeMigrationKeyOut:
    """§11.3 outgoing operands."""

    out_data: MigrationKeyAuth


@command(
    Ordinal.AUTHORIZE_MIGRATION_KEY,
    name="AuthorizeMigrationKey",
    section="Part 3 §11.3",
    takes=AuthorizeMigrationKeyIn,
    gives=AuthorizeMigrationKeyOut,
    gates=_GATES,
    # Checked by the handler: the strength of the key comes first.
    sessions=(AuthBy("authorizing_owner"),),
)
def authorize_migration_key(
    tpm: Tpm, cmd: AuthorizeMigrationKeyIn, auth: Authorized
) -> AuthorizeMigrationKeyOut:
    """Let users migrate keys to a destination without asking the owner again.

    Raises:
        TpmError: BAD_KEY_PROPERTY for a key that is too weak; AUTHFAIL; INAPPROPRIATE_ENC for
            another encryption scheme than OAEP.
    """
    migration.check_strength(cmd.migration_key)
    auth.verify_owner("authorizing_owner")
    if cmd.migration_key.algorithm_parms.enc_scheme != EncScheme.RSAESOAEP_SHA1_MGF1:
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
    return AuthorizeMigrationKeyOut(
        out_data=migration.authorization(tpm, cmd.migration_key, cmd.migration_scheme)
    )


@wire
class MigrateKeyIn:
    """§11.4 incoming operands."""

    ma_key_handle: Handle
    pub_key: Pubkey
    in_data: Sized


@command(
    Ordinal.MIGRATE_KEY,
    name="MigrateKey",
    section="Part 3 §11.4",
    takes=MigrateKeyIn,
    gives=OutDataOut,
    gates=_GATES,
    sessions=(AuthBy("ma_key_handle", may_drop=1),),
)
def migrate_key(tpm: Tpm, cmd: MigrateKeyIn, auth: Authorized) -> OutDataOut:
    """Pass a key on its way on to the next destination, as a migration authority.

    Raises:
        TpmError: INVALID_KEYUSAGE for any key but a migration key; DECRYPT_ERROR; what
            `migration.encrypted_to` says.
    """
    ma_key = auth.key("ma_key_handle")
    if ma_key.usage != KeyUsage.MIGRATE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    hidden = migration.decrypted(ma_key, cmd.in_data)
    return OutDataOut(out_data=migration.encrypted_to(tpm, cmd.pub_key, hidden))


# -- certified migratable keys: owner and authorities ----------------------------------------------


@wire
class CmkSetRestrictionsIn:
    """§11.5 incoming operands: bits of TPM_CMK_DELEGATE (Part 2 §5.17)."""

    restriction: U32


@command(
    Ordinal.CMK_SET_RESTRICTIONS,
    name="CMK_SetRestrictions",
    section="Part 3 §11.5",
    takes=CmkSetRestrictionsIn,
    gates=_GATES,
    sessions=_OWNER,
)
def cmk_set_restrictions(tpm: Tpm, cmd: CmkSetRestrictionsIn, _auth: Authorized) -> None:
    """Say which kinds of certified migratable keys a delegate may use; not delegatable itself."""
    if tpm.permanent.restrict_delegate != cmd.restriction:
        tpm.change_permanent().restrict_delegate = cmd.restriction


@wire
class CmkApproveMaIn:
    """§11.6 incoming operands: the digest of a TPM_MSA_COMPOSITE."""

    migration_authority_digest: Digest


@wire
class CmkApproveMaOut:
    """§11.6 outgoing operands."""

    out_data: Digest


@command(
    Ordinal.CMK_APPROVE_MA,
    name="CMK_ApproveMA",
    section="Part 3 §11.6",
    takes=CmkApproveMaIn,
    gives=CmkApproveMaOut,
    gates=_GATES,
    sessions=_OWNER,
)
def cmk_approve_ma(tpm: Tpm, cmd: CmkApproveMaIn, _auth: Authorized) -> CmkApproveMaOut:
    """Let users make keys that these migration authorities control."""
    return CmkApproveMaOut(out_data=migration.approval(tpm, cmd.migration_authority_digest))


@wire
class CmkCreateTicketIn:
    """§11.8 incoming operands."""

    verification_key: Pubkey
    signed_data: Digest
    signature_value: Sized


@wire
class CmkCreateTicketOut:
    """§11.8 outgoing operands."""

    sig_ticket: Digest


@command(
    Ordinal.CMK_CREATE_TICKET,
    name="CMK_CreateTicket",
    section="Part 3 §11.8",
    takes=CmkCreateTicketIn,
    gives=CmkCreateTicketOut,
    gates=_GATES,
    sessions=_OWNER,
)
def cmk_create_ticket(tpm: Tpm, cmd: CmkCreateTicketIn, _auth: Authorized) -> CmkCreateTicketOut:
    """Check a signature and give a ticket that this TPM will take for the signature.

    Raises:
        TpmError: BAD_KEY_PROPERTY when it is no RSA key; INAPPROPRIATE_ENC when it is one that
            encrypts; INVALID_KEYUSAGE for another scheme than SHA1 and INFO; BAD_SIGNATURE.
    """
    parms = cmd.verification_key.algorithm_parms
    if parms.algorithm_id != AlgorithmId.RSA:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY)
    if parms.enc_scheme != EncScheme.NONE:
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
    if parms.sig_scheme not in SHA1_SIGNATURES:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if not keys.public_key_of(cmd.verification_key).is_signature(
        cmd.signature_value, cmd.signed_data
    ):
        raise TpmError(ReturnCode.BAD_SIGNATURE)
    ver_key_digest = migration.pubkey_digest(cmd.verification_key)
    return CmkCreateTicketOut(sig_ticket=migration.sig_ticket(tpm, ver_key_digest, cmd.signed_data))


# -- certified migratable keys: the keys -----------------------------------------------------------


@wire
class CmkCreateKeyIn:
    """§11.7 incoming operands; `key_info` must be a KEY12."""

    parent_handle: Handle
    data_usage_auth: EncAuth
    key_info: AnyKey
    migration_authority_approval: Digest
    migration_authority_digest: Digest


@wire
class CmkCreateKeyOut:
    """§11.7 outgoing operands."""

    wrapped_key: Key12


@command(
    Ordinal.CMK_CREATE_KEY,
    name="CMK_CreateKey",
    section="Part 3 §11.7",
    takes=CmkCreateKeyIn,
    gives=CmkCreateKeyOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", WITH_SHARED_SECRET),),
)
def cmk_create_key(tpm: Tpm, cmd: CmkCreateKeyIn, auth: Authorized) -> CmkCreateKeyOut:
    """Make a key that migrates only where its authorities let it.

    Raises:
        TpmError: BAD_KEY_PROPERTY, NOTFIPS; INVALID_KEYUSAGE for a parent that is migratable or not
            for storage, for flags other than migratable and migrateAuthority both, and for kinds
            of keys that other commands make; MA_AUTHORITY when the owner did not approve the
            authorities; INVALID_STRUCTURE for a KEY of 1.1 age.
        DecodeError: The PCR binding is malformed.
    """
    wanted = cmd.key_info
    wrapping.check_properties(tpm, wanted)
    parent = auth.key("parent_handle")
    _require_storage(parent)
    _require_non_migratable(parent)
    if wanted.key_flags & _CMK_FLAGS != _CMK_FLAGS:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    authorities = cmd.migration_authority_digest
    if not is_same(migration.approval(tpm, authorities), cmd.migration_authority_approval):
        raise TpmError(ReturnCode.MA_AUTHORITY)
    if wanted.key_usage in {KeyUsage.IDENTITY, KeyUsage.AUTHCHANGE}:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if not isinstance(wanted, Key12):
        raise TpmError(ReturnCode.INVALID_STRUCTURE)
    key = wrapping.generate(
        tpm,
        wanted,
        usage_auth=auth.decrypt_secret("parent_handle", cmd.data_usage_auth),
        migration_auth=ZERO_DIGEST,
        payload=PayloadType.MIGRATE_RESTRICTED,
    )
    # What binds it to its authorities hashes its public part, so it is known only now.
    digest = migration.pubkey_digest(key.pubkey())
    bound = key.with_migration_auth(migration.migration_auth(tpm, authorities, digest))
    wrapped = wrapping.wrapped(tpm, parent, bound)
    assert isinstance(wrapped, Key12)
    return CmkCreateKeyOut(wrapped_key=wrapped)


@wire
class CmkCreateBlobIn:
    """§11.9 incoming operands; `restrict_ticket` is empty or a CmkAuth, `sig_ticket` or an HMAC."""

    parent_handle: Handle
    migration_type: U16
    migration_key_auth: MigrationKeyAuth
    pub_source_key_digest: Digest
    msa_list: SizedMsaComposite
    restrict_ticket: Sized
    sig_ticket: Sized
    enc_data: Sized


@command(
    Ordinal.CMK_CREATE_BLOB,
    name="CMK_CreateBlob",
    section="Part 3 §11.9",
    takes=CmkCreateBlobIn,
    gives=MigrationBlobOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle"),),
)
def cmk_create_blob(tpm: Tpm, cmd: CmkCreateBlobIn, auth: Authorized) -> MigrationBlobOut:
    """Send a certified migratable key to an authority, or where an authority lets it go.

    Raises:
        TpmError: BAD_MODE for another scheme than the authorized one; INVALID_KEYUSAGE;
            DECRYPT_ERROR; AUTHFAIL for a destination that the owner did not authorize;
            INVALID_STRUCTURE for a key that is not certified; MA_AUTHORITY when it belongs to
            other authorities; what the two schemes check; BAD_PARAMETER for other schemes.
    """
    authorized = cmd.migration_key_auth
    if cmd.migration_type != authorized.migration_scheme:
        raise TpmError(ReturnCode.BAD_MODE)
    parent = auth.key("parent_handle")
    _require_non_migratable(parent)
    _require_storage(parent)
    secrets = opened_key(parent, cmd.enc_data)
    migration.check_authorization(tpm, authorized)
    if secrets.payload not in _CMK_PAYLOADS:
        raise TpmError(ReturnCode.INVALID_STRUCTURE)
    msa_digest = sha1(encode(cmd.msa_list))
    bound = migration.migration_auth(tpm, msa_digest, cmd.pub_source_key_digest)
    if not is_same(secrets.migration_auth, bound):
        raise TpmError(ReturnCode.MA_AUTHORITY)
    if authorized.migration_scheme == MigrateScheme.RESTRICT_MIGRATE:
        _check_goes_to_authority(cmd)
    elif authorized.migration_scheme == MigrateScheme.RESTRICT_APPROVE:
        _check_goes_where_approved(tpm, cmd)
    else:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    p_hash = sha1(msa_digest, cmd.pub_source_key_digest)
    block = migration.packed(secrets, PayloadType.CMK_MIGRATE, p_hash)
    random, out_data = migration.sent(tpm, block, authorized.migration_key)
    return MigrationBlobOut(random=random, out_data=out_data)


def _check_goes_to_authority(cmd: CmkCreateBlobIn) -> None:
    """Check the destination of RESTRICT_MIGRATE (§11.9, action 8)."""
    destination = cmd.migration_key_auth.migration_key
    migration.check_is_authority(destination, cmd.msa_list.mig_auth_digest)
    parms = destination.algorithm_parms
    if parms.algorithm_id != AlgorithmId.RSA:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY)
    if parms.enc_scheme != EncScheme.RSAESOAEP_SHA1_MGF1:
        raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
    if parms.sig_scheme != SigScheme.NONE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if cmd.restrict_ticket or cmd.sig_ticket:
        raise TpmError(ReturnCode.BAD_PARAMETER, "this scheme has no tickets")


def _check_goes_where_approved(tpm: Tpm, cmd: CmkCreateBlobIn) -> None:
    """Check the destination of RESTRICT_APPROVE (§11.9, action 9)."""
    if len(cmd.sig_ticket) != DIGEST_BYTES:
        raise TpmError(ReturnCode.BAD_PARAM_SIZE, "sigTicket is no HMAC")
    migration.check_sig_ticket(tpm, cmd.sig_ticket, cmd.msa_list, cmd.restrict_ticket)
    ticket = decode(CmkAuth, cmd.restrict_ticket)
    destination = migration.pubkey_digest(cmd.migration_key_auth.migration_key)
    if ticket.destination_key_digest != destination:
        raise TpmError(ReturnCode.MA_DESTINATION)
    if ticket.source_key_digest != cmd.pub_source_key_digest:
        raise TpmError(ReturnCode.MA_SOURCE)


@wire
class CmkConvertMigrationIn:
    """§11.10 incoming operands; `migrated_key.enc_data` is the key as it arrived."""

    parent_handle: Handle
    restrict_ticket: CmkAuth
    sig_ticket: Digest
    migrated_key: Key12
    msa_list: SizedMsaComposite
    random: Sized


@command(
    Ordinal.CMK_CONVERT_MIGRATION,
    name="CMK_ConvertMigration",
    section="Part 3 §11.10",
    takes=CmkConvertMigrationIn,
    gives=OutDataOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle"),),
)
def cmk_convert_migration(tpm: Tpm, cmd: CmkConvertMigrationIn, auth: Authorized) -> OutDataOut:
    """Take in a certified migratable key that an authority let come here.

    Raises:
        TpmError: INVALID_KEYUSAGE for a parent that is not for storage; DECRYPT_ERROR,
            BAD_PARAMETER, INVALID_STRUCTURE as `migration.received`; AUTHFAIL for other
            authorities or another key than it left with; INVALID_KEYUSAGE for a migratable parent;
            BAD_MIGRATION for a key that was not certified; MA_TICKET_SIGNATURE; MA_DESTINATION for
            another parent than approved; BAD_PARAMETER for a prime that is not of the key;
            INVALID_KEYUSAGE for flags of another kind of key; MA_SOURCE for another key than
            approved.
    """
    parent, migrated = auth.key("parent_handle"), cmd.migrated_key
    _require_storage(parent)
    arrived = migration.received(parent, migrated.enc_data, cmd.random)
    source_digest = migration.pubkey_digest(keys.pubkey_of(migrated))
    msa_digest = sha1(encode(cmd.msa_list))
    if not is_same(arrived.migration_auth, sha1(msa_digest, source_digest)):
        raise TpmError(ReturnCode.AUTHFAIL, "another key, or of other authorities")
    _require_non_migratable(parent)
    if arrived.payload != PayloadType.CMK_MIGRATE:
        raise TpmError(ReturnCode.BAD_MIGRATION)
    ticket = cmd.restrict_ticket
    migration.check_sig_ticket(tpm, cmd.sig_ticket, cmd.msa_list, encode(ticket))
    if ticket.destination_key_digest != migration.pubkey_digest(parent.pubkey()):
        raise TpmError(ReturnCode.MA_DESTINATION)
    exponent = keys.exponent_of(migrated.algorithm_parms)
    try:
        RsaPrivateKey.from_prime(migrated.pub_key, arrived.priv_key, exponent)
    except ValueError as error:
        raise TpmError(ReturnCode.BAD_PARAMETER, "the prime is not of this key") from error
    if migrated.key_flags & _CMK_FLAGS != _CMK_FLAGS:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if ticket.source_key_digest != source_digest:
        raise TpmError(ReturnCode.MA_SOURCE)
    secrets = replace(
        arrived,
        payload=PayloadType.MIGRATE_EXTERNAL,
        migration_auth=migration.migration_auth(tpm, msa_digest, source_digest),
    )
    return OutDataOut(out_data=_wrapped(tpm, parent, secrets))
