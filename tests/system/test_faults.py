"""Faults on purpose, on real processes: what survives is said to survive, and what does not is not.

The sweep of a command is the proof, point by point, that a killed daemon goes on where it was.
SWEEP_POINTS is how many points are drawn (a dozen when not given), SWEEP_START_POINTS how many of
each phase of a start, DRAWN_PLANS how many plans.
"""

import json
import os
import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.faults.control import FaultControl
from daemons.faults.hooks import directory_of
from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from tests.system.guest_workload import Workload
from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    MANAGER,
    PROJECT,
    VTPM1,
    example,
    kill_and_wait,
    wait_until,
)
from tpm12.client import TpmClient

HERE = Path(__file__).parent
PLANS = PROJECT / "examples" / "faults"
POINTS = os.environ.get("SWEEP_POINTS", "12")
START_POINTS = os.environ.get("SWEEP_START_POINTS", "1")
"""For each phase; a point takes some seconds."""
DRAWN_PLANS = int(os.environ.get("DRAWN_PLANS", "1"))
"""How many are drawn; one takes some ten seconds."""
SWEEP_S = 400.0
"""For one sweep on a machine that has other things to do; alone it takes a tenth of that."""
RUN_S = 5
CHAIN = (MANAGER, VTPM1, GUEST1)

pytestmark = pytest.mark.slow


def sweep(stack, program, *options, status):
    """Sweep one of the programs here; what the command says in JSON."""
    said = stack.vtpm(
        *("crashsweep", "--json", *options, "--", sys.executable, HERE / program),
        status=status,
        patience_s=SWEEP_S,
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


@pytest.mark.parametrize("phase", ["first-start", "start", "recovery"])
def test_a_platform_comes_up_though_a_daemon_is_killed_at_a_point(stack, phase, seed):
    said = stack.vtpm(
        *("crashsweep", "--json", "--phase", phase, "--limit", START_POINTS, "--seed", str(seed)),
        status=None,
        patience_s=SWEEP_S,
    )
    told = json.loads(said.out)
    assert told["phase"] == phase
    assert len(told["points"]) == int(START_POINTS)
    assert {point["outcome"] for point in told["points"]} == {"survived"}, told["points"]
    assert f"point {START_POINTS} of {START_POINTS}, 0 not survived" in said.err


@pytest.mark.parametrize("words", [(), ("--phase", "start", "--", "true")])
def test_a_sweep_has_a_command_or_a_phase(stack, words):
    said = stack.vtpm("crashsweep", *words, status=2)
    assert "COMMAND, or --phase" in said.err


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("false",), "it ends with status 1 without faults"),
        (("sh", "-c", "echo lost >&2; exit 3"), "it ends with status 3 without faults: lost"),
        (("true",), "without faults it came to no point of the kind 'all'"),
    ],
)
def test_what_fails_anyway_or_does_nothing_is_not_swept(stack, command, why):
    """At every point it would end as it does without faults, and be said to have survived."""
    said = stack.vtpm("crashsweep", "--", *command, status=ExitCode.FAILED)
    assert "there is nothing to be swept" in said.err
    assert why in said.err
    assert not said.out


def test_a_command_that_is_not_there(stack):
    said = stack.vtpm("crashsweep", "--", "/no/such/program", status=127)
    assert "cannot run /no/such/program" in said.err


@pytest.fixture(scope="module")
def prepared(running):
    """A program's TPM, owned and with what the program uses."""
    workload = Workload(running.places.domain(GUEST1).tpm0, 0)
    workload.prepare()
    return workload


def run_with_faults(running, prepared, plan, seed):
    """Apply a plan while the program runs; what `vtpm fault run` said in JSON."""
    workload = replace(prepared, seed=seed, rounds=0, pauses_s=[])
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
        said = running.vtpm("fault", "run", plan, "--for", str(RUN_S), "--json")
    finally:
        program.join()
    assert not failures
    told = json.loads(said.out)
    assert told["problems"] == []
    return told["injected"]


def test_a_program_sees_a_pause_while_the_example_plan_is_applied(running, prepared, seed):
    injected = run_with_faults(running, prepared, PLANS / "kills.toml", seed)
    done = {(line["where"], line["what"]) for line in injected if not line["note"]}
    assert done == {
        ("process vtpm-guest1", "kill"),
        ("process vtpmmgr", "kill"),
        ("process hwtpm", "stop"),
        ("process hwtpm", "continue"),
        ("ring vtpm-guest1", "kill"),
        ("disk vtpm-guest1", "kill"),
    }
    assert not directory_of(running.places).exists()


