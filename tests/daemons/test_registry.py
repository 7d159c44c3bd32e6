"""The registry: who a peer is, and what is never believed."""

import errno
import json
import os
from dataclasses import dataclass, replace
from functools import partial
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import ExitCode, NotNow
from daemons.labels import LABEL_CHARACTERS_MAX
from daemons.places import BadPlace, Places
from daemons.registry import (
    RECORD_BYTES_MAX,
    DamagedRegistry,
    DomainRecord,
    Registry,
    RegistryWriter,
    Role,
    UnknownPeer,
    VtpmDevice,
    decode_record,
    encode_record,
)

UID = os.geteuid()
DEVICE = VtpmDevice(
    devid=0, backend="vtpmmgr", uuid=UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"), handle=0
)
VTPM = DomainRecord(
    name="vtpm-guest1",
    domid=2,
    role=Role.VTPM,
    label="system_u:system_r:vtpm_t",
    uid=UID,
    pid=1002,
    start_time=777,
    vtpms=(DEVICE,),
    localities=(),
    boot_hash="0f" * 20,
)


@dataclass(frozen=True)
class Peer:
    pid: int = 1002
    uid: int = UID
    start_time: int | None = 777
    lack: str = ""


@pytest.fixture
def directory(tmp_path):
    places = Places(tmp_path)
    places.prepare()
    return places.registry


@pytest.fixture
def writer(directory):
    return RegistryWriter(directory)


@pytest.fixture
def registry(directory):
    return Registry(directory)


def test_get_gives_back_what_was_put(writer, registry):
    writer.put(VTPM)
    assert registry.get("vtpm-guest1") == VTPM
    assert registry.get("guest1") is None
    assert registry.all() == [VTPM]


def test_put_replaces_and_remove_removes(writer, registry):
    writer.put(VTPM)
    writer.put(replace(VTPM, domid=3))
    assert registry.get("vtpm-guest1").domid == 3
    writer.remove("vtpm-guest1")
    writer.remove("vtpm-guest1")
    assert registry.all() == []


def test_all_is_in_the_order_of_domids(writer, registry):
    for name, domid in (("c", 1), ("a", 3), ("b", 2)):
        writer.put(replace(VTPM, name=name, domid=domid))
    assert [record.name for record in registry.all()] == ["c", "b", "a"]


def test_put_writes_files_of_mode_0600_and_leaves_nothing_beside(writer, directory):
    before = os.umask(0)
    try:
        writer.put(VTPM)
    finally:
        os.umask(before)
    assert [entry.name for entry in directory.iterdir()] == ["vtpm-guest1.json"]
    assert (directory / "vtpm-guest1.json").stat().st_mode & 0o777 == 0o600


def test_put_after_a_launcher_killed_halfway_cleans_up_after_it(writer, registry, directory):
    (directory / ".vtpm-guest1.json.new").write_text("{ half a rec")
    assert registry.all() == []
    writer.put(VTPM)
    assert registry.all() == [VTPM]


