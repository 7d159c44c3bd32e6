"""A guest's disk image: what pv-grub would boot, readable with ordinary tools.

The image file begins with a POSIX tar archive and goes on with whatever was there:

    boot/vmlinuz            the kernel
    boot/initrd.img         the initial RAM disk, if there is one
    boot/grub/menu.lst      GRUB legacy's menu: what to boot, with which command line

`tar tvf guest1.img` shows it. The reader takes regular files and directories and refuses all else
by name: links, devices, long-name and pax records, absolute paths, `..`, a name that comes twice,
a header whose checksum is wrong, a file that passes the end of the image. It is written here and
not with `tarfile`, which ends silently at the first header that it cannot read.

Invariants:
- Nothing outside the image file is ever read or written.
- A torn write leaves an image that is refused: the first block is written last.

Leaves to others: the menu's syntax (`grub_menu`), hashing (`loader`).
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from daemons.errors import ExitCode, Failure
from daemons.guest.grub_menu import MenuEntry, MenuError, menu_text, parse_menu

BLOCK_BYTES = 512
"""The tar format's unit."""
MENU_PATH = "boot/grub/menu.lst"
MENU_BYTES_MAX = 64 * 1024
MEMBERS_MAX = 64
FILE_BYTES_MAX = 256 * 1024 * 1024
"""Of one file in the archive: it is hashed in memory."""

_NAME, _SIZE, _CHECKSUM = slice(0, 100), slice(124, 136), slice(148, 156)
_KIND, _MAGIC, _PREFIX = 156, slice(257, 262), slice(345, 500)
_CHUNK_BYTES = 1024 * 1024


class ImageFailure(Failure):
    """A guest's image cannot be used."""


class ImageMissing(ImageFailure):
    """There is no such file."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"cannot open image {path}",
            why="there is no such file",
            next_step=f"make one: dd if=/dev/zero of={path} bs=2M count=1, "
            f"then vtpm image make {path} --kernel FILE ...",
            exit_code=ExitCode.NO_INPUT,
        )


class ImageBlank(ImageFailure):
    """The image holds nothing but zeros."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"nothing to boot in {path}",
            why="the image is blank",
            next_step=f"make one with `vtpm image make {path} --kernel FILE --initrd FILE "
            '--cmdline "..."`',
            exit_code=ExitCode.NO_INPUT,
        )


class ImageDamaged(ImageFailure):
    """The image holds something that is not a boot archive."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"cannot boot from {path}",
            why=reason,
            next_step=f"look at it with `tar tvf {path}`; `vtpm image make --force {path} ...` "
            "writes a new one",
            exit_code=ExitCode.DAMAGED,
        )


class ImageUnreadable(ImageFailure):
    """The disk under the image fails."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot read image {path}",
            why=(error.strerror or str(error)).lower(),
            next_step="look at the disk it lies on, or put a copy of the image there",
            exit_code=ExitCode.IO_ERROR,
        )


