"""The shared page of tpmif: its header, its packet, and who may set which state.

Nothing here knows of sockets, sequence numbers or grants; `tpmif` builds the ring on it.

Spec: Xen `io/tpmif.h`, protocol v2. Extra pages are refused: no backend ever mapped them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from enum import IntEnum
from typing import Final

from protocol.return_codes import ReturnCode
from protocol.wire import U8, U32LE, DecodeError, wire
from protocol.xenbus import Side

PAGE_BYTES: Final = 4096
PAGE_HEADER_BYTES: Final = 8
PACKET_BYTES_MAX: Final = PAGE_BYTES - PAGE_HEADER_BYTES
"""4088: what TPM_CAP_PROP_INPUT_BUFFER of a vTPM says."""


class RingError(DecodeError):
    """The other side broke the protocol of the ring; its connection is over."""

    def __init__(self, reason: str) -> None:
        super().__init__(ReturnCode.BAD_PARAMETER, reason)


class RingMisuseError(RuntimeError):
    """Our own side asked the ring for a step it may not take: a bug of ours."""


class PageState(IntEnum):
    """The state byte of the shared page."""

    IDLE = 0
    SUBMIT = 1
    FINISH = 2
    CANCEL = 3


PAGE_TRANSITIONS: Final[Mapping[Side, Mapping[PageState, frozenset[PageState]]]] = {
    Side.FRONTEND: {
        # CANCEL after the answer: it crossed the answer, and the backend acknowledges it.
        PageState.IDLE: frozenset({PageState.SUBMIT, PageState.CANCEL}),
        PageState.SUBMIT: frozenset({PageState.CANCEL}),
        PageState.FINISH: frozenset({PageState.SUBMIT, PageState.CANCEL}),
        PageState.CANCEL: frozenset(),
    },
    Side.BACKEND: {
        PageState.IDLE: frozenset(),
        PageState.SUBMIT: frozenset({PageState.FINISH, PageState.IDLE}),
        PageState.FINISH: frozenset(),
        PageState.CANCEL: frozenset({PageState.FINISH, PageState.IDLE}),
    },
}
"""Side -> the state of the page -> the states this side may set."""


@wire
class PageHeader:
    """struct tpmif_shared_page; host order, which is little endian wherever Xen has a vTPM."""

    length: U32LE
    state: U8
    locality: U8
    pad: U8
    nr_extra_pages: U8


_PAGE_HEADER: Final = struct.Struct("<IBBBB")
"""`PageHeader` for the hot path; a test holds the two equal."""


def page_image(state: PageState, locality: int = 0, packet: bytes = b"") -> bytes:
    """Write a page, cut after its packet.

    Args:
        state: The state to set.
        locality: 0 to 255, as the frontend asks for it.
        packet: 0 to 4088 bytes.

    Raises:
        RingMisuseError: The packet is too long for the page.
    """
    if len(packet) > PACKET_BYTES_MAX:
        raise RingMisuseError(f"a packet of {len(packet)} bytes does not fit into a page")
    return _PAGE_HEADER.pack(len(packet), state, locality, 0, 0) + packet


def read_page(image: bytes, at: int = 0) -> tuple[int, int, bytes]:
    """Read a page that is cut after its packet.

    Args:
        image: Bytes that hold the page from `at` to their end.
        at: Where the page starts.

    Returns:
        State (may be none of `PageState`), locality, packet.

    Raises:
        RingError: Header cut, extra pages, pad not zero, or a length that is not the packet's.
    """
    length_there = len(image) - at - PAGE_HEADER_BYTES
    if length_there < 0:
        raise RingError(f"a page of {len(image) - at} bytes has no whole header")
    length, state, locality, pad, nr_extra_pages = _PAGE_HEADER.unpack_from(image, at)
    if nr_extra_pages or pad:
        raise RingError(f"{nr_extra_pages} extra pages, pad {pad}: only one plain page is taken")
    if length != length_there or length > PACKET_BYTES_MAX:
        raise RingError(f"length {length} with a packet of {length_there} bytes")
    return state, locality, image[at + PAGE_HEADER_BYTES :]
