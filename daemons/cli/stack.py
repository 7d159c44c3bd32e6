"""The whole stack: up, down, status."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from daemons.cli.domains import read_config
from daemons.cli.options import SECONDS_MAX, SECONDS_MIN, Root, ask, no_nan, places_of
from daemons.cli.output import print_line, progress, warn
from daemons.errors import ExitCode, Failure

if TYPE_CHECKING:
    from daemons.places import Places

LAUNCHER_END_S: Final = 10.0
"""After it has answered that everything is stopped, for its own end."""

_LOOK_AGAIN_S: Final = 0.05

Step = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class DomainFile:
    """A config file with what its place in the start order depends on."""

    path: Path
    text: str
    name: str
    role: str
    backends: tuple[str, ...]


def up(
    configs: Annotated[list[Path] | None, typer.Argument(metavar="[CFG]...")] = None,
    fault: Annotated[
        Path | None,
        typer.Option("--fault", metavar="PLAN", help="Apply a fault plan while the stack starts."),
    ] = None,
    for_s: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="SECONDS",
            min=SECONDS_MIN,
            max=SECONDS_MAX,
            callback=no_nan,
            help="How long the plan of --fault goes on.",
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Start the stack and create the given domains.

    The launcher and the hardware TPM are started and the platform is powered on first.

    Domains are created in the order in which they need each other, whatever order the files are
    named in; those that are there already are left alone, those that have failed are created again.
    """
    files = in_start_order([read_domain_file(path) for path in configs or []])
    if fault is not None:
        from daemons.cli.fault import up_with_faults  # noqa: PLC0415 - who starts needs none of it

        up_with_faults(fault, for_s, files, root)
        return
    if for_s is not None:
        raise typer.BadParameter("--for says how long the plan of --fault goes on")
    with progress("starting") as step:
        created = bring_up(files, root, step)
    for row in created:
        warn(row)


def bring_up(files: Sequence[DomainFile], root: str | None, step: Step) -> list[object]:
    """Start what of a stack is not there yet, and wait until it is ready.

    Args:
        files: Of its domains, in their order.
        root: Of the installation.
        step: Called with what is being done.

    Returns:
        The rows of the domains that were created.

    Raises:
        Failure: Something does not start.
    """
    start_launcher(places_of(root), step)
    ask(root, "power_on", step)
    there = _names_there(root)
    created: list[object] = []
    for file in files:
        if file.name not in there:
            step(f"creating {file.name}")
            try:
                created.append(create_domain(file, root, step))
                continue
            except Failure:
                # Somebody else may have been quicker; then it is there, and is waited for.
                if file.name not in _names_there(root):
                    raise
        wait_for_domain(file.name, root, step)
    return created


def _names_there(root: str | None) -> set[str]:
    """The domains that need not be created."""
    return {row["name"] for row in ask(root, "list") if not row["state"].startswith("failed")}


def down(root: Root = None) -> None:
    """Stop everything in order, nothing lost."""
    places = places_of(root)
    if not stop_launcher(places, root):
        print_line(f"nothing runs under {places.root}")


def reload(root: Root = None) -> None:
    """Let all processes read again how much they log.

    It is in etc/vtpm/log-levels.toml, the only file that counts while they run: settings and policy
    are measured, and read at the start.
    """
    ask(root, "reload")


def create_domain(file: DomainFile, root: str | None, step: Step) -> object:
    """Create one domain and wait until it is ready.

    Returns:
        The launcher's row of it.
    """
    return ask(
        root,
        "create",
        lambda text: step(f"{file.name}: {text}"),
        config_text=file.text,
        path=str(file.path.resolve()),
    )


def wait_for_domain(name: str, root: str | None, step: Step) -> None:
    """Wait until a domain that is there already is ready; one that is paused stays so."""
    ask(root, "until_ready", lambda text: step(f"{name}: {text}"), domain=name)


def read_domain_file(path: Path) -> DomainFile:
    """Read a config file and see what it needs.

    Raises:
        Failure: It cannot be read, or is malformed; line and column are named.
    """
    from daemons.xl.domain_config import parse_domain  # noqa: PLC0415

    text = read_config(path)
    domain = parse_domain(text, str(path))
    backends = tuple(device.backend for device in domain.vtpms)
    return DomainFile(
        path=path, text=text, name=domain.name, role=domain.role.value, backends=backends
    )


