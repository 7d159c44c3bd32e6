"""A pytest plugin: the engine's own tests, on a TPM that shows what every client sees and no more.

    python -m pytest -p tests.differential.both --seen FILE [--on-swtpm] TEST...

`owned`, `with_ek` and `fresh` become a `Shown`, over this project's engine or over swtpm, and what
passes is written to FILE by test. A test goes as far as it can: what it asserts is of no interest
here, and where it looks into the engine (at a section of its state, say) it sees something that
is equal to everything; where it wants to change something there, it ends. So it takes the same
way on both, as long as both answer the same. `engine_tests.py` compares what was seen.
"""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.differential.other_tpm import OtherTpmEndedError
from tests.differential.sides import ours, theirs
from tests.tpm12.makers import lock_nv
from tests.tpm12.witness import EK, OWNER_AUTH, SRK, ZERO, parse_pubkey, u16, u32

STARTS = {"owned": "owned", "with_ek": "with_ek", "fresh": "factory"}
READ_PUBEK, OWNER_READ_INTERNAL_PUB = 0x7C, 0x81
OWNER_SET_DISABLE, SET_TEMP_DEACTIVATED, PRESENCE = 0x6E, 0x73, 0x4000000A


class EngineOnlyError(BaseException):
    """A test wants what another TPM has not; no test catches this."""


class Unseen:
    """What only the engine has: equal to everything, but for public keys, which one can ask for."""

    __hash__ = None

    def __init__(self, side, path=""):
        self._side, self._path = side, path

    def __getattr__(self, name):
        path = f"{self._path}.{name}"
        if path.endswith("srk.public.pub_key"):
            return _internal_modulus(self._side.tpm, SRK)
        if path.endswith("endorsement_key.public.pub_key"):
            answer = self._side.tpm.send(READ_PUBEK, ZERO)
            if answer.code:
                return _internal_modulus(self._side.tpm, EK)
            return parse_pubkey(answer.body)[1]
        return Unseen(self._side, path)

    def __call__(self, *_arguments, **_named):
        return self

    def __getitem__(self, _key):
        return self

    def __eq__(self, _other):
        return True

    def __ne__(self, _other):
        return True

    def __len__(self):
        return 0

    def __contains__(self, _thing):
        return True


def _internal_modulus(tpm, handle):
    answer = tpm.auth(OWNER_READ_INTERNAL_PUB, u32(handle), tpm.oiap(OWNER_AUTH).ending())
    return parse_pubkey(answer.ok())[1]


class Shown:
    """What a test gets in place of a `Bench`."""

    def __init__(self, side):
        self.tpm = side.tpm
        self.state = self.last = Unseen(side)
        self._side = side

    def __getattr__(self, name):
        raise EngineOnlyError(name)

    def power_cycle(self, startup_type=1):
        return self._side.started(startup_type)

    def present(self):
        self.tpm.assert_presence()

    def set_flags(self, **flags):
        for name, value in flags.items():
            if name == "disable":
                session = self.tpm.oiap(OWNER_AUTH).ending()
                self.tpm.auth(OWNER_SET_DISABLE, bytes([value]), session).ok()
            elif name == "nv_locked" and value:
                lock_nv(self.tpm).ok()
            elif name == "physical_presence_cmd_enable" and value:
                self.tpm.send(PRESENCE, u16(0x20)).ok()
            else:
                raise EngineOnlyError(name)

    def change(self, section, **values):
        if (section, values) != ("stclear", {"deactivated": True}):
            raise EngineOnlyError(section)
        self.present()
        self.tpm.send(SET_TEMP_DEACTIVATED).ok()


class Plugin:
    """Gives tests what they get here, and keeps what was seen of each."""

    def __init__(self, path, *, is_on_swtpm):
        self._path, self._kind = path, theirs if is_on_swtpm else ours
        self._side = None
        self._kept = {}

    @contextlib.contextmanager
    def _shown(self, start):
        made = self._kind(start)
        with made if self._kind is theirs else contextlib.nullcontext(made) as self._side:
            yield Shown(self._side)

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef, request):
        if fixturedef.argname not in STARTS:
            return None
        shown = self._shown(STARTS[fixturedef.argname])
        value = shown.__enter__()
        request.addfinalizer(lambda: shown.__exit__(None, None, None))
        fixturedef.cached_result = (value, fixturedef.cache_key(request), None)
        return value

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item):
        self._side = None
        yield
        if self._side:
            self._side.note(item.name)
            shown = [asdict(seen) for seen in self._side.seen]
            self._kept[_name(item)] = [
                {**seen, "request": seen["request"].hex(), "response": seen["response"].hex()}
                for seen in shown
            ]
        return True

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        del item
        with contextlib.suppress(EngineOnlyError, OtherTpmEndedError, Exception):
            return (yield)

    def pytest_sessionfinish(self):
        Path(self._path).write_text(json.dumps(self._kept))


def _name(item):
    """FILE::TEST, where the file is one of tests/tpm12."""
    return item.nodeid.removeprefix("tests/tpm12/").removeprefix("commands/")


def pytest_addoption(parser):
    parser.addoption("--seen", help="where to write what was seen")
    parser.addoption("--on-swtpm", action="store_true", help="ask swtpm and not the engine")


def pytest_configure(config):
    is_on_swtpm = config.getoption("on_swtpm")
    config.pluginmanager.register(Plugin(config.getoption("seen"), is_on_swtpm=is_on_swtpm))
