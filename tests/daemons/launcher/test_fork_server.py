"""The fork server with real processes: what a child gets, what is reported, what survives whom."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from daemons.errors import Failure
from daemons.launcher import spawner as spawner_module
from daemons.launcher.fork_server import (
    PACKET_BYTES_MAX,
    UNBORN_EXIT_STATUS,
    Order,
    encode_spawn,
)
from daemons.launcher.processes import become_child_subreaper, is_alive, pss_kib_of, send_signal
from daemons.launcher.spawner import SERVERS_AT_ONCE_MAX, Spawner, open_log
from daemons.listeners import start_time_of

FAKES = Path(__file__).parents[2] / "fakes"
PROGRAMS = {
    name: f"fake_daemons:{name}"
    for name in ("measured", "exiting", "inspecting", "waiting", "stubborn", "breeding")
} | {"missing": "no_such_module:main"}
DEADLINE_S = 20


class Room:
    """A spawner with a log and a story to read."""

    def __init__(self, directory: Path, spawner: Spawner) -> None:
        self.spawner = spawner
        self.log = directory / "child.log"
        self.story_file = directory / "story"

    async def spawn(self, program: str, *argv: str, title: str = "fake", oom: int = 0):
        environment = {"FAKE_STORY": str(self.story_file)}
        order = Order(
            program=program, argv=argv, environment=environment, title=title, oom_score_adj=oom
        )
        with open_log(self.log, 1 << 20) as log:
            return await self.spawner.spawn(order, log, log)

    async def run(self, program: str, *argv: str) -> int | None:
        child = await self.spawn(program, *argv)
        child.release()
        return await child.wait()

    def story(self) -> list[dict]:
        return [json.loads(line) for line in self.story_file.read_text().splitlines()]

    async def until_story_has(self, lines: int) -> None:
        await until(lambda: self.story_file.exists() and len(self.story()) >= lines)


async def until(is_so: Callable[[], bool]) -> None:
    """Wait for another process, which has no way to tell; each test has a deadline around it."""
    while not is_so():  # noqa: ASYNC110 - see above
        await trio.sleep(0.001)


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@asynccontextmanager
async def spawning(directory: Path):
    environment = dict(os.environ, PYTHONPATH=str(FAKES))
    spawner = Spawner(PROGRAMS, title="fork server of a test", environment=environment)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            spawner.start()
            nursery.start_soon(spawner.run)
            yield Room(directory, spawner)
            spawner.close()


async def test_child_has_what_a_daemon_needs_and_nothing_of_its_parents(tmp_path):
    async with spawning(tmp_path) as room:
        child = await room.spawn("inspecting", title="vtpmd vtpm-guest1")
        child.release()
        assert await child.wait() == 0
        (seen,) = room.story()
        assert seen["sid"] == seen["pgid"] == child.pid
        assert seen["ppid"] == room.spawner.server_pid
        assert seen["environment"] == {"FAKE_STORY": str(room.story_file)}
        assert seen["core"] == 0
        assert seen["cmdline"] == "vtpmd vtpm-guest1"
        assert seen["threads"] == 1
        assert seen["term"]
        assert seen["hup"]
        assert seen["child"]
        sockets = [place for place in seen["descriptors"] if place.startswith(("socket", "pipe"))]
        assert sockets == []
        assert room.log.read_text() == "standard output\n"


async def test_two_children_draw_different_random_numbers(tmp_path):
    async with spawning(tmp_path) as room:
        await room.run("inspecting")
        await room.run("inspecting")
        first, second = room.story()
        assert first["number"] != second["number"]


async def test_child_does_nothing_before_it_is_released(tmp_path):
    async with spawning(tmp_path) as room:
        held = await room.spawn("measured")
        assert await room.run("measured", "later") == 0
        assert [entry["argv"] for entry in room.story()] == [["later"]]
        held.release()
        assert await held.wait() == 0
        assert [entry["argv"] for entry in room.story()] == [["later"], []]


async def test_child_whose_gate_closes_ends_unborn(tmp_path):
    async with spawning(tmp_path) as room:
        child = await room.spawn("measured")
        child.close_gate()
        assert await child.wait() == UNBORN_EXIT_STATUS
        assert not room.story_file.exists()


@pytest.mark.parametrize("status", [0, 1, 78])
async def test_exit_status_is_reported(tmp_path, status):
    async with spawning(tmp_path) as room:
        assert await room.run("exiting", str(status)) == status
        assert "last words" in room.log.read_text()


async def test_killing_signal_is_reported_as_its_negative_number(tmp_path):
    async with spawning(tmp_path) as room:
        child = await room.spawn("stubborn")
        child.release()
        child.signal(signal.SIGKILL)
        assert await child.wait() == -signal.SIGKILL


async def test_what_a_child_leaves_in_its_group_is_killed(tmp_path):
    async with spawning(tmp_path) as room:
        assert await room.run("breeding") == 0
        (seen,) = room.story()
        await until(lambda: not is_there(seen["child"]))  # the server reaps it, as its subreaper


@pytest.mark.parametrize(
    ("program", "reason"), [("missing", "no_such_module"), ("unknown", "no program 'unknown'")]
)
async def test_program_that_cannot_run_is_refused_with_the_reason(tmp_path, program, reason):
    async with spawning(tmp_path) as room:
        with pytest.raises(Failure, match=reason):
            await room.spawn(program)
        assert await room.run("measured") == 0  # and the next order is served


@pytest.mark.parametrize(
    ("warm", "reason"),
    [
        ("broken_warm_up", r"it ended before .* \(status 1\): RuntimeError: it does not get warm"),
        ("suicidal_warm_up", r"it ended 3 times before .* \(killed by signal 9\): it said nothing"),
    ],
)
async def test_fork_server_that_cannot_start_fails_all_orders_at_once_with_its_reason(
    tmp_path, capfd, warm, reason
):
    environment = dict(os.environ, PYTHONPATH=str(FAKES))
    spawner = Spawner(
        PROGRAMS, title="broken", environment=environment, warm=f"fake_daemons:{warm}"
    )
    refused: list[Failure] = []

    async def order() -> None:
        with trio.CancelScope(shield=True):  # as the launcher does
            with pytest.raises(Failure) as raised:
                await Room(tmp_path, spawner).spawn("measured")
            refused.append(raised.value)

    async def launcher() -> None:
        async with trio.open_nursery() as nursery:
            spawner.start()
            nursery.start_soon(spawner.run)
            nursery.start_soon(order)

    with trio.fail_after(10), pytest.raises(ExceptionGroup) as ended:  # a spawn has 15 s
        await launcher()
    assert ended.group_contains(Failure, match=reason)
    (failure,) = refused
    assert re.search(reason, failure.why)
    if warm == "broken_warm_up":
        assert "first words\n" in capfd.readouterr().err  # nothing of it is lost


async def test_fork_server_writes_to_the_launchers_stderr_once_it_is_ready(tmp_path):
    async with spawning(tmp_path) as room:
        await room.spawner.ready()
        server = room.spawner.server_pid
        assert os.stat(f"/proc/{server}/fd/2").st_ino == os.fstat(2).st_ino  # noqa: PTH116


async def test_child_survives_its_fork_server_and_its_end_is_still_seen(tmp_path):
    become_child_subreaper()
    async with spawning(tmp_path) as room:
        child = await room.spawn("waiting")
        child.release()
        await room.until_story_has(1)
        first = room.spawner.server_pid
        os.kill(first, signal.SIGKILL)
        assert await room.run("measured", "by the next server") == 0
        assert room.spawner.server_pid != first
        assert is_alive(child.pid, child.start_time)
        child.signal(signal.SIGTERM)
        assert await child.wait() == 0
        assert room.story()[-1]["event"] == "stopped"


async def test_fork_server_that_is_killed_again_and_again_is_replaced_each_time(tmp_path):
    """Each of these has not been ready yet. Nobody's daemons may stay away because of it."""
    async with spawning(tmp_path) as room:
        await room.spawner.ready()
        killed = set()
        while len(killed) < 2 * SERVERS_AT_ONCE_MAX:
            pid = room.spawner.server_pid
            if pid is not None and pid not in killed:
                killed.add(pid)
                os.kill(pid, signal.SIGKILL)
            await trio.sleep(0.001)
        assert await room.run("exiting", "0") == 0


