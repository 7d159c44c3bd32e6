"""What travels on tis.sock: one register access, one answer or one interrupt per message.

The socket keeps message borders (SOCK_SEQPACKET), so a message has no length of its own; its first
byte says what it is. The chip speaks first: `Hello`, or `Refused` and the end. Then

    driver to chip     Read                                    answered by Value
                       Write                                   posted, as on a bus: no answer
                       PowerOn, PowerOff, PhysicalPresence     the platform's pins: Done
    chip to driver     Interrupt                               at any time

Whatever the chip does not do is answered by `Refused`, also a Write. The driver cannot tell which
of several posted writes that was, so it ends the connection on it.

Leaves to others: the registers (`hwtpm/tis_registers.py`), who may do what
(`daemons/tis_server.py`).

Invariants:
- A message is at most `MESSAGE_BYTES_MAX` bytes and carries at most `ACCESS_BYTES_MAX` of data.
- Bytes that are no message raise `DecodeError`, and nothing else.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Annotated, Final, TypeAlias, cast

import construct as cs

from protocol.return_codes import ReturnCode
from protocol.wire import U8, U16, Bool, Checked, ConstU8, DecodeError, Mapped, decode, encode, wire

VERSION: Final = 1
LOCALITIES: Final = 5
PAGE_BYTES: Final = 0x1000
ACCESS_BYTES_MAX: Final = 255
"""Data bytes of one access; the chip's burstCount may be lower and is told in STS."""
TEXT_BYTES_MAX: Final = 400
"""A reason, as UTF-8."""
MESSAGE_BYTES_MAX: Final = 512
"""No message is longer; a receiver asks for one byte more to notice."""


class Kind(IntEnum):
    """The first byte of a message."""

    READ = 0x01
    WRITE = 0x02
    POWER_ON = 0x11
    POWER_OFF = 0x12
    PHYSICAL_PRESENCE = 0x13
    HELLO = 0x81
    VALUE = 0x82
    INTERRUPT = 0x83
    DONE = 0x84
    REFUSED = 0x85


class RefusedReason(IntEnum):
    """Why the chip did not do something; the numbers are part of the protocol."""

    UNKNOWN_PEER = 1
    """Nobody registered the peer; the connection ends."""
    PAGE_NOT_GRANTED = 2
    """The peer's domain has no right to that locality's page."""
    NOT_PLATFORM = 3
    """Only the platform's owner moves the chip's pins."""
    TOO_WIDE = 4
    """More bytes than burstCount."""
    MALFORMED = 5
    """No message of this protocol; the connection ends."""
    TOO_MANY_CONNECTIONS = 6
    """The connection ends."""
    CHIP_FAILED = 7
    """The chip cannot do it; the text says why."""


_REASONS: Final = frozenset(int(reason) for reason in RefusedReason)


def _is_text(data: bytes) -> bool:
    if len(data) > TEXT_BYTES_MAX:
        return False
    try:
        return data.decode().isprintable()
    except UnicodeDecodeError:
        return False


Page = Annotated[
    int,
    Checked(
        cs.Int8ub,
        lambda locality: locality < LOCALITIES,
        ReturnCode.BAD_LOCALITY,
        "a locality above 4",
    ),
]
Offset = Annotated[
    int,
    Checked(
        cs.Int16ub,
        lambda offset: offset < PAGE_BYTES,
        ReturnCode.BADINDEX,
        "an offset outside the page",
    ),
]
Count = Annotated[
    int,
    Checked(cs.Int8ub, lambda count: count > 0, ReturnCode.BAD_PARAM_SIZE, "a read of no bytes"),
]
AccessData = Annotated[
    bytes,
    Checked(
        cs.GreedyBytes,
        lambda data: 1 <= len(data) <= ACCESS_BYTES_MAX,
        ReturnCode.BAD_PARAM_SIZE,
        "an access of no bytes or of too many",
    ),
]
LocalitySet = Annotated[
    int,
    Checked(
        cs.Int8ub,
        lambda mask: mask < 1 << LOCALITIES,
        ReturnCode.BAD_LOCALITY,
        "a locality above 4",
    ),
]
Text = Annotated[
    str,
    Mapped(
        Checked(cs.GreedyBytes, _is_text, ReturnCode.BAD_PARAMETER, "a reason that is no text"),
        bytes.decode,
        str.encode,
    ),
]
Reason = Annotated[
    RefusedReason,
    Mapped(
        Checked(
            cs.Int8ub,
            _REASONS.__contains__,
            ReturnCode.BAD_PARAMETER,
            "an unknown reason",
        ),
        RefusedReason,
        int,
    ),
]


