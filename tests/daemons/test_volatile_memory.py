"""A TPM that is killed at any point goes on as it was; each command was run once or not at all."""

import dataclasses
import hashlib
import struct

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from daemons.journal import read_journal
from daemons.volatile_memory import _SNAPSHOT, VolatileMemory, _replayed
from protocol.constants import KeyUsage, Ordinal, ResourceType
from tpm12.client import TpmClient
from tpm12.client_core import Use
from tpm12.commands import ALL
from tpm12.profile import CHIP
from tpm12.state_codec import delta, encode_section

MARK = b"m" * 20
PRESENCE_BY_COMMAND = bytes.fromhex("00c10000000c4000000a0020")
"""TPM_PhysicalPresence: sets a permanent flag, and needs no authorization."""


class Killed(BaseException):
    """The process ends here."""


class Store:
    """A store that survives, and that can be the place of a kill."""

    def __init__(self, permanent=None):
        self.permanent = permanent
        self.kill = ""

    def load(self):
        return self.permanent

    def save(self, permanent):
        if self.kill == "before":
            raise Killed
        if self.kill == "fails":
            raise Failure("disk", why="told to", next_step="none")
        self.permanent = permanent
        if self.kill == "after":
            raise Killed


class Machine:
    """One TPM over its processes."""

    def __init__(self, path, permanent=None):
        self.path = path
        self.store = Store(permanent)
        self.start()
        self.tpm.power_on_and_start()
        if permanent is None:
            self.tpm.save_as_new()

    def start(self):
        self.store.kill = ""
        self.tpm = DurableTpm(
            self.store, profile=CHIP, commands=ALL, memory=VolatileMemory(self.path, "t")
        )
        self.sent = []
        self.client = TpmClient(self.exchange, rng=FixedRng())

    def exchange(self, request):
        self.sent.append(request)
        return self.tpm.execute(request, 0, lambda response: {"last": request + response})

    def crash(self):
        """Another process comes; it has what the store and the journal have."""
        before = self.tpm.state
        self.start()
        assert self.tpm.is_resumed
        return before


class FixedRng:
    def random(self, count):
        return bytes(count)


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path / "journal")


@pytest.fixture(scope="module")
def owned_permanent(tmp_path_factory):
    machine = Machine(tmp_path_factory.mktemp("owned") / "journal")
    machine.tpm.make_endorsement_key()
    machine.client.take_ownership()
    return machine.store.permanent


@pytest.fixture
def owned(tmp_path, owned_permanent):
    return Machine(tmp_path / "journal", owned_permanent)


def same_volatile(one, other):
    return all(
        encode_section(getattr(one, section)) == encode_section(getattr(other, section))
        for section in ("stclear", "stany", "volatile")
    )


def test_new_tpm_is_not_resumed(machine):
    assert not machine.tpm.is_resumed


def test_pcrs_sessions_and_keys_are_as_they_were(owned):
    client = owned.client
    client.extend(10, MARK)
    session = client.oiap()
    handle = client.load_key2(client.create_wrap_key(KeyUsage.SIGNING, bits=512))
    before = owned.crash()
    assert same_volatile(before, owned.tpm.state)
    client = owned.client
    assert client.pcr_read(10) == hashlib.sha1(bytes(20) + MARK).digest()
    assert client.handles(ResourceType.KEY) == (handle,)
    assert client.handles(ResourceType.AUTH) == (session.handle,)
    signed = client.sign(handle, b"x" * 20)
    owned.crash()
    assert owned.client.sign(handle, b"x" * 20) == signed


def test_half_sent_hash_goes_on(machine):
    machine.client.call(Ordinal.SHA1_START)
    machine.client.call(Ordinal.SHA1_UPDATE, hash_data=bytes(64))
    machine.crash()
    out = machine.client.call(Ordinal.SHA1_COMPLETE, hash_data=b"end")
    assert out.hash_value == hashlib.sha1(bytes(64) + b"end").digest()


