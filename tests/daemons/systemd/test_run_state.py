"""What stands in the place of a mark, a counter or a lock is told, stays, and holds nobody up."""

import grp
import os
import stat
from types import SimpleNamespace

import pytest

from daemons.doctor.finding import State
from daemons.doctor.under_systemd import examine_marks
from daemons.errors import Failure
from daemons.places import Places
from daemons.registry import DomainRecord, Role
from daemons.systemd.run_state import RunState

PLAIN_UID = 12345


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setattr(grp, "getgrnam", lambda _: SimpleNamespace(gr_gid=0))
    places = Places(tmp_path)
    places.registry.mkdir(mode=0o700, parents=True)
    return RunState(places)


def a_fifo(path):
    os.mkfifo(path, 0o600)


def a_directory(path):
    path.mkdir()
    (path / "something").touch()


def a_loop(path):
    path.symlink_to(path.name)


def a_link(path):
    path.symlink_to(path.with_name("elsewhere"))


OBSTACLES = [a_fifo, a_directory, a_loop, a_link]


def refused_unless_done(state):
    with state.refused_unless_done("guest1"):
        pass


def locked(state):
    with state.locked():
        pass


USES = {
    "last-domid": [RunState.new_domid],
    "last-domid.new": [RunState.new_domid],
    "guest1.env": [lambda state: state.set_must_go_on("guest1", must=True)],
    "guest1.env.new": [lambda state: state.set_must_go_on("guest1", must=False)],
    "guest1.held": [
        lambda state: state.is_held("guest1"),
        lambda state: state.set_held("guest1", is_held=True),
        lambda state: state.set_held("guest1", is_held=False),
    ],
    "guest1.refused": [refused_unless_done],
    "guest1.failures": [lambda state: state.count_failure("guest1", 1.0)],
    "powered": [
        lambda state: state.is_powered,
        lambda state: state.set_powered(powered=True),
        lambda state: state.set_powered(powered=False),
    ],
    "lock": [locked],
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("name", USES)
@pytest.mark.timeout(20)
def test_what_is_in_the_way_is_told_and_stays(state, name, obstacle):
    path = state.places.registry / f".{name}"
    obstacle(path)
    before = path.lstat()
    for use in USES[name]:
        with pytest.raises(Failure, match=str(path)) as told:
            use(state)
        assert told.value.why
        assert told.value.next_step
    assert path.lstat().st_ino == before.st_ino
    assert stat.S_IFMT(path.lstat().st_mode) == stat.S_IFMT(before.st_mode)
    assert not path.with_name("elsewhere").exists()


def test_who_cannot_be_let_in_for_what_is_in_the_way_counts_as_refused(state):
    for obstacle in OBSTACLES:
        path = state.places.registry / f".{obstacle.__name__}.refused"
        obstacle(path)
        assert state.is_refused(obstacle.__name__)


def test_files_that_a_plain_user_may_not_read_are_told(state):
    directory = state.places.registry
    as_root = os.geteuid() == 0
    for name in ("last-domid", "lock", "guest1.failures", "guest1.env.new"):
        (directory / f".{name}").touch(0o000)
    if as_root:
        for path in (directory, *directory.iterdir()):
            os.chown(path, PLAIN_UID, PLAIN_UID)
        for above in directory.parents[:6]:
            above.chmod(above.stat().st_mode | 0o011)
        os.seteuid(PLAIN_UID)
    try:
        for name in ("last-domid", "lock", "guest1.failures", "guest1.env.new"):
            for use in USES[name]:
                with pytest.raises(Failure, match="Permission denied"):
                    use(state)
        directory.chmod(0o000)
        for use in USES["guest1.held"] + USES["powered"]:
            with pytest.raises(Failure, match="Permission denied"):
                use(state)
        with pytest.raises(Failure, match="Permission denied"):
            state.is_refused("guest1")
    finally:
        if as_root:
            os.seteuid(0)
        directory.chmod(0o700)


def test_marks_and_counters_say_what_was_written(state):
    for is_set in (True, True, False, False):
        state.set_held("guest1", is_held=is_set)
        state.set_powered(powered=is_set)
        assert state.is_held("guest1") is is_set
        assert state.is_powered is is_set
    assert [state.new_domid() for _ in range(3)] == [1, 2, 3]
    assert [state.count_failure("guest1", at) for at in (1.0, 2.0, 3.0, 500.0)] == [1, 2, 3, 1]
    state.set_must_go_on("guest1", must=True)
    env = state.places.registry / ".guest1.env"
    assert env.read_text() == "VTPM_GO_ON=--go-on\n"
    state.set_must_go_on("guest1", must=False)
    assert env.read_text() == "VTPM_GO_ON=\n"


DAMAGED = pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff\xfe 1", b"nan nan"])


@DAMAGED
def test_a_count_of_failures_that_cannot_be_read_begins_anew(state, content):
    (state.places.registry / ".guest1.failures").write_bytes(content)
    assert state.count_failure("guest1", 1.0) == 1


@DAMAGED
def test_no_domid_is_given_where_it_cannot_be_read_which_was_last(state, content):
    """A guest that got one again would boot on a vTPM that is not reset."""
    assert [state.new_domid() for _ in range(3)] == [1, 2, 3]
    counter = state.places.registry / ".last-domid"
    good = counter.read_bytes()
    counter.write_bytes(content)
    with pytest.raises(Failure, match="which domid was given out last"):
        state.new_domid()
    assert counter.read_bytes() == content
    counter.write_bytes(good)
    assert state.new_domid() == 4


def test_no_domid_is_given_where_the_last_is_gone_and_a_domain_is_there(state):
    record = DomainRecord(
        name="vtpm-guest1",
        domid=state.new_domid(),
        role=Role.VTPM,
        label="system_u:system_r:vtpm_t",
        uid=os.geteuid(),
        pid=None,
        start_time=None,
    )
    state.writer.put(record)
    (state.places.registry / ".last-domid").unlink()
    with pytest.raises(Failure, match="it is gone"):
        state.new_domid()
    state.writer.remove(record.name)
    assert state.new_domid() == 1


# -- what the doctor says of the marks -------------------------------------------------------------


def test_the_doctor_tells_the_marks_that_are_there(state):
    assert examine_marks(state.places, "guest1") == []
    state.set_held("guest1", is_held=True)
    state.set_must_go_on("guest1", must=True)
    state.count_failure("guest1", 1.0)
    with pytest.raises(RuntimeError), state.refused_unless_done("guest1"):
        raise RuntimeError
    found = examine_marks(state.places, "guest1")
    assert {finding.path.name for finding in found} == {
        ".guest1.held",
        ".guest1.refused",
        ".guest1.failures",
        ".guest1.env",
    }
    assert {finding.state for finding in found} == {State.FINE}


@pytest.mark.parametrize("mark", ["held", "refused", "failures", "env"])
@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_the_doctor_tells_what_stands_in_the_place_of_a_mark(state, obstacle, mark):
    path = state.places.registry / f".guest1.{mark}"
    obstacle(path)
    (found,) = examine_marks(state.places, "guest1")
    assert found.path == path
    assert found.state is State.REFUSED
    assert found.why
    assert found.next_step
