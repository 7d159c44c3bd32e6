"""The manager's image and the chip together: the real engine on the real store of the chip.

The power fails for both disks at once, or the manager is killed between two commands of the chip.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from daemons.chip_memory import FILE_BYTES, ChipMemory
from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from daemons.manager.chip import Chip, ChipSecrets
from daemons.manager.chip_anchor import ChipAnchor
from daemons.manager.handle_journal import HandleJournal
from daemons.manager.opening import Wishes, open_vault
from daemons.manager.request_memory import RequestMemory
from daemons.manager.vault import Vault
from daemons.manager.vault_format import PAGE_BYTES, NotAnchored, RolledBack, VaultError
from daemons.vtpmmgrd import _open as open_all
from protocol.return_codes import TpmError
from tests.daemons.manager.chip_bench import LOCALITY, SECRETS, EngineLink, owned_state
from tests.daemons.manager.vault_bench import KEY, SEALS, record_of, uuid_of
from tests.power_loss.machine import Machine, Plan, PowerLoss
from tests.tpm12.conftest import CountingRng, PooledPrimes
from tpm12.commands import ALL
from tpm12.profile import Profile

IMAGE, CHIP = "vtpmmgr.img", "hwtpm.nv"
WISHES = Wishes(locality=LOCALITY, seal_pcrs=(0, 17, 18))
PCR_18 = b"\x18" * 20
COMMANDS_OF_A_SAVE = 1


class KilledError(BaseException):
    """The manager is gone; the chip and the disks are not."""


class DurableLink(EngineLink):
    """A chip that stores what it is told, powered on and measured.

    Args:
        machine: Has its memory.

    Attributes:
        kill_at: Before or after which command (0, 1: the first one) the manager is killed.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.tpm = DurableTpm(
            ChipMemory(machine[CHIP].open_again()),
            profile=Profile(),
            commands=ALL,
            rng=CountingRng(b"durable"),
            key_generator=PooledPrimes(),
        )
        self.engine = self.tpm._engine
        self.kill_at: int | None = None
        self.garble: tuple[int, int] | None = None
        """Of which command's answer one bit is changed on its way, and in which byte."""
        self.commands = 0
        self.tpm.power_on_and_start()
        self.firmware.extend(0, bytes(20))
        assert self.tpm.hash_start()
        assert self.tpm.hash_data(b"launcher and policy")
        assert self.tpm.hash_end()
        self.extend(18, PCR_18)

    def execute(self, request: bytes) -> bytes:
        number, self.commands = self.commands, self.commands + 1
        if number * 2 == self.kill_at:
            raise KilledError
        response = super().execute(request)
        if number * 2 + 1 == self.kill_at:
            raise KilledError
        if self.garble is not None and number == self.garble[0]:
            garbled = bytearray(response)
            garbled[self.garble[1] % len(garbled)] ^= 1
            return bytes(garbled)
        return response

    def _run(self, request: bytes, locality: int) -> bytes:
        return self.tpm.execute(request, locality)


@dataclass
class Platform:
    """A machine with a chip."""

    machine: Machine
    link: DurableLink
    directory: Path

    def start(self, wishes: Wishes = WISHES, secrets: ChipSecrets = SECRETS) -> Vault:
        chip = self._new_chip(secrets)
        disk = self.machine[IMAGE].open_again()
        vault, _ = open_vault(disk, chip, wishes, lambda _text: None, self.link.rng)
        self.chip = chip
        return vault

    def start_with_requests(
        self, path: Path, wishes: Wishes = WISHES
    ) -> tuple[Vault, RequestMemory]:
        disk, chip = self.machine[IMAGE].open_again(), self._new_chip(SECRETS)
        vault, _, memory = open_all(
            disk, chip, wishes, path=path, progress=lambda _text: None, rng=self.link.rng
        )
        return vault, memory

    def _new_chip(self, secrets: ChipSecrets) -> Chip:
        return Chip(
            self.link,
            secrets,
            HandleJournal(self.directory / "journal"),
            lambda _text: None,
            self.link.rng,
        )


