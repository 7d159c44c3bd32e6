"""Sequences that reach the end of commands whose operands only a TPM, or its public keys, can make.

What is recorded (`recorder.py`) was encrypted to keys of other tests, so it ends at a decryption.
Here it is made for the furnished state, and where it takes two commands, from the first one's
response. Fuzzing begins at these sequences too.
"""

from protocol.wire import encode
from tests.any_bytes.furnished import all_authorized, key_handle, session_handle
from tests.any_bytes.sequences import REPAIRED, as_bytes, handles_in_order
from tests.tpm12 import delegation_makers as delegate
from tests.tpm12.conftest import Bench
from tests.tpm12.makers import AUTHCHANGE, BIND, IDENTITY, KEY_AUTH, MIGRATE, SIGNING
from tests.tpm12.transport_maker import ESTABLISH, KH_TRANSPORT, LOG, public
from tests.tpm12.witness import (
    COMMAND,
    SRK,
    ZERO,
    frame,
    hmac1,
    number,
    oaep,
    sha1,
    sized,
    u16,
    u32,
)

SIGN, UN_BIND, MIGRATE_KEY, DSAP, ACTIVATE_IDENTITY, ASYM_FINISH = (
    0x3C,
    0x1E,
    0x25,
    0x11,
    0x7A,
    0x0F,
)
SAVE_KEY, LOAD_KEY, SAVE_AUTH, LOAD_AUTH, RELEASE_TRANSPORT = 0xB4, 0xB5, 0xB6, 0xB7, 0xE8
OIAP = session_handle(1)
SECOND = session_handle(1, second=True)
FIRST_HANDLE = 0x05000000
"""What `handles_in_order` gives first."""


def _with_sessions(ordinal, body, *handles):
    blocks = b"".join(u32(handle) + bytes(20) + b"\1" + bytes(20) for handle in handles)
    return frame(ordinal, body + blocks, COMMAND + len(handles))


def sequences(state):
    """{name: requests}, for the furnished state with all authorized."""
    keys = state.volatile.keys
    modulus = {
        usage: keys[key_handle(usage)].public.pub_key for usage in (BIND, MIGRATE, AUTHCHANGE)
    }
    wrapped = keys[key_handle(SIGNING)].public.enc_data
    sign = u32(key_handle(SIGNING))
    single = {
        "Sign": _with_sessions(SIGN, sign + sized(bytes(20)), OIAP),
        "UnBind": _with_sessions(
            UN_BIND, u32(key_handle(BIND)) + sized(oaep(modulus[BIND], b"\1\1\0\0\2data")), OIAP
        ),
        "MigrateKey": _with_sessions(
            MIGRATE_KEY,
            u32(key_handle(MIGRATE))
            + encode(keys[key_handle(MIGRATE)].pubkey())
            + sized(oaep(modulus[MIGRATE], b"on its way")),
            OIAP,
        ),
        "DSAP": frame(DSAP, u16(7) + u32(0) + ZERO + sized(_delegation(state))),
        "ActivateIdentity": _with_sessions(
            ACTIVATE_IDENTITY, u32(key_handle(IDENTITY)) + sized(_activation(state)), OIAP, SECOND
        ),
        "ChangeAuthAsymFinish": _with_sessions(
            ASYM_FINISH,
            u32(SRK) + u32(key_handle(AUTHCHANGE)) + u16(5) + hmac1(KEY_AUTH, ZERO)
            + sized(oaep(modulus[AUTHCHANGE], ZERO + ZERO)) + sized(wrapped),
            OIAP,
        ),
    }  # fmt: skip
    open_logged = frame(ESTABLISH, u32(KH_TRANSPORT) + public(LOG) + sized(ZERO))
    return {
        **{name: [request] for name, request in single.items()},
        "LoadKeyContext": _saved_and_loaded(state, SAVE_KEY, sign, LOAD_KEY),
        "LoadAuthContext": _saved_and_loaded(state, SAVE_AUTH, u32(OIAP), LOAD_AUTH),
        "ReleaseTransportSigned": [
            open_logged, _with_sessions(RELEASE_TRANSPORT, sign + ZERO, OIAP, FIRST_HANDLE),
        ],
    }  # fmt: skip


def as_sequences(state):
    """The same, as the bytes of sequences."""
    return {
        name: as_bytes("furnished", [(REPAIRED, each) for each in requests], is_authorized=True)
        for name, requests in sequences(state).items()
    }


def _delegation(state):
    return delegate.owner_blob(Bench(state).tpm, 1)


def _activation(state):
    """TPM_ASYM_CA_CONTENTS for the furnished identity."""
    identity = encode(state.volatile.keys[key_handle(IDENTITY)].pubkey())
    symmetric = u32(6) + u16(1) + u16(16) + bytes(16)
    modulus = state.permanent.endorsement_key.public.pub_key
    return oaep(modulus, symmetric + sha1(identity))


def _saved_and_loaded(state, save, handle, load):
    """The context is random, but in every run the same."""
    request = frame(save, handle)
    with all_authorized(), handles_in_order():
        response = Bench(state).engine.execute(request).response
    assert number(response[6:10]) == 0
    return [request, frame(load, response[10:])]
