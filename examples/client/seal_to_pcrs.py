"""Seal a secret to PCR values: it comes out as long as they are the same.

vtpm exec guest1 -- python seal_to_pcrs.py, on a TPM without an owner
"""

import os
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.return_codes import TpmError
from tpm12.client import TpmClient

with Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection:
    tpm = TpmClient(connection.exchange, rng=SystemRng())
    tpm.take_ownership()
    now = {pcr: tpm.pcr_read(pcr) for pcr in (10, 11)}
    blob = tpm.seal(b"the disk key", release=now, auth=b"twenty bytes of auth")
    print(tpm.unseal(blob, auth=b"twenty bytes of auth").decode())

    tpm.extend(11, bytes(20))
    try:
        tpm.unseal(blob, auth=b"twenty bytes of auth")
    except TpmError as refusal:
        print("after an extend:", refusal)
