"""`vtpm simulator` as typer wants it, for the table of subcommands: see `simulator.py`."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Final, cast

import typer

from daemons.cli.simulator import SUMMARY, parser, run


def _command() -> Callable[..., None]:
    """A function whose parameters are the options."""

    def refuse(reason: str) -> None:
        raise typer.BadParameter(reason)

    def simulator(**chosen: object) -> None:
        raise typer.Exit(run(argparse.Namespace(**chosen), refuse))

    parameters = []
    for option in parser("vtpm simulator")._actions[1:]:  # noqa: SLF001 - the first is --help
        kind: Any = option.type or bool
        default = inspect.Parameter.empty if option.required else option.default
        declared = typer.Option(
            *option.option_strings, metavar=str(option.metavar or ""), help=option.help
        )
        typed = kind if option.required or kind is bool else kind | None
        annotation = cast("Any", Annotated)[typed, declared]
        parameters.append(
            inspect.Parameter(
                option.dest,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=annotation,
            )
        )
    simulator.__doc__ = SUMMARY
    simulator.__annotations__ = {p.name: p.annotation for p in parameters}
    vars(simulator)["__signature__"] = inspect.Signature(parameters)
    return simulator


simulator: Final = _command()
