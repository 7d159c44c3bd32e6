"""Without `maintcmds=1` there is no maintenance in a vTPM, on any way in."""

import pytest

from daemons.durable_tpm import DurableTpm
from daemons.simulator import EphemeralStore
from daemons.vtpm.command_set import MAINTENANCE, command_set
from daemons.world import SystemRng
from protocol.constants import CapabilityArea
from protocol.return_codes import ReturnCode
from tpm12.client import TpmClient
from tpm12.client_transport import ClientTransport
from tpm12.profile import VTPM

BAD_ORDINAL = bytes.fromhex("00c40000000a0000000a")


def bare(ordinal):
    return bytes.fromhex("00c10000000a") + int(ordinal).to_bytes(4, "big")


def exchange_of(*, has_maintenance_commands):
    commands = command_set(has_maintenance_commands=has_maintenance_commands)
    tpm = DurableTpm(EphemeralStore(), profile=VTPM, commands=commands)
    tpm.power_on_and_start()
    return lambda request: tpm.execute(request, 0)


@pytest.mark.parametrize("ordinal", MAINTENANCE)
@pytest.mark.parametrize("has_them", [True, False])
def test_maintenance_commands_need_maintcmds(ordinal, has_them):
    exchange = exchange_of(has_maintenance_commands=has_them)
    assert (exchange(bare(ordinal)) == BAD_ORDINAL) is not has_them
    tpm = TpmClient(exchange, rng=SystemRng())
    listed = tpm.get_capability(CapabilityArea.ORD, int(ordinal).to_bytes(4, "big"))
    assert listed == bytes([has_them])


@pytest.fixture(scope="module")
def owned():
    """A vTPM without them that has an owner: transport sessions want a storage root key."""
    commands = command_set(has_maintenance_commands=False)
    tpm = DurableTpm(EphemeralStore(), profile=VTPM, commands=commands)
    tpm.power_on_and_start()
    tpm.make_endorsement_key()
    TpmClient(lambda request: tpm.execute(request, 0), rng=SystemRng()).take_ownership()
    return lambda request: tpm.execute(request, 0)


@pytest.mark.parametrize("ordinal", MAINTENANCE)
def test_a_transport_session_does_not_reach_them_either(owned, ordinal):
    """Inside, only the engine sees which command it is: a check of the outer ordinal is none."""
    session = ClientTransport.establish(owned, rng=SystemRng(), key=None, attributes=0)
    # Without its declaration the wrapped command cannot be taken apart: the outer one is refused.
    response = owned(session.wrap(bare(ordinal)))
    assert int.from_bytes(response[6:10], "big") == ReturnCode.BAD_PARAMETER
