"""The measuring loader: which bytes go to the TPM, in which order, and what is recorded."""

import hashlib
import io
import json
import os
import struct
import tarfile

import pytest

from daemons.errors import ExitCode
from daemons.guest.boot_image import BootFiles, BootImage, ImageDamaged, write_boot_image
from daemons.guest.loader import (
    BadLoaderArgument,
    LoaderOptions,
    WrongVtpmLabel,
    check_vtpm_label,
    extend_all,
    measure,
)
from daemons.guest.measurements import (
    FILE_NAME,
    Measurement,
    forget_measurements,
    read_measurements,
    replay,
    write_measurements,
)
from daemons.world import SystemRng
from protocol.return_codes import ReturnCode, TpmError
from tpm12.client import TpmClient

KERNEL, INITRD, COMMAND_LINE = b"kernel bytes", b"initrd bytes", "root=/dev/xvda1 ro"


def sha1(data):
    return hashlib.sha1(data).digest()


class FakeTpm:
    """Takes raw requests; answers Extend like a TPM, or with a return code."""

    def __init__(self, return_code=0):
        self.requests = []
        self.return_code = return_code

    def exchange(self, request):
        self.requests.append(request)
        if self.return_code:
            return struct.pack(">HII", 0xC4, 10, self.return_code)
        return struct.pack(">HII20s", 0xC4, 30, 0, sha1(request))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "guest1.img"
    path.write_bytes(bytes(64 * 1024))
    files = BootFiles(kernel=KERNEL, initrd=INITRD, command_line=COMMAND_LINE)
    write_boot_image(path, files)
    return path


def measured(path):
    with BootImage(path) as opened:
        return measure(opened)


def test_loader_sends_three_plain_extends_in_order(image):
    tpm = FakeTpm()
    extend_all(measured(image), TpmClient(tpm.exchange, rng=SystemRng()))
    assert tpm.requests == [
        struct.pack(">HIII20s", 0x00C1, 34, 0x14, pcr, digest)
        for pcr, digest in (
            (4, sha1(KERNEL)),
            (5, sha1(COMMAND_LINE.encode())),
            (5, sha1(INITRD)),
        )
    ]


def test_loader_measures_a_missing_initrd_as_nothing(tmp_path):
    path = tmp_path / "guest1.img"
    path.write_bytes(bytes(64 * 1024))
    write_boot_image(path, BootFiles(kernel=KERNEL, initrd=None, command_line=""))
    kernel, command_line, initrd = measured(path)
    nothing = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
    assert (kernel.pcr, command_line.digest, initrd.digest) == (4, nothing, nothing)
    assert initrd.name == "none"


def test_loader_measures_a_gzip_file_as_it_is(image):
    packed = b"\x1f\x8b\x08" + bytes(40)
    write_boot_image(
        image, BootFiles(kernel=KERNEL, initrd=packed, command_line="x"), overwrite=True
    )
    assert measured(image)[2].digest == sha1(packed).hex()


def test_loader_stops_at_the_first_refusal(image):
    tpm = FakeTpm(ReturnCode.BAD_LOCALITY)
    with pytest.raises(TpmError):
        extend_all(measured(image), TpmClient(tpm.exchange, rng=SystemRng()))
    assert len(tpm.requests) == 1


