"""A whole launcher with real processes whose daemons are fakes, and what can be seen of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from daemons.errors import Failure
from daemons.launcher.leftovers import end_leftovers
from daemons.launcher_client import LauncherClient, StackNotUp
from daemons.listeners import start_time_of
from daemons.places import Places

FAKE_LAUNCHER = Path(__file__).parents[2] / "fakes" / "fake_launcher.py"
DEADLINE_S = 20
UUID = "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"

MANAGER = """
name="vtpmmgr"
kernel="/usr/lib/xen/boot/vtpmmgr-stubdom.gz"
extra="tpmlocality=2"
memory=8
disk=["file:/images/vtpmmgr-stubdom.img,hda,w"]
iomem=["fed42,1"]
"""
VTPM = f"""
name="vtpm-guest1"
kernel="/usr/lib/xen/boot/vtpm-stubdom.gz"
extra="loglevel=debug"
memory=8
disk=["file:/images/vtpm-guest1.img,hda,w"]
vtpm=["backend=vtpmmgr,uuid={UUID}"]
"""
GUEST = """
name="guest1"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=1024
disk=["file:/images/guest1.img,xvda,w"]
vif=['mac=00:01:02:03:04:05,bridge=br0']
vtpm=["backend=vtpm-guest1"]
"""
SETTINGS = """
destroy_drain_s = 0.3
backend_wait_s = 0.3
[supervisor]
start_s = 3.0
drain_s = 3.0
backoff_first_s = 0.01
backoff_max_s = 0.05
restarts_max = 3
"""


def numbered(text: str, number: int) -> str:
    return text.replace("guest1", f"guest{number}").replace(UUID[:8], f"{number:08x}")


class Stack:
    """One root, its launcher, and what can be seen of it."""

    def __init__(self, root: Path):
        self.places = Places(root)
        self.root = root
        self.launcher: subprocess.Popen | None = None
        (root / "behave").mkdir()
        (root / "images").mkdir()
        for name in ("vtpmmgr-stubdom", "vtpm-guest1", "vtpm-guest2", "guest1", "guest2"):
            (root / "images" / f"{name}.img").write_bytes(bytes(4096))
        self.places.prepare()
        (root / "etc/vtpm").mkdir(parents=True)
        (root / "etc/vtpm/launcherd.toml").write_text(SETTINGS)

    # -- the launcher

    def spawn_launcher(self) -> subprocess.Popen:
        with (self.root / "launcher.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, FAKE_LAUNCHER, "--root", self.root],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def start(self) -> None:
        self.launcher = self.spawn_launcher()
        self.until(self.answers, "the launcher answers")

    def answers(self) -> bool:
        try:
            with LauncherClient(self.places):
                return True
        except StackNotUp:
            assert self.launcher.poll() is None, self.launcher_log()
            return False

    def launcher_log(self) -> str:
        return (self.root / "launcher.log").read_text()

    def call(self, method, progress=None, **params):
        with LauncherClient(self.places) as client:
            return client.call(method, progress, timeout_s=DEADLINE_S, **params)

    def create(self, text, **params):
        return self.call("create", config_text=text, path="x.cfg", **params)

    @contextmanager
    def sent(self, *calls):
        """Send requests in one piece; the connection, on which the answers come."""
        lines = [
            json.dumps({"id": number, "method": method, "params": params}) + "\n"
            for number, (method, params) in enumerate(calls)
        ]
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(DEADLINE_S)
            connection.connect(str(self.places.launcher_socket))
            connection.sendall("".join(lines).encode())
            yield connection

    def call_at_once(self, *calls):
        """Send requests in one piece, so that nobody is answered before all are there.

        Returns:
            The answers, in the order of the requests.
        """
        answers = {}
        with self.sent(*calls) as connection, connection.makefile() as received:
            while len(answers) < len(calls):
                answer = json.loads(received.readline())
                if "progress" not in answer:
                    answers[answer["id"]] = answer
        return [answers[number] for number in range(len(calls))]

    def create_chain(self):
        for text in (MANAGER, VTPM, GUEST):
            self.create(text)

    # -- what can be seen

    def row(self, name: str) -> dict:
        (row,) = [row for row in self.call("list") if row["name"] == name]
        return row

    def chip(self) -> dict:
        return self.call("status")["chip"]

    def story(self, event: str | None = None) -> list[dict]:
        place = self.root / "story"
        lines = place.read_text().splitlines() if place.exists() else []
        parsed = [json.loads(line) for line in lines]
        return [entry for entry in parsed if event is None or entry["event"] == event]

    def names(self, event: str | None = None) -> list[str]:
        return [entry["name"] for entry in self.story(event)]

    def pids(self) -> list[int]:
        return [entry["pid"] for entry in self.story("started")]

    def until(self, is_so, what: str) -> None:
        """Wait for something outside this process; there is no event to wait for."""
        deadline = time.monotonic() + DEADLINE_S
        while not is_so():
            assert time.monotonic() < deadline, f"never: {what}\n{self.launcher_log()}"
            time.sleep(0.005)

    def until_state(self, name: str, state: str) -> dict:
        self.until(lambda: self.row(name)["state"].startswith(state), f"{name} is {state}")
        return self.row(name)

    def behave(self, name: str, how: str) -> None:
        (self.root / "behave" / name).write_text(how)

    def what_is_left(self) -> list[str]:
        """Name every process and file that should not be there after the end."""
        pids = [f"process {pid}" for pid in self.pids() if start_time_of(pid) is not None]
        files = [str(path) for path in self.places.run.rglob("*") if not path.is_dir()]
        directories = [
            str(path)
            for path in self.places.run.iterdir()
            if path.is_dir() and path.name != "registry"
        ]
        return pids + files + directories

    def stop(self) -> int:
        self.call("stop")
        return self.launcher.wait(DEADLINE_S)


@contextmanager
def fake_stack(root):
    stack = Stack(root)
    try:
        yield stack
    finally:
        if stack.launcher is not None and stack.launcher.poll() is None:
            stack.launcher.kill()
            stack.launcher.wait()
        end_leftovers(stack.places, drain_s=0.2)


def kill(row: dict) -> None:
    os.kill(row["pid"], signal.SIGKILL)


def refused(stack, method, **params) -> Failure:
    with pytest.raises(Failure) as raised:
        stack.call(method, **params)
    failure = raised.value
    assert failure.what
    assert failure.why
    assert failure.next_step
    return failure


def create_refused(stack, text) -> Failure:
    return refused(stack, "create", config_text=text, path="x.cfg")


def journals(stack, name) -> list[tuple[int, str]]:
    return [(e["pid"], e["journal"]) for e in stack.story("started") if e["name"] == name]


def state_letter(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def started_again(stack, name, restarts) -> None:
    stack.until(lambda: stack.row(name)["restarts"] == restarts, f"{name} is started again")
    stack.until_state(name, "running")
