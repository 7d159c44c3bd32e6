"""Define an NV area, write it, read it, lock it until the next start.

vtpm exec guest1 -- python nv_area.py, on a TPM without an owner
"""

import os
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import NvAttribute, NvIndex, Ordinal
from protocol.return_codes import TpmError
from tpm12.client import TpmClient, Use

AREA = 0x00011101
SECRET = b"the area's own auth."

with Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection:
    tpm = TpmClient(connection.exchange, rng=SystemRng())
    tpm.take_ownership()
    # What a platform's maker does last; until then NV areas protect nothing.
    tpm.nv_define_space(NvIndex.LOCK, 0, 0, owner_auth=None)

    rights = NvAttribute.OWNERWRITE | NvAttribute.AUTHREAD | NvAttribute.WRITE_STCLEAR
    tpm.nv_define_space(AREA, 16, rights, auth=SECRET)
    tpm.nv_write_value(AREA, b"written by owner")

    # Commands that have no method of their own are called by ordinal, with the specification's
    # operands. This one wants the area's secret, proven in an OIAP session.
    proof = Use(tpm.oiap(), SECRET)
    out = tpm.call(Ordinal.NV_READ_VALUE_AUTH, proof, nv_index=AREA, offset=11, data_size=5)
    print(out.data.decode())

    tpm.nv_write_value(AREA, b"")  # nothing, written to an area with WRITE_STCLEAR, locks it
    try:
        tpm.nv_write_value(AREA, b"once more")
    except TpmError as refusal:
        print("until the next start:", refusal)
