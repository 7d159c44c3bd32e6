"""Measuring: real hashes of real files."""

import ast
import hashlib
import os
from pathlib import Path

import pytest

from daemons.errors import Failure
from daemons.launcher import measuring
from daemons.launcher.measuring import (
    Measured,
    measure_bytes,
    measure_files,
    measure_program,
    measure_runtime,
    program_digest,
)

FILES = {
    "daemons/__init__.py": "",
    "daemons/toyd.py": (
        "from __future__ import annotations\n"
        "from protocol import (\n    words,  # a module\n    LIMIT,\n)\n"
        "import tpm12.engine as engine, os\n"
        "from daemons.launcher.near import thing\n"
        "def late():\n    from hwtpm import chip\n"
        "NAME = 'daemons.by_name'\n"
    ),
    "daemons/by_name.py": "",
    "daemons/stranger.py": "",
    "daemons/launcher/__init__.py": "",
    "daemons/launcher/near.py": "from . import nearer\nfrom ..beside import thing\n",
    "daemons/launcher/nearer.py": "",
    "daemons/beside.py": "thing = 1\n",
    "protocol/__init__.py": "LIMIT = 5\n",
    "protocol/words.py": "",
    "tpm12/__init__.py": "",
    "tpm12/engine.py": "import tpm12.keys\n",
    "tpm12/keys.py": "",
    "hwtpm/__init__.py": "",
    "hwtpm/chip.py": "",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(measuring, "_home", lambda package: tmp_path / package)
    return tmp_path


@pytest.mark.usefixtures("installed")
def test_program_is_all_that_its_main_module_reaches():
    measured = measure_program("toyd")
    assert [file.name for file in measured.files] == sorted(FILES.keys() - {"daemons/stranger.py"})


@pytest.mark.parametrize("name", sorted(FILES.keys() - {"daemons/stranger.py"}))
def test_program_any_changed_byte_changes_the_digest(installed, name):
    before = program_digest("toyd")
    assert program_digest("toyd") == before
    (installed / name).write_text(FILES[name] + "\n")
    assert program_digest("toyd") != before


def test_program_file_of_another_program_does_not_change_the_digest(installed):
    before = program_digest("toyd")
    (installed / "daemons/stranger.py").write_text("import os\n")
    assert program_digest("toyd") == before


def test_program_renamed_file_changes_the_digest(installed):
    before = program_digest("toyd")
    (installed / "daemons/by_name.py").rename(installed / "daemons/renamed.py")
    (installed / "daemons/toyd.py").write_text(
        FILES["daemons/toyd.py"].replace("by_name", "renamed")
    )
    assert program_digest("toyd") != before


@pytest.mark.usefixtures("installed")
def test_program_that_is_none_is_a_failure():
    with pytest.raises(Failure, match=r"daemons\.nothing"):
        measure_program("nothing")


@pytest.mark.usefixtures("installed")
def test_program_with_an_unreadable_file_is_a_failure(monkeypatch):
    def fails(_path, _flags):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(measuring.os, "open", fails)
    with pytest.raises(Failure, match="Permission denied"):
        measure_program("toyd")


def test_real_program_holds_every_module_that_python_itself_finds_in_it():
    """The imports are found by patterns; Python's own parser must not find one more."""
    measured = {file.name for file in measure_program("launcher.firmware").files}
    root = Path(measuring.__file__).parents[2]
    for name in measured:
        for node in ast.walk(ast.parse((root / name).read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            elif isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            else:
                continue
            for module in modules:
                path = Path(*module.split("."))
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if module.split(".")[0] in measuring.PACKAGES and (root / file).is_file():
                        assert file.as_posix() in measured, (name, module)


def test_manifest_is_one_line_per_file_in_one_order():
    measured = measure_bytes("policy", {"b": b"two", "a": b"one"})
    sha1, sha256 = hashlib.sha1(b"one").hexdigest(), hashlib.sha256(b"one").hexdigest()
    first, one, two = measured.manifest.decode().splitlines()
    assert first == "vtpm-manifest 1 policy"
    assert one == f"{sha1} {sha256} 3 a"
    assert two.endswith(" 3 b")
    assert measured.sha1 == hashlib.sha1(measured.manifest).digest()
    assert measured.sha256 == hashlib.sha256(measured.manifest).digest()
    assert measure_bytes("policy", {"a": b"one", "b": b"two"}) == measured


def test_manifest_tells_subjects_and_cuts_between_files_apart():
    variants = [
        measure_bytes("x", {"a": b"one", "b": b"two"}),
        measure_bytes("y", {"a": b"one", "b": b"two"}),
        measure_bytes("x", {"a": b"onetwo"}),
        measure_bytes("x", {"a": b"on", "b": b"etwo"}),
        measure_bytes("x", {}),
    ]
    assert len({measured.sha1 for measured in variants}) == len(variants)


def test_files_one_that_appears_changes_the_digest(tmp_path):
    path = tmp_path / "policy.toml"
    without = measure_files("policy", {"policy.toml": path})
    assert without == Measured("policy", ())
    path.write_bytes(b"")
    assert measure_files("policy", {"policy.toml": path}) != without


def test_files_one_that_cannot_be_read_is_a_failure(tmp_path):
    (tmp_path / "policy.toml").symlink_to(tmp_path / "nowhere")
    for path in (tmp_path / "policy.toml", tmp_path):
        with pytest.raises(Failure, match="cannot measure the policy"):
            measure_files("policy", {"policy.toml": path})


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["a FIFO", "a directory"])
def test_files_one_that_is_no_file_is_a_failure(tmp_path, make):
    make(tmp_path / "policy")
    with pytest.raises(Failure, match="cannot measure the policy"):
        measure_files("policy", {"policy": tmp_path / "policy"})


def test_runtime_has_the_interpreter_and_the_libraries():
    names = [file.name for file in measure_runtime().files]
    assert any(name.startswith("python cpython 3.") for name in names)
    assert any(name.startswith("cryptography/") and name.endswith(".so") for name in names)
    assert not any("__pycache__" in name for name in names)


def test_runtime_missing_library_is_a_failure(monkeypatch):
    monkeypatch.setattr(measuring, "LIBRARIES", ("no-such-library",))
    with pytest.raises(Failure, match="no-such-library is not installed"):
        measure_runtime()
