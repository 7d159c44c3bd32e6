"""What a killed manager leaves to the next: answered, under way, or never begun; nothing else."""

from __future__ import annotations

import errno
import hashlib
import os
from functools import partial
from pathlib import Path
from uuid import UUID

import pytest

from daemons.errors import ExitCode, Failure
from daemons.journal import HALF_BYTES
from daemons.manager.request_memory import Once, Pending, RequestMemory, in_doubt, settle
from daemons.manager.requests import response_of_deletion
from protocol import manager_messages as messages
from protocol.manager_messages import ManagerOrdinal
from protocol.return_codes import ReturnCode

VAULT_ID = b"v" * 16
RING = "vtpm-guest1/0"
EXTEND = bytes.fromhex("00c10000002200000014 0000000c".replace(" ", "")) + b"m" * 20
UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
DELETE = messages.request(ManagerOrdinal.VTPM_DEL, messages.VtpmUuid(uuid=UUID_1.bytes))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests"


def memory_at(path: Path, vault_id: bytes = VAULT_ID) -> RequestMemory:
    return RequestMemory(path, vault_id)


def test_answer_is_there_for_the_next_process(path: Path):
    before = memory_at(path)
    assert not before.is_resumed
    before.begin(Pending(RING, 7, EXTEND))
    before.answer(b"response")
    after = memory_at(path)
    assert after.is_resumed
    assert after.memory == before.memory
    assert after.last_sequence(RING) == 7
    assert after.get(RING, 7) == b"response"
    assert after.get(RING, 6) is None
    assert after.pending is None
    assert after.last_sequence("vtpm-guest2/0") == 0


def test_what_was_begun_is_pending_for_the_next_process_and_the_one_after(path: Path):
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    for _ in range(2):
        after = memory_at(path)
        assert after.pending == Pending(RING, 7, EXTEND)
        assert after.last_sequence(RING) == 0, "nobody may take it for executed"


@pytest.mark.parametrize("response", [b"response", None])
def test_pending_request_is_settled_once_for_all(path: Path, response: bytes | None):
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    asked: list[bytes] = []

    def outcome(request: bytes) -> bytes | None:
        asked.append(request)
        return response

    settle(memory_at(path), outcome)
    after = memory_at(path)
    assert asked == [EXTEND]
    assert after.pending is None
    assert after.last_sequence(RING) == (7 if response else 0)
    assert after.get(RING, 7) == response


def test_requests_that_were_not_begun_are_answered_on_their_connection_only(path: Path):
    memory = memory_at(path)
    memory.begin(Pending(RING, 3, EXTEND))
    memory.answer(b"three")
    memory.put(RING, 3, b"three")
    memory.put(RING, 4, b"four")
    assert memory.get(RING, 4) == b"four"
    assert memory.last_sequence(RING) == 3, "a frontend that comes back goes on from here"
    after = memory_at(path)
    assert (after.last_sequence(RING), after.get(RING, 4)) == (3, None)


def test_once_remembers_what_was_begun_and_nothing_else(path: Path):
    memory = memory_at(path)
    Once(memory, Pending(RING, 1, b"a")).answer(b"not begun")
    assert memory.last_sequence(RING) == 0
    once = Once(memory, Pending(RING, 2, b"b"))
    once.begin()
    once.answer(b"first")
    once.answer(b"second")
    assert memory_at(path).get(RING, 2) == b"first"


def test_many_answers_outlive_a_full_journal(path: Path):
    memory = memory_at(path)
    count = 3 * HALF_BYTES // 100
    for number in range(1, count + 1):
        memory.begin(Pending(f"vtpm-{number % 5}/0", number, EXTEND))
        memory.answer(b"%d" % number)
    memory.begin(Pending(RING, 1, EXTEND))
    after = memory_at(path)
    assert after.pending == Pending(RING, 1, EXTEND)
    last = {f"vtpm-{number % 5}/0": number for number in range(1, count + 1)}
    assert {ring: after.last_sequence(ring) for ring in last} == last


def test_vault_made_anew_knows_nothing_of_what_was_there(path: Path):
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    after = RequestMemory(path, b"w" * 16, is_new=True)
    assert (after.pending, after.is_resumed) == (None, False)


def test_without_the_file_the_memory_has_another_name(path: Path):
    before = memory_at(path)
    path.unlink()
    assert memory_at(path).memory != before.memory


def test_file_of_another_vault_is_refused_and_stays(path: Path):
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    content = path.read_bytes()
    with pytest.raises(Failure, match="cannot go on from journal") as refused:
        memory_at(path, b"w" * 16)
    assert refused.value.exit_code is ExitCode.DAMAGED
    assert path.read_bytes() == content


