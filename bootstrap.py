#!/usr/bin/env python3
"""Make .venv and install the project in it, on a machine that has Python and nothing else.

    python3 bootstrap.py [--dev]        --dev: also what the tests and linters need

Debian's python3 comes without pip and without the means to make an environment with one. So, in
this order: `python3 -m venv` if it can bring pip; else an environment without, filled by the
machine's own pip if there is one, else by a wheel of pip from PyPI whose SHA-256 is written down
here. What is installed are the versions in constraints.txt, those that the project is tested with.

Nothing outside this folder is changed, and nothing is done twice: a mark in .venv says what it was
made from, and it is made anew only for another Python or in another folder. One bootstrap works in
a folder at a time. pip's own settings (PIP_INDEX_URL and so on) hold here too.
"""

import fcntl
import hashlib
import html
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
MARK = VENV / "made-from.json"
CONSTRAINTS = ROOT / "constraints.txt"
OLDEST = (3, 11)
NEWEST_LOOKED_FOR = 20

PACKAGES = ("protocol", "tpm12", "hwtpm", "daemons")
PIP_WHEEL = "pip-26.0.1-py3-none-any.whl"
PIP_SHA256 = "bdb1b08f4274833d62c1aa29e20907365a2ceb950410df15fc9521bad440122b"
PYPI = "https://pypi.org/simple"
SILENCE_S = 60
"""So long may PyPI take to answer."""
OUTPUT_CHARS = 4000
"""So much of a failed program's output is shown, from its end."""
NOT_FOR_PIP = {"PYTHONHOME", "PYTHONPATH", "PIP_PREFIX", "PIP_ROOT", "PIP_TARGET", "PIP_USER"}
"""Settings that would have packages looked for, or put, elsewhere than in .venv."""
BY_HAND = "connect to PyPI; or bring pip yourself, on Debian: apt-get install python3-venv"


def fail(what: str, why: object, next_step: str) -> NoReturn:
    """Say what went wrong, why, and what to do; end."""
    sys.exit(f"bootstrap: {what}\n  why:  {why}\n  next: {next_step}")


def say(text: str) -> None:
    """Tell what is being done, at once."""
    print(f"bootstrap: {text}", flush=True)


def run(*command: object, is_shown: bool = True) -> bool:
    """Run a program; True if it succeeded. Its output is shown only if it failed."""
    environment = {name: text for name, text in os.environ.items() if name not in NOT_FOR_PIP}
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    done = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if done.returncode and is_shown:
        sys.stderr.write(done.stdout.decode(errors="replace")[-OUTPUT_CHARS:])
    return done.returncode == 0


def go_on_with_a_new_enough_python() -> None:
    """Become a newer Python if this one is too old and a newer one is on the path."""
    if sys.version_info >= OLDEST:
        return
    for minor in range(NEWEST_LOOKED_FOR, OLDEST[1] - 1, -1):
        found = shutil.which(f"python3.{minor}")
        if found:
            os.execv(found, [found, __file__, *sys.argv[1:]])  # noqa: S606 - it is a Python
    wanted = ".".join(map(str, OLDEST))
    fail(
        "there is no Python that is new enough",
        f"this is {sys.version.split()[0]}, and the stack needs {wanted}",
        f"install Python {wanted} or newer, then: make PYTHON=/path/to/python3 ...",
    )


def own_python() -> str:
    """This Python itself, also when it runs as that of an environment."""
    return os.path.realpath(sys.executable)


def what_to_make(*, with_dev: bool) -> "dict[str, Any]":
    """What the environment depends on, as the mark in it says it."""
    declared = b"".join(path.read_bytes() for path in (ROOT / "pyproject.toml", CONSTRAINTS))
    return {
        "folder": str(ROOT),
        "python": own_python(),
        "declared": hashlib.sha256(declared).hexdigest(),
        "with_dev": with_dev,
    }


def made_before() -> "dict[str, Any]":
    """What the last run that came to its end wrote into .venv; empty if there was none."""
    try:
        mark = json.loads(MARK.read_text())
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) and PYTHON.exists() else {}


def has_pip() -> bool:
    """Is there an environment with a pip that works?"""
    return PYTHON.exists() and run(PYTHON, "-m", "pip", "--version", is_shown=False)


