"""What a vTPM asks of the manager, and that only "unknown" counts as unknown."""

import pytest

from daemons.errors import Failure
from daemons.ring_client import RingForgotten, RingLost, Sent
from daemons.vtpm.manager_link import ManagerLink, changes_nothing
from protocol.return_codes import ReturnCode

RECORD = bytes(range(64))
SENT = Sent("memory", 7)
EXTEND = bytes.fromhex("00c1000000220000001400000000") + bytes(20)


def answer(code=0, body=b"", tag=0x01C4):
    return (
        tag.to_bytes(2, "big")
        + (10 + len(body)).to_bytes(4, "big")
        + code.to_bytes(4, "big")
        + body
    )


class Ring:
    def __init__(self, *answers):
        self.answers = list(answers)
        self.requests = []

    def exchange(self, request, *, before_send=None):
        self.requests.append(request)
        if before_send is not None:
            before_send(SENT)
        given = self.answers.pop(0)
        if isinstance(given, Exception):
            raise given
        return given

    def resume(self, request, sent, before_send):
        self.resumed = (request, sent, before_send)
        return self.answers.pop(0)


def forgotten():
    return RingForgotten("lost", why="told to", next_step="none")


def lost():
    return RingLost("lost", why="told to", next_step="none")


def test_requests_are_xens_bytes():
    ring = Ring(answer(body=RECORD), answer())
    link = ManagerLink(ring)
    assert link.load_hash_key() == RECORD
    link.save_hash_key(RECORD)
    assert ring.requests == [
        bytes.fromhex("01c10000000a00000002"),
        bytes.fromhex("01c10000004a00000001") + RECORD,
    ]


def test_unknown_is_the_one_answer_that_permits_a_new_vtpm():
    assert ManagerLink(Ring(answer(ReturnCode.BAD_PARAMETER))).load_hash_key() is None


@pytest.mark.parametrize("code", [c for c in ReturnCode if c not in (0, ReturnCode.BAD_PARAMETER)])
def test_every_other_refusal_is_a_failure(code):
    with pytest.raises(Failure, match="did not give"):
        ManagerLink(Ring(answer(code))).load_hash_key()


@pytest.mark.parametrize(
    "response",
    [
        b"",
        answer()[:9],
        answer(body=bytes(51)),
        answer(body=bytes(65)),
        answer(tag=0xC4),
        b"x" * 80,
    ],
)
def test_nonsense_is_a_failure_and_never_a_new_vtpm(response):
    with pytest.raises(Failure):
        ManagerLink(Ring(response)).load_hash_key()


@pytest.mark.parametrize("deaths", [1, 2, 9])
def test_a_request_of_our_own_is_asked_again_when_the_manager_forgot_it(deaths):
    ring = Ring(*[forgotten() for _ in range(deaths)], answer())
    ManagerLink(ring).save_hash_key(RECORD)
    assert ring.requests == [ring.requests[0]] * (deaths + 1)


def test_a_manager_that_never_lives_long_enough_is_given_up():
    with pytest.raises(RingForgotten):
        ManagerLink(Ring(*[forgotten() for _ in range(99)])).save_hash_key(RECORD)


def test_a_manager_that_does_not_come_back_is_not_asked_again():
    ring = Ring(lost(), answer())
    with pytest.raises(RingLost):
        ManagerLink(ring).save_hash_key(RECORD)
    assert len(ring.requests) == 1


def test_a_request_of_a_guest_that_changes_something_is_not_asked_again():
    ring = Ring(forgotten(), answer())
    with pytest.raises(RingLost):
        ManagerLink(ring).pass_on_once(EXTEND, lambda _: None)
    assert len(ring.requests) == 1
    assert not changes_nothing(EXTEND)


def test_a_request_that_must_not_be_done_twice_is_told_before_it_is_sent():
    told, ring = [], Ring(answer(tag=0xC4))
    assert ManagerLink(ring).pass_on_once(EXTEND, told.append) == answer(tag=0xC4)
    assert told == [SENT]


def test_what_a_killed_vtpm_had_sent_is_asked_for_under_its_number():
    ring = Ring(answer(tag=0xC4))
    assert ManagerLink(ring).resume(EXTEND, SENT, print) == answer(tag=0xC4)
    assert ring.resumed == (EXTEND, SENT, print)
    assert ring.requests == []


@pytest.mark.parametrize(
    "request_hex", ["00c10000000e0000001500000011", "00c10000000e0000004600000008"]
)
def test_a_request_of_a_guest_that_changes_nothing_is_asked_again(request_hex):
    ring = Ring(forgotten(), answer(tag=0xC4))
    assert changes_nothing(bytes.fromhex(request_hex))
    assert ManagerLink(ring).pass_on(bytes.fromhex(request_hex)) == answer(tag=0xC4)


def test_hardware_pcr_reads_the_chips_pcr():
    ring = Ring(answer(body=b"p" * 20, tag=0xC4))
    assert ManagerLink(ring).hardware_pcr(17) == b"p" * 20
    assert ring.requests == [bytes.fromhex("00c10000000e0000001500000011")]


def test_a_hardware_pcr_that_is_refused_is_a_failure():
    with pytest.raises(Failure, match="hardware PCR 30"):
        ManagerLink(Ring(answer(ReturnCode.BADINDEX, tag=0xC4))).hardware_pcr(30)
