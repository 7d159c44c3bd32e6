r"""The syntax of xl's domain config files: text in, values with positions out. Pure.

What the values mean is left to `domain_config`. The grammar is that of libxlutil (libxlu_cfg_l.l,
libxlu_cfg_y.y):

- `key = value` or `key += value`, ended by a newline, a `;` or the end of the text. Keys are lower
  case.
- A value is a string in single or double quotes, a bare number, or a list of values in brackets. A
  list may go over several lines, hold lists, and end in a comma.
- `#` begins a comment. Spaces and tabs separate.
- In strings, `\` stands before `"`, `'`, `\`, one of the letters a b f n r t v, `x` and two hex
  digits, or one to three octal digits. A string does not go over a line's end.
- A key that is set twice has its last value; `+=` joins strings and lists to what the key had.

Two deviations, both where libxlutil does not do what it means to: numeric escapes give the
character they name (there they give nothing), and a comment may be the last thing in a file that
has no newline at its end.

Invariants:
- Any text gives an XlConfig or one ConfigError whose position is in the text (or at its end).
- What an error shows of the text has no control characters in it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from daemons.errors import ExitCode, Failure
from daemons.named_files import read_bytes

CONFIG_CHARACTERS_MAX: Final = 256 * 1024
ADDITIONS_MAX: Final = 1000
"""Each += copies what there is."""
LIST_DEPTH_MAX: Final = 16
NUMBER_DIGITS_MAX: Final = 24
EXCERPT_COLUMNS_MAX: Final = 100

_KEY: Final = re.compile(r"[a-z][._0-9a-z]*")
_NUMBER: Final = re.compile(r"[0-9][0-9a-fx]*")
_NUMBER_MEANING: Final = re.compile(r"\s*([+-]?)(0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)\Z")
_BLANKS: Final = re.compile(r"[ \t]*")
_PLAIN: Final = re.compile(r"[^'\"\\\n]+")
_HEX_PAIR: Final = re.compile(r"[0-9a-fA-F]{2}")
_OCTAL: Final = re.compile(r"[0-7]{1,3}")
_ESCAPES: Final = {
    '"': '"',
    "'": "'",
    "\\": "\\",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}
_PYTHON_CHARACTERS: Final = "+-.():"
"""Characters that xl takes for a sign of the Python which config files were once written in."""


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """A place in the text: offset from 0, line and column from 1, all in characters."""

    offset: int
    line: int
    column: int

    def __str__(self) -> str:
        return f"line {self.line}, column {self.column}"


@dataclass(frozen=True, slots=True)
class Text:
    """A string, or a bare number as it was written."""

    text: str
    position: Position
    is_quoted: bool
    is_plain: bool
    """It stands in the file as it is: a place in it is a place in the file."""

    def place(self, index: int) -> Position:
        """Give the position of the character at `index`, or of the whole value if not plain."""
        if not self.is_plain or not 0 <= index <= len(self.text):
            return self.position
        shift = index + self.is_quoted
        start = self.position
        return Position(start.offset + shift, start.line, start.column + shift)


@dataclass(frozen=True, slots=True)
class ValueList:
    """A list in brackets."""

    items: tuple[Value, ...]
    position: Position


Value = Text | ValueList


@dataclass(frozen=True, slots=True)
class Setting:
    """What one key has, all its `+=` joined in."""

    name: str
    value: Value
    position: Position
    """Where the key stands in its last assignment."""
    is_added: bool = False
    """The last assignment was a `+=`: not a number, says xl."""


class ConfigError(Failure):
    """A config file cannot be understood.

    Attributes:
        position: Where in the text.
        reason: What is wrong there, without the excerpt.
    """

    def __init__(
        self, source: str, text: str, position: Position, reason: str, advice: str
    ) -> None:
        super().__init__(
            f"{_printable(source)} cannot be used: {position}",
            why=f"{reason}\n{_excerpt(text, position)}",
            next_step=advice,
            exit_code=ExitCode.CONFIGURATION,
        )
        self.position = position
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.what}: {self.why}\n{self.next_step}"


class WrongTextError(ValueError):
    """A string is well-formed for the file's syntax but not for what it should say.

    Args:
        reason: What is wrong.
        index: At which character of the string.
    """

    def __init__(self, reason: str, index: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.index = index


@dataclass(frozen=True, slots=True)
class XlConfig:
    """A whole file, parsed."""

    source: str
    """Name of the file, for messages."""
    text: str
    settings: dict[str, Setting]
    """One entry per key, in the order of their last assignments."""
    repeated: tuple[Setting, ...]
    """Settings that a later `=` of the same key put aside."""

    def error(self, position: Position, reason: str, advice: str = "") -> ConfigError:
        """Make the error that says what is wrong at a place of this file."""
        return ConfigError(self.source, self.text, position, reason, advice or _ADVICE)


_ADVICE: Final = "Correct the file and try again"
_PYTHON_ADVICE: Final = (
    "Correct the file and try again; strings need quotes, and Python is not understood here"
)


def parse(text: str, source: str = "the config") -> XlConfig:
    """Parse a config file.

    Args:
        text: The whole file, at most 256 Ki characters.
        source: The file's name, for messages.

    Raises:
        ConfigError: the text is not in xl's syntax; it says what, and where.
    """
    return _Parser(text, source).file()


def read(path: Path) -> XlConfig:
    """Read and parse a config file.

    Raises:
        ConfigError: as `parse`.
        Failure: the file cannot be read, or is not UTF-8.
    """
    try:
        content = read_bytes(path, 4 * CONFIG_CHARACTERS_MAX)
    except OSError as error:
        raise Failure(
            f"cannot read the config file {_printable(str(path))}",
            why=error.strerror or str(error),
            next_step="Check the path and its permissions",
            exit_code=ExitCode.NO_INPUT,
        ) from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Failure(
            f"cannot read the config file {_printable(str(path))}",
            why=f"its byte {error.start} is not UTF-8, so this is no text file",
            next_step="Give the domain's .cfg file, not its image",
            exit_code=ExitCode.CONFIGURATION,
        ) from error
    return parse(text, str(path))


def number(value: Text) -> int:
    """Read a value as C's strtol does with base 0: decimal, hexadecimal with 0x, octal with 0.

    Raises:
        WrongTextError: it is not a number.
    """
    found = _NUMBER_MEANING.match(value.text)
    if found is None:
        raise WrongTextError(f"{value.text[:40]!a} is not a number")
    if len(found[2]) > NUMBER_DIGITS_MAX:
        raise WrongTextError(f"the number has more than {NUMBER_DIGITS_MAX} digits")
    digits = found[2]
    base = 16 if digits[:2] == "0x" else 8 if digits[0] == "0" else 10
    return int(found[1] + digits, base)


class _Parser:
    """One pass over the text; `self._at` is the offset of the next character."""

    def __init__(self, text: str, source: str) -> None:
        self._text = text
        self._source = source
        self._at = 0
        self._line = 1
        self._line_start = 0
        self._settings: dict[str, Setting] = {}
        self._repeated: list[Setting] = []
        self._additions = 0

    def file(self) -> XlConfig:
        if len(self._text) > CONFIG_CHARACTERS_MAX:
            raise self._error(f"the file has more than {CONFIG_CHARACTERS_MAX} characters")
        while self._skip_blank_lines():
            self._assignment()
            self._end_of_statement()
        return XlConfig(self._source, self._text, self._settings, tuple(self._repeated))

    def _assignment(self) -> None:
        position = self._here()
        key = _KEY.match(self._text, self._at)
        if key is None:
            raise self._error("a key was expected here (lower case: name, kernel, memory, ...)")
        self._at = key.end()
        self._blanks()
        is_added = self._text.startswith("+=", self._at)
        if not is_added and self._peek() != "=":
            raise self._error(f"= was expected after {key[0]}")
        self._at += 2 if is_added else 1
        self._blanks()
        self._store(Setting(key[0], self._value(0), position, is_added))

    def _store(self, new: Setting) -> None:
        old = self._settings.pop(new.name, None)
        if old is not None and new.is_added:
            self._additions += 1
            if self._additions > ADDITIONS_MAX:
                raise self._error(f"there are more than {ADDITIONS_MAX} +=", new.position)
            try:
                new = replace(new, value=_joined(old.value, new.value))
            except WrongTextError as wrong:
                raise self._error(f"{wrong.reason} ({new.name})", new.position) from wrong
        elif old is not None:
            self._repeated.append(old)
        self._settings[new.name] = new

    def _end_of_statement(self) -> None:
        self._blanks()
        following = self._peek()
        if following in {"", "\n", "#", ";"}:
            return  # taken by _skip_blank_lines
        raise self._error("the end of the line or ; was expected after the value")

    def _value(self, depth: int) -> Value:
        following = self._peek()
        if following == "[":
            return self._list(depth)
        if following in {'"', "'"}:
            return self._string(following)
        written = _NUMBER.match(self._text, self._at)
        if written is None:
            raise self._error("a string in quotes, a number or a list was expected here")
        position = self._here()
        self._at = written.end()
        return Text(written[0], position, is_quoted=False, is_plain=True)

    def _list(self, depth: int) -> ValueList:
        position = self._here()
        if depth >= LIST_DEPTH_MAX:
            raise self._error(f"lists lie more than {LIST_DEPTH_MAX} deep in one another")
        self._at += 1
        items: list[Value] = []
        self._blanks_and_newlines(position)
        while self._peek() != "]":
            items.append(self._value(depth + 1))
            self._blanks_and_newlines(position)
            if self._peek() == ",":
                self._at += 1
                self._blanks_and_newlines(position)
            elif self._peek() != "]":
                raise self._error(", or ] was expected here")
        self._at += 1
        return ValueList(tuple(items), position)

    def _string(self, quote: str) -> Text:
        position = self._here()
        self._at += 1
        parts: list[str] = []
        is_plain = True
        while (following := self._peek()) != quote:
            if following in {"", "\n"}:
                raise self._error(f"the string has no closing {quote} on its line", position)
            if following == "\\":
                is_plain = False
                parts.append(self._escape())
            elif plain := _PLAIN.match(self._text, self._at):
                parts.append(plain[0])
                self._at = plain.end()
            else:  # the other kind of quote
                parts.append(following)
                self._at += 1
        self._at += 1
        return Text("".join(parts), position, is_quoted=True, is_plain=is_plain)

    def _escape(self) -> str:
        position = self._here()
        self._at += 1
        letter = self._peek()
        if letter in _ESCAPES:
            self._at += 1
            return _ESCAPES[letter]
        if letter == "x":
            digits = _HEX_PAIR.match(self._text, self._at + 1)
            code = int(digits[0], 16) if digits else 0
        else:
            digits = _OCTAL.match(self._text, self._at)
            code = int(digits[0], 8) if digits else 0
        if digits is None:
            raise self._error("this is not one of the escapes that xl knows", position)
        if not 0 < code < 256:
            raise self._error("this escape names no character from 1 to 255", position)
        self._at = digits.end()
        return chr(code)

    def _skip_blank_lines(self) -> bool:
        """Go to the next assignment; False at the end of the text."""
        while True:
            self._blanks()
            if not (self._newline() or self._semicolon()):
                return self._peek() != ""

    def _blanks_and_newlines(self, opened: Position) -> None:
        self._blanks()
        while self._newline():
            self._blanks()
        if self._peek() == "":
            raise self._error("the list has no closing ]", opened)

    def _blanks(self) -> None:
        blanks = _BLANKS.match(self._text, self._at)
        assert blanks is not None  # it matches nothing, too
        self._at = blanks.end()

    def _newline(self) -> bool:
        """Take a newline, with the comment before it."""
        if self._peek() == "#":
            end = self._text.find("\n", self._at)
            self._at = len(self._text) if end < 0 else end
            if end < 0:
                return True
        if self._peek() != "\n":
            return False
        self._at += 1
        self._line += 1
        self._line_start = self._at
        return True

    def _semicolon(self) -> bool:
        if self._peek() != ";":
            return False
        self._at += 1
        return True

    def _peek(self) -> str:
        """The next character; empty at the end of the text."""
        return self._text[self._at : self._at + 1]

    def _here(self) -> Position:
        return Position(self._at, self._line, self._at - self._line_start + 1)

    def _error(self, reason: str, position: Position | None = None) -> ConfigError:
        following = self._peek()
        if following == "\r":
            reason += "; there is a carriage return (the file has DOS line ends)"
        looks_like_python = following != "" and following in _PYTHON_CHARACTERS
        return ConfigError(
            self._source,
            self._text,
            position or self._here(),
            reason,
            _PYTHON_ADVICE if looks_like_python else _ADVICE,
        )


def _joined(old: Value, new: Value) -> Value:
    if isinstance(old, Text) and isinstance(new, Text):
        return replace(new, text=old.text + new.text, is_plain=False)
    if isinstance(old, ValueList) and isinstance(new, ValueList):
        return replace(new, items=old.items + new.items)
    raise WrongTextError("+= cannot join a list and a string")


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _excerpt(text: str, position: Position) -> str:
    """Show the line with a caret under the position; one shown character for each of the line."""
    start = position.offset - (position.column - 1)
    end = text.find("\n", start)
    line = text[start : len(text) if end < 0 else end]
    first = max(0, position.column - EXCERPT_COLUMNS_MAX)
    shown = line[first : first + EXCERPT_COLUMNS_MAX]
    # Tabs become one blank, so that the caret stands right; what could steer a terminal becomes ?.
    shown = _printable(shown.replace("\t", " "))
    return f"    {shown}\n    {' ' * (position.column - 1 - first)}^"
