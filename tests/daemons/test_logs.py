"""Log lines: what a person reads, what a program reads, and what nobody can forge."""

import io
import json

import pytest
import structlog

from daemons import logs
from daemons.errors import Failure


@pytest.fixture
def configured():
    def configure(**options):
        stream = io.StringIO()
        logs.configure("vtpmd", **({"domain": "vtpm-guest1"} | options), stream=stream)
        return structlog.get_logger(), stream

    yield configure
    structlog.reset_defaults()


def test_line_names_program_domain_level_and_values(configured):
    log, stream = configured()
    log.info("ring connected", ring="guest1/0", sequence=7, key=b"\x01\xff", text="a b")
    _, level, rest = stream.getvalue().split(maxsplit=2)
    assert level == "info"
    assert rest == (
        'vtpmd[vtpm-guest1] ring connected ring=guest1/0 sequence=7 key=01ff text="a b"\n'
    )


def test_daemon_without_domain_has_its_name_alone(configured):
    log, stream = configured(domain=None)
    log.error("x")
    assert stream.getvalue().endswith(" error vtpmd x\n")


@pytest.mark.parametrize(("level", "written"), [("error", 1), ("info", 2), ("debug", 3)])
def test_level_names_of_xl_choose_what_is_written(configured, level, written):
    log, stream = configured(level=level)
    log.debug("d")
    log.info("i")
    log.error("e")
    assert len(stream.getvalue().splitlines()) == written


def test_unknown_level_is_refused_with_the_choices():
    with pytest.raises(Failure, match="error, warning, info, debug"):
        logs.configure("vtpmd", level="loud\n")


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[2J", "\r", "\0", "\x9b31m", "\u202e", "\u2028", "\udc80"]
)
@pytest.mark.parametrize("where", ["event", "value", "exception", "domain"])
@pytest.mark.parametrize("as_json", [False, True])
def test_text_from_outside_can_neither_forge_a_line_nor_drive_a_terminal(
    configured, text, where, as_json
):
    log, stream = configured(as_json=as_json, domain=text if where == "domain" else "d")
    try:
        int(text if where == "exception" else "x")
    except ValueError as error:
        error.add_note(text if where == "exception" else "x")
        log.exception(text if where == "event" else "e", k=text if where == "value" else "v")
    written = stream.getvalue()
    assert all(c.isprintable() or c == "\n" for c in written)
    if as_json:
        assert written.count("\n") == 1
        json.loads(written)
    else:
        # Only the first line may begin like a line of ours.
        assert all(line.startswith("    ") for line in written.splitlines()[1:])


def test_long_text_is_cut(configured):
    log, stream = configured()
    log.info("x" * 100_000, y="z" * 100_000)
    assert len(stream.getvalue()) < 3000


def test_json_keeps_numbers_and_names(configured):
    log, stream = configured(as_json=True)
    log.info("started", pid=5, ok=True, missing=None, raw=b"\x01")
    fields = json.loads(stream.getvalue())
    assert fields["pid"] == 5
    assert fields["ok"] is True
    assert fields["missing"] is None
    assert fields["raw"] == "01"
    assert (fields["program"], fields["domain"]) == ("vtpmd", "vtpm-guest1")


class FullDisk(io.StringIO):
    def write(self, _):
        raise OSError(28, "No space left on device")


def test_log_that_cannot_be_written_does_not_stop_the_daemon():
    logs.configure("vtpmd", stream=FullDisk())
    structlog.get_logger().error("x")
    closed = io.StringIO()
    closed.close()
    logs.configure("vtpmd", stream=closed)
    structlog.get_logger().error("x")
    structlog.reset_defaults()


def test_log_of_a_process_that_has_no_stderr_goes_nowhere(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    logs.configure("vtpmd")
    structlog.get_logger().error("x")
    logs.write_line("vtpmd", "error", "x")
    structlog.reset_defaults()


# -- too many lines --------------------------------------------------------------------------------


def test_nobody_can_fill_a_disk_with_lines_of_one_event(configured):
    log, stream = configured()
    for number in range(logs.LINES_AT_ONCE * 10):
        log.info("peer refused", peer_pid=number)
    log.info("ring connected")
    lines = stream.getvalue().splitlines()
    assert logs.LINES_AT_ONCE <= len(lines) < 2 * logs.LINES_AT_ONCE
    assert "ring connected" in lines[-1]


def test_debug_lines_are_all_written_and_tracebacks_are_under_the_limit(configured):
    log, stream = configured(level="debug")
    for _ in range(logs.LINES_AT_ONCE * 3):
        log.debug("d")
        try:
            int("no number")
        except ValueError:
            log.exception("e")
    events = [line.split()[3] for line in stream.getvalue().splitlines() if "vtpmd" in line]
    assert events.count("d") == logs.LINES_AT_ONCE * 3
    assert logs.LINES_AT_ONCE <= events.count("e") < logs.LINES_AT_ONCE * 2


def test_line_after_those_left_out_says_how_many_they_were():
    now = 0.0
    allowance = logs.Allowance(lambda: now)
    taken = [allowance.take("refused") for _ in range(logs.LINES_AT_ONCE + 3)]
    assert taken == [0] * logs.LINES_AT_ONCE + [None] * 3
    assert allowance.take("connected") == 0, "others are counted on their own"
    now += 1 / logs.LINES_A_SECOND
    assert allowance.take("refused") == 3
    assert allowance.take("refused") is None
    now += 10 * logs.LINES_AT_ONCE / logs.LINES_A_SECOND
    assert [allowance.take("refused") for _ in range(3)] == [1, 0, 0]
