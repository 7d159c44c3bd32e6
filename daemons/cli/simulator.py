"""`vtpm simulator`: the engine alone, on a socket."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def simulator(
    socket: Annotated[Path, typer.Option(metavar="PATH", help="Where the TPM listens.")],
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where its memory is kept.")
    ] = None,
    *,
    no_ek: Annotated[
        bool, typer.Option("--no-ek", help="As it leaves a factory that makes no key.")
    ] = False,
    ephemeral: Annotated[
        bool, typer.Option("--ephemeral", help="Keep nothing; no --state is needed.")
    ] = False,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="The same TPM in every run. Not for secrets.")
    ] = None,
) -> None:
    """Serve one TPM 1.2 on a stream socket until SIGTERM. SIGHUP is a power cycle."""
    from daemons.simulator import Options, run_simulator  # noqa: PLC0415 - slow to import

    if state is None and not ephemeral:
        raise typer.BadParameter(
            "say where its memory is kept, or --ephemeral", param_hint="--state"
        )
    options = Options(
        state=state or Path(),
        socket=socket.absolute(),
        has_ek=not no_ek,
        is_ephemeral=ephemeral,
        seed=seed,
    )
    raise typer.Exit(run_simulator(options))
