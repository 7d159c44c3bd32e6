"""A machine with a real systemd as PID 1, in namespaces: up in half a second, gone without trace.

Its root file system is the host's under an overlay in memory, so a test may install into /usr and
/etc; what it writes outlives a reboot of the machine and nothing else. No service of the host runs
in it, and none of the host's is touched.

Needs root, overlayfs, a mounted cgroup2, systemd and util-linux; `why_not` says what is missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
TOOLS = ("unshare", "nsenter", "setpriv", "pivot_root", "mount", "systemctl", "systemd-analyze")
SYSTEMD = next(
    (p for p in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd") if Path(p).exists()), ""
)
SEARCH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
GENERATORS = "/usr/local/lib/systemd/system-generators"
BOOT_S = 30.0
COMMAND_S = 120.0
_LOOK_AGAIN_S = 0.01


def why_not() -> str:
    """Say why no machine can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "a machine with systemd as PID 1 needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SEARCH) is None]
    if missing or not SYSTEMD:
        return f"systemd and util-linux are needed: {', '.join(missing) or 'systemd'} is missing"
    if "overlay" not in Path("/proc/filesystems").read_text():
        return "the kernel has no overlayfs"
    if cgroup_root() is None:
        return "no cgroup2 is mounted"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--uts", "--ipc", "--cgroup", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    return f"no namespaces may be made: {tried.stderr.strip()}" if tried.returncode else ""


def cgroup_root() -> Path | None:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


class Machine:
    """One machine; `booted` makes it."""

    def __init__(self, work: Path, cgroup: Path) -> None:
        self._work = work
        self._cgroup = cgroup
        self._log = work / "pid1.log"
        self._outer: subprocess.Popen[bytes] | None = None
        self._pid = 0
        store = work / "store"
        store.mkdir()
        # The store is mounted in a namespace of its own, which this process holds between boots.
        self._holder = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation"),
                *("private", "sh", "-c"),
                f"mount -t tmpfs -o mode=755 tmpfs {store} && echo mounted && exec sleep infinity",
            ],
            stdout=subprocess.PIPE,
            env={"PATH": SEARCH},
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"mounted\n"

    def boot(self, target: str = "multi-user.target") -> None:
        """Power it on; returns when its first jobs are done."""
        binds = sorted({str(PROJECT), sys.prefix, sys.base_prefix} - {"/usr", "/usr/local"})
        inner = [str(HERE / "build_root.sh"), str(self._work / "store"), SYSTEMD, GENERATORS]
        command = [
            *("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._cgroup / "cgroup.procs")),
            *("nsenter", "--target", str(self._holder.pid), "--mount"),
            *("setpriv", "--pdeathsig", "KILL"),
            *("--bounding-set", "-sys_time,-sys_module,-sys_rawio"),
            *("unshare", "--mount", "--propagation", "private", "--pid", "--fork"),
            *("--kill-child", "--uts", "--ipc", "--cgroup", "--net", "bash", *inner),
            *(target, *binds),
        ]
        with self._log.open("ab") as log:
            self._outer = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": SEARCH},
            )
        deadline = time.monotonic() + BOOT_S
        while not self._is_up():
            if self._outer.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"systemd did not start:\n{self._log.read_text()[-2000:]}")
            time.sleep(_LOOK_AGAIN_S)
        self.run("systemctl", "is-system-running", "--wait", status=None)

    def _is_up(self) -> bool:
        assert self._outer is not None
        pid = self._outer.pid
        # nsenter and setpriv become unshare, whose child is PID 1.
        with contextlib.suppress(OSError, IndexError):
            child = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0]
            is_systemd = Path(f"/proc/{child}/comm").read_text() == "systemd\n"
            if is_systemd and Path(f"/proc/{child}/root/run/systemd/private").exists():
                self._pid = int(child)
                return True
        return False

    def reboot(self) -> None:
        """Shut it down in order, as an administrator does, and boot it again."""
        self.run("systemctl", "--no-block", "poweroff")
        self._wait_for_end()
        self.boot()

    def cut_power(self) -> None:
        """End all its processes at once, and boot it again."""
        assert self._outer is not None
        self._outer.kill()
        self._wait_for_end()
        self.boot()

    def _wait_for_end(self) -> None:
        assert self._outer is not None
        self._outer.wait(BOOT_S)
        self._outer = None

    def run(
        self,
        *command: str,
        status: int | None = 0,
        text: str | None = None,
        as_user: str | None = None,
        limit_s: float = COMMAND_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine.

        Args:
            command: The program and its arguments.
            status: What it must end with; None: anything.
            text: Its input.
            as_user: Who runs it; root if None.
            limit_s: How long it may take.
        """
        whole = self.command(*command, as_user=as_user)
        ended = subprocess.run(
            whole,
            input=text,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            check=False,
            env={"PATH": SEARCH, "TMPDIR": "/tmp", "SYSTEMD_PAGER": "", "LANG": "C.UTF-8"},
        )
        if status is not None:
            assert ended.returncode == status, (
                f"{command}: status {ended.returncode}\n{ended.stdout}{ended.stderr}"
            )
        return ended

    def command(self, *command: str, as_user: str | None = None) -> list[str]:
        """What the host runs to have a command run in the machine."""
        enter = ["nsenter", "--target", str(self._pid), "--mount", "--uts", "--ipc", "--net"]
        enter += ["--pid", "--cgroup"]
        if as_user is not None:
            enter += ["setpriv", "--reuid", as_user, "--regid", as_user, "--init-groups"]
        return [*enter, *command]

    def path(self, path: str) -> Path:
        """A file of the machine, as the host reaches it."""
        return Path(f"/proc/{self._pid}/root{path}")

    def close(self) -> None:
        """End it, and remove what it left."""
        for process in (self._outer, self._holder):
            if process is not None:
                process.kill()
                process.wait()
        if self._holder.stdout is not None:
            self._holder.stdout.close()
        deadline = time.monotonic() + BOOT_S
        while self._cgroup.exists() and time.monotonic() < deadline:
            for path in sorted(self._cgroup.rglob("*/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()
            with contextlib.suppress(OSError):
                self._cgroup.rmdir()
            time.sleep(_LOOK_AGAIN_S)
        shutil.rmtree(self._work, ignore_errors=True)


@contextlib.contextmanager
def booted() -> Iterator[Machine]:
    """A machine of this test's own, with nothing of ours installed."""
    work = Path(tempfile.mkdtemp(prefix="vtpm-machine-"))
    root = cgroup_root()
    assert root is not None
    cgroup = root / work.name
    cgroup.mkdir()
    machine = Machine(work, cgroup)
    try:
        machine.boot()
        yield machine
    finally:
        machine.close()