def platform_on(contents: dict[str, bytes], directory: Path, plan: Plan | None = None) -> Platform:
    machine = Machine(contents)
    platform = Platform(machine, DurableLink(machine), directory)
    (directory / "journal").unlink(missing_ok=True)
    # Operations are counted from the start of the manager.
    machine.operations, machine.log = 0, []
    machine.plan = plan or Plan()
    return platform


@pytest.fixture(scope="module")
def blank() -> dict[str, bytes]:
    """An owned chip, and a blank image."""
    machine = Machine({IMAGE: bytes(16 * PAGE_BYTES), CHIP: bytes(FILE_BYTES)})
    memory = ChipMemory(machine[CHIP])
    memory.load()
    memory.save(owned_state().permanent)
    machine[CHIP].sync()
    return machine.durable


@pytest.fixture(scope="module")
def used(blank: dict[str, bytes], tmp_path_factory) -> dict[str, bytes]:
    """The same after one vTPM was stored."""
    platform = platform_on(blank, tmp_path_factory.mktemp("used"))
    platform.start().save(record_of(1))
    return platform.machine.contents


def generation_of(vault: Vault) -> int:
    found = vault.load(uuid_of(1))
    return -1 if found is None else int.from_bytes(found.hash_key[:4], "big")


def crashes(
    contents: dict[str, bytes], directory: Path, budget: int
) -> Iterator[tuple[str, dict[str, bytes], int, int]]:
    """Start and save twice, with the power failing at each operation; what may be found then."""
    for point in itertools.count():
        platform = platform_on(contents, directory, Plan(power_fails_at=point))
        told, tried = -1, -1
        try:
            vault = platform.start()
            told = tried = generation_of(vault)
            for generation in (5, 6):
                tried = generation
                vault.save(record_of(1, generation))
                told = generation
        except PowerLoss:
            pass
        where = f"operation {point} ({platform.machine.log[-1]})"
        for left in platform.machine.after_power_loss(budget, point):
            yield where, left, told, tried
        if point >= platform.machine.operations:
            return


@pytest.mark.parametrize("start", ["blank", "used"])
def test_every_power_loss_of_image_and_chip_leaves_what_was_told(start, request, tmp_path):
    seen = 0
    stored = 0 if start == "used" else -1
    for where, left, told, tried in crashes(request.getfixturevalue(start), tmp_path, 5):
        platform = platform_on(left, tmp_path)
        vault = platform.start()
        assert generation_of(vault) in {max(told, stored), max(tried, stored)}, where
        vault.save(record_of(2))
        again = platform_on(platform.machine.durable, tmp_path).start()
        assert again.load(uuid_of(2)) == record_of(2), where
        seen += 1
    assert seen > 60


@pytest.mark.parametrize("start", ["blank", "used"])
def test_every_kill_between_two_commands_of_the_chip_is_taken_up(start, request, tmp_path):
    """The next manager finds what this one left in the chip, and leaves no second anchor in it."""
    contents = request.getfixturevalue(start)
    for point in itertools.count():
        platform = platform_on(contents, tmp_path)
        platform.link.kill_at = point
        told = tried = 0 if start == "used" else -1
        is_over = False
        try:
            vault = platform.start()
            tried = 5
            vault.save(record_of(1, 5))
            told, is_over = 5, True
        except KilledError:
            pass
        platform.link.kill_at = None
        vault = platform.start()
        assert generation_of(vault) in {told, tried}, point
        vault.save(record_of(1, 6))
        assert generation_of(platform.start()) == 6
        assert len(ChipAnchor(platform.chip, LOCALITY).indices()) == 1
        assert len(platform.link.engine.state.permanent.counters) == 1
        platform.chip.close()
        assert platform.link.sessions() == ()
        if is_over:
            assert point > 20
            return


# -- older copies ----------------------------------------------------------------------------------


def with_image(contents: dict[str, bytes], other: dict[str, bytes]) -> dict[str, bytes]:
    return {**contents, IMAGE: other[IMAGE]}


