"""bootstrap.py: makes the environment on a machine that has nothing, once, and says why it cannot.

That it works on a fresh Debian is tried there; here, PyPI is a server of ours.
"""

import ast
import hashlib
import io
import json
import os
import re
import ssl
import sys
import threading
import tomllib
import zipfile
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

import bootstrap

PROJECT = Path(bootstrap.__file__).parent


class Folder:
    """A copy of the project's folder, with no network and no pip; what is run is only noted."""

    def __init__(self, path, monkeypatch):
        self.path = path
        self.ran = []
        self.fails = set()
        for file in ("pyproject.toml", "constraints.txt"):
            (path / file).write_text(file)
        names = {"ROOT": ".", "VENV": ".venv", "PYTHON": ".venv/bin/python"}
        names |= {"MARK": ".venv/made-from.json", "CONSTRAINTS": "constraints.txt"}
        for name, place in names.items():
            monkeypatch.setattr(bootstrap, name, path / place)
        monkeypatch.setattr(bootstrap, "run", self.run)
        monkeypatch.setattr(bootstrap, "install_pip_from_its_wheel", lambda: self.note("wheel"))

    def note(self, what):
        self.ran.append(what)
        return what not in self.fails

    def run(self, *command, **_):
        words = [str(word) for word in command]
        if "--version" in words:
            return bootstrap.PYTHON.exists() and "no pip" not in bootstrap.PYTHON.read_text()
        if "compileall" in words:
            return True
        if "--python" in words:
            if "own pip" not in self.fails:
                bootstrap.PYTHON.write_text("")
            return self.note("own pip")
        if "install" in words:
            return self.note("install dev" if "[dev]" in words[-1] else "install")
        kind = "venv without pip" if "--without-pip" in words else "venv"
        bootstrap.PYTHON.parent.mkdir(parents=True)
        bootstrap.PYTHON.write_text("no pip" if kind in self.fails or "without" in kind else "")
        return self.note(kind)

    def bootstrap(self, *options):
        """Run it; gives what it ran."""
        self.ran.clear()
        bootstrap.do_what_is_missing(with_dev="--dev" in options)
        return list(self.ran)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    return Folder(tmp_path, monkeypatch)


# -- what is missing is done, and only that --------------------------------------------------------


def test_nothing_is_done_twice(folder):
    assert folder.bootstrap() == ["venv", "install"]
    assert folder.bootstrap() == []


def test_tests_need_more_and_what_they_need_stays(folder):
    folder.bootstrap()
    assert folder.bootstrap("--dev") == ["install dev"]
    assert folder.bootstrap("--dev") == []
    assert folder.bootstrap() == []


@pytest.mark.parametrize("file", ["pyproject.toml", "constraints.txt"])
def test_changed_declaration_is_installed_into_the_same_environment(folder, file):
    folder.bootstrap("--dev")
    (folder.path / file).write_text("changed")
    assert folder.bootstrap() == ["install dev"]
    assert folder.bootstrap() == []


@pytest.mark.parametrize("part", ["folder", "python"])
def test_environment_of_another_place_or_python_is_made_anew(folder, part):
    folder.bootstrap()
    mark = json.loads(bootstrap.MARK.read_text())
    bootstrap.MARK.write_text(json.dumps({**mark, part: "/another"}))
    assert folder.bootstrap() == ["venv", "install"]


def test_interrupted_installation_is_gone_on_with(folder):
    folder.fails = {"install"}
    with pytest.raises(SystemExit, match=r"cannot install the project"):
        folder.bootstrap()
    folder.fails = set()
    assert folder.bootstrap() == ["install"]


def test_environment_whose_python_is_gone_is_made_anew(folder):
    folder.bootstrap()
    bootstrap.PYTHON.unlink()
    assert folder.bootstrap() == ["venv", "install"]


