"""The other parties of direct anonymous attestation: an issuer, a host and a verifier.

Written from the scheme (Brickell, Camenisch, Chen: Direct Anonymous Attestation, 2004), not from
the engine: a signature that `verify` accepts proves a credential of `Issuer` over (f0, f1, v).
Everything a TPM does goes through a `Witness`.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tests.tpm12.witness import (
    EK,
    OWNER_AUTH,
    number,
    oaep,
    parse_pubkey,
    sha1,
    sized,
    u8,
    u16,
    u32,
)

JOIN, SIGN = 0x29, 0x31
OWNER_READ_INTERNAL_PUB = 0x81
_VECTORS = Path(__file__).parents[1] / "vectors"
_E_BASE = 1 << 367
"""The issuer's prime e lies a little above; only the difference is proven."""
_LOW = 1 << 1024


def wide(value):
    """A number as the commands take it: 256 bytes."""
    return value.to_bytes(256, "big")


class SigningKey:
    """An RSA key of the issuer's chain."""

    def __init__(self, p, q):
        d = pow(65537, -1, (p - 1) * (q - 1))
        public = rsa.RSAPublicNumbers(65537, p * q)
        numbers = rsa.RSAPrivateNumbers(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p), public)
        self._key = numbers.private_key()
        self.modulus = wide(p * q)

    def sign(self, data):
        return self._key.sign(data, padding.PKCS1v15(), hashes.SHA1())


