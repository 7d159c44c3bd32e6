"""What a person is told when something fails: what, why and what to do next.

Every daemon and every subcommand ends through `Failure`; anything else that reaches `main` is a bug
of ours.
"""

from __future__ import annotations

import errno
from enum import IntEnum
from typing import Final

OUT_OF_RESOURCES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What the system lacks for one more file or socket; it may pass."""


class ExitCode(IntEnum):
    """Exit statuses of all programs of the stack; the numbers are those of sysexits(3)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DAMAGED = 65
    """A stored file cannot be read, verified or unsealed; it was left as it is."""
    NO_INPUT = 66
    UNAVAILABLE = 69
    """A peer that is needed (launcher, manager, chip, vTPM) is not there."""
    BUG = 70
    IO_ERROR = 74
    NO_PERMISSION = 77
    CONFIGURATION = 78


class Failure(Exception):  # noqa: N818 - it is no error of the program
    """An expected failure, told to the person who can do something about it.

    Args:
        what: What could not be done, with the name of the thing ("cannot open image /x.img").
        why: The cause, as far as it is known.
        next_step: What the reader can do now; a command line where there is one.
        exit_code: The status with which a program that ends on this failure exits.
    """

    def __init__(
        self, what: str, *, why: str, next_step: str, exit_code: ExitCode = ExitCode.FAILED
    ) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.next_step = next_step
        self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.what}: {self.why}. {self.next_step}"


class NotNow(Failure):
    """What is lacking may be there a little later: room at a peer, a descriptor of our own."""
