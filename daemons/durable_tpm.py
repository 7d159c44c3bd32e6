"""A TPM whose permanent changes are stored before anyone hears of them.

The chip and every vTPM are one of these: an engine, and a store for its permanent section. A change
that cannot be stored fails the command and stays undone.

Leaves to others: where the bytes go (`chip_memory.py`, `vtpm/image.py`), who may send commands.

Invariants:
- A response that reports a permanent change leaves only after `store.save` has returned.
- One command at a time; callers hold the lock of their connection or ring.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Protocol

import structlog

from daemons.errors import Failure
from daemons.world import SystemClock, SystemRng
from protocol.constants import (
    DIGEST_BYTES,
    HEADER_BYTES,
    AlgorithmId,
    EncScheme,
    Ordinal,
    SigScheme,
    StartupType,
    Tag,
)
from protocol.return_codes import ReturnCode
from protocol.structures import KeyParms, RsaKeyParms
from protocol.wire import encode
from tpm12.crypto import RsaKeyGenerator
from tpm12.dispatch import Command
from tpm12.engine import Engine, Outcome
from tpm12.ports import KeyGenerator, StirrableRng
from tpm12.profile import Profile
from tpm12.state import Permanent, State, factory_state


def _command(ordinal: int, operands: bytes) -> bytes:
    size = HEADER_BYTES + len(operands)
    return struct.pack(">HII", Tag.RQU_COMMAND, size, ordinal) + operands


_EK_PARAMETERS = KeyParms(
    algorithm_id=AlgorithmId.RSA,
    enc_scheme=EncScheme.RSAESOAEP_SHA1_MGF1,
    sig_scheme=SigScheme.NONE,
    parms=encode(RsaKeyParms(key_length=2048, num_primes=2, exponent=b"")),
)
_CREATE_EK = _command(
    Ordinal.CREATE_ENDORSEMENT_KEY_PAIR, bytes(DIGEST_BYTES) + encode(_EK_PARAMETERS)
)


class PermanentStore(Protocol):
    """Keeps one permanent section."""

    def load(self) -> Permanent | None:
        """What was saved last, or None for a TPM that never was.

        Raises:
            Failure: There is something, and it cannot be read.
        """
        ...

    def save(self, permanent: Permanent) -> None:
        """Return when it would survive a power cut.

        Raises:
            Failure: It was not kept; what was saved before still is.
        """
        ...


class DurableTpm:
    """An engine on a store.

    Args:
        store: Where the permanent section is kept.
        profile: Maker, limits and times.
        commands: The declared commands.
        rng: Randomness; the system's when None.
        key_generator: Where RSA keys come from; OpenSSL, and `rng` for what it has not, when None.

    Raises:
        Failure: The stored state cannot be read.
    """

    def __init__(
        self,
        store: PermanentStore,
        *,
        profile: Profile,
        commands: Iterable[Command],
        rng: StirrableRng | None = None,
        key_generator: KeyGenerator | None = None,
    ) -> None:
        self._store = store
        rng = rng or SystemRng()
        state = factory_state()
        permanent = store.load()
        self.is_new = permanent is None
        if permanent is not None:
            state.permanent = permanent
        self._engine = Engine(
            state,
            rng=rng,
            clock=SystemClock(),
            key_generator=key_generator or RsaKeyGenerator(rng),
            profile=profile,
            commands=commands,
        )

    @property
    def state(self) -> State:
        """The state as the last kept command left it."""
        return self._engine.state

    def execute(self, request: bytes, locality: int) -> bytes:
        """Run one command and give its response."""
        outcome = self._engine.execute(request, locality)
        if outcome.permanent_changed:
            return self._store_then_keep(outcome)
        self._engine.state = outcome.state
        return outcome.response

    def power_on(self) -> None:
        """TPM_Init."""
        self._engine.keep(self._engine.power_on())

    def power_on_and_start(self, startup_type: StartupType = StartupType.CLEAR) -> None:
        """TPM_Init and TPM_Startup, as a platform's firmware does.

        Raises:
            Failure: The TPM did not start.
        """
        self.power_on()
        self.start(startup_type)

    def start(self, startup_type: StartupType = StartupType.CLEAR) -> None:
        """TPM_Startup.

        Raises:
            Failure: The TPM did not start.
        """
        response = self.execute(_command(Ordinal.STARTUP, startup_type.to_bytes(2, "big")), 0)
        if response[6:10] != bytes(4):
            code = ReturnCode(int.from_bytes(response[6:10], "big"))
            raise Failure(
                "the TPM did not start",
                why=f"TPM_Startup(ST_{startup_type.name}) answered TPM_{code.name}",
                next_step="ST_STATE needs what TPM_SaveState kept; for others see its self-test.",
            )

    def preset_pcrs(self, values: Mapping[int, bytes]) -> None:
        """Put values into PCRs as the builder of a machine does, before anybody else can.

        Args:
            values: 20 bytes by PCR.
        """
        state = self._engine.state
        stclear = state.stclear.clone()
        stclear.pcrs = {**stclear.pcrs, **values}
        self._engine.state = State(state.permanent, stclear, state.stany, state.volatile)

    def set_physical_presence(self, *, asserted: bool) -> None:
        """The hardware pin."""
        self._engine.keep(self._engine.physical_presence_pin(asserted=asserted))

    def hash_start(self) -> bool:
        """The bus cycle TPM_HASH_START; False when it fails."""
        return self._bus_cycle(self._engine.hash_start())

    def hash_data(self, data: bytes) -> bool:
        """The bus cycle TPM_HASH_DATA; False when it fails."""
        return self._bus_cycle(self._engine.hash_data(data))

    def hash_end(self) -> bool:
        """The bus cycle TPM_HASH_END; False when it fails."""
        return self._bus_cycle(self._engine.hash_end())

    @property
    def established(self) -> bool:
        """TPM_PERMANENT_FLAGS.tpmEstablished."""
        return self._engine.state.permanent.flags.tpm_established

    def make_endorsement_key(self) -> None:
        """Do what a maker does: TPM_CreateEndorsementKeyPair. Stores the new TPM.

        Raises:
            Failure: The TPM refused, or could not be stored.
        """
        response = self.execute(_CREATE_EK, 0)
        if response[6:10] != bytes(4):
            code = ReturnCode(int.from_bytes(response[6:10], "big"))
            raise Failure(
                "the endorsement key was not made",
                why=f"TPM_CreateEndorsementKeyPair answered TPM_{code.name}",
                next_step="Look at the log above; the image is as it was.",
            )
        self.is_new = False

    def save_as_new(self) -> None:
        """Store the state of a TPM that never was stored.

        Raises:
            Failure: It was not kept.
        """
        self._store.save(self._engine.state.permanent)
        self.is_new = False

    def _bus_cycle(self, outcome: Outcome) -> bool:
        if outcome.permanent_changed:
            try:
                self._store.save(outcome.state.permanent)
            except Failure as failure:
                _log_unsaved(failure)
                return False
        self._engine.keep(outcome)
        return outcome.code is ReturnCode.SUCCESS

    def _store_then_keep(self, outcome: Outcome) -> bytes:
        try:
            self._store.save(outcome.state.permanent)
        except Failure as failure:
            _log_unsaved(failure)
            return self._engine.refuse(outcome)
        self._engine.keep(outcome)
        return outcome.response


def _log_unsaved(failure: Failure) -> None:
    structlog.get_logger().error(
        "a change could not be stored; the command failed and changed nothing",
        what=failure.what,
        why=failure.why,
        next_step=failure.next_step,
    )
