"""What is fuzzed: for each room that reads bytes from outside, a function that takes any.

A target returns, or raises what is a bug. It needs no atheris: `test_targets.py` gives each target
its seeds, `run.py` gives it what coverage leads to.
"""

import hashlib
from contextlib import suppress
from functools import cache
from pathlib import Path
from uuid import UUID

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from daemons.errors import Failure
from daemons.manager import vault_format
from daemons.vtpm import image
from daemons.xl.domain_config import parse_domain
from protocol import manager_messages, tis_messages
from protocol.tpmif import BackendKeys, BackendRing, FrontendReady, FrontendRing
from protocol.wire import DecodeError, encode
from protocol.xenbus import XenbusState
from tests.any_bytes import lattice, reaching
from tests.any_bytes.conftest import states
from tests.any_bytes.sequences import REPAIRED, STATES, as_bytes, run_sequence
from tests.fakes.faulty_disk import FaultyDisk
from tpm12.state import Permanent, StAny, StClear, Volatile
from tpm12.state_codec import StateError, apply_delta, decode_section, encode_section

CORPUS = Path(__file__).parents[1] / "vectors" / "corpus"
_SECTIONS = (Permanent, StClear, StAny, Volatile)
_UUID = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
_IMAGE_BYTES = 1 << 17
_all_states = cache(states)


def engine(data):
    """A sequence of commands (see `tests/any_bytes/sequences.py`)."""
    run_sequence(data, _all_states())


def engine_seeds():
    """A sequence of one command for every ordinal, and some longer ones."""
    for command in lattice.COMMANDS.values():
        for request in lattice.base_requests(command):
            yield as_bytes("furnished", [(REPAIRED, request)], is_authorized=True)
            for state in STATES[:4]:
                yield as_bytes(state, [(REPAIRED, request)], is_authorized=True)
    yield from reaching.as_sequences(_all_states()["furnished"]).values()
    for state in STATES:
        steps = [(REPAIRED, lattice.made(c)) for c in list(lattice.COMMANDS.values())[:4]]
        yield as_bytes(state, steps, is_authorized=False)


def state_codec(data):
    """Which section u8 (0x80: a delta), then its bytes: read whole and as it was, or refused."""
    if not data:
        return
    section = _SECTIONS[data[0] % len(_SECTIONS)]
    try:
        if data[0] & 0x80:
            read = apply_delta(section(), data[1:])
        else:
            read = decode_section(section, data[1:])
    except StateError:
        return
    saved = encode_section(read)
    assert encode_section(decode_section(section, saved)) == saved


def state_codec_seeds():
    """The sections of every state."""
    for state in _all_states().values():
        for number, name in enumerate(("permanent", "stclear", "stany")):
            yield bytes([number]) + encode_section(getattr(state, name))


def vault(data):
    """A root page whose checksum is right, and what is inside a node or a root."""
    page = data[: vault_format.PAGE_BYTES - 32].ljust(vault_format.PAGE_BYTES - 32, b"\0")
    page += hashlib.sha256(page).digest()
    keys = vault_format.VaultKeys.derive(bytes(32))
    sealer = vault_format.Sealer("fuzzed", bytes(16), keys)
    for each in (page, data.ljust(vault_format.PAGE_BYTES, b"\0")[: vault_format.PAGE_BYTES]):
        try:
            header = vault_format.examine_root("fuzzed", data[0] if data else 0, each)
            if isinstance(header, vault_format.RootHeader):
                sealer.open_root(each, header.sequence)
        except Failure:
            pass
    header = page[: vault_format.HEADER_BYTES]
    plain = data[vault_format.HEADER_BYTES :][: vault_format.ROOT_BYTES]
    root = header + bytes(12) + keys.roots.encrypt(bytes(12), plain, header)
    with suppress(Failure):
        sealer.open_root(root.ljust(vault_format.PAGE_BYTES, b"\0"), 1)


def vault_seeds():
    """A blank page and one with a header."""
    yield bytes(vault_format.PAGE_BYTES)
    yield vault_format.MAGIC + bytes(64)
    yield vault_format.MAGIC + b"\0\1" + bytes(8) + b"\1" + bytes(200)


class _Keeper:
    """A manager that keeps one record."""

    def __init__(self, record):
        self.record = record

    def load_hash_key(self):
        return self.record

    def save_hash_key(self, hash_key):
        self.record = hash_key


