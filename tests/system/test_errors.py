"""What a newcomer meets: every error says what, why and what to do, and has its exit status."""

import json
import os
import shutil
import socket

import pytest

from tests.system.measured_boot import boot_pcrs
from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    GUEST2,
    MANAGER,
    VTPM1,
    ScratchStack,
    example,
    scratch_stack,
    wait_until,
)

FAILED, USAGE, DAMAGED, NO_INPUT, UNAVAILABLE = 1, 2, 65, 66, 69
NO_PERMISSION, CONFIGURATION = 77, 78
MINIMAL = 'name="x"\nkernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"\n'
BAD_ORDINAL, BADTAG = bytes.fromhex("0000000a"), bytes.fromhex("0000001e")
TPM2_GET_RANDOM = bytes.fromhex("8001 0000000c 0000017b 0008")


@pytest.fixture
def empty():
    """A root with nothing in it and nothing started."""
    with scratch_stack() as made:
        yield made


def told(said, status):
    """See that an error has its three parts; give them as one text."""
    assert said.status == status, said
    assert said.what, said
    assert said.why, said
    assert said.next_step, said
    assert "Traceback" not in said.err
    return f"{said.what}\n{said.why}\n{said.next_step}"


# -- the stack is not up ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("list",),
        ("status",),
        ("domid", GUEST1),
        ("device", GUEST1),
        ("pcrs", GUEST1),
        ("pcrs", "hwtpm"),
        ("exec", GUEST1, "--", "true"),
        ("destroy", GUEST1),
        ("vtpm-list", GUEST1),
        ("create", example(MANAGER)),
    ],
    ids=lambda words: words[0],
)
def test_without_a_stack_each_subcommand_says_how_to_start_it(empty, words):
    said = empty.vtpm(*words, status=None)
    told(said, UNAVAILABLE)
    assert said.what == "the stack is not up"
    assert str(empty.places.launcher_socket) in said.why
    assert said.next_step == "Start it with: vtpm up"


def test_down_without_a_stack_is_done_already(empty):
    assert empty.vtpm("down").err == ""


def test_unknown_subcommand_and_missing_argument_are_usage_errors(empty):
    for words in (("dance",), ("create",), ("exec", GUEST1), ("list", "--nonsense")):
        said = empty.vtpm(*words, status=USAGE)
        assert "usage" in said.err.lower(), said
    assert "Traceback" not in said.err


# -- domains ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "status", "texts"),
    [
        (("domid", "nobody"), UNAVAILABLE, ("no domain", "nobody", "vtpm list")),
        (("device", "nobody"), None, ("no domain nobody", "vtpm list")),
        (("device", VTPM1), USAGE, ("no tpm0", "no guest", "name the guest")),
        (("exec", MANAGER, "--", "true"), USAGE, ("no tpm0", "manager")),
        (("pcrs", VTPM1), USAGE, ("no tpm0", "vtpm")),
        (("create", example(GUEST1)), FAILED, ("exists", "domid", "vtpm destroy guest1")),
        (("block-attach", GUEST1, "nonsense:::"), None, ("disk",)),
        (("vtpm-detach", GUEST1, "7"), None, ("guest1",)),
        (("vtpm-attach", GUEST1, "backend=vtpm-guest1"), FAILED, ("guest1", "vtpm destroy")),
        (("vtpm-attach", GUEST1, "rubbish"), USAGE, ("rubbish", "uuid=...")),
        (("vtpm-attach", GUEST1, "uuid=1"), USAGE, ("uuid", "uuidgen")),
    ],
    ids=lambda value: " ".join(map(str, value[:1])) if isinstance(value, tuple) else None,
)
def test_mistake_about_a_domain_is_explained(running, words, status, texts):
    said = running.vtpm(*words, status=None)
    shown = told(said, status if status is not None else said.status)
    assert said.status in {FAILED, USAGE, UNAVAILABLE, CONFIGURATION}
    for text in texts:
        assert text in shown


