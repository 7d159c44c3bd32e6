"""Declaring commands: what an ordinal takes, who may send it when, and which function does it.

Commands register with `@command`; `table()` collects them and refuses gaps and doubles. This module
runs nothing: `engine.py` is the main path, `client.py` sends from the same declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import Flag, auto
from typing import Any, Final, TypeVar, cast

from protocol.return_codes import ReturnCode
from protocol.wire import HANDLE, wire, wire_fields
from tpm12.authorization import ANY_KIND, Authorized
from tpm12.tpm import Tpm


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
        gates: See Gate.
        sessions: Declared sessions, in the order of their blocks.
        handler: Does it.
        keys: Operands of `takes` that are key handles, resolved before the handler runs.
        sessions_by_count: For each legal number of blocks, which declared session each serves.
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
    sessions_by_count: dict[int, tuple[bool, ...]] = field(default_factory=dict)


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
            handles_in=_leading_handles(takes),
            handles_out=_leading_handles(gives),
            sessions_by_count=_assignments(sessions),
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
