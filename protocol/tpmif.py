"""The ring between a TPM frontend and its backend, as bytes in and events out.

Three layers, so that the same machine works over a socket and over granted pages:

- the page: the 8-byte tpmif header, the packet, and who may set which state (`tpmif_page`);
- the handshake: what each side publishes and the xenbus states it walks (`xenbus`);
- the ring, here: `FrontendRing` and `BackendRing` join both with sequence numbers. On a socket each
  message is a prefix (kind, sequence) before a page image or a text of keys. On granted pages the
  prefix is absent and each side counts for itself.

Invariants:
- One request is in flight; each accepted request gets exactly one FINISH or IDLE.
- Sequence numbers go up by one. The one that was executed last may come again and is a `Repeat`.
  A backend that crashed may remember less than it has answered, but no less than what changed
  anything: a request it does not remember is executed again, under the next number it expects.
- An answer that changed something says so by its prefix (`Kind.KEPT`) to a frontend that has
  `feature-kept`. A backend that comes back
  under the same name and remembers less than that was given older contents of its memory.
- Whatever a peer sends is an event or a `DecodeError`; after one the connection is to be closed.
- The locality byte is passed on as it came: what a peer may ask for is the backend's policy.

Where tpmif leaves a choice: a page image on a socket ends with its packet; CANCEL and IDLE images
carry no packet. A frontend can write CANCEL just before it sees FINISH. The backend then
acknowledges with IDLE, as on a shared page, and the frontend drops that one late IDLE.

Spec: Xen `io/tpmif.h`, protocol v2.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final, NamedTuple
from uuid import UUID

from protocol import xenbus
from protocol.tpmif_page import (
    PACKET_BYTES_MAX,
    PAGE_BYTES,
    PAGE_TRANSITIONS,
    PageState,
    RingError,
    RingMisuseError,
    page_image,
    read_page,
)
from protocol.wire import U8, U64LE, wire
from protocol.xenbus import Side, XenbusState

PREFIX_BYTES: Final = 9
MESSAGE_BYTES_MAX: Final = PREFIX_BYTES + PAGE_BYTES
SEQUENCE_MAX: Final = 2**63 - 1
RING_ID_CHARS_MAX: Final = 128

FEATURE_PROTOCOL_V2: Final = "feature-protocol-v2"
FEATURE_RESUME: Final = "feature-resume"
FEATURE_KEPT: Final = "feature-kept"
"""A frontend that has it is told which responses are remembered over a crash (`Kind.KEPT`)."""
HANDLE: Final = "handle"
UUID_KEY: Final = "uuid"
RING: Final = "ring"
MEMORY: Final = "memory"
LAST_SEQUENCE: Final = "last-sequence"


# Enumeration members cost more to look up than the rest of a kick: plain numbers for the hot path.
_KICK: Final = 2
_KEPT: Final = 3
_ANSWERS: Final = (_KICK, _KEPT)
_SUBMIT: Final = int(PageState.SUBMIT)
_FINISH: Final = int(PageState.FINISH)
_FRONTEND_MAY_SET: Final[Mapping[int, frozenset[int]]] = {
    int(state): frozenset(map(int, may_set))
    for state, may_set in PAGE_TRANSITIONS[Side.FRONTEND].items()
}
_BACKEND_MAY_SET: Final[Mapping[int, frozenset[int]]] = {
    int(state): frozenset(map(int, may_set))
    for state, may_set in PAGE_TRANSITIONS[Side.BACKEND].items()
}


# -- messages on a socket --------------------------------------------------------------------------


class Kind(IntEnum):
    """What follows the prefix."""

    XENBUS = 1
    KICK = _KICK
    KEPT = _KEPT
    """A page image with a response that the backend remembers also when it is killed."""


@wire
class Prefix:
    """What precedes keys or a page image on a socket."""

    kind: U8
    sequence: U64LE


_PREFIX: Final = struct.Struct("<BQ")
"""`Prefix` for the hot path; a test holds the two equal."""


_MESSAGE: Final = struct.Struct("<BQIBBBB")
"""`Prefix` and `PageHeader` of a kick in one, for commands and answers; a test holds it equal."""
_MESSAGE_BYTES: Final = 17
_event: Final = tuple.__new__
"""Makes an event of a command's way in half the time that its class takes."""
_FREE: Final = (int(PageState.IDLE), int(PageState.FINISH))
"""States in which a page takes a new request."""


