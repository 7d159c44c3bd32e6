"""All of it as a plain user, with nothing but a HOME: no root, no --root, no VTPM_ROOT.

Run by root, these tests become another user for the stack's processes; run by a plain user, they
are that user.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pytest

from tests.system.belongings import Belongings
from tests.system.damage import STATUSES, check_said
from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    PROJECT,
    VTPM1,
    ScratchStack,
    example,
    kill_and_wait,
    vtpm_command,
)

NOBODY = (65534, 65534)
ELSEWHERE = ("PYTHONPATH", "XDG_STATE_HOME", "HOME")


def command_of_a_plain_user():
    """How a plain user runs `vtpm`, with what to add to the environment; None if nothing works."""
    if os.geteuid() != 0:
        return vtpm_command(), {}
    # The interpreter of our environment may lie where only root may look; the system's does not.
    path = os.pathsep.join([str(PROJECT), sysconfig.get_path("purelib")])
    for interpreter, environment in (
        (sys.executable, {}),
        (shutil.which("python3", path="/usr/bin:/bin"), {"PYTHONPATH": path}),
    ):
        if interpreter is None:
            continue
        command = [interpreter, "-m", "daemons.cli.main"]
        try:
            tried = subprocess.run(
                [*command, "--help"],
                env={**os.environ, **environment},
                user=NOBODY[0],
                group=NOBODY[1],
                extra_groups=[],
                cwd="/",
                capture_output=True,
                timeout=60,
                check=False,
            )
        except PermissionError:
            continue
        if tried.returncode == 0:
            return command, environment
    return None


@pytest.fixture
def at_home():
    """A plain user's installation, where it is by default: below the HOME."""
    found = command_of_a_plain_user()
    if found is None:
        pytest.skip("no user but root can read this Python or this checkout")
    command, environment = found
    home = Path(tempfile.mkdtemp(prefix="vtpm-home-"))
    root = home / ".local" / "state" / "vtpm"
    root.mkdir(parents=True, mode=0o700)
    uid = NOBODY if os.geteuid() == 0 else None
    stack = ScratchStack(root, uid, command=command)
    stack.environment = {
        name: value
        for name, value in stack.environment.items()
        if name not in {"VTPM_ROOT", *ELSEWHERE}
    } | {"HOME": str(home), **environment}
    stack.make_images()
    if uid is not None:
        give(home, uid)
    try:
        yield stack
        assert not stack.tear_down()
    finally:
        stack.tear_down()
        shutil.rmtree(home)


def give(directory, uid):
    for path in [directory, *directory.rglob("*")]:
        os.chown(path, *uid)


@pytest.mark.slow
def test_plain_user_runs_the_whole_chain_below_the_home(at_home):
    at_home.make_boot(GUEST1)
    at_home.up(*FIRST_CHAIN)

    user = at_home.root.stat().st_uid
    answer = json.loads(at_home.vtpm("status", "--json").out)
    assert answer["launcher"]["root"] == str(at_home.root)
    for row in [answer["launcher"], answer["chip"], *answer["domains"]]:
        assert row["state"] == "running"
        assert Path(f"/proc/{row['pid']}").stat().st_uid == user
    for path in at_home.root.rglob("*"):
        assert path.lstat().st_uid == user, path
    shown = json.loads(at_home.vtpm("pcrs", GUEST1, "--json").out)
    assert {pcr: bytes.fromhex(shown[pcr]["value"]) for pcr in (4, 5)} == boot_pcrs(GUEST1)

    at_home.down()
    assert not at_home.traces()
    said = at_home.vtpm("up", *(example(name) for name in FIRST_CHAIN))
    assert "making" not in said.err
    at_home.vtpm("exec", GUEST1, "--", "sh", "-c", 'test -S "$TPM_DEVICE"')


FOLDERS = {
    "run": lambda places: places.run,
    "registry": lambda places: places.registry,
    "vTPM": lambda places: places.domain(VTPM1).directory,
    "guest": lambda places: places.domain(GUEST1).directory,
    "chip": lambda places: places.domain("hwtpm").directory,
    "memory": lambda places: places.chip_memory.parent,
    "logs": lambda places: places.log_dir,
    "settings": lambda places: places.config,
    "images": lambda places: places.root / "images",
}


@pytest.mark.slow
@pytest.mark.parametrize("state", ["down", "restarting", "running"])
def test_folder_that_its_user_may_not_enter_is_refused_and_comes_back(at_home, seed, state):
    """The damage matrix has no such cells: root may enter any folder. CI draws some folders."""
    names = sorted(FOLDERS)
    if os.environ.get("DAMAGE_CELLS") != "all":
        names = random.Random(f"{seed} {state}").sample(names, 3)
    at_home.make_boot(GUEST1)
    at_home.set("launcherd", 'log_level = "info"')
    give(at_home.places.config, (at_home.root.stat().st_uid, -1))
    at_home.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(at_home, GUEST1)
    up = ("up", *(example(name) for name in FIRST_CHAIN))
    for name in names:
        folder = FOLDERS[name](at_home.places)
        if state == "down":
            at_home.down()
        elif state == "restarting":
            kill_and_wait(at_home.pid("Domain-0"))
        if not folder.is_dir():
            continue
        mode = folder.stat().st_mode & 0o777
        folder.chmod(0)
        try:
            asked = [["list"], ["status"], ["pcrs", GUEST1]] if state == "running" else [up]
            for words in (*asked, ["doctor"]):
                said = at_home.vtpm(*words, status=None)
                assert "Traceback" not in said.err, (name, said)
                assert said.status in {0, *STATUSES}, (name, said)
                if said.status and words[0] != "doctor":
                    check_said(said)
        finally:
            folder.chmod(mode)
        at_home.vtpm(*up)
        at_home.until_running(*FIRST_CHAIN)
        things.check(at_home, GUEST1)


def test_plain_user_without_any_directory_is_told_what_to_give(at_home):
    at_home.environment.pop("HOME")
    said = at_home.vtpm("list", status=78)
    assert said.what == "there is no place for the stack's files"
    assert "HOME" in said.why
    assert "--root DIR" in said.next_step
    at_home.environment["HOME"] = str(at_home.root.parents[2])


def test_xdg_state_home_comes_before_the_home(at_home):
    said = at_home.vtpm("list", status=69, XDG_STATE_HOME=str(at_home.root.parent / "other"))
    assert f"{at_home.root.parent}/other/vtpm/run" in said.why


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be a second user")
def test_root_does_not_use_a_plain_user_s_directories(at_home):
    """Whoever owns a directory can put anything in it: root does not run on it."""
    at_home.vtpm("up")
    at_home.down()
    own = ScratchStack(at_home.root)
    said = own.vtpm("up", status=78)
    assert f"belongs to uid {NOBODY[0]}" in said.why
    assert said.next_step


def test_image_that_its_user_may_not_write_is_refused(at_home):
    """Root may write anything, so only a plain user meets this one."""
    image = at_home.image(MANAGER)
    image.chmod(0o400)
    said = at_home.vtpm("up", example(MANAGER), status=77)
    assert str(image) in said.what
    assert "may not write it" in said.why
    assert "0400" in said.why
    assert "chmod 600" in said.next_step
    assert not any(image.read_bytes())
