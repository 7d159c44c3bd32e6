"""The service manager hears that a daemon lives only when what it serves has answered."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import trio

from daemons.chip_memory import ChipMemory
from daemons.durable_tpm import DurableTpm
from daemons.sd_notify import NO_COMMAND, Notifier
from daemons.self_test import pass_self_test
from daemons.service import serve
from protocol.return_codes import ReturnCode
from tpm12.commands import ALL
from tpm12.profile import CHIP

WATCHDOG_S = 0.03


class Heard(Notifier):
    """A service manager that listens."""

    def __init__(self, watchdog_s: float | None = WATCHDOG_S) -> None:
        super().__init__(None, watchdog_s)
        self.said: list[str] = []
        self.is_new = trio.Event()

    def send(self, **fields: str) -> None:
        self.said += fields
        self.is_new.set()
        self.is_new = trio.Event()

    async def until(self, count: int, word: str) -> None:
        with trio.fail_after(5):
            while self.said.count(word) < count:
                await self.is_new.wait()


async def nobody(_connection):
    """No connection comes."""


async def test_each_answer_is_told():
    heard, answers = Heard(), []
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(serve, nobody, [], notifier=heard, is_alive=lambda: answers.append(1))
        )
        await heard.until(4, "WATCHDOG")
        nursery.cancel_scope.cancel()
    assert 4 <= heard.said.count("WATCHDOG") <= len(answers)


async def test_what_does_not_answer_is_not_alive():
    heard, release = Heard(), threading.Event()
    answered = threading.Event()

    def hang() -> None:
        answered.set()
        release.wait()

    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, nobody, [], notifier=heard, is_alive=hang))
        assert await trio.to_thread.run_sync(answered.wait, 5)
        assert "WATCHDOG" not in heard.said
        assert "READY" in heard.said
        release.set()
        await heard.until(1, "WATCHDOG")
        nursery.cancel_scope.cancel()


async def test_nobody_asks_if_the_manager_does_not_want_to_know():
    heard = Heard(watchdog_s=None)
    asked = []
    async with trio.open_nursery() as nursery:
        await nursery.start(
            partial(serve, nobody, [], notifier=heard, is_alive=lambda: asked.append(1))
        )
        nursery.cancel_scope.cancel()
    assert not asked


@pytest.fixture
def tpm(tmp_path):
    made = DurableTpm(ChipMemory.open(tmp_path / "chip"), profile=CHIP, commands=ALL)
    made.power_on_and_start()
    return made


def test_asking_the_engine_changes_nothing(tpm):
    before = tpm.state
    answer = tpm.execute(NO_COMMAND, 0)
    assert int.from_bytes(answer[6:10], "big") == ReturnCode.BAD_PARAM_SIZE
    assert tpm.state is before


def test_the_self_test_leaves_no_trace(tpm):
    before = tpm.state
    pass_self_test(tpm.state.permanent, CHIP, ALL)
    assert tpm.state is before
