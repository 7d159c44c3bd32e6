"""Whenever a manager is killed, the next one knows which handles of the chip are its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from daemons.manager.handle_journal import HandleJournal, Leftovers, NotNotedError, read_leftovers
from protocol.constants import ResourceType

OIAP = bytes.fromhex("00c10000000a0000000a")
PCR_READ = bytes.fromhex("00c10000000e0000001500000000")
LOAD_KEY2 = bytes.fromhex("00c20000000a00000041")
AUTH, KEY = int(ResourceType.AUTH), int(ResourceType.KEY)


class Killed(BaseException):
    """The process is gone: nothing behind this point runs."""


class LinkToChip:
    """A chip that opens handles, keeps its response until `finish`, and outlives the manager."""

    def __init__(self) -> None:
        self.open: set[int] = set()
        self._next = 0x02000001
        self._response = b""
        self._request = b""

    def execute(self, request: bytes) -> bytes:
        self._request = request
        if request == PCR_READ:
            self._response = bytes.fromhex("00c40000001e00000000") + bytes(20)
        else:
            self.open.add(self._next)
            self._response = bytes.fromhex("00c40000002200000000") + self._next.to_bytes(4, "big")
            self._response += bytes(20)
            self._next += 1
        return self._response

    def finish(self) -> None:
        self._response = b""

    def settle(self) -> None:
        self._response = b""

    def resume(self, request: bytes) -> bytes:
        if self._response and self._request == request:
            return self._response
        return self.execute(request)


def dying_at(count: int, call: Callable[..., object], counter: itertools.count[int]) -> object:
    def wrapped(*args: object) -> object:
        if next(counter) == count:
            raise Killed
        result = call(*args)
        if next(counter) == count:
            raise Killed
        return result

    return wrapped


def test_handles_are_known_and_forgotten(tmp_path: Path):
    journal, link = HandleJournal(tmp_path / "journal"), LinkToChip()
    journal.set_epoch("aa")
    journal.run(OIAP, link.execute, link.finish, link.settle)
    journal.run(PCR_READ, link.execute, link.finish, link.settle)
    journal.run(LOAD_KEY2, link.execute, link.finish, link.settle)
    assert journal.handles == ((AUTH, 0x02000001), (KEY, 0x02000002))
    assert journal.read() == Leftovers(epoch="aa", handles=journal.handles)
    assert (tmp_path / "journal").stat().st_mode & 0o777 == 0o600
    journal.clear()
    assert journal.handles == ()
    assert not list(tmp_path.iterdir())


def test_commands_that_open_nothing_write_nothing(tmp_path: Path):
    journal, link = HandleJournal(tmp_path / "journal"), LinkToChip()
    journal.run(PCR_READ, link.execute, link.finish, link.settle)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", range(24))
def test_manager_killed_at_any_moment_leaves_no_unknown_handle(tmp_path: Path, moment: int):
    path, link = tmp_path / "journal", LinkToChip()
    counter = itertools.count()
    journal = HandleJournal(path)
    journal.set_epoch("aa")
    for name in ("_write", "clear"):
        setattr(journal, name, dying_at(moment, getattr(journal, name), counter))
    execute = dying_at(moment, link.execute, counter)
    finish = dying_at(moment, link.finish, counter)
    try:
        journal.run(OIAP, execute, finish, link.settle)
        journal.run(OIAP, execute, finish, link.settle)
        was_killed = False
    except Killed:
        was_killed = True
    assert was_killed == (moment < 16), "the moments cover all of it"
    left, _ = HandleJournal(path).take_over(link.resume, link.finish)
    assert link.open <= {handle for _, handle in left.handles}
    # And once more, for a manager that is killed before it has flushed them.
    again, _ = HandleJournal(path).take_over(link.resume, link.finish)
    assert link.open <= {handle for _, handle in again.handles}
    HandleJournal(path).discard_leftovers()
    assert HandleJournal(path).read() == Leftovers()


@pytest.mark.parametrize("when", ["before", "after"])
def test_without_room_nothing_stays_open_that_is_not_known(tmp_path: Path, when: str):
    journal, link = HandleJournal(tmp_path / "journal"), LinkToChip()
    journal.set_epoch("aa")

    def fill_the_disk() -> None:
        (tmp_path / "journal.new").mkdir(exist_ok=True)
        (tmp_path / "journal.new" / "in the way").touch()

    def execute(request: bytes) -> bytes:
        fill_the_disk()
        return link.execute(request)

    if when == "before":
        fill_the_disk()
    with pytest.raises(NotNotedError, match="cannot note what"):
        journal.run(OIAP, execute, link.finish, link.settle)
    assert link.open == {handle for _, handle in journal.handles}
    assert bool(link.open) == (when == "after")
    assert link._response == b"", "the chip is free for the next command"


def test_what_an_earlier_manager_wrote_stays_until_it_is_discarded(tmp_path: Path):
    first, link = HandleJournal(tmp_path / "journal"), LinkToChip()
    first.set_epoch("aa")
    first.run(OIAP, link.execute, link.finish, link.settle)
    second = HandleJournal(tmp_path / "journal")
    second.run(PCR_READ, link.execute, link.finish, link.settle)
    second.clear()
    assert second.read().handles == ((AUTH, 0x02000001),)


def test_handle_of_an_outstanding_command_surely_is_of_this_power_cycle(tmp_path: Path):
    path, link = tmp_path / "journal", LinkToChip()
    path.write_text(json.dumps({"epoch": "old", "outstanding": OIAP.hex(), "handles": [[AUTH, 7]]}))
    left, fresh = HandleJournal(path).take_over(link.resume, link.finish)
    assert fresh == ((AUTH, 0x02000001),)
    assert left == Leftovers(epoch="old", handles=((AUTH, 7), (AUTH, 0x02000001)))


def test_only_commands_that_open_handles_are_ever_resumed(tmp_path: Path):
    path = tmp_path / "journal"
    path.write_text(json.dumps({"epoch": "", "outstanding": PCR_READ.hex(), "handles": []}))

    def resume(_request: bytes) -> bytes:
        raise AssertionError("it was resumed")

    assert HandleJournal(path).take_over(resume, lambda: None)[1] == ()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b'{"epoch": 1}',
        b'{"epoch":"","outstanding":"x"}',
        b'{"epoch":"","outstanding":"","handles":[[1]]}',
        b'{"epoch":"","outstanding":"","handles":7}',
    ],
)
def test_journal_that_is_not_understood_is_empty(tmp_path: Path, content: bytes):
    (tmp_path / "journal").write_bytes(content)
    assert HandleJournal(tmp_path / "journal").read() == Leftovers()


def test_symbolic_link_is_not_followed(tmp_path: Path):
    target = tmp_path / "target"
    target.write_text(json.dumps({"epoch": "", "outstanding": "", "handles": [[AUTH, 1]]}))
    (tmp_path / "journal").symlink_to(target)
    assert HandleJournal(tmp_path / "journal").read() == Leftovers()
    (tmp_path / "journal.new").symlink_to(target)
    before = target.read_text()
    link = LinkToChip()
    HandleJournal(tmp_path / "journal").run(OIAP, link.execute, link.finish, link.settle)
    assert target.read_text() == before


def test_what_is_kept_stays_in_the_file_and_is_not_flushed_with_the_rest(tmp_path: Path):
    link, journal = LinkToChip(), HandleJournal(tmp_path / "journal")
    journal.run(OIAP, link.execute, link.finish, link.settle)
    (kept,) = journal.handles
    journal.keep(*kept)
    journal.run(LOAD_KEY2, link.execute, link.finish, link.settle)
    assert kept not in journal.handles
    assert len(journal.handles) == 1
    journal.clear()
    assert HandleJournal(tmp_path / "journal").read().handles == (kept,)
    journal.unkeep(*kept)
    assert journal.handles == (kept,)
    journal.clear()
    assert HandleJournal(tmp_path / "journal").read() == Leftovers()


@pytest.mark.parametrize(
    "damaged",
    [
        {"handles": [[1, 1 << 32]]},
        {"handles": [[-1, 5]]},
        {"outstanding": "00c1" + "000000ff" + "0000000a"},
        {"outstanding": "00"},
    ],
)
def test_what_no_chip_can_be_sent_is_no_journal(tmp_path: Path, damaged: dict[str, object]):
    path = tmp_path / "journal"
    whole = {"epoch": "e", "outstanding": "", "handles": [[1, 2]]}
    path.write_text(json.dumps(whole))
    assert read_leftovers(path).handles == ((1, 2),)
    path.write_text(json.dumps({**whole, **damaged}))
    with pytest.raises(ValueError, match=r"no handle|is none"):
        read_leftovers(path)


def test_directory_in_the_place_of_a_journal_is_an_empty_one(tmp_path: Path):
    path = tmp_path / "journal"
    path.mkdir()
    journal = HandleJournal(path)
    assert journal.read() == Leftovers()
    journal.discard_leftovers()
    assert path.is_dir()
