"""A transport session from the outside, from the formulas of Part 3 chapter 24.

It shares no code with the engine or with `tpm12.client_transport`: what it accepts, another
implementation accepts too. A `Witness` on its `exchange` speaks through the session.
"""

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from tests.tpm12.makers import mgf1
from tests.tpm12.witness import (
    COMMAND,
    ZERO,
    Answer,
    frame,
    hmac1,
    number,
    sha1,
    sized,
    u8,
    u16,
    u32,
    xor,
)

ESTABLISH, EXECUTE, RELEASE = 0xE6, 0xE7, 0xE8
KH_TRANSPORT = 0x40000003
ENCRYPT, LOG, EXCLUSIVE = 1, 2, 4
MGF1, AES = 7, 6
NONE, CTR, OFB = 1, 4, 5
SECRET = sha1(b"transport secret")

# Bytes that are neither hashed nor encrypted: (in a request, in a response), where not none.
HANDLES = {
    0x0A: (0, 24), 0x0B: (26, 44), 0x0C: (4, 0), 0x0E: (4, 0), 0x0F: (8, 0), 0x11: (30, 44),
    0x13: (4, 0), 0x16: (4, 0), 0x17: (4, 0), 0x18: (4, 0), 0x1B: (4, 0), 0x1E: (4, 0),
    0x1F: (4, 0), 0x20: (4, 0), 0x21: (4, 0), 0x22: (4, 0), 0x23: (4, 0), 0x24: (4, 0),
    0x25: (4, 0), 0x28: (4, 0), 0x29: (4, 0), 0x2A: (4, 0), 0x31: (4, 0), 0x32: (8, 0),
    0x33: (8, 0), 0x3C: (4, 0), 0x3D: (4, 0), 0x3E: (4, 0), 0x41: (4, 4), 0x7A: (4, 0),
    0x86: (4, 0), 0x96: (4, 0), 0xB4: (4, 0), 0xB5: (0, 4), 0xB6: (4, 0), 0xB7: (0, 4),
    0xB8: (4, 0), 0xB9: (4, 4), 0xBA: (4, 0), 0xD4: (4, 0), 0xE6: (4, 4), 0xE8: (4, 0),
    0xF2: (4, 0),
}  # fmt: skip


def aes(session_key, mode, data):
    return Cipher(algorithms.AES(session_key[:16]), mode).encryptor().update(data)


def ofb(session_key, iv, data):
    block, stream = iv, b""
    while len(stream) < len(data):
        block = aes(session_key, modes.ECB(), block)
        stream += block
    return xor(data, stream[: len(data)])


def public(attributes=0, algorithm=0, scheme=0):
    """TRANSPORT_PUBLIC."""
    return u16(0x1E) + u32(attributes) + u32(algorithm) + u16(scheme)


