"""Properties of storage, cryptographic, NV, tick and counter commands, whatever their operands are.

Requests that would succeed are altered and authorized anew, so that the alteration reaches the
command and not only its HMAC check. Whatever comes of it: the response is well formed, and a
command that fails leaves permanent state, loaded keys and PCRs as they were, object by object.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.return_codes import ReturnCode
from tests.tpm12.conftest import OWNER_AUTH, SRK_AUTH, Bench
from tests.tpm12.makers import (
    AREA_AUTH,
    BIND,
    DATA_AUTH,
    ET_KEY,
    ET_OWNER,
    ET_SRK,
    KEY_AUTH,
    WRONG,
    define,
    loaded,
    lock_nv,
    nv_public,
    pcr_info,
    pcr_info_long,
    seal,
    signing,
    storage,
    template,
    wrap,
)
from tests.tpm12.witness import COMMAND, SRK, ZERO, frame, number, oaep, sized, u32

OIAP, OSAP = "OIAP", "OSAP"


@dataclass(frozen=True)
class Recipe:
    """A request that succeeds.

    Attributes:
        ordinal: Of the command.
        params: What goes into inParamDigest.
        handles: What goes before it.
        sessions: Of each session: its kind, entity type and value for OSAP, secret.
        out_handles: Bytes of handles in the response.
    """

    ordinal: int
    params: bytes
    handles: bytes = b""
    sessions: tuple = ()
    out_handles: int = 0

    def send(self, bench, params=None, handles=None, locality=0):
        tpm = bench.tpm
        params = self.params if params is None else params
        handles = self.handles if handles is None else handles
        if not self.sessions:
            return tpm.raw(frame(self.ordinal, handles + params), locality)
        sessions = [
            tpm.oiap(secret) if kind == OIAP else tpm.osap(*entity, secret)
            for kind, entity, secret in self.sessions
        ]
        more = {"handles": handles, "out_handles": self.out_handles, "locality": locality}
        return tpm.auth(self.ordinal, params, *sessions, **more)


def _equip(state):
    """Load keys, define areas, make a counter; the state, and recipes for every command."""
    bench = Bench(state)
    tpm = bench.tpm
    signer, _ = loaded(tpm, signing())
    info_signer, _ = loaded(tpm, signing(4))
    parent, _ = loaded(tpm, storage(pcr_info=pcr_info(10)))
    binder, bind_key = loaded(tpm, template(BIND, 3, 1))
    wrapped = wrap(tpm, signing(key12=True, pcr_info=pcr_info_long([1], [2]))).ok()
    sealed = seal(tpm, b"secret", pcr_info_long([1], [2])).ok()
    for index, attributes in ((1, 0x20002), (2, 0x40004), (3, 0x2000)):
        define(tpm, index, attributes, 8, as_owner=True).ok()
    lock_nv(tpm).ok()
    session = tpm.osap(ET_OWNER, 0, OWNER_AUTH)
    counter = tpm.auth(0xDC, session.masked(AREA_AUTH) + b"cntr", session).ok()[:4]
    tpm.send(0x5A).ok()

    by_owner = ((OIAP, None, OWNER_AUTH),)
    by_owner_osap = ((OSAP, (ET_OWNER, 0), OWNER_AUTH),)
    by_srk = ((OIAP, None, SRK_AUTH),)
    by_srk_osap = ((OSAP, (ET_SRK, SRK), SRK_AUTH),)
    by_key = ((OIAP, None, KEY_AUTH),)
    by_area = ((OIAP, None, AREA_AUTH),)
    srk, blob = u32(SRK), oaep(bind_key.modulus, b"\x01\x01\x00\x00\x02bound")
    long_info = sized(pcr_info_long([1], [2]))
    place = u32(0)
    recipes = {
        "Seal": Recipe(0x17, ZERO + long_info + sized(b"data"), srk, by_srk_osap),
        "Sealx": Recipe(0x3D, ZERO + long_info + sized(b"data"), srk, by_srk_osap),
        "Unseal": Recipe(0x18, sealed, srk, (*by_srk, (OIAP, None, DATA_AUTH))),
        "UnBind": Recipe(0x1E, sized(blob), u32(binder), by_key),
        "CreateWrapKey": Recipe(0x1F, ZERO + ZERO + signing(), srk, by_srk_osap),
        "CreateWrapKey under a key": Recipe(
            0x1F,
            ZERO + ZERO + signing(key12=True),
            u32(parent),
            ((OSAP, (ET_KEY, parent), KEY_AUTH),),
        ),
        "LoadKey": Recipe(0x20, wrapped, srk, by_srk),
        "LoadKey2": Recipe(0x41, wrapped, srk, by_srk, out_handles=4),
        "GetPubKey": Recipe(0x21, b"", u32(signer), by_key),
        "SHA1Start": Recipe(0xA0, b""),
        "Sign": Recipe(0x3C, sized(b"d" * 20), u32(signer), by_key),
        "Sign INFO": Recipe(0x3C, sized(b"data"), u32(info_signer), by_key),
        "GetRandom": Recipe(0x46, u32(16)),
        "StirRandom": Recipe(0x47, sized(b"data")),
        "CertifyKey": Recipe(0x32, ZERO, u32(signer) + u32(parent), by_key * 2),
        "CertifyKey2": Recipe(0x33, ZERO + ZERO, u32(parent) + u32(signer), by_key * 2),
        "NV_DefineSpace": Recipe(0xCC, nv_public(4, 0x2, 8) + ZERO, b"", by_owner_osap),
        "NV_DefineSpace again": Recipe(0xCC, nv_public(1, 0x2, 8) + ZERO, b"", by_owner_osap),
        "NV_WriteValue": Recipe(0xCD, u32(1) + place + sized(b"data"), b"", by_owner),
        "NV_WriteValue free": Recipe(0xCD, u32(3) + place + sized(b"data")),
        "NV_WriteValueAuth": Recipe(0xCE, u32(2) + place + sized(b"data"), b"", by_area),
        "NV_ReadValue": Recipe(0xCF, u32(1) + place + u32(8), b"", by_owner),
        "NV_ReadValue free": Recipe(0xCF, u32(3) + place + u32(8)),
        "NV_ReadValueAuth": Recipe(0xD0, u32(2) + place + u32(8), b"", by_area),
        "DirWriteAuth": Recipe(0x19, u32(0) + b"d" * 20, b"", by_owner),
        "DirRead": Recipe(0x1A, u32(0)),
        "GetTicks": Recipe(0xF1, b""),
        "TickStampBlob": Recipe(0xF2, ZERO + ZERO, u32(signer), by_key),
        "CreateCounter": Recipe(0xDC, ZERO + b"cntr", b"", by_owner_osap),
        "IncrementCounter": Recipe(0xDD, counter, b"", by_area),
        "ReadCounter": Recipe(0xDE, counter),
        "ReleaseCounter": Recipe(0xDF, counter, b"", by_area),
        "ReleaseCounterOwner": Recipe(0xE0, counter, b"", by_owner),
    }
    return bench.state, recipes


@pytest.fixture(scope="session")
def equipped(owned_state):
    return _equip(owned_state)


def _threaded(recipes):
    """The commands that need a SHA-1 thread."""
    return {
        "SHA1Update": Recipe(0xA1, sized(b"d" * 64)),
        "SHA1Complete": Recipe(0xA2, sized(b"d" * 5)),
        "SHA1CompleteExtend": Recipe(0xA3, u32(10) + sized(b"d" * 5)),
        **recipes,
    }


def bench_for(state, name):
    """A fresh engine over the equipped state, with a SHA-1 thread for who needs one."""
    bench = Bench(state)
    if name.startswith("SHA1"):
        bench.tpm.send(0xA0).ok()
    return bench


def test_every_recipe_succeeds(equipped):
    """The control: without an alteration every request reaches its end."""
    state, recipes = equipped
    for name, recipe in _threaded(recipes).items():
        recipe.send(bench_for(state, name)).ok()


altered_at = st.tuples(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
alterations = st.fixed_dictionaries(
    {
        "flips": st.lists(altered_at, max_size=3),
        "cut": st.integers(min_value=0, max_value=3),
        "more": st.binary(max_size=3),
        "locality": st.integers(min_value=0, max_value=4),
        "in_handles": st.booleans(),
    }
)


def altered(data, flips):
    changed = bytearray(data)
    for at, bits in flips:
        if changed:
            changed[at % len(changed)] ^= bits
    return bytes(changed)


def kept(state):
    """What a failing command must not replace."""
    return state.permanent, state.volatile.keys, state.stclear.pcrs


@settings(deadline=None, max_examples=400)
@given(data=st.data(), alteration=alterations)
def test_failed_command_changes_nothing(equipped, data, alteration):
    state, recipes = equipped
    recipes = _threaded(recipes)
    name = data.draw(st.sampled_from(sorted(recipes)))
    recipe, bench = recipes[name], bench_for(state, name)
    params, handles = recipe.params, recipe.handles
    if alteration["in_handles"] and handles:
        handles = altered(handles, alteration["flips"])
    else:
        params = altered(params, alteration["flips"])
        params = params[: len(params) - alteration["cut"]] + alteration["more"]
    before = kept(bench.state)
    answer = recipe.send(bench, params, handles, alteration["locality"])
    if answer.code != ReturnCode.SUCCESS:
        assert all(a is b for a, b in zip(before, kept(bench.state), strict=True))
        assert not bench.last.permanent_changed


@pytest.mark.parametrize("position", [0, 1])
def test_wrong_hmac_changes_nothing_but_sessions_and_attack_counter(equipped, position):
    state, recipes = equipped
    for recipe in recipes.values():
        if len(recipe.sessions) <= position:
            continue
        bench = Bench(state)
        before = kept(bench.state)
        sessions = list(recipe.sessions)
        kind, entity, _ = sessions[position]
        sessions[position] = (kind, entity, WRONG)
        wrong = Recipe(recipe.ordinal, recipe.params, recipe.handles, tuple(sessions))
        code = wrong.send(bench).code
        assert code == (ReturnCode.AUTH2FAIL if position else ReturnCode.AUTHFAIL)
        assert all(a is b for a, b in zip(before, kept(bench.state), strict=True))
        assert bench.state.stany.sessions == {}
        assert bench.state.stclear.failed_tries == 1


def test_replayed_request_is_refused(equipped):
    """Each request proves itself with the even nonce of the response before it."""
    state, recipes = equipped
    bench = Bench(state)
    recipe, sent = recipes["IncrementCounter"], []
    exchange = bench.tpm.exchange
    bench.tpm.exchange = lambda request, locality: (
        sent.append(request),
        exchange(request, locality),
    )[1]
    recipe.send(bench).ok()
    value = bench.state.permanent.counters
    assert bench.tpm.raw(sent[-1]).code == ReturnCode.AUTHFAIL
    assert bench.state.permanent.counters is value


@given(request=st.binary(max_size=80), ordinal=st.sampled_from(range(0x17, 0xF3)))
@settings(deadline=None)
def test_any_bytes_get_a_well_formed_answer(equipped, request, ordinal):
    state, _ = equipped
    for tag in (COMMAND, COMMAND + 1, COMMAND + 2):
        answer = Bench(state).tpm.raw(frame(ordinal, request, tag))
        assert number(answer.raw[2:6]) == len(answer.raw)
