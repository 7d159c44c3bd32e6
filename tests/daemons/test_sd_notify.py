"""The readiness protocol, from both ends."""

import array
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.sd_notify import (
    DATAGRAM_BYTES_MAX,
    Notifier,
    encode_fields,
    listen_for_notifications,
    notify,
    parse_fields,
    receive_notification,
)


@pytest.fixture
def place(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture
def receiver(place):
    with listen_for_notifications(place / "notify.sock") as listener:
        listener.socket.setblocking(False)
        yield listener.socket


def take(receiver):
    taken = receive_notification(receiver)
    return taken and dict(taken.fields)


def test_each_word_arrives_with_its_senders_credentials(receiver, place):
    notifier = Notifier(str(place / "notify.sock"))
    notifier.status("loading the state")
    notifier.ready("serving")
    notifier.watchdog()
    notifier.stopping()
    first = receive_notification(receiver)
    assert (first.pid, first.uid, first.gid) == (os.getpid(), os.geteuid(), os.getegid())
    assert first.fields == {"STATUS": "loading the state"}
    assert take(receiver) == {"READY": "1", "STATUS": "serving"}
    assert take(receiver) == {"WATCHDOG": "1"}
    assert take(receiver) == {"STOPPING": "1"}
    with pytest.raises(BlockingIOError):
        receive_notification(receiver)


def test_credentials_are_the_kernels_not_the_senders(receiver, place):
    source = "from daemons.sd_notify import notify; notify(READY='1', MAINPID='1')"
    process = subprocess.Popen(
        [sys.executable, "-c", source],
        env=os.environ | {"NOTIFY_SOCKET": str(place / "notify.sock")},
        cwd=Path(__file__).parents[2],
    )
    assert process.wait(30) == 0
    taken = receive_notification(receiver)
    assert taken.pid == process.pid
    assert taken.fields == {"READY": "1", "MAINPID": "1"}


def test_without_a_manager_nothing_happens(monkeypatch, place):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify(READY="1")
    Notifier(None).ready()
    Notifier(str(place / "nobody")).ready()
    Notifier(str(place / "no" / "directory")).ready()
    Notifier(str(place / ("long" * 60) / "notify.sock")).ready()


def test_abstract_address_is_understood():
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as abstract:
        name = f"vtpm-test-{os.getpid()}"
        abstract.bind("\0" + name)
        Notifier("@" + name).ready()
        assert abstract.recv(100) == b"READY=1"


def test_deep_path_is_reached(place):
    deep = place / ("d" * 120)
    deep.mkdir(mode=0o700)
    with listen_for_notifications(deep / "notify.sock") as listener:
        Notifier(str(deep / "notify.sock")).ready()
        assert take(listener.socket) == {"READY": "1"}


def test_text_cannot_add_a_field():
    assert encode_fields({"STATUS": "x\nREADY=1\0"}) == b"STATUS=x READY=1 "


@given(st.dictionaries(st.sampled_from(["STATUS", "READY", "X_1"]), st.text(max_size=700)))
def test_whatever_is_sent_is_understood(fields):
    parsed = parse_fields(encode_fields(fields))
    assert parsed is not None
    assert set(parsed) == set(fields)


@given(st.binary(max_size=200))
def test_any_datagram_is_fields_or_nothing(datagram):
    parsed = parse_fields(datagram)
    assert parsed is None or all(name and "\n" not in text for name, text in parsed.items())


@pytest.mark.parametrize("datagram", [b"READY", b"=1", b"A B=1", b"\xff=1", b"A\x1b=1"])
def test_malformed_datagram_is_dropped_and_the_next_one_taken(receiver, place, datagram):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(datagram, str(place / "notify.sock"))
        sender.sendto(b"x" * (DATAGRAM_BYTES_MAX + 1), str(place / "notify.sock"))
        sender.sendto("\n".join(f"K{n}=1" for n in range(33)).encode(), str(place / "notify.sock"))
        sender.sendto(b"READY=1\n", str(place / "notify.sock"))
    assert [take(receiver) for _ in range(4)] == [None, None, None, {"READY": "1"}]


def test_attached_descriptors_do_not_enter_our_table(receiver, place):
    before = len(list(Path("/proc/self/fd").iterdir()))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        descriptors = array.array("i", [0] * 50)
        sender.sendmsg(
            [b"FDSTORE=1"],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)],
            0,
            str(place / "notify.sock"),
        )
    assert take(receiver) == {"FDSTORE": "1"}
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("environ", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "2500000"}, 2.5),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": str(os.getpid())}, 1.0),
        ({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_watchdog_time_is_read_when_it_is_for_us(environ, watchdog_s):
    assert Notifier.from_environment(environ).watchdog_s == watchdog_s
