"""What a killed launcher has left: daemons that go on serving, and files of ended ones. No trio.

The registry names every process by pid and start time, so that nothing else can be hit, and so do
the marks of who serves (`ready_marks.py`), for a record that is gone or older than its process. The
next launcher takes them over (`adoption.py`); `end_leftovers` ends them where there is none.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
from collections.abc import Sequence
from typing import Final

from daemons.instance_lock import InstanceLock
from daemons.launcher.adoption import forget_power
from daemons.launcher.domain import STOP_ORDER
from daemons.launcher.last_domid import COUNTER_NAME
from daemons.launcher.processes import is_alive, open_process, send_signal
from daemons.launcher.ready_marks import Serving, who_has_served, who_serves
from daemons.places import CHIP_NAME, Places
from daemons.registry import Registry, RegistryWriter, Role

ORDER: Final = (*STOP_ORDER, Role.HWTPM)
"""Who uses others ends before them."""
DRAIN_S: Final = 10.0
LOCK_NAME: Final = "launcher.lock"


def find_leftovers(places: Places) -> list[Serving]:
    """Give the processes of domains that are alive, in the order in which they have to end.

    Raises:
        DamagedRegistry: A record cannot be believed.
    """
    recorded = {
        record.name: Serving(record.name, record.role, record.pid, record.start_time)
        for record in Registry(places.registry).all()
        if record.pid is not None
        and record.start_time is not None
        and is_alive(record.pid, record.start_time)
    }
    alive = (recorded | who_serves(places)).values()
    return sorted(
        (each for each in alive if each.role in ORDER), key=lambda each: ORDER.index(each.role)
    )


def end_leftovers(places: Places, *, drain_s: float = DRAIN_S) -> list[Serving]:
    """End every process that the registry knows, in order, and remove what they leave.

    Args:
        places: Of the installation.
        drain_s: Seconds from SIGTERM to SIGKILL, for each kind of domain.

    Returns:
        Those that were alive.

    Raises:
        AlreadyRunning: A launcher lives, and would start them again.
        DamagedRegistry: A record cannot be believed; nothing was ended.
        PermissionError: A process belongs to somebody else.
    """
    if not places.registry.is_dir():
        return []
    with launcher_lock(places):
        alive = end_leftovers_of(places, drain_s=drain_s)
        remove_remains(places)
    return alive


def end_leftovers_of(places: Places, *, drain_s: float = DRAIN_S) -> list[Serving]:
    """End the processes that the registry knows, for who has the launcher's place.

    Raises:
        DamagedRegistry, PermissionError: As `end_leftovers`.
    """
    alive = find_leftovers(places)
    for role in ORDER:
        _end_together([each for each in alive if each.role is role], drain_s)
    return alive


def launcher_lock(places: Places) -> InstanceLock:
    """Take the place of the root's one launcher; whoever has it may write the registry.

    Raises:
        AlreadyRunning: A launcher lives; its pid is named.
    """
    return InstanceLock(places.registry / LOCK_NAME, f"the launcher of {places.root}")


def remove_remains(places: Places) -> None:
    """Remove what ended domains and an ended launcher have left in the run directory."""
    writer = RegistryWriter(places.registry)
    for record in Registry(places.registry).all():
        if record.role is not Role.DOMAIN0:
            shutil.rmtree(places.run / record.name, ignore_errors=True)
        writer.remove(record.name)
    for name in (CHIP_NAME, *who_has_served(places)):  # also whose record is gone
        shutil.rmtree(places.run / name, ignore_errors=True)
    forget_power(places)
    remove_sockets(places)
    counter = places.registry / COUNTER_NAME  # nobody is left who could mistake a boot for another
    for remains in (places.event_log, counter, counter.with_name(f"{COUNTER_NAME}.new")):
        with contextlib.suppress(OSError):
            remains.unlink()


def remove_sockets(places: Places) -> None:
    """Remove the sockets of a launcher that has ended."""
    for remains in (places.launcher_socket, places.notify_socket):
        with contextlib.suppress(OSError):
            remains.unlink()


def _end_together(processes: Sequence[Serving], drain_s: float) -> None:
    for number, patience_s in ((signal.SIGTERM, drain_s), (signal.SIGKILL, drain_s)):
        handles: list[int] = []
        try:
            for each in processes:
                if send_signal(each.pid, each.start_time, number):
                    handle = open_process(each.pid)
                    if handle is not None:
                        handles.append(handle)
                    send_signal(each.pid, each.start_time, signal.SIGCONT)
            if _all_end(handles, patience_s):
                return
        finally:
            for handle in handles:
                os.close(handle)


def _all_end(handles: Sequence[int], patience_s: float) -> bool:
    waiting = set(handles)
    while waiting:
        ended, _, _ = select.select(waiting, [], [], patience_s)
        if not ended:
            return False
        waiting -= set(ended)
    return True
