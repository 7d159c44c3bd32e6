"""TOML of which every key must be known and every value in range. Pure.

A key that nobody reads is a protection that somebody believes to have; so it is an error.
"""

from __future__ import annotations

import re
import tomllib
from typing import Final

_MISSING: Final = object()


class TomlError(ValueError):
    """The text is not TOML, or not what it should hold; the message says where."""


class Table:
    """One table; values are taken out, and `finish` complains about those that are left.

    Args:
        entries: The parsed table.
        where: What the table is called, for messages.
        text: The whole file, to find lines in.
    """

    def __init__(self, entries: dict[str, object], where: str, text: str) -> None:
        self._left = dict(entries)
        self._known: list[str] = []
        self._where = where
        self._text = text

    @classmethod
    def parse(cls, content: bytes) -> Table:
        """Parse a file.

        Raises:
            TomlError: it is not UTF-8 or not TOML; line and column are named.
        """
        try:
            text = content.decode("utf-8")
            return cls(tomllib.loads(text), "the file", text)
        except (ValueError, RecursionError) as error:  # also TOMLDecodeError, UnicodeDecodeError
            raise TomlError(str(error)) from error

    def names(self) -> list[str]:
        """Give the keys that were not taken yet."""
        return list(self._left)

    def has(self, key: str) -> bool:
        """Tell whether a key stands in the table and was not taken yet."""
        return key in self._left

    def take_text(self, key: str, default: str | None = None) -> str:
        """Take a string."""
        found = self._take(key, default)
        if not isinstance(found, str):
            raise self._wrong(key, "is not a text in quotes")
        return found

    def take_choice(self, key: str, default: str, choices: tuple[str, ...]) -> str:
        """Take one of a few strings."""
        found = self._take(key, default)
        if not isinstance(found, str) or found not in choices:
            raise self._wrong(key, f"is none of {', '.join(choices)}")
        return found

    def take_flag(self, key: str, *, default: bool) -> bool:
        """Take true or false."""
        found = self._take(key, default)
        if not isinstance(found, bool):
            raise self._wrong(key, "is neither true nor false")
        return found

    def take_integer(self, key: str, default: int, least: int, most: int) -> int:
        """Take a whole number."""
        found = self._take(key, default)
        if not isinstance(found, int) or isinstance(found, bool) or not least <= found <= most:
            raise self._wrong(key, f"is not a whole number from {least} to {most}")
        return found

    def take_number(self, key: str, default: float, least: float, most: float) -> float:
        """Take a number, whole or not."""
        found = self._take(key, default)
        if not isinstance(found, int | float) or isinstance(found, bool):
            raise self._wrong(key, "is not a number")
        if not least <= found <= most:  # nan is in no range
            raise self._wrong(key, f"is not a number from {least:g} to {most:g}")
        return float(found)

    def take_table(self, key: str) -> Table:
        """Take a table; an empty one when there is none."""
        found = self._take(key, {})
        if not isinstance(found, dict):
            raise self._wrong(key, f"is not a table: write [{key}]")
        return Table(found, f"[{key}]", self._text)

    def take_tables(self, key: str, count_max: int) -> list[Table]:
        """Take an array of tables; an empty one when there is none."""
        found = self._take(key, [])
        if not isinstance(found, list) or len(found) > count_max:
            raise self._wrong(key, f"is not a list of {count_max} tables at most: write [[{key}]]")
        tables: list[Table] = []
        for at, entry in enumerate(found, start=1):
            if not isinstance(entry, dict):
                raise self._wrong(key, f"has an entry that is no table (number {at})")
            tables.append(Table(entry, f"[[{key}]] number {at}", self._section(key, at)))
        return tables

    def finish(self) -> None:
        """Complain about keys that nobody took.

        Raises:
            TomlError: there is one; its line and the known keys are named.
        """
        for key in self._left:
            known = ", ".join(self._known)
            raise TomlError(f"{self._where} has an unknown key {key!a}{self.line_of(key)}: {known}")

    def line_of(self, key: str) -> str:
        """Say where a key first stands, as " (line 9)"; nothing where it is not found.

        tomllib gives no positions of keys.
        """
        first = re.search(
            rf"^[ \t\[]*[\"']?{re.escape(key)}[\"']?[ \t]*[=.\]]", self._text, re.MULTILINE
        )
        return f" (line {self._text.count(chr(10), 0, first.start()) + 1})" if first else ""

    def _take(self, key: str, default: object) -> object:
        self._known.append(key)
        found = self._left.pop(key, _MISSING)
        if found is _MISSING:
            if default is None:
                raise TomlError(f"{self._where} has no {key}")
            return default
        return found

    def _wrong(self, key: str, reason: str) -> TomlError:
        return TomlError(f"{key} in {self._where}{self.line_of(key)} {reason}")

    def _section(self, key: str, number: int) -> str:
        """Give the text of one table of an array, at its lines; of the whole file if not found."""
        headers = [*re.finditer(rf"^[ \t]*\[\[{re.escape(key)}\]\]", self._text, re.MULTILINE)]
        if len(headers) < number:
            return self._text
        begin = headers[number - 1].end()
        end = headers[number].start() if number < len(headers) else len(self._text)
        return "\n" * self._text.count("\n", 0, begin) + self._text[begin:end]