class Transport:
    """One session.

    Attributes:
        tpm: The witness that it goes through.
        digest: What the log should be by now.
        moduli: Public parts by key handle, for the log.
        outer: The last answer of TPM_ExecuteTransport.
    """

    def __init__(self, tpm, attributes=0, algorithm=0, scheme=0, secret=SECRET):
        self.tpm, self.attributes = tpm, attributes
        self.algorithm, self.scheme, self.secret = algorithm, scheme, secret
        self.public = public(attributes, algorithm, scheme)
        self.digest, self.moduli, self.outer = ZERO, {}, None
        self.handle = self.even = None
        self.continues = True
        self.sent = None

    # -- opening -----------------------------------------------------------------------------

    def open(self, locality=None):
        """With the secret in clear."""
        return self._opened(
            self.tpm.send(
                ESTABLISH,
                u32(KH_TRANSPORT) + self.public + sized(self.secret),
                locality=locality,
            ),
            self.secret,
        )

    def open_under(self, key, encrypted, *sessions):
        """With the secret encrypted to a key."""
        params = self.public + sized(encrypted)
        answer = self.tpm.auth(ESTABLISH, params, *sessions, handles=u32(key), out_handles=4)
        return self._opened(answer, encrypted)

    def _opened(self, answer, sent_secret):
        body = answer.ok()
        assert len(body) == 60
        self.handle, locality, ticks = number(body[:4]), body[4:8], body[8:40]
        self.even = body[40:]
        if self.attributes & LOG:
            parameters = sha1(u32(ESTABLISH), self.public, sized(sent_secret))
            self.digest = sha1(self.digest, u16(0x10), parameters, ZERO)
            parameters = sha1(u32(0), u32(ESTABLISH), locality, ticks, self.even)
            self.digest = sha1(self.digest, u16(0x11), ticks, parameters, locality)
        self.tick_nonce = ticks[12:]
        return self

    # -- commands ----------------------------------------------------------------------------

    def exchange(self, request, locality=None):
        """Send a request through the session and give its response."""
        outer = self.execute(request, locality)
        return self.unwrap(request, outer.ok())

    def crypt(self, direction, odd, data):
        if not self.attributes & ENCRYPT or not data:
            return data
        seed = self.even + odd + direction
        if self.algorithm == MGF1:
            return xor(data, mgf1(seed + self.secret, len(data)))
        iv = mgf1(seed, 16)
        if self.scheme == OFB:
            return ofb(self.secret, iv, data)
        return aes(self.secret, modes.CTR(iv), data)

    def execute(self, request, locality=None, *, bad_hmac=False, hide=True):
        """Send TPM_ExecuteTransport, whatever comes of it."""
        ordinal, odd = number(request[6:10]), self.tpm.nonce()
        tag, start = number(request[:2]), 10 + HANDLES.get(ordinal, (0, 0))[0]
        end = max(start, len(request) - 45 * {0xC2: 1, 0xC3: 2}.get(tag, 0))
        h1 = sha1(request[6:10], request[start:end])
        hidden = self.crypt(b"in", odd, request[start:end]) if hide else request[start:end]
        wrapped = request[:start] + hidden + request[end:]
        digest = sha1(u32(EXECUTE), u32(len(request)), h1)
        mac = hmac1(self.secret, digest, self.even, odd, u8(self.continues))
        if bad_hmac:
            mac = xor(mac, b"\1" + bytes(19))
        block = u32(self.handle) + odd + u8(self.continues) + mac
        self.sent = (odd, h1, self._pub_key_hash(request, ordinal, start))
        self.outer = self.tpm.raw(frame(EXECUTE, sized(wrapped) + block, 0xC2), locality)
        return self.outer

    def _pub_key_hash(self, request, ordinal, start):
        named = [number(request[at : at + 4]) for at in range(10, start, 4)]
        if ordinal == 0x81:
            named = [number(request[10:14])]
        elif ordinal in (0xB8, 0xBA):
            named = named if number(request[14:18]) == 1 else []
        elif ordinal in (0x0B, 0x29, 0x31, 0x96, 0xB6, 0xB9):
            named = []
        elif ordinal == 0x11:
            named = [number(request[12:16])] if request[11:12] == b"\x09" else []
        if not named:
            return ZERO
        return sha1(*[sha1(sized(self.moduli.get(handle, b"unknown"))) for handle in named])

    def unwrap(self, request, body):
        """Check the answer of TPM_ExecuteTransport; give the wrapped response in clear."""
        odd, h1, pub_key_hash = self.sent
        ordinal = number(request[6:10])
        ticks, locality, size = body[:8], body[8:12], number(body[12:16])
        response, tail = body[16 : 16 + size], body[16 + size :]
        self.even, continues, mac = tail[:20], tail[20:21], tail[21:]
        assert len(mac) == 20
        start = end = 10
        if response[6:10] == bytes(4):
            start += HANDLES.get(ordinal, (0, 0))[1]
            end = len(response) - 41 * (number(response[:2]) - 0xC4)
        clear = self.crypt(b"out", odd, response[start:end])
        h2 = sha1(response[6:10], u32(ordinal), clear)
        digest = sha1(u32(0), u32(EXECUTE), body[:16], h2)
        assert mac == hmac1(self.secret, digest, self.even, odd, continues)
        self.continues = continues == b"\1"
        if self.attributes & LOG:
            current = u16(0x14) + ticks + u16(1) + self.tick_nonce
            self.digest = sha1(self.digest, u16(0x10), h1, pub_key_hash)
            self.digest = sha1(self.digest, u16(0x11), current, h2, locality)
        return response[:start] + clear + response[end:]

    def send(self, ordinal, body=b"", tag=COMMAND):
        """A wrapped command without authorization."""
        response = self.exchange(frame(ordinal, body, tag))
        return Answer(number(response[6:10]), response[10:], response)

    # -- closing -----------------------------------------------------------------------------

    def release(self, key, *sessions, replay=ZERO, bad_hmac=False):
        """TPM_ReleaseTransportSigned."""
        transport = _AsSession(self, bad_hmac)
        return self.tpm.auth(RELEASE, replay, *sessions, transport, handles=u32(key))

    def signed_bytes(self, body, replay=ZERO):
        """What TPM_ReleaseTransportSigned signs, by its answer."""
        locality, ticks = body[:4], body[4:36]
        parameters = sha1(u32(RELEASE), replay)
        digest = sha1(self.digest, u16(0x11), ticks, parameters, locality)
        return u16(5) + b"TRAN" + replay + sized(digest)


class _AsSession:
    """The transport session as an authorization session of TPM_ReleaseTransportSigned."""

    def __init__(self, transport, bad_hmac):
        self.handle, self.even = transport.handle, transport.even
        self.key = sha1(b"wrong") if bad_hmac else transport.secret
        self.continues = True
