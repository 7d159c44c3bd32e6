"""PCRs and quotes (Part 3, chapter 16)."""

import pytest

from protocol.return_codes import ReturnCode
from protocol.structures import Key, KeyParms, RsaKeyParms
from protocol.wire import encode
from tests.tpm12.conftest import PooledPrimes
from tests.tpm12.witness import (
    SRK,
    SRK_AUTH,
    ZERO,
    is_signature,
    parse_sized,
    selection,
    sha1,
    sized,
    u8,
    u16,
    u32,
)
from tpm12.crypto import new_rsa_key
from tpm12.keys import LoadedKey
from tpm12.profile import Profile

EXTEND, PCR_READ, QUOTE, QUOTE2, PCR_RESET = 0x14, 0x15, 0x16, 0x3E, 0xC8
ONES = b"\xff" * 20
DIGEST = sha1(b"measured")
NONCE = sha1(b"nonce")
# Table of the PC Client: who may extend, who may reset, from which locality.
ALL = {0, 1, 2, 3, 4}
EXTENDED_FROM = dict.fromkeys(range(17), ALL) | {
    17: {2, 3, 4}, 18: {2, 3, 4}, 19: {2, 3}, 20: {1, 2, 3}, 21: {2}, 22: {2}, 23: ALL,
}  # fmt: skip
RESET_FROM = {i: set() for i in range(16)} | {
    16: ALL, 17: {4}, 18: {4}, 19: {4}, 20: {2, 4}, 21: {2}, 22: {2}, 23: ALL,
}  # fmt: skip


def pcr(bench, index):
    return bench.tpm.send(PCR_READ, u32(index)).ok()


# -- Extend, PCRRead -------------------------------------------------------------------------------


def test_extend_of_zero_with_zero_is_the_known_answer(fresh):
    out = fresh.tpm.send(EXTEND, u32(0) + ZERO).ok()
    assert out.hex() == "b80de5d138758541c5f05265ad144ab9fa86d1db"
    assert pcr(fresh, 0) == out


def test_extend_chains_and_touches_one_pcr(fresh):
    fresh.tpm.send(EXTEND, u32(5) + DIGEST).ok()
    out = fresh.tpm.send(EXTEND, u32(5) + NONCE).ok()
    assert out == sha1(sha1(ZERO, DIGEST), NONCE)
    assert [pcr(fresh, i) for i in (4, 6)] == [ZERO, ZERO]


def test_extend_writes_nothing_permanent(fresh):
    fresh.tpm.send(EXTEND, u32(5) + DIGEST).ok()
    assert not fresh.last.permanent_changed


@pytest.mark.parametrize("locality", sorted(ALL))
def test_extend_by_locality(fresh, locality):
    for index, allowed in EXTENDED_FROM.items():
        answer = fresh.tpm.send(EXTEND, u32(index) + DIGEST, locality=locality)
        assert answer.code == (0 if locality in allowed else ReturnCode.BAD_LOCALITY), index


@pytest.mark.parametrize("index", [24, 25, 0x100, 0xFFFFFFFF])
def test_pcr_beyond_the_last_is_badindex(fresh, index):
    assert fresh.tpm.send(EXTEND, u32(index) + DIGEST).code == ReturnCode.BADINDEX
    assert fresh.tpm.send(PCR_READ, u32(index)).code == ReturnCode.BADINDEX


@pytest.mark.parametrize("how", ["disabled", "deactivated"])
def test_extend_of_a_tpm_out_of_use_happens_unseen(fresh, how):
    if how == "disabled":
        fresh.set_flags(disable=True)
    else:
        fresh.change("stclear", deactivated=True)
    assert fresh.tpm.send(EXTEND, u32(0) + DIGEST).ok() == ZERO
    fresh.set_flags(disable=False)
    fresh.change("stclear", deactivated=False)
    assert pcr(fresh, 0) == sha1(ZERO, DIGEST)


def test_pcr_read_looks_at_the_state_first(fresh):
    fresh.change("stclear", deactivated=True)
    assert fresh.tpm.send(PCR_READ, u32(99)).code == ReturnCode.DEACTIVATED


# -- PCR_Reset -------------------------------------------------------------------------------------


