"""vtpmd: one vTPM. Its state lies encrypted in its image, the key lies with the manager.

Start: connect to the manager (waiting until it is there), read the image, start the TPM, serve the
guest's ring. A TPM is made only for a blank image and a UUID unknown to the manager; its
endorsement key is made with it, as a maker does. A process that finds the journal of a killed one
goes on where that was: nothing is started, and the guest notices nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final, TypeVar

from daemons import log_levels, logs, policy, settings
from daemons.domain_options import DomainOptions, parse_domain_options
from daemons.durable_tpm import DurableTpm
from daemons.errors import ExitCode, Failure
from daemons.faults.hooks import Hooks, hooks_of
from daemons.journal import missing
from daemons.lean_structlog import structlog
from daemons.listeners import Kind, PeerCredentials, activated_or_listen
from daemons.places import Places
from daemons.registry import DomainRecord, Registry
from daemons.ring_client import RingClient
from daemons.ring_server import RingPeer, RingSettings, serve_rings
from daemons.sd_notify import NO_COMMAND, Notifier
from daemons.self_test import pass_self_test
from daemons.service import run_daemon
from daemons.threads import run_in_thread
from daemons.volatile_memory import VolatileMemory
from daemons.vtpm.backend import VtpmBackend
from daemons.vtpm.command_set import command_set
from daemons.vtpm.image import VtpmImage
from daemons.vtpm.manager_link import ManagerLink
from daemons.vtpm.passed_on import finish_passing_on
from daemons.vtpm.remembered_responses import remembered_responses
from daemons.vtpm.starting import reset, start
from daemons.xl.domain_arguments import VtpmArguments
from daemons.xl.domain_config import STATE_DISK, DomainConfig, read_domain
from tpm12.profile import VTPM

PROGRAM: Final = "vtpmd"
SOCKET_NAME: Final = "ring"
"""What the socket is called when systemd passes it."""
MANAGER_WAIT_S: Final = 24 * 3600.0
"""How long a vTPM waits for its manager; whoever started it sees what it waits for."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class VtpmdSettings:
    """What may be set, in etc/vtpm/vtpmd.toml."""

    rings: RingSettings = field(default_factory=RingSettings)
    reconnect_s: float = 60.0
    """How long a request waits for a manager that went away."""


def main(argv: list[str] | None = None) -> int:
    """Run vtpmd; the exit status is one of `ExitCode`."""
    description = "One vTPM of the vTPM stack."
    options = parse_domain_options(argv, program=PROGRAM, description=description, has_journal=True)
    return run_daemon(PROGRAM, partial(_run, options))


async def _run(options: DomainOptions) -> None:
    places = Places(options.root)
    config = read_domain(options.config)
    arguments = config.arguments
    if not isinstance(arguments, VtpmArguments):
        raise _misconfigured(options, f"its config file describes a {config.role}, not a vTPM")
    logs.configure(PROGRAM, options.domain, arguments.loglevel)
    log_levels.follow(places.log_levels, options.domain, arguments.loglevel)
    for word in arguments.unknown:
        structlog.get_logger().info("an argument in extra= is not known and ignored", word=word)
    registry = Registry(places.registry)
    own = registry.get(options.domain)
    if own is None or not own.vtpms:
        raise _misconfigured(options, "the registry has no such domain with a manager in vtpm=")
    chosen = settings.load(places.settings(PROGRAM), VtpmdSettings)
    notifier = Notifier.from_environment(os.environ)
    hooks = hooks_of(places, options.domain)
    ring = RingClient(
        places.domain(own.vtpms[0].backend).ring_socket,
        handle=own.vtpms[0].devid,
        reconnect_s=chosen.reconnect_s,
        on_status=notifier.status,
    )
    with ring:
        await _in_thread(partial(ring.connect, MANAGER_WAIT_S))
        manager = ManagerLink(ring)
        open_tpm = partial(_open_tpm, places, config, own, manager, notifier, hooks=hooks)
        tpm = await _in_thread(partial(open_tpm, must_go_on=options.must_go_on))
        await _in_thread(partial(finish_passing_on, tpm, manager))
        await _in_thread(partial(start, tpm, arguments, manager))
        backend = VtpmBackend(
            tpm,
            manager,
            start=partial(reset, tpm, arguments, manager),
            locality_rules=arguments.locality_rules,
        )
        ring_socket = places.domain(own.name).ring_socket
        listener = activated_or_listen(SOCKET_NAME, ring_socket, Kind.SEQPACKET)
        notifier.status("serving")
        rules = policy.load(places.policy)
        admit = partial(_admit, registry, rules, own.name)
        await serve_rings(
            listener,
            backend,
            admit,
            responses=remembered_responses(tpm),
            settings=chosen.rings,
            is_alive=partial(tpm.execute, NO_COMMAND, 0),
            wrap_socket=hooks.ring_socket,
        )


