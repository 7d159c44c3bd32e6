"""Endorsement key and identities: TPM Main r116 Part 3, chapters 14 and 15, and 27.6, 27.7.

Leaves to others: how keys are made and wrapped (`tpm12.wrapping`), what revoking trust removes
(`tpm12.clearing`).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    ZERO_DIGEST,
    AuthDataUsage,
    EncScheme,
    KeyFlags,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    PayloadType,
    SigScheme,
    StructureTag,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import (
    AnyKey,
    AsymCaContents,
    EkBlob,
    EkBlobActivate,
    IdentityContents,
    Key,
    KeyParms,
    Pubkey,
    SymmetricKey,
)
from protocol.wire import U32, Bool, Digest, EncAuth, Handle, Nonce, Sized, decode, encode, wire
from tpm12 import key_use, keys, pcrs, wrapping
from tpm12.authorization import (
    WITH_SHARED_SECRET,
    Authorized,
    check_key_use,
)
from tpm12.clearing import renew_daa_secrets, revoke_trust
from tpm12.crypto import DecryptionError, is_same, sha1
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.flags import set_flags
from tpm12.keys import STORAGE_KEY_BITS, LoadedKey
from tpm12.tpm import Tpm

_OWNED: Final = Gate.USABLE | Gate.OWNED
_OWNER: Final = (AuthBy("owner"),)
EK_TYPE_ACTIVATE: Final = 0x0001
"""TPM_EK_TYPE (Part 2 §4.11)."""


# -- chapter 14: endorsement key -------------------------------------------------------------------


@wire
class CreateEndorsementKeyPairIn:
    """§14.1 incoming operands."""

    anti_replay: Nonce
    key_info: KeyParms


@wire
class PubekOut:
    """§14.1 and §14.4 outgoing operands."""

    pub_endorsement_key: Pubkey
    checksum: Digest


@command(
    Ordinal.CREATE_ENDORSEMENT_KEY_PAIR,
    name="CreateEndorsementKeyPair",
    section="Part 3 §14.1",
    takes=CreateEndorsementKeyPairIn,
    gives=PubekOut,
)
def create_endorsement_key_pair(
    tpm: Tpm, cmd: CreateEndorsementKeyPairIn, _auth: Authorized
) -> PubekOut:
    """Make the endorsement key, for good.

    Raises:
        TpmError: DISABLED_CMD when there is one; BAD_KEY_PROPERTY.
    """
    public = _make_endorsement_key(tpm, cmd.key_info)
    set_flags(tpm, cekp_used=True, enable_revoke_ek=False)
    return _with_checksum(public, cmd.anti_replay)


@wire
class CreateRevocableEkIn:
    """§14.2 incoming operands."""

    anti_replay: Nonce
    key_info: KeyParms
    generate_reset: Bool
    input_ek_reset: Nonce


@wire
class CreateRevocableEkOut:
    """§14.2 outgoing operands."""

    pub_endorsement_key: Pubkey
    checksum: Digest
    output_ek_reset: Nonce


@command(
    Ordinal.CREATE_REVOCABLE_EK,
    name="CreateRevocableEK",
    section="Part 3 §14.2",
    takes=CreateRevocableEkIn,
    gives=CreateRevocableEkOut,
)
def create_revocable_ek(
    tpm: Tpm, cmd: CreateRevocableEkIn, _auth: Authorized
) -> CreateRevocableEkOut:
    """Make an endorsement key that TPM_RevokeTrust may remove, and tell the password for that.

    Raises:
        TpmError: DISABLED_CMD when there is one; BAD_KEY_PROPERTY.
    """
    public = _make_endorsement_key(tpm, cmd.key_info)
    ek_reset = tpm.random(len(cmd.input_ek_reset)) if cmd.generate_reset else cmd.input_ek_reset
    tpm.change_permanent().ek_reset = ek_reset
    set_flags(tpm, cekp_used=True, enable_revoke_ek=True)
    checked = _with_checksum(public, cmd.anti_replay)
    return CreateRevocableEkOut(
        pub_endorsement_key=public, checksum=checked.checksum, output_ek_reset=ek_reset
    )


def _make_endorsement_key(tpm: Tpm, key_info: KeyParms) -> Pubkey:
    if tpm.permanent.endorsement_key is not None:
        raise TpmError(ReturnCode.DISABLED_CMD)
    parms = keys.rsa_parms(key_info)
    if (
        parms.key_length != STORAGE_KEY_BITS
        or parms.num_primes != 2
        or keys.exponent_of(key_info) not in keys.EXPONENTS
    ):
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "an EK has 2048 bits and two primes")
    template = Key(
        key_usage=KeyUsage.STORAGE,
        key_flags=0,
        auth_data_usage=AuthDataUsage.ALWAYS,
        # The specification ignores the caller's schemes and tells these (libtpms refuses others).
        algorithm_parms=KeyParms(
            algorithm_id=key_info.algorithm_id,
            enc_scheme=EncScheme.RSAESOAEP_SHA1_MGF1,
            sig_scheme=SigScheme.NONE,
            parms=key_info.parms,
        ),
        pcr_info=b"",
        pub_key=b"",
        enc_data=b"",
    )
    key = wrapping.generate(
        tpm, template, usage_auth=ZERO_DIGEST, migration_auth=ZERO_DIGEST, payload=PayloadType.ASYM
    )
    tpm.change_permanent().endorsement_key = key
    renew_daa_secrets(tpm)
    return key.pubkey()


def _with_checksum(public: Pubkey, anti_replay: bytes) -> PubekOut:
    return PubekOut(pub_endorsement_key=public, checksum=sha1(encode(public), anti_replay))


@wire
class RevokeTrustIn:
    """§14.3 incoming operands."""

    ek_reset: Nonce


@command(Ordinal.REVOKE_TRUST, name="RevokeTrust", section="Part 3 §14.3", takes=RevokeTrustIn)
def revoke_trust_command(tpm: Tpm, cmd: RevokeTrustIn, _auth: Authorized) -> None:
    """Clear the TPM and remove its endorsement key.

    Raises:
        TpmError: PERMANENTEK; AUTHFAIL for another EKReset, also when there is no EK that one was
            ever set for; BAD_PRESENCE.
    """
    permanent = tpm.permanent
    if not permanent.flags.enable_revoke_ek:
        raise TpmError(ReturnCode.PERMANENTEK)
    if permanent.endorsement_key is None or not is_same(permanent.ek_reset, cmd.ek_reset):
        raise TpmError(ReturnCode.AUTHFAIL, "not the EKReset of this EK")
    tpm.require_presence()
    revoke_trust(tpm)


@wire
class ReadPubekIn:
    """§14.4 incoming operands."""

    anti_replay: Nonce


@command(
    Ordinal.READ_PUBEK,
    name="ReadPubek",
    section="Part 3 §14.4",
    takes=ReadPubekIn,
    gives=PubekOut,
)
def read_pubek(tpm: Tpm, cmd: ReadPubekIn, _auth: Authorized) -> PubekOut:
    """Tell the public endorsement key to anyone, until the TPM is owned.

    Raises:
        TpmError: DISABLED_CMD, NO_ENDORSEMENT.
    """
    if not tpm.permanent.flags.read_pubek:
        raise TpmError(ReturnCode.DISABLED_CMD)
    return _with_checksum(_endorsement_key(tpm).pubkey(), cmd.anti_replay)


@wire
class OwnerReadPubekOut:
    """§27.6 outgoing operands."""

    pub_endorsement_key: Pubkey


@command(
    Ordinal.OWNER_READ_PUBEK,
    name="OwnerReadPubek",
    section="Part 3 §27.6",
    gives=OwnerReadPubekOut,
    gates=_OWNED,
    sessions=_OWNER,
)
def owner_read_pubek(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> OwnerReadPubekOut:
    """Tell the owner the public endorsement key (of 1.1 age).

    Raises:
        TpmError: NO_ENDORSEMENT.
    """
    return OwnerReadPubekOut(pub_endorsement_key=_endorsement_key(tpm).pubkey())


@command(
    Ordinal.DISABLE_PUBEK_READ,
    name="DisablePubekRead",
    section="Part 3 §27.7",
    gates=_OWNED,
    sessions=_OWNER,
)
def disable_pubek_read(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Forbid TPM_ReadPubek (of 1.1 age)."""
    set_flags(tpm, read_pubek=False)


