"""vtpm pcrs: values, and what set them as far as it is proved."""

import contextlib
import hashlib
import json
import struct
import threading

import pytest

from daemons.cli.pcrs import Extended, explain
from daemons.errors import ExitCode
from daemons.guest.measurements import Measurement, write_measurements
from daemons.launcher.event_log import EventType, event_of, replay, write_log
from daemons.listeners import Kind, listen

KERNEL = hashlib.sha1(b"kernel").digest()
COMMAND_LINE = hashlib.sha1(b"quiet").digest()
NOTHING = hashlib.sha1(b"").digest()


def extended(value, *digests):
    for digest in digests:
        value = hashlib.sha1(value + digest).digest()
    return value


@pytest.fixture
def values():
    bank = [bytes(20)] * 24
    bank[17:23] = [b"\xff" * 20] * 6
    bank[4] = extended(bytes(20), KERNEL)
    bank[5] = extended(bytes(20), COMMAND_LINE, NOTHING)
    return bank


@pytest.fixture
def guest(launcher, values):
    """guest1 with measurements and a tpm0 that answers PCRRead from `values`."""
    places = launcher.places
    directory = places.domain("guest1").directory
    places.make_private(directory)
    write_measurements(
        directory,
        [
            Measurement(pcr=4, digest=KERNEL.hex(), what="kernel", name="/boot/k", size=6),
            Measurement(
                pcr=5, digest=COMMAND_LINE.hex(), what="command line", name="quiet", size=5
            ),
            Measurement(pcr=5, digest=NOTHING.hex(), what="initrd", name="none", size=0),
        ],
    )
    with listen(places.domain("guest1").tpm0, Kind.STREAM) as listener:
        thread = threading.Thread(target=answer_reads, args=(listener.socket, values))
        thread.start()
        yield directory
        listener.socket.shutdown(2)
        thread.join(10)


def answer_reads(listening, values):
    with contextlib.suppress(OSError):
        while True:
            connection, _ = listening.accept()
            with connection:
                while request := connection.recv(4096):
                    tag, _size, ordinal, pcr = struct.unpack(">HIII", request)
                    assert (tag, ordinal) == (0xC1, 0x15)
                    connection.sendall(struct.pack(">HII", 0xC4, 30, 0) + values[pcr])


def shown(vtpm, domain):
    done = vtpm("pcrs", domain, "--json")
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("guest")
def test_pcrs_of_a_guest_say_what_set_them(vtpm, values):
    rows = shown(vtpm, "guest1")
    assert [row["value"] for row in rows] == [value.hex() for value in values]
    assert rows[4] == {
        "pcr": 4,
        "value": values[4].hex(),
        "set_by": [{"what": "kernel /boot/k", "digest": KERNEL.hex()}],
        "explained": True,
    }
    assert [event["what"] for event in rows[5]["set_by"]] == ['command line "quiet"', "no initrd"]
    assert rows[0]["set_by"] == []
    assert rows[0]["explained"] is None


@pytest.mark.usefixtures("guest")
def test_pcrs_as_a_table(vtpm, values):
    lines = vtpm("pcrs", "guest1").stdout.splitlines()
    assert lines[0].split() == ["PCR", "Value", "Set", "by"]
    assert lines[5] == f"  4  {values[4].hex()}  kernel /boot/k"
    assert lines[6].endswith('command line "quiet"; no initrd')
    assert lines[1] == f"  0  {bytes(20).hex()}"


@pytest.mark.usefixtures("guest")
def test_pcr_that_somebody_else_extended_says_so(vtpm, values):
    values[4] = extended(values[4], NOTHING)
    values[10] = extended(bytes(20), NOTHING)
    rows = shown(vtpm, "guest1")
    assert rows[4]["explained"] is False
    lines = vtpm("pcrs", "guest1").stdout.splitlines()
    assert lines[5].endswith("kernel /boot/k; and others since")
    assert lines[11].endswith("not known")


def test_pcrs_with_damaged_measurements_fail(guest, vtpm):
    (guest / "measurements.json").write_text("{}")
    done = vtpm("pcrs", "guest1")
    assert done.exit_code == ExitCode.DAMAGED
    assert "measurements.json" in done.stderr


def test_pcrs_of_the_chip_are_explained_by_the_event_log(places, launcher, vtpm):
    log = [
        event_of(0, EventType.S_CRTM_VERSION, b"firmware 1"),
        event_of(17, EventType.HASH_START, b"launcher"),
        event_of(18, EventType.IPL, b"manager"),
    ]
    write_log(places.event_log, log)
    bank = replay(log)
    bank[18] = extended(bank[18], NOTHING)
    launcher.answers["platform_pcrs"] = [bank[pcr].hex() for pcr in range(24)]
    rows = shown(vtpm, "hwtpm")
    assert [row["explained"] for row in rows if row["set_by"]] == [True, True, False]
    assert rows[17]["set_by"][0]["what"] == "launcher"


@pytest.mark.usefixtures("launcher")
def test_pcrs_of_a_domain_without_tpm0_fail(vtpm):
    assert vtpm("pcrs", "vtpm-guest1").exit_code == ExitCode.USAGE


def test_event_of_another_pcr_explains_nothing():
    event = Extended(pcr=4, digest=KERNEL, text="kernel")
    zero, four = explain([bytes(20)], [event], {0: bytes(20)})[0], None
    assert (zero.events, zero.is_explained, four) == ((), None, None)
