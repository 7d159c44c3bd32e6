"""Config files as systemd's units use them: what is refused, and what becomes of the others."""

from __future__ import annotations

import os

import pytest

from daemons.errors import Failure
from daemons.places import Places
from daemons.systemd import generating
from daemons.systemd.domain_files import (
    check_together,
    read_all,
    read_file,
    unit_of,
    user_of,
)
from daemons.systemd.registering import give_image
from tests.system.scratch_stack import EXAMPLES

NAMES = ("guest1", "guest2", "vtpm-guest1", "vtpm-guest2", "vtpmmgr")


@pytest.fixture
def places(tmp_path):
    """An installation with the five domains of the example."""
    places = Places(tmp_path)
    places.domains.mkdir(parents=True)
    for name in NAMES:
        write(places, name, (EXAMPLES / f"{name}.cfg").read_text())
    return places


def write(places, name, text):
    path = places.domains / f"{name}.cfg"
    path.write_text(text)
    path.chmod(0o600)
    return path


def example(name):
    return (EXAMPLES / f"{name}.cfg").read_text()


def test_the_example_is_taken_as_it_is(places):
    configs, failures = read_all(places)
    assert (sorted(configs), failures) == (sorted(NAMES), [])
    for config in configs.values():
        check_together(config, configs.values())


def test_units_and_users_follow_from_names(places):
    configs, _ = read_all(places)
    units = {name: unit_of(name, config.role) for name, config in configs.items()}
    assert units == {
        "guest1": "vtpm-guest@guest1",
        "guest2": "vtpm-guest@guest2",
        "vtpm-guest1": "vtpm@vtpm-guest1",
        "vtpm-guest2": "vtpm@vtpm-guest2",
        "vtpmmgr": "vtpmmgrd",
    }
    assert user_of("guest1") == "vtpm_guest1"
    assert user_of("vtpmmgr") == "vtpm-mgr"
    assert user_of("mgr") != user_of("vtpmmgr"), "no domain is taken for a daemon"


@pytest.mark.parametrize("name", ["g" * 27, "gäst", "a.b", "a b", "a%i", "..", "$x"])
def test_a_name_that_fits_no_unit_is_refused(places, name):
    text = example("guest1").replace('"guest1"', f'"{name}"')
    with pytest.raises(Failure):
        read_file(write(places, name, text))


def test_a_file_of_another_domains_name_is_refused(places):
    path = write(places, "other", example("guest1"))
    with pytest.raises(Failure, match="guest1"):
        read_file(path)


def test_the_manager_has_one_name(places):
    path = write(places, "boss", example("vtpmmgr").replace('"vtpmmgr"', '"boss"'))
    with pytest.raises(Failure, match="vtpmmgr"):
        read_file(path)


def test_a_file_that_others_may_write_is_refused_and_the_rest_is_used(places):
    (places.domains / "guest1.cfg").chmod(0o666)
    configs, failures = read_all(places)
    assert "guest1" not in configs
    assert len(configs) == len(NAMES) - 1
    assert "guest1.cfg" in str(failures[0])


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("guest1", ("vtpm-guest1", "nobody"), "no config file"),
        ("guest1", ("vtpm-guest1", "vtpmmgr"), "is a manager"),
        ("guest1", ("vtpm-guest1", "vtpm-guest2"), "the TPM of guest2 too"),
        ("vtpm-guest1", ("vtpmmgr", "vtpm-guest2"), "is a vtpm"),
        (
            "vtpm-guest1",
            (
                "ac0a5b9e-cbe2-4c07-b43b-1d69e46fb839",
                "6c3ff5f1-8d58-4fed-b00d-a5ea9a817f7f",
            ),
            "vtpm-guest2 is the vTPM with uuid",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(places, name, change, why):
    lines = example(name).splitlines()
    changed = [line.replace(*change) if line.startswith("vtpm=") else line for line in lines]
    path = write(places, name, "\n".join(changed))
    config, _ = read_file(path)
    with pytest.raises(Failure, match=why):
        check_together(config, read_all(places)[0].values())


# -- the generator ---------------------------------------------------------------------------------


def test_the_target_wants_each_domain_and_its_socket(places, tmp_path):
    units = tmp_path / "units"
    assert generating.generate(places, units) == []
    wanted = sorted(path.name for path in (units / "vtpm-stack.target.wants").iterdir())
    assert len(wanted) == 2 * len(NAMES)
    assert "vtpm-guest@guest1.service" in wanted
    link = units / "vtpm-stack.target.wants" / "vtpm@vtpm-guest1.socket"
    assert str(link.readlink()).endswith("/systemd/system/vtpm@.socket")


def test_a_guest_may_reach_its_vtpm_and_a_vtpm_may_write_its_image(places, tmp_path):
    units = tmp_path / "units"
    generating.generate(places, units)
    guest = (units / "vtpm-guest@guest1.service.d" / generating.DROP_IN).read_text()
    assert "SupplementaryGroups=vtpm_vtpm-guest1\n" in guest
    assert "Wants=vtpm@vtpm-guest1.socket vtpm@vtpm-guest1.service\n" in guest
    assert "ReadWritePaths" not in guest
    vtpm = (units / "vtpm@vtpm-guest1.service.d" / generating.DROP_IN).read_text()
    assert f"ReadWritePaths=-{places.root}/images/vtpm-guest1.img\n" in vtpm
    assert "SupplementaryGroups" not in vtpm


def test_a_path_says_no_more_than_a_path(places, tmp_path):
    text = example("vtpm-guest1").replace("/images/vtpm-guest1.img", "/a b/%i.img")
    write(places, "vtpm-guest1", text)
    units = tmp_path / "units"
    generating.generate(places, units)
    drop_in = (units / "vtpm@vtpm-guest1.service.d" / generating.DROP_IN).read_text()
    assert f'ReadWritePaths=-"{places.root}/a b/%%i.img"' in drop_in


def test_a_bad_file_costs_the_others_nothing(places, tmp_path):
    write(places, "guest1", "name = [")
    units = tmp_path / "units"
    (failure,) = generating.generate(places, units)
    assert "guest1.cfg" in str(failure)
    assert (units / "vtpm-guest@guest2.service.d").is_dir()
    assert not (units / "vtpm-guest@guest1.service.d").exists()


def test_without_any_file_there_is_nothing(tmp_path):
    assert generating.generate(Places(tmp_path / "empty"), tmp_path / "units") == []
    assert not (tmp_path / "units").exists()


# -- images ----------------------------------------------------------------------------------------


def test_an_image_becomes_its_domains_alone(tmp_path):
    image = tmp_path / "x.img"
    image.write_bytes(bytes(16))
    image.chmod(0o666)
    give_image(image, os.geteuid(), "guest1")
    assert image.stat().st_mode & 0o777 == 0o600


def test_a_link_is_not_followed_to_somebody_elses_file(tmp_path):
    (tmp_path / "real").write_bytes(b"x")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(Failure):
        give_image(tmp_path / "link", os.geteuid(), "guest1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another one's file")
def test_another_domains_image_is_not_taken(tmp_path):
    image = tmp_path / "x.img"
    image.write_bytes(b"x")
    os.chown(image, 4711, 4711)
    with pytest.raises(Failure, match="4711"):
        give_image(image, 4712, "guest1")
    assert image.stat().st_uid == 4711
