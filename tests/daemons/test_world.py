"""Randomness from the kernel: in stock, but given once, and never to two processes."""

import os

from daemons.world import SystemRng


def test_random_bytes_have_their_size_and_come_once():
    rng = SystemRng()
    nonces = [rng.random(20) for _ in range(1000)]
    assert {len(nonce) for nonce in nonces} == {20}
    assert len(set(nonces)) == 1000
    assert [len(rng.random(size)) for size in (0, 1, 4, 19, 21, 32, 4096)] == [
        *(0, 1, 4, 19, 21, 32, 4096)
    ]


def test_part_of_a_nonce_takes_all_of_it():
    rng = SystemRng()
    heads = {rng.random(16) for _ in range(40)}
    assert heads.isdisjoint({rng.random(20)[:16] for _ in range(40)})


def test_a_forked_child_gets_none_of_its_parents_bytes():
    rng = SystemRng()
    rng.random(20)  # now there is a stock
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, b"".join(rng.random(20) for _ in range(40)))
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        seen = pipe.read()
    theirs = {seen[i : i + 20] for i in range(0, len(seen), 20)}
    assert len(theirs) == 40
    assert theirs.isdisjoint({rng.random(20) for _ in range(40)})
