"""Faults on purpose, on real processes: what survives is said to survive, and what does not is not.

The sweep of a command is the proof, point by point, that a killed daemon goes on where it was.
SWEEP_POINTS is how many points are drawn (a dozen when not given).
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.faults.control import FaultControl
from daemons.faults.hooks import directory_of
from tests.system.guest_workload import Workload
from tests.system.scratch_stack import ALL, GUEST1, PROJECT, VTPM1, wait_until

HERE = Path(__file__).parent
PLANS = PROJECT / "examples" / "faults"
POINTS = os.environ.get("SWEEP_POINTS", "12")
RUN_S = 5

pytestmark = pytest.mark.slow


def sweep(stack, program, *options, status):
    """Sweep one of the programs here; what the command says in JSON."""
    said = stack.vtpm(
        "crashsweep", "--json", *options, "--", sys.executable, HERE / program, status=status
    )
    return json.loads(said.out), said


def test_a_command_survives_a_kill_at_every_point(stack, seed):
    said, _ = sweep(stack, "checked_once.py", "--limit", POINTS, "--seed", str(seed), status=None)
    assert said["without_faults"]["status"] == 0
    assert len(said["points"]) == int(POINTS)
    assert {point["outcome"] for point in said["points"]} == {"survived"}, said["points"]


def test_a_command_that_does_not_survive_is_reported(stack):
    said, failed = sweep(
        stack, "same_process.py", "--points", "ring", "--limit", "3", status=ExitCode.FAILED
    )
    assert said["without_faults"]["status"] == 0
    lost = [point for point in said["points"] if point["outcome"] == "exit status 1"]
    assert lost
    assert all(point["last_line"] == "the vTPM is another process" for point in lost)
    assert "were not survived" in failed.what


def test_a_command_that_is_not_there(stack):
    said = stack.vtpm("crashsweep", "--", "/no/such/program", status=127)
    assert "cannot run /no/such/program" in said.err


def test_a_program_sees_a_pause_while_the_example_plan_is_applied(running, seed):
    workload = Workload(running.places.domain(GUEST1).tpm0, seed)
    workload.prepare()
    failures = []

    def work():
        try:
            workload.run(time.monotonic() + RUN_S + 3)
        except Exception as error:  # noqa: BLE001 - told below
            failures.append(error)

    program = threading.Thread(target=work)
    program.start()
    try:
        wait_until(lambda: workload.rounds or failures, "the program runs")
        said = running.vtpm("fault", "run", PLANS / "kills.toml", "--for", str(RUN_S), "--json")
    finally:
        program.join()
    assert not failures
    told = json.loads(said.out)
    assert told["problems"] == []
    done = {(line["where"], line["what"]) for line in told["injected"] if not line["note"]}
    assert done == {
        ("process vtpm-guest1", "kill"),
        ("process vtpmmgr", "kill"),
        ("process hwtpm", "stop"),
        ("process hwtpm", "continue"),
        ("ring vtpm-guest1", "kill"),
        ("disk vtpm-guest1", "kill"),
    }
    assert not directory_of(running.places).exists()


def test_a_killed_guest_is_reported_as_not_survived(running):
    said = running.vtpm("fault", "run", PLANS / "killed_guest.toml", status=ExitCode.FAILED)
    assert "fault 1: kill process guest1" in said.out
    assert "guest1 has booted again" in said.why
    running.until_running(*ALL)


def test_a_killed_launcher_is_started_again(running):
    plan = running.config("launcher", '[[fault]]\nwhere="process launcher"\nwhat="kill"\nat_s=0\n')
    before = running.pids()
    running.vtpm("fault", "run", plan)
    after = running.pids()
    assert {name for name in after if before.get(name) != after[name]} == {
        "Domain-0",
        "fork server",
    }


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("process guest9", "there is no guest9 here, but launcher, hwtpm, "),
        ("ring guest1", "guest1 has no such place"),
    ],
)
def test_a_plan_that_does_not_fit_the_stack_is_refused(running, where, why):
    when = "at_s=1" if where.startswith("process") else "nth=1"
    plan = running.config("unfit", f'[[fault]]\nwhere="{where}"\nwhat="kill"\n{when}\n')
    before = running.pid(VTPM1)
    said = running.vtpm("fault", "run", plan, status=ExitCode.CONFIGURATION)
    assert f"[[fault]] number 1: {why}" in said.why
    assert running.pid(VTPM1) == before


@pytest.mark.parametrize("step", [6, 10, 11])
def test_platform_comes_up_though_its_chip_is_killed_while_it_is_measured(stack, step):
    stack.places.prepare()
    kill = f'[[fault]]\nwhere="disk hwtpm"\nwhat="kill"\nnth={step}\n'
    with FaultControl(stack.places, ["hwtpm"]) as control:
        control.arm(kill.encode())
        stack.vtpm("up")
        assert [line["operation"] for line in control.new_lines()] == [step]
