"""Sealed data: what this TPM alone gives back, to who knows the secret, while the PCRs are right.

Leaves to others: the sessions (`authorization.py`), the commands (`commands/storage.py`).

Source: TPM Main r116 Part 2 §9, Part 3 §10.1, §10.2, §10.7.

Invariants:
- The digest inside the encrypted part covers the readable part, so neither can be exchanged.
- The encrypted part carries tpmProof: what another owner or TPM sealed is no sealed blob here.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import AdipScheme, EntityType, PayloadType, StructureTag
from protocol.return_codes import ReturnCode, TpmError
from protocol.structures import SealedData, StoredData, StoredData12
from protocol.wire import DecodeError, decode, encode
from tpm12 import pcrs
from tpm12.crypto import OAEP_OVERHEAD_BYTES, DecryptionError, aes128_ctr, is_same, mgf1, sha1, xor
from tpm12.encryption import encrypted_oaep
from tpm12.keys import LoadedKey
from tpm12.state import Session
from tpm12.tpm import Tpm

SEALED_OVERHEAD_BYTES: Final = 65
"""TPM_SEALED_DATA without its data."""
NOT_ENCRYPTED: Final = 0
"""STORED_DATA12.et of TPM_Seal: the data comes and goes in clear."""
_SIZE_FIELD_BYTES: Final = 4
_LONG_TAG: Final = StructureTag.PCR_INFO_LONG.to_bytes(2, "big")


def seal(
    tpm: Tpm, key: LoadedKey, blank: StoredData | StoredData12, secret: bytes, data: bytes
) -> StoredData | StoredData12:
    """Seal data under a storage key.

    Args:
        tpm: The command's draft.
        key: Its public part encrypts.
        blank: The blob without its encrypted part.
        secret: authData that TPM_Unseal will ask for, 20 bytes.
        data: What is sealed.

    Raises:
        TpmError: BAD_DATASIZE when the key cannot encrypt that much.
    """
    if len(data) > key.rsa.public.size - OAEP_OVERHEAD_BYTES - SEALED_OVERHEAD_BYTES:
        # libtpms says ENCRYPT_ERROR where the data alone would have fitted; the specification
        # knows one code for both.
        raise TpmError(ReturnCode.BAD_DATASIZE)
    sealed = SealedData(
        payload=PayloadType.SEAL,
        auth_data=secret,
        tpm_proof=tpm.permanent.tpm_proof,
        stored_digest=stored_digest(blank),
        data=data,
    )
    return with_sealed(blank, encrypted_oaep(tpm, key.rsa.public, encode(sealed)))


def unseal(tpm: Tpm, key: LoadedKey, stored: StoredData | StoredData12) -> SealedData:
    """Open a sealed blob, all but the check of its secret.

    Raises:
        TpmError: NOTSEALED_BLOB, whatever is wrong with the blob; WRONGPCRVAL, BAD_LOCALITY.
    """
    try:
        sealed = decode(SealedData, key.rsa.decrypt_oaep(stored.enc_data))
    except (DecryptionError, DecodeError) as error:
        raise TpmError(ReturnCode.NOTSEALED_BLOB) from error
    is_ours = is_same(sealed.tpm_proof, tpm.permanent.tpm_proof)
    is_whole = is_same(sealed.stored_digest, stored_digest(stored))
    if sealed.payload != PayloadType.SEAL or not is_ours or not is_whole:
        raise TpmError(ReturnCode.NOTSEALED_BLOB)
    is_long = isinstance(stored, StoredData12)
    pcrs.check_release(
        tpm, pcrs.binding_of(stored.seal_info, ReturnCode.NOTSEALED_BLOB, is_long=is_long)
    )
    return sealed


def blank_for(tpm: Tpm, pcr_info: bytes) -> StoredData | StoredData12:
    """The blob of TPM_Seal before sealing: its form follows the form of `pcr_info`.

    Raises:
        TpmError: BADINDEX for a malformed PCR binding.
    """
    is_long = pcr_info[:2] == _LONG_TAG
    seal_info = _filled_in(tpm, pcr_info, is_long=is_long)
    if is_long:
        return StoredData12(et=NOT_ENCRYPTED, seal_info=seal_info, enc_data=b"")
    return StoredData(seal_info=seal_info, enc_data=b"")


def blank_for_sealx(tpm: Tpm, pcr_info: bytes, session: Session) -> StoredData12:
    """The blob of TPM_Sealx before sealing; it says how the session hides the data.

    Raises:
        TpmError: BADINDEX for a PCR binding that is malformed or of 1.1 age.
    """
    # XOR is 0, so its blob gets the low byte of a key to be told from one that is not encrypted.
    is_xor = session.adip == AdipScheme.XOR
    et = EntityType.KEY if is_xor else session.adip << 8
    return StoredData12(et=et, seal_info=_filled_in(tpm, pcr_info, is_long=True), enc_data=b"")


def _filled_in(tpm: Tpm, pcr_info: bytes, *, is_long: bool) -> bytes:
    binding = pcrs.binding_of(pcr_info, ReturnCode.BADINDEX, is_long=is_long)
    return b"" if binding is None else encode(pcrs.filled_in(tpm, binding))


def stored_digest(stored: StoredData | StoredData12) -> bytes:
    """Hash the readable part of a blob: everything before encDataSize (Part 2 §9.3)."""
    return sha1(encode(with_sealed(stored, b""))[:-_SIZE_FIELD_BYTES])


def with_sealed(stored: StoredData | StoredData12, enc_data: bytes) -> StoredData | StoredData12:
    """The same readable part around another encrypted part."""
    if isinstance(stored, StoredData12):
        return StoredData12(et=stored.et, seal_info=stored.seal_info, enc_data=enc_data)
    return StoredData(seal_info=stored.seal_info, enc_data=enc_data)


def masked(session: Session, nonce_odd: bytes, scheme: int, data: bytes) -> bytes:
    """Hide data under a session, or show it again (Part 3 §10.2, §10.7); its own inverse.

    Args:
        session: OSAP or DSAP; its even nonce is the one the command's request used.
        nonce_odd: Of the command.
        scheme: AdipScheme.
        data: Any size.

    Raises:
        TpmError: INAPPROPRIATE_ENC for an unknown scheme.
    """
    secret, nonce_even = session.shared_secret, session.nonce_even
    if scheme == AdipScheme.XOR:
        return xor(data, mgf1(nonce_even + nonce_odd + b"XOR" + secret, len(data)))
    if scheme == AdipScheme.AES128_CTR:
        return aes128_ctr(secret, sha1(nonce_even, nonce_odd), data)
    raise TpmError(ReturnCode.INAPPROPRIATE_ENC)
