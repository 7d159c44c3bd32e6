"""What the doctor reads with: each reader's way of looking without a lock, a write or a key."""

import contextlib
import errno
import fcntl
import gzip
import os
import shutil

import pytest

from daemons.chip_memory import ChipMemory
from daemons.disk import PosixDisk, ReadOnlyDisk, holder_of
from daemons.errors import Failure
from daemons.instance_lock import InstanceLock, inspect_lock
from daemons.journal import HALVES_AT, Journal, inspect_journal
from daemons.listeners import Kind, listen, served_paths
from daemons.manager.handle_journal import HandleJournal, Leftovers, read_leftovers
from daemons.places import BadPlace, inspect_directory
from daemons.vtpm import image
from tests.vectors.state.make import HERE

KEY = bytes(32)


@pytest.fixture
def kept(tmp_path):
    def make(vector):
        path = tmp_path / vector
        path.write_bytes(gzip.decompress((HERE / f"{vector}.gz").read_bytes()))
        path.chmod(0o600)
        return path

    return make


# -- disks -----------------------------------------------------------------------------------------


def test_read_only_disk_reads_what_another_holds_and_writes_nothing(kept):
    path = kept("vtpm-1")
    before = path.read_bytes()
    with contextlib.closing(PosixDisk(path)), contextlib.closing(ReadOnlyDisk(path)) as disk:
        assert disk.read(0, 64) == before[:64]
        assert (disk.size, disk.name) == (len(before), str(path))
        with pytest.raises(OSError, match="Read-only") as refused:
            disk.write(0, b"x")
        disk.sync()
        with pytest.raises(OSError, match="ends at byte"):
            disk.read(len(before) - 1, 2)
    assert refused.value.errno == errno.EROFS
    assert path.read_bytes() == before


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_read_only_disk_refuses_what_the_owner_s_would(kept, mode):
    path = kept("vtpm-1")
    path.chmod(mode)
    with pytest.raises(Failure) as mine:
        ReadOnlyDisk(path)
    with pytest.raises(Failure) as theirs:
        PosixDisk(path)
    assert str(mine.value) == str(theirs.value)


def test_read_only_disk_may_be_of_another_user(kept):
    path = kept("vtpm-1")
    with pytest.raises(Failure, match="belongs to user id"):
        ReadOnlyDisk(path, os.geteuid() + 1)


def test_holder_is_named(kept):
    path = kept("vtpm-1")
    assert holder_of(path) is None
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holder_of(path) == os.getpid()
    assert holder_of(path) is None


@pytest.mark.parametrize("vector", ["chip-1", "chip-2"])
def test_chip_memory_is_inspected_without_a_write(kept, vector):
    path = kept(vector)
    before = path.read_bytes()
    with contextlib.closing(ReadOnlyDisk(path)) as disk:
        found = ChipMemory(disk).inspect()
    assert found.permanent is not None
    assert found.sequence > 0
    assert found.wrong == ()
    assert path.read_bytes() == before
    assert "permanent" not in repr(found)


def test_torn_slot_of_the_chip_s_memory_is_told(kept):
    path = kept("chip-2")
    with contextlib.closing(ReadOnlyDisk(path)) as disk:
        newest = ChipMemory(disk).inspect().sequence
    data = bytearray(path.read_bytes())
    numbers = {slot: int.from_bytes(data[slot * 262144 + 10 :][:8], "big") for slot in (0, 1)}
    older = min(numbers, key=numbers.__getitem__)
    data[older * 262144 + 60] ^= 1
    path.write_bytes(data)
    with contextlib.closing(ReadOnlyDisk(path)) as disk:
        found = ChipMemory(disk).inspect()
    assert found.sequence == newest
    assert found.wrong == (f"slot {older}: its checksum is wrong",)


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({}, ("", "")),
        ({0: b"XXXX"}, ("slot 0 holds no vTPM state", "")),
        ({8: b"\x00\x09"}, ("slot 0 has format version 9", "")),
        ({10: b"\xff\xff\xff\xff"}, ("slot 0 has an impossible length", "")),
        ({0: bytes(64), 8192: bytes(64)}, ("slot 0 is blank", "slot 1 is blank")),
    ],
)
def test_slots_of_a_vtpm_s_image_are_judged(kept, change, wrong):
    path = kept("vtpm-1")
    data = bytearray(path.read_bytes())
    for at, put in change.items():
        data[at : at + len(put)] = put
    path.write_bytes(data)
    with contextlib.closing(ReadOnlyDisk(path)) as disk:
        found = image.inspect(disk)
    assert found.wrong == wrong
    assert not found.is_blank
    assert found.is_hopeless == all(wrong)


