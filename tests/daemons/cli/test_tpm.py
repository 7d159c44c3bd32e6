"""`vtpm tpm`: the common commands, against a real engine on a real socket."""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from daemons import named_files
from daemons.cli.app import app
from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode
from daemons.guest.tpm0_client import Tpm0Client
from daemons.simulator import EphemeralStore, Simulator
from daemons.world import SystemRng
from protocol.constants import CapabilityArea
from tpm12.client import TpmClient
from tpm12.commands import ALL
from tpm12.profile import CHIP


@pytest.fixture(scope="module")
def tpm_socket(tmp_path_factory):
    path = tmp_path_factory.mktemp("tpm") / "sock"
    simulator = Simulator(DurableTpm(EphemeralStore(), profile=CHIP, commands=ALL))
    simulator.make_endorsement_key()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                while request := connection.recv(4096):
                    connection.sendall(simulator.exchange(request))

    thread = threading.Thread(target=serve)
    thread.start()
    yield path
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join()


@pytest.fixture
def run(tpm_socket):
    def run_it(*arguments):
        return CliRunner().invoke(app, ["tpm", str(tpm_socket), *map(str, arguments)])

    return run_it


def test_extend_and_read(run, tmp_path):
    file = tmp_path / "f"
    file.write_bytes(b"measured")
    digest = hashlib.sha1(b"measured").digest()
    value = hashlib.sha1(bytes(20) + digest).hexdigest()
    assert run("extend", 9, "--file", file).output.strip() == value
    assert run("pcr-read", 9).output.split() == ["9", value]


def test_owner_seal_unseal_and_nv(run, tmp_path):
    source, blob, target = tmp_path / "s", tmp_path / "b", tmp_path / "t"
    source.write_bytes(b"secret")
    assert run("takeownership", "--owner-auth", "text:me").exit_code == 0
    assert run("seal", source, blob, "--pcr", 10).exit_code == 0
    assert run("unseal", blob, target).exit_code == 0
    assert target.read_bytes() == b"secret"
    run("extend", 10, "00" * 20)
    refused = run("unseal", blob, target)
    assert refused.exit_code == 1
    assert "TPM_WRONGPCRVAL" in refused.output
    assert run("nv-define", "0x11101", 6, "--owner-auth", "text:me").exit_code == 0
    assert run("nv-write", "0x11101", source, "--owner-auth", "text:me").exit_code == 0
    read = run("nv-read", "0x11101", 6, "--owner-auth", "text:me")
    assert bytes.fromhex(read.output) == b"secret"
    assert run("clear", "--owner-auth", "text:you").exit_code == 1
    assert run("clear", "--owner-auth", "text:me").exit_code == 0


def test_a_file_that_is_no_blob_is_named(run, tmp_path):
    blob = tmp_path / "b"
    blob.write_bytes(b"nonsense")
    refused = run("unseal", blob, tmp_path / "t")
    assert refused.exit_code == 65
    assert str(blob) in refused.output


@pytest.mark.parametrize(
    "arguments",
    [("extend", 9), ("extend", 9, "zz"), ("extend", 9, "00"), ("nv-read", "x", 1)],
)
def test_mistakes_are_usage_errors(run, arguments):
    assert run(*arguments).exit_code == 2


def test_nobody_at_the_socket_is_a_failure(tmp_path):
    refused = CliRunner().invoke(app, ["tpm", str(tmp_path / "none"), "version"])
    assert refused.exit_code != 0
    assert "none" in refused.output


@pytest.fixture
def enabled(run):
    """The TPM is the module's, and may have been cleared."""
    assert run("enable").exit_code == 0
    return run


def test_cleared_tpm_is_switched_on_again(enabled):
    run = enabled
    assert run("takeownership").exit_code == 0
    assert run("takeownership").exit_code == 1
    assert run("clear").exit_code == 0
    off = run("takeownership")
    assert "vtpm tpm GUEST enable" in off.output
    assert run("enable").exit_code == 0
    assert run("takeownership").exit_code == 0
    assert run("clear").exit_code == 0


def test_presence_is_said_and_taken_back(run, tpm_socket):
    for word, is_there in (("on", True), ("off", False)):
        assert run("presence", word).exit_code == 0
        with Tpm0Client(tpm_socket) as tpm0:
            tpm = TpmClient(tpm0.exchange, rng=SystemRng())
            flags = tpm.get_capability(CapabilityArea.FLAG, (0x109).to_bytes(4, "big"))
        assert bool(flags[4]) is is_there
    assert run("presence", "perhaps").exit_code == 2


@pytest.mark.parametrize(
    "words",
    [
        ("pcr-read", "24"),
        ("pcr-read", "--", "-1"),
        ("extend", "24", "00" * 20),
        ("random", "--", "-1"),
        ("random", "65536"),
        ("nv-define", "0x100000000", "6"),
        ("nv-define", "0x11101", "--", "-6"),
        ("nv-read", "0x11101", "70000"),
    ],
    ids=" ".join,
)
def test_numbers_that_no_tpm_has_are_refused_before_it_is_asked(run, words):
    assert run(*words).exit_code == 2


def test_as_many_random_bytes_as_were_asked_for(enabled):
    assert len(bytes.fromhex(enabled("random", "5000").output)) == 5000


