"""The vault key, sealed to the chip and to what the platform measured.

The key is sealed under the storage root key to the values that some PCRs have, and to the manager's
locality. Several seals may stand side by side in the header of the vault, one per configuration
that may open it; the first that the chip opens counts. Until somebody signs configurations, there
is one seal: to the measurements as they are. (Xen keeps nothing at all until then, so that its
manager forgets every vTPM at its first restart.)

Source: `stubdom/vtpmmgr/disk_tpm.c` and its 84 bytes "Root" for what is sealed; the layout is ours.

Invariants:
- PCRs are read again for each seal, and a seal is tried before anybody relies on it.
- A failure to unseal changes nothing, and says which PCRs differ from when the key was sealed.
"""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import Annotated, Final

import construct as cs

from daemons.errors import ExitCode, Failure
from daemons.manager.chip import Chip
from daemons.manager.vault_format import KEY_BYTES, RootHeader, SealedKey
from protocol.constants import PCR_COUNT
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import PcrSelection, StoredData12
from protocol.wire import B4, B16, SECRET, DecodeError, decode, encode, wire
from tpm12.client import TpmClient, composite_hash, selection

AS_MEASURED: Final = b"the measurements as they were"
"""Name of the seal that nobody signed for."""
ROOT_MAGIC: Final = b"Root"

_NOT_THIS_CHIPS: Final = frozenset(
    {
        ReturnCode.NOTSEALED_BLOB,
        ReturnCode.DECRYPT_ERROR,
        ReturnCode.BAD_DATASIZE,
        ReturnCode.BAD_PARAMETER,
        ReturnCode.BAD_PARAM_SIZE,
        ReturnCode.BAD_VERSION,
        ReturnCode.INVALID_PCR_INFO,
        ReturnCode.INVALID_STRUCTURE,
        ReturnCode.ENCRYPT_ERROR,
    }
)
"""The blob was damaged, or another chip (or the same under another owner) made it."""
_PCR_MEANINGS: Final = {
    17: "the launcher and the policy",
    18: "the manager's program",
    19: "the manager's configuration",
}
_RANGE: Final = re.compile(r"([0-9]{1,2})(?:-([0-9]{1,2}))?")


@wire
class SealedRoot:
    """What is sealed: 52 bytes."""

    magic: B4 = ROOT_MAGIC
    vault_id: B16
    vault_key: Annotated[bytes, cs.Bytes(KEY_BYTES), SECRET]


class MeasurementsChanged(Failure):
    """The platform is not what it was when the key was sealed; the chip keeps the key."""


class NotOurSeal(Failure):
    """The chip cannot open any seal of the image, whatever the PCRs are."""


