"""The stages of TPM_DAA_Join and TPM_DAA_Sign, one function each; the two share many.

A `Stage` takes the session and two inputs, and gives the session after it and an output. It raises
TpmError: DAA_INPUT_DATA0 or DAA_INPUT_DATA1 for inputs of another size or other numbers than the
issuer's, and what its docstring adds.

Leaves to others: the order of stages and what is checked before each (`commands/daa.py`), secrets
and blobs (`daa.py`, whose names are used here).

Source: TPM Main r116 Part 3 §26.1, §26.2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from protocol.constants import DIGEST_BYTES, ZERO_DIGEST, KeyUsage, ResourceType
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import DaaIssuer, DaaTpm
from protocol.wire import decode, encode
from tpm12 import daa
from tpm12.authorization import check_key_use
from tpm12.crypto import DecryptionError, RsaPublicKey, is_same, sha1
from tpm12.state import DaaSession
from tpm12.tpm import Tpm

_ZERO: Final = b"\0"
_ONE: Final = b"\1"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What came with one stage."""

    data0: bytes
    data1: bytes


Result = tuple[DaaSession, bytes]
"""The session afterwards, whose `stage` the caller counts on, and the output."""
Stage = Callable[[Tpm, DaaSession, Inputs], Result]


# -- join: the issuer's chain of keys, stages 1 to 3 -----------------------------------------------


