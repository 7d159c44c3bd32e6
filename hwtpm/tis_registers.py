"""The TIS register map: offsets, masks and bit names, without any behaviour.

Source: TCG PC Client TPM Interface Specification (TIS) 1.2 rev 1.21 and TIS 1.3, register chapter.
Names are the specification's in snake_case; `tis_device.py` says what the registers do,
`tis_driver.py` how they are used.

The bits of a register are an IntEnum of masks and not an IntFlag: they are combined into plain
ints, and the | and & of IntFlag are Python code, which each access would pay for many times.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

LOCALITIES: Final = 5
"""Localities 0 to 4; each has a page of registers of its own."""
PAGE_BYTES: Final = 0x1000
BASE_ADDRESS: Final = 0xFED4_0000
"""Physical address of locality 0's page; locality n is n pages further up."""
REGISTER_BYTES: Final = 4
"""An access to a register carries at most one register; only FIFOs take more."""
NOT_DECODED: Final = 0xFF
"""What a bus returns for a byte that no device answers for."""

COMMAND_BYTES_MAX: Final = 4096
"""Size of the command and of the response buffer; the engine's TPM_CAP_PROP_INPUT_BUFFER."""
HEADER_BYTES: Final = 10
"""Tag, size of the whole packet, ordinal or return code."""
SIZE_KNOWN_BYTES: Final = 6
"""After so many bytes a packet has told how long it is: BE32 in its bytes 2 to 5."""

VENDOR_ID: Final = 0x1014
DEVICE_ID: Final = 0x0001
REVISION_ID: Final = 0x01


class Register(IntEnum):
    """Offset of each register in its locality's page; 32-bit aligned, little endian."""

    ACCESS = 0x000
    INT_ENABLE = 0x008
    INT_VECTOR = 0x00C
    INT_STATUS = 0x010
    INTF_CAPABILITY = 0x014
    STS = 0x018
    """Status byte at 0x18, burstCount in the two bytes behind it."""
    HASH_END = 0x020
    """Locality 4's page only, write only."""
    DATA_FIFO = 0x024
    """0x24 to 0x27 are the same port; in a hash sequence on locality 4's page it is HASH_DATA."""
    HASH_START = 0x028
    """Locality 4's page only, write only."""
    XDATA_FIFO = 0x080
    """0x80 to 0xBF: the same port again, for transfers of up to 64 bytes (TIS 1.3)."""
    DID_VID = 0xF00
    RID = 0xF04


DATA_FIFO_END: Final = 0x028
XDATA_FIFO_END: Final = 0x0C0
BURST_COUNT_SHIFT: Final = 8
"""burstCount is bits 8 to 23 of STS."""


class Access(IntEnum):
    """ACCESS_x, 8 bits. A write names exactly one of the writable bits."""

    TPM_REG_VALID_STS = 0x80
    """Read: the other bits can be trusted."""
    ACTIVE_LOCALITY = 0x20
    """Read: this locality is the active one. Write: relinquish, or withdraw the own request."""
    BEEN_SEIZED = 0x10
    """Read: a higher locality took the TPM away. Write: clear."""
    SEIZE = 0x08
    """Write: take the TPM from a lower locality. Reads 0."""
    PENDING_REQUEST = 0x04
    """Read: some other locality waits."""
    REQUEST_USE = 0x02
    """Write: ask for the TPM. Read: asked, and not granted yet."""
    TPM_ESTABLISHMENT = 0x01
    """Read, inverted: 0 once a dynamic launch has happened."""


class Status(IntEnum):
    """The status byte of STS_x."""

    STS_VALID = 0x80
    """Read: DATA_AVAIL and EXPECT can be trusted."""
    COMMAND_READY = 0x40
    """Read: ready for a command. Write: become ready; abort what runs; done with the response."""
    TPM_GO = 0x20
    """Write: execute the command in the FIFO."""
    DATA_AVAIL = 0x10
    """Read: the FIFO holds response bytes."""
    EXPECT = 0x08
    """Read: the command in the FIFO is not complete."""
    SELF_TEST_DONE = 0x04
    """TIS 1.3; reads 0 here, so that a ready status is the byte 0x40 that drivers compare with."""
    RESPONSE_RETRY = 0x02
    """Write: give the response again from its first byte."""


class IntEnable(IntEnum):
    """INT_ENABLE_x, 32 bits."""

    GLOBAL = 0x8000_0000
    COMMAND_READY = 0x80
    POLARITY_LOW_LEVEL = 0x08
    """Bits 4:3 = 01, the polarity every TPM must have. An interrupt here is a message, so the
    polarity is fixed."""
    LOCALITY_CHANGE = 0x04
    STS_VALID = 0x02
    DATA_AVAIL = 0x01


class IntStatus(IntEnum):
    """INT_STATUS_x: what happened; a written 1 clears the bit and ends the interrupt."""

    COMMAND_READY = 0x80
    LOCALITY_CHANGE = 0x04
    STS_VALID = 0x02
    DATA_AVAIL = 0x01


INT_EVENTS: Final = 0x87
"""All bits of `IntStatus`; the same bits in INT_ENABLE let the events through."""
INT_VECTOR_MASK: Final = 0x0F
"""The SIRQ channel is four bits."""


class Capability(IntEnum):
    """INTF_CAPABILITY_x, 32 bits, read only."""

    DATA_AVAIL_INT = 0x0000_0001
    STS_VALID_INT = 0x0000_0002
    LOCALITY_CHANGE_INT = 0x0000_0004
    LEVEL_HIGH = 0x0000_0008
    LEVEL_LOW = 0x0000_0010
    EDGE_RISING = 0x0000_0020
    EDGE_FALLING = 0x0000_0040
    COMMAND_READY_INT = 0x0000_0080
    BURST_COUNT_STATIC = 0x0000_0100
    TRANSFER_64_BYTES = 0x0000_0600
    """Bits 10:9 = 11: XDATA_FIFO takes up to 64 bytes a transfer."""
    INTERFACE_1_3 = 0x2000_0000
    """Bits 30:28 = 010: TIS 1.3."""
