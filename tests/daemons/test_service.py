"""The frame of a daemon: accepting, limits, signals, draining, and how it ends."""

import gc
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing

from daemons import heap, service
from daemons.errors import ExitCode, Failure
from daemons.listeners import Kind, connect, listen, start_time_of
from daemons.sd_notify import Notifier, listen_for_notifications, receive_notification
from daemons.service import ends_with_its_peer, run_daemon, serve
from protocol.return_codes import ReturnCode
from protocol.wire import DecodeError


@pytest.fixture
def place(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


def open_descriptors():
    gc.collect()  # what an earlier test has left to it may go at any moment
    return len(list(Path("/proc/self/fd").iterdir()))


async def echo(connection):
    while message := await connection.socket.recv(100):
        await connection.socket.send(message)


@asynccontextmanager
async def serving(handler, path, kind=Kind.SEQPACKET, **options):
    """A service until the end of the block, which may stop it with `stop(number)` before."""
    ended = trio.Event()

    async def run(task_status):
        await serve(handler, [listen(path, kind)], task_status=task_status, **options)
        ended.set()

    async def stop(number=signal.SIGTERM):
        signal.raise_signal(number)
        await ended.wait()

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            await nursery.start(run)
            yield stop
            nursery.cancel_scope.cancel()


def dial(path, kind=Kind.SEQPACKET):
    return trio.socket.from_stdlib_socket(connect(path, kind))


@pytest.mark.parametrize("kind", [Kind.STREAM, Kind.SEQPACKET])
async def test_connection_is_handled_with_the_peers_credentials(place, kind):
    seen = []

    async def handler(connection):
        seen.append(connection)
        await echo(connection)

    async with serving(handler, place / "s", kind):
        with dial(place / "s", kind) as near:
            await near.send(b"x")
            assert await near.recv(10) == b"x"
    assert seen[0].peer.pid == os.getpid()
    assert seen[0].peer.start_time == start_time_of(os.getpid())
    assert seen[0].connection_id == 1
    assert not list(place.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_stops_accepting_and_lets_open_connections_finish(place, number):
    async def handler(connection):
        await connection.stopping.wait()
        assert not (place / "s").exists()  # nobody new comes while we drain
        await connection.socket.send(b"finished")

    async with serving(handler, place / "s", drain_s=10) as stop:
        with dial(place / "s") as near:
            await trio.testing.wait_all_tasks_blocked()
            await stop(number)
            assert await near.recv(100) == b"finished"
            assert await near.recv(100) == b""


async def test_drain_ends_at_its_deadline(place, autojump_clock):
    ends = []

    async def handler(_):
        try:
            await trio.sleep_forever()
        finally:
            ends.append(autojump_clock.current_time())

    # A mock clock jumps while real sockets are under way, so nothing here is timed but the drain.
    listener = listen(place / "s", Kind.SEQPACKET)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, handler, [listener], drain_s=7))
        near = connect(place / "s", Kind.SEQPACKET)
        await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        stopped_at = autojump_clock.current_time()
        signal.raise_signal(signal.SIGTERM)
    near.close()
    assert ends == [stopped_at + 7]


async def test_service_manager_hears_ready_and_stopping(place):
    with listen_for_notifications(place / "notify.sock") as notices:
        notifier = Notifier(str(place / "notify.sock"))
        async with serving(echo, place / "s", notifier=notifier) as stop:
            assert receive_notification(notices.socket).fields == {"READY": "1"}
            await stop()
        assert receive_notification(notices.socket).fields == {"STOPPING": "1"}


async def test_excess_connections_are_closed_and_cost_the_others_nothing(place):
    async with serving(echo, place / "s", connections_max=2):
        first, second = dial(place / "s"), dial(place / "s")
        await first.send(b"1")
        assert await first.recv(10) == b"1"
        await second.send(b"2")
        assert await second.recv(10) == b"2"
        for _ in range(5):
            with dial(place / "s") as excess, suppress(ConnectionResetError):
                assert await excess.recv(10) == b""
        await first.send(b"3")
        assert await first.recv(10) == b"3"
        first.close()
        await trio.testing.wait_all_tasks_blocked()
        with dial(place / "s") as third:
            await third.send(b"4")
            assert await third.recv(10) == b"4"
        second.close()


