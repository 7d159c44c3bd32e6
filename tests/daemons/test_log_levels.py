"""How much a process logs may change while it runs, and what a wrong file does not do."""

import io
import os
import signal
from functools import partial

import pytest
import structlog
import trio

from daemons import command_log, log_levels, logs
from daemons.errors import ExitCode, Failure
from daemons.sd_notify import Notifier
from daemons.service import serve

GET_RANDOM = bytes.fromhex("00c1 0000000e 00000046 00000004")
ANSWER = bytes.fromhex("00c4 0000000a 00000003")


@pytest.fixture
def log():
    stream = io.StringIO()
    logs.configure("vtpmd", "vtpm-guest1", "info", stream=stream)
    yield stream
    logs.set_level("info")
    structlog.reset_defaults()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "log-levels.toml"


def write(file, text):
    file.write_text(text)
    file.chmod(0o644)


def written(log):
    """Write a line of each level; which of them appeared."""
    log.truncate(log.seek(0))
    for level in logs.LEVELS:
        getattr(structlog.get_logger(), level)("line")
    return {line.split()[1] for line in log.getvalue().splitlines()}


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("", {"error", "warning", "info"}),
        ('level = "error"', {"error"}),
        ('level = "error"\n[levels]\nvtpm-guest1 = "warning"', {"error", "warning"}),
        ('[levels]\nvtpm-guest1 = "debug"', {"error", "warning", "info", "debug"}),
        ('[levels]\nguest1 = "debug"', {"error", "warning", "info"}),
    ],
)
def test_the_file_decides_and_the_own_setting_where_it_says_nothing(log, file, text, levels):
    write(file, text)
    log_levels.follow(file, "vtpm-guest1", "info")
    assert written(log) == levels


def test_no_file_is_no_difference(log, file):
    log_levels.follow(file, "vtpm-guest1", "error")
    assert written(log) == {"error"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("level = 3", "level in the file (line 1) is none of"),
        ('levle = "debug"', "unknown key 'levle'"),
        ('[levels]\nguest1 = "loud"', "guest1 in [levels] (line 2) is none of"),
        ("[", "Invalid"),
    ],
)
def test_a_wrong_file_is_told_of_and_changes_nothing(log, file, text, reason):
    write(file, '[levels]\nvtpm-guest1 = "error"')
    log_levels.follow(file, "vtpm-guest1", "info")
    write(file, text)
    with pytest.raises(Failure) as refused:
        log_levels.read_levels(file)
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    assert reason in refused.value.why
    log_levels.read_again()
    assert reason in log.getvalue()
    assert written(log) == {"error"}


def test_a_file_that_others_may_write_is_not_used(log, file):
    write(file, 'level = "debug"')
    file.chmod(0o666)
    log_levels.follow(file, "vtpm-guest1", "error")
    assert written(log) == {"error"}


class Heard(Notifier):
    """A service manager that listens."""

    def __init__(self, watchdog_s=None):
        super().__init__(None, watchdog_s)
        self.said, self.is_new = [], trio.Event()

    def send(self, **fields):
        self.said.append(fields)
        self.is_new.set()
        self.is_new = trio.Event()

    async def until(self, count):
        with trio.fail_after(5):
            while len(self.said) < count:
                await self.is_new.wait()


async def nobody(_connection):
    """No connection comes."""


async def test_a_hang_up_is_a_reload_that_the_service_manager_hears_of(log, file):
    log_levels.follow(file, "vtpm-guest1", "info")
    heard = Heard()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, nobody, [], notifier=heard))
        write(file, 'level = "debug"')
        os.kill(os.getpid(), signal.SIGHUP)
        await heard.until(3)
        nursery.cancel_scope.cancel()
    assert [sorted(fields) for fields in heard.said] == [
        ["READY"],
        ["MONOTONIC_USEC", "RELOADING"],
        ["READY"],
    ]
    assert written(log) == set(logs.LEVELS)


# -- commands --------------------------------------------------------------------------------------


def told(log):
    log.truncate(log.seek(0))
    command_log.end(command_log.begin(), GET_RANDOM, ANSWER, ring="guest1/0")
    return log.getvalue()


def test_a_command_is_told_at_debug_without_its_operands(log):
    logs.set_level("debug")
    line = told(log)
    assert "command ring=guest1/0 ordinal=GET_RANDOM result=0x00000003 ms=" in line
    assert "00000004" not in line


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_no_command_is_told_at_any_other_level(log, level):
    logs.set_level(level)
    assert told(log) == ""


@pytest.mark.parametrize("request_", [b"", bytes(5), b"\xff" * 10])
def test_any_bytes_can_be_told(log, request_):
    logs.set_level("debug")
    command_log.end(command_log.begin(), request_, ANSWER)
    assert "ordinal=0x" in log.getvalue()


def test_commands_cannot_fill_a_log_and_what_is_left_out_is_told(log, monkeypatch):
    logs.set_level("debug")
    now = 1000.0
    monkeypatch.setattr(command_log, "_pace", command_log._Pace())
    monkeypatch.setattr(command_log.time, "monotonic", lambda: now)

    def run(commands):
        log.truncate(log.seek(0))
        for _ in range(commands):
            command_log.end(command_log.begin(), GET_RANDOM, ANSWER)
        return log.getvalue().splitlines()

    lines = run(command_log.LINES_AT_ONCE + 1000)
    assert len(lines) == command_log.LINES_AT_ONCE
    assert not any("left_out" in line for line in lines)
    now += 1 / command_log.LINES_A_SECOND
    (line,) = run(10)
    assert " left_out=1000 " in line
    now += command_log.LINES_AT_ONCE / command_log.LINES_A_SECOND
    lines = run(command_log.LINES_AT_ONCE)
    assert len(lines) == command_log.LINES_AT_ONCE
    assert " left_out=9 " in lines[0]
    assert "left_out" not in lines[1]


def test_a_command_that_is_not_told_leaves_nothing_behind(log):
    logs.set_level("info")
    assert command_log.begin() == 0.0
    command_log.end(0.0, GET_RANDOM, ANSWER)
    assert log.getvalue() == ""
