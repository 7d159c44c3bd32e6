"""Which commands a vTPM has: those of maintenance only with `maintcmds=1`.

Without them they are not in the engine's table at all. So they are not there inside a transport
session either, where nobody but the engine sees which command it is, and TPM_CAP_ORD says so.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import Ordinal
from tpm12.commands import ALL
from tpm12.dispatch import Command

MAINTENANCE: Final = frozenset(
    {
        Ordinal.CREATE_MAINTENANCE_ARCHIVE,
        Ordinal.LOAD_MAINTENANCE_ARCHIVE,
        Ordinal.KILL_MAINTENANCE_FEATURE,
        Ordinal.LOAD_MANU_MAINT_PUB,
        Ordinal.READ_MANU_MAINT_PUB,
    }
)


def command_set(*, has_maintenance_commands: bool) -> list[Command]:
    """The commands of one vTPM.

    Args:
        has_maintenance_commands: From `maintcmds=`.
    """
    if has_maintenance_commands:
        return list(ALL)
    return [command for command in ALL if command.ordinal not in MAINTENANCE]
