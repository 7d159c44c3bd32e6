"""The control socket over a real Unix socket: each wrong line is answered, nobody is disturbed."""

from __future__ import annotations

import json
import os
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from daemons import heap
from daemons.errors import ExitCode, Failure
from daemons.launcher import control
from daemons.launcher.control import (
    CONNECTIONS_MAX,
    ENTRIES_MAX,
    LINE_BYTES_MAX,
    REQUESTS_PER_CONNECTION_MAX,
    ControlServer,
    Method,
    Parameter,
)
from daemons.listeners import Kind, PeerCredentials, listen


class Desk:
    """Methods for the tests, and what they did."""

    def __init__(self):
        self.gate = trio.Event()
        self.done: list[str] = []

    async def echo(self, progress, text, count=0):
        for number in range(count):
            await progress(f"{text} {number}")
        return {"text": text}

    async def wait(self, progress):
        await progress("waiting")
        await self.gate.wait()
        self.done.append("wait")
        return "waited"

    async def fail(self, _progress):
        raise Failure("no image", why="gone", next_step="dd", exit_code=ExitCode.NO_INPUT)

    async def bug(self, _progress):
        raise ZeroDivisionError("ours")

    def methods(self):
        return {
            "echo": Method(
                run=self.echo,
                parameters=(
                    Parameter(name="text", type=str),
                    Parameter(name="count", type=int, is_required=False),
                ),
            ),
            "wait": Method(run=self.wait),
            "fail": Method(run=self.fail),
            "bug": Method(run=self.bug),
            "names": Method(run=self.fail, parameters=(Parameter(name="names", type=list),)),
        }


class Line:
    """One client connection."""

    def __init__(self, stream):
        self.stream = stream
        self._pending = b""

    async def send(self, message):
        line = message if isinstance(message, bytes) else json.dumps(message).encode()
        await self.stream.send_all(line + b"\n")

    async def receive(self):
        while b"\n" not in self._pending:
            received = await self.stream.receive_some()
            if not received:
                return None
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    async def ask(self, message):
        await self.send(message)
        return await self.receive()


@asynccontextmanager
async def serving(directory):
    directory.chmod(0o700)
    desk = Desk()
    path = directory / "launcher.sock"

    with trio.fail_after(20), listen(path, Kind.STREAM) as listener:
        async with AsyncExitStack() as clients, trio.open_nursery() as requests:

            async def connect():
                stream = await trio.open_unix_socket(str(path))
                return Line(await clients.enter_async_context(stream))

            await requests.start(ControlServer(desk.methods(), requests).serve, listener)
            desk.connect = connect
            yield desk
            requests.cancel_scope.cancel()


