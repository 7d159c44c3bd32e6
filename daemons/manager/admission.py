"""Who may be a client of the manager: decided on the registry's word, before a byte is read.

The rules over labels are the stack's (`daemons/policy.py`); what is added here is which of a
domain's devices leads to this manager, and who administers it. The client's UUID is the one in the
registry, never one that the peer names.

Invariants:
- The same check stands before known and unknown vTPMs; nothing is remembered from an earlier one.
- Administration is granted by label in the settings, to nobody by default, and never for being
  first. (Xen gives it to the first vTPM that saves anything.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from daemons.errors import ExitCode, Failure
from daemons.labels import Label, LabelError
from daemons.listeners import PeerCredentials
from daemons.policy import Policy
from daemons.registry import DomainRecord, Registry, VtpmDevice
from daemons.ring_server import RingPeer

BOOT_HASH_BYTES: Final = 20


class NotAdmitted(Failure):
    """A domain connected that is no client of this manager."""

    def __init__(self, domain: str, why: str, next_step: str) -> None:
        super().__init__(
            f"the manager does not serve {domain}",
            why=why,
            next_step=next_step,
            exit_code=ExitCode.NO_PERMISSION,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One connected vTPM, as the registry describes it."""

    connection_id: int
    domain: str
    uuid: UUID
    boot_hash: bytes = bytes(BOOT_HASH_BYTES)
    """SHA-1 of the program the domain was started with; zeros when nobody measured it."""
    is_administrator: bool = False
    """May manage groups and vTPMs, and extend the chip's PCRs."""


class Admission:
    """Takes clients in, or says why not.

    Args:
        manager: Name of the manager's own domain.
        registry: Who is who.
        policy: Whose label may talk to whose.
        administrators: Labels whose holders administer; a star may stand for the user.
    """

    def __init__(
        self, manager: str, registry: Registry, policy: Policy, administrators: tuple[str, ...]
    ) -> None:
        self._manager = manager
        self._registry = registry
        self._policy = policy
        self._administrators = administrators

    def admit(self, credentials: PeerCredentials) -> RingPeer:
        """Decide on a peer.

        Raises:
            UnknownPeer, DamagedRegistry: See `Registry.lookup`.
            NotAdmitted: It has no device of this manager.
            NotAllowed: The policy does not allow it.
        """
        domain = self._registry.lookup(credentials)
        own = self._registry.get(self._manager)
        if own is None:
            raise NotAdmitted(
                domain.name,
                f"the registry has no domain {self._manager}, so nobody knows the manager's label",
                "Start the manager with `vtpm create vtpmmgr.cfg`.",
            )
        device = device_of(domain, self._manager)
        self._policy.admit(domain, own, device)
        return RingPeer(domain=domain, device=device)

    def client(self, peer: RingPeer) -> Client:
        """Describe a peer that was admitted, once its ring is connected.

        Raises:
            NotAdmitted: Its boot hash is none.
            NotAllowed: The device it asked for in the handshake is not this manager's.
        """
        domain, device = peer.domain, peer.device
        if device.backend != self._manager or device not in domain.vtpms:
            raise NotAdmitted(domain.name, f"device {device.devid} is not ours", "Use another.")
        return Client(
            connection_id=peer.connection_id,
            domain=domain.name,
            uuid=device.uuid,
            boot_hash=_boot_hash(domain),
            is_administrator=is_listed(Label.parse(domain.label), self._administrators),
        )

    def is_attached(self, uuid: UUID) -> bool:
        """Whether a domain, with a process or without, has this vTPM as a device of this manager.

        Raises:
            DamagedRegistry: A record cannot be believed, and might be that domain's.
        """
        return any(
            device.uuid == uuid and device.backend == self._manager
            for domain in self._registry.all()
            for device in domain.vtpms
        )


def is_listed(label: Label, patterns: tuple[str, ...]) -> bool:
    """Whether a label is one of the patterns, exactly or with a star in place of its user.

    Only the user: `*:vm_r:vtpm_t` never means another role or type, or a label with a range.
    """
    text = str(label)
    return text in patterns or "*" + text[len(label.user) :] in patterns


def label_patterns(text: str) -> tuple[str, ...]:
    """Read the setting `administrators`: labels with commas between them, or nothing.

    Raises:
        Failure: One is no label.
    """
    patterns = tuple(part.strip() for part in text.split(",") if part.strip())
    for pattern in patterns:
        try:
            Label.parse("u" + pattern[1:] if pattern.startswith("*:") else pattern)
        except LabelError as error:
            raise Failure(
                "the manager's setting administrators is refused",
                why=str(error),
                next_step='Write labels such as "system_u:system_r:vtpm_t" or "*:vm_r:vtpm_t".',
                exit_code=ExitCode.CONFIGURATION,
            ) from error
    return patterns


def device_of(domain: DomainRecord, manager: str) -> VtpmDevice:
    """Find the first device by which a domain is a client of this manager.

    Raises:
        NotAdmitted: It has none.
    """
    for device in domain.vtpms:
        if device.backend == manager:
            return device
    raise NotAdmitted(
        domain.name,
        f"it has no vtpm device with backend={manager}",
        f'A vTPM\'s configuration needs vtpm=["backend={manager},uuid=..."].',
    )


def _boot_hash(domain: DomainRecord) -> bytes:
    try:
        boot_hash = bytes.fromhex(domain.boot_hash) or bytes(BOOT_HASH_BYTES)
    except ValueError:
        boot_hash = b""
    if len(boot_hash) != BOOT_HASH_BYTES:
        raise NotAdmitted(domain.name, "its boot hash is no SHA-1", "Create the domain again.")
    return boot_hash
