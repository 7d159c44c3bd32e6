"""A machine with our simulator as its TPM: SeaBIOS and Linux measure, it sleeps and wakes.

QEMU runs it, in software. Nothing in it was written for this project but the init that tells what
is there (`real_machine.sh`). The same machine with swtpm is the second opinion.
"""

import contextlib
import gzip
import os
import re
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path

import pytest

from tests.daemons.test_simulator import client, running
from tests.tpm12.witness import sha1

INIT = Path(__file__).with_name("real_machine.sh")
BUSYBOX = Path("/bin/busybox")
KERNEL = os.environ.get("VTPM_TEST_KERNEL", "")
"""A Linux with TPM TIS and IMA built in, as Debian's are; .ci/run sets it."""
QEMU = "qemu-system-x86_64"
BOOT_S = 300
FIRMWARE_PCRS = range(8)


def why_not():
    missing = [name for name in (QEMU, "swtpm", "busybox") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (.ci/run names the packages)"
    return "" if KERNEL else "VTPM_TEST_KERNEL names no kernel (.ci/run fetches Debian's)"


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


def archive(files):
    """A cpio archive in the format that Linux unpacks ("newc"): path, mode and contents."""
    packed = b""
    for number, (path, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")]):
        name = path.encode() + b"\0"
        values = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name), 0)
        header = b"070701" + b"".join(b"%08x" % value for value in values)
        packed += (header + name).ljust(-(-(len(header) + len(name)) // 4) * 4, b"\0")
        packed += data.ljust(-(-len(data) // 4) * 4, b"\0")
    return packed


@pytest.fixture(scope="module")
def initrd(tmp_path_factory):
    path = tmp_path_factory.mktemp("machine") / "initrd"
    files = [
        ("bin", 0o40755, b""),
        ("bin/busybox", 0o100755, BUSYBOX.read_bytes()),
        ("init", 0o100755, INIT.read_bytes()),
    ]
    path.write_bytes(gzip.compress(archive(files), 1))
    return path


def boot(control, initrd):
    """Boot a machine with the TPM that is controlled there; what its init said, by heading."""
    command = [
        *(QEMU, "-m", "256", "-nographic", "-no-reboot", "-net", "none"),
        *("-kernel", KERNEL, "-initrd", str(initrd)),
        *("-append", "console=ttyS0 quiet ima_policy=tcb ima_hash=sha1"),
        *("-chardev", f"socket,id=control,path={control}"),
        *("-tpmdev", "emulator,id=tpm,chardev=control", "-device", "tpm-tis,tpmdev=tpm"),
    ]
    ended = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, timeout=BOOT_S, check=True
    )
    said = ended.stdout.decode("latin-1").replace("\r", "")
    assert "=== end" in said, said[-3000:]
    *parts, _after = re.split(r"^=== (\w+)\n", said, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=False))


@contextlib.contextmanager
def swtpm(folder):
    control = folder / "control"
    (folder / "state").mkdir(mode=0o700)
    command = ["swtpm", "socket", "--tpmstate", f"dir={folder / 'state'}"]
    with subprocess.Popen([*command, "--ctrl", f"type=unixio,path={control}"]) as process:
        try:
            end = time.monotonic() + BOOT_S
            while not control.exists():
                assert time.monotonic() < end
                time.sleep(0.01)
            yield control
        finally:
            process.terminate()


class Booted:
    """What a machine said; its TPM, which ends with it, has said before and afterwards."""

    def __init__(self, folder, initrd):
        with running(folder, "--ephemeral", "--control", str(folder / "control")) as process:
            with client(folder) as tpm:
                self.modulus = tpm.read_pubek().pub_key.key
            self.said = boot(folder / "control", initrd)
            self.status = process.wait(BOOT_S)
            self.log = process.stderr.read()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("tpm")
    made.chmod(0o700)
    return made


@pytest.fixture(scope="module")
def booted(folder, initrd):
    return Booted(folder, initrd)


def hexadecimal(text):
    return bytes.fromhex("".join(text.split()))


def pcrs_in(text):
    return {
        int(number): hexadecimal(value)
        for number, value in re.findall(r"^PCR-(\d\d): ([0-9A-F ]+)$", text, re.MULTILINE)
    }


def replayed(measurements):
    """What PCRs come to by a log: lines that begin with a PCR and what it was extended with."""
    pcrs = defaultdict(lambda: bytes(20))
    for pcr, digest in re.findall(r"^ *(\d+) ([0-9a-f]{40}) ", measurements, re.MULTILINE):
        pcrs[int(pcr)] = sha1(pcrs[int(pcr)] + bytes.fromhex(digest))
    return dict(pcrs)


def test_kernel_finds_a_tpm_1_2_that_may_be_used(booted):
    said = booted.said
    assert "TCG version: 1.2" in said["caps"]
    state = [said[name].strip() for name in ("enabled", "active", "owned", "temp_deactivated")]
    assert state == ["1", "1", "0", "0"]
    modulus = said["pubek"].partition("Modulus:")[2]
    assert hexadecimal(modulus) == booted.modulus


def test_what_the_firmware_has_measured_is_in_the_pcrs(booted):
    pcrs = pcrs_in(booted.said["pcrs"])
    assert replayed(booted.said["firmware"]) == {pcr: pcrs[pcr] for pcr in FIRMWARE_PCRS}


def test_what_the_kernel_has_measured_is_in_pcr_10(booted):
    pcrs, ima = pcrs_in(booted.said["pcrs"]), booted.said["ima"]
    assert replayed(ima) == {10: pcrs[10]}
    aggregate = sha1(b"".join(pcrs[pcr] for pcr in FIRMWARE_PCRS))
    assert f"sha1:{aggregate.hex()} boot_aggregate" in ima


def test_program_in_the_machine_extends_a_pcr(booted):
    value = sha1(bytes(20) + b"twenty bytes of data")
    assert booted.said["extend"].strip() == "00c40000001e00000000" + value.hex()
    assert pcrs_in(booted.said["pcrs"])[11] == value


def test_pcrs_outlive_a_sleep_in_which_the_tpm_had_no_power(booted):
    """The kernel saves its state before, and the firmware starts the TPM with it (ST_STATE)."""
    assert booted.said["resumed"].strip() == "0"
    assert booted.log.count("power cycle") == 2
    assert pcrs_in(booted.said["pcrs_afterwards"]) == pcrs_in(booted.said["pcrs"])


def test_tpm_ends_with_its_machine(booted):
    assert booted.status == 0


def test_machine_with_swtpm_says_the_same(booted, initrd, tmp_path):
    with swtpm(tmp_path) as control:
        theirs = boot(control, initrd)
    of_the_maker = {"caps", "durations", "pubek", "timeouts"}
    differing = {
        name: (text, booted.said[name])
        for name, text in theirs.items()
        if name not in of_the_maker and text != booted.said[name]
    }
    assert not differing
