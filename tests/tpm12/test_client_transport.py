"""The typed client's end of a transport session."""

import pytest

from protocol.constants import KeyUsage, Ordinal, ResourceType, SigScheme, TransportAttribute
from protocol.return_codes import ReturnCode, TpmError
from protocol.wire import encode
from tests.tpm12.conftest import CountingRng
from tests.tpm12.witness import OWNER_AUTH, SRK_AUTH, is_signature, sha1
from tpm12.client import SRK, TpmClient
from tpm12.client_core import BadResponseError
from tpm12.client_transport import (
    AES128_CTR,
    AES128_OFB,
    MGF1,
    ClientTransport,
    TransportKey,
)

ENCRYPT, LOG = TransportAttribute.ENCRYPT, TransportAttribute.LOG
EXCLUSIVE = TransportAttribute.EXCLUSIVE
KEY_AUTH, REPLAY = sha1(b"key secret"), sha1(b"replay")


class Wire:
    """What goes over the wire, and what a hand on it does."""

    def __init__(self, bench):
        self.bench, self.requests, self.meddle = bench, [], None

    def __call__(self, request):
        self.requests.append(request)
        outcome = self.bench.engine.execute(request)
        self.bench.engine.keep(outcome)
        return self.meddle(outcome.response) if self.meddle else outcome.response


@pytest.fixture
def wire(owned):
    return Wire(owned)


@pytest.fixture
def rng():
    return CountingRng(b"client")


@pytest.fixture
def srk(owned):
    return TransportKey(handle=SRK, pubkey=owned.state.permanent.srk.pubkey(), auth=SRK_AUTH)


@pytest.fixture
def establish(wire, rng, srk):
    def with_(key=srk, **more):
        return ClientTransport.establish(wire, rng=rng, key=key, **more)

    return with_


def client(session, rng):
    return TpmClient(session.exchange, rng=rng)


@pytest.mark.parametrize("cipher", [MGF1, AES128_CTR, AES128_OFB])
def test_every_kind_of_command_works_inside(establish, rng, owned, cipher):
    session = establish(cipher=cipher)
    tpm = client(session, rng)
    assert tpm.pcr_values() == owned.state.stclear.pcrs
    blob = tpm.seal(b"data", auth=KEY_AUTH, key_auth=SRK_AUTH)
    assert tpm.unseal(blob, auth=KEY_AUTH, parent_auth=SRK_AUTH) == b"data"
    key = tpm.create_wrap_key(KeyUsage.SIGNING, bits=512, auth=KEY_AUTH, parent_auth=SRK_AUTH)
    handle = tpm.load_key2(key, parent_auth=SRK_AUTH)
    digest = sha1(b"m")
    assert is_signature(key.pub_key, tpm.sign(handle, digest, KEY_AUTH), b"m")
    tpm.flush_specific(handle, ResourceType.KEY)
    count_id, first = tpm.create_counter(b"abcd", auth=KEY_AUTH, owner_auth=OWNER_AUTH)
    assert tpm.increment_counter(count_id, KEY_AUTH).counter == first.counter + 1
    assert session.is_open


def test_secrets_do_not_show_on_the_wire(establish, rng, wire):
    tpm = client(establish(), rng)
    shown = []
    wire.meddle = lambda response: shown.append(response) or response
    random = tpm.get_random(64)
    tpm.extend(16, sha1(b"measured"))
    assert all(random not in response for response in shown)
    assert all(sha1(b"measured") not in request for request in wire.requests)


def test_session_without_encryption_may_send_its_secret_in_clear(establish, rng, wire):
    tpm = client(establish(None, attributes=0), rng)
    tpm.extend(16, sha1(b"measured"))
    assert sha1(b"measured") in wire.requests[-1]


def test_refusal_of_a_command_inside_is_its_own(establish, rng):
    session = establish()
    tpm = client(session, rng)
    with pytest.raises(TpmError) as caught:
        tpm.pcr_read(99)
    assert caught.value.code is ReturnCode.BADINDEX
    assert session.is_open
    tpm.pcr_read(0)


def test_refusal_of_the_session_is_an_error_and_ends_it(establish, rng, owned):
    session = establish()
    owned.change("stany", transport_sessions={})
    with pytest.raises(TpmError) as caught:
        client(session, rng).pcr_read(0)
    assert caught.value.code is ReturnCode.INVALID_AUTHHANDLE
    assert not session.is_open


