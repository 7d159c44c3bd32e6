"""What a guest can have in its TPM, and the check that all of it is still there."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field

from protocol.constants import KeyHandleValue
from protocol.structures import StoredData, StoredData12, StorePubkey
from tests.system.scratch_stack import ScratchStack

EK = int(KeyHandleValue.EK)
NV_INDEX = 0x11
OWNER_READ_AND_WRITE = 0x00020002
BOOT_PCRS = (4, 5)
Blob = StoredData | StoredData12


@dataclass
class Belongings:
    """An owned TPM with an NV area, and a secret sealed to PCR 4 and 5."""

    owner_auth: bytes = field(default_factory=lambda: secrets.token_bytes(20), repr=False)
    nv_data: bytes = field(default_factory=lambda: secrets.token_bytes(24))
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)
    public_key: StorePubkey | None = None
    blob: Blob | None = None

    def put_into(self, stack: ScratchStack, guest: str) -> None:
        """Own the TPM, define and write the NV area, seal the secret to what was booted."""
        with stack.tpm(guest) as tpm:
            self.public_key = tpm.read_pubek().pub_key
            tpm.take_ownership(owner_auth=self.owner_auth)
            tpm.nv_define_space(
                NV_INDEX, len(self.nv_data), OWNER_READ_AND_WRITE, owner_auth=self.owner_auth
            )
            tpm.nv_write_value(NV_INDEX, self.nv_data, owner_auth=self.owner_auth)
            self.blob = tpm.seal(self.secret, release={pcr: tpm.pcr_read(pcr) for pcr in BOOT_PCRS})

    def check(self, stack: ScratchStack, guest: str) -> None:
        """See that it is the same TPM with the same owner, NV content and storage root key."""
        with stack.tpm(guest) as tpm:
            assert tpm.owner_read_internal_pub(EK, self.owner_auth).pub_key == self.public_key
            read = tpm.nv_read_value(NV_INDEX, len(self.nv_data), owner_auth=self.owner_auth)
            assert read == self.nv_data
            assert self.blob is not None
            assert tpm.unseal(self.blob) == self.secret