def vtpm_image(data):
    """An image that is all from outside; then one whose state is, under the right key."""
    content = data[:_IMAGE_BYTES].ljust(_IMAGE_BYTES, b"\0")
    first = content[: image.HEADER_BYTES + int.from_bytes(content[10:14], "big")]
    for record in (None, hashlib.sha256(first).digest() + bytes(32), data[:64]):
        _load(content, record)
    head = image.SlotHeader(
        magic=image.MAGIC, version=1, length=len(data) + image.TAG_BYTES, nonce=bytes(12)
    )
    header = encode(head)
    slot = header + AESGCM(bytes(32)).encrypt(bytes(12), data, header + _UUID.bytes)
    if len(slot) <= _IMAGE_BYTES // 2:
        record = hashlib.sha256(slot).digest() + bytes(32)
        _load(slot.ljust(_IMAGE_BYTES, b"\0"), record)


def _load(content, record):
    disk = FaultyDisk(content)
    with suppress(Failure):
        image.VtpmImage(disk, _UUID, _Keeper(record)).load()
    assert disk.visible == content, "an image was changed by being read"


def vtpm_image_seeds():
    """Nothing, headers, and a permanent section."""
    yield b""
    yield image.MAGIC + b"\0\1" + bytes(16)
    yield image.FIRST_MAGIC + b"\0\1\0\0\0\x20" + bytes(44)
    yield encode_section(Permanent())


def xl_config(data):
    """A domain configuration: understood, or refused with a place."""
    with suppress(Failure):
        parse_domain(data.decode("utf-8", "replace"))


def xl_config_seeds():
    """A guest, and the rarer forms of values."""
    yield (
        b'name="guest"\nkernel="/images/guest.img"\nmemory=64\n'
        b'vtpm=["backend=domu-vtpm,uuid=ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"]\n'
        b'disk=["file:/images/guest.disk,hda,w"]\nseclabel="system_u:system_r:domU_t"\n'
    )
    yield b"name='vtpmmgr'\nkernel='vtpmmgr-stubdom'\niomem=['fed42,1']\nextra=\"tpmlocality=2\"\n"
    yield b'name = "a\\x41\\n" # comment\nlist = [ 1, 0x10,\n "three", [\'four\'], ]; other = 5\n'


def tis(data):
    """A message of the register socket, in either direction."""
    for decode in (tis_messages.decode_request, tis_messages.decode_answer):
        try:
            message = decode(data)
        except DecodeError:
            continue
        assert decode(tis_messages.encode_message(message)) == message


def tis_seeds():
    """One of each kind, as far as zeros go."""
    for kind in tis_messages.Kind:
        yield bytes([kind]) + bytes(12)


def tpmif(data):
    """Messages to a backend and to a frontend: u16 length and bytes each."""
    backend, frontend = BackendRing(), FrontendRing(0)
    backend.open()
    at = 0
    while at + 2 <= len(data):
        size = int.from_bytes(data[at : at + 2], "big")
        message = data[at + 2 : at + 2 + size]
        at += 2 + size
        for side in (backend, frontend):
            try:
                event = side.receive(message)
            except DecodeError:
                continue
            if isinstance(event, FrontendReady):
                keys = BackendKeys(handle=event.handle, uuid=_UUID, ring_id="r", memory="m")
                backend.connect(keys, 0)
            elif side is backend and backend.is_busy:
                backend.finish(bytes(10))


def tpmif_seeds():
    """A frontend that attaches and sends a command."""
    frontend, backend = FrontendRing(0), BackendRing()
    yield _joined([backend.open(), frontend.publish()])
    yield _joined([bytes(64), b"\1" + bytes(40), b"\2" + bytes(40), b""])
    state = XenbusState.INITIALISED.value
    yield _joined([bytes([2, 0, 0, 0, 0, state]), bytes([1, 0, 0, 0, 1]) + bytes(100)])


def _joined(messages):
    return b"".join(len(m).to_bytes(2, "big") + m for m in messages)


def manager(data):
    """A request to the manager: taken apart, or refused."""
    try:
        header, _ = manager_messages.split(data)
    except DecodeError:
        return
    assert header is not None


def manager_seeds():
    """One of each ordinal."""
    for ordinal in manager_messages.ManagerOrdinal:
        yield manager_messages.request(ordinal)


TARGETS = {
    "engine": (engine, engine_seeds),
    "state_codec": (state_codec, state_codec_seeds),
    "vault": (vault, vault_seeds),
    "vtpm_image": (vtpm_image, vtpm_image_seeds),
    "xl_config": (xl_config, xl_config_seeds),
    "tis": (tis, tis_seeds),
    "tpmif": (tpmif, tpmif_seeds),
    "manager": (manager, manager_seeds),
}
"""Name: (target, its seeds)."""


def kept(name):
    """The cases that runs have found for a target, and that are kept."""
    return sorted((CORPUS / name).glob("*.bin"))
