"""The firmware and the dynamic launch, against a chip in memory."""

import hashlib
import struct

import pytest

from daemons.errors import Failure
from daemons.launcher.event_log import EventType, replay
from daemons.launcher.firmware import Firmware, FirmwareFailure, PlatformParts
from daemons.launcher.measuring import measure_bytes
from daemons.places import Places
from protocol.constants import Ordinal
from protocol.return_codes import ReturnCode

ONES = b"\xff" * 20


def sha1(data):
    return hashlib.sha1(data).digest()


class FakeChip:
    """As much of a TPM 1.2 as firmware sees, with its rules about localities.

    `answers` overrides the return code of an ordinal; every request is kept in `requests`.
    """

    def __init__(self):
        self.answers = {}
        self.requests = []
        self.presence = []
        self.power_on()

    def power_on(self):
        self.is_started = False
        self.pcrs = {pcr: ONES if 17 <= pcr <= 22 else bytes(20) for pcr in range(24)}

    def exchange(self, request, locality):
        tag, size, ordinal = struct.unpack_from(">HII", request)
        assert (tag, size) == (0x00C1, len(request))
        self.requests.append((Ordinal(ordinal), locality))
        code, body = self._run(ordinal, request[10:], locality)
        code = self.answers.get(ordinal, code)
        body = b"" if code else body
        return struct.pack(">HII", 0x00C4, 10 + len(body), code) + body

    def _run(self, ordinal, parameters, locality):
        if ordinal == Ordinal.STARTUP:
            if self.is_started:
                return ReturnCode.INVALID_POSTINIT, b""
            assert parameters == b"\x00\x01"
            self.is_started = True
        elif not self.is_started:
            return ReturnCode.INVALID_POSTINIT, b""
        elif ordinal == Ordinal.EXTEND:
            pcr, digest = struct.unpack(">I20s", parameters)
            if pcr >= 17 and locality != 2:
                return ReturnCode.BAD_LOCALITY, b""
            self.pcrs[pcr] = sha1(self.pcrs[pcr] + digest)
            return 0, self.pcrs[pcr]
        elif ordinal == Ordinal.PCR_READ:
            return 0, self.pcrs[struct.unpack(">I", parameters)[0]]
        elif ordinal == Ordinal.TSC_PHYSICAL_PRESENCE:
            self.presence.append(struct.unpack(">H", parameters)[0])
        else:
            assert ordinal == Ordinal.SELF_TEST_FULL
        return 0, b""

    def hash_sequence(self, data):
        assert self.is_started
        self.requests.append(("hash", 4))
        self.pcrs.update(dict.fromkeys(range(17, 23), bytes(20)))
        self.pcrs[17] = sha1(self.pcrs[17] + sha1(data))


def parts(**changed):
    names = ("firmware", "settings", "runtime", "launcher", "policy")
    contents = {name: changed.get(name, name.encode()) for name in names}
    return PlatformParts(
        **{name: measure_bytes(name, {"file": content}) for name, content in contents.items()}
    )


PROGRAM = measure_bytes("program vtpmmgrd", {"a.py": b"pass"})
CHANGED_PROGRAM = measure_bytes("program vtpmmgrd", {"a.py": b"steal()"})
CONFIG = measure_bytes("manager configuration", {"domain.cfg": b"name='m'"})


@pytest.fixture
def chip():
    return FakeChip()


@pytest.fixture
def firmware(chip):
    return Firmware(chip)


@pytest.fixture
def powered(firmware):
    firmware.power_on(parts())
    return firmware


@pytest.mark.usefixtures("powered")
def test_power_on_starts_up_and_tests_before_it_measures(chip):
    ordinals = [ordinal for ordinal, _ in chip.requests]
    assert ordinals[:3] == [
        Ordinal.STARTUP,
        Ordinal.SELF_TEST_FULL,
        Ordinal.TSC_PHYSICAL_PRESENCE,
    ]
    assert ordinals[3] == Ordinal.EXTEND


def test_power_on_log_replays_to_what_the_chip_holds(chip, powered):
    assert replay(powered.events) == chip.pcrs
    assert powered.read_pcrs() == chip.pcrs
    assert all(event.is_consistent for event in powered.events)


def test_power_on_every_platform_pcr_has_its_separator_once(powered):
    separators = [e.pcr_index for e in powered.events if e.event_type == EventType.SEPARATOR]
    assert separators == list(range(8))


def test_power_on_events_before_and_after_the_separators(powered):
    listed = [(e.pcr_index, e.event_type) for e in powered.events if e.event_type != 4]
    assert listed == [
        (0, EventType.S_CRTM_VERSION),
        (0, EventType.POST_CODE),
        (1, EventType.PLATFORM_CONFIG_FLAGS),
        (2, EventType.NONHOST_CODE),
        (4, EventType.ACTION),
        (4, EventType.IPL),
        (5, EventType.IPL_PARTITION_DATA),
        (17, EventType.HASH_START),
    ]


