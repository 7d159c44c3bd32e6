"""`vtpm tpm`: the common commands, against a real engine on a real socket."""

import hashlib
import socket
import threading

import pytest
from typer.testing import CliRunner

from daemons.cli.main import app
from daemons.durable_tpm import DurableTpm
from daemons.simulator import EphemeralStore, Simulator
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
