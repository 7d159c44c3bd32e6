"""vtpm status: the chain as a tree."""

import json

import pytest


def row(name, role, *backends, **more):
    return {
        "name": name,
        "role": role,
        "state": "running",
        "pid": None,
        "restarts": 0,
        "status": "",
        "last_reason": "",
        "backends": list(backends),
        "pss_kib": None,
        **more,
    }


STATUS = {
    "launcher": row("Domain-0", "domain0", pid=100, root="/scratch", pss_kib=20480),
    "chip": row("hwtpm", "hwtpm", pid=102),
    "domains": [
        row("guest1", "guest", "vtpm-guest1", state="failed: nothing to boot", restarts=5),
        row(
            "vtpm-guest1",
            "vtpm",
            "vtpmmgr",
            pid=104,
            restarts=2,
            last_reason="killed by SIGKILL",
        ),
        row("vtpmmgr", "manager", pid=103, status="sealed to the measurements as they are"),
    ],
}


@pytest.fixture
def launcher(launcher):
    launcher.answers["status"] = STATUS
    return launcher


@pytest.mark.usefixtures("launcher")
def test_status_draws_each_below_what_it_rests_on(vtpm):
    done = vtpm("status")
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    depths = {
        name: next(line.index(name) for line in lines if name in line)
        for name in ("Domain-0", "hwtpm ", "vtpmmgr ", "vtpm-guest1", "guest1  guestd")
    }
    assert list(depths.values()) == sorted(depths.values())
    assert len(set(depths.values())) == 5


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize(
    "text",
    [
        "pid 100",
        "/scratch",
        "pid 103",
        "sealed to the measurements as they are",
        "restarts 2",
        "last end: killed by SIGKILL",
        "failed",
        "nothing to boot",
    ],
)
def test_status_tells_pids_states_and_reasons(vtpm, text):
    assert text in vtpm("status").stdout


def test_status_tells_a_reason_once_and_not_beside_the_name(launcher, vtpm):
    why = "killed by SIGSEGV: " + "for this reason " * 9 + "end"
    failed = {**STATUS["domains"][2], "state": f"failed: it died: {why}", "last_reason": why}
    launcher.answers["status"] = {**STATUS, "domains": [failed]}
    shown = vtpm("status").stdout
    (row,) = [line for line in shown.splitlines() if "vtpmmgr " in line]
    assert "SIGSEGV" not in row
    assert shown.count("SIGSEGV") == 1


def test_status_names_what_has_no_backend(launcher, vtpm):
    launcher.answers["status"] = {**STATUS, "domains": STATUS["domains"][:1]}
    assert "without a backend" in vtpm("status").stdout


@pytest.mark.usefixtures("launcher")
def test_status_as_json_is_what_the_launcher_said(vtpm):
    assert json.loads(vtpm("status", "--json").stdout) == STATUS


def test_status_text_cannot_drive_a_terminal_or_the_markup(launcher, vtpm):
    manager = {**STATUS["domains"][2], "status": "\x1b[31m[bold]x[/bold]"}
    launcher.answers["status"] = {**STATUS, "domains": [manager]}
    shown = vtpm("status").stdout
    assert "\x1b" not in shown
    assert "\\x1b[31m[bold]x[/bold]" in shown
