"""Threads and signals without trio: clients are served side by side, drained, and let go."""

import os
import signal
import socket
import threading

import pytest

from daemons.listeners import Kind, listen
from daemons.sd_notify import Notifier
from daemons.thread_service import STOPS, Door, Signals, ThreadService

WAIT_S = 20.0


class Running:
    """The service in the main thread, where signals come; the test acts in another."""

    def __init__(self, folder, serve_client, **options):
        self.path = folder / "sock"
        self.lines = []
        self.hang_ups = []
        self.is_stopping = threading.Event()
        door = Door(listen(self.path, Kind.STREAM), serve_client, **options)
        self._service = ThreadService([door], self._log)

    def _log(self, level, event, **values):
        self.lines.append((level, event, values))
        if event == "stopping":
            self.is_stopping.set()

    def connect(self):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(WAIT_S)
        client.connect(str(self.path))
        return client

    def run(self, act):
        failures = []

        def acting():
            try:
                act()
            except BaseException as error:  # noqa: BLE001 - raised again below
                failures.append(error)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)

        with Signals(STOPS | {signal.SIGHUP}) as signals:
            thread = threading.Thread(target=acting)
            thread.start()
            try:
                self._service.run(signals, Notifier(), lambda: self.hang_ups.append(None))
            finally:
                thread.join(WAIT_S)
        if failures:
            raise failures[0]


@pytest.fixture
def folder(tmp_path):
    tmp_path.chmod(0o700)
    return tmp_path


def echo(client, _pid):
    while data := client.recv(100):
        client.sendall(data)


def test_clients_are_served_side_by_side_until_a_signal(folder):
    running = Running(folder, echo)

    def act():
        with running.connect() as one, running.connect() as two:
            for client, data in ((one, b"1"), (two, b"2"), (one, b"3")):
                client.sendall(data)
                assert client.recv(10) == data

    running.run(act)
    assert not running.path.exists()
    assert running.lines[-1][:2] == ("info", "stopping")


def test_sighup_is_told_and_goes_on(folder):
    running = Running(folder, echo)

    def act():
        os.kill(os.getpid(), signal.SIGHUP)
        with running.connect() as client:
            client.sendall(b"x")
            assert client.recv(10) == b"x"

    running.run(act)
    assert running.hang_ups == [None]


def test_a_stop_lets_a_command_end_and_takes_no_more(folder):
    is_in_command = threading.Event()

    def slow(client, _pid):
        while data := client.recv(1):
            is_in_command.set()
            running.is_stopping.wait(WAIT_S)
            client.sendall(data)

    running = Running(folder, slow)
    client = None

    def act():
        nonlocal client
        client = running.connect()
        client.sendall(b"x")
        assert is_in_command.wait(WAIT_S)

    running.run(act)
    with client:
        assert client.recv(10) == b"x"
        assert client.recv(10) == b""


@pytest.mark.parametrize("fault", [TimeoutError("stalled"), ConnectionResetError()])
def test_a_clients_fault_costs_a_line_and_its_connection(folder, fault):
    def serve_client(client, pid):
        if client.recv(1) == b"!":
            raise fault
        echo(client, pid)

    running = Running(folder, serve_client)

    def act():
        with running.connect() as bad, running.connect() as good:
            bad.sendall(b"!")
            assert bad.recv(10) == b""
            good.sendall(b"ab")
            assert good.recv(10) == b"b"

    running.run(act)
    assert [line[1] for line in running.lines].count("connection ended by its peer") == 1


def test_a_bug_in_a_thread_ends_the_service(folder):
    def serve_client(_client, _pid):
        raise ZeroDivisionError("a bug")

    running = Running(folder, serve_client)

    def act():
        with running.connect() as client:
            assert client.recv(10) == b""

    with pytest.raises(ZeroDivisionError):
        running.run(act)


def test_more_clients_than_there_is_room_for_are_closed(folder):
    running = Running(folder, echo, clients_max=1)

    def act():
        with running.connect() as one:
            one.sendall(b"x")
            assert one.recv(10) == b"x"
            with running.connect() as two:
                assert two.recv(10) == b""

    running.run(act)
    assert ("error", "refused a client", {"reason": "too many are connected"}) in running.lines


def test_one_who_closes_and_comes_again_at_once_is_not_one_too_many(folder):
    """Also when the thread that serves it has not seen yet that it has gone."""
    has_gone = threading.Event()

    def slow_to_see(client, _pid):
        echo(client, 0)
        has_gone.wait(0.05)

    running = Running(folder, slow_to_see, clients_max=1)

    def act():
        for _ in range(3):
            with running.connect() as client:
                client.sendall(b"x")
                assert client.recv(10) == b"x"

    running.run(act)


def test_a_signal_that_came_before_ends_it_at_once(folder):
    running = Running(folder, echo)
    with Signals(STOPS | {signal.SIGHUP}) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        running._service.run(signals, Notifier(), lambda: None)
    assert not running.path.exists()


def test_client_without_a_thread_is_refused_and_the_others_are_served(folder, monkeypatch):
    running = Running(folder, echo)
    start = threading.Thread.start

    def no_room(thread):
        if thread.daemon:
            raise RuntimeError("can't start new thread")
        start(thread)

    def act():
        with running.connect() as one:
            one.sendall(b"1")
            assert one.recv(10) == b"1"
            with monkeypatch.context() as patched:
                patched.setattr(threading.Thread, "start", no_room)
                with running.connect() as two:
                    assert two.recv(1) == b""
            one.sendall(b"2")
            assert one.recv(10) == b"2"

    running.run(act)
    assert ("error", "refused a client", {"reason": "can't start new thread"}) in running.lines
