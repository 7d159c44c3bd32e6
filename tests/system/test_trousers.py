"""Other people's programs: Debian's TrouSerS (tcsd and tpm-tools) in guest1, on guest1's tpm0.

One tcsd serves all tests of this module: first those of a new TPM, then those of one with an owner,
whose owner clears it at the end. What a tool asked and was answered is shown when a test fails.
"""

import re
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from tests.clients.trousers import SESSION, free_port, trousers_on, why_not
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    scratch_stack,
    vtpm_command,
    wait_until,
)

SECRET = "the disk key of guest1\n"
pytestmark = pytest.mark.skipif(bool(why_not()), reason=f"TrouSerS: {why_not()}")


@pytest.fixture(scope="module")
def booted():
    """guest1 and what it stands on."""
    with scratch_stack() as stack:
        stack.make_images()
        stack.make_boot(GUEST1)
        stack.up(*FIRST_CHAIN)
        yield stack


@pytest.fixture(scope="module")
def trousers(booted):
    """A tcsd in guest1 that a recorder listens to."""
    with trousers_on(
        booted.places.domain(GUEST1).tpm0,
        within=[*vtpm_command(), "exec", GUEST1, "--"],
        environment=booted.environment,
    ) as tools:
        yield tools


# -- the first look --------------------------------------------------------------------------------


def test_script_inside_the_guest_needs_no_recorder(booted):
    """The plain way, as in the README: everything tcsd needs is in the environment."""
    directory = Path(tempfile.mkdtemp(prefix="vtpm-tcsd-"))
    try:
        script = directory / "script"
        script.write_text("tpm_version && tpm_selftest -l info\n")
        said = booted.vtpm("exec", GUEST1, "--", "sh", SESSION, directory, free_port(), script)
        assert re.search(r"TPM 1\.2 Version Info", said.out)
        assert re.search(r"Chip Version:\s+1\.2\.", said.out)
        assert "tpm_selftest succeeded" in said.out
    finally:
        shutil.rmtree(directory)


def test_tpm_version_reports_a_tpm_1_2(trousers):
    said = trousers.run("tpm_version")
    assert re.search(r"TPM 1\.2 Version Info", said.out)
    assert re.search(r"Spec Level:\s+2", said.out)
    assert not said.refusals


def test_tpm_selftest_succeeds(trousers):
    said = trousers.run("tpm_selftest", "-l", "info")
    assert "tpm_selftest succeeded" in said.out
    assert not said.refusals


# -- ownership -------------------------------------------------------------------------------------


def test_endorsement_key_is_readable_by_anybody_before_there_is_an_owner(trousers):
    said = trousers.run("tpm_getpubek")
    assert "2048 bits" in said.out
    assert not said.refusals


@pytest.fixture(scope="module")
def owned(trousers):
    """The same, once tpm_takeownership has made somebody its owner."""
    said = trousers.run("tpm_takeownership", "-y", "-z")
    assert not said.refusals, str(said)
    return trousers


def test_endorsement_key_is_the_owner_s_once_there_is_one(owned):
    said = owned.run("tpm_getpubek", "-z", status=None)
    # TPM_ReadPubek is disabled now (0x08); then the owner is asked for, and gets it.
    assert said.refusals == {(0x7C, 0x08)}
    assert "2048 bits" in said.out


def test_ownership_is_not_taken_twice(owned):
    said = owned.run("tpm_takeownership", "-y", "-z", status=None)
    assert "Tspi_TPM_TakeOwnership failed" in said.out


# -- NV --------------------------------------------------------------------------------------------


def test_nv_area_of_the_owner_is_defined_written_read_and_released(owned):
    owned.run("tpm_nvdefine", "-i", "0x10", "-s", "32", "-p", "OWNERREAD|OWNERWRITE", "-y")
    said = owned.run("tpm_nvinfo", "-i", "0x10")
    assert "OWNERREAD|OWNERWRITE" in said.out
    assert re.search(r"Size\s+: 32", said.out)
    owned.run("tpm_nvwrite", "-i", "0x10", "-d", "hello nv", "-z")
    said = owned.run("tpm_nvread", "-i", "0x10", "-s", "8", "-z")
    assert "68 65 6c 6c 6f 20 6e 76" in said.out
    owned.run("tpm_nvrelease", "-i", "0x10", "-y")
    assert "0x00000010" not in owned.run("tpm_nvinfo", "-n").out


def test_nv_area_with_a_password_is_read_with_it_and_not_without(owned):
    permissions = "AUTHREAD|AUTHWRITE"
    words = ["tpm_nvdefine", "-i", "0x12", "-s", "32", "-p", permissions, "-y"]
    owned.run(*words, "--pwda=geheim")
    owned.run("tpm_nvwrite", "-i", "0x12", "-d", "hello nv", "--password=geheim")
    said = owned.run("tpm_nvread", "-i", "0x12", "-s", "8", "--password=geheim")
    assert "hello nv" in said.out
    said = owned.run("tpm_nvread", "-i", "0x12", "-s", "8", "--password=wrong", status=None)
    assert "Authentication failed" in said.out
    assert said.refusals == {(0xD0, 0x01)}
    owned.run("tpm_nvrelease", "-i", "0x12", "-y")


