"""Sockets: what stands in the way, who holds them, deep paths, inheritance, and who is a peer."""

import contextlib
import fcntl
import gc
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from daemons import listeners
from daemons.errors import Failure
from daemons.instance_lock import InstanceLock
from daemons.listeners import (
    AlreadyRunning,
    InheritedSockets,
    Kind,
    NotListening,
    PeerCredentials,
    connect,
    inherit_or_listen,
    listen,
    peer_credentials,
    set_receive_timeout,
    start_time_of,
    steady_directory,
)

KINDS = [Kind.STREAM, Kind.SEQPACKET]


@pytest.fixture
def place(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir(mode=0o700)
    return directory


def open_descriptors():
    gc.collect()  # what an earlier test has left to it may go at any moment
    return len(list(Path("/proc/self/fd").iterdir()))


def run_python(source, *arguments, wait=True):
    """Run a program in a process of its own; it says what it has to say on stdout."""
    process = subprocess.Popen(
        [sys.executable, "-c", source, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    if wait:
        return process.communicate(timeout=30)[0]
    return process


# -- listening and connecting


@pytest.mark.parametrize("kind", KINDS)
def test_message_goes_from_connect_to_accept(place, kind):
    with listen(place / "s", kind) as listener, connect(place / "s", kind) as near:
        far, _ = listener.socket.accept()
        with far:
            near.send(b"hello")
            assert far.recv(100) == b"hello"
            assert near.gettimeout() is None


def test_socket_file_has_mode_0600_whatever_the_umask(place):
    before = os.umask(0)
    try:
        with listen(place / "s", Kind.STREAM):
            assert stat.S_IMODE((place / "s").stat().st_mode) == 0o600
    finally:
        assert os.umask(before) == 0


def test_socket_file_goes_with_its_listener_and_close_may_be_repeated(place):
    listener = listen(place / "s", Kind.STREAM)
    listener.close()
    listener.close()
    assert not list(place.iterdir())


def test_socket_file_that_is_another_ones_by_now_stays(place):
    first = listen(place / "s", Kind.STREAM)
    (place / "s").unlink()
    with listen(place / "s", Kind.STREAM):
        first.close()
        assert (place / "s").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_socket_of_a_dead_process_is_replaced(place, kind):
    run_python(
        "import socket, sys; s = socket.socket(socket.AF_UNIX, int(sys.argv[2]));"
        "s.bind(sys.argv[1]); s.listen()",
        place / "s",
        int(kind),
    )
    assert (place / "s").is_socket()
    with pytest.raises(NotListening, match="no process accepts"):
        connect(place / "s", kind)
    with listen(place / "s", kind):
        connect(place / "s", kind).close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_kind", KINDS)
def test_socket_of_a_live_process_is_refused_and_stays(place, kind, held_kind):
    with listen(place / "s", held_kind):
        with pytest.raises(AlreadyRunning) as caught:
            listen(place / "s", kind)
        assert kind is not held_kind or f"process {os.getpid()}" in caught.value.why
        connect(place / "s", held_kind).close()


def test_live_socket_with_a_full_backlog_is_refused(place):
    with listen(place / "s", Kind.STREAM, backlog=0):
        waiting = connect(place / "s", Kind.STREAM)
        with pytest.raises(AlreadyRunning):
            listen(place / "s", Kind.STREAM)
        with pytest.raises(Failure, match="too busy"):
            connect(place / "s", Kind.STREAM, timeout_s=0.01)
        waiting.close()


def plant_file(path):
    path.write_text("precious")


def plant_link(path):
    (path.parent / "target").write_text("precious")
    path.symlink_to(path.parent / "target")


def plant_link_to_nothing(path):
    path.symlink_to("nowhere")


def plant_link_to_dead_socket(path):
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path.parent / "dead"))
    path.symlink_to("dead")


@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (plant_file, "an ordinary file"),
        (plant_link, "a symbolic link"),
        (plant_link_to_nothing, "a symbolic link"),
        (plant_link_to_dead_socket, "a symbolic link"),
        (os.mkfifo, "a FIFO"),
        (Path.mkdir, "a directory"),
    ],
)
def test_anything_else_at_the_path_is_named_and_left_alone(place, plant, name):
    plant(place / "s")
    before = {entry: entry.lstat().st_ino for entry in place.iterdir()}
    with pytest.raises(Failure, match=name):
        listen(place / "s", Kind.STREAM)
    with pytest.raises(Failure, match=name):
        InstanceLock(place / "s", "vTPM x")
    assert {entry: entry.lstat().st_ino for entry in place.iterdir()} == before


