"""The main path of a TPM 1.2: one request in, one response and a new state out.

`Engine.execute` reads as the list of steps: header; ordinal; operands; gates; sessions; handles;
authorization; the handler on a draft of the state; the response. Nothing is kept until the caller
says so with `keep()`: a caller that has to make a change durable first does that in between, and
does not say so when it could not.

Source: TPM Main r116 Part 1 (command flow), Part 3 §1; order of checks as real TPMs have it:
malformed operands are reported before the state of the TPM is.

Invariants:
- Any bytes give a well-formed response; only our own bugs raise.
- A command that fails changes nothing but its sessions, the attack counter and what every command
  ends (the SHA-1 thread, saved state).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Final

from protocol.constants import AUTH_REQUEST_BYTES, HEADER_BYTES, Ordinal, Tag
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import DecodeError
from tpm12 import auditing, drtm, self_test, transport
from tpm12.authorization import (
    AuthBlock,
    Authorized,
    WrongHmacError,
    check_key_use,
    count_failure,
    lockout_left_us,
    read_blocks,
)
from tpm12.crypto import sha1
from tpm12.dispatch import AuthBy, Command, table
from tpm12.keys import LoadedKey
from tpm12.ports import Clock, KeyGenerator, StirrableRng
from tpm12.profile import Profile
from tpm12.state import SelfTestState, StAny, State, StClear, Volatile
from tpm12.tpm import Tpm, World, Wrapping
from tpm12.transport import TransportAuthorized

_HEADER: Final = struct.Struct(">HII")
_ERROR: Final = {code: _HEADER.pack(Tag.RSP_COMMAND, HEADER_BYTES, code) for code in ReturnCode}
_read_header: Final = _HEADER.unpack_from
_header: Final = _HEADER.pack
# Plain integers: comparing with an enumerator, or looking one up, shows in a command of 2 us.
_REQUEST: Final = int(Tag.RQU_COMMAND)
_RESPONSE: Final = int(Tag.RSP_COMMAND)
_SUCCESS: Final = ReturnCode.SUCCESS
_DONE: Final = _header(_RESPONSE, HEADER_BYTES, 0)
_FULLY_TESTED: Final = SelfTestState.FULL
_NO_KEYS: Final[dict[str, LoadedKey]] = {}
_NOTHING_READY: Final[Mapping[int, Command]] = {}
_NO_SESSION: Final[tuple[tuple[AuthBy, AuthBlock | None], ...]] = ((AuthBy(over=""), None),)
_FATAL: Final = frozenset({ReturnCode.FAIL, ReturnCode.AUDITFAIL_SUCCESSFUL})
"""What "cannot happen", and what was done and not audited: such a TPM trusts itself no more."""


def error_response(code: ReturnCode) -> bytes:
    """The 10-byte response of a failed command; its tag is always RSP_COMMAND."""
    return _ERROR[code]


@dataclass(slots=True)
class Outcome:
    """What a command came to.

    Attributes:
        response: The bytes for the peer.
        state: The state after it, the same object where nothing changed.
        permanent_changed: It must be stored before the response may leave.
        code: The return code in the response.
    """

    response: bytes
    state: State
    permanent_changed: bool
    code: ReturnCode


class Engine:
    """One TPM 1.2.

    Args:
        state: Where it starts from (`factory_state()`, or what a store kept).
        rng, clock, key_generator: What it needs from outside.
        profile: Maker, limits and times.
        commands: The declared commands it knows (`tpm12.commands.ALL` and vendor commands).
    """

    def __init__(  # noqa: PLR0913 - the world of an engine
        self,
        state: State,
        *,
        rng: StirrableRng,
        clock: Clock,
        key_generator: KeyGenerator,
        profile: Profile,
        commands: Iterable[Command],
    ) -> None:
        self.state = state
        self._table = table(commands)
        self._unowned = {n: c for n, c in self._table.items() if not c.needs_owner}
        self._hashing = {n: c for n, c in self._unowned.items() if c.keeps_sha1_thread}
        self._world = World(
            rng=rng,
            clock=clock,
            key_generator=key_generator,
            profile=profile,
            commands=self._table,
            run_wrapped=self._run_wrapped,
        )
        # The draft of the command before, settled, serves the next one if its state was kept.
        self._draft = Tpm(state, self._world, 0)
        self._draft_of: State | None = None
        self._unauthorized = _without_sessions(self._draft)
        """What a command gets that comes without sessions."""
        self._ready: Mapping[int, Command] = _NOTHING_READY
        """The commands for which nothing in the state is in the way: all of them, as a rule."""

    # -- one command -------------------------------------------------------------------------

    def execute(self, request: bytes, locality: int = 0) -> Outcome:
        """Run one command on a draft of the state.

        Args:
            request: One whole frame, as received.
            locality: Of the requester, 0 to 4; the transport answers for it.

        Returns:
            The outcome, not kept yet: see `keep()`. Who does not keep it has not run the command.
        """
        before, size = self.state, len(request)
        if size < HEADER_BYTES:
            return self._failed(before, ReturnCode.BAD_PARAM_SIZE)
        tag, param_size, ordinal = _read_header(request)
        if param_size != size:
            return self._failed(before, ReturnCode.BAD_PARAM_SIZE)
        tpm = self._draft if self._draft_of is before else self._new_draft(before)
        command = self._ready.get(ordinal)
        self._draft_of = None  # only what ends well puts it back
        tpm.locality = locality
        blocks: list[AuthBlock] = []
        operands: Any = None
        try:
            if tag == _REQUEST and command is not None and command.is_plain:
                # Most commands. Where other bytes than its operands are there, what is wrong with
                # them is found by the way that all others go.
                operands = command.takes.__wire_operands__(request)  # type: ignore[attr-defined]
            if operands is None:
                response = self._run(tpm, command, request, tag, blocks)
            else:
                results = command.handler(tpm, operands, self._unauthorized)  # type: ignore[union-attr]
                response = _DONE if results is None else results.__wire_frame__(_RESPONSE, 0)
        except WrongHmacError as error:
            tpm.rollback()
            count_failure(tpm)
            return self._ended(tpm, before, ordinal, blocks, error.code)
        except (TpmError, DecodeError) as error:
            tpm.rollback()
            return self._ended(tpm, before, ordinal, blocks, error.code)
        if (
            tpm.stany is before.stany
            and tpm.stclear is before.stclear
            and tpm.volatile is before.volatile
            and tpm.permanent is before.permanent
        ):
            self._draft_of = before
            return Outcome(response, before, False, _SUCCESS)
        return self._changed(tpm, before, response)

    def _run(  # noqa: C901, PLR0912 - the steps in a row; a call for each costs double
        self,
        tpm: Tpm,
        command: Command | None,
        request: bytes,
        tag: int,
        blocks: list[AuthBlock],
    ) -> bytes:
        """Run a command of any kind, with all checks.

        Args:
            tpm: Its draft.
            command: None: something in the state may be in its way, or there is no such command.
            request: The whole frame.
            tag: Of its header.
            blocks: Takes its auth blocks, also when it then fails.
        """
        if command is not None:
            # What `_begin` would look for is not there, and was found not to be in one go.
            operands, at = command.takes.__wire_decode__(request, HEADER_BYTES)  # type: ignore[attr-defined]
            is_audited = command.is_audited_at_factory
        else:
            command, operands, at, is_audited = _begin(tpm, self._table, request)
        if tag not in command.sessions_by_tag:
            raise TpmError(ReturnCode.BADTAG)
        if tag != _REQUEST:
            blocks += read_blocks(request, at, tag - _REQUEST)
        elif at != len(request):
            raise TpmError(ReturnCode.BAD_PARAM_SIZE)
        in_digest = b""
        if blocks or is_audited:  # neither the header nor the handles are hashed
            params_at = command.params_at
            if params_at == HEADER_BYTES:
                in_digest = sha1(request[6:at])
            else:
                in_digest = sha1(request[6:HEADER_BYTES] + request[params_at:at])
        if blocks or command.keys or is_audited:
            auth = _authorize(tpm, command, operands, blocks, in_digest)
        else:
            auth = self._unauthorized
        results = command.handler(tpm, operands, auth)
        if blocks:
            response = _signed(command, results, auth)
        elif results is None:
            response = _DONE
        else:
            response = results.__wire_frame__(_RESPONSE, 0)
        if is_audited:
            auditing.record(tpm, command, auth, response)
        return response

    def _changed(self, tpm: Tpm, before: State, response: bytes) -> Outcome:
        """A command that has changed something; of the state only that is looked through."""
        state = self._draft_of = tpm.settle()
        stany, stclear, volatile = state.stany, state.stclear, state.volatile
        is_permanent_changed = state.permanent is not before.permanent
        if (
            is_permanent_changed
            or self._ready is _NOTHING_READY
            or (stany is not before.stany and _is_stany_held(stany))
            or (stclear is not before.stclear and _is_stclear_held(stclear))
            or volatile.self_test != _FULLY_TESTED
        ):
            self._ready = self._ready_in(state)
        elif volatile is not before.volatile:
            self._ready = self._ready_beside_thread(state)
        return Outcome(response, state, is_permanent_changed, _SUCCESS)

    def _new_draft(self, state: State) -> Tpm:
        """A draft for a command whose state is not the one that the last command left.

        Making one and looking through the state costs 0.5 us, hence the draft of a command that
        ended well serves the next one.
        """
        self._draft = Tpm(state, self._world, 0)
        self._unauthorized = _without_sessions(self._draft)
        self._ready = self._ready_in(state)
        return self._draft

    def _ready_in(self, state: State) -> Mapping[int, Command]:
        """The commands for which nothing in a state is in the way."""
        return _NOTHING_READY if _is_held(state) else self._ready_beside_thread(state)

    def _ready_beside_thread(self, state: State) -> Mapping[int, Command]:
        """The same, when only a SHA-1 computation, or the lack of an owner, can be in the way.

        Most commands end it, and so does any that comes through another transport session.
        """
        volatile = state.volatile
        if volatile.sha1_thread is None:
            return self._unowned if state.permanent.owner_auth is None else self._table
        is_on_transport = self._world.wrapping or volatile.sha1_thread_transport
        return _NOTHING_READY if is_on_transport else self._hashing

    def keep(self, outcome: Outcome) -> None:
        """Make the outcome's state the TPM's."""
        self.state = outcome.state

    def unkept(self, request: bytes, code: ReturnCode) -> Outcome:
        """What is left of a command that was done, and could not be kept: it has failed.

        So its sessions are gone, as after any failure; a client does not end them itself.

        Args:
            request: The command; it succeeded.
            code: What to answer.
        """
        before = self.state
        tag, _, ordinal = _read_header(request)
        count = tag - _REQUEST
        blocks = read_blocks(request, len(request) - AUTH_REQUEST_BYTES * count, count)
        draft = Tpm(before, self._world, 0)
        return self._ended(draft, before, ordinal, blocks, code)

    def _run_wrapped(self, tpm: Tpm, request: bytes, wrapping: Wrapping) -> bytes:
        """Run a command that came inside another one, on the other's draft."""
        inner, profile = copy(self), self._world.profile
        inner._draft_of = None  # noqa: SLF001 - as below
        room = profile.input_buffer_bytes - wrapping.overhead_bytes
        inner._world = replace(  # noqa: SLF001 - our own, a moment ago
            self._world, wrapping=wrapping, profile=replace(profile, input_buffer_bytes=room)
        )
        inner.state = tpm.state()
        outcome = inner.execute(request, tpm.locality)
        tpm.adopt(outcome.state)
        return outcome.response

    # -- signals of the platform -------------------------------------------------------------

    def power_on(self) -> Outcome:
        """TPM_Init: power or reset; only TPM_Startup is legal afterwards (Part 3 §3.1)."""
        before = self.state
        tpm = Tpm(before, self._world, 0)
        tpm.stany = StAny(
            post_initialise=True,
            tick_start_us=self._world.clock.now_us(),
            tick_nonce=tpm.random(20),
            context_nonce_session=tpm.random(20),
        )
        pin = before.volatile.physical_presence_pin
        tpm.volatile = Volatile(physical_presence_pin=pin)
        self_test.run_limited(tpm)
        return self._succeeded(tpm, before, b"")

    def physical_presence_pin(self, *, asserted: bool) -> Outcome:
        """The hardware line for physical presence (Part 1 §10)."""
        before = self.state
        tpm = Tpm(before, self._world, 0)
        tpm.change_volatile().physical_presence_pin = asserted
        return self._succeeded(tpm, before, b"")

    def hash_start(self) -> Outcome:
        """TPM_HASH_START, a bus cycle of locality 4."""
        return self._bus_cycle(drtm.hash_start)

    def hash_data(self, data: bytes) -> Outcome:
        """TPM_HASH_DATA, a bus cycle of locality 4."""
        return self._bus_cycle(lambda tpm: drtm.hash_data(tpm, data))

    def hash_end(self) -> Outcome:
        """TPM_HASH_END, a bus cycle of locality 4."""
        return self._bus_cycle(drtm.hash_end)

    def _bus_cycle(self, action: drtm.BusCycle) -> Outcome:
        before = self.state
        tpm = Tpm(before, self._world, 4)
        try:
            action(tpm)
        except TpmError as error:
            tpm.rollback()
            tpm.change_volatile().self_test = SelfTestState.FAILURE
            return self._outcome(tpm, before, b"", error.code)
        return self._succeeded(tpm, before, b"")

    # -- outcomes ----------------------------------------------------------------------------

    def _failed(self, before: State, code: ReturnCode) -> Outcome:
        return Outcome(_ERROR[code], before, permanent_changed=False, code=code)

    def _ended(
        self,
        tpm: Tpm,
        before: State,
        ordinal: int,
        blocks: list[AuthBlock],
        code: ReturnCode,
    ) -> Outcome:
        """A failed command: the sessions it named are gone, unless it was refused unread."""
        if blocks and code is not ReturnCode.DEFEND_LOCK_RUNNING:
            if _is_on_transport(self._table.get(ordinal)):
                *blocks, last = blocks
                transport.end(tpm, last.handle)
            sessions = tpm.stany.sessions
            named = {block.handle for block in blocks}
            if not named.isdisjoint(sessions):
                kept = {h: s for h, s in sessions.items() if h not in named}
                tpm.change_stany().sessions = kept
        if code in _FATAL:
            tpm.change_volatile().self_test = SelfTestState.FAILURE
        return self._outcome(tpm, before, _ERROR[code], code)

    def _succeeded(self, tpm: Tpm, before: State, response: bytes) -> Outcome:
        return self._outcome(tpm, before, response, _SUCCESS)

    def _outcome(self, tpm: Tpm, before: State, response: bytes, code: ReturnCode) -> Outcome:
        is_permanent_same = tpm.permanent is before.permanent
        if (
            is_permanent_same
            and tpm.stclear is before.stclear
            and tpm.stany is before.stany
            and tpm.volatile is before.volatile
        ):
            return Outcome(response, before, permanent_changed=False, code=code)
        changed = not is_permanent_same
        return Outcome(response, tpm.state(), permanent_changed=changed, code=code)


