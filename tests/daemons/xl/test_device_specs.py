"""Strings in disk=, iomem=, vtpm= and vif=."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.xl.device_specs import (
    Disk,
    VtpmSpec,
    parse_disk,
    parse_iomem,
    parse_vif,
    parse_vtpm,
)
from daemons.xl.xl_config import WrongTextError

IMAGE = Disk(target="/images/x.img", vdev="hda", is_writable=True)


@pytest.mark.parametrize(
    "spec",
    [
        "file:/images/x.img,hda,w",
        "phy:/images/x.img,hda,w",
        "raw:/images/x.img,hda,rw",
        "/images/x.img,raw,hda,rw",
        "/images/x.img,,hda",
        "/images/x.img,,hda,",
        "/images/x.img,vdev=hda",
        "format=raw, vdev=hda, access=rw, target=/images/x.img",
        "access=w,/images/x.img,raw,hda",
        "vdev=hda,direct-io-safe,no-discard,grant_usage=1,target=/images/x.img",
        " \tvdev=hda,target=/images/x.img",
    ],
)
def test_parse_disk_forms_that_mean_the_same(spec):
    assert parse_disk(spec) == IMAGE


def test_parse_disk_of_a_block_attach():
    disk = parse_disk("backendtype=phy,backend=dom0,vdev=hda,access=w,target=/dev/vg/a,b=c")
    assert disk == Disk(
        target="/dev/vg/a,b=c", vdev="hda", is_writable=True, backend="dom0", backendtype="phy"
    )


@pytest.mark.parametrize(
    ("spec", "target", "writable", "cdrom"),
    [
        ("/x.iso,,hdc,cdrom", "/x.iso", False, True),
        ("/x.iso,,hdc,,cdrom", "/x.iso", False, True),
        ("/x.iso,raw,hdc,devtype=cdrom", "/x.iso", False, True),
        ("raw:/x.iso,hdc:cdrom,ro", "/x.iso", False, True),
        (",hdc:cdrom", "", False, True),
        ("vg/x,,hdc,r", "/dev/vg/x", False, False),
        ("/x,,hdc,ro", "/x", False, False),
    ],
)
def test_parse_disk_read_only_and_cdrom(spec, target, writable, cdrom):
    disk = parse_disk(spec)
    assert (disk.target, disk.vdev) == (target, "hdc")
    assert (disk.is_writable, disk.is_cdrom) == (writable, cdrom)


@pytest.mark.parametrize("format_", ["qcow", "qcow2", "vhd"])
def test_parse_disk_format_by_prefix_or_by_name(format_):
    assert parse_disk(f"{format_}:/x,hda,w").format == format_
    assert parse_disk(f"/x,{format_},hda").format == format_


@pytest.mark.parametrize(
    ("spec", "reason", "index"),
    [
        ("", "no vdev", 0),
        ("/x", "no vdev", 0),
        (",,hda", "no target", 0),
        ("/x,,hda,x", "not an access", 8),
        ("/x,zip,hda", "not a format", 3),
        ("/x,,hda,w,more", "more than target", 10),
        ("/x,,hd a", "not a device", 4),
        ("/x,,hda,vdev=hdb", "vdev is given twice", 8),
        ("/x,,hda,target=/y", "target is given twice", 8),
        ("/x,,hda,color=red", "not a parameter", 8),
        ("/x,,hda,backendtype=magic", "not a backendtype", 8),
        ("zip:/x,hda,w", "not a prefix", 0),
        ("raw:/x,hda:floppy,w", "not a type", 7),
        ("/a\x1b,,hda", "not printable", 0),
        ("file:/a/../../etc/shadow,hda,w", "has a .. part", 5),
        ("/" + "x" * 5000, "4096", 0),
    ],
)
def test_parse_disk_malformed_says_what_and_where(spec, reason, index):
    with pytest.raises(WrongTextError, match=reason) as caught:
        parse_disk(spec)
    assert caught.value.index == index


@pytest.mark.parametrize(
    ("spec", "localities"),
    [
        ("fed42,1", (2,)),
        ("FED42,1", (2,)),
        ("0xfed40,0x5", (0, 1, 2, 3, 4)),
        ("fed40,10", (0, 1, 2, 3, 4)),
        ("fed3f,2", (0,)),
        ("fed44,1@fed40", (4,)),
        ("fed45,1", ()),
        ("0,fffffffff", (0, 1, 2, 3, 4)),
        (" fed41,2", (1, 2)),
    ],
)
def test_parse_iomem_gives_the_localities_in_the_range(spec, localities):
    assert parse_iomem(spec) == localities


@pytest.mark.parametrize(
    "spec",
    ["", "fed42", "fed42,", "fed42,0", "fed42,1,1", "fed42,-1", "fed42;1", "zz,1", "fed42,1@"],
)
def test_parse_iomem_malformed_is_refused(spec):
    with pytest.raises(WrongTextError):
        parse_iomem(spec)


UUID_TEXT = "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (f"backend=vtpmmgr,uuid={UUID_TEXT}", VtpmSpec(backend="vtpmmgr", uuid=UUID(UUID_TEXT))),
        (f"uuid={UUID_TEXT.upper()},  backend=5", VtpmSpec(backend="5", uuid=UUID(UUID_TEXT))),
        ("backend=vtpm-guest1", VtpmSpec(backend="vtpm-guest1", uuid=None)),
        (",backend=a,", VtpmSpec(backend="a", uuid=None)),
        (f"backend=a,uuid={UUID(int=0)}", VtpmSpec(backend="a", uuid=None)),
    ],
)
def test_parse_vtpm_well_formed(spec, expected):
    assert parse_vtpm(spec) == expected


@pytest.mark.parametrize(
    ("spec", "reason", "index"),
    [
        ("", "backend= is missing", 0),
        (f"uuid={UUID_TEXT}", "backend= is missing", 0),
        ("backend=a,uuid=5", "not a uuid", 15),
        (f"backend=a,uuid={{{UUID_TEXT}}}", "not a uuid", 15),
        (f"backend=a,uuid={UUID_TEXT.replace('-', '')}", "not a uuid", 15),
        ("backend=a,backend=b", "given twice", 10),
        ("backend=a, color=red", "neither backend", 11),
        ("backend=a,word", "neither backend", 10),
        ("backend=", "cannot be the name", 8),
        ("backend=../x", "cannot be the name", 8),
    ],
)
def test_parse_vtpm_malformed_says_what_and_where(spec, reason, index):
    with pytest.raises(WrongTextError, match=reason) as caught:
        parse_vtpm(spec)
    assert caught.value.index == index


def test_parse_vif_takes_mac_and_bridge_and_keeps_the_rest():
    vif = parse_vif("mac=00:01:02:03:04:05, bridge=br0,model=e1000,type=ioemu")
    assert (vif.mac, vif.bridge) == ("00:01:02:03:04:05", "br0")
    assert parse_vif("").mac is None


@pytest.mark.parametrize("spec", ["mac=1", "mac=", "mac=00:01:02:03:04:0g", "bridge=\x1b[31m"])
def test_parse_vif_malformed_is_refused(spec):
    with pytest.raises(WrongTextError):
        parse_vif(spec)


PIECES = st.lists(
    st.sampled_from(
        ["/x", ",", "=", "hda", "w", "file:", "raw:/", "target=", "backend=", ":cdrom", " "]
    )
).map("".join)


@pytest.mark.parametrize("parser", [parse_disk, parse_iomem, parse_vtpm, parse_vif])
@given(spec=st.text() | PIECES)
def test_any_text_gives_a_value_or_one_error_inside_the_text(parser, spec):
    try:
        parser(spec)
    except WrongTextError as wrong:
        assert 0 <= wrong.index <= len(spec)  # noqa: PT017 - either outcome is right
