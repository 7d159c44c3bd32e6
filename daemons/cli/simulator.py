"""`vtpm simulator`: the engine alone, on a socket.

Its options are declared once, for argparse, so that the simulator can be started without typer;
for `vtpm --help` and `vtpm --root DIR simulator` the table of subcommands has them from there
(`simulator_command.py`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from daemons.errors import ExitCode, Failure

STALL_S_MAX = 24 * 3600.0
"""As for settings: the system's waits take no number without end."""
SUMMARY = "Serve one TPM 1.2 on a stream socket until SIGTERM. SIGHUP is a power cycle."


def parser(program: str) -> argparse.ArgumentParser:
    """The options, for a program called so."""
    options = argparse.ArgumentParser(prog=program, description=SUMMARY, allow_abbrev=False)
    add = options.add_argument
    add("--socket", metavar="PATH", type=Path, required=True, help="Where the TPM listens.")
    add("--state", metavar="DIR", type=Path, help="Where its memory is kept.")
    add(
        "--control",
        metavar="PATH",
        type=Path,
        help="Where swtpm's control channel is, for QEMU; else there is none.",
    )
    add("--journal", action="store_true", help="Goes on after a kill where it was.")
    add("--no-ek", action="store_true", help="As it leaves a factory that makes no key.")
    add("--ephemeral", action="store_true", help="Keep nothing; no --state is needed.")
    add(
        "--seed",
        metavar="N",
        type=int,
        help="The same TPM in every run. Not for secrets.",
    )
    add("--fail-self-test", action="store_true", help="Be broken: go into failure mode.")
    add("--clients-max", metavar="N", type=int, help="Connections at a time; else 64.")
    add(
        "--stall",
        metavar="SECONDS",
        type=float,
        help="How long a client may stop inside a command; else 60.",
    )
    return options


def main(arguments: Sequence[str], program: str) -> int:
    """Run the simulator with these arguments; its exit status."""
    options = parser(program)
    return run(options.parse_args(arguments), options.error)


def run(chosen: argparse.Namespace, refuse: Callable[[str], Any]) -> int:
    """Run the simulator as was chosen; its exit status.

    Args:
        chosen: Of the options.
        refuse: Called with what is wrong with them; does not return.
    """
    from daemons.simulator import Options, run_simulator  # noqa: PLC0415 - slow to import

    if chosen.state is None and not chosen.ephemeral:
        refuse("--state: say where its memory is kept, or --ephemeral")
    if chosen.state is not None and chosen.ephemeral:
        refuse("--state: an ephemeral TPM keeps nothing there")
    if chosen.journal and chosen.ephemeral:
        refuse("--journal: an ephemeral TPM has no memory to go on with")
    if chosen.journal and chosen.fail_self_test:
        refuse("--fail-self-test: a broken TPM has nothing to go on with, leave --journal out")
    for option, limit in (("--clients-max", chosen.clients_max), ("--stall", chosen.stall)):
        if limit is not None and not limit > 0:
            refuse(f"{option}: {limit} is not above 0")
    if chosen.stall is not None and chosen.stall > STALL_S_MAX:
        refuse(f"--stall: {chosen.stall} is more than {STALL_S_MAX:g} seconds")
    limits = {"clients_max": chosen.clients_max, "stall_s": chosen.stall}
    return run_simulator(
        Options(
            **{name: limit for name, limit in limits.items() if limit is not None},
            state=chosen.state or Path(),
            socket=_absolute(chosen.socket),
            control=chosen.control and _absolute(chosen.control),
            has_ek=not chosen.no_ek,
            is_ephemeral=chosen.ephemeral,
            has_journal=chosen.journal,
            seed=chosen.seed,
            fails_self_test=chosen.fail_self_test,
        )
    )


def _absolute(path: Path) -> Path:
    try:
        return path.absolute()
    except FileNotFoundError as error:
        raise Failure(
            f"cannot tell where {path} is",
            why="the working folder has been removed",
            next_step="Go into a folder that is there, or give the whole path",
            exit_code=ExitCode.NO_INPUT,
        ) from error