def _without_sessions(tpm: Tpm) -> Authorized:
    """The authorization of any command on a draft that no session came with: nothing is proven."""
    return Authorized(tpm, 0, _NO_SESSION, (), b"", _NO_KEYS)


def _is_held(state: State) -> bool:
    """May there be something that would stop a command, or that any command would end?

    It is looked for when the state has changed, not with each command.
    """
    permanent = state.permanent
    return bool(
        _is_stany_held(state.stany)
        or _is_stclear_held(state.stclear)
        or state.volatile.self_test != _FULLY_TESTED
        or permanent.flags.disable
        or permanent.saved_state is not None
        or permanent.ordinal_audit_status
    )


def _is_stany_held(stany: StAny) -> object:
    return stany.post_initialise or stany.transport_exclusive


def _is_stclear_held(stclear: StClear) -> object:
    return stclear.deactivated or stclear.failed_tries or stclear.disable_reset_lock


def _begin(
    tpm: Tpm, commands: Mapping[int, Command], request: bytes
) -> tuple[Command, object, int, bool]:
    """Begin a command on a TPM in any state: end what it ends, read its operands, pass the gates.

    Returns:
        The command, its operands and where they end, and whether the command is audited.
    """
    tag, _, ordinal = _read_header(request)
    command = commands.get(ordinal)
    if (
        tpm.volatile.sha1_thread is not None
        or tpm.permanent.saved_state is not None
        or tpm.stany.transport_exclusive
    ):
        _end_what_commands_end(tpm, command)
    if command is None:
        raise TpmError(ReturnCode.BAD_ORDINAL)
    operands, at = command.takes.__wire_decode__(request, HEADER_BYTES)  # type: ignore[attr-defined]
    _check_gates(tpm, command, tag)
    audit_status = tpm.permanent.ordinal_audit_status
    return command, operands, at, audit_status.get(ordinal, command.is_audited_at_factory)


