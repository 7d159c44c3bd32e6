"""The boot menu: what is measured as the command line, and what is refused."""

import pytest

from daemons.guest.grub_menu import LINE_BYTES_MAX, MenuError, menu_text, parse_menu

MENU = b"""# made by hand
default=1
timeout 5

title  old one
\troot (hd0,0)
\tkernel /boot/vmlinuz-1 root=/dev/xvda1 ro
\tinitrd /boot/initrd-1

title new
root (hd0)
kernel (hd0)/boot/vmlinuz-2   root=/dev/xvda2  quiet \\
  console=hvc0
module /boot/initrd-2
"""


def chosen_of(text):
    return parse_menu(text).chosen


def test_menu_default_picks_the_entry_and_its_paths():
    entry = chosen_of(MENU)
    assert (entry.title, entry.kernel, entry.initrd) == ("new", "boot/vmlinuz-2", "boot/initrd-2")


def test_menu_command_line_is_what_follows_the_path_byte_for_byte():
    assert parse_menu(MENU).entries[0].command_line == "root=/dev/xvda1 ro"
    # Joined lines: the backslash becomes one space, the spaces around it stay.
    assert chosen_of(MENU).command_line == "root=/dev/xvda2  quiet    console=hvc0"


@pytest.mark.parametrize(
    ("line", "command_line"),
    [
        ("kernel /k", ""),
        ("kernel /k ", ""),
        ("kernel /k a", "a"),
        ("kernel\t/k\ta=1\tb", "a=1 b"),
        ("kernel=/k a", "a"),
        ("  kernel   /k   a  b  ", "a  b  "),
        ("kernel /k a#b \\c", "a#b \\c"),
        ("kernel /k a\r", "a"),
    ],
)
def test_menu_command_line_follows_grubs_rules(line, command_line):
    assert chosen_of(f"title t\n{line}\n".encode()).command_line == command_line


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (b"", 1, "no title"),
        (b"kernel /k\n", 1, "before the first title"),
        (b"title t\n", 1, "has no kernel"),
        (b"title t\nkernel /k\nkernel /k\n", 3, "second kernel"),
        (b"title t\nkernel /k\ninitrd /i\nmodule /i\n", 4, "second initrd"),
        (b"title t\nkernel /k\ninitrd /i more\n", 3, "no arguments"),
        (b"title t\nkernel /k\n\nchainloader +1\n", 4, "unknown directive 'chainloader'"),
        (b"title t\nkernel k\n", 2, "must start with /"),
        (b"title t\nkernel /boot/../etc/k\n", 2, "not a plain path"),
        (b"title t\nkernel /boot//k\n", 2, "not a plain path"),
        (b"title t\nkernel (nd)/k\n", 2, "only device"),
        (b"title t\nkernel (hd0/k\n", 2, "only device"),
        (b"title t\nkernel\n", 2, "must start with /"),
        (b"default 1\ntitle t\nkernel /k\n", 1, "the last entry is 0"),
        (b"default saved\ntitle t\nkernel /k\n", 1, "number"),
        (b"title t\nkernel /k \xff\n", 2, "UTF-8"),
        (b"title t\nkernel /k a\0b\n", 2, "NUL"),
        (b"title t\nkernel /k a\\", 2, "backslash"),
        (b"title t\n" * 33, 33, "more than 32"),
    ],
)
def test_menu_that_leaves_a_doubt_is_refused_with_its_line(text, line, reason):
    with pytest.raises(MenuError, match=reason) as refused:
        parse_menu(text)
    assert refused.value.line == line


def test_menu_line_limit_counts_joined_lines():
    fits = b"title t\nkernel /k " + b"a" * (LINE_BYTES_MAX - 10)
    assert len(chosen_of(fits).command_line) == LINE_BYTES_MAX - 10
    with pytest.raises(MenuError, match="longer than"):
        parse_menu(fits + b"a")
    with pytest.raises(MenuError, match="longer than"):
        parse_menu(b"title t\n" + b"x\\\n" * LINE_BYTES_MAX)


@pytest.mark.parametrize("command_line", ["", "a", "a  b ", "root=LABEL=x y=z"])
@pytest.mark.parametrize("initrd", [None, "boot/initrd.img"])
def test_menu_written_is_read_back(command_line, initrd):
    entry = chosen_of(menu_text("guest", "boot/vmlinuz", command_line, initrd).encode())
    assert (entry.kernel, entry.command_line, entry.initrd) == (
        "boot/vmlinuz",
        command_line,
        initrd,
    )
