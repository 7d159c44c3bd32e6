"""Who is let in to the hardware TPM: the policy decides on labels, the registry on pages."""

from __future__ import annotations

import os

import pytest

from daemons import policy
from daemons.errors import ExitCode, Failure
from daemons.hwtpmd import admission
from daemons.listeners import PeerCredentials, start_time_of
from daemons.places import Places
from daemons.policy import BUILT_IN, NotAllowed
from daemons.registry import DomainRecord, Registry, RegistryWriter, Role, UnknownPeer

HWTPM = "system_u:system_r:hwtpm_t"
US = PeerCredentials(
    pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), start_time=start_time_of(os.getpid())
)


@pytest.fixture
def writer(tmp_path):
    places = Places(tmp_path)
    places.prepare()
    writer = RegistryWriter(places.registry)
    put(writer, "hwtpm", Role.HWTPM, HWTPM, pid=1)
    return writer


def put(writer, name, role, label, *, pid=US.pid, localities=()):
    writer.put(
        DomainRecord(
            name=name,
            domid=1,
            role=role,
            label=label,
            uid=os.geteuid(),
            pid=pid,
            start_time=start_time_of(pid),
            localities=localities,
        )
    )


def admit(tmp_path, rules=BUILT_IN):
    return admission(Registry(Places(tmp_path).registry), rules)(US)


def test_manager_has_the_pages_that_iomem_grants(writer, tmp_path):
    put(writer, "vtpmmgr", Role.MANAGER, "system_u:system_r:vtpmmgr_t", localities=(2,))
    peer = admit(tmp_path)
    assert (peer.name, peer.localities, peer.is_platform) == ("vtpmmgr", {2}, False)


def test_platform_has_all_pages_and_the_pins(writer, tmp_path):
    put(writer, "Domain-0", Role.DOMAIN0, "system_u:system_r:dom0_t")
    peer = admit(tmp_path)
    assert (peer.localities, peer.is_platform) == ({0, 1, 2, 3, 4}, True)


@pytest.mark.parametrize(
    ("role", "label"),
    [
        (Role.GUEST, "system_u:system_r:domU_t"),
        (Role.VTPM, "system_u:system_r:vtpm_t"),
        (Role.MANAGER, "system_u:system_r:other_t"),
    ],
)
def test_pages_of_iomem_are_worth_nothing_to_a_label_without_a_rule(writer, tmp_path, role, label):
    put(writer, "somebody", role, label, localities=(0, 1, 2, 3, 4))
    with pytest.raises(NotAllowed) as raised:
        admit(tmp_path)
    assert f"somebody ({label})" in raised.value.what
    assert f"hwtpm ({HWTPM})" in raised.value.what
    assert "vtpmmgr_t -> hwtpm_t" in raised.value.why
    assert raised.value.exit_code is ExitCode.NO_PERMISSION


def test_rules_of_the_policy_file_count(writer, tmp_path):
    put(writer, "guest1", Role.GUEST, "user1:vm_r:guest_t", localities=(0,))
    rules = policy.parse(b'[[allow]]\nfrontend="guest_t"\nbackend="hwtpm_t"\n', "policy.toml")
    assert admit(tmp_path, rules).localities == {0}


def test_label_of_the_chip_counts(writer, tmp_path):
    put(writer, "hwtpm", Role.HWTPM, "system_u:system_r:precious_t", pid=1)
    put(writer, "vtpmmgr", Role.MANAGER, "system_u:system_r:vtpmmgr_t", localities=(2,))
    with pytest.raises(NotAllowed, match="precious_t"):
        admit(tmp_path)


def test_chip_without_a_record_lets_nobody_in(writer, tmp_path):
    writer.remove("hwtpm")
    put(writer, "vtpmmgr", Role.MANAGER, "system_u:system_r:vtpmmgr_t", localities=(2,))
    with pytest.raises(Failure, match="lets nobody in"):
        admit(tmp_path)


@pytest.mark.usefixtures("writer")
def test_stranger_is_refused_before_labels_are_looked_at(tmp_path):
    with pytest.raises(UnknownPeer):
        admit(tmp_path)
