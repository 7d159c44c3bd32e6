"""kill -9 of anything while a guest extends a PCR of the chip: each measurement is made once.

The way is guest, vTPM, manager, chip. At random, with `--seed N` for other victims and moments; and
point by point: at each message of both rings, and at register accesses of the chip drawn from the
seed.
"""

import itertools
import random
import time

import pytest

from daemons.faults.control import FaultControl
from daemons.guest.tpm0_client import Tpm0Client
from daemons.places import CHIP_NAME
from tests.system.hardware_chain import ADMINISTRATORS, HardwareChain, extend_request
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    VTPM1,
    kill_and_wait,
    scratch_stack,
)
from tests.system.test_kill_anything import Killer

BUDGET_S = 4.0
VICTIMS = (VTPM1, MANAGER, CHIP_NAME)
ACCESSES = 8
"""How many register accesses are drawn; there are hundreds."""
COUNT_ONLY = b"# no faults\n"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def platform():
    """A platform whose guest1 may extend the chip's PCRs, with hooks for faults in all daemons."""
    with scratch_stack() as stack:
        stack.make_images(FIRST_CHAIN)
        stack.make_boot(GUEST1)
        stack.set("vtpmmgrd", ADMINISTRATORS)
        stack.places.prepare()
        with FaultControl(stack.places, VICTIMS) as control:
            stack.up(*FIRST_CHAIN)
            yield stack, control


def chain_of(stack, seed, kind=HardwareChain):
    return kind(stack.places.domain(GUEST1).tpm0, seed)


@pytest.mark.parametrize(
    "sets",
    [
        [(VTPM1,)],
        [(MANAGER,)],
        [(CHIP_NAME,)],
        [*itertools.combinations(VICTIMS, 2)],
        [(name,) for name in VICTIMS] + [VICTIMS],
    ],
    ids=["vTPM", "manager", "chip", "pairs", "any and all"],
)
def test_measurement_in_the_chip_is_made_once(platform, seed, sets):
    stack, _ = platform
    chain = chain_of(stack, seed)
    with Killer(stack, seed, sets, chain) as killer:
        chain.run(time.monotonic() + BUDGET_S)
    assert killer.failure is None, killer.failure
    assert len(killer.killed) > 3
    assert chain.rounds
    stack.until_running(*FIRST_CHAIN)


def test_measurement_in_the_chip_survives_a_kill_at_every_point(platform, seed):
    stack, control = platform
    chain = chain_of(stack, seed)
    chance = random.Random(seed)
    with Tpm0Client(chain.tpm0) as device:

        def measure_under(plan):
            control.arm(plan)
            chain.extend(device.exchange, chance.randbytes(20))
            return control.new_lines()

        assert measure_under(COUNT_ONLY) == []  # and all are connected
        assert measure_under(COUNT_ONLY) == []
        points = [
            (f"ring {name}", number)
            for name in (VTPM1, MANAGER)
            for number in range(1, control.counted(name, "ring") + 1)
        ]
        assert len(points) == 12, "two messages each for a read, an extend and a read"
        accesses = range(1, control.counted(CHIP_NAME, "tis") + 1)
        points += [("tis", number) for number in sorted(chance.sample(accesses, ACCESSES))]
        for where, number in points:
            plan = f'[[fault]]\nwhere="{where}"\nwhat="kill"\nnth={number}\n'
            found = [(line["where"], line["operation"]) for line in measure_under(plan.encode())]
            assert found == [(where, number)], (where, number)
            control.disarm()
            stack.until_running(*FIRST_CHAIN)
    assert chain.rounds == 2 + len(points)


def test_manager_with_a_damaged_journal_of_requests_does_not_start(platform, seed):
    stack, _ = platform
    measure_once(stack, seed)
    journal = stack.places.domain(MANAGER).requests
    stack.vtpm("pause", MANAGER)  # so that it is not back before its journal is damaged
    content = bytearray(journal.read_bytes())
    content[150] ^= 1
    with journal.open("r+b") as file:  # the same file: not a copy of it
        file.write(content)
    kill_and_wait(stack.pid(MANAGER))
    row = stack.until_state(MANAGER, "failed")
    assert f"cannot go on from journal {journal}" in row["state"]
    assert journal.read_bytes() == bytes(content), "what cannot be read stays as it is"
    journal.unlink()
    stack.vtpm("reboot", MANAGER)
    stack.until_running(*FIRST_CHAIN)
    measure_once(stack, seed)


def test_manager_without_its_journal_of_requests_serves(platform, seed):
    """What it does not know then is told by the name of its memory: see `test_ring.py`."""
    stack, _ = platform
    stack.vtpm("pause", MANAGER)
    stack.places.domain(MANAGER).requests.unlink()
    kill_and_wait(stack.pid(MANAGER))
    measure_once(stack, seed)
    stack.until_running(*FIRST_CHAIN)


def measure_once(stack, seed):
    chain = chain_of(stack, seed)
    with Tpm0Client(chain.tpm0) as device:
        chain.extend(device.exchange, random.Random(seed).randbytes(20))


class Faulty(HardwareChain):
    """A program whose chip does a measurement twice, or not at all."""

    fault = ""

    def exchange(self, device):
        def faulty(request):
            answer = device.exchange(request)
            if self.rounds == 2 and request[:10] == extend_request(b"")[:10]:
                if self.fault == "twice":
                    device.exchange(request)
                elif self.fault == "lost":
                    return self.last
            self.last = answer
            return answer

        return faulty


@pytest.mark.parametrize("fault", ["twice", "lost"])
def test_the_chain_would_notice(platform, seed, fault):
    """The control: without it, a chain that sees nothing would prove nothing."""
    stack, _ = platform
    chain = chain_of(stack, seed, Faulty)
    chain.fault = fault
    with pytest.raises(AssertionError, match=r"not one measurement|not what was answered"):
        chain.run(time.monotonic() + 30)
    assert chain.rounds == 2
