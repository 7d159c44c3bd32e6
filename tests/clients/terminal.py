"""Run a program that asks for passwords, as a person does: on a terminal, answering its prompts."""

from __future__ import annotations

import contextlib
import os
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_PIECE_BYTES = 4096
_PROMPT = re.compile(rb"[Pp]assword:\s*$")


class UnansweredError(AssertionError):
    """The program asked more than there were answers, or never ended."""


def run_on_terminal(
    words: Sequence[str],
    typed: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    deadline_s: float,
) -> tuple[int, str]:
    """Run a program to its end.

    Args:
        words: Its name and arguments.
        typed: What to answer, in the order of its prompts.
        environment: Its environment.
        directory: Where it runs.
        deadline_s: How long it may take.

    Returns:
        Its status, and all that stood on the terminal.
    """
    master, slave = os.openpty()
    try:
        # Programs read passwords from /dev/tty, which is the terminal that a session controls.
        with subprocess.Popen(
            ["setsid", "--ctty", "--wait", *words],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=dict(environment),
            cwd=directory,
        ) as running:
            os.close(slave)
            try:
                shown = _answered(master, list(typed), time.monotonic() + deadline_s)
            except UnansweredError as error:
                running.kill()
                raise UnansweredError(f"{' '.join(words)}: {error}") from error
            return running.wait(deadline_s), shown.decode(errors="replace").replace("\r\n", "\n")
    finally:
        os.close(master)


def _answered(master: int, answers: list[str], deadline: float) -> bytes:
    shown, asked_at = b"", 0
    # The other side of a terminal ends with EIO.
    with contextlib.suppress(OSError):
        while True:
            left = max(0.0, deadline - time.monotonic())
            if not select.select([master], [], [], left)[0]:
                raise UnansweredError(f"it has not ended; it said\n{shown.decode()}")
            piece = os.read(master, _PIECE_BYTES)
            if not piece:
                break
            shown += piece
            if _PROMPT.search(shown, asked_at):
                if not answers:
                    raise UnansweredError(f"it asks again; it said\n{shown.decode()}")
                os.write(master, answers.pop(0).encode() + b"\n")
                asked_at = len(shown)
    return shown
