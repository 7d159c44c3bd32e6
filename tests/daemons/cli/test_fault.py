"""vtpm fault: what is refused, and how a run ends that is ended from outside."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from daemons.errors import ExitCode
from daemons.faults.hooks import LOCK_NAME, directory_of
from daemons.launcher.domain import CHIP_DOMID
from daemons.launcher.processes import is_stopped
from daemons.listeners import start_time_of
from daemons.places import CHIP_NAME, DOMAIN0_NAME
from daemons.registry import DomainRecord, RegistryWriter, Role

PATIENCE_S = 30.0
STOP = '[[fault]]\nwhere = "process launcher"\nwhat = "stop"\nfor_s = 60\nat_s = 0\n'


def wait_until(is_so):
    end = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(STOP)
    return path


@pytest.fixture
def victim(launcher):
    """The process that the registry names as the launcher."""
    with subprocess.Popen(["sleep", "600"]) as process:
        row = {"state": "running", "pid": process.pid, "role": "domain0"}
        launcher.answers["status"] = {"domains": [], "launcher": row, "chip": row}
        registry = RegistryWriter(launcher.places.registry)
        for name, domid, role in (
            (DOMAIN0_NAME, 0, Role.DOMAIN0),
            (CHIP_NAME, CHIP_DOMID, Role.HWTPM),
        ):
            registry.put(
                DomainRecord(
                    name=name,
                    domid=domid,
                    role=role,
                    label="system_u:system_r:dom0_t",
                    uid=os.geteuid(),
                    pid=process.pid,
                    start_time=start_time_of(process.pid),
                )
            )
        yield process
        process.kill()


@pytest.mark.usefixtures("victim")
def test_what_never_happened_is_said(vtpm, plan):
    often = plan.read_text().replace("60", "0.1")
    late = STOP.replace("at_s = 0", "every_s = 9")
    plan.write_text(often + late)
    said = vtpm("fault", "run", plan, "--for", "0.3")
    assert "fault 2 never happened: stop process launcher, every 9 s" in said.stdout
    assert "fault 1 never" not in said.stdout
    told = json.loads(vtpm("fault", "run", plan, "--for", "0.3", "--json").stdout)
    assert told["never_happened"] == [{"fault": 2, "operations": None}]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing_stopped(victim, places, plan, number):
    # These tests may run under nohup, which the run would respect.
    hears = ["env", "--default-signal=HUP"]
    with subprocess.Popen(
        [*hears, sys.executable, "-m", "daemons.cli.main", "fault", "run", str(plan)],
        env={**os.environ, "VTPM_ROOT": str(places.root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as run:
        try:
            wait_until(lambda: is_stopped(victim.pid))
            run.send_signal(number)
            _, said = run.communicate(timeout=PATIENCE_S)
        finally:
            run.kill()
    assert run.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in said
    wait_until(lambda: not is_stopped(victim.pid))
    assert victim.poll() is None
    if number != signal.SIGKILL:
        assert not directory_of(places).exists()


def test_a_hang_up_that_nohup_ignores_ends_nothing(victim, places, plan):
    run = subprocess.Popen(
        ["nohup", sys.executable, "-m", "daemons.cli.main", "fault", "run", str(plan)],
        env={**os.environ, "VTPM_ROOT": str(places.root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: is_stopped(victim.pid))
    run.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert run.poll() is None
    run.terminate()
    assert run.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert not is_stopped(victim.pid)


@pytest.mark.usefixtures("victim")
def test_a_run_log_that_finds_no_room_ends_the_run_and_leaves_nothing_stopped(places, plan, victim):
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -u -m daemons.cli.main fault run {plan} > /dev/full"],
        env={**os.environ, "VTPM_ROOT": str(places.root)},
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == ExitCode.IO_ERROR
    assert "Traceback" not in done.stderr
    assert not is_stopped(victim.pid)


@pytest.mark.usefixtures("victim")
@pytest.mark.parametrize("what", ["directory", "link"])
def test_what_lies_in_the_place_of_the_lock_is_named(vtpm, places, plan, what):
    places.make_private(directory_of(places))
    lock = directory_of(places) / LOCK_NAME
    if what == "directory":
        lock.mkdir()
    else:
        lock.symlink_to("/nonexistent")
    refused = vtpm("fault", "run", plan)
    assert refused.exit_code == ExitCode.IO_ERROR
    assert f"why:  {lock}: " in refused.output


@pytest.mark.parametrize("seconds", ["nan", "inf", "-inf", "1e300", "0"])
@pytest.mark.parametrize("words", [["fault", "run"], ["up", "--fault"]])
def test_length_of_a_run_is_a_number_of_seconds(vtpm, plan, seconds, words):
    refused = vtpm(*words, plan, "--for", seconds)
    assert refused.exit_code == ExitCode.USAGE
    assert "--for" in refused.output