class ImageRefused(ImageFailure):
    """An image is not written, and stays as it is."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file of the archive: where its bytes are in the image, in bytes."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BootFiles:
    """What a new image is made of."""

    kernel: bytes
    initrd: bytes | None
    command_line: str
    title: str = "guest"


class BootImage:
    """An open image; use it in a `with` statement.

    Raises:
        ImageMissing: No such file.
        ImageBlank: Only zeros.
        ImageDamaged: Not an archive as described above.
        ImageUnreadable: The disk fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_image(path, os.O_RDONLY)
        try:
            with _disk_of(path):
                self._size = self._file.seek(0, os.SEEK_END)
                self.members = self._read_members()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def read(self, name: str, *, bytes_max: int = FILE_BYTES_MAX) -> bytes:
        """Read one file of the archive.

        Args:
            name: Path without a leading slash.
            bytes_max: Refuse a larger file.

        Raises:
            ImageDamaged: It is not there, or too large.
            ImageUnreadable: The disk fails.
        """
        member = self.members.get(name)
        if member is None:
            raise ImageDamaged(self.path, f"the archive has no {name}")
        if member.size > bytes_max:
            raise ImageDamaged(
                self.path, f"{name} has {member.size} bytes, more than {bytes_max} are not read"
            )
        with _disk_of(self.path):
            self._file.seek(member.offset)
            data = self._file.read(member.size)
        if len(data) != member.size:
            raise ImageDamaged(self.path, f"the image ends inside {name}")
        return data

    def entry(self, menu_path: str = MENU_PATH) -> MenuEntry:
        """The menu entry that boots by default.

        Raises:
            ImageDamaged: No menu, or one that cannot be read; the line is named.
        """
        text = self.read(menu_path, bytes_max=MENU_BYTES_MAX)
        try:
            return parse_menu(text).chosen
        except MenuError as error:
            raise ImageDamaged(self.path, f"{menu_path}, {error}") from error

    def _read_members(self) -> dict[str, Member]:
        if is_blank(self._file):
            raise ImageBlank(self.path)
        members: dict[str, Member] = {}
        for count, (name, member) in enumerate(self._walk(), start=1):
            if count > MEMBERS_MAX:
                raise ImageDamaged(self.path, f"the archive has more than {MEMBERS_MAX} members")
            if name in members:
                raise ImageDamaged(self.path, f"the archive has {name} twice")
            if member is not None:
                members[name] = member
        return members

    def _walk(self) -> Iterator[tuple[str, Member | None]]:
        """Yield the members in order; None stands for a directory."""
        at = 0
        while True:
            self._file.seek(at)
            block = self._file.read(BLOCK_BYTES)
            if len(block) == BLOCK_BYTES and not any(block):
                if at == 0:
                    raise ImageDamaged(self.path, "there is no archive at its beginning")
                return
            try:
                name, size, kind = _parse_header(block)
            except ValueError as error:
                raise ImageDamaged(self.path, f"at byte {at}: {error}") from error
            at += BLOCK_BYTES
            if kind == b"5":
                yield name, None
                continue
            if at + size > self._size:
                raise ImageDamaged(self.path, f"{name} passes the end of the image")
            yield name, Member(at, size)
            at += -(-size // BLOCK_BYTES) * BLOCK_BYTES


def write_boot_image(path: Path, files: BootFiles, *, overwrite: bool = False) -> None:
    """Write a boot archive into an existing image.

    Args:
        path: The image; its size stays.
        files: What goes in.
        overwrite: Write over an image that is not blank.

    Raises:
        ImageMissing: No such file.
        ImageRefused: The image is not blank, or too small, or the command line cannot be told in a
            menu.
    """
    archive = make_archive(path, files)
    with open_image(path, os.O_RDWR) as image:
        size = image.seek(0, os.SEEK_END)
        if len(archive) > size:
            raise ImageRefused(
                f"cannot write {path}",
                why=f"the archive has {len(archive)} bytes, the image {size}",
                next_step=f"make it larger: truncate -s {len(archive)} {path}",
                exit_code=ExitCode.USAGE,
            )
        if not overwrite and not is_blank(image):
            raise ImageRefused(
                f"cannot write {path}",
                why="the image is not blank",
                next_step="take another image, or --force to lose what is in this one",
                exit_code=ExitCode.USAGE,
            )
        _write_first_block_last(image, archive)


def make_archive(path: Path, files: BootFiles) -> bytes:
    """Put the files and their menu into a tar archive; the same files give the same bytes.

    Raises:
        ImageRefused: A reader of the menu would read another command line than the one given.
    """
    initrd = "boot/initrd.img" if files.initrd is not None else None
    menu = menu_text(files.title, "boot/vmlinuz", files.command_line, initrd).encode(
        errors="surrogateescape"
    )
    try:
        told = parse_menu(menu).chosen.command_line
    except MenuError as error:
        told = str(error)
    if told != files.command_line:
        raise ImageRefused(
            f"cannot write {path}",
            why=f"a menu.lst would turn the command line {files.command_line!r} into {told!r}",
            next_step="leave out line ends, tabs, leading spaces and a backslash at the end",
            exit_code=ExitCode.USAGE,
        )
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        _add(archive, MENU_PATH, menu)
        _add(archive, "boot/vmlinuz", files.kernel)
        if files.initrd is not None:
            _add(archive, "boot/initrd.img", files.initrd)
    return stream.getvalue()


def open_image(path: Path, flags: int) -> BinaryIO:
    """Open an image.

    Raises:
        ImageMissing: No such file.
        ImageRefused: Not a regular file, or no permission.
    """
    try:
        descriptor = _open_regular(path, flags)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageMissing(path) from error
    except OSError as error:
        raise ImageRefused(
            f"cannot open image {path}",
            why=error.strerror or str(error),
            next_step=f"look at its kind, owner and mode: ls -l {path}",
            exit_code=ExitCode.NO_PERMISSION,
        ) from error
    return os.fdopen(descriptor, "rb" if flags == os.O_RDONLY else "r+b")


def _open_regular(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "it is not a regular file")


@contextlib.contextmanager
def _disk_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ImageUnreadable(path, error) from error


def is_blank(image: BinaryIO) -> bool:
    """Tell whether a file holds nothing but zeros (an empty one too).

    Holes are passed over: a disk of a terabyte that was never written has nothing else.
    """
    at = 0
    while (at := _next_data(image, at)) >= 0:
        image.seek(at)
        chunk = image.read(_CHUNK_BYTES)
        if chunk.count(0) != len(chunk):
            return False
        if not chunk:
            return True
        at += len(chunk)
    return True


def _next_data(image: BinaryIO, at: int) -> int:
    """Where the file has something else than a hole, from some byte on; -1 if nowhere."""
    try:
        return os.lseek(image.fileno(), at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return -1


def _parse_header(block: bytes) -> tuple[str, int, bytes]:
    """Read one ustar header: name, size in bytes, kind (b"0" file, b"5" directory).

    Raises:
        ValueError: What is wrong with it.
    """
    if len(block) != BLOCK_BYTES:
        raise ValueError("the image ends inside the archive")
    unsummed = sum(block) - sum(block[_CHECKSUM]) + 8 * ord(" ")
    if block[_MAGIC] != b"ustar":
        raise ValueError("no tar header")
    if _octal(block[_CHECKSUM], "checksum") != unsummed:
        raise ValueError("the checksum of a tar header is wrong")
    kind = block[_KIND : _KIND + 1].replace(b"\0", b"0")
    name = _text(block[_NAME])
    prefix = _text(block[_PREFIX]) if block[262:263] == b"\0" and block[263:265] == b"00" else ""
    if prefix:
        name = f"{prefix}/{name}"
    if kind not in (b"0", b"5"):
        raise ValueError(f"{name!r} is neither a file nor a directory")
    size = _octal(block[_SIZE], "size")
    if kind == b"5" and size:
        raise ValueError(f"{name!r} is a directory with a size")
    return _plain(name, is_directory=kind == b"5"), size, kind


def _octal(field: bytes, what: str) -> int:
    digits = field.strip(b" \0")
    if not digits or any(digit not in b"01234567" for digit in digits):
        raise ValueError(f"the {what} in a tar header is not a number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    try:
        return field.split(b"\0", 1)[0].decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("a name that is not UTF-8") from error


def _plain(name: str, *, is_directory: bool) -> str:
    """Give `name` without a leading `./` and refuse one that could lead anywhere else."""
    plain = name.rstrip("/") if is_directory else name
    plain = plain.removeprefix("./")
    if is_directory and plain == ".":
        return plain
    if any(part in ("", ".", "..") for part in plain.split("/")):
        raise ValueError(f"{name!r} leads out of the archive")
    return plain


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    member.mode = 0o644
    archive.addfile(member, io.BytesIO(data))


def _write_first_block_last(image: BinaryIO, archive: bytes) -> None:
    """Blank the first block, write the rest, then the first block, syncing between."""
    for offset, data in (
        (0, bytes(BLOCK_BYTES)),
        (BLOCK_BYTES, archive[BLOCK_BYTES:]),
        (0, archive[:BLOCK_BYTES]),
    ):
        image.seek(offset)
        image.write(data)
        image.flush()
        os.fsync(image.fileno())
