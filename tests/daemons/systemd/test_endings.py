"""Who is started again, and who gives up: root's part behind a daemon of systemd's."""

import grp
from types import SimpleNamespace

import pytest

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


def test_who_was_let_in_was_not_refused(places, given_up):
    with RunState(places).refused_unless_done("guest1"):
        pass
    end(places, result="exit-code")
    assert not given_up
