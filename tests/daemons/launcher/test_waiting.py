"""Waiting for the end of a process that another one has started."""

import errno
import subprocess

import pytest
import trio

from daemons.launcher import waiting
from daemons.launcher.processes import open_process
from daemons.launcher.waiting import wait_for_end
from daemons.listeners import start_time_of


@pytest.fixture
def sleeper():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


async def test_end_is_waited_for(sleeper):
    with trio.move_on_after(0.1) as patience:
        await wait_for_end(sleeper.pid, start_time_of(sleeper.pid))
    assert patience.cancelled_caught
    sleeper.kill()
    with trio.fail_after(10):
        await wait_for_end(sleeper.pid)


async def test_another_process_with_the_number_is_not_waited_for(sleeper):
    with trio.fail_after(10):
        await wait_for_end(sleeper.pid, start_time_of(sleeper.pid) - 1)


@pytest.mark.usefixtures("autojump_clock")
async def test_lack_of_descriptors_is_waited_out(sleeper, monkeypatch):
    lacks = 3

    def open_sometimes(pid):
        nonlocal lacks
        if lacks:
            lacks -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return open_process(pid)

    monkeypatch.setattr(waiting, "open_process", open_sometimes)
    sleeper.kill()
    await wait_for_end(sleeper.pid)
    assert lacks == 0
    assert trio.current_time() > 0
