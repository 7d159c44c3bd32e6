"""A typed, blocking TPM 1.2 client over anything that exchanges bytes.

    tpm = TpmClient(exchange, rng=rng)     # exchange: request bytes -> response bytes
    tpm.pcr_read(10)
    blob = tpm.seal(b"secret", release={4: digest4, 5: digest5})

Methods are named as the specification's commands and take what a caller has: secrets, indices,
digests. Sessions are opened and closed inside. `call()` sends any other declared command.

Leaves to others: building and checking of bytes (`client_core.py`), the structure of each command
(its declaration in `commands/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, cast

from protocol.constants import (
    PCR_COUNT,
    PCR_SELECT_BYTES_MAX,
    ZERO_DIGEST,
    AdipScheme,
    AlgorithmId,
    AuthDataUsage,
    CapabilityArea,
    EncScheme,
    EntityType,
    KeyHandleValue,
    KeyUsage,
    Ordinal,
    ProtocolId,
    ResourceType,
    SigScheme,
    StartupType,
)
from protocol.structures import (
    UNRESTRICTED_PCR_INFO,
    CounterValue,
    Key,
    Key12,
    KeyHandleList,
    KeyParms,
    NvAttributes,
    NvDataPublic,
    PcrComposite,
    PcrInfoLong,
    PcrInfoShort,
    PcrSelection,
    Pubkey,
    RsaKeyParms,
    StoredData,
    StoredData12,
)
from protocol.wire import DecodeError, decode, encode
from tpm12.client_core import BadResponseError, ClientSession, Use, osap_shared_secret, prepare
from tpm12.commands import ALL
from tpm12.crypto import sha1
from tpm12.dispatch import Command, table
from tpm12.keys import public_key_of
from tpm12.ports import Rng

WELL_KNOWN: Final = ZERO_DIGEST
"""The well-known secret: 20 zero bytes."""
ANY_LOCALITY: Final = 0x1F
SRK: Final = int(KeyHandleValue.SRK)
Exchange = Callable[[bytes], bytes]


class TpmClient:
    """One TPM.

    Args:
        exchange: Sends a request, gives the response.
        commands: Declared commands by ordinal; the TPM's own when None.
        rng: For nonces and sessions.

    Every method raises `TpmError` when the TPM refuses and `BadResponseError` when its answer is
    malformed or not authentic.
    """

    def __init__(
        self, exchange: Exchange, *, rng: Rng, commands: Mapping[int, Command] | None = None
    ) -> None:
        self._exchange = exchange
        self._commands = table(ALL) if commands is None else commands
        self._rng = rng

    def call(self, ordinal: int, /, *uses: Use, **operands: Any) -> Any:  # noqa: ANN401 - any command's
        """Send one declared command.

        Args:
            ordinal: Its number.
            uses: Its authorizations, in the order of the declared sessions.
            operands: Its operands, by the specification's names in snake_case.

        Returns:
            An instance of the command's `gives`.
        """
        command = self._commands[ordinal]
        prepared = prepare(command, command.takes(**operands), uses, self._rng)
        return prepared.finish(self._exchange(prepared.request))

    # -- sessions ----------------------------------------------------------------------------

    def oiap(self) -> ClientSession:
        """Open a session that is bound to nothing."""
        out = self.call(Ordinal.OIAP)
        return ClientSession(out.auth_handle, out.nonce_even, self._rng.random(20))

    def osap(
        self, entity_type: int, entity_value: int, secret: bytes, adip: int = AdipScheme.XOR
    ) -> ClientSession:
        """Open a session that is bound to an entity and may mask new secrets.

        Args:
            entity_type: EntityType without the ADIP byte.
            entity_value: Key handle, NV index or counter id; 0 for the owner.
            secret: The entity's authValue.
            adip: AdipScheme.
        """
        nonce_odd_osap = self._rng.random(20)
        out = self.call(
            Ordinal.OSAP,
            entity_type=adip << 8 | entity_type,
            entity_value=entity_value,
            nonce_odd_osap=nonce_odd_osap,
        )
        shared = osap_shared_secret(secret, out.nonce_even_osap, nonce_odd_osap)
        return ClientSession(
            out.auth_handle, out.nonce_even, self._rng.random(20), shared_secret=shared, adip=adip
        )

    def dsap(
        self,
        entity_type: int,
        entity_value: bytes,
        secret: bytes,
        *,
        key_handle: int = 0,
        adip: int = AdipScheme.XOR,
    ) -> ClientSession:
        """Open a session that uses a delegation.

        Args:
            entity_type: EntityType DEL_OWNER_BLOB, DEL_ROW or DEL_KEY_BLOB, without the ADIP byte.
            entity_value: The encoded blob, or the index of a row as 4 bytes.
            secret: The delegation's authValue.
            key_handle: The key that is delegated; only for DEL_KEY_BLOB.
            adip: AdipScheme.
        """
        nonce_odd_dsap = self._rng.random(20)
        out = self.call(
            Ordinal.DSAP,
            entity_type=adip << 8 | entity_type,
            key_handle=key_handle,
            nonce_odd_dsap=nonce_odd_dsap,
            entity_value=entity_value,
        )
        shared = osap_shared_secret(secret, out.nonce_even_dsap, nonce_odd_dsap)
        return ClientSession(
            out.auth_handle, out.nonce_even, self._rng.random(20), shared_secret=shared, adip=adip
        )

    def _proof(self, secret: bytes) -> Use:
        """A fresh OIAP session that ends with its command."""
        return Use(self.oiap(), secret)

    def _key_osap(self, handle: int, secret: bytes) -> ClientSession:
        return self.osap(EntityType.KEYHANDLE, handle, secret)

    def _owner_osap(self, secret: bytes) -> ClientSession:
        return self.osap(EntityType.OWNER, 0, secret)

    # -- start-up, capabilities --------------------------------------------------------------

    def startup(self, startup_type: int = StartupType.CLEAR) -> None:
        """TPM_Startup."""
        self.call(Ordinal.STARTUP, startup_type=startup_type)

    def continue_self_test(self) -> None:
        """TPM_ContinueSelfTest."""
        self.call(Ordinal.CONTINUE_SELF_TEST)

    def get_capability(self, cap_area: int, sub_cap: bytes = b"") -> bytes:
        """TPM_GetCapability."""
        out = self.call(Ordinal.GET_CAPABILITY, cap_area=cap_area, sub_cap=sub_cap)
        return cast("bytes", out.resp)

    def get_property(self, sub_cap: int) -> bytes:
        """TPM_GetCapability of one CapabilityProperty."""
        return self.get_capability(CapabilityArea.PROPERTY, sub_cap.to_bytes(4, "big"))

    def handles(self, resource_type: int) -> tuple[int, ...]:
        """Handles of loaded keys or open sessions (ResourceType)."""
        listed = self.get_capability(CapabilityArea.HANDLE, resource_type.to_bytes(4, "big"))
        try:
            return decode(KeyHandleList, listed).handles
        except DecodeError as error:
            raise BadResponseError(f"the list of handles: {error}") from error

    def flush_specific(self, handle: int, resource_type: int) -> None:
        """TPM_FlushSpecific."""
        self.call(Ordinal.FLUSH_SPECIFIC, handle=handle, resource_type=resource_type)

    def end_session(self, session: ClientSession) -> None:
        """Drop a session that is still open."""
        if session.is_open:
            self.flush_specific(session.handle, ResourceType.AUTH)
            session.is_open = False

    def get_random(self, bytes_requested: int) -> bytes:
        """TPM_GetRandom; may give fewer bytes."""
        out = self.call(Ordinal.GET_RANDOM, bytes_requested=bytes_requested)
        return cast("bytes", out.random_bytes)

    # -- PCRs --------------------------------------------------------------------------------

    def pcr_read(self, pcr_index: int) -> bytes:
        """TPM_PCRRead; 20 bytes."""
        return cast("bytes", self.call(Ordinal.PCR_READ, pcr_index=pcr_index).out_digest)

    def pcr_values(self) -> dict[int, bytes]:
        """All PCRs."""
        return {i: self.pcr_read(i) for i in range(PCR_COUNT)}

    def extend(self, pcr_num: int, in_digest: bytes) -> bytes:
        """TPM_Extend; the new value, 20 bytes."""
        out = self.call(Ordinal.EXTEND, pcr_num=pcr_num, in_digest=in_digest)
        return cast("bytes", out.out_digest)

    def pcr_reset(self, *indices: int) -> None:
        """TPM_PCR_Reset."""
        self.call(Ordinal.PCR_RESET, pcr_selection=selection(indices))

    def quote(
        self, key_handle: int, external_data: bytes, indices: tuple[int, ...], auth: bytes
    ) -> tuple[PcrComposite, bytes]:
        """TPM_Quote; the composite and the signature over QUOTE_INFO."""
        out = self.call(
            Ordinal.QUOTE,
            self._proof(auth),
            key_handle=key_handle,
            external_data=external_data,
            target_pcr=selection(indices),
        )
        return out.pcr_data, out.sig

    # -- endorsement key and owner -----------------------------------------------------------

    def create_endorsement_key_pair(self) -> Pubkey:
        """TPM_CreateEndorsementKeyPair, RSA 2048; the checksum is verified."""
        anti_replay = self._rng.random(20)
        out = self.call(
            Ordinal.CREATE_ENDORSEMENT_KEY_PAIR,
            anti_replay=anti_replay,
            key_info=rsa_key_parms(EncScheme.RSAESOAEP_SHA1_MGF1, SigScheme.NONE),
        )
        return _checked_pubek(out.pub_endorsement_key, out.checksum, anti_replay)

    def read_pubek(self) -> Pubkey:
        """TPM_ReadPubek; the checksum is verified."""
        anti_replay = self._rng.random(20)
        out = self.call(Ordinal.READ_PUBEK, anti_replay=anti_replay)
        return _checked_pubek(out.pub_endorsement_key, out.checksum, anti_replay)

    def owner_read_internal_pub(self, key_handle: int, owner_auth: bytes = WELL_KNOWN) -> Pubkey:
        """TPM_OwnerReadInternalPub of the EK or SRK."""
        out = self.call(
            Ordinal.OWNER_READ_INTERNAL_PUB, self._proof(owner_auth), key_handle=key_handle
        )
        return cast("Pubkey", out.public_portion)

    def take_ownership(
        self, owner_auth: bytes = WELL_KNOWN, srk_auth: bytes = WELL_KNOWN
    ) -> Key | Key12:
        """TPM_TakeOwnership with an SRK of RSA 2048; gives its public part."""
        endorsement_key = public_key_of(self.read_pubek())
        srk_params = Key(
            key_usage=KeyUsage.STORAGE,
            key_flags=0,
            auth_data_usage=AuthDataUsage.ALWAYS,
            algorithm_parms=rsa_key_parms(EncScheme.RSAESOAEP_SHA1_MGF1, SigScheme.NONE),
            pcr_info=b"",
            pub_key=b"",
            enc_data=b"",
        )
        out = self.call(
            Ordinal.TAKE_OWNERSHIP,
            self._proof(owner_auth),
            protocol_id=ProtocolId.OWNER,
            enc_owner_auth=endorsement_key.encrypt_oaep(owner_auth),
            enc_srk_auth=endorsement_key.encrypt_oaep(srk_auth),
            srk_params=srk_params,
        )
        return cast("Key | Key12", out.srk_pub)

    def owner_clear(self, owner_auth: bytes = WELL_KNOWN) -> None:
        """TPM_OwnerClear."""
        self.call(Ordinal.OWNER_CLEAR, self._proof(owner_auth))

    # -- storage -----------------------------------------------------------------------------

    def seal(  # noqa: PLR0913 - secrets and bindings have defaults
        self,
        data: bytes,
        *,
        release: Mapping[int, bytes] | None = None,
        locality_at_release: int = ANY_LOCALITY,
        auth: bytes = WELL_KNOWN,
        key_handle: int = SRK,
        key_auth: bytes = WELL_KNOWN,
    ) -> StoredData | StoredData12:
        """TPM_Seal.

        Args:
            data: At most 149 bytes under a 2048-bit key.
            release: PCR values at which it may be unsealed; None does not bind it to PCRs.
            locality_at_release: Mask of localities that may unseal; only with `release`.
            auth: The new blob's secret.
            key_handle: A storage key.
            key_auth: Its secret.
        """
        session = self._key_osap(key_handle, key_auth)
        binding = b"" if release is None else encode(pcr_binding(release, locality_at_release))
        out = self.call(
            Ordinal.SEAL,
            Use(session),
            key_handle=key_handle,
            enc_auth=session.mask(auth),
            pcr_info=binding,
            in_data=data,
        )
        return cast("StoredData | StoredData12", out.sealed_data)

    def unseal(
        self,
        blob: StoredData | StoredData12,
        *,
        auth: bytes = WELL_KNOWN,
        parent_handle: int = SRK,
        parent_auth: bytes = WELL_KNOWN,
    ) -> bytes:
        """TPM_Unseal."""
        out = self.call(
            Ordinal.UNSEAL,
            self._proof(parent_auth),
            self._proof(auth),
            parent_handle=parent_handle,
            in_data=blob,
        )
        return cast("bytes", out.secret)

    def create_wrap_key(  # noqa: PLR0913 - secrets and properties have defaults
        self,
        key_usage: int,
        *,
        bits: int = 2048,
        enc_scheme: int = EncScheme.NONE,
        sig_scheme: int = SigScheme.RSASSAPKCS1V15_SHA1,
        auth: bytes = WELL_KNOWN,
        migration_auth: bytes = WELL_KNOWN,
        key_flags: int = 0,
        pcr_info: bytes = b"",
        parent_handle: int = SRK,
        parent_auth: bytes = WELL_KNOWN,
    ) -> Key | Key12:
        """TPM_CreateWrapKey; the wrapped key."""
        session = self._key_osap(parent_handle, parent_auth)
        out = self.call(
            Ordinal.CREATE_WRAP_KEY,
            Use(session),
            parent_handle=parent_handle,
            data_usage_auth=session.mask(auth),
            data_migration_auth=session.mask(migration_auth, is_second=True),
            key_info=Key12(
                key_usage=key_usage,
                key_flags=key_flags,
                auth_data_usage=AuthDataUsage.ALWAYS,
                algorithm_parms=rsa_key_parms(enc_scheme, sig_scheme, bits),
                pcr_info=pcr_info,
                pub_key=b"",
                enc_data=b"",
            ),
        )
        return cast("Key | Key12", out.wrapped_key)

    def load_key2(
        self, in_key: Key | Key12, *, parent_handle: int = SRK, parent_auth: bytes = WELL_KNOWN
    ) -> int:
        """TPM_LoadKey2; the key's handle."""
        out = self.call(
            Ordinal.LOAD_KEY2,
            self._proof(parent_auth),
            parent_handle=parent_handle,
            in_key=in_key,
        )
        return cast("int", out.inkey_handle)

    def sign(self, key_handle: int, area_to_sign: bytes, auth: bytes = WELL_KNOWN) -> bytes:
        """TPM_Sign."""
        out = self.call(
            Ordinal.SIGN, self._proof(auth), key_handle=key_handle, area_to_sign=area_to_sign
        )
        return cast("bytes", out.sig)

    # -- NV and counters ---------------------------------------------------------------------

    def nv_define_space(  # noqa: PLR0913 - secrets and restrictions have defaults
        self,
        nv_index: int,
        data_size: int,
        attributes: int,
        *,
        auth: bytes = WELL_KNOWN,
        owner_auth: bytes | None = WELL_KNOWN,
        pcr_info_read: PcrInfoShort = UNRESTRICTED_PCR_INFO,
        pcr_info_write: PcrInfoShort = UNRESTRICTED_PCR_INFO,
    ) -> None:
        """TPM_NV_DefineSpace; `owner_auth` None sends it without authorization."""
        public = NvDataPublic(
            nv_index=nv_index,
            pcr_info_read=pcr_info_read,
            pcr_info_write=pcr_info_write,
            permission=NvAttributes(attributes=attributes),
            b_read_stclear=False,
            b_write_stclear=False,
            b_write_define=False,
            data_size=data_size,
        )
        if owner_auth is None:
            self.call(Ordinal.NV_DEFINE_SPACE, pub_info=public, enc_auth=auth)
            return
        session = self._owner_osap(owner_auth)
        self.call(
            Ordinal.NV_DEFINE_SPACE, Use(session), pub_info=public, enc_auth=session.mask(auth)
        )

    def nv_write_value(
        self, nv_index: int, data: bytes, *, offset: int = 0, owner_auth: bytes | None = WELL_KNOWN
    ) -> None:
        """TPM_NV_WriteValue."""
        uses = () if owner_auth is None else (self._proof(owner_auth),)
        self.call(Ordinal.NV_WRITE_VALUE, *uses, nv_index=nv_index, offset=offset, data=data)

    def nv_read_value(
        self,
        nv_index: int,
        data_size: int,
        *,
        offset: int = 0,
        owner_auth: bytes | None = WELL_KNOWN,
    ) -> bytes:
        """TPM_NV_ReadValue."""
        uses = () if owner_auth is None else (self._proof(owner_auth),)
        out = self.call(
            Ordinal.NV_READ_VALUE, *uses, nv_index=nv_index, offset=offset, data_size=data_size
        )
        return cast("bytes", out.data)

    def create_counter(
        self, label: bytes, *, auth: bytes = WELL_KNOWN, owner_auth: bytes = WELL_KNOWN
    ) -> tuple[int, CounterValue]:
        """TPM_CreateCounter; its id and first value. `label` has 4 bytes."""
        session = self._owner_osap(owner_auth)
        out = self.call(
            Ordinal.CREATE_COUNTER, Use(session), enc_auth=session.mask(auth), label=label
        )
        return out.count_id, out.counter_value

    def increment_counter(self, count_id: int, auth: bytes = WELL_KNOWN) -> CounterValue:
        """TPM_IncrementCounter; the new value."""
        out = self.call(Ordinal.INCREMENT_COUNTER, self._proof(auth), count_id=count_id)
        return cast("CounterValue", out.count)

    def read_counter(self, count_id: int) -> CounterValue:
        """TPM_ReadCounter."""
        return cast("CounterValue", self.call(Ordinal.READ_COUNTER, count_id=count_id).count)