def test_put_does_not_write_through_a_planted_symlink(writer, directory, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (directory / ".vtpm-guest1.json.new").symlink_to(victim)
    (directory / "vtpm-guest1.json").symlink_to(victim)
    writer.put(VTPM)
    assert victim.read_text() == "precious"
    assert Registry(directory).get("vtpm-guest1") == VTPM


@pytest.mark.parametrize(
    "broken",
    [
        {"name": "../evil"},
        {"label": "no label"},
        {"label": "u:r:" + "t" * LABEL_CHARACTERS_MAX},
        {"domid": -1},
        {"localities": (5,)},
        {"boot_hash": "xyz"},
    ],
)
def test_put_of_a_record_that_no_reader_would_believe_is_refused(writer, directory, broken):
    with pytest.raises(DamagedRegistry):
        writer.put(replace(VTPM, **broken))
    assert list(directory.iterdir()) == []


def test_lookup_in_the_lab_needs_pid_and_start_time(writer, registry):
    writer.put(VTPM)
    assert registry.lookup(Peer()) == VTPM
    for stranger in (
        Peer(pid=1003),
        Peer(start_time=778),
        Peer(start_time=None),
        Peer(uid=UID + 1),
    ):
        with pytest.raises(UnknownPeer):
            registry.lookup(stranger)


def test_lookup_of_a_peer_that_cannot_be_told_for_now_is_no_refusal(writer, registry):
    writer.put(VTPM)
    with pytest.raises(NotNow, match="Too many open files"):
        registry.lookup(Peer(start_time=None, lack="Too many open files"))


def test_lookup_names_the_process_and_the_registry(registry, directory):
    with pytest.raises(UnknownPeer) as caught:
        registry.lookup(Peer(pid=4711))
    assert f"process 4711 of uid {UID} is not a domain" in str(caught.value)
    assert str(directory) in caught.value.why
    assert caught.value.exit_code is ExitCode.NO_PERMISSION


def test_lookup_domain_without_a_process_is_nobody(writer, registry):
    writer.put(replace(VTPM, pid=None, start_time=None))
    with pytest.raises(UnknownPeer):
        registry.lookup(Peer(start_time=None))


def test_lookup_domain_with_a_uid_of_its_own_is_known_by_it(writer, registry):
    own = replace(VTPM, uid=UID + 4000)
    writer.put(own)
    assert registry.lookup(Peer(pid=9, uid=UID + 4000, start_time=1)) == own


def test_lookup_two_domains_for_one_process_is_nobody(writer, registry):
    writer.put(VTPM)
    writer.put(replace(VTPM, name="other", domid=3))
    with pytest.raises(UnknownPeer, match="more than one"):
        registry.lookup(Peer())


def test_lookup_sees_a_reboot_at_once(writer, registry):
    writer.put(VTPM)
    assert registry.lookup(Peer()) == VTPM
    rebooted = replace(VTPM, domid=9, pid=2000)
    writer.put(rebooted)
    assert registry.lookup(Peer(pid=2000)) == rebooted
    with pytest.raises(UnknownPeer):
        registry.lookup(Peer())


def test_lookup_goes_on_beside_a_file_that_is_not_believed(writer, registry, directory):
    writer.put(VTPM)
    (directory / "broken.json").write_text("{")
    assert registry.lookup(Peer()) == VTPM
    with pytest.raises(UnknownPeer, match="1 of its files"):
        registry.lookup(Peer(pid=9))
    with pytest.raises(DamagedRegistry):
        registry.all()


def test_lookup_without_a_directory_is_an_unknown_peer(tmp_path):
    with pytest.raises(UnknownPeer):
        Registry(tmp_path / "none").lookup(Peer())


def test_get_of_a_bad_name_is_refused(registry):
    with pytest.raises(BadPlace):
        registry.get("../../etc/passwd")


def _symlink(path):
    real = path.with_name("real")
    path.rename(real)
    path.symlink_to(real)


def _hard_link(path):
    path.with_name("second").hardlink_to(path)


def _directory(path):
    path.unlink()
    path.mkdir()


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _huge(path):
    path.write_bytes(path.read_bytes() + b" " * RECORD_BYTES_MAX)


def _renamed(path):
    path.write_bytes(encode_record(replace(VTPM, name="somebody-else")))


@pytest.mark.parametrize(
    "spoil",
    [
        _symlink,
        _hard_link,
        _directory,
        _fifo,
        _huge,
        _renamed,
        lambda path: path.chmod(0o620),
        lambda path: path.chmod(0o602),
        lambda path: path.parent.chmod(0o770),
        lambda path: path.write_bytes(b"\xff"),
        lambda path: path.write_bytes(b""),
    ],
)
def test_file_that_is_not_safe_is_never_believed(writer, registry, directory, spoil):
    writer.put(VTPM)
    assert registry.lookup(Peer()) == VTPM  # also not from what was read before
    spoil(directory / "vtpm-guest1.json")
    with pytest.raises(DamagedRegistry):
        registry.get("vtpm-guest1")
    with pytest.raises((UnknownPeer, DamagedRegistry)):
        registry.lookup(Peer())


@pytest.mark.parametrize("call", ["listdir", "read"])
def test_file_that_cannot_be_read_is_a_refusal(writer, registry, monkeypatch, call):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer.put(VTPM)
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DamagedRegistry, match="Input/output error"):
        registry.all()