def _end_what_commands_end(tpm: Tpm, command: Command | None) -> None:
    """What does not outlive a command that is not about it, whether that command succeeds or not.

    Saved state; a SHA-1 thread, also where the command comes through another transport session
    than the thread did; an exclusive transport session.
    """
    ordinal = None if command is None else command.ordinal
    keeps_saved_state = command is not None and command.keeps_saved_state
    # Before TPM_Startup no command changes anything: who asks too early does not spoil a resume.
    keeps_saved_state = keeps_saved_state or tpm.stany.post_initialise
    if tpm.permanent.saved_state is not None and not keeps_saved_state:
        tpm.change_permanent().saved_state = None
    volatile = tpm.volatile
    keeps_thread = command is not None and command.keeps_sha1_thread
    keeps_thread = keeps_thread and volatile.sha1_thread_transport == tpm.wrapped_in
    # For TPM_ExecuteTransport it is the wrapped command that decides (Part 3 §13.1).
    keeps_thread = keeps_thread or ordinal == Ordinal.EXECUTE_TRANSPORT
    if volatile.sha1_thread is not None and not keeps_thread:
        tpm.change_volatile().sha1_thread = None
    # On which session a transport command is, is known when all of it has been read.
    if tpm.stany.transport_exclusive and not (_is_on_transport(command) or tpm.wrapped_in):
        transport.end(tpm, tpm.stany.transport_exclusive)
    tpm.settle()


