"""What the ordinals do, one module per chapter of TPM Main r116 Part 3.

Command modules never import each other; logic that two need stands one floor down, in `keys.py`,
`pcrs.py`, `authorization.py` and their like.
"""

from __future__ import annotations

from typing import Final

from tpm12.commands import (
    audit,
    auth_change,
    auth_sessions,
    capability,
    context,
    cryptographic,
    daa,
    delegation,
    identity,
    integrity,
    maintenance,
    management,
    migration,
    nv_storage,
    ownership,
    startup,
    storage,
    ticks_counters,
    transport,
)
from tpm12.dispatch import Command, commands_of

ALL: Final[list[Command]] = commands_of(
    (
        startup,
        integrity,
        auth_sessions,
        context,
        delegation,
        ownership,
        capability,
        management,
        identity,
        storage,
        migration,
        maintenance,
        cryptographic,
        auth_change,
        nv_storage,
        ticks_counters,
        daa,
        audit,
        transport,
    )
)
"""Every command of the TPM; vendor commands are added by who has them."""
