"""A TPM whose permanent changes are stored before anyone hears of them.

The chip and every vTPM are one of these: an engine, a store for its permanent section, and a memory
for the rest, from which the next process goes on when this one is killed. A change that cannot be
stored fails the command and stays undone.

Leaves to others: where the bytes go (`chip_memory.py`, `vtpm/image.py`, `volatile_memory.py`), who
may send commands.

Invariants:
- A response that reports a permanent change leaves only after `store.save` has returned.
- A response that reports any change leaves only after the memory has it.
- One command at a time; callers hold the lock of their connection or ring.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from daemons import logs
from daemons.errors import Failure
from daemons.journal import KEY_BYTES
from daemons.volatile_memory import NO_NOTES, Notes, VolatileMemory
from daemons.world import SteadyClock, SystemClock, SystemRng
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
from tpm12.ports import Clock, KeyGenerator, StirrableRng
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


NotesOf = Callable[[bytes], Notes]
"""Gives what is to be remembered with a command, from its response."""


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
        clock: The time; the system's when None. It may step back, the TPM's does not.
        key_generator: Where RSA keys come from; OpenSSL, and `rng` for what it has not, when None.
        memory: What outlives a killed process; None: nothing does.
        is_nv_locked: A new one leaves the factory with nvLocked set. As long as it is not, nobody
            is asked for authorization of any NV area (TPM Main r116 Part 3 §20).

    Attributes:
        is_new: Nothing was ever stored.
        is_resumed: It goes on where a killed process was; no power-on comes first.

    Raises:
        Failure: The stored state, or what the memory has, cannot be read.
    """

    def __init__(  # noqa: PLR0913 - the world of a TPM
        self,
        store: PermanentStore,
        *,
        profile: Profile,
        commands: Iterable[Command],
        rng: StirrableRng | None = None,
        clock: Clock | None = None,
        key_generator: KeyGenerator | None = None,
        memory: VolatileMemory | None = None,
        is_nv_locked: bool = False,
        seed: bytes | None = None,
    ) -> None:
        self._store = store
        self._memory = memory
        rng = rng or SystemRng()
        state = factory_state(is_nv_locked=is_nv_locked)
        permanent = store.load()
        self.is_new = permanent is None
        self.is_resumed = False
        if permanent is not None:
            state.permanent = permanent
        elif seed is not None:
            state.permanent.seed = seed
        if memory is not None:
            state = self._recalled(memory, state, rng)
        self._engine = Engine(
            state,
            rng=rng,
            clock=SteadyClock(clock or SystemClock(), _latest_us(state)),
            key_generator=key_generator or RsaKeyGenerator(rng),
            profile=profile,
            commands=commands,
        )

    @property
    def state(self) -> State:
        """The state as the last kept command left it."""
        return self._engine.state

    @property
    def notes(self) -> Notes:
        """What is remembered beside the state."""
        return NO_NOTES if self._memory is None else self._memory.notes

    def _recalled(self, memory: VolatileMemory, state: State, rng: StirrableRng) -> State:
        """The state as a killed process left it, or the given one; with a key for the memory.

        Raises:
            Failure: What it left cannot be read.
        """
        if state.permanent.journal_key is None:
            permanent = state.permanent.clone()
            permanent.journal_key = rng.random(KEY_BYTES)
            if not self.is_new:
                self._store.save(permanent)
            state.permanent = permanent
        left = None if self.is_new else memory.recall(state.permanent)
        if left is None:
            return state
        self.is_resumed = True
        state = State(state.permanent, left.stclear, left.stany, left.volatile)
        memory.begin(state, left.notes)
        return state

    def execute(self, request: bytes, locality: int, notes: NotesOf | None = None) -> bytes:
        """Run one command and give its response.

        Args:
            request: The command.
            locality: Of who sends it.
            notes: What to remember with its changes; not asked when it changes nothing.
        """
        engine = self._engine
        outcome = engine.execute(request, locality)
        state = outcome.state
        if outcome.permanent_changed:
            return self._store_then_keep(request, outcome, notes)
        if state is not engine.state:
            if self._memory is not None:
                self._memory.changed(state, notes(outcome.response) if notes else NO_NOTES)
            engine.state = state
        return outcome.response

    def remember(self, notes: Notes) -> None:
        """Remember notes without any change of state; from any thread."""
        if self._memory is not None:
            self._memory.note(notes)

    def power_on(self) -> None:
        """TPM_Init."""
        state = self._engine.power_on().state
        if self._memory is None or self._memory.is_kept:
            self._keep(state)
        else:
            self._memory.begin(state)
            self._engine.state = state

    def power_off(self) -> None:
        """The power goes: what the memory has is true no longer."""
        if self._memory is not None:
            self._memory.forget()

    def power_on_and_start(
        self, startup_type: StartupType = StartupType.CLEAR, notes: Notes = NO_NOTES
    ) -> None:
        """TPM_Init and TPM_Startup, as a platform's firmware does.

        Args:
            startup_type: Of TPM_Startup.
            notes: What to remember once it has started, and not before.

        Raises:
            Failure: The TPM did not start.
        """
        self.power_on()
        self.start(startup_type, notes)

    def start(self, startup_type: StartupType = StartupType.CLEAR, notes: Notes = NO_NOTES) -> None:
        """TPM_Startup; arguments as for `power_on_and_start`.

        Raises:
            Failure: The TPM did not start.
        """

        def once_started(response: bytes) -> Notes:
            return NO_NOTES if response[6:10] != bytes(4) else notes

        command = _command(Ordinal.STARTUP, startup_type.to_bytes(2, "big"))
        response = self.execute(command, 0, once_started)
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
        self._keep(State(state.permanent, stclear, state.stany, state.volatile))

    def set_physical_presence(self, *, asserted: bool) -> None:
        """The hardware pin."""
        self._keep(self._engine.physical_presence_pin(asserted=asserted).state)

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

    def reset_established(self, locality: int) -> ReturnCode:
        """TSC_ResetEstablishmentBit; its return code."""
        response = self.execute(_command(Ordinal.TSC_RESET_ESTABLISHMENT_BIT, b""), locality)
        return ReturnCode(int.from_bytes(response[6:10], "big"))

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
        if not outcome.permanent_changed:
            self._keep(outcome.state)
        elif not self._is_stored(outcome, NO_NOTES):
            return False
        return outcome.code is ReturnCode.SUCCESS

    def _keep(self, state: State) -> None:
        """Make a state the TPM's that has nothing to store."""
        if self._memory is not None:
            self._memory.changed(state)
        self._engine.state = state

    def _store_then_keep(self, request: bytes, outcome: Outcome, notes: NotesOf | None) -> bytes:
        if self._is_stored(outcome, notes(outcome.response) if notes else NO_NOTES):
            return outcome.response
        failed = self._engine.unkept(request, ReturnCode.IOERROR)
        if failed.state is not self._engine.state:
            if self._memory is not None:
                self._memory.changed(failed.state, notes(failed.response) if notes else NO_NOTES)
            self._engine.keep(failed)
        return failed.response

    def _is_stored(self, outcome: Outcome, notes: Notes) -> bool:
        """Store a permanent change and make it the TPM's; False: neither."""
        memory = self._memory
        if memory is not None:
            memory.prepare(outcome.state, notes)
        try:
            self._store.save(outcome.state.permanent)
        except Failure as failure:
            _log_unsaved(failure)
            if memory is not None:
                memory.dropped()
            return False
        if memory is not None:
            memory.stored(outcome.state, notes)
        self._engine.keep(outcome)
        return True


def _latest_us(state: State) -> int:
    """The latest moment that a state knows of."""
    return max(state.stany.tick_start_us, state.stclear.last_failure_us)


def _log_unsaved(failure: Failure) -> None:
    logs.get_logger().error(
        "a change could not be stored; the command failed and changed nothing",
        what=failure.what,
        why=failure.why,
        next_step=failure.next_step,
    )