@pytest.mark.parametrize("locality", sorted(ALL))
def test_reset_by_locality(fresh, locality):
    for index, allowed in RESET_FROM.items():
        answer = fresh.tpm.send(PCR_RESET, selection(index), locality=locality)
        expected = 0 if locality in allowed else ReturnCode.NOTLOCAL
        assert answer.code == (expected if allowed else ReturnCode.NOTRESETABLE), index


def test_reset_of_free_pcrs_is_zero(fresh):
    for index in (16, 23):
        fresh.tpm.send(EXTEND, u32(index) + DIGEST).ok()
    fresh.tpm.send(PCR_RESET, selection(16, 23)).ok()
    assert [pcr(fresh, i) for i in (16, 23)] == [ZERO, ZERO]


@pytest.mark.parametrize(("tos_present", "value"), [(False, ONES), (True, ZERO)])
def test_reset_of_a_dynamic_pcr_tells_whether_there_was_a_launch(fresh, tos_present, value):
    fresh.change("stany", tos_present=tos_present)
    fresh.tpm.send(EXTEND, u32(20) + DIGEST, locality=2).ok()
    fresh.tpm.send(PCR_RESET, selection(20), locality=2).ok()
    assert pcr(fresh, 20) == value


@pytest.mark.parametrize("refused", [(16, 0), (16, 20)])
def test_reset_checks_all_before_it_changes_the_first(fresh, refused):
    fresh.tpm.send(EXTEND, u32(16) + DIGEST).ok()
    assert fresh.tpm.send(PCR_RESET, selection(*refused)).code != 0
    assert pcr(fresh, 16) == sha1(ZERO, DIGEST)


@pytest.mark.parametrize("body", [selection(), selection(size=0), selection(16, size=4)])
def test_reset_of_no_or_too_long_selection_is_invalid_pcr_info(fresh, body):
    assert fresh.tpm.send(PCR_RESET, body).code == ReturnCode.INVALID_PCR_INFO


# -- Quote, Quote2 ---------------------------------------------------------------------------------

HANDLE, KEY_AUTH = 0x77, sha1(b"quoting key")


def quoting_key(*, usage=0x10, enc=1, sig=2, auth_data_usage=1, pcr_info=b""):
    rsa = new_rsa_key(PooledPrimes().primes(1024, 65537), 65537, 1024)
    parms = encode(RsaKeyParms(key_length=1024, num_primes=2, exponent=b""))
    public = Key(
        key_usage=usage,
        key_flags=0,
        auth_data_usage=auth_data_usage,
        algorithm_parms=KeyParms(algorithm_id=1, enc_scheme=enc, sig_scheme=sig, parms=parms),
        pcr_info=pcr_info,
        pub_key=rsa.public.modulus,
        enc_data=b"",
    )
    return LoadedKey(
        public,
        payload=1,
        usage_auth=KEY_AUTH,
        migration_auth=ZERO,
        prime=rsa.prime,
        parent_pcr_status=False,
    )


@pytest.fixture
def quoting(owned):
    owned.change("volatile", keys={HANDLE: quoting_key()})
    owned.tpm.send(EXTEND, u32(1) + DIGEST).ok()
    return owned


def with_key(bench, **how):
    bench.change("volatile", keys={HANDLE: quoting_key(**how)})


def modulus(bench):
    return bench.state.volatile.keys[HANDLE].public.pub_key


def quote(bench, target, *, secret=KEY_AUTH, ordinal=QUOTE, tail=b"", locality=0, handle=HANDLE):
    session = bench.tpm.oiap(secret).ending()
    params = NONCE + target + tail
    return bench.tpm.auth(ordinal, params, session, handles=u32(handle), locality=locality)


def quote2(bench, target, add_version=0, **how):
    return quote(bench, target, ordinal=QUOTE2, tail=u8(add_version), **how)


@pytest.mark.parametrize("indices", [(0,), (1,), (0, 1, 23), tuple(range(24))])
@pytest.mark.parametrize("size", [2, 3])
def test_quote_signs_the_composite(quoting, indices, size):
    indices = tuple(i for i in indices if i < 8 * size)
    body = quote(quoting, selection(*indices, size=size)).ok()
    values = b"".join(pcr(quoting, i) for i in indices)
    composite = selection(*indices, size=size) + sized(values)
    assert body.startswith(composite)
    signature, rest = parse_sized(body[len(composite) :])
    assert rest == b""
    info = b"\1\1\0\0QUOT" + (sha1(composite) if indices else ZERO) + NONCE
    assert is_signature(modulus(quoting), signature, info)


