"""Who may talk to whom, tried by real processes: rings, pages of the chip, and config files."""

import os
import shutil
import subprocess
from contextlib import contextmanager

import pytest

from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    GUEST1,
    GUEST2,
    IMAGE_BYTES,
    MANAGER,
    VTPM1,
    VTPM2,
    example,
    registered_pids,
)
from tests.system.stranger import stranger

RINGS = (MANAGER, VTPM1, VTPM2)


def ring_of(stack, name):
    return stack.places.domain(name).ring_socket


# -- processes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", RINGS)
def test_process_that_no_launcher_started_reaches_no_ring(running, backend):
    with stranger() as somebody:
        refused = somebody.tries("ring", ring_of(running, backend))["refused"]
    assert f"process {somebody.pid}" in refused
    assert "is not a domain" in refused


@pytest.mark.parametrize("locality", range(5))
def test_process_that_no_launcher_started_reaches_no_page_of_the_chip(running, locality):
    with stranger() as somebody:
        refused = somebody.tries("tis", running.places.tis_socket, locality)["refused"]
    assert f"process {somebody.pid}" in refused
    assert "is not a domain" in refused


@contextmanager
def in_place_of_guest2(stack):
    """A process of ours that the launcher takes for guest2; guest2 itself boots again after it."""
    stack.vtpm("destroy", GUEST2)
    try:
        with stranger() as somebody:
            stack.ask("attach_external", config_text=example(GUEST2).read_text(), pid=somebody.pid)
            yield somebody
    finally:
        stack.up(*ALL)
        stack.until_running(*ALL)


def test_guest_reaches_its_own_vtpm_and_no_other_door(running):
    with in_place_of_guest2(running) as guest2:
        assert running.row(GUEST2)["pid"] == guest2.pid
        # The control: the same process, the same call, the right door. Another guest2 is another
        # boot, so its TPM was reset.
        assert guest2.tries("ring", ring_of(running, VTPM2)) == {"pcr": "00" * 20}
        for backend in (VTPM1, MANAGER):
            refused = guest2.tries("ring", ring_of(running, backend))["refused"]
            assert "refuses this frontend" in refused
            assert GUEST2 in refused
            assert backend in refused
        for locality in range(5):
            refused = guest2.tries("tis", running.places.tis_socket, locality)["refused"]
            assert "granted: none" in refused or "guest2" in refused
        with running.tpm(GUEST1) as tpm:
            assert tpm.pcr_read(4) == boot_pcrs(GUEST1)[4]


def test_registration_ends_with_the_process(running):
    with in_place_of_guest2(running) as guest2:
        assert registered_pids(running)[GUEST2] == guest2.pid
    # Its number may be another's soon; the name was free again.
    assert registered_pids(running)[GUEST2] != guest2.pid


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else for a moment")
def test_other_user_of_the_machine_does_not_even_reach_the_sockets(running):
    paths = [
        running.places.launcher_socket,
        running.places.tis_socket,
        running.places.domain(GUEST1).tpm0,
        *(ring_of(running, backend) for backend in RINGS),
    ]
    program = (
        "import errno, socket, sys\n"
        "for path in sys.argv[1:]:\n"
        "    kind = socket.SOCK_STREAM if path.endswith(('tpm0', 'launcher.sock')) else"
        " socket.SOCK_SEQPACKET\n"
        "    with socket.socket(socket.AF_UNIX, kind) as s:\n"
        "        print(errno.errorcode[s.connect_ex(path)])\n"
    )
    python = shutil.which("python3", path="/usr/bin:/bin")  # ours may lie where nobody may look
    if python is None:
        pytest.skip("this machine has no /usr/bin/python3 that any user may run")
    tried = subprocess.run(
        [python, "-c", program, *map(str, paths)],
        user=65534,
        group=65534,
        extra_groups=[],
        cwd="/",
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    assert tried.stdout.split() == ["EACCES"] * len(paths)


# -- config files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replaced", "status", "reason"),
    [
        ({"backend=vtpm-guest2": "backend=vtpm-guest1"}, 69, "it is the TPM of guest1"),
        ({"backend=vtpm-guest2": "backend=vtpmmgr"}, 1, "vtpmmgr is a manager, not a vtpm"),
        ({"backend=vtpm-guest2": "backend=guest1"}, 1, "guest1 is a guest, not a vtpm"),
        ({"backend=vtpm-guest2": "backend=nobody"}, 69, "there is no domain nobody"),
    ],
)
def test_guest_is_not_made_with_somebody_else_s_backend(running, replaced, status, reason):
    config = running.variant(GUEST2, {'name="guest2"': 'name="guest3"'} | replaced)
    said = running.vtpm("create", config, status=status)
    assert reason in said.why
    assert said.next_step
    assert set(running.rows()) == {"Domain-0", *ALL}


def test_vtpm_with_the_uuid_of_a_living_one_is_refused_and_told_who_has_it(running):
    blank = running.root / "images" / "blank.img"
    blank.touch(mode=0o600)
    os.truncate(blank, IMAGE_BYTES)
    twin = running.variant(
        VTPM1, {'name="vtpm-guest1"': 'name="twin"', "vtpm-guest1.img": "blank.img"}
    )
    said = running.vtpm("create", twin, status=69)
    assert f"{VTPM1} is the vTPM with uuid" in said.why
    assert "vtpm destroy vtpm-guest1" in said.next_step
    assert not any(blank.read_bytes())
    assert set(running.rows()) == {"Domain-0", *ALL}


def test_manager_is_refused_a_page_that_it_was_not_granted(stack):
    config = stack.variant(MANAGER, {"fed42,1": "fed40,1"})
    stack.vtpm("up")
    said = stack.vtpm("create", config, status=None)
    assert said.status in {77, 78}
    assert "locality 2" in f"{said.what} {said.why}"
    assert 'iomem=["fed42,1"]' in said.next_step
    assert not any(stack.image(MANAGER).read_bytes())
    # With the page it is there at once, and its image is still good for it.
    stack.vtpm("create", example(MANAGER))


def test_manager_without_any_page_is_refused(stack):
    config = stack.variant(MANAGER, {'iomem=["fed42,1"]': ""})
    said = stack.vtpm("up", config, status=None)
    assert said.status in {77, 78}
    assert "iomem" in said.next_step
