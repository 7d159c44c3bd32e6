"""The `vtpm` command: how every subcommand is begun and ended.

What there is, is in `app.py`. `vtpm simulator` is begun without it: a simulator is started once a
test, and the table of subcommands with the library under it would take a third of its start.

- Exit status 0 means done, not begun. A failure is three lines on stderr and its own status.
- A result that standard output does not take is a failure, a reader that has gone is status 1.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from daemons import standard_streams
from daemons.errors import ExitCode, Failure

_NAMES = ("vtpm", "xl")


def main() -> int:
    """Run the command with this process's arguments and give its exit status."""
    standard_streams.open_closed()
    standard_streams.guard_outputs()
    called = Path(sys.argv[0]).name
    program = called if called in _NAMES else _NAMES[0]
    try:
        status = _run(program)
        sys.stdout.flush()
    except Failure as failure:  # of what is outside of all subcommands
        from daemons.cli.output import report  # noqa: PLC0415 - see above

        report(failure, program)
        return failure.exit_code
    except BrokenPipeError:
        return ExitCode.FAILED
    except Exception:  # noqa: BLE001 - the one place where a bug of ours ends
        traceback.print_exc()
        sys.stderr.write(f"{program}: this is a bug of ours; please report the lines above\n")
        return ExitCode.BUG
    return status


def _run(program: str) -> int:
    try:
        if sys.argv[1:2] == ["simulator"]:
            from daemons.cli import simulator  # noqa: PLC0415 - see above

            return simulator.main(sys.argv[2:], f"{program} simulator")
        from daemons.cli.app import app  # noqa: PLC0415 - see above

        app(prog_name=program)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main())