# -- sealing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("pcrs", [(), ("-p", "4", "-p", "5")], ids=["plain", "pcr 4 and 5"])
def test_sealed_file_is_unsealed(owned, pcrs):
    (owned.directory / "secret").write_text(SECRET)
    owned.run("tpm_sealdata", "-i", "secret", "-o", "sealed", *pcrs, "-z")
    assert SECRET not in (owned.directory / "sealed").read_text()
    assert SECRET in owned.run("tpm_unsealdata", "-i", "sealed", "-z").out


def test_file_sealed_to_a_pcr_is_shut_once_that_moves(owned, booted):
    (owned.directory / "secret").write_text(SECRET)
    owned.run("tpm_sealdata", "-i", "secret", "-o", "sealed", "-p", "10", "-z")
    with booted.tpm(GUEST1) as tpm:
        tpm.extend(10, b"\x33" * 20)
    said = owned.run("tpm_unsealdata", "-i", "sealed", "-z", status=None)
    assert SECRET not in said.out
    assert (0x18, 0x18) in said.refusals, str(said)  # TPM_Unseal: TPM_WRONGPCRVAL


# -- administration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("tpm_setenable", "-s", "-z"), "Disabled status: false"),
        (("tpm_setactive", "-s", "-z"), "Volatile Deactivated Status: false"),
        (("tpm_setownable", "-s", "-z"), "Ownable status: true"),
        (("tpm_setclearable", "-s", "-z"), "Owner Clear Disabled: false"),
        (("tpm_setpresence", "-s", "-z"), "Physical Presence: false"),
        (("tpm_restrictpubek", "-s", "-z"), "readable by: owner"),
        (("tpm_restrictsrk", "-s", "-z"), "readable with: owner auth"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_status_is_shown_to_the_owner(owned, words, expected):
    said = owned.run(*words)
    assert expected in said.out
    assert not said.refusals


@pytest.mark.parametrize(
    "words",
    [
        ("tpm_restrictsrk", "-a", "-z"),
        ("tpm_restrictsrk", "-r", "-z"),
        ("tpm_restrictpubek", "-r", "-z"),
        ("tpm_resetdalock", "-z"),
        ("tpm_setownable", "-p", "-z"),
        ("tpm_setownable", "-a", "-z"),
        ("tpm_setenable", "-d", "-z"),
        ("tpm_setenable", "-e", "-z"),
        ("tpm_changeownerauth", "-o", "-z", "-r"),
        ("tpm_changeownerauth", "-s", "-z", "-r"),
    ],
    ids=" ".join,
)
def test_owner_administers(owned, words):
    assert not owned.run(*words).refusals


@pytest.mark.parametrize(
    ("words", "ordinal"),
    [
        (("tpm_setenable", "-e", "-f"), 0x6F),
        (("tpm_setoperatorauth", "-z"), 0x74),
        (("tpm_setactive", "-i", "-z"), 0x72),
    ],
    ids=["enable", "operator", "deactivate"],
)
def test_what_needs_physical_presence_is_refused_for_want_of_it(owned, words, ordinal):
    said = owned.run(*words, status=None)
    assert "Bad physical presence value" in said.out
    assert said.refusals == {(ordinal, 0x2D)}


# -- the end of the story --------------------------------------------------------------------------


def test_two_clients_of_tpm0_do_not_disturb_each_other(owned, booted):
    """tcsd holds its connection open; another program reads PCRs beside it all the time."""
    seen, stop = [], threading.Event()

    def read():
        with booted.tpm(GUEST1) as tpm:
            while not stop.is_set():
                seen.append(tpm.pcr_read(4))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_until(lambda: seen, "the other program reads")
        (owned.directory / "secret").write_text(SECRET)
        owned.run("tpm_sealdata", "-i", "secret", "-o", "sealed", "-z")
        assert SECRET in owned.run("tpm_unsealdata", "-i", "sealed", "-z").out
    finally:
        stop.set()
        reader.join()
    assert len(set(seen)) == 1


def test_owner_clears_and_the_tpm_is_off_until_its_platform_enables_it(owned, booted):
    said = owned.run("tpm_clear", "-z")
    assert not said.refusals
    said = owned.run("tpm_takeownership", "-y", "-z", status=None)
    assert "TPM is disabled" in said.out
    assert {code for _, code in said.refusals} == {0x07}
    with booted.tpm(GUEST1) as tpm:
        # What firmware does when its user says so: presence by command, enable, activate.
        for value in (0x20, 0x08):
            tpm.call(0x4000000A, physical_presence=value)
        tpm.call(0x6F)
        tpm.call(0x72, state=False)
    booted.vtpm("reboot", GUEST1)
    with booted.tpm(GUEST1) as tpm:
        tpm.take_ownership()
