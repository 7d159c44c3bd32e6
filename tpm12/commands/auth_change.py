"""Changing AuthData: TPM Main r116 Part 3, chapter 17, and §27.4 (deprecated).

A secret inside a key or sealed data is changed by giving out a new blob. The old one stays good, so
whoever wants to be rid of the old secret has to destroy it.

Leaves to others: blobs (`tpm12.entities`), keys (`tpm12.wrapping`), certificates
(`tpm12.certification`).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import (
    DIGEST_BYTES,
    ZERO_DIGEST,
    AuthDataUsage,
    EntityType,
    KeyFlags,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    ProtocolId,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import Key, KeyParms
from protocol.wire import (
    U16,
    U32,
    Digest,
    EncAuth,
    Handle,
    Nonce,
    SecretAuth,
    Sized,
    decode,
    encode,
    wire,
)
from tpm12 import certification, contexts, entities, key_use, keys, wrapping
from tpm12.authorization import (
    OIAP_ONLY,
    WITH_SHARED_SECRET,
    Authorized,
    check_key_use,
    end_bound_sessions,
    key_entity,
)
from tpm12.certification import CertifyInfo
from tpm12.crypto import DecryptionError, hmac_key, hmac_sha1, is_same, sha1
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

_GATES: Final = Gate.USABLE | Gate.OWNED
_OWNER_SESSIONS: Final = frozenset(
    {EntityType.OWNER, EntityType.DEL_OWNER_BLOB, EntityType.DEL_ROW}
)
"""What sessions that the owner authorized are bound to."""


# -- chapter 17 ------------------------------------------------------------------------------------


@wire
class ChangeAuthIn:
    """§17.1 incoming operands; `new_auth` is masked under the parent's session."""

    parent_handle: Handle
    protocol_id: U16
    new_auth: EncAuth
    entity_type: U16
    enc_data: Sized


@wire
class ChangeAuthOut:
    """§17.1 outgoing operands."""

    out_data: Sized


@command(
    Ordinal.CHANGE_AUTH,
    name="ChangeAuth",
    section="Part 3 §17.1",
    takes=ChangeAuthIn,
    gives=ChangeAuthOut,
    gates=_GATES,
    # Both are checked by the handler: what is asked for comes before who asks.
    sessions=(AuthBy("parent", WITH_SHARED_SECRET), AuthBy("entity", OIAP_ONLY)),
)
def change_auth(tpm: Tpm, cmd: ChangeAuthIn, auth: Authorized) -> ChangeAuthOut:
    """Give a key or sealed data another secret, in a new blob.

    Raises:
        TpmError: WRONG_ENTITYTYPE; INVALID_KEYHANDLE; WRONGPCRVAL, BAD_LOCALITY for the parent;
            BAD_MODE for other kinds of sessions than OSAP and OIAP; BAD_PARAMETER for another
            protocolID; AUTHFAIL; INVALID_KEYUSAGE; DECRYPT_ERROR; INVALID_STRUCTURE when the blob
            is not of the type; AUTHFAIL for data that another TPM sealed; AUTH2FAIL.
    """
    if cmd.entity_type not in entities.CHANGEABLE:
        raise TpmError(ReturnCode.WRONG_ENTITYTYPE)
    parent = tpm.key(cmd.parent_handle)
    check_key_use(tpm, parent, reads_only=False)
    auth.session("parent")
    auth.session("entity")
    if cmd.protocol_id != ProtocolId.ADCP:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    auth.verify("parent", parent.usage_hmac, key_entity(parent))
    if parent.usage != KeyUsage.STORAGE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    entity = entities.opened(tpm, parent, cmd.entity_type, cmd.enc_data)
    auth.verify("entity", hmac_key(entities.secret_of(entity)), None)
    new_auth = auth.decrypt_secret("parent", cmd.new_auth)
    auth.end_all()
    return ChangeAuthOut(out_data=entities.closed(tpm, parent, entity, new_auth))


@wire
class ChangeAuthOwnerIn:
    """§17.2 incoming operands; `new_auth` is masked under the owner's session."""

    protocol_id: U16
    new_auth: EncAuth
    entity_type: U16


