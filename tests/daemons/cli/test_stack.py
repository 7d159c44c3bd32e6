"""up and down: the order of domains, and what is asked of the launcher."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from daemons.cli.stack import DomainFile, in_start_order
from daemons.errors import ExitCode, Failure

EXAMPLES = Path(__file__).resolve().parents[3] / "examples" / "trusted-dom0"


def a_file(name, *backends):
    return DomainFile(path=Path(f"{name}.cfg"), text="", name=name, role="guest", backends=backends)


def names_in_order(*files):
    return [file.name for file in in_start_order(files)]


def test_order_puts_backends_first_and_keeps_the_rest():
    files = (
        a_file("guest1", "vtpm-guest1"),
        a_file("guest2", "vtpm-guest2"),
        a_file("vtpm-guest1", "vtpmmgr"),
        a_file("vtpm-guest2", "vtpmmgr"),
        a_file("vtpmmgr"),
    )
    assert names_in_order(*files) == ["vtpmmgr", "vtpm-guest1", "vtpm-guest2", "guest1", "guest2"]


def test_order_leaves_backends_that_run_already_out():
    assert names_in_order(a_file("guest1", "vtpm-guest1")) == ["guest1"]


@pytest.mark.parametrize(
    "files", [(a_file("a"), a_file("a")), (a_file("a", "b"), a_file("b", "a")), (a_file("a", "a"),)]
)
def test_order_that_cannot_be_is_refused(files):
    with pytest.raises(Failure) as failure:
        in_start_order(files)
    assert failure.value.exit_code is ExitCode.CONFIGURATION


def test_up_powers_on_and_creates_in_order(launcher, vtpm):
    launcher.answers["list"] = []
    files = sorted(EXAMPLES.glob("*.cfg"))
    assert len(files) == 5
    done = vtpm("up", *files)
    assert done.exit_code == 0, done.stderr
    asked = [method for method, _ in launcher.calls]
    assert asked == ["power_on", "list", *["create"] * 5]
    paths = [Path(params["path"]).stem for method, params in launcher.calls if method == "create"]
    assert paths == ["vtpmmgr", "vtpm-guest1", "vtpm-guest2", "guest1", "guest2"]
    texts = [params["config_text"] for method, params in launcher.calls if method == "create"]
    assert texts[0] == (EXAMPLES / "vtpmmgr.cfg").read_text()


def test_up_leaves_running_domains_alone_and_waits_until_they_are_ready(launcher, vtpm):
    done = vtpm("up", EXAMPLES / "guest1.cfg")
    assert done.exit_code == 0
    assert [method for method, _ in launcher.calls] == ["power_on", "list", "until_ready"]


def test_up_with_a_malformed_file_starts_nothing(launcher, vtpm, tmp_path):
    bad = tmp_path / "bad.cfg"
    bad.write_text('name="guest1\n')
    done = vtpm("up", EXAMPLES / "vtpmmgr.cfg", bad)
    assert done.exit_code == ExitCode.CONFIGURATION
    assert "line 1" in done.stderr
    assert launcher.calls == []


def test_up_stops_at_the_first_domain_that_fails(launcher, vtpm):
    launcher.answers["list"] = []

    def create(params):
        if "vtpm-guest1" in params["path"]:
            return Failure("cannot start vtpm-guest1", why="blank", next_step="look", exit_code=65)
        return {}

    launcher.answers["create"] = create
    done = vtpm("up", *sorted(EXAMPLES.glob("*.cfg")))
    assert done.exit_code == ExitCode.DAMAGED
    assert [method for method, _ in launcher.calls].count("create") == 2


def test_down_without_a_stack_says_so_and_is_done(vtpm, places):
    done = vtpm("down")
    assert done.exit_code == 0
    assert done.stdout == f"nothing runs under {places.root}\n"


def test_up_shows_what_is_strange_in_the_files(launcher, vtpm):
    launcher.answers["list"] = []
    launcher.answers["create"] = {"warnings": ["x.cfg:3: the key colour is not known"]}
    done = vtpm("up", EXAMPLES / "vtpmmgr.cfg")
    assert "warning: x.cfg:3: the key colour is not known\n" in done.stderr


BREAKS_THE_FORK_SERVER = """
import sys, types
if "daemons.launcher.fork_server" in sys.orig_argv:
    def warm_up():
        raise RuntimeError("the drawers do not fit")
    sys.modules["daemons.launcher.warming"] = broken = types.ModuleType("warming")
    broken.warm_up = warm_up
"""


def test_up_whose_fork_server_cannot_start_says_why_at_once_and_leaves_nothing(
    vtpm_process, places, tmp_path_factory
):
    breaking = tmp_path_factory.mktemp("breaking")
    (breaking / "sitecustomize.py").write_text(BREAKS_THE_FORK_SERVER)
    before = time.monotonic()
    done = vtpm_process("up", PYTHONPATH=str(breaking))
    assert time.monotonic() - before < 12  # it was 15 s until one could even stop it
    assert done.returncode == ExitCode.BUG
    assert "the fork server" in done.stderr
    assert "RuntimeError: the drawers do not fit" in done.stderr
    assert str(places.log_dir / "launcher.log") in done.stderr
    assert "Traceback" in (places.log_dir / "launcher.log").read_text()
    done = vtpm_process("down")
    assert done.returncode == 0
    assert "nothing runs" in done.stdout


def test_two_ups_at_once_are_both_done(vtpm_process):
    with ThreadPoolExecutor() as threads:
        both = [threads.submit(vtpm_process, "up") for _ in range(2)]
    try:
        assert [done.result().returncode for done in both] == [0, 0], both
    finally:
        assert vtpm_process("down").returncode == 0


def test_down_waits_for_a_launcher_that_only_comes_up(vtpm_process, places):
    """The control socket is there some time after the launcher."""
    places.prepare()
    command = [sys.executable, "-m", "daemons.launcherd", "--root", str(places.root)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as launcher:
        lock = places.registry / "launcher.lock"
        deadline = time.monotonic() + 20
        while not lock.exists() and time.monotonic() < deadline:
            time.sleep(0.001)  # it has no way to tell
        done = vtpm_process("down")
        assert done.returncode == 0, done.stderr
        assert launcher.wait(20) == 0
