"""What the start of one domain's process asks of others.

A crash is not a power cycle: the chip and a vTPM that are killed go on from their journals, and who
uses them sees a pause. There are two cases in which there is nothing to go on from, and then nobody
may go on with what is gone: a guest that did would have clean PCRs, which it could fill with any
history it likes.

| before a process of this role starts | this is done | shown as the reason |
|---|---|---|
| the chip without a journal | all domains stop, and start again | the platform lost its power |
| a vTPM without a journal | its guests stop, and boot after it | its vTPM NAME was started anew |

A journal is given up when a domain is rebooted or made anew, and when the platform's power goes.
That a vTPM is reset for each boot of its guest is no matter of processes: it sees the guest's new
domid, and resets itself (`daemons/vtpm/backend.py`).

This module is the only place that knows these rules.
"""

from __future__ import annotations

from collections.abc import Iterable

from daemons.errors import Failure
from daemons.launcher.domain import STOP_ORDER, Domain
from daemons.launcher.stack import Stack
from daemons.launcher.wishes import note_restart
from daemons.lean_structlog import structlog

log = structlog.get_logger()


async def before_power_on(stack: Stack, reason: str) -> None:
    """Let the whole platform fall: no domain outlives the power of the chip.

    Args:
        stack: Of the launcher.
        reason: How the chip ended.
    """
    for role in STOP_ORDER:
        fallen = [domain for domain in stack.of_role(role) if domain.has_process]
        await _restart(stack, fallen, f"the platform lost its power ({reason})")


async def before_new_volatile_state(stack: Stack, vtpm: Domain) -> None:
    """Stop the guests of a vTPM: none may see its PCRs clean while it goes on."""
    guests = [guest for guest in stack.users_of(vtpm.name) if guest.has_process]
    await _restart(stack, guests, f"its vTPM {vtpm.name} was started anew")


def forget_journal(domain: Domain) -> None:
    """Let the next process of a domain find nothing of the one before it."""
    domain.power_cycle = None


def keeps_journal(domain: Domain, power_cycle: int) -> bool:
    """Tell whether the next process of a domain goes on where the one before it has ended."""
    return domain.power_cycle == power_cycle


def must_go_on(domain: Domain, power_cycle: int) -> bool:
    """Tell whether it would be wrong to start a domain without its journal: somebody has used it.

    Who takes the journal of a killed vTPM away must not get clean PCRs for that.
    """
    return (
        keeps_journal(domain, power_cycle) and domain.supervisor.times_ready > domain.ready_before
    )


def _note_restart(stack: Stack, domain: Domain) -> None:
    """For a launcher that finds it dead: this is no crash. Without room it is taken for one."""
    try:
        note_restart(stack.places, domain.name, domain.config.on_crash)
    except Failure as failure:
        log.warning(failure.what, why=failure.why, domain=domain.name)


async def _restart(stack: Stack, domains: Iterable[Domain], reason: str) -> None:
    stopped = list(domains)
    for domain in stopped:
        if domain.external is not None:
            # It cannot be rebooted from here, so it loses its TPM instead.
            stack.domains.pop(domain.name, None)
            stack.registry.remove(domain.name)
            domain.external = None
        else:
            _note_restart(stack, domain)
            domain.supervisor.restart(reason, drain_s=stack.settings.destroy_drain_s)
    supervised = [domain for domain in stopped if domain.name in stack.domains]
    await stack.until(lambda: not any(domain.has_process for domain in supervised))
