"""The boot menu of a guest: GRUB legacy's menu.lst, as far as a measuring loader needs it.

What is measured must not depend on how a reader reads, so the line rules are those of GRUB 0.97
(stage2 `get_line_from_config`, `skip_to`), which pv-grub inherits:

- a carriage return is dropped, a tab is a space, a backslash before a line end joins the lines
  with one space;
- leading spaces are dropped, a line that begins with `#` is a comment;
- a directive ends at a space or `=`; the kernel's command line is what follows the kernel's path,
  **without the path**, leading spaces dropped, every other byte (trailing spaces too) as it is.

Unlike GRUB, which skips what it does not know, an unknown directive is refused with its line: a
loader that measures must not guess.

Leaves to others: where the files are (`boot_image`), hashing (`loader`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

LINE_BYTES_MAX = 2048
"""Bytes in one joined line; Linux takes a command line of 2048."""
ENTRIES_MAX = 32

_HARMLESS = frozenset({"timeout", "hiddenmenu", "color", "boot", "root", "savedefault"})
"""Directives that change nothing about what is booted here: one disk, nobody at the console."""


class MenuError(ValueError):
    """The menu cannot be read.

    Attributes:
        line: Number of the line, from 1.
        reason: What is wrong with it.
    """

    def __init__(self, line: int, reason: str) -> None:
        super().__init__(line, reason)
        self.line = line
        self.reason = reason

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MenuEntry:
    """One `title` with what it boots.

    Attributes:
        kernel: Path from the top of the archive, without a leading slash.
        command_line: What the kernel is given, and PCR 5 measures.
        initrd: Path like `kernel`, or None.
    """

    title: str
    kernel: str
    command_line: str
    initrd: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Menu:
    """A whole menu; `chosen` is the entry that boots."""

    entries: tuple[MenuEntry, ...]
    default: int

    @property
    def chosen(self) -> MenuEntry:
        """The entry that `default` names."""
        return self.entries[self.default]


def menu_text(title: str, kernel: str, command_line: str, initrd: str | None) -> str:
    """Write a menu of one entry; paths have no leading slash."""
    lines = [
        "default 0",
        "timeout 0",
        "",
        f"title {title}",
        "root (hd0)",
        f"kernel /{kernel} {command_line}" if command_line else f"kernel /{kernel}",
    ]
    if initrd is not None:
        lines.append(f"initrd /{initrd}")
    return "\n".join(lines) + "\n"


def parse_menu(data: bytes) -> Menu:
    """Read a menu.

    Raises:
        MenuError: Anything that would leave a doubt about what is booted.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        broken = data.count(b"\n", 0, error.start) + 1
        raise MenuError(broken, "a byte that is not UTF-8") from error
    default = (0, 0)
    drafts: list[_Draft] = []
    for number, line in _lines(text):
        word, argument = _split(line, also_equals=True)
        if word == "title":
            if len(drafts) == ENTRIES_MAX:
                raise MenuError(number, f"more than {ENTRIES_MAX} entries")
            drafts.append(_Draft(number, argument))
        elif word == "default":
            default = (number, _index(number, argument))
        elif word in _HARMLESS:
            continue
        elif not drafts:
            raise MenuError(number, f"{word!r} before the first title")
        else:
            drafts[-1].take(number, word, argument)
    if not drafts:
        raise MenuError(1, "no title: nothing to boot")
    line_number, chosen = default
    if chosen >= len(drafts):
        raise MenuError(line_number, f"default {chosen}, but the last entry is {len(drafts) - 1}")
    return Menu(entries=tuple(draft.finish() for draft in drafts), default=chosen)


class _Draft:
    """An entry while its lines are read."""

    def __init__(self, line: int, title: str) -> None:
        self.line = line
        self.title = title
        self.kernel: tuple[str, str] | None = None
        self.initrd: str | None = None

    def take(self, number: int, word: str, argument: str) -> None:
        if word == "kernel":
            if self.kernel is not None:
                raise MenuError(number, "a second kernel in one entry")
            path, command_line = _split(argument, also_equals=False)
            self.kernel = (_path(number, path), command_line)
        elif word in ("initrd", "module"):
            if self.initrd is not None:
                raise MenuError(number, "a second initrd or module in one entry")
            path, rest = _split(argument, also_equals=False)
            if rest:
                raise MenuError(number, f"{word} takes one path and no arguments")
            self.initrd = _path(number, path)
        else:
            raise MenuError(number, f"unknown directive {word!r}")

    def finish(self) -> MenuEntry:
        if self.kernel is None:
            raise MenuError(self.line, f"entry {self.title!r} has no kernel")
        kernel, command_line = self.kernel
        return MenuEntry(
            title=self.title, kernel=kernel, command_line=command_line, initrd=self.initrd
        )


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the joined lines with the number of their first physical line."""
    pending, first = "", 1
    for number, physical in enumerate(text.replace("\r", "").split("\n"), start=1):
        if "\0" in physical:
            raise MenuError(number, "a NUL byte")
        line = physical.replace("\t", " ")
        if not pending:
            first = number
        pending += line if pending else line.lstrip(" ")
        if len(pending.encode()) > LINE_BYTES_MAX:
            raise MenuError(first, f"longer than {LINE_BYTES_MAX} bytes")
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        if pending.strip(" ") and not pending.startswith("#"):
            yield first, pending.lstrip(" ")
        pending = ""
    if pending.strip(" "):
        raise MenuError(first, "the file ends in a backslash")


def _split(text: str, *, also_equals: bool) -> tuple[str, str]:
    """Cut the first word off, and the separators behind it."""
    separators = " =" if also_equals else " "
    end = next((at for at, letter in enumerate(text) if letter in separators), len(text))
    return text[:end], text[end:].lstrip(separators)


def _index(number: int, argument: str) -> int:
    word = argument.strip(" ")
    if not (word.isascii() and word.isdigit()) or len(word) > 3:
        raise MenuError(number, f"default takes the number of an entry, not {word!r}")
    return int(word)


def _path(number: int, path: str) -> str:
    """Take GRUB's device prefix off and refuse a path that leaves the archive."""
    if path.startswith("("):
        device, closing, path = path.partition(")")
        if not closing or not device.startswith("(hd"):
            raise MenuError(number, f"the only device here is (hd0), not {device + closing!r}")
    if not path.startswith("/"):
        raise MenuError(number, f"a path must start with /, not {path!r}")
    parts = path[1:].split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise MenuError(number, f"{path!r} is not a plain path")
    return "/".join(parts)
