"""A whole installation in a directory of its own, driven as a person does: by the `vtpm` command.

Nothing of the stack is replaced here; what is asked of it beside the command (the launcher's list,
a guest's tpm0) goes over the real sockets.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from daemons.errors import Failure
from daemons.guest.tpm0_client import Tpm0Client
from daemons.launcher_client import LauncherClient
from daemons.places import Places
from daemons.registry import Registry
from daemons.world import SystemRng
from tests.system.traces import Traces, find_traces
from tpm12.client import TpmClient

PROJECT = Path(__file__).resolve().parents[2]
EXAMPLES = PROJECT / "examples" / "trusted-dom0"
MANAGER, VTPM1, VTPM2, GUEST1, GUEST2 = "vtpmmgr", "vtpm-guest1", "vtpm-guest2", "guest1", "guest2"
ALL = (MANAGER, VTPM1, VTPM2, GUEST1, GUEST2)
FIRST_CHAIN = (MANAGER, VTPM1, GUEST1)
"""The manager, one vTPM and its guest: enough for most tests, and quicker."""
IMAGE_OF = {name: f"{'vtpmmgr-stubdom' if name == MANAGER else name}.img" for name in ALL}
IMAGE_BYTES = 2 * 1024 * 1024
KERNELS = {GUEST1: b"the kernel of guest1\n" * 99, GUEST2: b"the kernel of guest2\n" * 99}
INITRDS = {GUEST1: b"an initrd\n" * 99, GUEST2: b"an initrd\n" * 99}
COMMAND_LINE = "root=/dev/xvda1 ro quiet"

COMMAND_S = 90.0
"""For one subcommand: on two busy cores, with keys to be made."""
WAIT_S = 30.0
_LOOK_AGAIN_S = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Said:
    """How a subcommand ended and what it said."""

    words: tuple[str, ...]
    status: int
    out: str
    err: str

    def _part(self, lead: str) -> str:
        found = re.findall(rf"^{lead}(.+)$", self.err, re.MULTILINE)
        return found[-1] if found else ""

    @property
    def what(self) -> str:
        """What could not be done; empty when nothing failed."""
        return self._part(r"(?:vtpm|xl): ")

    @property
    def why(self) -> str:
        return self._part("  why:  ")

    @property
    def next_step(self) -> str:
        return self._part("  next: ")

    def __str__(self) -> str:
        return f"vtpm {' '.join(self.words)}: status {self.status}\n{self.out}{self.err}"


class NotSeenError(AssertionError):
    """What was waited for did not come true in time."""


def wait_until(is_so: Callable[[], T], what: str, deadline_s: float = WAIT_S) -> T:
    """Wait for something in other processes to become true; give what `is_so` gave.

    They do not tell us when it does, so it is looked at again and again. It is the only pause in
    these tests, and nothing depends on its length.

    Raises:
        NotSeenError: It did not in time.
    """
    deadline = time.monotonic() + deadline_s
    while not (seen := is_so()):
        if time.monotonic() > deadline:
            raise NotSeenError(f"not seen within {deadline_s:g} s: {what}")
        time.sleep(_LOOK_AGAIN_S)
    return seen


def kill_and_wait(*pids: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Kill processes, all at once, and return when they have ended."""
    handles = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            handles.append(os.pidfd_open(pid))
    try:
        for handle in handles:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, number)
        waiting = set(handles)
        deadline = time.monotonic() + WAIT_S
        while waiting:
            ended, _, _ = select.select(waiting, [], [], max(0.0, deadline - time.monotonic()))
            if not ended:
                raise NotSeenError(f"some of {pids} have not ended")
            waiting -= set(ended)
    finally:
        for handle in handles:
            os.close(handle)


def vtpm_command() -> list[str]:
    """The installed command; from a checkout that is not installed, its module."""
    script = Path(sys.executable).with_name("vtpm")
    return [str(script)] if script.exists() else [sys.executable, "-m", "daemons.cli.main"]