def test_quote_of_nothing_signs_a_zero_composite(quoting):
    body = quote(quoting, selection()).ok()
    signature, _ = parse_sized(body[len(selection()) + 4 :])
    assert is_signature(modulus(quoting), signature, b"\1\1\0\0QUOT" + ZERO + NONCE)


@pytest.mark.parametrize("locality", sorted(ALL))
@pytest.mark.parametrize("add_version", [0, 1])
def test_quote2_signs_composite_locality_and_version(quoting, locality, add_version):
    body = quote2(quoting, selection(0, 1), add_version, locality=locality).ok()
    composite = sha1(selection(0, 1), sized(pcr(quoting, 0) + pcr(quoting, 1)))
    pcr_data = selection(0, 1) + u8(1 << locality) + composite
    assert body.startswith(pcr_data)
    version, rest = parse_sized(body[len(pcr_data) :])
    signature, rest = parse_sized(rest)
    assert rest == b""
    assert version == (quoting.tpm.capability(0x1A) if add_version else b"")
    assert (version[2:6] == Profile().version) == bool(add_version)
    info = u16(0x36) + b"QUT2" + NONCE + pcr_data + version
    assert is_signature(modulus(quoting), signature, info)


def test_quote2_with_a_bad_bool_is_bad_parameter(quoting):
    assert quote2(quoting, selection(0), 2).code == ReturnCode.BAD_PARAMETER


BOTH = pytest.mark.parametrize("how", [quote, quote2])


@BOTH
@pytest.mark.parametrize(
    ("key", "code"),
    [
        ({"usage": 0x10, "sig": 4}, 0),
        ({"usage": 0x12}, 0),
        ({"usage": 0x15, "enc": 3}, 0),
        ({"usage": 0x10, "sig": 3}, ReturnCode.INAPPROPRIATE_SIG),
        ({"usage": 0x11, "enc": 3, "sig": 1}, ReturnCode.INAPPROPRIATE_SIG),
        ({"usage": 0x14, "enc": 3, "sig": 2}, ReturnCode.INVALID_KEYUSAGE),
    ],
)
def test_quote_by_kind_of_key(quoting, how, key, code):
    with_key(quoting, **key)
    assert how(quoting, selection(0)).code == code


@BOTH
def test_quote_with_another_secret_is_authfail(quoting, how):
    assert how(quoting, selection(0), secret=ZERO).code == ReturnCode.AUTHFAIL


@BOTH
def test_quote_with_an_unknown_handle_is_invalid_keyhandle(quoting, how):
    assert how(quoting, selection(0), handle=0x99).code == ReturnCode.INVALID_KEYHANDLE


@BOTH
def test_quote_with_the_srk_is_inappropriate_sig(quoting, how):
    answer = how(quoting, selection(0), secret=SRK_AUTH, handle=SRK)
    assert answer.code == ReturnCode.INAPPROPRIATE_SIG


@BOTH
def test_quote_of_a_long_selection_is_invalid_pcr_info(quoting, how):
    assert how(quoting, selection(0, size=4)).code == ReturnCode.INVALID_PCR_INFO


@BOTH
def test_quote_with_a_key_bound_to_other_pcrs_is_wrongpcrval(quoting, how):
    with_key(quoting, pcr_info=selection(1) + ZERO + ZERO)
    assert how(quoting, selection(0)).code == ReturnCode.WRONGPCRVAL
    composite = sha1(selection(1), sized(pcr(quoting, 1)))
    with_key(quoting, pcr_info=selection(1) + composite + ZERO)
    how(quoting, selection(0)).ok()


@pytest.mark.parametrize(("ordinal", "tail"), [(QUOTE, b""), (QUOTE2, u8(0))])
@pytest.mark.parametrize(("usage", "code"), [(0, 0), (1, 1), (3, 1)])
def test_quote_without_session_is_for_keys_that_need_none(quoting, ordinal, tail, usage, code):
    with_key(quoting, auth_data_usage=usage)
    answer = quoting.tpm.send(ordinal, u32(HANDLE) + NONCE + selection(0) + tail)
    assert answer.code == code