async def test_order_outlives_fork_servers_that_are_killed_for_longer_than_its_deadline(
    tmp_path, monkeypatch
):
    """The deadline is for one that is silent; whoever follows one that was killed has it anew."""
    async with spawning(tmp_path) as room:
        await room.spawner.ready()
        monkeypatch.setattr(spawner_module, "SPAWN_DEADLINE_S", 3.0)
        begun, killed, statuses = trio.current_time(), set(), []

        async def order() -> None:
            statuses.append(await room.run("exiting", "0"))

        os.kill(room.spawner.server_pid, signal.SIGSTOP)  # so that it answers nothing meanwhile
        async with trio.open_nursery() as ordering:
            ordering.start_soon(order)
            while trio.current_time() - begun < 4.0:
                pid = room.spawner.server_pid
                if pid is not None and pid not in killed:
                    killed.add(pid)
                    await trio.sleep(0.02)
                    os.kill(pid, signal.SIGKILL)
                await trio.sleep(0.001)
        assert statuses == [0]
        assert len(killed) > 1


async def test_fork_server_stays_until_its_last_child_has_ended(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(FAKES))
    spawner = Spawner(PROGRAMS, title="fork server of a test", environment=environment)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            spawner.start()
            nursery.start_soon(spawner.run)
            room = Room(tmp_path, spawner)
            child = await room.spawn("waiting")
            child.release()
            await room.until_story_has(1)
            server = spawner.server_pid
            os.kill(server, signal.SIGTERM)  # a signal meant for the launcher does not stop it
            spawner.close()
            assert is_alive(server, start_time_of(server))
            child.signal(signal.SIGTERM)
        assert await child.wait() == 0
    assert not is_there(server)


