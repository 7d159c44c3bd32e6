"""What a TPM reports as done has been stored, and what could not be stored was not done."""

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from protocol.return_codes import ReturnCode
from tests.differential.sides import take_ownership
from tests.tpm12.witness import OWNER_AUTH, Witness
from tpm12.commands import ALL
from tpm12.profile import CHIP


class Store:
    def __init__(self, permanent=None):
        self.permanent = permanent
        self.saves = 0
        self.fails = False

    def load(self):
        return self.permanent

    def save(self, permanent):
        self.saves += 1
        if self.fails:
            raise Failure("disk", why="told to", next_step="none")
        self.permanent = permanent


def tpm(store=None):
    made = DurableTpm(store or Store(), profile=CHIP, commands=ALL)
    made.power_on_and_start()
    return made


EXTEND = bytes.fromhex("00c1000000220000001400000000") + bytes(20)
OWNER_SET_DISABLE = 0x6E
READ = bytes.fromhex("00c10000000e0000001500000000")


def code(response):
    return ReturnCode(int.from_bytes(response[6:10], "big"))


def test_a_command_that_changes_nothing_permanent_stores_nothing():
    store = Store()
    machine = tpm(store)
    assert code(machine.execute(EXTEND, 0)) is ReturnCode.SUCCESS
    assert code(machine.execute(READ, 0)) is ReturnCode.SUCCESS
    assert store.saves == 0


def test_the_hash_sequence_stores_tpm_established_before_it_reports():
    store = Store()
    machine = tpm(store)
    assert machine.hash_start()
    assert store.permanent.flags.tpm_established
    assert machine.hash_data(b"loader")
    assert machine.hash_end()
    assert machine.established


def test_a_change_that_cannot_be_stored_is_not_made():
    store = Store()
    store.fails = True
    machine = tpm(store)
    assert not machine.hash_start()
    assert not machine.established
    assert machine.state.stclear.pcrs[17] == b"\xff" * 20


def test_sessions_of_a_change_that_cannot_be_stored_are_gone():
    """As after any failure: no client ends them itself, and there are few."""
    store = Store()
    machine = tpm(store)
    machine.make_endorsement_key()
    witness = Witness(machine.execute)
    take_ownership(witness).ok()
    store.fails = True
    session, before = witness.oiap(OWNER_AUTH), machine.state.permanent
    assert witness.auth(OWNER_SET_DISABLE, b"\x01", session).code == ReturnCode.IOERROR
    assert session.handle not in machine.state.stany.sessions
    assert machine.state.permanent is before
    store.fails = False
    witness.auth(OWNER_SET_DISABLE, b"\x01", witness.oiap(OWNER_AUTH)).ok()


def test_a_stored_state_comes_back():
    store = Store()
    first = tpm(store)
    first.hash_start()
    first.hash_end()
    second = tpm(Store(store.permanent))
    assert second.established
    assert not second.is_new


def test_a_tpm_that_fails_its_self_test_does_not_start(monkeypatch):
    monkeypatch.setattr("tpm12.self_test._ABC_DIGEST", bytes(20))
    with pytest.raises(Failure, match="did not start"):
        tpm()
