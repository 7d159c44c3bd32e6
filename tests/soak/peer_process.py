"""The side of who orders hostile peers: one process of `hostile_peers`, and what lets it in."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Final

from daemons.errors import Failure
from tests.system.scratch_stack import PROJECT, ScratchStack

IMP: Final = """
name="imp"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
seclabel="system_u:system_r:dom0_t"
iomem=["fed40,1"]
"""
"""A domain that has a page of the chip."""


def mallory(vtpm: str) -> str:
    """The config of a guest that has this vTPM."""
    return f"""
name="mallory"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=64
vtpm=["backend={vtpm}"]
"""


class HostilePeers:
    """A process of `hostile_peers`, as whatever domain it has to be.

    Args:
        stack: The installation; None where nobody has to let it in.
        door: What it attacks.
        path: The socket.
        seed: Drawn from.
        domain: Name and config that let it in; None for an outsider.
    """

    def __init__(
        self,
        stack: ScratchStack | None,
        door: str,
        path: Path,
        seed: int,
        domain: tuple[str, str] | None = None,
    ) -> None:
        self.door = door
        self.counts: Counter[str] = Counter()
        self.failure = ""
        self._stack, self._domain = stack, domain
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.soak.hostile_peers", door, str(path), str(seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=PROJECT,
        )

    def let_in(self) -> None:
        """Have the launcher take this process for its domain, if it does not."""
        if self._domain is None or self._stack is None:
            return
        name, config = self._domain
        if name not in self._stack.rows():
            with contextlib.suppress(Failure):  # its vTPM may be on its way back
                self._stack.ask("attach_external", config_text=config, pid=self._process.pid)

    def order(self, word: str) -> None:
        """`go`, `rest`, `each` or `connect N`; returns when it is so."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        self.counts, self.failure = Counter(told["counts"]), told["failure"]

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()
