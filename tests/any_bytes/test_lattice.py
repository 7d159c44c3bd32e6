"""The length lattice around every declared ordinal, from every state the TPM can be in.

Whatever is asked, the answer is well formed, and a command that failed changed nothing but
sessions, the attack counter, and what every command ends.
"""

from unittest import mock

import pytest

from protocol.return_codes import ReturnCode
from protocol.wire import DecodeError
from tests.any_bytes import lattice
from tests.any_bytes.answers import check_outcome
from tests.any_bytes.furnished import all_authorized
from tests.tpm12.conftest import Bench
from tpm12.commands import ALL
from tpm12.tpm import Tpm

_LOCALITIES = 5


@pytest.fixture(params=ALL, ids=lambda command: command.name)
def command(request):
    return request.param


def check(bench, requests):
    """Ask everything of one state; how many requests succeeded."""
    before, succeeded = bench.state, 0
    for number, (what, request) in enumerate(requests):
        try:
            outcome = bench.engine.execute(request, number % _LOCALITIES)
            succeeded += check_outcome(before, outcome) == ReturnCode.SUCCESS
        except Exception as error:
            error.add_note(f"{what}: {request.hex()}")
            raise
    return succeeded


def test_lattice_has_every_length(command):
    for base in lattice.base_requests(command):
        try:
            wanted = set(lattice.of_lengths(command, base))
        except DecodeError:
            continue
        assert wanted <= {request for _, request in lattice.altered(command, base)}


def test_altered_requests_get_an_answer_in_every_state(command, all_states):
    requests = list(lattice.everything(command))
    for name, state in all_states.items():
        if name != "furnished":
            check(Bench(state), requests)


def test_altered_requests_get_an_answer_when_all_is_authorized(command, furnished_state):
    with all_authorized():
        check(Bench(furnished_state), lattice.everything(command))


def test_most_ordinals_succeed_somewhere(furnished_state):
    # The control: what is altered would otherwise often have reached its end.
    failing = set()
    with all_authorized():
        for command in ALL:
            requests = [("", base) for base in lattice.base_requests(command)]
            if not any(check(Bench(furnished_state), [(w, r)]) for w, r in requests):
                failing.add(command.name)
    assert len(failing) < len(ALL) / 3, sorted(failing)


def _change_something(tpm):
    tpm.change_permanent().no_owner_nv_write += 1


def _divide_by_zero(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("owner", "name", "instead", "seen"),
    [
        (Tpm, "rollback", _change_something, AssertionError),
        (Tpm, "random", _divide_by_zero, ZeroDivisionError),
        (Tpm, "random", lambda *_: bytes(5000), AssertionError),
    ],
)
def test_broken_engine_is_noticed(furnished_state, owner, name, instead, seen):
    """The control: a failed command that changed something, an exception, a response too long."""
    requests = lattice.everything(lattice.COMMANDS["GetRandom"])
    with all_authorized(), mock.patch.object(owner, name, instead), pytest.raises(seen):
        check(Bench(furnished_state), requests)