def test_a_program_sees_a_pause_while_chip_and_clocks_are_not_as_they_should(
    running, prepared, seed
):
    examples = ["busy_chip.toml", "seized_locality.toml", "clocks.toml"]
    texts = [(PLANS / name).read_text() for name in examples]
    plan = running.config("chip", "\n".join(re.sub("(?m)^seed.*", "", text) for text in texts))
    injected = run_with_faults(running, prepared, plan, seed)
    done = {(line["where"], line["what"]) for line in injected}
    assert {
        ("tis", "busy-chip"),
        ("tis", "seized-locality"),
        ("clock", "jump"),
        ("clock vtpmmgr", "drift"),
    } <= done


def test_a_program_sees_a_pause_while_drawn_plans_are_applied(running, prepared, seed):
    first = seed % 10**8  # a seed that `vtpm fault draw` takes
    for number in range(first, first + DRAWN_PLANS):
        plan = running.config("drawn", running.vtpm("fault", "draw", "--seed", str(number)).out)
        print(plan.read_text())  # noqa: T201 - shown when the test fails
        run_with_faults(running, prepared, plan, number)


def test_the_same_seed_repeats_the_faults_of_real_processes(running):
    plan = (
        '[[fault]]\nwhere = "ring vtpm-guest1"\nwhat = "delay"\nfor_s = 0.001\nprobability = 0.2\n'
    )
    seen = []
    with FaultControl(running.places, [VTPM1]) as control:
        kill_and_wait(running.pid(VTPM1))
        wait_until(
            lambda: control.has_hooks(VTPM1, running.row(VTPM1)["pid"]), "the vTPM has hooks"
        )
        with Tpm0Client(running.places.domain(GUEST1).tpm0) as device:
            tpm = TpmClient(device.exchange, rng=SystemRng())
            tpm.pcr_read(0)
            for seed in (1, 1, 2):
                control.arm(f"seed = {seed}\n{plan}".encode())
                for pcr in range(24):
                    tpm.pcr_read(pcr)
                seen.append([line["operation"] for line in control.new_lines()])
    assert len(seen[0]) > 3
    assert seen[0] == seen[1] != seen[2]


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


# -- faults while a stack starts -------------------------------------------------------------------


def test_a_stack_comes_up_though_each_of_its_daemons_is_killed_meanwhile(stack):
    kills = {"disk hwtpm": 6, "disk vtpmmgr": 3, "ring vtpm-guest1": 1}
    plan = stack.config(
        "start",
        "".join(f'[[fault]]\nwhere="{w}"\nwhat="kill"\nnth={n}\n' for w, n in kills.items())
        + '[[fault]]\nwhere="tis"\nwhat="busy-chip"\nfor_s=1\nnth=100\n'
        + '[[fault]]\nwhere="process launcher"\nwhat="kill"\nat_s=2\n',
    )
    said = stack.vtpm("up", "--fault", plan, *(example(name) for name in CHAIN))
    for where, nth in kills.items():
        assert f"kill {where}, operation {nth}" in said.out
    assert "busy-chip tis, operation 100" in said.out
    assert "kill process launcher" in said.out
    assert "injected; the stack is whole, and nobody has lost anything" in said.out
    stack.until_running(*CHAIN)
    assert not directory_of(stack.places).exists()


def test_a_stack_that_does_not_come_up_is_reported(stack):
    plan = stack.config("start", '[[fault]]\nwhere="disk hwtpm"\nwhat="io-error"\nprobability=1\n')
    said = stack.vtpm("up", "--fault", plan, status=ExitCode.FAILED)
    assert "io-error disk hwtpm, operation 1" in said.out
    assert "the stack did not come up" in said.why


def test_faults_of_a_start_need_a_stack_that_does_not_run(running):
    said = running.vtpm("up", "--fault", PLANS / "busy_chip.toml", status=ExitCode.CONFIGURATION)
    assert "runs already" in said.why
    assert "vtpm fault run" in said.next_step


def test_a_plan_of_a_start_has_to_fit(stack):
    plan = stack.config("start", '[[fault]]\nwhere="ring guest1"\nwhat="kill"\nnth=1\n')
    said = stack.vtpm(
        "up", "--fault", plan, *(example(name) for name in CHAIN), status=ExitCode.CONFIGURATION
    )
    assert "guest1 has no such place" in said.why


def test_a_plan_is_explained(stack):
    said = stack.vtpm("fault", "check", PLANS / "clocks.toml")
    assert "by +3600 s" in said.out
    assert "at 100 times the speed" in said.out
    bad = stack.config("bad", '[[fault]]\nwhere="tis"\nwhat="busy-chip"\nnth=1\n')
    said = stack.vtpm("fault", "check", bad, status=ExitCode.CONFIGURATION)
    assert "has no for_s" in said.why
