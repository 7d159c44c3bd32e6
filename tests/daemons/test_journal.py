"""What a killed process leaves is read whole or refused; what nobody was told of does not count."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from daemons import journal as journals
from daemons.errors import ExitCode, Failure
from daemons.journal import HALVES_AT, Journal, read_journal

KEY = bytes(range(32))
OWNER = b"vtpm-guest1"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal"


def read(path, key=KEY, owner=OWNER):
    return read_journal(path, key, owner)


def refused(path, **options):
    with pytest.raises(Failure) as caught:
        read(path, **options)
    assert caught.value.exit_code is ExitCode.DAMAGED
    assert "reboot" in caught.value.next_step
    return caught.value.why


def test_records_come_back_in_their_order(path):
    journal = Journal(path, KEY, OWNER, b"snapshot")
    assert journal.append(b"one")
    assert journal.append(b"")
    assert journal.append(b"three")
    assert read(path) == [b"snapshot", b"one", b"", b"three"]
    assert b"three" not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600


def test_no_file_is_nothing_to_go_on_from(path):
    assert read(path) is None


def test_full_half_is_followed_by_a_snapshot_in_the_other(path):
    journal = Journal(path, KEY, OWNER, b"begin")
    size = path.stat().st_size
    inode = path.stat().st_ino
    expected = [b"begin"]
    restarts = 0
    for number in range(3000):
        record = number.to_bytes(4, "big") * 100
        if not journal.append(record):
            restarts += 1
            expected = [b"all until %d" % number]
            journal.restart(expected[0])
            assert read(path) == expected
            assert journal.append(record)
        expected.append(record)
    assert restarts > 3
    assert read(path) == expected
    assert (path.stat().st_size, path.stat().st_ino) == (size, inode)


def test_large_snapshot_gets_a_larger_file(path):
    journal = Journal(path, KEY, OWNER, b"small")
    size = path.stat().st_size
    journal.restart(bytes(size))
    assert journal.append(b"more")
    assert read(path) == [bytes(size), b"more"]
    assert path.stat().st_size > 4 * size
    assert not path.with_name("journal.new").exists()


def test_file_that_cannot_be_made_is_a_failure_and_leaves_the_one_before(path, monkeypatch):
    journal = Journal(path, KEY, OWNER, b"small")
    monkeypatch.setattr(journals, "SIZE_BYTES_MAX", 1024)
    with pytest.raises(Failure, match="file too large"):
        journal.restart(bytes(200_000))
    assert journal.append(b"goes on")
    assert read(path) == [b"small", b"goes on"]


def test_each_start_takes_the_place_of_the_one_before(path):
    Journal(path, KEY, OWNER, b"first")
    Journal(path, KEY, OWNER, b"second")
    assert read(path) == [b"second"]


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def written(path):
    journal = Journal(path, KEY, OWNER, b"snapshot")
    for number in range(5):
        journal.append(b"record %d" % number)
    end = HALVES_AT + int.from_bytes(path.read_bytes()[64:72], "little")
    journal.close()
    return path, end


def test_every_bit_that_counts_is_guarded(written):
    path, end = written
    content = path.read_bytes()
    whole = read(path)
    with path.open("r+b") as file:
        for at in [*range(58), *range(64, 72), *range(HALVES_AT, end)]:
            for bit in range(8):
                file.seek(at)
                file.write(bytes([content[at] ^ 1 << bit]))
                file.flush()
                if 10 <= at < 26:
                    assert read(path) is None  # of another boot: as if the power had gone
                else:
                    refused(path)
            file.seek(at)
            file.write(content[at : at + 1])
            file.flush()
    assert read(path) == whole


def test_what_lies_behind_the_last_whole_record_does_not_count(written):
    path, end = written
    whole = read(path)
    with path.open("r+b") as file:
        file.seek(end)
        file.write(os.urandom(64))  # a record that a kill tore
    assert read(path) == whole


@pytest.mark.parametrize("size", [0, 1, 71, HALVES_AT, HALVES_AT + 20])
def test_truncated_file_is_refused(written, size):
    path, _ = written
    os.truncate(path, size)
    refused(path)


def test_file_of_zeros_is_refused(written):
    path, _ = written
    path.write_bytes(bytes(path.stat().st_size))
    assert "no journal" in refused(path)


def test_copy_is_refused(written, tmp_path):
    path, _ = written
    copy = tmp_path / "copy"
    shutil.copy2(path, copy)
    assert "copy" in refused(copy)


def test_copy_in_the_place_of_the_file_is_refused(written, tmp_path):
    path, _ = written
    shutil.copy2(path, tmp_path / "older")
    (tmp_path / "older").rename(path)
    assert "copy" in refused(path)


def test_file_of_another_owner_or_key_is_refused(written):
    path, _ = written
    refused(path, owner=b"vtpm-guest2")
    refused(path, key=bytes(32))


def test_link_in_the_place_of_the_file_is_refused(written, tmp_path):
    path, _ = written
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(path)


def test_version_of_later_is_refused_by_its_number(written):
    path, _ = written
    with path.open("r+b") as file:
        file.seek(8)
        file.write(b"\x02\x00")
    assert "version 2" in refused(path)


def test_file_of_an_earlier_boot_is_nothing_to_go_on_from(written, monkeypatch, tmp_path):
    path, _ = written
    (tmp_path / "boot_id").write_text("00000000-1111-2222-3333-444444444444\n")
    monkeypatch.setattr(journals, "BOOT_ID", tmp_path / "boot_id")
    assert read(path) is None


# -- a real kill -----------------------------------------------------------------------------------

WRITER = """
import sys
from pathlib import Path
from daemons.journal import Journal
journal = Journal(Path(sys.argv[1]), bytes(range(32)), b"vtpm-guest1", b"0")
number = 0
while True:
    number += 1
    record = b"%d " % number * 50
    if not journal.append(record):
        journal.restart(b"%d" % (number - 1))
        journal.append(record)
    sys.stdout.write("%d\\n" % number)
    sys.stdout.flush()
"""


@pytest.mark.parametrize("lines", [1, 57, 800, 2500])
def test_killed_writer_leaves_all_that_it_acknowledged(path, lines):
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True
    ) as writer:
        acknowledged = 0
        for _ in range(lines):
            acknowledged = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        acknowledged = max([acknowledged, *map(int, writer.stdout.read().split()[:-1])])
    first, *rest = read(path)
    numbers = [int(first), *(int(record.split()[0]) for record in rest)]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert numbers[-1] >= acknowledged
