"""What of a response must agree between two TPMs, and what is random or the maker's own.

`LAYOUTS` says for each ordinal what its successful response consists of, part by part. What no part
covers is compared byte for byte, so a new command is compared in full until somebody says
otherwise. A hidden part keeps its length, unless its name says that the length is free too.
"""

from collections.abc import Callable

from tests.tpm12.witness import number

AUTH_BLOCK_BYTES = 41
_HEADER_BYTES = 10
_GET_CAPABILITY = 0x65

Part = Callable[[bytes], tuple[str, bytes]]
"""Takes itself off the front of the data: what to compare, and the rest."""


def hidden(count: int) -> Part:
    return lambda data: (f"<{min(count, len(data))}>", data[count:])


def hidden_freely(_data):
    """All that is left, whatever its length."""
    return "<>", b""


def shown(count: int) -> Part:
    return lambda data: (data[:count].hex(), data[count:])


def sized(data):
    end = 4 + number(data[:4])
    return f"<sized {end - 4}>", data[end:]


def sized_shown(data):
    end = 4 + number(data[:4])
    return data[:end].hex(), data[end:]


def sized_freely(data):
    return "<sized>", data[4 + number(data[:4]) :]


def together(*parts: Part) -> Part:
    def take(data):
        texts = []
        for part in parts:
            text, data = part(data)
            texts.append(text)
        return " ".join(texts), data

    return take


def parms(data):
    """KEY_PARMS."""
    end = 12 + number(data[8:12])
    return data[:end].hex(), data[end:]


def selection(data):
    """PCR_SELECTION."""
    end = 2 + number(data[:2])
    return data[:end].hex(), data[end:]


def certify_info(data):
    """CERTIFY_INFO or CERTIFY_INFO2; hidden is the digest of the key."""
    last = (sized_shown, sized_shown) if data[:2] == b"\x00\x29" else (sized_shown,)
    return together(shown(11), parms, hidden(20), shown(21), *last)(data)


def handle_list(data):
    """A sized KEY_HANDLE_LIST: how many."""
    end = 4 + number(data[:4])
    return data[:6].hex() + f" <{end - 6}>", data[end:]


def index_list(data):
    """Sized NV indices, which come in no order that the specification gives (Part 2 §21.1)."""
    end = 4 + number(data[:4])
    indices = sorted(data[at : at + 4].hex() for at in range(4, end, 4))
    return " ".join(indices), data[end:]


def version_info(data):
    """A sized CAP_VERSION_INFO: all but revision and maker."""
    end = 4 + number(data[:4])
    return data[4:8].hex() + " <2> " + data[10:13].hex() + " <maker>", data[end:]


def wrapped_response(data):
    """A sized response: its head, and how much follows."""
    end = 4 + number(data[:4])
    return data[:14].hex() + f" <{end - 14}>", data[end:]


handle, nonce, digest = hidden(4), hidden(20), hidden(20)
pubkey = together(parms, sized)
key = together(shown(11), parms, sized_shown, sized, sized)
stored_data = together(shown(4), sized_shown, sized)
composite = together(selection, sized_shown)
pcr_info_short = together(selection, shown(21))
ticks = together(shown(2), hidden(8), shown(2), hidden(20))

LAYOUTS: dict[int, tuple[Part, ...]] = {
    0x0A: (handle, nonce),
    0x0B: (handle, nonce, nonce),
    0x0C: (sized,),
    0x0D: (key,),
    0x0E: (certify_info, sized, handle, key),
    0x0F: (sized, nonce, digest),
    0x11: (handle, nonce, nonce),
    0x12: (digest,),
    0x13: (key,),
    0x16: (composite, sized),
    0x17: (stored_data,),
    0x1B: (sized, sized),
    0x1D: (digest,),
    0x1F: (key,),
    0x20: (handle,),
    0x21: (pubkey,),
    0x24: (sized,),
    0x25: (sized,),
    0x28: (sized, sized),
    0x29: (sized_freely,),
    0x2A: (sized,),
    0x2B: (pubkey, shown(2), digest),
    0x31: (sized_freely,),
    0x32: (certify_info, sized),
    0x33: (certify_info, sized),
    0x3C: (sized,),
    0x3D: (stored_data,),
    0x3E: (pcr_info_short, sized_freely, sized),
    0x41: (handle,),
    0x46: (sized,),
    0x54: (sized_freely,),
    0x66: (shown(2), hidden(2)),
    0x78: (pubkey, digest),
    0x79: (key, sized),
    0x7C: (pubkey, digest),
    0x7D: (pubkey,),
    0x7F: (pubkey, digest, nonce),
    0x81: (pubkey,),
    0x85: (shown(10), digest),
    0x86: (shown(10), digest, digest, sized),
    0xB4: (sized_freely,),
    0xB5: (handle,),
    0xB6: (sized_freely,),
    0xB7: (handle,),
    0xB8: (sized_freely,),
    0xB9: (handle,),
    0xD1: (sized_freely,),
    0xD4: (sized_freely,),
    0xD5: (sized_freely,),
    0xE6: (handle, shown(4), ticks, nonce),
    0xE7: (hidden(8), shown(4), wrapped_response),
    0xE8: (shown(4), ticks, sized),
    0xF1: (ticks,),
    0xF2: (ticks, sized),
}
_EXECUTE = 0xE7
_OF_ANY_SIZE = {ordinal for ordinal, parts in LAYOUTS.items() if sized_freely in parts}
"""Ordinals whose response is as long as each maker's contexts and blobs are."""
_OF_THE_MAKER = {0x103, 0x115, 0x116, 0x120, 0x123}
"""TPM_CAP_PROPERTY that each maker answers as he is: name, times, effects of start-up, NV bytes."""


def _capability(request: bytes) -> tuple[Part, ...]:
    area, sub_cap = number(request[10:14]), request[18:]
    if area == 0x05 and number(sub_cap) in _OF_THE_MAKER:
        return (sized,)
    if area in {0x07, 0x14}:
        return (handle_list,)
    if area == 0x0D:
        return (index_list,)
    if area == 0x10:
        return (sized_freely,)
    if area == 0x1A:
        return (version_info,)
    return ()


def masked(request: bytes, response: bytes, *, is_hidden: bool = False) -> str:
    """What to compare of a well-formed response: tag, code, parameters, whether sessions go on.

    Args:
        request: What was asked.
        response: What came.
        is_hidden: The parameters are encrypted: compare only their length, unless that is each
            maker's own.
    """
    head = response[:2].hex() + " " + response[6:10].hex()
    if number(response[6:10]) != 0:
        return head
    blocks = number(response[:2]) - 0xC4
    end = len(response) - AUTH_BLOCK_BYTES * blocks
    body, tail = response[_HEADER_BYTES:end], response[end:]
    ordinal = number(request[6:10])
    parts = _capability(request) if ordinal == _GET_CAPABILITY else LAYOUTS.get(ordinal, ())
    if is_hidden:
        is_of_any_size = ordinal == _EXECUTE and number(request[20:24]) in _OF_ANY_SIZE
        parts = (hidden_freely,) if is_of_any_size else (hidden(len(body)),)
    text, rest = together(*parts)(body)
    goes_on = "".join(f" {tail[AUTH_BLOCK_BYTES * i + 20]}" for i in range(blocks))
    return f"{head} {text} {rest.hex()} |{goes_on}"