def test_last_command_may_end_the_session(establish, wire, owned):
    session = establish()
    request = bytes.fromhex("00c10000000e0000001500000000")
    session.unwrap(wire(session.wrap(request, continues=False)))
    assert not session.is_open
    assert owned.state.stany.transport_sessions == {}


@pytest.mark.parametrize("attributes", [ENCRYPT, EXCLUSIVE])
def test_close_ends_the_session(establish, owned, attributes):
    session = establish(attributes=attributes)
    assert list(owned.state.stany.transport_sessions) == [session.handle]
    session.close()
    assert owned.state.stany.transport_sessions == {}
    session.close()


@pytest.mark.parametrize("attributes", [LOG, LOG | ENCRYPT, LOG | EXCLUSIVE])
def test_log_is_signed_and_is_what_went_through(establish, rng, wire, attributes):
    outside = TpmClient(wire, rng=rng)
    key = outside.create_wrap_key(
        KeyUsage.SIGNING,
        bits=512,
        sig_scheme=SigScheme.RSASSAPKCS1V15_INFO,
        auth=KEY_AUTH,
        parent_auth=SRK_AUTH,
    )
    handle = outside.load_key2(key, parent_auth=SRK_AUTH)
    session = establish(attributes=attributes)
    session.public_keys[handle] = key.pub_key
    tpm = client(session, rng)
    tpm.extend(16, sha1(b"measured"))
    tpm.seal(b"data", key_auth=SRK_AUTH)
    signed, signature = session.release_signed(handle, REPLAY, KEY_AUTH)
    assert is_signature(key.pub_key, signature, encode(signed))
    assert not session.is_open


def test_log_with_a_key_that_is_not_known_is_not_followed(establish, rng):
    session = establish(None, attributes=LOG)
    tpm = client(session, rng)
    assert session.trans_digest is not None
    key = tpm.create_wrap_key(KeyUsage.SIGNING, bits=512, auth=KEY_AUTH, parent_auth=SRK_AUTH)
    assert session.trans_digest is None
    handle = tpm.load_key2(key, parent_auth=SRK_AUTH)
    signed, signature = session.release_signed(handle, REPLAY, KEY_AUTH)
    assert signed is None
    assert signature


def flipped(at):
    def meddle(response):
        changed = bytearray(response)
        changed[at] ^= 1
        return bytes(changed)

    return meddle


@pytest.mark.parametrize("at", [10, 17, 18, 30, 40, -1, -21, -30])
def test_changed_answer_is_not_believed(establish, rng, wire, at):
    session = establish()
    wire.meddle = flipped(at)
    with pytest.raises(BadResponseError):
        client(session, rng).pcr_read(0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0\xc4\0\0\0\x0a\0\0\0",
        bytes.fromhex("00c40000000b00000000"),
        bytes.fromhex("00c40000000a00000000"),
        bytes.fromhex("00c50000000a00000000"),
        bytes.fromhex("00c50000003300000000") + bytes(41),
        bytes.fromhex("00c50000004700000000") + bytes(12) + b"\0\0\0\4" + bytes(45),
        bytes.fromhex("00c50000004d00000000") + bytes(12) + b"\0\0\0\x0a" + bytes(51),
    ],
)
def test_malformed_answer_is_not_believed(establish, rng, wire, answer):
    session = establish()
    wire.meddle = lambda _response: answer
    with pytest.raises(BadResponseError):
        client(session, rng).pcr_read(0)


def test_answer_to_nothing_is_our_mistake(establish):
    with pytest.raises(ValueError, match="nothing was sent"):
        establish().unwrap(b"")


def test_command_that_does_not_go_inside(establish, rng):
    with pytest.raises(TpmError) as caught:
        client(establish(), rng).call(Ordinal.EXECUTE_TRANSPORT, wrapped_cmd=b"")
    assert caught.value.code in (ReturnCode.NO_WRAP_TRANSPORT, ReturnCode.BADTAG)


def test_secret_does_not_show_in_the_keys_repr(srk):
    assert SRK_AUTH.hex() not in repr(srk)
    assert repr(SRK_AUTH) not in repr(srk)
