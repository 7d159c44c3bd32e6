"""launcherd: starts, watches, labels and measures everything of one root.

One launcher serves one root. It runs in the foreground, under systemd or a terminal; `--background`
returns when the control socket answers. SIGTERM and SIGINT stop everything in order.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import trio

from daemons import log_levels, logs
from daemons.errors import ExitCode, Failure
from daemons.launcher.adoption import OldStack, find_old_stack
from daemons.launcher.chip import Chip, Firmware
from daemons.launcher.control import ControlServer
from daemons.launcher.devices import Devices
from daemons.launcher.domain import PROGRAMS
from daemons.launcher.domains import Domains
from daemons.launcher.last_words import read_last_words
from daemons.launcher.launcher_settings import LauncherSettings
from daemons.launcher.leftovers import (
    end_leftovers_of,
    find_leftovers,
    launcher_lock,
    remove_remains,
    remove_sockets,
)
from daemons.launcher.methods import Methods
from daemons.launcher.notifications import hear_notifications
from daemons.launcher.processes import become_child_subreaper
from daemons.launcher.ready_marks import note_ready
from daemons.launcher.spawner import Spawner, open_log
from daemons.launcher.stack import Stack
from daemons.launcher.supervisor import Changes
from daemons.launcher_client import LauncherClient, StackNotUp
from daemons.lean_structlog import structlog
from daemons.listeners import AlreadyRunning, Kind, Listener, listen, start_time_of
from daemons.places import CHIP_NAME, DOMAIN0_NAME, Places
from daemons.policy import Policy
from daemons.policy import load as load_policy
from daemons.registry import DomainRecord, RegistryWriter, Role
from daemons.sd_notify import Notifier, listen_for_notifications
from daemons.service import STOP_SIGNALS, run_daemon
from daemons.settings import load as load_settings

PROGRAM: Final = "launcherd"
LOG_NAME: Final = "launcher.log"
BACKGROUND_START_S: Final = 20.0
ANOTHER_START_S: Final = 8.0
"""For a launcher that somebody else has just started; it answers when its fork server is ready."""
_POLL_S: Final = 0.01

DAEMONS: Final[Mapping[str, str]] = {
    program: f"daemons.{program}:main" for program in PROGRAMS.values()
}
"""Program name to the `module:function` that the fork server runs."""

_INHERITED: Final = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "PYTHONPATH")
"""What daemons get of the launcher's environment."""

FirmwareFactory = Callable[[Places], Firmware]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a test may put in place of the real thing.

    Attributes:
        programs: Program name to `module:function`.
        firmware: Makes the platform's part for the chip.
        warm: What the fork server calls once, as `module:function`.
    """

    programs: Mapping[str, str]
    firmware: FirmwareFactory
    warm: str | None = None


def platform_firmware(places: Places) -> Firmware:
    """Make the real firmware; imported here, so that a background start does not wait for it."""
    from daemons.launcher.platform_firmware import PlatformFirmware  # noqa: PLC0415

    return PlatformFirmware(places)


REAL: Final = World(
    programs=DAEMONS, firmware=platform_firmware, warm="daemons.launcher.warming:warm_up"
)


def main(argv: list[str] | None = None, *, world: World = REAL) -> int:
    """Run the launcher; the exit status is one of `ExitCode`."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Starts and watches one platform.")
    parser.add_argument("--root", metavar="DIR", help="root of the installation")
    parser.add_argument(
        "--background", action="store_true", help="return when the control socket answers"
    )
    options = parser.parse_args(argv)
    if options.background:
        return run_daemon(PROGRAM, partial(_start_in_background, options.root))
    return run_daemon(PROGRAM, partial(run_launcher, options.root, world))


# -- in the background ---------------------------------------------------------------------------


async def _start_in_background(root: str | None) -> None:
    await trio.to_thread.run_sync(start_in_background, Places.choose(root, os.environ))


