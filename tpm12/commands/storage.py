"""Storage functions: TPM Main r116 Part 3, chapter 10, and §27.8.

Leaves to others: wrapped keys (`tpm12.wrapping`), sealed blobs (`tpm12.sealing`).
"""

from __future__ import annotations

from protocol.constants import (
    EncScheme,
    KeyFlags,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    PayloadType,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import AnyKey, AnyStoredData, BoundData, Pubkey, StoredData12
from protocol.wire import U32, EncAuth, Handle, SecretSized, Sized, decode, wire
from tpm12 import key_use, sealing, wrapping
from tpm12.authorization import (
    OIAP,
    OIAP_ONLY,
    WITH_SHARED_SECRET,
    Authorized,
    check_key_use,
)
from tpm12.crypto import DecryptionError, hmac_key
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

_GATES = Gate.USABLE | Gate.OWNED


# -- sealing -------------------------------------------------------------------------------------


@wire
class SealIn:
    """§10.1 and §10.7 incoming operands."""

    key_handle: Handle
    enc_auth: EncAuth
    pcr_info: Sized
    in_data: SecretSized


@wire
class SealOut:
    """§10.1 and §10.7 outgoing operands."""

    sealed_data: AnyStoredData


@command(
    Ordinal.SEAL,
    name="Seal",
    section="Part 3 §10.1",
    takes=SealIn,
    gives=SealOut,
    gates=_GATES,
    sessions=(AuthBy("key_handle", WITH_SHARED_SECRET),),
)
def seal(tpm: Tpm, cmd: SealIn, auth: Authorized) -> SealOut:
    """Encrypt data so that only this TPM, in a named state, gives it back.

    Raises:
        TpmError: BAD_PARAMETER for no data; INVALID_KEYUSAGE for a key that is migratable or not
            for storage; BADINDEX for a malformed PCR binding; BAD_DATASIZE.
    """
    key = _sealing_key(auth, cmd.in_data)
    blank = sealing.blank_for(tpm, cmd.pcr_info)
    secret = auth.decrypt_secret("key_handle", cmd.enc_auth)
    return SealOut(sealed_data=sealing.seal(tpm, key, blank, secret, cmd.in_data))


@command(
    Ordinal.SEALX,
    name="Sealx",
    section="Part 3 §10.7",
    takes=SealIn,
    gives=SealOut,
    gates=_GATES,
    sessions=(AuthBy("key_handle", WITH_SHARED_SECRET),),
)
def sealx(tpm: Tpm, cmd: SealIn, auth: Authorized) -> SealOut:
    """Seal data that comes hidden under the session, and will be given back hidden.

    Raises:
        TpmError: As `seal`; BADINDEX for a PCR binding of 1.1 age too.
    """
    key = _sealing_key(auth, cmd.in_data)
    session, block = auth.session("key_handle")
    blank = sealing.blank_for_sealx(tpm, cmd.pcr_info, session)
    secret = auth.decrypt_secret("key_handle", cmd.enc_auth)
    data = sealing.masked(session, block.nonce_odd, session.adip, cmd.in_data)
    return SealOut(sealed_data=sealing.seal(tpm, key, blank, secret, data))


def _sealing_key(auth: Authorized, data: bytes) -> LoadedKey:
    if not data:
        raise TpmError(ReturnCode.BAD_PARAMETER, "nothing to seal")
    key = auth.key("key_handle")
    _require_sealing_usage(key)
    return key


def _require_sealing_usage(key: LoadedKey) -> None:
    if key.usage != KeyUsage.STORAGE or key.is_migratable:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)


@wire
class UnsealIn:
    """§10.2 incoming operands."""

    parent_handle: Handle
    in_data: AnyStoredData


@wire
class UnsealOut:
    """§10.2 outgoing operands."""

    secret: SecretSized


