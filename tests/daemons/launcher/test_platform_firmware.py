"""The firmware over a real chip: engine, TIS registers and socket, all but the process."""

from contextlib import asynccontextmanager

import pytest
import trio

from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm
from daemons.hwtpmd import Chip
from daemons.launcher import platform_firmware
from daemons.launcher.event_log import EventType, read_log, replay
from daemons.launcher.platform_firmware import PlatformFirmware
from daemons.listeners import Kind, listen
from daemons.places import Places
from daemons.tis_link import ChipFault, TisLink
from daemons.tis_server import TisPeer, TisServer, serve_tis
from hwtpm.tis_driver import TisError, TisFault
from tpm12.commands import ALL
from tpm12.profile import CHIP

WAIT_S = 20.0


@pytest.fixture
def places(tmp_path):
    places = Places(tmp_path)
    places.prepare()
    places.make_private(places.tis_socket.parent)
    return places


@asynccontextmanager
async def chip_of(places):
    """A chip whose only peer is the platform."""
    tpm = DurableTpm(ChipMemory.open(places.chip_memory), profile=CHIP, commands=ALL)
    if tpm.is_new:
        tpm.save_as_new()
    peer = TisPeer(name="Domain-0", localities=frozenset(range(5)), is_platform=True)
    server = TisServer(Chip(tpm), lambda _credentials: peer)
    listener = listen(places.tis_socket, Kind.SEQPACKET)
    with trio.fail_after(WAIT_S):
        async with trio.open_nursery() as nursery:
            await nursery.start(serve_tis, listener, server)
            yield tpm
            nursery.cancel_scope.cancel()


def pcrs(tpm):
    return dict(tpm.state.stclear.pcrs)


def explained(places, tpm):
    return replay(read_log(places.event_log)) == pcrs(tpm)


async def test_power_on_measures_the_platform_into_a_real_chip(places):
    steps = []
    async with chip_of(places) as tpm:
        await PlatformFirmware(places).power_on(steps.append)
        assert explained(places, tpm)
        assert tpm.established
    events = read_log(places.event_log)
    assert steps
    assert {event.pcr_index for event in events} == {*range(8), 17}
    assert all(event.is_consistent for event in events)


async def test_power_on_again_gives_the_same_values(places):
    async with chip_of(places) as tpm:
        firmware = PlatformFirmware(places)
        await firmware.power_on(lambda _step: None)
        before = pcrs(tpm)
        await firmware.power_on(lambda _step: None)
        assert pcrs(tpm) == before
        assert explained(places, tpm)


async def test_manager_is_launched_at_locality_2_and_a_changed_one_is_told_apart(places):
    async with chip_of(places) as tpm:
        firmware = PlatformFirmware(places)
        await firmware.power_on(lambda _step: None)
        await firmware.launch_manager('name="vtpmmgr"')
        before = pcrs(tpm)
        await firmware.launch_manager('name="vtpmmgr"')
        assert pcrs(tpm) == before
        await firmware.launch_manager('name="another"')
        assert {pcr for pcr in range(24) if pcrs(tpm)[pcr] != before[pcr]} == {19}
        assert explained(places, tpm)
        await firmware.launch_manager('name="vtpmmgr"')
        assert pcrs(tpm) == before
    launches = [e for e in read_log(places.event_log) if e.event_type == EventType.HASH_START]
    assert len(launches) == 3


class Seizing(TisLink):
    """A link whose every nth command is run, and then taken by a higher locality."""

    every = 7
    commands = 0

    def exchange(self, request):
        response = super().exchange(request)
        Seizing.commands += 1
        if Seizing.commands == self.every:
            Seizing.every += 23
            self.relinquish()  # the other has gone again, too
            raise ChipFault("cannot run a command", TisError(TisFault.SEIZED, 0, ""))
        return response


async def test_power_on_and_launch_begin_again_when_they_are_seized(places, monkeypatch):
    async with chip_of(places) as tpm:
        undisturbed = PlatformFirmware(places)
        await undisturbed.power_on(lambda _step: None)
        await undisturbed.launch_manager('name="vtpmmgr"')
        wanted = pcrs(tpm)
        monkeypatch.setattr(platform_firmware, "TisLink", Seizing)
        firmware = PlatformFirmware(places)
        await firmware.power_on(lambda _step: None)
        assert Seizing.commands > Seizing.every - 23, "it was seized"
        Seizing.every = Seizing.commands + 3
        await firmware.launch_manager('name="vtpmmgr"')
        assert pcrs(tpm) == wanted
        assert explained(places, tpm)


async def test_what_is_seized_every_time_is_told(places, monkeypatch):
    class Always(TisLink):
        def exchange(self, _request):
            raise ChipFault("cannot run a command", TisError(TisFault.SEIZED, 0, ""))

    monkeypatch.setattr(platform_firmware, "TisLink", Always)
    async with chip_of(places):
        with pytest.raises(ChipFault, match="cannot run"):
            await PlatformFirmware(places).power_on(lambda _step: None)


async def test_changed_policy_changes_pcr_5_and_17(places):
    async with chip_of(places) as tpm:
        await PlatformFirmware(places).power_on(lambda _step: None)
        before = pcrs(tpm)
        places.config.mkdir(parents=True)
        places.policy.write_text("# nobody may do anything\n")
        await PlatformFirmware(places).power_on(lambda _step: None)
        assert {pcr for pcr in range(24) if pcrs(tpm)[pcr] != before[pcr]} == {5, 17}


async def test_boot_hash_is_that_of_the_program(places):
    firmware = PlatformFirmware(places)
    assert len(await firmware.boot_hash("vtpmd")) == 40
    assert await firmware.boot_hash("vtpmd") != await firmware.boot_hash("guestd")
