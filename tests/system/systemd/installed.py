"""The stack installed in a machine as docs/systemd.md says, with the domains of trusted-dom0."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from tests.system.systemd.machine import PROJECT, Machine, booted
from tpm12.client import TpmClient

CHIP, MANAGER = "hwtpmd.service", "vtpmmgrd.service"
VTPM1, VTPM2 = "vtpm@vtpm-guest1.service", "vtpm@vtpm-guest2.service"
GUEST1, GUEST2 = "vtpm-guest@guest1.service", "vtpm-guest@guest2.service"
SERVICES = (CHIP, MANAGER, VTPM1, GUEST1, VTPM2, GUEST2)
TARGET = "vtpm-stack.target"
WAIT_S = 60.0
_LOOK_AGAIN_S = 0.05

PAGE = PROJECT / "docs" / "systemd.md"

T = TypeVar("T")


class Installed:
    """An installed stack."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.run = machine.run

    def systemctl(self, *words: str, status: int | None = 0) -> str:
        ended = self.run("systemctl", *words, status=status)
        return ended.stdout.strip()

    def show(self, unit: str, name: str) -> str:
        return self.systemctl("show", "--value", f"--property={name}", unit)

    def pid(self, unit: str) -> int:
        return int(self.show(unit, "MainPID"))

    def is_active(self, *units: str) -> bool:
        states = self.systemctl("is-active", *units, status=None).split()
        return states == ["active"] * len(units)

    def until(self, get: Callable[[], T], what: str, limit_s: float = WAIT_S) -> T:
        """Wait until something is so."""
        deadline = time.monotonic() + limit_s
        while True:
            found = get()
            if found:
                return found
            assert time.monotonic() < deadline, (
                f"in vain: {what}; active: {self.active()}\n{self.journal()}"
            )
            time.sleep(_LOOK_AGAIN_S)

    def until_active(self, *units: str) -> None:
        self.until(lambda: self.is_active(*units), f"{units} active")

    def stop(self) -> None:
        """Stop the target, and wait until the last unit has stopped."""
        self.systemctl("stop", TARGET)
        self.until(lambda: not self.active(), "everything stopped")

    def active(self) -> list[str]:
        """Units that are not at rest, but those that only set up."""
        moving = "--state=active,activating,reloading,deactivating"  # one that failed is at rest
        listed = self.systemctl("list-units", "--plain", "--no-legend", moving, "hwtpmd*", "vtpm*")
        names = [line.split()[0] for line in listed.splitlines()]
        return [n for n in names if "setup" not in n and not n.endswith(("slice", "target"))]

    def vtpm(self, *words: str, status: int | None = 0) -> str:
        return self.run("vtpm", *words, status=status).stdout

    def vtpm_json(self, *words: str) -> Any:
        return json.loads(self.vtpm(*words, "--json"))

    def pcrs(self, domain: str) -> dict[int, str]:
        return {row["pcr"]: row["value"] for row in self.vtpm_json("pcrs", domain)}

    @contextlib.contextmanager
    def client(self, guest: str) -> Iterator[TpmClient]:
        """A program on a guest's tpm0, over one connection."""
        with Tpm0Client(self.machine.path(f"/run/vtpm/{guest}/tpm0")) as tpm0:
            yield TpmClient(tpm0.exchange, rng=SystemRng())

    def journal(self, *words: str) -> str:
        told = self.run("journalctl", "--no-pager", "-o", "short-monotonic", *words, status=None)
        return told.stdout[-8000:]

    def tpm_version(self, guest: str) -> str:
        """What TrouSerS' tpm_version says in a guest."""
        script = "tcsd -e -f & until tpm_version; do kill -0 $! || exit 1; done; kill $!"
        ended = self.run("vtpm", "exec", guest, "--", "sh", "-c", script)
        (version,) = re.findall(r"TPM 1\.2 Version Info", ended.stdout)
        return version


def install(machine: Machine) -> Installed:
    """Do what the document says, up to the start."""
    machine.run(sys.executable, str(PROJECT / "systemd" / "install.py"))
    machine.run("sh", "-e", "-c", f"cd {PROJECT}\n{_domains_as_told()}")
    return Installed(machine)


def _domains_as_told() -> str:
    """The page's own block of commands that puts config files and images in place."""
    (block,) = re.findall(r"^```sh systemd\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


@contextlib.contextmanager
def installed_machine() -> Iterator[Installed]:
    """A machine with the stack installed, not started."""
    with booted() as machine:
        yield install(machine)
