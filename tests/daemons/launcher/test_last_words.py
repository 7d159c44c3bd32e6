"""The last words of a daemon, as `service.run_daemon` writes them."""

from __future__ import annotations

import io
import os

import pytest
import structlog

from daemons import logs
from daemons.launcher.last_words import LastWords, parse_last_words, read_last_words


def failure_line(**parts) -> str:
    stream = io.StringIO()
    try:
        logs.configure("vtpmd", "vtpm-guest1", stream=stream)
        structlog.get_logger().error(parts.pop("what"), **parts)
    finally:
        structlog.reset_defaults()
    return stream.getvalue()


def test_failure_line_of_our_own_log_is_read_back():
    line = failure_line(
        what="cannot open image /images/a.img",
        why='slot 1 says "no" = bad',
        next_step="dd if=/dev/zero of=/images/a.img",
        exit_code=65,
    )
    assert parse_last_words("first\n" + line + "a line after it\n") == LastWords(
        what="cannot open image /images/a.img",
        why='slot 1 says "no" = bad',
        next_step="dd if=/dev/zero of=/images/a.img",
    )


def test_one_word_values_have_no_quotes():
    line = failure_line(what="w", why="broken", next_step="wait", exit_code=1)
    assert parse_last_words(line) == LastWords(what="w", why="broken", next_step="wait")


def test_everyday_lines_are_no_last_words():
    stream = io.StringIO()
    try:
        logs.configure("vtpmd", stream=stream)
        structlog.get_logger().info("ring connected", ring=1)
        structlog.get_logger().warning("slow")
    finally:
        structlog.reset_defaults()
    assert parse_last_words(stream.getvalue()) == LastWords()
    assert parse_last_words("something that was printed\n" + stream.getvalue()) == LastWords()


@pytest.mark.parametrize(
    "line", ["Fatal Python error: Segmentation fault", "vtpmd: error: --domain is missing"]
)
def test_error_of_python_or_of_the_arguments_is_the_cause(line):
    assert parse_last_words(f"usage: vtpmd\n{line}\nCurrent thread 0x1:\n").why == line


def test_error_line_without_a_reason_is_taken_as_it_is():
    line = failure_line(what="refusing connections", limit=3)
    assert parse_last_words(line) == LastWords(why="refusing connections limit=3")


def test_bug_is_told_by_the_end_of_its_traceback():
    stream = io.StringIO()
    try:
        logs.configure("vtpmd", stream=stream)
        group = ExceptionGroup("many", [ValueError("boom")])
        structlog.get_logger().error("this is a bug of ours", exc_info=group)
        structlog.get_logger().info("an everyday line after it")
    finally:
        structlog.reset_defaults()
    assert parse_last_words(stream.getvalue()) == LastWords(why="ValueError: boom")


def test_without_a_failure_line_it_is_the_end_of_the_traceback():
    tail = "Traceback (most recent call last):\n  line 1\nValueError: \x1b[31mboom\n\nprinted\n"
    assert parse_last_words(tail) == LastWords(why="ValueError: ?[31mboom")
    assert str(parse_last_words(tail)) == "ValueError: ?[31mboom"
    assert parse_last_words("") == LastWords()


def test_only_what_was_written_since_the_start_counts(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("a: error: old\n")
    assert read_last_words(log, 14) == LastWords()
    assert read_last_words(log, 0) == LastWords(why="a: error: old")
    log.write_text("a: error: old\na: error: new\n")
    assert read_last_words(log, 14) == LastWords(why="a: error: new")
    assert read_last_words(tmp_path / "missing", 0) == LastWords()


def fifo(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [fifo, directory, loop])
@pytest.mark.timeout(20)
def test_what_is_no_log_has_no_words_and_holds_nobody_up(tmp_path, make):
    make(tmp_path / "a.log")
    assert read_last_words(tmp_path / "a.log", 0) == LastWords()


@pytest.mark.timeout(20)
def test_fifo_with_a_writer_has_no_words(tmp_path):
    log = tmp_path / "a.log"
    os.mkfifo(log)
    descriptor = os.open(log, os.O_RDWR)
    try:
        os.write(descriptor, b"a: error: old\n")
        assert read_last_words(log, 0) == LastWords()
    finally:
        os.close(descriptor)


def test_long_words_are_cut():
    assert 200 < len(parse_last_words("a: error: " + "x" * 5000).why) < 400
