"""Programs inside a guest: device, exec, shell.

A guest here is its TPM: a program is inside it when its environment points at the guest's tpm0.
"""

from __future__ import annotations

import os
import shlex
import stat
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

import typer

from daemons.cli.options import Domain, Root, ask, places_of
from daemons.cli.output import print_line
from daemons.errors import ExitCode, Failure

NOT_EXECUTABLE: Final = 126
NOT_FOUND: Final = 127
"""Exit statuses of a shell whose command cannot be run."""

Row = dict[str, Any]
"""One domain in the launcher's listing."""
Command = Annotated[
    list[str], typer.Argument(metavar="-- COMMAND...", help="The program and its arguments.")
]


def device(guest: Domain, root: Root = None) -> None:
    """Print the path of a guest's tpm0 socket."""
    print_line(str(tpm0_of(guest, root)))


def exec_in_guest(guest: Domain, command: Command, root: Root = None) -> None:
    """Run a program as if inside a guest.

    TPM_DEVICE and what TrouSerS needs are in its environment. Its exit status is this command's.
    """
    environment = {**os.environ, **guest_environment(guest, root)}
    run_instead(command, environment)


def shell(
    guest: Annotated[str | None, typer.Argument(metavar="[GUEST]")] = None, root: Root = None
) -> None:
    """Start a shell in which `xl` is this command.

    If a guest is named, programs in it find the guest's tpm0.
    """
    environment = dict(os.environ) | {"VTPM_ROOT": str(places_of(root).root)}
    if guest is not None:
        environment |= guest_environment(guest, root)
    program = environment.get("SHELL") or "/bin/sh"
    try:
        status = _status_of_shell(program, environment)
    except OSError as error:
        raise Failure(
            f"cannot start the shell {program}",
            why=f"{error.filename or program}: {(error.strerror or str(error)).lower()}",
            next_step="Set SHELL to a program, and TMPDIR to a folder, that can be used",
            exit_code=ExitCode.CONFIGURATION,
        ) from error
    raise typer.Exit(status if status >= 0 else 128 - status)


def _status_of_shell(program: str, environment: dict[str, str]) -> int:
    with tempfile.TemporaryDirectory(prefix="vtpm-shell-") as directory:
        for name in ("xl", "vtpm"):
            _write_wrapper(Path(directory) / name)
        path = f"{directory}:{environment.get('PATH', os.defpath)}"
        ended = subprocess.run([program], env={**environment, "PATH": path}, check=False)  # noqa: S603 - the user's own shell
    return ended.returncode


def guest_row(guest: str, root: str | None) -> Row:
    """The launcher's row of a running guest.

    Raises:
        Failure: No such domain, not a guest, or not running.
    """
    rows: list[Row] = ask(root, "list")
    for row in rows:
        if guest in (row["name"], str(row["domid"])):
            break
    else:
        raise Failure(
            f"there is no domain {guest}",
            why="no domain has this name or domid",
            next_step=f"vtpm create {guest}.cfg, or vtpm list for those that there are",
        )
    if row["role"] != "guest":
        raise Failure(
            f"{guest} has no tpm0",
            why=f"it is no guest, but a domain of the role {row['role']}",
            next_step="name the guest that uses it",
            exit_code=ExitCode.USAGE,
        )
    if row["state"] != "running":
        raise Failure(
            f"the tpm0 of {guest} cannot be used",
            why=f"the guest is {row['state']}",
            next_step=f"vtpm unpause {guest}" if row["state"] == "paused" else "vtpm status",
            exit_code=ExitCode.UNAVAILABLE,
        )
    return row


def tpm0_of(guest: str, root: str | None) -> Path:
    """Path of a running guest's tpm0 socket.

    Raises:
        Failure: As `guest_row`; or the guest has no vTPM.
    """
    path = places_of(root).domain(guest_row(guest, root)["name"]).tpm0
    try:
        is_there = stat.S_ISSOCK(path.stat().st_mode)
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise Failure(
            f"{guest} has no tpm0",
            why=f"there is no socket at {path}: the guest has no vTPM",
            next_step='add vtpm=["backend=..."] to its config file',
            exit_code=ExitCode.UNAVAILABLE,
        )
    return path


def guest_environment(guest: str, root: str | None) -> dict[str, str]:
    """What programs need to find the guest's TPM: our own name for it, and TrouSerS'.

    Raises:
        Failure: As `tpm0_of`.
    """
    tpm0_of(guest, root)
    environment: dict[str, str] = ask(root, "guest_environment", domain=guest)
    return environment


def run_instead(command: list[str], environment: Mapping[str, str]) -> NoReturn:
    """Become another program.

    Raises:
        typer.Exit: It cannot be run; with a shell's exit status for that.
    """
    sys.stdout.flush()
    if not command[0]:  # execvpe has no error of the system for it
        sys.stderr.write("vtpm: cannot run '': it is no name\n")
        raise typer.Exit(NOT_FOUND)
    try:
        os.execvpe(command[0], command, dict(environment))  # noqa: S606 - the user asked for it
    except OSError as error:
        sys.stderr.write(f"vtpm: cannot run {command[0]}: {error.strerror}\n")
        status = NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        raise typer.Exit(status) from error


def _write_wrapper(path: Path) -> None:
    """Write a script that runs this command under its own name."""
    interpreter = shlex.quote(sys.executable)
    path.write_text(f'#!/bin/sh\nexec {interpreter} -m daemons.cli.main "$@"\n')
    path.chmod(0o755)