def test_one_bootstrap_works_in_a_folder_at_a_time(monkeypatch):
    order = []
    monkeypatch.setattr(bootstrap.fcntl, "flock", lambda _file, how: order.append(how))
    monkeypatch.setattr(bootstrap, "do_what_is_missing", lambda **_: order.append("do"))
    bootstrap.main()
    assert order == [bootstrap.fcntl.LOCK_EX, "do"]


# -- the ways to pip -------------------------------------------------------------------------------


def test_pip_comes_from_the_machine_s_own_where_venv_brings_none(folder):
    folder.fails = {"venv"}
    assert folder.bootstrap() == ["venv", "venv without pip", "own pip", "install"]


def test_pip_comes_as_a_wheel_where_the_machine_has_none(folder):
    folder.fails = {"venv", "own pip"}
    assert folder.bootstrap() == ["venv", "venv without pip", "own pip", "wheel", "install"]


def test_python_that_cannot_make_environments_is_told(folder):
    folder.fails = {"venv", "venv without pip"}
    with pytest.raises(SystemExit, match=r"cannot make \.venv\n  why:  .*\n  next: make this"):
        folder.bootstrap()


class Index:
    """A PyPI with one wheel; it is no real pip, and when it is run it tells what it was told."""

    def __init__(self, folder, *, certificate=None):
        self.told = folder / "told"
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as wheel:
            program = f"import sys; open({str(self.told)!r}, 'w').write(' '.join(sys.argv[1:]))"
            wheel.writestr("pip/__main__.py", program)
        self.pages = {
            "/simple/pip/": f'<a href="../../f/{bootstrap.PIP_WHEEL}#sha256=0">x</a>'.encode(),
            f"/f/{bootstrap.PIP_WHEEL}": content.getvalue(),
        }
        self.sha256 = hashlib.sha256(content.getvalue()).hexdigest()
        self.certificate = certificate

    @contextmanager
    def served(self):
        pages = self.pages

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200 if self.path in pages else 404)
                self.end_headers()
                self.wfile.write(pages.get(self.path, b""))

            def log_message(self, *_):
                pass

        class Quiet(HTTPServer):
            def handle_error(self, *_):
                """Say nothing of a client that hangs up on our certificate."""

        with Quiet(("127.0.0.1", 0), Handler) as server:
            scheme = "http"
            if self.certificate:
                scheme = "https"
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                context.load_cert_chain(self.certificate)
                server.socket = context.wrap_socket(server.socket, server_side=True)
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield f"{scheme}://127.0.0.1:{server.server_port}/simple"
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def fetching(tmp_path, monkeypatch):
    """Fetch pip from an `Index`; gives what the wheel was told when it was run."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(bootstrap, "PYTHON", sys.executable)

    def fetching(index, *, sha256=None):
        monkeypatch.setattr(bootstrap, "PIP_SHA256", sha256 or index.sha256)
        with index.served() as url:
            monkeypatch.setenv("PIP_INDEX_URL", url)
            bootstrap.install_pip_from_its_wheel()
        return index.told.read_text()

    fetching.folder = tmp_path
    return fetching


def test_wheel_of_pip_is_found_in_the_index_and_installs_itself(fetching):
    told = fetching(Index(fetching.folder))
    assert re.fullmatch(rf"install --no-index /\S+/{re.escape(bootstrap.PIP_WHEEL)}", told)


def test_another_wheel_than_the_known_one_is_never_run(fetching):
    index = Index(fetching.folder)
    with pytest.raises(SystemExit, match="has another SHA-256"):
        fetching(index, sha256="0" * 64)
    assert not index.told.exists()


def test_index_without_the_wheel_is_told(fetching):
    index = Index(fetching.folder)
    index.pages["/simple/pip/"] = b"<html></html>"
    with pytest.raises(SystemExit, match=f"does not have {bootstrap.PIP_WHEEL}"):
        fetching(index)


def test_index_that_is_not_reached_is_told(fetching):
    index = Index(fetching.folder)
    index.pages.clear()
    with pytest.raises(SystemExit, match=r"cannot fetch pip\n  why:  http\S+: HTTP Error 404"):
        fetching(index)


def test_known_wheel_needs_no_certificate(fetching):
    """As on a Debian without ca-certificates; the SHA-256 above says what may be run."""
    index = Index(fetching.folder, certificate=self_signed(fetching.folder / "certificate.pem"))
    assert fetching(index).startswith("install")
    index.told.unlink()
    with pytest.raises(SystemExit, match="has another SHA-256"):
        fetching(index, sha256="0" * 64)
    assert not index.told.exists()


def self_signed(path):
    """Make a certificate that nobody knows."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(pem + certificate.public_bytes(serialization.Encoding.PEM))
    return path


