"""Put the stack in place for a system: programs, units, users, man pages. Called by `make install`.

    python systemd/install.py --prefix /usr/local [--destdir DIR]

Run it with the Python of .venv: what is installed are our packages and the libraries in .venv, the
very versions that the project is tested with. Nothing is fetched.

    PREFIX/lib/vtpm-stack/               an environment of its own, with all programs in bin/
    PREFIX/bin/vtpm                      the command
    PREFIX/lib/systemd/system/           units
    PREFIX/lib/systemd/system-generators/vtpm-generator
    PREFIX/lib/{sysusers,tmpfiles}.d/    users and directories
    PREFIX/share/doc/vtpm-stack/, PREFIX/share/man/
    /etc/vtpm/domains/                   for the config files, empty
"""

import argparse
import compileall
import os
import re
import shutil
import stat
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import man_pages  # beside this file

ROOT = Path(__file__).resolve().parent.parent
UNITS = ROOT / "systemd"
PACKAGES = ("protocol", "tpm12", "hwtpm", "daemons")
NAME = "vtpm-stack"
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOMAINS = "/etc/vtpm/domains"
TMPFILES = "tmpfiles.d"
UNIT_SUFFIXES = {".service", ".socket", ".target", ".slice"}
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)")


def fail(what: str, why: str, next_step: str) -> NoReturn:
    """Say what went wrong, why, and what to do; end."""
    sys.exit(f"install: {what}\n  why:  {why}\n  next: {next_step}")


class Target:
    """The tree that is written: below `destdir`, with paths as they will be without it."""

    def __init__(self, destdir: str, prefix: str) -> None:
        self._destdir = destdir
        self.prefix = prefix.rstrip("/") or "/usr"
        self.home = f"{self.prefix}/lib/{NAME}"
        self.documents = f"{self.prefix}/share/doc/{NAME}"
        self.words = {
            "@BINDIR@": f"{self.home}/bin",
            "@LIBDIR@": f"{self.prefix}/lib",
            "@DOCDIR@": self.documents,
        }

    def at(self, path: str) -> Path:
        """Where a path is written now."""
        return Path(f"{self._destdir}{path}")

    def put(self, path: str, content: bytes, mode: int = 0o644) -> None:
        """Write a file, whole or not at all."""
        there = self.at(path)
        make_directory(there.parent)
        beside = there.with_name(f".{there.name}.new")
        beside.unlink(missing_ok=True)
        beside.write_bytes(content)
        beside.chmod(mode)
        beside.rename(there)

    def put_filled(self, path: str, source: Path, mode: int = 0o644) -> None:
        """Write one of our files with the places of this installation in it."""
        text = source.read_text()
        for word, place in self.words.items():
            text = text.replace(word, place)
        self.put(path, text.encode(), mode)


def make_directory(directory: Path) -> None:
    """Make a directory that everybody may read, whatever the umask is."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir()
        directory.chmod(0o755)


def interpreter() -> Path:
    """The Python itself, one that the users of the daemons can reach.

    It is the one that .venv was made from, else the system's of the same version.
    """
    own = Path(os.path.realpath(sys.executable))
    same = Path(f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}")
    for found in (own, same):
        if found.exists() and all(is_open(parent) for parent in found.parents):
            return found
    fail(
        "there is no Python for the daemons",
        f"{own} lies in a directory that other users cannot enter",
        f"install {same}, or make .venv with another one: make clean; make PYTHON=... install",
    )


def is_open(directory: Path) -> bool:
    """May everybody pass through?"""
    return bool(directory.stat().st_mode & stat.S_IXOTH)


def libraries() -> set[str]:
    """The distributions that the project needs to run, with all that they need."""
    found: set[str] = set()
    waiting = list(DECLARED["dependencies"])
    while waiting:
        requirement = waiting.pop()
        name = _REQUIREMENT.match(requirement)
        if name is None or "extra ==" in requirement or name[1].lower() in found:
            continue
        try:
            waiting += metadata.requires(name[1]) or []
        except metadata.PackageNotFoundError:
            if ";" in requirement:  # for another system than this one
                continue
            fail("cannot install", f"{name[1]} is not in this environment", "make for-users")
        found.add(name[1].lower())
    return found


def files_of(library: str) -> Iterator[tuple[str, Path]]:
    """The files of a distribution, and where each belongs below site-packages."""
    for entry in metadata.files(library) or []:
        if ".." not in entry.parts and entry.suffix != ".pyc":
            yield str(entry), Path(str(entry.locate()))


def our_files() -> Iterator[tuple[str, Path]]:
    """The files of our packages."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path.relative_to(ROOT).as_posix(), path


