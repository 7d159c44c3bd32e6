"""Small daemons for tests of the launcher: each behaves in one way, told by its arguments.

Imported by the fork server, so nothing here may import pytest. What a daemon has seen goes to the
file that FAKE_STORY names, one JSON object a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path


def tell(**facts: object) -> None:
    """Append one line to the story."""
    place = os.environ.get("FAKE_STORY")
    if place:
        facts = {"pid": os.getpid(), "name": os.environ.get("FAKE_NAME", ""), **facts}
        with Path(place).open("a", encoding="utf-8") as story:
            story.write(json.dumps(facts) + "\n")


def notify(**fields: str) -> None:
    """Send one sd_notify datagram; as with a daemon, nobody needs to be there to hear it."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier,
        contextlib.suppress(ConnectionRefusedError),
    ):
        notifier.connect(os.environ["NOTIFY_SOCKET"])
        notifier.send("\n".join(f"{key}={text}" for key, text in fields.items()).encode())


def measured(argv: list[str]) -> int:
    """Tell when main was reached."""
    tell(at_ns=time.monotonic_ns(), argv=argv)
    return 0


def exiting(argv: list[str]) -> int:
    """Say something and exit with the given status."""
    sys.stderr.write("last words\n")
    return int(argv[0])


def inspecting(_argv: list[str]) -> int:
    """Tell everything that the fork server should have set."""
    tell(
        sid=os.getsid(0),
        pgid=os.getpgid(0),
        ppid=os.getppid(),
        environment=dict(os.environ),
        core=resource.getrlimit(resource.RLIMIT_CORE)[0],
        cmdline=Path("/proc/self/cmdline").read_bytes().split(b"\0")[0].decode(),
        descriptors=sorted(
            str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.exists()
        ),
        term=signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        hup=signal.getsignal(signal.SIGHUP) == signal.SIG_DFL,
        child=signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL,
        number=random.random(),
        threads=len(list(Path("/proc/self/task").iterdir())),
    )
    sys.stdout.write("standard output\n")
    return 0


def waiting(_argv: list[str]) -> int:
    """Wait for SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    tell(event="started")
    signal.sigwait({signal.SIGTERM})
    tell(event="stopped")
    return 0


def stubborn(_argv: list[str]) -> int:
    """Become ready and refuse to end."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def breeding(_argv: list[str]) -> int:
    """Leave a child of its own behind in the same process group."""
    pid = os.fork()
    if pid == 0:
        while True:
            signal.pause()
    tell(child=pid)
    return 0


def broken_warm_up() -> None:
    """Fail as a fork server whose modules do not fit together."""
    sys.stderr.write("first words\n")
    raise RuntimeError("it does not get warm")


def suicidal_warm_up() -> None:
    """End as a fork server that the kernel kills."""
    os.kill(os.getpid(), signal.SIGKILL)


def domain(argv: list[str]) -> int:
    """Be a daemon of the stack, as the file ROOT/behave/DOMAIN says; see `BEHAVIOURS`.

    What happens is told in ROOT/story. Each leaves a socket behind, as a killed daemon does.
    """
    must_go_on = "--go-on" in argv
    argv = [word for word in argv if word != "--go-on"]
    options = dict(zip(argv[::2], argv[1::2], strict=True))
    root, name = Path(options["--root"]), options["--domain"]
    os.environ["FAKE_STORY"], os.environ["FAKE_NAME"] = str(root / "story"), name
    record = json.loads((root / "run/vtpm/registry" / f"{name}.json").read_text())
    assert record["pid"] == os.getpid(), "started before it was in the registry"
    config = options.get("--config")
    seen = Path(config).read_text() if config else ""
    left = root / "run/vtpm" / name / "ring.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(left))  # fails if the last one's was not removed
    behaviour = root / "behave" / name
    words = behaviour.read_text().split() if behaviour.exists() else ["ready"]
    journal = left.with_name("journal")
    found = journal.read_text() if journal.exists() else ""
    assert found or not must_go_on, "told to go on, and there is no journal"
    journal.write_text(str(os.getpid()))
    tell(event="started", domid=record["domid"], record=record, config=seen, journal=found)
    return BEHAVIOURS[words[0]](root, name, words[1:])


def _ready(_root: Path, _name: str, _words: list[str]) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    notify(STATUS="at work", READY="1")
    signal.sigwait({signal.SIGTERM})
    tell(event="stopped")
    return 0


def _slow(root: Path, name: str, words: list[str]) -> int:
    """Serve at its socket and be ready, as soon as somebody says so."""
    while (root / "behave" / name).read_text() != "ready":
        time.sleep(0.01)
    path = root / "run/vtpm" / name / "ring.sock"
    path.unlink()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as serving:
        serving.bind(str(path))
        serving.listen()
        return _ready(root, name, words)


def _fails(_root: Path, _name: str, words: list[str]) -> int:
    why = " ".join(words[1:]) or "it is upside down"
    sys.stderr.write(
        f'2026-01-01T00:00:00.000+00:00 error fake[x] cannot open image why="{why}"'
        f' next_step="turn it" exit_code={words[0]}\n'
    )
    return int(words[0])


def _fails_once(root: Path, name: str, words: list[str]) -> int:
    (root / "behave" / name).write_text("ready")
    return _fails(root, name, words)


def _silent(_root: Path, _name: str, _words: list[str]) -> int:
    notify(STATUS="thinking")
    while True:
        signal.pause()


def _stubborn(_root: Path, _name: str, _words: list[str]) -> int:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    notify(READY="1")
    while True:
        signal.pause()


def _speaks_for_another(root: Path, name: str, words: list[str]) -> int:
    """Tell readiness from a process that is not the domain's."""
    pid = os.fork()
    if pid == 0:
        notify(READY="1")
        os._exit(0)
    os.waitpid(pid, 0)
    return _silent(root, name, words)


BEHAVIOURS = {
    "ready": _ready,
    "fails": _fails,
    "fails_once": _fails_once,
    "silent": _silent,
    "slow": _slow,
    "stubborn": _stubborn,
    "speaks_for_another": _speaks_for_another,
}
