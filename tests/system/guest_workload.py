"""A program in a guest that would notice anything lost, done twice, or gone back.

It extends a PCR, increments a counter, writes NV memory, signs with a loaded key and keeps one
authorization session over all of it, again and again, over one connection; and each time it says
what the answer has to be.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import KeyUsage, Ordinal
from tpm12.client import TpmClient
from tpm12.client_core import Use

PCR = 10
NV_INDEX = 0x21
OWNER_READ_AND_WRITE = 0x00020002
NV_BYTES = 16
DIGEST = b"\x5a" * 20
WELL_KNOWN = bytes(20)


@dataclass
class Workload:
    """One guest's program.

    Attributes:
        count_id: The counter that `prepare` made.
        rounds: How many were done.
        pauses_s: How long the slowest exchanges took, in seconds.
        is_over: To be set by who has seen enough.
    """

    tpm0: Path
    seed: int
    count_id: int = 0
    rounds: int = 0
    pauses_s: list[float] = field(default_factory=list)
    is_over: threading.Event = field(default_factory=threading.Event)

    def prepare(self) -> None:
        """Own the TPM, and make what the rounds use."""
        with Tpm0Client(self.tpm0) as device:
            tpm = TpmClient(device.exchange, rng=SystemRng())
            tpm.take_ownership()
            tpm.nv_define_space(NV_INDEX, NV_BYTES, OWNER_READ_AND_WRITE)
            # One counter for all runs: a TPM increments no other until its next start.
            self.count_id, _ = tpm.create_counter(b"kill")

    def run(self, until: float) -> None:
        """Do rounds until a time of the monotonic clock.

        Raises:
            AssertionError: Something was lost, done twice, or went back.
            TpmError, Failure: An answer was an error, or the connection ended.
        """
        chance = random.Random(self.seed)
        with Tpm0Client(self.tpm0) as device:
            tpm = TpmClient(self._timed(device), rng=SystemRng())
            key = tpm.load_key2(tpm.create_wrap_key(KeyUsage.SIGNING, bits=512))
            signature = tpm.sign(key, DIGEST)
            expected_count = tpm.read_counter(self.count_id).counter
            pcr = tpm.pcr_read(PCR)
            session = tpm.oiap()
            while time.monotonic() < until and not self.is_over.is_set():
                measurement = chance.randbytes(20)
                pcr = hashlib.sha1(pcr + measurement, usedforsecurity=False).digest()
                assert tpm.extend(PCR, measurement) == pcr, "PCR 10 is not what was extended"
                assert tpm.pcr_read(PCR) == pcr
                expected_count += 1
                out = tpm.call(
                    Ordinal.INCREMENT_COUNTER,
                    Use(session, WELL_KNOWN, continues=True),
                    count_id=self.count_id,
                )
                assert out.count.counter == expected_count, "the counter is not one more"
                written = chance.randbytes(NV_BYTES)
                tpm.nv_write_value(NV_INDEX, written)
                assert tpm.nv_read_value(NV_INDEX, NV_BYTES) == written, "NV holds something else"
                assert tpm.sign(key, DIGEST) == signature, "the loaded key is another"
                self.rounds += 1
            tpm.end_session(session)

    def _timed(self, device: Tpm0Client):
        def exchange(request: bytes) -> bytes:
            begin = time.monotonic()
            response = device.exchange(request)
            self.pauses_s.append(time.monotonic() - begin)
            return response

        return exchange
