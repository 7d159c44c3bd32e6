"""The documents are true: what they name is there, and the README's step by step works as written.

Checked: links; names of files, tests, and members of classes; `vtpm` subcommands and their options;
exit statuses; the list of TPM commands that are missing; code examples.
"""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer

from daemons.cli.app import app
from daemons.errors import ExitCode
from tpm12.commands import ALL

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")])
PACKAGES = ("protocol", "tpm12", "hwtpm", "daemons")
TOPS = (*PACKAGES, "tests", "docs", "examples", "benchmarks", "systemd", ".ci")
STEPS_LIMIT_S = 120

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(re.escape(top) for top in TOPS)})/[\w./*-]*")
_CODE = re.compile(r"^```.*?^```|^(?: {4}|\t).*?$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_TEST = re.compile(r"`(test_\w+)`")
_MEMBER = re.compile(r"`([A-Z]\w*)\.(\w+)(?:\(\))?`")
_COMMAND = re.compile(r"(?:^|[\s`(;|])vtpm((?: --root \S+)?(?: [a-z][a-z-]+(?![\w-]))+)")
_FENCE = re.compile(r"^```(\w+)(?: (\w+))?\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)


def sources(*tops):
    return [path for top in tops for path in (ROOT / top).rglob("*.py")]


def slug(heading):
    """The anchor that hosting platforms give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


def headings(text):
    return {slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def code_of(document):
    return "\n".join(_CODE.findall(document.read_text()))


# -- what is named is there ------------------------------------------------------------------------


@every_document
def test_links_lead_somewhere(document):
    for target in _LINK.findall(document.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), f"{target} is not there"
        if anchor:
            assert anchor in headings(found.read_text()), f"{target}: no such heading"


@every_document
def test_paths_exist(document):
    for path in _PATH.findall(document.read_text()):
        plain = path.rstrip(".-/")
        assert list(ROOT.glob(plain)), f"{plain} is not there"


@pytest.fixture(scope="module")
def tests_by_name():
    names = set()
    for path in sources("tests"):
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
    return names


@every_document
def test_tests_exist(document, tests_by_name):
    missing = set(_TEST.findall(document.read_text())) - tests_by_name
    assert not missing, f"no test is called {', '.join(sorted(missing))}"


@pytest.fixture(scope="module")
def members():
    """Names in the bodies of our classes, and attributes that their methods set."""
    found = {}
    for path in sources(*PACKAGES):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                names = found.setdefault(node.name, set())
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                        names.add(inner.name)
                    elif isinstance(inner, ast.AnnAssign | ast.Assign):
                        targets = inner.targets if isinstance(inner, ast.Assign) else [inner.target]
                        names |= {getattr(t, "id", getattr(t, "attr", "")) for t in targets}
    return found


@every_document
def test_members_of_classes_exist(document, members):
    for owner, member in _MEMBER.findall(document.read_text()):
        if member in {"md", "json", "cfg"}:
            continue
        assert owner in members, f"there is no class {owner}"
        assert member in members[owner], f"{owner} has no {member}"


# -- the command -----------------------------------------------------------------------------------


def subcommands():
    """Click commands by their words: "create", "image make"."""
    found = {}
    table = typer.main.get_command(app)
    for word in table.list_commands(None):
        command = table.get_command(None, word)
        below = getattr(command, "commands", None)
        if below is None:
            found[word] = command
        else:
            found |= {f"{word} {inner}": each for inner, each in below.items()}
    return found


SUBCOMMANDS = subcommands()
FIRST_WORDS = {words.split()[0] for words in SUBCOMMANDS}


@every_document
def test_subcommands_exist(document):
    for words in _COMMAND.findall(code_of(document)):
        first, *more = re.sub(r"^ --root \S+", "", words).split()
        assert first in FIRST_WORDS, f"vtpm {first} does not exist"
        if first not in SUBCOMMANDS and more:
            assert f"{first} {more[0]}" in SUBCOMMANDS, f"vtpm {first} {more[0]} does not exist"


def reference():
    """Sections of docs/commands.md by the words of their command."""
    text = (ROOT / "docs/commands.md").read_text()
    parts = re.split(r"^#{2,3} (.+)$", text, flags=re.MULTILINE)
    return {
        heading.strip("`").removeprefix("vtpm "): body
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
        if heading.startswith("`vtpm ")
    }


def test_reference_has_every_subcommand_and_no_other():
    assert reference().keys() == SUBCOMMANDS.keys()


@pytest.mark.parametrize("words", SUBCOMMANDS)
def test_reference_has_every_option_and_no_other(words):
    body = reference()[words]
    declared = {opt for param in SUBCOMMANDS[words].params for opt in param.opts if opt[0] == "-"}
    named = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*\b", body))
    assert named <= declared | {"--root"}, f"not options: {named - declared}"
    assert declared - {"--root", "--help"} <= named, f"not described: {declared - named}"


def test_reference_has_every_exit_status():
    told = re.findall(r"^\| (\d+) \|", (ROOT / "docs/commands.md").read_text(), re.MULTILINE)
    assert [int(status) for status in told] == sorted(ExitCode)


# -- the TPM's commands ----------------------------------------------------------------------------


def test_missing_ordinals_are_those_that_the_engine_does_not_have():
    text = (ROOT / "docs/conformance.md").read_text()
    done = {int(found, 16) for found in re.findall(r"^\| (0x\w{8}) .*\| done", text, re.MULTILINE)}
    assert done == {declared.ordinal for declared in ALL}, "run `make conformance`"


# -- examples --------------------------------------------------------------------------------------


def fences(document, language):
    found = _FENCE.findall(document.read_text())
    return [(needs, text) for tongue, needs, text in found if tongue == language]


@every_document
def test_python_examples_compile_and_import_what_is_there(document):
    for _, text in fences(document, "python"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def readme_steps():
    """The README's shell blocks in order, but those that need programs that are not here."""
    has_trousers = shutil.which("tcsd") and shutil.which("tpm_version") and os.geteuid() == 0
    return [
        text
        for needs, text in fences(ROOT / "README.md", "sh")
        if not needs or (needs == "trousers" and has_trousers)
    ]


@pytest.mark.slow
def test_steps_of_the_readme_work_as_written():
    (python,) = (text for _, text in fences(ROOT / "README.md", "python"))
    *steps, down = readme_steps()
    with tempfile.TemporaryDirectory(prefix="vtpm-steps-") as home:
        example = Path(home) / "seal.py"
        example.write_text(python)
        from_python = f"vtpm exec guest2 -- python {example}\n"
        script = "".join(["trap 'vtpm down' EXIT\n", *steps, from_python, down])
        environment = {
            "HOME": home,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        ended = subprocess.run(
            ["bash", "-e", "-u", "-o", "pipefail", "-c", script],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",  # TrouSerS prints odd bytes
            timeout=STEPS_LIMIT_S,
            check=False,
        )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    pcr_4 = [re.search(r"\b[0-9a-f]{40}\b", line)[0] for line in lines if line.startswith("  4  ")]
    # `vtpm image show` gives the digest, then come the PCRs of guest1, the chip and guest1 again.
    _, first, _, changed = pcr_4
    assert first in lines, "what the program in the guest reads is what vtpm pcrs shows"
    assert changed != first
    assert "unsealed: b'the key of my disk'" in lines
