"""The subcommands of `vtpm` in one table.

Subcommands follow `xl` where `xl` has them, and it can be called by that name. Each is a short
handler in one of the modules of this package; what they do is asked of the launcher.

- Start-up stays quick: the module of a subcommand is imported when that one is asked for, and
  imports what it needs when it is run. All are imported for `vtpm --help` alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from daemons.cli.options import new_app
from daemons.cli.output import report
from daemons.errors import Failure

PROGRAM: Final = "vtpm"
SUBCOMMANDS: Final = {
    "up": "stack:up",
    "down": "stack:down",
    "reload": "stack:reload",
    "status": "status:status",
    "doctor": "doctor:doctor",
    "create": "domains:create",
    "destroy": "domains:destroy",
    "shutdown": "domains:shutdown",
    "reboot": "domains:reboot",
    "pause": "domains:pause",
    "unpause": "domains:unpause",
    "list": "domains:list_domains",
    "domid": "domains:domid",
    "vtpm-attach": "devices:vtpm_attach",
    "vtpm-list": "devices:vtpm_list",
    "vtpm-detach": "devices:vtpm_detach",
    "block-attach": "devices:block_attach",
    "block-list": "devices:block_list",
    "device": "guests:device",
    "exec": "guests:exec_in_guest",
    "shell": "guests:shell",
    "pcrs": "pcrs:show_pcrs",
    "simulator": "simulator_command:simulator",
    "demo": "demo:demo",
    "crashsweep": "crashsweep:crashsweep",
    "fault": "fault:app",
    "tpm": "tpm:app",
    "image": "image:app",
}
"""Where each is declared: a module of this package, and its function or group in it."""


class _Group(TyperGroup):
    """Finds a subcommand by the table; ends on a `Failure` with its three lines and its status."""

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ANN401 - the type is the library's own
        for name in SUBCOMMANDS:
            self.get_command(ctx, name)
        return list(SUBCOMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ANN401 - as above
        if cmd_name in SUBCOMMANDS:
            if cmd_name not in self.commands:
                self.commands[cmd_name] = _declared(cmd_name)
            return self.commands[cmd_name]
        self.list_commands(ctx)  # whoever mistypes is told what is like it
        return None

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - as above
        try:
            return super().invoke(ctx)
        except Failure as failure:
            report(failure, ctx.find_root().info_name or PROGRAM)
            raise typer.Exit(int(failure.exit_code)) from failure


def _declared(name: str) -> Any:  # noqa: ANN401 - as above
    """A subcommand as the library has it."""
    module, _, attribute = SUBCOMMANDS[name].partition(":")
    found = getattr(import_module(f"daemons.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        return typer.main.get_command(found)
    alone = new_app()
    alone.command(name)(found)
    return typer.main.get_command(alone)


app = new_app(name=PROGRAM, cls=_Group)


@app.callback()
def vtpm(
    context: typer.Context,
    root: Annotated[
        str | None, typer.Option("--root", metavar="DIR", help="Directory of the installation.")
    ] = None,
) -> None:
    """Virtual TPMs for guests; names and forms are those of xl."""
    context.obj = root
