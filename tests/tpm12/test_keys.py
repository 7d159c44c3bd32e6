"""Loaded keys: what they say of themselves, how they are stored, which properties go together."""

import itertools

import pytest

from protocol.constants import STRUCT_VER
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import Key, Key12, KeyParms, PcrInfo, PcrInfoLong, RsaKeyParms
from protocol.wire import DecodeError, decode, encode
from tests.tpm12.conftest import PooledPrimes
from tests.tpm12.makers import pcr_info, pcr_info_long
from tests.tpm12.witness import key_template, parse_key, rsa_parms, sha1, sized, u8
from tpm12 import keys
from tpm12.crypto import new_rsa_key
from tpm12.keys import LoadedKey

SIGNING, STORAGE, IDENTITY, AUTHCHANGE, BIND, LEGACY, MIGRATE = range(0x10, 0x17)


def described(usage=SIGNING, enc=1, sig=2, *, bits=512, exponent=b"", primes=2, **more):
    parms = rsa_parms(bits, enc, sig, exponent, primes, more.pop("algorithm", 1))
    data = key_template(usage, parms=parms, **more)
    return decode(Key12 if more.get("key12") else Key, data)


@pytest.fixture(scope="module")
def rsa():
    return new_rsa_key(PooledPrimes().primes(512, 65537), 65537, 512)


def loaded(rsa, public, **more):
    whole = keys.described(
        public, pcr_info=public.pcr_info, pub_key=rsa.public.modulus, enc_data=b"wrapped"
    )
    parts = {
        "payload": 1,
        "usage_auth": b"u" * 20,
        "migration_auth": b"m" * 20,
        "prime": rsa.prime,
        "parent_pcr_status": False,
    }
    return LoadedKey(whole, **{**parts, **more})


@pytest.fixture(params=[False, True], ids=["KEY", "KEY12"])
def key(rsa, request):
    return loaded(rsa, described(key12=request.param, flags=0x02))


# -- what a key says of itself ---------------------------------------------------------------------


def test_pub_data_digest_covers_all_before_enc_data_size(key):
    parsed = parse_key(encode(key.public))
    whole = parsed.head + parsed.parms + sized(parsed.pcr_info) + sized(parsed.modulus)
    assert key.pub_data_digest == sha1(whole)


def test_pub_data_digest_covers_the_binding(rsa):
    free, bound = loaded(rsa, described()), loaded(rsa, described(pcr_info=pcr_info(1)))
    assert free.pub_data_digest != bound.pub_data_digest


def test_store_asymkey_is_what_part_2_says(key):
    expected = u8(1) + b"u" * 20 + b"m" * 20 + key.pub_data_digest + sized(key.prime)
    assert encode(key.store_asymkey()) == expected


def test_pubkey_is_parameters_and_modulus(key):
    parsed = parse_key(encode(key.public))
    assert encode(key.pubkey()) == parsed.parms + sized(parsed.modulus)


def test_key_speaks_of_its_parameters(key):
    assert (key.usage, key.enc_scheme, key.sig_scheme) == (SIGNING, 1, 2)
    assert key.rsa.public.exponent == 65537
    assert key.is_migratable
    assert key.rsa is key.rsa
    assert key.usage_hmac is key.usage_hmac


def test_repr_tells_no_secret(key):
    assert repr(key) == "LoadedKey(usage=0x0010, bits=512)"


def test_binding_follows_the_form_of_the_key(rsa):
    assert loaded(rsa, described()).pcr_info is None
    assert isinstance(loaded(rsa, described(pcr_info=pcr_info(1))).pcr_info, PcrInfo)
    long = described(key12=True, pcr_info=pcr_info_long([1], [1]))
    assert isinstance(loaded(rsa, long).pcr_info, PcrInfoLong)
    for wrong in (
        described(pcr_info=pcr_info_long([1], [1])),
        described(key12=True, pcr_info=pcr_info(1)),
    ):
        with pytest.raises(DecodeError):
            loaded(rsa, wrong)


@pytest.mark.parametrize(
    ("exponent", "value"), [(b"", 65537), (b"\3", 3), (b"\1\0\1", 65537), (b"\0\0\x11", 17)]
)
def test_exponent(exponent, value):
    assert keys.exponent_of(described(exponent=exponent).algorithm_parms) == value


def test_public_key_of_a_pubkey(key):
    public = keys.public_key_of(key.pubkey())
    assert key.rsa.decrypt_oaep(public.encrypt_oaep(b"d")) == b"d"


# -- storing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [False, True])
def test_a_key_is_stored_whole(rsa, status):
    public = described(key12=True, pcr_info=pcr_info_long([1], [2]))
    key = loaded(rsa, public, payload=6, parent_pcr_status=status)
    again = LoadedKey.from_bytes(key.to_bytes())
    for name in ("public", "payload", "usage_auth", "migration_auth", "prime", "pcr_info"):
        assert getattr(again, name) == getattr(key, name)
    assert again.parent_pcr_status == status
    assert again.to_bytes() == key.to_bytes()
    assert again.rsa.sign_sha1(bytes(20)) == key.rsa.sign_sha1(bytes(20))


