"""Man pages from the documents: docs/commands.md is vtpm(1), each page of docs/man is its daemon's.

One source for both: the Markdown that these documents use becomes man(7). Called by install.py.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    "vtpm.1": ("docs/commands.md", "the command of the vTPM stack"),
    "vtpm-stack.7": ("docs/systemd.md", "the vTPM stack started by systemd"),
    "hwtpmd.8": ("docs/man/hwtpmd.md", "the emulated hardware TPM 1.2"),
    "vtpmmgrd.8": ("docs/man/vtpmmgrd.md", "the manager of the vTPM stack"),
    "vtpmd.8": ("docs/man/vtpmd.md", "one vTPM of the vTPM stack"),
    "guestd.8": ("docs/man/guestd.md", "one guest of the vTPM stack"),
    "launcherd.8": ("docs/man/launcherd.md", "starts and watches a vTPM stack"),
}

_FENCE = re.compile(r"```")
_LIST = re.compile(r"(?:[-*]|\d+\.) +(.*)")
_LINK = re.compile(r"\[([^\]]*)\]\([^)]*\)")


def man_page(name: str) -> str:
    """Make one page, `NAME.SECTION`."""
    source, brief = PAGES[name]
    program, _, section = name.rpartition(".")
    text = (ROOT / source).read_text()
    head = [
        f'.\\" Made from {source}; do not edit.',
        f'.TH {program.upper()} {section} "" "vTPM stack" ""',
        ".SH NAME",
        f"{program} \\- {brief}",
        ".SH DESCRIPTION",
    ]
    _, _, body = text.partition("\n")  # the title is the page's name
    return "\n".join([*head, *_converted(body.splitlines())]) + "\n"


def _converted(lines: list[str]) -> Iterator[str]:
    at = 0
    while at < len(lines):
        line = lines[at]
        if _FENCE.match(line):
            until = _first(lines, at + 1, lambda text: bool(_FENCE.match(text)))
            yield from _example(lines[at + 1 : until])
            until += 1
        elif line.startswith("    "):
            until = _first(lines, at, lambda text: bool(text) and not text.startswith("    "))
            yield from _example([text[4:] for text in lines[at:until]])
        elif line.startswith("|"):
            until = _first(lines, at, lambda text: not text.startswith("|"))
            yield from _table(lines[at:until])
        else:
            until = at + 1
            yield from _text(line)
        at = until


def _first(lines: list[str], at: int, ends: Callable[[str], bool]) -> int:
    """The number of the first line that ends what begins at a line."""
    return next((n for n in range(at, len(lines)) if ends(lines[n])), len(lines))


def _text(line: str) -> Iterator[str]:
    if line.startswith("#"):
        level = len(line) - len(line.lstrip("#"))
        text = _inline(line.lstrip("# "))
        yield f".SH {text.upper()}" if level <= 2 else f".SS {text}"
    elif found := _LIST.match(line):
        yield ".IP \\(bu 2"
        yield _inline(found[1])
    else:
        yield _inline(line.strip()) if line.strip() else ".PP"


def _example(lines: list[str]) -> Iterator[str]:
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    yield from (".PP", ".RS 4", ".nf")
    yield from (_plain(line) for line in lines)
    yield from (".fi", ".RE")


def _table(lines: list[str]) -> Iterator[str]:
    """A table becomes a list: the first column is what the others are about."""
    rows = [re.split(r"(?<!\\)\|", line.strip().strip("|")) for line in lines]
    header = [cell.strip() for cell in rows[0]]
    for row in rows[2:]:
        first, *others = (_inline(cell.strip()) for cell in row)
        yield ".TP"
        yield first or "\\&"
        named = [
            f"{_inline(title)}: {text}" if title and len(others) > 1 else text
            for title, text in zip(header[1:], others, strict=True)
            if text
        ]
        yield "; ".join(named) or "\\&"


def _inline(text: str) -> str:
    """Code and bold words are bold, links are their words."""
    text = _plain(_LINK.sub(r"\1", text))
    text = re.sub(r"`([^`]*)`|\*\*([^*]*)\*\*", lambda m: f"\\fB{m[1] or m[2]}\\fR", text)
    return re.sub(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])", r"\\fI\1\\fR", text)


def _plain(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text
