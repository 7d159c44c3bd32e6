"""A SHA-1 computation that is written down in the midst of it."""

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpm12.sha1 import SINCE_BYTES_MAX, Sha1Thread


@given(parts=st.lists(st.binary(max_size=100), max_size=5), last=st.binary(max_size=64))
def test_thread_is_sha1_and_leaves_its_past_alone(parts, last):
    threads = [Sha1Thread()]
    for part in parts:
        threads.append(threads[-1].fed(part))
    for i, thread in enumerate(threads):
        assert thread.digest(last) == hashlib.sha1(b"".join(parts[:i]) + last).digest()


@given(before=st.integers(0, 200), after=st.integers(0, 130), last=st.integers(0, 64))
def test_thread_that_was_stored_goes_on(before, after, last):
    # Long enough that part of it is kept as a chaining value only.
    data = bytes(i * 7 % 256 for i in range(SINCE_BYTES_MAX + 1 + before))
    stored = Sha1Thread().fed(data[:100]).fed(data[100:]).to_bytes()
    assert len(stored) < 300
    thread = Sha1Thread.from_bytes(stored).fed(bytes(after))
    again = Sha1Thread.from_bytes(thread.to_bytes())
    for each in (thread, again):
        expected = hashlib.sha1(data + bytes(after) + bytes(last)).digest()
        assert each.digest(bytes(last)) == expected


@given(data=st.binary(max_size=300))
def test_short_thread_that_was_stored_goes_on(data):
    thread = Sha1Thread.from_bytes(Sha1Thread().fed(data).to_bytes())
    assert thread.digest(b"end") == hashlib.sha1(data + b"end").digest()


@pytest.mark.parametrize(
    "stored",
    [b"", bytes(27), bytes(28 + SINCE_BYTES_MAX + 1), (63).to_bytes(8, "big") + bytes(20)],
    ids=["empty", "short", "long", "not after whole blocks"],
)
def test_what_was_never_stored_is_refused(stored):
    with pytest.raises(ValueError, match="SHA-1"):
        Sha1Thread.from_bytes(stored)
