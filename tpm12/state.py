"""Everything one TPM knows, in four sections by how long they live.

- `Permanent`: survives power loss; TPM_PERMANENT_FLAGS and _DATA, NV areas, owner-evict keys.
- `StClear`: until TPM_Startup(ST_CLEAR); TPM_STCLEAR_FLAGS and _DATA, PCRs, attack counter.
- `StAny`: until any TPM_Startup, but for what TPM_SaveState keeps; sessions, contexts, audit.
- `Volatile`: until power goes; loaded keys, the SHA-1 thread, self-test.

The split follows TPM Main r116 Part 2 §7. Numbers of the first three sections' fields follow the
specification's where it gives one. Invariants: those of `sections.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from protocol.constants import PCR_COUNT, ZERO_DIGEST, KeyHandleValue
from protocol.delegation_structures import DelegatePublic
from protocol.structures import DaaIssuer, DaaTpm, NvDataPublic, PermanentFlags
from protocol.wire import (
    B4,
    U8,
    U16,
    U32,
    Digest,
    Nonce,
    SecretAuth,
    SecretSized,
    Sized,
    wire,
)
from tpm12.crypto import HmacKey, hmac_key
from tpm12.keys import LoadedKey
from tpm12.sections import Section, section, stored, stored_map
from tpm12.sha1 import Sha1Thread

NO_COUNTER: Final = 0xFFFFFFFF
"""STCLEAR_DATA.countID: no counter was incremented since ST_CLEAR."""
RELEASED_COUNTER: Final = 0xFFFFFFFE
"""The active counter was released; no other may be incremented until ST_CLEAR."""
ALL_ONES: Final = b"\xff" * 20


@wire
class NvArea:
    """One defined NV area: its public part, its secret and its bytes."""

    public: NvDataPublic
    auth_value: SecretAuth
    data: SecretSized


@wire
class Counter:
    """One monotonic counter."""

    label: B4
    auth_data: SecretAuth
    value: U32


@wire
class FamilyRow:
    """TPM_FAMILY_TABLE_ENTRY (Part 2 §20.5)."""

    label: U8
    verification_count: U32
    flags: U32


@wire
class DelegateRow:
    """TPM_DELEGATE_TABLE_ROW (Part 2 §20.9): an owner delegation that lives in the TPM."""

    public: DelegatePublic
    auth_value: SecretAuth


@wire
class Session:
    """An authorization session (Part 3 §18).

    Attributes:
        protocol: ProtocolId OIAP, OSAP or DSAP.
        entity_type: EntityType of an OSAP or DSAP session, 0 for OIAP.
        entity_value: Key handle, NV index or counter id that it is bound to.
        entity_digest: What the entity was at setup; compared at use.
        adip: AdipScheme for new secrets.
        shared_secret: The HMAC key of OSAP and DSAP; empty for OIAP.
        delegation: The DELEGATE_PUBLIC of a DSAP session; empty otherwise.
    """

    protocol: U16
    nonce_even: Nonce
    entity_type: U8
    entity_value: U32
    entity_digest: Digest
    adip: U8
    shared_secret: SecretSized
    delegation: Sized

    def with_nonce(self, nonce_even: bytes) -> Session:
        """The same session after one more response."""
        return Session(
            protocol=self.protocol,
            nonce_even=nonce_even,
            entity_type=self.entity_type,
            entity_value=self.entity_value,
            entity_digest=self.entity_digest,
            adip=self.adip,
            shared_secret=self.shared_secret,
            delegation=self.delegation,
        )


@wire
class TransportSession:
    """A transport session (Part 3 §24)."""

    auth_data: SecretAuth
    nonce_even: Nonce
    attributes: U32
    algorithm_id: U32
    enc_scheme: U16
    trans_digest: Digest


@wire
class DaaSession:
    """A TPM_DAA_Join or TPM_DAA_Sign in progress: TPM_DAA_CONTEXT and the rest of it (Part 2 §22).

    Attributes:
        stage: The stage that must come next.
        digest_context: Ties the session to its credential and to its kind, join or sign.
        scratch: The number in progress, 256 bytes; empty: none.
        join_u0, join_u1, digest_n0: TPM_DAA_JOINDATA; zero in a sign session.
    """

    stage: U8
    issuer_settings: DaaIssuer
    tpm_specific: DaaTpm
    digest_context: Digest
    digest: Digest
    context_seed: SecretAuth
    scratch: SecretSized
    join_u0: SecretSized
    join_u1: SecretSized
    digest_n0: Digest


FACTORY_FLAGS: Final = PermanentFlags(
    disable=False,
    ownership=True,
    deactivated=False,
    read_pubek=True,
    disable_owner_clear=False,
    allow_maintenance=True,
    physical_presence_lifetime_lock=False,
    physical_presence_hw_enable=False,
    physical_presence_cmd_enable=False,
    cekp_used=False,
    tpm_post=False,
    tpm_post_lock=False,
    fips=False,
    operator=False,
    enable_revoke_ek=True,
    nv_locked=False,
    read_srk_pub=False,
    tpm_established=False,
    maintenance_done=False,
    disable_full_da_logic_info=False,
)
"""As a TPM is shipped, but enabled and active, so that a fresh one is of use (as libtpms)."""


@section
class Permanent(Section):
    """TPM_PERMANENT_FLAGS and TPM_PERMANENT_DATA (Part 2 §7.1, §7.4) and what goes with them."""

    flags: PermanentFlags = stored(1, PermanentFlags, default=FACTORY_FLAGS)
    tpm_proof: bytes = stored(3, bytes, default=ZERO_DIGEST)
    owner_auth: bytes | None = stored(4, bytes, default=None)
    """None: no owner is installed."""
    operator_auth: bytes | None = stored(5, bytes, default=None)
    manu_maint_pub: bytes | None = stored(6, bytes, default=None)
    endorsement_key: LoadedKey | None = stored(7, LoadedKey, default=None)
    srk: LoadedKey | None = stored(8, LoadedKey, default=None)
    delegate_key: bytes = stored(9, bytes, default=bytes(16))
    context_key: bytes = stored(10, bytes, default=bytes(16))
    audit_monotonic_counter: int = stored(11, int, default=0)
    counters: dict[int, Counter] = stored_map(12, Counter, default_factory=dict)
    ordinal_audit_status: dict[int, bool] = stored_map(14, bool, default_factory=dict)
    """Ordinals that are audited, or not, unlike at the factory."""
    auth_dir: bytes = stored(15, bytes, default=ZERO_DIGEST)
    family_table: dict[int, FamilyRow] = stored_map(17, FamilyRow, default_factory=dict)
    delegate_table: dict[int, DelegateRow] = stored_map(18, DelegateRow, default_factory=dict)
    ek_reset: bytes = stored(19, bytes, default=ZERO_DIGEST)
    last_family_id: int = stored(21, int, default=0)
    no_owner_nv_write: int = stored(22, int, default=0)
    restrict_delegate: int = stored(23, int, default=0)
    tpm_daa_seed: bytes = stored(24, bytes, default=ZERO_DIGEST)
    daa_proof: bytes = stored(25, bytes, default=ZERO_DIGEST)
    daa_blob_key: bytes = stored(26, bytes, default=bytes(16))
    counter_highest: int = stored(32, int, default=0)
    """The highest value any counter ever had; new ones start above it."""
    nv: dict[int, NvArea] = stored_map(33, NvArea, default_factory=dict)
    owner_evict_keys: dict[int, LoadedKey] = stored_map(34, LoadedKey, default_factory=dict)
    saved_state: bytes | None = stored(35, bytes, default=None)
    """What TPM_SaveState kept; gone after the next command."""
    journal_key: bytes | None = stored(36, bytes, default=None)
    """Encrypts what a killed process leaves of the other sections; of this stack, not of the
    specification. None: not drawn yet."""
    seed: bytes | None = stored(37, bytes, default=None)
    """What its secrets can be computed from again, by anybody; of this stack, too. None: nothing,
    or it was made before this was kept."""


@section
class StClear(Section):
    """TPM_STCLEAR_FLAGS and TPM_STCLEAR_DATA (Part 2 §7.2, §7.5)."""

    context_nonce_key: bytes = stored(1, bytes, default=ZERO_DIGEST)
    count_id: int = stored(2, int, default=NO_COUNTER)
    owner_reference: int = stored(3, int, default=KeyHandleValue.OWNER)
    disable_reset_lock: bool = stored(4, bool, default=False)
    pcrs: dict[int, bytes] = stored_map(5, bytes, default_factory=dict, has_fixed_keys=True)
    deferred_physical_presence: int = stored(6, int, default=0)
    deactivated: bool = stored(32, bool, default=False)
    disable_force_clear: bool = stored(33, bool, default=False)
    physical_presence: bool = stored(34, bool, default=False)
    physical_presence_lock: bool = stored(35, bool, default=False)
    b_global_lock: bool = stored(36, bool, default=False)
    nv_read_locked: dict[int, bool] = stored_map(37, bool, default_factory=dict)
    """Areas with bReadSTClear set."""
    nv_write_locked: dict[int, bool] = stored_map(38, bool, default_factory=dict)
    """Areas with bWriteSTClear set."""
    failed_tries: int = stored(39, int, default=0)
    """Failed authorizations, for the dictionary-attack defence."""
    last_failure_us: int = stored(40, int, default=0)


@section
class StAny(Section):
    """TPM_STANY_FLAGS and TPM_STANY_DATA (Part 2 §7.3, §7.6)."""

    context_nonce_session: bytes = stored(1, bytes, default=ZERO_DIGEST)
    audit_digest: bytes = stored(2, bytes, default=ZERO_DIGEST)
    tick_start_us: int = stored(3, int, default=0)
    tick_nonce: bytes = stored(7, bytes, default=ZERO_DIGEST)
    context_count: int = stored(4, int, default=0)
    context_list: dict[int, int] = stored_map(5, int, default_factory=dict)
    sessions: dict[int, Session] = stored_map(6, Session, default_factory=dict)
    transport_sessions: dict[int, TransportSession] = stored_map(
        8, TransportSession, default_factory=dict
    )
    daa_sessions: dict[int, DaaSession] = stored_map(9, DaaSession, default_factory=dict)
    delegation_changes: int = stored(10, int, default=0)
    """How often delegated sessions were ended; saved ones from before are dead."""
    resets: int = stored(11, int, default=0)
    """How often TPM_Reset came; keys that TPM_SaveKeyContext saved before are dead."""
    legacy_contexts: dict[int, bool] = stored_map(12, bool, default_factory=dict)
    """Counts in `context_list` of what TPM_SaveAuthContext saved: TPM_Reset takes them."""
    post_initialise: bool = stored(32, bool, default=True)
    transport_exclusive: int = stored(34, int, default=0)
    tos_present: bool = stored(35, bool, default=False)


class SelfTestState:
    """What the self-tests have found so far."""

    LIMITED = 1
    FULL = 2
    FAILURE = 3


@section
class Volatile(Section):
    """What a power cycle takes."""

    keys: dict[int, LoadedKey] = stored_map(1, LoadedKey, default_factory=dict)
    sha1_thread: Sha1Thread | None = stored(2, Sha1Thread, default=None)
    self_test: int = stored(3, int, default=SelfTestState.LIMITED)
    hash_sequence: Sha1Thread | None = stored(4, Sha1Thread, default=None)
    """The locality 4 hash sequence in progress."""
    sha1_thread_transport: int = stored(6, int, default=0)
    """The transport session that `sha1_thread` belongs to; 0: none."""
    physical_presence_pin: bool = stored(5, bool, default=False)


@dataclass(slots=True)
class State:
    """The four sections. Replaced as a whole when a command is kept."""

    permanent: Permanent
    stclear: StClear
    stany: StAny
    volatile: Volatile


def factory_state(*, is_nv_locked: bool = False) -> State:
    """A TPM as it leaves the factory: enabled, active, without EK and owner, not powered on.

    Args:
        is_nv_locked: The maker of the platform has made his NV areas and set nvLocked.
    """
    flags = replace(FACTORY_FLAGS, nv_locked=True) if is_nv_locked else FACTORY_FLAGS
    return State(
        permanent=Permanent(flags=flags),
        stclear=StClear(pcrs=dict.fromkeys(range(PCR_COUNT), ZERO_DIGEST)),
        stany=StAny(),
        volatile=Volatile(),
    )


def session_key(session: Session) -> HmacKey:
    """The HMAC key of an OSAP or DSAP session."""
    return hmac_key(session.shared_secret)
