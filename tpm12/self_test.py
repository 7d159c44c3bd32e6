"""Self-test: known answers of the cryptography this TPM stands on, and of its own EK.

Source: TPM Main r116 Part 1 §§ on self-test, Part 3 §4. What must run before the full test is
marked `Gate.BEFORE_SELF_TEST` in the declarations; any other command makes the TPM test itself
first, which the specification allows (Part 3 §4).
"""

from __future__ import annotations

from protocol.return_codes import ReturnCode, TpmError
from tpm12.crypto import DecryptionError, aes128_ctr, hmac_sha1, mgf1, sha1
from tpm12.state import SelfTestState
from tpm12.tpm import Tpm

_ABC_DIGEST = bytes.fromhex("a9993e364706816aba3e25717850c26c9cd0d89d")
_HMAC_RFC2202_1 = bytes.fromhex("b617318655057264e28bc0b6fb378c8ef146be00")
_AES_KEY = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
_AES_COUNTER = bytes.fromhex("f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff")
_AES_PLAIN = bytes.fromhex("6bc1bee22e409f96e93d7e117393172a")
_AES_CIPHER = bytes.fromhex("874d6191b620e3261bef6864990db6ce")
_MGF1_SEED_FOO = bytes.fromhex("1ac9075cd4")


def run_limited(tpm: Tpm) -> None:
    """What runs at power-on: SHA-1 and HMAC known answers."""
    passed = sha1(b"abc") == _ABC_DIGEST and hmac_sha1(b"\x0b" * 20, b"Hi There") == _HMAC_RFC2202_1
    state = SelfTestState.LIMITED if passed else SelfTestState.FAILURE
    tpm.change_volatile().self_test = state


def run_full(tpm: Tpm) -> None:
    """All tests; the result is kept.

    Raises:
        TpmError: FAILEDSELFTEST. The TPM is then in failure mode until power goes.
    """
    passed = (
        not tpm.world.profile.fails_self_test
        and mgf1(b"foo", 5) == _MGF1_SEED_FOO
        and aes128_ctr(_AES_KEY, _AES_COUNTER, _AES_PLAIN) == _AES_CIPHER
        and _endorsement_key_works(tpm)
    )
    tpm.change_volatile().self_test = SelfTestState.FULL if passed else SelfTestState.FAILURE
    if not passed:
        tpm.settle()
        raise TpmError(ReturnCode.FAILEDSELFTEST)


def _endorsement_key_works(tpm: Tpm) -> bool:
    key = tpm.permanent.endorsement_key
    if key is None:
        return True
    try:
        return key.rsa.decrypt_oaep(key.rsa.public.encrypt_oaep(_ABC_DIGEST)) == _ABC_DIGEST
    except (DecryptionError, ValueError):
        return False
