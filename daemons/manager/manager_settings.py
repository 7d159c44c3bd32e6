"""What may be set of vtpmmgrd, in etc/vtpm/vtpmmgrd.toml."""

from __future__ import annotations

from dataclasses import dataclass, field

from daemons.ring_server import RingSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmmgrdSettings:
    """Of vtpmmgrd."""

    log_level: str = "info"
    administrators: str = ""
    """Labels of vTPMs whose guests may administer the manager, with commas; `*` may be the user."""
    seal_pcrs: str = "0-7,17-19"
    """PCRs of the chip that must be as they were when the manager's key was sealed."""
    key_generation: int = 1
    """A higher number than before gives the image a new key at the next start."""
    abandoned_anchor: str = ""
    """The NV area of the chip ("0x00015000") whose image is given up, with all its vTPMs."""
    rings: RingSettings = field(default_factory=RingSettings)
