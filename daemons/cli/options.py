"""What every subcommand is declared with, and the way from its options to the launcher."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isnan
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

if TYPE_CHECKING:
    from daemons.places import Places


def _inherit_root(context: typer.Context, value: str | None) -> str | None:
    """`vtpm --root DIR list` means `vtpm list --root DIR`."""
    return value or (context.obj if isinstance(context.obj, str) else None)


Root = Annotated[
    str | None,
    typer.Option(
        "--root",
        metavar="DIR",
        callback=_inherit_root,
        help="Directory of the installation; else VTPM_ROOT, / for root, "
        "~/.local/state/vtpm for others.",
    ),
]


def new_app(**settings: Any) -> typer.Typer:  # noqa: ANN401 - passed through
    """A subcommand, or a group of them.

    Plain help: rich would cost more than the whole of `vtpm list`.
    """
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        **settings,
    )


SECONDS_MIN: Final = 0.1
SECONDS_MAX: Final = 24 * 3600.0
"""As for settings: the system's own clocks and waits take no number without end."""


def no_nan(value: float | None) -> float | None:
    """Refuse the one number that is within every range."""
    if value is not None and isnan(value):
        raise typer.BadParameter("nan is no number of seconds")
    return value


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Domain = Annotated[str, typer.Argument(metavar="DOMAIN", help="Name or domid.")]
Domains = Annotated[list[str], typer.Argument(metavar="DOMAIN...", help="Names or domids.")]


def places_of(root: str | None) -> Places:
    """The installation that the options name."""
    from daemons.places import Places  # noqa: PLC0415 - `--help` needs none of it

    return Places.choose(root, os.environ)


def ask(
    root: str | None,
    method: str,
    /,
    progress: Callable[[str], None] | None = None,
    **params: object,
) -> Any:  # noqa: ANN401 - whatever JSON the method gives
    """Call one method of the launcher of this installation, or of systemd in its place.

    Parameters that are None are left out.

    Raises:
        Failure: The stack is not up, or what the launcher answered.
    """
    from daemons.systemd.stack_control import open_control  # noqa: PLC0415

    with open_control(places_of(root)) as stack:
        return stack.call(method, progress, 0, **params)