@command(
    Ordinal.CHANGE_AUTH_OWNER,
    name="ChangeAuthOwner",
    section="Part 3 §17.2",
    takes=ChangeAuthOwnerIn,
    gates=_GATES,
    sessions=(AuthBy("owner", WITH_SHARED_SECRET),),
)
def change_auth_owner(tpm: Tpm, cmd: ChangeAuthOwnerIn, auth: Authorized) -> None:
    """Change the secret of the owner or of the SRK; not delegatable.

    Every OSAP and DSAP session of the owner ends; those of the SRK end when its secret changes. Of
    the saved ones all end, whoever they are of, as is permitted.

    Raises:
        TpmError: BAD_PARAMETER for another protocolID; WRONG_ENTITYTYPE.
    """
    if cmd.protocol_id != ProtocolId.ADCP:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    if cmd.entity_type not in {EntityType.OWNER, EntityType.SRK}:
        raise TpmError(ReturnCode.WRONG_ENTITYTYPE)
    new_auth = auth.decrypt_secret("owner", cmd.new_auth)
    srk = tpm.key(KeyHandleValue.SRK)
    permanent = tpm.change_permanent()
    ended_digest = None
    if cmd.entity_type == EntityType.OWNER:
        permanent.owner_auth = new_auth
    else:
        permanent.srk = _with_usage_auth(srk, new_auth)
        ended_digest = srk.pub_data_digest
    tpm.change_stany().sessions = {
        handle: session
        for handle, session in tpm.stany.sessions.items()
        if session.entity_type not in _OWNER_SESSIONS and session.entity_digest != ended_digest
    }
    contexts.end_saved_bound_sessions(tpm)


def _with_usage_auth(key: LoadedKey, usage_auth: bytes) -> LoadedKey:
    return LoadedKey(
        key.public,
        payload=key.payload,
        usage_auth=usage_auth,
        migration_auth=key.migration_auth,
        prime=key.prime,
        parent_pcr_status=key.parent_pcr_status,
    )


# -- §27.4: with a key that the TPM makes for it ---------------------------------------------------


@wire
class ChangeAuthAsymStartIn:
    """§27.4.1 incoming operands."""

    id_handle: Handle
    anti_replay: Nonce
    temp_key: KeyParms


@wire
class ChangeAuthAsymStartOut:
    """§27.4.1 outgoing operands; the handle is not at the beginning, and inside the digest."""

    certify_info: CertifyInfo
    sig: Sized
    eph_handle: U32
    temp_key: Key


@command(
    Ordinal.CHANGE_AUTH_ASYM_START,
    name="ChangeAuthAsymStart",
    section="Part 3 §27.4.1",
    takes=ChangeAuthAsymStartIn,
    gives=ChangeAuthAsymStartOut,
    gates=_GATES,
    sessions=(AuthBy("id_handle", may_drop=1),),
)
def change_auth_asym_start(
    tpm: Tpm, cmd: ChangeAuthAsymStartIn, auth: Authorized
) -> ChangeAuthAsymStartOut:
    """Make a key that new secrets can be sent to, and let an identity vouch for it.

    Raises:
        TpmError: INVALID_KEYUSAGE for any key but an identity key; BAD_KEY_PROPERTY, NOTFIPS;
            NOSPACE.
    """
    identity = auth.key("id_handle")
    if identity.usage != KeyUsage.IDENTITY:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    template = Key(
        key_usage=KeyUsage.AUTHCHANGE,
        key_flags=KeyFlags.IS_VOLATILE,
        auth_data_usage=AuthDataUsage.NEVER,
        algorithm_parms=cmd.temp_key,
        pcr_info=b"",
        pub_key=b"",
        enc_data=b"",
    )
    parms = keys.check_properties(template)
    # `wrapping.check_properties` would refuse every key without authorization in FIPS mode, but
    # this one is so by definition.
    if tpm.permanent.flags.fips and parms.key_length < wrapping.FIPS_RSA_BITS_MIN:
        raise TpmError(ReturnCode.NOTFIPS)
    key = wrapping.generate(tpm, template, usage_auth=ZERO_DIGEST)
    assert isinstance(key.public, Key)
    handle = wrapping.add_to_slots(tpm, key)
    info = certification.certify_info(key, cmd.anti_replay)
    assert isinstance(info, CertifyInfo)
    return ChangeAuthAsymStartOut(
        certify_info=info,
        sig=identity.rsa.sign_sha1(sha1(encode(info))),
        eph_handle=handle,
        temp_key=key.public,
    )