class Issuer:
    """Who gives credentials: its key, its group of pseudonyms, the chain that vouches for it."""

    def __init__(self, seed=b"issuer"):
        self._random = random.Random(seed)
        pool = json.loads((_VECTORS / "primes.json").read_text())["2048"]
        primes = [(int(p, 16), int(q, 16)) for p, q in pool]
        group = json.loads((_VECTORS / "daa_group.json").read_text())
        self.q, self.gamma = int(group["q"], 16), int(group["gamma"], 16)
        self.e = int(group["e"], 16)
        p, q = primes[-1]
        self.n, self._order = p * q, (p - 1) * (q - 1)
        self.s = pow(self.draw(2040), 2, self.n)
        self.r0, self.r1, self.z = (pow(self.s, self.draw(2040), self.n) for _ in range(3))
        self.s1 = pow(self.s, _LOW, self.n)
        self.chain = [SigningKey(*pair) for pair in primes[-4:-1]]
        self.settings = self._settings()

    def draw(self, bits):
        return self._random.getrandbits(bits)

    @property
    def gamma_bytes(self):
        return self.gamma.to_bytes(204, "big")

    def _settings(self):
        """TPM_DAA_ISSUER."""
        numbers = [wide(x) for x in (self.r0, self.r1, self.s, self.s1, self.n)]
        digests = b"".join(sha1(x) for x in [*numbers, self.gamma_bytes])
        return u16(0x2F) + digests + self.q.to_bytes(26, "big")

    @property
    def digest_n0(self):
        return sha1(self.chain[0].modulus)

    def chain_steps(self):
        """Inputs of join stage 1: each key, signed by the one before."""
        yield self.chain[0].modulus, b""
        for above, key in zip(self.chain, self.chain[1:], strict=False):
            yield key.modulus, above.sign(key.modulus)

    def signed_settings(self):
        """Inputs of join stage 2."""
        return self.settings, self.chain[-1].sign(self.digest_n0 + self.settings)

    def base(self):
        """An element w of order q, as stages 13 and 6 take it."""
        return pow(self.draw(1600), (self.gamma - 1) // self.q, self.gamma)

    def issue(self, u):
        """Sign U: the pair (A, v''), with A^e * U * S^v'' = Z."""
        v = 1 << 2535 | self.draw(2534)
        root = pow(self.e, -1, self._order)
        return pow(self.z * pow(u * pow(self.s, v, self.n), -1, self.n), root, self.n), v


class Platform:
    """A host and its TPM in one DAA session.

    Args:
        tpm: A Witness.
        ordinal: JOIN or SIGN.
    """

    def __init__(self, tpm, ordinal):
        self.tpm = tpm
        self.ordinal = ordinal
        self.handle = 0
        self.next = 0

    def ask(self, stage, data0=b"", data1=b"", *, secret=OWNER_AUTH, handle=None):
        """One stage, whatever comes of it."""
        params = u8(stage) + sized(data0) + sized(data1)
        handles = u32(self.handle if handle is None else handle)
        return self.tpm.auth(self.ordinal, params, self.tpm.oiap(secret).ending(), handles=handles)

    def stage(self, data0=b"", data1=b"", *, again=False):
        """The next stage, which must succeed; its output."""
        out = self.ask(self.next, data0, data1).ok()
        assert number(out[:4]) == len(out) - 4
        if self.next == 0:
            self.handle = number(out[4:])
        self.next += not again
        return out[4:]

    def inputs(self, issuer, credential):
        """Stage and plain inputs of each command of a run; join stage 1 comes several times."""
        if self.ordinal == JOIN:
            return self._join_inputs(issuer)
        return self._sign_inputs(issuer, credential)

    def comes_again(self, stage, data0, issuer):
        """Is this a round of join stage 1 that is not the last?"""
        return self.ordinal == JOIN and stage == 1 and data0 != issuer.chain[-1].modulus

    def _join_inputs(self, issuer):
        n, gamma = wide(issuer.n), issuer.gamma_bytes
        bases = [wide(x) for x in (issuer.r0, issuer.r1, issuer.s, issuer.s1)]
        yield 0, u32(len(issuer.chain)), b""
        for data0, data1 in issuer.chain_steps():
            yield 1, data0, data1
        yield 2, *issuer.signed_settings()
        yield 3, u32(1), b""
        yield from ((4 + i, base, n) for i, base in enumerate(bases))
        yield 8, oaep(self.endorsement_modulus(), b"a nonce of NE bytes."), b""
        yield from ((9 + i, base, n) for i, base in enumerate(bases))
        yield 13, gamma, wide(issuer.base())
        yield 14, gamma, b""
        yield 15, gamma, b""
        yield 16, sha1(b"challenge"), b""
        yield from ((stage, b"", b"") for stage in range(17, 22))
        yield 22, bytes(128), b""
        yield 23, bytes(192), b""
        yield 24, b"", b""

    def _sign_inputs(self, issuer, credential):
        n, gamma = wide(issuer.n), issuer.gamma_bytes
        bases = [wide(x) for x in (issuer.r0, issuer.r1, issuer.s, issuer.s1)]
        yield 0, issuer.settings, b""
        yield 1, credential.own, b""
        yield from ((2 + i, base, n) for i, base in enumerate(bases))
        yield 6, gamma, wide(issuer.base())
        yield 7, gamma, b""
        yield 8, gamma, b""
        yield 9, sha1(b"challenge"), b""
        yield 10, b"\1", sha1(b"message")
        yield 11, b"", b""
        yield 12, b"", b""
        yield 13, credential.v0, b""
        yield 14, credential.v0, b""
        yield 15, credential.v1, b""

    def endorsement_modulus(self):
        out = self.tpm.auth(
            OWNER_READ_INTERNAL_PUB, u32(EK), self.tpm.oiap(OWNER_AUTH).ending()
        ).ok()
        return parse_pubkey(out)[1]


@dataclass
class Credential:
    """What a platform has after a join: the issuer's signature, and the TPM's blobs."""

    a: int
    e: int
    own: bytes
    v0: bytes
    v1: bytes


def join(tpm, issuer, count=1):
    """A whole TPM_DAA_Join, in which the issuer checks what the TPM proves."""
    n, gamma = wide(issuer.n), issuer.gamma_bytes
    bases = [wide(x) for x in (issuer.r0, issuer.r1, issuer.s, issuer.s1)]
    session = Platform(tpm, JOIN)
    session.stage(u32(len(issuer.chain)))
    for modulus, signature in issuer.chain_steps():
        last = modulus == issuer.chain[-1].modulus
        assert session.stage(modulus, signature, again=not last) == b""
    assert session.stage(*issuer.signed_settings()) == b""
    assert session.stage(u32(count)) == b""
    u = [session.stage(base, n) for base in bases][-1]
    ne = issuer.draw(160).to_bytes(20, "big")
    shown = session.stage(oaep(session.endorsement_modulus(), ne))
    assert shown == sha1(sha1(u, u32(count), issuer.digest_n0), ne)
    commitment = number([session.stage(base, n) for base in bases][-1])
    w = issuer.base()
    session.stage(gamma, wide(w))
    pseudonym, pseudonym_commitment = number(session.stage(gamma)), number(session.stage(gamma))
    asked = sha1(b"join", u, issuer.settings)
    nt = session.stage(asked)
    s0, s1, s2 = (session.stage() for _ in range(3))
    c = session.stage()
    s3 = session.stage()
    assert c == sha1(asked, nt)
    assert len(s2) == 128
    c, s0, s1, s2, s3 = map(number, (c, s0, s1, s2, s3))
    u = number(u)
    answer = _product(issuer, s0, s1, s2 + s3 * _LOW)
    assert commitment == answer * pow(u, -c, issuer.n) % issuer.n
    assert pseudonym_commitment == _pseudonym_commitment(issuer, (w, pseudonym), c, s0, s1)
    a, v = issuer.issue(u)
    v0 = session.stage((v % _LOW).to_bytes(128, "big"))
    v1 = session.stage((v // _LOW).to_bytes(192, "big"))
    return Credential(a, issuer.e, session.stage(), v0, v1)


@dataclass
class Signature:
    """What a verifier gets."""

    t: int
    w: int
    pseudonym: int
    nt: bytes
    c: int
    s0: int
    s1: int
    sv: int
    se: int


def sign(tpm, issuer, credential, selector, selected, *, message=None):
    """A whole TPM_DAA_Sign, in which the host blinds the credential.

    Args:
        selector: b"\1" for a digest, b"\0" for the handle of an identity key.
        selected: The digest or handle.
        message: What goes into the challenge; `selected`, if not given.
    """
    n, gamma = wide(issuer.n), issuer.gamma_bytes
    bases = [wide(x) for x in (issuer.r0, issuer.r1, issuer.s, issuer.s1)]
    session = Platform(tpm, SIGN)
    session.stage(issuer.settings)
    assert session.stage(credential.own) == b""
    commitment = number([session.stage(base, n) for base in bases][-1])
    w = issuer.base()
    session.stage(gamma, wide(w))
    pseudonym, pseudonym_commitment = number(session.stage(gamma)), number(session.stage(gamma))
    blinding, re = issuer.draw(2000), issuer.draw(360)
    t = credential.a * pow(issuer.s, blinding, issuer.n) % issuer.n
    commitment = commitment * pow(t, re, issuer.n) % issuer.n
    asked = _host_challenge(issuer, t, w, pseudonym, commitment, pseudonym_commitment)
    nt = session.stage(asked)
    challenge = session.stage(selector, selected)
    expected = selected if message is None else message
    assert challenge == sha1(sha1(asked, nt), selector, expected)
    s0, s1 = number(session.stage()), number(session.stage())
    s2 = number(session.stage(credential.v0))
    assert session.stage(credential.v0) == b""
    s3 = number(session.stage(credential.v1))
    c = number(challenge)
    sv = s2 + s3 * _LOW - c * credential.e * blinding
    return Signature(t, w, pseudonym, nt, c, s0, s1, sv, re + c * (credential.e - _E_BASE))


def verify(issuer, signature, selector, message):
    """Check a signature with nothing but the issuer's public numbers."""
    n, c = issuer.n, signature.c
    commitment = (
        pow(issuer.z, -c, n)
        * pow(signature.t, signature.se + c * _E_BASE, n)
        * _product(issuer, signature.s0, signature.s1, signature.sv)
        % n
    )
    pseudonym_commitment = _pseudonym_commitment(
        issuer, (signature.w, signature.pseudonym), c, signature.s0, signature.s1
    )
    asked = _host_challenge(
        issuer, signature.t, signature.w, signature.pseudonym, commitment, pseudonym_commitment
    )
    return c == number(sha1(sha1(asked, signature.nt), selector, message))


def _product(issuer, s0, s1, sv):
    n = issuer.n
    return pow(issuer.r0, s0, n) * pow(issuer.r1, s1, n) * pow(issuer.s, sv, n) % n


def _pseudonym_commitment(issuer, known_as, c, s0, s1):
    gamma, (w, pseudonym) = issuer.gamma, known_as
    return pow(w, (s0 + (s1 << 104)) % issuer.q, gamma) * pow(pseudonym, -c, gamma) % gamma


def _host_challenge(issuer, *numbers):
    return sha1(issuer.settings, *(wide(x) for x in numbers))
