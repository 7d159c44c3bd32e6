"""Processes that faults have stopped, and when they go on."""

import subprocess
import time

import pytest

from daemons.faults.stopped import Stopped
from daemons.launcher.processes import is_stopped
from daemons.listeners import start_time_of

PATIENCE_S = 10.0


@pytest.fixture
def process():
    with subprocess.Popen(["sleep", "600"]) as victim:
        yield victim.pid, start_time_of(victim.pid)
        victim.kill()


def until(process, *, stopped):
    end = time.monotonic() + PATIENCE_S
    while is_stopped(process[0]) != stopped:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_who_is_stopped_by_two_faults_goes_on_after_the_second(process):
    with Stopped() as stopped:
        assert stopped.stop(1, process)
        assert stopped.stop(2, process)
        until(process, stopped=True)
        stopped.resume(1)
        time.sleep(0.1)
        assert is_stopped(process[0])
        stopped.resume(2)
        until(process, stopped=False)


def test_whoever_is_stopped_goes_on_at_the_end(process):
    with Stopped() as stopped:
        for fault in (1, 2):
            stopped.stop(fault, process)
        until(process, stopped=True)
    until(process, stopped=False)
