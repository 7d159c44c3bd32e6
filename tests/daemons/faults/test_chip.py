"""The chip's own faults: busy registers, and a locality that seizes and gives back."""

import os

import pytest

from daemons.faults import chip
from daemons.faults.chip import OtherLocality, as_of_a_busy_chip, asks_for_status
from daemons.faults.hooks import PAGE_BYTES
from daemons.faults.page import Page, now_us
from hwtpm.tis_device import TisDevice
from protocol.tis_messages import Done, Read, Value, Write, decode_answer, encode_message

FOR_S = 2.0


class NoEngine:
    established = False


class Server:
    """As much of the chip's server as another locality needs."""

    def __init__(self):
        self.device = TisDevice(NoEngine())
        self.device.power_on()

    def write(self, access):
        self.device.write(access.locality, access.offset, access.data)


class Later:
    """Timers that run out when the test says so."""

    def __init__(self):
        self.waiting = []

    def __call__(self, after_s, call):
        self.waiting.append((after_s, call))

    def run_out(self):
        waiting, self.waiting = self.waiting, []
        for _, call in waiting:
            call()


class Run:
    """The process that asked for faults."""

    def __init__(self):
        self.lives = True

    def __call__(self):
        return self.lives


@pytest.fixture
def clock(monkeypatch):
    """This moment, which the test moves."""
    moment_us = [now_us()]
    monkeypatch.setattr(chip, "now_us", lambda: moment_us[0])
    return moment_us


@pytest.fixture
def page(tmp_path):
    descriptor = os.open(tmp_path / "page", os.O_RDWR | os.O_CREAT, 0o600)
    os.truncate(descriptor, PAGE_BYTES)
    made = Page(descriptor)
    made.arm(1)
    os.close(descriptor)
    yield made
    made.close()


@pytest.mark.parametrize(("active", "by"), [(None, 3), (0, 3), (2, 3), (3, 4)])
def test_another_locality_seizes_and_gives_back(page, clock, active, by):
    server, later = Server(), Later()
    other = OtherLocality(page, server, Run(), later)
    if active is not None:
        server.device.write(active, 0x00, b"\x02")
    other.seize(FOR_S)
    if active is not None:
        assert server.device.read(active, 0x00)[0] & 0x10, "beenSeized"
    clock[0] += round(FOR_S * 1e6) - 1
    later.run_out()
    assert server.device.active_locality == by
    clock[0] += 1
    later.run_out()
    assert server.device.active_locality is None
    assert page.seizure is None
    assert not later.waiting


@pytest.mark.parametrize("end", ["disarmed", "killed"])
def test_it_gives_back_when_the_run_is_over(page, end):
    server, later, run = Server(), Later(), Run()
    OtherLocality(page, server, run, later).seize(FOR_S)
    if end == "disarmed":
        page.disarm()
    else:
        run.lives = False
    later.run_out()
    assert server.device.active_locality is None
    assert page.seizure is None


def test_a_second_seizure_at_the_same_time_does_nothing(page):
    server, later = Server(), Later()
    other = OtherLocality(page, server, Run(), later)
    other.seize(FOR_S)
    other.seize(FOR_S)
    assert len(later.waiting) == 1


def test_the_process_that_follows_a_killed_one_gives_back(page, clock):
    server, later = Server(), Later()
    OtherLocality(page, server, Run(), Later()).seize(FOR_S)
    successor = OtherLocality(page, server, Run(), later)
    later.run_out()
    assert server.device.active_locality == 3
    clock[0] += round(FOR_S * 1e6)
    later.run_out()
    assert server.device.active_locality is None
    successor.seize(FOR_S)
    assert server.device.active_locality == 3


def test_page_of_a_chip_that_was_never_seized(page):
    later = Later()
    OtherLocality(page, Server(), Run(), later)
    assert later.waiting == []
    assert page.busy_until_us < now_us()


@pytest.mark.parametrize(
    ("true", "shown"),
    [
        (b"\x40\xfc\x00\x00", b"\x00\x00\x00\x00"),
        (b"\x90\xfc\x00\x00", b"\x80\x00\x00\x00"),
        (b"\x88\xfc\x00\x00", b"\x88\x00\x00\x00"),
        (b"\x90", b"\x80"),
        (b"\xff\xff\xff\xff", b"\xff\xff\xff\xff"),
    ],
    ids=["ready", "with a response", "expecting", "a byte", "another locality's"],
)
def test_busy_registers(true, shown):
    answer = decode_answer(as_of_a_busy_chip(encode_message(Value(data=true))))
    assert answer == Value(data=shown)


def test_other_answers_are_left_alone():
    done = encode_message(Done())
    assert as_of_a_busy_chip(done) == done
    assert as_of_a_busy_chip(b"\xee") == b"\xee"


def test_who_asks_for_the_status():
    assert asks_for_status(encode_message(Read(locality=2, offset=0x18, count=4)))
    assert not asks_for_status(encode_message(Read(locality=2, offset=0x24, count=4)))
    assert not asks_for_status(encode_message(Write(locality=2, offset=0x18, data=b"\x40")))
    assert not asks_for_status(b"")