def kick(sequence: int, image: bytes, kind: int = _KICK) -> bytes:
    """Write the message that carries a page image."""
    return _PREFIX.pack(kind, sequence) + image


def publication(state: XenbusState, keys: Mapping[str, str]) -> bytes:
    """Write the message that carries a side's state and keys."""
    return _PREFIX.pack(Kind.XENBUS, 0) + xenbus.encode_keys(state, keys)


def _read_prefix(message: bytes) -> tuple[int, int]:
    if not PREFIX_BYTES <= len(message) <= MESSAGE_BYTES_MAX:
        raise RingError(f"a message of {len(message)} bytes")
    return _PREFIX.unpack_from(message)


def _number(keys: Mapping[str, str], name: str, maximum: int) -> int:
    """Read a decimal key within limits, in its only spelling."""
    text = keys.get(name, "")
    if len(text) <= 20 and text.isdecimal() and text.isascii():
        number = int(text)
        if number <= maximum and str(number) == text:
            return number
    raise RingError(f"key {name} is {text[:24]!r}, not a number up to {maximum}")


def _check_protocol(keys: Mapping[str, str]) -> None:
    if keys.get(FEATURE_PROTOCOL_V2) != "1":
        raise RingError(f"{FEATURE_PROTOCOL_V2} is not 1: protocol 2 is required")
    if keys.get(FEATURE_RESUME) != "1":
        raise RingError(f"{FEATURE_RESUME} is not 1: repeats could not be told from new requests")


# -- events ----------------------------------------------------------------------------------------


class FrontendReady(NamedTuple):
    """To the backend: the frontend has published its keys. Answer with `connect` or `refuse`."""

    handle: int


@dataclass(frozen=True, slots=True)
class Attached:
    """To the backend: both sides are Connected."""


class Submitted(NamedTuple):
    """To the backend: a new request. Answer with `finish` or `idle`."""

    sequence: int
    locality: int
    packet: bytes


class Repeat(NamedTuple):
    """To the backend: the request that was answered last, again. Answer with what was stored."""

    sequence: int
    locality: int
    packet: bytes


class CancelAsked(NamedTuple):
    """To the backend: the frontend gives up on a request.

    Attributes:
        is_late: The request was answered before; `idle` is the acknowledgement. Otherwise `idle`
            says that it was cancelled and `finish` that it was not.
    """

    sequence: int
    is_late: bool


class PeerClosing(NamedTuple):
    """The other side is going away."""

    reason: str


class PeerClosed(NamedTuple):
    """The other side has let go of the ring. For a frontend: refused, if nothing was connected."""

    reason: str


@dataclass(frozen=True, slots=True)
class BackendWaiting:
    """To the frontend: the backend is there. Answer with `publish`."""


class Fate(Enum):
    """What became of the request that was outstanding when the connection broke."""

    NONE = "nothing was outstanding"
    NOT_EXECUTED = "it has not been executed; resubmit or abandon it"
    EXECUTED = "it has been executed; resubmit it to get its response"
    UNKNOWN = "the backend cannot tell: it has lost its memory, or this ring is out of step"
    ROLLED_BACK = "it remembers less than it had answered: it was given older contents, or none"


class BackendConnected(NamedTuple):
    """To the frontend: the backend has taken the ring. Answer with `connected`."""

    handle: int
    uuid: UUID
    ring_id: str
    last_sequence: int
    fate: Fate


class Finished(NamedTuple):
    """To the frontend: the response."""

    sequence: int
    packet: bytes


