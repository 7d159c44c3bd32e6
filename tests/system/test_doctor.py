"""`vtpm doctor` beside real daemons: what it says of a file is what its daemon then says."""

import json

import pytest

from tests.system.scratch_stack import (
    ALL,
    FIRST_CHAIN,
    GUEST1,
    MANAGER,
    VTPM1,
    example,
    kill_and_wait,
    registered_pids,
    scratch_stack,
    wait_until,
)

DAMAGED = 65
CONFIGS = tuple(example(name) for name in FIRST_CHAIN)


@pytest.fixture
def chain():
    """The first chain, up."""
    with scratch_stack() as made:
        made.make_images(FIRST_CHAIN)
        made.make_boot(GUEST1)
        made.up(*FIRST_CHAIN)
        yield made


def files(stack, *words, status=0):
    """What the doctor says, by path under the root."""
    groups = json.loads(stack.vtpm("doctor", "--json", *words, status=status).out)
    found = [file for group in groups for file in group["files"]]
    return {file["path"].removeprefix(f"{stack.root}/"): file for file in found}


def problems(found):
    return {path: file["why"] for path, file in found.items() if file["state"] not in FINE}


FINE = {"fine", "not there"}


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


# -- nothing wrong ---------------------------------------------------------------------------------


def test_healthy_stack_is_one_screen(running):
    said = running.vtpm("doctor")
    assert len(said.out.splitlines()) <= 24
    assert problems(files(running)) == {}
    for name in ALL:
        assert running.image(name).name in said.out


def test_it_disturbs_nobody(running):
    before = running.images(), {name: running.log(name) for name in (*ALL, "hwtpm", "launcher")}
    for _ in range(3):
        files(running)
    after = running.images(), {name: running.log(name) for name in (*ALL, "hwtpm", "launcher")}
    assert before == after


def test_stack_that_was_never_started_and_one_that_is_down_are_fine(stack):
    configs = [example(name) for name in ALL]
    assert problems(files(stack, *configs)) == {}
    stack.up(*ALL)
    stack.down()
    found = files(stack, *configs)
    assert problems(found) == {}
    assert found["var/lib/vtpm/hwtpm.nv"]["why"].startswith("state number")


# -- half dead -------------------------------------------------------------------------------------


def test_killed_launcher_and_vtpm_are_told_and_the_way_back_is_right(chain):
    pids = chain.pids()
    kill_and_wait(pids["Domain-0"], pids["fork server"], pids[VTPM1])
    found = problems(files(chain))
    assert "the launcher was killed" in found["run/vtpm/registry/launcher.lock"]
    assert "is dead" in found[f"run/vtpm/registry/{VTPM1}.json"]
    assert "vtpm up" in files(chain)["run/vtpm/registry/launcher.lock"]["next_step"]
    chain.vtpm("up")
    chain.until_running(VTPM1)
    assert problems(files(chain)) == {}


def test_damaged_journal_is_refused_with_the_reason_that_the_vtpm_gives(chain):
    pids = chain.pids()
    kill_and_wait(pids["Domain-0"], pids["fork server"], pids[VTPM1])
    flip(chain.places.domain(VTPM1).journal, 70)
    found = files(chain, status=DAMAGED)[f"run/vtpm/{VTPM1}/journal"]
    assert found["state"] == "refused"
    chain.vtpm("up")
    row = chain.until_state(VTPM1, "failed")
    assert found["why"] in row["state"]
    assert found["what"] in row["state"] + chain.log(VTPM1)


def test_damaged_record_is_refused_with_the_reason_that_the_launcher_gives(chain):
    pids = registered_pids(chain)
    kill_and_wait(chain.pids()["fork server"], *pids.values())
    record = chain.places.registry / f"{GUEST1}.json"
    good = record.read_bytes()
    record.write_bytes(good[:-20])
    found = files(chain, status=DAMAGED)[f"run/vtpm/registry/{GUEST1}.json"]
    said = chain.vtpm("up", status=DAMAGED)
    assert found["why"] == said.why
    record.write_bytes(good)


# -- damaged stores: each daemon is asked after the doctor -----------------------------------------


@pytest.fixture
def used():
    """The first chain, down, with what it has stored."""
    with scratch_stack() as made:
        made.make_images(FIRST_CHAIN)
        made.make_boot(GUEST1)
        made.up(*FIRST_CHAIN)
        made.down()
        yield made


def test_damaged_stores_are_refused_with_the_reasons_that_their_daemons_give(used):
    images = {name: used.image(name) for name in FIRST_CHAIN}
    paths = [used.places.chip_memory, *images.values()]
    good = {path: path.read_bytes() for path in paths}
    for at, path in enumerate(paths):
        path.write_bytes(b"\xa5" * 8192 + good[path][8192:])
        if path in {used.image(VTPM1), used.places.chip_memory}:  # their second slots, too
            data = bytearray(path.read_bytes())
            data[len(data) // 2 : len(data) // 2 + 4096] = b"\xa5" * 4096
            path.write_bytes(data)
        if path == used.image(MANAGER):
            path.write_bytes(b"\xa5" * 4 * 4096 + good[path][4 * 4096 :])
        found = files(used, *CONFIGS, status=DAMAGED)
        mine = found[str(path.relative_to(used.root))]
        assert mine["state"] == "refused"
        assert problems(found) == {str(path.relative_to(used.root)): mine["why"]}
        ups = [example(name) for name in FIRST_CHAIN[: max(at, 1)]]
        said = used.vtpm("up", *ups, status=DAMAGED)
        assert mine["why"] in said.why
        assert mine["next_step"][:40] in said.next_step or mine["next_step"][:40] in said.err
        used.vtpm("down", status=None)
        wait_until(lambda: not registered_pids(used), "nobody runs")
        path.write_bytes(good[path])
    used.up(*FIRST_CHAIN)


def test_settings_and_policy_are_refused_with_the_reason_that_the_launcher_gives(used):
    used.set("launcherd", "backend_wait = 1")
    found = files(used, *CONFIGS, status=DAMAGED)["etc/vtpm/launcherd.toml"]
    said = used.vtpm("up", status=78)
    assert found["why"] == said.why
    assert found["what"] == said.what