def test_hash_sequence_of_the_bus_goes_on(machine):
    assert machine.tpm.hash_start()
    assert machine.tpm.hash_data(b"first")
    machine.crash()
    assert machine.tpm.hash_data(b"second")
    assert machine.tpm.hash_end()
    digest = hashlib.sha1(b"firstsecond").digest()
    assert machine.client.pcr_read(17) == hashlib.sha1(bytes(20) + digest).digest()


def test_command_that_changes_nothing_writes_nothing(machine):
    machine.client.pcr_read(10)  # the first one after the start tests the TPM itself
    before = machine.path.read_bytes()
    machine.client.pcr_read(10)
    assert machine.path.read_bytes() == before
    machine.client.extend(10, MARK)
    assert machine.path.read_bytes() != before


def test_response_is_remembered_with_its_change_and_not_without(machine):
    machine.client.pcr_read(10)
    machine.client.extend(10, MARK)
    extended = machine.sent[-1]
    machine.client.pcr_read(10)
    machine.crash()
    assert machine.tpm.notes["last"].startswith(extended)


@pytest.mark.parametrize("kill", ["before", "after"])
def test_permanent_change_has_happened_with_all_that_goes_with_it_or_not_at_all(owned, kill):
    count_id, value = owned.client.create_counter(b"test")
    before = owned.tpm.state
    session = owned.client.oiap()
    owned.store.kill = kill
    with pytest.raises(Killed):
        owned.client.call(Ordinal.INCREMENT_COUNTER, Use(session, bytes(20)), count_id=count_id)
    increment = owned.sent[-1]
    owned.crash()
    counter = owned.client.read_counter(count_id).counter
    if kill == "after":
        assert counter == value.counter + 1
        assert owned.tpm.notes["last"].startswith(increment)
    else:
        assert counter == value.counter
        assert not owned.tpm.notes["last"].startswith(increment)
        assert owned.tpm.state.permanent == before.permanent


def test_change_that_could_not_be_stored_is_not_there_after_a_crash(owned):
    owned.store.kill = "fails"
    before = owned.tpm.state
    assert owned.tpm.execute(PRESENCE_BY_COMMAND, 0)[6:10] != bytes(4)
    assert same_volatile(owned.crash(), owned.tpm.state)
    assert owned.tpm.state.permanent == before.permanent


def test_prepared_change_counts_once_another_change_follows(owned):
    count_id, value = owned.client.create_counter(b"test")
    owned.client.increment_counter(count_id)
    owned.client.extend(10, MARK)
    for _ in range(2):
        owned.crash()
        assert owned.client.read_counter(count_id).counter == value.counter + 1
        assert owned.client.pcr_read(10) == hashlib.sha1(bytes(20) + MARK).digest()


def test_goes_on_over_many_full_journals(machine):
    pcr = bytes(20)
    for number in range(4000):
        mark = number.to_bytes(20, "big")
        machine.client.extend(10, mark)
        pcr = hashlib.sha1(pcr + mark).digest()
        if number % 911 == 0:
            machine.crash()
    machine.crash()
    assert machine.client.pcr_read(10) == pcr


def test_notes_of_other_threads_do_not_settle_what_is_prepared(owned):
    owned.client.create_counter(b"test")
    save = owned.store.save

    def save_and_note(permanent):
        owned.tpm.remember({"registers": b"moved"})
        save(permanent)

    owned.store.save = save_and_note
    owned.store.kill = "before"
    before = owned.tpm.state
    with pytest.raises(Killed):
        owned.tpm.execute(PRESENCE_BY_COMMAND, 0)
    del owned.store.save
    owned.crash()
    assert owned.tpm.notes["registers"] == b"moved"
    assert owned.tpm.state.permanent == before.permanent


def test_power_off_leaves_nothing_to_go_on_from(machine):
    machine.client.extend(10, MARK)
    machine.tpm.power_off()
    assert not machine.path.exists()
    machine.start()
    assert not machine.tpm.is_resumed


def test_key_of_the_journal_is_drawn_once_and_stored(machine, tmp_path):
    key = machine.store.permanent.journal_key
    assert len(key) == 32
    machine.crash()
    assert machine.store.permanent.journal_key == key
    other = Machine(tmp_path / "other")
    assert other.store.permanent.journal_key != key


