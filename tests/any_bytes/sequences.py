"""Short sequences of commands, whatever their bytes are, as one byte string.

    state u8 | steps: mode u8, size u16, that many bytes of request

The state is one of `STATES`; its highest bit says that all is authorized. Of a mode, the lower
three bits are the locality, 0x08 asks for a paramSize that is right, 0x10 comes after TPM_Init and
0x20 makes time pass. A sequence says all there is to know of itself: found cases are kept in
`tests/vectors/corpus/engine/`, one file each.
"""

import struct
from contextlib import ExitStack
from unittest import mock

from tests.any_bytes.answers import check_outcome, stored
from tests.any_bytes.furnished import all_authorized
from tests.any_bytes.lattice import resized
from tests.tpm12.conftest import Bench, PooledPrimes
from tpm12.state_codec import decode_section
from tpm12.tpm import Tpm

STATES = (
    "before_startup", "started", "with_ek", "owned",
    "furnished", "disabled", "deactivated", "failed",
)  # fmt: skip
AUTHORIZED, REPAIRED, POWER_CYCLED, LATER = 0x80, 0x08, 0x10, 0x20
STEPS_MAX = 8
_LOCALITIES = 5
_SAVED_BYTES_MAX = 1 << 17
"""Far above what 28,672 bytes of NV, keys and tables come to."""
_STEP = struct.Struct(">BH")


class RememberedPrimes(PooledPrimes):
    """Makes primes that the pool has not once a process."""

    made = {}  # noqa: RUF012 - shared on purpose

    def primes(self, bits, exponent, /):
        if bits in self._pool:
            return super().primes(bits, exponent)
        if (bits, exponent) not in self.made:
            self.made[bits, exponent] = super().primes(bits, exponent)
        return self.made[bits, exponent]


def as_bytes(state, steps, *, is_authorized):
    """A sequence of (mode, request)."""
    head = bytes([STATES.index(state) | (AUTHORIZED if is_authorized else 0)])
    return head + b"".join(_STEP.pack(mode, len(request)) + request for mode, request in steps)


def steps_of(data):
    """The (mode, request) steps of a sequence; the last may be cut off."""
    at = 1
    for _ in range(STEPS_MAX):
        if at + _STEP.size > len(data):
            return
        mode, size = _STEP.unpack_from(data, at)
        at += _STEP.size
        yield mode, data[at : at + size]
        at += size


def run_sequence(data, states):
    """Run a sequence; give the return codes.

    Raises:
        AssertionError: A promise is broken.
        Exception: Whatever else a command ended in.
    """
    if not data:
        return []
    bench = Bench(states[STATES[(data[0] & ~AUTHORIZED) % len(STATES)]])
    bench.engine._world = _with_primes(bench.engine._world)
    with ExitStack() as around:
        around.enter_context(handles_in_order())
        if data[0] & AUTHORIZED:
            around.enter_context(all_authorized())
        codes = [_step(bench, *step) for step in steps_of(data)]
    check_saved(bench.state)
    return codes


def _step(bench, mode, request):
    if mode & POWER_CYCLED:
        bench.engine.keep(bench.engine.power_on())
    if mode & LATER:
        bench.clock.pass_s(3)
    if mode & REPAIRED and len(request) >= 10:
        request = resized(request)
    before = bench.state
    outcome = bench.engine.execute(request, (mode & 7) % _LOCALITIES)
    code = check_outcome(before, outcome)
    bench.engine.keep(outcome)
    return code


def check_saved(state):
    """What is saved is loaded as it was, and is not larger than a store has room for."""
    for name, saved in zip(("permanent", "stclear", "stany"), stored(state), strict=True):
        section = getattr(state, name)
        loaded = decode_section(type(section), saved)
        again = stored(_with(state, name, loaded))
        assert saved in again, f"{name} is another after it was loaded"
        assert len(saved) <= _SAVED_BYTES_MAX


def _with(state, name, section):
    sections = {each: getattr(state, each) for each in state.__slots__}
    return type(state)(**{**sections, name: section})


def _with_primes(world):
    values = {name: getattr(world, name) for name in world.__slots__}
    return type(world)(**{**values, "key_generator": RememberedPrimes()})


def handles_in_order():
    """New handles that a sequence can know beforehand: the lowest free from 0x05000000."""

    def new_handle(_tpm, *taken):
        handle = 0x05000000
        while any(handle in t for t in taken):
            handle += 1
        return handle

    return mock.patch.object(Tpm, "new_handle", new_handle)
