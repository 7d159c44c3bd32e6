"""The engine alone on a socket: a real process, started as a user starts it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daemons.errors import ExitCode
from daemons.world import SystemRng
from protocol.constants import CapabilityArea, Ordinal, StartupType
from protocol.return_codes import ReturnCode, TpmError
from protocol.swtpm_control import ControlCommand
from tpm12.client import TpmClient

VTPM = Path(sys.executable).with_name("vtpm")
READY_S = 30.0
PCR_READ = bytes.fromhex("00c10000000e0000001500000000")


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "sim"
    made.mkdir(mode=0o700)
    return made


def answers(path):
    with socket.socket(socket.AF_UNIX) as connection:
        return connection.connect_ex(str(path)) == 0


@contextlib.contextmanager
def running(folder, *options):
    path = folder / "sock"
    command = [str(VTPM), "simulator", "--socket", str(path), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            end = time.monotonic() + READY_S
            while not answers(path):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < end
                time.sleep(0.01)
            yield process
        finally:
            process.terminate()
            process.wait(10)
            process.stderr.close()


@contextlib.contextmanager
def client(folder):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(folder / "sock"))
        yield client_over(connection)


def client_over(connection):
    def exchange(request):
        connection.sendall(request)
        return connection.recv(4096)

    return TpmClient(exchange, rng=SystemRng())


def test_any_folder_that_is_not_for_others_to_change_holds_socket_and_state(tmp_path):
    """As the documentation has it: --state /tmp/my-tpm --socket /tmp/my-tpm.sock."""
    for mode in (0o755, 0o1777):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with running(folder, "--state", str(folder / "my-tpm")), client(folder) as tpm:
            tpm.read_pubek()


def test_state_survives_sigterm_and_kill(folder):
    with running(folder, "--state", str(folder / "st")), client(folder) as tpm:
        endorsement_key = tpm.read_pubek()
        tpm.take_ownership()
        tpm.nv_define_space(0x11101, 4, 0x20002)
        tpm.nv_write_value(0x11101, b"abcd")
    with running(folder, "--state", str(folder / "st")) as process, client(folder) as tpm:
        assert tpm.owner_read_internal_pub(0x40000006) == endorsement_key
        tpm.nv_write_value(0x11101, b"efgh")
        process.send_signal(signal.SIGKILL)
        process.wait()
    with running(folder, "--state", str(folder / "st")), client(folder) as tpm:
        assert tpm.nv_read_value(0x11101, 4) == b"efgh"


def test_clients_that_send_startup_and_clients_that_do_not(folder):
    with running(folder, "--ephemeral", "--no-ek") as process:
        with client(folder) as tpm:
            tpm.startup(StartupType.CLEAR)
            tpm.extend(10, b"x" * 20)
        with client(folder) as tpm:
            assert any(tpm.pcr_read(10))
            with pytest.raises(TpmError) as caught:
                tpm.startup(StartupType.CLEAR)
            assert caught.value.code is ReturnCode.INVALID_POSTINIT
        process.send_signal(signal.SIGHUP)
        end = time.monotonic() + READY_S
        with client(folder) as tpm:
            while any(tpm.pcr_read(10)):
                assert time.monotonic() < end


def test_two_clients_at_once(folder):
    with running(folder, "--ephemeral", "--no-ek"), client(folder) as one, client(folder) as two:
        assert one.extend(10, bytes(20)) != two.extend(10, bytes(20))
        assert one.pcr_read(10) == two.pcr_read(10)


def test_no_ek_is_as_from_the_factory(folder):
    with running(folder, "--ephemeral", "--no-ek"), client(folder) as tpm:
        with pytest.raises(TpmError) as caught:
            tpm.read_pubek()
        assert caught.value.code is ReturnCode.NO_ENDORSEMENT
        tpm.create_endorsement_key_pair()


def test_a_self_test_that_fails_on_purpose_is_no_matter_of_the_state(folder):
    kept = ["--state", str(folder / "state")]
    with running(folder, *kept, "--fail-self-test"), client(folder) as tpm:
        with pytest.raises(TpmError) as caught:
            tpm.read_pubek()
        assert caught.value.code is ReturnCode.FAILEDSELFTEST
    with running(folder, *kept), client(folder) as tpm:
        tpm.call(Ordinal.SELF_TEST_FULL)
        assert tpm.read_pubek()


def test_a_seed_repeats_the_tpm_and_marks_it(folder):
    seen = []
    for seed in ("7", "7", "8"):
        with running(folder, "--ephemeral", "--seed", seed), client(folder) as tpm:
            assert b"SEED" in tpm.get_capability(CapabilityArea.VERSION_VAL)
            seen.append((tpm.read_pubek(), tpm.get_random(20)))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def test_damaged_state_is_refused_and_left(folder):
    state = folder / "st"
    with running(folder, "--state", str(state)):
        pass
    memory = state / "tpm.nv"
    memory.write_bytes(b"garbage" * (memory.stat().st_size // 7 + 1))
    before = memory.read_bytes()
    command = [str(VTPM), "simulator", "--socket", str(folder / "s"), "--state", str(state)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 65
    assert "no chip memory" in done.stderr
    assert memory.read_bytes() == before


def test_where_to_keep_it_must_be_said(folder):
    command = [str(VTPM), "simulator", "--socket", str(folder / "s")]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )
    assert done.returncode == 2
    assert "--ephemeral" in done.stderr


def refused(folder, *options):
    command = [str(VTPM), "simulator", "--socket", str(folder / "s"), *options]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "NO_COLOR": "1"}
    )


@pytest.mark.parametrize(("first", "then"), [(["--seed", "7"], []), ([], ["--seed", "7"])])
def test_a_tpm_made_with_a_seed_never_passes_for_another(folder, first, then):
    state = ["--state", str(folder / "st")]
    with running(folder, *state, *first):
        pass
    done = refused(folder, *state, *then)
    assert done.returncode == 78
    assert "it was made" in done.stderr
    with running(folder, *state, *first), client(folder) as tpm:
        assert (b"SEED" in tpm.get_capability(CapabilityArea.VERSION_VAL)) is bool(first)


@pytest.mark.parametrize(
    "ek", [pytest.param((), id="with its key"), pytest.param(("--no-ek",), id="without")]
)
def test_a_tpm_made_with_a_seed_knows_it_without_the_file_beside_it(folder, ek):
    """As after a copy of its memory alone, or a power cut that took what was not synced."""
    state = ["--state", str(folder / "st"), *ek]
    with running(folder, *state, "--seed", "7"):
        pass
    (folder / "st" / "seed").unlink()
    for then in ((), ("--seed", "8")):
        done = refused(folder, *state, *then)
        assert done.returncode == 78
        assert "it was made with --seed 7" in done.stderr
    with running(folder, *state, "--seed", "7"), client(folder) as tpm:
        tpm.startup(StartupType.CLEAR)
        assert b"SEED" in tpm.get_capability(CapabilityArea.VERSION_VAL)


def test_a_tpm_that_was_made_before_seeds_were_kept_in_it_goes_by_the_file(folder):
    state = ["--state", str(folder / "st")]
    with running(folder, *state):
        pass
    (folder / "st" / "seed").write_text("7")
    assert "it was made with --seed 7" in refused(folder, *state).stderr
    with running(folder, *state, "--seed", "7"), client(folder) as tpm:
        assert b"SEED" in tpm.get_capability(CapabilityArea.VERSION_VAL)


def test_a_file_in_place_of_the_folder_is_refused_with_the_reason(folder):
    (folder / "st").write_text("")
    done = refused(folder, "--state", str(folder / "st"))
    assert done.returncode == 78
    assert "file exists" in done.stderr


def test_to_keep_nothing_somewhere_is_refused(folder):
    done = refused(folder, "--state", str(folder / "st"), "--ephemeral")
    assert done.returncode == 2
    assert "keeps nothing" in done.stderr


def test_to_keep_nothing_and_go_on_is_refused(folder):
    done = refused(folder, "--ephemeral", "--journal")
    assert done.returncode == 2
    assert "no memory to go on with" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        ["--clients-max", "0"],
        ["--stall", "0"],
        ["--stall", "x"],
        ["--stall", "nan"],
        ["--stall", "inf"],
        ["--stall", "1e300"],
    ],
)
def test_limit_that_is_none_is_refused(folder, options):
    command = [str(VTPM), "simulator", "--socket", str(folder / "sock"), "--ephemeral", *options]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert options[0] in ended.stderr


def is_served(connection):
    try:
        connection.sendall(PCR_READ)
        return len(connection.recv(4096)) == 30
    except ConnectionError:
        return False


def test_no_more_clients_than_it_was_told(folder):
    with running(folder, "--ephemeral", "--clients-max", "1"), contextlib.ExitStack() as opened:
        end = time.monotonic() + READY_S
        while True:  # until whoever looked whether it listens has gone
            first = opened.enter_context(socket.socket(socket.AF_UNIX))
            first.connect(str(folder / "sock"))
            if is_served(first):
                break
            assert time.monotonic() < end
        with socket.socket(socket.AF_UNIX) as second:
            second.connect(str(folder / "sock"))
            assert not is_served(second)
        assert is_served(first)


def test_client_that_stops_inside_a_command_is_closed_when_it_was_told(folder):
    with running(folder, "--ephemeral", "--stall", "0.2"):
        with socket.socket(socket.AF_UNIX) as slow:
            slow.settimeout(30)
            slow.connect(str(folder / "sock"))
            slow.sendall(b"\x00\xc1")
            assert slow.recv(1) == b""
        with client(folder) as tpm:
            tpm.pcr_read(0)


def control(folder):
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(READY_S)
    connection.connect(str(folder / "control"))
    return connection


def asked(connection, number, operands=b"", descriptors=()):
    socket.send_fds(connection, [number.to_bytes(4, "big") + operands], descriptors)
    return connection.recv(100)


def test_control_channel_gives_connections_and_power_to_one_at_a_time(folder):
    """As QEMU uses it; what each request does is in test_swtpm_control.py."""
    options = ("--ephemeral", "--no-ek", "--control", str(folder / "control"))
    with running(folder, *options) as process, control(folder) as first:
        assert asked(first, ControlCommand.INIT, bytes(4)) == bytes(4)
        with control(folder) as second:
            assert second.recv(1) == b""
        ours, given = socket.socketpair()
        with ours:
            with given:
                assert asked(first, ControlCommand.SET_DATAFD, b"", [given.fileno()]) == bytes(4)
            ours.settimeout(READY_S)
            tpm = client_over(ours)
            tpm.startup(StartupType.CLEAR)
            with client(folder) as the_same:
                assert the_same.extend(10, b"x" * 20) == tpm.pcr_read(10)
            assert asked(first, ControlCommand.SHUTDOWN) == bytes(4)
            assert process.wait(READY_S) == 0
            assert ours.recv(1) == b""


def test_without_room_for_its_control_channel_a_simulator_leaves_no_socket(folder):
    command = [str(VTPM), "simulator", "--ephemeral", "--socket", str(folder / "sock")]
    for place, text in (("none/control", "there is no folder"), ("taken", "is in the way")):
        (folder / "taken").write_text("something else")
        ended = subprocess.run(
            [*command, "--control", str(folder / place)],
            capture_output=True,
            text=True,
            timeout=READY_S,
            check=False,
        )
        assert ended.returncode != 0
        assert text in ended.stderr
        assert not (folder / "sock").exists()
    assert (folder / "taken").read_text() == "something else"


def in_the_way(place, what):
    place.mkdir(parents=True)
    if what == "fifo":
        os.mkfifo(place / "seed")
    elif what == "directory":
        (place / "seed").mkdir()
    elif what == "other bytes":
        (place / "seed").write_bytes(b"\xff\xfe")
    else:
        (place / "journal").mkdir()


@pytest.mark.parametrize("what", ["fifo", "directory", "other bytes", "journal"])
def test_what_lies_in_the_place_of_a_file_is_named_and_holds_nobody_up(folder, what):
    with running(folder, "--state", str(folder / "state")):
        pass
    in_the_way(folder / "new", what)
    (folder / "new" / "tpm.nv").write_bytes((folder / "state" / "tpm.nv").read_bytes())
    (folder / "new" / "tpm.nv").chmod(0o600)
    ended = subprocess.run(
        [str(VTPM), "simulator", "--socket", str(folder / "sock"), "--state", str(folder / "new")],
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )
    assert ended.returncode in {ExitCode.CONFIGURATION, ExitCode.IO_ERROR}
    assert "next_step" in ended.stderr


def test_socket_whose_folder_has_no_possible_name_is_refused(folder):
    socket_at = folder / ("x" * 300) / "sock"
    ended = subprocess.run(
        [str(VTPM), "simulator", "--ephemeral", "--socket", str(socket_at)],
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )
    assert ended.returncode == ExitCode.CONFIGURATION


@pytest.mark.parametrize("words", [["simulator"], ["--root", "/", "simulator"]])
def test_a_path_from_a_folder_that_is_gone_is_a_failure(folder, words):
    command = f'cd {folder} && rmdir {folder} && exec "$@"'
    ended = subprocess.run(
        ["sh", "-c", command, "sh", str(VTPM), *words, "--ephemeral", "--socket", "sock"],
        capture_output=True,
        text=True,
        timeout=READY_S,
        check=False,
    )
    assert ended.returncode == ExitCode.NO_INPUT
    assert ended.stderr.startswith("vtpm: cannot tell where sock is\n  why:  the working folder")


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"])
def test_serves_also_with_its_standard_streams_closed(folder, closed):
    words = [str(VTPM), "simulator", "--ephemeral", "--no-ek", "--socket", str(folder / "sock")]
    process = subprocess.Popen(["sh", "-c", f'exec "$@" {closed}', "sh", *words])
    try:
        end = time.monotonic() + READY_S
        while not answers(folder / "sock"):
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.01)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(folder / "sock"))
            assert is_served(connection)
    finally:
        process.terminate()
        assert process.wait(10) == ExitCode.DONE
