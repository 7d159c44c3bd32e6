"""Settings: defaults, files, and what is refused in them."""

import dataclasses
from dataclasses import dataclass, field

import pytest

from daemons.errors import ExitCode
from daemons.guestd import GuestdSettings
from daemons.hwtpmd import HwtpmdSettings
from daemons.launcher.launcher_settings import LauncherSettings
from daemons.manager.manager_settings import VtpmmgrdSettings
from daemons.ring_server import RingSettings
from daemons.settings import (
    SettingsError,
    load,
    parse,
)
from daemons.vtpmd import VtpmdSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Settings of every kind."""

    log_level: str = "info"
    rings: RingSettings = field(default_factory=RingSettings)
    reconnect_s: float = 60.0


ALL = [LauncherSettings, HwtpmdSettings, VtpmmgrdSettings, VtpmdSettings, GuestdSettings]


@pytest.mark.parametrize("kind", ALL)
def test_load_without_a_file_gives_the_defaults(tmp_path, kind):
    assert load(tmp_path / "none.toml", kind) == kind()


@pytest.mark.parametrize("kind", ALL)
def test_parse_empty_file_gives_the_defaults(kind):
    assert parse(b"", kind, "x.toml") == kind()


@pytest.mark.parametrize("kind", ALL)
def test_every_quantity_ends_in_its_unit(kind):
    def names(of):
        for declared in dataclasses.fields(of):
            value = getattr(of, declared.name)
            yield from names(value) if dataclasses.is_dataclass(value) else [(declared.name, value)]

    for name, value in names(kind()):
        if not isinstance(value, str | bool):
            assert name.endswith(("_s", "_max", "_generation")), name


def test_load_file_says_only_what_differs(tmp_path):
    path = tmp_path / "vtpmd.toml"
    path.write_text('log_level = "debug"\nreconnect_s = 5\n[rings]\nrings_max = 7\n')
    path.chmod(0o600)
    settings = load(path, Chosen)
    assert settings.log_level == "debug"
    assert settings.reconnect_s == 5.0
    assert settings.rings.rings_max == 7
    assert settings.rings.send_s == Chosen().rings.send_s


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"log_level = 'loud'", "none of"),
        (b"log_level = 3", "none of"),
        (b"reconnect_s = 'long'", "not a number"),
        (b"reconnect_s = true", "not a number"),
        (b"reconnect_s = 0", "from 0.01"),
        (b"reconnect_s = -1", "from 0.01"),
        (b"reconnect_s = nan", "from 0.01"),
        (b"reconnect_s = inf", "from 0.01"),
        (b"\nreconect_s = 5", "unknown key 'reconect_s' (line 2)"),
        (b"rings = 5", "not a table"),
        (b"[rings]\nrings_max = 0", "whole number from 1"),
        (b"[rings]\nrings_max = 1.5", "whole number from 1"),
        (b"[rings]\nrings_max = 100000", "whole number from 1"),
        (b"[rings]\nnothing = 1", "[rings] has an unknown key 'nothing' (line 2)"),
        (b"a = \n", "line 1"),
        (b"a = 1\na = 2\n", "line 2"),
    ],
)
def test_parse_file_that_is_not_understood_is_refused_with_its_place(content, why):
    with pytest.raises(SettingsError) as caught:
        parse(content, Chosen, "vtpmd.toml")
    assert why in caught.value.why
    assert caught.value.exit_code is ExitCode.CONFIGURATION
