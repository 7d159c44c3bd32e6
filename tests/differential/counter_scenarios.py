"""Monotonic counters, the SHA-1 thread, random numbers."""

from tests.tpm12.makers import (
    AREA_AUTH,
    ET_COUNTER,
    ET_OWNER,
    WRONG,
)
from tests.tpm12.witness import (
    OWNER_AUTH,
    sized,
    u32,
)


def counters(log):
    """Create, count and release."""

    def create():
        log.note("create", _create(log))

    def say(step, ordinal, count_id, secret=AREA_AUTH, *, bound=False):
        tpm = log.rested()
        session = tpm.osap(ET_COUNTER, count_id, secret) if bound else tpm.oiap(secret)
        answer = tpm.auth(ordinal, u32(count_id), session)
        log.note(f"{step} {count_id}", answer)

    for _ in range(9):
        create()
    say("count", 0xDD, 3, WRONG)
    say("count", 0xDD, 9)
    for count_id in (3, 3, 4):
        say("count", 0xDD, count_id)
    say("count", 0xDD, 3, bound=True)
    say("release", 0xDF, 4, WRONG)
    say("release", 0xDF, 4)
    create()
    say("release", 0xE0, 5, OWNER_AUTH)
    say("release", 0xE0, 5, OWNER_AUTH)
    say("release", 0xDF, 6, bound=True)
    say("release", 0xDF, 3)
    log.note("none is active", log.tpm.send(0x65, u32(5) + sized(u32(0x122))))
    create()
    for count_id in (0, 3, 0xFFFFFFFE):
        say("count", 0xDD, count_id)
        log.note(f"read {count_id}", log.tpm.send(0xDE, u32(count_id)))


def _create(log):
    session = log.rested().osap(ET_OWNER, 0, OWNER_AUTH)
    return log.tpm.auth(0xDC, session.masked(AREA_AUTH) + b"cntr", session)


def hashing(log):
    """The SHA-1 thread, and random numbers."""
    start, update, complete, extend = (0xA0, b""), 0xA1, 0xA2, 0xA3
    steps = [
        (update, sized(b"d" * 64)), (complete, sized(b"")), start, (complete, sized(b"abc")),
        (complete, sized(b"")), start, (update, sized(b"d" * 64)), (complete, sized(b"d" * 64)),
        start, (update, sized(b"d" * 63)), (complete, sized(b"")), start,
        (update, sized(b"d" * 4032)), (complete, sized(b"")), start, (complete, sized(b"d" * 65)),
        (complete, sized(b"")), start, (extend, u32(12) + sized(b"abc")), start,
        (extend, u32(17) + sized(b"abc")), (complete, sized(b"")), start,
        (extend, u32(24) + sized(b"abc")), (complete, sized(b"")), start, (0xFFF, b""),
        (complete, sized(b"")), (0x15, u32(12)),
    ]  # fmt: skip
    for i, (ordinal, body) in enumerate(steps):
        log.note(f"{i}", log.tpm.send(ordinal, body))
    for size in (0, 1, 4082, 5000, 0xFFFFFFFF):
        log.note(f"random {size}", log.tpm.send(0x46, u32(size)))
    for size in (0, 255, 256, 4000):
        log.note(f"stir {size}", log.tpm.send(0x47, sized(b"d" * size)))


SCENARIOS = {"counters": ("owned", counters), "hashing": ("owned", hashing)}
