"""A named file that is a pipe: read to its end, and never waited for without end."""

import os
import threading
import time

import pytest

from daemons import named_files
from daemons.errors import ExitCode, Failure
from daemons.named_files import read_bytes
from daemons.xl.xl_config import read

pytestmark = pytest.mark.timeout(20)

TEXT = b'name="guest1"\n'


@pytest.fixture
def fifo(tmp_path):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(named_files, "WRITER_WAIT_S", 0.2)
    monkeypatch.setattr(named_files, "SILENCE_MAX_S", 0.3)


def writer(path, *parts, pause_s=0.0):
    def write():
        time.sleep(pause_s)
        with path.open("wb", buffering=0) as file:
            for part in parts:
                file.write(part)
                time.sleep(pause_s)

    thread = threading.Thread(target=write)
    thread.start()
    return thread


@pytest.mark.usefixtures("soon")
def test_fifo_that_nobody_writes_into_is_refused(fifo):
    with pytest.raises(OSError, match="nobody writes into it"):
        read_bytes(fifo, 100)


@pytest.mark.usefixtures("soon")
def test_daemon_refuses_it_too(fifo):
    with pytest.raises(Failure, match="nobody writes into it") as told:
        read(fifo)
    assert told.value.exit_code is ExitCode.NO_INPUT


@pytest.mark.usefixtures("soon")
@pytest.mark.parametrize("said", [b"", TEXT])
def test_who_writes_and_says_nothing_more_is_not_waited_for_without_end(fifo, said):
    descriptor = os.open(fifo, os.O_RDWR)
    try:
        os.write(descriptor, said)
        with pytest.raises(OSError, match="has said nothing for"):
            read_bytes(fifo, 100)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_pipe_is_read_to_its_end(fifo, pause_s):
    thread = writer(fifo, TEXT, TEXT, pause_s=pause_s)
    assert read_bytes(fifo, 100) == TEXT + TEXT
    thread.join()


def test_who_thinks_before_writing_is_waited_for(fifo, monkeypatch):
    monkeypatch.setattr(named_files, "WRITER_WAIT_S", 0.1)
    thread = writer(fifo, b"", TEXT, pause_s=0.05)
    time.sleep(0.02)
    assert read_bytes(fifo, 100) == TEXT
    thread.join()


def test_pipe_whose_writer_has_gone_is_read(tmp_path):
    there, here = os.pipe()
    try:
        os.write(here, TEXT)
        os.close(here)
        began = time.monotonic()
        assert read_bytes(tmp_path / f"/dev/fd/{there}", 100) == TEXT
        assert read_bytes(tmp_path / f"/dev/fd/{there}", 100) == b""
        assert time.monotonic() - began < named_files.WRITER_WAIT_S
    finally:
        os.close(there)


def test_what_is_too_long_is_not_read_to_its_end(fifo, tmp_path):
    thread = writer(fifo, b"#" * 101)
    assert read_bytes(fifo, 100) == b"#" * 101
    thread.join()
    (tmp_path / "file").write_bytes(b"#" * 200)
    assert read_bytes(tmp_path / "file", 100) == b"#" * 101
