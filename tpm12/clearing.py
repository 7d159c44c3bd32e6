"""Clearing a TPM: what TPM_OwnerClear, TPM_ForceClear and TPM_RevokeTrust have in common.

Leaves to others: who may clear (the commands).

Source: TPM Main r116 Part 3 §6.2, §6.3, §14.3.

Invariants:
- After a clear no secret of the former owner is of use: keys, sessions, saved contexts, wrapped
  blobs (tpmProof is another) and delegations are gone.
- What belongs to the platform stays: the EK, PCRs, NV areas that the owner did not control, the
  audit counter, physical-presence settings, nvLocked.
"""

from __future__ import annotations

from typing import Final

from protocol.constants import ZERO_DIGEST, KeyHandleValue, NvAttribute
from tpm12 import nv
from tpm12.flags import set_flags
from tpm12.state import NO_COUNTER, NvArea
from tpm12.tpm import Tpm

_OWNER_CONTROLLED: Final = int(NvAttribute.OWNERREAD | NvAttribute.OWNERWRITE)


def clear_owner(tpm: Tpm) -> None:
    """Remove the owner and everything that hangs on one (Part 3 §6.2, actions)."""
    _forget_secrets(tpm)
    set_flags(
        tpm,
        disable=True,
        deactivated=True,
        ownership=True,
        read_pubek=True,
        disable_owner_clear=False,
        allow_maintenance=True,
        operator=False,
        maintenance_done=False,
        read_srk_pub=False,
        disable_full_da_logic_info=False,
    )
    permanent = tpm.change_permanent()
    permanent.no_owner_nv_write = 0
    permanent.restrict_delegate = 0
    permanent.ordinal_audit_status = {}
    permanent.counters = {}  # counter_highest stays: a new counter starts above every old one
    for index in [i for i, area in permanent.nv.items() if _goes_with_owner(i, area)]:
        nv.remove(tpm, index)
    _end_everything_open(tpm)


def revoke_trust(tpm: Tpm) -> None:
    """Clear, and remove the EK and what hangs on it (Part 3 §14.3, actions).

    enableRevokeEK stays TRUE, so that a new revocable EK can be made.
    """
    clear_owner(tpm)
    set_flags(tpm, cekp_used=False, nv_locked=False)
    permanent = tpm.change_permanent()
    permanent.endorsement_key = None
    permanent.ek_reset = tpm.random(20)
    renew_daa_secrets(tpm)
    for index in [i for i in permanent.nv if i & nv.D_BIT]:
        nv.remove(tpm, index)


def renew_daa_secrets(tpm: Tpm) -> None:
    """Draw tpmDAASeed, daaProof and daaBlobKey anew: every DAA credential is lost."""
    permanent = tpm.change_permanent()
    permanent.tpm_daa_seed = tpm.random(20)
    permanent.daa_proof = tpm.random(20)
    permanent.daa_blob_key = tpm.random(16)


def renew_owner_secrets(tpm: Tpm) -> None:
    """Draw tpmProof, contextKey and delegateKey anew: whatever they protected is lost."""
    permanent = tpm.change_permanent()
    permanent.tpm_proof = tpm.random(20)
    permanent.context_key = tpm.random(16)
    permanent.delegate_key = tpm.random(16)


def _forget_secrets(tpm: Tpm) -> None:
    # The specification lets the keys be zero or invalid while there is no owner. Fresh random ones
    # make sure that nothing is ever protected by a key that everybody knows.
    renew_owner_secrets(tpm)
    permanent = tpm.change_permanent()
    permanent.owner_auth = None
    permanent.operator_auth = None
    permanent.srk = None
    permanent.owner_evict_keys = {}
    permanent.family_table = {}
    permanent.delegate_table = {}


def _goes_with_owner(nv_index: int, area: NvArea) -> bool:
    attributes = area.public.permission.attributes
    return bool(attributes & _OWNER_CONTROLLED) and not nv_index & nv.D_BIT


def _end_everything_open(tpm: Tpm) -> None:
    """Reset TPM_STANY_DATA, and TPM_STCLEAR_DATA but for the PCRs (Part 3 §6.2, actions 7, 8)."""
    tpm.change_volatile().keys = {}
    stany = tpm.change_stany()
    stany.sessions = {}
    stany.transport_sessions = {}
    stany.transport_exclusive = 0
    stany.context_nonce_session = tpm.random(20)
    stany.context_count = 0
    stany.context_list = {}
    stany.legacy_contexts = {}
    stany.daa_sessions = {}
    stany.audit_digest = ZERO_DIGEST
    stclear = tpm.change_stclear()
    stclear.context_nonce_key = tpm.random(20)
    stclear.count_id = NO_COUNTER
    stclear.owner_reference = int(KeyHandleValue.OWNER)
    stclear.disable_reset_lock = False
    stclear.deferred_physical_presence = 0
    stclear.failed_tries = 0
    stclear.last_failure_us = 0
