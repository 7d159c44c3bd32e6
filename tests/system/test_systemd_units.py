"""The units as files: what each may do, as systemd-analyze sees it; what `make install` puts where.

No machine is booted for this, and no root is needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

from daemons.cli.app import app

PROJECT = Path(__file__).resolve().parents[2]
INSTALL = PROJECT / "systemd" / "install.py"
SERVICES = sorted(path.name for path in (PROJECT / "systemd").glob("*.service"))
LISTENING = {"hwtpmd", "vtpmmgrd", "vtpm@", "vtpm-guest@"}
EXPOSURE_MAX = 1.0
DAEMONS = ("hwtpmd", "vtpmmgrd", "vtpmd", "guestd", "launcherd")

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not installed"
)


def put_in_place(destdir, *options):
    return subprocess.run(
        [sys.executable, str(INSTALL), "--destdir", str(destdir), *options],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def destdir(tmp_path_factory):
    made = tmp_path_factory.mktemp("destdir")
    done = put_in_place(made)
    assert done.returncode == 0, done.stderr
    return made


def unit_text(name):
    return (PROJECT / "systemd" / name).read_text()


@needs_systemd
@pytest.mark.parametrize("name", SERVICES)
def test_no_service_is_exposed(destdir, name):
    unit = destdir / "usr/local/lib/systemd/system" / name
    analyzed = subprocess.run(
        [
            *("systemd-analyze", "security", "--offline=true", "--no-pager"),
            *(f"--threshold={EXPOSURE_MAX * 10:.0f}", str(unit)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert analyzed.returncode == 0, analyzed.stdout
    exposure = float(analyzed.stdout.split("Overall exposure level")[1].split(":")[1].split()[0])
    assert exposure <= EXPOSURE_MAX


def test_whoever_listens_has_a_socket_unit():
    sockets = {path.stem for path in (PROJECT / "systemd").glob("*.socket")}
    assert sockets == LISTENING


@pytest.mark.parametrize("name", [f"{stem}.service" for stem in sorted(LISTENING)])
def test_daemons_tell_that_they_are_ready_and_alive(name):
    lines = unit_text(name).splitlines()
    assert "Type=notify" in lines
    assert any(line.startswith("WatchdogSec=") for line in lines)
    assert any(line.startswith("User=vtpm") for line in lines)


def test_a_restart_of_one_never_restarts_another():
    """systemd passes a restart on over Requires=, BindsTo= and PartOf=: also that after a crash."""
    for name in SERVICES:
        for line in unit_text(name).splitlines():
            key, _, units = line.partition("=")
            if key in {"Requires", "BindsTo", "PartOf", "Requisite"}:
                passed_on = {unit for unit in units.split() if unit.endswith(".service")}
                allowed = {"hwtpmd.service"} if name == "vtpm-platform.service" else set()
                assert passed_on <= allowed, (name, line)


def test_all_programs_are_installed_and_run(destdir):
    home = destdir / "usr/local/lib/vtpm-stack"
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["scripts"]
    assert {path.name for path in (home / "bin").iterdir()} == {*declared, "python"}
    for program in declared:
        _, _, imported, _ = (home / "bin" / program).read_text().splitlines()
        run = subprocess.run(
            [home / "bin" / "python", "-I", "-c", imported],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, (program, run.stderr)


def test_every_file_knows_where_the_others_are(destdir):
    for path in destdir.rglob("*"):
        if path.is_file() and path.suffix in {".service", ".socket", ".target", ".conf"}:
            assert "@BINDIR@" not in path.read_text()
            assert "@LIBDIR@" not in path.read_text()
            assert str(destdir) not in path.read_text(), path


def test_a_prefix_holds_everywhere(tmp_path):
    assert put_in_place(tmp_path, "--prefix", "/usr").returncode == 0
    assert (tmp_path / "usr/bin/vtpm").is_symlink()
    unit = (tmp_path / "usr/lib/systemd/system/hwtpmd.service").read_text()
    assert "ExecStart=/usr/lib/vtpm-stack/bin/hwtpmd" in unit


def test_there_is_a_private_place_for_config_files(destdir):
    assert (destdir / "etc/vtpm/domains").stat().st_mode & 0o777 == 0o700


def test_a_relative_prefix_is_refused(tmp_path):
    refused = put_in_place(tmp_path, "--prefix", "here")
    assert refused.returncode == 1
    assert "not absolute" in refused.stderr


# -- man pages -------------------------------------------------------------------------------------


def man_page(destdir, name):
    return destdir / f"usr/local/share/man/man{name[-1]}" / name


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("name", ["vtpm.1", "vtpm-stack.7", *(f"{daemon}.8" for daemon in DAEMONS)])
def test_man_pages_are_set_without_a_warning(destdir, name):
    page = man_page(destdir, name)
    made = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", str(page)], capture_output=True, text=True, check=False
    )
    assert (made.returncode, made.stderr) == (0, "")
    assert name.partition(".")[0] in made.stdout


def test_the_page_of_the_command_has_every_subcommand(destdir):
    page = man_page(destdir, "vtpm.1").read_text().replace("\\-", "-")
    told = set(re.findall(r"^\.SS \\fBvtpm ([^\\]+)\\fR$", page, re.MULTILINE))
    assert told == set(_subcommands(typer.main.get_command(app)))


def _subcommands(group, before=()):
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        words = (*before, name)
        if hasattr(command, "commands"):
            yield from _subcommands(command, words)
        else:
            yield " ".join(words)


@pytest.mark.parametrize("program", DAEMONS)
def test_a_daemons_page_has_its_options_and_no_other(destdir, program):
    """One source is not enough if it is wrong: the program itself says what it takes."""
    helped = subprocess.run(
        [sys.executable, "-c", f"from daemons.{program} import main; main(['--help'])"],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        check=False,
    )
    declared = set(re.findall(r"--[a-z-]+", helped.stdout)) - {"--help"}
    page = man_page(destdir, f"{program}.8").read_text().replace("\\-", "-")
    assert set(re.findall(r"(?<![\w-])--[a-z-]+", page)) == declared
