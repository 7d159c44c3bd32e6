"""TPM_Init and TPM_Startup of a vTPM, which a process that is killed within leaves to the next.

Each step is done once: TPM_Startup(ST_STATE) uses up the state that was saved, so a second one
would find none, and a guest whose reset was under way must not be given saved state. How far it
came is a note that changes together with what TPM_Startup did.
"""

from __future__ import annotations

from typing import Final

from daemons.durable_tpm import DurableTpm
from daemons.vtpm.manager_link import ManagerLink
from daemons.xl.domain_arguments import StartupType as StartupArgument
from daemons.xl.domain_arguments import VtpmArguments
from protocol.constants import StartupType

_HOW_FAR: Final = "started"
"""Note: one of the following."""
_BEGUN, _DONE, _RESETTING, _WITHOUT_PCRS = b"0", b"1", b"2", b"3"

_STARTUP_TYPES: Final = {
    StartupArgument.CLEAR: StartupType.CLEAR,
    StartupArgument.SAVE: StartupType.STATE,
    StartupArgument.DEACTIVATED: StartupType.DEACTIVATED,
}


def start(tpm: DurableTpm, arguments: VtpmArguments, manager: ManagerLink) -> None:
    """Start the TPM, unless it goes on from a process that had done so.

    Args:
        tpm: Whose memory has the note, if a killed process left one.
        arguments: The TPM_Startup that was asked for, and PCRs of the hardware's.
        manager: Has those.

    Raises:
        Failure: It does not start, or the manager does not give a PCR.
    """
    how_far = tpm.notes.get(_HOW_FAR)
    if how_far == _DONE:
        return
    if how_far == _RESETTING:
        reset(tpm, arguments, manager)
        return
    if how_far != _WITHOUT_PCRS:
        _power_on_and_start(tpm, _STARTUP_TYPES[arguments.startup], _BEGUN)
    _preset_pcrs(tpm, arguments, manager)


def reset(tpm: DurableTpm, arguments: VtpmArguments, manager: ManagerLink) -> None:
    """Start the TPM for a guest that has booted anew, which finds no state that was saved.

    Args:
        tpm: The TPM.
        arguments: As for `start`.
        manager: As for `start`.

    Raises:
        Failure: As `start`.
    """
    startup_type = _STARTUP_TYPES[arguments.startup]
    if startup_type is StartupType.STATE:
        startup_type = StartupType.CLEAR
    _power_on_and_start(tpm, startup_type, _RESETTING)
    _preset_pcrs(tpm, arguments, manager)


def _power_on_and_start(tpm: DurableTpm, startup_type: StartupType, under_way: bytes) -> None:
    tpm.remember({_HOW_FAR: under_way})
    tpm.power_on_and_start(startup_type, {_HOW_FAR: _WITHOUT_PCRS})


def _preset_pcrs(tpm: DurableTpm, arguments: VtpmArguments, manager: ManagerLink) -> None:
    wanted = sorted(arguments.hardware_init_pcrs)
    if wanted:
        tpm.preset_pcrs({index: manager.hardware_pcr(index) for index in wanted})
    tpm.remember({_HOW_FAR: _DONE})
