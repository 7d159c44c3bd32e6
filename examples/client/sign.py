"""Make a signing key, keep it in a file, load it again and sign with it.

vtpm exec guest1 -- python sign.py, on a TPM without an owner
"""

import hashlib
import os
import tempfile
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import KeyUsage, ResourceType
from protocol.structures import Key12
from protocol.wire import decode, encode
from tpm12.client import TpmClient
from tpm12.keys import pubkey_of, public_key_of

PASSWORD = hashlib.sha1(b"my password", usedforsecurity=False).digest()

with (
    Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection,
    tempfile.TemporaryDirectory() as folder,
):
    tpm = TpmClient(connection.exchange, rng=SystemRng())
    tpm.take_ownership()
    # What comes out is the public part, and the private part encrypted: it can lie anywhere.
    kept = Path(folder) / "key"
    kept.write_bytes(encode(tpm.create_wrap_key(KeyUsage.SIGNING, auth=PASSWORD)))

    key = decode(Key12, kept.read_bytes())
    handle = tpm.load_key2(key)
    digest = hashlib.sha1(b"a text", usedforsecurity=False).digest()
    signature = tpm.sign(handle, digest, PASSWORD)
    tpm.flush_specific(handle, ResourceType.KEY)

assert public_key_of(pubkey_of(key)).is_signature(signature, digest)
print("signed:", signature.hex()[:32], "...")
