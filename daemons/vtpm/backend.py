"""The vTPM behind its ring: which commands it runs itself, which it passes on, and for whom.

Per packet, in order (Xen's vtpm-stubdom, with its weaknesses mended): the locality that the
frontend claims must be one that its label may claim; a manager request (tag 0x01C2, or 0x01C1 as
the plain command 0x00C1) goes to the manager; the rest is the TPM's.

A guest that was started anew (another domid), or is another one than before, finds its vTPM reset
with it: TPM_Init and TPM_Startup, as a machine's reset line does it. A guest that only opens its
device again finds the TPM as it left it; that is how a measuring loader hands over to the kernel,
and how a guest goes on with a vTPM that was killed and came back.

Invariants:
- A guest can never reach SaveHashKey or LoadHashKey.
- Which boot of the guest this is says the registry, never the guest.
- One machine at a time: while a guest is connected, no other is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from daemons.durable_tpm import DurableTpm
from daemons.errors import Failure, NotNow
from daemons.lean_structlog import structlog
from daemons.policy import LocalityRule, claimable_localities
from daemons.ring_client import RingLost
from daemons.ring_server import Refused, RingPeer
from daemons.vtpm.manager_link import ManagerLink, changes_nothing
from daemons.vtpm.passed_on import PassedOn, pass_on
from daemons.vtpm.remembered_responses import note
from protocol.constants import LOCALITY_MAX, Tag
from protocol.manager_messages import ManagerTag
from protocol.return_codes import ReturnCode
from tpm12.engine import error_response

_TO_MANAGER: Final = ManagerTag.VTPM_TAG_REQ2.to_bytes(2, "big")
_TO_HARDWARE: Final = ManagerTag.VTPM_TAG_REQ.to_bytes(2, "big")
_PLAIN: Final = Tag.RQU_COMMAND.to_bytes(2, "big")
_SERVED: Final = "served"
"""Note: which boot of which guest this TPM's volatile state belongs to."""


class VtpmBackend:
    """One vTPM for all frontends of its ring socket.

    Args:
        tpm: The TPM.
        manager: Where requests for the manager go.
        start: Powers the TPM on and starts it, as when the vTPM began.
        locality_rules: From `locality=` arguments; without any, only locality 0 may be claimed.
    """

    def __init__(
        self,
        tpm: DurableTpm,
        manager: ManagerLink,
        *,
        start: Callable[[], None],
        locality_rules: Sequence[LocalityRule] = (),
    ) -> None:
        self._tpm = tpm
        self._manager = manager
        self._start = start
        self._locality_rules = tuple(locality_rules)
        self._localities: dict[int, frozenset[int]] = {}
        self._connected: dict[int, str] = {}
        self._served = tpm.notes.get(_SERVED)

    def attached(self, peer: RingPeer) -> None:
        """Take a frontend; reset the TPM when its machine was reset.

        Raises:
            Refused: The TPM does not start.
            NotNow: The manager is away, without which it does not.
        """
        name = peer.domain.name
        others = {other for other in self._connected.values() if other != name}
        if others:
            raise Refused(f"this is the TPM of {others.pop()}, and a vTPM is one machine's")
        boot = f"{name} {peer.domain.domid}".encode()
        served = self._served
        if served is not None and served != boot:
            structlog.get_logger().info("the guest was started anew: resetting its TPM", guest=name)
            try:
                self._start()
            except RingLost as lost:  # the manager, which has PCRs to begin with: it comes back
                raise NotNow(
                    f"{name} is not taken for now",
                    why=f"its TPM cannot be started anew: {lost.what}: {lost.why}",
                    next_step=lost.next_step,
                    exit_code=lost.exit_code,
                ) from lost
            except Failure as failure:
                raise Refused(f"{failure.what}: {failure.why}") from failure
        if served != boot:
            self._served = boot
            # After the reset: a vTPM that is killed in between is reset again by the same guest.
            self._tpm.remember({_SERVED: boot})
        self._connected[peer.connection_id] = name
        allowed = claimable_localities(peer.domain.label, self._locality_rules)
        self._localities[peer.connection_id] = allowed

    def detached(self, peer: RingPeer) -> None:
        """Forget a connection. The TPM stays as it is."""
        self._localities.pop(peer.connection_id, None)
        self._connected.pop(peer.connection_id, None)

    def execute(self, peer: RingPeer, request: bytes, locality: int, sequence: int) -> bytes:
        """Run or pass on one command and give its response."""
        if locality not in self._localities[peer.connection_id] or locality > LOCALITY_MAX:
            return error_response(ReturnCode.FAIL)
        tag = request[:2]
        if tag == _TO_MANAGER:
            return self._pass_on(PassedOn(peer.ring_id, sequence, request))
        if tag == _TO_HARDWARE:
            return self._pass_on(PassedOn(peer.ring_id, sequence, _PLAIN + request[2:]))
        ring_id = peer.ring_id
        return self._tpm.execute(
            request, locality, lambda response: note(ring_id, sequence, response)
        )

    def _pass_on(self, passed: PassedOn) -> bytes:
        if not changes_nothing(passed.request):
            return pass_on(self._tpm, self._manager, passed)
        try:
            return self._manager.pass_on(passed.request)
        except Failure as failure:
            structlog.get_logger().error(
                "a request to the manager came back without an answer", why=str(failure)
            )
            return error_response(ReturnCode.IOERROR)