def test_program_that_is_not_there_has_the_shell_s_exit_status(running):
    assert (
        "/no/such/program" in running.vtpm("exec", GUEST1, "--", "/no/such/program", status=127).err
    )
    assert running.vtpm("exec", GUEST1, "--", "/etc", status=126).err


def test_tpm0_that_somebody_removed_is_named(running):
    path = running.places.domain(GUEST1).tpm0
    path.unlink()
    said = running.vtpm("device", GUEST1, status=None)
    assert str(path) in told(said, UNAVAILABLE)
    running.vtpm("reboot", GUEST1)
    assert path.exists()


def test_paused_guest_is_named_as_such(running):
    running.vtpm("pause", GUEST2)
    said = running.vtpm("pcrs", GUEST2, status=None)
    assert "paused" in told(said, UNAVAILABLE)
    assert said.next_step == "vtpm unpause guest2"
    running.vtpm("unpause", GUEST2)
    running.vtpm("pcrs", GUEST2)


def test_second_manager_is_refused_and_the_first_named(running):
    second = running.variant(MANAGER, {'name="vtpmmgr"': 'name="vtpmmgr2"'})
    said = running.vtpm("create", second, status=None)
    assert MANAGER in told(said, FAILED)
    assert "vtpm destroy vtpmmgr" in said.next_step


def test_tpm2_command_is_answered_and_the_mistake_shown(running):
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(running.places.domain(GUEST1).tpm0))
        client.sendall(TPM2_GET_RANDOM)
        answer = client.recv(4096)
        # The tag is that of a TPM 1.2: it is how programs tell the two apart.
        assert answer[:6] == bytes.fromhex("00c4 0000000a")
        assert answer[6:10] in {BAD_ORDINAL, BADTAG}
        client.sendall(bytes.fromhex("00c1 0000000e 00000015 00000004"))
        assert client.recv(4096)[10:] == boot_pcrs(GUEST1)[4]
    assert "TPM 2.0" in wait_until(lambda: running.row(GUEST1)["status"], "a status")
    assert "TPM 1.2" in running.vtpm("status").out


# -- what is not there yet -------------------------------------------------------------------------


def test_vtpm_waits_for_its_manager_and_says_so(stack):
    stack.set("launcherd", "backend_wait_s = 0.3")
    stack.vtpm("up")
    said = stack.vtpm("create", example(VTPM1), status=None)
    shown = told(said, UNAVAILABLE)
    assert "vtpm-guest1 is created, but does not run yet" in shown
    assert "waits for vtpmmgr" in shown
    assert "vtpm create" in shown
    assert stack.row(VTPM1)["state"].startswith("starting: waits for vtpmmgr")
    assert "waits for vtpmmgr" in stack.vtpm("status").out
    # It goes on by itself.
    stack.vtpm("create", example(MANAGER))
    stack.until_running(VTPM1)
    stack.vtpm("create", example(GUEST1))


def test_guest_is_not_made_before_its_vtpm(stack):
    stack.up(MANAGER)
    said = stack.vtpm("create", example(GUEST1), status=None)
    told(said, UNAVAILABLE)
    assert said.next_step == "Create it first: vtpm create vtpm-guest1.cfg"


def test_vtpm_up_makes_a_failed_domain_again_when_its_reason_is_gone(stack):
    stack.image(VTPM1).rename(stack.image(VTPM1).with_suffix(".kept"))
    names = [example(name) for name in FIRST_CHAIN]
    told(stack.vtpm("up", *names, status=None), NO_INPUT)
    stack.image(VTPM1).with_suffix(".kept").rename(stack.image(VTPM1))
    stack.vtpm("up", *names)
    assert [row["state"] for row in stack.rows().values()] == ["running"] * 4


