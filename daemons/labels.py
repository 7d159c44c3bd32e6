"""Security labels `user:role:type`: their text, their patterns and their hashes. Pure.

The optional fourth part is an MLS range, kept as it is and compared like the rest.
Source of the hashes: the manager's kernel list, SHA-1 of the label's text without its NUL, or of
the text with the user replaced by a star.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

LABEL_CHARACTERS_MAX: Final = 126
"""What the manager's label space holds beside its NUL; longer labels are refused, never cut (two
long labels that begin alike must not become one)."""


class LabelError(ValueError):
    """A text that is not a label, with the reason."""


@dataclass(frozen=True, slots=True)
class Label:
    """One label, already checked."""

    user: str
    role: str
    type: str
    mls: str = ""

    @classmethod
    def parse(cls, text: str) -> Label:
        """Read `user:role:type` or `user:role:type:mls`.

        Raises:
            LabelError: too few parts, an empty part, a character that is not plain, too long.
        """
        if len(text) > LABEL_CHARACTERS_MAX:
            raise LabelError(
                f"a label has {LABEL_CHARACTERS_MAX} characters at most, not {len(text)}"
            )
        parts = text.split(":", 3)
        if len(parts) < 3 or not all(parts):
            raise LabelError(f"{text!a} is not of the form user:role:type")
        for part in parts[:3]:
            if not all(
                character.isascii() and (character.isalnum() or character in "_.-")
                for character in part
            ):
                raise LabelError(
                    f"{part!a} in a label may have letters, digits, '_', '.' and '-' only"
                )
        if not all("!" <= character <= "~" for character in parts[3:4] and parts[3]):
            raise LabelError(f"the range in {text!a} has characters that are not printable")
        return cls(*parts)

    def __str__(self) -> str:
        return ":".join(part for part in (self.user, self.role, self.type, self.mls) if part)

    @property
    def digest(self) -> bytes:
        """SHA-1 of the label without NUL, as in the manager's kernel list (20 bytes)."""
        return _sha1(str(self))

    @property
    def wildcard_digest(self) -> bytes:
        """SHA-1 of the label with its user replaced by a star (20 bytes)."""
        return _sha1("*" + str(self)[len(self.user) :])


def matches_pattern(label: str, pattern: str) -> bool:
    """Tell whether a label is meant by a pattern of `locality=` or `--vtpm-label`.

    Args:
        label: A label's text.
        pattern: The same text, or `*` and a suffix; the star stands for at least one character.
    """
    if not pattern.startswith("*"):
        return label == pattern
    suffix = pattern[1:]
    return len(label) > len(suffix) and label.endswith(suffix)


def _sha1(text: str) -> bytes:
    # The manager's format asks for SHA-1; nothing here rests on its resistance to collisions
    # alone, because the launcher gives labels out.
    return hashlib.sha1(text.encode("ascii"), usedforsecurity=False).digest()
