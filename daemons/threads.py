"""Worker threads for blocking work, of which the system may refuse one more."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import trio

from daemons.errors import ExitCode, Failure

T = TypeVar("T")


class NoThread(Failure):
    """The system has no thread for us; what was to be done was not begun."""


async def run_in_thread(
    work: Callable[[], T],
    *,
    limiter: trio.CapacityLimiter | None = None,
    thread_name: str | None = None,
    abandon_on_cancel: bool = False,
) -> T:
    """Run blocking work in a worker thread; as `trio.to_thread.run_sync`, but for the error.

    Raises:
        NoThread: No thread can be started.
    """
    is_begun = False

    def begin() -> T:
        nonlocal is_begun
        is_begun = True
        return work()

    try:
        return await trio.to_thread.run_sync(
            begin, limiter=limiter, thread_name=thread_name, abandon_on_cancel=abandon_on_cancel
        )
    except RuntimeError as error:
        if is_begun:
            raise
        raise NoThread(
            "cannot start a thread",
            why=str(error),
            next_step="Look for a limit on threads, processes or memory (ulimit -u, pids.max)",
            exit_code=ExitCode.UNAVAILABLE,
        ) from error
