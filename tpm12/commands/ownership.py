"""Opt-in, ownership, physical presence: TPM Main r116 Part 3, chapters 5 and 6.

Leaves to others: what a clear removes (`tpm12.clearing`), how keys are made (`tpm12.wrapping`).
"""

from __future__ import annotations

from typing import Final

from protocol.constants import DIGEST_BYTES, KeyFlags, KeyUsage, Ordinal, ProtocolId
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import AnyKey, Key, Key12
from protocol.wire import U16, Bool, SecretAuth, Sized, wire
from tpm12 import wrapping
from tpm12.authorization import OIAP_ONLY, Authorized
from tpm12.clearing import clear_owner, renew_owner_secrets
from tpm12.crypto import DecryptionError, hmac_key
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.flags import set_flags
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

_OWNER: Final = (AuthBy("owner"),)
_OWNED: Final = Gate.USABLE | Gate.OWNED
_LOCALITIES_OF_THE_LAUNCH: Final = frozenset({3, 4})
"""Who may say that the established state ended (Part 3 §6.7)."""


# -- chapter 5: opt-in ---------------------------------------------------------------------------


@wire
class StateIn:
    """§5.1 and §5.5 incoming operands."""

    state: Bool


@command(Ordinal.SET_OWNER_INSTALL, name="SetOwnerInstall", section="Part 3 §5.1", takes=StateIn)
def set_owner_install(tpm: Tpm, cmd: StateIn, _auth: Authorized) -> None:
    """Allow or forbid TPM_TakeOwnership; without effect while there is an owner.

    Raises:
        TpmError: BAD_PRESENCE.
    """
    if tpm.has_owner:
        return
    tpm.require_presence()
    set_flags(tpm, ownership=cmd.state)


@wire
class OwnerSetDisableIn:
    """§5.2 incoming operands."""

    disable_state: Bool


@command(
    Ordinal.OWNER_SET_DISABLE,
    name="OwnerSetDisable",
    section="Part 3 §5.2",
    takes=OwnerSetDisableIn,
    gates=Gate.OWNED,
    sessions=_OWNER,
)
def owner_set_disable(tpm: Tpm, cmd: OwnerSetDisableIn, _auth: Authorized) -> None:
    """Disable or enable, at once; works on a disabled TPM."""
    set_flags(tpm, disable=cmd.disable_state)