async def test_child_that_is_told_to_stop_as_soon_as_it_is_there_stops(tmp_path):
    async with spawning(tmp_path) as room:
        for _ in range(20):
            child = await room.spawn("waiting")
            child.signal(signal.SIGTERM)
            child.release()
            assert await child.wait() in {0, -signal.SIGTERM}


async def test_abandoned_fork_server_ends_at_once_but_for_its_children(tmp_path):
    environment = dict(os.environ, PYTHONPATH=str(FAKES))
    unused = Spawner(PROGRAMS, title="unused", environment=environment)
    unused.start()
    server = unused.server_pid
    unused.abandon()
    assert not is_there(server)
    unused.abandon()  # nothing is left to do

    used = Spawner(PROGRAMS, title="used", environment=environment)
    with trio.fail_after(DEADLINE_S):
        async with trio.open_nursery() as nursery:
            used.start()
            nursery.start_soon(used.run)
            child = await Room(tmp_path, used).spawn("waiting")
            child.release()
            server = used.server_pid
            nursery.cancel_scope.cancel()
        used.abandon()
        assert is_alive(server, start_time_of(server))
        assert is_alive(child.pid, child.start_time)
        child.signal(signal.SIGKILL)
        await until(lambda: os.waitpid(server, os.WNOHANG) == (server, 0))


async def test_spawn_is_quick_and_a_child_is_small(tmp_path):
    async with spawning(tmp_path) as room:
        await room.run("measured")  # by now everything is imported
        delays_ms = []
        for _ in range(10):
            before = time.monotonic_ns()
            assert await room.run("measured") == 0
            delays_ms.append((room.story()[-1]["at_ns"] - before) / 1e6)
        child = await room.spawn("waiting")
        child.release()
        await room.until_story_has(12)
        pss_kib = pss_kib_of(child.pid)
        child.signal(signal.SIGTERM)
        assert await child.wait() == 0
        # A fresh interpreter with these imports takes 100 ms and 23 MB; the bounds leave room for a
        # busy machine.
        assert sorted(delays_ms)[5] < 30
        assert pss_kib < 12_000


