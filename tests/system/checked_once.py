"""A program in a guest that changes volatile and permanent state once and checks each answer."""

import hashlib
import os

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from tpm12.client import TpmClient

NV_INDEX = 0x21
OWNER_READ_AND_WRITE = 0x00020002
MEASUREMENT = b"\xa5" * 20

with Tpm0Client(os.environ["TPM_DEVICE"]) as device:
    tpm = TpmClient(device.exchange, rng=SystemRng())
    before = tpm.pcr_read(10)
    expected = hashlib.sha1(before + MEASUREMENT, usedforsecurity=False).digest()
    assert tpm.extend(10, MEASUREMENT) == expected
    tpm.take_ownership()
    tpm.nv_define_space(NV_INDEX, 16, OWNER_READ_AND_WRITE)
    tpm.nv_write_value(NV_INDEX, b"sixteen bytes...")
    assert tpm.nv_read_value(NV_INDEX, 16) == b"sixteen bytes..."
    assert tpm.pcr_read(10) == expected
