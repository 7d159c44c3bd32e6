"""A vTPM that is killed while the manager works for its guest: the request is carried out once."""

from functools import partial

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from daemons.ring_client import Sent
from daemons.volatile_memory import VolatileMemory
from daemons.vtpm.manager_link import ManagerLink
from daemons.vtpm.passed_on import PassedOn, finish_passing_on, pass_on
from daemons.vtpm.remembered_responses import remembered_responses
from protocol.return_codes import ReturnCode
from tpm12.commands import ALL
from tpm12.profile import VTPM

RING = "guest1/0"
EXTEND = bytes.fromhex("00c1000000220000001400000011") + b"m" * 20
PASSED = PassedOn(RING, 9, EXTEND)
DONE = bytes.fromhex("00c40000000e00000000") + b"DONE"
IOERROR = bytes.fromhex("00c40000000a") + ReturnCode.IOERROR.to_bytes(4, "big")


class Killed(BaseException):
    """The process ends here."""


class Store:
    permanent = None

    def load(self):
        return self.permanent

    def save(self, permanent):
        self.permanent = permanent


class Manager:
    """A ring to a manager that never dies; the vTPM may, at any step."""

    memory = "manager"

    def __init__(self):
        self.done = []
        self.dies_at = None
        self.number = 20

    def step(self, name):
        if self.dies_at == name:
            raise Killed

    def exchange(self, request, *, before_send=None):
        self.step("before the note")
        before_send(Sent(self.memory, self.number + 1))
        self.step("noted")
        self.number += 1
        self.done.append(request)
        self.step("done")
        return DONE

    def resume(self, request, sent, before_send):
        self.step("asked")
        if sent.memory != self.memory:
            raise Failure("forgotten", why="told to", next_step="none")
        if sent.sequence == self.number:
            return DONE
        return self.exchange(request, before_send=before_send)


@pytest.fixture
def vtpm(tmp_path):
    """Start the next process of one vTPM."""
    store = Store()

    def start():
        memory = VolatileMemory(tmp_path / "journal", "vtpm-guest1")
        tpm = DurableTpm(store, profile=VTPM, commands=ALL, memory=memory)
        if tpm.is_new:
            tpm.save_as_new()
        if not tpm.is_resumed:
            tpm.power_on_and_start()
        return tpm

    return start


def killed_at(vtpm, manager, *steps):
    """Pass a request on, and go on after each death; the process that lives at the end."""
    tpm = vtpm()
    remembered_responses(tpm)
    work = partial(pass_on, passed=PASSED)
    for step in steps:
        manager.dies_at = step
        with pytest.raises(Killed):
            work(tpm, ManagerLink(manager))
        work = finish_passing_on
        tpm = vtpm()
        assert tpm.is_resumed
    manager.dies_at = None
    finish_passing_on(tpm, ManagerLink(manager))
    return tpm


@pytest.mark.parametrize(
    "steps",
    [
        ["noted"],
        ["done"],
        ["noted", "asked"],
        ["noted", "noted"],
        ["noted", "done"],
        ["done", "asked"],
        ["noted", "noted", "done", "asked"],
    ],
    ids=" ".join,
)
def test_request_is_carried_out_once_and_its_response_is_there(vtpm, manager, steps):
    tpm = killed_at(vtpm, manager, *steps)
    responses = remembered_responses(tpm)
    assert manager.done == [EXTEND]
    assert (responses.last_sequence(RING), responses.get(RING, 9)) == (9, DONE)


@pytest.fixture
def manager():
    return Manager()


def test_request_that_was_not_noted_is_for_the_guest_to_submit_again(vtpm, manager):
    tpm = killed_at(vtpm, manager, "before the note")
    assert manager.done == []
    assert remembered_responses(tpm).last_sequence(RING) == 0


def test_next_process_has_the_response_of_one_that_was_answered(vtpm, manager):
    assert pass_on(vtpm(), ManagerLink(manager), PASSED) == DONE
    tpm = vtpm()
    manager.dies_at = "asked"
    finish_passing_on(tpm, ManagerLink(manager))
    assert remembered_responses(tpm).get(RING, 9) == DONE
    assert manager.done == [EXTEND]


def test_manager_that_forgot_is_an_input_output_error_and_nothing_is_done_twice(vtpm, manager):
    manager.dies_at = "done"
    with pytest.raises(Killed):
        pass_on(vtpm(), ManagerLink(manager), PASSED)
    manager.memory = "another"
    tpm = vtpm()
    finish_passing_on(tpm, ManagerLink(manager))
    assert remembered_responses(tpm).get(RING, 9) == IOERROR
    assert manager.done == [EXTEND]


def test_without_the_note_it_would_be_done_twice(vtpm, manager, monkeypatch):
    """The control: a vTPM that notes nothing does it again when its guest submits it again."""
    monkeypatch.setattr(DurableTpm, "remember", lambda *_: None)
    manager.dies_at = "done"
    with pytest.raises(Killed):
        pass_on(vtpm(), ManagerLink(manager), PASSED)
    manager.dies_at = None
    tpm = vtpm()
    finish_passing_on(tpm, ManagerLink(manager))
    pass_on(tpm, ManagerLink(manager), PASSED)
    assert manager.done == [EXTEND, EXTEND]
