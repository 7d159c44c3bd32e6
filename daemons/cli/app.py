"""The subcommands of `vtpm` in one table.

Subcommands follow `xl` where `xl` has them, and it can be called by that name. Each is a short
handler in one of the modules of this package; what they do is asked of the launcher.

- Start-up stays quick: a module imports what it needs when it is run.
"""

from __future__ import annotations

from typing import Annotated, Any, Final

import typer
from typer.core import TyperGroup

from daemons.cli import (
    crashsweep,
    demo,
    devices,
    doctor,
    domains,
    fault,
    guests,
    image,
    pcrs,
    simulator,
    stack,
    status,
    tpm,
)
from daemons.cli.output import report
from daemons.errors import Failure

PROGRAM: Final = "vtpm"


class _Group(TyperGroup):
    """Ends on a `Failure` with its three lines and its exit status."""

    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - the type is the library's own
        try:
            return super().invoke(ctx)
        except Failure as failure:
            report(failure, ctx.find_root().info_name or PROGRAM)
            raise typer.Exit(int(failure.exit_code)) from failure


def _new_app(**settings: Any) -> typer.Typer:  # noqa: ANN401 - passed through
    # Plain help: rich would cost more than the whole of `vtpm list`.
    return typer.Typer(
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        no_args_is_help=True,
        **settings,
    )


app = _new_app(name=PROGRAM, cls=_Group)
image_app = _new_app(name="image")
fault_app = _new_app(name="fault")
tpm_app = _new_app(name="tpm")


@app.callback()
def vtpm(
    context: typer.Context,
    root: Annotated[
        str | None, typer.Option("--root", metavar="DIR", help="Directory of the installation.")
    ] = None,
) -> None:
    """Virtual TPMs for guests; names and forms are those of xl."""
    context.obj = root


app.command()(stack.up)
app.command()(stack.down)
app.command()(stack.reload)
app.command()(status.status)
app.command()(doctor.doctor)
app.command()(domains.create)
app.command()(domains.destroy)
app.command()(domains.shutdown)
app.command()(domains.reboot)
app.command()(domains.pause)
app.command()(domains.unpause)
app.command("list")(domains.list_domains)
app.command()(domains.domid)
app.command()(devices.vtpm_attach)
app.command()(devices.vtpm_list)
app.command()(devices.vtpm_detach)
app.command()(devices.block_attach)
app.command()(devices.block_list)
app.command()(guests.device)
app.command("exec")(guests.exec_in_guest)
app.command()(guests.shell)
app.command("pcrs")(pcrs.show_pcrs)
app.command("simulator")(simulator.as_typer_command())
app.command()(demo.demo)
app.command()(crashsweep.crashsweep)
fault_app.command("run")(fault.run)
fault_app.command("check")(fault.check)
app.add_typer(fault_app, name="fault", help="Faults on purpose.")
tpm_app.callback()(tpm.select)
for _command in tpm.COMMANDS:
    tpm_app.command()(_command)
app.add_typer(tpm_app, name="tpm", help="A guest's TPM: common commands.")
image_app.command("make")(image.image_make)
image_app.command("show")(image.image_show)
app.add_typer(image_app, name="image", help="Guest images: what a guest boots.")
