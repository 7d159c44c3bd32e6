#!/usr/bin/env python3
"""Make .venv and install the project in it, on a machine that has Python and nothing else.

    python3 bootstrap.py [--dev]        --dev: also what the tests and linters need

Debian's python3 comes without pip and without the means to make an environment with one. So, in
this order: `python3 -m venv` if it can bring pip; else an empty environment, filled by the
machine's own pip if there is one, else by pip's wheel from PyPI, checked against its SHA-256.
Nothing outside .venv is changed. Running it again is quick: it does what is missing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
PIP_INDEX = "https://pypi.org/pypi/pip/json"
OLDEST = (3, 11)


def fail(what: str, why: str, next_step: str) -> "None":
    """Say what went wrong and end."""
    sys.exit(f"bootstrap: {what}: {why}\n  {next_step}")


def run(*command: "str | Path") -> bool:
    """Run a program; its output is shown only when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        sys.stderr.write(done.stdout.decode(errors="replace")[-3000:])
    return done.returncode == 0


def python_of_the_right_age() -> str:
    """This Python, or a newer one beside it."""
    if sys.version_info >= OLDEST:
        return sys.executable
    for minor in range(15, OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            return found
    wanted = ".".join(map(str, OLDEST))
    fail(
        "no Python that is new enough",
        f"this is {sys.version.split()[0]}, the stack needs {wanted}",
        f"Install python{wanted} or newer and run this with it.",
    )
    raise AssertionError


def environment_has_pip() -> bool:
    """Is .venv there, of this Python, with a pip that works?"""
    return (
        PYTHON.exists()
        and (
            subprocess.run(
                [str(PYTHON), "-m", "pip", "--version"], capture_output=True, check=False
            )
        ).returncode
        == 0
    )


def make_environment(python: str) -> None:
    """Make .venv with pip in it, one way or the other."""
    print("making .venv", flush=True)
    shutil.rmtree(VENV, ignore_errors=True)
    quiet = subprocess.run([python, "-m", "venv", str(VENV)], capture_output=True, check=False)
    if quiet.returncode == 0 and environment_has_pip():
        return
    shutil.rmtree(VENV, ignore_errors=True)
    if not run(python, "-m", "venv", "--without-pip", VENV):
        fail(
            "cannot make .venv",
            "python3 -m venv failed as above",
            "Make this folder writable; on Debian, apt-get install python3-venv may help.",
        )
    own_pip = subprocess.run(
        [python, "-m", "pip", "--python", str(PYTHON), "install", "pip"],
        capture_output=True,
        check=False,
    )
    if own_pip.returncode != 0:
        install_pip_from_its_wheel()


def install_pip_from_its_wheel() -> None:
    """Fetch pip from PyPI and let it install itself: a wheel of pip can be run as it is."""
    print("fetching pip", flush=True)
    try:
        with urllib.request.urlopen(PIP_INDEX, timeout=60) as answer:
            files = json.load(answer)["urls"]
        wheel = next(f for f in files if f["packagetype"] == "bdist_wheel")
        with urllib.request.urlopen(wheel["url"], timeout=120) as answer:
            content = answer.read()
    except (OSError, ValueError, KeyError, StopIteration) as error:
        fail(
            "cannot fetch pip",
            str(error),
            "Connect to PyPI, or install pip: apt-get install python3-venv.",
        )
    if hashlib.sha256(content).hexdigest() != wheel["digests"]["sha256"]:
        fail("pip is not what PyPI says", "its SHA-256 is wrong", "Try again.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / wheel["filename"]
        path.write_bytes(content)
        if not run(PYTHON, f"{path}/pip", "install", "--no-index", path):
            fail("cannot install pip", "it failed as above", "apt-get install python3-venv.")


def install_project(*, with_dev: bool) -> None:
    """Install the project (editable) unless this very pyproject.toml was installed already."""
    what = f"{ROOT}[dev]" if with_dev else str(ROOT)
    mark = VENV / (".installed-dev" if with_dev else ".installed")
    state = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if mark.exists() and mark.read_text() == state:
        return
    print("installing the project and what it needs", flush=True)
    if not run(PYTHON, "-m", "pip", "install", "--quiet", "--editable", what):
        fail("cannot install the project", "pip failed as above", "Connect to PyPI and try again.")
    mark.write_text(state)
    if with_dev:
        (VENV / ".installed").write_text(state)


def main() -> None:
    """Do what is missing."""
    os.chdir(ROOT)
    if not environment_has_pip():
        make_environment(python_of_the_right_age())
    install_project(with_dev="--dev" in sys.argv[1:])


if __name__ == "__main__":
    main()
