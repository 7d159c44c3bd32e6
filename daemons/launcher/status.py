"""What the launcher tells of its domains, for `vtpm list` and `vtpm status`. It only reads."""

from __future__ import annotations

import os

from daemons.launcher.chip import Chip
from daemons.launcher.domain import CHIP_DOMID, Domain
from daemons.launcher.process_states import State
from daemons.launcher.processes import pss_kib_of
from daemons.launcher.stack import Stack
from daemons.launcher.supervisor import Supervisor
from daemons.places import CHIP_NAME, DOMAIN0_NAME
from daemons.registry import Role

Row = dict[str, object]


def list_rows(stack: Stack) -> list[Row]:
    """Give a row for each domain, domain 0 first."""
    return [domain0_row(stack), *(domain_row(domain) for domain in stack.domains.values())]


def domain0_row(stack: Stack) -> Row:
    """Give the row of domain 0: the launcher itself."""
    return {
        "name": DOMAIN0_NAME,
        "domid": 0,
        "label": stack.policy.default_label(Role.DOMAIN0),
        "role": Role.DOMAIN0.value,
        "state": "running",
        "pid": os.getpid(),
        "restarts": 0,
        "last_reason": "",
        "status": "",
        "memory": None,
        "vif": [],
        "vtpms": [],
        "backends": [],
        "warnings": [],
    }


def domain_row(domain: Domain) -> Row:
    """Give the row of one domain."""
    config = domain.config
    return {
        "name": domain.name,
        "domid": domain.domid,
        "label": domain.label,
        "role": domain.role.value,
        "state": domain.shown_state,
        **_life(domain.supervisor if domain.external is None else None),
        "pid": domain.pid,
        "memory": config.memory_mib,
        "vif": [vif.text for vif in config.vifs],
        "vtpms": [
            {"devid": d.devid, "backend": d.backend, "uuid": str(d.uuid)} for d in domain.devices
        ],
        "backends": [device.backend for device in domain.devices],
        "boot_hash": domain.boot_hash,
        "warnings": list(config.warnings),
    }


def status_answer(stack: Stack, chip: Chip) -> Row:
    """Give the health of the whole chain: launcher, chip, and every domain with its backends.

    A tree follows from the backends; who names none that exists hangs on nothing yet. Memory is
    measured here, since it costs a walk through each process's pages.
    """
    launcher = domain0_row(stack)
    launcher["root"] = str(stack.places.root)
    launcher["fork_server_pid"] = stack.spawner.server_pid
    rows = [launcher, _chip_row(chip), *(domain_row(domain) for domain in stack.domains.values())]
    for row in rows:
        pid = row["pid"]
        row["pss_kib"] = pss_kib_of(pid) if isinstance(pid, int) else None
    return {"launcher": rows[0], "chip": rows[1], "domains": rows[2:]}


def _chip_row(chip: Chip) -> Row:
    state = str(chip.supervisor.state)
    if chip.is_powered:
        state = "running"
    elif chip.supervisor.state is State.CREATED:
        state = "off"
    elif chip.supervisor.state is State.RUNNING:
        state = f"starting: {chip.why_not_powered}"
    elif chip.supervisor.reason:
        state = f"{state}: {chip.supervisor.reason}"
    return {
        "name": CHIP_NAME,
        "domid": CHIP_DOMID,
        "role": Role.HWTPM.value,
        "state": state,
        "is_powered": chip.is_powered,
        **_life(chip.supervisor),
        "pid": chip.pid,
    }


def _life(supervisor: Supervisor | None) -> Row:
    if supervisor is None:
        return {
            "restarts": 0,
            "last_reason": "",
            "status": "a process of its own, not started here",
        }
    return {
        "restarts": supervisor.restarts,
        "last_reason": supervisor.last_reason,
        "status": supervisor.status_text,
    }
