"""The plugin that gives a test its own TPM: used here as anybody's tests use it."""

import contextlib
import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace
from functools import partial

import pytest

from daemons.errors import Failure
from daemons.pytest_tpm import SimulatorError
from protocol.constants import CapabilityArea, KeyUsage, Ordinal, StartupType
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import encode
from tpm12.client_core import Use

DIGEST = b"\x5a" * 20
READ_PCR_16 = bytes.fromhex("00c10000000e0000001500000010")


@pytest.fixture(autouse=True)
def plugin(pytestconfig):
    if not pytestconfig.pluginmanager.has_plugin("daemons.pytest_tpm"):
        pytest.skip("the plugin is there once the project is installed")


def test_socket_takes_raw_commands(tpm12_simulator):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(tpm12_simulator.socket))
        connection.sendall(READ_PCR_16)
        assert connection.recv(4096) == bytes.fromhex("00c40000001e00000000") + bytes(20)


def test_client_is_open_and_every_test_has_another_tpm(tpm12_client, tpm12_simulators):
    assert tpm12_client.read_pubek() != tpm12_simulators().client.read_pubek()


def test_power_cycle_takes_what_is_volatile_and_leaves_the_connection(tpm12_simulator):
    tpm = tpm12_simulator.client
    tpm.take_ownership()
    tpm.extend(16, b"x" * 20)
    session = tpm.oiap()
    for _ in range(3):
        tpm12_simulator.power_cycle()
        assert tpm.pcr_read(16) == bytes(20)
    with pytest.raises(TpmError):
        tpm.end_session(session)
    assert tpm.unseal(tpm.seal(b"still owned")) == b"still owned"


def test_after_a_power_cycle_a_client_may_start_it(tpm12_simulator):
    tpm12_simulator.power_cycle()
    tpm12_simulator.client.startup(StartupType.CLEAR)
    with pytest.raises(TpmError) as refused:
        tpm12_simulator.client.startup(StartupType.CLEAR)
    assert refused.value.code is ReturnCode.INVALID_POSTINIT


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_permanent_state_survives(tpm12_simulator, end):
    tpm12_simulator.client.take_ownership()
    key = tpm12_simulator.client.owner_read_internal_pub(0x40000006)
    getattr(tpm12_simulator, end)()
    tpm12_simulator.start()
    assert tpm12_simulator.client.owner_read_internal_pub(0x40000006) == key


def extend_until_it_is_killed(tpm, value, measurements):
    """The PCR as it was answered last, and as it is if the command under way was run."""
    following = value
    with contextlib.suppress(Failure, OSError):
        for measurement in measurements:
            following = hashlib.sha1(value + measurement, usedforsecurity=False).digest()
            assert tpm.extend(16, measurement) == following
            value = following
    return value, following


def test_killed_in_a_loop_it_goes_on_where_it_was(tpm12_simulators, seed):
    chance = random.Random(seed)
    simulator = tpm12_simulators(has_journal=True)
    simulator.client.take_ownership()
    key = simulator.client.load_key2(simulator.client.create_wrap_key(KeyUsage.SIGNING, bits=512))
    signature = simulator.client.sign(key, DIGEST)
    session = simulator.client.oiap()
    count_id, _ = simulator.client.create_counter(b"kill")
    value = bytes(20)
    for kills in range(1, 9):
        count = simulator.client.call(
            Ordinal.INCREMENT_COUNTER, Use(session, bytes(20), continues=True), count_id=count_id
        )
        assert count.count.counter == simulator.client.read_counter(count_id).counter
        timer = threading.Timer(chance.uniform(0, 0.02), os.kill, (simulator.pid, signal.SIGKILL))
        timer.start()
        answered, following = extend_until_it_is_killed(
            simulator.client, value, iter(partial(chance.randbytes, 20), b"")
        )
        timer.join()
        simulator.crash()
        assert simulator.log.count("gone on where a killed one was") == kills
        value = simulator.client.pcr_read(16)
        assert value in {answered, following}, "what was answered is lost, or a measurement made"
        assert simulator.client.sign(key, DIGEST) == signature
    simulator.client.end_session(session)


def test_without_a_journal_a_crash_is_a_power_cycle(tpm12_simulator):
    """The control of the loop: what goes on does so by the journal."""
    tpm12_simulator.client.extend(16, DIGEST)
    tpm12_simulator.crash()
    assert tpm12_simulator.client.pcr_read(16) == bytes(20)


@pytest.mark.parametrize("ends_power", ["power_cycle", "restart"])
def test_with_a_journal_the_power_still_ends(tpm12_simulators, ends_power):
    simulator = tpm12_simulators(has_journal=True, has_ek=False)
    simulator.client.extend(16, DIGEST)
    getattr(simulator, ends_power)()
    assert simulator.client.pcr_read(16) == bytes(20)
    simulator.client.extend(16, DIGEST)
    simulator.crash()
    assert any(simulator.client.pcr_read(16))


