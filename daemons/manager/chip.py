"""What the manager does with the hardware TPM: start-up, operations under its own name, clean-up.

Source: `stubdom/vtpmmgr/init.c` for the order of start-up. Not kept from there: flushing
everybody's handles (only the leftovers of an earlier manager are flushed, see `handle_journal.py`),
one session for everything and for the whole life of the manager (sessions are opened for one
command and end with it; one is kept, for what every save does, and opened anew when it fails).

Leaves to others: moving bytes (`tis_link.py`), what is sealed (`sealing.py`), TPM_Startup and the
measuring of the platform (the firmware's part, played by the launcher).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from daemons.errors import ExitCode, Failure
from daemons.manager.handle_journal import (
    HandleJournal,
    Handles,
    Leftovers,
    NotNotedError,
    opens,
)
from daemons.manager.requests import OnceOnly
from daemons.tis_link import ChipFault, Patience
from hwtpm.tis_driver import TisFault
from protocol.constants import (
    CapabilityArea,
    CapabilityProperty,
    KeyHandleValue,
    Ordinal,
    ResourceType,
)
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import CapVersionInfo
from protocol.wire import DecodeError, decode
from tpm12.client import TpmClient
from tpm12.client_core import BadResponseError, ClientSession, Use
from tpm12.ports import Rng

Progress = Callable[[str], None]
Advice = Mapping[ReturnCode, tuple[str, ExitCode]]
"""Next step and exit status for what the chip may answer."""
NO_ADVICE: Final[Advice] = {}
SEIZED_S: Final = 30.0
"""How long one command is begun anew while other localities seize the TPM again and again."""
FLUSHED_MAX: Final = 10
"""How often one is begun anew because somebody has flushed its session."""


class ChipLink(Protocol):
    """One locality of the chip; `TisLink` is one. Every method may raise `Failure`."""

    def exchange(self, request: bytes) -> bytes:
        """Run one command."""

    def execute(self, request: bytes) -> bytes:
        """Run one command and leave its response in the chip."""

    def finish(self) -> None:
        """Let the chip forget the response."""

    def resume(self, request: bytes) -> bytes:
        """Give the response of a command that an earlier process left outstanding."""

    def recollect(self, request: bytes) -> bytes | None:
        """Give the same; None, and run nothing, when the command was not run."""

    def settle(self) -> None:
        """Make sure that no response of an earlier command waits in the chip."""

    def let_go(self) -> None:
        """Let other localities have the chip soon."""

    def relinquish(self) -> None:
        """Let other localities have the chip now."""

    def learn_timing(self) -> object:
        """Ask the chip how long it may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChipSecrets:
    """What the manager needs to know to use the chip; 20 bytes each."""

    owner_auth: bytes
    srk_auth: bytes

    def __repr__(self) -> str:
        return "ChipSecrets(<hidden>)"


class ChipRefusal(Failure):
    """The chip answered an operation of the manager with an error.

    Attributes:
        code: The chip's return code.
    """

    def __init__(self, doing: str, error: TpmError, advice: Advice) -> None:
        next_step, exit_code = {**_ADVICE, **advice}.get(error.code, (_LOOK, ExitCode.FAILED))
        super().__init__(
            f"cannot {doing}",
            why=f"the hardware TPM answered {error}",
            next_step=next_step,
            exit_code=exit_code,
        )
        self.code = error.code