def test_tpm_of_an_older_version_gets_its_key(tmp_path, owned_permanent):
    permanent = owned_permanent.clone()
    permanent.journal_key = None
    machine = Machine(tmp_path / "journal", permanent)
    assert machine.store.permanent.journal_key is not None
    machine.client.extend(10, MARK)
    machine.crash()


def test_journal_of_another_tpm_is_refused(machine, tmp_path):
    other = Machine(tmp_path / "other")
    other.path.rename(machine.path)
    with pytest.raises(Failure) as caught:
        machine.start()
    assert caught.value.exit_code is ExitCode.DAMAGED


def test_snapshot_without_all_of_its_sections_is_refused(machine):
    with pytest.raises(ValueError, match="without all"):
        _replayed([_SNAPSHOT], machine.store.permanent)


def test_an_older_permanent_state_is_refused_and_the_right_one_goes_on(owned):
    count_id, _ = owned.client.create_counter(b"test")
    older = owned.store.permanent
    value = owned.client.increment_counter(count_id)
    owned.client.extend(10, MARK)
    right, left = owned.store.permanent, owned.path.read_bytes()
    owned.store.permanent = older
    with pytest.raises(Failure, match="not the one that the killed process had stored") as caught:
        owned.start()
    assert caught.value.exit_code is ExitCode.DAMAGED
    assert owned.path.read_bytes() == left
    owned.store.permanent = right
    owned.crash()
    assert owned.client.read_counter(count_id).counter == value.counter


def test_an_older_permanent_state_is_refused_when_the_newest_was_under_way(owned):
    count_id, _ = owned.client.create_counter(b"test")
    older = owned.store.permanent
    owned.client.increment_counter(count_id)
    owned.store.kill = "after"
    with pytest.raises(Killed):
        owned.client.increment_counter(count_id)
    owned.store.permanent = older
    with pytest.raises(Failure, match="not the one"):
        owned.start()


@pytest.mark.parametrize("is_there", [False, True], ids=["the one before", "the failed one"])
def test_after_a_save_that_failed_either_state_is_gone_on_with(owned, is_there):
    owned.store.kill = "fails"
    attempts = []
    save = owned.store.save

    def fail(permanent):
        attempts.append(permanent)
        save(permanent)

    owned.store.save = fail
    assert owned.tpm.execute(PRESENCE_BY_COMMAND, 0)[6:10] != bytes(4)
    del owned.store.save
    if is_there:
        owned.store.permanent = attempts[0]
    owned.crash()
    owned.crash()


def test_a_prepared_change_of_an_older_version_is_understood(owned):
    """It had the change itself where there is a digest now."""
    before = owned.tpm.state.permanent
    after = before.clone()
    after.flags = dataclasses.replace(before.flags, ownership=not before.flags.ownership)
    memory = VolatileMemory(owned.path, "t")
    memory.begin(owned.tpm.state)
    records = read_journal(owned.path, before.journal_key, b"t")
    data = delta(before, after)
    note = b"run\0yes"
    prepared = b"\x03" + struct.pack("<BI", 1, len(data)) + data
    prepared += struct.pack("<BI", 5, len(note)) + note
    assert _replayed([*records, prepared], after).notes == {"run": b"yes"}
    assert _replayed([*records, prepared], before).notes == {}


@pytest.mark.parametrize("is_noted_after", [False, True])
def test_change_whose_save_failed_and_was_stored_all_the_same_is_known_with_its_response(
    machine, is_noted_after
):
    """As when a manager is killed after it has stored and before it answers, and the vTPM then."""
    stored = machine.store.save

    def lost_answer(permanent):
        stored(permanent)
        raise Failure("manager", why="told to", next_step="none")

    machine.store.save = lost_answer
    assert machine.exchange(PRESENCE_BY_COMMAND)[6:10] != bytes(4)
    machine.store.save = stored
    if is_noted_after:
        machine.tpm.remember({"last": b"newer"})
    machine.crash()
    assert machine.tpm.state.permanent.flags.physical_presence_cmd_enable
    response = bytes.fromhex("00c40000000a00000000")
    known = b"newer" if is_noted_after else PRESENCE_BY_COMMAND + response
    assert machine.tpm.notes["last"] == known
