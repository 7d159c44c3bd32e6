"""What was freed goes back to the system, also from under what is still in use."""

from pathlib import Path

from daemons import heap

BLOCKS, BLOCK_BYTES = 20_000, 2_000


def anonymous_bytes():
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no such line")


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