@pytest.mark.parametrize("mode", [0o750, 0o701, 0o770, 0o777, 0o1777])
def test_directory_open_to_others_is_refused(place, mode):
    place.chmod(mode)
    with pytest.raises(Failure, match="mode"):
        listen(place / "s", Kind.STREAM)


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o1777])
def test_place_where_nobody_can_exchange_the_socket_will_do_where_a_person_chose_it(place, mode):
    place.chmod(mode)
    with listen(place / "s", Kind.STREAM, open_directory=steady_directory):
        assert stat.S_IMODE((place / "s").stat().st_mode) == 0o600
    assert not (place / "s").exists()


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_place_where_others_could_exchange_the_socket_is_refused(place, mode):
    place.chmod(mode)
    with pytest.raises(Failure, match="exchange"):
        listen(place / "s", Kind.STREAM, open_directory=steady_directory)
    assert not (place / "s").exists()


def test_lock_that_somebody_keeps_on_an_open_place_is_not_waited_for_for_ever(place, monkeypatch):
    monkeypatch.setattr(listeners, "DIRECTORY_LOCK_S", 0.0)
    holder = os.open(place, os.O_RDONLY)
    try:
        fcntl.flock(holder, fcntl.LOCK_SH)
        with pytest.raises(Failure, match="another process has held a lock"):
            listen(place / "s", Kind.STREAM, open_directory=steady_directory)
    finally:
        os.close(holder)


def test_directory_that_is_a_link_is_refused(place):
    (place.parent / "link").symlink_to(place)
    with pytest.raises(Failure, match="symbolic link"):
        listen(place.parent / "link" / "s", Kind.STREAM)


def test_missing_directory_is_refused(place):
    with pytest.raises(Failure, match="not there"):
        listen(place / "deep" / "s", Kind.STREAM)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(place):
    os.chown(place, 12345, 12345)
    with pytest.raises(Failure, match="user 12345"):
        listen(place / "s", Kind.STREAM)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path_bytes", [106, 107, 108, 109, 300, 3000])
def test_path_of_any_length_works(place, kind, path_bytes):
    while len(bytes(place)) < path_bytes - 2:
        missing = path_bytes - 2 - len(bytes(place))
        place /= "d" * min(200, missing - 1) if missing > 1 else "d"
        place.mkdir(mode=0o700)
    path = place / "s"
    assert len(bytes(path)) >= path_bytes
    before = open_descriptors()
    with listen(path, kind):
        connect(path, kind).close()
        with pytest.raises(AlreadyRunning):
            listen(path, kind)
    assert not path.exists()
    with pytest.raises(NotListening):
        connect(path, kind)
    assert open_descriptors() == before


def test_name_too_long_for_any_socket_is_refused_with_that_reason(place):
    with pytest.raises(Failure, match="too many for a socket"):
        listen(place / ("n" * 108), Kind.STREAM)


def test_connect_tells_apart_what_is_missing(place):
    with pytest.raises(NotListening, match="no such socket"):
        connect(place / "s", Kind.STREAM)
    with pytest.raises(NotListening):
        connect(place / ("d" * 200) / "s", Kind.STREAM)
    (place / "file").write_text("")
    with pytest.raises(NotListening, match="an ordinary file"):
        connect(place / "file", Kind.STREAM)
    with listen(place / "s", Kind.STREAM), pytest.raises(Failure, match="another kind"):
        connect(place / "s", Kind.SEQPACKET)


