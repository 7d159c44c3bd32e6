"""The engine's own tests as scenarios: what they send, sent to swtpm too.

`engine_tests.txt` names the tests of `tests/tpm12` that reach a return code which no scenario of
its own reaches. Both TPMs run them under the plugin `both.py`; each file of tests is a scenario,
each test a step.
"""

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.differential.sides import Seen

CHOSEN = Path(__file__).with_suffix(".txt")
TESTS = Path(__file__).parents[1] / "tpm12"
PREFIX = "tests of "
RUN_S = 1200


def chosen():
    """The tests by the name of their scenario."""
    found: dict[str, list[str]] = {}
    for line in CHOSEN.read_text().splitlines():
        found.setdefault(f"{PREFIX}{line.split('.py')[0].removeprefix('test_')}", []).append(line)
    return found


def seen_by_test(names, *, is_on_swtpm):
    """Run tests on one of the two; what was seen of each."""
    with tempfile.TemporaryDirectory(prefix="engine-tests-") as directory:
        seen, arguments = Path(directory, "seen"), Path(directory, "arguments")
        arguments.write_text("".join(f"{_path(name)}\n" for name in names))
        command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
        command += ["-p", "tests.differential.both", "--seen", str(seen), f"@{arguments}"]
        command += ["--on-swtpm"] if is_on_swtpm else []
        ran = subprocess.run(
            command,
            cwd=TESTS.parents[1],
            timeout=RUN_S,
            check=False,
            capture_output=True,
            text=True,
        )
        if not seen.exists():
            raise AssertionError(f"the tests did not run:\n{ran.stdout}{ran.stderr}")
        return _read(seen)


def _path(name):
    """Where pytest finds a test."""
    file = name.split("::")[0]
    folder = "tests/tpm12" if (TESTS / file).exists() else "tests/tpm12/commands"
    return f"{folder}/{name}"


def _read(path):
    return {
        name: [
            Seen(
                **{
                    **each,
                    "request": bytes.fromhex(each["request"]),
                    "response": bytes.fromhex(each["response"]),
                }
            )
            for each in many
        ]
        for name, many in json.loads(path.read_text()).items()
    }


@cache
def seen_of_all(*, is_on_swtpm):
    """All of them in one run, for starting costs more than most of them."""
    names = [name for many in chosen().values() for name in many]
    return seen_by_test(names, is_on_swtpm=is_on_swtpm)