def start_in_background(places: Places) -> None:
    """Start the launcher in a session of its own, unless one answers, and wait until it does.

    Raises:
        Failure: It ended, with its own reason; or it does not answer.
    """
    if _answers(places):
        return
    places.prepare()
    log_path = places.log_dir / LOG_NAME
    with open_log(log_path, 16 * 1024 * 1024) as log_file:
        since_byte = os.fstat(log_file.fileno()).st_size
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
            [sys.executable, "-P", "-m", "daemons.launcherd", "--root", str(places.root)],
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=log_file,
            start_new_session=True,
        )
    begun = time.monotonic()
    while not _answers(places):
        status, passed_s = process.poll(), time.monotonic() - begun
        if status is not None and not (passed_s < ANOTHER_START_S and _another_starts(places)):
            words = read_last_words(log_path, since_byte)
            raise Failure(
                words.what or "cannot start the launcher",
                why=words.why or _why_without_words(status, log_path),
                next_step="; ".join(filter(None, (words.next_step, f"its log is {log_path}"))),
                exit_code=ExitCode(status) if status in set(ExitCode) else ExitCode.FAILED,
            )
        if passed_s > BACKGROUND_START_S:
            raise Failure(
                "cannot start the launcher",
                why=f"process {process.pid} has not answered within {BACKGROUND_START_S:g} s",
                next_step=f"Look at {log_path}",
                exit_code=ExitCode.UNAVAILABLE,
            )
        time.sleep(_POLL_S)  # another process gets ready; it has no other way to tell us
    process.returncode = 0  # it stays; nobody waits for it here


def _why_without_words(status: int, log_path: Path) -> str:
    """Why a launcher has ended whose log has not a word of it."""
    disk = os.statvfs(log_path.parent)
    if not disk.f_bavail or not disk.f_favail:
        return f"it ended with status {status}: no space left on the file system of {log_path}"
    return f"it ended with status {status}"


def _another_starts(places: Places) -> bool:
    """Tell whether another launcher of this root lives; it answers when it is ready."""
    try:
        launcher_lock(places).close()
    except AlreadyRunning:
        return True
    return False


def _answers(places: Places) -> bool:
    try:
        with LauncherClient(places):
            return True
    except StackNotUp:
        return False


# -- the launcher itself -------------------------------------------------------------------------


async def run_launcher(root: str | None, world: World) -> None:
    """Be the launcher until SIGTERM, SIGINT or the method `stop`.

    Raises:
        Failure: Another one runs, or the places, settings or policy are not as they should be.
    """
    places = Places.choose(root, os.environ)
    settings = load_settings(places.settings(PROGRAM), LauncherSettings)
    policy = load_policy(places.policy)
    logs.configure(PROGRAM, level=settings.log_level)
    log_levels.follow(places.log_levels, log_levels.LAUNCHER, settings.log_level)
    places.prepare()
    with launcher_lock(places):
        old = find_old_stack(places)
        if old is None:
            end_leftovers_of(places)
            remove_remains(places)
        else:
            remove_sockets(places)
        become_child_subreaper()
        spawner = Spawner(world.programs, title=f"vtpm fork server {places.root}", warm=world.warm)
        try:
            spawner.start()  # it imports while we go on
            with listen_for_notifications(places.notify_socket) as notify:
                await _Launcher(places, settings, policy, spawner, world).run(notify, old)
        finally:
            spawner.abandon()
            _leave(places)


def _leave(places: Places) -> None:
    """Remove what an ended launcher leaves.

    One that could not take an old stack over, or that ends by a bug, leaves the domains as they
    are, as one that is killed does.
    """
    serving = find_leftovers(places)
    if not serving:
        remove_remains(places)
        return
    structlog.get_logger().warning(
        "domains go on serving without a launcher",
        next_step="`vtpm up` takes them over; `vtpm down` ends them",
        domains=" ".join(each.name for each in serving),
    )


def _own_record(label: str) -> DomainRecord:
    return DomainRecord(
        name=DOMAIN0_NAME,
        domid=0,
        role=Role.DOMAIN0,
        label=label,
        uid=os.geteuid(),
        pid=os.getpid(),
        start_time=start_time_of(os.getpid()),
        localities=(0, 1, 2, 3, 4),
    )


