"""Connections that one worker thread each carries, with blocking receives and sends.

trio accepts and ends them; what goes over them costs no switch between tasks. Decision 0002.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from typing import TypeVar

import trio

from daemons.lean_structlog import structlog
from daemons.service import PEER_FAULTS
from daemons.threads import NoThread, run_in_thread

T = TypeVar("T")


async def carry(  # noqa: PLR0913 - what a thread needs
    raw: socket.socket,
    work: Callable[[], None],
    stopping: trio.Event,
    *,
    limiter: trio.CapacityLimiter,
    thread_name: str,
    cut_short: Callable[[], None] = lambda: None,
) -> None:
    """Run the work of a connection in a thread until it ends.

    Args:
        raw: The connection, blocking. It stays the caller's to close.
        work: Ends when the connection does.
        stopping: Set when the daemon stops: then the command that runs is answered, and no more is
            taken.
        limiter: Of the threads.
        thread_name: For whoever looks at the process.
        cut_short: Called when the work is to end at once, for what does not end with the
            connection.
    """
    is_done = False

    async def end_on_stop() -> None:
        try:
            await stopping.wait()
            stop_taking(raw)
            await trio.sleep_forever()
        finally:
            if not is_done:
                _shut(raw, socket.SHUT_RDWR)
                cut_short()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_on_stop)
        try:
            await run_in_thread(work, thread_name=thread_name, limiter=limiter)
        except NoThread as lack:
            # The peer finds its connection ended, and comes again; the others are served on.
            structlog.get_logger().error("cannot serve a connection", reason=lack.why)
        finally:
            is_done = True
            nursery.cancel_scope.cancel()


def stop_taking(raw: socket.socket) -> None:
    """Take no more from a peer; what runs may end and be answered."""
    _shut(raw, socket.SHUT_RD)


def _shut(raw: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        raw.shutdown(how)


def ours(call: Callable[[], T]) -> T:
    """Call what stands behind a server so that none of its errors can be taken for the peer's."""
    try:
        return call()
    except PEER_FAULTS as error:
        raise RuntimeError("what is behind the server let an error of its links escape") from error
