"""The syntax of xl config files."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from daemons.errors import ExitCode, Failure
from daemons.xl.xl_config import (
    ADDITIONS_MAX,
    CONFIG_CHARACTERS_MAX,
    LIST_DEPTH_MAX,
    ConfigError,
    Text,
    ValueList,
    WrongTextError,
    number,
    parse,
    read,
)


def plain(value):
    """A value without its positions."""
    return value.text if isinstance(value, Text) else [plain(item) for item in value.items]


def values(text):
    return {name: plain(setting.value) for name, setting in parse(text).settings.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("\n\n # nothing\n", {}),
        ('name="guest1"', {"name": "guest1"}),
        ("name = 'guest1'\n", {"name": "guest1"}),
        ("\tmemory =\t8 ; vcpus=2;;\n", {"memory": "8", "vcpus": "2"}),
        ("a=0x1f\nb=017\n", {"a": "0x1f", "b": "017"}),
        ("disk=['a','b',]", {"disk": ["a", "b"]}),
        ("disk=[]", {"disk": []}),
        ("disk=[\n\n'a' # first\n,\n'b'\n,\n]\n", {"disk": ["a", "b"]}),
        (
            "vnuma=[['pnode=0','size=2'],[ 1, [2] ]]",
            {"vnuma": [["pnode=0", "size=2"], ["1", ["2"]]]},
        ),
        ("a='#;[]=' # rest ' \" \n", {"a": "#;[]="}),
        ("""a='it"s' ; b="it's" """, {"a": 'it"s', "b": "it's"}),
        (r"""a="\"\'\\\a\b\f\n\r\t\v" """, {"a": "\"'\\\a\b\f\n\r\t\v"}),
        (r"""a='\x41\x7e\101\7z' """, {"a": "A~A\7z"}),
        ("a=1\na=2\n", {"a": "2"}),
        ("a='x'\na+='y'\n", {"a": "xy"}),
        ("a+='y'\n", {"a": "y"}),
        ("a=['x']\na += ['y', 'z']\n", {"a": ["x", "y", "z"]}),
        ("device_model.args=1", {"device_model.args": "1"}),
        ("a=1 # the last line has no newline", {"a": "1"}),
        ("name='gäst'", {"name": "gäst"}),
    ],
)
def test_parse_well_formed_text_gives_its_values(text, expected):
    assert values(text) == expected


@pytest.mark.parametrize(
    ("text", "line", "column", "reason"),
    [
        ("memory=", 1, 8, "was expected here"),
        ("memory=\n", 1, 8, "was expected here"),
        ("name=guest1", 1, 6, "string in quotes"),
        ("name", 1, 5, "= was expected"),
        ("a+='x'\n" * (ADDITIONS_MAX + 2), ADDITIONS_MAX + 2, 1, "more than 1000 +="),
        ("Name='x'", 1, 1, "lower case"),
        ("a=1 b=2", 1, 5, "end of the line"),
        ("\n\n a='x\n'", 3, 4, "no closing '"),
        ('a="x', 1, 3, 'no closing "'),
        (r"a='\q'", 1, 4, "escapes"),
        (r"a='\x4'", 1, 4, "escapes"),
        (r"a='\0'", 1, 4, "1 to 255"),
        (r"a='\777'", 1, 4, "1 to 255"),
        ("a='x\\", 1, 5, "escapes"),
        ("a=['x' 'y']", 1, 8, ", or ]"),
        ("a=['x',,'y']", 1, 8, "was expected here"),
        ("a=[,]", 1, 4, "was expected here"),
        ("a=['x',\n\n", 1, 3, "no closing ]"),
        ("a=['x'\n# more", 1, 3, "no closing ]"),
        ("a=1\nb=[1]]", 2, 6, "end of the line"),
        ("a=\n1", 1, 3, "was expected here"),
        ("a=['x']\na+='y'\n", 2, 1, "list and a string"),
        ("memory=8\r\n", 1, 9, "DOS line ends"),
        ("import os\n", 1, 8, "= was expected"),
        ("a=-1", 1, 3, "was expected here"),
        ("a=" + "[" * (LIST_DEPTH_MAX + 1), 1, 3 + LIST_DEPTH_MAX, "deep"),
    ],
)
def test_parse_malformed_text_says_what_and_where(text, line, column, reason):
    with pytest.raises(ConfigError) as caught:
        parse(text, "guest1.cfg")
    assert (caught.value.position.line, caught.value.position.column) == (line, column)
    assert reason in caught.value.reason
    assert caught.value.exit_code is ExitCode.CONFIGURATION
    assert f"guest1.cfg cannot be used: line {line}, column {column}" in str(caught.value)


def test_error_shows_the_line_with_a_caret_under_the_place():
    with pytest.raises(ConfigError) as caught:
        parse("name='x'\nmemory\t= eight # MiB\n", "x.cfg")
    assert "    memory = eight # MiB\n             ^" in caught.value.why


def test_error_shows_part_of_a_long_line_with_the_caret_in_it():
    with pytest.raises(ConfigError) as caught:
        parse("a='" + "x" * 5000 + r"\q'")
    shown, caret = caught.value.why.splitlines()[1:]
    assert len(shown) < 120
    assert shown[caret.index("^")] == "\\"


def test_error_never_passes_control_characters_on():
    with pytest.raises(ConfigError) as caught:
        parse("a='\x1b[31m\x9b\u202e' b", "evil\x1b[2J.cfg")
    assert all(character.isprintable() or character == "\n" for character in str(caught.value))


def test_error_on_python_in_the_file_says_that_it_is_not_understood():
    with pytest.raises(ConfigError, match="Python"):
        parse("name = (1)")


def test_parse_over_long_text_is_refused_at_once():
    with pytest.raises(ConfigError, match="characters"):
        parse("#" * (CONFIG_CHARACTERS_MAX + 1))


def test_positions_of_keys_items_and_characters_in_them():
    config = parse("a=1\n disk = [\n  'one',\n  \"t\\x77o\" ]")
    disk = config.settings["disk"]
    assert (disk.position.line, disk.position.column) == (2, 2)
    assert isinstance(disk.value, ValueList)
    one, two = disk.value.items
    assert (one.position.line, one.position.column) == (3, 3)
    assert (one.place(2).line, one.place(2).column) == (3, 6)
    assert two.text == "two"
    assert two.place(2) == two.position  # an escape lies before it: no exact place
    assert config.text[one.place(2).offset] == "e"


def test_repeated_keys_are_reported_and_added_ones_are_not():
    config = parse("a=1\nb='x'\na=2\nb+='y'\n")
    assert [(setting.name, setting.position.line) for setting in config.repeated] == [("a", 1)]
    assert config.settings["b"].is_added


@pytest.mark.parametrize(
    ("written", "expected"),
    [("8", 8), ("0", 0), ("0x1f", 31), ("017", 15), ("'8'", 8), ("' -0x10'", -16), ("'+7'", 7)],
)
def test_number_reads_as_strtol_with_base_0(written, expected):
    assert number(parse(f"a={written}").settings["a"].value) == expected


@pytest.mark.parametrize("written", ["''", "'eight'", "0x", "09", "1f", "8x", "'8 '", "1" * 5000])
def test_number_refuses_what_is_none(written):
    with pytest.raises(WrongTextError):
        number(parse(f"a={written}").settings["a"].value)


TOKENS = [
    "name",
    "vtpm",
    "=",
    "+=",
    "'",
    '"',
    "[",
    "]",
    ",",
    "#",
    "\\",
    "\\x4",
    "\\101",
    "8",
    "0x1f",
]
PIECES = st.sampled_from([*TOKENS, "'a'", '"b"', "é", ";", "\n", "\t", " ", "\r", "\0"])


@given(st.one_of(st.text(), st.lists(PIECES, max_size=40).map("".join)))
@example("a=['")
@example("a=#")
@example("\\")
def test_parse_any_text_gives_values_or_one_error_inside_the_text(text):
    try:
        config = parse(text)
    except ConfigError as error:
        position = error.position
        assert 0 <= position.offset <= len(text)
        lines = text.split("\n")
        assert 1 <= position.line <= len(lines)
        assert 1 <= position.column <= len(lines[position.line - 1]) + 1
        assert sum(len(line) + 1 for line in lines[: position.line - 1]) + position.column - 1 == (
            position.offset
        )
    else:
        for setting in config.settings.values():
            assert text[setting.position.offset :].startswith(setting.name)


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
TREES = st.recursive(WORDS, lambda inner: st.lists(inner, max_size=4), max_leaves=12)
ESCAPED = {"'": r"\'", '"': r"\"", "\\": r"\\", "\n": r"\n", "\t": r"\t", "\x07": r"\x07"}


def written(tree, quote):
    if isinstance(tree, str):
        return quote + "".join(ESCAPED.get(character, character) for character in tree) + quote
    return "[ " + ",\n".join(written(item, quote) for item in tree) + " ]"


@given(
    st.dictionaries(st.from_regex(r"[a-z][._0-9a-z]{0,8}", fullmatch=True), TREES),
    st.sampled_from("'\""),
)
def test_parse_gives_back_what_was_written(tree, quote):
    text = "\n".join(f"{name} = {written(value, quote)} # {name}" for name, value in tree.items())
    assert values(text) == tree


def test_read_gives_the_parsed_file(tmp_path):
    path = tmp_path / "guest1.cfg"
    path.write_text('name="guest1"\n')
    assert plain(read(path).settings["name"].value) == "guest1"


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00binary"])
def test_read_of_a_missing_or_binary_file_says_so(tmp_path, content):
    path = tmp_path / "guest1.cfg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(Failure) as caught:
        read(path)
    assert "guest1.cfg" in caught.value.what
