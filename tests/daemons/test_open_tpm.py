"""The awaitable client: every method of the blocking one, over a real socket."""

import inspect

import pytest
import trio

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from daemons.guest.tpm0 import Tpm0Device
from daemons.listeners import Kind, listen
from daemons.open_tpm import AsyncTpm, open_tpm
from daemons.service import serve
from daemons.simulator import EphemeralStore, Simulator
from protocol.return_codes import ReturnCode, TpmError
from tpm12.client import TpmClient
from tpm12.commands import ALL
from tpm12.profile import CHIP


def public(kind):
    return {n for n, m in vars(kind).items() if not n.startswith("_") and inspect.isroutine(m)}


@pytest.fixture
async def path(tmp_path, nursery):
    folder = tmp_path / "tpm"
    folder.mkdir(mode=0o700)
    simulator = Simulator(DurableTpm(EphemeralStore(), profile=CHIP, commands=ALL))
    device = Tpm0Device(simulator.exchange, lambda _: None, lambda: None)
    await nursery.start(serve, device.handle, [listen(folder / "sock", Kind.STREAM)])
    return folder / "sock"


def test_every_method_of_the_blocking_client_is_there():
    named = {n for n in vars(AsyncTpm) if not n.startswith("_")} - {"in_thread"}
    assert named == public(TpmClient)


async def test_commands_may_be_awaited_from_several_tasks(path):
    async with open_tpm(path) as tpm, trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(tpm.extend, 10, b"x" * 20)
        assert len(await tpm.get_random(20)) == 20
    async with open_tpm(path) as tpm:
        assert any(await tpm.pcr_read(10))


async def test_a_refusal_is_a_tpm_error(path):
    async with open_tpm(path) as tpm:
        with pytest.raises(TpmError) as caught:
            await tpm.pcr_read(99)
    assert caught.value.code is ReturnCode.BADINDEX


async def test_nobody_there_is_a_failure(tmp_path):
    with pytest.raises(Failure):
        async with open_tpm(tmp_path / "nothing"):
            pass
