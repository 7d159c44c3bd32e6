"""Start-up of the hardware TPM: whatever state it is in, and with nobody else disturbed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from daemons.errors import ExitCode, Failure
from daemons.manager.chip import Chip, ChipRefusal, ChipSecrets
from daemons.manager.handle_journal import opens
from daemons.tis_link import ChipFault
from hwtpm.tis_driver import TisError, TisFault
from protocol.constants import (
    CapabilityArea,
    EntityType,
    KeyHandleValue,
    NvAttribute,
    Ordinal,
    ResourceType,
)
from protocol.return_codes import ReturnCode, TpmError
from tests.daemons.manager.chip_bench import ChipBench, EngineLink, bench_on, boot, owned_link
from tpm12.client import TpmClient

SRK = int(KeyHandleValue.SRK)
GEHEIM = ChipSecrets(owner_auth=b"\x01" * 20, srk_auth=b"\x02" * 20)


def test_new_chip_gets_endorsement_key_and_owner(tmp_path: Path):
    link = EngineLink()
    link.power_on()
    bench = bench_on(link, tmp_path, GEHEIM)
    version = bench.chip.start()
    assert version.version[:2] == b"\x01\x02"
    link.firmware.seal(b"x", key_auth=GEHEIM.srk_auth)
    with pytest.raises(TpmError, match="AUTHFAIL"):
        link.firmware.seal(b"x", key_auth=GEHEIM.owner_auth)
    assert [text for text in bench.progress if "making" in text] == [
        "making the hardware TPM's endorsement key",
        "taking ownership of the hardware TPM: making its storage root key",
    ]
    assert link.sessions() == ()
    assert not bench.journal.exists()


def test_chip_with_an_endorsement_key_keeps_it(tmp_path: Path):
    link = EngineLink()
    link.power_on()
    endorsement_key = link.firmware.create_endorsement_key_pair()
    bench_on(link, tmp_path).chip.start()
    read = link.firmware.owner_read_internal_pub(int(KeyHandleValue.EK))
    assert read.pub_key == endorsement_key.pub_key


def test_owned_chip_is_left_as_it_is(tmp_path: Path):
    link = owned_link()
    before = link.engine.state.permanent
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    assert link.engine.state.permanent.srk == before.srk
    assert not any("making" in text for text in bench.progress)


def test_chip_that_was_not_started_is_told_so(tmp_path: Path):
    link = EngineLink()
    link.engine.keep(link.engine.power_on())
    with pytest.raises(ChipRefusal) as refused:
        bench_on(link, tmp_path).chip.start()
    assert refused.value.code == ReturnCode.INVALID_POSTINIT
    assert refused.value.exit_code == ExitCode.UNAVAILABLE
    assert "vtpm up" in refused.value.next_step


def test_chip_that_is_no_tpm_1_2_is_refused(tmp_path: Path):
    link = owned_link()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        return genuine(request).replace(b"\x00\x30\x01\x02", b"\x00\x30\x02\x00")

    link.execute = execute
    with pytest.raises(Failure, match="hardware TPM") as refused:
        bench_on(link, tmp_path).chip.start()
    assert "version 2.0" in refused.value.why


def test_chip_that_is_gone_is_a_failure_that_says_so(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    link.is_gone = True
    with pytest.raises(Failure, match="x"):
        bench.chip.exchange(bytes(10))


def test_chip_is_free_for_others_after_each_use(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    with bench.chip.operation("x") as tpm:
        tpm.pcr_read(0)
    assert link.let_go_count == 1
    bench.chip.exchange(bytes(10))
    assert link.let_go_count == 2
    with pytest.raises(ChipRefusal), bench.chip.operation("x") as tpm:
        tpm.pcr_read(24)
    assert link.let_go_count == 3


# -- other users' handles --------------------------------------------------------------------------


def test_other_users_sessions_survive_the_start(tmp_path: Path):
    link = owned_link()
    session = link.firmware.oiap()
    bench_on(link, tmp_path).chip.start()
    assert link.sessions() == (session.handle,)


def test_sessions_of_a_killed_manager_are_flushed_and_no_others(tmp_path: Path):
    link = owned_link()
    theirs = link.firmware.oiap()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    with pytest.raises(KeyboardInterrupt):  # stands for SIGKILL: nothing cleans up
        _killed_with_sessions(bench.chip)
    assert len(link.sessions()) == 3
    bench.another().chip.start()
    assert link.sessions() == (theirs.handle,)


def _killed_with_sessions(chip) -> None:
    with chip.operation("x") as tpm:
        tpm.oiap()
        tpm.osap(EntityType.KEYHANDLE, SRK, bytes(20))
        raise KeyboardInterrupt


def _open_sessions(chip: Chip, count: int) -> None:
    with chip.operation("x") as tpm:
        for _ in range(count):
            tpm.oiap()


def test_manager_killed_before_it_saw_the_answer_leaves_nothing(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        response = genuine(request)
        if opens(request) is None:
            return response
        raise KeyboardInterrupt

    link.execute = execute
    with pytest.raises(KeyboardInterrupt):
        _killed_with_sessions(bench.chip)
    del link.execute
    assert len(link.sessions()) == 1
    bench.another().chip.start()
    assert link.sessions() == ()


def test_manager_killed_while_it_clears_up_leaves_it_to_the_next(tmp_path: Path):
    """Of two sessions one is noted, and one waits in the chip; the next manager is killed too."""
    for point in range(20):
        link = owned_link()
        bench = bench_on(link, tmp_path)
        bench.chip.start()
        genuine, left = link.execute, 6  # each is opened behind a look at what is open
        is_over = False

        def execute(request: bytes, genuine: Callable[[bytes], bytes] = genuine) -> bytes:
            nonlocal left
            response, left = genuine(request), left - 1
            if left == 0:
                raise KeyboardInterrupt
            return response

        link.execute = execute
        with pytest.raises(KeyboardInterrupt):
            _open_sessions(bench.chip, 3)
        assert len(link.sessions()) == 3
        left = point + 1
        with contextlib.suppress(KeyboardInterrupt):
            bench.another().chip.start()
            is_over = True
        del link.execute
        bench.another().chip.start()
        assert link.sessions() == (), point
        if is_over:
            assert point > 5
            return


def test_manager_starts_though_the_command_of_the_one_before_it_was_seized(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()

    def seized(_request: bytes) -> bytes:
        raise ChipFault("run", TisError(TisFault.SEIZED, 2, "on purpose"))

    genuine, is_seized = link.execute, False

    def execute(request: bytes) -> bytes:
        nonlocal is_seized
        is_seized |= opens(request) is not None
        return seized(request) if is_seized else genuine(request)

    link.execute, bench.chip.seized_s = execute, 0.0
    with pytest.raises(ChipFault):
        _killed_with_sessions(bench.chip)
    del link.execute
    assert bench.journal.exists(), "an outstanding command is written down"
    link.resume = seized  # as long as nobody has asked for the locality again
    bench.another().chip.start()
    del link.resume
    bench.another().chip.start()
    assert link.sessions() == ()


def test_manager_that_ends_because_it_was_seized_leaves_nothing_open(tmp_path: Path):
    """The answer that names the session is lost, and then one to the command that flushes it."""
    link = owned_link()
    theirs = link.firmware.oiap()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    genuine, seizable = link.execute, [Ordinal.OIAP, Ordinal.FLUSH_SPECIFIC]

    def execute(request: bytes) -> bytes:
        response = genuine(request)
        if seizable and request[6:10] == seizable[0].to_bytes(4, "big"):
            seizable.pop(0)
            raise ChipFault("run", TisError(TisFault.SEIZED, 2, "on purpose"))
        return response

    link.execute = execute
    with pytest.raises(ChipFault):
        _open_sessions(bench.chip, 1)
    assert link.sessions() == (theirs.handle,)
    assert not seizable
    bench.another().chip.start()
    assert link.sessions() == (theirs.handle,)


def test_handles_of_before_a_power_cycle_are_not_flushed_in_the_next(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    with pytest.raises(KeyboardInterrupt):
        _killed_with_sessions(bench.chip)
    lost = [handle for _, handle in bench.chip._journal.handles]
    left = bench.journal.read_text()
    boot(link)
    theirs = [link.firmware.oiap().handle for _ in lost]
    # The chip may give the same numbers again; here it does.
    for mine, other in zip(lost, theirs, strict=True):
        left = left.replace(str(mine), str(other))
    bench.journal.write_text(left)
    bench.another().chip.start()
    assert sorted(link.sessions()) == sorted(theirs)
    assert not bench.journal.exists()


@pytest.mark.parametrize("cycle", range(3))
def test_start_leaves_sessions_and_keys_at_their_baseline(tmp_path: Path, cycle: int):
    link = owned_link()
    for _ in range(cycle):
        bench_on(link, tmp_path).chip.start()
    for kind in (ResourceType.AUTH, ResourceType.KEY, ResourceType.TRANS):
        assert link.firmware.handles(kind) == ()


# -- refusals --------------------------------------------------------------------------------------


def test_wrong_secret_is_a_matter_of_configuration_and_leaves_no_session(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path, GEHEIM)
    bench.chip.start()
    with pytest.raises(ChipRefusal) as refused, bench.chip.operation("seal") as tpm:
        tpm.seal(b"x", key_auth=GEHEIM.srk_auth)
    assert refused.value.code == ReturnCode.AUTHFAIL
    assert refused.value.exit_code == ExitCode.CONFIGURATION
    assert "srk_auth=" in refused.value.next_step
    assert GEHEIM.srk_auth.hex() not in str(refused.value)
    assert link.sessions() == ()


def test_session_opened_before_a_refusal_is_flushed(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    with pytest.raises(ChipRefusal):
        _refused_with_sessions(bench.chip)
    assert link.sessions() == ()


def _refused_with_sessions(chip) -> None:
    with chip.operation("seal") as tpm:
        tpm.oiap()
        raise TpmError(ReturnCode.RESOURCES)


@pytest.mark.parametrize("garbage", [b"", bytes(9), bytes(10), b"\xff" * 60])
def test_garbage_from_the_chip_is_one_failure(tmp_path: Path, garbage: bytes):
    link = owned_link()
    link.execute = lambda _request: garbage
    with pytest.raises(Failure):
        bench_on(link, tmp_path).chip.start()


def _lost_with_a_session(chip: Chip, link: EngineLink) -> None:
    with chip.operation("read") as tpm:
        tpm.oiap()
        link.is_gone = True
        tpm.get_random(1)


def test_session_of_an_operation_that_lost_the_chip_is_flushed_by_the_next(tmp_path: Path):
    """The manager lives on, so no next one finds what this one has noted."""
    link = owned_link()
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    for _ in range(3):
        with pytest.raises(Failure, match="gone"):
            _lost_with_a_session(bench.chip, link)
        with pytest.raises(Failure, match="gone"):
            _open_sessions(bench.chip, 1)
        assert len(bench.chip._journal.read().handles) == 1
        link.is_gone = False
        with bench.chip.operation("read") as tpm:
            tpm.get_random(1)
        assert link.sessions() == ()


def test_list_of_handles_that_is_none_is_a_failure(tmp_path: Path):
    """GetCapability is answered well, and what it tells is too short for what it says."""
    link = owned_link()
    chip = bench_on(link, tmp_path).chip
    link.execute = lambda _request: bytes.fromhex("00c4 00000010 00000000 00000002 0005")
    with pytest.raises(Failure, match="not to be trusted"), chip.operation("count") as tpm:
        tpm.handles(ResourceType.COUNTER)


def test_all_session_slots_taken_by_others_is_told(tmp_path: Path):
    link = owned_link()
    while True:
        try:
            link.firmware.oiap()
        except TpmError:
            break
    bench = bench_on(link, tmp_path)
    bench.chip.start()
    with pytest.raises(ChipRefusal) as refused, bench.chip.operation("seal") as tpm:
        tpm.seal(b"x")
    assert refused.value.exit_code == ExitCode.UNAVAILABLE
    assert isinstance(link.firmware, TpmClient)


def test_owner_who_was_quicker_is_accepted(tmp_path: Path):
    """What counts is whether our storage secret opens the chip; sealing will show."""
    link = EngineLink()
    link.power_on()
    link.firmware.create_endorsement_key_pair()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        if request[6:10] == int(Ordinal.TAKE_OWNERSHIP).to_bytes(4, "big"):
            link.firmware.take_ownership()
        return genuine(request)

    link.execute = execute
    bench_on(link, tmp_path).chip.start()
    assert link.sessions() == ()


def test_command_that_was_changed_on_its_way_is_no_wrong_secret_where_there_is_none_yet(
    tmp_path: Path,
):
    link = EngineLink()
    link.power_on()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        if request[6:10] == int(Ordinal.TAKE_OWNERSHIP).to_bytes(4, "big"):
            request = request[:-1] + bytes([request[-1] ^ 1])
        return genuine(request)

    link.execute = execute
    with pytest.raises(ChipRefusal) as refused:
        bench_on(link, tmp_path).chip.start()
    assert refused.value.code == ReturnCode.AUTHFAIL
    assert refused.value.exit_code == ExitCode.UNAVAILABLE
    link.execute = genuine
    bench_on(link, tmp_path).chip.start()
    assert link.sessions() == ()


def test_chip_that_takes_no_owner_is_a_failure_that_says_so(tmp_path: Path):
    link = EngineLink()
    link.power_on()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        if request[6:10] == int(Ordinal.READ_PUBEK).to_bytes(4, "big"):
            return bytes.fromhex("00c40000000a00000007")
        return genuine(request)

    link.execute = execute
    with pytest.raises(ChipRefusal) as refused:
        bench_on(link, tmp_path).chip.start()
    assert refused.value.code == ReturnCode.DISABLED
    assert "Enable" in refused.value.next_step


def test_version_that_is_none_is_refused(tmp_path: Path):
    link = owned_link()
    genuine = link.execute

    def execute(request: bytes) -> bytes:
        if request[10:14] == int(CapabilityArea.VERSION_VAL).to_bytes(4, "big"):
            return bytes.fromhex("00c40000001000000000") + bytes.fromhex("00000002ffff")
        return genuine(request)

    link.execute = execute
    with pytest.raises(Failure, match="cannot use the hardware TPM"):
        bench_on(link, tmp_path).chip.start()


EXTEND = bytes.fromhex("00c100000022000000140000000c") + b"m" * 20


def test_secrets_are_not_shown():
    assert GEHEIM.srk_auth.hex() not in repr(GEHEIM)
    assert "01" not in repr(GEHEIM)


class StepsAtTheChip:
    """What is remembered of a command, and what the chip holds at that moment."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self.seen: list[tuple[str, int, bool]] = []

    def begin(self) -> None:
        self._note("begun")

    def answer(self, response: bytes) -> None:
        assert response == self._link._response
        self._note("answered")

    def _note(self, what: str) -> None:
        self.seen.append((what, len(self._link.asked), self._link._response is not None))


