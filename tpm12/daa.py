"""Direct anonymous attestation: what a session and a credential are, and the secrets behind them.

The TPM's secret is f, computed anew from its seed whenever it is needed, in two parts f0 and f1. A
credential is (A, e, v) with A^e * R0^f0 * R1^f1 * S^v = Z mod n, of which the TPM keeps v, in two
parts v0 and v1, in blobs that only it can open. r0 to r4 are the random numbers of one proof, and c
is its challenge.

Leaves to others: the stages (`daa_stages.py`), their order and sessions (`commands/daa.py`).

Source: TPM Main r116 Part 2 §22, Part 3 §26.

Invariants:
- A number from outside is used only if it hashes to what the issuer's settings say, and never as a
  modulus below 2 or longer than 256 bytes: no division by zero, and no computation without an end.
- A blob is opened only after its HMAC is checked.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from protocol.constants import ZERO_DIGEST, ResourceType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import DaaBlob, DaaIssuer, DaaSensitive, DaaTpm
from protocol.wire import DecodeError, decode, encode
from tpm12.crypto import aes128_ctr, hmac_sha1, is_same, mgf1, sha1
from tpm12.state import DaaSession
from tpm12.tpm import Tpm

MODULUS_BYTES: Final = 256
"""DAA_SIZE_issuerModulus, DAA_SIZE_NE, DAA_SIZE_w, and the size of the scratch."""
R_BYTES: Final = (43, 43, 128, 168, 219)
"""DAA_SIZE_r0 to DAA_SIZE_r4."""
U0_BYTES: Final = 128
U1_BYTES: Final = 138
V0_BYTES: Final = 128
V1_BYTES: Final = 192
NT_BYTES: Final = 20
COUNT_BYTES: Final = 4
POWER0_BITS: Final = 104
POWER1_BITS: Final = 1024
_IV_BYTES: Final = 16
_LABEL: Final = bytes(16)
_ZERO: Final = b"\0"
_ONE: Final = b"\1"

NO_ISSUER: Final = DaaIssuer(
    daa_digest_r0=ZERO_DIGEST,
    daa_digest_r1=ZERO_DIGEST,
    daa_digest_s0=ZERO_DIGEST,
    daa_digest_s1=ZERO_DIGEST,
    daa_digest_n=ZERO_DIGEST,
    daa_digest_gamma=ZERO_DIGEST,
    daa_generic_q=bytes(26),
)
NO_CREDENTIAL: Final = DaaTpm(
    daa_digest_issuer=ZERO_DIGEST,
    daa_digest_v0=ZERO_DIGEST,
    daa_digest_v1=ZERO_DIGEST,
    daa_rekey=ZERO_DIGEST,
    daa_count=0,
)
BLANK: Final = DaaSession(
    stage=1,
    issuer_settings=NO_ISSUER,
    tpm_specific=NO_CREDENTIAL,
    digest_context=ZERO_DIGEST,
    digest=ZERO_DIGEST,
    context_seed=ZERO_DIGEST,
    scratch=b"",
    join_u0=bytes(U0_BYTES),
    join_u1=bytes(U1_BYTES),
    digest_n0=ZERO_DIGEST,
)
"""A session before its first stage."""


# -- checks ----------------------------------------------------------------------------------------


def join_context(session: DaaSession) -> bytes:
    """DAA_digestContext of a join session."""
    joined = session.join_u0 + session.join_u1 + session.digest_n0
    return sha1(encode(session.tpm_specific), joined)


def sign_context(session: DaaSession) -> bytes:
    """DAA_digestContext of a sign session."""
    return sha1(encode(session.tpm_specific))


def check_issuer(session: DaaSession) -> None:
    """Check that the credential is one of this issuer.

    Raises:
        TpmError: DAA_ISSUER_SETTINGS.
    """
    expected = session.tpm_specific.daa_digest_issuer
    if not is_same(expected, sha1(encode(session.issuer_settings))):
        raise TpmError(ReturnCode.DAA_ISSUER_SETTINGS)


def issuer_settings(data: bytes) -> DaaIssuer:
    """Read an issuer's settings.

    Raises:
        TpmError: DAA_INPUT_DATA0 when they are malformed, or the group has no order.
    """
    try:
        settings = decode(DaaIssuer, data)
    except DecodeError as error:
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "no TPM_DAA_ISSUER") from error
    if not any(settings.daa_generic_q):
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "a group of order 0")
    return settings


def count(data: bytes) -> int:
    """Read a counter.

    Raises:
        TpmError: DAA_INPUT_DATA0 when it has another size.
    """
    require_size(data, COUNT_BYTES)
    return integer(data)


def require_size(data: bytes, size: int, code: ReturnCode = ReturnCode.DAA_INPUT_DATA0) -> None:
    """Check the size of an input.

    Raises:
        TpmError: `code`.
    """
    if len(data) != size:
        raise TpmError(code, f"{len(data)} bytes instead of {size}")


def checked(data: bytes, digest: bytes, code: ReturnCode) -> int:
    """Read a number that the issuer's settings vouch for.

    Raises:
        TpmError: `code` for another number, and for one of more than 256 bytes.
    """
    if sha1(data) != digest or len(data) > MODULUS_BYTES:
        raise TpmError(code, "not the issuer's number")
    return integer(data)


def modulus(data: bytes, digest: bytes, code: ReturnCode) -> int:
    """Read a modulus that the issuer's settings vouch for.

    Raises:
        TpmError: As `checked`; `code` for 0 and 1 too.
    """
    found = checked(data, digest, code)
    if found < 2:
        raise TpmError(code, "no modulus")
    return found


def integer(data: bytes) -> int:
    """Read a big-endian number of any size."""
    return int.from_bytes(data, "big")


def minimal(number: int) -> bytes:
    """Write a number in as few bytes as it needs; 0 in none."""
    return number.to_bytes((number.bit_length() + 7) // 8, "big")


# -- secrets ---------------------------------------------------------------------------------------


def q(session: DaaSession) -> int:
    """The order of the issuer's group of pseudonyms."""
    return integer(session.issuer_settings.daa_generic_q)


