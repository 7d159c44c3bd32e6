"""TPMs in every state from which commands are tried."""

import pytest

from tests.any_bytes import furnished
from tests.tpm12.conftest import Bench
from tests.tpm12.witness import u32
from tpm12.state import factory_state


def states():
    """Every state, by name; `furnished` is for `all_authorized()`."""
    made = {}
    bench = Bench(factory_state())
    bench.engine.keep(bench.engine.power_on())
    made["before_startup"] = bench.state
    bench.power_cycle().ok()
    bench.tpm.send(0x50).ok()
    made["started"] = bench.state
    made["with_ek"] = furnished.ek_state(made["started"])
    made["owned"] = furnished.owned_state(made["with_ek"])
    made["furnished"] = furnished.with_daa_sessions(
        made["owned"], furnished.furnished_state(made["owned"])
    )
    for name, change in (
        ("disabled", lambda b: b.set_flags(disable=True)),
        ("deactivated", lambda b: b.change("stclear", deactivated=True)),
        ("failed", lambda b: b.change("volatile", self_test=3)),
    ):
        bench = Bench(made["furnished"])
        change(bench)
        made[name] = bench.state
    return made


@pytest.fixture(scope="session")
def all_states():
    return states()


@pytest.fixture(scope="session")
def furnished_state(all_states):
    return all_states["furnished"]


@pytest.fixture(scope="session")
def owned_state(all_states):
    return all_states["owned"]


def random_request(size):
    """TPM_GetRandom."""
    return b"\x00\xc1\x00\x00\x00\x0e\x00\x00\x00\x46" + u32(size)
