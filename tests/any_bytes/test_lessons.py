"""Tests for lessons that no room has a test of its own for; `security_lessons.py` says which."""

import contextlib
import itertools
import math
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daemons.chip_memory import FILE_BYTES, ChipMemory
from daemons.vtpm.image import VtpmImage
from protocol.return_codes import ReturnCode, TpmError
from tests.any_bytes import lattice
from tests.any_bytes.answers import check_outcome, stored
from tests.any_bytes.furnished import all_authorized, key_handle, session_handle
from tests.any_bytes.sequences import check_saved
from tests.daemons.vtpm.test_image import BYTES, OURS, Manager
from tests.fakes.faulty_disk import FaultyDisk
from tests.tpm12.conftest import SRK_AUTH, Bench, CountingRng
from tests.tpm12.makers import BIND, IDENTITY, KEY_AUTH, define, load, seal, signing, wrap
from tests.tpm12.witness import EK, SRK, ZERO, frame, oaep, sized, u32
from tpm12.client import TpmClient
from tpm12.client_core import BadResponseError
from tpm12.crypto import RsaKeyGenerator, new_rsa_key
from tpm12.state import Permanent, StAny, StClear
from tpm12.state_codec import StateError, decode_section, encode_section

NV_WRITE, NV_WRITE_AUTH, NV_READ, NV_READ_AUTH = 0xCD, 0xCE, 0xCF, 0xD0
UN_BIND, UNSEAL, SAVE_STATE, EXTEND, ST_STATE = 0x1E, 0x18, 0x98, 0x14, 2
_SECTIONS = {"permanent": Permanent, "stclear": StClear, "stany": StAny}


# -- NV: offset and size ---------------------------------------------------------------------------


@pytest.mark.parametrize("ordinal", [NV_WRITE, NV_WRITE_AUTH, NV_READ, NV_READ_AUTH])
def test_nv_access_past_32_bits_is_refused(furnished_state, ordinal):
    index = 2 if ordinal in {NV_WRITE_AUTH, NV_READ_AUTH} else 1
    block = u32(session_handle(1)) + ZERO + b"\1" + ZERO
    offsets = (1, 63, 64, 65, 1 << 31, (1 << 32) - 64, (1 << 32) - 1)
    sizes = (64, 65, 1 << 16, 1 << 31, (1 << 32) - 64, (1 << 32) - 1)
    for offset, size in itertools.product(offsets, sizes):
        is_write = ordinal in {NV_WRITE, NV_WRITE_AUTH}
        amount = sized(bytes(min(size, 3000))) if is_write else u32(size)
        request = frame(ordinal, u32(index) + u32(offset) + amount + block, 0xC2)
        with all_authorized():
            outcome = Bench(furnished_state).engine.execute(request, 0)
        assert check_outcome(furnished_state, outcome) == ReturnCode.NOSPACE


# -- plaintexts ------------------------------------------------------------------------------------


def _un_bind(state, plaintext):
    key = state.volatile.keys[key_handle(BIND)]
    blob = oaep(key.public.pub_key, plaintext)
    block = u32(session_handle(1)) + ZERO + b"\1" + ZERO
    request = frame(UN_BIND, u32(key_handle(BIND)) + sized(blob) + block, 0xC2)
    with all_authorized():
        outcome = Bench(state).engine.execute(request, 0)
    check_outcome(state, outcome)
    return outcome


def test_plaintext_of_any_length_is_unbound(furnished_state):
    for length in range(18):
        data = bytes(range(length))
        outcome = _un_bind(furnished_state, b"\1\1\0\0\2" + data)
        assert outcome.code == ReturnCode.SUCCESS
        assert outcome.response[10:-41] == sized(data)
    for length in range(5):
        assert _un_bind(furnished_state, b"\1\1\0\0\2"[:length]).code != ReturnCode.SUCCESS


