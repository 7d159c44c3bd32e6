"""vtpm-systemd: the small programs that the units run beside the daemons. People use `vtpm`.

| Words | What |
|---|---|
| generate DIR | drop-ins from the config files; run by systemd itself |
| setup | run directories of the chip and the manager |
| setup NAME | user and run directory of a domain |
| register ROLE NAME | before the process of a domain starts |
| forget ROLE NAME | after it has ended |
| power-on | the platform's firmware |
| reload | a daemon reads again what may change while it runs |
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.places import Places
from daemons.registry import Role
from daemons.sd_notify import Notifier

PROGRAM: Final = "vtpm-systemd"
ROOT: Final = Path("/")
"""systemd starts one installation: the machine's."""


def main(argv: list[str] | None = None) -> int:
    """Run one of them and give its exit status."""
    options = _parser().parse_args(argv)
    try:
        _run(options, Places(ROOT))
    except Failure as failure:
        print(failure, file=sys.stderr)  # noqa: T201
        if options.what != "reload":  # the daemon serves on, and its status is its own
            Notifier.from_environment(os.environ).status(f"{failure.what}: {failure.why}")
        return int(failure.exit_code)
    except Exception:  # noqa: BLE001 - the one place where a bug of ours ends
        traceback.print_exc()
        return int(ExitCode.BUG)
    return int(ExitCode.DONE)


def _run(options: argparse.Namespace, places: Places) -> None:
    # Each imports what it needs: a generator holds up the whole machine's start.
    if options.what == "generate":
        from daemons.systemd.generating import generate, report  # noqa: PLC0415

        report(generate(places, options.directory))
    elif options.what == "setup":
        from daemons.systemd.setting_up import set_up, set_up_daemons  # noqa: PLC0415

        if options.name is None:
            set_up_daemons(places)
        else:
            set_up(places, options.name)
    elif options.what == "reload":
        from daemons.systemd.reloading import reload  # noqa: PLC0415

        reload(places, int(os.environ["MAINPID"]))
    elif options.what == "power-on":
        from daemons.systemd.platform import power_on  # noqa: PLC0415

        power_on(places)
    else:
        from daemons.systemd.registering import Ending, forget, register  # noqa: PLC0415

        if options.what == "register":
            register(places, options.name, options.role)
        else:
            forget(places, options.name, options.role, Ending.from_environment(os.environ))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="What the units of the stack run.")
    ways = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    generate = ways.add_parser("generate", help="write drop-ins; a systemd generator")
    generate.add_argument("directory", type=Path)
    generate.add_argument("others", nargs="*", help="what systemd passes too; not used")
    setup = ways.add_parser("setup", help="make the user and the directory of a domain")
    setup.add_argument("name", nargs="?", help="the chip and the manager, if it is left out")
    ways.add_parser("power-on", help="power the platform on and measure it")
    ways.add_parser("reload", help="let the daemon with MAINPID read its log level again")
    for what, told in (("register", "before a process starts"), ("forget", "after it has ended")):
        way = ways.add_parser(what, help=told)
        way.add_argument("role", type=Role, choices=[r for r in Role if r is not Role.DOMAIN0])
        way.add_argument("name")
    return parser


if __name__ == "__main__":
    sys.exit(main())