def test_ticks_go_on_under_one_nonce(enabled):
    first, second = (json.loads(enabled("ticks", "--json").output) for _ in range(2))
    assert first["nonce"] == second["nonce"]
    assert first["ticks"] <= second["ticks"]
    assert first["microseconds_a_tick"] == 1
    assert f"nonce                {first['nonce']}" in enabled("ticks").output


def test_a_secret_need_not_be_utf_8(enabled):
    run = enabled
    assert run("takeownership", "--owner-auth", "text:\udcff").exit_code == 0
    digest = hashlib.sha1(b"\xff").hexdigest()
    assert run("clear", "--owner-auth", f"hash:{digest}").exit_code == 0


@pytest.fixture
def sealed(enabled, tmp_path):
    """A sealed secret, as a file."""
    source, blob = tmp_path / "s", tmp_path / "b"
    source.write_bytes(b"secret")
    assert enabled("takeownership").exit_code == 0
    assert enabled("seal", source, blob).exit_code == 0
    yield blob
    assert enabled("clear").exit_code == 0


def test_what_is_unsealed_into_a_file_that_was_there_is_for_nobody_else(run, sealed, tmp_path):
    target = tmp_path / "t"
    target.write_bytes(b"longer than the secret")
    target.chmod(0o644)
    assert run("unseal", sealed, target).exit_code == 0
    assert target.read_bytes() == b"secret"
    assert target.stat().st_mode & 0o777 == 0o600


def test_a_fifo_that_nobody_reads_from_holds_nobody_up(run, sealed, tmp_path, monkeypatch):
    monkeypatch.setattr(named_files, "READER_WAIT_S", 0.1)
    os.mkfifo(tmp_path / "f")
    refused = run("unseal", sealed, tmp_path / "f")
    assert refused.exit_code == 74
    assert "nobody reads from it" in refused.output


def test_pipes_and_devices_are_written(run, sealed, tmp_path):
    os.mkfifo(tmp_path / "f")
    with ThreadPoolExecutor() as threads:
        read = threads.submit((tmp_path / "f").read_bytes)
        assert run("unseal", sealed, tmp_path / "f").exit_code == 0
        assert read.result(10) == b"secret"
    assert run("unseal", sealed, "/dev/null").exit_code == 0
    full = run("unseal", sealed, "/dev/full")
    assert full.exit_code == 74
    assert "no space left" in full.output


@pytest.mark.parametrize("to", ["| cat", "> o; cat o"])
def test_what_is_unsealed_goes_to_the_output(tpm_socket, sealed, tmp_path, to):
    words = f"-m daemons.cli.main tpm {tpm_socket} unseal {sealed} /dev/stdout"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} {words} {to}"],
        cwd=tmp_path,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == (b"secret", b"")


def test_where_nothing_can_be_written_is_named(enabled, tmp_path):
    run = enabled
    source = tmp_path / "s"
    source.write_bytes(b"secret")
    assert run("takeownership").exit_code == 0
    failed = run("seal", source, tmp_path / "nowhere" / "b")
    assert failed.exit_code == 74
    assert "cannot write" in failed.output
    assert run("seal", source, tmp_path / "b").exit_code == 0
    assert run("unseal", tmp_path / "b", tmp_path / "t").exit_code == 0
    assert (tmp_path / "t").stat().st_mode & 0o777 == 0o600
    assert run("clear").exit_code == 0


@contextlib.contextmanager
def odd_server(path, answer):
    """A socket on which one client gets the same answer to whatever it sends."""
    with socket.socket(socket.AF_UNIX) as listening, ThreadPoolExecutor(1) as threads:
        listening.bind(str(path))
        listening.listen()

        def serve():
            connection, _ = listening.accept()
            with connection:
                while connection.recv(4096):
                    connection.sendall(answer)

        serving = threads.submit(serve)
        yield
        serving.result()


def test_a_control_socket_is_not_waited_for(tmp_path):
    """It answers four bytes to what it does not know, and a TPM may take minutes."""
    path = tmp_path / "control"
    with odd_server(path, bytes.fromhex("0000000a")):
        said = CliRunner().invoke(app, ["tpm", str(path), "version"])
    assert said.exit_code == ExitCode.UNAVAILABLE
    assert "is it a control socket?" in said.output


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("00c40000000a00000000", ("pcr-read", "1")),
        ("00c40000000b0000000000", ("enable",)),
        ("00c400000012000000000000000461626364", ("version",)),
        ("00c40000000e0000000000000000", ("random", "5")),
    ],
    ids=["too short", "too long", "no version", "no byte"],
)
def test_an_answer_that_is_none_is_no_bug_of_ours_and_is_not_asked_for_without_end(
    tmp_path, answer, words
):
    """It is what a fault plan with `corrupt` makes of answers, and what other servers may send."""
    path = tmp_path / "odd"
    with odd_server(path, bytes.fromhex(answer)):
        command = [sys.executable, "-m", "daemons.cli.main", "tpm", str(path), *words]
        said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert said.returncode == ExitCode.UNAVAILABLE, said.stderr
    assert "gave no proper answer" in said.stderr
    assert "Traceback" not in said.stderr