def pcr_indices(text: str) -> tuple[int, ...]:
    """Read the setting `seal_pcrs`: numbers and ranges with commas, such as "0-7,17-19".

    Raises:
        Failure: It is none, or names a PCR that a TPM 1.2 does not have.
    """
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(","):
        found = _RANGE.fullmatch(part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last or last >= PCR_COUNT:
            raise Failure(
                "the manager's setting seal_pcrs is refused",
                why=f"{part[:40]!a} is neither a PCR (0 to {PCR_COUNT - 1}) nor a range of them",
                next_step='Write it like "0-7,17-19".',
                exit_code=ExitCode.CONFIGURATION,
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def seal(
    chip: Chip, *, vault_id: bytes, vault_key: bytes, pcrs: tuple[int, ...], locality: int
) -> SealedKey:
    """Seal the vault key to the PCRs as they are now.

    Args:
        chip: Started.
        vault_id: 16 bytes.
        vault_key: 32 bytes.
        pcrs: Which PCRs, ascending.
        locality: The only one from which it can be unsealed, 0 to 4: the manager's own.

    Raises:
        Failure: The chip refused, or gave back something else than was sealed.
    """
    root = SealedRoot(vault_id=vault_id, vault_key=vault_key)
    with chip.operation("seal the manager's key to the hardware TPM") as tpm:
        values = {pcr: tpm.pcr_read(pcr) for pcr in pcrs}
        blob = tpm.seal(
            encode(root),
            release=values,
            locality_at_release=1 << locality,
            key_auth=chip.secrets.srk_auth,
        )
        # Also fails when a PCR moved since it was read: better now than at the next start.
        secret = tpm.unseal(blob, parent_auth=chip.secrets.srk_auth)
    if not hmac.compare_digest(secret, encode(root)):
        raise Failure(
            "cannot seal the manager's key to the hardware TPM",
            why="the chip unseals something else than was sealed",
            next_step="Do not trust this chip.",
            exit_code=ExitCode.UNAVAILABLE,
        )
    return SealedKey(
        name=AS_MEASURED,
        pcr_selection=selection(pcrs).pcr_select,
        locality=1 << locality,
        digest_at_release=composite_hash(values),
        pcr_values=tuple(values[pcr] for pcr in pcrs),
        stored_data=encode(blob),
    )


def unseal(chip: Chip, header: RootHeader) -> tuple[bytes, SealedKey]:
    """Get the vault key from whichever seal the chip opens, and which one that was.

    Raises:
        MeasurementsChanged: The chip knows a seal, but PCRs or locality are not the sealed ones.
        NotOurSeal: It knows none.
        ChipRefusal: It cannot be asked now, or a secret is wrong.
    """
    refusals: list[tuple[SealedKey, ReturnCode]] = []
    with chip.operation("unseal the manager's key") as tpm:
        now = _values_now(tpm, header)
        for sealed in sorted(header.seals, key=lambda candidate: len(_differing(candidate, now))):
            try:
                return _try_seal(tpm, chip.secrets.srk_auth, sealed, header.vault_id), sealed
            except TpmError as error:
                if error.code not in _NOT_THIS_CHIPS | {
                    ReturnCode.WRONGPCRVAL,
                    ReturnCode.BAD_LOCALITY,
                }:
                    raise
                refusals.append((sealed, error.code))
    raise _cannot_unseal(refusals, now)


def describe(sealed: SealedKey) -> str:
    """One line for the status: to what the key is sealed."""
    pcrs = ",".join(map(str, indices_of(sealed))) or "none"
    locality = sealed.locality.bit_length() - 1
    if sealed.name == AS_MEASURED:
        return (
            f"sealed to the measurements as they were (PCR {pcrs}, locality {locality}):"
            " no signed configuration"
        )
    return f"sealed to {sealed.name.decode(errors='replace')} (PCR {pcrs}, locality {locality})"


def indices_of(sealed: SealedKey) -> tuple[int, ...]:
    """The PCRs of a seal, ascending."""
    return PcrSelection(pcr_select=sealed.pcr_selection).indices


def _values_now(tpm: TpmClient, header: RootHeader) -> dict[int, bytes]:
    pcrs = {pcr for sealed in header.seals for pcr in indices_of(sealed) if pcr < PCR_COUNT}
    return {pcr: tpm.pcr_read(pcr) for pcr in sorted(pcrs)}


def _differing(sealed: SealedKey, now: Mapping[int, bytes]) -> list[int]:
    """Which PCRs are not as they were, as far as the values were kept."""
    # The header is not proven yet: it may name PCRs that no chip has.
    before = zip(indices_of(sealed), sealed.pcr_values, strict=False)
    return [pcr for pcr, value in before if pcr in now and now[pcr] != value]


def _try_seal(tpm: TpmClient, srk_auth: bytes, sealed: SealedKey, vault_id: bytes) -> bytes:
    try:
        blob = decode(StoredData12, sealed.stored_data)
        secret = tpm.unseal(blob, parent_auth=srk_auth)
        root = decode(SealedRoot, secret)
    except DecodeError as error:
        raise TpmError(ReturnCode.NOTSEALED_BLOB, str(error)) from None
    if root.magic != ROOT_MAGIC or root.vault_id != vault_id:
        raise TpmError(ReturnCode.NOTSEALED_BLOB, "it is sealed for another vault")
    return root.vault_key


def _cannot_unseal(
    refusals: list[tuple[SealedKey, ReturnCode]], now: Mapping[int, bytes]
) -> MeasurementsChanged | NotOurSeal:
    what = "cannot unseal the key of the manager's image"
    for sealed, code in refusals:
        if code == ReturnCode.WRONGPCRVAL:
            return MeasurementsChanged(
                what,
                why=f"the platform is not what it was when the key was sealed:"
                f" {_difference(sealed, now)}",
                next_step="Start the platform with the program, configuration and firmware it had,"
                " or give the manager a new image; this one was left as it is.",
                exit_code=ExitCode.DAMAGED,
            )
    for sealed, code in refusals:
        if code == ReturnCode.BAD_LOCALITY:
            return MeasurementsChanged(
                what,
                why="the key was sealed for locality"
                f" {sealed.locality.bit_length() - 1}, and the manager uses another",
                next_step="Correct tpmlocality= and iomem= in the manager's configuration.",
                exit_code=ExitCode.DAMAGED,
            )
    codes = ", ".join(f"TPM_{code.name}" for _, code in refusals) or "there is no seal"
    return NotOurSeal(
        what,
        why=f"the hardware TPM did not seal it, or has another owner since ({codes})",
        next_step="Bring the image and the chip back together; the image was left as it is.",
        exit_code=ExitCode.DAMAGED,
    )


def _difference(sealed: SealedKey, now: Mapping[int, bytes]) -> str:
    changed = _differing(sealed, now)
    if not changed:
        return "which PCR of " + ",".join(map(str, indices_of(sealed))) + " differs is not known"
    before = dict(zip(indices_of(sealed), sealed.pcr_values, strict=False))
    told = []
    for pcr in changed:
        meaning = _PCR_MEANINGS.get(pcr, "firmware and boot" if pcr < 8 else "")
        name = f"PCR {pcr} ({meaning})" if meaning else f"PCR {pcr}"
        told.append(f"{name} was {before[pcr].hex()[:12]}.. and is {now[pcr].hex()[:12]}..")
    return "; ".join(told)