@pytest.mark.parametrize("at", [0, 9, 20, 64, 130, 150])
def test_damaged_file_is_refused_and_stays(path: Path, at: int):
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))
    content = path.read_bytes()
    if at == 20:  # the boot id: it says that the machine was booted since
        assert not memory_at(path).is_resumed
        return
    with pytest.raises(Failure, match="cannot go on from journal"):
        memory_at(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("lack", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_file_that_the_system_cannot_open_now_is_not_called_damaged(
    path: Path, lack: int, monkeypatch: pytest.MonkeyPatch
):
    """Nobody is told to remove it, and the launcher tries again."""
    memory_at(path).begin(Pending(RING, 7, EXTEND))
    with monkeypatch.context() as lacking:

        def refuse(*_: object) -> int:
            raise OSError(lack, os.strerror(lack))

        lacking.setattr(os, "open", refuse)
        with pytest.raises(Failure) as refused:
            memory_at(path)
    assert refused.value.exit_code is ExitCode.IO_ERROR
    assert "rm " not in refused.value.next_step
    assert memory_at(path).pending == Pending(RING, 7, EXTEND)


def test_file_of_another_version_of_the_items_is_refused(path: Path):
    memory = memory_at(path)
    memory._append(b"\x09" + bytes(14))
    with pytest.raises(Failure, match="cannot go on from journal") as refused:
        memory_at(path)
    assert refused.value.why == "another version of the stack wrote it: an item of kind 9"
    assert f"rm {path}" in refused.value.next_step


# -- the whole way: killed at each step, a request is carried out once -----------------------------


class Killed(BaseException):
    """The process ends here."""


class Chip:
    """Extends one PCR, and keeps the response of its last command like the registers do."""

    def __init__(self) -> None:
        self.pcr = bytes(20)
        self.last: tuple[bytes, bytes] | None = None

    def execute(self, request: bytes) -> bytes:
        self.pcr = hashlib.sha1(self.pcr + request[14:], usedforsecurity=False).digest()
        self.last = request, self.pcr
        return self.pcr

    def recollect(self, request: bytes) -> bytes | None:
        return self.last[1] if self.last is not None and self.last[0] == request else None


class Manager:
    """The steps of `Chip.run_once`, one of which may be the last."""

    def __init__(self, path: Path, chip: Chip, dies_at: int | None) -> None:
        self.memory = memory_at(path)
        self.chip = chip
        self._left = dies_at
        if self.memory.pending is not None:
            settle(self.memory, chip.recollect)
        chip.last = None  # whatever the manager asks next wipes it out

    def step(self) -> None:
        if self._left == 0:
            raise Killed
        self._left = None if self._left is None else self._left - 1

    def extend(self, sequence: int, request: bytes) -> bytes:
        once = Once(self.memory, Pending(RING, sequence, request))
        self.step()
        once.begin()
        self.step()
        response = self.chip.execute(request)
        self.step()
        once.answer(response)
        self.step()
        self.chip.last = None
        self.step()
        return response


def extended_over_deaths(path: Path, deaths: list[int]) -> tuple[bytes, bytes]:
    """Extend once as a frontend that resubmits; what it was told, and what the PCR is."""
    chip = Chip()
    for dies_at in (*deaths, None):
        manager = Manager(path, chip, dies_at)
        last = manager.memory.last_sequence(RING)
        if last == 1:
            answer = manager.memory.get(RING, 1)
            assert answer is not None
            return answer, chip.pcr
        try:
            return manager.extend(last + 1, EXTEND), chip.pcr
        except Killed:
            manager.memory.close()
    raise AssertionError(deaths)


ONCE = hashlib.sha1(bytes(20) + b"m" * 20, usedforsecurity=False).digest()
TWO_DEATHS = [[first, second] for first in range(5) for second in range(5)]


@pytest.mark.parametrize("deaths", TWO_DEATHS, ids=str)
def test_manager_killed_at_any_two_steps_extends_once(path: Path, deaths: list[int]):
    assert extended_over_deaths(path, deaths) == (ONCE, ONCE)


def test_a_manager_that_does_not_ask_its_chip_is_noticed(
    path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The control: without the chip's word, a death after the run makes it two."""
    monkeypatch.setattr(Chip, "recollect", lambda *_: None)
    assert extended_over_deaths(path, [2])[1] != ONCE


@pytest.mark.parametrize("was_deleted", [True, False])
def test_deletion_that_was_begun_is_judged_by_the_vault(path: Path, *, was_deleted: bool):
    memory_at(path).begin(Pending(RING, 4, DELETE))
    records = {} if was_deleted else {UUID_1: None}
    after = memory_at(path)
    assert after.pending is not None
    assert not after.pending.is_for_chip
    settle(after, partial(response_of_deletion, records=records))
    assert after.last_sequence(RING) == (4 if was_deleted else 0)
    if was_deleted:
        messages.results(messages.Nothing, after.get(RING, 4) or b"")


def test_a_request_in_doubt_is_an_input_output_error():
    assert in_doubt() == bytes.fromhex("00c40000000a") + ReturnCode.IOERROR.to_bytes(4, "big")