@pytest.mark.usefixtures("autojump_clock")
async def test_memory_of_a_burst_of_connections_goes_back_once(place, monkeypatch):
    given_back = []
    monkeypatch.setattr(heap, "give_back", lambda: given_back.append(trio.current_time()))
    begun = trio.current_time()
    async with serving(echo, place / "s") as stop:
        for _ in range(20):
            with dial(place / "s"):
                pass
        await trio.testing.wait_all_tasks_blocked(0.05)
        await trio.sleep(5 * heap.GIVE_BACK_S)
        assert len(given_back) == 1
        with dial(place / "s"):
            pass
        await trio.testing.wait_all_tasks_blocked(0.05)
        await stop()
    assert len(given_back) == 2, "a stop gives back what is due"
    assert trio.current_time() - begun < 7 * heap.GIVE_BACK_S, "and does not wait for it"


async def test_descriptors_stay_flat_over_many_connections(place):
    async with serving(echo, place / "s"):
        counts = []
        for number in range(300):
            with dial(place / "s") as near:
                await near.send(b"x")
                assert await near.recv(10) == b"x"
            await trio.testing.wait_all_tasks_blocked()
            if number in {10, 299}:
                counts.append(open_descriptors())
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "fault",
    [
        DecodeError(ReturnCode.BAD_PARAMETER, "x"),
        ConnectionResetError(),
        BrokenPipeError(),
        TimeoutError(),
        trio.TooSlowError(),
        trio.BrokenResourceError(),
        KeyError("one more"),
        ExceptionGroup("", [ConnectionResetError(), TimeoutError()]),
    ],
)
async def test_peers_fault_ends_its_connection_alone(place, fault, capsys):
    @ends_with_its_peer(KeyError)
    async def handler(connection):
        if await connection.socket.recv(100) == b"fault":
            raise fault
        await connection.socket.send(b"served")

    async with serving(handler, place / "s"):
        with dial(place / "s") as bad:
            await bad.send(b"fault")
            assert await bad.recv(10) == b""
        with dial(place / "s") as good:
            await good.send(b"x")
            assert await good.recv(10) == b"served"
    capsys.readouterr()


async def test_our_own_bug_leaves_through_serve(place):
    @ends_with_its_peer()
    async def handler(_):
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with serving(handler, place / "s"):
            with dial(place / "s"):
                await trio.sleep_forever()
    assert not list(place.iterdir())


async def test_bug_beside_a_peers_fault_is_not_lost():
    @ends_with_its_peer()
    async def handler():
        raise ExceptionGroup("", [ConnectionResetError(), ZeroDivisionError()])

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        await handler()


async def test_lack_of_descriptors_is_waited_out(place, monkeypatch):
    """The first accept finds the table full; the connection is served when there is room."""
    with trio.socket.socket() as one:
        implementation = type(one)
    real_accept, tries = implementation.accept, []

    async def accept(self):
        tries.append(1)
        if len(tries) == 1:
            raise OSError(24, "Too many open files")
        return await real_accept(self)

    monkeypatch.setattr(implementation, "accept", accept)
    monkeypatch.setattr(service, "ACCEPT_RETRY_S", 0.001)
    async with serving(echo, place / "s"):
        with dial(place / "s") as near:
            await near.send(b"x")
            assert await near.recv(10) == b"x"
    assert len(tries) >= 2


# -- run_daemon: in processes of their own, for signals and exit codes are those of a process