@command(Ordinal.PHYSICAL_ENABLE, name="PhysicalEnable", section="Part 3 §5.3", gates=Gate.NONE)
def physical_enable(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Enable; works on a disabled TPM.

    Raises:
        TpmError: BAD_PRESENCE.
    """
    tpm.require_presence()
    set_flags(tpm, disable=False)


@command(
    Ordinal.PHYSICAL_DISABLE, name="PhysicalDisable", section="Part 3 §5.4", gates=Gate.ENABLED
)
def physical_disable(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Disable, at once.

    Raises:
        TpmError: BAD_PRESENCE.
    """
    tpm.require_presence()
    set_flags(tpm, disable=True)


@command(
    Ordinal.PHYSICAL_SET_DEACTIVATED,
    name="PhysicalSetDeactivated",
    section="Part 3 §5.5",
    takes=StateIn,
    gates=Gate.ENABLED,
)
def physical_set_deactivated(tpm: Tpm, cmd: StateIn, _auth: Authorized) -> None:
    """Deactivate or activate, from the next TPM_Startup(ST_CLEAR) on.

    Raises:
        TpmError: BAD_PRESENCE.
    """
    tpm.require_presence()
    set_flags(tpm, deactivated=cmd.state)


@command(
    Ordinal.SET_TEMP_DEACTIVATED,
    name="SetTempDeactivated",
    section="Part 3 §5.6",
    gates=Gate.ACTIVE,
    sessions=(AuthBy("operator", OIAP_ONLY, may_drop=1),),
)
def set_temp_deactivated(tpm: Tpm, _cmd: Nothing, auth: Authorized) -> None:
    """Deactivate until the next TPM_Startup(ST_CLEAR), for the operator or for who is present.

    Raises:
        TpmError: NOOPERATOR when a session came but no operator is set; AUTHFAIL; BAD_PRESENCE.
    """
    if auth.has("operator"):
        operator_auth = tpm.permanent.operator_auth
        if operator_auth is None or not tpm.permanent.flags.operator:
            raise TpmError(ReturnCode.NOOPERATOR)
        auth.verify("operator", hmac_key(operator_auth), None)
    else:
        tpm.require_presence()
    tpm.change_stclear().deactivated = True


@wire
class SetOperatorAuthIn:
    """§5.7 incoming operands; the secret comes in clear, from who is present."""

    operator_auth: SecretAuth


@command(
    Ordinal.SET_OPERATOR_AUTH,
    name="SetOperatorAuth",
    section="Part 3 §5.7",
    takes=SetOperatorAuthIn,
)
def set_operator_auth(tpm: Tpm, cmd: SetOperatorAuthIn, _auth: Authorized) -> None:
    """Set the operator's secret.

    Raises:
        TpmError: BAD_PRESENCE.
    """
    tpm.require_presence()
    if tpm.permanent.operator_auth != cmd.operator_auth:
        tpm.change_permanent().operator_auth = cmd.operator_auth
    set_flags(tpm, operator=True)


# -- chapter 6: ownership --------------------------------------------------------------------------


@wire
class TakeOwnershipIn:
    """§6.1 incoming operands."""

    protocol_id: U16
    enc_owner_auth: Sized
    enc_srk_auth: Sized
    srk_params: AnyKey


@wire
class TakeOwnershipOut:
    """§6.1 outgoing operands."""

    srk_pub: AnyKey


@command(
    Ordinal.TAKE_OWNERSHIP,
    name="TakeOwnership",
    section="Part 3 §6.1",
    takes=TakeOwnershipIn,
    gives=TakeOwnershipOut,
    # A deactivated TPM may be owned, so that it can be owned before it is activated (Part 2 §17).
    gates=Gate.ENABLED,
    sessions=(AuthBy("new_owner", OIAP_ONLY),),
)
def take_ownership(tpm: Tpm, cmd: TakeOwnershipIn, auth: Authorized) -> TakeOwnershipOut:
    """Install an owner and a storage root key; the session is proven with the new ownerAuth.

    Raises:
        TpmError: OWNER_SET; INSTALL_DISABLED; NO_ENDORSEMENT; BAD_PARAMETER for another
            protocolID; DECRYPT_ERROR, or BAD_KEY_PROPERTY for a secret of other than 20 bytes;
            AUTHFAIL; INVALID_KEYUSAGE, BAD_KEY_PROPERTY, NOTFIPS for the wanted SRK.
    """
    if tpm.has_owner:
        raise TpmError(ReturnCode.OWNER_SET)
    if not tpm.permanent.flags.ownership:
        raise TpmError(ReturnCode.INSTALL_DISABLED)
    endorsement_key = tpm.permanent.endorsement_key
    if endorsement_key is None:
        raise TpmError(ReturnCode.NO_ENDORSEMENT)
    auth.session("new_owner")
    if cmd.protocol_id != ProtocolId.OWNER:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    owner_auth = _decrypted_secret(endorsement_key, cmd.enc_owner_auth)
    auth.verify("new_owner", hmac_key(owner_auth), None)
    _check_srk_params(tpm, cmd.srk_params)
    srk_auth = _decrypted_secret(endorsement_key, cmd.enc_srk_auth)
    renew_owner_secrets(tpm)
    srk = wrapping.generate(tpm, cmd.srk_params, usage_auth=srk_auth)
    permanent = tpm.change_permanent()
    permanent.owner_auth = owner_auth
    permanent.srk = srk
    set_flags(tpm, read_pubek=False)
    return TakeOwnershipOut(srk_pub=srk.public)


def _decrypted_secret(endorsement_key: LoadedKey, encrypted: bytes) -> bytes:
    try:
        secret = endorsement_key.rsa.decrypt_oaep(encrypted)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    if len(secret) != DIGEST_BYTES:
        raise TpmError(ReturnCode.BAD_KEY_PROPERTY, "the secret is not 20 bytes")
    return secret


def _check_srk_params(tpm: Tpm, params: Key | Key12) -> None:
    if params.key_usage != KeyUsage.STORAGE or params.key_flags & KeyFlags.MIGRATABLE:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    wrapping.check_properties(tpm, params)


@command(
    Ordinal.OWNER_CLEAR,
    name="OwnerClear",
    section="Part 3 §6.2",
    gates=_OWNED,
    sessions=_OWNER,
)
def owner_clear(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Give the TPM up; every session ends.

    The response is still signed with the old ownerAuth.

    Raises:
        TpmError: CLEAR_DISABLED.
    """
    if tpm.permanent.flags.disable_owner_clear:
        raise TpmError(ReturnCode.CLEAR_DISABLED)
    clear_owner(tpm)


@command(Ordinal.FORCE_CLEAR, name="ForceClear", section="Part 3 §6.3")
def force_clear(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Clear for who is present, with or without an owner.

    Raises:
        TpmError: BAD_PRESENCE, CLEAR_DISABLED.
    """
    tpm.require_presence()
    if tpm.stclear.disable_force_clear:
        raise TpmError(ReturnCode.CLEAR_DISABLED)
    clear_owner(tpm)


@command(
    Ordinal.DISABLE_OWNER_CLEAR,
    name="DisableOwnerClear",
    section="Part 3 §6.4",
    gates=_OWNED,
    sessions=_OWNER,
)
def disable_owner_clear(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Forbid TPM_OwnerClear until TPM_ForceClear."""
    set_flags(tpm, disable_owner_clear=True)


@command(Ordinal.DISABLE_FORCE_CLEAR, name="DisableForceClear", section="Part 3 §6.5")
def disable_force_clear(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Forbid TPM_ForceClear until the next TPM_Startup(ST_CLEAR)."""
    tpm.change_stclear().disable_force_clear = True


# -- physical presence -----------------------------------------------------------------------------

_HW_DISABLE: Final = 0x0200
_CMD_DISABLE: Final = 0x0100
_LIFETIME_LOCK: Final = 0x0080
_HW_ENABLE: Final = 0x0040
_CMD_ENABLE: Final = 0x0020
_NOTPRESENT: Final = 0x0010
_PRESENT: Final = 0x0008
_LOCK: Final = 0x0004
_LIFETIME: Final = _HW_DISABLE | _CMD_DISABLE | _LIFETIME_LOCK | _HW_ENABLE | _CMD_ENABLE
_ASSERTION: Final = _NOTPRESENT | _PRESENT | _LOCK
_CONTRADICTIONS: Final = (
    _HW_ENABLE | _HW_DISABLE,
    _CMD_ENABLE | _CMD_DISABLE,
    _LOCK | _PRESENT,
    _PRESENT | _NOTPRESENT,
)


@wire
class PhysicalPresenceIn:
    """§6.6 incoming operands."""

    physical_presence: U16


@command(
    Ordinal.TSC_PHYSICAL_PRESENCE,
    name="TSC_PhysicalPresence",
    section="Part 3 §6.6",
    takes=PhysicalPresenceIn,
    gates=Gate.BEFORE_SELF_TEST,
)
def physical_presence(tpm: Tpm, cmd: PhysicalPresenceIn, _auth: Authorized) -> None:
    """Assert physical presence, or set for life how it may be asserted. For the platform.

    Raises:
        TpmError: BAD_PARAMETER, whatever speaks against it.
    """
    wanted = cmd.physical_presence
    is_for_life = bool(wanted & _LIFETIME)
    if (
        not wanted
        or wanted & ~(_LIFETIME | _ASSERTION)
        or (is_for_life and wanted & _ASSERTION)
        or any(wanted & both == both for both in _CONTRADICTIONS)
    ):
        raise TpmError(ReturnCode.BAD_PARAMETER)
    if is_for_life:
        _set_presence_for_life(tpm, wanted)
    else:
        _assert_presence(tpm, wanted)


def _set_presence_for_life(tpm: Tpm, wanted: int) -> None:
    flags = tpm.permanent.flags
    if flags.physical_presence_lifetime_lock:
        raise TpmError(ReturnCode.BAD_PARAMETER, "locked for the life of the TPM")
    set_flags(
        tpm,
        physical_presence_hw_enable=bool(wanted & _HW_ENABLE)
        or (flags.physical_presence_hw_enable and not wanted & _HW_DISABLE),
        physical_presence_cmd_enable=bool(wanted & _CMD_ENABLE)
        or (flags.physical_presence_cmd_enable and not wanted & _CMD_DISABLE),
        physical_presence_lifetime_lock=bool(wanted & _LIFETIME_LOCK),
    )


def _assert_presence(tpm: Tpm, wanted: int) -> None:
    if not tpm.permanent.flags.physical_presence_cmd_enable:
        raise TpmError(ReturnCode.BAD_PARAMETER, "presence is not asserted by command here")
    if tpm.stclear.physical_presence_lock:
        raise TpmError(ReturnCode.BAD_PARAMETER, "locked until ST_CLEAR")
    stclear = tpm.change_stclear()
    stclear.physical_presence = bool(wanted & _PRESENT)
    stclear.physical_presence_lock = bool(wanted & _LOCK)


@command(
    Ordinal.TSC_RESET_ESTABLISHMENT_BIT,
    name="TSC_ResetEstablishmentBit",
    section="Part 3 §6.7",
    gates=Gate.BEFORE_SELF_TEST,
)
def reset_establishment_bit(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Forget that a dynamic launch happened. For the code that was launched.

    Raises:
        TpmError: BAD_LOCALITY.
    """
    if tpm.locality not in _LOCALITIES_OF_THE_LAUNCH:
        raise TpmError(ReturnCode.BAD_LOCALITY)
    set_flags(tpm, tpm_established=False)
