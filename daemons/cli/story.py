"""The story that `vtpm demo` tells: its steps, and the check that each of them was really seen.

A statement is printed with a mark only after it was checked; the first that is not true ends the
story with a failure. What a PCR must hold is computed here from the files that were put into the
image, not taken from the stack.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.markup import escape

from daemons.cli.options import ask
from daemons.cli.pcrs import guest_reports
from daemons.cli.stack import (
    create_domain,
    in_start_order,
    read_domain_file,
    start_launcher,
    stop_launcher,
)
from daemons.cli.status import status_tree
from daemons.errors import ExitCode, Failure
from daemons.guest.boot_image import BootFiles, write_boot_image
from daemons.guest.measurements import replay, sha1
from daemons.guest.tpm0_client import Tpm0Client
from daemons.places import Places
from daemons.world import SystemRng
from protocol.constants import CapabilityProperty
from protocol.return_codes import TpmError
from protocol.structures import StoredData, StoredData12
from protocol.wire import encode
from tpm12.client import TpmClient

Blob = StoredData | StoredData12

EXAMPLES: Final = Path(__file__).resolve().parent / "trusted-dom0"
GUESTS: Final = ("guest1", "guest2")
IMAGE_BYTES: Final = 2 * 1024 * 1024
DISK_KEY_BYTES: Final = 32
BOOT_PCRS: Final = (4, 5)
COMMAND_LINE: Final = "root=/dev/xvda1 ro quiet"


class Story:
    """The demo's steps and what they hand on.

    Args:
        scratch: An empty directory: the root of the stack.
    """

    def __init__(self, scratch: Path) -> None:
        self.console: Console = Console(highlight=False)
        self.places = Places(scratch)
        self.root = str(scratch)
        self.chapter = 0

    def say(self, text: str) -> None:
        """Print a line; rich markup is understood."""
        self.console.print(text, soft_wrap=True)

    def tell(self) -> None:
        """Go through the story.

        Raises:
            Failure: Something was not as it should be.
        """
        self._title("The platform comes up")
        self._make_images()
        self._start()
        self._draw()
        self._title("Both guests booted measured")
        booted = {guest: self._show_boot(guest) for guest in GUESTS}
        self._title("guest1 takes ownership and seals a disk key to PCR 4 and 5")
        disk_key = secrets.token_bytes(DISK_KEY_BYTES)
        blob = self._seal_disk_key(disk_key)
        self._title("The whole stack is stopped and started again")
        self._restart()
        again = self._boot_pcrs("guest1")
        self.check("guest1 has booted the same again", again == booted["guest1"])
        self.check("the disk key unseals", self._unseal("guest1", blob) == disk_key)
        self._title("guest1 boots another kernel")
        self._boot_other_kernel()
        changed = self._boot_pcrs("guest1")
        self.check("PCR 4 is another", changed[0] != booted["guest1"][0])
        self.check("PCR 5 is the same", changed[1] == booted["guest1"][1])
        self._check_refused("guest1", blob, ("WRONGPCRVAL",))
        self._title("guest2 tries to read guest1's secret")
        self._own("guest2")
        own_secret = secrets.token_bytes(DISK_KEY_BYTES)
        own_blob = self._seal("guest2", own_secret)
        self.check(
            "guest2 unseals a secret of its own", self._unseal("guest2", own_blob) == own_secret
        )
        self._check_refused("guest2", blob, ("NOTSEALED_BLOB", "DECRYPT_ERROR", "BAD_DATASIZE"))

    def check(self, text: str, is_true: object, detail: str = "") -> None:
        """Print what was seen.

        Raises:
            Failure: It was not seen.
        """
        if not is_true:
            self.say(f"  [bold red]✗[/] {text}")
            raise Failure(
                f"the demo did not see that {text}",
                why=detail or "what was seen is something else",
                next_step="vtpm demo --root DIR keeps the root, with the logs in DIR/var/log/vtpm",
            )
        self.say(f"  [bold green]✓[/] {text}")
        if detail:
            self.say(f"    [dim]{detail}[/]")

    def clean_up(self) -> None:
        """Stop what runs, in order if it can be, else by force."""
        try:
            stop_launcher(self.places, self.root)
        finally:
            # Orphans come to us, their subreaper; none, when the launcher has done its work.
            for pid in children_left():
                os.kill(pid, signal.SIGKILL)

    def check_nothing_is_left(self, *, is_kept: bool) -> None:
        """See that no process and no file of the demo is there any more."""
        self._title("Nothing is left behind")
        self.check("every process has ended", not children_left())
        if not is_kept:
            self.check("the scratch root is gone", not self.places.root.exists())

    # -- steps -------------------------------------------------------------------------------------

    def _make_images(self) -> None:
        images = self.places.images("/images")
        images.mkdir(mode=0o700)
        for name in ("vtpmmgr-stubdom", *(f"vtpm-{guest}" for guest in GUESTS), *GUESTS):
            with (images / f"{name}.img").open("wb") as image:
                image.truncate(IMAGE_BYTES)
        for guest in GUESTS:
            files = BootFiles(
                kernel=kernel_of(guest), initrd=initrd_of(guest), command_line=COMMAND_LINE
            )
            write_boot_image(images / f"{guest}.img", files)
        sizes = [image.stat().st_size for image in images.iterdir()]
        self.check(
            "five images are made, those of the guests with a kernel to boot",
            sizes == [IMAGE_BYTES] * 5,
            f"{sizes} bytes",
        )

    def _start(self) -> None:
        with self._progress("starting the platform") as step:
            start_launcher(self.places, step)
            ask(self.root, "power_on", step)
            files = in_start_order([read_domain_file(path) for path in _config_files()])
            for file in files:
                step(f"creating {file.name}")
                create_domain(file, self.root, step)
        states = {row["name"]: row["state"] for row in ask(self.root, "list")}
        wrong = [f"{name} is {state}" for name, state in states.items() if state != "running"]
        expected = {file.name for file in files}
        self.check(
            f"the platform is up, with {len(expected)} domains from their xl config files",
            expected <= set(states) and not wrong,
            "; ".join(wrong),
        )

    def _draw(self) -> None:
        self.say("")
        self.console.print(status_tree(ask(self.root, "status")))

    def _show_boot(self, guest: str) -> tuple[bytes, ...]:
        reports = guest_reports(guest, self.root)
        expected = {
            4: replay([sha1(kernel_of(guest))]),
            5: replay([sha1(COMMAND_LINE.encode()), sha1(initrd_of(guest))]),
        }
        for pcr in BOOT_PCRS:
            report = reports[pcr]
            self.check(
                f"{guest} PCR {pcr} = {report.value.hex()}",
                report.is_explained and report.value == expected[pcr],
                f"set by {report.set_by}",
            )
        return tuple(reports[pcr].value for pcr in BOOT_PCRS)

    def _boot_pcrs(self, guest: str) -> tuple[bytes, ...]:
        reports = guest_reports(guest, self.root)
        return tuple(reports[pcr].value for pcr in BOOT_PCRS)

    def _own(self, guest: str) -> None:
        with self._progress(f"{guest}: making its storage root key"), self._tpm(guest) as tpm:
            tpm.take_ownership(owner_auth=secrets.token_bytes(20))
            is_owned = tpm.get_property(CapabilityProperty.OWNER) == b"\x01"
        self.check(f"{guest} owns its vTPM", is_owned)

    def _seal_disk_key(self, disk_key: bytes) -> Blob:
        self._own("guest1")
        blob = self._seal("guest1", disk_key)
        stored = encode(blob)
        self.check("the disk key is sealed", disk_key not in stored, f"in {len(stored)} bytes")
        return blob

    def _seal(self, guest: str, secret: bytes) -> Blob:
        with self._tpm(guest) as tpm:
            return tpm.seal(secret, release={pcr: tpm.pcr_read(pcr) for pcr in BOOT_PCRS})

    def _unseal(self, guest: str, blob: Blob) -> bytes:
        with self._tpm(guest) as tpm:
            return tpm.unseal(blob)

    def _check_refused(self, guest: str, blob: Blob, reasons: tuple[str, ...]) -> None:
        try:
            self._unseal(guest, blob)
        except TpmError as error:
            self.check(
                f"the disk key does not unseal in {guest}",
                error.code.name in reasons,
                f"the vTPM answers TPM_{error.code.name}",
            )
            return
        self.check(f"the disk key does not unseal in {guest}", is_true=False, detail="it does")

    def _restart(self) -> None:
        stop_launcher(self.places, self.root)
        self.check("every process of the stack has ended", not children_left())
        self._start()

    def _boot_other_kernel(self) -> None:
        path = self.places.images("/images/guest1.img")
        other = BootFiles(
            kernel=kernel_of("guest1") + b"and a back door\n",
            initrd=initrd_of("guest1"),
            command_line=COMMAND_LINE,
        )
        write_boot_image(path, other, overwrite=True)
        before = self._pids()
        with self._progress("rebooting guest1") as step:
            ask(self.root, "reboot", step, domain="guest1")
        after = self._pids()
        changed = {name for name, pid in after.items() if pid != before[name]}
        self.check(
            "guest1 has rebooted, and nobody else",
            changed == {"guest1"},
            f"new processes: {', '.join(sorted(changed))}",
        )

    # -- what the steps use ------------------------------------------------------------------------

    def _title(self, text: str) -> None:
        self.chapter += 1
        self.say(f"\n[bold]{self.chapter}. {text}[/]")

    @contextmanager
    def _progress(self, doing: str) -> Iterator[Callable[[str], None]]:
        with self.console.status(escape(doing)) as spinner:
            yield lambda step: spinner.update(f"{escape(doing)}: {escape(step)}")

    def _pids(self) -> dict[str, int | None]:
        return {row["name"]: row["pid"] for row in ask(self.root, "list")}

    @contextmanager
    def _tpm(self, guest: str) -> Iterator[TpmClient]:
        from tpm12.client import TpmClient  # noqa: PLC0415

        with Tpm0Client(self.places.domain(guest).tpm0) as tpm0:
            yield TpmClient(tpm0.exchange, rng=SystemRng())


def kernel_of(guest: str) -> bytes:
    """The kernel that a guest of the demo boots; a guest here has no CPU, so any bytes will do."""
    return f"kernel 6.1 of {guest}\n".encode() * 64


def initrd_of(guest: str) -> bytes:
    """The initial RAM disk of a guest of the demo."""
    return f"initrd of {guest}\n".encode() * 64


def children_left() -> list[int]:
    """Processes below this one that have not ended; those that have are taken off the table."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    return [
        int(pid)
        for children in Path("/proc/self/task").glob("*/children")
        for pid in children.read_text().split()
    ]


def _config_files() -> list[Path]:
    files = sorted(EXAMPLES.glob("*.cfg"))
    if not files:
        raise Failure(
            "the demo has no config files",
            why=f"{EXAMPLES} has none",
            next_step="run it from a checkout of the project",
            exit_code=ExitCode.NO_INPUT,
        )
    return files