def test_signal_does_not_reach_a_later_process_with_the_same_number():
    assert not send_signal(os.getpid(), start_time_of(os.getpid()) + 1, signal.SIGKILL)
    assert not is_alive(os.getpid(), start_time_of(os.getpid()) + 1)


def test_a_thread_s_number_is_no_process():
    ended = threading.Event()
    thread = threading.Thread(target=ended.wait)
    thread.start()
    try:
        number = thread.native_id
        assert start_time_of(number) is not None
        assert not is_alive(number, start_time_of(number))
        assert not send_signal(number, start_time_of(number), signal.SIGKILL)
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("reads", [False, True], ids=["nobody reads", "somebody reads"])
def test_fifo_in_the_place_of_a_log_is_refused_and_holds_nobody_up(tmp_path, reads):
    place = tmp_path / "a.log"
    os.mkfifo(place)
    reader = os.open(place, os.O_RDONLY | os.O_NONBLOCK) if reads else None
    try:
        with pytest.raises(Failure, match="cannot open the log"):
            open_log(place, 10)
    finally:
        if reader is not None:
            os.close(reader)


def test_log_that_has_grown_too_long_is_put_aside(tmp_path):
    place = tmp_path / "a.log"
    place.write_bytes(b"x" * 11)
    with open_log(place, 10) as log:
        log.write(b"new")
    assert place.read_bytes() == b"new"
    assert (tmp_path / "a.log.1").read_bytes() == b"x" * 11


def test_log_that_is_a_symlink_is_refused(tmp_path):
    (tmp_path / "a.log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Failure, match="cannot open the log"):
        open_log(tmp_path / "a.log", 10)
    assert not (tmp_path / "elsewhere").exists()


def test_environment_that_is_too_long_for_an_order_is_named():
    environment = {"PATH": "/bin:" * (PACKET_BYTES_MAX // 5), "HOME": "/"}
    order = Order(program="waiting", environment=environment, title="vtpmd vtpm-guest1")
    with pytest.raises(Failure, match="shorter PATH") as refused:
        encode_spawn(1, order)
    assert refused.value.what == "cannot start vtpmd vtpm-guest1"


async def test_lack_of_descriptors_for_the_next_fork_server_is_waited_out(tmp_path, monkeypatch):
    monkeypatch.setattr(spawner_module, "START_RETRY_S", 0.01)
    memfd_create, lacks = os.memfd_create, 3

    def sometimes(name):
        nonlocal lacks
        if lacks:
            lacks -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return memfd_create(name)

    async with spawning(tmp_path) as room:
        await room.spawner.ready()
        server, before = room.spawner.server_pid, open_descriptors()
        monkeypatch.setattr(os, "memfd_create", sometimes)
        os.kill(server, signal.SIGKILL)
        assert await room.run("measured") == 0
        assert lacks == 0
        assert room.spawner.server_pid != server
        assert open_descriptors() <= before + 1  # nothing of the tries is left


async def test_child_that_could_not_be_told_from_a_later_one_ends_unborn(tmp_path, monkeypatch):
    """By its start time it is known to everybody that it connects to."""

    def lacking(pid):
        pids.append(pid)
        raise OSError(errno.EMFILE, "Too many open files")

    pids = []
    async with spawning(tmp_path) as room:
        await room.spawner.ready()
        with monkeypatch.context() as lack:
            lack.setattr(spawner_module, "start_time_of", lacking)
            with pytest.raises(OSError, match="Too many open files"):
                await room.spawn("measured")
        (pid,) = pids
        await until(lambda: not is_there(pid))
        assert not room.story_file.exists()
        assert await room.run("measured") == 0
