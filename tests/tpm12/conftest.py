"""Engines to test: a world without chance, and TPMs in the states that tests start from.

`fresh` is started and nothing else, `with_ek` has an endorsement key, `owned` has an owner too.
Each is a `Bench`: an engine of the test's own over a state that is made once and shared (states
never change in place), and a `Witness` that speaks to it.
"""

import hashlib
import json
from pathlib import Path

import pytest

from protocol.constants import PCR_COUNT
from protocol.structures import (
    UNRESTRICTED_PCR_INFO,
    Key,
    KeyParms,
    NvAttributes,
    NvDataPublic,
    RsaKeyParms,
)
from protocol.wire import encode
from tests.conformance.reached import checker, counts, watched
from tests.tpm12.witness import OWNER_AUTH, SRK_AUTH, ZERO, Witness, sha1, u16
from tpm12.commands import ALL
from tpm12.crypto import RsaKeyGenerator, new_rsa_key
from tpm12.engine import Engine
from tpm12.flags import with_flags
from tpm12.keys import LoadedKey
from tpm12.profile import Profile
from tpm12.state import NvArea, State, factory_state

STARTUP, SELF_TEST_FULL = 0x99, 0x50
_PRIMES = Path(__file__).parents[1] / "vectors" / "primes.json"


class CountingRng:
    """Looks random, is the same in every run, and never repeats."""

    def __init__(self, seed=b"tests"):
        self._seed = seed
        self._drawn = 0

    def random(self, size, /):
        self._drawn += 1
        return hashlib.shake_128(self._seed + self._drawn.to_bytes(8, "big")).digest(size)

    def stir(self, data, /):
        self._seed = hashlib.sha256(self._seed + data).digest()


class SetClock:
    """A clock that stands until a test moves it."""

    def __init__(self):
        self.us = 1_000_000_000

    def now_us(self):
        return self.us

    def pass_s(self, seconds):
        self.us += int(seconds * 1_000_000)


class PooledPrimes:
    """Deals primes from a pool, so that tests need not wait for keys; fit for every exponent."""

    def __init__(self):
        pool = json.loads(_PRIMES.read_text())
        self._pool = {
            int(bits): [(int(p, 16), int(q, 16)) for p, q in pairs] for bits, pairs in pool.items()
        }
        self._dealt = 0
        self._others = RsaKeyGenerator(CountingRng(b"primes"))

    def primes(self, bits, exponent, /):
        pairs = self._pool.get(bits)
        if pairs is None:
            return self._others.primes(bits, exponent)
        self._dealt += 1
        return pairs[self._dealt % len(pairs)]


BANK = list(range(PCR_COUNT))


class Bench:
    """An engine, its world, and a witness that keeps every outcome.

    Attributes:
        last: Outcome of the last command, for what only the engine's host sees.
    """

    def __init__(self, state, profile=None, commands=ALL):
        self.rng, self.clock, self.primes = CountingRng(), SetClock(), PooledPrimes()
        self.engine = Engine(
            state,
            rng=self.rng,
            clock=self.clock,
            key_generator=self.primes,
            profile=profile or Profile(),
            commands=commands,
        )
        self.tpm = Witness(self._exchange)
        self.last = None

    def _exchange(self, request, locality):
        self.last = self.engine.execute(request, locality)
        self.engine.keep(self.last)
        # What a delta of the bank counts on (`has_fixed_keys`), after every command of every test.
        assert list(self.state.stclear.pcrs) in ([], BANK)
        return self.last.response

    @property
    def state(self):
        return self.engine.state

    def change(self, section, **values):
        """Put values straight into a section of the state."""
        sections = {name: getattr(self.state, name) for name in State.__slots__}
        changed = sections[section].clone()
        for name, value in values.items():
            assert hasattr(changed, name)
            setattr(changed, name, value)
        self.engine.state = State(**{**sections, section: changed})

    def set_flags(self, **flags):
        """Put permanent flags straight into the state."""
        self.change("permanent", flags=with_flags(self.state.permanent.flags, **flags))

    def present(self):
        """Assert physical presence without a command."""
        self.set_flags(physical_presence_cmd_enable=True)
        self.change("stclear", physical_presence=True)

    def power_cycle(self, startup_type=1):
        """TPM_Init and TPM_Startup; the startup's answer."""
        self.engine.keep(self.engine.power_on())
        return self.tpm.send(STARTUP, u16(startup_type))


