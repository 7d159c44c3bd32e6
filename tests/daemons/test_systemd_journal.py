"""Events as entries of systemd's journal."""

from __future__ import annotations

import os
import socket

import pytest
import structlog

from daemons import logs, systemd_journal
from daemons.systemd_journal import Journal, encode_entry, field_name, is_our_stderr, message_id


@pytest.fixture
def journal(tmp_path, monkeypatch):
    """A socket in place of the journal's; whoever configures logging now writes to it."""
    address = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(address))
        receiver.setblocking(False)
        monkeypatch.setattr(logs, "is_our_stderr", lambda _environ: True)
        monkeypatch.setattr(logs, "Journal", lambda: Journal(address))
        yield receiver
    structlog.reset_defaults()


def entry(journal):
    lines = journal.recv(65536).decode().splitlines()
    return dict(line.partition("=")[::2] for line in lines)


def test_an_event_has_its_kind_its_domain_and_what_is_told_with_it(journal):
    logs.configure("vtpmd", "vtpm-guest1")
    structlog.get_logger().error("cannot open image", why="no space left", uuid=b"\xac\x0a")
    fields = entry(journal)
    assert fields == {
        "MESSAGE": 'cannot open image why="no space left" uuid=ac0a',
        "MESSAGE_ID": message_id("cannot open image"),
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "vtpmd",
        "VTPM_DOMAIN": "vtpm-guest1",
        "VTPM_EVENT": "cannot open image",
        "VTPM_WHY": "no space left",
        "VTPM_UUID": "ac0a",
    }


def test_outside_text_forges_no_field(journal):
    logs.configure("vtpmd", "x\nPRIORITY=0")
    structlog.get_logger().info("refused\nVTPM_DOMAIN=other", reason="a\nMESSAGE=b")
    fields = entry(journal)
    assert fields["PRIORITY"] == "6"
    assert fields["VTPM_DOMAIN"] == "x\\nPRIORITY=0"
    assert fields["MESSAGE"].startswith("refused\\n")


def test_a_level_is_still_a_level(journal):
    logs.configure("vtpmd", level="error")
    structlog.get_logger().info("too little to tell")
    with pytest.raises(BlockingIOError):
        journal.recv(1)


def test_a_text_of_lines_has_its_length():
    assert encode_entry({"A": "x", "B": "y\nz"}) == b"A=x\nB\n\3\0\0\0\0\0\0\0y\nz\n"


def test_what_the_journal_does_not_take_is_written_to_stderr(tmp_path, capsys):
    Journal(tmp_path / "nobody").send({"MESSAGE": "still told"})
    assert capsys.readouterr().err == "still told\n"


def test_only_the_journals_own_stream_counts():
    status = os.fstat(2)
    assert is_our_stderr({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"})
    assert not is_our_stderr({"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"})
    assert not is_our_stderr({})


def test_any_key_becomes_a_field_that_the_journal_takes():
    assert field_name("peer_pid") == "VTPM_PEER_PID"
    assert field_name("odd key=\n") == "VTPM_ODD_KEY__"


def test_kinds_have_ids_of_their_own():
    assert message_id("power is on") != message_id("power is off")
    assert len(message_id("power is on")) == 32
    assert systemd_journal.KINDS.version == 4
