"""What was freed goes back to the system, also from under what is still in use."""

import ctypes
import os

import pytest

from daemons import heap
from tests.soak import baseline

BLOCKS, BLOCK_BYTES = 20_000, 2_000


def anonymous_bytes():
    return baseline.daemon(os.getpid()).anonymous_kib * 1024


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc"
)
def test_freed_memory_under_a_block_in_use_goes_back():
    blocks = [b"%d" % i * (BLOCK_BYTES // 5) for i in range(10_000, 10_000 + BLOCKS)]
    in_use = blocks[::500]  # none of the free runs ends the heap
    full = anonymous_bytes()
    del blocks
    kept = anonymous_bytes()
    assert kept > full - BLOCKS * BLOCK_BYTES / 4  # the control: the C library keeps it
    heap.give_back()
    assert anonymous_bytes() < kept - BLOCKS * BLOCK_BYTES / 2
    assert len(in_use) == BLOCKS / 500
