"""Taking over: what stands in the place of a file holds no launcher up, and ends none."""

import os
from pathlib import Path

import pytest

from daemons.errors import Failure
from daemons.journal import boot_id
from daemons.launcher.adoption import (
    MARKER_NAME,
    find_old_stack,
    forget_power,
    living_process,
    note_power,
)
from daemons.launcher.last_words import LastWords
from daemons.listeners import start_time_of
from daemons.places import Places
from daemons.registry import DomainRecord, RegistryWriter, Role
from tests.daemons.launcher.plain_user import nobody_looks_into


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def record():
    return DomainRecord(
        name="guest1",
        domid=3,
        role=Role.GUEST,
        label="system_u:vm:guest1",
        uid=os.getuid(),
        pid=os.getpid(),
        start_time=start_time_of(os.getpid()),
    )


def a_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, a_loop])
@pytest.mark.timeout(20)
def test_process_is_taken_over_whatever_stands_in_the_place_of_its_log(places, record, make):
    make(places.log_dir / "guest1.log")
    launched = living_process(places, record)()
    assert launched.process.pid == os.getpid()
    assert launched.last_words() == LastWords()


def test_process_is_taken_over_though_its_log_cannot_be_looked_at(places, record):
    with nobody_looks_into(places.log_dir):
        launched = living_process(places, record)()
        assert launched.process.pid == os.getpid()
        assert launched.last_words() == LastWords()


def test_only_what_it_says_from_now_on_are_its_last_words(places, record):
    log = places.log_dir / "guest1.log"
    log.write_text("a: error: old\n")
    launched = living_process(places, record)()
    assert launched.last_words() == LastWords()
    with log.open("a") as file:
        file.write("a: error: new\n")
    assert launched.last_words() == LastWords(why="a: error: new")


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, a_loop])
@pytest.mark.timeout(20)
def test_what_stands_in_the_place_of_the_mark_of_power_is_told_and_stays(places, make):
    marker = places.run / MARKER_NAME
    make(marker)
    before = marker.lstat().st_ino
    with pytest.raises(Failure, match="cannot note that the hardware TPM has its power"):
        note_power(places)
    assert marker.lstat().st_ino == before


def test_power_is_noted_over_an_older_mark(places):
    marker = places.run / MARKER_NAME
    marker.write_text("of another boot" * 4)
    note_power(places)
    assert marker.read_text() == boot_id().hex()
    forget_power(places)
    assert not marker.exists()


def test_domain_that_cannot_be_looked_at_is_a_failure(places, record, monkeypatch):
    places.make_private(places.domain("guest1").directory)
    RegistryWriter(places.registry, None).put(record)
    refused = places.domain("guest1").config
    whole = Path.lstat

    def lstat(path):
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "lstat", lstat)
    monkeypatch.setattr(Path, "exists", lambda path: bool(path.lstat()))
    with pytest.raises(Failure, match="cannot take over"):
        find_old_stack(places)
