"""The locality 4 hash sequence: what the bus cycles HASH_START, HASH_DATA and HASH_END do.

They have no ordinals; the chip's TIS front calls them.

Source: PC Client TIS 1.2 (DRTM), TPM Main r116 Part 1 on tpmEstablished and TOSPresent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Final

from protocol.constants import ZERO_DIGEST
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import PermanentFlags
from tpm12.crypto import Sha1Thread, sha1
from tpm12.pcrs import DRTM_PCR, DYNAMIC_PCRS
from tpm12.tpm import Tpm

BusCycle = Callable[[Tpm], None]
_FLAG_NAMES: Final = tuple(f.name for f in fields(PermanentFlags) if f.name != "tag")


def with_flags(flags: PermanentFlags, **changed: bool) -> PermanentFlags:
    """The same permanent flags but for the named ones."""
    values = {name: getattr(flags, name) for name in _FLAG_NAMES}
    return PermanentFlags(**{**values, **changed})


def hash_start(tpm: Tpm) -> None:
    """Begin: dynamic PCRs to zero, tpmEstablished and TOSPresent set.

    Raises:
        TpmError: INVALID_POSTINIT before TPM_Startup.
    """
    if tpm.stany.post_initialise:
        raise TpmError(ReturnCode.INVALID_POSTINIT)
    if not tpm.permanent.flags.tpm_established:
        permanent = tpm.change_permanent()
        permanent.flags = with_flags(permanent.flags, tpm_established=True)
    stany = tpm.change_stany()
    stany.tos_present = True
    stany.transport_exclusive = 0
    stclear = tpm.change_stclear()
    stclear.pcrs = {**stclear.pcrs, **dict.fromkeys(DYNAMIC_PCRS, ZERO_DIGEST)}
    volatile = tpm.change_volatile()
    volatile.sha1_thread = None
    volatile.hash_sequence = Sha1Thread()


def hash_data(tpm: Tpm, data: bytes) -> None:
    """Feed bytes.

    Raises:
        TpmError: SHA_THREAD without a HASH_START.
    """
    sequence = tpm.volatile.hash_sequence
    if sequence is None:
        raise TpmError(ReturnCode.SHA_THREAD)
    tpm.change_volatile().hash_sequence = sequence.fed(data)


def hash_end(tpm: Tpm) -> None:
    """End: PCR 17 is extended, from zero, with the digest of what was fed.

    Raises:
        TpmError: SHA_THREAD without a HASH_START.
    """
    sequence = tpm.volatile.hash_sequence
    if sequence is None:
        raise TpmError(ReturnCode.SHA_THREAD)
    tpm.change_volatile().hash_sequence = None
    stclear = tpm.change_stclear()
    stclear.pcrs = {**stclear.pcrs, DRTM_PCR: sha1(ZERO_DIGEST + sequence.digest())}
