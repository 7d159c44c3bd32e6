"""Images and the chip's memory that cannot be used: refused by name, and left as they are."""

import fcntl
import os
import shutil
from contextlib import contextmanager

import pytest

from tests.system.belongings import Belongings
from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    IMAGE_BYTES,
    IMAGE_OF,
    MANAGER,
    VTPM1,
    VTPM2,
    example,
    scratch_stack,
)

STORES = (MANAGER, VTPM1)
QUICK = "backend_wait_s = 0.5"
"""The launcher's settings are measured: an image is opened only under those it was made under."""
NO_INPUT, UNAVAILABLE, DAMAGED, NO_PERMISSION = 66, 69, 65, 77


@pytest.fixture(scope="module")
def after_a_run():
    """What the files of a platform hold after it has run once."""
    with scratch_stack() as made:
        made.make_images()
        for guest in (GUEST1, GUEST2):
            made.make_boot(guest)
        made.set("launcherd", QUICK)
        made.up(*ALL)
        made.down()
        return {file: (made.root / file).read_bytes() for file in stored_files(made)}


def stored_files(stack):
    files = [*(stack.image(name) for name in ALL), stack.places.chip_memory]
    return [file.relative_to(stack.root) for file in files]


@pytest.fixture
def used(after_a_run):
    """A stack that has run, and is down: an installation may be moved to another root."""
    with scratch_stack() as made:
        made.make_images()
        made.places.prepare()
        made.set("launcherd", QUICK)
        for file, data in after_a_run.items():
            (made.root / file).write_bytes(data)
            (made.root / file).chmod(0o600)
        yield made


@contextmanager
def left_as_they_are(stack):
    """See that no byte of any image and of the chip's memory changes, nor a mode or owner."""
    before = stack.images()
    modes = {name: stack.image(name).stat() for name in ALL if stack.image(name).exists()}
    yield
    assert {name for name, data in stack.images().items() if data != before[name]} == set()
    for name, status in modes.items():
        now = stack.image(name).stat()
        assert (now.st_mode, now.st_uid) == (status.st_mode, status.st_uid), name


def up_to(stack, name):
    """Start what a domain stands on: of the manager, only the chip."""
    stack.up(*FIRST_CHAIN[: FIRST_CHAIN.index(name)])


def refused(stack, name, status):
    """Create a domain that must be refused; what was said, and what the list shows after."""
    said = stack.vtpm("create", example(name), status=status)
    assert said.what
    assert said.why
    assert said.next_step
    row = stack.rows().get(name)
    if row is not None:  # it stays, failed, with its reason, until somebody decides
        assert row["state"].startswith("failed: ")
        assert said.why in row["state"]
        assert said.why[:60] in stack.vtpm("list").out
        assert row["restarts"] == 0, "another start cannot change it"
    return said


def flip(path, offset):
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def written_parts(path):
    """Offset and length of what is not blank, in pieces of 4096 bytes."""
    data = path.read_bytes()
    return [at for at in range(0, len(data), 4096) if any(data[at : at + 4096])]


# -- not there, not ours, not usable ---------------------------------------------------------------


@pytest.mark.parametrize("name", FIRST_CHAIN)
def test_missing_image_is_named_with_the_command_that_makes_it(stack, name):
    up_to(stack, name)
    stack.image(name).unlink()
    said = refused(stack, name, NO_INPUT)
    assert str(stack.image(name)) in said.what
    assert "No such file" in said.why
    assert ("vtpm image make" if name == GUEST1 else "dd if=/dev/zero") in said.next_step
    assert str(stack.image(name)) in said.next_step
    assert not stack.image(name).exists()
    # As told: make it, and create it again.
    stack.make_images([name])
    if name == GUEST1:
        stack.make_boot(name)
    stack.vtpm("create", example(name))


def test_blank_guest_image_says_how_to_fill_it(stack):
    up_to(stack, GUEST1)
    stack.image(GUEST1).write_bytes(bytes(IMAGE_BYTES))
    with left_as_they_are(stack):
        said = refused(stack, GUEST1, None)
    assert said.status in {DAMAGED, NO_INPUT}
    assert "vtpm image make" in said.next_step