# -- journals --------------------------------------------------------------------------------------


@pytest.fixture
def journal(tmp_path):
    path = tmp_path / "journal"
    written = Journal(path, KEY, b"owner", b"snapshot")
    written.append(b"one")
    written.append(b"two")
    yield path
    written.close()


def test_records_of_a_journal_are_counted_while_it_is_written(journal):
    assert inspect_journal(journal) == 3


def test_journal_that_is_not_there_is_none(tmp_path):
    assert inspect_journal(tmp_path / "journal") is None


@pytest.mark.parametrize("offset", [0, 8, 50, 64, 70, HALVES_AT + 8, HALVES_AT + 20])
def test_journal_that_no_key_could_open_is_refused(journal, offset):
    data = bytearray(journal.read_bytes())
    data[offset] ^= 0x40
    with journal.open("r+b") as file:
        file.write(data)
    if offset == HALVES_AT + 20:  # inside an encrypted record: that takes the key
        assert inspect_journal(journal) == 3
        return
    with pytest.raises(Failure, match="cannot go on from journal"):
        inspect_journal(journal)


def test_copy_of_a_journal_is_refused(journal):
    shutil.copy(journal, journal.with_name("copy"))
    with pytest.raises(Failure, match="a copy"):
        inspect_journal(journal.with_name("copy"))


@pytest.mark.parametrize("text", ["[" * 50000, '{"handles": [[1e999, 2]]}', "[]", "7", "", "\xff"])
def test_handles_that_are_not_understood_are_none(tmp_path, text):
    path = tmp_path / "journal"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no list of handles|Expecting"):
        read_leftovers(path)
    assert HandleJournal(path).read() == Leftovers()


# -- locks, directories, sockets -------------------------------------------------------------------


def test_lock_is_looked_at_without_being_taken(tmp_path):
    tmp_path.chmod(0o700)
    path = tmp_path / "a.lock"
    with InstanceLock(path, "it"):
        assert inspect_lock(path) == os.getpid()
    path.write_text("4711\n")
    assert inspect_lock(path) is None
    with InstanceLock(path, "it"):
        pass


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), os.mkfifo, os.mkdir])
def test_what_is_no_lock_is_refused(tmp_path, make):
    path = tmp_path / "a.lock"
    make(path)
    with pytest.raises(Failure, match="is in the way"):
        inspect_lock(path)


def test_directory_is_looked_at_and_not_made(tmp_path):
    path = tmp_path / "private"
    assert not inspect_directory(path, is_private=True)
    assert not path.exists()
    path.mkdir(mode=0o700)
    assert inspect_directory(path, is_private=True)
    path.chmod(0o755)
    with pytest.raises(BadPlace, match="other users could get in"):
        inspect_directory(path, is_private=True)
    path.rmdir()
    path.symlink_to(tmp_path)
    with pytest.raises(BadPlace):
        inspect_directory(path, is_private=True)


@pytest.mark.parametrize("kind", list(Kind))
def test_served_paths_are_those_that_somebody_listens_on(tmp_path, kind):
    tmp_path.chmod(0o700)
    path = tmp_path / "a socket"
    listener = listen(path, kind)
    assert str(path) in served_paths()
    listener.socket.close()
    assert path.exists()
    assert str(path) not in served_paths()