def load_chain(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the next key of the chain that ends with the key that signs the issuer's settings.

    The first is only named (and f hangs on it), each other is signed by the one before. DAA_count
    counts them down; the stage comes again until it is 0.

    Raises:
        TpmError: DAA_INPUT_DATA0, DAA_INPUT_DATA1 for sizes; DAA_ISSUER_VALIDITY for a signature.
    """
    modulus, own = inputs.data0, session.tpm_specific
    daa.require_size(modulus, daa.MODULUS_BYTES)
    if not session.scratch:
        digest_n0 = sha1(modulus)
        rekey = sha1(tpm.permanent.tpm_daa_seed, digest_n0)
        session = replace(session, digest_n0=digest_n0)
    else:
        _check_signed(session, modulus, inputs.data1)
        rekey = own.daa_rekey
    own = replace(own, daa_rekey=rekey, daa_count=own.daa_count - 1)
    return replace(session, tpm_specific=own, scratch=modulus), b""


def load_issuer(_tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the issuer's settings, which the last key of the chain signed.

    Raises:
        TpmError: DAA_INPUT_DATA0, DAA_INPUT_DATA1 for sizes; DAA_ISSUER_VALIDITY for a signature.
    """
    settings = daa.issuer_settings(inputs.data0)
    _check_signed(session, session.digest_n0 + inputs.data0, inputs.data1)
    own = replace(session.tpm_specific, daa_digest_issuer=sha1(inputs.data0))
    return replace(session, issuer_settings=settings, tpm_specific=own, scratch=b""), b""


def _check_signed(session: DaaSession, signed: bytes, signature: bytes) -> None:
    daa.require_size(signature, daa.MODULUS_BYTES, ReturnCode.DAA_INPUT_DATA1)
    if not RsaPublicKey(session.scratch).is_signature(signature, sha1(signed)):
        raise TpmError(ReturnCode.DAA_ISSUER_VALIDITY)


def draw_u(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the number of this credential, and draw the TPM's share of v."""
    own = replace(session.tpm_specific, daa_count=daa.count(inputs.data0))
    u0, u1 = tpm.random(daa.U0_BYTES), tpm.random(daa.U1_BYTES)
    return replace(session, tpm_specific=own, join_u0=u0, join_u1=u1), b""


# -- powers modulo n -------------------------------------------------------------------------------

_BASES: Final[dict[str, Callable[[DaaIssuer], bytes]]] = {
    "R0": lambda issuer: issuer.daa_digest_r0,
    "R1": lambda issuer: issuer.daa_digest_r1,
    "S0": lambda issuer: issuer.daa_digest_s0,
    "S1": lambda issuer: issuer.daa_digest_s1,
}


def power(base: str, exponent: Callable[[DaaSession], int], *, starts: bool = False) -> Stage:
    """A stage that multiplies the scratch by a power of one of the issuer's bases, modulo n.

    Args:
        base: R0, R1, S0 or S1; comes as inputData0, n as inputData1.
        exponent: Gives the power.
        starts: Begin with 1 instead of the scratch.

    The stage raises TpmError: DAA_INPUT_DATA0, DAA_INPUT_DATA1 for other numbers than the issuer's.
    """

    def step(_tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
        issuer = session.issuer_settings
        x = daa.checked(inputs.data0, _BASES[base](issuer), ReturnCode.DAA_INPUT_DATA0)
        n = daa.modulus(inputs.data1, issuer.daa_digest_n, ReturnCode.DAA_INPUT_DATA1)
        z = 1 if starts else daa.integer(session.scratch)
        product = z * pow(x, exponent(session), n) % n
        return replace(session, scratch=product.to_bytes(daa.MODULUS_BYTES, "big")), b""

    return step


def then_output(step: Stage) -> Stage:
    """A stage whose scratch is its output, and then empty."""

    def stage(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
        session, _ = step(tpm, session, inputs)
        return replace(session, scratch=b""), session.scratch

    return stage


r0_to_f0: Final = power("R0", daa.f0, starts=True)
r1_to_f1: Final = power("R1", daa.f1)
s0_to_u0: Final = power("S0", lambda session: daa.integer(session.join_u0))
r1_to_r1: Final = power("R1", lambda session: daa.r(session, 1))
s0_to_r2: Final = power("S0", lambda session: daa.r(session, 2))
s1_to_r3: Final = then_output(power("S1", lambda session: daa.r(session, 3)))
s1_to_r4: Final = then_output(power("S1", lambda session: daa.r(session, 4)))
_r0_to_r0: Final = power("R0", lambda session: daa.r(session, 0), starts=True)
_s1_to_u1: Final = power("S1", lambda session: daa.integer(session.join_u1))


def r0_to_r0(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Begin a proof: draw the seed of its random numbers."""
    return _r0_to_r0(tpm, replace(session, context_seed=tpm.random(DIGEST_BYTES)), inputs)


def finish_u(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Give U = R0^f0 * R1^f1 * S0^u0 * S1^u1, which the issuer will sign."""
    session, _ = _s1_to_u1(tpm, session, inputs)
    counted = session.tpm_specific.daa_count.to_bytes(daa.COUNT_BYTES, "big")
    digest = sha1(session.scratch, counted, session.digest_n0)
    return replace(session, digest=digest, scratch=b""), session.scratch


def prove_endorsement(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Show the issuer that U comes from the TPM with this endorsement key.

    Raises:
        TpmError: DAA_INPUT_DATA0 for the size; NO_ENDORSEMENT; DECRYPT_ERROR.
    """
    daa.require_size(inputs.data0, daa.MODULUS_BYTES)
    endorsement_key = tpm.permanent.endorsement_key
    if endorsement_key is None:
        raise TpmError(ReturnCode.NO_ENDORSEMENT)
    try:
        ne = endorsement_key.rsa.decrypt_oaep(inputs.data0)
    except DecryptionError as error:
        raise TpmError(ReturnCode.DECRYPT_ERROR) from error
    return replace(session, digest=ZERO_DIGEST), sha1(session.digest, ne)


# -- pseudonyms: powers of w modulo gamma ----------------------------------------------------------


def _gamma(session: DaaSession, inputs: Inputs) -> int:
    digest = session.issuer_settings.daa_digest_gamma
    return daa.modulus(inputs.data0, digest, ReturnCode.DAA_INPUT_DATA0)


def load_w(_tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the base of a pseudonym, if it is of the issuer's group.

    Raises:
        TpmError: DAA_INPUT_DATA0, DAA_INPUT_DATA1; DAA_WRONG_W.
    """
    gamma = _gamma(session, inputs)
    daa.require_size(inputs.data1, daa.MODULUS_BYTES, ReturnCode.DAA_INPUT_DATA1)
    if pow(daa.integer(inputs.data1), daa.q(session), gamma) != 1:
        raise TpmError(ReturnCode.DAA_WRONG_W)
    return replace(session, scratch=inputs.data1), b""


def w_to_f(_tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Give the pseudonym E = w^f."""
    gamma = _gamma(session, inputs)
    return session, daa.minimal(pow(daa.integer(session.scratch), daa.f(session), gamma))


def w_to_r(_tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Give E1 = w^r, the proof's part about the pseudonym."""
    gamma = _gamma(session, inputs)
    r = (daa.r(session, 0) + (daa.r(session, 1) << daa.POWER0_BITS)) % daa.q(session)
    e1 = daa.minimal(pow(daa.integer(session.scratch), r, gamma))
    return replace(session, scratch=b""), e1


# -- the answer to the challenge -------------------------------------------------------------------


def take_challenge(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the host's part of the challenge, and give the TPM's."""
    daa.require_size(inputs.data0, DIGEST_BYTES)
    nt = tpm.random(daa.NT_BYTES)
    return replace(session, digest=sha1(inputs.data0, nt)), nt


def answer_f0(_tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Give s0 = r0 + c * f0."""
    return session, daa.minimal(daa.r(session, 0) + daa.c(session) * daa.f0(session))


def answer_f1(_tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Give s1 = r1 + c * f1."""
    return session, daa.minimal(daa.r(session, 1) + daa.c(session) * daa.f1(session))


def answer_u0(_tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Give the lower part of r2 + c * u0, in full length."""
    s2, _ = _split(daa.r(session, 2) + daa.c(session) * daa.integer(session.join_u0))
    return session, s2.to_bytes(daa.POWER1_BITS // 8, "big")


def carry_u0(_tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Keep the upper part of r2 + c * u0, and give the challenge."""
    _, carry = _split(daa.r(session, 2) + daa.c(session) * daa.integer(session.join_u0))
    return _carrying(session, carry), session.digest


def answer_u1(_tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Give s3 = r3 + c * u1 + carry."""
    s3 = (
        daa.r(session, 3)
        + daa.c(session) * daa.integer(session.join_u1)
        + daa.integer(session.scratch)
    )
    return replace(session, scratch=b""), daa.minimal(s3)


def _split(number: int) -> tuple[int, int]:
    """The lower POWER1_BITS, and the rest."""
    return number % (1 << daa.POWER1_BITS), number >> daa.POWER1_BITS


def _carrying(session: DaaSession, carry: int) -> DaaSession:
    return replace(session, scratch=carry.to_bytes(daa.MODULUS_BYTES, "big"))


# -- join: the credential, stages 22 to 24 ---------------------------------------------------------


def make_v0(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Add the issuer's u2 to the lower part of v, and give that out in a blob."""
    daa.require_size(inputs.data0, daa.V0_BYTES)
    low, carry = _split(daa.integer(inputs.data0) + daa.integer(session.join_u0))
    v0 = low.to_bytes(daa.V0_BYTES, "big")
    own = replace(session.tpm_specific, daa_digest_v0=sha1(v0))
    session = _carrying(replace(session, tpm_specific=own), carry)
    return session, daa.closed(tpm, ResourceType.DAA_V0, v0)


def make_v1(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Add the issuer's u3 to the upper part of v, and give that out in a blob.

    Raises:
        TpmError: DAA_INPUT_DATA0 for the size, and for a number that is too large to add to.
    """
    daa.require_size(inputs.data0, daa.V1_BYTES)
    total = daa.integer(inputs.data0) + daa.integer(session.join_u1) + daa.integer(session.scratch)
    if total >> (8 * daa.V1_BYTES):
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "v1 has more than 192 bytes")
    v1 = total.to_bytes(daa.V1_BYTES, "big")
    own = replace(session.tpm_specific, daa_digest_v1=sha1(v1))
    session = replace(session, tpm_specific=own, scratch=b"")
    return session, daa.closed(tpm, ResourceType.DAA_V1, v1)


def make_credential(tpm: Tpm, session: DaaSession, _inputs: Inputs) -> Result:
    """Give the TPM's part of the credential out in a blob."""
    return session, daa.closed(tpm, ResourceType.DAA_TPM, encode(session.tpm_specific))


# -- sign: what it does its own way ----------------------------------------------------------------


def load_credential(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Take the TPM's part of the credential back, if it is of the issuer that was named.

    Raises:
        TpmError: DAA_INPUT_DATA0; DAA_ISSUER_SETTINGS.
    """
    own = decode(DaaTpm, daa.opened(tpm, ResourceType.DAA_TPM, inputs.data0))
    session = replace(session, tpm_specific=own)
    daa.check_issuer(session)
    return session, b""


def bind_message(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Put what is signed into the challenge: a digest, or the modulus of one of this TPM's AIKs.

    Raises:
        TpmError: DAA_INPUT_DATA0 for the selector, DAA_INPUT_DATA1 for what it selects.
    """
    selector, selected = inputs.data0, inputs.data1
    if selector == _ONE:
        daa.require_size(selected, DIGEST_BYTES, ReturnCode.DAA_INPUT_DATA1)
        message = selected
    elif selector == _ZERO:
        daa.require_size(selected, daa.COUNT_BYTES, ReturnCode.DAA_INPUT_DATA1)
        message = _identity_modulus(tpm, daa.integer(selected))
    else:
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "selector is neither 0 nor 1")
    digest = sha1(session.digest, selector, message)
    return replace(session, digest=digest), digest


def _identity_modulus(tpm: Tpm, handle: int) -> bytes:
    try:
        key = tpm.key(handle)
        check_key_use(tpm, key, reads_only=True)
    except TpmError as error:
        raise TpmError(ReturnCode.DAA_INPUT_DATA1, "no key that may be read") from error
    if key.usage != KeyUsage.IDENTITY:
        raise TpmError(ReturnCode.DAA_INPUT_DATA1, "no identity key")
    return key.public.pub_key


def answer_v0(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Give s2, the lower part of r2 + c * v0."""
    s2, _ = _split(daa.r(session, 2) + daa.c(session) * _v0(tpm, session, inputs))
    return session, daa.minimal(s2)


def carry_v0(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Keep the upper part of r2 + c * v0."""
    _, carry = _split(daa.r(session, 2) + daa.c(session) * _v0(tpm, session, inputs))
    return _carrying(session, carry), b""


def answer_v1(tpm: Tpm, session: DaaSession, inputs: Inputs) -> Result:
    """Give s3 = r4 + c * v1 + carry."""
    v1 = _own(tpm, ResourceType.DAA_V1, inputs, session.tpm_specific.daa_digest_v1)
    s3 = daa.r(session, 4) + daa.c(session) * v1 + daa.integer(session.scratch)
    return replace(session, scratch=b""), daa.minimal(s3)


def _v0(tpm: Tpm, session: DaaSession, inputs: Inputs) -> int:
    return _own(tpm, ResourceType.DAA_V0, inputs, session.tpm_specific.daa_digest_v0)


def _own(tpm: Tpm, resource_type: ResourceType, inputs: Inputs, digest: bytes) -> int:
    """A part of v, if it is of the credential in use."""
    secret = daa.opened(tpm, resource_type, inputs.data0)
    if not is_same(sha1(secret), digest):
        raise TpmError(ReturnCode.DAA_INPUT_DATA0, "of another credential")
    return daa.integer(secret)
