"""Send commands through an encrypted transport session, and have the TPM sign what went through.

vtpm exec guest1 -- python transport.py, on a TPM without an owner
"""

import os
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import EncScheme, KeyUsage, TransportAttribute
from protocol.wire import encode
from tpm12.client import TpmClient
from tpm12.client_transport import ClientTransport, TransportKey
from tpm12.crypto import sha1
from tpm12.keys import pubkey_of, public_key_of

with Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection:
    rng = SystemRng()
    tpm = TpmClient(connection.exchange, rng=rng)
    tpm.take_ownership()
    signing = tpm.create_wrap_key(KeyUsage.SIGNING)
    storage = tpm.create_wrap_key(
        KeyUsage.STORAGE, enc_scheme=EncScheme.RSAESOAEP_SHA1_MGF1, sig_scheme=1
    )
    signing_handle, storage_handle = tpm.load_key2(signing), tpm.load_key2(storage)

    session = ClientTransport.establish(
        connection.exchange,
        rng=rng,
        key=TransportKey(handle=storage_handle, pubkey=pubkey_of(storage)),
        attributes=TransportAttribute.ENCRYPT | TransportAttribute.LOG,
    )
    inside = TpmClient(session.exchange, rng=rng)  # every method, wrapped
    print("drawn unseen:", len(inside.get_random(16)), "bytes")
    inside.extend(10, bytes(20))

    log, signature = session.release_signed(signing_handle, os.urandom(20))

assert log is not None
assert public_key_of(pubkey_of(signing)).is_signature(signature, sha1(encode(log)))
print("the TPM has signed what went through")
