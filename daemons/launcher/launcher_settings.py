"""What may be set of launcherd, in etc/vtpm/launcherd.toml."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemons.launcher.supervisor import Limits


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherSettings:
    """Of launcherd."""

    log_level: str = "info"
    control_connections_max: int = 64
    """Programs that talk to the launcher at the same time. One more ends the oldest that waits for
    nothing."""
    control_requests_max: int = 16
    """Requests of one program under way at the same time."""
    control_send_s: float = 5.0
    """How long a program may leave its answers unread, in seconds; then it has left."""
    destroy_drain_s: float = 2.0
    """From SIGTERM to SIGKILL where a domain ends at once (destroy, death of what it needs)."""
    backend_wait_s: float = 20.0
    """How long `create` waits for a backend that nobody has created; the domain goes on waiting."""
    log_mib_max: int = 16
    """A domain's log that is longer when its process starts is put aside, once."""
    supervisor: Limits = field(default_factory=Limits)
    """Start, stop and restart of the domains' processes."""
