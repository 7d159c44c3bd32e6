"""`vtpm doctor` on an installation whose files are made here: no daemon runs, this process is all.

What it says of a damaged file is compared with what the daemon's own reader says.
"""

import contextlib
import gzip
import hashlib
import json
import os
import shutil
import stat
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemons import policy
from daemons import settings as daemon_settings
from daemons.chip_memory import ChipMemory
from daemons.disk import PosixDisk
from daemons.doctor.examination import examine, exit_code_of
from daemons.doctor.finding import State
from daemons.errors import ExitCode, Failure
from daemons.guest.boot_image import BootFiles, BootImage, write_boot_image
from daemons.guest.loader import measure
from daemons.guest.measurements import FILE_NAME, write_measurements
from daemons.hwtpmd import HwtpmdSettings
from daemons.instance_lock import InstanceLock
from daemons.journal import Journal, boot_id, read_journal
from daemons.launcher.event_log import EventType, event_of, read_log, write_log
from daemons.launcher.last_domid import note_count, read_count
from daemons.launcher.leftovers import launcher_lock
from daemons.launcher.wishes import WISH_NAME, Wish, note_wish, read_wish
from daemons.listeners import Kind, listen, start_time_of
from daemons.manager.request_memory import RequestMemory
from daemons.manager.vault import inspect
from daemons.registry import DomainRecord, Registry, RegistryWriter, Role, VtpmDevice
from daemons.vtpm.image import VtpmImage
from daemons.xl.domain_config import read_domain
from tests.vectors.state.make import HERE

VTPM_UUID = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
MANAGER_CFG = """\
name="vtpmmgr"
kernel="/usr/lib/xen/boot/vtpmmgr-stubdom.gz"
disk=["file:/images/manager.img,hda,w"]
iomem=["fed42,1"]
extra="tpmlocality=2"
"""
VTPM_CFG = f"""\
name="vtpm1"
kernel="/usr/lib/xen/boot/vtpm-stubdom.gz"
disk=["file:/images/vtpm.img,hda,w"]
vtpm=["backend=vtpmmgr,uuid={VTPM_UUID}"]
"""
GUEST_CFG = """\
name="guest1"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
disk=["file:/images/guest.img,xvda,w"]
vtpm=["backend=vtpm1"]
"""
CONFIGS = {"vtpmmgr": MANAGER_CFG, "vtpm1": VTPM_CFG, "guest1": GUEST_CFG}
ROLES = {
    "Domain-0": Role.DOMAIN0,
    "hwtpm": Role.HWTPM,
    "vtpmmgr": Role.MANAGER,
    "vtpm1": Role.VTPM,
    "guest1": Role.GUEST,
}
KEY = bytes(range(32))
DAMAGED = 65
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")


# -- an installation -------------------------------------------------------------------------------


