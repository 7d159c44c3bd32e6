"""An installation on a file system that is full: a refusal with a reason, and nothing is lost.

The whole root stands on a small tmpfs of its own, which is filled to the last block. What was
acknowledged is there when there is room again; what was refused has changed nothing.
"""

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from protocol.return_codes import ReturnCode, TpmError
from tests.system.belongings import NV_INDEX, OWNER_READ_AND_WRITE, Belongings
from tests.system.measured_boot import sha1
from tests.system.scratch_stack import (
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    VTPM1,
    example,
    kill_and_wait,
    scratch_stack,
    wait_until,
)

DISK_BYTES = 64 * 1024 * 1024
CHIP, LAUNCHER = "hwtpm", "Domain-0"
REFUSALS = {69, 74}
"""Exit statuses: not available now, and input or output failed."""
CHAIN = tuple(example(name) for name in FIRST_CHAIN)
MARK = b"\x42" * 20

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system"),
]


@pytest.fixture
def disk():
    """A small file system."""
    with tempfile.TemporaryDirectory(prefix="vtpm-full-") as directory:
        options = f"size={DISK_BYTES},mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "vtpm", directory], check=True)
        try:
            yield Path(directory)
        finally:
            subprocess.run(["umount", directory], check=True)


@pytest.fixture
def stack(disk):
    with scratch_stack(disk) as stack:
        stack.make_images()
        stack.make_boot(GUEST1)
        yield stack


@pytest.fixture
def owned(stack):
    """A running stack, and what its guest has in its TPM."""
    things = Belongings()
    stack.vtpm("up", *CHAIN)
    things.put_into(stack, GUEST1)
    with stack.tpm(GUEST1) as tpm:
        tpm.extend(10, MARK)
    return things


@contextlib.contextmanager
def full(disk):
    """Not a block is free in this block."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            with contextlib.suppress(OSError):  # ENOSPC, as the control below sees
                while True:
                    file.write(bytes(size))
    try:
        yield
    finally:
        filler.unlink()


def check_refusal(said):
    """A subcommand that could not do it says why, what to do, and that it is about room."""
    assert said.status in REFUSALS, said
    assert "space" in said.why, said
    assert said.next_step, said
    assert "Traceback" not in said.err


def runs_or_waits_for_room(stack, name, before):
    """Whether a daemon that was killed runs again; else it says that it waits for room."""

    def state():
        row = stack.row(name)
        is_back = row["state"] == "running" and row["pid"] not in {None, before}
        return row["state"] if is_back or "space" in row["state"] else ""

    return wait_until(state, f"{name} runs or waits for room", 60) == "running"


def all_is_right(stack, things):
    things.check(stack, GUEST1)
    with stack.tpm(GUEST1) as tpm:
        assert tpm.pcr_read(10) == sha1(bytes(20) + MARK)


def test_a_tpm_whose_disk_is_full_answers_and_loses_nothing(stack, disk, owned):
    refusals = []
    with full(disk), stack.tpm(GUEST1) as tpm:
        for _ in range(20):
            changed = bytes([owned.nv_data[0] ^ 1]) + owned.nv_data[1:]
            try:
                tpm.nv_write_value(NV_INDEX, changed, owner_auth=owned.owner_auth)
            except TpmError as error:
                refusals.append(error.code)
            else:
                owned.nv_data = changed
            all_is_right(stack, owned)
        tpm.extend(11, MARK)
    assert set(refusals) == {ReturnCode.IOERROR}
    all_is_right(stack, owned)
    stack.vtpm("down")
    stack.vtpm("up", *CHAIN)
    owned.check(stack, GUEST1)


def test_what_needs_more_room_is_refused_and_done_when_there_is_some(stack, disk, owned):
    with full(disk), stack.tpm(GUEST1) as tpm:
        codes = set()
        for index in range(0x20, 0x40):
            try:
                tpm.nv_define_space(index, 500, OWNER_READ_AND_WRITE, owner_auth=owned.owner_auth)
                codes.add(ReturnCode.SUCCESS)
            except TpmError as error:
                codes.add(error.code)
                break
        assert codes <= {ReturnCode.SUCCESS, ReturnCode.IOERROR, ReturnCode.NOSPACE}
        all_is_right(stack, owned)
    with stack.tpm(GUEST1) as tpm:
        tpm.nv_define_space(0x41, 24, OWNER_READ_AND_WRITE, owner_auth=owned.owner_auth)
    all_is_right(stack, owned)


@pytest.mark.parametrize("name", [CHIP, MANAGER, VTPM1])
def test_a_daemon_killed_on_a_full_disk_goes_on_where_it_was(stack, disk, owned, name):
    with full(disk):
        before = stack.pid(name)
        kill_and_wait(before)
        if runs_or_waits_for_room(stack, name, before):
            all_is_right(stack, owned)
    stack.until_running(*FIRST_CHAIN)  # nobody has to ask for it
    all_is_right(stack, owned)


def test_a_launcher_killed_on_a_full_disk_takes_over_what_runs(stack, disk, owned):
    with full(disk):
        kill_and_wait(stack.pid(LAUNCHER))
        said = stack.vtpm("up", *CHAIN, status=None)
        if said.status:
            check_refusal(said)
        all_is_right(stack, owned)
    stack.vtpm("up", *CHAIN)
    stack.until_running(*FIRST_CHAIN)
    all_is_right(stack, owned)


def test_a_stack_that_is_down_starts_when_there_is_room(stack, disk, owned):
    stack.vtpm("down")
    with full(disk):
        said = stack.vtpm("up", *CHAIN, status=None)
        if said.status:
            check_refusal(said)
        else:
            owned.check(stack, GUEST1)
        stack.vtpm("down", status=None)
    stack.vtpm("up", *CHAIN)
    owned.check(stack, GUEST1)


def test_a_first_start_without_room_makes_nothing_and_says_why(stack, disk):
    with full(disk):
        said = stack.vtpm("up", *CHAIN, status=None)
        check_refusal(said)
        stack.vtpm("down", status=None)
    stack.vtpm("up", *CHAIN)
    things = Belongings()
    things.put_into(stack, GUEST1)
    things.check(stack, GUEST1)


def test_a_disk_that_is_full_has_no_room(disk):
    """The control: a filler that leaves room would prove nothing."""
    with full(disk), pytest.raises(OSError, match="space"):
        (disk / "more").write_bytes(b"a byte needs a block")
    (disk / "more").write_bytes(b"and there is one now")
