"""House rules that a machine can check: direction of imports, purity, size, names, no leftovers."""

import ast
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("protocol", "tpm12", "hwtpm", "daemons")
MAY_IMPORT = {
    "protocol": {"protocol"},
    "tpm12": {"protocol", "tpm12"},
    "hwtpm": {"protocol", "hwtpm"},
    "daemons": {"protocol", "tpm12", "hwtpm", "daemons"},
}
PURE = ("protocol", "tpm12", "hwtpm")
NOT_PURE = {
    "asyncio",
    "datetime",
    "io",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "trio",
}
LINES_MAX = 800
FUNCTION_LINES_MAX = 70
ROOMS_WITHOUT_A_NAME = {"utils", "util", "common", "helpers", "misc", "base"}


def sources(*packages):
    return sorted(p for package in packages for p in (ROOT / package).rglob("*.py"))


def relative(path):
    return path.relative_to(ROOT).as_posix()


def imported(path):
    """Modules that a file imports, with line numbers."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module, node.lineno


ALL = sources(*PACKAGES)


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    for module, line in imported(path):
        top = module.split(".")[0]
        assert top not in PACKAGES or top in MAY_IMPORT[package], f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", sources(*PURE), ids=relative)
def test_pure_packages_do_no_input_or_output(path):
    for module, line in imported(path):
        assert module.split(".")[0] not in NOT_PURE, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", sources("tpm12"), ids=relative)
def test_one_module_speaks_to_the_cryptography_library(path):
    if relative(path) != "tpm12/crypto.py":
        assert not [m for m, _ in imported(path) if m.split(".")[0] == "cryptography"]


@pytest.mark.parametrize("path", sources("tpm12/commands"), ids=relative)
def test_command_modules_do_not_import_each_other(path):
    if path.name != "__init__.py":
        assert not [m for m, _ in imported(path) if m.startswith("tpm12.commands")]


@pytest.mark.parametrize("path", ALL, ids=relative)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= LINES_MAX, path
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            doc = ast.get_docstring(node, clean=False)
            length -= doc.count("\n") + 1 if doc else 0
            assert length <= FUNCTION_LINES_MAX, f"{path}:{node.lineno} {node.name}: {length} lines"


def test_every_room_has_a_name():
    assert not [p for p in ALL if p.stem in ROOMS_WITHOUT_A_NAME]


@pytest.mark.parametrize("path", sources(*PURE), ids=relative)
def test_pure_packages_catch_only_what_they_name(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in {"Exception", "BaseException", "everything"}, (
                f"{path}:{node.lineno}"
            )


@pytest.mark.parametrize("path", [*ALL, *sources("tests")], ids=relative)
def test_no_leftovers(path):
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT:
                assert not re.search(r"\b(TODO|FIXME|XXX)\b", token.string), (
                    f"{path}:{token.start[0]}"
                )


@pytest.mark.parametrize("path", [*ALL, *sources("tests")], ids=relative)
def test_every_exemption_names_its_rule_and_reason(path):
    with path.open("rb") as file:
        for token in tokenize.tokenize(file.readline):
            if token.type == tokenize.COMMENT and "noqa" in token.string:
                assert re.search(r"noqa: [A-Z]+[0-9]+", token.string), f"{path}:{token.start[0]}"


def test_daemons_have_structlog_without_rich():
    """What the firmware does not measure is not in them (measuring.LIBRARIES)."""
    others = [
        relative(path)
        for path in sources("daemons")
        if "structlog" in {module for module, _ in imported(path)}
    ]
    assert others == ["daemons/lean_structlog.py"]
    asked = "import sys, daemons.guestd, daemons.launcherd; print('rich' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", asked], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert told.stdout == "False\n"