_LOOK: Final = "Look at the log of the hardware TPM."
_SECRETS: Final = (
    "Give the secrets the chip was taken with: owner_auth= and srk_auth= in the manager's extra=.",
    ExitCode.CONFIGURATION,
)
_ENABLE: Final = ("Enable and activate the TPM in the firmware's set-up.", ExitCode.UNAVAILABLE)
_WAIT: Final = ("Wait, then start the manager again.", ExitCode.UNAVAILABLE)
_NO_SECRET_YET: Final[Advice] = {
    # It is us who give the secret, so it cannot be the wrong one.
    ReturnCode.AUTHFAIL: (
        "Something between the manager and the chip changes bytes; another start tries it again.",
        ExitCode.UNAVAILABLE,
    ),
}
_ADVICE: Final[Advice] = {
    ReturnCode.AUTHFAIL: _SECRETS,
    ReturnCode.AUTH2FAIL: _SECRETS,
    ReturnCode.DISABLED: _ENABLE,
    ReturnCode.DEACTIVATED: _ENABLE,
    ReturnCode.INSTALL_DISABLED: _ENABLE,
    ReturnCode.INVALID_POSTINIT: (
        "The firmware has not started the TPM: power the platform on with `vtpm up`.",
        ExitCode.UNAVAILABLE,
    ),
    ReturnCode.RETRY: _WAIT,
    ReturnCode.DOING_SELFTEST: _WAIT,
    ReturnCode.DEFEND_LOCK_RUNNING: _WAIT,
    ReturnCode.RESOURCES: (
        "Sessions or key slots of the chip are all taken; a power cycle of the platform frees them",
        ExitCode.UNAVAILABLE,
    ),
}


