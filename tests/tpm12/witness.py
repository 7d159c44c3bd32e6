"""A TPM 1.2 client of the tests' own, written from the formulas of the specification.

It shares no code with `tpm12.client` or with our declarations: what it accepts, another
implementation accepts too. It speaks to anything that takes a request and gives a response: an
engine in memory, or another TPM on a socket.
"""

import hashlib
import hmac
import struct
from dataclasses import dataclass

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

COMMAND, AUTH1, AUTH2 = 0xC1, 0xC2, 0xC3
SRK, OWNER, EK = 0x40000000, 0x40000001, 0x40000006
ZERO = bytes(20)
OAEP = padding.OAEP(mgf=padding.MGF1(hashes.SHA1()), algorithm=hashes.SHA1(), label=b"TCPA")


def sha1(*parts):
    return hashlib.sha1(b"".join(parts)).digest()


def hmac1(key, *parts):
    return hmac.digest(key, b"".join(parts), "sha1")


def xor(left, right):
    return bytes(a ^ b for a, b in zip(left, right, strict=True))


OWNER_AUTH = sha1(b"owner secret")
SRK_AUTH = sha1(b"srk secret")
"""Secrets of the owned TPM that `conftest.py` makes."""


def u8(value):
    return struct.pack(">B", value)


def u16(value):
    return struct.pack(">H", value)


def u32(value):
    return struct.pack(">I", value)


def sized(data):
    return u32(len(data)) + data


def number(data):
    return int.from_bytes(data, "big")


def frame(ordinal, body=b"", tag=COMMAND):
    """A whole request."""
    return struct.pack(">HII", tag, 10 + len(body), ordinal) + body


@dataclass
class Answer:
    """A response: its code, the parameters behind it without auth blocks, and all of its bytes."""

    code: int
    body: bytes
    raw: bytes

    def ok(self):
        assert self.code == 0, f"return code 0x{self.code:x}"
        return self.body


@dataclass
class Session:
    """An authorization session; `key` is the HMAC key, `shared` the OSAP secret (or None)."""

    handle: int
    even: bytes
    key: bytes
    shared: bytes | None = None
    continues: bool = True

    def ending(self):
        """The same session, asking to end with the next command."""
        self.continues = False
        return self

    def with_key(self, key):
        """A copy that proves itself with another secret."""
        return Session(self.handle, self.even, key, self.shared, self.continues)

    def masked(self, secret, nonce=None):
        """A new secret under XOR ADIP."""
        return xor(secret, sha1(self.shared, self.even if nonce is None else nonce))


class Witness:
    """Sends commands through `exchange(request, locality) -> response`."""

    def __init__(self, exchange):
        self.exchange = exchange
        self.locality = 0
        self._nonces = 0

    def nonce(self):
        """A nonceOdd; it need not be secret, only new."""
        self._nonces += 1
        return sha1(b"odd", u32(self._nonces))

    def raw(self, request, locality=None):
        """Send whole bytes; check that the response is well formed."""
        response = self.exchange(request, self.locality if locality is None else locality)
        tag, size, code = struct.unpack_from(">HII", response)
        assert size == len(response)
        assert tag in (0xC4, 0xC5, 0xC6)
        if code:
            assert response == struct.pack(">HII", 0xC4, 10, code)
        return Answer(code, response[10:], response)

    def send(self, ordinal, body=b"", *, tag=COMMAND, locality=None):
        """Send one command without authorization."""
        return self.raw(frame(ordinal, body, tag), locality)

    def oiap(self, secret=ZERO):
        out = self.send(0x0A).ok()
        return Session(number(out[:4]), out[4:24], secret)

    def osap(self, entity_type, entity_value, secret=ZERO):
        odd = self.nonce()
        out = self.send(0x0B, u16(entity_type) + u32(entity_value) + odd).ok()
        shared = hmac1(secret, out[24:44], odd)
        return Session(number(out[:4]), out[4:24], shared, shared)

    def auth(self, ordinal, params, *sessions, handles=b"", out_handles=0, locality=None, odd=None):
        """Send one command with sessions; check the response's HMACs and roll the nonces.

        Args:
            params: Parameters as they go into inParamDigest.
            handles: What goes before them and is not hashed.
            out_handles: Bytes of handles in the response, not hashed either.
            odd: nonceOdd values, where a secret was masked with one.
        """
        odd = odd or [self.nonce() for _ in sessions]
        in_digest = sha1(u32(ordinal), params)
        blocks = b""
        for session, nonce_odd in zip(sessions, odd, strict=True):
            continues = u8(session.continues)
            mac = hmac1(session.key, in_digest, session.even, nonce_odd, continues)
            blocks += u32(session.handle) + nonce_odd + continues + mac
        tag = COMMAND + len(sessions)
        answer = self.raw(frame(ordinal, handles + params + blocks, tag), locality)
        if answer.code:
            return answer
        count = len(sessions)
        assert number(answer.raw[:2]) == 0xC4 + count
        at = len(answer.body) - 41 * count
        body, tail = answer.body[:at], answer.body[at:]
        out_digest = sha1(u32(0), u32(ordinal), body[out_handles:])
        for i, (session, nonce_odd) in enumerate(zip(sessions, odd, strict=True)):
            even, continues, mac = struct.unpack_from(">20s1s20s", tail, 41 * i)
            assert even != session.even, "the even nonce was not rolled"
            assert mac == hmac1(session.key, out_digest, even, nonce_odd, continues)
            session.even, session.continues = even, bool(continues[0])
        return Answer(0, body, answer.raw)

    # -- what many tests need ----------------------------------------------------------------

    def flags(self):
        """The permanent flags by number, 1 to 20."""
        out = self.capability(4, u32(0x108))
        return dict(enumerate(out[2:], start=1))

    def capability(self, area, sub_cap=b""):
        out = self.send(0x65, u32(area) + sized(sub_cap)).ok()
        assert number(out[:4]) == len(out) - 4
        return out[4:]

    def assert_presence(self):
        """Physical presence by command."""
        self.send(0x4000000A, u16(0x20)).ok()
        self.send(0x4000000A, u16(0x08)).ok()


