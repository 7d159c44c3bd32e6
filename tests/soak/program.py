"""A guest's program in a soak: everything a TPM is used for, seeded, each answer checked.

One connection to tpm0 for as long as the guest lives. The PCR chain and the counter show that each
command was executed exactly once; NV, a kept session, a loaded key and sealed data that nothing was
lost. When the guest was killed or rebooted on purpose, the program begins again as a guest's
programs do, and what is permanent must be as it was acknowledged.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from daemons.errors import Failure
from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import KeyUsage, Ordinal, ResourceType
from protocol.structures import Key, Key12, StoredData, StoredData12
from tpm12.client import TpmClient
from tpm12.client_core import ClientSession, Use

PCR: Final = 10
NV_INDEX: Final = 0x21
OWNER_READ_AND_WRITE: Final = 0x00020002
NV_BYTES: Final = 16
DIGEST: Final = b"\x5a" * 20
WELL_KNOWN: Final = bytes(20)
BOOT_S: Final = 60.0
"""How long a guest that was killed may take to serve again."""
ANSWER_S: Final = 90.0
"""A command that takes longer counts as lost."""
BEFORE_S: Final = 2.0
"""A connection made so shortly after a kill was announced may still be to the one that dies."""
SAMPLES_MAX: Final = 50_000
"""Durations kept of one phase; later ones are counted only."""
_LOOK_AGAIN_S: Final = 0.02

TIMED: Final = int(Ordinal.PCR_READ).to_bytes(4, "big")
"""What every phase sends alike: the figures of two phases compare the same command."""


class Wrong(Exception):  # noqa: N818 - what a soak is looking for
    """The TPM has done something twice, not at all, or other than it said."""


class _Stopped(Exception):  # noqa: N818 - never leaves this module
    """The program was told to end while its guest boots."""


class Program:
    """One guest's program, in a thread.

    Args:
        guest: Its name.
        tpm0: Its device.
        seed: What the rounds are drawn from.
        tamper: Wraps the exchange of requests; for controls.

    Attributes:
        phase: What durations are kept under; set by the soak.
        rounds: How many were done.
        commands: How many were answered, by phase.
        durations_s: Of the PCRReads of each phase.
        longest_s: The slowest exchange of all.
        boots: How often it began after its guest had gone.
        failure: What ended it, if something did.
    """

    def __init__(
        self,
        guest: str,
        tpm0: Path,
        seed: int,
        tamper: Callable[[Callable[[bytes], bytes]], Callable[[bytes], bytes]] = lambda call: call,
    ) -> None:
        self.guest = guest
        self.phase = "setting up"
        self.rounds = 0
        self.boots = 0
        self.commands: defaultdict[str, int] = defaultdict(int)
        self.durations_s: defaultdict[str, list[float]] = defaultdict(list)
        self.longest_s = 0.0
        self.failure: Exception | None = None
        self._tpm0 = tpm0
        self._chance = random.Random(seed)
        self._tamper = tamper
        self._ends_at = -BEFORE_S  # when the guest's end was last announced
        self._connected_at = 0.0
        self._stop = threading.Event()
        self._may_run = threading.Event()
        self._rests = threading.Event()
        self._thread = threading.Thread(target=self._run, name=guest)
        self._wrapped_key: Key | Key12 | None = None
        self._count_id = 0
        self._counts = {0}
        self._written = {bytes(NV_BYTES)}
        self._pcr = b""
        self._key = 0
        self._signature = b""
        self._session: ClientSession | None = None

    # -- for the soak

    def start(self) -> None:
        """Own the TPM, make what the rounds use, and begin."""
        self._thread.start()
        self.go_on()

    def rest(self, patience_s: float = ANSWER_S) -> None:
        """Return when it is between two rounds, holding one session and one key; or has failed."""
        self._may_run.clear()
        if not self._rests.wait(patience_s) and self.failure is None:
            raise TimeoutError(f"the program of {self.guest} is stuck in a round")

    def go_on(self) -> None:
        """Let it go on."""
        self._may_run.set()

    def end(self) -> None:
        """Let it flush what it holds and close."""
        self._stop.set()
        self._may_run.set()
        self._thread.join(ANSWER_S + BOOT_S)

    def abandon(self) -> None:
        """End it without waiting: the stack goes away below it."""
        self.announce_end_of_guest()
        self._stop.set()
        self._may_run.set()

    def announce_end_of_guest(self) -> None:
        """Say that the guest is about to be killed or rebooted on purpose."""
        self._ends_at = time.monotonic()

    # -- the thread

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                try:
                    self._live()
                except Failure:
                    if self._ends_at < self._connected_at - BEFORE_S:
                        raise
                    self.boots += 1
        except _Stopped:
            pass
        except Exception as error:  # noqa: BLE001 - told by the soak, whatever it is
            self.failure = error
        finally:
            self._rests.set()

    def _live(self) -> None:
        """Do rounds from one boot of the guest to its end."""
        with self._connect() as device:
            tpm = TpmClient(self._tamper(self._timed(device)), rng=SystemRng())
            if self._wrapped_key is None:
                self._prepare(tpm)
            self._begin(tpm)
            while not self._stop.is_set():
                if not self._may_run.is_set():
                    self._rests.set()
                    self._may_run.wait()
                    self._rests.clear()
                    continue
                self._round(tpm)
                self.rounds += 1
            self._let_go(tpm)

    def _connect(self) -> Tpm0Client:
        deadline = time.monotonic() + BOOT_S
        while True:
            self._connected_at = time.monotonic()
            try:
                return Tpm0Client(self._tpm0, answer_s=ANSWER_S)
            except Failure:
                if self._stop.is_set():
                    raise _Stopped from None
                if time.monotonic() > deadline:
                    raise
            time.sleep(_LOOK_AGAIN_S)

    def _timed(self, device: Tpm0Client) -> Callable[[bytes], bytes]:
        def exchange(request: bytes) -> bytes:
            begin = time.perf_counter()
            response = device.exchange(request)
            lasted_s = time.perf_counter() - begin
            self.commands[self.phase] += 1
            self.longest_s = max(self.longest_s, lasted_s)
            kept = self.durations_s[self.phase]
            if request[6:10] == TIMED and len(kept) < SAMPLES_MAX:
                kept.append(lasted_s)
            return response

        return exchange

    def _prepare(self, tpm: TpmClient) -> None:
        tpm.take_ownership()
        tpm.nv_define_space(NV_INDEX, NV_BYTES, OWNER_READ_AND_WRITE)
        first = bytes(NV_BYTES)
        tpm.nv_write_value(NV_INDEX, first)
        self._count_id, value = tpm.create_counter(b"soak")
        self._counts = {value.counter}
        self._wrapped_key = tpm.create_wrap_key(KeyUsage.SIGNING, bits=512)

    def _begin(self, tpm: TpmClient) -> None:
        """Check what must have outlived the last boot, and take what a boot takes."""
        if self._wrapped_key is None:
            raise AssertionError("begun before it was prepared")
        count, written = (
            tpm.read_counter(self._count_id).counter,
            tpm.nv_read_value(NV_INDEX, NV_BYTES),
        )
        _check(count in self._counts, f"the counter is {count}, not one of {self._counts}")
        _check(written in self._written, "NV memory holds what was never written, or is older")
        self._counts, self._written = {count}, {written}
        self._pcr = tpm.pcr_read(PCR)
        _check(self._pcr == bytes(20), f"after a boot PCR {PCR} is {self._pcr.hex()}")
        self._key = tpm.load_key2(self._wrapped_key)
        self._signature = tpm.sign(self._key, DIGEST)
        self._session = tpm.oiap()

    def _let_go(self, tpm: TpmClient) -> None:
        tpm.flush_specific(self._key, ResourceType.KEY)
        if self._session is not None:
            tpm.end_session(self._session)

    # -- what a round does

    def _round(self, tpm: TpmClient) -> None:
        steps = [
            self._extend,
            self._increment,
            self._write,
            self._sign,
            self._seal,
            self._swap_session,
            self._swap_key,
            self._load_another_key,
        ]
        for step in self._chance.sample(steps, 4):
            _check(tpm.pcr_read(PCR) == self._pcr, f"PCR {PCR} is not what was extended")
            step(tpm)

    def _extend(self, tpm: TpmClient) -> None:
        measurement = self._chance.randbytes(20)
        self._pcr = hashlib.sha1(self._pcr + measurement, usedforsecurity=False).digest()
        _check(tpm.extend(PCR, measurement) == self._pcr, f"PCR {PCR} is not what was extended")

    def _increment(self, tpm: TpmClient) -> None:
        expected = max(self._counts) + 1
        self._counts = {expected - 1, expected}  # until it is answered
        session = self._session
        assert session is not None
        out = tpm.call(
            Ordinal.INCREMENT_COUNTER,
            Use(session, WELL_KNOWN, continues=True),
            count_id=self._count_id,
        )
        _check(out.count.counter == expected, "the counter is not one more")
        self._counts = {expected}

    def _write(self, tpm: TpmClient) -> None:
        data = self._chance.randbytes(NV_BYTES)
        self._written |= {data}  # until it is answered
        tpm.nv_write_value(NV_INDEX, data)
        self._written = {data}
        _check(tpm.nv_read_value(NV_INDEX, NV_BYTES) == data, "NV memory holds something else")

    def _sign(self, tpm: TpmClient) -> None:
        _check(tpm.sign(self._key, DIGEST) == self._signature, "the loaded key is another")

    def _seal(self, tpm: TpmClient) -> None:
        secret = self._chance.randbytes(32)
        blob: StoredData | StoredData12 = tpm.seal(secret, release={PCR: self._pcr})
        _check(tpm.unseal(blob) == secret, "something else was unsealed")

    def _swap_session(self, tpm: TpmClient) -> None:
        """Save the session and load it again; it goes on with its nonces."""
        session = self._session
        assert session is not None
        session.handle = _swap(tpm, session.handle, ResourceType.AUTH)

    def _swap_key(self, tpm: TpmClient) -> None:
        """Save the key, flush it, and load it again."""
        self._key = _swap(tpm, self._key, ResourceType.KEY)

    def _load_another_key(self, tpm: TpmClient) -> None:
        assert self._wrapped_key is not None
        another = tpm.load_key2(self._wrapped_key)
        _check(tpm.sign(another, DIGEST) == self._signature, "the key was loaded as another")
        tpm.flush_specific(another, ResourceType.KEY)


def _swap(tpm: TpmClient, handle: int, kind: ResourceType) -> int:
    saved = tpm.call(
        Ordinal.SAVE_CONTEXT, handle=handle, resource_type=kind, label=b"soak".ljust(16, b"\0")
    ).context_blob
    if kind is ResourceType.KEY:  # a session is gone once it is saved
        tpm.flush_specific(handle, kind)
    loaded: int = tpm.call(
        Ordinal.LOAD_CONTEXT, entity_handle=0, keep_handle=False, context_blob=saved
    ).handle
    return loaded


def _check(is_so: bool, otherwise: str) -> None:
    if not is_so:
        raise Wrong(otherwise)


@contextlib.contextmanager
def resting(programs: list[Program]) -> Iterator[None]:
    """All programs between two rounds, for as long as the block lasts."""
    for program in programs:
        program.rest()
    try:
        yield
    finally:
        for program in programs:
            program.go_on()