# -- config files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "texts"),
    [
        ('name="x"\nkernel=/usr\n', CONFIGURATION, ("line 2", "column 8")),
        ('name="x"\nkernel="y\n', CONFIGURATION, ("line 2", "column 8")),
        ('name="x"\nmemory=\n', CONFIGURATION, ("line 2",)),
        ('name="x"\ndisk=["a" "b"]\n', CONFIGURATION, ("line 2", "column 11")),
        ('kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"\n', CONFIGURATION, ("name",)),
        ('name="x"\n', CONFIGURATION, ("kernel",)),
        ('name="x"\nkernel="/boot/vmlinuz"\n', CONFIGURATION, ("vmlinuz",)),
        ('name="../x"\n' + MINIMAL.split("\n")[1], CONFIGURATION, ("'../x'", "slashes")),
        (MINIMAL.replace('"x"', '"hwtpm"'), CONFIGURATION, ("hwtpm",)),
        (MINIMAL.replace('"x"', '"7"'), CONFIGURATION, ("domid",)),
        (MINIMAL + 'memory="much"\n', CONFIGURATION, ("memory", "line 3")),
        (MINIMAL + 'vtpm=["uuid=1"]\n', CONFIGURATION, ("uuid", "line 3")),
        (MINIMAL + 'disk=["nonsense:x"]\n', CONFIGURATION, ("disk", "line 3")),
        (MINIMAL + 'disk=["file:/a/../../etc/shadow,xvda,w"]\n', CONFIGURATION, ("..", "line 3")),
    ],
)
def test_mistake_in_a_config_file_is_found_with_its_place(shared_empty, text, status, texts):
    path = shared_empty.config("mistaken", text)
    said = shared_empty.vtpm("up", path, status=None)
    shown = told(said, status) + said.err
    for expected in (str(path.name), *texts):
        assert expected in shown, said


@pytest.fixture(scope="module")
def shared_empty():
    """A root for config files that are refused; at most a launcher comes up in it."""
    with scratch_stack() as made:
        yield made


def test_config_file_that_is_none_is_explained(shared_empty):
    missing = shared_empty.root / "missing.cfg"
    assert str(missing) in told(shared_empty.vtpm("create", missing, status=None), NO_INPUT)
    said = shared_empty.vtpm("create", shared_empty.root, status=None)
    assert "directory" in told(said, NO_INPUT)
    binary = shared_empty.root / "binary.cfg"
    binary.write_bytes(b"\x7fELF\xff\xfe")
    assert "not UTF-8" in told(shared_empty.vtpm("create", binary, status=None), NO_INPUT)
    binary.write_bytes(b"#" * 100_000)
    assert "65536" in told(shared_empty.vtpm("create", binary, status=None), NO_INPUT)


def test_unknown_key_is_a_warning_that_names_it(stack):
    text = example(MANAGER).read_text() + "on_crash='preserve'\nbootlader=\"oops\"\n"
    said = stack.vtpm("up", stack.config("warned", text))
    assert "bootlader" in said.err + str(stack.row(MANAGER)["warnings"])
    assert stack.row(MANAGER)["state"] == "running"


def test_files_that_wait_for_each_other_are_refused(shared_empty):
    kernel = 'kernel="/usr/lib/xen/boot/vtpm-stubdom.gz"\n'
    one = shared_empty.config("one", f'name="one"\n{kernel}vtpm=["backend=two"]\n')
    two = shared_empty.config("two", f'name="two"\n{kernel}vtpm=["backend=one"]\n')
    said = shared_empty.vtpm("up", one, two, status=None)
    assert "wait for each other" in told(said, CONFIGURATION)
    said = shared_empty.vtpm("up", one, one, status=None)
    assert "one" in told(said, CONFIGURATION)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("launcherd.toml", "backend_wait_s = \n", "line 1"),
        ("launcherd.toml", "bakend_wait_s = 1\n", "bakend_wait_s"),
        ("launcherd.toml", 'log_level = "loud"\n', "log_level"),
        ("policy.toml", "[[allow]]\nfrontend = 3\n", "frontend"),
        ("policy.toml", "[[deny]]\n", "deny"),
    ],
)
def test_mistake_in_a_settings_file_stops_the_start(empty, name, text, expected):
    empty.places.config.mkdir(mode=0o700, parents=True)
    path = empty.places.config / name
    path.write_text(text)
    path.chmod(0o600)
    said = empty.vtpm("up", status=None)
    shown = told(said, CONFIGURATION)
    assert str(path) in shown
    assert expected in shown
    assert "Correct the file" in said.next_step