def test_failed_starts_leave_no_descriptor(place):
    plant_file(place / "s")
    before = open_descriptors()
    for _ in range(20):
        with pytest.raises(Failure):
            listen(place / "s", Kind.STREAM)
        with pytest.raises(Failure):
            connect(place / "s", Kind.STREAM)
    assert open_descriptors() == before


@pytest.mark.parametrize("_again", range(10))
def test_concurrent_starts_give_exactly_one_listener(place, _again):
    """A dead socket is found by many at once: one takes its place, nobody removes a live one."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(place / "s"))
    started, refused, barrier = [], [], threading.Barrier(8)

    def start():
        barrier.wait(10)
        try:
            started.append(listen(place / "s", Kind.STREAM))
        except AlreadyRunning as failure:
            refused.append(failure)

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert (len(started), len(refused)) == (1, 7)
    connect(place / "s", Kind.STREAM).close()
    started[0].close()


def test_receive_timeout_leaves_the_socket_blocking():
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        set_receive_timeout(near, 0.001)
        with pytest.raises(BlockingIOError):
            near.recv(10)
        set_receive_timeout(near, 0)
        far.send(b"x")
        assert near.recv(10) == b"x"
        assert near.getblocking()


# -- peers


@contextlib.contextmanager
def no_descriptor_left():
    """Let this process open nothing more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_peer_is_who_the_kernel_says(place):
    with listen(place / "s", Kind.SEQPACKET) as listener, connect(place / "s", Kind.SEQPACKET):
        far, _ = listener.socket.accept()
        with far:
            assert peer_credentials(far) == PeerCredentials(
                pid=os.getpid(),
                uid=os.geteuid(),
                gid=os.getegid(),
                start_time=start_time_of(os.getpid()),
            )


def test_peer_that_is_gone_has_no_start_time(place):
    source = """
import socket, sys
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(1)); """
    with listen(place / "s", Kind.STREAM) as listener:
        process = run_python(source, place / "s", wait=False)
        far, _ = listener.socket.accept()
        with far:
            assert peer_credentials(far).pid == process.pid
            assert peer_credentials(far).start_time == start_time_of(process.pid) is not None
            far.send(b"x")
            process.communicate(timeout=30)
            assert peer_credentials(far).pid == process.pid
            assert peer_credentials(far).start_time is None
    assert start_time_of(process.pid) is None


def test_peer_whose_pid_was_given_to_another_has_no_start_time(place, monkeypatch):
    source = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    with listen(place / "s", Kind.STREAM) as listener:
        run_python(source, place / "s")
        far, _ = listener.socket.accept()
        with far:
            monkeypatch.setattr(listeners, "start_time_of", lambda _: 12345)
            assert peer_credentials(far).start_time is None


def test_peer_cannot_be_told_without_a_descriptor_and_is_not_gone(place):
    with listen(place / "s", Kind.SEQPACKET) as listener, connect(place / "s", Kind.SEQPACKET):
        far, _ = listener.socket.accept()
        with far, no_descriptor_left():
            found = peer_credentials(far)
            with pytest.raises(OSError, match="Too many open files"):
                start_time_of(os.getpid())
        assert (found.pid, found.start_time) == (os.getpid(), None)
        assert found.lack == "Too many open files"


def test_start_time_is_read_behind_any_program_name():
    source = """
import ctypes, sys
ctypes.CDLL(None).prctl(15, b"a) R 1 (b", 0, 0, 0)
from daemons.listeners import start_time_of
import os
print(start_time_of(os.getpid()), end="")
"""
    before = start_time_of(os.getpid())
    assert int(run_python(source)) >= before


# -- sockets from systemd