def test_older_copies_of_the_image_are_refused_and_left(used, tmp_path):
    """Also the copy from just before the last save, and together with whatever vTPM images."""
    platform = platform_on(used, tmp_path)
    vault = platform.start()
    copies = [used, platform.machine.contents]
    for generation in (1, 2, 3):
        vault.save(record_of(1, generation))
        copies.append(platform.machine.contents)
    newest = copies.pop()
    for older in copies:
        restored = platform_on(with_image(newest, older), tmp_path)
        with pytest.raises(RolledBack) as refused:
            restored.start()
        assert refused.value.exit_code is ExitCode.DAMAGED
        assert refused.value.next_step
        assert restored.machine.contents[IMAGE] == older[IMAGE]
    assert generation_of(platform_on(newest, tmp_path).start()) == 3


def test_the_counter_refuses_what_the_nv_area_would_let_through(used, tmp_path, monkeypatch):
    """Somebody who knows the area's secret can write it; nobody can set the counter back."""
    platform = platform_on(used, tmp_path)
    platform.start().save(record_of(1, 1))
    restored = platform_on(with_image(platform.machine.contents, used), tmp_path)
    monkeypatch.setattr("daemons.manager.vault.is_one_ahead", lambda *_: False)
    with pytest.raises(NotAnchored, match="older copy"):
        restored.start()


def test_an_older_chip_is_refused(used, tmp_path):
    platform = platform_on(used, tmp_path)
    vault = platform.start()
    for generation in (1, 2):
        vault.save(record_of(1, generation))
    newest = platform.machine.contents
    with pytest.raises(NotAnchored, match="chip is older"):
        platform_on({**newest, CHIP: used[CHIP]}, tmp_path).start()


def test_an_area_that_somebody_else_made_in_its_place_is_refused(used, tmp_path):
    platform = platform_on(used, tmp_path)
    area = next(iter(platform.link.engine.state.permanent.nv))
    platform.link.firmware.nv_define_space(area, 40, 0x40004, auth=b"\1" * 20)
    with pytest.raises(Failure, match="does not vouch") as refused:
        platform.start()
    assert refused.value.exit_code is ExitCode.DAMAGED
    platform = platform_on(used, tmp_path)
    platform.link.firmware.nv_define_space(area, 0, 0x40004)
    with pytest.raises(NotAnchored, match="gone"):
        platform.start()


def test_a_counter_that_is_gone_is_refused(used, tmp_path):
    platform = platform_on(used, tmp_path)
    permanent = platform.link.engine.state.permanent
    permanent.counters = {}
    with pytest.raises(NotAnchored, match="counter"):
        platform.start()


def test_another_counter_of_the_chip_does_not_keep_the_manager_out(used, tmp_path):
    platform = platform_on(used, tmp_path)
    count_id, _ = platform.link.firmware.create_counter(b"them")
    platform.link.firmware.increment_counter(count_id)
    before = platform.start().anchorage
    assert platform.start().anchorage == before
    # After the next power-on it moves again.
    after = platform_on(platform.machine.contents, tmp_path).start().anchorage
    assert after.counter_value == before.counter_value
    last = platform_on(platform.machine.contents, tmp_path)
    last.start()
    assert last.start().anchorage.counter_value == before.counter_value + 1


@pytest.mark.parametrize("start", ["blank", "used"])
@pytest.mark.parametrize("byte", [-1, -5, 13])
def test_an_answer_that_was_changed_on_its_way_costs_no_vault(start, byte, request, tmp_path):
    """One bit of any answer of the chip: a start may be refused, and the next one is as ever."""
    contents = request.getfixturevalue(start)
    stored = 0 if start == "used" else -1
    for number in itertools.count():
        platform = platform_on(contents, tmp_path)
        platform.link.garble = (number, byte)
        with contextlib.suppress(Failure):
            platform.start()
        platform.link.garble = None
        vault = platform.start()
        assert generation_of(vault) == stored, number
        assert len(platform.link.engine.state.permanent.counters) == 1
        assert len(platform.link.engine.state.permanent.nv) == 1
        if number >= platform.link.commands:
            return


# -- blank images, older formats -------------------------------------------------------------------


