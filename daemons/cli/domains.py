"""Domains: create, destroy, shutdown, reboot, pause, unpause, list, domid; arguments as in xl."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from daemons.cli.options import Domain, Domains, Json, Root, ask
from daemons.cli.output import (
    print_json,
    print_line,
    print_rows,
    progress,
    state_and_reason,
    warn,
)
from daemons.errors import ExitCode, Failure
from daemons.named_files import read_bytes

CONFIG_BYTES_MAX = 64 * 1024

ConfigFile = Annotated[Path, typer.Argument(metavar="CFG", help="An xl config file.")]
_LIST_HEADER = ("Name", "ID", "Mem", "State", "PID", "Restarts", "Label")


def read_config(path: Path) -> str:
    """Read an xl config file as text; what it says is judged by the launcher.

    Raises:
        Failure: It cannot be read, is too long, or is not UTF-8.
    """
    try:
        data = read_bytes(path, CONFIG_BYTES_MAX)
        if len(data) > CONFIG_BYTES_MAX:
            why = f"it has more than {CONFIG_BYTES_MAX} bytes"
        else:
            return data.decode("utf-8")
    except OSError as error:
        why = error.strerror or str(error)
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not UTF-8: this is not a text file"
    raise Failure(
        f"cannot read the config file {path}",
        why=why,
        next_step="examples/trusted-dom0/ has config files that work",
        exit_code=ExitCode.NO_INPUT,
    )


def create(
    config: ConfigFile,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings that follow those of the file."),
    ] = None,
    paused: Annotated[bool, typer.Option("--paused", "-p", help="Leave it paused.")] = False,
    root: Root = None,
) -> None:
    """Create a domain from an xl config file.

    Returns when it is ready.
    """
    text = "\n".join([read_config(config), *(settings or [])])
    with progress(f"creating {config.name}") as step:
        created = ask(
            root,
            "create",
            step,
            config_text=text,
            path=str(config.resolve()),
            paused=paused,
        )
    warn(created)


def destroy(domain: Domain, root: Root = None) -> None:
    """End a domain at once, without asking it."""
    ask(root, "destroy", domain=domain)


def shutdown(
    domains: Domains,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="As in xl; always on here.")] = True,
    root: Root = None,
) -> None:
    """Ask domains to shut down; return when they have."""
    del wait  # done, not begun: the launcher answers when the domain has gone
    _each("shutdown", domains, root)


def reboot(domains: Domains, root: Root = None) -> None:
    """Reboot domains; a guest's vTPM is reset with it. Return when they are ready again."""
    _each("reboot", domains, root)


def pause(domains: Domains, root: Root = None) -> None:
    """Stop domains from running, without ending them."""
    _each("pause", domains, root)


def unpause(domains: Domains, root: Root = None) -> None:
    """Let paused domains run.

    A domain that was created with -p boots now.
    """
    _each("unpause", domains, root)


def list_domains(
    domains: Annotated[list[str] | None, typer.Argument(metavar="[DOMAIN]...")] = None,
    as_json: Json = False,
    root: Root = None,
) -> None:
    """List domains.

    Columns: name, domid, memory in MiB, state, pid, restarts, label. The reason of a state, if
    there is one, stands below the row.
    """
    found = ask(root, "list")
    if domains:
        found = [_only(found, wanted) for wanted in domains]
    if as_json:
        print_json(found)
        return
    print_rows(
        _LIST_HEADER,
        [
            [
                state_and_reason(row)[0] if key == "state" else row.get(key)
                for key in ("name", "domid", "memory", "state", "pid", "restarts", "label")
            ]
            for row in found
        ],
        [state_and_reason(row)[1] for row in found],
    )


def domid(domain: Domain, root: Root = None) -> None:
    """Print the domid of a domain."""
    print_line(str(ask(root, "domid", name=domain)))


def _each(method: str, domains: list[str], root: str | None) -> None:
    for domain in domains:
        with progress(f"{method} {domain}") as step:
            ask(root, method, step, domain=domain)


def _only(rows: list[dict[str, object]], wanted: str) -> dict[str, object]:
    for row in rows:
        if wanted in (row["name"], str(row["domid"])):
            return row
    raise Failure(
        f"there is no domain {wanted}",
        why="no domain has this name or domid",
        next_step="vtpm list shows those that there are",
    )
