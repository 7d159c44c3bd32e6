"""Devices of domains: vtpm-attach, vtpm-list, vtpm-detach, block-attach, block-list.

Arguments and columns are those of xl, so that scripts written for it work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from daemons.cli.options import Domain, Domains, Json, Root, ask
from daemons.cli.output import print_json, print_line
from daemons.errors import ExitCode, Failure

_VTPM_HEADER: Final = "{:<3} {:<2} {:<36} {:<6} {:<5} {:<6} {:<5} {:<10}"
_VTPM_ROW: Final = (
    "{idx:<3} {be:<2} {uuid} {handle:>6} {state:>5} {evt_ch:>6} {ring_ref:>8} {be_path:<30}"
)
_BLOCK_HEADER: Final = "{:<5} {:<3} {:<6} {:<5} {:<6} {:<8} {:<30}"
_BLOCK_ROW: Final = (
    "{vdev:<5} {be:<3} {handle:<6} {state:<5} {evt_ch:<6} {ring_ref:<8} {be_path:<30}"
)
_UNKNOWN: Final = -1
"""What xl shows for a number that nobody has published yet."""


def vtpm_attach(
    domain: Domain,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[uuid=UUID] [backend=DOMAIN]")
    ] = None,
    root: Root = None,
) -> None:
    """Attach a vTPM to a domain.

    Without backend=, domain 0 is the backend, as in xl.
    """
    options = _options(words or [], ("uuid", "backend"))
    uuid = _uuid(options["uuid"]) if "uuid" in options else None
    backend = options.get("backend", "Domain-0")
    ask(root, "vtpm_attach", domain=domain, backend=backend, uuid=uuid)


def vtpm_list(domains: Domains, as_json: Json = False, root: Root = None) -> None:
    """List the vTPMs of domains, in xl's columns."""
    devices = ask(root, "vtpm_list", domains=domains)
    if as_json:
        print_json(devices)
        return
    print_line(
        _VTPM_HEADER.format("Idx", "BE", "Uuid", "handle", "state", "evt-ch", "ring-ref", "BE-path")
    )
    _print_devices(_VTPM_ROW, devices)


def vtpm_detach(
    domain: Domain,
    device: Annotated[str, typer.Argument(metavar="DEVID|UUID")],
    root: Root = None,
) -> None:
    """Detach a vTPM, named by uuid or number.

    The vTPM itself and its state stay.
    """
    ask(root, "vtpm_detach", domain=domain, devid_or_uuid=device)


def block_attach(
    domain: Domain,
    spec: Annotated[list[str], typer.Argument(metavar="DISK...", help="As in disk=[...].")],
    root: Root = None,
) -> None:
    """Attach a disk to a domain."""
    ask(root, "block_attach", domain=domain, spec=",".join(spec))


def block_list(domains: Domains, as_json: Json = False, root: Root = None) -> None:
    """List the disks of domains, in xl's columns."""
    disks = [disk for domain in domains for disk in ask(root, "block_list", domain=domain)]
    if as_json:
        print_json(disks)
        return
    print_line(
        _BLOCK_HEADER.format("Vdev", "BE", "handle", "state", "evt-ch", "ring-ref", "BE-path")
    )
    _print_devices(_BLOCK_ROW, disks)


def _print_devices(row: str, devices: Iterable[Mapping[str, Any]]) -> None:
    keys = ("idx", "vdev", "be", "handle", "state", "evt_ch", "ring_ref", "be_path", "uuid")
    for device in devices:
        values = {key: device.get(key, _UNKNOWN) for key in keys}
        print_line(row.format(**values))


def _options(words: list[str], known: tuple[str, ...]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in known:
            raise Failure(
                f"unrecognized argument {word!r}",
                why=f"only {' and '.join(f'{k}=...' for k in known)} are known, as separate words",
                next_step="vtpm vtpm-attach guest1 uuid=UUID backend=vtpm-guest1",
                exit_code=ExitCode.USAGE,
            )
        found[key] = value
    return found


def _uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as error:
        raise Failure(
            f"invalid uuid {text!r}",
            why="a uuid has 32 hexadecimal digits in the groups 8-4-4-4-12",
            next_step="uuidgen makes one",
            exit_code=ExitCode.USAGE,
        ) from error
