"""A system that has no thread for us: what asked for one ends or waits, and the daemon goes on."""

import socket
import threading
from functools import partial

import pytest
import trio

from daemons import service
from daemons.carrying import carry
from daemons.listeners import Kind, connect, listen
from daemons.service import serve
from daemons.threads import NoThread, run_in_thread
from tests.daemons.test_watchdog import Heard, nobody

MORE_THAN_ARE_IDLE = 40
"""trio keeps worker threads for a while; these at once take more than there can be."""


@pytest.fixture
def no_new_thread(monkeypatch):
    """No thread can be started until the function that is returned is called."""

    def refuse(_thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        yield patch.undo


async def test_lack_of_threads_is_a_failure_with_its_reason_and_nothing_is_begun(no_new_thread):
    release, begun, refused = threading.Event(), [], []
    limiter = trio.CapacityLimiter(MORE_THAN_ARE_IDLE)

    def work():
        begun.append(1)
        release.wait()

    async def ask():
        try:
            await run_in_thread(work, limiter=limiter)
        except NoThread as failure:
            refused.append(failure)

    async with trio.open_nursery() as nursery:
        for _ in range(MORE_THAN_ARE_IDLE):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.05)
        release.set()
    assert refused
    assert len(begun) + len(refused) == MORE_THAN_ARE_IDLE
    assert refused[0].why == "can't start new thread"
    assert limiter.borrowed_tokens == 0
    no_new_thread()
    assert await run_in_thread(lambda: "done") == "done"


async def test_error_of_the_work_itself_is_no_lack_of_threads():
    def work():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        await run_in_thread(work)


async def test_connection_without_a_thread_ends_and_the_others_are_served(tmp_path, no_new_thread):
    limiter = trio.CapacityLimiter(MORE_THAN_ARE_IDLE * 2)

    async def handler(connection):
        raw = socket.socket(fileno=connection.socket.detach())
        raw.setblocking(True)

        def echo():
            while message := raw.recv(10):
                raw.send(message)

        with raw:
            await carry(raw, echo, connection.stopping, limiter=limiter, thread_name="echo")

    async def is_served(near):
        await trio.testing.wait_all_tasks_blocked(0.02)  # the daemon runs in this thread, too
        near.settimeout(5)
        try:
            near.send(b"x")
            return near.recv(10) == b"x"
        except ConnectionError:
            return False

    async with trio.open_nursery() as nursery:
        path = tmp_path / "s"
        await nursery.start(partial(serve, handler, [listen(path, Kind.SEQPACKET)]))
        clients = [connect(path, Kind.SEQPACKET) for _ in range(MORE_THAN_ARE_IDLE)]
        served = [await is_served(client) for client in clients]
        assert not all(served)
        no_new_thread()
        with connect(path, Kind.SEQPACKET) as late:
            assert await is_served(late)
        for client, was_served in zip(clients, served, strict=True):
            assert not was_served or await is_served(client)
            client.close()
        nursery.cancel_scope.cancel()


async def test_watchdog_without_a_thread_asks_again(monkeypatch):
    lack = [NoThread("cannot start a thread", why="none", next_step="wait")] * 2

    async def sometimes(work, **options):
        if lack:
            raise lack.pop()
        return await run_in_thread(work, **options)

    monkeypatch.setattr(service, "run_in_thread", sometimes)
    heard = Heard()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, nobody, [], notifier=heard, is_alive=lambda: None))
        await heard.until(1, "WATCHDOG")
        nursery.cancel_scope.cancel()
    assert lack == []