# -- from the driver -------------------------------------------------------------------------------


@wire
class Read:
    """Read `count` bytes at `offset` of a locality's page."""

    kind: ConstU8 = Kind.READ
    locality: Page
    offset: Offset
    count: Count


@wire
class Write:
    """Write bytes at `offset` of a locality's page."""

    kind: ConstU8 = Kind.WRITE
    locality: Page
    offset: Offset
    data: AccessData


@wire
class PowerOn:
    """The platform has power, or was reset: TPM_Init."""

    kind: ConstU8 = Kind.POWER_ON


@wire
class PowerOff:
    """The platform has no power any more."""

    kind: ConstU8 = Kind.POWER_OFF


@wire
class PhysicalPresence:
    """The physical-presence pin."""

    kind: ConstU8 = Kind.PHYSICAL_PRESENCE
    is_asserted: Bool


# -- from the chip ---------------------------------------------------------------------------------


@wire
class Hello:
    """What the peer may do here."""

    kind: ConstU8 = Kind.HELLO
    version: U16
    locality_mask: LocalitySet
    """Bit n: the page of locality n is granted."""
    is_platform: Bool

    @property
    def localities(self) -> frozenset[int]:
        """The granted localities."""
        return frozenset(n for n in range(LOCALITIES) if self.locality_mask >> n & 1)


@wire
class Value:
    """The bytes of the oldest unanswered Read."""

    kind: ConstU8 = Kind.VALUE
    data: AccessData


@wire
class Interrupt:
    """New bits of a locality's INT_STATUS."""

    kind: ConstU8 = Kind.INTERRUPT
    locality: Page
    status: U8
    vector: U8


@wire
class Done:
    """The answer to a pin of the platform."""

    kind: ConstU8 = Kind.DONE


@wire
class Refused:
    """Something was not done."""

    kind: ConstU8 = Kind.REFUSED
    reason: Reason
    text: Text


Request: TypeAlias = Read | Write | PowerOn | PowerOff | PhysicalPresence
Answer: TypeAlias = Hello | Value | Interrupt | Done | Refused

_REQUESTS: Final[dict[int, type]] = {
    Kind.READ: Read,
    Kind.WRITE: Write,
    Kind.POWER_ON: PowerOn,
    Kind.POWER_OFF: PowerOff,
    Kind.PHYSICAL_PRESENCE: PhysicalPresence,
}
_ANSWERS: Final[dict[int, type]] = {
    Kind.HELLO: Hello,
    Kind.VALUE: Value,
    Kind.INTERRUPT: Interrupt,
    Kind.DONE: Done,
    Kind.REFUSED: Refused,
}


def decode_request(data: bytes) -> Request:
    """Read a message from the driver.

    Raises:
        DecodeError: It is none, too long, or names what does not exist.
    """
    return cast("Request", _decode(_REQUESTS, data))


def decode_answer(data: bytes) -> Answer:
    """Read a message from the chip.

    Raises:
        DecodeError: As `decode_request`.
    """
    return cast("Answer", _decode(_ANSWERS, data))


def encode_message(message: Request | Answer) -> bytes:
    """Write a message.

    Raises:
        EncodeError: A field does not fit.
    """
    return encode(message)


def refused(reason: RefusedReason, text: str) -> Refused:
    """Make a refusal from any text: made printable and cut to what a message holds."""
    printable = "".join(c if c.isprintable() else "?" for c in text)
    cut = printable.encode("utf-8", "replace")[:TEXT_BYTES_MAX].decode("utf-8", "ignore")
    return Refused(reason=reason, text=cut)


def _decode(kinds: dict[int, type], data: bytes) -> object:
    if not data or len(data) > MESSAGE_BYTES_MAX:
        raise DecodeError(ReturnCode.BAD_PARAM_SIZE, f"a message of {len(data)} bytes")
    structure = kinds.get(data[0])
    if structure is None:
        raise DecodeError(ReturnCode.BAD_PARAMETER, f"no message has the kind 0x{data[0]:02x}")
    return decode(structure, data)