# -- structures that callers build -----------------------------------------------------------------


def selection(indices: tuple[int, ...]) -> PcrSelection:
    """The TPM_PCR_SELECTION of these PCRs, 3 bytes wide."""
    bits = sum(1 << i for i in set(indices))
    return PcrSelection(pcr_select=bits.to_bytes(PCR_SELECT_BYTES_MAX, "little"))


def composite_hash(values: Mapping[int, bytes]) -> bytes:
    """TPM_COMPOSITE_HASH of PCR values by index; 20 bytes."""
    if not values:
        return ZERO_DIGEST
    ordered = b"".join([values[i] for i in sorted(values)])
    return sha1(encode(PcrComposite(select=selection(tuple(values)), pcr_value=ordered)))


def pcr_binding(values: Mapping[int, bytes], locality_at_release: int) -> PcrInfoLong:
    """A TPM_PCR_INFO_LONG that releases at these PCR values and localities."""
    selected = selection(tuple(values))
    return PcrInfoLong(
        locality_at_creation=ANY_LOCALITY,
        locality_at_release=locality_at_release,
        creation_pcr_selection=selected,
        release_pcr_selection=selected,
        digest_at_creation=ZERO_DIGEST,
        digest_at_release=composite_hash(values),
    )


def rsa_key_parms(enc_scheme: int, sig_scheme: int, bits: int = 2048) -> KeyParms:
    """TPM_KEY_PARMS of an RSA key with two primes and the default exponent."""
    return KeyParms(
        algorithm_id=AlgorithmId.RSA,
        enc_scheme=enc_scheme,
        sig_scheme=sig_scheme,
        parms=encode(RsaKeyParms(key_length=bits, num_primes=2, exponent=b"")),
    )


def _checked_pubek(pubek: Pubkey, checksum: bytes, anti_replay: bytes) -> Pubkey:
    if sha1(encode(pubek), anti_replay) != checksum:
        raise BadResponseError("the checksum of the endorsement key is wrong")
    return pubek