# -- rights and places -----------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["run/vtpm", "var/lib/vtpm", "var/log/vtpm"])
def test_directory_that_others_may_enter_is_refused(empty, place):
    directory = empty.root / place
    directory.mkdir(parents=True)
    directory.chmod(0o755)
    said = empty.vtpm("up", status=None)
    assert "0755" in told(said, CONFIGURATION)
    assert said.next_step == f"Run: chmod 700 {directory}"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(empty):
    empty.places.run.mkdir(parents=True, mode=0o700)
    os.chown(empty.places.run, 65534, 65534)
    said = empty.vtpm("up", status=None)
    assert "uid 65534" in told(said, CONFIGURATION)


def test_root_that_everybody_may_write_is_refused(empty):
    empty.root.chmod(0o777)
    said = empty.vtpm("up", status=None)
    assert "0777" in told(said, CONFIGURATION)
    empty.root.chmod(0o700)


def test_symlink_in_place_of_a_directory_is_refused(empty):
    (empty.root / "elsewhere").mkdir(mode=0o700)
    (empty.root / "run").mkdir(mode=0o700)
    empty.places.run.symlink_to(empty.root / "elsewhere")
    said = empty.vtpm("up", status=None)
    assert "symlink" in told(said, CONFIGURATION)
    assert not list((empty.root / "elsewhere").iterdir())


def test_root_that_is_a_file_is_refused(empty):
    file = empty.root / "file"
    file.touch()
    said = empty.vtpm("up", "--root", file, status=None)
    assert said.status in {UNAVAILABLE, CONFIGURATION}
    assert str(file) in told(said, said.status)


def test_second_launcher_is_told_who_holds_the_root(running):
    """The control socket is gone, as after somebody cleaned /run: the lock still tells."""
    socket_file = running.places.launcher_socket
    kept = socket_file.with_name("kept.sock")
    launcher = running.pid("Domain-0")
    socket_file.rename(kept)
    try:
        said = running.vtpm("up", status=None)
        assert f"process {launcher}" in told(said, UNAVAILABLE)
    finally:
        kept.rename(socket_file)
    assert running.pid("Domain-0") == launcher
    assert set(running.rows()) == {"Domain-0", *ALL}


@pytest.mark.slow
def test_root_too_deep_for_a_socket_path_still_works():
    """107 bytes are what a socket address takes; this root alone has more."""
    with scratch_stack() as shallow:
        root = shallow.root / ("deep" * 20) / ("deeper" * 10)
        root.mkdir(parents=True, mode=0o700)
        assert len(str(root)) > 107
        deep = ScratchStack(root)
        deep.make_images()
        deep.make_boot(GUEST1)
        try:
            deep.up(*FIRST_CHAIN)
            assert deep.vtpm("device", GUEST1).out.strip() == str(deep.places.domain(GUEST1).tpm0)
            with deep.tpm() as tpm:
                assert tpm.pcr_read(4) == boot_pcrs(GUEST1)[4]
            shown = json.loads(deep.vtpm("pcrs", GUEST1, "--json").out)
            assert bytes.fromhex(shown[4]["value"]) == boot_pcrs(GUEST1)[4]
            deep.down()
            assert not deep.traces()
        finally:
            deep.tear_down()
            shutil.rmtree(root)
