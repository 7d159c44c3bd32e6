"""The image on a real file system: who may hold it, and what is refused with which reason."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from daemons.disk import PosixDisk
from daemons.errors import ExitCode, Failure

SIZE = 64 * 1024


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "vtpmmgr-stubdom.img"
    path.write_bytes(bytes(SIZE))
    path.chmod(0o644)
    return path


def refusal(path: Path) -> Failure:
    with pytest.raises(Failure) as refused:
        PosixDisk(path)
    assert refused.value.next_step
    return refused.value


def test_what_was_written_is_read_back_and_is_in_the_file(image: Path):
    disk = PosixDisk(image)
    assert (disk.name, disk.size) == (str(image), SIZE)
    disk.write(4096, b"x" * 4096)
    disk.sync()
    assert disk.read(4095, 3) == b"\0xx"
    disk.close()
    disk.close()
    assert image.read_bytes()[4096:8192] == b"x" * 4096
    assert image.stat().st_size == SIZE


def test_reading_past_the_end_is_an_io_error(image: Path):
    disk = PosixDisk(image)
    os.truncate(image, 100)
    with pytest.raises(OSError, match="ends at byte 100"):
        disk.read(90, 20)
    disk.close()


def test_writing_past_the_end_changes_nothing(image: Path):
    disk = PosixDisk(image)
    with pytest.raises(OSError, match="past the end"):
        disk.write(SIZE - 10, bytes(11))
    disk.close()
    assert image.stat().st_size == SIZE


def test_missing_image_is_told_with_the_command_that_makes_it(tmp_path: Path):
    failure = refusal(tmp_path / "none.img")
    assert failure.exit_code == ExitCode.NO_INPUT
    assert f"dd if=/dev/zero of={tmp_path}/none.img bs=1M count=2" in failure.next_step
    assert not (tmp_path / "none.img").exists()


def cut_off(image):
    os.truncate(image, image.stat().st_size - 1)


def put_aside(image):
    image.rename(image.with_name("aside"))


def replaced(image):
    content = image.read_bytes()
    put_aside(image)
    image.write_bytes(content)


@pytest.mark.parametrize("change", [cut_off, put_aside, replaced])
def test_what_the_next_process_would_not_find_is_not_written(image: Path, change):
    disk = PosixDisk(image)
    disk.write(0, b"before")
    change(image)
    with pytest.raises(OSError, match=r"stands in its place|was cut off|No such file"):
        disk.write(0, b"after!")
    assert disk.read(0, 6) == b"before"
    disk.close()


def test_symbolic_link_is_not_followed(image: Path, tmp_path: Path):
    link = tmp_path / "link.img"
    link.symlink_to(image)
    failure = refusal(link)
    assert "symbolic link" in failure.why
    assert failure.exit_code == ExitCode.NO_PERMISSION


def test_fifo_does_not_hang_and_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "fifo")
    assert "neither a regular file" in refusal(tmp_path / "fifo").why


def test_directory_and_socket_are_refused(tmp_path: Path):
    assert refusal(tmp_path).exit_code == ExitCode.CONFIGURATION
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        assert refusal(tmp_path / "socket").exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_image_that_others_may_write_is_refused(image: Path, mode: int):
    image.chmod(mode)
    failure = refusal(image)
    assert failure.exit_code == ExitCode.NO_PERMISSION
    assert f"chmod go-w {image}" in failure.next_step


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_somebody_elses_image_is_refused(image: Path):
    os.chown(image, 12345, 12345)
    failure = refusal(image)
    assert failure.exit_code == ExitCode.NO_PERMISSION
    assert "user id 12345" in failure.why


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open everything")
def test_image_without_permission_is_refused(image: Path):
    image.chmod(0o400)
    assert refusal(image).exit_code == ExitCode.NO_PERMISSION


def test_second_user_is_told_who_holds_the_image(image: Path):
    disk = PosixDisk(image)
    failure = refusal(image)
    assert failure.exit_code == ExitCode.UNAVAILABLE
    assert f"process {os.getpid()}" in failure.why
    disk.close()
    PosixDisk(image).close()


def test_image_held_under_another_name_is_refused(image: Path, tmp_path: Path):
    disk = PosixDisk(image)
    (tmp_path / "second-name.img").hardlink_to(image)
    assert refusal(tmp_path / "second-name.img").exit_code == ExitCode.UNAVAILABLE
    disk.close()


def test_refused_image_is_let_go(image: Path):
    disk = PosixDisk(image)
    refusal(image)
    disk.close()
    image.chmod(0o666)
    refusal(image)
    image.chmod(0o600)
    PosixDisk(image).close()


def test_killed_holder_leaves_no_lock(image: Path):
    program = (
        "import pathlib, sys; from daemons.disk import PosixDisk;"
        f"disk = PosixDisk(pathlib.Path({str(image)!r})); print('held', flush=True);"
        "sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        assert f"process {holder.pid}" in refusal(image).why
        holder.kill()
        holder.wait()
    PosixDisk(image).close()
