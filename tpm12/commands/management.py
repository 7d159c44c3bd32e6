"""Lockout, and keys in the owner's control: TPM Main r116 Part 3, chapters 9 and 21.1.

TPM_FieldUpgrade and TPM_SetRedirection are optional and not served (BAD_ORDINAL).
"""

from __future__ import annotations

from protocol.constants import KeyFlags, KeyUsage, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import Pubkey
from protocol.wire import U32, Bool, Handle, encode, wire
from tpm12.authorization import Authorized
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.keys import LoadedKey
from tpm12.tpm import Tpm

_OWNED = Gate.USABLE | Gate.OWNED


@command(
    Ordinal.RESET_LOCK_VALUE,
    name="ResetLockValue",
    section="Part 3 §9.3",
    gates=_OWNED,
    # Not "owner": a failure here has a consequence, which the handler draws.
    sessions=(AuthBy("unlocking_owner"),),
)
def reset_lock_value(tpm: Tpm, _cmd: Nothing, auth: Authorized) -> None:
    """Forget failed authorizations; runs while the dictionary-attack defence is on.

    One failure closes this door until the defence is off again, or it would be the place to guess
    ownerAuth. With the defence off, the engine has opened it before this is called.

    Raises:
        TpmError: AUTHFAIL, also with the right secret after a failure while the defence is on.
    """
    if tpm.stclear.disable_reset_lock:
        raise TpmError(ReturnCode.AUTHFAIL, "a try failed while the defence is on")
    try:
        auth.verify_owner("unlocking_owner")
    except TpmError as error:
        if error.code is ReturnCode.AUTHFAIL:
            tpm.change_stclear().disable_reset_lock = True
            tpm.settle()
        raise
    if tpm.stclear.failed_tries:
        stclear = tpm.change_stclear()
        stclear.failed_tries = 0
        stclear.last_failure_us = 0


KEY_CONTROL_OWNER_EVICT = 0x00000001
"""TPM_KEY_CONTROL bit (Part 2 §5.6)."""
_SLOTS_FOR_OTHERS = 2
"""Slots that owner-evict keys must leave (Part 3 §21.1)."""


@wire
class KeyControlOwnerIn:
    """§21.1 incoming operands."""

    key_handle: Handle
    pub_key: Pubkey
    bit_name: U32
    bit_value: Bool


@command(
    Ordinal.KEY_CONTROL_OWNER,
    name="KeyControlOwner",
    section="Part 3 §21.1",
    takes=KeyControlOwnerIn,
    gates=_OWNED,
    sessions=(AuthBy("owner"),),
)
def key_control_owner(tpm: Tpm, cmd: KeyControlOwnerIn, _auth: Authorized) -> None:
    """Keep a loaded key through every start-up, or stop keeping it; it stays loaded either way.

    Raises:
        TpmError: INVALID_KEYHANDLE (for the SRK too); BAD_PARAMETER when `pub_key` is another
            key's, or the key is volatile or hangs on PCRs; BAD_MODE for another control bit;
            NOSPACE.
    """
    # keyHandle is not part of what the owner signed; pubKey says which key is meant.
    key = tpm.key_in_slot(cmd.key_handle)
    if key is None:
        raise TpmError(ReturnCode.INVALID_KEYHANDLE)
    if key.usage in {KeyUsage.AUTHCHANGE, KeyUsage.MIGRATE}:
        raise TpmError(ReturnCode.INVALID_KEYUSAGE)
    if encode(cmd.pub_key) != encode(key.pubkey()):
        raise TpmError(ReturnCode.BAD_PARAMETER, "another key's public part")
    if cmd.bit_name != KEY_CONTROL_OWNER_EVICT:
        raise TpmError(ReturnCode.BAD_MODE)
    is_kept = cmd.key_handle in tpm.permanent.owner_evict_keys
    if cmd.bit_value and not is_kept:
        _check_may_be_kept(tpm, key)
        _move(tpm, cmd.key_handle, key, to_owner=True)
    elif is_kept and not cmd.bit_value:
        _move(tpm, cmd.key_handle, key, to_owner=False)


def _check_may_be_kept(tpm: Tpm, key: LoadedKey) -> None:
    profile = tpm.world.profile
    kept = len(tpm.permanent.owner_evict_keys) + 1
    if kept > min(profile.owner_evict_slots, profile.key_slots - _SLOTS_FOR_OTHERS):
        raise TpmError(ReturnCode.NOSPACE)
    if key.parent_pcr_status:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a parent of the key hangs on PCRs")
    if key.flags & KeyFlags.IS_VOLATILE:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a volatile key")


def _move(tpm: Tpm, handle: int, key: LoadedKey, *, to_owner: bool) -> None:
    permanent, volatile = tpm.change_permanent(), tpm.change_volatile()
    if to_owner:
        volatile.keys = {h: k for h, k in volatile.keys.items() if h != handle}
        permanent.owner_evict_keys = {**permanent.owner_evict_keys, handle: key}
    else:
        kept = permanent.owner_evict_keys
        permanent.owner_evict_keys = {h: k for h, k in kept.items() if h != handle}
        volatile.keys = {**volatile.keys, handle: key}
