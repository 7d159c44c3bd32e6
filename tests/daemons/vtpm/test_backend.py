"""Which commands a vTPM runs, which it passes on, for whom; and whose reboot resets it."""

from uuid import UUID

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure, NotNow
from daemons.policy import LocalityRule
from daemons.registry import DomainRecord, Role, VtpmDevice
from daemons.ring_client import RingForgotten, RingLost, Sent
from daemons.ring_server import Refused, RingPeer
from daemons.vtpm.backend import VtpmBackend
from daemons.vtpm.manager_link import ManagerLink
from protocol.return_codes import ReturnCode
from tpm12.commands import ALL
from tpm12.profile import VTPM

DEVICE = VtpmDevice(
    devid=0, backend="vtpm-guest1", uuid=UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"), handle=0
)
READ_PCR_10 = bytes.fromhex("00c10000000e000000150000000a")
EXTEND_PCR_10 = bytes.fromhex("00c1000000220000001400 00000a".replace(" ", "")) + bytes(20)
OK = bytes.fromhex("00c40000000a00000000")


class Store:
    def load(self):
        return None

    def save(self, permanent):
        pass


class Manager:
    def __init__(self):
        self.requests = []
        self.fails = False

    def exchange(self, request, *, before_send=None):
        self.requests.append(request)
        if before_send is not None:
            before_send(Sent("memory", len(self.requests)))
        if self.fails:
            raise Failure("gone", why="told to", next_step="none")
        return OK

    def resume(self, request, sent, before_send):
        raise AssertionError((request, sent, before_send))


def peer(name="guest1", domid=5, connection_id=1, label="system_u:system_r:domU_t"):
    record = DomainRecord(
        name=name,
        domid=domid,
        role=Role.GUEST,
        label=label,
        uid=0,
        pid=1,
        start_time=1,
        vtpms=(DEVICE,),
        localities=(),
        boot_hash="00" * 20,
    )
    return RingPeer(domain=record, device=DEVICE, connection_id=connection_id)


@pytest.fixture
def manager():
    return Manager()


def backend_of(manager, **options):
    tpm = DurableTpm(Store(), profile=VTPM, commands=ALL)
    tpm.power_on_and_start()
    made = VtpmBackend(tpm, ManagerLink(manager), start=tpm.power_on_and_start, **options)
    made.attached(peer())
    return made


@pytest.fixture
def backend(manager):
    return backend_of(manager)


def code(response):
    assert len(response) >= 10
    assert int.from_bytes(response[2:6], "big") == len(response)
    return ReturnCode(int.from_bytes(response[6:10], "big"))


def is_clean(backend, whom):
    return not any(backend.execute(whom, READ_PCR_10, 0, 1)[10:])


def test_a_guest_that_opens_its_device_again_finds_its_pcrs(backend):
    backend.execute(peer(), EXTEND_PCR_10, 0, 1)
    backend.detached(peer())
    backend.attached(peer(connection_id=2))
    assert not is_clean(backend, peer(connection_id=2))


def test_a_guest_that_was_started_anew_finds_its_tpm_reset(backend):
    backend.execute(peer(), EXTEND_PCR_10, 0, 1)
    backend.detached(peer())
    backend.attached(peer(domid=6, connection_id=2))
    assert is_clean(backend, peer(domid=6, connection_id=2))


def test_another_guest_is_refused_while_one_is_connected(backend):
    backend.execute(peer(), EXTEND_PCR_10, 0, 1)
    with pytest.raises(Refused, match="the TPM of guest1"):
        backend.attached(peer(name="other", domid=9, connection_id=2))
    assert not is_clean(backend, peer())


def test_another_guest_finds_no_trace_of_the_one_before(backend):
    backend.execute(peer(), EXTEND_PCR_10, 0, 1)
    backend.detached(peer())
    backend.attached(peer(name="other", domid=9, connection_id=2))
    assert is_clean(backend, peer(name="other", domid=9, connection_id=2))


@pytest.mark.parametrize(
    ("kind", "told"),
    [(Failure, Refused), (RingLost, NotNow), (RingForgotten, NotNow)],
    ids=["refused", "manager away", "manager rebooted"],
)
def test_a_tpm_that_does_not_start_again_takes_no_frontend(manager, kind, told):
    def failing():
        raise kind("the TPM did not start", why="told to", next_step="none")

    tpm = DurableTpm(Store(), profile=VTPM, commands=ALL)
    tpm.power_on_and_start()
    backend = VtpmBackend(tpm, ManagerLink(manager), start=failing)
    backend.attached(peer())
    backend.detached(peer())
    for connection_id in (2, 3):
        with pytest.raises(told, match="did not start"):
            backend.attached(peer(domid=6, connection_id=connection_id))


@pytest.mark.parametrize("locality", [1, 2, 3, 4, 5, 8, 255])
def test_without_rules_only_locality_0_may_be_claimed(backend, locality):
    assert code(backend.execute(peer(), EXTEND_PCR_10, locality, 1)) is ReturnCode.FAIL
    assert is_clean(backend, peer())


def test_a_rule_gives_localities_to_a_label(manager):
    rule = LocalityRule(pattern="*:domU_t", localities=frozenset({0, 3}))
    backend = backend_of(manager, locality_rules=(rule,))
    assert code(backend.execute(peer(), EXTEND_PCR_10, 3, 1)) is ReturnCode.SUCCESS
    assert code(backend.execute(peer(), EXTEND_PCR_10, 2, 1)) is ReturnCode.FAIL


def test_a_label_that_no_rule_names_may_claim_nothing(manager):
    rule = LocalityRule(pattern="root:root:other_t", localities=frozenset({0}))
    backend = backend_of(manager, locality_rules=(rule,))
    assert code(backend.execute(peer(), READ_PCR_10, 0, 1)) is ReturnCode.FAIL


@pytest.mark.parametrize("ordinal", [1, 2, 3, 4])
def test_save_and_load_hash_key_never_reach_the_manager_as_such(backend, manager, ordinal):
    request = bytes.fromhex("01c10000000a") + ordinal.to_bytes(4, "big")
    backend.execute(peer(), request, 0, 1)
    assert manager.requests == [b"\x00\xc1" + request[2:]]


def test_management_requests_go_to_the_manager_unchanged(backend, manager):
    request = bytes.fromhex("01c20000000a02000101")
    assert backend.execute(peer(), request, 0, 1) == OK
    assert manager.requests == [request]


def test_a_manager_that_is_gone_is_an_input_output_error_for_the_guest(backend, manager):
    manager.fails = True
    response = backend.execute(peer(), bytes.fromhex("01c20000000a02000101"), 0, 1)
    assert code(response) is ReturnCode.IOERROR


@pytest.mark.parametrize("request_", [b"", b"\x00", b"\x00\xc1", bytes(9), bytes(4088)])
def test_any_bytes_get_a_well_formed_answer(backend, request_):
    assert code(backend.execute(peer(), request_, 0, 1)) is not ReturnCode.SUCCESS
