"""Devices are written into the files of domains, and taken out of them."""

from uuid import UUID

import pytest

from daemons.errors import Failure
from daemons.places import Places
from daemons.systemd.device_files import attach_disk, attach_vtpm, detach_vtpm
from daemons.systemd.domain_files import path_of, read_file
from tests.system.scratch_stack import ALL, GUEST1, GUEST2, VTPM1, VTPM2, example

TWIN = "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839"


@pytest.fixture
def places(tmp_path):
    made = Places(tmp_path)
    made.domains.mkdir(mode=0o700, parents=True)
    for name in ALL:
        path = path_of(made, name)
        path.write_text(example(name).read_text())
        path.chmod(0o600)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "more.img").write_bytes(bytes(512))
    return made


def config_of(places, name):
    return read_file(path_of(places, name))[0]


def test_a_vtpm_is_taken_away_and_given_back(places):
    detach_vtpm(places, GUEST1, "0")
    assert config_of(places, GUEST1).vtpms == ()
    attach_vtpm(places, GUEST1, VTPM1, TWIN)
    (device,) = config_of(places, GUEST1).vtpms
    assert (device.backend, device.uuid) == (VTPM1, UUID(TWIN))
    detach_vtpm(places, GUEST1, TWIN)
    assert config_of(places, GUEST1).vtpms == ()
    assert path_of(places, GUEST1).stat().st_mode & 0o777 == 0o600


def test_a_disk_is_added(places):
    attach_disk(places, GUEST1, "file:/images/more.img,xvdq,w")
    assert config_of(places, GUEST1).disk("xvdq").target == "/images/more.img"


@pytest.mark.parametrize(
    ("attach", "why"),
    [
        (lambda p: attach_vtpm(p, GUEST1, VTPM1, None), "already there"),
        (lambda p: attach_vtpm(p, GUEST1, VTPM2, None), f"the TPM of {GUEST2} too"),
        (lambda p: attach_vtpm(p, GUEST1, GUEST2, None), "is a guest, not a vtpm"),
        (lambda p: attach_vtpm(p, GUEST1, "nobody", None), "no config file"),
        (lambda p: attach_vtpm(p, GUEST1, "Domain-0", None), "domain 0 serves no TPM"),
        (lambda p: attach_vtpm(p, GUEST1, VTPM2, "no"), "not a uuid"),
        (lambda p: attach_vtpm(p, "vtpmmgr", VTPM1, None), "it is the manager"),
        (lambda p: detach_vtpm(p, GUEST1, "7"), "no such device"),
        (lambda p: attach_disk(p, GUEST1, "file:/images/more.img,xvda,w"), "has a disk xvda"),
        (lambda p: attach_disk(p, GUEST1, "file:/images/none.img,xvdq,w"), "No such file"),
        (lambda p: attach_disk(p, GUEST1, "nonsense:::"), ""),
    ],
)
def test_what_cannot_be_is_refused_and_the_file_stays(places, attach, why):
    before = {path: path.read_bytes() for path in places.domains.iterdir()}
    with pytest.raises(Failure) as refused:
        attach(places)
    assert why in str(refused.value)
    assert {path: path.read_bytes() for path in places.domains.iterdir()} == before
