"""device, exec, shell: how programs find a guest's TPM."""

import json
import stat
import sys
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.listeners import Kind, listen

VARIABLES = (
    "TPM_DEVICE",
    "TCSD_USE_TCP_DEVICE",
    "TCSD_UN_SOCKET_DEVICE_PATH",
    "VTPM_ROOT",
    "VTPM_GUEST",
)
SHOW_ENVIRONMENT = f"import json, os; print(json.dumps([os.environ.get(v) for v in {VARIABLES}]))"


@pytest.fixture
def tpm0(launcher):
    places = launcher.places
    places.make_private(places.domain("guest1").directory)
    with listen(places.domain("guest1").tpm0, Kind.STREAM) as listener:
        launcher.answers["guest_environment"] = {
            "TPM_DEVICE": str(listener.path),
            "TCSD_USE_TCP_DEVICE": "1",
            "TCSD_UN_SOCKET_DEVICE_PATH": str(listener.path),
            "VTPM_ROOT": str(places.root),
            "VTPM_GUEST": "guest1",
        }
        yield listener.path


@pytest.mark.parametrize("guest", ["guest1", "3"])
def test_device_prints_the_path_of_tpm0(tpm0, vtpm, guest):
    assert vtpm("device", guest).stdout == f"{tpm0}\n"


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize(
    ("guest", "why", "exit_code"),
    [
        ("guest9", "no domain has this name", ExitCode.FAILED),
        ("vtpm-guest1", "role vtpm", ExitCode.USAGE),
        ("guest2", "failed: nothing to boot", ExitCode.UNAVAILABLE),
        ("guest1", "the guest has no vTPM", ExitCode.UNAVAILABLE),
    ],
)
def test_device_of_what_has_no_tpm0_says_why(vtpm, guest, why, exit_code):
    done = vtpm("device", guest)
    assert done.exit_code == exit_code
    assert why in done.stderr


def test_exec_gives_a_real_process_the_guests_tpm(tpm0, vtpm_process, places):
    done = vtpm_process("exec", "guest1", "--", sys.executable, "-c", SHOW_ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        str(tpm0),
        "1",
        str(tpm0),
        str(places.root),
        "guest1",
    ]


@pytest.mark.usefixtures("tpm0")
@pytest.mark.parametrize("status", [0, 1, 42])
def test_exec_passes_the_exit_status_on(vtpm_process, status):
    assert vtpm_process("exec", "guest1", "--", "sh", "-c", f"exit {status}").returncode == status


@pytest.mark.usefixtures("tpm0")
def test_exec_leaves_the_commands_own_options_alone(vtpm_process, places):
    done = vtpm_process(
        "exec", "guest1", "--root", places.root, "--", "printf", "%s|", "--json", "--", "-x"
    )
    assert done.stdout == "--json|--|-x|"


@pytest.mark.usefixtures("tpm0")
def test_exec_replaces_itself(vtpm_process):
    done = vtpm_process("exec", "guest1", "--", "sh", "-c", "kill -9 $$")
    assert done.returncode == -9


@pytest.mark.usefixtures("tpm0")
@pytest.mark.parametrize(
    ("command", "status"), [("/no/such/program", 127), ("/etc/passwd", 126), ("", 127)]
)
def test_exec_of_what_cannot_run_ends_as_a_shell_would(vtpm_process, command, status):
    done = vtpm_process("exec", "guest1", "--", command)
    assert done.returncode == status
    assert f"cannot run {command}" in done.stderr


@pytest.mark.usefixtures("launcher")
def test_exec_without_a_guest_runs_nothing(vtpm_process, tmp_path):
    done = vtpm_process("exec", "guest9", "--", "touch", tmp_path / "trace")
    assert done.returncode == 1
    assert not (tmp_path / "trace").exists()


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


def test_shell_has_xl_on_its_path_and_passes_the_status_on(launcher, vtpm_process, tmp_path):
    launcher.answers["domid"] = 3
    program = script(tmp_path / "sh", "xl domid guest1; command -v xl; exit 7")
    done = vtpm_process("shell", SHELL=str(program))
    assert done.returncode == 7
    number, place = done.stdout.split()
    assert number == "3"
    assert place.endswith("/xl")
    assert not Path(place).exists()


def test_shell_of_a_guest_has_its_tpm0(tpm0, vtpm_process, tmp_path):
    program = script(tmp_path / "sh", 'echo "$TPM_DEVICE"')
    assert vtpm_process("shell", "guest1", SHELL=str(program)).stdout == f"{tpm0}\n"


@pytest.mark.parametrize("program", ["/no/such/shell", "/etc/passwd", "/tmp"])
def test_a_shell_that_cannot_be_started_is_a_failure(vtpm_process, program):
    refused = vtpm_process("shell", SHELL=program)
    assert refused.returncode == ExitCode.CONFIGURATION
    assert refused.stderr.startswith(f"vtpm: cannot start the shell {program}\n  why:")


def test_tpm0_of_the_tests_is_a_socket(tpm0):
    assert stat.S_ISSOCK(tpm0.stat().st_mode)
