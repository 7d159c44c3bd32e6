"""What a stack has at a quiet moment, and whether it is the same at another one.

Of each daemon: anonymous resident memory, proportional memory, descriptors, threads. Of each TPM:
loaded keys and open sessions. Of the installation: the files in its run directory.

Anonymous memory is what is judged of a daemon: it does not depend on who shares pages with it, and
so on which fork server it comes from, as proportional memory does. That is judged for the stack as
a whole.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from protocol.constants import ResourceType
from tests.system.scratch_stack import ScratchStack
from tpm12.client import TpmClient

SETTLE_S: Final = 25.0
"""trio ends a worker thread that has had nothing to do for 10 s; leaving clients take a moment."""
MEMORY_KIB_MAX: Final = 2048
MEMORY_SHARE_MAX: Final = 0.10
"""A daemon's memory may be so much more than before: both of it, whichever is more."""
STACK_SHARE_MAX: Final = 0.50
"""All daemons' proportional memory: children of different fork servers share less, up to this."""
HANDLES: Final = (ResourceType.KEY, ResourceType.AUTH, ResourceType.TRANS)
OUTSIDERS: Final = frozenset({"witness", "imp", "mallory"})
"""Domains that the launcher did not start: programs of the soak itself."""
LATE_PEERS: Final = {"vtpmmgr": 1}
"""Rings that may come later: the hostile guest's vTPM, which stores nothing, goes back to a manager
that was killed only when it has something to store."""
_LOOK_AGAIN_S: Final = 0.25


@dataclass(frozen=True)
class Daemon:
    """One process. Memory is in KiB.

    Attributes:
        descriptors: Without those of processes.
        watched: Descriptors of processes: a launcher has one of each daemon that is not the child
            of its fork server, because a launcher or a fork server before it had started it.
    """

    pid: int
    anonymous_kib: int
    proportional_kib: int
    descriptors: int
    watched: int
    threads: int


@dataclass(frozen=True)
class Moment:
    """A quiet stack.

    Attributes:
        daemons: By name.
        handles: By TPM: how many keys, authorization and transport sessions.
        files: Below the run directory, as paths relative to it.
    """

    daemons: dict[str, Daemon]
    handles: dict[str, list[int]]
    files: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def daemon(pid: int) -> Daemon:
    """Read what a process has."""
    status = _table(Path(f"/proc/{pid}/status").read_text())
    rollup = _table(Path(f"/proc/{pid}/smaps_rollup").read_text())
    opened = list(_opened(pid))
    watched = opened.count("anon_inode:[pidfd]")
    return Daemon(
        pid=pid,
        anonymous_kib=int(status["RssAnon"].split()[0]),
        proportional_kib=int(rollup["Pss"].split()[0]),
        descriptors=len(opened) - watched,
        watched=watched,
        threads=int(status["Threads"]),
    )


def _opened(pid: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield str(descriptor.readlink())


def _table(text: str) -> dict[str, str]:
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def handles_of(tpm: TpmClient) -> list[int]:
    """How many of each kind of handle a TPM has."""
    return [len(tpm.handles(kind)) for kind in HANDLES]


def chip_handles(stack: ScratchStack) -> list[int]:
    """The same of the hardware TPM, by a program that is let in for a moment."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.soak.chip_witness", str(stack.places.tis_socket)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as witness:
        stack.ask("attach_external", config_text=WITNESS, pid=witness.pid)
        out, _ = witness.communicate("go\n", timeout=60)
    found: list[int] = json.loads(out)
    return found


WITNESS: Final = """
name="witness"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
seclabel="system_u:system_r:dom0_t"
iomem=["fed40,1"]
"""


def observe(
    stack: ScratchStack,
    guests: list[str],
    like: Moment | None = None,
    *,
    settle_s: float = SETTLE_S,
) -> Moment:
    """Look at a quiet stack; with `like`, once it has had time to become like that.

    Args:
        stack: With nothing under way.
        guests: Whose TPMs are asked.
        like: What it had before.
        settle_s: The longest time to wait, in seconds.
    """
    handles = {"hwtpm": chip_handles(stack)}
    for guest in guests:
        with stack.tpm(guest) as tpm:
            handles[guest] = handles_of(tpm)
    deadline = time.monotonic() + settle_s
    before = None
    while True:
        pids = {name: pid for name, pid in stack.pids().items() if name not in OUTSIDERS}
        daemons = {name: daemon(pid) for name, pid in pids.items()}
        counts = {name: (d.descriptors, d.threads) for name, d in daemons.items()}
        moment = Moment(daemons, handles, sorted(_files(stack)))
        is_settled = counts == before if like is None else not list(_more(like, moment))
        if is_settled or time.monotonic() > deadline:
            return moment
        before = counts
        time.sleep(_LOOK_AGAIN_S)


def _files(stack: ScratchStack) -> Iterator[str]:
    for path in stack.places.run.rglob("*"):
        found = path.relative_to(stack.places.run)
        if not {found.stem, *found.parts} & OUTSIDERS:
            yield str(found)


def differences(before: Moment, after: Moment) -> list[str]:
    """What is not at its baseline any more, in words; a stack that is well gives none."""
    found = list(_more(before, after)) + list(_fatter(before.daemons, after.daemons))
    for tpm, expected in before.handles.items():
        now = after.handles.get(tpm)
        if now != expected:
            found.append(f"{tpm} has {now} keys, sessions and transports, not {expected}")
    for word, paths in (
        ("a stray file", set(after.files) - set(before.files)),
        ("no longer", set(before.files) - set(after.files)),
    ):
        found += [f"{word} in the run directory: {path}" for path in sorted(paths)]
    return found


def _more(before: Moment, after: Moment) -> Iterator[str]:
    """Descriptors and threads that were not there."""
    if missing := before.daemons.keys() - after.daemons.keys():
        yield f"gone: {', '.join(sorted(missing))}"
    for name, now in after.daemons.items():
        then = before.daemons.get(name)
        if then is None:
            yield f"{name} was not there before"
            continue
        more = LATE_PEERS.get(name, 0)
        if now.descriptors > then.descriptors + more:
            yield f"{name} has {now.descriptors} descriptors, not {then.descriptors}"
        if now.watched > len(after.daemons):
            yield f"{name} watches {now.watched} processes, of {len(after.daemons)}"
        if now.threads > then.threads + more:
            yield f"{name} has {now.threads} threads, not {then.threads}"


def _fatter(before: Mapping[str, Daemon], after: Mapping[str, Daemon]) -> Iterator[str]:
    for name, now in after.items():
        then = before.get(name)
        if then is not None and now.anonymous_kib > allowed_kib(then.anonymous_kib):
            yield f"{name} has {now.anonymous_kib} KiB of memory, not {then.anonymous_kib}"
    total = sum(d.proportional_kib for d in before.values())
    total_now = sum(d.proportional_kib for d in after.values())
    if total_now > total * (1 + STACK_SHARE_MAX):
        yield f"all daemons together have {total_now} KiB of memory, not {total}"


def allowed_kib(then_kib: int) -> int:
    """The most that a daemon may have later, where it had so much."""
    return then_kib + max(MEMORY_KIB_MAX, round(then_kib * MEMORY_SHARE_MAX))