def test_plaintext_of_any_length_is_unsealed_or_refused(furnished_state):
    modulus = furnished_state.permanent.srk.public.pub_key
    proof = furnished_state.permanent.tpm_proof
    blocks = b"".join(
        u32(session_handle(1, second=second)) + ZERO + b"\1" + ZERO for second in (False, True)
    )
    head = b"\1\1\0\0" + sized(b"")
    inner = b"\5" + ZERO + proof + ZERO
    for length in (*range(0, 90, 3), 213, 214):
        for data_size in (0, 1, max(length - 65, 0), length, 1 << 31, (1 << 32) - 1):
            plaintext = (inner + u32(data_size) + bytes(214))[:length]
            request = frame(
                UNSEAL, u32(SRK) + head + sized(oaep(modulus, plaintext)) + blocks, 0xC3
            )
            with all_authorized():
                outcome = Bench(furnished_state).engine.execute(request, 0)
            check_outcome(furnished_state, outcome)


def test_same_plaintext_is_never_sealed_the_same_way(owned_state):
    tpm = Bench(owned_state).tpm
    blobs = {seal(tpm, b"the same").ok() for _ in range(5)}
    keys = {wrap(tpm, signing()).ok()[-64:] for _ in range(5)}
    assert len(blobs) == len(keys) == 5


# -- keys ------------------------------------------------------------------------------------------


