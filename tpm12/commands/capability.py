"""Telling what the TPM can do and how it stands, and changing it: TPM Main r116 Part 3, chapter 7.

Leaves to others: what there is to tell (`tpm12.capabilities`). TPM_SetCapability is a table of what
may be set, by whom and to what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import B4, U32, Sized, wire
from tpm12 import self_test
from tpm12.authorization import Authorized
from tpm12.capabilities import as_bits, is_told_untested, stclear_flags, tell
from tpm12.clearing import renew_daa_secrets
from tpm12.dispatch import AuthBy, Gate, Nothing, command
from tpm12.flags import set_flags
from tpm12.state import SelfTestState
from tpm12.tpm import Tpm

# -- TPM_GetCapability -----------------------------------------------------------------------------


@wire
class GetCapabilityIn:
    """§7.1 incoming operands."""

    cap_area: U32
    sub_cap: Sized


@wire
class GetCapabilityOut:
    """§7.1 outgoing operands."""

    resp: Sized


@command(
    Ordinal.GET_CAPABILITY,
    name="GetCapability",
    section="Part 3 §7.1",
    takes=GetCapabilityIn,
    gives=GetCapabilityOut,
    gates=Gate.BEFORE_SELF_TEST | Gate.IN_FAILURE_MODE,
)
def get_capability(tpm: Tpm, cmd: GetCapabilityIn, _auth: Authorized) -> GetCapabilityOut:
    """Tell one thing about the TPM.

    What a TPM is, is told in failure mode and before the self-test too; what it can do, is not.

    Raises:
        TpmError: BAD_MODE for an unknown area or sub-capability; FAILEDSELFTEST; as the area says.
    """
    tested = tpm.volatile.self_test
    if tested != SelfTestState.FULL and not is_told_untested(cmd.cap_area, cmd.sub_cap):
        if tested == SelfTestState.FAILURE:
            raise TpmError(ReturnCode.FAILEDSELFTEST)
        self_test.run_full(tpm)
        tpm.settle()
    return GetCapabilityOut(resp=tell(tpm, cmd.cap_area, cmd.sub_cap))


# -- TPM_GetCapabilityOwner ------------------------------------------------------------------------


@wire
class GetCapabilityOwnerOut:
    """§7.3 outgoing operands."""

    version: B4
    non_volatile_flags: U32
    volatile_flags: U32


@command(
    Ordinal.GET_CAPABILITY_OWNER,
    name="GetCapabilityOwner",
    section="Part 3 §7.3",
    gives=GetCapabilityOwnerOut,
    gates=Gate.USABLE | Gate.OWNED,
    sessions=(AuthBy("owner"),),
)
def get_capability_owner(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> GetCapabilityOwnerOut:
    """Tell the owner version and flags (of 1.1 age)."""
    return GetCapabilityOwnerOut(
        version=tpm.world.profile.version,
        non_volatile_flags=as_bits(tpm.permanent.flags),
        volatile_flags=as_bits(stclear_flags(tpm)),
    )


# -- TPM_SetCapability -----------------------------------------------------------------------------


@wire
class SetCapabilityIn:
    """§7.2 incoming operands."""

    cap_area: U32
    sub_cap: Sized
    set_value: Sized


_PERM_FLAGS, _PERM_DATA, _STCLEAR_FLAGS, _STCLEAR_DATA, _STANY_FLAGS, _STANY_DATA, _VENDOR = range(
    1, 8
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settable:
    """Something that TPM_SetCapability may set (Part 2 §7.1 to §7.6, "Flag restrictions").

    Attributes:
        store: Sets it, given the value.
        value_bytes: Size of setValue; None: there is no value, one that comes is ignored.
        by_owner, by_presence: Who may; either suffices; neither: anyone.
        localities: From where; empty: from anywhere.
        gates: ENABLED, ACTIVE.
        only: The one value that may be set; None: any.
        is_for_unowned: Not while there is an owner.
    """

    store: Callable[[Tpm, int], None]
    value_bytes: int | None = 1
    by_owner: bool = False
    by_presence: bool = False
    localities: frozenset[int] = frozenset()
    gates: Gate = Gate.NONE
    only: int | None = None
    is_for_unowned: bool = False


def _permanent_flag(name: str) -> Callable[[Tpm, int], None]:
    return lambda tpm, value: set_flags(tpm, **{name: bool(value)})


def _store_disable_force_clear(tpm: Tpm, _value: int) -> None:
    tpm.change_stclear().disable_force_clear = True


def _store_tos_present(tpm: Tpm, _value: int) -> None:
    tpm.change_stany().tos_present = False


def _store_restrict_delegate(tpm: Tpm, value: int) -> None:
    if tpm.permanent.restrict_delegate != value:
        tpm.change_permanent().restrict_delegate = value


def _store_daa_secrets(tpm: Tpm, _value: int) -> None:
    renew_daa_secrets(tpm)


def _store_deferred_presence(tpm: Tpm, value: int) -> None:
    if value & ~tpm.stclear.deferred_physical_presence:
        tpm.require_presence()  # taking bits back needs nobody
    tpm.change_stclear().deferred_physical_presence = value


_LAUNCH: Final = frozenset({3, 4})
_SETTABLE: Final[dict[int, dict[int, Settable]]] = {
    _PERM_FLAGS: {
        1: Settable(store=_permanent_flag("disable"), by_owner=True, by_presence=True),
        2: Settable(
            store=_permanent_flag("ownership"),
            by_presence=True,
            gates=Gate.USABLE,
            is_for_unowned=True,
        ),
        3: Settable(store=_permanent_flag("deactivated"), by_presence=True, gates=Gate.ENABLED),
        4: Settable(store=_permanent_flag("read_pubek"), by_owner=True, gates=Gate.USABLE),
        5: Settable(
            store=_permanent_flag("disable_owner_clear"),
            by_owner=True,
            gates=Gate.USABLE,
            only=True,
        ),
        6: Settable(
            store=_permanent_flag("allow_maintenance"), by_owner=True, gates=Gate.USABLE, only=False
        ),
        17: Settable(store=_permanent_flag("read_srk_pub"), by_owner=True, gates=Gate.USABLE),
        18: Settable(store=_permanent_flag("tpm_established"), localities=_LAUNCH, only=False),
        20: Settable(store=_permanent_flag("disable_full_da_logic_info"), by_owner=True),
    },
    _PERM_DATA: {
        23: Settable(
            store=_store_restrict_delegate, value_bytes=4, by_owner=True, gates=Gate.USABLE
        ),
        # The owner's alone: who may renew daaProof may destroy every DAA credential.
        25: Settable(store=_store_daa_secrets, value_bytes=None, by_owner=True, gates=Gate.USABLE),
    },
    _STCLEAR_FLAGS: {2: Settable(store=_store_disable_force_clear, gates=Gate.USABLE, only=True)},
    _STCLEAR_DATA: {6: Settable(store=_store_deferred_presence, value_bytes=4)},
    _STANY_FLAGS: {
        4: Settable(store=_store_tos_present, localities=_LAUNCH, gates=Gate.USABLE, only=False)
    },
    _STANY_DATA: {},
    _VENDOR: {},
}


@command(
    Ordinal.SET_CAPABILITY,
    name="SetCapability",
    section="Part 3 §7.2",
    takes=SetCapabilityIn,
    gates=Gate.NONE,
    sessions=(AuthBy("owner", may_drop=1),),
)
def set_capability(tpm: Tpm, cmd: SetCapabilityIn, auth: Authorized) -> None:
    """Set one flag or value; a value that it has already costs nothing.

    Raises:
        TpmError: AUTHFAIL; BAD_PARAMETER for what may not be set, or not to this; BAD_LOCALITY;
            BAD_PRESENCE; DISABLED, DEACTIVATED; OWNER_SET.
    """
    area = _SETTABLE.get(cmd.cap_area, {})
    settable = area.get(int.from_bytes(cmd.sub_cap, "big")) if len(cmd.sub_cap) == 4 else None
    if settable is None:
        raise TpmError(ReturnCode.BAD_PARAMETER, "not to be set")
    if settable.value_bytes not in {None, len(cmd.set_value)}:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a value of another size")
    _check_may_set(tpm, settable, has_owner_session=auth.has("owner"))
    value = int.from_bytes(cmd.set_value, "big")
    if settable.value_bytes == 1 and value > 1:
        raise TpmError(ReturnCode.BAD_PARAMETER, "a BOOL other than 0 or 1")
    if settable.only not in {None, value}:
        raise TpmError(ReturnCode.BAD_PARAMETER, "not to be set to this")
    settable.store(tpm, value)


def _check_may_set(tpm: Tpm, settable: Settable, *, has_owner_session: bool) -> None:
    needs_someone = settable.by_owner or settable.by_presence
    if needs_someone and not (
        (settable.by_owner and has_owner_session) or (settable.by_presence and tpm.has_presence)
    ):
        raise TpmError(ReturnCode.AUTHFAIL)
    if settable.localities and tpm.locality not in settable.localities:
        raise TpmError(ReturnCode.BAD_LOCALITY)
    if Gate.ENABLED in settable.gates and tpm.permanent.flags.disable:
        raise TpmError(ReturnCode.DISABLED)
    if Gate.ACTIVE in settable.gates and tpm.stclear.deactivated:
        raise TpmError(ReturnCode.DEACTIVATED)
    if settable.is_for_unowned and tpm.has_owner:
        raise TpmError(ReturnCode.OWNER_SET)
