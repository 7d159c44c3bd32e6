"""VTPM_ORD_* on the wire: known bytes, every ordinal, every truncation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import manager_messages as messages
from protocol.manager_messages import LAYOUTS, ManagerOrdinal, ManagerTag
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import DecodeError, decode, encode

UUID_BYTES = bytes.fromhex("0123456789ab4cdeaf00112233445566")


def hexed(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


EXAMPLES = {
    messages.SaveHashKeyIn: (messages.SaveHashKeyIn(hash_key=b"\x5a" * 52), b"\x5a" * 52),
    messages.LoadHashKeyIn: (messages.LoadHashKeyIn(ignored=b"junk"), b"junk"),
    messages.LoadHashKeyOut: (messages.LoadHashKeyOut(hash_key=b"\x5a" * 64), b"\x5a" * 64),
    messages.GetBootHashOut: (messages.GetBootHashOut(kern_hash=b"\x01" * 20), b"\x01" * 20),
    messages.GetQuoteIn: (
        messages.GetQuoteIn(data=b"\x22" * 20, pcr_selection=b"\xff\x00\x0e", flags=15),
        b"\x22" * 20 + hexed("0003 ff000e 0000000f"),
    ),
    messages.GetQuoteOut: (
        messages.GetQuoteOut(sig=b"\x02" * 256, flag_hashes_and_pcr_values=b"\x03" * 60),
        b"\x02" * 256 + b"\x03" * 60,
    ),
    messages.GroupListOut: (messages.GroupListOut(count=3), hexed("00000003")),
    messages.GroupNewIn: (
        messages.GroupNewIn(label_digest=bytes(20), saa_modulus=bytes(range(256))),
        bytes(20) + bytes(range(256)),
    ),
    messages.GroupNewOut: (
        messages.GroupNewOut(
            group_uuid=UUID_BYTES, aik_modulus=b"\x04" * 256, identity_binding=b"\x05" * 256
        ),
        UUID_BYTES + b"\x04" * 256 + b"\x05" * 256,
    ),
    messages.GroupIn: (messages.GroupIn(group=1), hexed("00000001")),
    messages.GroupActivateIn: (
        messages.GroupActivateIn(group=0, blob=b"ca"),
        hexed("00000000 00000002") + b"ca",
    ),
    messages.GroupActivateOut: (
        messages.GroupActivateOut(alg=6, enc_scheme=255, key=b"\x07" * 16),
        hexed("00000006 00ff 0010") + b"\x07" * 16,
    ),
    messages.GroupRegisterIn: (
        messages.GroupRegisterIn(
            group=1, dhkx1=b"\x08" * 256, saa_proof=b"\x09" * 256, pcr_selection=b"\x01"
        ),
        hexed("00000001") + b"\x08" * 256 + b"\x09" * 256 + hexed("0001 01"),
    ),
    messages.GroupRegisterOut: (
        messages.GroupRegisterOut(
            dhkx2=b"\x0a" * 256, recover_blob=b"\x0b" * 32, sig=b"\x0c" * 256
        ),
        b"\x0a" * 256 + b"\x0b" * 32 + b"\x0c" * 256,
    ),
    messages.GroupUpdateIn: (
        messages.GroupUpdateIn(
            group=0,
            cfg_list_sig=b"\x0d" * 256,
            cfg_list=messages.ConfigurationList(seq=1, cfgs=(b"\x11" * 20,), kerns=()),
            selections=hexed("0003 ff000e"),
        ),
        hexed("00000000")
        + b"\x0d" * 256
        + hexed("0000000000000001 00000001")
        + b"\x11" * 20
        + hexed("00000000 0003 ff000e"),
    ),
    messages.GroupShowOut: (
        messages.GroupShowOut(
            group_uuid=UUID_BYTES,
            saa_modulus=bytes(256),
            cfg_list=messages.ConfigurationList(seq=2, cfgs=(), kerns=(b"\x12" * 20,)),
        ),
        UUID_BYTES + bytes(256) + hexed("0000000000000002 00000000 00000001") + b"\x12" * 20,
    ),
    messages.GroupQuoteIn: (
        messages.GroupQuoteIn(group=1, nonce=b"\x33" * 20, pcr_selection=b""),
        hexed("00000001") + b"\x33" * 20 + hexed("0000"),
    ),
    messages.GroupQuoteOut: (
        messages.GroupQuoteOut(sig=b"\x0e" * 256, pcr_values=bytes(20)),
        b"\x0e" * 256 + bytes(20),
    ),
    messages.GroupRecover2In: (
        messages.GroupRecover2In(group=1, dhkx2=b"\x0f" * 256, recover_blob=bytes(32)),
        hexed("00000001") + b"\x0f" * 256 + bytes(32),
    ),
    messages.VtpmListIn: (messages.VtpmListIn(group=1, offset=2), hexed("00000001 00000002")),
    messages.VtpmListOut: (
        messages.VtpmListOut(total=1, uuids=UUID_BYTES),
        hexed("00000001") + UUID_BYTES,
    ),
    messages.VtpmNewIn: (
        messages.VtpmNewIn(group=0, uuid=UUID_BYTES),
        hexed("00000000") + UUID_BYTES,
    ),
    messages.VtpmUuid: (messages.VtpmUuid(uuid=UUID_BYTES), UUID_BYTES),
    messages.Nothing: (messages.Nothing(), b""),
}


@pytest.mark.parametrize("structure", EXAMPLES, ids=lambda structure: structure.__name__)
def test_structure_has_its_known_bytes(structure: type):
    value, known = EXAMPLES[structure]
    assert encode(value) == known
    assert decode(structure, known) == value


def test_every_declared_layout_has_an_example():
    declared = {part for layout in LAYOUTS.values() for part in (layout.operands, layout.results)}
    assert declared - {None} == set(EXAMPLES)
    assert set(LAYOUTS) == set(ManagerOrdinal)


# Fields that take whatever is there accept a prefix; all others must refuse it.
OPEN_ENDED = {
    messages.LoadHashKeyIn: 0,
    messages.GetQuoteOut: 256,
    messages.GroupQuoteOut: 256,
    messages.GroupUpdateIn: 296,
    messages.VtpmListOut: 4,
}

LEGAL_PREFIXES = {(messages.VtpmNewIn, 4), (messages.LoadHashKeyOut, 52)}


@pytest.mark.parametrize("structure", EXAMPLES, ids=lambda structure: structure.__name__)
def test_every_truncation_is_refused(structure: type):
    _, known = EXAMPLES[structure]
    for length in range(OPEN_ENDED.get(structure, len(known))):
        if (structure, length) in LEGAL_PREFIXES:
            continue
        with pytest.raises(DecodeError):
            decode(structure, known[:length])


@pytest.mark.parametrize("structure", EXAMPLES, ids=lambda structure: structure.__name__)
@given(data=st.binary(max_size=600))
def test_any_bytes_decode_or_raise_the_one_error(structure: type, data: bytes):
    try:
        value = decode(structure, data)
    except DecodeError:
        return
    assert encode(value) == data


@pytest.mark.parametrize("count", [0x10000, 0x7FFFFFFF, 0xFFFFFFFF])
def test_huge_counts_are_refused_without_allocating(count: int):
    body = bytes(8) + count.to_bytes(4, "big") + bytes(20)
    with pytest.raises(DecodeError):
        decode(messages.ConfigurationList, body)


@pytest.mark.parametrize("length", [0, 20, 51, 65, 1000])
def test_hash_key_of_another_length_is_refused(length: int):
    with pytest.raises(DecodeError) as refused:
        decode(messages.SaveHashKeyIn, bytes(length))
    assert refused.value.code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize("length", [52, 53, 63, 64])
def test_hash_key_of_52_to_64_bytes_is_taken(length: int):
    assert decode(messages.SaveHashKeyIn, bytes(length)).hash_key == bytes(length)


def test_hash_keys_are_not_shown():
    assert "hidden" in repr(messages.SaveHashKeyIn(hash_key=b"\x5a" * 52))
    assert "hidden" in repr(messages.LoadHashKeyOut(hash_key=b"\x5a" * 52))


def test_requests_carry_the_tag_of_their_ordinal():
    blob = messages.SaveHashKeyIn(hash_key=b"\x5a" * 52)
    save = messages.request(ManagerOrdinal.SAVEHASHKEY, blob)
    assert save == hexed("01c1 0000003e 00000001") + b"\x5a" * 52
    assert messages.request(ManagerOrdinal.LOADHASHKEY) == hexed("01c1 0000000a 00000002")
    assert messages.request(ManagerOrdinal.GROUP_LIST) == hexed("01c2 0000000a 02000101")
    assert messages.packet(0x01C4, 0, b"xy") == hexed("01c4 0000000c 00000000") + b"xy"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(9),
        hexed("01c1 0000000b 00000002"),
        hexed("01c1 00000009 00000002"),
        hexed("01c1 ffffffff 00000002"),
        hexed("01c1 0000000a 00000002 00"),
    ],
)
def test_packet_with_a_wrong_length_is_refused(data: bytes):
    with pytest.raises(DecodeError) as refused:
        messages.split(data)
    assert refused.value.code == ReturnCode.BAD_PARAMETER


def test_results_of_a_success_are_decoded():
    answer = messages.packet(ManagerTag.VTPM_TAG_RSP, 0, b"\x5a" * 52)
    assert messages.results(messages.LoadHashKeyOut, answer).hash_key == b"\x5a" * 52


@pytest.mark.parametrize("tag", [0x01C4, 0x01C5])
def test_results_of_a_refusal_raise_its_code(tag: int):
    with pytest.raises(TpmError) as refused:
        messages.results(messages.LoadHashKeyOut, messages.packet(tag, 3))
    assert refused.value.code == ReturnCode.BAD_PARAMETER


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        messages.packet(0x01C5, 0),
        messages.packet(0x00C4, 0),
        messages.packet(0x00C4, 3),
        messages.packet(0x01C1, 3),
        messages.packet(0x01C4, 0x12345),
        messages.packet(0x01C4, 0, bytes(51)),
        messages.packet(0x01C4, 0, bytes(53)),
        messages.packet(0x01C4, 0, bytes(65)),
    ],
)
def test_garbage_from_the_manager_is_one_named_error(answer: bytes):
    with pytest.raises(DecodeError):
        messages.results(messages.LoadHashKeyOut, answer)
