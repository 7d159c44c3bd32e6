"""The locality 4 hash sequence: what the bus cycles HASH_START, HASH_DATA and HASH_END do.

They have no ordinals; the chip's TIS front calls them.

Source: PC Client TIS 1.2 (DRTM), TPM Main r116 Part 1 on tpmEstablished and TOSPresent.
"""

from __future__ import annotations

from collections.abc import Callable

from protocol.constants import ZERO_DIGEST
from protocol.return_codes import ReturnCode, TpmError
from tpm12 import transport
from tpm12.crypto import sha1
from tpm12.flags import set_flags
from tpm12.pcrs import DRTM_PCR, DYNAMIC_PCRS
from tpm12.sha1 import Sha1Thread
from tpm12.tpm import Tpm

BusCycle = Callable[[Tpm], None]


def hash_start(tpm: Tpm) -> None:
    """Begin: dynamic PCRs to zero, tpmEstablished and TOSPresent set.

    Raises:
        TpmError: INVALID_POSTINIT before TPM_Startup.
    """
    if tpm.stany.post_initialise:
        raise TpmError(ReturnCode.INVALID_POSTINIT)
    set_flags(tpm, tpm_established=True)
    transport.end(tpm, tpm.stany.transport_exclusive)
    tpm.change_stany().tos_present = True
    if tpm.permanent.saved_state is not None:
        tpm.change_permanent().saved_state = None
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