def test_generated_keys_are_as_strong_as_their_size():
    generator = RsaKeyGenerator(CountingRng(b"lessons"))
    product, bits = 1, 512
    for _ in range(150):
        key = new_rsa_key(generator.primes(bits, 65537), 65537, bits)
        n, p = (int.from_bytes(x, "big") for x in (key.public.modulus, key.prime))
        q = n // p
        assert p * q == n
        assert n.bit_length() == bits
        assert p.bit_length() == q.bit_length() == bits // 2
        assert p >> (bits // 2 - 2) == q >> (bits // 2 - 2) == 0b11
        assert abs(p - q).bit_length() > bits // 2 - 100
        assert math.gcd(65537, (p - 1) * (q - 1)) == 1
        assert math.gcd(n, product) == 1, "two keys share a prime"
        product *= n


def test_every_key_with_every_use_gives_an_answer(furnished_state):
    handles = (*(key_handle(usage) for usage in range(0x10, 0x17)), SRK, EK)
    assert key_handle(IDENTITY) in furnished_state.volatile.keys
    bench = Bench(furnished_state)
    with all_authorized():
        for command in lattice.ALL:
            count = len(command.key_handles_at)
            for request in lattice.base_requests(command) if count else ():
                for named in itertools.product(handles, repeat=count):
                    changed = bytearray(request)
                    for at, handle in zip(command.key_handles_at, named, strict=True):
                        changed[at : at + 4] = u32(handle)
                    outcome = bench.engine.execute(bytes(changed), 0)
                    check_outcome(furnished_state, outcome)


# -- state -----------------------------------------------------------------------------------------


def _records(data):
    """Offsets and sizes of the records of a stored section."""
    at = 4
    while at < len(data):
        size = int.from_bytes(data[at + 6 : at + 10], "big")
        yield at + 6, size
        at += 10 + size


@pytest.mark.parametrize("name", _SECTIONS)
def test_stored_record_of_another_length_is_refused(furnished_state, name):
    data = encode_section(getattr(furnished_state, name))
    for at, true in _records(data):
        for size in {0, 1, true - 1, true + 1, 1 << 31, (1 << 32) - 2, (1 << 32) - 1} - {true, -1}:
            altered = data[:at] + struct.pack(">I", size) + data[at + 4 :]
            with pytest.raises(StateError):
                decode_section(_SECTIONS[name], altered)


@settings(max_examples=300)
@given(
    name=st.sampled_from(sorted(_SECTIONS)),
    flips=st.lists(st.tuples(st.integers(0), st.integers(1, 255)), min_size=1, max_size=3),
)
def test_altered_state_is_refused_or_read(furnished_state, name, flips):
    data = bytearray(encode_section(getattr(furnished_state, name)))
    for at, bits in flips:
        data[at % len(data)] ^= bits
    try:
        read = decode_section(_SECTIONS[name], bytes(data))
    except StateError:
        return
    saved = encode_section(read)
    assert encode_section(decode_section(_SECTIONS[name], saved)) == saved


def test_most_state_that_fits_is_saved(owned_state):
    bench = Bench(owned_state)
    blob = wrap(bench.tpm, signing()).ok()
    while load(bench.tpm, blob).code == ReturnCode.SUCCESS:
        pass
    index = 0x1000
    while define(bench.tpm, index, 0x20002, 900, as_owner=True).code == ReturnCode.SUCCESS:
        index += 1
    while bench.tpm.send(0x0A).code == ReturnCode.SUCCESS:
        pass
    bench.tpm.send(SAVE_STATE).ok()
    check_saved(bench.state)
    assert len(stored(bench.state)[0]) < BYTES // 2
    bench.engine.keep(bench.engine.power_on())
    bench.tpm.send(0x99, struct.pack(">H", ST_STATE)).ok()
    assert bench.state.permanent.nv.keys() >= set(range(0x1000, index))


def test_saved_state_does_not_survive_an_extend(owned_state):
    for extends in (False, True):
        bench = Bench(owned_state)
        bench.tpm.send(SAVE_STATE).ok()
        if extends:
            bench.tpm.send(EXTEND, u32(10) + ZERO).ok()
        assert (bench.power_cycle(ST_STATE).code == ReturnCode.SUCCESS) is not extends


def test_state_that_shrinks_leaves_no_tail(furnished_state, owned_state):
    manager, disk, memory = Manager(), FaultyDisk(bytes(BYTES)), FaultyDisk(bytes(FILE_BYTES))
    image, chip = VtpmImage(disk, OURS, manager), ChipMemory(memory)
    image.load()
    chip.load()
    for state in (furnished_state, owned_state, furnished_state, owned_state):
        image.save(state.permanent)
        chip.save(state.permanent)
        again = VtpmImage(FaultyDisk(disk.durable), OURS, manager).load()
        assert encode_section(again) == encode_section(state.permanent)
        again = ChipMemory(FaultyDisk(memory.durable)).load()
        assert encode_section(again) == encode_section(state.permanent)


# -- secrets, and hostile TPMs ---------------------------------------------------------------------


def _everything_in(state):
    for name in state.__slots__:
        section = getattr(state, name)
        yield section
        for field in section.__slots__:
            value = getattr(section, field)
            yield from value.values() if isinstance(value, dict) else ()
            if not isinstance(value, bytes | dict):
                yield value


def test_secrets_are_in_no_repr(furnished_state):
    permanent, stany = furnished_state.permanent, furnished_state.stany
    keys = [permanent.srk, permanent.endorsement_key, *furnished_state.volatile.keys.values()]
    secrets = {
        permanent.owner_auth,
        permanent.tpm_proof,
        permanent.context_key,
        permanent.delegate_key,
        SRK_AUTH,
        KEY_AUTH,
        *(key.prime for key in keys),
        *(session.shared_secret for session in stany.sessions.values()),
        *(session.auth_data for session in stany.transport_sessions.values()),
        *(area.auth_value for area in permanent.nv.values()),
    } - {b"", ZERO}
    shown = "".join(map(repr, _everything_in(furnished_state))) + repr(furnished_state)
    for secret in secrets:
        assert secret.hex() not in shown
        assert repr(secret)[2:-1] not in shown


CALLS = {
    "pcr_read": lambda tpm: tpm.pcr_read(10),
    "get_random": lambda tpm: tpm.get_random(16),
    "read_pubek": lambda tpm: tpm.read_pubek(),
    "oiap": lambda tpm: tpm.oiap(),
    "nv_read_value": lambda tpm: tpm.nv_read_value(1, 4),
}


@settings(max_examples=300)
@given(
    call=st.sampled_from(sorted(CALLS)),
    response=st.one_of(
        st.binary(max_size=60),
        st.builds(
            lambda tag, code, body: struct.pack(">HII", tag, 10 + len(body), code) + body,
            st.integers(0xC4, 0xC6),
            st.sampled_from([0, 0, 0, 1, 0x800, 0xFFFFFFFF]),
            st.binary(max_size=80),
        ),
    ),
)
def test_client_gets_one_named_error_from_any_response(call, response):
    tpm = TpmClient(lambda _request: response, rng=CountingRng())
    with contextlib.suppress(TpmError, BadResponseError):
        CALLS[call](tpm)