@command(
    Ordinal.UNSEAL,
    name="Unseal",
    section="Part 3 §10.2",
    takes=UnsealIn,
    gives=UnsealOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", may_drop=1), AuthBy("data", OIAP_ONLY)),
)
def unseal(tpm: Tpm, cmd: UnsealIn, auth: Authorized) -> UnsealOut:
    """Give sealed data back.

    Raises:
        TpmError: INVALID_KEYUSAGE; NOTSEALED_BLOB; WRONGPCRVAL, BAD_LOCALITY; AUTH2FAIL for the
            data's secret; for a blob of TPM_Sealx AUTHFAIL without a session for the parent and
            BAD_MODE when that is an OIAP session.
    """
    key = auth.key("parent_handle")
    _require_sealing_usage(key)
    sealed = sealing.unseal(tpm, key, cmd.in_data)
    auth.verify("data", hmac_key(sealed.auth_data), None)
    data = sealed.data
    if isinstance(cmd.in_data, StoredData12) and cmd.in_data.et != sealing.NOT_ENCRYPTED:
        session, block = auth.session("parent_handle")
        if session.protocol == OIAP:
            raise TpmError(ReturnCode.BAD_MODE, "data of TPM_Sealx needs an OSAP session")
        data = sealing.masked(session, block.nonce_odd, cmd.in_data.et >> 8, data)
        auth.end_session("parent_handle")
    return UnsealOut(secret=data)


# -- binding -------------------------------------------------------------------------------------


@wire
class UnBindIn:
    """§10.3 incoming operands."""

    key_handle: Handle
    in_data: Sized


@wire
class UnBindOut:
    """§10.3 outgoing operands."""

    out_data: SecretSized


@command(
    Ordinal.UN_BIND,
    name="UnBind",
    section="Part 3 §10.3",
    takes=UnBindIn,
    gives=UnBindOut,
    gates=_GATES,
    # Checked by the handler: whether there are data comes before who asks.
    sessions=(AuthBy("key", may_drop=1),),
)
def un_bind(tpm: Tpm, cmd: UnBindIn, auth: Authorized) -> UnBindOut:
    """Decrypt what was encrypted to a key outside the TPM.

    Bad PKCS#1 v1.5 padding gives no DECRYPT_ERROR but, as if it had been good, bytes that depend on
    key and ciphertext only: the code would be the oracle of Bleichenbacher's attack.

    Raises:
        TpmError: BAD_PARAMETER for no data; INVALID_KEYHANDLE; WRONGPCRVAL, BAD_LOCALITY for the
            key; AUTHFAIL; INVALID_KEYUSAGE; DECRYPT_ERROR; INVALID_STRUCTURE for another payload
            than TPM_PT_BIND.
        DecodeError: BAD_VERSION or BAD_PARAM_SIZE when the plaintext is no TPM_BOUND_DATA.
    """
    if not cmd.in_data:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    key = tpm.key(cmd.key_handle)
    check_key_use(tpm, key, reads_only=False)
    key_use.authorize(auth, "key", key)
    if key.usage not in {KeyUsage.BIND, KeyUsage.LEGACY}:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    is_oaep = key.enc_scheme == EncScheme.RSAESOAEP_SHA1_MGF1
    try:
        plaintext = (key.rsa.decrypt_oaep if is_oaep else key.rsa.decrypt_pkcs1v15)(cmd.in_data)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    if key.usage == KeyUsage.LEGACY and not is_oaep:
        return UnBindOut(out_data=plaintext)
    bound = decode(BoundData, plaintext)
    if bound.payload != PayloadType.BIND:
        raise TpmError(ReturnCode.INVALID_STRUCTURE)
    return UnBindOut(out_data=bound.payload_data)


# -- keys ----------------------------------------------------------------------------------------


@wire
class CreateWrapKeyIn:
    """§10.4 incoming operands."""

    parent_handle: Handle
    data_usage_auth: EncAuth
    data_migration_auth: EncAuth
    key_info: AnyKey


@wire
class CreateWrapKeyOut:
    """§10.4 outgoing operands."""

    wrapped_key: AnyKey


