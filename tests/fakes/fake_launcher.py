"""A launcher whose daemons and firmware are fakes; run as a program, `fake_launcher.py --root DIR`.

What the firmware does goes to ROOT/story; the file ROOT/behave/firmware makes it fail, and
ROOT/behave/boot_hash is a bug in it, which ends the launcher.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from daemons.errors import Failure
from daemons.launcherd import World, main


class FakeFirmware:
    """Tells what it was asked to do."""

    def __init__(self, places):
        self._root = places.root

    def _tell(self, event, **facts):
        with (self._root / "story").open("a") as story:
            story.write(json.dumps({"name": "firmware", "event": event, **facts}) + "\n")

    async def measure(self):
        pass

    async def power_on(self, tell):
        tell("which is being started up")
        if (self._root / "behave" / "firmware").exists():
            raise Failure("the chip refused", why="it is a fake", next_step="mend it")
        self._tell("power_on")

    async def adopt(self):
        self._tell("adopt")

    async def launch_manager(self, config_text):
        self._tell("launch_manager", config=config_text)

    async def boot_hash(self, _program):
        if (self._root / "behave" / "boot_hash").exists():
            raise ZeroDivisionError
        return "ab" * 20


if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    programs = dict.fromkeys(("hwtpmd", "vtpmmgrd", "vtpmd", "guestd"), "fake_daemons:domain")
    sys.exit(main(world=World(programs=programs, firmware=FakeFirmware)))