class Chip:
    """The hardware TPM, from one locality.

    Args:
        link: Carries commands.
        secrets: Of owner and SRK.
        journal: Where open handles are written down.
        progress: Told what takes long.
        rng: Gives nonces.
    """

    def __init__(
        self,
        link: ChipLink,
        secrets: ChipSecrets,
        journal: HandleJournal,
        progress: Progress,
        rng: Rng,
    ) -> None:
        self._link = link
        self._journal = journal
        self._progress = progress
        self._client = TpmClient(self._run_own, rng=rng)
        self._session: ClientSession | None = None
        self._abandoned: list[int] = []
        self._doubts: list[tuple[ResourceType, frozenset[int]]] = []
        self.seized_s = SEIZED_S
        self.secrets = secrets

    def exchange(self, request: bytes) -> bytes:
        """Run one command for somebody else, bytes to bytes.

        Raises:
            Failure: The chip does not answer.
        """
        try:
            return self._link.exchange(request)
        finally:
            self._let_others_in()

    def run_once(self, request: bytes, once: OnceOnly) -> bytes:
        """Run one command for somebody else that must not be run twice.

        Whenever this process is killed in here, `recollect` tells the next one what became of it.

        Raises:
            Failure: The chip does not answer.
        """
        try:
            # An older response, of the very same bytes perhaps, must not be taken for this one's.
            self._link.settle()
            once.begin()
            response = self._link.execute(request)
            once.answer(response)
            self._link.finish()
            return response
        finally:
            self._let_others_in()

    def recollect(self, request: bytes) -> bytes | None:
        """Tell what became of a command that a killed manager had begun. Call it before all else.

        Its response stays in the chip until the next command.

        Returns:
            Its response, or None when it was not run.

        Raises:
            Failure: The chip does not answer, or cannot tell.
        """
        return self._link.recollect(request)

    @contextlib.contextmanager
    def operation(self, doing: str, advice: Advice = NO_ADVICE) -> Iterator[TpmClient]:
        """Use the chip for something of the manager's own, and leave nothing open in it.

        Args:
            doing: Ends the sentence "cannot ...", should it fail.
            advice: What to do about a refusal, where that is another thing than usual.

        Raises:
            ChipRefusal: The chip answered with an error.
            Failure: It does not answer, or not authentically.
        """
        try:
            with self._cleaned_up():
                yield self._client
        except TpmError as error:
            raise ChipRefusal(doing, error, advice) from error
        except BadResponseError as error:
            raise Failure(
                f"cannot {doing}",
                why=f"the hardware TPM's answer is not to be trusted: {error}",
                next_step="Something between the manager and the chip changes bytes, or the secret"
                " in owner_auth= or srk_auth= is wrong.",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error

    def authorized(
        self,
        doing: str,
        ordinal: Ordinal,
        secret: bytes,
        **operands: Any,  # noqa: ANN401 - any command's
    ) -> Any:  # noqa: ANN401 - any command's
        """Run one command with one authorization, under a session that stays open for the next.

        For what is done with every save: opening a session costs as much as the command.

        Args:
            doing: See `operation`.
            ordinal: The command, which may be run twice.
            secret: What it proves, 20 bytes.
            operands: As in `TpmClient.call`.

        Raises:
            Failure: See `operation`.
        """
        with self.operation(doing) as tpm:
            seizures, flushed = Patience(self.seized_s), 0
            while True:
                try:
                    return self._under_session(tpm, ordinal, secret, operands)
                except ChipFault as fault:
                    # Another locality took the TPM; whether the command ran does not matter.
                    if fault.fault is not TisFault.SEIZED or not seizures.has_more:
                        raise
                except TpmError as error:
                    # Somebody flushed it, or it ended with a power cycle.
                    flushed += 1
                    if error.code != ReturnCode.INVALID_AUTHHANDLE or flushed > FLUSHED_MAX:
                        raise

    def _under_session(
        self, tpm: TpmClient, ordinal: Ordinal, secret: bytes, operands: dict[str, Any]
    ) -> Any:  # noqa: ANN401 - any command's
        session = self._session
        if session is None:
            self._flush_abandoned(tpm)
            session = self._session = tpm.oiap()
            self._journal.keep(ResourceType.AUTH, session.handle)
        try:
            answer = tpm.call(ordinal, Use(session, secret, continues=True), **operands)
        except Failure:
            # The chip is out of reach, and it is not known where the session's nonces are.
            self._abandoned.append(session.handle)
            self._session = None
            raise
        except (TpmError, BadResponseError):
            self._let_session_go()
            raise
        if not session.is_open:
            self._let_session_go()
        return answer

    def _flush_abandoned(self, tpm: TpmClient) -> None:
        while self._abandoned:
            with contextlib.suppress(TpmError):
                tpm.flush_specific(self._abandoned[-1], ResourceType.AUTH)
            self._journal.unkeep(ResourceType.AUTH, self._abandoned.pop())

    def _let_session_go(self) -> None:
        if self._session is not None:
            self._journal.unkeep(ResourceType.AUTH, self._session.handle)
            self._session = None

    def close(self) -> None:
        """End the session that was kept open, as far as the chip can be reached."""
        if self._session is None:
            return
        self._let_session_go()
        with contextlib.suppress(Failure):
            self._flush(self._journal.handles)
            self._link.relinquish()

    @contextlib.contextmanager
    def _cleaned_up(self) -> Iterator[None]:
        try:
            # Of an operation under which the chip was lost, and could not be told.
            if left := self._journal.handles:
                self._flush(left)
            yield
        except (TpmError, BadResponseError, NotNotedError):
            self._flush(self._journal.handles)
            raise
        except ChipFault as fault:
            if fault.fault is TisFault.SEIZED:
                self._flush_what_was_seized()
            raise
        else:
            self._journal.clear()
        finally:
            self._let_others_in()

    def _let_others_in(self) -> None:
        # An idle manager must not keep the firmware (or an operating system at locality 0) out.
        self._link.let_go()

    # -- start-up

    def start(self) -> CapVersionInfo:
        """Make the chip ready to seal: clean up after an earlier manager, own the chip.

        Raises:
            Failure: See `operation`; or it is no TPM 1.2.
        """
        self._progress("looking at the hardware TPM")
        # First of all: any other command would wipe out a response that still waits in the chip.
        left, fresh = self._journal.take_over(self._resume, self._link.finish)
        self._link.learn_timing()
        version = self._read_version()
        with self.operation("start the hardware TPM") as tpm:
            tpm.continue_self_test()
        self._flush_leftovers(left, fresh)
        with self.operation("find out whether the hardware TPM has an owner") as tpm:
            is_owned = tpm.get_property(CapabilityProperty.OWNER) != b"\0"
        if not is_owned:
            self._take_ownership()
        return version

    def prove_owner(self) -> None:
        """Make sure that the owner's secret is the right one, where much will depend on it.

        Raises:
            ChipRefusal: It is not; the chip has changed nothing.
            Failure: See `operation`.
        """
        with self.operation("use the hardware TPM as its owner") as tpm:
            tpm.owner_read_internal_pub(KeyHandleValue.SRK, self.secrets.owner_auth)

    def _read_version(self) -> CapVersionInfo:
        with self.operation("identify the hardware TPM") as tpm:
            told = tpm.get_capability(CapabilityArea.VERSION_VAL)
        try:
            version = decode(CapVersionInfo, told)
        except DecodeError as error:
            raise _not_usable(f"its version is {told[:16].hex()}: {error}") from error
        if version.version[:2] != b"\x01\x02":
            raise _not_usable(f"it has version {version.version[0]}.{version.version[1]}")
        return version

    def _flush_leftovers(self, left: Leftovers, fresh: Handles) -> None:
        with self.operation("tell this power cycle of the hardware TPM from another") as tpm:
            epoch = tpm.call(Ordinal.GET_TICKS).current_time.tick_nonce.hex()
        self._journal.set_epoch(epoch)
        self._flush(left.handles if left.epoch == epoch else fresh)
        self._journal.discard_leftovers()

    def _take_ownership(self) -> None:
        with self.operation("take ownership of the hardware TPM", _NO_SECRET_YET) as tpm:
            try:
                tpm.read_pubek()
            except TpmError as error:
                if error.code != ReturnCode.NO_ENDORSEMENT:
                    raise
                self._progress("making the hardware TPM's endorsement key")
                tpm.create_endorsement_key_pair()
            self._progress("taking ownership of the hardware TPM: making its storage root key")
            try:
                tpm.take_ownership(self.secrets.owner_auth, self.secrets.srk_auth)
            except TpmError as error:
                # Somebody else was quicker; what counts is whether our SRK secret is right.
                if error.code != ReturnCode.OWNER_SET:
                    raise

    def _resume(self, request: bytes) -> bytes:
        """What an earlier manager's command was answered; nothing if it was seized.

        Whether that command opened anything is not known then, and nobody will ever know: to insist
        would keep the manager from starting for ever.
        """
        try:
            return self._link.resume(request)
        except ChipFault as fault:
            if fault.fault is not TisFault.SEIZED:
                raise
            return b""

    # -- handles

    def _run_own(self, request: bytes) -> bytes:
        link, kind = self._link, opens(request)
        before: frozenset[int] = frozenset()
        if kind is not None:
            self._flush_doubtful()
            before = frozenset(self._client.handles(kind))
        try:
            return self._journal.run(request, link.execute, link.finish, link.settle)
        except ChipFault as fault:
            if kind is not None and fault.fault is TisFault.SEIZED:
                self._doubts.append((kind, before))
            raise

    def _flush_doubtful(self) -> None:
        """Flush what was opened by commands whose answers were lost when the TPM was seized.

        Nobody knows those handles, and the chip has few. Who may seize the TPM (localities 3 and 4)
        opens nothing on this platform. Somebody at a lower one who has opened something between the
        seizure and our return loses it.
        """
        while self._doubts:
            kind, before = self._doubts[-1]
            for handle in set(self._client.handles(kind)) - before:
                self._client.flush_specific(handle, kind)
            self._doubts.pop()

    def _flush_what_was_seized(self) -> None:
        """Flush what an operation had open, as far as the chip can be reached.

        At once: a start that was seized ends with it, and what is in doubt only this process knows.
        """
        seizures = Patience(self.seized_s)
        while True:
            try:
                self._flush_doubtful()
                self._flush(self._journal.handles)
            except ChipFault as fault:
                if fault.fault is not TisFault.SEIZED or not seizures.has_more:
                    return
            except (TpmError, BadResponseError, Failure):
                return
            else:
                return

    def _flush(self, handles: Handles) -> None:
        """Flush what is ours; that some of it has ended already is the normal case."""
        for kind, handle in handles:
            with contextlib.suppress(TpmError, BadResponseError):
                self._client.flush_specific(handle, kind)
        self._journal.clear()


def _not_usable(why: str) -> Failure:
    return Failure(
        "cannot use the hardware TPM",
        why=why,
        next_step="The manager needs a TPM 1.2.",
        exit_code=ExitCode.CONFIGURATION,
    )
