"""The policy: who may talk to whom."""

import contextlib
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import ExitCode
from daemons.policy import (
    BUILT_IN,
    LocalityRule,
    NotAllowed,
    PolicyError,
    claimable_localities,
    load,
    parse,
)
from daemons.private_files import UnsafeFile
from daemons.registry import DomainRecord, Role, VtpmDevice

UUID_1 = UUID("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839")


def domain(name, label, backend=None):
    device = VtpmDevice(devid=0, backend=backend, uuid=UUID_1, handle=0) if backend else None
    return DomainRecord(
        name=name, domid=1, role=Role.GUEST, label=label, uid=1, pid=1, start_time=1,
        vtpms=(device,) if device else (),
    )  # fmt: skip


MANAGER = domain("vtpmmgr", "system_u:system_r:vtpmmgr_t")
VTPM = domain("vtpm1", "system_u:system_r:vtpm_t", "vtpmmgr")
GUEST = domain("guest1", "system_u:system_r:domU_t", "vtpm1")


def test_admit_the_platform_with_default_labels():
    BUILT_IN.admit(VTPM, MANAGER, VTPM.vtpms[0])
    BUILT_IN.admit(GUEST, VTPM, GUEST.vtpms[0])


@pytest.mark.parametrize(
    ("frontend", "backend"),
    [
        ("system_u:system_r:vtpm_t", "system_u:system_r:vtpmmgr_t"),
        ("guest1_u:vm_r:vtpm_t", "system_u:system_r:vtpmmgr_t"),
        ("guest1_u:vm_r:vtpm_t", "other_u:system_r:vtpmmgr_t"),
        ("guest1_u:vm_r:guest_t", "guest1_u:vm_r:vtpm_t"),
        ("system_u:vm_r:guest_t", "guest1_u:vm_r:vtpm_t"),
        ("guest1_u:vm_r:guest_t", "system_u:vm_r:vtpm_t"),
        ("system_u:system_r:dom0_t", "system_u:system_r:vtpm_t"),
        ("system_u:system_r:vtpmmgr_t", "system_u:system_r:hwtpm_t"),
        ("system_u:system_r:dom0_t", "system_u:system_r:hwtpm_t"),
    ],
)
def test_built_in_policy_allows(frontend, backend):
    BUILT_IN.check_labels(domain("f", frontend), domain("b", backend))


@pytest.mark.parametrize(
    ("frontend", "backend", "why"),
    [
        ("guest1_u:vm_r:guest_t", "guest2_u:vm_r:vtpm_t", "the users differ"),
        ("system_u:system_r:domU_t", "system_u:system_r:vtpmmgr_t", "vtpm_t -> vtpmmgr_t"),
        ("system_u:system_r:dom0_t", "system_u:system_r:vtpmmgr_t", "no rule"),
        ("system_u:system_r:vtpm_t", "system_u:system_r:vtpm_t", "no rule"),
        ("system_u:system_r:domU_t", "system_u:system_r:hwtpm_t", "no rule"),
        ("system_u:system_r:vtpm_t", "system_u:system_r:hwtpm_t", "no rule"),
        ("system_u:system_r:vtpm_t", "system_u:system_r:domU_t", "none at all"),
        ("system_u:system_r:vtpm_tx", "system_u:system_r:vtpmmgr_t", "no rule"),
        ("nothing", "system_u:system_r:vtpmmgr_t", "not of the form"),
    ],
)
def test_built_in_policy_refuses_and_names_labels_and_rule(frontend, backend, why):
    with pytest.raises(NotAllowed, match="may not use") as caught:
        BUILT_IN.check_labels(domain("f", frontend), domain("b", backend))
    assert f"f ({frontend})" in caught.value.what
    assert f"b ({backend})" in caught.value.what
    assert why in caught.value.why
    assert caught.value.exit_code is ExitCode.NO_PERMISSION


def test_admit_device_of_another_backend_is_refused_whatever_the_labels_say():
    other = replace(VTPM, name="vtpm2")
    with pytest.raises(NotAllowed, match="no such vtpm device"):
        BUILT_IN.admit(GUEST, other, GUEST.vtpms[0])


def test_admit_device_that_the_frontend_does_not_have_is_refused():
    invented = replace(GUEST.vtpms[0], uuid=UUID(int=1))
    with pytest.raises(NotAllowed, match="no such vtpm device"):
        BUILT_IN.admit(GUEST, VTPM, invented)


