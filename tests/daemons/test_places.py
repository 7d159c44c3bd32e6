"""Places: the root rule, domain names, paths of config files, private directories."""

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daemons.errors import ExitCode
from daemons.places import (
    BadPlace,
    Places,
    check_domain_name,
)


def mode_of(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("option", "environ", "uid", "root"),
    [
        ("/opt/lab", {"VTPM_ROOT": "/elsewhere"}, 0, "/opt/lab"),
        (None, {"VTPM_ROOT": "/elsewhere"}, 0, "/elsewhere"),
        (None, {"VTPM_ROOT": ""}, 0, "/"),
        (None, {"HOME": "/home/u", "XDG_STATE_HOME": "/s"}, 0, "/"),
        (None, {"HOME": "/home/u", "XDG_STATE_HOME": "/s"}, 1000, "/s/vtpm"),
        (
            None,
            {"HOME": "/home/u", "XDG_STATE_HOME": "relative"},
            1000,
            "/home/u/.local/state/vtpm",
        ),
        (None, {"HOME": "/home/u"}, 1000, "/home/u/.local/state/vtpm"),
    ],
)
def test_choose_takes_option_then_environment_then_default(option, environ, uid, root):
    assert Places.choose(option, environ, uid=uid).root == Path(root)


def test_choose_relative_root_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Places.choose("lab/../other", {}).root == tmp_path / "other"


def test_choose_without_home_says_what_to_give():
    with pytest.raises(BadPlace, match="--root") as caught:
        Places.choose(None, {}, uid=1000)
    assert caught.value.exit_code is ExitCode.CONFIGURATION


def test_choose_root_with_nul_is_refused():
    with pytest.raises(BadPlace):
        Places.choose("/tmp/a\0b", {})


def test_places_lie_where_the_design_says():
    places = Places(Path("/r"))
    assert places.launcher_socket == Path("/r/run/vtpm/launcher.sock")
    assert places.notify_socket == Path("/r/run/vtpm/notify.sock")
    assert places.tis_socket == Path("/r/run/vtpm/hwtpm/tis.sock")
    assert places.chip_memory == Path("/r/var/lib/vtpm/hwtpm.nv")
    assert places.policy == Path("/r/etc/vtpm/policy.toml")
    assert places.settings("vtpmd") == Path("/r/etc/vtpm/vtpmd.toml")
    assert places.event_log == Path("/r/run/vtpm/event.log")
    guest = places.domain("guest1")
    assert guest.ring_socket == Path("/r/run/vtpm/guest1/ring.sock")
    assert guest.tpm0 == Path("/r/run/vtpm/guest1/tpm0")
    assert guest.journal == Path("/r/run/vtpm/guest1/journal")
    assert guest.config == Path("/r/run/vtpm/guest1/domain.cfg")
    assert guest.log == Path("/r/var/log/vtpm/guest1.log")
    assert Places(Path("/")).run == Path("/run/vtpm")


def test_relative_root_is_refused():
    with pytest.raises(BadPlace):
        Places(Path("relative"))


@pytest.mark.parametrize(
    "name", ["guest1", "vtpm-guest1", "Domain-0", "hwtpm", "a.b_c+d@e", "x" * 64]
)
def test_domain_name_plain_one_is_taken(name):
    assert check_domain_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", "a/b", "..", ".", ".hidden", "-option", "12", "a b", "a\n", "\x1b[31m", "gäst", "a\0b",
     "x" * 65, "x" * 4096, "registry", "launcher.sock", "notify.sock", "event.log",
     "powered"],
)  # fmt: skip
def test_domain_name_unsafe_one_is_refused_and_shown_escaped(name):
    with pytest.raises(BadPlace) as caught:
        Places(Path("/r")).domain(name)
    assert all(" " <= character <= "~" for character in str(caught.value))
    assert len(str(caught.value)) < 400


