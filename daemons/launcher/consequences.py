"""What the start of one domain's process asks of others, in this version.

A vTPM, and the chip, keep their volatile state (PCRs, sessions, loaded keys) in their process
alone, so their death loses it. A guest that went on would then have clean PCRs, which it could fill
with any history it likes. Hence the rules:

| before a process of this role starts | this is done | shown as the reason |
|---|---|---|
| the chip | every domain is stopped, and started again in order | the platform lost its power |
| a vTPM | its guests are stopped, and boot again after it | its vTPM NAME was started anew |
| a guest | a vTPM that an earlier guest has used is started anew | reset for the start of NAME |

A process that is started again finds the journal of the one before it, which may have been killed:
the manager learns from it which handles of the chip are its own. It is taken away when nothing in
it can be true any more: after the platform lost its power, and for a vTPM that is reset.

This module is the only place that knows them. A vTPM or chip that resumes from a journal needs the
first two no longer.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemons.launcher.domain import STOP_ORDER, Domain
from daemons.launcher.stack import Stack


async def before_chip_starts(stack: Stack, reason: str) -> None:
    """Let the whole platform fall: no domain outlives the power of the chip.

    Args:
        stack: Of the launcher.
        reason: How the chip ended.
    """
    for role in STOP_ORDER:
        fallen = [domain for domain in stack.of_role(role) if domain.has_process]
        await _restart(stack, fallen, f"the platform lost its power ({reason})")


async def before_vtpm_starts(stack: Stack, vtpm: Domain) -> None:
    """Stop the guests of a vTPM: none may see its PCRs clean while it goes on."""
    vtpm.served = ""
    guests = [guest for guest in stack.users_of(vtpm.name) if guest.has_process]
    await _restart(stack, guests, f"its vTPM {vtpm.name} was started anew")


def is_fresh_for(guest: Domain, vtpm: Domain) -> bool:
    """Tell whether a vTPM may serve the start of a guest; if not, it is started anew first.

    Returns:
        True when nothing has used it since its own start. False starts it anew at once.
    """
    if not vtpm.is_running:
        return False
    if not vtpm.served:
        return True
    forget_journal(vtpm)
    vtpm.supervisor.restart(f"reset for the start of {guest.name}")
    return False


def forget_journal(domain: Domain) -> None:
    """Let the next process of a domain find nothing of the one before it."""
    domain.power_cycle = None


def keeps_journal(domain: Domain, power_cycle: int) -> bool:
    """Tell whether the next process of a domain goes on where the one before it has ended."""
    return domain.power_cycle == power_cycle


async def _restart(stack: Stack, domains: Iterable[Domain], reason: str) -> None:
    stopped = list(domains)
    for domain in stopped:
        if domain.external is not None:
            # It cannot be rebooted from here, so it loses its TPM instead.
            stack.domains.pop(domain.name, None)
            stack.registry.remove(domain.name)
            domain.external = None
        else:
            domain.supervisor.restart(reason, drain_s=stack.settings.destroy_drain_s)
    supervised = [domain for domain in stopped if domain.name in stack.domains]
    await stack.until(lambda: not any(domain.has_process for domain in supervised))