async def _in_thread(call: Callable[[], T]) -> T:
    """Run slow blocking work; a signal ends the wait, and the process with it."""
    return await run_in_thread(call, abandon_on_cancel=True)


def _open_tpm(  # noqa: PLR0913 - one caller
    places: Places,
    config: DomainConfig,
    own: DomainRecord,
    manager: ManagerLink,
    notifier: Notifier,
    *,
    hooks: Hooks,
    must_go_on: bool,
) -> DurableTpm:
    """Open the image and start the TPM in it, or make a new one."""
    disk = config.disk(STATE_DISK)
    if disk is None or not disk.target or not disk.is_writable:
        raise Failure(
            f"{own.name} cannot start",
            why=f"its config file has no writable disk {STATE_DISK}",
            next_step=f'Add disk=["file:/images/NAME.img,{STATE_DISK},w"].',
            exit_code=ExitCode.CONFIGURATION,
        )
    notifier.status("opening the image")
    image = VtpmImage(hooks.open_disk(places.images(disk.target)), own.vtpms[0].uuid, manager)
    memory = VolatileMemory(places.domain(own.name).journal, own.name)
    arguments = config.arguments
    has_maintenance = isinstance(arguments, VtpmArguments) and arguments.has_maintenance_commands
    commands = command_set(has_maintenance_commands=has_maintenance)
    tpm = DurableTpm(
        image,
        profile=VTPM,
        commands=commands,
        clock=hooks.clock(),
        memory=memory,
        is_nv_locked=True,
    )
    if tpm.is_resumed:
        structlog.get_logger().info("went on where a killed process was")
    elif must_go_on:
        raise missing(places.domain(own.name).journal)
    if tpm.is_new:
        tpm.power_on_and_start()
        notifier.status("making a new TPM and its endorsement key")
        tpm.make_endorsement_key()
        structlog.get_logger().info("made a new TPM", uuid=str(own.vtpms[0].uuid))
    notifier.status("testing itself")
    pass_self_test(tpm.state.permanent, VTPM, commands)
    return tpm


def _admit(
    registry: Registry, rules: policy.Policy, name: str, credentials: PeerCredentials
) -> RingPeer:
    """Who may be a frontend: a domain with a vtpm device of ours, as the policy allows.

    Raises:
        UnknownPeer, NotAllowed: Failures that say why not.
    """
    frontend, own = registry.lookup(credentials), registry.get(name)
    if own is None:
        raise Failure(
            f"{name} takes no frontends",
            why="the registry no longer has it",
            next_step=f"Start it again: vtpm create {name}.cfg.",
            exit_code=ExitCode.UNAVAILABLE,
        )
    device = next((d for d in frontend.vtpms if d.backend == name), None)
    if device is None:
        raise Failure(
            f"{frontend.name} may not use {name}",
            why="it has no vtpm device of that backend",
            next_step=f"Give it one: vtpm vtpm-attach {frontend.name} backend={name}.",
            exit_code=ExitCode.NO_PERMISSION,
        )
    rules.admit(frontend, own, device)
    return RingPeer(domain=frontend, device=device)


def _misconfigured(options: DomainOptions, why: str) -> Failure:
    return Failure(
        f"vTPM {options.domain} cannot start",
        why=why,
        next_step=f"Look at {options.config}; a vTPM is started with `vtpm create`.",
        exit_code=ExitCode.CONFIGURATION,
    )
