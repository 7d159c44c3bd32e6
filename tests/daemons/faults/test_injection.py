"""Faults inside a daemon: they reach it only from its owner, and happen where the plan says."""

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from daemons.disk import PosixDisk
from daemons.errors import ExitCode, Failure
from daemons.faults import injection
from daemons.faults.control import FaultControl
from daemons.faults.hooks import NO_HOOKS, directory_of, hooks_of
from daemons.faults.page import Page, now_us
from daemons.faults.plan import What, parse_plan
from daemons.places import Places
from daemons.world import SystemClock

DOMAIN = "vtpm-guest1"
IMAGE_BYTES = 8192


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path)
    made.prepare()
    return made


@pytest.fixture
def control(places):
    with FaultControl(places, [DOMAIN, "hwtpm"]) as made:
        yield made


def fault(where, what, more="nth = 2"):
    return f'[[fault]]\nwhere = "{where}"\nwhat = "{what}"\n{more}\n'.encode()


@pytest.fixture
def ring(places, control):  # noqa: ARG001 - it has to be there first
    """A ring whose backend has hooks."""
    backend, frontend = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    faulty = hooks_of(places, DOMAIN).ring_socket(backend)
    faulty.settimeout(5)
    frontend.settimeout(5)
    yield SimpleNamespace(backend=faulty, frontend=frontend)
    faulty.close()
    frontend.close()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image"
    path.write_bytes(bytes(IMAGE_BYTES))
    path.chmod(0o600)
    return path


