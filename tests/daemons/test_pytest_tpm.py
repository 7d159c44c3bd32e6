"""The plugin that gives a test its own TPM: used here as anybody's tests use it."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading

import pytest

from protocol.constants import CapabilityArea, Ordinal, StartupType
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import encode

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