def test_default_labels_are_there_for_every_role():
    assert set(BUILT_IN.default_labels) == set(Role)
    assert BUILT_IN.default_label(Role.MANAGER) == "system_u:system_r:vtpmmgr_t"
    assert BUILT_IN.default_label(Role.VTPM) == "system_u:system_r:vtpm_t"
    assert BUILT_IN.default_label(Role.GUEST) == "system_u:system_r:domU_t"


@pytest.mark.parametrize(
    ("rules", "label", "expected"),
    [
        ([], "u:r:guest_t", {0}),
        ([("u:r:guest_t", {0, 2})], "u:r:guest_t", {0, 2}),
        ([("u:r:guest_t", {0, 2})], "u:r:other_t", set()),
        ([("*:guest_t", {0}), ("u:r:guest_t", {3})], "u:r:guest_t", {0, 3}),
        ([("*nothing", {0})], "u:r:guest_t", set()),
    ],
)
def test_claimable_localities_default_zero_else_what_the_rules_say(rules, label, expected):
    listed = [LocalityRule(pattern, frozenset(numbers)) for pattern, numbers in rules]
    assert claimable_localities(label, listed) == expected


FILE = b"""
# who may talk to whom
[labels]
guest = "tenant_u:vm_r:guest_t"

[[allow]]
frontend = "vtpm_t"
backend = "vtpmmgr_t"
same_user = false

[[allow]]
frontend = "guest_t"
backend = "vtpm_t"
"""


def test_parse_file_replaces_the_rules_and_keeps_labels_it_does_not_name():
    policy = parse(FILE, "policy.toml")
    assert policy.default_label(Role.GUEST) == "tenant_u:vm_r:guest_t"
    assert policy.default_label(Role.VTPM) == "system_u:system_r:vtpm_t"
    policy.check_labels(domain("g", "a:r:guest_t"), domain("v", "a:r:vtpm_t"))
    with pytest.raises(NotAllowed, match=r"policy\.toml"):
        policy.check_labels(GUEST, VTPM)  # domU_t is not in the file


def test_parse_empty_file_allows_nothing():
    with pytest.raises(NotAllowed):
        parse(b"", "policy.toml").check_labels(VTPM, MANAGER)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"x = \n", "line 1"),
        (b"\xff", "utf-8"),
        (b"x = 1\n", "unknown key 'x' (line 1)"),
        (b"[labels]\nking = 'u:r:t'\n", "unknown key 'king' (line 2)"),
        (b"[labels]\nguest = 'x'\n", "user:role:type"),
        (b"[labels]\nguest = 5\n", "not a text"),
        (b"labels = 3\n", "not a table"),
        (b"allow = 3\n", "not a list"),
        (b"allow = [3]\n", "no table"),
        (b"[[allow]]\nfrontend='a'\n", "[[allow]] number 1 has no backend"),
        (b"[[allow]]\nfrontend='a:b'\nbackend='c'\n", "not the type"),
        (b"[[allow]]\nfrontend='a'\nbackend='c'\nsame_user=1\n", "neither true nor false"),
        (b"[[allow]]\nfrontend='a'\nbackend='c'\nuser='*'\n", "unknown key 'user'"),
        (b"[[allow]]\n" * 257, "256"),
    ],
)
def test_parse_file_that_is_not_understood_stops_the_start(content, why):
    with pytest.raises(PolicyError) as caught:
        parse(content, "policy.toml")
    assert why in caught.value.why
    assert caught.value.exit_code is ExitCode.CONFIGURATION


@given(st.binary() | st.text().map(str.encode))
def test_parse_any_bytes_give_a_policy_or_the_named_error(content):
    with contextlib.suppress(PolicyError):
        parse(content, "policy.toml")


def test_load_without_a_file_is_the_built_in_policy(tmp_path):
    assert load(tmp_path / "policy.toml") is BUILT_IN


def test_load_file_that_others_may_write_to_is_refused(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_bytes(FILE)
    path.chmod(0o644)
    assert load(path).source == str(path)
    path.chmod(0o664)
    with pytest.raises(UnsafeFile, match="0664"):
        load(path)


def test_load_file_that_cannot_be_read_is_refused():
    with pytest.raises(UnsafeFile, match="Input/output error"):
        load(Path("/proc/self/mem"))  # at 0 there is nothing


def test_load_symlink_or_directory_or_huge_file_is_refused(tmp_path):
    real = tmp_path / "real.toml"
    real.write_bytes(FILE)
    real.chmod(0o644)
    link = tmp_path / "policy.toml"
    link.symlink_to(real)
    for path in (link, tmp_path):
        with pytest.raises(UnsafeFile):
            load(path)
    real.write_bytes(b"#" * 70000)
    with pytest.raises(UnsafeFile, match="65536"):
        load(real)
