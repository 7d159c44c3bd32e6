"""A program that takes amiss what it should not even see: that its vTPM is another process now."""

import os
import sys
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.places import Places
from daemons.registry import Registry
from daemons.world import SystemRng
from tpm12.client import TpmClient

registry = Registry(Places(Path(os.environ["VTPM_ROOT"])).registry)
before = registry.get("vtpm-guest1").pid
with Tpm0Client(os.environ["TPM_DEVICE"]) as device:
    TpmClient(device.exchange, rng=SystemRng()).extend(10, bytes(20))
if registry.get("vtpm-guest1").pid != before:
    sys.exit("the vTPM is another process")
