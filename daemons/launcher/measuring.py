r"""What a program is made of, as one digest: real hashes of real files.

A `Measured` is a list of files with their hashes, written down as a text of which there is only
one form (its manifest). The digest that goes into a PCR is the hash of that text. So the event log
can carry the manifest itself: whoever reads it sees which file it was that changed.

    vtpm-manifest 1 program vtpmmgrd\n
    <sha1> <sha256> <bytes> <name>\n      one line per file, ordered by name

A program's files are those of its main module and of every module of our packages that one of its
files names in an import (or in a string that is a module's dotted name). That may be more than is
ever loaded, never less. The interpreter and the libraries from elsewhere are measured by
`measure_runtime`.

Invariants:
- The same files give the same manifest wherever they are installed.
- A file that cannot be read is a Failure, never left out.

Left to others: extending and logging (`firmware`). A program is measured on disk, and run from
what the fork server has loaded: the launcher measures at its start, before it forks anything.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure

PACKAGES: Final = ("protocol", "tpm12", "hwtpm", "daemons")
LIBRARIES: Final = ("cffi", "construct", "cryptography", "setproctitle", "structlog", "trio")
"""What a daemon imports from elsewhere (rich and typer are only for the command)."""
CODE_SUFFIXES: Final = frozenset({".py", ".so"})
SOURCES_REMEMBERED: Final = 512
FILE_BYTES_MAX: Final = 256 * 1024 * 1024

_IMPORT: Final = re.compile(rb"^[ \t]*import[ \t]+([^\n#]+)", re.MULTILINE)
_FROM: Final = re.compile(
    rb"^[ \t]*from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|(?:\\\n|[^\n#])+)", re.MULTILINE
)
_QUOTED: Final = re.compile(rb"[\"']((?:protocol|tpm12|hwtpm|daemons)(?:\.\w+)+)")
_COMMENT: Final = re.compile(rb"#[^\n]*")


@dataclass(frozen=True, slots=True, order=True)
class FileDigests:
    """One file."""

    name: str
    """Path relative to the place the packages are installed in."""
    size: int
    sha1: bytes
    sha256: bytes


@dataclass(frozen=True, slots=True)
class Measured:
    """Some files, measured together.

    Attributes:
        subject: What they are together: `program vtpmmgrd`.
        files: Ordered by name.
    """

    subject: str
    files: tuple[FileDigests, ...]

    @property
    def manifest(self) -> bytes:
        """The text that stands for all of it."""
        lines = [f"vtpm-manifest 1 {self.subject}\n"]
        lines += [f"{f.sha1.hex()} {f.sha256.hex()} {f.size} {f.name}\n" for f in self.files]
        return "".join(lines).encode()

    @property
    def sha1(self) -> bytes:
        """SHA-1 of the manifest: what a TPM 1.2 is extended with."""
        return sha1(self.manifest)

    @property
    def sha256(self) -> bytes:
        """SHA-256 of the manifest."""
        return hashlib.sha256(self.manifest).digest()


def sha1(data: bytes) -> bytes:
    """Hash as TPM 1.2 does; its PCRs know nothing else, so a SHA-256 always stands beside it."""
    return hashlib.sha1(data, usedforsecurity=False).digest()


def measure_program(program: str) -> Measured:
    """Measure a program of ours.

    Args:
        program: Name of a daemon such as `vtpmmgrd`, whose main module is `daemons.vtpmmgrd`.

    Raises:
        Failure: it is none of ours, or one of its files cannot be read.
    """
    homes = {name: _home(name) for name in PACKAGES}
    contents = dict(_reachable(f"daemons.{program}", homes))
    if _file_of(f"daemons.{program}", homes) is None:
        raise _cannot_measure(f"program {program}", f"there is no module daemons.{program}")
    return _measured(f"program {program}", contents)


def program_digest(program: str) -> str:
    """Give the SHA-1 of a program's manifest in hex: the boot hash of the domain that runs it.

    Raises:
        Failure: see `measure_program`.
    """
    return measure_program(program).sha1.hex()


def measure_bytes(subject: str, contents: Mapping[str, bytes]) -> Measured:
    """Measure texts that are at hand, by their names."""
    return _measured(subject, contents)


def measure_files(subject: str, paths: Mapping[str, Path]) -> Measured:
    """Measure files such as settings; one that is not there adds nothing, and so is seen too.

    Args:
        subject: What they are together.
        paths: The files by the names that the manifest gives them.

    Raises:
        Failure: one is there and cannot be read.
    """
    contents: dict[str, bytes] = {}
    for name, path in paths.items():
        if path.is_symlink() or path.exists():
            contents[name] = _content(subject, path)
    return _measured(subject, contents)


def measure_runtime() -> Measured:
    """Measure the interpreter and the libraries that are not ours.

    Raises:
        Failure: one is not installed, or a file of it cannot be read.
    """
    subject = "runtime"
    version = f"python {sys.implementation.name} {'.'.join(map(str, sys.version_info[:3]))}"
    contents = {version: _content(subject, Path(sys.executable))}
    for library in LIBRARIES:
        for name, path in _library_files(library):
            contents[name] = _content(subject, path)
    return _measured(subject, contents)


def _library_files(library: str) -> Iterator[tuple[str, Path]]:
    try:
        listed = metadata.files(library)
    except metadata.PackageNotFoundError as error:
        raise _cannot_measure("runtime", f"the library {library} is not installed") from error
    for entry in listed or ():
        if entry.suffix in CODE_SUFFIXES and ".." not in entry.parts:
            yield str(entry), Path(str(entry.locate()))


def _measured(subject: str, contents: Mapping[str, bytes]) -> Measured:
    files = (
        FileDigests(name, len(data), sha1(data), hashlib.sha256(data).digest())
        for name, data in contents.items()
    )
    return Measured(subject, tuple(sorted(files)))


def _reachable(module: str, homes: Mapping[str, Path]) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a module, of its packages, and of all modules that they name."""
    waiting = [module]
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        # A module's packages run before it does.
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            part, parent = ".".join(parts[:length]), ".".join(parts[: length - 1])
            if part in seen:
                continue
            seen.add(part)
            path = _file_of(part, homes)
            if path is None:
                continue
            content = _content(f"program {module}", Path(path))
            home = homes[part.partition(".")[0]]
            yield os.path.relpath(path, home.parent), content
            is_package = path.endswith("/__init__.py")
            waiting.extend(_named_in(content, part if is_package else parent) - seen)


