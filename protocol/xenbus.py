"""How two ends of a device find each other: xenbus states, and the keys each side publishes.

In Xen both live in xenstore; here each side sends its own as one small text, `NAME=TEXT` lines with
the state among them. What the keys of a vTPM mean is in `tpmif`.

- Each side only ever sets its own state, and only along `TRANSITIONS`.
- Unknown keys are ignored, as in xenstore; malformed ones are refused.

Spec: Xen `io/xenbus.h` (states); the walk of the vTPM drivers as tabled in `TRANSITIONS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Final

from protocol.return_codes import ReturnCode
from protocol.wire import DecodeError

KEYS_BYTES_MAX: Final = 1024
KEYS_MAX: Final = 16
TEXT_CHARS_MAX: Final = 256
_NAME_CHARS: Final = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")

STATE: Final = "state"
ERROR: Final = "error"
"""Why a side closes, for people."""


class Side(Enum):
    """The two ends of a device."""

    FRONTEND = "frontend"
    BACKEND = "backend"


class XenbusState(IntEnum):
    """enum xenbus_state; the reconfiguring states are not used by vTPM drivers."""

    INITIALISING = 1
    INIT_WAIT = 2
    INITIALISED = 3
    CONNECTED = 4
    CLOSING = 5
    CLOSED = 6


_S = XenbusState

TRANSITIONS: Final[Mapping[Side, Mapping[XenbusState, frozenset[XenbusState]]]] = {
    Side.FRONTEND: {
        # Linux publishes Initialised and waits; mini-os goes to Connected at once.
        _S.INITIALISING: frozenset({_S.INITIALISED, _S.CONNECTED, _S.CLOSING, _S.CLOSED}),
        _S.INITIALISED: frozenset({_S.CONNECTED, _S.CLOSING, _S.CLOSED}),
        _S.CONNECTED: frozenset({_S.CLOSING, _S.CLOSED}),
        _S.CLOSING: frozenset({_S.CLOSED}),
        # Back to the start, so that whoever boots next can connect.
        _S.CLOSED: frozenset({_S.INITIALISING}),
        _S.INIT_WAIT: frozenset(),
    },
    Side.BACKEND: {
        _S.INITIALISING: frozenset({_S.INIT_WAIT, _S.CLOSING, _S.CLOSED}),
        _S.INIT_WAIT: frozenset({_S.CONNECTED, _S.CLOSING, _S.CLOSED}),
        # InitWait: the frontend has closed, the device and its TPM are kept for the next one.
        _S.CONNECTED: frozenset({_S.CLOSING, _S.CLOSED, _S.INIT_WAIT}),
        _S.CLOSING: frozenset({_S.CLOSED, _S.INIT_WAIT}),
        _S.CLOSED: frozenset({_S.INIT_WAIT}),
        _S.INITIALISED: frozenset(),
    },
}
"""Side -> the state it is in -> the states it may set next."""


def check_transition(side: Side, current: XenbusState, new: XenbusState) -> None:
    """Check one step of a side.

    Raises:
        DecodeError: BAD_PARAMETER: the step is not in `TRANSITIONS`.
    """
    if new not in TRANSITIONS[side][current]:
        raise DecodeError(
            ReturnCode.BAD_PARAMETER, f"{side.value} went from {current.name} to {new.name}"
        )


def encode_keys(state: XenbusState, keys: Mapping[str, str]) -> bytes:
    """Write what a side publishes. Characters that are not printable ASCII become `?`."""
    lines = [f"{STATE}={state.value}"]
    for name, text in keys.items():
        lines.append(f"{name}={_printable(text)}")
    return "\n".join(lines).encode("ascii")


def decode_keys(body: bytes) -> tuple[XenbusState, dict[str, str]]:
    """Read what the other side publishes.

    Raises:
        DecodeError: Too long, not printable ASCII, a malformed or repeated key, or no known state.
    """
    if len(body) > KEYS_BYTES_MAX:
        raise _malformed(f"{len(body)} bytes of keys, more than {KEYS_BYTES_MAX}")
    keys: dict[str, str] = {}
    for line in body.split(b"\n", KEYS_MAX):
        name, separator, text = line.decode("latin-1").partition("=")
        if not separator or not name or not _NAME_CHARS.issuperset(name) or name in keys:
            raise _malformed("a malformed or repeated key")
        if len(text) > TEXT_CHARS_MAX or text != _printable(text):
            raise _malformed(f"the text of key {name} is too long or not printable ASCII")
        keys[name] = text
    state = keys.pop(STATE, "")
    if state not in _STATES:
        raise _malformed(f"no known state: {state[:8]!r}")
    return _STATES[state], keys


_STATES: Final = {str(state.value): state for state in XenbusState}


def _printable(text: str) -> str:
    return "".join(c if " " <= c <= "~" else "?" for c in text[: TEXT_CHARS_MAX + 1])


def _malformed(reason: str) -> DecodeError:
    return DecodeError(ReturnCode.BAD_PARAMETER, f"xenbus keys: {reason}")