def test_command_that_must_not_run_twice_is_remembered_while_the_chip_knows_it(tmp_path: Path):
    link = owned_link()
    bench = bench_on(link, tmp_path)
    link.execute(EXTEND)  # of an earlier process, and not finished
    steps, asked, given_up = StepsAtTheChip(link), len(link.asked), link.let_go_count
    response = bench.chip.run_once(EXTEND, steps)
    assert response[:10] == bytes.fromhex("00c40000001e00000000")
    assert steps.seen == [("begun", asked, False), ("answered", asked + 1, True)]
    assert link._response is None
    assert link.let_go_count == given_up + 1


def test_next_manager_is_told_what_became_of_a_command(tmp_path: Path):
    link = owned_link()
    response = link.execute(EXTEND)
    bench = bench_on(link, tmp_path)
    assert bench.chip.recollect(EXTEND) == response
    bench.chip.start()
    assert bench.chip.recollect(EXTEND) is None, "the chip forgets with the next command"


def write_authorized(bench: ChipBench, secret: bytes = bytes(20), data: bytes = b"x") -> None:
    bench.chip.authorized(
        "write", Ordinal.NV_WRITE_VALUE_AUTH, secret, nv_index=5, offset=0, data=data
    )


@pytest.fixture
def with_area(tmp_path: Path) -> ChipBench:
    bench = bench_on(owned_link(), tmp_path)
    bench.chip.start()
    bench.link.firmware.nv_define_space(5, 1, NvAttribute.AUTHWRITE)
    return bench