def _is_on_transport(command: Command | None) -> bool:
    """Is its last session a transport session?"""
    return command is not None and command.authorized is TransportAuthorized


def _check_lockout(tpm: Tpm, command: Command) -> None:
    """Refuse authorization for some time after too many failures (Part 3 §9; Part 2 §7.5)."""
    if lockout_left_us(tpm):
        if command.ordinal not in _RUN_LOCKED_OUT:
            raise TpmError(ReturnCode.DEFEND_LOCK_RUNNING)
    elif tpm.stclear.disable_reset_lock:
        # A TPM_ResetLockValue that failed closes it for that time, and no longer.
        tpm.change_stclear().disable_reset_lock = False
        tpm.settle()


def _check_gates(tpm: Tpm, command: Command, tag: int) -> None:
    stclear = tpm.stclear
    if tag != Tag.RQU_COMMAND and (stclear.failed_tries or stclear.disable_reset_lock):
        _check_lockout(tpm, command)
    tested = tpm.volatile.self_test
    if tested != SelfTestState.FULL:
        if tested == SelfTestState.FAILURE:
            if not command.runs_in_failure_mode:
                raise TpmError(ReturnCode.FAILEDSELFTEST)
            return  # also before TPM_Startup, which cannot succeed: a dead TPM can still say why
        if not command.runs_before_self_test and not tpm.stany.post_initialise:
            self_test.run_full(tpm)
            tpm.settle()
    if tpm.stany.post_initialise and not command.runs_before_startup:
        raise TpmError(ReturnCode.INVALID_POSTINIT)
    if command.needs_enabled and tpm.permanent.flags.disable:
        raise TpmError(ReturnCode.DISABLED)
    if command.needs_active and tpm.stclear.deactivated:
        raise TpmError(ReturnCode.DEACTIVATED)
    if command.needs_owner and tpm.permanent.owner_auth is None:
        raise TpmError(ReturnCode.NOSRK)


