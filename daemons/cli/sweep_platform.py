"""The scratch platform of a crash sweep: made once, put back before each point.

It is below this process: whatever is left of it is killed with `kill_children`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from daemons.cli.options import ask
from daemons.errors import Failure
from daemons.faults.hooks import DIRECTORY_NAME
from daemons.faults.points import MANAGER, VTPM
from daemons.places import CHIP_NAME, Places
from daemons.registry import Registry

GUEST: Final = "guest1"
IMAGE_BYTES: Final = 2 * 1024 * 1024
WHOLE_S: Final = 60.0
"""How long the stack may take to be whole after a command."""
END_S: Final = 10.0
_LOOK_AGAIN_S: Final = 0.02

Step = Callable[[str], None]


class Platform:
    """A scratch platform: the manager, one vTPM and its guest.

    Args:
        root: An empty directory.

    Attributes:
        has_area: The vTPM that is kept has an NV area for the sweep's own program.
    """

    def __init__(self, root: Path) -> None:
        self.places = Places(root)
        self._root = str(root)
        self._images = self.places.images("/images")
        self._blank = root / "blank"
        self._used = root / "used"
        self.has_area = False

    def make(self, step: Step) -> None:
        """Make images, start everything once, stop it, and keep what is stored."""
        from daemons.cli.story import COMMAND_LINE, initrd_of, kernel_of  # noqa: PLC0415
        from daemons.guest.boot_image import BootFiles, write_boot_image  # noqa: PLC0415

        self._images.mkdir(mode=0o700)
        for name in ("vtpmmgr-stubdom", VTPM, GUEST):
            with (self._images / f"{name}.img").open("wb") as image:
                image.truncate(IMAGE_BYTES)
        files = BootFiles(
            kernel=kernel_of(GUEST), initrd=initrd_of(GUEST), command_line=COMMAND_LINE
        )
        write_boot_image(self._images / f"{GUEST}.img", files)
        shutil.copytree(self._images, self._blank)
        self.start(step)
        self.keep(step)

    def keep(self, step: Step) -> None:
        """Stop everything, and keep what is stored for `restore`."""
        ask(self._root, "stop", step)
        kill_children()  # the launcher, which ends by itself, and nothing else
        shutil.rmtree(self._used, ignore_errors=True)
        shutil.copytree(self._images, self._used)
        shutil.copy2(self.places.chip_memory, self._used)

    def restore(self, *, is_blank: bool = False) -> None:
        """End what runs as a power cut does, and put back what was stored.

        Args:
            is_blank: As before the first start, not as it was when it was kept.
        """
        kill_children()
        self.places.chip_memory.unlink(missing_ok=True)
        for log in self.places.log_dir.glob("*"):
            log.unlink()
        for entry in self.places.run.iterdir():
            if entry.is_dir() and entry.name != DIRECTORY_NAME:
                shutil.rmtree(entry)
            elif not entry.is_dir():
                entry.unlink()
        for kept in (self._blank if is_blank else self._used).iterdir():
            home = self.places.chip_memory.parent if kept.suffix == ".nv" else self._images
            shutil.copy2(kept, home)

    def start(self, step: Step) -> dict[str, str]:
        """Start everything; what is in the guest's environment."""
        from daemons.cli.stack import (  # noqa: PLC0415 - `--help` needs none of it
            create_domain,
            read_domain_file,
            start_launcher,
        )
        from daemons.cli.story import EXAMPLES  # noqa: PLC0415

        start_launcher(self.places, step)
        ask(self._root, "power_on", step)
        for name in (MANAGER, VTPM, GUEST):
            create_domain(read_domain_file(EXAMPLES / f"{name}.cfg"), self._root, step)
        environment: dict[str, str] = ask(self._root, "guest_environment", domain=GUEST)
        return environment

    def pid(self, name: str) -> int:
        """The process of a domain, which runs."""
        record = Registry(self.places.registry).get(name)
        assert record is not None
        assert record.pid is not None
        return record.pid

    def measured(self) -> dict[str, tuple[str, ...]]:
        """All PCRs of the chip and of the guest's TPM, in hex."""
        from daemons.cli.pcrs import read_pcrs  # noqa: PLC0415 - `--help` needs none of it
        from daemons.guest.tpm0_client import Tpm0Client  # noqa: PLC0415

        with Tpm0Client(self.tpm0, answer_s=WHOLE_S) as device:
            guest = tuple(value.hex() for value in read_pcrs(device.exchange))
        return {CHIP_NAME: tuple(ask(self._root, "platform_pcrs")), GUEST: guest}

    @property
    def tpm0(self) -> Path:
        """The guest's device."""
        return self.places.domain(GUEST).tpm0

    def guest_domid(self) -> int:
        """The domid of the guest: another one when it has booted again."""
        rows = {row["name"]: row for row in ask(self._root, "list")}
        domid = rows[GUEST]["domid"]
        assert isinstance(domid, int)
        return domid

    def what_is_wrong(self) -> str:
        """Wait until all domains run; what is wrong with one that does not, or nothing."""
        deadline = time.monotonic() + WHOLE_S
        while True:
            rows = [*ask(self._root, "list"), ask(self._root, "status")["chip"]]
            wrong = [
                f"{row['name']} is {row['state']}" for row in rows if row["state"] != "running"
            ]
            if not wrong or time.monotonic() > deadline:
                return "; ".join(wrong)
            time.sleep(_LOOK_AGAIN_S)


def kill_children() -> None:
    """Kill every process below this one, and return when they have ended; orphans come to us.

    Raises:
        Failure: One does not end.
    """
    from daemons.cli.story import children_left  # noqa: PLC0415 - `--help` needs none of it

    deadline = time.monotonic() + END_S
    while children := children_left():
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise Failure(
                "the scratch platform does not end",
                why=f"processes {children} are still there after they were killed",
                next_step="look at them with ps",
            )
        time.sleep(_LOOK_AGAIN_S)
