"""The `vtpm` command: how every subcommand is begun and ended.

What there is, is in `app.py`. `vtpm simulator` is begun without it: a simulator is started once a
test, and the table of subcommands with the library under it would take a third of its start.

- Exit status 0 means done, not begun. A failure is three lines on stderr and its own status.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from daemons.errors import ExitCode

_NAMES = ("vtpm", "xl")


def main() -> int:
    """Run the command with this process's arguments and give its exit status."""
    called = Path(sys.argv[0]).name
    program = called if called in _NAMES else _NAMES[0]
    try:
        if sys.argv[1:2] == ["simulator"]:
            from daemons.cli import simulator  # noqa: PLC0415 - see above

            return simulator.main(sys.argv[2:], f"{program} simulator")
        from daemons.cli.app import app  # noqa: PLC0415 - see above

        app(prog_name=program)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except Exception:  # noqa: BLE001 - the one place where a bug of ours ends
        traceback.print_exc()
        sys.stderr.write(f"{program}: this is a bug of ours; please report the lines above\n")
        return ExitCode.BUG
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
