"""VTPM_ORD_*: what a vTPM and the manager say to each other, byte for byte.

Every packet has the ten-byte header of a TPM command: tag, length of the whole packet, ordinal or
return code. Requests carry tag 0x01C1 (what every vTPM may ask) or 0x01C2 (management, for the
administrative vTPM); plain TPM commands that the manager passes on to the hardware keep their own
tags. A request that was handled is answered with tag 0x01C4, whether it succeeded or failed.

Source: Xen's `stubdom/vtpmmgr/vtpm_manager.h` and `vtpm_cmd_handler.c` as they behave. Field names
are Xen's in snake_case, ordinals are Xen's with the `VTPM_ORD_` prefix off.

Leaves to others: who may ask for what (`daemons/manager/requests.py`), PCR selections, keys and
quotes (`structures.py`).

Invariants:
- The length field of a packet is the packet's real length, in both directions. (Xen's manager
  never compared them; a mismatch is refused here, since somebody built the packet wrongly.)
- Management layouts are declared as far as they are known, also for ordinals that no manager
  answers yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Final, TypeVar

import construct as cs

from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import (
    B16,
    B32,
    SECRET,
    U16,
    U32,
    U64,
    Checked,
    Counted,
    DecodeError,
    Digest,
    Nonce,
    Rest,
    Sized,
    Sized16,
    decode,
    decode_from,
    encode,
    wire,
)

T = TypeVar("T")

HEADER_BYTES: Final = 10
HASH_KEY_BYTES_MIN: Final = 52
"""SHA-1 of the vTPM's state and an AES-256 key: the form Xen's vTPM uses."""
HASH_KEY_BYTES_MAX: Final = 64
"""SHA-256 of the state and an AES-256 key: reserved in Xen, used by ours."""
ERROR_TAG_OFFSET: Final = 3
"""A refusal in the dispatcher carries the request's tag plus this."""


class ManagerTag(IntEnum):
    """Tags of packets that the manager itself handles."""

    VTPM_TAG_REQ = 0x01C1
    VTPM_TAG_REQ2 = 0x01C2
    VTPM_TAG_RSP = 0x01C4
    VTPM_TAG_RSP2 = 0x01C5


class ManagerOrdinal(IntEnum):
    """VTPM_ORD_*. Management starts at 0x02000000, not at the TPM's vendor bit (0x20000000)."""

    SAVEHASHKEY = 0x00000001
    LOADHASHKEY = 0x00000002
    GET_BOOT_HASH = 0x00000003
    GET_QUOTE = 0x00000004
    GROUP_LIST = 0x02000101
    GROUP_NEW = 0x02000102
    GROUP_DEL = 0x02000103
    GROUP_ACTIVATE = 0x02000104
    GROUP_REGISTER = 0x02000105
    GROUP_UPDATE = 0x02000106
    GROUP_SHOW = 0x02000107
    GROUP_QUOTE = 0x02000108
    GROUP_RECOVER1 = 0x02000109
    GROUP_RECOVER2 = 0x0200010A
    VTPM_LIST = 0x02000201
    VTPM_SHOW = 0x02000202
    VTPM_EDIT = 0x02000203
    VTPM_NEW = 0x02000204
    VTPM_DEL = 0x02000205
    HW_MAKE_IDENTITY = 0x02000301
    HW_ACTIVATE_IDENTITY = 0x02000302
    HW_READ_PUBEK = 0x02000303
    HW_NV_DEFINE_SPACE = 0x02000304
    HW_NV_WRITE_VALUE = 0x02000305
    HW_NV_READ_VALUE = 0x02000306

    @property
    def is_management(self) -> bool:
        """Whether only the administrative vTPM may send it, under tag 0x01C2."""
        return self >= ManagerOrdinal.GROUP_LIST


Modulus = Annotated[bytes, cs.Bytes(256)]
"""A 2048-bit RSA modulus, signature or Diffie-Hellman value, big-endian."""
DigestList = Annotated[tuple[bytes, ...], Counted(cs.Int32ub, cs.Bytes(20))]
HashKey = Annotated[
    bytes,
    Checked(
        cs.GreedyBytes,
        lambda value: HASH_KEY_BYTES_MIN <= len(value) <= HASH_KEY_BYTES_MAX,
        ReturnCode.BAD_PARAMETER,
        "a hash-key blob has 52 to 64 bytes",
    ),
    SECRET,
]
LoadedHashKey = Annotated[
    bytes,
    Checked(
        cs.GreedyBytes,
        lambda value: len(value) in (HASH_KEY_BYTES_MIN, HASH_KEY_BYTES_MAX),
        ReturnCode.BAD_PARAMETER,
        "the manager gives 52 or 64 bytes",
    ),
    SECRET,
]
OptionalUuid = Annotated[
    bytes,
    Checked(
        cs.GreedyBytes,
        lambda value: len(value) in (0, 16),
        ReturnCode.BAD_PARAMETER,
        "a UUID has 16 bytes, or is left out",
    ),
]


