"""The arguments of a domain's daemon."""

from pathlib import Path

import pytest

from daemons.domain_options import parse_domain_options
from daemons.errors import ExitCode

ARGUMENTS = ["--domain", "guest1", "--config", "guest1.cfg"]


def parse(*root):
    return parse_domain_options([*root, *ARGUMENTS], program="guestd", description="A guest.")


def test_root_is_the_machine_s_or_what_a_link_leads_to(tmp_path):
    assert parse().root == Path("/")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    assert parse("--root", str(tmp_path / "link")).root == (tmp_path / "root").resolve()


def test_root_without_an_end_ends_the_process_with_its_reason(tmp_path, capsys):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(SystemExit) as end:
        parse("--root", str(tmp_path / "loop"))
    assert end.value.code == ExitCode.USAGE
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(f"guestd: error: argument --root: '{tmp_path / 'loop'}' cannot be used")
