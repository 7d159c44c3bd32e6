"""Admin start-up and state, and testing: TPM Main r116 Part 3, chapters 3 and 4."""

from __future__ import annotations

from protocol.constants import KeyHandleValue, Ordinal, StartupType
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import U16, Sized, wire
from tpm12 import auditing, saved_state, self_test
from tpm12.authorization import Authorized
from tpm12.dispatch import Gate, Nothing, command
from tpm12.pcrs import start_values
from tpm12.state import SelfTestState, StAny, StClear
from tpm12.state_codec import StateError
from tpm12.tpm import Tpm

_ALWAYS = Gate.BEFORE_SELF_TEST


@wire
class StartupIn:
    """§3.2 incoming operands."""

    startup_type: U16


@command(
    Ordinal.STARTUP,
    name="Startup",
    section="Part 3 §3.2",
    takes=StartupIn,
    gates=_ALWAYS | Gate.BEFORE_STARTUP | Gate.KEEPS_SAVED_STATE,
)
def startup(tpm: Tpm, cmd: StartupIn, _auth: Authorized) -> None:
    """Leave the state after TPM_Init; saved state is gone afterwards, whatever comes of it.

    Raises:
        TpmError: INVALID_POSTINIT when already started; BAD_PARAMETER; FAILEDSELFTEST for
            ST_STATE when there is no saved state or it cannot be read, and the TPM is in failure
            mode until power goes: or who skips TPM_SaveState could start again with clean PCRs.
    """
    saved = tpm.permanent.saved_state
    if saved is not None:
        tpm.change_permanent().saved_state = None
        tpm.settle()
    if not tpm.stany.post_initialise:
        raise TpmError(ReturnCode.INVALID_POSTINIT)
    if cmd.startup_type == StartupType.STATE:
        _resume(tpm, saved)
        return
    if cmd.startup_type not in {StartupType.CLEAR, StartupType.DEACTIVATED}:
        raise TpmError(ReturnCode.BAD_PARAMETER)
    is_deactivated = cmd.startup_type == StartupType.DEACTIVATED or tpm.permanent.flags.deactivated
    tpm.stclear = StClear(
        context_nonce_key=tpm.random(20),
        owner_reference=KeyHandleValue.OWNER,
        pcrs=start_values(),
        deactivated=is_deactivated,
    )
    tpm.stany = StAny(
        post_initialise=False,
        tick_start_us=tpm.stany.tick_start_us,
        tick_nonce=tpm.stany.tick_nonce,
        context_nonce_session=tpm.random(20),
    )


def _resume(tpm: Tpm, saved: bytes | None) -> None:
    try:
        saved_state.restore(tpm, saved or b"")
    except StateError as error:
        tpm.change_volatile().self_test = SelfTestState.FAILURE
        tpm.settle()
        raise TpmError(ReturnCode.FAILEDSELFTEST, str(error)) from error


@command(Ordinal.SAVE_STATE, name="SaveState", section="Part 3 §3.3", gates=Gate.NONE)
def save_state(tpm: Tpm, _cmd: Nothing, auth: Authorized) -> None:
    """Keep over a loss of power what TPM_Startup(ST_STATE) restores; the next command drops it.

    Raises:
        TpmError: NO_WRAP_TRANSPORT inside a transport session: that session is a part of what is
            kept, and changes with the response.
    """
    if tpm.wrapped_in:
        raise TpmError(ReturnCode.NO_WRAP_TRANSPORT)
    if auditing.is_audited(tpm, Ordinal.SAVE_STATE):
        # The kept digest has the input of this command, and cannot have its output.
        auditing.record_input(tpm, auth.in_param_digest)
    tpm.change_permanent().saved_state = saved_state.saved(tpm)


@command(Ordinal.SELF_TEST_FULL, name="SelfTestFull", section="Part 3 §4.1", gates=_ALWAYS)
def self_test_full(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Test everything now.

    Raises:
        TpmError: FAILEDSELFTEST.
    """
    self_test.run_full(tpm)


@command(Ordinal.CONTINUE_SELF_TEST, name="ContinueSelfTest", section="Part 3 §4.2", gates=_ALWAYS)
def continue_self_test(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> None:
    """Finish the tests that power-on began; the answer comes after them.

    Raises:
        TpmError: FAILEDSELFTEST.
    """
    if tpm.volatile.self_test != SelfTestState.FULL:
        self_test.run_full(tpm)


@wire
class GetTestResultOut:
    """§4.3 outgoing operands."""

    out_data: Sized


_RESULTS = {
    SelfTestState.LIMITED: b"limited self-test passed\n",
    SelfTestState.FULL: b"full self-test passed\n",
    SelfTestState.FAILURE: b"self-test failed; the TPM is in failure mode until power goes\n",
}


@command(
    Ordinal.GET_TEST_RESULT,
    name="GetTestResult",
    section="Part 3 §4.3",
    gives=GetTestResultOut,
    gates=_ALWAYS | Gate.IN_FAILURE_MODE,
)
def get_test_result(tpm: Tpm, _cmd: Nothing, _auth: Authorized) -> GetTestResultOut:
    """Tell what the self-tests found, in the maker's words."""
    return GetTestResultOut(out_data=_RESULTS[tpm.volatile.self_test])
