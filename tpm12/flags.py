"""Changing permanent flags: a flag that already has its value costs no write.

Source: TPM Main r116 Part 2 §7.1.
"""

from __future__ import annotations

from dataclasses import replace

from protocol.structures import PermanentFlags
from tpm12.tpm import Tpm


def with_flags(flags: PermanentFlags, **changed: bool) -> PermanentFlags:
    """The same permanent flags but for the named ones."""
    return replace(flags, **changed)


def set_flags(tpm: Tpm, **changed: bool) -> None:
    """Set permanent flags; when all have their values already, nothing changes.

    Args:
        tpm: The command's draft.
        changed: Names of flags and their new values.
    """
    flags = tpm.permanent.flags
    wanted = replace(flags, **changed)
    if wanted != flags:
        tpm.change_permanent().flags = wanted