@wire
class Header:
    """The first ten bytes of every packet; `code` is an ordinal or a return code."""

    tag: U16
    length: U32
    code: U32


@wire
class Nothing:
    """A request or response without operands."""


# -- what every vTPM may ask (tag 0x01C1) ----------------------------------------------------------


@wire
class SaveHashKeyIn:
    """SAVEHASHKEY: keep this blob for the vTPM that asks."""

    hash_key: HashKey


@wire
class LoadHashKeyIn:
    """LOADHASHKEY: give back what was kept. Bytes behind the header are ignored, as in Xen."""

    ignored: Rest = b""


@wire
class LoadHashKeyOut:
    """The kept blob: 52 bytes when the last twelve of its 64 are zero, else 64."""

    hash_key: LoadedHashKey


@wire
class GetBootHashOut:
    """The hash of the program that the vTPM's domain was started with."""

    kern_hash: Digest


@wire
class GetQuoteIn:
    """GET_QUOTE: a quote by the hardware TPM with the key of the vTPM's group."""

    data: Nonce
    pcr_selection: Sized16
    flags: U32


@wire
class GetQuoteOut:
    """Signature, then 20 bytes for each flag set (ascending), then 20 for each PCR (ascending)."""

    sig: Modulus
    flag_hashes_and_pcr_values: Rest


# -- management (tag 0x01C2) -----------------------------------------------------------------------


@wire
class GroupListOut:
    """GROUP_LIST: how many groups there are."""

    count: U32


@wire
class GroupNewIn:
    """GROUP_NEW: a group whose configurations the holder of `saa_modulus` signs."""

    label_digest: Digest
    saa_modulus: Modulus


@wire
class GroupNewOut:
    """The new group and its attestation identity key, for a privacy CA."""

    group_uuid: B16
    aik_modulus: Modulus
    identity_binding: Modulus


@wire
class GroupIn:
    """GROUP_DEL and GROUP_SHOW: a group by its index."""

    group: U32


@wire
class GroupActivateIn:
    """GROUP_ACTIVATE: the privacy CA's answer for the group's identity key."""

    group: U32
    blob: Sized


@wire
class GroupActivateOut:
    """TPM_SYMMETRIC_KEY out of the CA's answer."""

    alg: U32
    enc_scheme: U16
    key: Annotated[bytes, cs.Prefixed(cs.Int16ub, cs.GreedyBytes), SECRET]


@wire
class GroupRegisterIn:
    """GROUP_REGISTER: escrow the group's keys to the SAA by Diffie-Hellman."""

    group: U32
    dhkx1: Modulus
    saa_proof: Modulus
    pcr_selection: Sized16


@wire
class GroupRegisterOut:
    """The manager's half of the exchange, the escrow, and a bare quote signature over both."""

    dhkx2: Modulus
    recover_blob: B32
    sig: Modulus


@wire
class ConfigurationList:
    """What the SAA signs: platform composites and kernel (label) hashes under a sequence number."""

    seq: U64
    cfgs: DigestList
    kerns: DigestList


@wire
class GroupUpdateIn:
    """GROUP_UPDATE: a new signed list; then one PCR_SELECTION (u16 size, bytes) per platform."""

    group: U32
    cfg_list_sig: Modulus
    cfg_list: ConfigurationList
    selections: Rest


@wire
class GroupShowOut:
    """GROUP_SHOW: the group's identity and its list exactly as signed."""

    group_uuid: B16
    saa_modulus: Modulus
    cfg_list: ConfigurationList


@wire
class GroupQuoteIn:
    """GROUP_QUOTE: defined by Xen, answered by no manager yet."""

    group: U32
    nonce: Nonce
    pcr_selection: Sized16


@wire
class GroupQuoteOut:
    """Signature and the values of the selected PCRs."""

    sig: Modulus
    pcr_values: Rest


@wire
class GroupRecover2In:
    """GROUP_RECOVER2: defined by Xen, answered by no manager yet."""

    group: U32
    dhkx2: Modulus
    recover_blob: B32


@wire
class VtpmListIn:
    """VTPM_LIST: the UUIDs of a group, from the `offset`-th on."""

    group: U32
    offset: U32


@wire
class VtpmListOut:
    """How many there are in all, and 16 bytes for each one told here."""

    total: U32
    uuids: Rest


@wire
class VtpmNewIn:
    """VTPM_NEW: a vTPM with this UUID, or with a random one."""

    group: U32
    uuid: OptionalUuid = b""


@wire
class VtpmUuid:
    """The answer of VTPM_NEW and the operand of VTPM_DEL."""

    uuid: B16


@dataclass(frozen=True, slots=True)
class Layout:
    """The operands of one ordinal both ways; None where Xen never defined them."""

    operands: type | None
    results: type | None


