"""Let somebody else use one of the owner's commands, and take it back.

vtpm exec guest1 -- python delegation.py, on a TPM without an owner
"""

import os
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import DelegateType, EntityType, FamilyOperation, KeyHandleValue, Ordinal
from protocol.delegation_structures import DelegatePublic, Delegations
from protocol.return_codes import TpmError
from protocol.structures import UNRESTRICTED_PCR_INFO
from protocol.wire import encode
from tpm12.client import TpmClient, Use
from tpm12.delegation import PERMISSIONS

OWNER, HELPER = b"the owner's own auth", b"the helper's secret."


def read_internal_pub(tpm: TpmClient, blob: bytes) -> int:
    """Use the delegation; gives the size of the storage root key."""
    session = tpm.dsap(EntityType.DEL_OWNER_BLOB, blob, HELPER)
    read = tpm.call(Ordinal.OWNER_READ_INTERNAL_PUB, Use(session), key_handle=KeyHandleValue.SRK)
    return 8 * len(read.public_portion.pub_key.key)


with Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection:
    tpm = TpmClient(connection.exchange, rng=SystemRng())
    tpm.take_ownership(OWNER)

    def manage(operation: int, family: int = 0, data: bytes = b"") -> bytes:
        """The owner manages a family of delegations."""
        proof = Use(tpm.oiap(), OWNER)
        out = tpm.call(
            Ordinal.DELEGATE_MANAGE, proof, family_id=family, op_code=operation, op_data=data
        )
        return out.ret_data

    family = int.from_bytes(manage(FamilyOperation.CREATE, data=b"H"), "big")
    manage(FamilyOperation.ENABLE, family, b"\1")

    bits = PERMISSIONS[DelegateType.OWNER_BITS]
    allowed = Delegations(
        delegate_type=DelegateType.OWNER_BITS, per1=bits[Ordinal.OWNER_READ_INTERNAL_PUB], per2=0
    )
    public = DelegatePublic(
        label=ord("h"),
        pcr_info=UNRESTRICTED_PCR_INFO,
        permissions=allowed,
        family_id=family,
        verification_count=0,
    )
    session = tpm.osap(EntityType.OWNER, 0, OWNER)
    made = tpm.call(
        Ordinal.DELEGATE_CREATE_OWNER_DELEGATION,
        Use(session),
        increment=False,
        public_info=public,
        del_auth=session.mask(HELPER),
    )
    blob = encode(made.blob)

    print("the storage root key has", read_internal_pub(tpm, blob), "bits")

    manage(FamilyOperation.INVALIDATE, family)
    try:
        read_internal_pub(tpm, blob)
    except TpmError as refusal:
        print("after the family was invalidated:", refusal)