@pytest.mark.parametrize(
    ("changed", "pcrs"),
    [
        ("firmware", {0}),
        ("settings", {1}),
        ("runtime", {2}),
        ("launcher", {4, 17}),
        ("policy", {5, 17}),
    ],
)
@pytest.mark.usefixtures("powered")
def test_power_on_changed_part_changes_just_its_pcrs(chip, changed, pcrs):
    other = FakeChip()
    Firmware(other).power_on(parts(**{changed: b"changed"}))
    assert {pcr for pcr in range(24) if other.pcrs[pcr] != chip.pcrs[pcr]} == pcrs


@pytest.mark.usefixtures("powered")
def test_power_on_presence_commands_are_enabled_then_locked_without_presence(chip):
    assert chip.presence == [0x0020, 0x0014]
    last = [ordinal for ordinal, _ in chip.requests].index(Ordinal.TSC_PHYSICAL_PRESENCE, 3)
    assert Ordinal.EXTEND in [ordinal for ordinal, _ in chip.requests[:last]]
    assert ("hash", 4) in chip.requests[last:]  # locked before anything else runs


def test_power_on_chip_whose_presence_is_locked_for_life_is_left_so(chip, firmware):
    chip.answers[Ordinal.TSC_PHYSICAL_PRESENCE] = ReturnCode.BAD_PARAMETER
    firmware.power_on(parts())


@pytest.mark.parametrize(
    "ordinal",
    [
        Ordinal.STARTUP,
        Ordinal.SELF_TEST_FULL,
        Ordinal.TSC_PHYSICAL_PRESENCE,
        Ordinal.EXTEND,
        Ordinal.PCR_READ,
    ],
)
def test_power_on_refused_step_is_a_failure_that_names_step_and_code(chip, firmware, ordinal):
    chip.answers[ordinal] = ReturnCode.FAILEDSELFTEST
    with pytest.raises(FirmwareFailure, match="TPM_FAILEDSELFTEST") as caught:
        firmware.power_on(parts())
    assert "the hardware TPM did not" in caught.value.what
    assert replay(firmware.events) == chip.pcrs or ordinal == Ordinal.EXTEND


@pytest.mark.usefixtures("powered")
def test_power_on_without_a_power_cycle_is_refused(chip):
    with pytest.raises(FirmwareFailure, match="has not lost power"):
        Firmware(chip).power_on(parts())


def test_power_on_pcrs_that_are_not_fresh_are_noticed(chip, firmware):
    chip.pcrs[0] = b"x" * 20
    with pytest.raises(FirmwareFailure, match="does not explain"):
        firmware.power_on(parts())


def test_power_on_hash_sequence_that_did_not_run_is_noticed(chip, firmware):
    chip.hash_sequence = lambda _data: None
    with pytest.raises(FirmwareFailure, match="PCR 17"):
        firmware.power_on(parts())


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"\x00\xc4",
        struct.pack(">HII", 0x00C4, 11, 0),
        struct.pack(">HII", 0x00C5, 10, 0),
        struct.pack(">HII", 0x00C4, 10, 0x12345678),
    ],
)
def test_power_on_malformed_or_odd_response_is_a_failure(chip, firmware, response):
    chip.exchange = lambda _request, _locality: response
    with pytest.raises(FirmwareFailure):
        firmware.power_on(parts())


def test_power_on_answer_without_a_digest_is_a_failure(chip, firmware):
    chip.exchange = lambda _request, _locality: struct.pack(">HII", 0x00C4, 10, 0)
    with pytest.raises(FirmwareFailure, match="not a digest"):
        firmware.power_on(parts())


def test_power_on_again_after_a_power_cycle_gives_the_same_values(chip, powered):
    before = dict(chip.pcrs)
    chip.power_on()
    powered.power_on(parts())
    assert chip.pcrs == before
    assert replay(powered.events) == before


def test_launch_manager_extends_18_and_19_at_locality_2(chip, powered):
    chip.requests.clear()
    assert powered.launch_manager(PROGRAM, CONFIG)
    looked = [(Ordinal.PCR_READ, 2), (Ordinal.PCR_READ, 2)]
    assert chip.requests == [*looked, (Ordinal.EXTEND, 2), (Ordinal.EXTEND, 2)]
    assert chip.pcrs[18] == sha1(bytes(20) + PROGRAM.sha1)
    assert chip.pcrs[19] == sha1(bytes(20) + CONFIG.sha1)
    assert replay(powered.events) == chip.pcrs


