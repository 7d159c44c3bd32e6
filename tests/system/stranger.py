"""A process that is no part of the stack and tries doors; run as a program.

It reads one JSON array a line, `["ring", PATH]` or `["tis", PATH, LOCALITY]`, tries to read a PCR
there, and answers with one JSON object a line: {"pcr": HEX} or {"refused": TEXT}.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daemons.errors import Failure
from daemons.ring_client import RingClient
from daemons.tis_link import TisLink

READ_PCR_4 = bytes.fromhex("00c1 0000000e 00000015 00000004")
PATIENCE_S = 10.0


class Stranger:
    """The side of the test: one such process.

    Args:
        process: Running this module.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def tries(self, *door: object) -> dict[str, Any]:
        """Let it try a door; see the module."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(door, default=str) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@contextlib.contextmanager
def stranger() -> Iterator[Stranger]:
    """Start one; it ends with the context."""
    with subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=dict(os.environ),
    ) as process:
        try:
            yield Stranger(process)
        finally:
            process.kill()


def main() -> None:
    for line in sys.stdin:
        kind, path, *more = json.loads(line)
        try:
            if kind == "ring":
                with RingClient(Path(path)) as ring:
                    ring.connect(PATIENCE_S)
                    response = ring.exchange(READ_PCR_4)
            else:
                with TisLink(Path(path), more[0], use_interrupts=False) as link:
                    response = link.exchange(READ_PCR_4)
            answer = {"pcr": response[10:].hex()}
        except Failure as failure:
            answer = {"refused": str(failure)}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