class Cancelled(NamedTuple):
    """To the frontend: the request was cancelled (or dropped by the backend) and not executed."""

    sequence: int


BackendEvent = (
    FrontendReady | Attached | Submitted | Repeat | CancelAsked | PeerClosing | PeerClosed
)
FrontendEvent = BackendWaiting | BackendConnected | Finished | Cancelled | PeerClosing | PeerClosed


# -- the backend's side ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendKeys:
    """What a backend publishes for one device.

    Attributes:
        handle: The device's number in its domain.
        uuid: Of the vTPM, from the backend's own registry.
        ring_id: The same for every connection of this device of this domain; printable ASCII.
        memory: Names what the backend remembers of answered requests. A backend that has lost it
            (and cannot tell what was executed) has another name.
    """

    handle: int
    uuid: UUID
    ring_id: str
    memory: str


class BackendRing:
    """One connection, seen by the backend.

    Call `open` first, then give every message to `receive`. Methods that return bytes return the
    message to send.
    """

    __slots__ = (
        "_backend_state",
        "_cancelled",
        "_frontend_state",
        "_page",
        "_sequence",
        "_tells_kept",
        "is_attached",
    )

    def __init__(self) -> None:
        self._frontend_state = XenbusState.INITIALISING
        self._backend_state = XenbusState.INITIALISING
        self.is_attached = False
        """Whether both sides are Connected."""
        self._page: int = PageState.IDLE
        self._sequence = 0  # of the request on the page; answered unless the page says otherwise
        self._cancelled = 0  # the last sequence that CANCEL came for
        self._tells_kept = False  # the frontend knows a response that is kept from one that is not

    @property
    def is_busy(self) -> bool:
        """Whether a request waits for its answer."""
        return self._page in {PageState.SUBMIT, PageState.CANCEL}

    def open(self) -> bytes:
        """Say that the backend is there and waits (InitWait)."""
        return self._publish(XenbusState.INIT_WAIT, {FEATURE_PROTOCOL_V2: "1", FEATURE_RESUME: "1"})

    def connect(self, keys: BackendKeys, last_sequence: int) -> bytes:
        """Take the frontend (Connected). The page is as new.

        Args:
            keys: What the backend's registry says about this device.
            last_sequence: Of the request answered last on this ring; 0: none.
        """
        if not 0 <= last_sequence <= SEQUENCE_MAX or len(keys.ring_id) > RING_ID_CHARS_MAX:
            raise RingMisuseError(f"sequence {last_sequence}, ring id {keys.ring_id!r}")
        if self._frontend_state not in {XenbusState.INITIALISED, XenbusState.CONNECTED}:
            raise RingMisuseError("the frontend is not ready")
        self._page, self._sequence, self._cancelled = PageState.IDLE, last_sequence, 0
        return self._publish(
            XenbusState.CONNECTED,
            {
                FEATURE_PROTOCOL_V2: "1",
                FEATURE_RESUME: "1",
                HANDLE: str(keys.handle),
                UUID_KEY: str(keys.uuid),
                RING: keys.ring_id,
                MEMORY: keys.memory,
                LAST_SEQUENCE: str(last_sequence),
            },
        )

    def refuse(self, reason: str) -> bytes:
        """Say why there will be no connection (Closed)."""
        return self._publish(XenbusState.CLOSED, {xenbus.ERROR: reason[: xenbus.TEXT_CHARS_MAX]})

    def closing(self, reason: str = "") -> bytes:
        """Say that the backend is going away, or agree that the frontend does (Closing)."""
        keys = {xenbus.ERROR: reason[: xenbus.TEXT_CHARS_MAX]} if reason else {}
        return self._publish(XenbusState.CLOSING, keys)

    def wait_again(self) -> bytes:
        """Say that the frontend was let go and may come again (InitWait)."""
        self._page = PageState.IDLE
        return self.open()

    def _publish(self, state: XenbusState, keys: Mapping[str, str]) -> bytes:
        if state not in xenbus.TRANSITIONS[Side.BACKEND][self._backend_state]:
            raise RingMisuseError(f"backend from {self._backend_state.name} to {state.name}")
        self._backend_state = state
        self.is_attached = state is self._frontend_state is XenbusState.CONNECTED
        return publication(state, keys)

    def receive(self, message: bytes) -> BackendEvent | None:
        """Take one message of the frontend; None when there is nothing to do about it.

        Raises:
            DecodeError: The frontend broke the protocol.
        """
        # The usual case, in one look at the message: a new request on a free page.
        if len(message) >= _MESSAGE_BYTES and self.is_attached and self._page in _FREE:
            kind, sequence, length, state, locality, pad, pages = _MESSAGE.unpack_from(message)
            if (
                state == _SUBMIT
                and kind == _KICK
                and sequence == self._sequence + 1
                and length == len(message) - _MESSAGE_BYTES <= PACKET_BYTES_MAX
                and not (pad or pages)
            ):
                self._page, self._sequence = _SUBMIT, sequence
                return _event(Submitted, (sequence, locality, message[_MESSAGE_BYTES:]))
        kind, sequence = _read_prefix(message)
        if kind == _KICK:
            return self._kicked(sequence, message)
        if kind == Kind.XENBUS and sequence == 0:
            return self._published(message[PREFIX_BYTES:])
        raise RingError(f"a message of kind {kind}, sequence {sequence}")

    def _kicked(self, sequence: int, message: bytes) -> BackendEvent:
        state, locality, packet = read_page(message, PREFIX_BYTES)
        if not self.is_attached:
            raise RingError("a kick before both sides were connected")
        if state not in _FRONTEND_MAY_SET[self._page]:
            raise RingError(f"frontend set state {state} on a page of state {self._page}")
        if state == _SUBMIT:
            if sequence == self._sequence + 1:
                self._page, self._sequence = state, sequence
                return Submitted(sequence, locality, packet)
            if sequence == self._sequence and sequence:
                self._page = state
                return Repeat(sequence, locality, packet)
            raise RingError(f"sequence {sequence} after {self._sequence}")
        return self._cancel_asked(sequence, packet)

    def _cancel_asked(self, sequence: int, packet: bytes) -> CancelAsked:
        if packet or sequence != self._sequence or sequence == self._cancelled or not sequence:
            raise RingError(f"CANCEL of {sequence} after {self._sequence}, {len(packet)} bytes")
        is_late = not self.is_busy
        self._page, self._cancelled = PageState.CANCEL, sequence
        return CancelAsked(sequence, is_late)

    def _published(self, body: bytes) -> BackendEvent | None:
        state, keys = xenbus.decode_keys(body)
        xenbus.check_transition(Side.FRONTEND, self._frontend_state, state)
        was_ready = self._frontend_state is XenbusState.INITIALISED
        self._frontend_state = state
        self.is_attached = state is self._backend_state is XenbusState.CONNECTED
        reason = keys.get(xenbus.ERROR, "")
        if state is XenbusState.CLOSING:
            return PeerClosing(reason)
        if state is XenbusState.CLOSED:
            return PeerClosed(reason)
        if state is XenbusState.INITIALISING:
            return None
        if self._backend_state is XenbusState.CONNECTED and was_ready:
            return Attached()
        if self._backend_state is not XenbusState.INIT_WAIT or was_ready:
            raise RingError(
                f"frontend {state.name} while the backend is {self._backend_state.name}"
            )
        _check_protocol(keys)
        self._tells_kept = keys.get(FEATURE_KEPT) == "1"
        return FrontendReady(_number(keys, HANDLE, 0xFFFF))

    def finish(self, response: bytes, *, is_kept: bool = False) -> bytes:
        """Answer the request on the page (FINISH).

        Args:
            response: Up to 4088 bytes.
            is_kept: It is remembered also when this process is killed.
        """
        kind = _KEPT if is_kept and self._tells_kept else _KICK
        if self._page == _SUBMIT and len(response) <= PACKET_BYTES_MAX:
            self._page = _FINISH
            return _MESSAGE.pack(kind, self._sequence, len(response), _FINISH, 0, 0, 0) + response
        return self._answer(PageState.FINISH, response, kind)

    def idle(self) -> bytes:
        """Say that the request was cancelled, or acknowledge a late CANCEL (IDLE)."""
        return self._answer(PageState.IDLE, b"")

    def _answer(self, state: PageState, packet: bytes, kind: int = _KICK) -> bytes:
        if state not in _BACKEND_MAY_SET[self._page]:
            raise RingMisuseError(f"backend sets {state.name} on a page of state {self._page}")
        message = kick(self._sequence, page_image(state, 0, packet), kind)
        self._page = state
        return message


