"""The domains of a platform: create, destroy, shutdown, reboot, pause, unpause, as xl means them.

Each operation is done when it returns, not begun: `create` returns a domain that is ready (or
paused, if so asked), `shutdown` and `destroy` leave nothing of it behind.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from functools import partial

import structlog
import trio

from daemons.errors import ExitCode, Failure
from daemons.launcher.chip import Chip
from daemons.launcher.domain import STOP_ORDER, Domain
from daemons.launcher.launching import (
    BACKEND_ROLES,
    check_disks,
    launch_domain,
    waits_for_somebody,
)
from daemons.launcher.processes import is_alive
from daemons.launcher.stack import DOMAINS_MAX, Stack
from daemons.launcher.supervisor import State, Supervisor
from daemons.listeners import start_time_of
from daemons.places import DOMAIN0_NAME, Places
from daemons.registry import Role
from daemons.xl.domain_config import DomainConfig, parse_domain

Progress = Callable[[str], Awaitable[None]]

log = structlog.get_logger()


class Domains:
    """Makes and ends domains.

    Args:
        stack: Of the launcher.
        chip: What everything stands on.
    """

    def __init__(self, stack: Stack, chip: Chip) -> None:
        self._stack = stack
        self._chip = chip
        self._is_stopping = False

    # -- create ----------------------------------------------------------------------------------

    async def create(
        self, progress: Progress, config_text: str, path: str, *, paused: bool = False
    ) -> Domain:
        """Create a domain, and return when it is ready.

        Args:
            progress: Told what it waits for.
            config_text: Its xl config file.
            path: Where the file is, for messages.
            paused: Make it, but do not start it before `unpause`.

        Raises:
            Failure: The config is wrong, an image or a backend is missing, or the domain cannot
                run. A domain that failed after it was made stays, with its reason, until it is
                destroyed or created again.
        """
        config = parse_domain(config_text, path)
        if config.role is Role.MANAGER and not paused:
            await self._chip.power_on(progress)
        await self._make_room(config.name)
        domain = self._new_domain(config, config_text, path)
        check_disks(self._stack, domain)
        supervisor = Supervisor(
            config.name,
            partial(launch_domain, self._stack, self._chip, domain),
            self._stack.settings.supervisor,
            self._stack.changes,
        )
        domain.supervisor = supervisor
        self._stack.domains[config.name] = domain
        for warning in config.warnings:
            log.warning("config", domain=config.name, warning=warning)
        self._stack.registry.put(domain.record(None, None))
        self._stack.changes.announce()
        if not paused:
            self._stack.nursery.start_soon(supervisor.run)
            await self._until_ready(progress, domain)
        return domain

    async def attach_external(self, config_text: str, pid: int) -> Domain:
        """Let a process that was not started here be a guest: for measurements and tests.

        Args:
            config_text: The guest's config; its disks are not looked at.
            pid: Of a process of this user.

        Raises:
            Failure: The config is not a guest's, a backend is missing or taken, or there is no such
                process.
        """
        config = parse_domain(config_text, "the external guest's config")
        start_time = start_time_of(pid)
        if start_time is None:
            raise _cannot(f"attach process {pid} as {config.name}", "there is no such process")
        if os.stat(f"/proc/{pid}").st_uid != os.geteuid():  # noqa: PTH116 - one field of it
            raise _cannot(
                f"attach process {pid} as {config.name}",
                "it belongs to another user",
                exit_code=ExitCode.NO_PERMISSION,
            )
        if config.role is not Role.GUEST:
            raise _cannot(f"attach process {pid} as {config.name}", "its config is not a guest's")
        await self._make_room(config.name)
        domain = self._new_domain(config, config_text, "")
        for device in domain.devices:
            backend = self._stack.domains[device.backend]
            if not backend.is_running:
                why = f"its vTPM {backend.name} is {backend.shown_state}"
                raise _cannot(f"attach process {pid} as {config.name}", why)
            # No restart as for a guest's boot: the caller boots nothing, and wants the vTPM as it
            # stands.
            backend.served = config.name
        domain.external = (pid, start_time)
        self._stack.domains[config.name] = domain
        self._stack.registry.put(domain.record(pid, start_time))
        self._stack.nursery.start_soon(self._forget_when_gone, domain)
        self._stack.changes.announce()
        return domain

    def _new_domain(self, config: DomainConfig, config_text: str, path: str) -> Domain:
        domain = Domain(
            config=config,
            config_text=config_text,
            config_path=path,
            domid=self._stack.new_domid(),
            label=config.label or self._stack.policy.default_label(config.role),
            disks=config.disks,
        )
        managers = self._stack.of_role(Role.MANAGER)
        if config.role is Role.MANAGER and managers:
            raise _cannot(
                f"create {config.name}",
                f"the platform has its manager: {managers[0].name}",
                f"To replace it: vtpm destroy {managers[0].name}",
            )
        for spec in config.vtpms:
            backend = self.backend_for(domain, spec.backend)
            domain.attach(backend, spec.uuid)
        return domain

    def backend_for(self, domain: Domain, backend: str) -> str:
        """Check that a backend can serve a domain, and give its name.

        Args:
            domain: The frontend.
            backend: Name or domid.

        Raises:
            Failure: It does not exist, has another role, or serves another guest. Only a vTPM may
                be made before its
                manager: it waits.
        """
        what = f"connect {domain.name} to backend {backend}"
        wanted = BACKEND_ROLES.get(domain.role)
        if wanted is None:
            raise _cannot(what, f"{domain.name} is the manager, which uses the hardware TPM")
        if backend in {"0", DOMAIN0_NAME}:
            raise _cannot(
                what,
                "domain 0 serves no TPM here",
                f"Name the {wanted.value} with backend=NAME",
            )
        found = self._stack.domains.get(backend)
        if found is None and backend.isdecimal():
            found = self._stack.find(backend)
        if found is None:
            if domain.role is Role.VTPM:
                return backend
            raise _cannot(
                what,
                f"there is no domain {backend}",
                f"Create it first: vtpm create {backend}.cfg",
                ExitCode.UNAVAILABLE,
            )
        if found.role is not wanted:
            why = f"{found.name} is a {found.role.value}, not a {wanted.value}"
            raise _cannot(what, why, f"Name the {wanted.value} with backend=NAME")
        if domain.role is Role.GUEST:
            others = [o.name for o in self._stack.users_of(found.name) if o.name != domain.name]
            if others:
                raise _cannot(
                    what,
                    f"it is the TPM of {others[0]}; a vTPM is one machine's",
                    f"Give {domain.name} a vTPM of its own, or first: vtpm destroy {others[0]}",
                    ExitCode.UNAVAILABLE,
                )
        return found.name

    async def _make_room(self, name: str) -> None:
        """Let a new domain take the place of one that has failed, and of no other."""
        if self._is_stopping:
            raise _cannot(f"create {name}", "the stack is stopping", "vtpm up starts it again")
        old = self._stack.domains.get(name)
        if old is not None:
            if old.external is not None or old.supervisor.state is not State.FAILED:
                raise _cannot(
                    f"create {name}",
                    f"a domain of this name exists (domid {old.domid}, {old.shown_state})",
                    f"To make it anew: vtpm destroy {name}",
                )
            await self._end(old, drain_s=0)
        if len(self._stack.domains) >= DOMAINS_MAX:
            raise _cannot(f"create {name}", f"there are {DOMAINS_MAX} domains already")

    async def _until_ready(self, progress: Progress, domain: Domain) -> None:
        """Wait until a domain that was just started runs.

        Raises:
            Failure: It failed, was ended meanwhile, or waits for something that only a person can
                bring.
        """
        stack, supervisor = self._stack, domain.supervisor
        patience_until = trio.current_time() + stack.settings.backend_wait_s
        told = ""
        while supervisor.state not in {State.RUNNING, State.PAUSED}:
            if supervisor.state is State.FAILED and supervisor.failure is not None:
                raise supervisor.failure
            if domain.is_leaving or supervisor.state is State.ENDED:
                why = "it was ended while it started"
                raise _cannot(f"start {domain.name}", why, f"vtpm create {domain.config_path}")
            is_waiting = waits_for_somebody(stack, domain)
            if not is_waiting:
                patience_until = trio.current_time() + stack.settings.backend_wait_s
            elif trio.current_time() >= patience_until:
                raise Failure(
                    f"{domain.name} is created, but does not run yet",
                    why=f"it {supervisor.reason}",
                    next_step="It starts by itself when that is there; `vtpm status` shows it",
                    exit_code=ExitCode.UNAVAILABLE,
                )
            shown = supervisor.status_text or supervisor.reason or "starting"
            if shown != told:
                told = shown
                await progress(shown)
                continue
            with trio.move_on_at(patience_until):
                await stack.changes.next()

    # -- the other operations --------------------------------------------------------------------

    async def shutdown(self, progress: Progress, domain: str) -> None:
        """Ask a domain to end, wait for it, and remove what it leaves."""
        found = self._stack.find(domain)
        await progress(f"stopping {found.name}")
        await self._end(found, drain_s=self._stack.settings.supervisor.drain_s)

    async def destroy(self, progress: Progress, domain: str) -> None:
        """End a domain at once, and remove what it leaves."""
        found = self._stack.find(domain)
        await progress(f"ending {found.name}")
        await self._end(found, drain_s=self._stack.settings.destroy_drain_s)

    async def reboot(self, progress: Progress, domain: str) -> Domain:
        """Stop a domain and start it again, also a failed one; a guest's vTPM is reset with it."""
        found = self._supervised(domain)
        if found.supervisor.state is State.CREATED:
            raise _cannot(f"reboot {found.name}", "it is paused and has not been started")
        starts = found.supervisor.starts
        found.supervisor.restart("reboot was asked for")
        await progress(f"rebooting {found.name}")
        await self._stack.until(
            lambda: (
                found.supervisor.starts > starts
                or found.supervisor.failure is not None
                or found.supervisor.state is State.ENDED
                or waits_for_somebody(self._stack, found)
            )
        )
        await self._until_ready(progress, found)
        return found

    async def pause(self, _progress: Progress, domain: str) -> None:
        """Stop a domain where it stands."""
        found = self._supervised(domain)
        if not found.supervisor.pause() and found.supervisor.state not in {
            State.PAUSED,
            State.CREATED,
        }:
            raise _cannot(f"pause {found.name}", f"it is {found.shown_state}")

    async def unpause(self, progress: Progress, domain: str) -> None:
        """Let a paused domain go on, or start one that was created paused."""
        found = self._supervised(domain)
        supervisor = found.supervisor
        if supervisor.state is State.CREATED and not found.is_leaving:
            if found.role is Role.MANAGER:
                await self._chip.power_on(progress)
            if supervisor.state is State.CREATED:
                self._stack.nursery.start_soon(supervisor.run)
                await self._stack.until(lambda: supervisor.state is not State.CREATED)
            await self._until_ready(progress, found)
        elif not supervisor.unpause() and supervisor.state is not State.RUNNING:
            raise _cannot(f"unpause {found.name}", f"it is {found.shown_state}")

    async def stop_all(self, progress: Progress) -> None:
        """Stop every domain, guests first, and then the chip; nothing may be created meanwhile."""
        self._is_stopping = True
        drain_s = self._stack.settings.supervisor.drain_s
        for role in STOP_ORDER:
            domains = self._stack.of_role(role)
            if domains:
                await progress(f"stopping {', '.join(domain.name for domain in domains)}")
            async with trio.open_nursery() as nursery:
                for domain in domains:
                    nursery.start_soon(partial(self._end, domain, drain_s=drain_s))
        await progress("switching the hardware TPM off")
        await self._chip.power_off()

    def _supervised(self, name: str) -> Domain:
        domain = self._stack.find(name)
        if domain.external is not None:
            why = "its process was not started by the launcher"
            raise _cannot(f"do this with {domain.name}", why, "End the process itself")
        return domain

    # -- ends ------------------------------------------------------------------------------------

    async def _end(self, domain: Domain, *, drain_s: float) -> None:
        """End a domain for good: process, record, directory. Several may ask at once."""
        domain.is_leaving = True
        if domain.external is None:
            supervisor = domain.supervisor
            if supervisor.state is not State.CREATED:
                supervisor.stop(drain_s=drain_s)
                await self._stack.until(lambda: supervisor.state is State.ENDED)
        self._forget(domain)

    def _forget(self, domain: Domain) -> None:
        if self._stack.domains.get(domain.name) is domain:
            del self._stack.domains[domain.name]
            self._stack.registry.remove(domain.name)
            remove_directory(self._stack.places, domain.name)
        self._stack.changes.announce()

    async def _forget_when_gone(self, domain: Domain) -> None:
        assert domain.external is not None
        pid, start_time = domain.external
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            self._forget(domain)
            return
        try:
            if is_alive(pid, start_time):
                await trio.lowlevel.wait_readable(handle)
        finally:
            os.close(handle)
        self._forget(domain)


def remove_directory(places: Places, name: str) -> None:
    """Remove the run directory of an ended domain."""
    shutil.rmtree(places.domain(name).directory, ignore_errors=True)


def _cannot(
    what: str,
    why: str,
    next_step: str = "`vtpm list` shows the domains and their states",
    exit_code: ExitCode = ExitCode.FAILED,
) -> Failure:
    return Failure(f"cannot {what}", why=why, next_step=next_step, exit_code=exit_code)
