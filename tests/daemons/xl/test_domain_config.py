"""A domain's config file: what it means, what is warned about, what is refused."""

from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import Failure
from daemons.guest.loader import LoaderOptions
from daemons.registry import Role
from daemons.xl.device_specs import Disk, VtpmSpec
from daemons.xl.domain_arguments import LogLevel, ManagerArguments, VtpmArguments
from daemons.xl.domain_config import Action, disk_from_argument, parse_domain, read_domain
from daemons.xl.xl_config import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples" / "trusted-dom0"

MANAGER = """\
name="vtpmmgr"
kernel="/usr/lib/xen/boot/vtpmmgr-stubdom.gz"
extra="tpmlocality=2"
memory=8
disk=["file:/images/vtpmmgr-stubdom.img,hda,w"]
iomem=["fed42,1"]
"""
VTPM = """\
name="vtpm-guest{n}"
kernel="/usr/lib/xen/boot/vtpm-stubdom.gz"
extra="loglevel=debug"
memory=8
disk=["file:/images/vtpm-guest{n}.img,hda,w"]
vtpm=["backend=vtpmmgr,uuid={uuid}"]
"""
GUEST = """\
name="guest{n}"
kernel="/usr/lib/xen/boot/pv-grub-x86_64.gz"
memory=1024
disk=["file:/images/guest{n}.img,xvda,w"]
vif=['mac=00:01:02:03:04:0{m},bridge=br0']
vtpm=["backend=vtpm-guest{n}"]
"""
UUIDS = ("ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839", "6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f")
PLATFORM = {
    "vtpmmgr.cfg": MANAGER,
    "vtpm-guest1.cfg": VTPM.format(n=1, uuid=UUIDS[0]),
    "vtpm-guest2.cfg": VTPM.format(n=2, uuid=UUIDS[1]),
    "guest1.cfg": GUEST.format(n=1, m=5),
    "guest2.cfg": GUEST.format(n=2, m=6),
}


def test_examples_are_these_files_word_for_word():
    assert {path.name: path.read_text() for path in EXAMPLES.glob("*.cfg")} == PLATFORM


@pytest.mark.parametrize("name", PLATFORM)
def test_examples_are_read_without_a_warning(name):
    domain = read_domain(EXAMPLES / name)
    assert domain.name == name.removesuffix(".cfg")
    assert domain.warnings == ()
    assert domain.not_used == ()


def test_manager_of_the_example():
    domain = parse_domain(MANAGER)
    assert domain.role is Role.MANAGER
    assert domain.arguments == ManagerArguments(tpm_locality=2)
    assert domain.localities == (2,)
    assert domain.disk("hda") == Disk(
        target="/images/vtpmmgr-stubdom.img", vdev="hda", is_writable=True
    )
    assert domain.disk("hdb") is None
    assert (domain.memory_mib, domain.vcpus) == (8, 1)
    assert (domain.label, domain.uuid) == (None, None)
    assert (domain.on_poweroff, domain.on_reboot, domain.on_crash) == (
        Action.DESTROY,
        Action.RESTART,
        Action.RESTART,
    )


def test_vtpm_and_guest_of_the_example():
    vtpm = parse_domain(PLATFORM["vtpm-guest2.cfg"])
    assert vtpm.role is Role.VTPM
    assert vtpm.arguments == VtpmArguments(loglevel=LogLevel.DEBUG)
    assert vtpm.vtpms == (VtpmSpec(backend="vtpmmgr", uuid=UUID(UUIDS[1])),)
    guest = parse_domain(PLATFORM["guest1.cfg"])
    assert guest.role is Role.GUEST
    assert guest.arguments == LoaderOptions()
    assert guest.vtpms == (VtpmSpec(backend="vtpm-guest1", uuid=None),)
    assert guest.vifs[0].mac == "00:01:02:03:04:05"


@pytest.mark.parametrize(
    ("kernel", "role"),
    [
        ("vtpmmgr-stubdom.gz", Role.MANAGER),
        ("/a/vtpmmgr-stubdom", Role.MANAGER),
        ("/a/vtpm-stubdom-4.20.gz", Role.VTPM),
        ("/a/pv-grub-x86_32.gz", Role.GUEST),
    ],
)
def test_role_is_told_by_the_kernels_file_name(kernel, role):
    assert parse_domain(f'name="x"\nkernel="{kernel}"').role is role


