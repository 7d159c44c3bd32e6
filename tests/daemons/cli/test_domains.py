"""Subcommands about domains: what they ask of the launcher, what they print, how they fail."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from daemons.cli import output
from daemons.errors import ExitCode, Failure

CONFIG = 'name="guest1"\nkernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"\n'


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "guest1.cfg"
    path.write_text(CONFIG)
    return path


@pytest.mark.usefixtures("launcher")
def test_list_prints_aligned_columns(vtpm):
    done = vtpm("list")
    assert done.exit_code == 0
    lines = [line.split() for line in done.stdout.splitlines()]
    assert lines[0] == ["Name", "ID", "Mem", "State", "PID", "Restarts", "Label"]
    assert lines[1] == ["vtpm-guest1", "2", "8", "running", "102", "1", "system_u:vm_r:vtpm_t"]
    starts = {line.index("system_u") for line in done.stdout.splitlines()[1:4]}
    assert len(starts) == 1


@pytest.mark.usefixtures("launcher")
def test_list_tells_the_reason_of_a_state_below_its_row(vtpm):
    *_, row, reason = vtpm("list").stdout.splitlines()
    assert row.split()[:4] == ["guest2", "4", "1024", "failed"]
    assert reason == "    nothing to boot"


def test_list_stays_narrow_however_long_a_reason_is(launcher, vtpm):
    why = "it died 6 times in a row, the last time: " + "for this reason " * 30
    failed = {**launcher.answers["list"][0], "state": f"failed: {why}"}
    launcher.answers["list"] = [failed, launcher.answers["list"][1]]
    header, row, reason, other = vtpm("list").stdout.splitlines()
    assert max(map(len, (header, row, other))) < 100
    assert reason == "    " + why
    assert json.loads(vtpm("list", "--json").stdout)[0]["state"] == f"failed: {why}"


def test_reason_is_broken_at_a_terminals_width(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    output.print_rows(("Name",), [("guest1",), ("guest2",)], ["word " * 40, ""])
    _, _, *reason, last = capsys.readouterr().out.splitlines()
    assert last == "guest2"
    assert len(reason) > 1
    assert all(line.startswith("    word") and len(line) <= 60 for line in reason)


def test_create_shows_what_is_strange_in_the_file(launcher, vtpm, config):
    launcher.answers["create"] = {"warnings": ["guest1.cfg:3: \x1bkey is not known"]}
    done = vtpm("create", config)
    assert done.exit_code == 0
    assert "warning: guest1.cfg:3: \\x1bkey is not known\n" in done.stderr


def test_list_as_json_is_what_the_launcher_said(launcher, vtpm):
    done = vtpm("list", "--json")
    assert json.loads(done.stdout) == launcher.answers["list"]


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("wanted", ["guest1", "3"])
def test_list_of_one_domain_by_name_or_domid(vtpm, wanted):
    assert [row["name"] for row in json.loads(vtpm("list", wanted, "--json").stdout)] == ["guest1"]


@pytest.mark.usefixtures("launcher")
def test_list_of_unknown_domain_fails(vtpm):
    done = vtpm("list", "guest9")
    assert done.exit_code == 1
    assert "there is no domain guest9" in done.stderr


def test_list_escapes_what_could_drive_a_terminal(launcher, vtpm):
    launcher.answers["list"] = [{**launcher.answers["list"][0], "state": "failed: \x1b[2Jx\ny"}]
    done = vtpm("list")
    assert "\x1b" not in done.stdout
    assert "    \\x1b[2Jx\\ny" in done.stdout


def test_create_sends_text_and_path_and_waits(launcher, vtpm, config):
    launcher.progress["create"] = ["waiting for vtpm-guest1", "booting"]
    done = vtpm("create", config)
    assert done.exit_code == 0
    assert launcher.calls == [
        ("create", {"config_text": CONFIG, "path": str(config), "paused": False})
    ]
    assert "creating guest1.cfg: waiting for vtpm-guest1\n" in done.stderr
    assert done.stdout == ""


def test_create_takes_settings_and_paused_as_xl(launcher, vtpm, config):
    assert vtpm("create", "-p", config, 'name="other"', "memory=64").exit_code == 0
    (_, params), *_ = launcher.calls
    assert params["paused"] is True
    assert params["config_text"] == f'{CONFIG}\nname="other"\nmemory=64'


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"#" * 70000, "more than 65536 bytes")],
)
def test_create_of_unreadable_file_asks_nothing(launcher, vtpm, tmp_path, content, why):
    path = tmp_path / "bad.cfg"
    if content is not None:
        path.write_bytes(content)
    done = vtpm("create", path)
    assert done.exit_code == ExitCode.NO_INPUT
    assert why in done.stderr
    assert launcher.calls == []


@pytest.mark.parametrize("command", ["create", "up"])
@pytest.mark.timeout(60)
def test_fifo_that_nobody_writes_into_is_refused(launcher, vtpm, tmp_path, command):
    path = tmp_path / "guest1.cfg"
    os.mkfifo(path)
    done = vtpm(command, path)
    assert done.exit_code == ExitCode.NO_INPUT
    assert "cannot read the config file" in done.stderr
    assert "nobody writes into it" in done.stderr
    assert launcher.calls == []
    assert path.is_fifo()


@pytest.mark.parametrize("words", ["create <(cat {})", "create /dev/stdin < {}"])
def test_config_file_may_come_through_a_pipe(launcher, places, config, words):
    command = f"{sys.executable} -m daemons.cli.main {words.format(config)}"
    environment = {**os.environ, "VTPM_ROOT": str(places.root)}
    subprocess.run(["bash", "-c", command], check=True, timeout=60, env=environment)
    ((method, params),) = launcher.calls
    assert (method, params["config_text"]) == ("create", CONFIG)


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path.name)])
def test_directory_and_loop_are_no_config_file(launcher, vtpm, tmp_path, make):
    make(tmp_path / "guest1.cfg")
    assert vtpm("create", tmp_path / "guest1.cfg").exit_code == ExitCode.NO_INPUT
    assert launcher.calls == []


@pytest.mark.parametrize("method", ["shutdown", "reboot", "pause", "unpause"])
def test_each_domain_is_asked_for_in_turn(launcher, vtpm, method):
    assert vtpm(method, "guest1", "4").exit_code == 0
    assert launcher.calls == [(method, {"domain": "guest1"}), (method, {"domain": "4"})]


def test_destroy_asks_once(launcher, vtpm):
    assert vtpm("destroy", "guest1").exit_code == 0
    assert launcher.calls == [("destroy", {"domain": "guest1"})]


def test_domid_prints_the_number_alone(launcher, vtpm):
    launcher.answers["domid"] = 3
    assert vtpm("domid", "guest1").stdout == "3\n"


def test_failure_is_three_lines_and_its_exit_code(launcher, vtpm):
    launcher.answers["destroy"] = Failure(
        "cannot destroy guest1",
        why="line 3, column 5\n    name=x\n         ^",
        next_step="try again",
        exit_code=ExitCode.CONFIGURATION,
    )
    done = vtpm("destroy", "guest1")
    assert done.exit_code == ExitCode.CONFIGURATION
    assert done.stderr == (
        "vtpm: cannot destroy guest1\n"
        "  why:  line 3, column 5\n"
        "            name=x\n"
        "                 ^\n"
        "  next: try again\n"
    )


def test_stack_that_is_not_up_says_how_to_start_it(vtpm):
    done = vtpm("list")
    assert done.exit_code == ExitCode.UNAVAILABLE
    assert "the stack is not up" in done.stderr
    assert "vtpm up" in done.stderr


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("placement", ["before", "after"])
def test_root_is_taken_before_and_after_the_subcommand(vtpm, places, placement):
    root = ("--root", str(places.root))
    args = (*root, "list") if placement == "before" else ("list", *root)
    assert vtpm(*args, VTPM_ROOT="/nowhere").exit_code == 0


@pytest.mark.parametrize("subcommand", ["group", "saa", "quote", "verify", "frobnicate"])
def test_unknown_subcommand_is_refused(vtpm, subcommand):
    done = vtpm(subcommand)
    assert done.exit_code == ExitCode.USAGE
    assert "No such command" in done.stderr


def test_process_ends_with_the_failures_exit_code(vtpm_process):
    done = vtpm_process("list")
    assert done.returncode == ExitCode.UNAVAILABLE
    assert done.stderr.count("\n") == 3