def test_loader_takes_another_menu(tmp_path):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in (("k", KERNEL), ("other.lst", b"title t\nkernel /k quiet\n")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    path = tmp_path / "guest1.img"
    path.write_bytes(stream.getvalue())
    with BootImage(path) as opened:
        options = LoaderOptions.parse("(hd0,0)/other.lst")
        assert measure(opened, options.menu_path)[1].name == "quiet"
        with pytest.raises(ImageDamaged):
            measure(opened)


@pytest.mark.parametrize(
    ("extra", "label", "menu"),
    [
        ("", None, "boot/grub/menu.lst"),
        ("--vtpm-label=system_u:vm_r:vtpm_t", "system_u:vm_r:vtpm_t", "boot/grub/menu.lst"),
        ("--vtpm-label=*:vtpm_t (hd0)/b/m", "*:vtpm_t", "b/m"),
        ("/b/m", None, "b/m"),
    ],
)
def test_options_are_those_of_pv_grub(extra, label, menu):
    assert LoaderOptions.parse(extra) == LoaderOptions(vtpm_label=label, menu_path=menu)


@pytest.mark.parametrize(
    "extra",
    [
        "--vtpm-label=",
        "/b/m --vtpm-label=a:b:c",
        "--verbose",
        "(nd)/b/m",
        "b/m",
        "/",
        "/../m",
        "/b /c",
    ],
)
def test_options_that_mean_nothing_are_refused(extra):
    with pytest.raises(BadLoaderArgument) as failure:
        LoaderOptions.parse(extra)
    assert failure.value.exit_code is ExitCode.CONFIGURATION


LABEL = "system_u:vm_r:vtpm_t"


@pytest.mark.parametrize("wanted", [None, LABEL, "*:vm_r:vtpm_t", "*ystem_u:vm_r:vtpm_t"])
def test_vtpm_label_that_fits_is_taken(wanted):
    check_vtpm_label(LoaderOptions(vtpm_label=wanted), LABEL)


@pytest.mark.parametrize("wanted", ["other_u:vm_r:vtpm_t", f"*{LABEL}", "*:guest_t", "*x"])
@pytest.mark.parametrize("found", [LABEL, None])
def test_vtpm_label_that_does_not_fit_stops_the_boot(wanted, found):
    with pytest.raises(WrongVtpmLabel):
        check_vtpm_label(LoaderOptions(vtpm_label=wanted), found)


def test_no_vtpm_is_skipped_without_a_label():
    check_vtpm_label(LoaderOptions(), None)


def test_measurements_are_read_back_and_give_the_pcr(tmp_path, image):
    events = measured(image)
    write_measurements(tmp_path, events)
    assert tuple(read_measurements(tmp_path)) == events
    path = tmp_path / "measurements.json"
    assert path.stat().st_mode & 0o777 == 0o600
    in_pcr_5 = [bytes.fromhex(e.digest) for e in events if e.pcr == 5]
    first = sha1(bytes(20) + sha1(COMMAND_LINE.encode()))
    assert replay(in_pcr_5) == sha1(first + sha1(INITRD))
    write_measurements(tmp_path, events[:1])
    assert len(read_measurements(tmp_path)) == 1
    forget_measurements(tmp_path)
    forget_measurements(tmp_path)
    assert read_measurements(tmp_path) == []


def a_measurement(**changes):
    event = {"pcr": 4, "digest": "00" * 20, "what": "kernel", "name": "/k", "size": 1}
    return {**event, **changes}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        json.dumps({"format": 2, "events": []}),
        json.dumps({"format": 1, "events": [{}]}),
        json.dumps({"format": 1, "events": [a_measurement(digest="00")]}),
        json.dumps({"format": 1, "events": [a_measurement(more=1)]}),
        " " * 70000,
    ],
)
def test_measurements_that_are_damaged_are_refused(tmp_path, text):
    (tmp_path / "measurements.json").write_text(text)
    with pytest.raises(ValueError, match=r".+"):
        read_measurements(tmp_path)


def test_measurement_of_the_tests_is_a_good_one(tmp_path):
    text = json.dumps({"format": 1, "events": [a_measurement()]})
    (tmp_path / "measurements.json").write_text(text)
    assert read_measurements(tmp_path) == [Measurement(**a_measurement())]


def a_link(path):
    path.symlink_to(path.with_name("elsewhere"))
    path.with_name("elsewhere").write_text("{}")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, a_link], ids=["FIFO", "folder", "link"])
def test_measurements_something_else_in_their_place_is_refused(tmp_path, make):
    """The directory is the guest's, and root reads there: nobody hangs, no link is followed."""
    make(tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match=r"not a regular|s a directory|levels of symbolic"):
        read_measurements(tmp_path)
