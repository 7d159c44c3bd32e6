"""vtpm demo: it tells the truth, or fails; it cleans up after itself."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from daemons.cli.story import Story, children_left
from daemons.errors import ExitCode, Failure

DEMO_S_MAX = 20.0
SEEN = (
    "the platform is up, with 5 domains",
    "guest1 PCR 4 =",
    "guest2 PCR 5 =",
    "the disk key is sealed",
    "every process of the stack has ended",
    "the disk key unseals",
    "PCR 4 is another",
    "PCR 5 is the same",
    "TPM_WRONGPCRVAL",
    "the disk key does not unseal in guest2",
    "every process has ended",
    "the scratch root is gone",
    "All of it was seen",
)


def run_demo(*args, tmp):
    return subprocess.run(
        [sys.executable, "-m", "daemons.cli.main", "demo", *args],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "TMPDIR": str(tmp), "COLUMNS": "200"},
    )


@pytest.mark.slow
def test_demo_sees_everything_and_leaves_nothing(tmp_path):
    done = run_demo(tmp=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    places = [done.stdout.find(text) for text in SEEN]
    assert -1 not in places, SEEN[places.index(-1)]
    assert places == sorted(places)
    assert "✗" not in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_demo_that_is_stopped_leaves_nothing(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-m", "daemons.cli.main", "demo"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as process:
        is_told = False
        for line in process.stdout:
            is_told = is_told or "booted measured" in line
            if is_told:  # and again, by whoever is impatient
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    assert list(tmp_path.iterdir()) == []
    assert processes_that_name(tmp_path) == []


def processes_that_name(path):
    """Command lines that hold a path; a launcher and its fork server name their root."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(path).encode() in (line := place.read_bytes()):
                found.append(line)
    return found


def test_demo_refuses_a_root_that_is_not_empty(tmp_path):
    (tmp_path / "mine").write_text("precious")
    done = run_demo("--root", tmp_path, tmp=tmp_path)
    assert done.returncode == ExitCode.USAGE
    assert (tmp_path / "mine").read_text() == "precious"


def test_story_prints_a_mark_only_for_what_was_seen(tmp_path, capsys):
    story = Story(tmp_path)
    story.check("it is so", is_true=True)
    with pytest.raises(Failure, match="did not see that it is so too"):
        story.check("it is so too", is_true=False)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["✓", "✗"]


def test_story_sees_a_process_that_was_left():
    process = subprocess.Popen(["sleep", "60"])
    try:
        assert process.pid in children_left()
    finally:
        process.kill()
        process.wait()
    assert process.pid not in children_left()


def test_story_notices_an_unseal_that_works_where_it_must_not(tmp_path, monkeypatch):
    story = Story(tmp_path)
    monkeypatch.setattr(story, "_unseal", lambda _guest, _blob: b"the key")
    with pytest.raises(Failure, match="does not unseal in guest2"):
        story._check_refused("guest2", None, ("NOTSEALED_BLOB",))