_RUN_LOCKED_OUT: Final = frozenset({int(Ordinal.RESET_LOCK_VALUE), int(Ordinal.STARTUP)})
"""What is not refused for its sessions while the attack defence is on: the command that ends it
(Part 3 §9.3), and TPM_Startup, which "SHALL execute as normal" and whose sessions are BADTAG."""


def _authorize(
    tpm: Tpm,
    command: Command,
    operands: object,
    blocks: Sequence[AuthBlock],
    in_digest: bytes,
) -> Authorized:
    """Resolve key handles, check the keys' own bindings, then the sessions."""
    keys = _NO_KEYS
    if command.keys:
        keys = {}
        for operand, reads_only in command.keys:
            key = tpm.key(getattr(operands, operand))
            check_key_use(tpm, key, reads_only=reads_only)
            keys[operand] = key
    sessions = command.sessions
    declared: Sequence[tuple[AuthBy, AuthBlock | None]]
    if not blocks:
        declared = command.unserved
    elif len(sessions) == 1:
        declared = ((sessions[0], blocks[0]),)
    else:
        following = iter(blocks)
        declared = [
            (by, next(following) if is_served else None)
            for by, is_served in zip(sessions, command.sessions_by_count[len(blocks)], strict=True)
        ]
    auth = command.authorized(tpm, command.ordinal, declared, blocks, in_digest, keys)
    if len(blocks) > 1 or not command.leaves_checks:
        auth.verify_declared()
    return auth


def _signed(command: Command, results: Any, auth: Authorized) -> bytes:  # noqa: ANN401 - a wire structure or None
    """The response to a command with authorization."""
    body = b"" if results is None else results.__wire_encode__()
    blocks = auth.blocks
    handles = 4 * command.handles_out
    digest = sha1(command.digest_prefix + (body[handles:] if handles else body))
    body += auth.sign_response(blocks, digest)
    return _header(_RESPONSE + len(blocks), HEADER_BYTES + len(body), 0) + body
