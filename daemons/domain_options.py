"""The arguments of a domain's daemon, as the launcher and the units give them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from daemons.journal import GO_ON


@dataclass(frozen=True, slots=True, kw_only=True)
class DomainOptions:
    """Arguments of the process.

    Attributes:
        root: Of the installation.
        domain: Its name.
        config: Its xl config file.
        must_go_on: A process was killed, and without its journal none may follow it.
    """

    root: Path
    domain: str
    config: Path
    must_go_on: bool = False


def parse_domain_options(
    argv: list[str] | None, *, program: str, description: str, has_journal: bool = False
) -> DomainOptions:
    """Read the arguments; those that are wrong end the process with their reason.

    Args:
        argv: The arguments; those of the process when None.
        program: Its name.
        description: One sentence for `--help`.
        has_journal: Whether there is something to go on from.
    """
    parser = argparse.ArgumentParser(prog=program, description=description)
    parser.add_argument("--root", type=_root, default=Path("/"), help="root of the installation")
    parser.add_argument("--domain", required=True, help="name of its domain")
    parser.add_argument("--config", type=Path, required=True, help="the domain's xl config file")
    if has_journal:
        parser.add_argument(GO_ON, action="store_true", help="refuse to start without a journal")
    found = parser.parse_args(argv)
    return DomainOptions(
        root=found.root,
        domain=found.domain,
        config=found.config,
        must_go_on=has_journal and found.go_on,
    )


def _root(text: str) -> Path:
    try:
        return Path(text).resolve()
    except (OSError, RuntimeError) as error:  # a loop of symlinks is a RuntimeError
        raise argparse.ArgumentTypeError(f"{text!a} cannot be used: {error}") from error
