"""A chip in memory for the manager's tests: the real engine behind the link's interface."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from daemons.errors import ExitCode, Failure
from daemons.manager.chip import Chip, ChipSecrets
from daemons.manager.handle_journal import HandleJournal
from protocol.constants import ResourceType
from tests.tpm12.conftest import CountingRng, PooledPrimes, SetClock
from tpm12.client import TpmClient
from tpm12.commands import ALL
from tpm12.engine import Engine
from tpm12.profile import Profile
from tpm12.state import State, factory_state

LOCALITY = 2
WELL_KNOWN = bytes(20)
SECRETS = ChipSecrets(owner_auth=WELL_KNOWN, srk_auth=WELL_KNOWN)


class EngineLink:
    """An engine behind `ChipLink`; the platform's firmware is behind it too.

    Args:
        state: What the chip is when the test begins.
        locality: The one that the link has.
    """

    def __init__(
        self, state: State | None = None, *, locality: int = LOCALITY, seed: bytes = b"chip"
    ) -> None:
        self.engine = Engine(
            state or factory_state(),
            rng=CountingRng(seed),
            clock=SetClock(),
            key_generator=PooledPrimes(),
            profile=Profile(),
            commands=ALL,
        )
        self.locality = locality
        self.asked: list[bytes] = []
        self.is_gone = False
        self.let_go_count = self.relinquished = 0
        self._response: bytes | None = None
        self._request = b""
        self.rng = CountingRng(seed + b" client")
        self.firmware = TpmClient(lambda request: self._run(request, 0), rng=self.rng)

    def power_on(self) -> None:
        """TPM_Init and TPM_Startup, as at each power-on of the platform."""
        self.engine.keep(self.engine.power_on())
        self._response = None
        self.firmware.startup()

    def launch(self, measured: bytes) -> None:
        """The dynamic launch: PCR 17 from locality 4; then 17 to 19 can be extended."""
        self.engine.keep(self.engine.hash_start())
        self.engine.keep(self.engine.hash_data(measured))
        self.engine.keep(self.engine.hash_end())

    def extend(self, pcr: int, digest: bytes) -> None:
        """Measure, from the manager's locality."""
        client = TpmClient(lambda request: self._run(request, LOCALITY), rng=self.rng)
        client.extend(pcr, digest)

    def sessions(self) -> tuple[int, ...]:
        """What is open in the chip."""
        return self.firmware.handles(ResourceType.AUTH)

    def exchange(self, request: bytes) -> bytes:
        response = self.execute(request)
        self.finish()
        return response

    def execute(self, request: bytes) -> bytes:
        if self.is_gone:
            raise Failure("x", why="gone", next_step="y", exit_code=ExitCode.UNAVAILABLE)
        self.asked.append(request)
        self._request, self._response = request, self._run(request, self.locality)
        return self._response

    def finish(self) -> None:
        self._response = None

    def resume(self, request: bytes) -> bytes:
        if self._response is not None and self._request == request:
            return self._response
        return self.execute(request)

    def recollect(self, request: bytes) -> bytes | None:
        return self._response if self._request == request else None

    def settle(self) -> None:
        self.finish()

    def let_go(self) -> None:
        self.let_go_count += 1

    def relinquish(self) -> None:
        self.relinquished += 1

    def learn_timing(self) -> None:
        # What the driver does here goes through the chip like any command.
        self._run(bytes.fromhex("00c10000000e0000001500000000"), self.locality)
        self._response = None

    def _run(self, request: bytes, locality: int) -> bytes:
        outcome = self.engine.execute(request, locality)
        self.engine.keep(outcome)
        return outcome.response


@dataclass
class ChipBench:
    """A manager's chip, started or not, with what it told."""

    link: EngineLink
    chip: Chip
    progress: list[str]
    journal: Path

    def another(self, secrets: ChipSecrets = SECRETS) -> ChipBench:
        """The next manager on the same chip, after the one before is gone."""
        return bench_on(self.link, self.journal.parent, secrets)


def bench_on(link: EngineLink, directory: Path, secrets: ChipSecrets = SECRETS) -> ChipBench:
    progress: list[str] = []
    journal = directory / "journal"
    chip = Chip(link, secrets, HandleJournal(journal), progress.append, link.rng)
    return ChipBench(link, chip, progress, journal)


@cache
def owned_state() -> State:
    """A chip with an endorsement key and an owner, powered off; made once."""
    link = EngineLink()
    link.power_on()
    link.firmware.create_endorsement_key_pair()
    link.firmware.take_ownership()
    return link.engine.state


def owned_link(locality: int = LOCALITY) -> EngineLink:
    """An owned chip, powered on, measured and launched."""
    link = EngineLink(owned_state(), locality=locality)
    boot(link)
    return link


def boot(link: EngineLink, program: bytes = b"\x18" * 20) -> None:
    """A power-on with the same measurements each time, but for the manager's program."""
    link.power_on()
    for pcr in range(8):
        link.firmware.extend(pcr, bytes([pcr]) * 20)
    link.launch(b"launcher and policy")
    link.extend(18, program)
    link.extend(19, b"\x19" * 20)