DAEMON = """
import os, sys, trio
from functools import partial
from pathlib import Path
from daemons.errors import *
from daemons.listeners import *
from daemons.service import *
place = Path(sys.argv[2])
async def failing():
    raise Failure(
        "cannot open image x", why="it is blank", next_step="Make one.", exit_code=ExitCode.DAMAGED
    )
async def grouped():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failing)
async def mixed():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(failing)
        nursery.start_soon(buggy)
async def buggy():
    raise ZeroDivisionError("a bug")
async def interrupted():
    raise KeyboardInterrupt
async def exiting():
    raise SystemExit(3)
async def loading():
    try:
        print("loading", flush=True)
        await trio.sleep_forever()
    finally:
        print("unloaded", flush=True)
async def serving():
    async def handler(connection):
        await connection.socket.send(b"hello")
        await connection.stopping.wait()
        await connection.socket.send(b"bye")
    await serve(handler, [listen(place / "s", Kind.SEQPACKET)])
sys.exit(run_daemon("testd", globals()[sys.argv[1]]))
"""


def start_daemon(which, place, **environ):
    return subprocess.Popen(
        [sys.executable, "-c", DAEMON, which, str(place)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | environ,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.parametrize(
    ("which", "code"),
    [
        ("failing", ExitCode.DAMAGED),
        ("grouped", ExitCode.DAMAGED),
        ("mixed", ExitCode.BUG),
        ("buggy", ExitCode.BUG),
        ("interrupted", ExitCode.DONE),
        ("exiting", 3),
    ],
)
def test_end_of_a_daemon_gives_its_exit_code_and_says_why(which, code, place):
    with listen_for_notifications(place / "n") as notices:
        process = start_daemon(which, place, NOTIFY_SOCKET=str(place / "n"))
        written = process.communicate(timeout=30)[1].decode()
        assert process.returncode == code
        if code == ExitCode.DAMAGED:
            assert len(written.splitlines()) == 1
            assert 'cannot open image x why="it is blank" next_step="Make one."' in written
            status = receive_notification(notices.socket).fields["STATUS"]
            assert status == "cannot open image x: it is blank"
        if code == ExitCode.BUG:
            assert "Traceback" in written
            assert "ZeroDivisionError: a bug" in written
            assert "bug" in receive_notification(notices.socket).fields["STATUS"]
        if code == ExitCode.DONE:
            assert written == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_loading_is_a_clean_stop(number, place):
    process = start_daemon("loading", place)
    assert process.stdout.readline() == b"loading\n"
    process.send_signal(number)
    said, written = process.communicate(timeout=30)
    assert said == b"unloaded\n"
    assert process.returncode == ExitCode.DONE
    assert b"Traceback" not in written


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_serving_drains_and_leaves_nothing(number, place):
    with listen_for_notifications(place / "n") as notices:
        process = start_daemon("serving", place, NOTIFY_SOCKET=str(place / "n"))
        notices.socket.settimeout(30)
        assert receive_notification(notices.socket).fields == {"READY": "1"}
        with connect(place / "s", Kind.SEQPACKET) as near:
            near.settimeout(30)
            assert near.recv(10) == b"hello"
            process.send_signal(number)
            assert near.recv(10) == b"bye"
        process.communicate(timeout=30)
        assert process.returncode == ExitCode.DONE
    assert not list(place.iterdir())


def test_daemon_that_is_started_with_closed_streams_serves(place):
    """What it opens first would get their numbers, and its log would go into that."""
    words = [sys.executable, "-c", DAEMON, "serving", str(place)]
    with listen_for_notifications(place / "n") as notices:
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words],
            env=os.environ | {"NOTIFY_SOCKET": str(place / "n")},
            cwd=Path(__file__).parents[2],
        )
        notices.socket.settimeout(30)
        assert receive_notification(notices.socket).fields == {"READY": "1"}
        streams = [Path(f"/proc/{process.pid}/fd/{number}").readlink() for number in range(3)]
        assert streams == [Path(os.devnull)] * 3
        with connect(place / "s", Kind.SEQPACKET) as near:
            near.settimeout(30)
            assert near.recv(10) == b"hello"
            process.terminate()
            assert near.recv(10) == b"bye"
        assert process.wait(30) == ExitCode.DONE


def test_failure_before_logging_is_configured_still_reads_well(capsys):
    async def failing():
        raise Failure("x", why="y", next_step="z", exit_code=ExitCode.USAGE)

    assert run_daemon("testd", failing) == ExitCode.USAGE
    assert "testd x why=y next_step=z" in capsys.readouterr().err