@pytest.mark.parametrize("kernel", ["/boot/vmlinuz", "/vtpm-stubdom/linux", "/a/xvtpm-stubdom.gz"])
def test_role_that_cannot_be_told_is_an_error_that_says_how(kernel):
    with pytest.raises(ConfigError, match=r"tells no role.*vtpm-stubdom") as caught:
        parse_domain(f'name="x"\nkernel="{kernel}"')
    assert (caught.value.position.line, caught.value.position.column) == (2, 8)


def guest(*lines):
    return "\n".join(['name="guest1"', 'kernel="/pv-grub.gz"', *lines])


@pytest.mark.parametrize(
    ("lines", "warning"),
    [
        (["vtmp=['backend=x']"], "3: the key vtmp is not known and ignored; did you mean vtpm?"),
        (["", "zzzzzz=1"], "4: the key zzzzzz is not known and ignored"),
        (["memory=5", "memory=6"], "3: memory is set again further down"),
        (["cmdline=''", "extra='x'"], "4: root= and extra= are ignored beside cmdline="),
        (["iomem=['fee00,1']"], "3: no page of the TPM is in 'fee00,1'"),
    ],
)
def test_warnings_name_the_file_and_the_line(lines, warning):
    assert parse_domain(guest(*lines), "g.cfg").warnings == (f"g.cfg:{warning}",)


def test_keys_of_xl_without_a_meaning_here_are_listed():
    domain = parse_domain(guest("vnc=1", "maxmem=2048", "cpus='1-3'"))
    assert domain.not_used == ("cpus", "maxmem", "vnc")
    assert domain.warnings == ()


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        (MANAGER.replace("fed42", "fed40"), 'locality 2 needs iomem=["fed42,1"]'),
        (MANAGER.replace(",hda,w", ",hda,r"), "read-only"),
        (MANAGER.replace("hda", "hdb"), "block-attach"),
        (PLATFORM["vtpm-guest1.cfg"].replace(f",uuid={UUIDS[0]}", ""), "has no uuid="),
        (PLATFORM["vtpm-guest1.cfg"].replace("vtpm=[", "vif=["), "vtpm-attach"),
        (PLATFORM["vtpm-guest1.cfg"].replace("loglevel=debug", "shiny"), "no argument 'shiny'"),
    ],
)
def test_warnings_about_what_will_stop_the_domain_later(text, warning):
    assert any(warning in given for given in parse_domain(text).warnings)


def test_every_used_key_reaches_the_domain():
    domain = parse_domain(
        guest(
            "ramdisk='/initrd'",
            "root='/dev/xvda1'",
            "vcpus=0x2",
            f"uuid='{UUIDS[0]}'",
            "seclabel='guest1_u:vm_r:guest_t'",
            "on_poweroff='preserve'",
            "on_reboot='destroy'",
            "on_crash='coredump-restart'",
            "disk=['/a,,xvda']",
            "disk+=['/b,,xvdb,r']",
        ).replace("root=", "cmdline='--vtpm-label=*:vm_r:vtpm_t'#")
    )
    assert domain.ramdisk == "/initrd"
    assert domain.arguments == LoaderOptions(vtpm_label="*:vm_r:vtpm_t")
    assert domain.vcpus == 2
    assert domain.uuid == UUID(UUIDS[0])
    assert domain.label == "guest1_u:vm_r:guest_t"
    assert (domain.on_poweroff, domain.on_reboot) == (Action.PRESERVE, Action.DESTROY)
    assert domain.on_crash is Action.RESTART
    assert any("on_crash=coredump-restart cannot be done here" in w for w in domain.warnings)
    assert [disk.vdev for disk in domain.disks] == ["xvda", "xvdb"]


def test_command_line_is_root_and_extra_or_cmdline():
    def line(*lines):
        return parse_domain('name="v"\nkernel="vtpm-stubdom"\n' + "\n".join(lines)).command_line

    assert line() == ""
    assert line("extra='save'") == "save"
    assert line("root='x'") == "root=x"
    assert line("root='x'", "extra='save'") == "root=x save"
    assert line("root='x'", "extra='save'", "cmdline='clear'") == "clear"


