"""What a stack leaves on the machine when it is stopped: its files, and nothing that lives."""

import os
import re
import signal
import stat
import subprocess
import sys
import time

import pytest

from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    IMAGE_OF,
    VTPM1,
    kill_and_wait,
    scratch_stack,
    vtpm_command,
    wait_until,
)
from tests.system.traces import find_traces

DEMO_S_MAX = 20.0


def everything_below(directory):
    """Paths below a directory, and what each is."""
    return {
        str(path.relative_to(directory)): stat.S_IFMT(path.lstat().st_mode)
        for path in directory.rglob("*")
    }


def test_finder_sees_a_running_stack(stack):
    """The control of all the others: what is there is found, each kind of it."""
    stack.up(*FIRST_CHAIN)
    found = stack.traces()
    assert set(stack.pids().values()) == set(found.processes)
    sockets = ["launcher.sock", "notify.sock", "hwtpm/tis.sock", "vtpmmgr/ring.sock"]
    sockets += ["vtpm-guest1/ring.sock", "guest1/tpm0"]
    assert {str(stack.places.run / name) for name in sockets} == set(found.sockets)
    assert any("launcher.lock" in lock for lock in found.locks)
    assert any(IMAGE_OF[VTPM1] in lock for lock in found.locks)


def test_down_leaves_files_and_nothing_that_lives(stack):
    stack.up(*ALL)
    stack.down()
    assert not stack.traces()
    assert everything_below(stack.places.run) == {"registry": stat.S_IFDIR}
    stored = everything_below(stack.places.state)
    assert stored == {"hwtpm.nv": stat.S_IFREG}
    logs = {"launcher.log", "hwtpm.log", *(f"{name}.log" for name in ALL)}
    assert set(everything_below(stack.places.log_dir)) == logs
    assert {image.name for image in (stack.root / "images").iterdir()} == set(IMAGE_OF.values())


@pytest.mark.parametrize("subcommand", ["destroy", "shutdown"])
def test_ended_domain_leaves_nothing_of_its_own(stack, subcommand):
    stack.up(*FIRST_CHAIN)
    pid = stack.pid(GUEST1)
    stack.vtpm(subcommand, GUEST1)
    assert pid not in stack.traces().processes
    assert not stack.places.domain(GUEST1).directory.exists()
    assert not (stack.places.registry / f"{GUEST1}.json").exists()
    assert set(stack.rows()) == {"Domain-0", *FIRST_CHAIN[:2]}


def test_down_ends_domains_that_are_paused_waiting_or_failed(stack):
    stack.set("launcherd", "backend_wait_s = 0.2\nsupervisor.restarts_max = 1")
    stack.up(*FIRST_CHAIN)
    stack.vtpm("pause", VTPM1)
    kill_and_wait(stack.pid("vtpmmgr"))
    wait_until(lambda: stack.row("vtpmmgr")["restarts"], "a restart of the manager")
    stack.down()
    assert not stack.traces()


def test_no_secret_is_in_any_log(stack):
    """What is sealed and owned with, and what encrypts, never reaches a log."""
    stack.up(*FIRST_CHAIN)
    secret, owner = os.urandom(32), os.urandom(20)
    with stack.tpm() as tpm:
        tpm.take_ownership(owner_auth=owner)
        tpm.unseal(tpm.seal(secret))
    stack.down()
    logs = "".join(file.read_text(errors="replace") for file in stack.places.log_dir.iterdir())
    assert logs
    for hidden in (secret, owner):
        assert hidden.hex() not in logs.lower()
        assert repr(hidden) not in logs


# -- the demo --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_demo_tells_its_story_and_leaves_nothing(tmp_path):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    started = time.monotonic()
    ended = subprocess.run(
        [*vtpm_command(), "demo"],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    lasted_s = time.monotonic() - started
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "✗" not in ended.stdout
    for seen in (
        "TPM_WRONGPCRVAL",
        "the disk key unseals",
        "does not unseal in guest2",
        "PCR 4 =",
        "every process has ended",
        "All of it was seen",
    ):
        assert seen in ended.stdout
    assert not list(temporary.iterdir())
    assert not find_traces(temporary)
    assert lasted_s < DEMO_S_MAX


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_interrupted_demo_leaves_nothing_either(tmp_path, number):
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    # A shell gives what it runs in the background a SIGINT that is ignored, for all below it too.
    with subprocess.Popen(
        ["env", "--default-signal=INT", *vtpm_command(), "demo"],
        env=os.environ | {"TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as demo:
        for line in demo.stdout:
            if "The platform comes up" in line:
                break
        wait_until(lambda: len(find_traces(temporary).processes) > 3, "the platform comes up")
        demo.send_signal(number)
        rest = demo.stdout.read()
    assert demo.returncode != 0
    assert "All of it was seen" not in rest
    wait_until(lambda: not find_traces(temporary), "nothing left")
    assert not list(temporary.iterdir())


@pytest.mark.slow
def test_demo_fails_when_something_is_not_seen(tmp_path):
    """The demo can fail: its guests' images hold another kernel than it computes PCR 4 from."""
    program = (
        "import sys\n"
        "from daemons.cli import story\n"
        "story.sha1 = lambda data: bytes(20)\n"
        "from daemons.cli.main import main\n"
        "sys.argv = ['vtpm', 'demo']\n"
        "raise SystemExit(main())\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert re.search(r"the demo did not see that guest1 PCR 4 = [0-9a-f]{40}", ended.stderr)
    assert "next:" in ended.stderr
    assert not find_traces(tmp_path)
    assert not list(tmp_path.iterdir())


def test_two_stacks_on_one_machine_do_not_touch_each_other(stack):
    with scratch_stack() as other:
        other.make_images()
        other.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN)
        other.up(*FIRST_CHAIN)
        assert stack.pids().keys() == other.pids().keys()
        assert not set(stack.pids().values()) & set(other.pids().values())
        before = stack.pids()
        other.down()
        assert stack.pids() == before
        assert not other.traces()