def made_key(primes, usage, *, usage_auth, migration_auth):
    """A 2048-bit storage-like key, put together without the engine's help."""
    rsa = new_rsa_key(primes, 65537, 2048)
    parms = encode(RsaKeyParms(key_length=2048, num_primes=2, exponent=b""))
    public = Key(
        key_usage=usage,
        key_flags=0,
        auth_data_usage=1,
        algorithm_parms=KeyParms(algorithm_id=1, enc_scheme=3, sig_scheme=1, parms=parms),
        pcr_info=b"",
        pub_key=rsa.public.modulus,
        enc_data=b"",
    )
    return LoadedKey(
        public,
        payload=1,
        usage_auth=usage_auth,
        migration_auth=migration_auth,
        prime=rsa.prime,
        parent_pcr_status=False,
    )


def nv_area(index, attributes):
    """An NV area of four bytes that nothing but its attributes guards."""
    public = NvDataPublic(
        nv_index=index,
        pcr_info_read=UNRESTRICTED_PCR_INFO,
        pcr_info_write=UNRESTRICTED_PCR_INFO,
        permission=NvAttributes(attributes=attributes),
        b_read_stclear=False,
        b_write_stclear=False,
        b_write_define=False,
        data_size=4,
    )
    return NvArea(public=public, auth_value=ZERO, data=b"data")


@pytest.fixture(autouse=True)
def return_codes_are_recorded(request):
    """Which codes each command gives is known, so that all of them are compared with swtpm's."""
    pairs = set()
    with watched(lambda name, code: pairs.add((name, code))):
        yield
    if counts(request.node):
        judge = checker(request.config)
        for name, code in sorted(pairs):
            judge.check(request.node, name, code)


@pytest.fixture(scope="session")
def factory():
    """State as shipped, without power."""
    return factory_state()


@pytest.fixture(scope="session")
def fresh_state(factory):
    bench = Bench(factory)
    bench.power_cycle().ok()
    bench.tpm.send(SELF_TEST_FULL).ok()
    return bench.state


@pytest.fixture(scope="session")
def ek_state(fresh_state):
    bench = Bench(fresh_state)
    key = made_key(
        PooledPrimes().primes(2048, 65537), 0x11, usage_auth=bytes(20), migration_auth=bytes(20)
    )
    bench.change("permanent", endorsement_key=key, tpm_daa_seed=sha1(b"daa seed"))
    bench.set_flags(cekp_used=True, enable_revoke_ek=False)
    return bench.state


@pytest.fixture(scope="session")
def owned_state(ek_state):
    bench = Bench(ek_state)
    primes = PooledPrimes()
    primes.primes(2048, 65537)
    proof = sha1(b"tpm proof")
    srk = made_key(primes.primes(2048, 65537), 0x11, usage_auth=SRK_AUTH, migration_auth=proof)
    bench.change(
        "permanent",
        srk=srk,
        owner_auth=OWNER_AUTH,
        tpm_proof=proof,
        context_key=bytes(range(16)),
        delegate_key=bytes(range(16, 32)),
    )
    bench.set_flags(read_pubek=False)
    return bench.state


@pytest.fixture
def make_bench():
    """Make a Bench over any state, with any profile."""
    return Bench


@pytest.fixture
def fresh(fresh_state):
    return Bench(fresh_state)


@pytest.fixture
def with_ek(ek_state):
    return Bench(ek_state)


@pytest.fixture
def owned(owned_state):
    return Bench(owned_state)


@pytest.fixture(params=["fresh", "with_ek", "owned"])
def any_tpm(request):
    """Each of the three in turn."""
    return request.getfixturevalue(request.param)
