"""How the command ends when its standard streams are closed, full, or of another encoding."""

import os
import socket
import subprocess
import sys

import pytest

from daemons.errors import ExitCode

PLAN = '[[fault]]\nwhere = "process {}"\nwhat = "kill"\nat_s = 0\n'


@pytest.fixture
def shell(places):
    """Run `vtpm WORDS` as a shell does, with redirections."""

    def run(words, **environment):
        return subprocess.run(
            ["sh", "-c", f"{sys.executable} -m daemons.cli.main {words}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={**os.environ, "VTPM_ROOT": str(places.root), **environment},
        )

    return run


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "plan.toml"
    path.write_text(PLAN.format("guest1"))
    return path


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize(
    "words",
    ["list", "list --json", "domid guest1", "--help", "list --help", "simulator --help"],
)
def test_a_result_that_finds_no_room_is_a_failure(shell, launcher, words):
    launcher.answers["domid"] = 3
    done = shell(f"{words} > /dev/full")
    assert done.returncode == ExitCode.IO_ERROR
    assert done.stderr.startswith(
        "vtpm: cannot write the result\n  why:  standard output: no space"
    )
    assert len(done.stderr.splitlines()) == 3


def test_a_check_of_faults_that_finds_no_room_is_a_failure(shell, plan):
    done = shell(f"fault check {plan} > /dev/full")
    assert done.returncode == ExitCode.IO_ERROR
    assert "Traceback" not in done.stderr


def test_an_output_that_is_not_open_for_writing_is_a_failure(shell, plan):
    assert shell(f"fault check {plan} 1< /dev/null").returncode == ExitCode.IO_ERROR


@pytest.mark.parametrize("words", ["nonsense", "destroy nobody"])
@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-", "> /dev/full 2> /dev/full"])
def test_where_nobody_can_be_told_the_status_is_the_same(shell, words, where):
    assert shell(f"{words} {where}").returncode == shell(words).returncode


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_none_that_fail(shell, closed):
    done = shell(f"list {closed}")
    assert done.returncode == ExitCode.DONE
    assert done.stderr == ""


@pytest.mark.usefixtures("launcher")
def test_a_reader_that_has_seen_enough_is_no_bug(shell):
    done = shell("list | true")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.usefixtures("launcher")
def test_a_program_of_a_guest_gets_streams_though_there_are_none(shell, launcher, tmp_path):
    """Descriptors that are closed would be the sockets and files that it opens."""
    asked = f"import os; [os.fstat(n) for n in range(3)]; open({str(tmp_path / 'done')!r}, 'w')"
    launcher.answers["guest_environment"] = {}
    socket_of_guest1(launcher)
    done = shell(f'exec guest1 -- {sys.executable} -c "{asked}" <&- >&- 2>&-')
    assert done.returncode == ExitCode.DONE
    assert (tmp_path / "done").exists()


def socket_of_guest1(launcher):
    place = launcher.places.domain("guest1")
    launcher.places.make_private(place.directory)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place.tpm0))


@pytest.mark.parametrize(
    ("name", "encoding", "shown"),
    [("\u00fc", "ascii:strict", "\\xfc"), ("\udcff", "utf-8:strict", "\\udcff")],
)
def test_a_path_that_the_output_cannot_encode_is_escaped(shell, tmp_path, name, encoding, shown):
    image = tmp_path / f"{name}.img"
    image.write_bytes(bytes(2 * 1024 * 1024))
    done = shell(f"image make {image} --kernel /etc/passwd", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (ExitCode.DONE, "")
    assert done.stdout == f"{tmp_path}/{shown}.img\n"