INHERITING = """
import os, socket, sys
from pathlib import Path
place, names, kind = sys.argv[1:4]
sockets = []
for number, name in enumerate(names.split(":")):
    s = socket.socket(socket.AF_UNIX, int(kind)); s.bind(f"{place}/{number}"); s.listen()
    sockets.append(s)
for number, s in enumerate(sockets):
    os.dup2(s.fileno(), 100 + number)
for number in range(len(sockets)):
    os.dup2(100 + number, 3 + number, inheritable=True)
environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(sockets)), "LISTEN_FDNAMES": names}
environ |= dict(pair.split("=", 1) for pair in sys.argv[4:])
from daemons.errors import Failure
from daemons.listeners import *
try:
    inherited = InheritedSockets.from_environment(environ)
    ring = inherit_or_listen(inherited, "ring", Path(place) / "own", Kind.SEQPACKET)
    print(ring.path, ring.socket.getsockname(), os.get_inheritable(3), sorted(environ))
    again = inherit_or_listen(inherited, "ring", Path(place) / "own", Kind.SEQPACKET)
    print(again.path)
    ring.close(); again.close(); inherited.close()
    print(os.path.exists(f"{place}/0"))
except Failure as failure:
    print("Failure:", failure.why)
"""


def inherit(place, names, kind, *environ):
    return run_python(INHERITING, place, names, int(kind), *environ).decode().splitlines()


def test_socket_passed_by_systemd_is_used_and_its_file_stays(place):
    lines = inherit(place, "tpm0:ring", Kind.SEQPACKET)
    assert lines[0] == f"None {place}/1 False []"
    assert lines[1] == f"{place}/own"
    assert lines[2] == "True"


def test_sockets_passed_to_another_process_are_not_taken(place):
    lines = inherit(place, "ring", Kind.SEQPACKET, "LISTEN_PID=1")
    assert lines[0].startswith(f"{place}/own")


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ("LISTEN_FDS=x", "not a number"),
        ("LISTEN_FDNAMES=ring:more", "names"),
        ("LISTEN_FDS=300", "names"),
    ],
)
def test_malformed_inheritance_is_refused(place, environ, why):
    lines = inherit(place, "ring", Kind.SEQPACKET, environ)
    assert lines[0].startswith("Failure:")
    assert why in lines[0]


def test_inherited_socket_of_another_kind_is_refused(place):
    assert "not a listening Unix SEQPACKET" in inherit(place, "ring", Kind.STREAM)[0]


def test_without_systemd_nothing_is_inherited(place):
    inherited = InheritedSockets.from_environment({})
    with inherit_or_listen(inherited, "ring", place / "s", Kind.SEQPACKET) as listener:
        assert listener.path == place / "s"


# -- one live instance


def test_second_instance_is_told_who_holds_the_lock(place):
    source = """
import sys
from pathlib import Path
from daemons.instance_lock import InstanceLock
lock = InstanceLock(Path(sys.argv[1]), "vTPM x"); print("held", flush=True); sys.stdin.read()
"""
    process = run_python(source, place / "ring.lock", wait=False)
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(AlreadyRunning, match=f"process {process.pid} holds"):
        InstanceLock(place / "ring.lock", "vTPM x")
    process.kill()  # leaves the file and not the lock
    process.communicate(timeout=30)
    assert (place / "ring.lock").exists()
    with InstanceLock(place / "ring.lock", "vTPM x"):
        pass
    assert not list(place.iterdir())


def test_instances_that_come_and_go_never_hold_the_lock_together(place):
    holders, worst, barrier = [], [], threading.Barrier(6)

    def work():
        barrier.wait(10)
        for _ in range(30):
            try:
                lock = InstanceLock(place / "l", "vTPM x")
            except AlreadyRunning:
                continue
            holders.append(1)
            worst.append(len(holders))
            holders.pop()
            lock.close()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert max(worst) == 1


def test_lock_on_a_hard_link_is_refused(place):
    (place / "precious").write_text("1")
    os.link(place / "precious", place / "l")
    with pytest.raises(Failure, match="in the way"):
        InstanceLock(place / "l", "vTPM x")
    assert (place / "precious").read_text() == "1"