def test_another_migration_secret_makes_another_key(key):
    stored = key.to_bytes()
    other = key.with_migration_auth(b"o" * 20)
    assert LoadedKey.from_bytes(other.to_bytes()).migration_auth == b"o" * 20
    assert other.pub_data_digest == key.pub_data_digest
    assert key.to_bytes() == stored != other.to_bytes()


def test_every_prefix_of_a_stored_key_is_refused(key):
    data = key.to_bytes()
    for size in range(len(data)):
        with pytest.raises(DecodeError):
            LoadedKey.from_bytes(data[:size])


# -- properties ------------------------------------------------------------------------------------

# Part 2 §5.8: the only combinations of usage, encryption and signature scheme.
SERVED = {
    *((SIGNING, 1, sig) for sig in (2, 3, 4)),
    (STORAGE, 3, 1),
    (IDENTITY, 1, 2),
    (AUTHCHANGE, 3, 1),
    *((BIND, enc, 1) for enc in (2, 3)),
    *((LEGACY, enc, sig) for enc in (2, 3) for sig in (2, 3)),
    (MIGRATE, 3, 1),
}


def code_of(public):
    try:
        keys.check_properties(public)
    except TpmError as error:
        return error.code
    return ReturnCode.SUCCESS


@pytest.mark.parametrize("usage", [0x00, 0x0F, *range(0x10, 0x17), 0x17, 0xFFFF])
def test_schemes_that_go_with_a_usage(usage):
    for enc, sig in itertools.product(range(7), range(7)):
        is_served = (usage, enc, sig) in SERVED
        code = code_of(described(usage, enc, sig, bits=2048))
        assert code == (ReturnCode.SUCCESS if is_served else ReturnCode.BAD_KEY_PROPERTY)


@pytest.mark.parametrize("usage", range(0x10, 0x17))
def test_sizes_that_go_with_a_usage(usage):
    enc, sig = next((e, s) for u, e, s in sorted(SERVED) if u == usage)
    only_2048 = usage in {STORAGE, IDENTITY, MIGRATE}
    for bits in (0, 496, 511, 512, 520, 528, 1024, 2032, 2047, 2048, 2064, 4096, 1 << 31):
        is_served = 512 <= bits <= 2048 and bits % 16 == 0 and (bits == 2048 or not only_2048)
        code = code_of(described(usage, enc, sig, bits=bits))
        assert code == (ReturnCode.SUCCESS if is_served else ReturnCode.BAD_KEY_PROPERTY)


@pytest.mark.parametrize("usage", range(0x10, 0x17))
def test_exponents_that_go_with_a_usage(usage):
    enc, sig = next((e, s) for u, e, s in sorted(SERVED) if u == usage)
    only_default = usage in {STORAGE, IDENTITY, MIGRATE}
    for exponent in (0, 1, 2, 3, 4, 5, 7, 9, 15, 17, 257, 65537, 65539, 1 << 64):
        is_served = exponent in {3, 5, 7, 17, 257, 65537} and not only_default
        data = exponent.to_bytes(9, "big")
        code = code_of(described(usage, enc, sig, bits=2048, exponent=data))
        assert code == (ReturnCode.SUCCESS if is_served else ReturnCode.BAD_KEY_PROPERTY)


@pytest.mark.parametrize("bit", range(32))
def test_flags_that_are_known(bit):
    code = code_of(described(flags=1 << bit))
    assert code == (ReturnCode.SUCCESS if bit < 5 else ReturnCode.BAD_KEY_PROPERTY)


def test_auth_data_usages_that_are_known():
    served = {u for u in range(256) if not code_of(described(auth_data_usage=u))}
    assert served == {0, 1, 3}


@pytest.mark.parametrize("primes", [0, 1, 3, 1 << 31])
def test_numbers_of_primes(primes):
    assert code_of(described(primes=primes)) == ReturnCode.BAD_KEY_PROPERTY


@pytest.mark.parametrize("algorithm", [0, 2, 4, 6, 0xFFFFFFFF])
def test_algorithms_other_than_rsa(algorithm):
    assert code_of(described(algorithm=algorithm)) == ReturnCode.BAD_KEY_PROPERTY


def test_rsa_parameters_that_are_malformed():
    inner = encode(RsaKeyParms(key_length=512, num_primes=2, exponent=b""))
    for parms in (b"", inner[:-1], inner + b"x"):
        public = Key(
            ver=STRUCT_VER,
            key_usage=SIGNING,
            key_flags=0,
            auth_data_usage=1,
            algorithm_parms=KeyParms(algorithm_id=1, enc_scheme=1, sig_scheme=2, parms=parms),
            pcr_info=b"",
            pub_key=b"",
            enc_data=b"",
        )
        assert code_of(public) == ReturnCode.BAD_KEY_PROPERTY