def in_a_child(work):
    """Do something in a process of its own; how that ended."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- who can reach a daemon ------------------------------------------------------------------------


def test_a_daemon_has_no_hooks_unless_asked_for(places):
    assert hooks_of(places, DOMAIN) is NO_HOOKS
    assert NO_HOOKS.open_disk is PosixDisk
    assert NO_HOOKS.ring_socket is None
    assert NO_HOOKS.tis_socket is None
    assert NO_HOOKS.attach_chip is None
    assert NO_HOOKS.clock is SystemClock
    assert NO_HOOKS.monotonic_s is time.monotonic


def test_without_a_page_nothing_that_injects_is_even_loaded(places):
    """The cost of the hooks in an ordinary daemon: one open() at its start that finds nothing."""
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "import daemons.hwtpmd, daemons.vtpmd, daemons.vtpmmgrd\n"
        "from daemons.faults.hooks import NO_HOOKS, hooks_of\n"
        "from daemons.places import Places\n"
        f"assert hooks_of(Places(Path({str(places.root)!r})), {DOMAIN!r}) is NO_HOOKS\n"
        "print(*[name for name in sys.modules if name.startswith('daemons.faults.')])\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert said.stdout.split() == ["daemons.faults.hooks"]


@pytest.mark.usefixtures("control")
def test_only_the_domains_asked_for_have_hooks(places):
    assert hooks_of(places, DOMAIN) is not NO_HOOKS
    assert hooks_of(places, "vtpm-guest2") is NO_HOOKS


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o660])
@pytest.mark.usefixtures("control")
def test_a_page_that_others_may_touch_is_not_used(places, mode):
    (directory_of(places) / f"{DOMAIN}.page").chmod(mode)
    assert hooks_of(places, DOMAIN) is NO_HOOKS


@pytest.mark.usefixtures("control")
def test_a_directory_that_others_may_touch_is_not_used(places):
    directory_of(places).chmod(0o755)
    assert hooks_of(places, DOMAIN) is NO_HOOKS


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
@pytest.mark.usefixtures("control")
def test_a_page_of_somebody_else_is_not_used(places):
    os.chown(directory_of(places) / f"{DOMAIN}.page", 4711, -1)
    assert hooks_of(places, DOMAIN) is NO_HOOKS


@pytest.mark.usefixtures("control")
def test_a_link_in_the_place_of_the_page_is_not_followed(places):
    page = directory_of(places) / f"{DOMAIN}.page"
    page.rename(page.with_name("elsewhere"))
    page.symlink_to("elsewhere")
    assert hooks_of(places, DOMAIN) is NO_HOOKS


@pytest.mark.usefixtures("control")
def test_a_page_of_another_size_is_not_used(places):
    os.truncate(directory_of(places) / f"{DOMAIN}.page", 100)
    assert hooks_of(places, DOMAIN) is NO_HOOKS


def test_what_an_ended_process_has_left_is_not_used(places):
    def ask_for_faults():
        FaultControl(places, [DOMAIN]).arm(fault(f"ring {DOMAIN}", "drop"))
        os._exit(0)

    in_a_child(ask_for_faults)
    assert (directory_of(places) / f"{DOMAIN}.page").exists()
    assert hooks_of(places, DOMAIN) is NO_HOOKS


@pytest.mark.usefixtures("control")
def test_two_cannot_inject_at_the_same_time(places):
    with pytest.raises(Failure, match="another process does so") as refused:
        FaultControl(places, [DOMAIN])
    assert refused.value.exit_code is ExitCode.UNAVAILABLE


def test_nothing_is_left_and_nothing_happens_any_more(places):
    backend, frontend = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with FaultControl(places, [DOMAIN]) as control:
        faulty = hooks_of(places, DOMAIN).ring_socket(backend)
        control.arm(fault(f"ring {DOMAIN}", "drop", "probability = 1"))
    assert not directory_of(places).exists()
    with faulty, frontend:
        faulty.send(b"whole")
        assert frontend.recv(10) == b"whole"


# -- messages --------------------------------------------------------------------------------------


def test_without_a_plan_messages_pass_and_are_not_counted(control, ring):
    ring.frontend.send(b"one")
    assert ring.backend.recv(10) == b"one"
    assert control.counted(DOMAIN, "ring") == 0


def test_messages_of_both_directions_count(control, ring):
    control.arm(b"")
    ring.frontend.send(b"one")
    ring.backend.recv(10)
    ring.backend.send(b"two")
    assert control.counted(DOMAIN, "ring") == 2
    assert control.counted(DOMAIN, "ring sent") == 1
    control.arm(b"")
    assert control.counted(DOMAIN, "ring") == 0


def test_operations_are_those_at_which_a_fault_could_be(control, ring):
    plan = fault(f"ring {DOMAIN}", "drop", "nth = 9") + fault(
        f"ring {DOMAIN}", "lost-response", "nth = 9"
    )
    plan += b'[[fault]]\nwhere = "clock"\nwhat = "jump"\nby_s = 1\nnth = 9\n'
    control.arm(plan)
    ring.frontend.send(b"one")
    ring.backend.recv(10)
    for message in (b"two", b"three"):
        ring.backend.send(message)
    drop, lost, jump = parse_plan(plan, "plan").faults
    assert [control.operations(each) for each in (drop, lost, jump)] == [3, 2, 0]
    access = replace(drop, what=What.BUSY_CHIP)  # one message of a driver, two answers
    assert control.operations(access) == 1


def received(ring, *messages):
    for message in messages:
        ring.frontend.send(message)
    ring.frontend.shutdown(socket.SHUT_WR)
    return [*iter(lambda: ring.backend.recv(10), b"")]


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("drop", [b"one", b"three"]),
        ("duplicate", [b"one", b"two", b"two", b"three"]),
        ("corrupt", [b"one", b"tgo", b"three"]),
    ],
)
def test_a_received_message_meets_its_fault(control, ring, what, expected):
    control.arm(fault(f"ring {DOMAIN}", what))
    assert received(ring, b"one", b"two", b"three") == expected
    (line,) = control.new_lines()
    assert (line["where"], line["what"], line["operation"]) == (f"ring {DOMAIN}", what, 2)
    assert control.new_lines() == []


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("drop", [b"one", b"three"]),
        ("lost-response", [b"one", b"three"]),
        ("duplicate", [b"one", b"two", b"two", b"three"]),
        ("corrupt", [b"one", b"tgo", b"three"]),
    ],
)
def test_a_sent_message_meets_its_fault(control, ring, what, expected):
    control.arm(fault(f"ring {DOMAIN}", what))
    for message in (b"one", b"two", b"three"):
        assert ring.backend.send(message) == len(message)
    ring.backend.shutdown(socket.SHUT_WR)
    assert [*iter(lambda: ring.frontend.recv(10), b"")] == expected


def test_a_lost_response_is_never_a_request(control, ring):
    control.arm(fault(f"ring {DOMAIN}", "lost-response", "probability = 1"))
    assert received(ring, b"one", b"two") == [b"one", b"two"]


def test_a_fault_of_another_place_or_domain_does_not_happen(control, ring):
    others = [f"disk {DOMAIN}", "tis", "ring vtpm-guest2"]
    control.arm(b"".join(fault(w, "kill", "probability = 1") for w in others))
    assert received(ring, b"one", b"two") == [b"one", b"two"]


def test_a_plan_written_anew_counts_anew(control, ring):
    control.arm(fault(f"ring {DOMAIN}", "drop"))
    ring.frontend.send(b"one")
    ring.backend.recv(10)
    control.arm(fault(f"ring {DOMAIN}", "corrupt"))
    assert received(ring, b"two", b"six") == [b"two", b"syx"]


def test_a_plan_that_cannot_be_read_does_nothing(control, ring):
    control.arm(b"[[fault]]\nwhat = 1\n")
    assert received(ring, b"one", b"two") == [b"one", b"two"]


def test_a_kill_happens_at_its_message_and_once(places, control):
    control.arm(fault(f"ring {DOMAIN}", "kill", "nth = 3"))

    def serve():
        backend, frontend = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        faulty = hooks_of(places, DOMAIN).ring_socket(backend)
        for _ in range(5):
            frontend.send(b"request")
            faulty.recv(10)

    assert in_a_child(serve) == -signal.SIGKILL
    assert control.counted(DOMAIN, "ring") == 3
    assert in_a_child(serve) == 0, "the one that follows is not killed for the same message"
    assert control.counted(DOMAIN, "ring") == 8
    assert [line["operation"] for line in control.new_lines()] == [3]


def test_a_fault_has_its_time_and_happens_at_the_next_message(control, ring, monkeypatch):
    control.arm(fault(f"ring {DOMAIN}", "corrupt", "at_s = 3600"))
    assert received(ring, b"one") == [b"one"]
    hour_later_us = now_us() + 3_600_000_000
    monkeypatch.setattr(injection, "now_us", lambda: hour_later_us)
    ring.backend.send(b"two")
    ring.backend.send(b"six")
    assert [ring.frontend.recv(10), ring.frontend.recv(10)] == [b"tgo", b"six"]
    (line,) = control.new_lines()
    assert line["operation"] == 2


def test_a_fault_that_has_happened_is_not_due_again_for_the_process_that_follows(places, control):
    control.arm(fault(f"ring {DOMAIN}", "kill", "at_s = 0"))

    def serve():
        backend, frontend = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        faulty = hooks_of(places, DOMAIN).ring_socket(backend)
        frontend.send(b"request")
        faulty.recv(10)

    assert in_a_child(serve) == -signal.SIGKILL
    assert in_a_child(serve) == 0


def work(ring, disk):
    """A fixed program: messages of both directions, and what they have stored."""
    for turn in range(60):
        ring.frontend.send(b"request")
        with contextlib.suppress(TimeoutError):
            ring.backend.recv(10)
        ring.backend.send(b"response")
        with contextlib.suppress(OSError):
            disk.write(0, bytes([turn]) * 8)
            disk.sync()


@pytest.mark.parametrize("others", ["", fault(f"disk {DOMAIN}", "kill", "nth = 10000").decode()])
def test_the_same_seed_repeats_every_fault(control, ring, disk, others):
    ring.backend.settimeout(0.01)
    plan = (
        fault(f"ring {DOMAIN}", "corrupt", "probability = 0.1")
        + fault(f"ring {DOMAIN}", "lost-response", "probability = 0.1")
        + fault(f"ring {DOMAIN}", "duplicate", "nth = 17")
        + fault(f"disk {DOMAIN}", "io-error", "probability = 0.2")
        + fault(f"disk {DOMAIN}", "delay", "for_s = 0.001\nprobability = 0.1")
        + others.encode()
    )
    seen = []
    for seed in (5, 5, 6):
        control.arm(f"seed = {seed}\n".encode() + plan)
        work(ring, disk)
        seen.append([(n["fault"], n["what"], n["operation"]) for n in control.new_lines()])
        drained(ring)
    assert len(seen[0]) > 20
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


def drained(ring):
    """Take what is left in the ring, so that the next run begins as this one did."""
    for end in (ring.backend, ring.frontend):
        end.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while super(type(end), end).recv(10) if end is ring.backend else end.recv(10):
                pass
        end.setblocking(True)
    ring.backend.settimeout(0.01)


# -- disks -----------------------------------------------------------------------------------------


@pytest.fixture
def disk(places, control, image):  # noqa: ARG001 - it has to be there first
    faulty = hooks_of(places, DOMAIN).open_disk(image)
    yield faulty
    faulty.close()


def test_a_disk_without_faults_is_the_disk(disk, image):
    disk.write(10, b"abc")
    disk.sync()
    assert (disk.name, disk.size, disk.read(10, 3)) == (str(image), IMAGE_BYTES, b"abc")
    assert image.read_bytes()[10:13] == b"abc"


@pytest.mark.parametrize(("what", "number"), [("io-error", errno.EIO), ("disk-full", errno.ENOSPC)])
def test_a_disk_fails_before_it_does_anything(control, disk, image, what, number):
    control.arm(fault(f"disk {DOMAIN}", what, "nth = 3"))
    disk.write(0, b"one")
    disk.sync()
    with pytest.raises(OSError, match="on purpose") as failed:
        disk.write(0, b"two")
    assert failed.value.errno == number
    assert image.read_bytes()[:3] == b"one"
    assert control.counted(DOMAIN, "disk") == 3


@pytest.mark.parametrize(
    ("plan", "written"),
    [
        (fault(f"disk {DOMAIN}", "kill", "nth = 2"), b"a" * 4096),
        (fault(f"disk {DOMAIN}", "torn-write", "nth = 3"), b"b" * 2048 + b"a" * 2048),
        (fault(f"disk {DOMAIN}", "kill", "nth = 4"), b"b" * 4096),
    ],
    ids=["kill", "torn-write", "kill at a sync"],
)
def test_a_process_dies_at_a_step_of_its_disk(places, control, image, plan, written):
    control.arm(plan)

    def save():
        disk = hooks_of(places, DOMAIN).open_disk(image)
        for letter in (b"a", b"b"):
            disk.write(0, letter * 4096)
            disk.sync()

    assert in_a_child(save) == -signal.SIGKILL
    assert image.read_bytes()[:4096] == written


def test_a_run_ends_when_the_chip_that_it_seized_is_given_back(places):
    """Its page goes with it, and whoever starts without a page knows of no seizure."""
    with FaultControl(places, ["hwtpm"]) as control:
        control.arm(b"")
        with (directory_of(places) / "hwtpm.page").open("r+b") as file:
            page = Page(file.fileno())
        page.seizure = (3, now_us() + 10**9)

        def give_back():
            while page.generation:
                time.sleep(0.01)
            time.sleep(0.1)
            page.seizure = None

        chip = threading.Thread(target=give_back)
        chip.start()
    assert page.seizure is None
    chip.join()
    page.close()
