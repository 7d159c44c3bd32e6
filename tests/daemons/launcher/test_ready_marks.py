"""The mark of having served: a second witness, that harms nobody when it is damaged."""

import os
import subprocess

import pytest

from daemons.errors import Failure
from daemons.launcher.ready_marks import (
    READY_NAME,
    contradictions,
    note_ready,
    was_ready,
    who_serves,
)
from daemons.listeners import start_time_of
from daemons.places import Places
from daemons.registry import DomainRecord, Role
from tests.daemons.launcher.fake_stack import kill
from tests.daemons.launcher.plain_user import nobody_looks_into


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path)
    made.prepare()
    made.make_private(made.domain("guest1").directory)
    return made


def record(pid, start_time):
    return DomainRecord(
        name="guest1",
        domid=3,
        role=Role.GUEST,
        label="system_u:vm:guest1",
        uid=os.getuid(),
        pid=pid,
        start_time=start_time,
    )


def mark(places):
    return places.domain("guest1").directory / READY_NAME


def test_a_living_process_is_found_by_its_mark(places):
    assert who_serves(places) == {}
    assert not was_ready(places, "guest1")
    note_ready(places, "guest1", Role.GUEST, os.getpid())
    assert was_ready(places, "guest1")
    (serving,) = who_serves(places).values()
    assert (serving.name, serving.role, serving.pid) == ("guest1", Role.GUEST, os.getpid())


def test_a_dead_process_serves_nobody(places):
    child = subprocess.Popen(["sleep", "60"])
    note_ready(places, "guest1", Role.GUEST, child.pid)
    assert who_serves(places)["guest1"].pid == child.pid
    child.kill()
    child.wait()
    assert who_serves(places) == {}
    assert was_ready(places, "guest1")


def test_a_later_process_with_the_same_pid_is_another(places):
    note_ready(places, "guest1", Role.GUEST, os.getpid())
    started = start_time_of(os.getpid())
    mark(places).write_text(f"guest {os.getpid()} {started + 1}\n")
    assert who_serves(places) == {}


@pytest.mark.parametrize(
    "content", [b"", b"guest", b"guest 1\n", b"nobody 1 1\n", b"guest 1 1\nmore", bytes(40)]
)
def test_a_mark_that_cannot_be_read_names_nobody_and_still_counts(places, content):
    mark(places).write_bytes(content)
    assert who_serves(places) == {}
    assert was_ready(places, "guest1")


def test_something_else_in_the_place_of_a_mark_names_nobody(places):
    os.mkfifo(mark(places), 0o600)
    assert who_serves(places) == {}
    mark(places).unlink()
    mark(places).mkdir()
    assert who_serves(places) == {}
    mark(places).rmdir()
    mark(places).parent.rmdir()
    with pytest.raises(Failure, match="cannot note that guest1 serves"):
        note_ready(places, "guest1", Role.GUEST, os.getpid())


def test_whoever_may_have_been_used_has_been(places):
    directory = mark(places).parent
    mark(places).symlink_to(READY_NAME)
    assert was_ready(places, "guest1")
    mark(places).unlink()
    assert not was_ready(places, "guest1")
    with nobody_looks_into(directory):
        assert was_ready(places, "guest1")


def test_a_record_that_names_another_process_than_the_one_that_serves_is_told(places):
    note_ready(places, "guest1", Role.GUEST, os.getpid())
    started = start_time_of(os.getpid())
    file = places.registry / "guest1.json"
    assert contradictions(places, {"guest1": record(os.getpid(), started)}) == {}
    (why,) = contradictions(places, {}).values()
    assert "is gone" in why
    for pid, start_time in ((os.getpid(), started - 1), (1, 1), (None, None)):
        told = contradictions(places, {"guest1": record(pid, start_time)})
        assert "is older than what runs" in told[file]


def fifo(path):
    os.mkfifo(path)


def directory(path):
    path.mkdir()


def link(path):
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [fifo, directory, link])
def test_what_stands_in_the_place_of_a_mark_is_refused_and_holds_nobody_up(places, make):
    folder = places.domain("guest1").directory
    folder.mkdir(parents=True, exist_ok=True)
    make(folder / READY_NAME)
    with pytest.raises(Failure, match="cannot note"):
        note_ready(places, "guest1", Role.GUEST, os.getpid())
    assert not (folder / "elsewhere").exists()


@pytest.mark.parametrize("make", [fifo, directory, link])
def test_start_is_refused_at_once_with_something_else_in_the_place_of_the_mark(stack, make):
    """Else the process would be waited for, and killed as one that does not get ready."""
    stack.create_chain()
    place = stack.places.domain("vtpm-guest1").directory / READY_NAME
    place.unlink()
    make(place)
    kill(stack.row("vtpm-guest1"))
    row = stack.until_state("vtpm-guest1", "failed")
    assert str(place) in row["state"]
    assert stack.row("guest1")["state"] == "running"
    (place.rmdir if place.is_dir() and not place.is_symlink() else place.unlink)()
    stack.call("reboot", domain="vtpm-guest1")
    stack.until_state("vtpm-guest1", "running")