@given(st.text())
def test_domain_name_any_text_stays_in_its_directory_or_is_refused(name):
    places = Places(Path("/r"))
    try:
        directory = places.domain(name).directory
    except BadPlace:
        return
    assert directory.parent == places.run
    assert os.path.normpath(directory) == str(directory)


def test_under_root_takes_absolute_paths_under_the_root():
    places = Places(Path("/r"))
    assert places.under_root("/images/guest1.img") == Path("/r/images/guest1.img")
    assert places.images("//images///guest1.img") == Path("/r/images/guest1.img")
    assert Places(Path("/")).images("/images/x.img") == Path("/images/x.img")


@pytest.mark.parametrize("path", ["images/x", "/images/../../etc/passwd", "/..", "", "/a\0b"])
def test_under_root_refuses_what_could_leave_it(path):
    with pytest.raises(BadPlace):
        Places(Path("/r")).under_root(path)


@given(st.text())
def test_under_root_any_text_stays_under_the_root_or_is_refused(path):
    try:
        real = Places(Path("/r")).under_root(path)
    except BadPlace:
        return
    assert Path(os.path.normpath(real)).is_relative_to("/r")


def test_prepare_makes_private_directories_whatever_the_umask(tmp_path):
    places = Places(tmp_path / "new" / "root")
    before = os.umask(0)
    try:
        places.prepare()
    finally:
        os.umask(before)
    for directory in (places.run, places.state, places.log_dir, places.registry):
        assert mode_of(directory) == 0o700
    places.prepare()  # nothing to do, nothing to complain about


@pytest.mark.parametrize("which", ["run", "state", "log_dir", "registry"])
def test_prepare_directory_open_to_others_is_refused_with_the_command_that_helps(tmp_path, which):
    places = Places(tmp_path)
    places.prepare()
    getattr(places, which).chmod(0o750)
    with pytest.raises(BadPlace) as caught:
        places.prepare()
    assert f"chmod 700 {getattr(places, which)}" in caught.value.next_step


@pytest.mark.parametrize("planted", ["symlink", "file", "fifo"])
@pytest.mark.parametrize("where", ["run", "run/vtpm", "run/vtpm/registry", "var/lib/vtpm"])
def test_prepare_anything_but_a_directory_in_its_place_is_refused(tmp_path, planted, where):
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    root = tmp_path / "root"
    trap = root / where
    trap.parent.mkdir(parents=True, mode=0o700)
    trap.parent.chmod(0o700)
    {
        "symlink": lambda: trap.symlink_to(target),
        "file": trap.touch,
        "fifo": lambda: os.mkfifo(trap),
    }[planted]()
    with pytest.raises(BadPlace, match="symlink or not a directory"):
        Places(root).prepare()
    assert list(target.iterdir()) == []


def test_prepare_directory_of_somebody_else_is_refused(tmp_path, monkeypatch):
    places = Places(tmp_path)
    places.prepare()
    own = os.geteuid()
    if own == 0:
        os.chown(places.run, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: own + 1)
    with pytest.raises(BadPlace, match="belongs to uid"):
        places.prepare()


def test_prepare_root_that_everybody_may_write_to_is_refused_unless_sticky(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(BadPlace, match="rename"):
        Places(tmp_path).prepare()
    tmp_path.chmod(0o1777)
    Places(tmp_path).prepare()


def test_make_private_outside_the_private_places_is_our_bug(tmp_path):
    with pytest.raises(ValueError, match="not under"):
        Places(tmp_path).make_private(tmp_path / "etc")


def test_make_private_leaks_no_descriptor(tmp_path):
    places = Places(tmp_path)
    places.prepare()
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        places.prepare()
    places.run.chmod(0o755)
    for _ in range(20):
        with pytest.raises(BadPlace):
            places.prepare()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_root_without_an_end_or_a_name_is_refused(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for root in (str(tmp_path / "a"), str(tmp_path / "\udcff")):
        with pytest.raises(BadPlace, match="root cannot be used"):
            Places.choose(root, {})