def test_launch_manager_the_same_one_again_changes_nothing(chip, powered):
    powered.launch_manager(PROGRAM, CONFIG)
    before, events = dict(chip.pcrs), powered.events
    assert not Firmware(chip, events).launch_manager(PROGRAM, CONFIG)  # a new launcher, too
    assert chip.pcrs == before


@pytest.mark.parametrize(
    ("program", "config", "changed"),
    [
        (CHANGED_PROGRAM, CONFIG, {18}),
        (PROGRAM, measure_bytes("manager configuration", {"domain.cfg": b"other"}), {19}),
    ],
)
def test_launch_manager_another_one_has_other_values_and_the_old_one_its_old(
    chip, powered, program, config, changed
):
    powered.launch_manager(PROGRAM, CONFIG)
    before = dict(chip.pcrs)
    assert powered.launch_manager(program, config)
    assert {pcr for pcr in range(24) if chip.pcrs[pcr] != before[pcr]} == changed
    assert powered.launch_manager(PROGRAM, CONFIG)
    assert chip.pcrs == before
    assert replay(powered.events) == chip.pcrs


@pytest.mark.parametrize("nth", range(3))
def test_launch_of_another_manager_that_was_cut_off_is_noticed_by_who_goes_on(chip, powered, nth):
    """Killed in the hash sequence or at an extend, with the old log on disk, or what was kept."""
    powered.launch_manager(PROGRAM, CONFIG)
    right, kept = dict(chip.pcrs), [powered.events]

    def killed(*_):
        raise KeyboardInterrupt

    def keep(events):
        kept.append(tuple(events))

    sequence, exchange, left = chip.hash_sequence, chip.exchange, [nth]

    def hash_sequence(data):
        sequence(data)
        if nth == 0:
            killed()

    def extend(request, locality):
        answer = exchange(request, locality)
        if request[6:10] == Ordinal.EXTEND.to_bytes(4, "big"):
            left[0] -= 1
            if left[0] == 0:
                killed()
        return answer

    chip.hash_sequence, chip.exchange = hash_sequence, extend
    with pytest.raises(KeyboardInterrupt):
        powered.launch_manager(CHANGED_PROGRAM, CONFIG, keep)
    assert chip.pcrs != right
    chip.hash_sequence, chip.exchange = sequence, exchange
    assert Firmware(chip, kept[-1]).launch_manager(PROGRAM, CONFIG)
    assert {pcr: chip.pcrs[pcr] for pcr in (17, 18, 19)} == {p: right[p] for p in (17, 18, 19)}


def test_launch_manager_after_one_that_failed_halfway_starts_over(chip, powered):
    extend = chip.exchange
    done = []

    def fails_at_the_second(request, locality):
        done.append(request)
        if len(done) == 2:
            return struct.pack(">HII", 0x00C4, 10, ReturnCode.FAIL)
        return extend(request, locality)

    chip.exchange = fails_at_the_second
    with pytest.raises(FirmwareFailure, match="PCR 19"):
        powered.launch_manager(PROGRAM, CONFIG)
    assert replay(powered.events) == chip.pcrs
    powered.launch_manager(PROGRAM, CONFIG)
    assert chip.pcrs[18] == sha1(bytes(20) + PROGRAM.sha1)
    assert chip.pcrs[19] == sha1(bytes(20) + CONFIG.sha1)


@pytest.mark.parametrize("nth", [1, 2])
def test_launch_manager_after_an_extend_in_doubt_starts_over(chip, powered, nth):
    """It was done, and nobody heard of it: the locality was seized, or the launcher killed."""
    exchange = chip.exchange
    extends = []

    def seized_at_the_nth(request, locality):
        answer = exchange(request, locality)
        if request[6:10] == Ordinal.EXTEND.to_bytes(4, "big"):
            extends.append(request)
            if len(extends) == nth:
                raise Failure("seized", why="a higher locality", next_step="")
        return answer

    chip.exchange = seized_at_the_nth
    with pytest.raises(Failure, match="seized"):
        powered.launch_manager(PROGRAM, CONFIG)
    assert replay(powered.events) != chip.pcrs
    assert powered.launch_manager(PROGRAM, CONFIG)
    assert replay(powered.events) == chip.pcrs
    assert chip.pcrs[18] == sha1(bytes(20) + PROGRAM.sha1)
    assert chip.pcrs[19] == sha1(bytes(20) + CONFIG.sha1)


def test_launch_manager_without_power_on_is_refused(firmware):
    with pytest.raises(FirmwareFailure, match="no dynamic launch"):
        firmware.launch_manager(PROGRAM, CONFIG)


def test_places_of_the_log_is_in_the_run_directory(tmp_path):
    assert Places(tmp_path).event_log.parent == Places(tmp_path).run