async def test_progress_comes_before_the_result(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        await line.send({"id": 7, "method": "echo", "params": {"text": "a", "count": 2}})
        assert [await line.receive() for _ in range(3)] == [
            {"id": 7, "progress": "a 0"},
            {"id": 7, "progress": "a 1"},
            {"id": 7, "result": {"text": "a"}},
        ]


async def test_failure_goes_out_with_all_its_parts(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        answer = await line.ask({"id": "x", "method": "fail"})
        assert answer == {
            "id": "x",
            "error": {"what": "no image", "why": "gone", "next_step": "dd", "exit_code": 66},
        }


async def test_bug_in_a_method_is_an_answer_and_not_the_end(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        answer = await line.ask({"id": 1, "method": "bug"})
        assert answer["error"]["exit_code"] == ExitCode.BUG
        assert "ZeroDivisionError" in answer["error"]["why"]
        assert "result" in await line.ask({"id": 2, "method": "echo", "params": {"text": "a"}})


@pytest.mark.parametrize(
    ("request_line", "words"),
    [
        (b"no json", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"id": 1}', "has the keys id, method and params"),
        (b'{"method": "echo"}', "has the keys id, method and params"),
        (b'{"id": 1, "method": "echo", "extra": 1}', "has the keys id, method and params"),
        (b'{"id": 1, "method": "dance"}', "bug, echo, fail, names, wait"),
        (b'{"id": 1, "method": ["echo"]}', "its method is not a string"),
        (b'{"id": [1], "method": "echo"}', "its id is not a number, a string or null"),
        (b'{"id": 1, "method": "echo"}', "echo needs text"),
        (b'{"id": 1, "method": "echo", "params": [1]}', "not a JSON object"),
        (b'{"id": 1, "method": "echo", "params": {"text": 5}}', "not of type str"),
        (b'{"id": 1, "method": "echo", "params": {"text": null}}', "not of type str"),
        (b'{"id": 1, "method": "echo", "params": {"text": "a", "count": true}}', "not of type int"),
        (b'{"id": 1, "method": "echo", "params": {"text": "a", "x": 1}}', "text, [count]"),
        (b'{"id": 1, "method": "wait", "params": {"x": 1}}', "no parameters"),
        (b'{"id": 1, "method": "names", "params": {"names": [1]}}', "not of type list"),
        (b'{"id": 1, "method": "names", "params": {"names": ["\\ud800"]}}', "not of type list"),
        (
            b'{"id": 1, "method": "names", "params": {"names": [%b]}}'
            % b",".join([b'"a"'] * (ENTRIES_MAX + 1)),
            "not of type list",
        ),
        (b'{"id": 1, "method": "echo", "params": {"text": "\\ud800"}}', "not of type str"),
    ],
)
async def test_wrong_request_is_answered_and_the_next_one_served(tmp_path, request_line, words):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        answer = await line.ask(request_line)
        assert words in str(answer["error"])
        assert answer["error"]["exit_code"] == ExitCode.USAGE
        assert "result" in await line.ask({"id": 2, "method": "echo", "params": {"text": "a"}})


@pytest.mark.parametrize(
    "request_line",
    [
        b'{"id": %b, "method": "echo", "params": {"text": "a"}}',
        b'{"id": %b, "method": "dance"}',
        b'{"id": 1, "method": %b}',
        b'{"id": 1, "method": "echo", "params": %b}',
        b'{"id": 1, "method": "echo", "params": {"text": %b}}',
        b'{"id": 1, "method": "names", "params": {"names": %b}}',
    ],
)
async def test_what_is_nested_so_deep_that_it_can_just_be_read_harms_nobody(tmp_path, request_line):
    """Each depth below that of the interpreter: what was read cannot be shown or said again."""
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        for depth in range(800, 1000):
            answer = await line.ask(request_line % (b"[" * depth + b"]" * depth))
            assert answer["error"]["exit_code"] == ExitCode.USAGE


async def test_optional_parameter_may_be_null(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        request = {"id": 2, "method": "echo", "params": {"text": "a", "count": 0}}
        assert "result" in await line.ask(request)


async def test_line_that_is_too_long_ends_the_connection_with_a_reason(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        answers = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_send_until_refused, line, b"x" * (LINE_BYTES_MAX * 2))
            answers.append(await line.receive())
            nursery.cancel_scope.cancel()
        assert "more than" in answers[0]["error"]["why"]
        other = await desk.connect()
        assert "result" in await other.ask({"id": 2, "method": "echo", "params": {"text": "a"}})


async def _send_until_refused(line, content):
    try:
        await line.stream.send_all(content)
        await trio.sleep_forever()
    except trio.BrokenResourceError:
        pass


async def test_request_split_anywhere_is_the_same_request(tmp_path):
    request = b'{"id": 3, "method": "echo", "params": {"text": "abc"}}\n'
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        for cut in range(1, len(request)):
            await line.stream.send_all(request[:cut])
            await wait_all_tasks_blocked()
            await line.stream.send_all(request[cut:])
            while "result" not in await line.receive():
                pass


async def test_slow_method_holds_up_nobody(tmp_path):
    async with serving(tmp_path) as desk:
        slow, quick = await desk.connect(), await desk.connect()
        assert (await slow.ask({"id": 1, "method": "wait"}))["progress"] == "waiting"
        await quick.send({"id": 1, "method": "fail"})
        assert "error" in await quick.receive()
        await slow.send({"id": 2, "method": "fail"})  # and not even its own client
        assert (await slow.receive())["id"] == 2
        desk.gate.set()
        assert (await slow.receive()) == {"id": 1, "result": "waited"}


async def test_request_is_carried_through_when_its_client_has_left(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        await line.ask({"id": 1, "method": "wait"})
        await line.stream.aclose()
        await wait_all_tasks_blocked()
        desk.gate.set()
        await wait_all_tasks_blocked()
        assert desk.done == ["wait"]


async def test_memory_of_a_client_that_left_goes_back(tmp_path, monkeypatch):
    given_back = trio.Event()
    monkeypatch.setattr(heap, "GIVE_BACK_S", 0.01)
    monkeypatch.setattr(heap, "give_back", given_back.set)
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        await line.stream.aclose()
        with trio.fail_after(20):
            await given_back.wait()


async def test_client_that_only_closed_its_sending_side_still_gets_its_answer(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        await line.ask({"id": 1, "method": "wait"})
        await line.stream.send_eof()
        await wait_all_tasks_blocked()
        desk.gate.set()
        assert await line.receive() == {"id": 1, "result": "waited"}
        assert await line.receive() is None


async def test_open_requests_of_one_client_are_limited(tmp_path):
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        for number in range(REQUESTS_PER_CONNECTION_MAX):
            assert "progress" in await line.ask({"id": number, "method": "wait"})
        answer = await line.ask({"id": "one more", "method": "wait"})
        assert answer["id"] == "one more"
        assert "under way already" in answer["error"]["why"]


async def test_clients_are_limited(tmp_path):
    async with serving(tmp_path) as desk:
        lines = [await desk.connect() for _ in range(CONNECTIONS_MAX)]
        await wait_all_tasks_blocked()
        for line in lines:
            assert "progress" in await line.ask({"id": 1, "method": "wait"})
        one_more = await desk.connect()
        assert "under way already" in (await one_more.receive())["error"]["why"]
        for line in lines:
            await line.stream.aclose()
        await wait_all_tasks_blocked()
        again = await desk.connect()
        assert "error" in await again.ask({"id": 1, "method": "fail"})


async def test_clients_that_have_closed_their_sending_side_count_until_they_have_their_answers(
    tmp_path,
):
    async with serving(tmp_path) as desk:
        lines = [await desk.connect() for _ in range(CONNECTIONS_MAX)]
        for line in lines:
            await line.ask({"id": 1, "method": "wait"})
            await line.stream.send_eof()
        await wait_all_tasks_blocked()
        one_more = await desk.connect()
        assert "under way already" in (await one_more.receive())["error"]["why"]
        desk.gate.set()
        for line in lines:
            assert (await line.receive())["result"] == "waited"
        await wait_all_tasks_blocked()
        again = await desk.connect()
        assert "error" in await again.ask({"id": 1, "method": "fail"})


async def test_connections_on_which_nobody_asks_anything_keep_nobody_out(tmp_path):
    async with serving(tmp_path) as desk:
        waiting = await desk.connect()
        assert "progress" in await waiting.ask({"id": 1, "method": "wait"})
        half_open = [await desk.connect() for _ in range(2 * CONNECTIONS_MAX)]
        await half_open[-1].stream.send_all(b'{"id": 1, "met')  # said, but not yet all of it
        await wait_all_tasks_blocked()
        owner = await desk.connect()
        assert "error" in await owner.ask({"id": 1, "method": "fail"})
        assert await half_open[0].receive() is None, "the oldest of them was sent away"
        desk.gate.set()
        assert await waiting.receive() == {"id": 1, "result": "waited"}


@pytest.mark.parametrize(("uid", "is_heard"), [(0, True), (os.geteuid(), True), (12345, False)])
async def test_only_the_same_user_and_root_are_heard(tmp_path, monkeypatch, uid, is_heard):
    stranger = PeerCredentials(pid=1, uid=uid, gid=0, start_time=1)
    monkeypatch.setattr(control, "peer_credentials", lambda _: stranger)
    async with serving(tmp_path) as desk:
        line = await desk.connect()
        if is_heard:
            assert (await line.ask({"id": 1, "method": "fail"}))["error"]["what"] == "no image"
        else:
            answer = await line.receive()
            assert answer["error"]["exit_code"] == ExitCode.NO_PERMISSION
            assert "uid 12345" in answer["error"]["why"]
            assert await line.receive() is None
