"""What a repeatable TPM encrypts is the same each time, and decrypts as any other's."""

import pytest

from tests.tpm12.conftest import Bench, PooledPrimes
from tests.tpm12.makers import seal
from tpm12.crypto import new_rsa_key
from tpm12.encryption import encrypted_oaep, encrypted_pkcs1v15
from tpm12.profile import Profile
from tpm12.tpm import Tpm

REPEATABLE, ORDINARY = Profile(is_repeatable=True), Profile()
BITS = 512
ENCRYPT = {
    "oaep": (encrypted_oaep, lambda key, data: key.decrypt_oaep(data), 42),
    "pkcs1": (encrypted_pkcs1v15, lambda key, data: key.decrypt_pkcs1v15(data), 11),
}


@pytest.fixture(scope="module")
def key():
    return new_rsa_key(PooledPrimes().primes(BITS, 65537), 65537, BITS)


def draft(state, profile):
    bench = Bench(state, profile)
    return Tpm(bench.state, bench.engine._world, 0)


@pytest.mark.parametrize("name", ENCRYPT)
@pytest.mark.parametrize("profile", [REPEATABLE, ORDINARY], ids=["repeatable", "ordinary"])
def test_ciphertext_decrypts_up_to_the_limit(fresh_state, key, name, profile):
    encrypt, decrypt, overhead = ENCRYPT[name]
    limit = BITS // 8 - overhead
    for data in (b"d", b"d" * limit):
        assert decrypt(key, encrypt(draft(fresh_state, profile), key.public, data)) == data
    with pytest.raises(ValueError):  # noqa: PT011 - OpenSSL's words and ours
        encrypt(draft(fresh_state, profile), key.public, b"d" * (limit + 1))


@pytest.mark.parametrize("name", ENCRYPT)
def test_only_a_repeatable_tpm_repeats(fresh_state, key, name):
    encrypt = ENCRYPT[name][0]
    for profile, is_same in ((REPEATABLE, True), (ORDINARY, False)):
        made = [encrypt(draft(fresh_state, profile), key.public, b"data") for _ in range(2)]
        assert (made[0] == made[1]) is is_same


def test_sealed_blobs_repeat_with_all_else(owned_state):
    made = [seal(Bench(owned_state, REPEATABLE).tpm, b"data") for _ in range(2)]
    assert made[0] == made[1]
    others = [seal(Bench(owned_state, ORDINARY).tpm, b"data") for _ in range(2)]
    assert others[0] != others[1]
