"""Who is started again, and who gives up: root's part behind a daemon of systemd's."""

import grp
import os
from types import SimpleNamespace

import pytest

from daemons.errors import Failure
from daemons.guest.measurements import FILE_NAME as MEASUREMENTS
from daemons.places import Places
from daemons.registry import Role
from daemons.systemd import registering
from daemons.systemd.registering import FAILURES_MAX, FINAL_STATUSES, Ending, forget
from daemons.systemd.run_state import STABLE_S, RunState


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(grp, "getgrnam", lambda _: SimpleNamespace(gr_gid=0))
    made = Places(tmp_path)
    made.registry.mkdir(mode=0o700, parents=True)
    return made


@pytest.fixture
def given_up(monkeypatch):
    units = []
    monkeypatch.setattr(registering, "_give_up", lambda unit, **_: units.append(unit))
    return units


def end(places, **how):
    forget(places, "guest1", Role.GUEST, Ending(**how))


FAILED = {"result": "exit-code", "code": "exited"}


@pytest.mark.parametrize("status", sorted(FINAL_STATUSES))
def test_what_a_restart_cannot_mend_is_not_started_again(places, given_up, status):
    end(places, **FAILED, status=status)
    assert given_up == ["vtpm-guest@guest1"]


@pytest.mark.parametrize(
    "how",
    [
        {"result": "signal", "code": "killed", "status": "KILL"},
        {"result": "watchdog", "code": "killed", "status": "KILL"},
        {"result": "timeout", "code": "exited", "status": "0"},
        {"result": "success", "code": "exited", "status": "0"},
    ],
)
def test_who_is_killed_all_day_comes_back_each_time(places, given_up, how):
    for _ in range(10 * FAILURES_MAX):
        end(places, **how)
    assert not given_up


def test_who_fails_again_and_again_gives_up(places, given_up):
    for _ in range(FAILURES_MAX):
        end(places, **FAILED, status="70")
    assert not given_up
    end(places, **FAILED, status="70")
    assert given_up == ["vtpm-guest@guest1"]


def test_failures_that_are_far_apart_do_not_count_together(places, given_up, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(registering.time, "monotonic", lambda: now[0])
    for _ in range(3 * FAILURES_MAX):
        end(places, **FAILED, status="70")
        now[0] += STABLE_S
    assert not given_up


def test_who_was_refused_before_the_process_began_gives_up(places, given_up):
    with pytest.raises(RuntimeError), RunState(places).refused_unless_done("guest1"):
        raise RuntimeError
    end(places, result="exit-code")
    assert given_up == ["vtpm-guest@guest1"]


@pytest.mark.parametrize(
    "how",
    [
        {"result": "signal", "code": "killed", "status": "KILL"},
        {"result": "timeout", "code": "killed", "status": "TERM"},
    ],
)
def test_who_was_killed_before_the_process_began_was_not_refused(places, given_up, how):
    # What is in front of the manager waits for the platform's power, for one.
    class Killed(BaseException):
        pass

    with pytest.raises(Killed), RunState(places).refused_unless_done("guest1"):
        raise Killed
    assert RunState(places).is_refused("guest1"), "the mark is as a kill leaves it"
    end(places, **how)
    assert not given_up


def test_who_was_let_in_was_not_refused(places, given_up):
    with RunState(places).refused_unless_done("guest1"):
        pass
    end(places, result="exit-code")
    assert not given_up


def a_fifo(path):
    os.mkfifo(path, 0o600)


def a_directory(path):
    path.mkdir()
    (path / "something").touch()


@pytest.mark.parametrize(
    ("role", "name", "file"),
    [
        (Role.GUEST, "guest1", f"guest1/{MEASUREMENTS}"),
        (Role.VTPM, "vtpm1", "vtpm1/journal"),
        (Role.VTPM, "vtpm1", "vtpm1/requests"),
        (Role.HWTPM, "hwtpm", "hwtpm/journal"),
        (Role.HWTPM, "hwtpm", "event.log"),
    ],
)
def test_directory_in_the_place_of_a_file_is_told_and_stays(places, role, name, file):
    path = places.run / file
    path.parent.mkdir(exist_ok=True)
    a_directory(path)
    with pytest.raises(Failure, match=f"cannot remove {path}: Is a directory"):
        forget(places, name, role, Ending(result="success"))
    assert (path / "something").exists()


def test_what_the_chip_leaves_goes_though_one_thing_cannot(places):
    state = RunState(places)
    state.set_powered(powered=True)
    a_directory(places.event_log)
    left = [places.domain(name).journal for name in ("hwtpm", "vtpmmgr")]
    left += [places.domain(name).requests for name in ("hwtpm", "vtpmmgr")]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(Failure, match="cannot remove"):
        forget(places, "hwtpm", Role.HWTPM, Ending(result="success"))
    assert not [path for path in left if path.exists()]
    # So that the next start of the chip, which has no journal, does the rest.
    assert state.is_powered
    (places.event_log / "something").unlink()
    places.event_log.rmdir()
    forget(places, "hwtpm", Role.HWTPM, Ending(result="success"))
    assert not state.is_powered


@pytest.mark.timeout(20)
def test_who_is_refused_for_what_stands_in_the_place_of_the_mark_gives_up(places, given_up):
    a_fifo(places.registry / ".guest1.refused")
    with pytest.raises(Failure), RunState(places).refused_unless_done("guest1"):
        pytest.fail("it was let in")
    end(places, result="exit-code")
    assert given_up == ["vtpm-guest@guest1"]


@pytest.mark.parametrize("is_loop", [True, False])
def test_a_link_in_the_place_of_a_journal_is_no_missing_one(places, is_loop):
    """The daemon that is to go on from it refuses it; nobody above it starts again."""
    journal = places.domain("vtpm1").journal
    journal.parent.mkdir()
    assert not registering._goes_on(places, "vtpm1", Role.VTPM)
    journal.symlink_to("journal" if is_loop else "elsewhere")
    assert registering._goes_on(places, "vtpm1", Role.VTPM)
    journal.unlink()
    journal.parent.rmdir()
    journal.parent.touch()
    with pytest.raises(Failure, match="Not a directory"):
        registering._goes_on(places, "vtpm1", Role.VTPM)
