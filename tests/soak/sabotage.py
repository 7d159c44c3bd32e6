"""Controls: what a soak must notice, done on purpose.

A soak that finds nothing proves something only if it would have found these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from enum import StrEnum
from typing import Final

from tests.system.scratch_stack import GUEST1, GUEST2, ScratchStack

EXTEND: Final = bytes.fromhex("00000014")
CONNECTIONS: Final = 8
Exchange = Callable[[bytes], bytes]


class Kind(StrEnum):
    """What can be broken on purpose."""

    TWICE = "twice"
    """The TPM of guest1 does an extend twice."""
    LOST = "lost"
    """The TPM of guest1 does not do an extend, and says it did."""
    SESSION = "session"
    """A session is left open in guest2's TPM."""
    CONNECTIONS = "connections"
    """guest2 does not close connections."""
    FILE = "file"
    """A file is left in the run directory."""


class Sabotage:
    """Breaks what it is told to.

    Args:
        kinds: What.
        after: With the how-manieth extend.
    """

    def __init__(self, kinds: frozenset[Kind] = frozenset(), after: int = 20) -> None:
        self._kinds = kinds
        self._after = after
        self._held = contextlib.ExitStack()

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def tamper(self, guest: str) -> Callable[[Exchange], Exchange]:
        """What stands between a guest's program and its TPM."""
        if guest != GUEST1 or not self._kinds & {Kind.TWICE, Kind.LOST}:
            return lambda exchange: exchange
        extends = 0

        def tampered(exchange: Exchange) -> Exchange:
            last = b""

            def call(request: bytes) -> bytes:
                nonlocal extends, last
                if request[6:10] != EXTEND:
                    return exchange(request)
                extends += 1
                if extends == self._after and Kind.LOST in self._kinds:
                    return last
                if extends == self._after:
                    exchange(request)
                last = exchange(request)
                return last

            return call

        return tampered

    def strike(self, stack: ScratchStack) -> None:
        """Leave behind what is to be left behind, before the stack is looked at last."""
        if Kind.SESSION in self._kinds:
            with stack.tpm(GUEST2) as tpm:
                tpm.oiap()
        if Kind.CONNECTIONS in self._kinds:
            for _ in range(CONNECTIONS):
                tpm = self._held.enter_context(stack.tpm(GUEST2))
                tpm.pcr_read(0)
        if Kind.FILE in self._kinds:
            (stack.places.run / "stray").touch()

    def clean_up(self, stack: ScratchStack) -> None:
        """Take it back, so that the stack can end."""
        self._held.close()
        (stack.places.run / "stray").unlink(missing_ok=True)
