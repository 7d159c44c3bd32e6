"""Waiting for the end of a process that is not, or no longer, a child of the fork server."""

from __future__ import annotations

import os

import trio

from daemons.launcher.processes import is_alive, open_process

DESCRIPTOR_RETRY_S = 0.1


async def wait_for_end(pid: int, start_time: int | None = None) -> None:
    """Wait until a process has ended; if there is no descriptor to be had for it, for one first.

    Args:
        pid: Its number.
        start_time: In clock ticks since boot; None for a child of ours, whose number cannot be
            anybody else's before we have waited for it.
    """
    while True:
        try:
            handle = open_process(pid)
            break
        except OSError:
            await trio.sleep(DESCRIPTOR_RETRY_S)
    if handle is None:
        return
    try:
        if start_time is None or is_alive(pid, start_time):
            await trio.lowlevel.wait_readable(handle)
    finally:
        os.close(handle)