class _Launcher:
    """Wires the rooms together and keeps them running."""

    def __init__(
        self,
        places: Places,
        settings: LauncherSettings,
        policy: Policy,
        spawner: Spawner,
        world: World,
    ) -> None:
        self._places = places
        self._settings = settings
        self._policy = policy
        self._spawner = spawner
        self._registry = RegistryWriter(places.registry)
        self._world = world
        self._ended = trio.Event()

    async def run(self, notify: Listener, old: OldStack | None) -> None:
        """Serve until everything is stopped; first take over what an earlier launcher has left.

        Who finds the control socket finds a launcher that can start daemons: it is there only when
        the fork server is ready.
        """
        self._registry.put(_own_record(self._policy.default_label(Role.DOMAIN0)))
        with trio.open_signal_receiver(*STOP_SIGNALS) as signals, ExitStack() as listening:
            async with trio.open_nursery() as nursery:
                stack = self._stack(nursery)
                chip = Chip(stack, self._world.firmware(self._places))
                domains = Domains(stack, chip)
                methods = Methods(stack, chip, domains, Devices(stack, domains), self._ended.set)
                server = ControlServer(
                    methods.table(),
                    nursery,
                    self._settings.control_connections_max,
                    requests_max=self._settings.control_requests_max,
                    send_s=self._settings.control_send_s,
                )
                nursery.start_soon(self._spawner.run)
                await nursery.start(
                    hear_notifications, notify, partial(_pass_notification, stack, chip)
                )
                await self._spawner.ready()
                if old is not None:
                    await domains.adopt(old)
                control = listening.enter_context(listen(self._places.launcher_socket, Kind.STREAM))
                await nursery.start(server.serve, control)
                notifier = Notifier.from_environment(os.environ)
                notifier.ready(f"serving {self._places.root}")
                structlog.get_logger().info("ready", root=str(self._places.root))
                nursery.start_soon(self._stop_on_signal, signals, domains, notifier)
                await self._ended.wait()
                # The answer to `stop` is on its way; its client sees the end of the connection
                # after it. Who asks more now, or reads nothing, does not hold the end up.
                with trio.move_on_after(self._settings.control_send_s):
                    await server.answered()
                self._spawner.close()
                with trio.move_on_after(self._settings.supervisor.drain_s):
                    await self._spawner.ended()
                nursery.cancel_scope.cancel()

    async def _stop_on_signal(self, signals: object, domains: Domains, notifier: Notifier) -> None:
        async for number in signals:  # type: ignore[attr-defined]
            structlog.get_logger().info("stopping", signal=number)
            notifier.stopping()
            await domains.stop_all(_log_progress)
            self._ended.set()

    def _stack(self, nursery: trio.Nursery) -> Stack:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment["NOTIFY_SOCKET"] = str(self._places.notify_socket)
        return Stack(
            places=self._places,
            settings=self._settings,
            policy=self._policy,
            spawner=self._spawner,
            registry=self._registry,
            changes=Changes(),
            nursery=nursery,
            child_environment=environment,
        )


async def _log_progress(text: str) -> None:
    structlog.get_logger().info(text)


def _pass_notification(stack: Stack, chip: Chip, pid: int, fields: Mapping[str, str]) -> bool:
    if chip.pid == pid:
        chip.supervisor.notified(_noted(stack, CHIP_NAME, Role.HWTPM, pid, fields))
        return True
    for domain in stack.domains.values():
        if domain.external is None and domain.pid == pid:
            domain.supervisor.notified(_noted(stack, domain.name, domain.role, pid, fields))
            return True
    return False


def _noted(
    stack: Stack, name: str, role: Role, pid: int, fields: Mapping[str, str]
) -> Mapping[str, str]:
    """What a process says of itself; that it is ready only once that is written down."""
    if fields.get("READY") != "1" or _is_noted_as_ready(stack, name, role, pid):
        return fields
    return {field: value for field, value in fields.items() if field != "READY"}


def _is_noted_as_ready(stack: Stack, name: str, role: Role, pid: int) -> bool:
    """Whether it could be written down that a domain serves: before that nobody may use it."""
    try:
        note_ready(stack.places, name, role, pid)
    except Failure as failure:
        structlog.get_logger().error(
            failure.what, why=failure.why, next_step=failure.next_step, domain=name
        )
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