# -- structures ------------------------------------------------------------------------------------


def rsa_parms(bits=2048, enc=3, sig=1, exponent=b"", primes=2, algorithm=1):  # noqa: PLR0917 - the fields, in order
    """KEY_PARMS of an RSA key."""
    inner = u32(bits) + u32(primes) + sized(exponent)
    return u32(algorithm) + u16(enc) + u16(sig) + sized(inner)


def key_template(usage, *, key12=False, flags=0, auth_data_usage=1, pcr_info=b"", parms=None):
    """KEY or KEY12 without public and private part."""
    head = b"\x00\x28\x00\x00" if key12 else b"\x01\x01\x00\x00"
    head += u16(usage) + u32(flags) + u8(auth_data_usage)
    return head + (parms or rsa_parms()) + sized(pcr_info) + sized(b"") + sized(b"")


@dataclass
class ParsedKey:
    """The parts of a KEY or KEY12."""

    head: bytes
    parms: bytes
    pcr_info: bytes
    modulus: bytes
    enc_data: bytes
    rest: bytes

    @property
    def pubkey(self):
        return self.parms + sized(self.modulus)

    @property
    def digest(self):
        """pubDataDigest."""
        return sha1(self.head, self.parms, sized(self.pcr_info), sized(self.modulus))


def parse_parms(data):
    """Split KEY_PARMS off the front."""
    end = 12 + number(data[8:12])
    return data[:end], data[end:]


def parse_sized(data):
    end = 4 + number(data[:4])
    assert end <= len(data)
    return data[4:end], data[end:]


def parse_pubkey(data):
    """Split PUBKEY off the front: (parms, modulus, rest)."""
    parms, rest = parse_parms(data)
    modulus, rest = parse_sized(rest)
    return parms, modulus, rest


def parse_key(data):
    head, rest = data[:11], data[11:]
    parms, rest = parse_parms(rest)
    pcr_info, rest = parse_sized(rest)
    modulus, rest = parse_sized(rest)
    enc_data, rest = parse_sized(rest)
    return ParsedKey(head, parms, pcr_info, modulus, enc_data, rest)


def public_key(modulus, exponent=65537):
    return rsa.RSAPublicNumbers(exponent, number(modulus)).public_key()


def oaep(modulus, data):
    """Encrypt as a client does, with the TPM's OAEP label."""
    return public_key(modulus).encrypt(data, OAEP)


def is_signature(modulus, signature, message):
    """Check RSASSA-PKCS1-v1_5 with SHA-1 over a message, by hand."""
    size = len(modulus)
    block = pow(number(signature), 65537, number(modulus)).to_bytes(size, "big")
    info = bytes.fromhex("3021300906052b0e03021a05000414") + sha1(message)
    return block == b"\0\1" + b"\xff" * (size - len(info) - 3) + b"\0" + info


def selection(*indices, size=3):
    """PCR_SELECTION."""
    select = bytearray(size)
    for i in indices:
        select[i // 8] |= 1 << i % 8
    return u16(size) + bytes(select)