def install_programs(target: Target) -> None:
    """Make the environment: interpreter, libraries, packages, programs."""
    python = interpreter()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if target.at(target.home).exists():
        shutil.rmtree(target.at(target.home))
    pyvenv = f"home = {python.parent}\ninclude-system-site-packages = false\nversion = {version}\n"
    target.put(f"{target.home}/pyvenv.cfg", pyvenv.encode())
    link = target.at(f"{target.home}/bin/python")
    make_directory(link.parent)
    link.symlink_to(python)
    packages = f"{target.home}/lib/python{version}/site-packages"
    for library in sorted(libraries()):
        for name, path in files_of(library):
            target.put(f"{packages}/{name}", path.read_bytes())
    for name, path in our_files():
        target.put(f"{packages}/{name}", path.read_bytes())
    where = target.at(packages)
    compileall.compile_dir(where, stripdir=str(where), prependdir=packages, quiet=2)
    for program, place in DECLARED["scripts"].items():
        module, _, function = place.partition(":")
        script = (
            f"#!{target.home}/bin/python -I\n"
            "import sys\n"
            f"from {module} import {function}\n"
            f"sys.exit({function}())\n"
        )
        target.put(f"{target.home}/bin/{program}", script.encode(), 0o755)
    command = target.at(f"{target.prefix}/bin/vtpm")
    make_directory(command.parent)
    command.unlink(missing_ok=True)
    command.symlink_to(f"{target.home}/bin/vtpm")


def install_units(target: Target) -> None:
    """Units, generator, users and directories."""
    lib = f"{target.prefix}/lib"
    for path in sorted(UNITS.iterdir()):
        if path.suffix in UNIT_SUFFIXES:
            target.put_filled(f"{lib}/systemd/system/{path.name}", path)
    generator = f"{lib}/systemd/system-generators/vtpm-generator"
    target.put_filled(generator, UNITS / "vtpm-generator", 0o755)
    domains = target.at(DOMAINS)
    make_directory(domains.parent)
    domains.mkdir(mode=0o700, exist_ok=True)
    target.put_filled(f"{lib}/sysusers.d/{NAME}.conf", UNITS / f"{NAME}.sysusers")
    target.put_filled(f"{lib}/{TMPFILES}/{NAME}.conf", UNITS / f"{NAME}.tmpfiles")


def install_documents(target: Target) -> None:
    """What a person reads on this machine."""
    for path in (ROOT / "docs").glob("*.md"):
        target.put(f"{target.documents}/{path.name}", path.read_bytes())
    for name in man_pages.PAGES:
        page = man_pages.man_page(name).encode()
        target.put(f"{target.prefix}/share/man/man{name[-1]}/{name}", page)
    for path in (ROOT / "examples" / "trusted-dom0").iterdir():
        target.put(f"{target.documents}/examples/{path.name}", path.read_bytes())


def main() -> None:
    """Install everything."""
    parser = argparse.ArgumentParser(description="Install the vTPM stack for a system.")
    parser.add_argument("--prefix", default="/usr/local")
    parser.add_argument("--destdir", default="")
    options = parser.parse_args()
    if not options.prefix.startswith("/"):
        fail("cannot install", f"--prefix {options.prefix} is not absolute", "give PREFIX=/...")
    target = Target(options.destdir, options.prefix)
    try:
        install_programs(target)
        install_units(target)
        install_documents(target)
    except OSError as error:
        fail("cannot install", str(error), "run it as root, or with DESTDIR=DIR")
    print(f"installed in {target.at(target.prefix)}; docs/systemd.md says how to go on")


if __name__ == "__main__":
    main()
