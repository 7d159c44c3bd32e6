"""The PCR bank: who may extend and reset what, composites, and bindings of blobs to PCRs.

Source: TPM Main r116 Part 2 §8, Part 3 §16; PC Client TIS for the table of localities.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from protocol.constants import PCR_COUNT, ZERO_DIGEST
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import PcrComposite, PcrInfo, PcrInfoLong, PcrInfoShort, PcrSelection
from protocol.wire import DecodeError, decode, encode
from tpm12.crypto import sha1
from tpm12.state import ALL_ONES
from tpm12.tpm import Tpm


@dataclass(frozen=True, slots=True)
class PcrAttributes:
    """TPM_PCR_ATTRIBUTES (Part 2 §8.8): locality masks, and what a start sets."""

    resettable_from: int
    extendable_from: int
    start: bytes


_STATIC = PcrAttributes(0x00, 0x1F, ZERO_DIGEST)
_FREE = PcrAttributes(0x1F, 0x1F, ZERO_DIGEST)
ATTRIBUTES: Final[tuple[PcrAttributes, ...]] = (
    *(_STATIC for _ in range(16)),
    _FREE,  # 16, debug
    PcrAttributes(0x10, 0x1C, ALL_ONES),  # 17
    PcrAttributes(0x10, 0x1C, ALL_ONES),  # 18
    PcrAttributes(0x10, 0x0C, ALL_ONES),  # 19
    PcrAttributes(0x14, 0x0E, ALL_ONES),  # 20
    PcrAttributes(0x04, 0x04, ALL_ONES),  # 21
    PcrAttributes(0x04, 0x04, ALL_ONES),  # 22
    _FREE,  # 23, application support
)
DYNAMIC_PCRS: Final = range(17, 23)
"""What the locality 4 hash sequence resets to zero."""
DRTM_PCR: Final = 17
_LOCALITY_4: Final = 4

EMPTY_SELECTION_DIGEST: Final = ZERO_DIGEST
"""COMPOSITE_HASH of an empty selection."""


def start_values() -> dict[int, bytes]:
    """The bank after TPM_Startup(ST_CLEAR)."""
    return {i: attributes.start for i, attributes in enumerate(ATTRIBUTES)}


def extend(tpm: Tpm, pcr_num: int, digest: bytes) -> bytes:
    """Extend one PCR and give its new value.

    Raises:
        TpmError: BADINDEX; BAD_LOCALITY when this locality may not, which depends on the value of
            PCR 17 (PC Client TIS 1.2 §7.2).
    """
    if pcr_num >= PCR_COUNT:
        raise TpmError(ReturnCode.BADINDEX)
    if not ATTRIBUTES[pcr_num].extendable_from >> tpm.locality & 1:
        raise TpmError(ReturnCode.BAD_LOCALITY)
    if (
        pcr_num == DRTM_PCR
        and tpm.locality != _LOCALITY_4
        and tpm.stclear.pcrs[pcr_num] == ZERO_DIGEST
    ):
        # Between the reset and the hash sequence's digest: else a program would begin the chain.
        raise TpmError(ReturnCode.BAD_LOCALITY, "at its reset value only locality 4 extends it")
    stclear = tpm.change_stclear()
    pcrs = stclear.pcrs = stclear.pcrs.copy()
    value = pcrs[pcr_num] = sha1(pcrs[pcr_num] + digest)
    return value


def composite(tpm: Tpm, selection: PcrSelection) -> PcrComposite:
    """TPM_PCR_COMPOSITE of the PCRs as they are."""
    pcrs = tpm.stclear.pcrs
    return PcrComposite(select=selection, pcr_value=b"".join([pcrs[i] for i in selection.indices]))


def composite_hash(tpm: Tpm, selection: PcrSelection) -> bytes:
    """TPM_COMPOSITE_HASH of the PCRs as they are; zero for an empty selection."""
    if not selection.indices:
        return EMPTY_SELECTION_DIGEST
    return sha1(encode(composite(tpm, selection)))


def parse_binding(data: bytes, *, is_long: bool | None = None) -> PcrInfo | PcrInfoLong | None:
    """Read the PCR_INFO or PCR_INFO_LONG of a command; empty means no binding.

    Args:
        data: The bytes behind pcrInfoSize.
        is_long: Demand one form; None tells them apart by the tag of the long one.

    Raises:
        DecodeError: It is neither.
    """
    if not data:
        return None
    if is_long is None:
        is_long = data[:2] == b"\x00\x06"
    return decode(PcrInfoLong, data) if is_long else decode(PcrInfo, data)


def filled_in(tpm: Tpm, binding: PcrInfo | PcrInfoLong) -> PcrInfo | PcrInfoLong:
    """The binding with the creation fields set by the TPM (Part 3 §10.1, §10.4)."""
    if isinstance(binding, PcrInfoLong):
        return PcrInfoLong(
            locality_at_creation=tpm.locality_bit,
            locality_at_release=binding.locality_at_release,
            creation_pcr_selection=binding.creation_pcr_selection,
            release_pcr_selection=binding.release_pcr_selection,
            digest_at_creation=composite_hash(tpm, binding.creation_pcr_selection),
            digest_at_release=binding.digest_at_release,
        )
    return PcrInfo(
        pcr_selection=binding.pcr_selection,
        digest_at_release=binding.digest_at_release,
        digest_at_creation=composite_hash(tpm, binding.pcr_selection),
    )


def release_selection(binding: PcrInfo | PcrInfoLong | PcrInfoShort) -> PcrSelection:
    """The PCRs that a blob or key is released by."""
    if isinstance(binding, PcrInfoLong):
        return binding.release_pcr_selection
    return binding.pcr_selection


def check_release(tpm: Tpm, binding: PcrInfo | PcrInfoLong | PcrInfoShort | None) -> None:
    """Check that a blob or key bound to PCRs may be used now.

    Raises:
        TpmError: WRONGPCRVAL; BAD_LOCALITY (the forms of 1.2 only).
    """
    if binding is None:
        return
    if isinstance(binding, PcrInfoLong):
        selection = binding.release_pcr_selection
    else:
        selection = binding.pcr_selection
    if selection.indices and composite_hash(tpm, selection) != binding.digest_at_release:
        raise TpmError(ReturnCode.WRONGPCRVAL)
    if isinstance(binding, PcrInfo):
        return
    if not binding.locality_at_release >> tpm.locality & 1:
        raise TpmError(ReturnCode.BAD_LOCALITY)


def binding_of(data: bytes, code: ReturnCode, *, is_long: bool) -> PcrInfo | PcrInfoLong | None:
    """Read a binding inside a blob that came back to us.

    Raises:
        TpmError: `code` when it is malformed.
    """
    try:
        return parse_binding(data, is_long=is_long)
    except DecodeError as error:
        raise TpmError(code, "malformed PCR binding") from error