@wire
class ChangeAuthAsymFinishIn:
    """§27.4.2 incoming operands."""

    parent_handle: Handle
    eph_handle: Handle
    entity_type: U16
    new_auth_link: Digest
    enc_new_auth: Sized
    enc_data: Sized


@wire
class ChangeAuthAsymFinishOut:
    """§27.4.2 outgoing operands."""

    out_data: Sized
    salt_nonce: Nonce
    change_proof: Digest


@wire
class ChangeauthValidate:
    """TPM_CHANGEAUTH_VALIDATE (Part 2 §5.11)."""

    new_auth_secret: SecretAuth
    n1: Nonce


@command(
    Ordinal.CHANGE_AUTH_ASYM_FINISH,
    name="ChangeAuthAsymFinish",
    section="Part 3 §27.4.2",
    takes=ChangeAuthAsymFinishIn,
    gives=ChangeAuthAsymFinishOut,
    gates=_GATES,
    # Checked by the handler: the SRK is used with the owner's secret here.
    sessions=(AuthBy("parent", may_drop=1),),
)
def change_auth_asym_finish(
    tpm: Tpm, cmd: ChangeAuthAsymFinishIn, auth: Authorized
) -> ChangeAuthAsymFinishOut:
    """Give a key or sealed data another secret that the parent's owner does not learn.

    The key that TPM_ChangeAuthAsymStart made is gone afterwards. (libtpms changes keys only.)

    Raises:
        TpmError: INVALID_KEYHANDLE for either handle; WRONGPCRVAL, BAD_LOCALITY for the parent;
            AUTHFAIL; WRONG_ENTITYTYPE; INVALID_KEYUSAGE for a parent that is not for storage;
            DECRYPT_ERROR, INVALID_STRUCTURE for the blob; BAD_PARAMETER for an ephemeral key of
            another kind; DECRYPT_ERROR for the new secret; AUTHFAIL when the old one was not known.
        DecodeError: The new secret is no TPM_CHANGEAUTH_VALIDATE.
    """
    parent = tpm.key(cmd.parent_handle)
    check_key_use(tpm, parent, reads_only=False)
    _authorize_parent(cmd.parent_handle, parent, auth)
    if cmd.entity_type not in entities.CHANGEABLE:
        raise TpmError(ReturnCode.WRONG_ENTITYTYPE)
    if parent.usage != KeyUsage.STORAGE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    entity = entities.opened(tpm, parent, cmd.entity_type, cmd.enc_data)
    wanted = _new_secret(tpm.key(cmd.eph_handle), cmd.enc_new_auth)
    linked = hmac_sha1(entities.secret_of(entity), wanted.new_auth_secret)
    if not is_same(linked, cmd.new_auth_link):
        raise TpmError(ReturnCode.AUTHFAIL, "who asks does not know the old secret")
    salt_nonce = tpm.random(DIGEST_BYTES)
    volatile = tpm.change_volatile()
    volatile.keys = {h: key for h, key in volatile.keys.items() if h != cmd.eph_handle}
    end_bound_sessions(tpm, EntityType.KEYHANDLE, cmd.eph_handle)
    return ChangeAuthAsymFinishOut(
        out_data=entities.closed(tpm, parent, entity, wanted.new_auth_secret),
        salt_nonce=salt_nonce,
        change_proof=hmac_sha1(wanted.new_auth_secret, salt_nonce + wanted.n1),
    )


def _authorize_parent(handle: int, parent: LoadedKey, auth: Authorized) -> None:
    """Check the parent's session; for the SRK it is the owner's ("Description" of §27.4.2)."""
    if handle == KeyHandleValue.SRK and auth.has("parent"):
        auth.verify_owner("parent")
    else:
        key_use.authorize(auth, "parent", parent)


def _new_secret(ephemeral: LoadedKey, enc_new_auth: bytes) -> ChangeauthValidate:
    if ephemeral.usage != KeyUsage.AUTHCHANGE:
        raise TpmError(ReturnCode.BAD_PARAMETER, "not a key of TPM_ChangeAuthAsymStart")
    try:
        plaintext = ephemeral.rsa.decrypt_oaep(enc_new_auth)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    return decode(ChangeauthValidate, plaintext)
