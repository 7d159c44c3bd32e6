"""A vTPM that is killed while it starts, or is reset for its guest: the next one goes on."""

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from daemons.volatile_memory import VolatileMemory
from daemons.vtpm.manager_link import ManagerLink
from daemons.vtpm.starting import reset, start
from daemons.xl.domain_arguments import StartupType, VtpmArguments
from tpm12.client import TpmClient
from tpm12.commands import ALL
from tpm12.profile import VTPM

ARGUMENTS = VtpmArguments(startup=StartupType.SAVE, hardware_init_pcrs=frozenset({3}))
SAVE_STATE = bytes.fromhex("00c10000000a00000098")
MARK = b"m" * 20
HARDWARE = b"h" * 20
POINTS = ["before the store", "after the store", "at the manager"]


class Killed(BaseException):
    """The process ends here."""


class World:
    """What outlives the processes of one vTPM: its store, and the manager behind its ring."""

    permanent = None
    dies_at = ""

    def step(self, name):
        if self.dies_at == name:
            raise Killed

    def load(self):
        return self.permanent

    def save(self, permanent):
        self.step("before the store")
        self.permanent = permanent
        self.step("after the store")

    def exchange(self, _request, *, before_send=None):
        del before_send
        self.step("at the manager")
        return bytes.fromhex("00c40000001e00000000") + HARDWARE

    resume = None


class Machine:
    """One vTPM over its processes."""

    def __init__(self, journal):
        self.world = World()
        self.journal = journal
        self.manager = ManagerLink(self.world)
        self.open()
        self.tpm.power_on_and_start()
        self.tpm.save_as_new()
        TpmClient(self.execute, rng=None).extend(8, MARK)
        self.saved = self.pcr(8)
        assert self.execute(SAVE_STATE)[6:10] == bytes(4)
        self.journal.unlink()  # the power goes
        self.open()

    def open(self):
        """Begin another process."""
        self.world.dies_at = ""
        memory = VolatileMemory(self.journal, "vtpm-guest1")
        self.tpm = DurableTpm(self.world, profile=VTPM, commands=ALL, memory=memory)

    def execute(self, request):
        return self.tpm.execute(request, 0)

    def pcr(self, index):
        return TpmClient(self.execute, rng=None).pcr_read(index)

    def start(self):
        start(self.tpm, ARGUMENTS, self.manager)

    def reset(self):
        reset(self.tpm, ARGUMENTS, self.manager)

    def killed_in(self, step, point):
        self.world.dies_at = point
        with pytest.raises(Killed):
            step()
        self.open()


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "journal")


def test_start_takes_up_the_state_that_was_saved_and_a_reset_does_not(machine):
    machine.start()
    assert (machine.pcr(8), machine.pcr(3)) == (machine.saved, HARDWARE)
    machine.reset()
    assert (machine.pcr(8), machine.pcr(3)) == (bytes(20), HARDWARE)


@pytest.mark.parametrize("point", POINTS)
def test_saved_state_is_taken_up_though_the_start_was_cut_short(machine, point):
    machine.killed_in(machine.start, point)
    machine.start()
    assert (machine.pcr(8), machine.pcr(3)) == (machine.saved, HARDWARE)


@pytest.mark.parametrize(
    ("has_saved", "point"),
    # Where nothing is saved, TPM_Startup stores nothing.
    [(False, "at the manager"), *((True, point) for point in POINTS)],
)
def test_reset_that_was_cut_short_is_no_start_with_saved_state(machine, point, has_saved):
    machine.start()
    if has_saved:
        assert machine.execute(SAVE_STATE)[6:10] == bytes(4)
    machine.killed_in(machine.reset, point)
    machine.start()
    assert (machine.pcr(8), machine.pcr(3)) == (bytes(20), HARDWARE)


def test_tpm_that_has_started_is_left_alone_by_the_next_process(machine):
    machine.start()
    TpmClient(machine.execute, rng=None).extend(9, MARK)
    before = machine.pcr(9)
    machine.open()
    machine.start()
    assert machine.pcr(9) == before != bytes(20)


def test_start_without_saved_state_fails_each_time(machine):
    machine.start()
    machine.journal.unlink()
    for _ in range(2):
        machine.open()
        with pytest.raises(Failure, match="did not start"):
            machine.start()
