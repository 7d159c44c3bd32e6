"""A plan applied to a stack that starts: what a killed launcher means for who brings it up."""

import os
import signal
import subprocess
import threading
import time

import pytest

from daemons.errors import Failure
from daemons.faults import run as fault_run
from daemons.faults.plan import LAUNCHER, parse_plan
from daemons.faults.run import FaultRun
from daemons.launcher.domain import CHIP_DOMID
from daemons.listeners import start_time_of
from daemons.places import CHIP_NAME, DOMAIN0_NAME, Places
from daemons.registry import DomainRecord, RegistryWriter, Role

PLAN = b'[[fault]]\nwhere = "process launcher"\nwhat = "kill"\nat_s = 0.05\n'
ROLES = {LAUNCHER: Role.DOMAIN0.value, CHIP_NAME: Role.HWTPM.value}


class Launcher:
    """Processes that the registry names as the launcher, one after the other."""

    def __init__(self, places):
        self.places = places
        self.processes = []

    def start(self):
        process = subprocess.Popen(["sleep", "60"])
        self.processes.append(process)
        self._register(DOMAIN0_NAME, 0, Role.DOMAIN0, process.pid)

    def stop(self):
        self.processes[-1].kill()
        self.processes[-1].wait()

    def add_chip(self):
        """Beside it, or the stack would not be whole; this process stands for it."""
        self._register(CHIP_NAME, CHIP_DOMID, Role.HWTPM, os.getpid())

    def _register(self, name, domid, role, pid):
        record = DomainRecord(
            name=name,
            domid=domid,
            role=role,
            label="system_u:system_r:dom0_t",
            uid=os.geteuid(),
            pid=pid,
            start_time=start_time_of(pid),
        )
        RegistryWriter(self.places.registry).put(record)


@pytest.fixture
def launcher(tmp_path):
    places = Places.choose(str(tmp_path), {})
    places.prepare()
    launcher = Launcher(places)
    launcher.start()
    launcher.add_chip()
    yield launcher
    for process in launcher.processes:
        process.kill()
        process.wait()


def started(places, bring_up, monkeypatch, is_slow_s):
    """Apply `PLAN`, with a pause between the kill and whatever its author does next."""
    send_signal = fault_run.send_signal

    def send_and_be_slow(*process_and_signal):
        is_sent = send_signal(*process_and_signal)
        time.sleep(is_slow_s)
        return is_sent

    monkeypatch.setattr(fault_run, "send_signal", send_and_be_slow)
    row = {"state": "running", "pid": os.getpid(), "role": "domain0"}
    run = FaultRun(
        places=places,
        ask=lambda _: {"domains": [], "launcher": row, "chip": row},
        revive=lambda: pytest.fail("a start brings its launcher back itself"),
        tell=lambda _: None,
        step=lambda _: None,
    )
    run.start(parse_plan(PLAN, "plan"), PLAN, 0.2, bring_up, ROLES)
    return run


def gone():
    return Failure("the launcher is gone", why="it was killed", next_step="vtpm up")


def test_a_start_is_tried_again_though_its_failure_is_seen_before_the_kill_is_counted(
    launcher, monkeypatch
):
    tries = []

    def bring_up():
        tries.append(len(tries))
        if len(tries) == 1:
            assert launcher.processes[0].wait(10) == -signal.SIGKILL
            raise gone()
        launcher.start()

    run = started(launcher.places, bring_up, monkeypatch, is_slow_s=0.2)
    assert tries == [0, 1]
    assert [line.what for line in run.injected] == ["kill"]


def test_a_start_that_fails_by_itself_is_not_tried_again(launcher, monkeypatch):
    tries = []

    def bring_up():
        tries.append(len(tries))
        raise gone()

    started(launcher.places, bring_up, monkeypatch, is_slow_s=0)
    assert tries == [0]


def test_kills_that_are_due_while_the_launcher_is_being_started_are_not_made_up_for(launcher):
    """Else a run of half a second would go on for as many starts as it has kills."""
    starts = []

    def revive():
        launcher.processes[-1].wait(10)
        time.sleep(0.2)
        launcher.start()
        starts.append(len(starts))

    row = {"state": "running", "pid": os.getpid(), "role": "domain0"}
    run = FaultRun(
        places=launcher.places,
        ask=lambda _: {"domains": [], "launcher": row, "chip": row},
        revive=revive,
        tell=lambda _: None,
        step=lambda _: None,
    )
    plan = PLAN.replace(b"at_s", b"every_s")
    assert run.run(parse_plan(plan, "plan"), plan, "plan", 0.5) == []
    done = [line for line in run.injected if not line.note]
    assert len(done) == len(starts) <= 3
    assert len(run.injected) == 10
    assert {line.note for line in run.injected} == {"", "not done, it was being started"}


def test_who_is_hit_by_the_last_kill_after_all_was_seen_whole_is_no_problem(launcher):
    """A daemon that was about to die when the plan ended is back at once, as from each kill."""
    well = {"state": "running", "pid": os.getpid(), "role": "domain0"}
    states = iter(["running", "running", "waiting"])
    run = FaultRun(
        places=launcher.places,
        ask=lambda _: {
            "domains": [],
            "launcher": well,
            "chip": well | {"state": next(states, "waiting")},
        },
        revive=lambda: None,
        tell=lambda _: None,
        step=lambda _: None,
    )
    assert run.run(parse_plan(b"", "plan"), b"", "plan", 0.0) == []


@pytest.mark.parametrize("for_s", [0.1, 60])
def test_a_stack_that_is_taken_down_meanwhile_ends_the_run(launcher, for_s):
    """Nobody starts its launcher again: neither the plan nor the verdict waits for it."""
    plan = b'[[fault]]\nwhere = "process hwtpm"\nwhat = "kill"\nat_s = 50\n'
    row = {"state": "running", "pid": os.getpid(), "role": "domain0"}

    def ask(_):
        if launcher.processes[-1].poll() is not None:
            raise gone()
        return {"domains": [], "launcher": row, "chip": row}

    run = FaultRun(
        places=launcher.places,
        ask=ask,
        revive=lambda: pytest.fail("the plan has not killed it"),
        tell=lambda _: None,
        step=lambda _: None,
    )
    timer = threading.Timer(0.05, launcher.stop)
    timer.start()
    problems = run.run(parse_plan(plan, "plan"), plan, "plan", for_s)
    assert len(problems) == 1
    assert "taken down meanwhile" in problems[0]