@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ("kernel='pv-grub'", 1, 1, "name= is missing"),
        ("name=''\nkernel='pv-grub'", 1, 6, "name= is missing"),
        ("name='x'", 1, 1, "kernel= is missing"),
        ("name='a b'\nkernel='pv-grub'", 1, 6, "cannot be the name"),
        ("name='hwtpm'\nkernel='pv-grub'", 1, 6, "belongs to the platform"),
        ("name='Domain-0'\nkernel='pv-grub'", 1, 6, "belongs to the platform"),
        ("name=['x']\nkernel='pv-grub'", 1, 6, "one value, not a list"),
        (guest("memory='much'"), 3, 9, "not a number"),
        (guest("memory=0"), 3, 8, "not between"),
        (guest("memory=1", "memory+=1"), 4, 9, "+= cannot be used with numbers"),
        (guest("disk='file:/x,hda,w'"), 3, 6, "disk is a list"),
        (guest("disk=[['/x,,hda']]"), 3, 7, "an entry of disk is a string"),
        (guest("disk=['/x,,hda', '/y,,hda']"), 3, 18, "two disks are called hda"),
        (guest("disk=['/x,qcow2,hda']"), 3, 7, "only raw"),
        (guest("disk=['/x,,hda,q']"), 3, 16, "not an access"),
        (guest("vtpm=[", "  'uuid=x']"), 4, 9, "not a uuid"),
        (guest("vtpm=['']"), 3, 8, "backend= is missing"),
        (guest("iomem=['fed42']"), 3, 9, "START,COUNT"),
        (guest("uuid='x'"), 3, 7, "not a uuid"),
        (guest("seclabel='x'"), 3, 10, "user:role:type"),
        (guest("on_crash='panic'"), 3, 10, "on_crash is none of"),
        (guest("extra='--color'"), 3, 7, "loader"),
        (MANAGER.replace("tpmlocality=2", "tpmlocality=2 loc=1"), 3, 22, "no option 'loc=1'"),
        (guest("vif=[" + "''," * 65 + "]"), 3, 6 + 3 * 64, "more than 64"),
    ],
)
def test_malformed_value_is_an_error_with_line_and_column(text, line, column, reason):
    with pytest.raises(ConfigError) as caught:
        parse_domain(text, "x.cfg")
    assert reason in caught.value.reason
    assert (caught.value.position.line, caught.value.position.column) == (line, column)
    assert "x.cfg" in caught.value.what


def test_disk_of_a_block_attach_is_read_as_in_a_file():
    assert disk_from_argument("backendtype=phy,vdev=hda,access=w,target=/a").target == "/a"
    with pytest.raises(Failure, match="is not a disk"):
        disk_from_argument("nonsense")


KEYS = [
    "name",
    "kernel",
    "extra",
    "memory",
    "disk",
    "iomem",
    "vtpm",
    "vif",
    "seclabel",
    "uuid",
    "on_crash",
]
VALUES = st.recursive(
    st.sampled_from(
        [
            "'x'",
            "8",
            "'pv-grub'",
            "'vtpm-stubdom'",
            "'vtpmmgr-stubdom'",
            "'u:r:t'",
            "''",
            "'tpm2=1'",
        ]
    ),
    lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
    max_leaves=4,
)


@given(
    st.lists(st.tuples(st.sampled_from(KEYS), st.sampled_from(["=", "+="]), VALUES), max_size=12)
)
def test_any_settings_give_a_domain_or_one_error_inside_the_text(settings):
    text = "\n".join(f"{key}{operator}{value}" for key, operator, value in settings)
    try:
        parse_domain(text)
    except ConfigError as error:
        assert 0 <= error.position.offset <= len(text)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize("name", ["powered", "launcher", "registry", "event.log", "hwtpm"])
def test_names_of_the_stack_s_own_files_are_refused(name):
    with pytest.raises(Failure, match=name):
        parse_domain(f"name='{name}'\nkernel='pv-grub'")