@pytest.mark.skipif(UID != 0, reason="only root gives files away")
@pytest.mark.parametrize("whole_directory", [False, True])
def test_file_of_somebody_else_is_never_believed(writer, registry, directory, whole_directory):
    writer.put(VTPM)
    os.chown(directory if whole_directory else directory / "vtpm-guest1.json", 12345, -1)
    with pytest.raises(DamagedRegistry, match="belongs to uid 12345"):
        registry.get("vtpm-guest1")


def shape():
    return json.loads(encode_record(VTPM))


def test_decode_gives_back_what_was_encoded():
    assert decode_record(encode_record(VTPM)) == VTPM


@pytest.mark.parametrize("key", sorted(shape()))
def test_decode_missing_key_is_refused(key):
    fields = shape()
    del fields[key]
    with pytest.raises(DamagedRegistry):
        decode_record(json.dumps(fields).encode())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("name", "a\nb"),
        ("name", 5),
        ("domid", True),
        ("domid", 0x7FF0),
        ("domid", 1.5),
        ("role", "king"),
        ("label", "x"),
        ("uid", -1),
        ("pid", 0),
        ("pid", "1"),
        ("start_time", -1),
        ("vtpms", {}),
        ("vtpms", [{}]),
        ("vtpms", [{"devid": 0, "backend": "b", "uuid": "x", "handle": 0}]),
        ("localities", [0, 1, 2, 3, 4, 4]),
        ("localities", ["2"]),
        ("boot_hash", "AB" * 20),
        ("extra", 1),
    ],
)
def test_decode_value_out_of_range_is_refused(key, value):
    with pytest.raises(DamagedRegistry):
        decode_record(json.dumps({**shape(), key: value}).encode())


def test_decode_repeated_key_is_refused():
    text = encode_record(VTPM).replace(b'"pid": 1002', b'"pid": 1002,\n "pid": 1')
    with pytest.raises(DamagedRegistry, match="twice"):
        decode_record(text)


def test_decode_uuid_in_another_form_is_refused():
    text = encode_record(VTPM).replace(b"ac0a5b9e-", b"AC0A5B9E-")
    with pytest.raises(DamagedRegistry, match="lower-case"):
        decode_record(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.binary()
    | st.dictionaries(st.sampled_from(sorted(shape())), JSON).map(
        lambda d: json.dumps({**shape(), **d}).encode()
    )
)
def test_decode_any_bytes_give_a_record_or_the_named_error(content):
    try:
        record = decode_record(content)
    except DamagedRegistry as error:
        told = str(error)
    else:
        told = str(record)
        assert decode_record(encode_record(record)) == record
    assert told.isprintable()


@pytest.mark.parametrize("lack", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("is_file", [False, True], ids=["directory", "file"])
def test_want_of_a_descriptor_is_no_damage(directory, registry, monkeypatch, lack, is_file):
    RegistryWriter(directory).put(VTPM)
    opened = os.open

    def open_in_want(path, *arguments, dir_fd=None, **options):
        if (path == directory) is not is_file:
            raise OSError(lack, os.strerror(lack))
        return opened(path, *arguments, dir_fd=dir_fd, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", open_in_want)
        for look in (partial(registry.lookup, Peer()), partial(registry.get, VTPM.name)):
            with pytest.raises(NotNow, match=os.strerror(lack)):
                look()
    assert registry.lookup(Peer()) == VTPM