def test_a_start_without_the_journal_is_a_power_on_for_good(tpm12_simulators):
    simulator = tpm12_simulators(has_journal=True, has_ek=False)
    simulator.client.extend(16, DIGEST)
    choice = simulator._choice
    simulator._choice = replace(choice, has_journal=False)
    simulator.crash()
    simulator.kill()
    simulator._choice = choice
    simulator.start()
    assert simulator.client.pcr_read(16) == bytes(20)


def test_a_tpm_that_was_killed_has_still_to_be_started(tpm12_simulators):
    simulator = tpm12_simulators(has_journal=True, has_ek=False)
    simulator.crash()
    simulator.client.startup(StartupType.CLEAR)
    simulator.crash()
    with pytest.raises(TpmError) as refused:
        simulator.client.startup(StartupType.CLEAR)
    assert refused.value.code is ReturnCode.INVALID_POSTINIT


def test_damaged_journal_is_refused_and_can_be_given_up(tpm12_simulators):
    simulator = tpm12_simulators(has_journal=True, has_ek=False)
    simulator.client.extend(16, DIGEST)
    simulator.kill()
    journal = simulator.state / "journal"
    with journal.open("r+b") as file:
        file.seek(150)
        file.write(b"damage")
    with pytest.raises(SimulatorError, match="status 65") as refused:
        simulator.start()
    assert f"rm {journal}" in str(refused.value)
    journal.unlink()
    simulator.start()
    assert simulator.client.pcr_read(16) == bytes(20)


@pytest.mark.tpm12(is_ephemeral=True, has_ek=False)
def test_mark_chooses_options(tpm12_simulator):
    with pytest.raises(TpmError) as refused:
        tpm12_simulator.client.read_pubek()
    assert refused.value.code is ReturnCode.NO_ENDORSEMENT
    tpm12_simulator.client.create_endorsement_key_pair()
    tpm12_simulator.restart()
    with pytest.raises(TpmError):
        tpm12_simulator.client.read_pubek()


@pytest.mark.tpm12(fails_self_test=True)
def test_broken_tpm_is_in_failure_mode_once_it_has_tested_itself(tpm12_simulator):
    tpm = tpm12_simulator.client
    assert len(tpm.get_capability(CapabilityArea.VERSION)) == 4
    for _ in range(2):  # power does not mend it
        for ordinal in (Ordinal.SELF_TEST_FULL, Ordinal.OIAP, Ordinal.RESET):
            with pytest.raises(TpmError) as refused:
                tpm.call(ordinal)
            assert refused.value.code is ReturnCode.FAILEDSELFTEST
        assert b"failed" in tpm.call(Ordinal.GET_TEST_RESULT).out_data
        tpm12_simulator.power_cycle()


def test_many_clients_at_once(tpm12_simulator):
    """Each command runs whole: no extend is lost."""
    clients, rounds = 20, 25

    def extend():
        with tpm12_simulator.new_client() as tpm:
            for _ in range(rounds):
                tpm.extend(16, b"y" * 20)

    with tpm12_simulator.new_client() as alone:
        threads = [threading.Thread(target=extend) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        together = alone.pcr_read(16)
        alone.pcr_reset(16)
        for _ in range(clients * rounds):
            alone.extend(16, b"y" * 20)
        assert alone.pcr_read(16) == together


# -- a seed ----------------------------------------------------------------------------------------


def test_a_seed_repeats_every_key_and_nonce_and_says_so(tpm12_simulators):
    runs = []
    for seed in (7, 7, 8):
        tpm = tpm12_simulators(seed=seed).client
        assert b"SEED" in tpm.get_capability(CapabilityArea.VERSION_VAL)
        runs.append([encode(tpm.read_pubek()), tpm.get_random(64), tpm.oiap().nonce_even])
    assert runs[0] == runs[1]
    assert all(one != other for one, other in zip(runs[0], runs[2], strict=True))


# -- when it fails ---------------------------------------------------------------------------------


def run_tests(directory, source, *options):
    (directory / "test_theirs.py").write_text(textwrap.dedent(source))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(directory)],
        cwd=directory,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_somebody_elses_tests_need_no_more_than_the_name(tmp_path):
    done = run_tests(
        tmp_path,
        """
        def test_theirs(tpm12_client):
            assert tpm12_client.pcr_read(16) == bytes(20)
        """,
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr


def test_a_simulator_that_dies_is_told_with_its_log(tpm12_simulator):
    os.kill(tpm12_simulator.pid, signal.SIGKILL)
    with pytest.raises(Exception, match="ended with status -9"):
        tpm12_simulator.power_cycle()


def test_log_is_shown_with_a_failed_test(tmp_path):
    done = run_tests(tmp_path, "def test_theirs(tpm12_simulator): assert False")
    assert "vtpm simulator" in done.stdout
    assert "serving a TPM 1.2" in done.stdout


def test_plugin_imports_nothing_of_the_project_before_a_test_asks(tmp_path):
    done = run_tests(
        tmp_path,
        """
        import sys

        def test_theirs():
            assert not {"tpm12", "protocol", "trio"} & set(sys.modules)
        """,
        "-p",
        "no:trio",
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
