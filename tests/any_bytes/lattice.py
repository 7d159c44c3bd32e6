"""Requests as they should not be: every truncation, every length, count, number and boolean wrong.

`base_requests()` gives requests that look right for every declared ordinal (recorded ones, and one
made from the declaration); `altered()` gives the lattice around one of them.
"""

import itertools
import struct

from protocol.constants import AUTH_REQUEST_BYTES, HEADER_BYTES
from protocol.wire import DecodeError
from tests.any_bytes import recorder
from tests.any_bytes.furnished import key_handle, session_handle, transport_handle
from tests.any_bytes.wire_places import COUNT, HANDLE_PLACE, LENGTH, TRUTH, least, places
from tests.tpm12.witness import (
    COMMAND,
    frame,
    key_template,
    rsa_parms,
    sized,
    u16,
    u32,
)
from tpm12.commands import ALL
from tpm12.transport import TRANSPORT_ONLY

INPUT_BYTES_MAX = 4096
SIZES = (0, 1, INPUT_BYTES_MAX, INPUT_BYTES_MAX + 1, 1 << 31, (1 << 32) - 1)
"""What every length field is set to, where it is wide enough."""
TAGS = (0x00C0, 0x00C1, 0x00C2, 0x00C3, 0x00C4, 0x0000, 0xFFFF, 0xC100, 0x01C1)
RESERVED_HANDLES = (*range(0x40000000, 0x40000008), 0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_CONTINUES_AT = 24
"""Of continueAuthSession in an authorization block."""
_WIDTHS = {1: ">B", 2: ">H", 4: ">I", 8: ">Q"}

_TEMPLATE = key_template(0x10, parms=rsa_parms(512, 1, 2))
_TEMPLATE12 = key_template(0x10, parms=rsa_parms(512, 1, 2), key12=True)
_OPERANDS = {
    "TakeOwnership": u16(5) + sized(bytes(256)) + sized(bytes(256)) + key_template(0x11),
    "LoadKey": u32(0x40000000) + _TEMPLATE,
    "LoadKey2": u32(0x40000000) + _TEMPLATE,
    "CreateWrapKey": u32(0x40000000) + bytes(40) + _TEMPLATE,
    "MakeIdentity": bytes(40) + key_template(0x12, parms=rsa_parms(enc=1, sig=2)),
    "Unseal": u32(0x40000000) + b"\1\1\0\0" + sized(b"") + sized(bytes(256)),
    "CMK_CreateKey": u32(0x40000000) + bytes(20) + _TEMPLATE12 + bytes(40),
    "CMK_CreateBlob": (
        u32(0x40000000) + u16(4) + rsa_parms() + sized(bytes(256)) + u16(4) + bytes(40)
        + sized(u32(1) + bytes(20)) + sized(b"") * 3
    ),
    "CMK_ConvertMigration": (
        u32(0x40000000) + bytes(80) + _TEMPLATE12 + sized(u32(1) + bytes(20)) + sized(b"")
    ),
    "NV_DefineSpace": (
        u16(0x18) + u32(9) + (u16(3) + bytes(3) + b"\x1f" + bytes(20)) * 2
        + u16(0x17) + u32(2) + bytes(3) + u32(8) + bytes(20)
    ),
    "EstablishTransport": (
        u32(0x40000000) + u16(0x1E) + u32(0) + u32(0) + u16(0) + sized(bytes(20))
    ),
    "ExecuteTransport": sized(frame(0x15, u32(3))),
}  # fmt: skip
"""Operands of commands that get nowhere with the least that decodes."""


def made(command):
    """A request put together from the declaration alone."""
    count = max(command.sessions_by_count)
    operands = _OPERANDS.get(command.name)
    if operands is None:
        handles = u32(key_handle(0x10)) * command.handles_in
        operands = handles + least(command.takes)[len(handles) :]
    blocks = b"".join(_block(by, i) for i, by in enumerate(command.sessions[:count]))
    return frame(command.ordinal, operands + blocks, COMMAND + count)


def _block(by, position):
    if by.kinds is TRANSPORT_ONLY:
        handle = transport_handle(encrypts=0)
    elif 1 in by.kinds:
        handle = session_handle(1, second=bool(position))
    else:
        handle = session_handle(2, 2 if by.over == "owner" else 4)
    return u32(handle) + bytes(20) + b"\1" + bytes(20)


def base_requests(command):
    """Requests of a command that look right."""
    recorded = [r for name, r in recorder.load() if name.split(".")[0] == command.name]
    return [made(command), *recorded]


def altered(command, request):
    """Every alteration of a request: (what was altered, request)."""
    yield "nothing", request
    yield from _truncated(request)
    yield from _with_headers(request)
    try:
        found, end = places(command.takes, request, HEADER_BYTES)
    except DecodeError:
        return
    for place in found:
        yield from _at(place, request, end)
    yield from _with_blocks(request, end)


def _truncated(request):
    for size in range(len(request)):
        yield f"cut to {size}", request[:size]
        if size >= HEADER_BYTES:
            yield f"shortened to {size}", resized(request[:size])
    for more in (1, 45, INPUT_BYTES_MAX - len(request)):
        yield f"{more} more", resized(request + bytes(more))


def _with_headers(request):
    for tag in TAGS:
        yield f"tag {tag:#x}", u16(tag) + request[2:]
    true = len(request)
    for size in sorted({*SIZES, 9, 10, true - 1, true + 1}):
        yield f"paramSize {size}", request[:2] + u32(size) + request[6:]


def _at(place, request, end):
    true = int.from_bytes(request[place.at : place.at + place.width], "big")
    top = (1 << 8 * place.width) - 1
    wanted = {0, 1, true - 1, true + 1, top, top - 1, top // 2, top // 2 + 1}
    if place.kind == TRUTH:
        wanted = {2, 255}
    elif place.kind in {LENGTH, COUNT}:
        rest = end - place.at - place.width
        wanted |= {rest, rest + 1, 2 * true, INPUT_BYTES_MAX, INPUT_BYTES_MAX + 1, 0x7FFF, 0x8000}
    elif place.kind == HANDLE_PLACE:
        wanted |= set(RESERVED_HANDLES)
    for value in sorted(v for v in wanted if 0 <= v <= top and v != true):
        yield f"{place.name} = {value}", _with(request, place, value)
    if place.kind == LENGTH:
        yield from _really_so_long(place, request, true)


def _really_so_long(place, request, true):
    """As many bytes as the length says, in place of as many as there should be."""
    start = place.at + place.width
    room = INPUT_BYTES_MAX - len(request) + true
    for size in sorted({0, 1, true - 1, true + 1, true + 2, 2 * true, 255, 256, 257, room}):
        if 0 <= size <= room and size != true and size < 1 << 8 * place.width:
            payload = (request[start : place.end] + bytes(size))[:size]
            whole = request[:start] + payload + request[place.end :]
            for outer in (place, *place.around):
                length = outer.end - outer.at - outer.width + size - true
                if 0 <= length < 1 << 8 * outer.width:
                    whole = _with(whole, outer, length)
            yield f"{place.name} of {size} bytes", resized(whole)


def _with_blocks(request, end):
    for block in range(end, len(request) - AUTH_REQUEST_BYTES + 1, AUTH_REQUEST_BYTES):
        at = block + _CONTINUES_AT
        for value in (0, 2, 255):
            yield f"continue = {value}", request[:at] + bytes([value]) + request[at + 1 :]
        for handle in RESERVED_HANDLES:
            yield f"session {handle:#x}", request[:block] + u32(handle) + request[block + 4 :]
    for count in (0, 1, 2):
        blocks = b"".join(
            u32(session_handle(1, second=i)) + bytes(20) + b"\1" + bytes(20) for i in range(count)
        )
        body = request[HEADER_BYTES:end] + blocks
        yield f"{count} blocks", frame(int.from_bytes(request[6:10], "big"), body, COMMAND + count)


def _with(request, place, value):
    data = struct.pack(_WIDTHS[place.width], value)
    return request[: place.at] + data + request[place.at + place.width :]


def resized(request):
    """The request with a paramSize that is right."""
    return request[:2] + u32(len(request)) + request[6:]


DOOR_CUTS = 12
"""How many truncations of one request a door is tried with, besides those inside its header."""


def of_lengths(command, request):
    """Each truncation of a request, and each of its length fields at each of `SIZES`."""
    yield from (request[:size] for size in range(len(request)))
    yield from (request[:2] + u32(size) + request[6:] for size in SIZES)
    for place in places(command.takes, request, HEADER_BYTES)[0]:
        if place.kind == LENGTH:
            top = (1 << 8 * place.width) - 1
            yield from (_with(request, place, size) for size in SIZES if size <= top)


def at_a_door(chance):
    """The same for one request of every ordinal, with some of the truncations that say so."""
    for command in ALL:
        request = made(command)
        *cuts, last = range(HEADER_BYTES, max(len(request), HEADER_BYTES + 1))
        for size in (*range(HEADER_BYTES), *chance.sample(cuts, min(len(cuts), DOOR_CUTS)), last):
            yield request[:size]
            if size >= HEADER_BYTES:
                yield resized(request[:size])
        yield from itertools.islice(of_lengths(command, request), len(request), None)


COMMANDS = {command.name: command for command in ALL}


def everything(command):
    """The lattice around all base requests of a command, each request once."""
    seen = set()
    for what, request in itertools.chain.from_iterable(
        altered(command, base) for base in base_requests(command)
    ):
        if request not in seen:
            seen.add(request)
            yield what, request
