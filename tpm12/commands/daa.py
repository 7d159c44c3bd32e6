"""Direct anonymous attestation: TPM Main r116 Part 3, chapter 26.

Each command is called once for each stage of its table, in order, with the handle that stage 0
gave. The session is taken out of the TPM before anything is checked and put back after a stage that
succeeded: any error ends it ("Actions", 2).

Leaves to others: what a stage does (`tpm12.daa_stages`), secrets and blobs (`tpm12.daa`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import U8, Handle, Sized, wire
from tpm12 import daa, daa_stages
from tpm12.authorization import Authorized
from tpm12.crypto import is_same
from tpm12.daa_stages import Inputs, Stage
from tpm12.dispatch import AuthBy, Gate, command
from tpm12.state import DaaSession
from tpm12.tpm import Tpm

_GATES: Final = Gate.USABLE | Gate.OWNED
# Checked by the handler: a wrong authorization ends the DAA session too.
_SESSIONS: Final = (AuthBy("daa_owner"),)
_HANDLE_BYTES: Final = 4


@wire
class DaaIn:
    """§26.1 and §26.2 incoming operands."""

    handle: Handle
    stage: U8
    input_data0: Sized
    input_data1: Sized


@wire
class DaaOut:
    """§26.1 and §26.2 outgoing operands; the handle that stage 0 gives is inside the digest."""

    output_data: Sized


_JOIN: Final[dict[int, Stage]] = {
    1: daa_stages.load_chain,
    2: daa_stages.load_issuer,
    3: daa_stages.draw_u,
    4: daa_stages.r0_to_f0,
    5: daa_stages.r1_to_f1,
    6: daa_stages.s0_to_u0,
    7: daa_stages.finish_u,
    8: daa_stages.prove_endorsement,
    9: daa_stages.r0_to_r0,
    10: daa_stages.r1_to_r1,
    11: daa_stages.s0_to_r2,
    12: daa_stages.s1_to_r3,
    13: daa_stages.load_w,
    14: daa_stages.w_to_f,
    15: daa_stages.w_to_r,
    16: daa_stages.take_challenge,
    17: daa_stages.answer_f0,
    18: daa_stages.answer_f1,
    19: daa_stages.answer_u0,
    20: daa_stages.carry_u0,
    21: daa_stages.answer_u1,
    22: daa_stages.make_v0,
    23: daa_stages.make_v1,
    24: daa_stages.make_credential,
}
_SIGN: Final[dict[int, Stage]] = {
    1: daa_stages.load_credential,
    2: daa_stages.r0_to_r0,
    3: daa_stages.r1_to_r1,
    4: daa_stages.s0_to_r2,
    5: daa_stages.s1_to_r4,
    6: daa_stages.load_w,
    7: daa_stages.w_to_f,
    8: daa_stages.w_to_r,
    9: daa_stages.take_challenge,
    10: daa_stages.bind_message,
    11: daa_stages.answer_f0,
    12: daa_stages.answer_f1,
    13: daa_stages.answer_v0,
    14: daa_stages.carry_v0,
    15: daa_stages.answer_v1,
}
_JOIN_HAS_ISSUER_FROM: Final = 3
_SIGN_HAS_CREDENTIAL_FROM: Final = 2


@command(
    Ordinal.DAA_JOIN,
    name="DAA_Join",
    section="Part 3 §26.1",
    takes=DaaIn,
    gives=DaaOut,
    gates=_GATES,
    sessions=_SESSIONS,
)
def daa_join(tpm: Tpm, cmd: DaaIn, auth: Authorized) -> DaaOut:
    """Get a credential from an issuer, stage by stage.

    Raises:
        TpmError: AUTHFAIL; RESOURCES when every DAA session is taken; BAD_HANDLE; DAA_STAGE for any
            stage but the next; DAA_ISSUER_SETTINGS, DAA_TPM_SETTINGS for a sign session; what the
            stage says.
    """
    session = _taken(tpm, cmd.handle) if cmd.stage else None
    auth.verify_owner("daa_owner")
    if not cmd.stage:
        handle = _new_handle(tpm)
        number = daa.count(cmd.input_data0)
        if not number:
            raise TpmError(ReturnCode.DAA_INPUT_DATA0, "a chain of no keys")
        session = replace(daa.BLANK, tpm_specific=replace(daa.NO_CREDENTIAL, daa_count=number))
        _put(tpm, handle, replace(session, digest_context=daa.join_context(session)))
        return DaaOut(output_data=handle.to_bytes(_HANDLE_BYTES, "big"))
    session, stage = _due(session, _JOIN, cmd.stage)
    if cmd.stage >= _JOIN_HAS_ISSUER_FROM:
        daa.check_issuer(session)
    _check_context(session, daa.join_context(session))
    session, output_data = stage(tpm, session, Inputs(cmd.input_data0, cmd.input_data1))
    if cmd.stage == max(_JOIN):
        return DaaOut(output_data=output_data)
    comes_again = cmd.stage == 1 and session.tpm_specific.daa_count > 0
    session = replace(session, stage=cmd.stage + (not comes_again))
    _put(tpm, cmd.handle, replace(session, digest_context=daa.join_context(session)))
    return DaaOut(output_data=output_data)


@command(
    Ordinal.DAA_SIGN,
    name="DAA_Sign",
    section="Part 3 §26.2",
    takes=DaaIn,
    gives=DaaOut,
    gates=_GATES,
    sessions=_SESSIONS,
)
def daa_sign(tpm: Tpm, cmd: DaaIn, auth: Authorized) -> DaaOut:
    """Sign a message or an identity key with a credential, without saying whose, stage by stage.

    Raises:
        TpmError: AUTHFAIL; RESOURCES when every DAA session is taken; BAD_HANDLE; DAA_STAGE for any
            stage but the next; DAA_ISSUER_SETTINGS, DAA_TPM_SETTINGS for a join session; what the
            stage says.
    """
    session = _taken(tpm, cmd.handle) if cmd.stage else None
    auth.verify_owner("daa_owner")
    if not cmd.stage:
        handle = _new_handle(tpm)
        settings = daa.issuer_settings(cmd.input_data0)
        _put(tpm, handle, replace(daa.BLANK, issuer_settings=settings))
        return DaaOut(output_data=handle.to_bytes(_HANDLE_BYTES, "big"))
    session, stage = _due(session, _SIGN, cmd.stage)
    if cmd.stage >= _SIGN_HAS_CREDENTIAL_FROM:
        daa.check_issuer(session)
        _check_context(session, daa.sign_context(session))
    session, output_data = stage(tpm, session, Inputs(cmd.input_data0, cmd.input_data1))
    if cmd.stage < max(_SIGN):
        session = replace(session, stage=cmd.stage + 1)
        _put(tpm, cmd.handle, replace(session, digest_context=daa.sign_context(session)))
    return DaaOut(output_data=output_data)


def _taken(tpm: Tpm, handle: int) -> DaaSession | None:
    """Take a session out of the TPM, for good unless it is put back; None when there is none."""
    sessions = tpm.stany.daa_sessions
    session = sessions.get(handle)
    if session is not None:
        tpm.change_stany().daa_sessions = {h: s for h, s in sessions.items() if h != handle}
        tpm.settle()
    return session


def _put(tpm: Tpm, handle: int, session: DaaSession) -> None:
    stany = tpm.change_stany()
    stany.daa_sessions = {**stany.daa_sessions, handle: session}


def _new_handle(tpm: Tpm) -> int:
    sessions = tpm.stany.daa_sessions
    if len(sessions) >= tpm.world.profile.daa_sessions:
        raise TpmError(ReturnCode.RESOURCES)
    return tpm.new_handle(sessions)


def _due(
    session: DaaSession | None, stages: dict[int, Stage], wanted: int
) -> tuple[DaaSession, Stage]:
    """The session and its stage, if that is the next.

    Raises:
        TpmError: BAD_HANDLE; DAA_STAGE.
    """
    if session is None:
        raise TpmError(ReturnCode.BAD_HANDLE)
    stage = stages.get(wanted)
    if stage is None or session.stage != wanted:
        raise TpmError(ReturnCode.DAA_STAGE)
    return session, stage


def _check_context(session: DaaSession, expected: bytes) -> None:
    if not is_same(session.digest_context, expected):
        raise TpmError(ReturnCode.DAA_TPM_SETTINGS)
