"""Declaring commands: what an ordinal takes, who may send it when, and which function does it.

Commands register with `@command`; `table()` collects them and refuses gaps and doubles. This module
runs nothing: `engine.py` is the main path, `client.py` sends from the same declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Final, TypeVar, cast

from protocol.constants import HEADER_BYTES, Ordinal, Tag
from protocol.return_codes import ReturnCode
from protocol.wire import HANDLE, wire, wire_fields
from tpm12.auditing import AUDITED_AT_FACTORY
from tpm12.authorization import ANY_KIND, Authorized
from tpm12.tpm import Tpm
from tpm12.transport import TRANSPORT_ONLY, TransportAuthorized


class Gate(Flag):
    """States of the TPM that a command demands or tolerates (Part 3, "actions" of each command)."""

    NONE = 0
    ENABLED = auto()
    ACTIVE = auto()
    OWNED = auto()
    BEFORE_STARTUP = auto()
    """Runs also before TPM_Startup."""
    BEFORE_SELF_TEST = auto()
    """Does not make a TPM with limited self-test test itself first."""
    IN_FAILURE_MODE = auto()
    """Runs also after a failed self-test."""
    KEEPS_SHA1_THREAD = auto()
    """Leaves a SHA-1 computation in progress alone."""
    KEEPS_SAVED_STATE = auto()
    """Leaves what TPM_SaveState kept alone."""
    USABLE = ENABLED | ACTIVE


@dataclass(frozen=True, slots=True)
class AuthBy:
    """One authorization session of a command.

    Attributes:
        over: What it authorizes: a key-handle operand, "owner" (both checked by the dispatcher), or
            another word, for which the handler calls `auth.verify(over, ...)`.
        kinds: Protocols it may speak.
        may_drop: 0: must come. 1, 2: may be left out, the lower number first.
        reads_only: The command uses only the public part of the key.
        code: What a wrong HMAC gives; None: AUTHFAIL for the first, AUTH2FAIL for the second.
    """

    over: str
    kinds: frozenset[int] = ANY_KIND
    may_drop: int = 0
    reads_only: bool = False
    code: ReturnCode | None = None

    def failure(self, position: int) -> ReturnCode:
        """The return code of a wrong HMAC at this position among the declared sessions."""
        if self.code is not None:
            return self.code
        return ReturnCode.AUTHFAIL if position == 0 else ReturnCode.AUTH2FAIL


@wire
class Nothing:
    """No operands."""


Handler = Callable[[Tpm, Any, Authorized], Any]
H = TypeVar("H", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Command:
    """One declared command.

    Attributes:
        ordinal: Its number.
        name: The specification's name, without TPM_.
        section: Where it is specified.
        takes, gives: Operand structures.
        gates: See Gate; the booleans below say the same, for the main path.
        sessions: Declared sessions, in the order of their blocks.
        handler: Does it.
        keys: Operands of `takes` that are key handles, resolved before the handler runs.
        key_handles_at: Where a request names keys, in bytes, for the log of transport sessions.
        params_at, results_at: Where in request and response the hashed parameters begin, in bytes.
        is_audited_at_factory: It is audited until the owner says otherwise.
        authorized: What the handler gets to see of the sessions.
        sessions_by_count: For each legal number of blocks, which declared session each serves.
        sessions_by_tag: The same, by the tag that says how many blocks there are.
        digest_prefix: What a response's digest begins with: success and the ordinal.
        unserved: The declared sessions when none came.
        leaves_checks: Nothing of its authorization is for the dispatcher to check.
        is_plain: May come without sessions, and then nothing but gates stands before its handler.
    """

    ordinal: int
    name: str
    section: str
    takes: type
    gives: type
    gates: Gate
    sessions: tuple[AuthBy, ...]
    handler: Handler
    keys: tuple[tuple[str, bool], ...]
    handles_in: int
    handles_out: int
    key_handles_at: tuple[int, ...]
    params_at: int
    results_at: int
    is_audited_at_factory: bool
    authorized: type[Authorized]
    needs_enabled: bool
    needs_active: bool
    needs_owner: bool
    runs_before_startup: bool
    runs_before_self_test: bool
    runs_in_failure_mode: bool
    keeps_sha1_thread: bool
    keeps_saved_state: bool
    digest_prefix: bytes
    unserved: tuple[tuple[AuthBy, None], ...]
    leaves_checks: bool
    is_plain: bool
    sessions_by_count: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    sessions_by_tag: dict[int, tuple[bool, ...]] = field(default_factory=dict)


_REGISTER: Final = "__tpm_command__"


def command(  # noqa: PLR0913 - a declaration has many words
    ordinal: int,
    *,
    name: str,
    section: str,
    takes: type = Nothing,
    gives: type = Nothing,
    gates: Gate = Gate.USABLE,
    sessions: tuple[AuthBy, ...] = (),
) -> Callable[[H], H]:
    """Declare the function below as the action of an ordinal.

    Args:
        ordinal: Its number.
        name: The specification's name, without TPM_.
        section: Part and section of TPM Main r116.
        takes: Wire structure of the operands, leading handles marked `Handle`.
        gives: Wire structure of the results, handles outside the digest marked `Handle`.
        gates: States it needs and tolerates.
        sessions: Authorization sessions, in order of their blocks.
    """

    def register(handler: H) -> H:
        key_operands = tuple(
            (by.over, by.reads_only) for by in sessions if by.over.endswith("handle")
        )
        handles_in, handles_out = _leading_handles(takes), _leading_handles(gives)
        unhashed = _UNHASHED_BYTES.get(ordinal, (4 * handles_in, 4 * handles_out))
        by_count = _assignments(sessions)
        is_audited = ordinal in AUDITED_AT_FACTORY
        declared = Command(
            ordinal=ordinal,
            name=name,
            section=section,
            takes=takes,
            gives=gives,
            gates=gates,
            sessions=sessions,
            handler=cast("Handler", handler),
            keys=key_operands,
            handles_in=handles_in,
            handles_out=handles_out,
            key_handles_at=_key_handles_at(ordinal, takes),
            params_at=HEADER_BYTES + unhashed[0],
            results_at=HEADER_BYTES + unhashed[1],
            is_audited_at_factory=is_audited,
            authorized=(
                TransportAuthorized
                if any(by.kinds is TRANSPORT_ONLY for by in sessions)
                else Authorized
            ),
            needs_enabled=Gate.ENABLED in gates,
            needs_active=Gate.ACTIVE in gates,
            needs_owner=Gate.OWNED in gates,
            runs_before_startup=Gate.BEFORE_STARTUP in gates,
            runs_before_self_test=Gate.BEFORE_SELF_TEST in gates,
            runs_in_failure_mode=Gate.IN_FAILURE_MODE in gates,
            keeps_sha1_thread=Gate.KEEPS_SHA1_THREAD in gates,
            keeps_saved_state=Gate.KEEPS_SAVED_STATE in gates,
            digest_prefix=bytes(4) + ordinal.to_bytes(4, "big"),
            unserved=tuple((by, None) for by in sessions),
            leaves_checks=not key_operands and all(by.over != "owner" for by in sessions),
            is_plain=0 in by_count and not (key_operands or is_audited),
            sessions_by_count=by_count,
            sessions_by_tag={Tag.RQU_COMMAND + count: by_count[count] for count in by_count},
        )
        setattr(handler, _REGISTER, declared)
        return handler

    return register


def commands_of(modules: Iterable[object]) -> list[Command]:
    """The commands that modules declare."""
    return [
        getattr(thing, _REGISTER)
        for module in modules
        for thing in vars(module).values()
        if hasattr(thing, _REGISTER)
    ]


def table(commands: Iterable[Command]) -> dict[int, Command]:
    """Commands by ordinal.

    Raises:
        ValueError: Two commands have one ordinal.
    """
    found: dict[int, Command] = {}
    for declared in commands:
        if declared.ordinal in found:
            raise ValueError(f"ordinal 0x{declared.ordinal:08x} is declared twice")
        found[declared.ordinal] = declared
    return found


_UNHASHED_BYTES: Final[dict[int, tuple[int, int]]] = {
    # Nothing of setting up a session is hashed, logged or encrypted, but the entityValue of a
    # TPM_DSAP without its size (Part 3 §24.2, 6 f and g).
    Ordinal.OIAP: (0, 24),
    Ordinal.OSAP: (26, 44),
    Ordinal.DSAP: (30, 44),
}
_KEY_OPERANDS: Final = frozenset(
    {
        "cert_handle",
        "eph_handle",
        "id_handle",
        "id_key_handle",
        "key_handle",
        "ma_key_handle",
        "parent_handle",
    }
)


def _key_handles_at(ordinal: int, takes: type) -> tuple[int, ...]:
    """Offsets of key handles in a request; what only its other operands tell is not among them."""
    if ordinal == Ordinal.EVICT_KEY:
        return (HEADER_BYTES,)
    names = [wire_field.name for wire_field in wire_fields(takes)]
    leading = len(names) if ordinal == Ordinal.OWNER_READ_INTERNAL_PUB else _leading_handles(takes)
    return tuple(HEADER_BYTES + 4 * i for i in range(leading) if names[i] in _KEY_OPERANDS)


def _leading_handles(structure: type) -> int:
    count = 0
    for wire_field in wire_fields(structure):
        if HANDLE not in wire_field.markers:
            break
        count += 1
    return count


def _assignments(sessions: tuple[AuthBy, ...]) -> dict[int, tuple[bool, ...]]:
    """For each legal number of auth blocks: which declared sessions they are for, in order."""
    present = [True] * len(sessions)
    found = {len(sessions): tuple(present)}
    droppable = [i for i, by in enumerate(sessions) if by.may_drop]
    for i in sorted(droppable, key=lambda i: sessions[i].may_drop):
        present[i] = False
        found[sum(present)] = tuple(present)
    return found
