"""The vTPM behind its ring: which commands it runs itself, which it passes on, and for whom.

Per packet, in order (Xen's vtpm-stubdom, with its weaknesses mended): the locality that the
frontend claims must be one that its label may claim; a manager request (tag 0x01C2, or 0x01C1 as
the plain command 0x00C1) goes to the manager; maintenance commands need `maintcmds=1`; the rest is
the TPM's.

A guest that was started anew (another domid) finds its vTPM reset with it: TPM_Init and
TPM_Startup, as a machine's reset line does it. A guest that only opens its device again finds the
TPM as it left it; that is how a measuring loader hands over to the kernel.

Invariants:
- A guest can never reach SaveHashKey or LoadHashKey.
- Which boot of the guest this is says the registry, never the guest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import structlog

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure
from daemons.policy import LocalityRule, claimable_localities
from daemons.ring_server import Refused, RingPeer
from daemons.vtpm.manager_link import ManagerLink
from protocol.constants import LOCALITY_MAX, Ordinal, Tag
from protocol.manager_messages import ManagerTag
from protocol.return_codes import ReturnCode
from tpm12.engine import error_response

_MAINTENANCE: Final = frozenset(
    ordinal.to_bytes(4, "big")
    for ordinal in (
        Ordinal.CREATE_MAINTENANCE_ARCHIVE,
        Ordinal.LOAD_MAINTENANCE_ARCHIVE,
        Ordinal.KILL_MAINTENANCE_FEATURE,
        Ordinal.LOAD_MANU_MAINT_PUB,
        Ordinal.READ_MANU_MAINT_PUB,
    )
)
_TO_MANAGER: Final = ManagerTag.VTPM_TAG_REQ2.to_bytes(2, "big")
_TO_HARDWARE: Final = ManagerTag.VTPM_TAG_REQ.to_bytes(2, "big")
_PLAIN: Final = Tag.RQU_COMMAND.to_bytes(2, "big")


class VtpmBackend:
    """One vTPM for all frontends of its ring socket.

    Args:
        tpm: The TPM.
        manager: Where requests for the manager go.
        start: Powers the TPM on and starts it, as when the vTPM began.
        locality_rules: From `locality=` arguments; without any, only locality 0 may be claimed.
        has_maintenance_commands: From `maintcmds=`.
    """

    def __init__(
        self,
        tpm: DurableTpm,
        manager: ManagerLink,
        *,
        start: Callable[[], None],
        locality_rules: Sequence[LocalityRule] = (),
        has_maintenance_commands: bool = False,
    ) -> None:
        self._tpm = tpm
        self._manager = manager
        self._start = start
        self._locality_rules = tuple(locality_rules)
        self._has_maintenance_commands = has_maintenance_commands
        self._localities: dict[int, frozenset[int]] = {}
        self._domids: dict[str, int] = {}

    def attached(self, peer: RingPeer) -> None:
        """Take a frontend; reset the TPM when its machine was reset.

        Raises:
            Refused: The TPM does not start.
        """
        name, domid = peer.domain.name, peer.domain.domid
        known = self._domids.get(name)
        if known is not None and known != domid:
            structlog.get_logger().info("the guest was started anew: resetting its TPM", guest=name)
            try:
                self._start()
            except Failure as failure:
                raise Refused(f"{failure.what}: {failure.why}") from failure
        self._domids[name] = domid
        allowed = claimable_localities(peer.domain.label, self._locality_rules)
        self._localities[peer.connection_id] = allowed

    def detached(self, peer: RingPeer) -> None:
        """Forget a connection. The TPM stays as it is."""
        self._localities.pop(peer.connection_id, None)

    def execute(self, peer: RingPeer, request: bytes, locality: int, sequence: int) -> bytes:
        """Run or pass on one command and give its response."""
        del sequence  # repeats were answered before they come here
        if locality not in self._localities[peer.connection_id] or locality > LOCALITY_MAX:
            return error_response(ReturnCode.FAIL)
        tag = request[:2]
        if tag == _TO_MANAGER:
            return self._pass_on(request)
        if tag == _TO_HARDWARE:
            return self._pass_on(_PLAIN + request[2:])
        if request[6:10] in _MAINTENANCE and not self._has_maintenance_commands:
            return error_response(ReturnCode.BAD_ORDINAL)
        return self._tpm.execute(request, locality)

    def _pass_on(self, request: bytes) -> bytes:
        try:
            return self._manager.pass_on(request)
        except Failure as failure:
            structlog.get_logger().error(
                "a request to the manager came back without an answer", why=str(failure)
            )
            return error_response(ReturnCode.IOERROR)