def f(session: DaaSession) -> int:
    """The secret of this credential."""
    own = session.tpm_specific
    counted = own.daa_rekey + own.daa_count.to_bytes(COUNT_BYTES, "big")
    return integer(sha1(counted, _ZERO) + sha1(counted, _ONE)) % q(session)


def f0(session: DaaSession) -> int:
    """The lower 104 bits of f."""
    return f(session) % (1 << POWER0_BITS)


def f1(session: DaaSession) -> int:
    """The other bits of f."""
    return f(session) >> POWER0_BITS


def r(session: DaaSession, i: int) -> int:
    """The random number r_i of this proof."""
    return integer(mgf1(b"r%d" % i + session.context_seed, R_BYTES[i]))


def c(session: DaaSession) -> int:
    """The challenge of this proof."""
    return integer(session.digest)


# -- blobs -----------------------------------------------------------------------------------------


def closed(tpm: Tpm, resource_type: ResourceType, secret: bytes) -> bytes:
    """Encrypt a part of a credential into a blob that only this TPM opens."""
    iv = tpm.random(_IV_BYTES)
    plain = encode(DaaSensitive(internal_data=secret))
    blob = DaaBlob(
        resource_type=resource_type,
        label=_LABEL,
        blob_integrity=ZERO_DIGEST,
        additional_data=iv,
        sensitive_data=aes128_ctr(tpm.permanent.daa_blob_key, iv, plain),
    )
    return encode(replace(blob, blob_integrity=_integrity(tpm, blob)))


def opened(tpm: Tpm, resource_type: ResourceType, data: bytes) -> bytes:
    """What is inside a blob that this TPM made.

    Raises:
        TpmError: DAA_INPUT_DATA0, whatever is wrong with it.
    """
    try:
        blob = decode(DaaBlob, data)
        if not is_same(_integrity(tpm, blob), blob.blob_integrity):
            raise TpmError(ReturnCode.DAA_INPUT_DATA0, "not a blob of this TPM")
        iv = blob.additional_data
        plain = aes128_ctr(tpm.permanent.daa_blob_key, iv, blob.sensitive_data)
        secret = decode(DaaSensitive, plain).internal_data
    except DecodeError as error:
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "no TPM_DAA_BLOB") from error
    if blob.resource_type != resource_type:
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "a blob of another kind")
    return secret


def _integrity(tpm: Tpm, blob: DaaBlob) -> bytes:
    return hmac_sha1(tpm.permanent.daa_proof, encode(replace(blob, blob_integrity=ZERO_DIGEST)))
