"""One command's view of the TPM: the state as it is, and the changes it makes.

A `Tpm` is a draft. Sections are read directly (`tpm.stclear.pcrs`) and changed through
`change_*()`, which clones a section before its first change. `rollback()` drops every change since
the last `settle()`; nothing outside sees a draft until the engine hands it over.

Leaves to others: authorization (`authorization.py`), what commands do (`commands/`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from protocol.constants import KeyHandleValue
from protocol.return_codes import ReturnCode, TpmError
from tpm12.keys import LoadedKey
from tpm12.ports import Clock, KeyGenerator, StirrableRng
from tpm12.profile import Profile
from tpm12.state import Permanent, StAny, State, StClear, Volatile

if TYPE_CHECKING:
    from tpm12.dispatch import Command

_SRK: Final = int(KeyHandleValue.SRK)
_RESERVED: Final = {
    int(KeyHandleValue.OWNER): ReturnCode.INVALID_RESOURCE,
    int(KeyHandleValue.REVOKE): ReturnCode.INVALID_RESOURCE,
    int(KeyHandleValue.TRANSPORT): ReturnCode.INVALID_RESOURCE,
    int(KeyHandleValue.OPERATOR): ReturnCode.INVALID_RESOURCE,
    int(KeyHandleValue.ADMIN): ReturnCode.INVALID_RESOURCE,
    int(KeyHandleValue.EK): ReturnCode.KEYNOTFOUND,
}
"""What naming one of these handles in place of a key comes to."""
_RESERVED_HANDLES: Final = 0x40
"""Top byte of the reserved handles; free handles stay out of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What an engine is given from outside, once."""

    rng: StirrableRng
    clock: Clock
    key_generator: KeyGenerator
    profile: Profile
    commands: Mapping[int, Command]
    """What the engine implements, by ordinal."""
    run_wrapped: Callable[[Tpm, bytes, Wrapping], bytes]
    """Run a command that came inside another one on the other's draft; gives its response."""
    wrapping: Wrapping | None = None
    """How the command came; None: by itself."""

    @property
    def ordinals(self) -> Collection[int]:
        """What the engine implements, for TPM_CAP_ORD."""
        return self.commands.keys()


@dataclass(frozen=True, slots=True)
class Wrapping:
    """The transport session around a command (Part 3 §24.2)."""

    trans_handle: int
    is_encrypted: bool
    overhead_bytes: int
    """What the outer request or response, whichever has more, takes from its own packet."""


