"""`vtpm demo`: the whole story on one screen, in a scratch root.

Whatever happens, the stack is stopped and the scratch root removed.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from daemons.cli.options import Root
from daemons.errors import ExitCode, Failure


def demo(root: Root = None) -> None:
    """Tell the whole story on one screen.

    It runs in a scratch root and ends with status 0 only if all of it was seen. With --root it uses
    that directory, which must be new or empty, and keeps it.
    """
    from daemons.cli.story import Story  # noqa: PLC0415 - it imports all that a client needs
    from daemons.launcher.processes import become_child_subreaper  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _leave)
    become_child_subreaper()
    started = time.monotonic()
    with _scratch_root(root) as scratch:
        story = Story(scratch)
        try:
            story.tell()
        except BaseException:
            with suppress(Failure):  # what went wrong first is what has to be told
                story.clean_up()
            if root is None:
                story.say("The scratch root goes, with its logs; one given with --root stays.")
            raise
        story.clean_up()
    story.check_nothing_is_left(is_kept=root is not None)
    story.say(f"\n[bold green]All of it was seen[/] in {time.monotonic() - started:.1f} s.")


@contextmanager
def _scratch_root(chosen: str | None) -> Iterator[Path]:
    if chosen is not None:
        path, why = Path(chosen).absolute(), "it is not empty"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_usable = not any(path.iterdir())
        except OSError as error:
            is_usable, why = False, error.strerror or str(error)
        if not is_usable:
            raise Failure(
                f"the demo does not use {path}",
                why=why,
                next_step="name a new directory, or none",
                exit_code=ExitCode.USAGE,
            )
        yield path
        return
    path = Path(tempfile.mkdtemp(prefix="vtpm-demo-"))
    try:
        yield path
    finally:
        shutil.rmtree(path)


def _leave(number: int, _frame: object) -> None:
    """Turn SIGTERM into an orderly end, so that nothing is left behind; the next ones into nothing.

    Who sends another one must not end what puts away.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(128 + number)