def test_session_of_authorized_commands_is_opened_once_and_written_down(with_area: ChipBench):
    link = with_area.link
    write_authorized(with_area)
    (session,) = link.sessions()
    before = len(link.asked)
    write_authorized(with_area, data=b"y")
    assert len(link.asked) == before + 1
    assert link.sessions() == (session,)
    assert link.engine.state.permanent.nv[5].data == b"y"
    # Killed now: the next manager flushes it.
    with_area.another().chip.start()
    assert link.sessions() == ()


def test_refused_authorized_command_leaves_no_session_and_the_next_one_works(with_area: ChipBench):
    write_authorized(with_area)
    with pytest.raises(ChipRefusal) as refused:
        write_authorized(with_area, secret=b"\1" * 20)
    assert refused.value.code == ReturnCode.AUTHFAIL
    assert with_area.link.sessions() == ()
    write_authorized(with_area)
    assert len(with_area.link.sessions()) == 1
    with_area.chip.close()
    with_area.chip.close()
    assert with_area.link.sessions() == ()


def test_session_is_given_up_when_the_chip_does_not_answer(with_area: ChipBench):
    write_authorized(with_area)
    with_area.link.is_gone = True
    with pytest.raises(Failure, match="gone"):
        write_authorized(with_area)
    with_area.link.is_gone = False
    write_authorized(with_area)
    write_authorized(with_area)
    assert len(with_area.link.sessions()) == 1