class Tpm:
    """The draft a command works on.

    Attributes:
        permanent, stclear, stany, volatile: The sections; read only, see `change_*()`.
        locality: Of the command, 0 to 4.
    """

    __slots__ = (
        "_ground",
        "locality",
        "permanent",
        "stany",
        "stclear",
        "volatile",
        "world",
    )

    def __init__(self, state: State, world: World, locality: int) -> None:
        self._ground = state  # to which `rollback()` returns
        self.permanent = state.permanent
        self.stclear = state.stclear
        self.stany = state.stany
        self.volatile = state.volatile
        self.world = world
        self.locality = locality

    # -- changing ----------------------------------------------------------------------------

    def change_permanent(self) -> Permanent:
        """The permanent section, to be changed: makes the command a durable one."""
        permanent = self.permanent
        if permanent is self._ground.permanent:
            permanent = self.permanent = permanent.clone()
        return permanent

    def change_stclear(self) -> StClear:
        """The ST_CLEAR section, to be changed."""
        stclear = self.stclear
        if stclear is self._ground.stclear:
            stclear = self.stclear = stclear.clone()
        return stclear

    def change_stany(self) -> StAny:
        """The ST_ANY section, to be changed."""
        stany = self.stany
        if stany is self._ground.stany:
            stany = self.stany = stany.clone()
        return stany

    def change_volatile(self) -> Volatile:
        """The volatile section, to be changed."""
        volatile = self.volatile
        if volatile is self._ground.volatile:
            volatile = self.volatile = volatile.clone()
        return volatile

    def settle(self) -> State:
        """Make the changes so far the ground to which `rollback()` returns, and give it."""
        state = self._ground = State(self.permanent, self.stclear, self.stany, self.volatile)
        return state

    def rollback(self) -> None:
        """Drop every change since the last `settle()`."""
        self.adopt(self._ground)

    def state(self) -> State:
        """The state with the changes made."""
        return State(self.permanent, self.stclear, self.stany, self.volatile)

    def adopt(self, state: State) -> None:
        """Take over what a command made of `state()` that ran inside this one."""
        self.permanent, self.stclear = state.permanent, state.stclear
        self.stany, self.volatile = state.stany, state.volatile

    # -- what commands ask for ---------------------------------------------------------------

    def random(self, size: int) -> bytes:
        """Random bytes for nonces, handles, keys."""
        return self.world.rng.random(size)

    def new_handle(self, *taken: Collection[int]) -> int:
        """A handle that none of `taken` uses and that is not one of the reserved."""
        while True:
            raw = self.world.rng.random(4)
            handle = int.from_bytes(raw, "big")
            if raw[0] != _RESERVED_HANDLES and handle and all(handle not in t for t in taken):
                return handle

    @property
    def wrapped_in(self) -> int:
        """Handle of the transport session that the command came through; 0: none."""
        wrapping = self.world.wrapping
        return 0 if wrapping is None else wrapping.trans_handle

    @property
    def locality_bit(self) -> int:
        """The command's locality as a TPM_LOCALITY_SELECTION."""
        return 1 << self.locality

    @property
    def has_owner(self) -> bool:
        """Is an owner installed?"""
        return self.permanent.owner_auth is not None

    @property
    def has_presence(self) -> bool:
        """Is physical presence asserted, by command or by the pin (Part 1 §10)?"""
        flags = self.permanent.flags
        return (flags.physical_presence_cmd_enable and self.stclear.physical_presence) or (
            flags.physical_presence_hw_enable and self.volatile.physical_presence_pin
        )

    def require_presence(self) -> None:
        """Check physical presence.

        Raises:
            TpmError: BAD_PRESENCE.
        """
        if not self.has_presence:
            raise TpmError(ReturnCode.BAD_PRESENCE)

    def require_enabled_and_active(self) -> None:
        """Check opt-in state, for commands that need it only in some cases.

        Raises:
            TpmError: DISABLED or DEACTIVATED.
        """
        if self.permanent.flags.disable:
            raise TpmError(ReturnCode.DISABLED)
        if self.stclear.deactivated:
            raise TpmError(ReturnCode.DEACTIVATED)

    @property
    def is_enabled_and_active(self) -> bool:
        """Neither disabled nor deactivated."""
        return not (self.permanent.flags.disable or self.stclear.deactivated)

    def key_in_slot(self, handle: int) -> LoadedKey | None:
        """The key that was loaded under a handle, an owner-evict key too; no reserved one."""
        return self.volatile.keys.get(handle) or self.permanent.owner_evict_keys.get(handle)

    def key(self, handle: int) -> LoadedKey:
        """The key at a handle: a slot, an owner-evict key, or the SRK.

        Raises:
            TpmError: INVALID_KEYHANDLE, for the SRK of an unowned TPM too; KEYNOTFOUND for the
                EK, which TPM_OwnerReadInternalPub alone knows by its handle; INVALID_RESOURCE
                for a reserved handle that is no key's. The specification names no code for the
                last two: these are the ones that clients know.
        """
        found = self.permanent.srk if handle == _SRK else self.key_in_slot(handle)
        if found is None:
            code = _RESERVED.get(handle, ReturnCode.INVALID_KEYHANDLE)
            raise TpmError(code, f"no key at 0x{handle:08x}")
        return found
