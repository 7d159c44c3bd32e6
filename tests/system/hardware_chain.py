"""A guest's program that extends a PCR of the hardware TPM, through its vTPM and the manager.

Each answer has to be the PCR with this one measurement more; anything done twice, or not at all,
breaks the chain.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client

PCR = 12
TO_HARDWARE = bytes.fromhex("01c1")
OK = bytes.fromhex("00c40000001e00000000")
ADMINISTRATORS = 'administrators = "*:system_r:vtpm_t"'

Exchange = Callable[[bytes], bytes]


def read_request() -> bytes:
    """TPM_PCRRead of the hardware."""
    return TO_HARDWARE + bytes.fromhex("0000000e00000015") + PCR.to_bytes(4, "big")


def extend_request(measurement: bytes) -> bytes:
    """TPM_Extend of the hardware."""
    return TO_HARDWARE + bytes.fromhex("0000002200000014") + PCR.to_bytes(4, "big") + measurement


@dataclass
class HardwareChain:
    """One guest's program.

    Attributes:
        rounds: How many measurements were made.
    """

    tpm0: Path
    seed: int
    rounds: int = 0

    def run(self, until: float) -> None:
        """Extend until a time of the monotonic clock.

        Raises:
            AssertionError: An answer was an error, or a measurement was made twice or never.
        """
        chance = random.Random(self.seed)
        with Tpm0Client(self.tpm0) as device:
            while time.monotonic() < until:
                self.extend(self.exchange(device), chance.randbytes(20))

    def exchange(self, device: Tpm0Client) -> Exchange:
        """The way to the TPM."""
        return device.exchange

    def extend(self, exchange: Exchange, measurement: bytes) -> None:
        """Make one measurement and check that it is the only one."""
        before = value_of(exchange(read_request()))
        expected = hashlib.sha1(before + measurement, usedforsecurity=False).digest()
        assert value_of(exchange(extend_request(measurement))) == expected, "not one measurement"
        assert value_of(exchange(read_request())) == expected, "the PCR is not what was answered"
        self.rounds += 1


def value_of(response: bytes) -> bytes:
    """The PCR in a response."""
    assert response[:10] == OK, f"an error: {response.hex()}"
    return response[10:]