def make_environment() -> None:
    """Make .venv with pip in it, one way or the other."""
    say("making .venv")
    remove_environment()
    if run(own_python(), "-m", "venv", VENV, is_shown=False) and has_pip():
        return
    remove_environment()
    if not run(own_python(), "-m", "venv", "--without-pip", VENV):
        fail("cannot make .venv", "python3 -m venv failed as above", "make this folder writable")
    machines_pip = (own_python(), "-m", "pip", "--python", PYTHON, "install", "pip")
    if not (run(*machines_pip, is_shown=False) and has_pip()):
        install_pip_from_its_wheel()


def remove_environment() -> None:
    """Remove .venv."""
    if VENV.is_symlink() or VENV.is_file():
        fail(f"{VENV} is in the way", "it is not a folder", "move it away and try again")
    try:
        if VENV.exists():
            shutil.rmtree(VENV)
    except OSError as error:
        fail("cannot make .venv anew", error, f"remove it as its owner: rm -rf {VENV}")


def install_pip_from_its_wheel() -> None:
    """Fetch pip from PyPI and let it install itself: a wheel of pip can be run as it is."""
    say("fetching pip")
    index = os.environ.get("PIP_INDEX_URL") or PYPI
    try:
        page, page_url = fetch(f"{index.rstrip('/')}/pip/")
        link = re.search(f'href="([^"]*{re.escape(PIP_WHEEL)}[^"]*)"', page.decode())
        if link is None:
            fail("cannot fetch pip", f"{index} does not have {PIP_WHEEL}", BY_HAND)
        content, _ = fetch(urllib.parse.urljoin(page_url, html.unescape(link[1])))
    except (OSError, ValueError) as error:
        fail("cannot fetch pip", f"{index}: {error}", BY_HAND)
    if hashlib.sha256(content).hexdigest() != PIP_SHA256:
        fail("does not use the pip that came", f"{PIP_WHEEL} has another SHA-256", BY_HAND)
    with tempfile.TemporaryDirectory() as folder:
        wheel = Path(folder) / PIP_WHEEL
        wheel.write_bytes(content)
        if not run(PYTHON, f"{wheel}/pip", "install", "--no-index", wheel):
            fail("cannot install pip", "it failed as above", BY_HAND)


def fetch(url: str) -> "tuple[bytes, str]":
    """Get what is at an address, and the address where it was found in the end.

    A Debian without ca-certificates cannot tell whom it speaks to. It need not: what comes is used
    only if it is the one wheel that we know. (pip then brings certificates of its own.)
    """
    try:
        answer = urllib.request.urlopen(url, timeout=SILENCE_S)
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLCertVerificationError):
            raise
        unverified = ssl.create_default_context()
        unverified.check_hostname = False
        unverified.verify_mode = ssl.CERT_NONE
        answer = urllib.request.urlopen(url, timeout=SILENCE_S, context=unverified)
    with answer:
        return answer.read(), answer.geturl()


def install_project(*, with_dev: bool) -> None:
    """Install the project, editable, with what it needs."""
    say("installing what the project needs" + (", also for its tests" if with_dev else ""))
    install = (PYTHON, "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS)
    # A plain path in the environment: setuptools' finder would cost each process 30 ms.
    as_a_path = ("--config-settings", "editable_mode=compat")
    if not run(*install, *as_a_path, "--editable", ".[dev]" if with_dev else "."):
        fail("cannot install the project", "pip failed as above", "connect to PyPI and try again")
    # Else every start compiles again where Python is told not to write what it compiled.
    run(PYTHON, "-m", "compileall", "-q", *(ROOT / package for package in PACKAGES))


def do_what_is_missing(*, with_dev: bool) -> None:
    """Make the environment, or bring it up to date, if it is not what it should be."""
    before = made_before()
    wanted = what_to_make(with_dev=with_dev or before.get("with_dev", False))
    if before == wanted:
        return
    started = time.monotonic()
    if not os.access(ROOT, os.W_OK):
        fail(
            "cannot make .venv",
            f"{ROOT} is not yours to write in",
            "copy the project into a folder of your own",
        )
    parts = ("folder", "python")
    is_another = any(before.get(part, wanted[part]) != wanted[part] for part in parts)
    if is_another or not has_pip():
        make_environment()
    install_project(with_dev=wanted["with_dev"])
    MARK.write_text(json.dumps(wanted))
    say(f"ready after {time.monotonic() - started:.0f} s")


def main() -> None:
    """Do what is missing, one process at a time."""
    go_on_with_a_new_enough_python()
    with Path(__file__).open("rb") as this_file:
        fcntl.flock(this_file, fcntl.LOCK_EX)
        do_what_is_missing(with_dev="--dev" in sys.argv[1:])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
