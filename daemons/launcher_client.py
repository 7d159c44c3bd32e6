"""The blocking client of the launcher's control socket, for the `vtpm` command and scripts.

Light on purpose: it imports nothing that takes time to load.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from typing import Any, Final, Self

from daemons.errors import ExitCode, Failure
from daemons.listeners import Kind, NotListening, connect, set_receive_timeout
from daemons.places import Places

ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
"""A listing of a few thousand domains fits."""
RECEIVE_BYTES: Final = 65536


class StackNotUp(Failure):
    """No launcher answers for this root."""


class LauncherClient:
    """Calls methods of the launcher of one root.

    Args:
        places: Of the installation.
        connect_s: Seconds to wait for a launcher that is too busy to accept.

    Raises:
        StackNotUp: No launcher runs.
        Failure: It may not be reached by this user.
    """

    def __init__(self, places: Places, *, connect_s: float = 5.0) -> None:
        self._places = places
        self._pending = b""
        self._next_id = 1
        try:
            self._connection: socket.socket | None = connect(
                places.launcher_socket, Kind.STREAM, connect_s
            )
        except NotListening as error:
            raise StackNotUp(
                "the stack is not up",
                why=f"no launcher answers at {places.launcher_socket}",
                next_step="Start it with: vtpm up",
                exit_code=ExitCode.UNAVAILABLE,
            ) from error

    def call(
        self,
        method: str,
        /,
        progress: Callable[[str], None] | None = None,
        timeout_s: float = 0,
        **params: object,
    ) -> Any:  # noqa: ANN401 - whatever JSON the method gives
        """Call a method and wait for its result.

        Args:
            method: Its name.
            progress: Called with each progress text.
            timeout_s: Seconds without any word from the launcher after which to give up; 0: never.
            params: Its parameters; those that are None are left out.

        Returns:
            The result, as JSON values.

        Raises:
            Failure: What the launcher answered, with its exit code.
            StackNotUp: It ended before it answered.
        """
        if self._connection is None:
            raise _gone("this client was closed")
        number = self._next_id
        self._next_id += 1
        given = {name: value for name, value in params.items() if value is not None}
        request = json.dumps({"id": number, "method": method, "params": given})
        set_receive_timeout(self._connection, timeout_s)
        try:
            self._connection.sendall(request.encode("ascii") + b"\n")
        except OSError as error:
            refusal = self._last_line()
            if refusal is None:
                raise _gone(str(error)) from error
            raise _failure_of(refusal) from error
        while True:
            answer = self._receive_line()
            if answer.get("id") not in {number, None}:
                continue  # an answer to a call that was given up
            if "progress" in answer:
                if progress is not None:
                    progress(answer["progress"])
            elif "error" in answer:
                raise _failure_of(answer)
            else:
                return answer["result"]

    def close(self) -> None:
        """Close the connection. Safe to call again."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _receive_line(self) -> dict[str, Any]:
        assert self._connection is not None
        while b"\n" not in self._pending:
            try:
                received = self._connection.recv(RECEIVE_BYTES)
            except BlockingIOError as error:
                raise Failure(
                    "the launcher does not answer",
                    why="it said nothing for the time that was set",
                    next_step="Look at its log; `vtpm status` may tell what it waits for",
                    exit_code=ExitCode.UNAVAILABLE,
                ) from error
            except OSError as error:
                raise _gone(str(error)) from error
            if not received:
                raise _gone("it closed the connection")
            self._pending += received
            if len(self._pending) > ANSWER_BYTES_MAX:
                raise _gone(f"its answer has more than {ANSWER_BYTES_MAX} bytes")
        line, _, self._pending = self._pending.partition(b"\n")
        answer = json.loads(line)
        if not isinstance(answer, dict):
            raise _gone("its answer is not of this protocol")
        return answer

    def _last_line(self) -> dict[str, Any] | None:
        """Read what the launcher said before it closed, if anything."""
        try:
            answer = self._receive_line()
        except Failure:
            return None
        return answer if "error" in answer else None


def _failure_of(answer: dict[str, Any]) -> Failure:
    error = answer["error"]
    return Failure(
        error["what"],
        why=error["why"],
        next_step=error["next_step"],
        exit_code=ExitCode(error["exit_code"]),
    )


def _gone(why: str) -> StackNotUp:
    return StackNotUp(
        "the launcher is gone",
        why=why,
        next_step="Look at its log, then start again with: vtpm up",
        exit_code=ExitCode.UNAVAILABLE,
    )