@wire
class OwnerReadInternalPubIn:
    """§14.5 incoming operands; this handle is part of what the owner signs."""

    key_handle: U32


@wire
class OwnerReadInternalPubOut:
    """§14.5 outgoing operands."""

    public_portion: Pubkey


@command(
    Ordinal.OWNER_READ_INTERNAL_PUB,
    name="OwnerReadInternalPub",
    section="Part 3 §14.5",
    takes=OwnerReadInternalPubIn,
    gives=OwnerReadInternalPubOut,
    gates=_OWNED,
    sessions=_OWNER,
)
def owner_read_internal_pub(
    tpm: Tpm, cmd: OwnerReadInternalPubIn, _auth: Authorized
) -> OwnerReadInternalPubOut:
    """Tell the owner the public part of EK or SRK.

    Raises:
        TpmError: BAD_PARAMETER for any other handle.
    """
    if cmd.key_handle == KeyHandleValue.EK:
        key = _endorsement_key(tpm)
    elif cmd.key_handle == KeyHandleValue.SRK:
        key = tpm.key(KeyHandleValue.SRK)
    else:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    return OwnerReadInternalPubOut(public_portion=key.pubkey())


def _endorsement_key(tpm: Tpm) -> LoadedKey:
    key = tpm.permanent.endorsement_key
    if key is None:
        raise TpmError(ReturnCode.NO_ENDORSEMENT)
    return key


