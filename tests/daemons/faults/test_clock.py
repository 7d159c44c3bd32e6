"""Clocks that go wrong, under a real TPM: what it shows and how long it locks out."""

import hashlib
import os
import signal

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.faults.clock import ClockState, faulty, shown_us
from daemons.faults.control import FaultControl
from daemons.faults.hooks import hooks_of
from daemons.faults.plan import Fault, Place, What
from daemons.places import Places
from daemons.world import SteadyClock
from protocol.constants import KeyHandleValue, Ordinal
from protocol.return_codes import ReturnCode, TpmError
from tests.tpm12.conftest import CountingRng, PooledPrimes
from tpm12.client import TpmClient
from tpm12.commands import ALL
from tpm12.profile import VTPM

DOMAIN = "vtpm-guest1"
HOUR_US = 3_600_000_000
READINGS = 5


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def control(places):
    with FaultControl(places, [DOMAIN]) as made:
        yield made


def clock_fault(what, more, *, when="nth = 1", where=f"clock {DOMAIN}"):
    return f'[[fault]]\nwhere = "{where}"\nwhat = "{what}"\n{more}\n{when}\n'.encode()


def clock_of(places):
    return hooks_of(places, DOMAIN).clock()


class NoStore:
    """Keeps nothing, as a TPM's that is only looked at."""

    def load(self):
        return None

    def save(self, permanent):
        pass


def tpm_on(clock):
    durable = DurableTpm(
        NoStore(),
        profile=VTPM,
        commands=ALL,
        rng=StirredRng(b"clock"),
        key_generator=PooledPrimes(),
        clock=clock,
    )
    durable.power_on_and_start()
    return TpmClient(lambda request: durable.execute(request, 0), rng=CountingRng(b"client"))


class StirredRng(CountingRng):
    def stir(self, data):
        pass


def ticks(tpm):
    return tpm.call(Ordinal.GET_TICKS).current_time.current_ticks


# -- what a clock shows ----------------------------------------------------------------------------


def fault(what, **how):
    return Fault(number=1, where=Place("clock", DOMAIN), what=what, nth=1, **how)


def test_a_clock_shows_what_happened_to_it():
    right = ClockState()
    assert shown_us(right, 10**9) == 10**9
    ahead = faulty(right, fault(What.JUMP, by_s=2.5), 10**9)
    assert shown_us(ahead, 10**9) == 10**9 + 2_500_000
    stopped = faulty(ahead, fault(What.STOP, for_s=3), 10**9)
    for passed_us, behind_us in (
        (0, 0),
        (10**6, 10**6),
        (3 * 10**6, 3 * 10**6),
        (10**7, 3 * 10**6),
    ):
        true_us = 10**9 + passed_us
        assert shown_us(stopped, true_us) == true_us + 2_500_000 - behind_us
    fast = faulty(stopped, fault(What.DRIFT, for_s=1, speed=3.0), 10**9 + 10**7)
    assert shown_us(fast, 10**9 + 10**7) == shown_us(stopped, 10**9 + 10**7)
    assert shown_us(fast, 10**9 + 2 * 10**7) == 10**9 + 2 * 10**7 - 500_000 + 2_000_000
    back = faulty(fast, fault(What.JUMP, by_s=-1), 10**9 + 2 * 10**7)
    assert shown_us(back, 10**9 + 2 * 10**7) == 10**9 + 2 * 10**7 + 500_000


# -- a TPM by such a clock -------------------------------------------------------------------------


@pytest.mark.parametrize("by_s", [3600, -3600])
def test_ticks_never_go_back_and_follow_a_jump_forward(places, control, by_s):
    tpm = tpm_on(clock_of(places))
    before = ticks(tpm)
    control.arm(clock_fault("jump", f"by_s = {by_s}", when="nth = 2"))
    shown = [ticks(tpm) for _ in range(READINGS)]
    assert shown == sorted(shown)
    assert (shown[-1] - before >= HOUR_US) == (by_s > 0)
    (line,) = control.new_lines()
    assert (line["what"], line["operation"]) == ("jump", 2)


def test_without_the_guard_ticks_would_go_back(places, control):
    """The control: the clock below does step back."""
    clock = clock_of(places)
    before = clock.now_us()
    control.arm(clock_fault("jump", "by_s = -3600"))
    assert clock.now_us() < before
    steady = SteadyClock(clock, before)
    assert steady.now_us() == before
    assert steady.now_us() > before, "time goes on from where it was"


def test_a_clock_that_stops_and_one_that_is_fast(places, control):
    tpm = tpm_on(clock_of(places))
    control.arm(clock_fault("stop", "for_s = 60"))
    assert len({ticks(tpm) for _ in range(READINGS)}) == 1
    control.arm(clock_fault("drift", "for_s = 60\nspeed = 1000"))
    control.arm(clock_fault("jump", "by_s = 0.001"))
    shown = [ticks(tpm) for _ in range(READINGS)]
    assert shown == sorted(shown)


def test_a_clock_is_as_it_was_in_the_process_that_follows(places, control):
    control.arm(clock_fault("jump", "by_s = 3600"))
    child = os.fork()
    if not child:
        clock_of(places).now_us()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    true = SteadyClock(hooks_of(places, "vtpm-guest2").clock())
    assert clock_of(places).now_us() - true.now_us() > HOUR_US // 2


def lock_out(tpm):
    """Guess until the TPM answers nothing with authorization; the number of the guesses."""
    for guess in range(1, 100):
        secret = hashlib.sha1(bytes([guess]), usedforsecurity=False).digest()
        try:
            tpm.owner_clear(secret)
        except TpmError as error:
            if error.code is ReturnCode.DEFEND_LOCK_RUNNING:
                return guess
    raise AssertionError("it takes every guess")


def is_locked_out(tpm):
    try:
        tpm.owner_read_internal_pub(KeyHandleValue.SRK)
    except TpmError as error:
        return error.code is ReturnCode.DEFEND_LOCK_RUNNING
    return False


@pytest.mark.parametrize(("by_s", "is_locked"), [(24 * 3600, False), (-24 * 3600, True)])
def test_lockout_ends_by_the_tpm_s_clock_and_not_before(places, control, by_s, is_locked):
    tpm = tpm_on(clock_of(places))
    tpm.create_endorsement_key_pair()
    tpm.take_ownership()
    lock_out(tpm)
    control.arm(clock_fault("jump", f"by_s = {by_s}"))
    assert is_locked_out(tpm) == is_locked


def test_lockout_without_a_fault_lasts(places):
    tpm = tpm_on(clock_of(places))
    tpm.create_endorsement_key_pair()
    tpm.take_ownership()
    lock_out(tpm)
    assert is_locked_out(tpm)


def test_the_clock_of_the_machine_is_everybody_s(places, control):
    control.arm(clock_fault("jump", "by_s = 3600", where="clock"))
    hooks = hooks_of(places, DOMAIN)
    before = clock_of(places).now_us()
    assert hooks.monotonic_s() * 1e6 - before < HOUR_US
    (line,) = control.new_lines()
    assert line["where"] == "clock"