def in_start_order(files: Sequence[DomainFile]) -> list[DomainFile]:
    """Put each file behind those of its backends; otherwise the order stays.

    Raises:
        Failure: Two files of one name, or domains that wait for each other.
    """
    names = [file.name for file in files]
    for file in files:
        if names.count(file.name) > 1:
            raise _bad_set(f"two of the files are about a domain {file.name}")
    ordered: list[DomainFile] = []
    left = list(files)
    while left:
        waited_for = {file.name for file in left}
        ready = [file for file in left if waited_for.isdisjoint(file.backends)]
        if not ready:
            raise _bad_set(f"{', '.join(sorted(waited_for))} wait for each other")
        ordered += ready
        left = [file for file in left if file not in ready]
    return ordered


def _bad_set(why: str) -> Failure:
    return Failure(
        "cannot start these domains together",
        why=why,
        next_step="look at name= and vtpm=[...] in the config files",
        exit_code=ExitCode.CONFIGURATION,
    )


def start_launcher(places: Places, step: Step) -> None:
    """Start the launcher of an installation if it does not run, and wait until it answers.

    Raises:
        Failure: It ended, or took too long; its last words are shown.
    """
    from daemons.systemd import stack_control  # noqa: PLC0415 - `--help` needs none of it

    if launcher_pid(places) is not None or stack_control.is_run_by_systemd(places):
        return
    if stack_control.is_installed(places):
        stack_control.SystemdStack(places).call("power_on", step)
        return
    step("starting the launcher")
    # Imported only now: 150 ms that nobody else needs to pay.
    from daemons.launcherd import start_in_background  # noqa: PLC0415

    start_in_background(places)


def launcher_pid(places: Places) -> int | None:
    """Ask the kernel which process listens on the launcher's socket; None when nobody does."""
    from daemons.listeners import (  # noqa: PLC0415 - `--help` needs none of it
        Kind,
        NotListening,
        connect,
        peer_credentials,
    )

    try:
        connection = connect(places.launcher_socket, Kind.STREAM)
    except NotListening:
        return None
    with connection:
        return peer_credentials(connection).pid


def stop_launcher(places: Places, root: str | None) -> bool:
    """Stop the stack and wait until the launcher's process has ended.

    Returns:
        False when nothing ran.

    Raises:
        Failure: It has not ended in time.
    """
    from daemons.systemd.stack_control import is_run_by_systemd  # noqa: PLC0415

    if launcher_pid(places) is None and is_run_by_systemd(places):
        with progress("stopping") as step:
            ask(root, "stop", step)
        return True
    pid, has_ended_leftovers = _launcher_or_leftovers(places)
    if pid is None:
        return has_ended_leftovers
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        with progress("stopping") as step:
            ask(root, "stop", step)
            ended, _, _ = select.select([process], [], [], LAUNCHER_END_S)
        with contextlib.suppress(ChildProcessError):  # it is our child when this process started it
            os.waitpid(pid, os.WNOHANG)
    finally:
        os.close(process)
    if not ended:
        raise Failure(
            "the launcher is still there",
            why=f"process {pid} has stopped everything but has not ended",
            next_step=f"look at {places.log_dir / 'launcher.log'}",
            exit_code=ExitCode.FAILED,
        )
    return True


def _launcher_or_leftovers(places: Places) -> tuple[int | None, bool]:
    """Give the launcher's pid; or, without one, end what a killed launcher has left.

    Returns:
        Its pid or None, and whether anything was left.

    Raises:
        AlreadyRunning: There is one that neither answers nor ends.
    """
    # `--help` needs neither
    from daemons.launcher.leftovers import end_leftovers  # noqa: PLC0415
    from daemons.listeners import AlreadyRunning  # noqa: PLC0415

    deadline = time.monotonic() + LAUNCHER_END_S
    while True:
        pid = launcher_pid(places)
        if pid is not None:
            return pid, False
        try:
            return None, bool(end_leftovers(places))
        except AlreadyRunning:  # it does not listen yet, or no longer
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_AGAIN_S)
