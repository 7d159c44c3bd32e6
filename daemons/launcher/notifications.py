"""What the launcher's children say of themselves: sd_notify datagrams.

The kernel names the sender of a datagram, so no domain can report another one ready.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import trio

from daemons.lean_structlog import structlog
from daemons.listeners import Listener
from daemons.sd_notify import receive_notification

log = structlog.get_logger()

Notified = Callable[[int, Mapping[str, str]], bool]
"""Takes the sender's pid and its fields; False when no domain has this process."""


async def hear_notifications(
    listener: Listener,
    notified: Notified,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Hear until cancelled.

    Args:
        listener: From `sd_notify.listen_for_notifications`; it stays the caller's.
        notified: Called for each datagram that is well formed.
        task_status: Started at once; datagrams wait in the socket anyway.
    """
    listener.socket.setblocking(False)
    task_status.started()
    while True:
        await trio.lowlevel.wait_readable(listener.socket)
        try:
            notification = receive_notification(listener.socket)
        except BlockingIOError:
            continue
        if notification is None:
            log.warning("a notification is not well formed")
        elif not notified(notification.pid, notification.fields):
            log.warning("a notification is from no domain", pid=notification.pid)