@command(
    Ordinal.CREATE_WRAP_KEY,
    name="CreateWrapKey",
    section="Part 3 §10.4",
    takes=CreateWrapKeyIn,
    gives=CreateWrapKeyOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", WITH_SHARED_SECRET),),
)
def create_wrap_key(tpm: Tpm, cmd: CreateWrapKeyIn, auth: Authorized) -> CreateWrapKeyOut:
    """Make a key and wrap it under its parent.

    Raises:
        TpmError: BAD_KEY_PROPERTY, NOTFIPS; INVALID_KEYUSAGE for a parent that is not for storage,
            a non-migratable key under a migratable parent, and kinds of keys that other commands
            make.
        DecodeError: The PCR binding is malformed.
    """
    wanted = cmd.key_info
    wrapping.check_properties(tpm, wanted)
    parent = auth.key("parent_handle")
    is_migratable = bool(wanted.key_flags & KeyFlags.MIGRATABLE)
    if (
        parent.usage != KeyUsage.STORAGE
        or (parent.is_migratable and not is_migratable)
        or wanted.key_usage in {KeyUsage.IDENTITY, KeyUsage.AUTHCHANGE}
        or wanted.key_flags & KeyFlags.MIGRATE_AUTHORITY
    ):
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    usage_auth = auth.decrypt_secret("parent_handle", cmd.data_usage_auth)
    migration_auth = auth.decrypt_secret("parent_handle", cmd.data_migration_auth, is_second=True)
    key = wrapping.generate(
        tpm,
        wanted,
        usage_auth=usage_auth,
        migration_auth=migration_auth if is_migratable else None,
    )
    return CreateWrapKeyOut(wrapped_key=wrapping.wrapped(tpm, parent, key))


@wire
class LoadKeyIn:
    """§10.5 and §27.8 incoming operands."""

    parent_handle: Handle
    in_key: AnyKey


@wire
class LoadKey2Out:
    """§10.5 outgoing operands; the handle is outside the digest, so that it may be exchanged."""

    inkey_handle: Handle


@command(
    Ordinal.LOAD_KEY2,
    name="LoadKey2",
    section="Part 3 §10.5",
    takes=LoadKeyIn,
    gives=LoadKey2Out,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", may_drop=1),),
)
def load_key2(tpm: Tpm, cmd: LoadKeyIn, auth: Authorized) -> LoadKey2Out:
    """Load a wrapped key into a slot.

    Raises:
        TpmError: What `wrapping.unwrapped` says; NOSPACE when every slot is taken.
    """
    key = wrapping.unwrapped(tpm, auth.key("parent_handle"), cmd.in_key)
    return LoadKey2Out(inkey_handle=wrapping.add_to_slots(tpm, key))


@wire
class LoadKeyOut:
    """§27.8 outgoing operands: the handle is inside the digest."""

    inkey_handle: U32


@command(
    Ordinal.LOAD_KEY,
    name="LoadKey",
    section="Part 3 §27.8",
    takes=LoadKeyIn,
    gives=LoadKeyOut,
    gates=_GATES,
    sessions=(AuthBy("parent_handle", may_drop=1),),
)
def load_key(tpm: Tpm, cmd: LoadKeyIn, auth: Authorized) -> LoadKeyOut:
    """Load a wrapped key into a slot, as 1.1 did it.

    Raises:
        TpmError: As `load_key2`.
    """
    key = wrapping.unwrapped(tpm, auth.key("parent_handle"), cmd.in_key)
    return LoadKeyOut(inkey_handle=wrapping.add_to_slots(tpm, key))


@wire
class GetPubKeyIn:
    """§10.6 incoming operands."""

    key_handle: Handle


@wire
class GetPubKeyOut:
    """§10.6 outgoing operands."""

    pub_key: Pubkey


@command(
    Ordinal.GET_PUB_KEY,
    name="GetPubKey",
    section="Part 3 §10.6",
    takes=GetPubKeyIn,
    gives=GetPubKeyOut,
    gates=_GATES,
    sessions=(AuthBy("key_handle", may_drop=1, reads_only=True),),
)
def get_pub_key(tpm: Tpm, cmd: GetPubKeyIn, auth: Authorized) -> GetPubKeyOut:
    """Give the public part of a loaded key.

    Raises:
        TpmError: INVALID_KEYHANDLE for the SRK unless readSRKPub is set.
    """
    if cmd.key_handle == KeyHandleValue.SRK and not tpm.permanent.flags.read_srk_pub:
        raise TpmError(ReturnCode.INVALID_KEYHANDLE)
    return GetPubKeyOut(pub_key=auth.key("key_handle").pubkey())
