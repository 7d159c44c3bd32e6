"""The last words of a daemon, as `service.run_daemon` writes them."""

from __future__ import annotations

import io

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
    assert parse_last_words("Segmentation fault\n" + stream.getvalue()).why == "Segmentation fault"


def test_without_a_failure_line_it_is_the_last_line():
    tail = "Traceback\n  line 1\nValueError: \x1b[31mboom\n\n"
    assert parse_last_words(tail) == LastWords(why="ValueError: ?[31mboom")
    assert str(parse_last_words(tail)) == "ValueError: ?[31mboom"
    assert parse_last_words("") == LastWords()


def test_only_what_was_written_since_the_start_counts(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("old words\n")
    assert read_last_words(log, 10) == LastWords()
    assert read_last_words(log, 0) == LastWords(why="old words")
    log.write_text("old words\nnew\n")
    assert read_last_words(log, 10) == LastWords(why="new")
    assert read_last_words(tmp_path / "missing", 0) == LastWords()


def test_long_words_are_cut():
    assert len(parse_last_words("x" * 5000).why) < 400
