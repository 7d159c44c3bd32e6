"""The pages of the image: their bytes, and what each check stands against."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.manager.vault_format import (
    BODY_BYTES,
    FANOUT,
    MAGIC,
    PAGE_BYTES,
    RECORD_BYTES,
    RECORDS_PER_LEAF,
    Damaged,
    Full,
    NodePlace,
    PageState,
    Record,
    Reference,
    Root,
    RootHeader,
    SealedKey,
    Sealer,
    VaultError,
    VaultKeys,
    examine_root,
    pack_references,
    record_at,
    root_pages,
    unpack_references,
    uuids_of,
    with_record,
)
from protocol.wire import encode

KEY = bytes(range(32))
VAULT_ID = b"\x11" * 16
NONCE = b"\x22" * 12
BODY = bytes(range(252)) * 16
PLACE = NodePlace(1, 7)


def sealer(key: bytes = KEY, vault_id: bytes = VAULT_ID) -> Sealer:
    return Sealer("image", vault_id, VaultKeys.derive(key))


def stored_node(place: NodePlace = PLACE, page: int = 9) -> tuple[Reference, bytes]:
    stored = sealer().close_node(page, place, BODY, sequence=3, nonce=NONCE)
    return Reference(page=page, digest=hashlib.sha256(stored).digest()), stored


def root_header(**changes: object) -> RootHeader:
    fields = {
        "sequence": 4,
        "vault_id": VAULT_ID,
        "page_count": 512,
        "key_check": VaultKeys.derive(KEY).key_check,
        "seals": (),
    }
    return RootHeader(**(fields | changes))


def test_node_is_one_page_and_comes_back():
    reference, stored = stored_node()
    assert len(stored) == PAGE_BYTES
    assert sealer().open_node(reference, PLACE, stored) == BODY


@pytest.mark.parametrize("place", [NodePlace(0, 7), NodePlace(1, 6), NodePlace(2, 7)])
def test_node_in_another_place_is_refused(place: NodePlace):
    reference, stored = stored_node()
    with pytest.raises(Damaged) as refused:
        sealer().open_node(reference, place, stored)
    assert "another node" in refused.value.why


def test_node_on_another_page_is_refused():
    reference, stored = stored_node()
    moved = Reference(page=10, digest=reference.digest)
    with pytest.raises(Damaged) as refused:
        sealer().open_node(moved, PLACE, stored)
    assert "does not decrypt" in refused.value.why


@pytest.mark.parametrize("other", [sealer(key=bytes(32)), sealer(vault_id=bytes(16))])
def test_node_of_another_vault_is_refused(other: Sealer):
    reference, stored = stored_node()
    with pytest.raises(Damaged):
        other.open_node(reference, PLACE, stored)


def test_node_that_its_parent_does_not_mean_is_refused():
    _, stored = stored_node()
    with pytest.raises(Damaged) as refused:
        sealer().open_node(Reference(page=9, digest=bytes(32)), PLACE, stored)
    assert "its parent" in refused.value.why


def test_leaf_holds_48_records_of_84_bytes():
    assert (RECORDS_PER_LEAF, RECORD_BYTES, FANOUT) == (48, 84, 112)
    record = Record(uuid=b"\x01" * 16, flags=0x0102, group=0x0304, hash_key=b"\x05" * 64)
    assert encode(record) == b"\x01" * 16 + bytes.fromhex("01020304") + b"\x05" * 64
    body = with_record(bytes(BODY_BYTES), 47, record)
    assert body[47 * 84 :] == encode(record)
    assert record_at(body, 47) == record
    assert uuids_of(body) == [bytes(16)] * 47 + [b"\x01" * 16]
    assert with_record(body, 47, None) == bytes(BODY_BYTES)


def test_references_behind_the_last_are_refused():
    references = [Reference(page=n, digest=bytes([n]) * 32) for n in range(4, 7)]
    body = pack_references(references)
    assert unpack_references("image", body, 3) == references
    with pytest.raises(Damaged):
        unpack_references("image", body, 2)


def test_root_is_one_page_and_comes_back():
    header, root = root_header(), Root(sequence=4, trees=())
    page = sealer().close_root(header, root, nonce=NONCE)
    assert len(page) == PAGE_BYTES
    for number in root_pages(4):
        assert examine_root("image", number, page) == header
    assert sealer().open_root(page, 4) == root
    with pytest.raises(Damaged):
        sealer().open_root(page, 6)


def test_root_says_its_sequence_twice_and_they_agree():
    page = sealer().close_root(root_header(), Root(sequence=6, trees=()), nonce=NONCE)
    with pytest.raises(Damaged) as refused:
        sealer().open_root(page, 4)
    assert "contradicts" in refused.value.why


@pytest.mark.parametrize("number", [1, 3])
def test_root_in_the_other_slot_is_refused(number: int):
    page = sealer().close_root(root_header(), Root(sequence=4, trees=()), nonce=NONCE)
    with pytest.raises(Damaged) as refused:
        examine_root("image", number, page)
    assert "belongs elsewhere" in refused.value.why


def test_five_seals_fit_and_twelve_do_not():
    def seal(values: int) -> SealedKey:
        return SealedKey(
            name=b"a configuration",
            pcr_selection=b"\xff\x00\x0e",
            locality=4,
            digest_at_release=bytes(20),
            pcr_values=(bytes(20),) * values,
            stored_data=bytes(322),
        )

    root = Root(sequence=4, trees=())
    five = (seal(11), *(seal(0) for _ in range(4)))
    assert sealer().close_root(root_header(seals=five), root, nonce=NONCE)
    with pytest.raises(Full):
        sealer().close_root(root_header(seals=(seal(11),) * 12), root, nonce=NONCE)


@given(
    start=st.sampled_from([b"", MAGIC, MAGIC + b"\x00\x01", MAGIC + b"\x00\x02"]),
    content=st.binary(max_size=400),
    number=st.integers(0, 3),
)
def test_any_page_is_blank_torn_a_header_or_refused(start: bytes, content: bytes, number: int):
    page = (start + content).ljust(PAGE_BYTES, b"\0")
    assert examine_root("image", number, page) in (PageState.BLANK, PageState.TORN)
    whole = page[:-32] + hashlib.sha256(page[:-32]).digest()
    try:
        header = examine_root("image", number, whole)
    except VaultError:
        return
    # Whoever can make a checksum can make a header; the key is what it lacks.
    assert isinstance(header, RootHeader)
    with pytest.raises(Damaged):
        sealer().open_root(whole, header.sequence)


@pytest.mark.parametrize("at", range(0, PAGE_BYTES, 97))
def test_root_with_a_flipped_byte_is_torn(at: int):
    page = bytearray(sealer().close_root(root_header(), Root(sequence=4, trees=()), nonce=NONCE))
    page[at] ^= 0x10
    assert examine_root("image", 0, bytes(page)) is PageState.TORN


@pytest.mark.parametrize("length", [0, 16, 31, 33])
def test_vault_key_has_32_bytes(length: int):
    with pytest.raises(ValueError, match="32 bytes"):
        VaultKeys.derive(bytes(length))


def test_known_bytes_of_the_format():
    """The format is a promise: files of this version must open in later ones."""
    header, root = root_header(), Root(sequence=4, trees=())
    page = sealer().close_root(header, root, nonce=NONCE)
    assert page[:16] == b"vTPM manager\x00\xd0\x4d\x01"
    assert page[16:26].hex() == "0002" + "0000000000000004"
    _, node = stored_node()
    digests = [hashlib.sha256(stored).hexdigest()[:16] for stored in (page, node)]
    assert digests == ["4ba9ec6d9b71808f", "f8264aa00c3c59a9"]