# -- what stands in the way ------------------------------------------------------------------------


def test_old_python_is_told_which_is_needed(monkeypatch):
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(bootstrap.shutil, "which", lambda _name: None)
    with pytest.raises(SystemExit, match=r"the stack needs 3\.11"):
        bootstrap.main()


def test_old_python_goes_on_as_the_newest_beside_it(monkeypatch):
    became = []
    there = {"python3.11": "/usr/bin/python3.11", "python3.12": "/opt/python3.12"}
    monkeypatch.setattr(bootstrap.sys, "version_info", (3, 9, 2))
    monkeypatch.setattr(bootstrap.sys, "argv", ["bootstrap.py", "--dev"])
    monkeypatch.setattr(bootstrap.shutil, "which", there.get)
    monkeypatch.setattr(bootstrap.os, "execv", lambda *how: became.append(how) or sys.exit(0))
    with pytest.raises(SystemExit):
        bootstrap.main()
    path = "/opt/python3.12"
    assert became == [(path, [path, bootstrap.__file__, "--dev"])]


def test_old_python_can_read_it_at_all():
    ast.parse(Path(bootstrap.__file__).read_text(), feature_version=(3, 7))


def test_file_in_the_place_of_the_environment_is_left_alone(folder):
    bootstrap.VENV.write_text("mine")
    with pytest.raises(SystemExit, match="is in the way"):
        folder.bootstrap()
    assert bootstrap.VENV.read_text() == "mine"


def test_environment_of_somebody_else_is_told(folder, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    bootstrap.VENV.mkdir()
    monkeypatch.setattr(bootstrap.shutil, "rmtree", refuse)
    with pytest.raises(SystemExit, match=r"Permission denied.*\n  next: remove it as its owner"):
        folder.bootstrap()


def test_folder_of_somebody_else_is_told(folder, monkeypatch):
    monkeypatch.setattr(bootstrap.os, "access", lambda *_: False)
    with pytest.raises(SystemExit, match="is not yours to write in"):
        folder.bootstrap()
    assert folder.ran == []


def test_settings_that_put_packages_elsewhere_do_not_reach_pip(monkeypatch, capfd):
    for name in bootstrap.NOT_FOR_PIP:
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "kept")
    program = "import os, sys; sys.exit(' '.join(sorted(os.environ)))"
    assert not bootstrap.run(sys.executable, "-c", program)
    names = set(capfd.readouterr().err.split())
    assert names.isdisjoint(bootstrap.NOT_FOR_PIP)
    assert "PIP_INDEX_URL" in names


# -- what is installed -----------------------------------------------------------------------------


def test_every_package_that_is_asked_for_has_one_tested_version():
    declared = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    asked = [*declared["dependencies"], *declared["optional-dependencies"]["dev"]]
    lines = (PROJECT / "constraints.txt").read_text().splitlines()
    pinned = [line.partition("==")[0].lower() for line in lines if not line.startswith("#")]
    assert all("==" in line for line in lines if not line.startswith("#"))
    assert len(set(pinned)) == len(pinned)
    assert {re.split(r"[><=]", name)[0].lower() for name in asked} <= set(pinned)