def test_a_blank_image_is_refused_where_the_chip_remembers_another(used, blank, tmp_path):
    restored = platform_on(with_image(used, blank), tmp_path)
    with pytest.raises(Failure, match="remembers another") as refused:
        restored.start()
    assert refused.value.exit_code is ExitCode.DAMAGED
    assert 'abandoned_anchor = "0x00015000"' in refused.value.next_step
    assert not any(restored.machine.contents[IMAGE])
    wishes = replace(WISHES, abandoned_anchor=0x15000)
    vault = restored.start(wishes)
    assert len(vault) == 0
    # The setting stays, because settings are measured; it does not come to mean this vault.
    vault.save(record_of(1))
    assert len(restored.start(wishes)) == 1
    blank_again = platform_on(with_image(restored.machine.contents, blank), tmp_path)
    with pytest.raises(Failure, match="remembers another"):
        blank_again.start(wishes)


def test_a_counter_that_outlived_its_area_is_not_taken_for_a_new_vault_s(used, blank, tmp_path):
    """The owner removed the area of an old vault, as he may, and left its counter."""
    platform = platform_on(with_image(used, blank), tmp_path)
    counters = platform.link.engine.state.permanent.counters
    platform.link.firmware.nv_define_space(0x15000, 0, 0x40004)
    vault = platform.start()
    assert vault.anchorage.nv_index == 0x15000
    vault.save(record_of(1))
    assert generation_of(platform.start()) == 0
    assert len(platform.link.engine.state.permanent.counters) == 1
    assert platform.link.engine.state.permanent.counters != counters


@pytest.mark.parametrize("what", ["NV areas", "counters"])
def test_a_chip_without_room_for_an_anchor_says_what_to_make_room_of(blank, tmp_path, what):
    platform = platform_on(blank, tmp_path)
    owner = platform.link.firmware
    if what == "counters":
        for _ in range(Profile().counters):
            owner.create_counter(b"them")
    else:
        for index, size in enumerate([4000] * 7 + [400, 200, 100, 50, 25, 12, 6]):
            with contextlib.suppress(TpmError):
                owner.nv_define_space(0x20000 + index, size, 0x40004)
    with pytest.raises(Failure, match=r"cannot make .* in the hardware TPM") as refused:
        platform.start()
    assert what in refused.value.next_step
    assert refused.value.exit_code is ExitCode.UNAVAILABLE
    # It is made: nothing of theirs is left.
    permanent = platform.link.engine.state.permanent
    permanent.counters = {}
    permanent.nv = {at: area for at, area in permanent.nv.items() if at == 0x15000}
    platform.start().save(record_of(1))


@pytest.mark.parametrize("wrong", ["owner_auth", "srk_auth"])
def test_a_new_vault_is_not_begun_with_a_wrong_secret(blank, tmp_path, wrong):
    """To correct the secret changes what is measured, and so what an image may be opened by."""
    platform = platform_on(blank, tmp_path)
    with pytest.raises(Failure, match="AUTHFAIL") as refused:
        platform.start(secrets=replace(SECRETS, **{wrong: b"w" * 20}))
    assert "owner_auth=" in refused.value.next_step
    assert not any(platform.machine.contents[IMAGE])
    assert not platform.link.engine.state.permanent.nv
    platform.link.extend(18, b"\x19" * 20)
    assert len(platform.start()) == 0


def test_every_kill_while_an_old_vault_is_given_up_is_taken_up(used, blank, tmp_path):
    """What the old vault's manager remembered of requests keeps nobody out of the new one."""
    wishes = replace(WISHES, abandoned_anchor=0x15000)
    path = tmp_path / "requests"
    for point in itertools.count():
        RequestMemory(path, b"the old vault's.", is_new=True).close()
        platform = platform_on(with_image(used, blank), tmp_path)
        platform.link.kill_at = point
        is_over = False
        with contextlib.suppress(KilledError):
            platform.start_with_requests(path, wishes)
            is_over = True
        platform.link.kill_at = None
        vault, memory = platform.start_with_requests(path, wishes)
        vault.save(record_of(1))
        memory.close()
        if is_over:
            assert point > 20
            return


def test_a_blank_image_that_is_refused_leaves_what_is_remembered_of_requests(used, blank, tmp_path):
    """The right image is put back, and its manager goes on."""
    path = tmp_path / "requests"
    _, memory = platform_on(used, tmp_path).start_with_requests(path)
    memory.close()
    with pytest.raises(Failure, match="remembers another"):
        platform_on(with_image(used, blank), tmp_path).start_with_requests(path)
    assert path.exists()


