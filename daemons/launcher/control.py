"""The launcher's control socket: JSON lines in, progress and results out.

    -> {"id": 1, "method": "create", "params": {...}}
    <- {"id": 1, "progress": "making the endorsement key"}      any number of times
    <- {"id": 1, "result": ...}   or   {"id": 1, "error": {"what", "why", "next_step", "exit_code"}}

What the methods do is not known here. A request that was taken is carried through, also when the
one who asked has left.

Invariants:

- Only the launcher's own uid and root are heard; the kernel says who a peer is.
- Nothing is guessed: unknown methods, unknown, missing and mistyped parameters are refused with a
  list of what exists.
- Lines, connections and open requests have limits.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import UnionType
from typing import Any, Final, cast

import trio

from daemons import heap
from daemons.errors import ExitCode, Failure
from daemons.lean_structlog import structlog
from daemons.listeners import Listener, peer_credentials

LINE_BYTES_MAX: Final = 2 * 1024 * 1024
"""A config file of 256 Ki characters fits, however JSON escapes them."""
CONNECTIONS_MAX: Final = 64
REQUESTS_PER_CONNECTION_MAX: Final = 16
ENTRIES_MAX: Final = 2048
"""Of a list; more than there can be domains."""
RECEIVE_BYTES: Final = 16_384
SEND_S: Final = 5.0
"""A client that does not read for so long has left."""

Progress = Callable[[str], Awaitable[None]]

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter of a method."""

    name: str
    type: type | UnionType
    is_required: bool = True

    def accepts(self, given: object) -> bool:
        """Tell whether a JSON value may be this parameter.

        True and false are no numbers, half a character is no text, and lists are of texts.
        """
        if isinstance(given, bool) and self.type is not bool:
            return False
        if isinstance(given, list):
            is_short = len(given) <= ENTRIES_MAX
            return is_short and self.type is list and all(_is_text(entry) for entry in given)
        if isinstance(given, str) and not _is_text(given):
            return False
        return isinstance(given, self.type)


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method: what it takes, and the coroutine function behind it.

    Attributes:
        run: Called as `run(progress, **params)`; its result goes out as JSON, its `Failure` as an
            error.
    """

    run: Callable[..., Awaitable[object]]
    parameters: tuple[Parameter, ...] = ()

    def describe(self) -> str:
        """Give the parameters as a person would write them."""
        return ", ".join(p.name if p.is_required else f"[{p.name}]" for p in self.parameters)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    number: object
    method: Method
    name: str
    parameters: Mapping[str, object]


class BadRequest(Failure):
    """A line that is not a request of this protocol."""

    def __init__(self, why: str, next_step: str = "vtpm and launcherd of one version fit") -> None:
        super().__init__(
            "the launcher refused a request",
            why=why,
            next_step=next_step,
            exit_code=ExitCode.USAGE,
        )


class ControlServer:
    """Serves the control socket.

    Args:
        methods: Name to method.
        requests: Where requests run; it outlives the connections.
        connections_max: Clients at the same time. One more takes the place of the first that has
            no request under way; if each has one, it is told to wait.
        requests_max: Requests of one client under way at the same time.
        send_s: How long a client may leave its answers unread, in seconds.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        requests: trio.Nursery,
        connections_max: int = CONNECTIONS_MAX,
        *,
        requests_max: int = REQUESTS_PER_CONNECTION_MAX,
        send_s: float = SEND_S,
    ) -> None:
        self._methods = methods
        self._connections_max = connections_max
        self._requests_max = requests_max
        self._send_s = send_s
        self._requests = requests
        self._clients: dict[_Client, trio.CancelScope] = {}  # the one that came first is first
        self._open_requests = 0
        self._request_done = trio.Event()

    async def serve(
        self,
        listener: Listener,
        task_status: trio.TaskStatus[list[trio.SocketListener]] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept until cancelled. The listener stays the caller's.

        Args:
            listener: A stream listener.
            task_status: Started when connections are accepted.
        """
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.socket))
        async with trio.open_nursery() as nursery:
            # What waits in this nursery is cancelled with it, and need not be told to stop.
            memory = heap.AfterBursts(nursery, stopping=trio.Event())

            async def handle(stream: trio.SocketStream) -> None:
                try:
                    await self._handle(stream)
                finally:
                    memory.connection_ended()

            await trio.serve_listeners(handle, [accepting], task_status=task_status)

    async def answered(self) -> None:
        """Wait until no request is under way."""
        while self._open_requests:
            await self._request_done.wait()

    async def _handle(self, stream: trio.SocketStream) -> None:
        peer = peer_credentials(cast("socket.socket", stream.socket))
        client = _Client(stream, self._send_s)
        async with stream:
            if peer.uid not in {0, os.geteuid()}:
                await client.send_failure(None, _stranger(peer.uid))
                return
            if len(self._clients) >= self._connections_max and not self._end_an_idle_one():
                why = f"{self._connections_max} clients have requests under way already"
                await client.send_failure(None, BadRequest(why, "Wait until one of them is done"))
                return
            try:
                with trio.CancelScope() as scope:
                    self._clients[client] = scope
                    # One that left: what it asked for goes on.
                    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                        await self._serve_client(client)
                # Answers still to come keep the stream open, unless nobody reads them.
                await client.all_answered()
            finally:
                self._clients.pop(client, None)

    def _end_an_idle_one(self) -> bool:
        """Make room: who waits for nothing loses nothing, and may come again.

        Otherwise connections on which nobody says anything would keep the owner of the stack out.
        """
        for client, scope in self._clients.items():
            if not client.open_requests:
                del self._clients[client]
                scope.cancel()
                log.info("client sent away", reason="it asked for nothing, and others came")
                return True
        return False

    async def _serve_client(self, client: _Client) -> None:
        async for line in client.lines():
            try:
                request = self._parse(line)
            except BadRequest as failure:
                await client.send_failure(_number_of(line), failure)
                continue
            if client.open_requests >= self._requests_max:
                why = f"{self._requests_max} requests of this client are under way already"
                await client.send_failure(request.number, BadRequest(why, "Wait for their answers"))
                continue
            client.open_requests += 1
            self._requests.start_soon(self._carry_out, client, request)

    def _parse(self, line: bytes) -> _Request:
        try:
            parsed = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"it is not JSON ({error})") from error
        if not isinstance(parsed, dict):
            raise BadRequest("it is not a JSON object")
        unknown = parsed.keys() - {"id", "method", "params"}
        if unknown or "id" not in parsed or "method" not in parsed:
            raise BadRequest("a request has the keys id, method and params, and no other")
        if not _is_id(parsed["id"]):
            raise BadRequest("its id is not a number, a string or null")
        name, parameters = parsed["method"], parsed.get("params", {})
        if not isinstance(name, str):
            raise BadRequest("its method is not a string")
        method = self._methods.get(name)
        if method is None:
            raise BadRequest(
                f"there is no method {name!r}", f"There are: {', '.join(sorted(self._methods))}"
            )
        _check_parameters(name, method, parameters)
        return _Request(number=parsed["id"], method=method, name=name, parameters=parameters)

    async def _carry_out(self, client: _Client, request: _Request) -> None:
        async def progress(text: str) -> None:
            await client.send({"id": request.number, "progress": text})

        self._open_requests += 1
        try:
            result = await request.method.run(progress, **request.parameters)
        except Failure as failure:
            log.info("refused", method=request.name, what=failure.what, why=failure.why)
            await client.send_failure(request.number, failure)
        except Exception as error:
            # The one place of the launcher where a bug is not fatal: it would take down a whole
            # platform that is well.
            log.exception("a method failed by a bug of ours", method=request.name)
            bug = Failure(
                f"{request.name} failed by a bug of the launcher",
                why=f"{type(error).__name__}: {error}",
                next_step="Please report it, with the launcher's log",
                exit_code=ExitCode.BUG,
            )
            await client.send_failure(request.number, bug)
        else:
            await client.send({"id": request.number, "result": result})
        finally:
            client.request_done()
            self._open_requests -= 1
            done, self._request_done = self._request_done, trio.Event()
            done.set()


class _Client:
    """One connection: lines in, answers out; an answer to one who left goes nowhere."""

    def __init__(self, stream: trio.SocketStream, send_s: float) -> None:
        self._stream = stream
        self._send_s = send_s
        self._sending = trio.Lock()
        self._idle = trio.Event()
        self._has_left = False
        self.open_requests = 0

    async def lines(self) -> Any:  # noqa: ANN401 - an async generator of bytes
        """Yield whole lines; an over-long one ends the connection after an error."""
        pending = bytearray()
        while True:
            received = await self._stream.receive_some(RECEIVE_BYTES)
            if not received:
                return
            pending += received
            if b"\n" in received:
                *lines, pending = pending.split(b"\n")
                for line in lines:
                    if line.strip():
                        yield bytes(line)
            if len(pending) > LINE_BYTES_MAX:
                await self.send_failure(
                    None, BadRequest(f"a line has more than {LINE_BYTES_MAX} bytes")
                )
                return

    async def send(self, message: Mapping[str, object]) -> None:
        """Send one line; the first failure means that the client has left."""
        line = json.dumps(message).encode("ascii") + b"\n"
        async with self._sending:
            if self._has_left:
                return
            try:
                with trio.fail_after(self._send_s):
                    await self._stream.send_all(line)
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                self._has_left = True

    async def send_failure(self, number: object, failure: Failure) -> None:
        """Send an error answer."""
        error = {
            "what": failure.what,
            "why": failure.why,
            "next_step": failure.next_step,
            "exit_code": int(failure.exit_code),
        }
        await self.send({"id": number, "error": error})

    def request_done(self) -> None:
        """Note that a request has had its answer."""
        self.open_requests -= 1
        if self.open_requests == 0:
            done, self._idle = self._idle, trio.Event()
            done.set()

    async def all_answered(self) -> None:
        """Wait for the answers to what was asked; at once when nobody reads them any more."""
        while self.open_requests and not self._has_left:
            await self._idle.wait()


def _check_parameters(name: str, method: Method, parameters: object) -> None:
    usage = f"{name} takes: {method.describe() or 'no parameters'}"
    if not isinstance(parameters, dict):
        raise BadRequest("its params are not a JSON object", usage)
    known = {parameter.name: parameter for parameter in method.parameters}
    for given_name, given in parameters.items():
        if given_name not in known:
            raise BadRequest(f"{name} has no parameter {given_name!r}", usage)
        if given is None and not known[given_name].is_required:
            continue
        if not known[given_name].accepts(given):
            wanted = getattr(known[given_name].type, "__name__", str(known[given_name].type))
            raise BadRequest(f"{given_name} of {name} is not of type {wanted}", usage)
    for parameter in method.parameters:
        if parameter.is_required and parameter.name not in parameters:
            raise BadRequest(f"{name} needs {parameter.name}", usage)


def _number_of(line: bytes) -> object:
    """Read the id of a request that was refused, so that its sender can tell which."""
    try:
        parsed = json.loads(line)
    except (ValueError, RecursionError):
        return None
    number = parsed.get("id") if isinstance(parsed, dict) else None
    return number if _is_id(number) else None


def _is_text(value: object) -> bool:
    """Is it a string that can be written to a file? JSON can say half of a character."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_id(value: object) -> bool:
    """May it stand in an answer? What is nested so deep that it can just be read may not."""
    return value is None or isinstance(value, (bool, int, float, str))


def _stranger(uid: int) -> Failure:
    return Failure(
        "the launcher refused a client",
        why=f"it belongs to uid {uid}, the launcher to uid {os.geteuid()}",
        next_step="Run as the user that started the stack",
        exit_code=ExitCode.NO_PERMISSION,
    )
