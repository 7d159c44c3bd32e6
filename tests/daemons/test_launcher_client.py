"""The blocking client against a server that is a few lines in a thread."""

from __future__ import annotations

import json
import socket
import threading
from contextlib import contextmanager

import pytest

from daemons.errors import ExitCode, Failure
from daemons.launcher_client import LauncherClient, StackNotUp
from daemons.listeners import Kind, listen
from daemons.places import Places


@pytest.fixture
def places(tmp_path):
    places = Places(tmp_path)
    places.prepare()
    return places


@contextmanager
def answering(places, *answers: bytes | None):
    """Answer each line with the next bytes; None closes the connection."""
    asked: list[dict] = []

    def serve(listener):
        connection, _ = listener.socket.accept()
        with connection, connection.makefile("rb") as lines:
            for answer in answers:
                asked.append(json.loads(lines.readline()))
                if answer is None:
                    return
                connection.sendall(answer)
            lines.read()

    with listen(places.launcher_socket, Kind.STREAM) as listener:
        server = threading.Thread(target=serve, args=(listener,))
        server.start()
        try:
            with LauncherClient(places) as client:
                yield client, asked
        finally:
            server.join()


def line(**message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def test_stack_that_is_not_up_is_named_with_the_next_step(places):
    with pytest.raises(StackNotUp, match=r"the stack is not up.*vtpm up") as raised:
        LauncherClient(places)
    assert raised.value.exit_code is ExitCode.UNAVAILABLE


def test_socket_that_a_dead_launcher_left_is_the_same(places):
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(places.launcher_socket))
    with pytest.raises(StackNotUp, match="vtpm up"):
        LauncherClient(places)


def test_call_gives_progress_and_result(places):
    told: list[str] = []
    answer = line(id=1, progress="making a key") + line(id=1, result={"domid": 3})
    with answering(places, answer) as (client, asked):
        assert client.call("create", told.append, path="/x", paused=None) == {"domid": 3}
    assert told == ["making a key"]
    assert asked == [{"id": 1, "method": "create", "params": {"path": "/x"}}]


def test_error_answer_is_raised_with_all_its_parts(places):
    error = {"what": "w", "why": "y", "next_step": "n", "exit_code": 66}
    with (
        answering(places, line(id=1, error=error)) as (client, _),
        pytest.raises(Failure) as raised,
    ):
        client.call("create")
    failure = raised.value
    assert (failure.what, failure.why, failure.next_step) == ("w", "y", "n")
    assert failure.exit_code is ExitCode.NO_INPUT


def test_late_answer_to_an_earlier_call_is_not_taken_for_this_one(places):
    with answering(places, line(id=1, result=1), line(id=1, result=9) + line(id=2, result=2)) as (
        client,
        _,
    ):
        assert client.call("list") == 1
        assert client.call("list") == 2


def test_launcher_that_ends_during_a_call_is_named(places):
    with answering(places, None) as (client, _), pytest.raises(StackNotUp, match="is gone"):
        client.call("list")


def test_silence_beyond_the_limit_is_a_failure(places):
    with answering(places, b"") as (client, _), pytest.raises(Failure, match="does not answer"):
        client.call("list", timeout_s=0.05)


def test_closed_client_says_so(places):
    with answering(places) as (client, _):
        client.close()
        with pytest.raises(StackNotUp, match="was closed"):
            client.call("list")
