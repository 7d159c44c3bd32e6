"""Who may be a client of the manager: the registry, the labels, and nothing a peer says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from daemons.errors import ExitCode, Failure
from daemons.labels import Label
from daemons.listeners import PeerCredentials
from daemons.manager.admission import Admission, NotAdmitted, is_listed, label_patterns
from daemons.policy import BUILT_IN, NotAllowed
from daemons.registry import (
    DomainRecord,
    Registry,
    RegistryWriter,
    Role,
    UnknownPeer,
    VtpmDevice,
)

UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")
ADMINISTRATOR = "system_u:system_r:vtpm_t"
DEVICE = VtpmDevice(devid=0, backend="vtpmmgr", uuid=UUID_1, handle=0)
VTPM = DomainRecord(
    name="vtpm-guest1",
    domid=3,
    role=Role.VTPM,
    label="guest1_u:vm_r:vtpm_t",
    uid=2001,
    pid=100,
    start_time=5,
    vtpms=(DEVICE,),
    boot_hash="b0" * 20,
)
MANAGER = DomainRecord(
    name="vtpmmgr",
    domid=2,
    role=Role.MANAGER,
    label="system_u:system_r:vtpmmgr_t",
    uid=2000,
    pid=99,
    start_time=4,
)
CREDENTIALS = PeerCredentials(pid=100, uid=2001, gid=2001, start_time=5)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "registry"
    directory.mkdir(mode=0o700)
    RegistryWriter(directory).put(MANAGER)
    RegistryWriter(directory).put(VTPM)
    return directory


@pytest.fixture
def writer(directory: Path) -> RegistryWriter:
    return RegistryWriter(directory)


@pytest.fixture
def admission(directory: Path) -> Admission:
    return Admission("vtpmmgr", Registry(directory), BUILT_IN, (ADMINISTRATOR,))


def test_vtpm_is_admitted_with_what_the_registry_says(admission: Admission):
    peer = admission.admit(CREDENTIALS)
    assert (peer.domain, peer.device) == (VTPM, DEVICE)
    client = admission.client(replace(peer, connection_id=7))
    assert client.uuid == UUID_1
    assert client.domain == "vtpm-guest1"
    assert client.connection_id == 7
    assert client.boot_hash == b"\xb0" * 20
    assert not client.is_administrator


def test_administrator_is_who_the_settings_say(admission: Admission, writer: RegistryWriter):
    writer.put(replace(VTPM, label=ADMINISTRATOR))
    assert admission.client(admission.admit(CREDENTIALS)).is_administrator


def test_unmeasured_domain_has_a_boot_hash_of_zeros(admission: Admission, writer: RegistryWriter):
    writer.put(replace(VTPM, boot_hash=""))
    assert admission.client(admission.admit(CREDENTIALS)).boot_hash == bytes(20)


def test_stranger_is_refused(admission: Admission):
    with pytest.raises(UnknownPeer):
        admission.admit(replace(CREDENTIALS, pid=101, uid=7777))


@pytest.mark.parametrize("label", ["guest1_u:vm_r:guest_t", "a:b:dom0_t", "a:vm_r:vtpmmgr_t"])
def test_other_type_is_refused(admission: Admission, writer: RegistryWriter, label: str):
    writer.put(replace(VTPM, label=label))
    with pytest.raises(NotAllowed):
        admission.admit(CREDENTIALS)


@pytest.mark.parametrize("devices", [(), (replace(DEVICE, backend="vtpm-guest2"),)])
def test_domain_without_a_device_of_ours_is_refused(
    admission: Admission, writer: RegistryWriter, devices: tuple[VtpmDevice, ...]
):
    writer.put(replace(VTPM, vtpms=devices))
    with pytest.raises(NotAdmitted, match="vtpm-guest1"):
        admission.admit(CREDENTIALS)


def test_device_of_another_backend_is_never_a_client(admission: Admission):
    peer = admission.admit(CREDENTIALS)
    foreign = replace(peer, device=replace(DEVICE, devid=1, backend="other"))
    with pytest.raises(NotAdmitted):
        admission.client(foreign)


def test_vtpm_is_attached_while_a_domain_has_it(admission: Admission, writer: RegistryWriter):
    assert admission.is_attached(UUID_1)
    assert not admission.is_attached(UUID(int=1))
    writer.put(replace(VTPM, pid=None, start_time=None))
    assert admission.is_attached(UUID_1)
    writer.put(replace(VTPM, vtpms=(replace(DEVICE, backend="another"),)))
    assert not admission.is_attached(UUID_1)
    writer.remove(VTPM.name)
    assert not admission.is_attached(UUID_1)


def test_manager_that_is_not_registered_admits_nobody(admission: Admission, writer: RegistryWriter):
    writer.remove("vtpmmgr")
    with pytest.raises(Failure, match="does not serve"):
        admission.admit(CREDENTIALS)


@pytest.mark.parametrize("boot_hash", ["b0", "zz" * 20, "00" * 32])
def test_boot_hash_that_is_none_is_refused(admission: Admission, boot_hash: str):
    peer = admission.admit(CREDENTIALS)
    broken = replace(peer, domain=replace(VTPM, boot_hash=boot_hash))
    with pytest.raises(NotAdmitted, match="vtpm-guest1"):
        admission.client(broken)


@pytest.mark.parametrize(
    ("label", "listed"),
    [
        ("system_u:system_r:vtpm_t", True),
        ("guest1_u:vm_r:vtpm_t", True),
        ("guest1_u:vm_r:guest_t", False),
        ("guest1_u:system_r:vtpm_t", False),
        ("x:y:vm_r:vtpm_t", False),
        ("guest1_u:vm_r:vtpm_t:s0", False),
        ("u:vm_r:xvtpm_t", False),
    ],
)
def test_star_stands_for_the_user_and_nothing_else(label: str, *, listed: bool):
    patterns = ("system_u:system_r:vtpm_t", "*:vm_r:vtpm_t")
    assert is_listed(Label.parse(label), patterns) is listed


def test_administrators_are_read_from_the_setting():
    assert label_patterns("") == ()
    assert label_patterns("a:b:c, *:vm_r:vtpm_t") == ("a:b:c", "*:vm_r:vtpm_t")


@pytest.mark.parametrize("text", ["vtpm_t", "*", "*:vtpm_t", "a:*:c", "a:b:c d:e:f"])
def test_administrator_that_is_no_label_stops_the_start(text: str):
    with pytest.raises(Failure) as refused:
        label_patterns(text)
    assert refused.value.exit_code == ExitCode.CONFIGURATION
