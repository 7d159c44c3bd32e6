"""A full self-test of a TPM's state, on a copy: before READY, and with no trace in the TPM itself.

A TPM that goes on where a killed process was must not be sent a command: that could end its SHA-1
thread or its exclusive transport session. So another engine tests what it has: the endorsement
key, and the cryptography beneath it.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from protocol.constants import HEADER_BYTES, Ordinal, Tag
from protocol.return_codes import ReturnCode
from tpm12.dispatch import Command
from tpm12.profile import Profile
from tpm12.state import Permanent

_SELF_TEST_FULL = b"".join(
    number.to_bytes(size, "big")
    for number, size in ((Tag.RQU_COMMAND, 2), (HEADER_BYTES, 4), (Ordinal.SELF_TEST_FULL, 4))
)


class _Copy:
    """A permanent section that is kept nowhere (`PermanentStore`)."""

    def __init__(self, permanent: Permanent) -> None:
        self._permanent = permanent

    def load(self) -> Permanent:
        """Give it."""
        return self._permanent

    def save(self, permanent: Permanent) -> None:
        """Keep it nowhere."""


def pass_self_test(permanent: Permanent, profile: Profile, commands: Iterable[Command]) -> None:
    """Test a TPM's permanent state and the cryptography that works on it.

    Raises:
        Failure: TPM_SelfTestFull fails.
    """
    tpm = DurableTpm(_Copy(permanent), profile=profile, commands=commands)
    tpm.power_on_and_start()
    response = tpm.execute(_SELF_TEST_FULL, 0)
    code = int.from_bytes(response[6:10], "big")
    if code != ReturnCode.SUCCESS:
        raise Failure(
            "the TPM does not pass its self-test",
            why=f"TPM_SelfTestFull answers 0x{code:x}",
            next_step="Restore its stored state from a backup; it was left as it is",
            exit_code=ExitCode.DAMAGED,
        )