@dataclass
class ScratchStack:
    """One installation.

    Attributes:
        root: Its root directory.
        uid: User and group to run the command as; None for our own.
        environment: Of every command.
        command: What `vtpm` is.
    """

    root: Path
    uid: tuple[int, int] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=vtpm_command)

    def __post_init__(self) -> None:
        self.places = Places(self.root)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("VTPM")}
        self.environment = {**kept, "VTPM_ROOT": str(self.root), **self.environment}

    # -- files ---------------------------------------------------------------------------------

    def image(self, name: str) -> Path:
        """The image of a domain."""
        return self.root / "images" / IMAGE_OF[name]

    def images(self) -> dict[str, bytes]:
        """What all files that must survive hold: the images and the chip's memory."""
        files = [self.image(name) for name in ALL] + [self.places.chip_memory]
        return {file.name: file.read_bytes() for file in files if file.exists()}

    def make_images(self, names: Iterable[str] = ALL) -> None:
        """Make blank images as the platform's own instructions do."""
        (self.root / "images").mkdir(mode=0o700, exist_ok=True)
        for name in names:
            image = self.image(name)
            image.touch(mode=0o600)
            os.truncate(image, IMAGE_BYTES)

    def make_boot(self, guest: str, *, kernel: bytes | None = None, force: bool = False) -> None:
        """Put into a guest's image what it boots."""
        files = self.root / "boot"
        files.mkdir(mode=0o700, exist_ok=True)
        kernel_file, initrd_file = files / f"{guest}-kernel", files / f"{guest}-initrd"
        kernel_file.write_bytes(KERNELS[guest] if kernel is None else kernel)
        initrd_file.write_bytes(INITRDS[guest])
        if self.uid is not None:
            for path in (files, kernel_file, initrd_file):
                os.chown(path, *self.uid)
        words = ["image", "make", IMAGE_OF[guest], "--kernel", str(kernel_file)]
        words += ["--initrd", str(initrd_file), "--cmdline", COMMAND_LINE]
        self.vtpm(*words, *(["--force"] if force else []))

    def config(self, name: str, text: str) -> Path:
        """Write a config file of the test's own."""
        path = self.root / f"{name}.cfg"
        path.write_text(text)
        return path

    def set(self, daemon: str, settings: str) -> None:
        """Write the settings file of a daemon."""
        self.places.config.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self.places.settings(daemon)
        path.write_text(settings + "\n")
        path.chmod(0o600)

    def variant(self, name: str, replaced: Mapping[str, str]) -> Path:
        """Write a variant of one of the example config files."""
        text = example(name).read_text()
        for old, new in replaced.items():
            assert old in text, f"{old!r} is not in {name}.cfg"
            text = text.replace(old, new)
        return self.config(f"{name}-variant", text)

    def log(self, name: str) -> str:
        """The log of a domain, hwtpm or the launcher."""
        try:
            return (self.places.log_dir / f"{name}.log").read_text(errors="replace")
        except FileNotFoundError:
            return ""

    # -- the command ---------------------------------------------------------------------------

    def vtpm(
        self,
        *words: str | Path,
        status: int | None = 0,
        patience_s: float = COMMAND_S,
        **environment: str,
    ) -> Said:
        """Run a subcommand.

        Args:
            words: Its name and arguments.
            status: What its exit status must be; None for any.
            patience_s: How long it may take, in seconds.
            environment: Changes to the environment.
        """
        with self.begin(*words, **environment) as running:
            try:
                out, err = running.communicate(timeout=patience_s)
            except subprocess.TimeoutExpired:
                running.kill()
                raise
        said = Said(tuple(str(word) for word in words), running.returncode, out, err)
        if status is not None and said.status != status:
            raise AssertionError(f"expected status {status}\n{said}")
        return said

    def begin(self, *words: str | Path, **environment: str) -> subprocess.Popen[str]:
        """Begin a subcommand; its output is piped."""
        user, group = self.uid or (None, None)
        return subprocess.Popen(
            [*self.command, *(str(word) for word in words)],
            env=self.environment | environment,
            user=user,
            group=group,
            extra_groups=None if user is None else [],
            cwd=self.root,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )

    def up(self, *names: str) -> None:
        """`vtpm up` with the example config files of these domains."""
        self.vtpm("up", *(example(name) for name in names))

    def down(self) -> None:
        self.vtpm("down")

    # -- what runs -----------------------------------------------------------------------------

    def ask(self, method: str, **params: object) -> Any:
        """Call a method of the launcher."""
        with LauncherClient(self.places) as launcher:
            return launcher.call(method, None, COMMAND_S, **params)

    def rows(self) -> dict[str, dict[str, Any]]:
        """The launcher's list, by name."""
        return {row["name"]: row for row in self.ask("list")}

    def row(self, name: str) -> dict[str, Any]:
        """The launcher's row of a domain, or of the chip."""
        if name == "hwtpm":
            chip: dict[str, Any] = self.ask("status")["chip"]
            return chip
        return self.rows()[name]

    def pid(self, name: str) -> int:
        pid = self.row(name)["pid"]
        assert isinstance(pid, int), f"{name} has no process"
        return pid

    def pids(self) -> dict[str, int]:
        """All processes by name: domains, hwtpm, the launcher and its fork server."""
        answer = self.ask("status")
        rows = [answer["launcher"], answer["chip"], *answer["domains"]]
        found = {row["name"]: row["pid"] for row in rows if row["pid"]}
        return found | {"fork server": answer["launcher"]["fork_server_pid"]}

    def until_running(self, *names: str, starts_after: Mapping[str, int] | None = None) -> None:
        """Wait until domains run; those in `starts_after` in another process than that."""
        before = starts_after or {}

        def is_so() -> bool:
            rows = self.rows()
            return all(
                rows[name]["state"] == "running" and rows[name]["pid"] != before.get(name)
                for name in names
            )

        try:
            wait_until(is_so, f"{', '.join(names)} running")
        except NotSeenError as error:
            raise NotSeenError(f"{error}\n{self.vtpm('list', status=None)}") from None

    def until_state(self, name: str, beginning: str) -> dict[str, Any]:
        """Wait until the state of a domain starts with a word; give its row."""
        wait_until(
            lambda: str(self.row(name)["state"]).startswith(beginning), f"{name} is {beginning}"
        )
        return self.row(name)

    @contextlib.contextmanager
    def tpm(self, guest: str = GUEST1) -> Iterator[TpmClient]:
        """A guest's TPM, over its tpm0."""
        with Tpm0Client(self.places.domain(guest).tpm0, answer_s=COMMAND_S) as tpm0:
            yield TpmClient(tpm0.exchange, rng=SystemRng())

    def traces(self) -> Traces:
        """What there is of this installation beside its files."""
        return find_traces(self.root)

    def kill_everything(self) -> None:
        """Kill every process at once, also those that were just being started."""
        while processes := self.traces().processes:
            kill_and_wait(*processes)

    # -- the end -------------------------------------------------------------------------------

    def tear_down(self) -> Traces:
        """Stop everything, in order if it can be, else by force.

        Returns:
            What an orderly stop has left.
        """
        if not self.traces():
            return self.traces()
        with contextlib.suppress(Failure, subprocess.TimeoutExpired, AssertionError):
            self.down()
        left = self.traces()
        self.kill_everything()
        return left


def example(name: str) -> Path:
    """One of the project's example config files."""
    return EXAMPLES / f"{name}.cfg"


@contextlib.contextmanager
def scratch_stack(parent: Path | None = None) -> Iterator[ScratchStack]:
    """Make an empty root, and leave nothing of what was started in it.

    Args:
        parent: Where; the directory for temporary files when None.
    """
    # Not pytest's own directory: its paths are too long for tcsd.
    root = Path(tempfile.mkdtemp(prefix="vtpm-system-", dir=parent))
    stack = ScratchStack(root)
    try:
        yield stack
        left = stack.tear_down()
        assert not left, f"`vtpm down` has left: {left}"
    finally:
        stack.tear_down()
        shutil.rmtree(root)


def registered_pids(stack: ScratchStack) -> dict[str, int]:
    """Who the registry says is running, when there is no launcher to ask."""
    records = Registry(stack.places.registry).all()
    return {record.name: record.pid for record in records if record.pid is not None}