@pytest.mark.parametrize("has_run", [True, False])
@pytest.mark.parametrize("nth", [1, 2])
def test_authorized_command_that_was_seized_is_begun_anew(
    with_area: ChipBench, nth: int, *, has_run: bool
):
    """Another locality seizes the TPM in the middle of the session's start, or of the command."""
    link = with_area.link
    genuine, asked = link.execute, []

    def execute(request: bytes) -> bytes:
        if request[6:10] == bytes.fromhex("00000065"):  # a look at what is open
            return genuine(request)
        asked.append(request)
        if len(asked) != nth:
            return genuine(request)
        if has_run:
            genuine(request)
        raise ChipFault("run", TisError(TisFault.SEIZED, 2, "on purpose"))

    link.execute = execute
    theirs = link.firmware.oiap().handle
    write_authorized(with_area, data=b"z")
    assert link.engine.state.permanent.nv[5].data == b"z"
    # The session that was in use is flushed, and the one whose start had run.
    assert len(asked) == {1: 3 + has_run, 2: 5}[nth]
    assert len(link.sessions()) == 2
    assert theirs in link.sessions()


def test_seizures_in_quick_succession_are_outlasted(with_area: ChipBench):
    """They come twice as often as a number of tries would allow; what counts is for how long."""
    link = with_area.link
    genuine, seizures = link.execute, 20

    def execute(request: bytes) -> bytes:
        nonlocal seizures
        response = genuine(request)
        if opens(request) is None or not seizures:
            return response
        seizures -= 1
        raise ChipFault("run", TisError(TisFault.SEIZED, 2, "on purpose"))

    link.execute = execute
    write_authorized(with_area, data=b"z")
    assert not seizures
    assert len(link.sessions()) == 1


def test_authorized_command_that_is_seized_for_ever_fails(with_area: ChipBench):
    with_area.chip.seized_s = 0.1

    def execute(_request: bytes) -> bytes:
        raise ChipFault("run", TisError(TisFault.SEIZED, 2, "on purpose"))

    with_area.link.execute = execute
    with pytest.raises(ChipFault):
        write_authorized(with_area)