class Installation:
    """Files as a running stack has them; the process of every domain is this one."""

    def __init__(self, places, opened):
        self.places = places
        self._opened = opened
        places.prepare()
        places.config.mkdir(mode=0o700, parents=True)
        (places.root / "images").mkdir(mode=0o700)
        self._make_stores()
        self._make_run_files()
        for name, config in CONFIGS.items():
            (places.root / f"{name}.cfg").write_text(config)

    @property
    def config_files(self):
        return sorted(self.places.root.glob("*.cfg"))

    def image(self, name):
        return self.places.root / "images" / f"{name}.img"

    def stop(self):
        """Take away what `vtpm down` takes away."""
        self._opened.close()
        shutil.rmtree(self.places.run)

    def _make_stores(self):
        kept = {
            self.places.chip_memory: "chip-2",
            self.image("manager"): "vault-2-anchored",
            self.image("vtpm"): "vtpm-1",
        }
        for path, vector in kept.items():
            path.write_bytes(gzip.decompress((HERE / f"{vector}.gz").read_bytes()))
            path.chmod(0o600)
        guest = self.image("guest")
        guest.write_bytes(bytes(1 << 16))
        guest.chmod(0o600)
        write_boot_image(guest, BootFiles(kernel=b"kernel", initrd=None, command_line="ro"))

    def _make_run_files(self):
        places, opened = self.places, self._opened
        opened.enter_context(launcher_lock(places))
        for path, kind in ((places.launcher_socket, Kind.STREAM),):
            opened.enter_context(listen(path, kind))
        opened.enter_context(listen(places.notify_socket, Kind.DATAGRAM))
        (places.run / "powered").write_text(boot_id().hex())
        write_log(places.event_log, [event_of(0, EventType.S_CRTM_VERSION, b"version")])
        writer = RegistryWriter(places.registry)
        for domid, (name, role) in enumerate(ROLES.items()):
            writer.put(self.record(name, role, domid))
            if role is Role.DOMAIN0:
                continue
            own = places.domain(name)
            places.make_private(own.directory)
            if name in CONFIGS:
                own.config.write_text(CONFIGS[name])
                (own.directory / "ready").touch()
            socket = {Role.HWTPM: places.tis_socket, Role.GUEST: own.tpm0}.get(
                role, own.ring_socket
            )
            kind = Kind.STREAM if role is Role.GUEST else Kind.SEQPACKET
            opened.enter_context(listen(socket, kind))
        note_count(places.registry, len(ROLES))
        for name in ("hwtpm", "vtpm1"):
            journal = Journal(places.domain(name).journal, KEY, name.encode(), b"snapshot")
            journal.append(b"record")
            journal.close()
        handles = '{"epoch": "00", "outstanding": "", "handles": [[2, 17]]}'
        places.domain("vtpmmgr").journal.write_text(handles)
        RequestMemory(places.domain("vtpmmgr").requests, b"v" * 16).close()
        with BootImage(self.image("guest")) as image:
            write_measurements(places.domain("guest1").directory, measure(image))

    def record(self, name, role, domid):
        devices = (VtpmDevice(devid=0, backend="vtpmmgr", uuid=VTPM_UUID, handle=0),)
        return DomainRecord(
            name=name,
            domid=domid,
            role=role,
            label="system_u:system_r:some_t",
            uid=os.geteuid(),
            pid=os.getpid(),
            start_time=start_time_of(os.getpid()),
            vtpms=devices if role is Role.VTPM else (),
        )

    # -- what is said of it

    def findings(self, *configs):
        return [f for group in examine(self.places, configs) for f in group.findings]

    def about(self, path, *configs):
        """The one finding about a file that is not its directory."""
        found = [f for f in self.findings(*configs) if f.path == path]
        assert len(found) == 1, found
        return found[0]

    def problems(self, *configs):
        return {
            f.path: f.state
            for f in self.findings(*configs)
            if f.state in {State.WARNING, State.REFUSED}
        }


@pytest.fixture
def stack(places):
    with contextlib.ExitStack() as opened:
        yield Installation(places, opened)


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    # In place: a journal that is another file is refused for that.
    with path.open("r+b") as file:
        file.write(data)


