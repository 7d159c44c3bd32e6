"""vTPM and block devices: xl's arguments in, xl's columns out."""

import json

import pytest

from daemons.errors import ExitCode

UUID = "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"
VTPM = {
    "idx": 0,
    "be": 2,
    "uuid": UUID,
    "handle": 0,
    "state": 4,
    "evt_ch": -1,
    "ring_ref": -1,
    "be_path": "/local/domain/2/backend/vtpm/3/0",
}


def test_vtpm_list_has_the_columns_of_xl(launcher, vtpm):
    launcher.answers["vtpm_list"] = [VTPM]
    done = vtpm("vtpm-list", "guest1")
    assert launcher.calls == [("vtpm_list", {"domains": ["guest1"]})]
    assert done.stdout.splitlines() == [
        "Idx BE Uuid                                 handle state evt-ch ring-ref BE-path   ",
        f"0   2  {UUID}      0     4     -1       -1 /local/domain/2/backend/vtpm/3/0",
    ]


def test_vtpm_list_as_json(launcher, vtpm):
    launcher.answers["vtpm_list"] = [VTPM]
    assert json.loads(vtpm("vtpm-list", "--json", "guest1", "guest2").stdout) == [VTPM]
    assert launcher.calls == [("vtpm_list", {"domains": ["guest1", "guest2"]})]


def test_vtpm_attach_takes_separate_words(launcher, vtpm):
    done = vtpm("vtpm-attach", "guest1", f"uuid={UUID.upper()}", "backend=vtpm-guest1")
    assert done.exit_code == 0
    assert launcher.calls == [
        ("vtpm_attach", {"domain": "guest1", "backend": "vtpm-guest1", "uuid": UUID})
    ]


def test_vtpm_attach_without_words_means_domain_0(launcher, vtpm):
    assert vtpm("vtpm-attach", "guest1").exit_code == 0
    assert launcher.calls == [("vtpm_attach", {"domain": "guest1", "backend": "Domain-0"})]


@pytest.mark.parametrize("word", ["backend", "colour=red", "uuid=12", "uuid="])
def test_vtpm_attach_refuses_other_words(launcher, vtpm, word):
    done = vtpm("vtpm-attach", "guest1", word)
    assert done.exit_code == ExitCode.USAGE
    assert launcher.calls == []


@pytest.mark.parametrize("device", ["0", UUID])
def test_vtpm_detach_by_number_or_uuid(launcher, vtpm, device):
    assert vtpm("vtpm-detach", "guest1", device).exit_code == 0
    assert launcher.calls == [("vtpm_detach", {"domain": "guest1", "devid_or_uuid": device})]


def test_block_attach_takes_one_string_or_words(launcher, vtpm):
    spec = "backendtype=phy,backend=hardware,vdev=hda,access=w,target=/dev/lvm/vtpmmgr"
    assert vtpm("block-attach", "vtpmmgr", spec).exit_code == 0
    assert vtpm("block-attach", "vtpmmgr", *spec.split(",")).exit_code == 0
    assert launcher.calls == [("block_attach", {"domain": "vtpmmgr", "spec": spec})] * 2


def test_block_list_has_the_columns_of_xl(launcher, vtpm):
    disk = {
        "vdev": 51712,
        "be": 0,
        "handle": 3,
        "state": 4,
        "evt_ch": -1,
        "ring_ref": -1,
        "be_path": "/local/domain/0/backend/vbd/3/51712",
    }
    launcher.answers["block_list"] = [disk]
    assert vtpm("block-list", "guest1").stdout.splitlines() == [
        "Vdev  BE  handle state evt-ch ring-ref BE-path" + 23 * " ",
        "51712 0   3      4     -1     -1       /local/domain/0/backend/vbd/3/51712",
    ]
    assert json.loads(vtpm("block-list", "guest1", "--json").stdout) == [disk]