# -- chapter 15: identities ------------------------------------------------------------------------


@wire
class MakeIdentityIn:
    """§15.1 incoming operands; `identity_auth` is masked under the owner's session."""

    identity_auth: EncAuth
    label_priv_ca_digest: Digest
    id_key_params: AnyKey


@wire
class MakeIdentityOut:
    """§15.1 outgoing operands."""

    id_key: AnyKey
    identity_binding: Sized


@command(
    Ordinal.MAKE_IDENTITY,
    name="MakeIdentity",
    section="Part 3 §15.1",
    takes=MakeIdentityIn,
    gives=MakeIdentityOut,
    gates=_OWNED,
    # Both are checked by the handler: the owner, whose block is the last, comes first.
    sessions=(AuthBy("srk", may_drop=1), AuthBy("identity_owner", WITH_SHARED_SECRET)),
)
def make_identity(tpm: Tpm, cmd: MakeIdentityIn, auth: Authorized) -> MakeIdentityOut:
    """Make an identity key under the SRK, and let it sign what it is.

    Raises:
        TpmError: BAD_KEY_PROPERTY, NOTFIPS; AUTH2FAIL for the owner's session, also when it is
            the only one; AUTHFAIL for the SRK's; INVALID_KEYUSAGE for another usage or a
            migratable key.
    """
    wrapping.check_properties(tpm, cmd.id_key_params)
    auth.verify_owner("identity_owner")
    srk = tpm.key(KeyHandleValue.SRK)
    key_use.authorize(auth, "srk", srk)
    params = cmd.id_key_params
    if params.key_usage != KeyUsage.IDENTITY or params.key_flags & KeyFlags.MIGRATABLE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    usage_auth = auth.decrypt_secret("identity_owner", cmd.identity_auth)
    auth.end_all()
    key = wrapping.generate(tpm, params, usage_auth=usage_auth)
    contents = IdentityContents(
        label_priv_ca_digest=cmd.label_priv_ca_digest, identity_pub_key=key.pubkey()
    )
    return MakeIdentityOut(
        id_key=wrapping.wrapped(tpm, srk, key),
        identity_binding=key.rsa.sign_sha1(sha1(encode(contents))),
    )


@wire
class ActivateIdentityIn:
    """§15.2 incoming operands."""

    id_key_handle: Handle
    blob: Sized


@wire
class ActivateIdentityOut:
    """§15.2 outgoing operands."""

    symmetric_key: SymmetricKey


@command(
    Ordinal.ACTIVATE_IDENTITY,
    name="ActivateIdentity",
    section="Part 3 §15.2",
    takes=ActivateIdentityIn,
    gives=ActivateIdentityOut,
    gates=_OWNED,
    # The owner's is checked first; the key's, which the handler checks, comes first in the request.
    # The first block failing is AUTHFAIL, the second AUTH2FAIL; libtpms has them swapped.
    sessions=(AuthBy("identity", may_drop=1), AuthBy("owner")),
)
def activate_identity(tpm: Tpm, cmd: ActivateIdentityIn, auth: Authorized) -> ActivateIdentityOut:
    """Decrypt what a CA encrypted to this TPM's EK, if it names this identity key.

    Raises:
        TpmError: INVALID_KEYHANDLE; WRONGPCRVAL, BAD_LOCALITY for the key; AUTHFAIL; BAD_PARAMETER
            for a key that is no identity key, or not the named one; DECRYPT_ERROR; BAD_TYPE;
            WRONGPCRVAL, BAD_LOCALITY when the CA asked for that.
        DecodeError: The plaintext is malformed.
    """
    key = tpm.key(cmd.id_key_handle)
    check_key_use(tpm, key, reads_only=False)
    key_use.authorize(auth, "identity", key)
    if key.usage != KeyUsage.IDENTITY:
        raise TpmError(ReturnCode.BAD_PARAMETER, "no identity key")
    try:
        plaintext = _endorsement_key(tpm).rsa.decrypt_oaep(cmd.blob)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    contents: AsymCaContents | EkBlobActivate
    # The form of 1.1 age has no tag: it begins with an algorithm of four bytes.
    if plaintext[:2] == StructureTag.EK_BLOB.to_bytes(2, "big"):
        contents = _activation_in(decode(EkBlob, plaintext))
    else:
        contents = decode(AsymCaContents, plaintext)
    if not is_same(contents.id_digest, sha1(encode(key.pubkey()))):
        raise TpmError(ReturnCode.BAD_PARAMETER, "another identity")
    if isinstance(contents, EkBlobActivate):
        pcrs.check_release(tpm, contents.pcr_info)
    return ActivateIdentityOut(symmetric_key=contents.session_key)


def _activation_in(blob: EkBlob) -> EkBlobActivate:
    if blob.ek_type != EK_TYPE_ACTIVATE:
        raise TpmError(ReturnCode.BAD_TYPE)
    return decode(EkBlobActivate, blob.blob)
