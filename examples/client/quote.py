"""Let a TPM say what its PCRs are, and check what it says as somebody far away does.

vtpm exec guest1 -- python quote.py, on a TPM without an owner
"""

import os
from pathlib import Path

from daemons.guest.tpm0_client import Tpm0Client
from daemons.world import SystemRng
from protocol.constants import KeyUsage, SigScheme
from protocol.structures import QuoteInfo
from protocol.wire import encode
from tpm12.client import TpmClient, composite_hash
from tpm12.crypto import sha1
from tpm12.keys import pubkey_of, public_key_of

with Tpm0Client(Path(os.environ["TPM_DEVICE"])) as connection:
    tpm = TpmClient(connection.exchange, rng=SystemRng())
    tpm.take_ownership()
    wrapped = tpm.create_wrap_key(KeyUsage.SIGNING, sig_scheme=SigScheme.RSASSAPKCS1V15_SHA1)
    handle = tpm.load_key2(wrapped)

    challenge = os.urandom(20)
    values, signature = tpm.quote(handle, challenge, (10, 11), bytes(20))

# From here on no TPM is needed: the challenge, the key's public part, the values, the signature.
read = {10: values.pcr_value[:20], 11: values.pcr_value[20:]}
signed = encode(QuoteInfo(digest_value=composite_hash(read), external_data=challenge))
assert public_key_of(pubkey_of(wrapped)).is_signature(signature, sha1(signed))
print("PCR 10 was", read[10].hex())