# -- the frontend's side ---------------------------------------------------------------------------


class Request(NamedTuple):
    """A request that has no answer yet."""

    sequence: int
    locality: int
    packet: bytes


class FrontendRing:
    """A device, seen by the frontend; outlives its connections.

    Call `reconnect` for every further connection: what is outstanding and the count stay.

    Args:
        handle: The device's number in this domain.
        may_forget: A backend that was started anew, with another memory, is as good.
    """

    __slots__ = (
        "_backend_state",
        "_cancelled",
        "_frontend_state",
        "_handle",
        "_kept",
        "_may_forget",
        "_memory",
        "_page",
        "_sequence",
        "is_attached",
        "outstanding",
    )

    def __init__(self, handle: int, *, may_forget: bool = True) -> None:
        self._handle = handle
        self._may_forget = may_forget
        self._kept = 0
        """The last request whose response the backend must remember."""
        self._memory: str | None = None
        """Of the backend of the last connection."""
        self._sequence = 0  # of the last request submitted or, after connecting, answered
        self.outstanding: Request | None = None
        self.reconnect()

    @property
    def memory(self) -> str:
        """What the backend of the last connection calls its memory; empty before there was one."""
        return self._memory or ""

    @property
    def sequence(self) -> int:
        """The number of the request that was submitted last or, after connecting, answered."""
        return self._sequence

    def reconnect(self) -> None:
        """Start the handshake of another connection with a page as new."""
        self._frontend_state = XenbusState.INITIALISING
        self._backend_state = XenbusState.INITIALISING
        self.is_attached = False
        """Whether both sides are Connected."""
        self._page: int = PageState.IDLE
        self._cancelled = 0

    def publish(self) -> bytes:
        """Say which device this is (Initialised)."""
        return self._publish(
            XenbusState.INITIALISED,
            {
                FEATURE_PROTOCOL_V2: "1",
                FEATURE_RESUME: "1",
                FEATURE_KEPT: "1",
                HANDLE: str(self._handle),
            },
        )

    def connected(self) -> bytes:
        """Agree to the backend's keys (Connected)."""
        return self._publish(XenbusState.CONNECTED, {})

    def closing(self) -> bytes:
        """Say that this frontend is going away (Closing)."""
        return self._publish(XenbusState.CLOSING, {})

    def closed(self) -> bytes:
        """Let go of the ring (Closed)."""
        return self._publish(XenbusState.CLOSED, {})

    def _publish(self, state: XenbusState, keys: Mapping[str, str]) -> bytes:
        if state not in xenbus.TRANSITIONS[Side.FRONTEND][self._frontend_state]:
            raise RingMisuseError(f"frontend from {self._frontend_state.name} to {state.name}")
        self._frontend_state = state
        self.is_attached = state is self._backend_state is XenbusState.CONNECTED
        return publication(state, keys)

    def submit(self, packet: bytes, locality: int = 0) -> bytes:
        """Put a new request on the page (SUBMIT).

        Raises:
            RingError: The backend said that no number is left; nobody gets there by counting.
        """
        if self.outstanding is not None:
            raise RingMisuseError("a request is outstanding")
        if self._sequence >= SEQUENCE_MAX:
            raise RingError("it says that all sequence numbers are used up")
        if not self.is_attached or self._page not in _FREE or len(packet) > PACKET_BYTES_MAX:
            self._set_page(PageState.SUBMIT, locality, packet)  # says what is wrong
        sequence = self._sequence + 1
        head = _MESSAGE.pack(_KICK, sequence, len(packet), _SUBMIT, locality, 0, 0)
        self._page, self._sequence = _SUBMIT, sequence
        self.outstanding = _event(Request, (sequence, locality, packet))
        return head + packet

    def resubmit(self) -> bytes:
        """Put the outstanding request on the page of a new connection, under its own number.

        Its number is the one it had, or the one the backend expects next when it knows nothing of
        it.
        """
        if self.outstanding is None:
            raise RingMisuseError("nothing is outstanding")
        sequence, locality, packet = self.outstanding
        self._sequence = sequence
        return kick(sequence, self._set_page(PageState.SUBMIT, locality, packet))

    def restore(self, memory: str, request: Request) -> None:
        """Take over a request that an earlier process of this domain has sent.

        Connect then: `BackendConnected` says what became of it.

        Args:
            memory: Of the backend it was sent to.
            request: With the number under which it was sent last.
        """
        if self.outstanding is not None or self.is_attached:
            raise RingMisuseError("a request is outstanding, or the ring is connected")
        self._memory, self._sequence, self.outstanding = memory, request.sequence, request

    def abandon(self) -> None:
        """Forget the outstanding request, after `BackendConnected` said what became of it."""
        if self.outstanding is None or self._page in {PageState.SUBMIT, PageState.CANCEL}:
            raise RingMisuseError("nothing can be abandoned")
        self.outstanding = None

    def cancel(self) -> bytes | None:
        """Give up on the request on the page (CANCEL); None when it is answered or cancelled."""
        if self._page != PageState.SUBMIT or not self.is_attached:
            return None
        image = self._set_page(PageState.CANCEL, 0, b"")
        self._cancelled = self._sequence
        return kick(self._sequence, image)

    def _set_page(self, state: PageState, locality: int, packet: bytes) -> bytes:
        if not self.is_attached:
            raise RingMisuseError("not connected")
        if state not in _FRONTEND_MAY_SET[self._page]:
            raise RingMisuseError(f"frontend sets {state.name} on a page of state {self._page}")
        image = page_image(state, locality, packet)
        self._page = state
        return image

    def receive(self, message: bytes) -> FrontendEvent | None:
        """Take one message of the backend; None when there is nothing to do about it.

        Raises:
            DecodeError: The backend broke the protocol.
        """
        # The usual case, in one look at the message: the answer to what is outstanding.
        if len(message) >= _MESSAGE_BYTES and self.is_attached and self._page == _SUBMIT:
            kind, sequence, length, state, _, pad, pages = _MESSAGE.unpack_from(message)
            if (
                state == _FINISH
                and kind in _ANSWERS
                and sequence == self._sequence
                and length == len(message) - _MESSAGE_BYTES <= PACKET_BYTES_MAX
                and not (pad or pages)
            ):
                self._page, self.outstanding = _FINISH, None
                if kind == _KEPT:
                    self._kept = sequence
                return _event(Finished, (sequence, message[_MESSAGE_BYTES:]))
        kind, sequence = _read_prefix(message)
        if kind == _KICK:
            return self._kicked(sequence, message)
        if kind == _KEPT:
            event = self._kicked(sequence, message)
            if type(event) is Finished:
                self._kept = sequence
            return event
        if kind == Kind.XENBUS and sequence == 0:
            return self._published(message[PREFIX_BYTES:])
        raise RingError(f"a message of kind {kind}, sequence {sequence}")

    def _kicked(self, sequence: int, message: bytes) -> FrontendEvent | None:
        state, _, packet = read_page(message, PREFIX_BYTES)
        if self._backend_state is not XenbusState.CONNECTED:
            raise RingError("a kick before both sides were connected")
        if state == PageState.IDLE and packet:
            raise RingError(f"an IDLE page with a packet of {len(packet)} bytes")
        if self.outstanding is None or sequence != self.outstanding.sequence:
            self._drop_late(sequence, state)
            return None
        if state not in _BACKEND_MAY_SET[self._page]:
            raise RingError(f"backend set state {state} on a page of state {self._page}")
        self._page, self.outstanding = state, None
        return Finished(sequence, packet) if state == _FINISH else Cancelled(sequence)

    def _drop_late(self, sequence: int, state: int) -> None:
        """Drop the one acknowledgement of a CANCEL that crossed its answer."""
        if state != PageState.IDLE or sequence != self._cancelled or not sequence:
            raise RingError(f"an answer to {sequence}, state {state}, that nobody waits for")
        self._cancelled = 0

    def _published(self, body: bytes) -> FrontendEvent | None:
        state, keys = xenbus.decode_keys(body)
        xenbus.check_transition(Side.BACKEND, self._backend_state, state)
        self._backend_state = state
        self.is_attached = state is self._frontend_state is XenbusState.CONNECTED
        reason = keys.get(xenbus.ERROR, "")
        if state is XenbusState.CLOSING:
            return PeerClosing(reason)
        if state is XenbusState.CLOSED:
            return PeerClosed(reason)
        _check_protocol(keys)
        if state is XenbusState.INIT_WAIT:
            return self._backend_waits()
        if self._frontend_state not in {XenbusState.INITIALISED, XenbusState.CONNECTED}:
            raise RingError("the backend connected before this frontend was ready")
        return self._backend_connected(keys)

    def _backend_waits(self) -> BackendWaiting | None:
        if self._frontend_state is XenbusState.INITIALISING:
            return BackendWaiting()
        if self._frontend_state in {XenbusState.CLOSING, XenbusState.CLOSED}:
            return None  # it only says that the backend has let go
        raise RingError(f"backend INIT_WAIT while the frontend is {self._frontend_state.name}")

    def _backend_connected(self, keys: Mapping[str, str]) -> BackendConnected:
        last_sequence = _number(keys, LAST_SEQUENCE, SEQUENCE_MAX)
        memory, ring_id = keys.get(MEMORY, ""), keys.get(RING, "")
        if not memory or not 0 < len(ring_id) <= RING_ID_CHARS_MAX:
            raise RingError("the backend does not say what it remembers of which ring")
        try:
            uuid = UUID(keys.get(UUID_KEY, ""))
        except ValueError as error:
            raise RingError("the backend's uuid is malformed") from error
        handle = _number(keys, HANDLE, 0xFFFF)
        fate = self._fate(memory, last_sequence)
        if fate is Fate.ROLLED_BACK:  # and all stays as it was, so the next connection says it too
            return BackendConnected(handle, uuid, ring_id, last_sequence, fate)
        if fate is Fate.NOT_EXECUTED and self.outstanding is not None:
            self.outstanding = self.outstanding._replace(sequence=last_sequence + 1)
        if memory != self._memory:
            self._kept = 0
        self._memory = memory
        self._sequence = last_sequence
        return BackendConnected(handle, uuid, ring_id, last_sequence, fate)

    def _fate(self, memory: str, last_sequence: int) -> Fate:
        if self._kept and (
            last_sequence < self._kept if memory == self._memory else not self._may_forget
        ):
            return Fate.ROLLED_BACK
        if self.outstanding is None:
            return Fate.NONE
        if memory == self._memory and last_sequence == self.outstanding.sequence:
            return Fate.EXECUTED
        if memory == self._memory and last_sequence < self.outstanding.sequence:
            return Fate.NOT_EXECUTED
        return Fate.UNKNOWN