def test_a_vault_without_an_anchor_gets_one_and_its_copies_end(blank, tmp_path):
    """What version 1 left: the chip knows nothing, once."""
    machine = Machine(blank)
    platform = platform_on(blank, tmp_path)
    chip = Chip(platform.link, SECRETS, HandleJournal(tmp_path / "j"), print, platform.link.rng)
    chip.start()
    from daemons.manager import sealing  # noqa: PLC0415 - only here

    sealed = sealing.seal(
        chip, vault_id=bytes(16), vault_key=KEY, pcrs=WISHES.seal_pcrs, locality=LOCALITY
    )
    assert sealed != SEALS[0]
    vault = Vault.create(
        machine[IMAGE], KEY, vault_id=bytes(16), seals=(sealed,), random_bytes=chip_random
    )
    vault.save(record_of(1))
    unanchored = {IMAGE: machine.contents[IMAGE], CHIP: platform.machine.contents[CHIP]}
    platform = platform_on(unanchored, tmp_path)
    vault = platform.start()
    assert vault.load(uuid_of(1)) == record_of(1)
    assert vault.anchorage.is_confirmed
    with pytest.raises(RolledBack):
        platform_on(with_image(platform.machine.contents, unanchored), tmp_path).start()


def chip_random(size: int) -> bytes:
    return CountingRng(b"vault").random(size)


# -- a chip that does not answer -------------------------------------------------------------------


def test_a_save_that_the_chip_was_not_told_of_fails_and_is_made_good(used, tmp_path):
    platform = platform_on(used, tmp_path)
    vault = platform.start()
    platform.link.is_gone = True
    with pytest.raises(VaultError, match="not told") as failed:
        vault.save(record_of(1, 5))
    assert failed.value.exit_code is ExitCode.IO_ERROR
    with pytest.raises(Failure, match="gone"):
        vault.reopened(platform.machine[IMAGE].open_again())
    platform.link.is_gone = False
    again = vault.reopened(platform.machine[IMAGE].open_again())
    assert generation_of(again) == 5
    again.save(record_of(1, 6))
    assert generation_of(platform_on(platform.machine.durable, tmp_path).start()) == 6


def test_a_session_that_was_flushed_is_opened_anew(used, tmp_path):
    platform = platform_on(used, tmp_path)
    vault = platform.start()
    vault.save(record_of(1, 1))
    for handle in platform.link.sessions():
        platform.link.firmware.flush_specific(handle, 2)
    vault.save(record_of(1, 2))
    assert len(platform.link.sessions()) == 1
    platform.chip.close()
    assert platform.link.sessions() == ()


# -- a new key -------------------------------------------------------------------------------------


def test_a_new_key_survives_a_power_loss_at_every_step(used, tmp_path):
    wishes = replace(WISHES, key_generation=2)
    for point in itertools.count():
        platform = platform_on(used, tmp_path, Plan(power_fails_at=point))
        try:
            platform.start(wishes)
            is_over = True
        except PowerLoss:
            is_over = False
        for left in platform.machine.after_power_loss(3, point):
            vault = platform_on(left, tmp_path).start(wishes)
            assert vault.key_generation == 2
            assert not vault._newest.old_node_keys
            assert generation_of(vault) == 0
        if is_over:
            assert point > 20
            return


# -- cost ------------------------------------------------------------------------------------------


def test_a_save_costs_one_sync_of_the_image_and_one_of_the_chip(used, tmp_path):
    platform = platform_on(used, tmp_path)
    vault = platform.start()
    vault.save(record_of(1, 1))
    machine, link = platform.machine, platform.link
    machine.log, commands = [], link.commands
    vault.save(record_of(1, 2))
    assert [what for what in machine.log if what.startswith("sync")] == [
        f"sync {IMAGE}",
        f"sync {CHIP}",
    ]
    assert machine.log.count(f"write {IMAGE}") == 4
    assert link.commands - commands == COMMANDS_OF_A_SAVE