@lru_cache(maxsize=SOURCES_REMEMBERED)
def _named_in(source: bytes, own_package: str) -> frozenset[str]:
    """The dotted names that a file imports, ours and others'.

    Remembered by what the file says: many programs have it, and each start measures one.
    """
    return frozenset(_names_imported(source, own_package))


def _names_imported(source: bytes, own_package: str) -> Iterator[str]:
    for statement in _IMPORT.finditer(source):
        yield from _names(statement[1])
    for statement in _FROM.finditer(source):
        package = _absolute(statement[1].decode("ascii", "replace"), own_package)
        yield package
        # What is imported may itself be a module.
        for name in _names(_COMMENT.sub(b"", statement[2])):
            yield f"{package}.{name}"
    for quoted in _QUOTED.finditer(source):
        yield quoted[1].decode("ascii", "replace")


def _absolute(package: str, own_package: str) -> str:
    """Resolve the leading dots of a relative import."""
    relative = package.lstrip(".")
    dots = len(package) - len(relative)
    if dots == 0:
        return package
    above = own_package.split(".")[: len(own_package.split(".")) - (dots - 1)]
    return ".".join([*above, relative] if relative else above)


def _names(listed: bytes) -> Iterable[str]:
    plain = re.sub(rb"[()\\\n]", b" ", listed).decode("ascii", "replace")
    return [part.split()[0] for part in plain.split(",") if part.strip()]


def _file_of(module: str, homes: Mapping[str, Path]) -> str | None:
    package, *rest = module.split(".")
    if package not in homes:
        return None
    # Plain strings: this is asked a thousand times for a program, and pathlib takes half of it.
    place = "/".join((str(homes[package]), *rest))
    for path in (f"{place}.py", f"{place}/__init__.py") if rest else (f"{place}/__init__.py",):
        if os.path.isfile(path):  # noqa: PTH113
            return path
    return None


def _home(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise _cannot_measure(f"package {package}", "it is not installed")
    return Path(found.submodule_search_locations[0]).resolve()


def _content(subject: str, path: Path) -> bytes:
    try:
        # O_NONBLOCK: a FIFO in its place must not hold us up.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise _cannot_measure(subject, f"{path} is not a regular file")
            if status.st_size > FILE_BYTES_MAX:
                raise _cannot_measure(subject, f"{path} has more than {FILE_BYTES_MAX} bytes")
            return file.read()
    except OSError as error:
        raise _cannot_measure(subject, f"{path}: {error.strerror}") from error


def _cannot_measure(subject: str, why: str) -> Failure:
    return Failure(
        f"cannot measure the {subject}",
        why=why,
        next_step="Install the stack again; nothing is started that was not measured",
        exit_code=ExitCode.DAMAGED,
    )