def everything_below(root):
    """Bytes, modes, owners and times of all files and directories."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.stat(follow_symlinks=False)
        data = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        found[path] = (data, status.st_mode, status.st_uid, status.st_ino, status.st_mtime_ns)
    return found


# -- nothing wrong ---------------------------------------------------------------------------------


def test_healthy_stack_is_one_screen_without_problems(stack, vtpm):
    said = vtpm("doctor")
    assert said.exit_code == 0
    assert stack.problems() == {}
    lines = said.output.splitlines()
    assert len(lines) < 24
    for word in ("hwtpm.nv", "manager.img", "vtpm.img", "guest.img", "launcher.lock", "journal"):
        assert word in said.output
    assert not {"warning", "refused"} & set(said.output.split())


def test_all_gives_each_file_a_line(stack, vtpm):
    said = vtpm("doctor", "--all")
    shown = [line for line in said.output.splitlines() if line.startswith("  ")]
    assert len(shown) == len(stack.findings())


def test_json_has_each_file_with_its_daemon(stack, vtpm):
    groups = json.loads(vtpm("doctor", "--json").output)
    assert [group["name"] for group in groups] == ["platform", *list(ROLES)[1:]]
    assert all(group["pid"] == os.getpid() for group in groups)
    files = [file for group in groups for file in group["files"]]
    assert {file["state"] for file in files} == {"fine", "not there"}
    assert len(files) == len(stack.findings())


def test_nothing_is_changed(stack, vtpm):
    stack.image("vtpm").write_bytes(b"garbage")
    before = everything_below(stack.places.root)
    vtpm("doctor", *stack.config_files)
    assert everything_below(stack.places.root) == before


def test_stack_that_is_down_has_nothing_wrong(stack, vtpm):
    stack.stop()
    said = vtpm("doctor", *stack.config_files)
    assert said.exit_code == 0
    assert stack.problems(*stack.config_files) == {}
    assert "manager.img" in said.output


def test_installation_that_never_was_is_not_made(places, vtpm, tmp_path):
    shutil.rmtree(places.root)
    said = vtpm("doctor")
    assert said.exit_code == 0
    assert not places.root.exists()
    tmp_path.mkdir()


def test_blank_images_before_the_first_start_are_fine(stack):
    stack.stop()
    stack.places.chip_memory.unlink()
    for name in ("manager", "vtpm"):
        stack.image(name).write_bytes(bytes(1 << 16))
    assert stack.problems(*stack.config_files) == {}
    assert stack.about(stack.places.chip_memory).state is State.ABSENT


def test_no_secret_is_shown(stack, vtpm):
    permanent = ChipMemory(PosixDisk(stack.places.chip_memory)).load()
    journal = stack.places.domain("vtpmmgr").journal
    journal.write_text('{"epoch": "5ec2e7", "outstanding": "5ec2e7", "handles": []}')
    for words in (["doctor"], ["doctor", "--all"], ["doctor", "--json"]):
        said = vtpm(*words).output
        assert "5ec2e7" not in said
        for secret in (permanent.context_key, permanent.tpm_proof, permanent.delegate_key):
            assert secret.hex() not in said
            assert repr(secret) not in said


# -- damage: the reason is the daemon's ------------------------------------------------------------


class NoRecord:
    """A manager that knows some other state."""

    def load_hash_key(self):
        return bytes(64)

    def save_hash_key(self, hash_key):
        raise AssertionError(hash_key)


def chip_memory(stack):
    return stack.places.chip_memory, lambda path: ChipMemory(PosixDisk(path)).load()


def manager_image(stack):
    return stack.image("manager"), lambda path: inspect(PosixDisk(path))


def vtpm_image(stack):
    def load(path):
        VtpmImage(PosixDisk(path), VTPM_UUID, NoRecord()).load()

    return stack.image("vtpm"), load


def guest_image(stack):
    def load(path):
        with BootImage(path) as image:
            measure(image)

    return stack.image("guest"), load


def vtpm_journal(stack):
    return stack.places.domain("vtpm1").journal, lambda path: read_journal(path, KEY, b"vtpm1")


def chip_journal(stack):
    return stack.places.domain("hwtpm").journal, lambda path: read_journal(path, KEY, b"hwtpm")


def record(stack):
    return stack.places.registry / "guest1.json", lambda path: Registry(path.parent).all()


def last_domid(stack):
    def read(path):
        return read_count(path.parent, Registry(path.parent).all())

    return stack.places.registry / ".last-domid", read


def wish(stack):
    note_wish(stack.places, "vtpm1", Wish.PRESERVED)
    path = stack.places.domain("vtpm1").directory / WISH_NAME
    return path, lambda _path: read_wish(stack.places, "vtpm1")


def event_log(stack):
    return stack.places.event_log, read_log


def copied_config(stack):
    return stack.places.domain("vtpm1").config, read_domain


def hwtpmd_settings(stack):
    path = stack.places.settings("hwtpmd")
    return path, lambda path: daemon_settings.load(path, HwtpmdSettings)


def the_policy(stack):
    return stack.places.policy, policy.load


def lock(stack):
    stack.stop()
    stack.places.prepare()
    return stack.places.registry / "launcher.lock", lambda path: InstanceLock(path, "the launcher")


FILES = [
    chip_memory,
    manager_image,
    vtpm_image,
    guest_image,
    vtpm_journal,
    chip_journal,
    record,
    last_domid,
    wish,
    event_log,
    copied_config,
    hwtpmd_settings,
    the_policy,
    lock,
]
SIZES = {"garbage": None, "short": 9}


@pytest.mark.parametrize("damage", SIZES)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.__name__)
def test_damaged_file_is_refused_with_the_daemon_s_reason(stack, vtpm, file, damage):
    path, read = file(stack)
    size = path.stat().st_size if path.exists() else 100
    path.touch(mode=0o600)
    with path.open("r+b") as opened:  # the same inode
        opened.truncate(0)
        opened.write(b"\xa5" * (SIZES[damage] or size))
    with pytest.raises(Failure) as refused:
        read(path)
    found = stack.about(path)
    assert found.state is State.REFUSED
    assert found.why == refused.value.why
    assert found.next_step
    said = vtpm("doctor")
    assert said.exit_code == DAMAGED
    first = said.output.splitlines()[0]
    assert first.startswith("refused")
    assert str(path) in first


@pytest.mark.parametrize("file", [chip_memory, manager_image], ids=lambda file: file.__name__)
def test_other_format_is_refused_by_number(stack, file):
    path, read = file(stack)
    if file is chip_memory:
        path.write_bytes((b"HWTPM-NV" + b"\x00\x09" + bytes(256 * 1024 - 10)) * 2)
    else:
        data = bytearray(path.read_bytes())
        for page in range(0, 4 * 4096, 4096):
            data[page + 16 : page + 18] = b"\x00\x09"
            content = data[page : page + 4096 - 32]
            data[page + 4096 - 32 : page + 4096] = hashlib.sha256(content).digest()
        path.write_bytes(data)
    with pytest.raises(Failure) as refused:
        read(path)
    assert stack.about(path).why == refused.value.why
    assert "9" in refused.value.why


@pytest.mark.parametrize("name", ["manager", "vtpm", "guest"])
def test_image_that_is_not_there_is_refused_as_the_launcher_does(stack, name):
    stack.image(name).unlink()
    found = stack.about(stack.image(name))
    assert found.state is State.REFUSED
    assert "No such file" in found.why
    assert "Make it with" in found.next_step


def test_image_that_others_may_write_is_refused(stack):
    stack.image("vtpm").chmod(0o666)
    found = stack.about(stack.image("vtpm"))
    assert found.state is State.REFUSED
    assert "others than its owner may write it" in found.why


def test_image_held_by_a_stranger_is_refused_and_one_held_by_its_domain_is_not(stack):
    image = stack.image("vtpm")
    with contextlib.closing(PosixDisk(image)):  # this process is the vTPM's, says its record
        assert stack.about(image).state is State.FINE
        own = stack.record("vtpm1", Role.VTPM, 3)
        RegistryWriter(stack.places.registry).put(
            DomainRecord(**{f: getattr(own, f) for f in own.__slots__} | {"pid": 1})
        )
        found = stack.about(image)
    assert found.state is State.REFUSED
    assert f"process {os.getpid()} holds it" in found.why


def test_damaged_slot_of_a_vtpm_is_a_warning_because_the_other_may_count(stack):
    flip(stack.image("vtpm"), 0)
    found = stack.about(stack.image("vtpm"))
    assert found.state is State.WARNING
    assert "slot 0 holds no vTPM state" in found.why


def test_blank_image_of_a_vtpm_that_has_served_is_refused(stack):
    stack.image("vtpm").write_bytes(bytes(1 << 14))
    found = stack.about(stack.image("vtpm"))
    assert found.state is State.REFUSED
    assert "slot 0 is blank; slot 1 is blank" in found.why


def test_blank_vtpm_image_beside_a_used_manager_is_a_warning(stack):
    stack.stop()
    stack.image("vtpm").write_bytes(bytes(1 << 14))
    assert stack.about(stack.image("vtpm"), *stack.config_files).state is State.WARNING


def test_new_chip_beside_a_used_manager_is_a_warning(stack):
    stack.stop()
    stack.places.chip_memory.unlink()
    found = stack.about(stack.places.chip_memory, *stack.config_files)
    assert found.state is State.WARNING
    assert "another chip" in found.why


# -- journals, marks, records, sockets -------------------------------------------------------------


@pytest.mark.parametrize("name", ["vtpm1", "hwtpm"])
def test_journal_that_is_gone_is_refused_while_its_tpm_is_needed(stack, name):
    journal = stack.places.domain(name).journal
    journal.unlink()
    found = stack.about(journal)
    assert (found.state, found.why) == (State.REFUSED, "it is gone")


def test_journal_of_a_vtpm_that_never_served_may_be_missing(stack):
    stack.places.domain("vtpm1").journal.unlink()
    (stack.places.domain("vtpm1").directory / "ready").unlink()
    assert stack.about(stack.places.domain("vtpm1").journal).state is State.ABSENT


def test_copied_journal_is_refused(stack):
    journal = stack.places.domain("vtpm1").journal
    copy = journal.with_name("copy")
    shutil.copy(journal, copy)
    copy.rename(journal)
    assert stack.about(journal).why == "it is a copy of the file that was written"


def test_cut_record_of_a_journal_is_refused(stack):
    journal = stack.places.domain("vtpm1").journal
    flip(journal, 128 + 8)  # the length of the first record
    assert stack.about(journal).why == "its bytes are not those that were written"


def test_run_files_of_an_earlier_boot_are_nobody_s(stack):
    (stack.places.run / "powered").write_text("00" * 16)
    stack.places.domain("vtpm1").journal.write_bytes(b"garbage")
    assert State.REFUSED not in stack.problems().values()


def test_killed_launcher_is_a_warning_with_the_way_back(stack, vtpm):
    (stack.places.registry / "launcher.lock").unlink()
    found = stack.about(stack.places.registry / "launcher.lock")
    assert found.state is State.WARNING
    assert "vtpm up" in found.next_step
    assert vtpm("doctor").exit_code == 0


@pytest.mark.parametrize(
    ("noted", "told"),
    [
        (Wish.PRESERVED, "it was shut down, and is kept"),
        (Wish.RESTART, "it is to be started again"),
        (Wish.CRASHED, "it crashed, and is kept"),
    ],
)
def test_what_is_wanted_of_a_domain_is_told(stack, noted, told):
    note_wish(stack.places, "vtpm1", noted, "a reason")
    found = stack.about(stack.places.domain("vtpm1").directory / WISH_NAME)
    assert (found.state, found.why) == (State.FINE, told)
    assert stack.problems() == {}


def test_number_of_domids_is_told_and_missed(stack):
    path = stack.places.registry / ".last-domid"
    assert stack.about(path).why == str(len(ROLES))
    path.unlink()
    found = stack.about(path)
    assert found.state is State.REFUSED
    assert "gone" in found.why


def test_dead_process_is_a_warning(stack):
    own = stack.record("vtpm1", Role.VTPM, 3)
    dead = DomainRecord(**{f: getattr(own, f) for f in own.__slots__} | {"start_time": 1})
    RegistryWriter(stack.places.registry).put(dead)
    found = stack.about(stack.places.registry / "vtpm1.json")
    assert found.state is State.WARNING
    assert "is dead" in found.why


def test_socket_that_nobody_serves_is_a_warning_while_its_daemon_lives(stack):
    path = stack.places.domain("vtpm1").ring_socket
    path.unlink()
    assert stack.about(path).state is State.WARNING
    path.write_bytes(b"")
    assert "an ordinary file" in stack.about(path).why


def test_process_that_the_registry_does_not_know_is_found_by_its_socket(stack):
    (stack.places.registry / "vtpm1.json").unlink()
    found = stack.about(stack.places.domain("vtpm1").ring_socket)
    assert found.state is State.WARNING
    assert "the registry does not know" in found.why


def test_handles_that_are_not_understood_are_a_warning(stack):
    journal = stack.places.domain("vtpmmgr").journal
    journal.write_text("[" * 60000)
    assert stack.about(journal).state is State.WARNING


def test_damaged_journal_of_requests_is_refused_as_the_manager_does(stack):
    journal = stack.places.domain("vtpmmgr").requests
    assert "records" in stack.about(journal).why
    with journal.open("r+b") as file:
        file.write(b"VTPM-XXX")
    found = stack.about(journal)
    assert found.state is State.REFUSED
    assert f"rm {journal}" in found.next_step
    with pytest.raises(Failure) as refused:
        RequestMemory(journal, b"v" * 16)
    assert found.why == refused.value.why


def test_missing_journal_of_requests_is_a_warning_while_the_manager_lives(stack):
    journal = stack.places.domain("vtpmmgr").requests
    journal.unlink()
    assert stack.about(journal).state is State.WARNING


def test_measurements_are_refused_as_vtpm_pcrs_does(stack):
    path = stack.places.domain("guest1").directory / FILE_NAME
    path.write_text('{"format": 1, "events": [{}]}')
    found = stack.about(path)
    assert found.state is State.REFUSED
    assert "vtpm reboot guest1" in found.next_step


# -- settings, directories, disks, config files ----------------------------------------------------


def test_setting_that_the_manager_refuses_is_refused(stack):
    path = stack.places.settings("vtpmmgrd")
    path.write_text('seal_pcrs = "0-99"\n')
    assert "neither a PCR" in stack.about(path).why


def test_settings_file_of_no_daemon_is_a_warning(stack):
    path = stack.places.config / "vtpm.toml"
    path.write_text("")
    assert stack.about(path).state is State.WARNING


@pytest.mark.parametrize(
    ("text", "state"), [('level = "debug"', State.FINE), ('level = "loud"', State.REFUSED)]
)
def test_log_levels_are_read_as_the_daemons_do(stack, text, state):
    stack.places.log_levels.write_text(text)
    assert stack.about(stack.places.log_levels).state is state


def test_directory_open_to_others_is_refused(stack):
    stack.places.state.chmod(0o755)
    found = stack.about(stack.places.state)
    assert found.state is State.REFUSED
    assert "chmod 700" in found.next_step


def test_config_file_is_refused_with_its_place(stack, tmp_path):
    path = tmp_path / "bad.cfg"
    path.write_text("name=")
    found = stack.about(path, path)
    assert found.state is State.REFUSED
    assert found.why


def test_long_log_is_told(stack):
    log = stack.places.log_dir / "vtpm1.log"
    with log.open("wb") as file:
        file.truncate(17 << 20)
    assert stack.about(log).state is State.WARNING


@as_root
def test_root_looks_with_the_eyes_of_the_installation_s_user(stack):
    stack.stop()
    for path in [stack.places.root, *stack.places.root.rglob("*")]:
        os.chown(path, 12345, 12345)
    root = stack.places.root
    for above in (root, *root.parents[:3]):
        above.chmod(above.stat().st_mode | 0o011)
    assert stack.problems(*stack.config_files) == {}
    assert os.geteuid() == 0


@as_root
def test_plain_user_on_somebody_else_s_installation_is_told_so(stack):
    for above in (stack.places.root, *stack.places.root.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055)
    os.seteuid(12345)
    try:
        found = stack.findings()
        status = exit_code_of(examine(stack.places))
    finally:
        os.seteuid(0)
    assert status is ExitCode.NO_PERMISSION
    hidden = [f for f in found if f.state is State.WARNING]
    assert hidden
    assert all("not looked at" in f.why for f in hidden)


# -- any bytes -------------------------------------------------------------------------------------


def run_files(stack):
    places = stack.places
    return [
        places.chip_memory,
        *(stack.image(name) for name in ("manager", "vtpm", "guest")),
        *(places.domain(name).journal for name in ("hwtpm", "vtpm1", "vtpmmgr")),
        *(places.domain(name).config for name in CONFIGS),
        places.domain("guest1").directory / FILE_NAME,
        places.registry / "vtpm1.json",
        places.registry / "launcher.lock",
        places.registry / ".last-domid",
        places.domain("vtpm1").directory / WISH_NAME,
        places.run / "powered",
        places.event_log,
        places.settings("vtpmmgrd"),
        places.policy,
        places.root / "guest1.cfg",
    ]


texts = st.sampled_from([b"[" * 50000, b'{"format": 1e999}', b'{"handles": [[1e999, 1]]}', b"{}"])


@pytest.mark.parametrize("at", range(20))
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_bytes_in_any_file_get_an_answer(stack, at, data):
    paths = run_files(stack)
    assert len(paths) == 20
    path = paths[at]
    path.touch(mode=0o600)
    good = path.read_bytes()
    mutated = bytearray(good[: 1 << 20])
    for _ in range(data.draw(st.integers(1, 8))):
        if mutated:
            near = st.integers(0, min(len(mutated), 300) - 1)
            mutated[data.draw(near | st.integers(0, len(mutated) - 1))] = data.draw(
                st.integers(0, 255)
            )
    content = data.draw(st.just(bytes(mutated)) | st.binary(max_size=300) | texts)
    cut = data.draw(st.just(len(content)) | st.integers(0, len(content)))
    with path.open("r+b") as file:
        file.truncate(cut)
        file.write(content[:cut])
    try:
        found = stack.findings(*stack.config_files)
        assert all(f.why and f.next_step for f in found if f.state in {"warning", "refused"})
    finally:
        with path.open("r+b") as file:
            file.truncate(0)
            file.write(good)


@pytest.mark.parametrize("at", range(20))
@pytest.mark.parametrize("thing", ["directory", "fifo", "link"])
def test_anything_else_in_the_place_of_a_file_gets_an_answer(stack, at, thing):
    path = run_files(stack)[at]
    path.unlink(missing_ok=True)
    if thing == "directory":
        path.mkdir()
    elif thing == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.symlink_to("/nowhere")
    stack.findings(*stack.config_files)
