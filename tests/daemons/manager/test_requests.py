"""Requests of vTPMs, byte for byte: who gets what, and which code says no."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import ExitCode, Failure
from daemons.manager.admission import Client
from daemons.manager.requests import UUIDS_PER_LIST, OnceOnly, Requests
from daemons.manager.vault_format import Full, NotStored, Record
from protocol import manager_messages as messages
from protocol.manager_messages import ManagerOrdinal
from protocol.return_codes import ReturnCode, TpmError

UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
UUID_2 = UUID("6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f")
SHORT_BLOB = bytes(range(52))
LONG_BLOB = bytes(range(100, 164))
BOOT_HASH = b"\xb0" * 20


class RecordsInMemory:
    """A vault without a disk that can be told to fail."""

    def __init__(self) -> None:
        self.kept: dict[UUID, Record] = {}
        self.saves = 0
        self.failure: Failure | None = None

    def load(self, uuid: UUID) -> Record | None:
        self._fail()
        return self.kept.get(uuid)

    def save(self, record: Record) -> None:
        self._fail()
        self.saves += 1
        self.kept[UUID(bytes=record.uuid)] = record

    def delete(self, uuid: UUID) -> None:
        self._fail()
        self.kept.pop(uuid, None)

    def __contains__(self, uuid: UUID) -> bool:
        return uuid in self.kept

    def __iter__(self) -> Iterator[UUID]:
        return iter(self.kept)

    def _fail(self) -> None:
        if self.failure is not None:
            raise self.failure


class RecordedChip:
    """A chip that answers one thing and keeps what it was asked."""

    answer = bytes.fromhex("00c40000000e00000000") + b"RAND"

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.is_gone = False

    def exchange(self, request: bytes) -> bytes:
        self.asked.append(request)
        if self.is_gone:
            raise Failure("x", why="y", next_step="z", exit_code=ExitCode.UNAVAILABLE)
        return self.answer

    def run_once(self, request: bytes, once: OnceOnly) -> bytes:
        once.begin()
        response = self.exchange(request)
        once.answer(response)
        return response


class Steps:
    """Keeps what is said about a request that must not be carried out twice."""

    def __init__(self, records: RecordsInMemory) -> None:
        self._records = records
        self.seen: list[str] = []

    def begin(self) -> None:
        self.seen.append(f"begun with {len(self._records.kept)} records")

    def answer(self, response: bytes) -> None:
        self.seen.append(f"answered {response[:10].hex()}")


class Bench:
    """A manager with everything around it in memory."""

    def __init__(self) -> None:
        self.records = RecordsInMemory()
        self.chip = RecordedChip()
        self.reported: list[Failure] = []
        self.attached: set[UUID] = set()
        self.requests = Requests(
            self.records,
            self.chip,
            self.reported.append,
            self.attached.__contains__,
            self._recover,
        )
        self.recoveries = 0
        self.steps = Steps(self.records)

    def _recover(self) -> None:
        self.recoveries += 1

    def send(self, client: Client, request: str | bytes) -> str:
        data = bytes.fromhex(request) if isinstance(request, str) else request
        return self.requests.execute(client, data, self.steps).hex()

    def save(self, client: Client, blob: bytes = SHORT_BLOB) -> None:
        request = messages.request(
            ManagerOrdinal.SAVEHASHKEY, messages.SaveHashKeyIn(hash_key=blob)
        )
        messages.results(messages.Nothing, self.requests.execute(client, request, self.steps))

    def load(self, client: Client) -> bytes:
        request = messages.request(ManagerOrdinal.LOADHASHKEY)
        answer = self.requests.execute(client, request, self.steps)
        return messages.results(messages.LoadHashKeyOut, answer).hash_key


@pytest.fixture
def bench() -> Bench:
    return Bench()


GUEST_1 = Client(connection_id=1, domain="vtpm-guest1", uuid=UUID_1, boot_hash=BOOT_HASH)
GUEST_2 = Client(connection_id=2, domain="vtpm-guest2", uuid=UUID_2)
IMPOSTOR = Client(connection_id=3, domain="vtpm-evil", uuid=UUID_1)
ADMIN = Client(connection_id=4, domain="vtpm-dom0", uuid=UUID(int=0xD0), is_administrator=True)

LOAD = "01c1 0000000a 00000002"
REFUSED_7 = "01c40000000a00000007"
UNKNOWN = "01c40000000a00000003"
DONE = "01c40000000a00000000"


# -- SaveHashKey, LoadHashKey ----------------------------------------------------------------------


def test_first_save_creates_the_vtpm_and_load_gives_it_back(bench: Bench):
    assert bench.send(GUEST_1, LOAD) == UNKNOWN
    assert bench.send(GUEST_1, "01c10000003e00000001" + SHORT_BLOB.hex()) == DONE
    assert bench.send(GUEST_1, LOAD) == "01c40000003e00000000" + SHORT_BLOB.hex()
    assert bench.records.kept[UUID_1].hash_key == SHORT_BLOB + bytes(12)


def test_64_bytes_come_back_as_64(bench: Bench):
    assert bench.send(GUEST_1, "01c10000004a00000001" + LONG_BLOB.hex()) == DONE
    assert bench.send(GUEST_1, LOAD) == "01c40000004a00000000" + LONG_BLOB.hex()


def test_length_between_is_filled_up_to_64(bench: Bench):
    bench.save(GUEST_1, b"\x01" * 53)
    assert bench.load(GUEST_1) == (b"\x01" * 53).ljust(64, b"\0")


@pytest.mark.parametrize("length", [0, 1, 20, 51, 65, 4078])
def test_blob_of_another_length_is_refused_and_nothing_is_taken(bench: Bench, length: int):
    request = messages.packet(0x01C1, 1, bytes(length))
    assert bench.send(GUEST_1, request) == UNKNOWN
    assert not bench.records.kept
    assert not bench.requests.holds(GUEST_1)


def test_load_ignores_extra_bytes(bench: Bench):
    bench.save(GUEST_1)
    assert bench.send(GUEST_1, "01c10000000c00000002ffff")[12:20] == "00000000"


def test_each_client_has_its_own_record(bench: Bench):
    bench.save(GUEST_1, SHORT_BLOB)
    bench.save(GUEST_2, LONG_BLOB)
    assert bench.load(GUEST_1) == SHORT_BLOB
    assert bench.load(GUEST_2) == LONG_BLOB


def test_repeated_save_writes_once(bench: Bench):
    bench.save(GUEST_1)
    bench.save(GUEST_1)
    assert bench.records.saves == 1
    bench.save(GUEST_1, LONG_BLOB)
    assert bench.records.saves == 2


def test_save_keeps_what_administration_set(bench: Bench):
    bench.records.kept[UUID_1] = Record(uuid=UUID_1.bytes, flags=2, group=9, hash_key=bytes(64))
    bench.save(GUEST_1, LONG_BLOB)
    assert bench.records.kept[UUID_1] == Record(
        uuid=UUID_1.bytes, flags=2, group=9, hash_key=LONG_BLOB
    )


# -- one holder ------------------------------------------------------------------------------------


def test_second_domain_with_the_same_uuid_is_refused_every_time(bench: Bench):
    """Xen remembered the refused vTPM as attached, so that asking again succeeded."""
    bench.save(GUEST_1)
    for _ in range(3):
        assert bench.send(IMPOSTOR, LOAD) == REFUSED_7
        assert bench.send(IMPOSTOR, "01c10000003e00000001" + bytes(52).hex()) == REFUSED_7
    assert bench.load(GUEST_1) == SHORT_BLOB
    assert bench.requests.holder_of(UUID_1) == GUEST_1


def test_uuid_that_is_not_known_yet_has_one_holder_too(bench: Bench):
    assert bench.send(GUEST_1, LOAD) == UNKNOWN
    assert bench.send(IMPOSTOR, LOAD) == REFUSED_7
    assert bench.send(IMPOSTOR, "01c10000003e00000001" + bytes(52).hex()) == REFUSED_7
    assert not bench.records.kept


def test_holder_that_left_makes_room(bench: Bench):
    bench.save(GUEST_1)
    bench.requests.disconnected(GUEST_1)
    assert bench.load(IMPOSTOR) == SHORT_BLOB


def test_refused_connection_that_ends_does_not_free_the_vtpm(bench: Bench):
    """Xen cleared the mark for any connection that pointed at the vTPM."""
    bench.save(GUEST_1)
    bench.send(IMPOSTOR, LOAD)
    bench.requests.disconnected(IMPOSTOR)
    assert bench.send(IMPOSTOR, LOAD) == REFUSED_7


def test_newer_connection_of_the_domain_takes_over_and_the_older_is_out(bench: Bench):
    bench.save(GUEST_1)
    newer = replace(GUEST_1, connection_id=17)
    assert bench.load(newer) == SHORT_BLOB
    assert bench.send(GUEST_1, LOAD) == REFUSED_7
    bench.requests.disconnected(GUEST_1)
    assert bench.requests.holds(newer)
    bench.save(newer, LONG_BLOB)
    bench.requests.disconnected(newer)
    assert bench.requests.holder_of(UUID_1) is None


# -- when the store fails --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (Full("i", "w"), ReturnCode.NOSPACE),
        (NotStored("i", "w"), ReturnCode.IOERROR),
        (Failure("i", why="w", next_step="n"), ReturnCode.IOERROR),
    ],
)
def test_failing_store_has_its_own_code(bench: Bench, failure: Failure, code: ReturnCode):
    bench.records.failure = failure
    for attempt in (bench.save, bench.load):
        with pytest.raises(TpmError) as refused:
            attempt(GUEST_1)
        assert refused.value.code == code
    assert bench.reported == [failure, failure]
    bench.records.failure = None
    bench.save(GUEST_1)


def test_recovery_is_told_when_the_same_is_done_again_and_well(bench: Bench):
    bench.records.failure = NotStored("i", "w")
    for _ in range(2):
        with pytest.raises(TpmError):
            bench.save(GUEST_1)
    bench.records.failure = None
    bench.send(GUEST_1, LOAD)
    assert bench.recoveries == 0, "whether a save works is not known yet"
    bench.save(GUEST_1)
    bench.save(GUEST_1, b"another blob of some length".ljust(len(SHORT_BLOB), b"."))
    assert bench.recoveries == 1


def test_bad_parameter_to_load_means_unknown_and_nothing_else(bench: Bench):
    """A vTPM starts fresh on this answer alone; whatever else goes wrong must read differently."""
    bench.save(GUEST_2)
    bench.records.failure = NotStored("i", "w")
    answers = [bench.send(GUEST_2, LOAD), bench.send(IMPOSTOR, "01c1 0000000b 00000002")]
    bench.records.failure = None
    bench.save(GUEST_1)
    answers += [bench.send(IMPOSTOR, LOAD), bench.send(GUEST_1, "01c100000009 00000002 ")]
    assert UNKNOWN not in answers


# -- GetBootHash, GetQuote -------------------------------------------------------------------------


def test_boot_hash_is_the_launchers_word(bench: Bench):
    assert bench.send(GUEST_1, "01c10000000a00000003") == "01c40000001e00000000" + BOOT_HASH.hex()
    assert bench.send(GUEST_2, "01c10000000a00000003") == "01c40000001e00000000" + "00" * 20
    assert bench.send(GUEST_1, "01c10000000b0000000300") == UNKNOWN


@pytest.mark.parametrize("ordinal", ["00000000", "00000004", "00000005", "02000101", "ffffffff"])
def test_ordinals_that_are_not_there(bench: Bench, ordinal: str):
    assert bench.send(GUEST_1, "01c10000000a" + ordinal) == "01c40000000a0000000a"


# -- commands for the chip -------------------------------------------------------------------------


def test_random_and_pcr_read_pass_unchanged(bench: Bench):
    for request in ("00c10000000e0000004600000014", "00c10000000e0000001500000011"):
        assert bench.send(GUEST_1, request) == bench.chip.answer.hex()
        assert bench.chip.asked[-1].hex() == request


@pytest.mark.parametrize("length", [10, 11, 13, 15, 34])
def test_random_of_another_length_is_refused(bench: Bench, length: int):
    request = messages.packet(0x00C1, 0x46, bytes(length - 10))
    assert bench.send(GUEST_1, request) == "00c40000000a00000003"
    assert not bench.chip.asked


@pytest.mark.parametrize("number", [0, 1, 65535, 65536, 0xFFFFFFFF])
def test_any_number_of_random_bytes_is_the_chips_to_judge(bench: Bench, number: int):
    request = messages.packet(0x00C1, 0x46, number.to_bytes(4, "big"))
    bench.send(GUEST_1, request)
    assert bench.chip.asked == [request]


@pytest.mark.parametrize("ordinal", ["0000000a", "00000016", "00000018", "0000005d", "20000016"])
@pytest.mark.parametrize(("tag", "answer_tag"), [("00c1", "00c4"), ("00c2", "00c5")])
def test_other_commands_do_not_reach_the_chip(
    bench: Bench, ordinal: str, tag: str, answer_tag: str
):
    answer = bench.send(GUEST_1, tag + "0000000e" + ordinal + "00000000")
    assert answer == answer_tag + "0000000a00000008"
    assert not bench.chip.asked


@pytest.mark.parametrize(("tag", "answer_tag"), [("00c2", "00c5"), ("00c3", "00c6")])
def test_sessions_of_the_manager_cannot_be_named(bench: Bench, tag: str, answer_tag: str):
    answer = bench.send(GUEST_1, tag + "0000000e0000004600000014")
    assert answer == answer_tag + "0000000a0000001e"
    assert not bench.chip.asked


EXTEND = "00c1000000220000001400000011" + "ab" * 20
NAMESAKE = replace(ADMIN, connection_id=9, domain="vtpm-evil", is_administrator=False)


def test_extend_is_for_administrators_that_hold_their_vtpm(bench: Bench):
    assert bench.send(GUEST_1, EXTEND) == "00c40000000a00000008"
    bench.save(NAMESAKE)
    assert bench.send(ADMIN, EXTEND) == "00c40000000a00000008"
    assert not bench.chip.asked
    bench.requests.disconnected(NAMESAKE)
    assert bench.send(ADMIN, EXTEND) == bench.chip.answer.hex()
    assert bench.send(NAMESAKE, LOAD) == REFUSED_7, "the administrator has it now"


def test_extend_of_the_chip_is_remembered_around_its_run(bench: Bench):
    bench.send(GUEST_1, EXTEND)
    assert bench.steps.seen == [], "what is refused is not begun"
    bench.send(ADMIN, EXTEND)
    assert bench.steps.seen == ["begun with 0 records", "answered 00c40000000e00000000"]


def test_requests_that_may_be_done_twice_are_not_remembered(bench: Bench):
    bench.save(GUEST_1)
    bench.load(GUEST_1)
    for request in ("00c10000000e0000004600000014", "00c10000000e0000001500000001"):
        assert bench.send(GUEST_1, request) == bench.chip.answer.hex()
    bench.send(ADMIN, "01c20000000a02000101")
    assert bench.steps.seen == []


def test_unreachable_chip_is_an_io_error(bench: Bench):
    bench.chip.is_gone = True
    assert bench.send(GUEST_1, "00c10000000e0000004600000014") == "00c40000000a0000001f"
    bench.chip.is_gone = False
    assert bench.send(GUEST_1, "00c10000000e0000004600000014") == bench.chip.answer.hex()


# -- management ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordinal", [o for o in ManagerOrdinal if o.is_management])
def test_management_is_for_administrators(bench: Bench, ordinal: ManagerOrdinal):
    bench.save(GUEST_1)
    request = messages.request(ordinal)
    assert bench.send(GUEST_1, request) == "01c50000000a00000001"
    bench.save(NAMESAKE)
    assert bench.send(ADMIN, request) == "01c50000000a00000001", "it does not hold its vTPM"


def test_first_vtpm_does_not_become_administrator(bench: Bench):
    bench.save(GUEST_1)
    assert bench.records.kept[UUID_1].flags == 0
    assert bench.send(GUEST_1, "01c20000000a02000101") == "01c50000000a00000001"


def test_one_group_is_listed(bench: Bench):
    bench.save(ADMIN)
    assert bench.send(ADMIN, "01c20000000a02000101") == "01c40000000e0000000000000001"
    assert bench.send(ADMIN, "01c20000000b0200010100") == UNKNOWN


def test_vtpms_are_listed_in_pages_that_fit(bench: Bench):
    bench.save(ADMIN)
    for number in range(1, 300):
        uuid = UUID(int=number << 64)
        bench.records.kept[uuid] = Record(uuid=uuid.bytes, hash_key=bytes(64))
    seen: list[bytes] = []
    while True:
        request = messages.request(
            ManagerOrdinal.VTPM_LIST, messages.VtpmListIn(group=0, offset=len(seen))
        )
        answer = bench.requests.execute(ADMIN, request, bench.steps)
        assert len(answer) <= 4088
        page = messages.results(messages.VtpmListOut, answer)
        assert page.total == 300
        if not page.uuids:
            break
        assert len(page.uuids) <= 16 * UUIDS_PER_LIST
        seen += [page.uuids[at : at + 16] for at in range(0, len(page.uuids), 16)]
    assert seen == [uuid.bytes for uuid in bench.records]


def test_list_of_a_group_that_is_not_there(bench: Bench):
    bench.save(ADMIN)
    assert bench.send(ADMIN, "01c200000012020002010000000100000000") == "01c40000000a00000002"
    assert bench.send(ADMIN, "01c20000000e0200020100000000") == UNKNOWN


def test_vtpm_is_deleted_when_nobody_has_it_open(bench: Bench):
    bench.save(ADMIN)
    bench.save(GUEST_1)
    request = "01c20000001a02000205" + UUID_1.hex
    assert bench.send(ADMIN, request) == "01c40000000a00000009"
    bench.requests.disconnected(GUEST_1)
    assert bench.steps.seen == []
    assert bench.send(ADMIN, request) == DONE
    assert bench.steps.seen == ["begun with 2 records"]
    assert bench.send(ADMIN, request) == "01c40000000a00000009"
    assert bench.steps.seen == ["begun with 2 records"], "there was nothing to delete"
    assert bench.send(GUEST_1, LOAD) == UNKNOWN
    assert bench.send(ADMIN, request[:-2].replace("1a02", "1902")) == UNKNOWN


def test_vtpm_that_a_domain_has_is_not_deleted_before_it_has_asked(bench: Bench):
    """As after a manager was killed: a vTPM that runs on asks for its key no second time."""
    bench.save(ADMIN)
    bench.save(GUEST_1)
    bench.requests.disconnected(GUEST_1)
    bench.attached.add(UUID_1)
    request = "01c20000001a02000205" + UUID_1.hex
    assert bench.send(ADMIN, request) == "01c40000000a00000009"
    assert bench.steps.seen == []
    bench.attached.clear()
    assert bench.send(ADMIN, request) == DONE


@pytest.mark.parametrize(
    "ordinal", ["02000102", "02000106", "02000108", "02000202", "02000204", "02000301", "02ffffff"]
)
def test_management_ordinals_that_are_not_there(bench: Bench, ordinal: str):
    bench.save(ADMIN)
    assert bench.send(ADMIN, "01c20000000a" + ordinal) == "01c50000000a0000000a"


# -- any bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("request_", ["", "01", "01c10000000a000000"])
def test_less_than_a_header(bench: Bench, request_: str):
    assert bench.send(GUEST_1, request_) == "00c40000000a00000003"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        ("0000 0000000a 00000001", "00030000000a0000001e"),
        ("ffff 0000000a 00000001", "00020000000a0000001e"),
        ("01c4 0000000a 00000002", "01c70000000a0000001e"),
        ("00c4 0000000a 00000046", "00c70000000a0000001e"),
        ("01c1 ffffffff 00000002", "01c40000000a00000019"),
        ("01c2 00000009 02000101", "01c50000000a00000019"),
    ],
)
def test_wrong_tags_and_lengths(bench: Bench, request_: str, answer: str):
    assert bench.send(GUEST_1, request_) == answer


@given(
    tag=st.sampled_from([0x01C1, 0x01C2, 0x00C1, 0x00C2, 0x00C3, 0x01C4]),
    ordinal=st.one_of(
        st.sampled_from([int(o) for o in ManagerOrdinal] + [0x14, 0x15, 0x46]),
        st.integers(0, 0xFFFFFFFF),
    ),
    body=st.binary(max_size=120),
    raw=st.one_of(st.none(), st.binary(max_size=80)),
    is_administrator=st.booleans(),
)
def test_any_bytes_get_a_well_formed_answer(
    tag: int, ordinal: int, body: bytes, raw: bytes | None, *, is_administrator: bool
):
    bench = Bench()
    client = replace(ADMIN, is_administrator=is_administrator)
    bench.save(client)
    request = messages.packet(tag, ordinal, body) if raw is None else raw
    answer = bench.requests.execute(client, request, bench.steps)
    header, results = messages.split(answer)
    assert header.code == 0 or not results
    assert len(answer) <= 4088