LAYOUTS: Final[dict[ManagerOrdinal, Layout]] = {
    ManagerOrdinal.SAVEHASHKEY: Layout(SaveHashKeyIn, Nothing),
    ManagerOrdinal.LOADHASHKEY: Layout(LoadHashKeyIn, LoadHashKeyOut),
    ManagerOrdinal.GET_BOOT_HASH: Layout(Nothing, GetBootHashOut),
    ManagerOrdinal.GET_QUOTE: Layout(GetQuoteIn, GetQuoteOut),
    ManagerOrdinal.GROUP_LIST: Layout(Nothing, GroupListOut),
    ManagerOrdinal.GROUP_NEW: Layout(GroupNewIn, GroupNewOut),
    ManagerOrdinal.GROUP_DEL: Layout(GroupIn, Nothing),
    ManagerOrdinal.GROUP_ACTIVATE: Layout(GroupActivateIn, GroupActivateOut),
    ManagerOrdinal.GROUP_REGISTER: Layout(GroupRegisterIn, GroupRegisterOut),
    ManagerOrdinal.GROUP_UPDATE: Layout(GroupUpdateIn, Nothing),
    ManagerOrdinal.GROUP_SHOW: Layout(GroupIn, GroupShowOut),
    ManagerOrdinal.GROUP_QUOTE: Layout(GroupQuoteIn, GroupQuoteOut),
    # Group, then a whole TPM_KEY, a nonce and a selection; nobody sends it, so it is left open.
    ManagerOrdinal.GROUP_RECOVER1: Layout(None, None),
    ManagerOrdinal.GROUP_RECOVER2: Layout(GroupRecover2In, Nothing),
    ManagerOrdinal.VTPM_LIST: Layout(VtpmListIn, VtpmListOut),
    ManagerOrdinal.VTPM_SHOW: Layout(None, None),
    ManagerOrdinal.VTPM_EDIT: Layout(None, None),
    ManagerOrdinal.VTPM_NEW: Layout(VtpmNewIn, VtpmUuid),
    ManagerOrdinal.VTPM_DEL: Layout(VtpmUuid, Nothing),
    ManagerOrdinal.HW_MAKE_IDENTITY: Layout(None, None),
    ManagerOrdinal.HW_ACTIVATE_IDENTITY: Layout(None, None),
    ManagerOrdinal.HW_READ_PUBEK: Layout(None, None),
    ManagerOrdinal.HW_NV_DEFINE_SPACE: Layout(None, None),
    ManagerOrdinal.HW_NV_WRITE_VALUE: Layout(None, None),
    ManagerOrdinal.HW_NV_READ_VALUE: Layout(None, None),
}


# -- whole packets ---------------------------------------------------------------------------------


def packet(tag: int, code: int, operands: object | None = None) -> bytes:
    """Build one packet.

    Args:
        tag: u16.
        code: u32, ordinal or return code.
        operands: A structure of this module, bytes, or None.
    """
    body = operands if isinstance(operands, bytes) else encode(operands) if operands else b""
    return encode(Header(tag=tag, length=HEADER_BYTES + len(body), code=code)) + body


def request(ordinal: ManagerOrdinal, operands: object | None = None) -> bytes:
    """Build the request for one ordinal, under the tag that belongs to it."""
    tag = ManagerTag.VTPM_TAG_REQ2 if ordinal.is_management else ManagerTag.VTPM_TAG_REQ
    return packet(tag, ordinal, operands)


def split(data: bytes) -> tuple[Header, bytes]:
    """Cut a packet into its header and what follows.

    Raises:
        DecodeError: BAD_PARAMETER when it is shorter than a header, or its length field is wrong.
    """
    if len(data) < HEADER_BYTES:
        raise DecodeError(ReturnCode.BAD_PARAMETER, f"{len(data)} bytes are no packet")
    header, start = decode_from(Header, data, 0)
    if header.length != len(data):
        raise DecodeError(
            ReturnCode.BAD_PARAMETER,
            f"the packet says {header.length} bytes and has {len(data)}",
        )
    return header, data[start:]


def results(structure: type[T], data: bytes) -> T:
    """Read the answer to one request, on the side of the vTPM.

    Args:
        structure: What the ordinal answers with on success (`LAYOUTS[ordinal].results`).
        data: The whole packet.

    Raises:
        TpmError: The manager refused; its return code.
        DecodeError: The packet is not a response of the manager (an error with another tag is not:
            nobody may take it for "this vTPM is unknown").
    """
    header, body = split(data)
    is_refusal = header.code != ReturnCode.SUCCESS
    if header.tag != ManagerTag.VTPM_TAG_RSP and not (
        is_refusal and header.tag == ManagerTag.VTPM_TAG_RSP2
    ):
        reason = f"tag {header.tag:#06x} and code {header.code:#x} in the manager's answer"
        raise DecodeError(ReturnCode.BADTAG, reason)
    if is_refusal:
        try:
            code = ReturnCode(header.code)
        except ValueError:
            reason = f"the manager answered with the unknown code {header.code:#x}"
            raise DecodeError(ReturnCode.FAIL, reason) from None
        raise TpmError(code, "the manager's answer")
    return decode(structure, body)