def test_damaged_guest_image_leaves_no_trace_in_any_pcr(stack):
    up_to(stack, GUEST1)
    good = stack.image(GUEST1).read_bytes()
    stack.image(GUEST1).write_bytes(b"\xff" * 512 + good[512:])
    with left_as_they_are(stack):
        assert refused(stack, GUEST1, None).status in {DAMAGED, NO_INPUT}
    stack.image(GUEST1).write_bytes(good)
    stack.vtpm("create", example(GUEST1))
    with stack.tpm() as tpm:
        assert {pcr: tpm.pcr_read(pcr) for pcr in (4, 5)} == boot_pcrs(GUEST1)


@pytest.mark.parametrize("name", STORES)
def test_image_that_others_may_write_is_refused(used, name):
    up_to(used, name)
    used.image(name).chmod(0o666)
    with left_as_they_are(used):
        said = refused(used, name, NO_PERMISSION)
    assert "0666" in f"{said.what} {said.why}"
    assert "chmod" in said.next_step
    used.image(name).chmod(0o600)
    used.vtpm("create", example(name))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
@pytest.mark.parametrize("name", STORES)
def test_image_of_another_user_is_refused(used, name):
    up_to(used, name)
    os.chown(used.image(name), 65534, 65534)
    with left_as_they_are(used):
        said = refused(used, name, NO_PERMISSION)
    assert "65534" in f"{said.what} {said.why}"
    assert "chown" in said.next_step


@pytest.mark.parametrize("name", STORES)
def test_image_that_is_a_directory_or_a_link_elsewhere_is_refused(used, name):
    up_to(used, name)
    kept = used.image(name).with_suffix(".kept")
    used.image(name).rename(kept)
    used.image(name).mkdir()
    assert refused(used, name, None).status in {NO_INPUT, NO_PERMISSION}
    used.image(name).rmdir()
    kept.rename(used.image(name))
    used.vtpm("create", example(name))


@pytest.mark.parametrize("name", STORES)
def test_image_held_by_another_process_is_refused_and_the_holder_named(used, name):
    up_to(used, name)
    with used.image(name).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with left_as_they_are(used):
            said = used.vtpm("create", example(name), status=None)
        assert said.status != 0
        assert "another process" in said.why or str(os.getpid()) in said.why, said
    used.vtpm("reboot", name)
    used.until_running(name)


@pytest.mark.parametrize("name", STORES)
def test_image_cut_short_is_refused(used, name):
    up_to(used, name)
    os.truncate(used.image(name), 4096)
    with left_as_they_are(used):
        assert refused(used, name, None).status in {DAMAGED, 78}


# -- read-only -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STORES)
def test_image_that_the_config_opens_read_only_is_refused(used, name):
    up_to(used, name)
    config = used.variant(name, {",hda,w": ",hda,r"})
    with left_as_they_are(used):
        said = used.vtpm("create", config, status=None)
    assert said.status == 78
    assert "writable" in f"{said.what} {said.why}"


# -- blank where a key is known --------------------------------------------------------------------


def test_blank_vtpm_image_is_refused_where_the_manager_knows_a_key(used):
    used.image(VTPM1).write_bytes(bytes(IMAGE_BYTES))
    up_to(used, VTPM1)
    with left_as_they_are(used):
        said = refused(used, VTPM1, DAMAGED)
    assert "blank" in said.why
    assert IMAGE_OF[VTPM1] in said.what


def test_blank_manager_image_is_refused_where_the_chip_remembers_another(used):
    used.image(MANAGER).write_bytes(bytes(IMAGE_BYTES))
    up_to(used, MANAGER)
    with left_as_they_are(used):
        said = refused(used, MANAGER, DAMAGED)
    assert "blank" in said.what
    assert "abandoned_anchor" in said.next_step


def test_a_vault_that_is_given_up_is_made_anew_and_no_old_vtpm_accepts_it(used):
    """The manager is new then, and says so by knowing nobody; an old vTPM is not made anew."""
    used.image(MANAGER).write_bytes(bytes(IMAGE_BYTES))
    used.set("vtpmmgrd", 'abandoned_anchor = "0x00015000"')
    used.up(MANAGER)
    with left_as_they_are(used):
        said = refused(used, VTPM1, DAMAGED)
    assert "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839" in said.why


# -- damaged ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", STORES)
def test_image_with_any_damaged_page_is_refused_or_the_same_tpm_still(used, name):
    """Where an older root or slot lies, damage need not matter; then it is the same TPM still."""
    up_to(used, name)
    outcomes = {}
    pages = written_parts(used.image(name))
    for page in [*pages[:4], *pages[4::3]]:
        # As the start before left it: the one from before that start is an older copy by now.
        good = used.image(name).read_bytes()
        flip(used.image(name), page + 100)
        damaged = used.image(name).read_bytes()
        said = used.vtpm("create", example(name), status=None)
        outcomes[page] = said.status
        assert said.status in {0, DAMAGED}, said
        if said.status == DAMAGED:
            assert used.image(name).read_bytes() == damaged
        elif name == MANAGER:
            assert used.row(name)["status"].startswith("2 vTPMs known")
        used.vtpm("destroy", name)
        if said.status == DAMAGED:
            used.image(name).write_bytes(good)
    assert DAMAGED in outcomes.values(), outcomes
    used.vtpm("create", example(name))


@pytest.mark.parametrize("name", STORES)
def test_image_of_garbage_is_refused(used, name):
    up_to(used, name)
    used.image(name).write_bytes(os.urandom(IMAGE_BYTES))
    with left_as_they_are(used):
        refused(used, name, DAMAGED)


def test_damaged_chip_memory_is_refused_and_no_new_chip_is_made(used):
    path = used.places.chip_memory
    for page in written_parts(path):
        flip(path, page + 40)
    with left_as_they_are(used):
        said = used.vtpm("up", *(example(name) for name in ALL), status=DAMAGED)
    assert str(path) in said.what
    assert said.why
    assert said.next_step
    assert "hwtpm" in used.vtpm("status").out


def test_missing_chip_memory_is_a_new_chip_which_opens_nothing_of_the_old(used):
    """Nobody but the images can tell that this is another machine, and they do."""
    used.places.chip_memory.unlink()
    manager = used.image(MANAGER).read_bytes()
    said = used.vtpm("up", example(MANAGER), status=DAMAGED)
    assert "hardware TPM" in said.why
    assert used.image(MANAGER).read_bytes() == manager


# -- older and others' -----------------------------------------------------------------------------


def test_older_copy_of_a_vtpm_s_image_is_refused(used):
    older = used.image(VTPM1).read_bytes()
    used.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(used, GUEST1)
    used.down()
    newest = used.image(VTPM1).read_bytes()
    used.image(VTPM1).write_bytes(older)
    used.up(MANAGER)
    with left_as_they_are(used):
        said = refused(used, VTPM1, DAMAGED)
    assert "older copy" in f"{said.why} {said.next_step}"
    used.image(VTPM1).write_bytes(newest)
    used.up(*FIRST_CHAIN)
    things.check(used, GUEST1)


def test_older_copies_of_all_images_together_are_refused(used):
    """The manager's and the vTPM's image fit together; only the chip knows that they are old."""
    older = {name: used.image(name).read_bytes() for name in STORES}
    used.up(*FIRST_CHAIN)
    things = Belongings()
    things.put_into(used, GUEST1)
    used.down()
    newest = {name: used.image(name).read_bytes() for name in STORES}
    for name, data in older.items():
        used.image(name).write_bytes(data)
    up_to(used, MANAGER)
    with left_as_they_are(used):
        said = refused(used, MANAGER, DAMAGED)
    assert "older copy" in said.what
    for name, data in newest.items():
        used.image(name).write_bytes(data)
    used.vtpm("create", example(MANAGER))
    used.up(VTPM1, GUEST1)
    things.check(used, GUEST1)


def test_swapped_vtpm_images_are_refused(used):
    beside = used.image(VTPM1).with_suffix(".kept")
    shutil.move(used.image(VTPM1), beside)
    shutil.move(used.image(VTPM2), used.image(VTPM1))
    shutil.move(beside, used.image(VTPM2))
    used.up(MANAGER)
    with left_as_they_are(used):
        said = refused(used, VTPM1, DAMAGED)
        assert "another vTPM's" in f"{said.why} {said.next_step}"
        refused(used, VTPM2, DAMAGED)


def test_guest_of_a_refused_vtpm_says_whom_it_waits_for(used):
    used.image(VTPM1).write_bytes(os.urandom(IMAGE_BYTES))
    said = used.vtpm("up", *(example(name) for name in FIRST_CHAIN), status=DAMAGED)
    assert IMAGE_OF[VTPM1] in said.what
    said = used.vtpm("create", example(GUEST1), status=UNAVAILABLE)
    assert VTPM1 in said.why
    # The other guest has nothing to do with it.
    used.up(VTPM2, GUEST2)
    assert used.row(GUEST2)["state"] == "running"
